"""Conditional dependence: the units' order and losses against numpy, subset by subset."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer

import lightning_mdc as mdc
from lightning_mdc.importance import ConditionalDependence
from lightning_mdc.importance.conditional import lost_by_elimination
from lightning_mdc.importance.ridge import RIDGE
from lightning_mdc.models import find_sites
from tests.kinds import BASE, images, make

Array = NDArray[np.float64]


def unexplained(covariance: Array, weight: Array, kept: list[int]) -> float:
    """Variance of ``weight @ z`` that the best linear estimate from the kept channels leaves."""
    some = covariance[:, kept] @ np.linalg.solve(covariance[np.ix_(kept, kept)], covariance[kept]) if kept else 0
    return float(np.trace(weight @ (covariance - some) @ weight.T))


def eliminated(covariance: Array, weight: Array, units: int) -> Array:
    """Every candidate tried at every step; what is lost by then, of all."""
    covariance = covariance + RIDGE * covariance.diagonal().mean() * np.eye(len(covariance))
    width = len(covariance) // units
    left, lost = list(range(units)), np.zeros(units)

    def channels(some: list[int]) -> list[int]:
        return [unit * width + i for unit in some for i in range(width)]

    while left:
        costs = [unexplained(covariance, weight, channels([u for u in left if u != unit])) for unit in left]
        lost[left.pop(int(np.argmin(costs)))] = min(costs)
    return lost / unexplained(covariance, weight, [])


def problem(channels: int, out: int, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((400, channels)) @ rng.standard_normal((channels, channels))
    return np.cov(z.T), rng.standard_normal((out, channels))


# The last has more units than are followed at a time.
@pytest.mark.parametrize(("channels", "units", "out"), [(14, 14, 6), (15, 5, 6), (8, 1, 6), (90, 90, 60)])
def test_units_leave_in_the_order_and_at_the_cost_that_trying_all_finds(channels: int, units: int, out: int) -> None:
    covariance, weight = problem(channels, out)
    found = lost_by_elimination(torch.from_numpy(covariance), torch.from_numpy(weight), units)
    np.testing.assert_allclose(found.numpy(), eliminated(covariance, weight, units), rtol=1e-8)


def test_a_copy_is_worth_nothing_and_what_only_one_says_is_kept() -> None:
    rng = np.random.default_rng(1)
    z = rng.standard_normal((500, 3))
    z = np.column_stack([z[:, 0], z[:, 0], 0.3 * z[:, 1]])  # loud, its copy, quiet
    covariance, weight = torch.from_numpy(np.cov(z.T)), torch.eye(3, dtype=torch.float64)
    found = lost_by_elimination(covariance, weight, 3)
    assert sorted(found[:2].tolist())[0] < 1e-3  # one of the two leaves first, at no cost
    assert found[2] > 0.02


def test_nothing_varies() -> None:
    assert (lost_by_elimination(torch.zeros(4, 4).double(), torch.ones(2, 4).double(), 4) == 0).all()


def test_scores_of_a_model_are_of_what_its_layers_read() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(**BASE, mlp_ratio=0.5).eval()  # few neurons, and numpy tries them all
    batches = [images(12, seed=1), images(12, seed=2)]
    scores = mdc.score(model, batches, ConditionalDependence())
    assert scores.criterion == "conditional"
    site = find_sites(model).blocks[1].neurons
    assert site is not None
    seen: list[torch.Tensor] = []
    handle = site.consumer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    z = torch.cat(seen).double().flatten(0, 1).numpy()
    expected = eliminated(np.cov(z.T, bias=True), site.consumer.weight.detach().double().numpy(), site.num_units)
    np.testing.assert_allclose(scores.neurons[1].numpy(), expected, rtol=1e-3)
    raw = mdc.score(model, batches, mdc.HSIC(hsic_weight=1, activation_weight=0))
    for mine, theirs in zip(scores.tokens, raw.tokens, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_kept_units_rebuild_the_layer_better_than_those_of_other_criteria() -> None:
    """What the scores promise is what least squares delivers."""
    model, batches = make(), [images(32, seed=3), images(32, seed=4)]
    policy = mdc.Policy(neurons=0.25)
    statistics = mdc.ActivationStatistics.of(model, batches, progress=False)

    def error(criterion: str) -> float:
        plan = mdc.make_plan(model, mdc.score(model, batches, criterion, progress=False), policy)
        slim = mdc.slim(model, plan, compensate="lstsq", statistics=statistics)
        outputs: list[torch.Tensor] = []
        handles = [
            find_sites(m).blocks[0].module.register_forward_hook(lambda module, args, output: outputs.append(output))
            for m in (model, slim)
        ]
        with torch.no_grad():
            model(batches[0]), slim(batches[0])
        for handle in handles:
            handle.remove()
        return float((outputs[0] - outputs[1]).square().mean())

    assert error("conditional") < min(error("random"), error("magnitude"), error("activation"))
