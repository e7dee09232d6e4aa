"""Swaps after elimination: each pair's gain against trying it out, and where they end."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import lightning_mdc as mdc
from lightning_mdc.errors import CalibrationError, CompensationError, PlanError
from lightning_mdc.importance import exchange
from lightning_mdc.importance.conditional import lost_by_elimination
from lightning_mdc.importance.ridge import RIDGE
from lightning_mdc.models import find_anatomy, unit_channels
from tests.kinds import BASE, images, make, randomised


def problem(channels: int, out: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((400, channels)) @ rng.standard_normal((channels, channels))
    return torch.from_numpy(np.cov(z.T)), torch.from_numpy(rng.standard_normal((out, channels)))


def lost(covariance: Tensor, weight: Tensor, units: int, kept: tuple[int, ...] | list[int]) -> float:
    """By numpy, of the noisy covariance that the criterion has too."""
    noisy = covariance.numpy() + RIDGE * float(covariance.diagonal().mean()) * np.eye(len(covariance))
    some = unit_channels(torch.tensor(sorted(kept)), len(noisy) // units).numpy()
    explained = noisy[:, some] @ np.linalg.solve(noisy[np.ix_(some, some)], noisy[some])
    return float(np.trace(weight.numpy() @ (noisy - explained) @ weight.numpy().T))


def with_pair(kept: list[int], leaves: int, comes: int) -> list[int]:
    return sorted({*kept, comes} - {leaves})


def test_what_every_pair_wins_is_what_trying_it_shows() -> None:
    covariance, weight = problem(12, 5)
    kept = [0, 2, 3, 7, 9]
    noisy = covariance + RIDGE * covariance.diagonal().mean() * torch.eye(12).double()
    step = exchange._Channels(noisy, weight, kept)
    for _ in range(3):  # after exchanges, too
        removed = [unit for unit in range(12) if unit not in step.kept]
        falls = step._falls(torch.tensor(step.kept), torch.tensor(removed))
        before = lost(covariance, weight, 12, step.kept)
        tried = [
            [before - lost(covariance, weight, 12, with_pair(step.kept, u, v)) for v in removed] for u in step.kept
        ]
        np.testing.assert_allclose(falls.numpy(), tried, rtol=1e-6, atol=1e-6 * before)
        assert step.exchange(0)


@pytest.mark.parametrize(("channels", "units", "out"), [(60, 60, 40), (60, 60, 3), (48, 12, 6)])
@pytest.mark.parametrize("seed", [0, 1])
def test_swaps_lower_the_loss_and_end_where_no_pair_does(channels: int, units: int, out: int, seed: int) -> None:
    covariance, weight = problem(channels, out, seed)
    order = lost_by_elimination(covariance, weight, units).argsort(descending=True)
    start, losses = sorted(order[: units // 2].tolist()), []
    for most in range(30):
        kept = exchange.exchanged(covariance, weight, start, units, most)
        assert len(set(kept)) == len(start)
        losses.append(lost(covariance, weight, units, kept))
    ends = exchange.exchanged(covariance, weight, start, units, 10_000)
    losses.append(lost(covariance, weight, units, ends))
    assert losses == sorted(losses, reverse=True)
    removed = [unit for unit in range(units) if unit not in ends]
    pairs = itertools.islice(itertools.product(ends, removed), 0, None, 7)  # some of them
    tried = [lost(covariance, weight, units, with_pair(list(ends), *pair)) for pair in pairs]
    assert min(tried) >= losses[-1] * (1 - 1e-6)


def test_a_bad_choice_becomes_a_better_one_and_the_best_stays() -> None:
    """Channels 0 to 2 are all that is read."""
    weight = torch.zeros(2, 8).double()
    weight[0, 0] = weight[1, 1] = weight[0, 2] = 1
    for kept in ([5, 6, 7], [0, 6, 7], [0, 1, 2]):
        assert exchange.exchanged(torch.eye(8).double(), weight, kept, 8, 10) == (0, 1, 2)
    assert exchange.exchanged(torch.eye(8).double(), weight, [5, 6, 7], 8, 1) != (0, 1, 2)


@pytest.mark.parametrize("kept", [[], [0, 1, 2, 3]])
def test_where_nothing_can_be_exchanged_nothing_is(kept: list[int]) -> None:
    assert exchange.exchanged(torch.eye(4).double(), torch.ones(2, 4).double(), kept, 4, 5) == tuple(kept)
    assert exchange.exchanged(torch.zeros(4, 4).double(), torch.ones(2, 4).double(), [1], 4, 5) == (1,)


def test_plans_with_swaps_lose_less_in_every_layer() -> None:
    model, policy = make(), mdc.Policy(heads=[0.5, 1, 0.5, 0.25], neurons=[0.1, 0.1, 0.1, 1.0])
    scores = mdc.score(model, [images(32)], "activation", moments=True, progress=False)
    plain, swapped = (mdc.make_plan(model, scores, policy, swaps=most) for most in (0, 20))
    assert swapped.neurons != plain.neurons
    fell = []
    for units in find_anatomy(model).all_units:
        before, after = (plan.kept[units.dimension][units.block] for plan in (plain, swapped))
        assert len(after) == len(before)
        assert scores.moments is not None
        covariance, weight = scores.moments.of(units).covariance(), units.reader.weight.detach().double()
        losses = [lost(covariance, weight, units.count, kept) for kept in (before, after)]
        assert losses[1] <= losses[0]
        fell.append(losses[1] < 0.99 * losses[0])
    assert any(fell)
    assert mdc.Plan.from_json(swapped.to_json()) == swapped


def test_swaps_that_cannot_be_are_refused() -> None:
    model = make()
    scores = mdc.score(model, [images(8)], "activation", progress=False)
    with pytest.raises(CalibrationError, match=r"swaps=3: scores have no moments of the neurons; .*moments=True"):
        mdc.make_plan(model, scores, mdc.Policy(neurons=0.5), swaps=3)
    assert mdc.make_plan(model, scores, mdc.Policy(tokens=0.5), swaps=3)
    with pytest.raises(PlanError, match="swaps=-1"):
        mdc.make_plan(model, scores, mdc.Policy(neurons=0.5), swaps=-1)


def test_moments_of_another_model_are_refused() -> None:
    model, other = make(), randomised(VisionTransformer(**BASE | {"mlp_ratio": 2}))
    scores = mdc.score(model, [images(8)], "activation", progress=False)
    of_other = mdc.score(other, [images(8)], "activation", moments=True, progress=False)
    with pytest.raises(CompensationError, match=r"moments are of another model: its layers read"):
        mdc.make_plan(model, scores.with_moments(of_other.moments), mdc.Policy(neurons=0.5), swaps=3)
