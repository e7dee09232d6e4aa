"""What moments of the dense model tell of policies before any is tried.

How much of its output's variance a layer loses if only its k best units stay, and it is refitted to them, is known for
all k from one Cholesky factor. Of all policies on the budget, the one with the smallest sum of these shares is found by
Lagrange's multiplier: at a price per unit of cost every axis decides for itself, and the price is raised until all
together are on the budget (Everett, "Generalized Lagrange Multiplier Method", Operations Research 1963).

That is blind to what losses do to each other, and to what tokens are worth: a search begins with these policies, and
learns what the sums do not explain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lightning_mdc.gp_ei.projection import Projection
from lightning_mdc.importance import Scores
from lightning_mdc.importance.ridge import RIDGE, ridge_cholesky
from lightning_mdc.models import unit_channels
from lightning_mdc.policy import TOKENS, UNIT_DIMENSIONS
from lightning_mdc.policy_search.policy_space import PolicySpace

_HALVINGS = 60  # of the range of prices, from far too low to far too high
_PRICES = (1e-9, 1e9)  # shares of a layer's variance for the whole budget

Curves = Mapping[str, Sequence[np.ndarray]]


class Forecast:
    """What layers will lose at the points of a space.

    Args:
        space: of the policies.
        curves: by dimension, what a layer loses if so many units stay, (units + 1,) for each block; see `lost_shares`.
    """

    def __init__(self, space: PolicySpace, curves: Curves) -> None:
        self.space, self.curves = space, curves
        self._is_of_tokens = np.array([axis.name.split(".")[0] == TOKENS for axis in space.axes])

    @classmethod
    def by_moments(cls, space: PolicySpace, scores: Scores) -> Forecast | None:
        """By the moments of scores; None if they have none of all that is searched."""
        if scores.moments is None:
            return None
        curves: dict[str, list[np.ndarray]] = {}
        for name in UNIT_DIMENSIONS:
            if name not in space.dimensions:
                continue
            curves[name] = [np.zeros(size + 1) for size in space.grid.sizes[name]]
            for units in filter(None, space.anatomy.units(name)):
                if not units.count:
                    continue
                layer = scores.moments.of(units)
                if layer is None:
                    return None
                order = torch.argsort(scores.units(name)[units.block].double().cpu(), descending=True, stable=True)
                weight = units.reader.weight.detach().cpu().double()
                curves[name][units.block] = lost_shares(layer.covariance().cpu(), weight, order, units.width)
        return cls(space, curves) if curves else None

    def losses(self, points: np.ndarray) -> np.ndarray:
        """Sums of the shares that layers lose at points (n, axes): (n, dimensions of units)."""
        counts = self.space.counts(points)
        return np.stack(
            [
                np.sum([curve[counts[name][:, block].astype(int)] for block, curve in enumerate(of_blocks)], axis=0)
                for name, of_blocks in self.curves.items()
            ],
            axis=1,
        )

    def features(self, points: np.ndarray) -> np.ndarray:
        """What the worth of points (n, axes) may follow: what layers lose, by dimension, and the share of tokens that
        leave, where any may."""
        leaving = 1 - points[:, self._is_of_tokens].mean(axis=1, keepdims=True) if self._is_of_tokens.any() else None
        return np.concatenate([self.losses(points), *([] if leaving is None else [leaving])], axis=1)

    def best_points(self) -> np.ndarray:
        """Points (n, axes) on the budget at which layers lose least: one with all tokens, and some with fewer."""
        space = self.space
        # All tokens, as many as the uniform policy has, and what is in the middle.
        uniform = np.where(self._is_of_tokens, space.nearest(space.uniform), 1.0)
        found = (self.least(shares) for shares in (np.ones(len(space)), uniform, (1 + uniform) / 2))
        points = np.array([point for point in found if point is not None]).reshape(-1, len(space))
        points = points[np.sort(np.unique(points, axis=0, return_index=True)[1])]
        if not len(points):
            return points
        # What one unit more would be too much for, leaves room for others.
        return Projection(space, space.constraint).fill(points, np.random.default_rng(0))

    def least(self, shares: np.ndarray) -> np.ndarray | None:
        """A point (axes,) within the budget, with these shares (axes,) of tokens, at which layers lose less than at any
        that costs no more; None if none is within the budget. That is so where costs add up over the axes, as MACs and
        parameters do; under other budgets it is near that."""
        space = self.space
        most = np.where(self._is_of_tokens, np.clip(shares, space.low, space.high), space.high)
        values = [
            np.array([most[number]])
            if self._is_of_tokens[number]
            else np.append(np.arange(axis.low, axis.high - axis.step / 2, axis.step), axis.high)
            for number, axis in enumerate(space.axes)
        ]
        begins = np.cumsum([0, *map(len, values)])
        alone = np.tile(most, (begins[-1], 1))  # each value of each axis, the others at their most
        for axis, each in enumerate(values):
            alone[begins[axis] : begins[axis + 1], axis] = each
        alone = space.snap(alone)
        losses, costs = self.losses(alone).sum(axis=1), space.utilisation(alone)

        def at(log_price: float) -> np.ndarray:
            worth = losses + np.exp(log_price) * costs
            chosen = [begin + worth[begin:end].argmin() for begin, end in pairwise(begins)]
            return space.snap(alone[chosen, np.arange(len(space))][None])

        def is_affordable(log_price: float) -> bool:
            return bool(space.constraint.holds(space.utilisation(at(log_price)))[0])

        low, high = np.log(_PRICES)
        if not is_affordable(high):
            return None
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if is_affordable(middle) else (middle, high)
        return at(high)[0]


def lost_shares(covariance: Tensor, weight: Tensor, order: Tensor, width: int) -> np.ndarray:
    """Share of the variance of ``y = W z`` that is lost if the first k units of `order` stay, refitted: (units + 1,).

    Args:
        covariance: of the channels z, (channels, channels) float64; each unit owns `width` in a row.
        weight: W, (out, channels) float64.
        order: all units, the best first: (units,) int64.
    """
    channels = unit_channels(order, width)
    noise = RIDGE * float(covariance.diagonal().mean())
    if not noise > 0:  # nothing varies
        return np.zeros(len(order) + 1)
    factor = ridge_cholesky(covariance[channels][:, channels], noise)
    # What the first channels explain is what the first columns of ``W L`` have, for S = L L^T.
    explained = (weight[:, channels] @ factor).square().sum(dim=0).view(len(order), width).sum(dim=1).cumsum(dim=0)
    total = float(explained[-1])
    return np.concatenate([[1.0], 1 - (explained / total).numpy()]) if total > 0 else np.zeros(len(order) + 1)
