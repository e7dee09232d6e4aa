"""The policies of one model as points: one axis per block (or group of blocks) and dimension, priced all at once."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import nn

from lightning_mdc.budget import Budget, CostModel, InputSize, Kept, as_budget, image_size
from lightning_mdc.budget.grid import Counts, Grid
from lightning_mdc.budget.pricing import Pricing
from lightning_mdc.budget.uniform import uniform_counts
from lightning_mdc.errors import BudgetError, PolicyError, SearchError, check_kind
from lightning_mdc.gp_ei.projection import Constraint
from lightning_mdc.gp_ei.space import Axis
from lightning_mdc.gp_ei.space import Space as PointSpace
from lightning_mdc.models import find_anatomy
from lightning_mdc.policy import DIMENSIONS, TOKENS, UNIT_DIMENSIONS, Policy, Space, TokenOptions

# Without bounds of the user's own, no block goes below this share of what the uniform policy keeps of it, unless a
# uniform policy of fewer dimensions does.
_LEAST_OF_UNIFORM = 0.1


class PolicySpace(PointSpace):
    """Keep ratios of a model's heads, neurons and tokens, in whole units.

    A point is a list of ratios; two points that keep the same counts are one, written as the smallest ratio that keeps
    them. Axes are named ``heads.0``, ``neurons.0``, ... by block or group, and ``tokens`` (one ratio for all stages)
    or ``tokens.0``, ... by stage.

    Args:
        model: the dense model (or a module that holds it).
        budget: fraction of the dense MACs in (0, 1], or a `Budget`.
        dimensions: what may be pruned; None: see `uniform_policy`. Not tokens where only parameters count.
        space: bounds, groups, fewest units, token stages; None: ``Space()``.
        tokens: what happens at a token stage; None: ``TokenOptions()``.
        input_size: in pixels, see `macs`; None: the model's own.
        submodule: of the vision transformer in `model`; see `find_anatomy`.

    Raises:
        BudgetError: the budget cannot be reached inside the bounds; says what can.
        SearchError: bounds or groups that do not fit the model, or of what is not searched.
        UnsupportedModelError: the model cannot lose units of a dimension asked for.
        PlanError: `tokens` are given where none can leave, or none do by default.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: float | Budget = 0.6,
        dimensions: Iterable[str] | None = None,
        space: Space | None = None,
        tokens: TokenOptions | None = None,
        *,
        input_size: InputSize | None = None,
        submodule: str | None = None,
    ) -> None:
        self.anatomy = find_anatomy(model, submodule)
        self.costs = CostModel(self.anatomy, image_size(input_size))
        self.pricing = Pricing(self.costs, as_budget(budget), tokens)
        self.budget, self.tokens = self.pricing.budget, self.pricing.tokens
        self.dense_macs = self.costs.of_model()
        check_kind("space", space, Space, PolicyError)
        self.space = Space() if space is None else space
        names = self.anatomy.to_prune(dimensions, tokens)
        # Where dropping tokens saves nothing it would only hurt.
        self.dimensions = tuple(name for name in names if name != TOKENS or self.pricing.rewards_dropping_tokens)
        self.grid = Grid(self.costs, self.dimensions, self.space, self.tokens)
        # Also checks that the budget can be reached at all.
        self.uniform = uniform_counts(self.pricing, names, self.space)
        # The uniform policies of some of the dimensions, those of most first.
        self.uniform_of_fewer: list[Policy] = []
        for count in range(len(self.dimensions) - 1, 0, -1):
            for some in itertools.combinations(self.dimensions, count):
                with contextlib.suppress(BudgetError):  # out of reach of these alone
                    self.uniform_of_fewer.append(uniform_counts(self.pricing, some, self.space))
        bounds, tied = _checked_bounds(self.space.bounds, names), _checked_groups(self.space.groups, names)
        tied[TOKENS] = 1 if self.space.token_ratio == "shared" else None
        # Which blocks (stages for tokens) each axis moves, by dimension.
        self._members: dict[str, list[tuple[int, np.ndarray]]] = {name: [] for name in DIMENSIONS}
        axes: list[Axis] = []
        for name in self.dimensions:
            for axis, members in self._axes(name, bounds.get(name), tied.get(name)):
                self._members[name].append((len(axes), members))
                axes.append(axis)
        super().__init__(axes)
        self.constraint = Constraint(self.utilisation, 1.0)
        self._check_reachable(budget)

    def _axes(self, dimension: str, bounds: Any, count: int | None) -> Iterator[tuple[Axis, np.ndarray]]:
        """The axes of one dimension, and the blocks that each moves."""
        step = self.grid.step.get(dimension, 1)
        sizes = self.grid.sizes.get(dimension, np.full(len(self.grid.stages), self.costs.num_tokens))
        coarse = dimension not in (*self.grid.fine, TOKENS)
        fewer = [policy.ratios[dimension] for policy in self.uniform_of_fewer]
        low, high = _bounds_of(dimension, bounds, sizes, coarse, [self.uniform.ratios[dimension], *fewer])
        if dimension != TOKENS:  # whole units inside the bounds
            fewest = np.maximum(np.ceil(sizes * low / step - 1e-6) * step, self.grid.least[dimension])
            low = np.minimum(fewest, sizes) / np.maximum(sizes, 1)
        for number, members in enumerate(_tied(dimension, count, len(sizes))):
            members = members[sizes[members] > 0]
            if not len(members):
                continue
            name = TOKENS if dimension == TOKENS and count == 1 else f"{dimension}.{number}"
            bottom, top = float(low[members].max()), float(high[members].min())
            if bottom > top:
                raise SearchError(
                    f"bounds of {name}: no whole number of {dimension} is between {bottom:.4g} and {top:.4g}; "
                    "widen them"
                )
            yield Axis(name, bottom, top, step=step / int(sizes[members].max())), members

    # --- points and policies --------------------------------------------------------------------------------------

    def policy(self, point: np.ndarray) -> Policy:
        """The policy of a point (axes,), with realised ratios."""
        points = np.atleast_2d(point)
        units = {name: counts[0] for name, counts in self.counts(points).items()}
        reaching, stay = self.grid.tokens(self._stage_ratios(points))
        return self.grid.policy(units, (stay / reaching)[0])

    def nearest(self, policy: Policy) -> np.ndarray:
        """The point (axes,) of `policy`, or one just below it: tied blocks and stages cannot keep what differs."""
        counts = self.anatomy.counts(policy)
        point = self.high.copy()
        for dimension in UNIT_DIMENSIONS:
            for axis, members in self._members[dimension]:
                point[axis] = (counts.units[dimension][members] / self.grid.sizes[dimension][members]).min()
        if self._members[TOKENS]:
            reaching, stay = self.grid.tokens(counts.tokens[None])
            self._set_tokens(point[None], counts.tokens[None])
            if (self.grid.tokens(self._stage_ratios(point[None]))[1] != stay).any():  # no one ratio keeps just that
                for axis, members in self._members[TOKENS]:
                    point[axis] = (stay / reaching)[0, members].min()
        return self.snap(point[None])[0]

    def snap(self, points: np.ndarray) -> np.ndarray:
        """See `Space.snap`: every ratio the smallest that keeps the same counts of its blocks."""
        points = np.clip(points, self.low, self.high)
        snapped = points.copy()
        for dimension, counts in self.counts(points).items():
            if axes := [axis for axis, _ in self._members[dimension]]:
                blocks, first = self._blocks_of(dimension)
                ratios = (counts / np.maximum(self.grid.sizes[dimension], 1))[:, blocks]
                snapped[:, axes] = np.maximum(np.maximum.reduceat(ratios, first, axis=1), self.low[axes])
        self._set_tokens(snapped, self._stage_ratios(points))
        return snapped

    def _blocks_of(self, dimension: str) -> tuple[np.ndarray, np.ndarray]:
        """Blocks that an axis moves, axis by axis, and where in that list each axis begins."""
        members = [members for _, members in self._members[dimension]]
        return np.concatenate(members), np.cumsum([0, *map(len, members[:-1])])

    def counts(self, points: np.ndarray) -> Counts:
        """Whole units at points (n, axes): by dimension, (n, blocks); see `keep_count`."""
        counts: Counts = {}
        for dimension, sizes in self.grid.sizes.items():
            if not (members := self._members[dimension]):
                counts[dimension] = np.broadcast_to(sizes, (len(points), len(sizes)))
                continue
            step, ratios = self.grid.step[dimension], np.ones((len(points), len(sizes)))
            ratios[:, self._blocks_of(dimension)[0]] = points[:, [axis for axis, blocks in members for _ in blocks]]
            counts[dimension] = np.where(ratios >= 1, sizes, np.floor(sizes * ratios / step + 1e-6) * step)
        return counts

    def _kept(self, points: np.ndarray) -> Kept:
        """What is kept at points (n, axes)."""
        if not self._members[TOKENS]:
            return self.costs.kept(self.counts(points), (), None, self.tokens)
        reaching, stay = self.grid.tokens(self._stage_ratios(points))
        return self.grid.kept(self.counts(points), stay / reaching)

    def _stage_ratios(self, points: np.ndarray) -> np.ndarray:
        """(n, axes) -> keep ratio asked of each token stage, (n, stages)."""
        ratios = np.ones((len(points), len(self.grid.stages)))
        for axis, members in self._members[TOKENS]:
            ratios[:, members] = points[:, [axis]]
        return ratios

    def _set_tokens(self, points: np.ndarray, ratios: np.ndarray) -> None:
        """Write ratios (n, stages) into points (n, axes): the smallest that keep as many tokens, or 1 if all stay."""
        if not self._members[TOKENS]:
            return
        reaching, stay = self.grid.tokens(ratios)
        # All stay at a bit less than 1 too, and the prefix tokens and one more at 0.
        needed = np.minimum(stay, reaching - self.grid.extra)
        smallest = np.where(needed <= self.costs.num_prefix + 1, 0.0, needed / reaching)
        for axis, members in self._members[TOKENS]:
            all_stay = (stay == reaching)[:, members].all(axis=1) & (self.high[axis] == 1)
            points[:, axis] = np.where(all_stay, 1.0, smallest[:, members].max(axis=1))
            points[:, axis] = np.clip(points[:, axis], self.low[axis], self.high[axis])

    # --- what points cost -----------------------------------------------------------------------------------------

    def utilisation(self, points: np.ndarray) -> np.ndarray:
        """Cost of points (n, axes) divided by the budget, (n,): affordable up to 1, by the tightest limit."""
        return np.max(list(self.pricing.utilisations(self._kept(points)).values()), axis=0)

    def macs(self, points: np.ndarray) -> np.ndarray:
        """MACs of one image, (n, axes) -> (n,)."""
        return np.asarray(self.costs.macs(self._kept(points)))

    def prices(self, points: np.ndarray) -> dict[str, np.ndarray]:
        """MACs and whatever else the budget limits, by name, (n, axes) -> (n,): seconds per image, for one."""
        kept = self._kept(points)
        prices = {"macs": self.costs.macs, **self.pricing.prices}
        return {name: np.asarray(price(kept)) for name, price in prices.items()}

    def _check_reachable(self, budget: float | Budget) -> None:
        least = float(self.utilisation(self.snap(self.low[None]))[0])
        if least > 1:
            fraction = self.pricing.fraction
            reachable = f"{least:.4g} times the budget" if fraction is None else f"{least * fraction:.4g}"
            raise BudgetError(
                f"budget={fraction or budget} is below the smallest cost inside the bounds, {reachable}; raise budget "
                "or lower the bounds"
            )


