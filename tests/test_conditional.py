"""Conditional dependence: the units' order and losses against numpy, subset by subset."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import lightning_mdc as mdc
from lightning_mdc.importance import ConditionalDependence, conditional
from lightning_mdc.importance.conditional import lost_by_elimination
from lightning_mdc.importance.ridge import RIDGE
from lightning_mdc.models import find_anatomy
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


# The last two have more units than leave at once; with few outputs, what leaves makes others worth less.
@pytest.mark.parametrize(
    ("channels", "units", "out"), [(14, 14, 6), (15, 5, 6), (24, 6, 30), (8, 1, 6), (90, 90, 60), (100, 100, 8)]
)
def test_units_leave_in_the_order_and_at_the_cost_that_trying_all_finds(channels: int, units: int, out: int) -> None:
    covariance, weight = problem(channels, out)
    found = lost_by_elimination(torch.from_numpy(covariance), torch.from_numpy(weight), units)
    np.testing.assert_allclose(found.numpy(), eliminated(covariance, weight, units), rtol=1e-8)


@pytest.mark.parametrize("out", [4, 40])
def test_hundreds_of_units_leave_in_the_order_of_the_plain_loop(out: int) -> None:
    """As units, one after another, and as channels, many at once."""
    covariance, weight = map(torch.from_numpy, problem(300, out, seed=2))
    precision = torch.linalg.inv(covariance + RIDGE * covariance.diagonal().mean() * torch.eye(300))
    one_by_one, at_once = (way(precision.clone(), weight, 300) for way in (conditional._units, conditional._channels))
    assert torch.equal(one_by_one[0], at_once[0])
    torch.testing.assert_close(one_by_one[1], at_once[1], rtol=1e-7, atol=1e-9)


def test_of_equal_units_the_first_leaves_first() -> None:
    order = conditional._channels(torch.eye(100).double(), torch.eye(100).double(), 100)[0]
    assert order.tolist() == list(range(100))
    order = conditional._units(torch.eye(12).double(), torch.eye(12).double(), 4)[0]
    assert order.tolist() == list(range(4))


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
    units = find_anatomy(model).blocks[1].units["neurons"]
    z = reads(model, 1, batches)
    expected = eliminated(np.cov(z.T, bias=True), units.reader.weight.detach().double().numpy(), units.count)
    np.testing.assert_allclose(scores.neurons[1].numpy(), expected, rtol=1e-3)
    raw = mdc.score(model, batches, mdc.HSIC(hsic_weight=1, activation_weight=0))
    for mine, theirs in zip(scores.tokens, raw.tokens, strict=True):
        torch.testing.assert_close(mine, theirs)


def reads(model: nn.Module, block: int, batches: list[torch.Tensor]) -> Array:
    """What the layer that reads a block's neurons is given, (rows, neurons) in float64."""
    seen: list[torch.Tensor] = []
    reader = find_anatomy(model).blocks[block].units["neurons"].reader
    handle = reader.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(seen).double().flatten(0, 1).numpy()


def test_channels_far_from_0_keep_their_variance() -> None:
    """Mean 1000, standard deviation about 0.5: fp32 has seven digits, and their squares need more."""
    torch.manual_seed(0)
    model = VisionTransformer(**BASE, mlp_ratio=0.5).eval()
    mlp = model.blocks[1].mlp
    with torch.no_grad():
        mlp.fc1.weight *= 0.5 / mlp.fc1.weight.norm(dim=1, keepdim=True)
        mlp.fc1.bias.fill_(1000)
    batches = [images(12, seed=1), images(12, seed=2)]
    scores = mdc.score(model, batches, dimensions=("neurons",), progress=False)
    z, weight = reads(model, 1, batches), mlp.fc2.weight.detach().double().numpy()
    covariance = np.cov(z.T, bias=True)
    assert 0.3 < np.sqrt(covariance.diagonal()).mean() < 0.7
    np.testing.assert_allclose(scores.neurons[1].numpy(), eliminated(covariance, weight, len(covariance)), rtol=1e-2)
    plan = mdc.make_plan(model, scores, mdc.Policy(neurons=0.5))
    kept = list(plan.neurons[1])
    slim = mdc.slim(model, plan, "lstsq", moments=scores.moments)
    ridge = RIDGE * covariance.diagonal().mean() * np.eye(len(kept))
    lost = np.setdiff1d(np.arange(len(covariance)), kept)
    update = np.linalg.solve(covariance[np.ix_(kept, kept)] + ridge, covariance[np.ix_(kept, lost)] @ weight[:, lost].T)
    found = slim.blocks[1].mlp.fc2.weight.detach().numpy()
    np.testing.assert_allclose(found, weight[:, kept] + update.T, atol=1e-2 * np.abs(update).max())


def test_kept_units_rebuild_the_layer_better_than_those_of_other_criteria() -> None:
    """What the scores promise is what least squares delivers."""
    model, batches = make(), [images(32, seed=3), images(32, seed=4)]
    policy = mdc.Policy(neurons=0.25)

    def error(criterion: str) -> float:
        scores = mdc.score(model, batches, criterion, moments=True, progress=False)
        slim = mdc.slim(model, mdc.make_plan(model, scores, policy), "lstsq", moments=scores.moments)
        outputs: list[torch.Tensor] = []
        handles = [
            find_anatomy(m).blocks[0].module.register_forward_hook(lambda module, args, output: outputs.append(output))
            for m in (model, slim)
        ]
        with torch.no_grad():
            model(batches[0]), slim(batches[0])
        for handle in handles:
            handle.remove()
        return float((outputs[0] - outputs[1]).square().mean())

    assert error("conditional") < min(error("random"), error("magnitude"), error("activation"))
