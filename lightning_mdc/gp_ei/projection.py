"""Puts points onto a budget: shifted until they cost what they may, then filled up unit by unit.

Rejection would be hopeless: where 0.3 % of the space costs what it may, nearly all that is drawn is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lightning_mdc.errors import BudgetError
from lightning_mdc.gp_ei.space import Space

# Halvings of the shift; 2 / 2^20 is finer than one neuron of the largest model.
_HALVINGS = 20
_PROBES = 8


@dataclass(frozen=True)
class Constraint:
    """What a point may cost.

    Attributes:
        cost: points (n, axes) -> costs (n,), vectorised; along an axis it must not go up and down.
        target: the most a point may cost.
        tolerance: how far below the target it may stay; None: as far as whole units leave it.
    """

    cost: Callable[[np.ndarray], np.ndarray]
    target: float
    tolerance: float | None = None

    def holds(self, costs: np.ndarray) -> np.ndarray:
        """(n,) costs -> (n,) bool."""
        enough = costs >= self.target - self.tolerance if self.tolerance is not None else True
        return (costs <= self.target) & enough


class Projection:
    """Moves points of one space onto one constraint.

    Raises:
        BudgetError: no point of the space costs as little as it must; says what the cheapest costs.
    """

    def __init__(self, space: Space, constraint: Constraint, seed: int = 0) -> None:
        self.space, self.constraint = space, constraint
        self.slope = self._slope(np.random.default_rng(seed))
        self._check_reachable()

    def __call__(self, unit: np.ndarray) -> np.ndarray:
        """(n, axes) in [0, 1] -> snapped points (n, axes), all coordinates that cost something shifted by one scalar.

        A point whose choices alone cost too much stays too expensive: ask `Constraint.holds`.
        """

        def shifted(by: np.ndarray) -> np.ndarray:
            return self._shifted(unit, by[:, None] * self.slope)

        dearest = np.ones(len(unit))
        always = self._cost(shifted(dearest)) <= self.constraint.target  # whichever way it is shifted
        return shifted(np.where(always, dearest, self._most(shifted, -dearest, dearest)))

    def fill(self, points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Points (n, axes) with units added while another one fits.

        All axes with room rise together as far as they can; those of which one unit more is too much (a head, mostly)
        drop out; until none is left. Axes without steps then take up what is left, one after the other.
        """
        points, space = points.copy(), self.space
        stepped = (space.step > 0) & (self.slope != 0)
        axes = np.flatnonzero(stepped)
        free = np.tile(self.slope != 0, (len(points), 1))
        # Priority among axes of which each fits, but not all together.
        order = rng.random((len(points), len(axes)))
        while True:
            raised = np.repeat(points[:, None], len(axes), axis=1)  # (n, stepped axes, axes): one unit more of each
            raised[:, np.arange(len(axes)), axes] += self.slope[axes] * space.step[axes] * (1 + 1e-9)
            raised = space.snap(raised.reshape(-1, len(space))).reshape(raised.shape)
            moved = (raised != points[:, None]).any(axis=2)
            costs = self._cost(raised.reshape(-1, len(space))).reshape(moved.shape)
            fits = moved & (costs <= self.constraint.target) & free[:, axes]
            free[:, axes] = fits
            shifted = self._shift_free(points, free)
            stuck = fits.any(axis=1) & (shifted == points).all(axis=1)
            if stuck.any():
                first = np.where(fits, order, -1.0).argmax(axis=1)
                shifted[stuck] = raised[np.arange(len(points)), first][stuck]
            points = shifted
            if not fits.any():
                break
        # Without steps of its own, an axis stops the others where a snap of the app's makes one of it: each by itself.
        for axis in rng.permutation(np.flatnonzero((space.step == 0) & (self.slope != 0))):
            points = self._shift_free(points, np.tile(np.arange(len(space)) == axis, (len(points), 1)))
        return points

    def _shift_free(self, points: np.ndarray, free: np.ndarray) -> np.ndarray:
        unit, slope = self.space.to_unit(points), free * self.slope

        def shifted(by: np.ndarray) -> np.ndarray:
            # Never below where it stood: a way through [0, 1] and back may round down.
            there = self._shifted(unit, by[:, None] * slope)
            there = np.where(self.slope >= 0, np.maximum(there, points), np.minimum(there, points))
            return np.where(free & (by > 0)[:, None], there, points)

        return shifted(self._most(shifted, np.zeros(len(points)), np.ones(len(points))))

    def _most(self, shifted: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """By how much, (n,) between low and high, each point can be shifted and still cost what it may; else low."""
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            fits = self._cost(shifted(middle)) <= self.constraint.target
            low, high = np.where(fits, middle, low), np.where(fits, high, middle)
        return low

    def _shifted(self, unit: np.ndarray, shift: np.ndarray) -> np.ndarray:
        return self.space.snap(self.space.from_unit(np.clip(unit + shift, 0.0, 1.0)))

    def _cost(self, points: np.ndarray) -> np.ndarray:
        return np.asarray(self.constraint.cost(points), dtype=np.float64)

    def _slope(self, rng: np.random.Generator) -> np.ndarray:
        """(axes,): +1 where more costs more, -1 where more costs less, 0 where it costs nothing or has no order."""
        space = self.space
        unit = rng.random((_PROBES, len(space)))
        low = np.repeat(unit[:, None], len(space), axis=1)  # (probes, axis that is moved, axes)
        high = low.copy()
        axes = np.arange(len(space))
        low[:, axes, axes], high[:, axes, axes] = 0.0, 1.0
        low_cost, high_cost = (
            self._cost(space.snap(space.from_unit(ends.reshape(-1, len(space))))).reshape(_PROBES, -1)
            for ends in (low, high)
        )
        return np.where(space.numeric, np.sign((high_cost - low_cost).sum(axis=0)), 0.0)

    def _check_reachable(self) -> None:
        rng = np.random.default_rng(0)
        unit = rng.random((256, len(self.space)))  # choices may matter to the cost: try many
        cheapest = self._cost(self._shifted(unit, -2 * self.slope)).min()
        dearest = self._cost(self._shifted(unit, 2 * self.slope)).max()
        target, tolerance = self.constraint.target, self.constraint.tolerance
        if not cheapest <= target:
            raise BudgetError(
                f"target={target:.6g} is below the smallest cost inside the bounds, {cheapest:.6g}; raise the target "
                "or lower the bounds"
            )
        if tolerance is not None and dearest < target - tolerance:
            raise BudgetError(
                f"target={target:.6g} with tolerance={tolerance:.6g} is above the largest cost inside the bounds, "
                f"{dearest:.6g}; lower the target or raise the bounds"
            )