def _tied(dimension: str, count: int | None, blocks: int) -> list[np.ndarray]:
    """Neighbouring blocks in `count` groups of nearly equal size, early to late; None: each block its own."""
    if count is not None and not 1 <= count <= blocks:
        raise SearchError(f"groups={count} for {dimension}: the model has {blocks} blocks; give 1 to {blocks}")
    return np.array_split(np.arange(blocks), blocks if count is None else count)


def _checked_bounds(bounds: Any, dimensions: tuple[str, ...]) -> dict[str, Any]:
    bounds = {} if bounds is None else bounds
    if not isinstance(bounds, Mapping) or set(bounds) - set(DIMENSIONS):
        raise SearchError(f"bounds={bounds!r}: expected ratios by dimension, such as {{'heads': (0.3, 1)}}")
    return _of_searched("bounds", bounds, dimensions)


def _checked_groups(groups: Any, dimensions: tuple[str, ...]) -> dict[str, int | None]:
    wrong = isinstance(groups, Mapping) and any(type(count) not in (int, type(None)) for count in groups.values())
    if groups is None or type(groups) is int:
        return {name: groups for name in UNIT_DIMENSIONS if name in dimensions}
    if wrong or not isinstance(groups, Mapping) or set(groups) - set(UNIT_DIMENSIONS):
        raise SearchError(
            f"groups={groups!r}: expected a number of groups, or one by dimension such as {{'heads': 3}} (tokens have "
            "token_ratio)"
        )
    return _of_searched("groups", groups, dimensions)


