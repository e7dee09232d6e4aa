"""Policies under which layers lose least: without a trial, by what moments of the dense model tell.

How much of its output's variance a layer loses if only its k best units stay, and it is refitted to them, is known for
all k from one Cholesky factor. Of all policies on the budget, the one with the smallest sum of these shares is found by
Lagrange's multiplier: at a price per unit of cost every axis decides for itself, and the price is raised until all
together are on the budget (Everett, "Generalized Lagrange Multiplier Method", Operations Research 1963).

It is blind to what losses do to each other, and to what tokens are worth: a place to begin a search from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_mdc.gp_ei.projection import Projection
from lightning_mdc.importance import Scores
from lightning_mdc.importance.moments import Moments
from lightning_mdc.importance.ridge import RIDGE, ridge_cholesky
from lightning_mdc.models import Units, unit_channels
from lightning_mdc.policy import TOKENS, UNIT_DIMENSIONS
from lightning_mdc.policy_search.policy_space import PolicySpace

_HALVINGS = 60  # of the range of prices, from far too low to far too high
_PRICES = (1e-9, 1e9)  # share of a layer's variance for the whole budget


def least_loss_points(space: PolicySpace, scores: Scores) -> np.ndarray:
    """Points (n, axes) on the budget: one with all tokens, and some with fewer; none without moments of the units."""
    curves = None if scores.moments is None else _curves(space, scores, scores.moments)
    found = [] if curves is None else [least(space, curves, ratio) for ratio in _token_ratios(space)]
    points = np.array([point for point in found if point is not None]).reshape(-1, len(space))
    # What one unit more would be too much for, leaves room for others.
    return Projection(space, space.constraint).fill(points, np.random.default_rng(0)) if len(points) else points


def lost_shares(covariance: Tensor, weight: Tensor, order: Sequence[int], width: int) -> np.ndarray:
    """Share of the variance of ``y = W z`` that is lost if the first k units of `order` stay, refitted: (units + 1,).

    Args:
        covariance: of the channels z, (channels, channels) float64; each unit owns `width` in a row.
        weight: W, (out, channels) float64.
        order: all units, the best first.
    """
    channels = unit_channels(torch.tensor(order), width)
    noise = RIDGE * float(covariance.diagonal().mean())
    if not noise > 0:  # nothing varies
        return np.zeros(len(order) + 1)
    factor = ridge_cholesky(covariance[channels][:, channels], noise)
    explained = (weight[:, channels] @ factor).square().sum(dim=0).view(len(order), width).sum(dim=1).cumsum(dim=0)
    total = float(explained[-1])
    return np.concatenate([[1.0], 1 - (explained / total).numpy()]) if total > 0 else np.zeros(len(order) + 1)


def _curves(space: PolicySpace, scores: Scores, moments: Moments) -> dict[str, list[np.ndarray]] | None:
    """By dimension, `lost_shares` of each block; zeros where nothing is searched."""
    curves = {}
    for name in UNIT_DIMENSIONS:
        curves[name] = [np.zeros(size + 1) for size in space.grid.sizes[name]]
        for units in space.anatomy.units(name) if name in space.dimensions else ():
            if units is None or not units.count:
                continue
            if moments.of(units) is None:
                return None
            curves[name][units.block] = _of_units(units, scores, moments)
    return curves


def _of_units(units: Units, scores: Scores, moments: Moments) -> np.ndarray:
    layer = moments.of(units)
    assert layer is not None
    order = torch.argsort(scores.units(units.dimension)[units.block].double().cpu(), descending=True, stable=True)
    weight = units.reader.weight.detach().cpu().double()
    return lost_shares(layer.covariance().cpu(), weight, order.tolist(), units.width)


def _token_ratios(space: PolicySpace) -> Iterator[float]:
    """All tokens, as many as the uniform policy has, and what is in the middle."""
    yield 1.0
    if TOKENS in space.dimensions:
        uniform = min(space.uniform.ratios[TOKENS])
        yield from (uniform, (1 + uniform) / 2)


def least(space: PolicySpace, curves: Mapping[str, Sequence[np.ndarray]], tokens: float = 1.0) -> np.ndarray | None:
    """A point (axes,) within the budget, with such a share of tokens at each stage, at which layers lose less than at
    any that costs no more; None if none is within the budget.

    Args:
        curves: by dimension, what a layer loses if so many units stay, (units + 1,) for each block.
    """
    is_of_tokens = np.array([axis.name.split(".")[0] == TOKENS for axis in space.axes])
    most = np.where(is_of_tokens, np.clip(tokens, space.low, space.high), space.high)
    values = [
        np.array([most[number]])
        if is_of_tokens[number]
        else np.append(np.arange(axis.low, axis.high - axis.step / 2, axis.step), axis.high)
        for number, axis in enumerate(space.axes)
    ]
    alone = np.tile(most, (sum(map(len, values)), 1))  # each value of each axis, the others at their most
    axis_of = np.repeat(np.arange(len(values)), [len(each) for each in values])
    alone[np.arange(len(alone)), axis_of] = np.concatenate(values)
    alone = space.snap(alone)
    losses, costs = losses_at(space, curves, alone), space.utilisation(alone)
    begins = np.searchsorted(axis_of, np.arange(len(values)))

    def at(price: float) -> np.ndarray:
        worth = losses + price * costs
        point = most.copy()
        for axis, (begin, each) in enumerate(zip(begins, values, strict=True)):
            chosen = begin + int(worth[begin : begin + len(each)].argmin())
            point[axis] = alone[chosen, axis]
        return space.snap(point[None])

    low, high = np.log(_PRICES)
    if not space.constraint.holds(space.utilisation(at(float(np.exp(high)))))[0]:
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if space.constraint.holds(space.utilisation(at(float(np.exp(middle)))))[0]:
            high = middle
        else:
            low = middle
    return at(float(np.exp(high)))[0]


def losses_at(space: PolicySpace, curves: Mapping[str, Sequence[np.ndarray]], points: np.ndarray) -> np.ndarray:
    """Sum of the shares that layers lose at points (n, axes): (n,)."""
    counts = space.counts(points)
    lost = (
        curve[counts[name][:, block].astype(int)]
        for name, of_blocks in curves.items()
        for block, curve in enumerate(of_blocks)
    )
    return np.sum(list(lost), axis=0)
