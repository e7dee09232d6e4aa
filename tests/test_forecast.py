"""Policies under which layers lose least: against ridge regression in numpy, and against trying all policies."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import lightning_mdc as mdc
from lightning_mdc.importance.ridge import RIDGE
from lightning_mdc.models import find_anatomy
from lightning_mdc.policy_search.forecast import Forecast, lost_shares
from lightning_mdc.policy_search.policy_space import PolicySpace
from tests.kinds import BASE, images, make, randomised


def best_points(space: PolicySpace, scores: mdc.Scores) -> np.ndarray:
    forecast = Forecast.by_moments(space, scores)
    assert forecast is not None
    return forecast.best_points()


@pytest.mark.parametrize(("units", "width"), [(6, 1), (3, 2), (1, 4)])
def test_shares_are_what_ridge_regression_leaves(units: int, width: int) -> None:
    rng = np.random.default_rng(0)
    z = rng.standard_normal((500, units * width)) @ rng.standard_normal((units * width, units * width))
    weight, order = rng.standard_normal((5, units * width)), rng.permutation(units)
    covariance = np.cov(z.T, bias=True)
    shares = lost_shares(torch.from_numpy(covariance), torch.from_numpy(weight), torch.from_numpy(order), width)
    noisy = covariance + RIDGE * covariance.diagonal().mean() * np.eye(len(covariance))
    total = np.trace(weight @ noisy @ weight.T)
    for k in range(units + 1):
        kept = [unit * width + channel for unit in order[:k] for channel in range(width)]
        reads = noisy[:, kept] @ np.linalg.pinv(noisy[np.ix_(kept, kept)]) @ noisy[kept]
        assert shares[k] == pytest.approx(np.trace(weight @ (noisy - reads) @ weight.T) / total, abs=1e-9)


def test_nothing_is_lost_where_nothing_varies() -> None:
    assert lost_shares(torch.zeros(4, 4).double(), torch.ones(2, 4).double(), torch.arange(4), 1).tolist() == [0] * 5
    assert lost_shares(torch.eye(2).double(), torch.zeros(3, 2).double(), torch.tensor([1, 0]), 1).tolist() == [0] * 3


def test_they_are_the_scores_of_the_criterion_that_eliminates() -> None:
    model = make()
    scores = mdc.score(model, [images(32)], "conditional", progress=False)
    assert scores.moments is not None
    for units in find_anatomy(model).all_units:
        own = scores.units(units.dimension)[units.block].double()
        layer = scores.moments.of(units)
        assert layer is not None
        order = own.argsort(descending=True)
        shares = lost_shares(layer.covariance(), units.reader.weight.detach().double(), order, units.width)
        np.testing.assert_allclose(shares[:-1][::-1], np.sort(own.numpy()), rtol=1e-3, atol=1e-6)


def test_no_policy_that_costs_no_more_loses_less() -> None:
    small = {"depth": 2, "embed_dim": 16, "num_heads": 4, "mlp_ratio": 1}
    space = PolicySpace(randomised(VisionTransformer(**BASE | small)), 0.75, ("heads", "neurons"))
    rng = np.random.default_rng(0)
    curves = {
        name: [np.append(1, 1 - rng.random(size).cumsum() / size) for size in sizes]
        for name, sizes in space.grid.sizes.items()
    }
    forecast = Forecast(space, curves)
    found = forecast.least(np.ones(len(space)))
    assert found is not None
    steps = [np.arange(axis.low, axis.high + 1e-9, axis.step) for axis in space.axes]
    every = space.snap(np.array(list(itertools.product(*steps))))
    cost = space.utilisation(found[None])[0]
    assert cost <= 1
    losses = forecast.losses(every).sum(axis=1)[space.utilisation(every) <= cost]
    assert len(losses) > 100
    assert forecast.losses(found[None]).sum() == pytest.approx(losses.min())


def test_points_are_on_the_budget_with_all_tokens_and_with_fewer() -> None:
    model = make()
    scores = mdc.score(model, [images(16)], progress=False)
    space = PolicySpace(model, 0.6)
    points = best_points(space, scores)
    used = space.utilisation(points)
    assert ((used <= 1) & (used > 0.99)).all()
    tokens = [min(space.policy(point).ratios["tokens"]) for point in points]
    assert tokens[0] == 1
    assert tokens[1] < tokens[2] < 1
    assert space.policy(points[0]).ratios["neurons"] != (space.policy(points[0]).ratios["neurons"][0],) * 4


def test_where_nothing_is_known_of_layers_there_are_none() -> None:
    model = make()
    space = PolicySpace(model, 0.6)
    assert Forecast.by_moments(space, mdc.score(model, [images(8)], "activation", progress=False)) is None
    of_heads = mdc.score(model, [images(8)], dimensions=["heads"], progress=False)
    assert Forecast.by_moments(space, of_heads) is None
    of_tokens = PolicySpace(model, 0.8, ("tokens",))
    assert Forecast.by_moments(of_tokens, mdc.score(model, [images(8)], progress=False)) is None


def test_a_budget_that_needs_fewer_tokens_begins_with_fewer() -> None:
    model = make()
    scores = mdc.score(model, [images(8)], progress=False)
    space = PolicySpace(model, 0.75, ("tokens", "heads"), mdc.Space(min_heads=3))
    points = best_points(space, scores)
    assert len(points)
    assert all(min(space.policy(point).ratios["tokens"]) < 1 for point in points)


def test_a_search_begins_with_them() -> None:
    model = make()
    scores = mdc.score(model, [images(16)], progress=False)
    judge = mdc.HeldOut([images(8)], "kl", dense=model)
    options = mdc.SearchOptions(progress=False)
    result = mdc.search(model, scores, judge, 0.6, n_trials=4, compensate="lstsq", options=options)
    assert result.space is not None
    expected = [result.space.policy(point) for point in best_points(result.space, scores)]
    assert [trial.policy for trial in result.history[1:]] == expected
    plain = mdc.search(model, scores, judge, 0.6, n_trials=2, options=options)  # nothing is refitted
    assert plain.history[1].policy not in expected