def _of_searched(what: str, given: Mapping[str, Any], dimensions: tuple[str, ...]) -> dict[str, Any]:
    found = {name: value for name, value in given.items() if value is not None}
    if others := [name for name in found if name not in dimensions]:
        raise SearchError(
            f"{what}={given!r}: {others[0]} are not searched, only {', '.join(dimensions)}; leave them out"
        )
    return found


def _bounds_of(
    dimension: str, bounds: Any, sizes: np.ndarray, coarse: bool, uniform: list[tuple[float, ...]]
) -> tuple[Any, Any]:
    """Smallest and largest keep ratio of each block or stage, (blocks,) each. `uniform`: ratios, of fewer last."""
    if bounds is None:
        if coarse:  # few: down to the fewest
            return np.zeros(len(sizes)), np.ones(len(sizes))
        ratios = [_LEAST_OF_UNIFORM * np.array(uniform[0]), *map(np.array, uniform[1:])]
        return np.min([np.broadcast_to(kept, len(sizes)) for kept in ratios], axis=0), np.ones(len(sizes))
    try:
        pairs = np.broadcast_to(np.asarray(bounds, dtype=np.float64), (len(sizes), 2))
    except (ValueError, TypeError) as error:
        raise SearchError(
            f"bounds of {dimension}={bounds!r}: expected (smallest, largest) or {len(sizes)} such pairs"
        ) from error
    low, high = pairs[:, 0], pairs[:, 1]
    if not ((low >= 0) & (low <= high) & (high <= 1)).all():
        raise SearchError(f"bounds of {dimension}={bounds!r}: expected keep ratios, the smaller first, in [0, 1]")
    return low.copy(), high.copy()
