"""The policies of one model as points: one axis per block (or group of blocks) and dimension, priced all at once."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from lightning_mdc.budget import Budget, CostModel, as_budget
from lightning_mdc.budget.cost_model import Kept, TokenDrop
from lightning_mdc.budget.pricing import Pricing
from lightning_mdc.budget.uniform import neuron_step, realised, uniform_policy
from lightning_mdc.errors import BudgetError, SearchError, check_one_of
from lightning_mdc.gp_ei.projection import Constraint
from lightning_mdc.gp_ei.space import Axis, Space
from lightning_mdc.models import Sites, find_sites
from lightning_mdc.policy import DIMENSIONS, Policy, default_stages

# Without bounds of the user's own, no block goes below this share of what the uniform policy keeps of it, unless a
# uniform policy of fewer dimensions does.
_LEAST_OF_UNIFORM = 0.3

Bounds = Mapping[str, Any]
Groups = int | Mapping[str, int | None] | None


class PolicySpace(Space):
    """Keep ratios of a model's heads, neurons and tokens, in whole units.

    A point is a list of ratios; two points that keep the same counts are one, written as the smallest ratio that keeps
    them. Axes are named ``heads.0``, ``neurons.0``, ... by block or group, and ``tokens`` (one ratio for all stages)
    or ``tokens.0``, ... by stage.

    Args:
        model: the dense model (or a module that holds it).
        budget: fraction of the dense MACs in (0, 1], or a `Budget`.
        dimensions: what may be pruned; None: all the model can lose, except tokens where only parameters count.
        bounds: per dimension the smallest and largest keep ratio, ``{"heads": (0.3, 1)}``, or one such pair per block
            (per stage for tokens).
        groups: ties neighbouring blocks together: so many groups instead of one axis per block, for all dimensions or
            as ``{"heads": 3}``.
        token_ratio: ``"shared"``: all stages keep the same ratio; ``"stages"``: one axis per stage.
        min_heads, min_neurons, round_to, stages: see `uniform_policy`.
        fuse_tokens: see `make_plan`.

    Raises:
        BudgetError: the budget cannot be reached inside the bounds; says what can.
        SearchError: bounds or groups that do not fit the model.
        UnsupportedModelError: the model cannot lose units of a dimension asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: float | Budget = 0.6,
        dimensions: Iterable[str] | None = None,
        *,
        bounds: Bounds | None = None,
        groups: Groups = None,
        token_ratio: str = "shared",
        min_heads: int = 1,
        min_neurons: int = 1,
        round_to: int | None = None,
        stages: Sequence[int] | None = None,
        fuse_tokens: bool = True,
    ) -> None:
        self.sites: Sites = find_sites(model)
        if dimensions is None:
            dimensions = self.sites.dimensions
        dimensions = tuple(dimensions)
        self.costs = CostModel(self.sites)
        self.pricing = Pricing(self.costs, as_budget(budget))
        self.budget = self.pricing.budget
        self.dense_macs = self.costs.of_model()
        units: dict[str, Any] = {"min_heads": min_heads, "min_neurons": min_neurons, "round_to": round_to}
        # Also checks dimensions, stages and the fewest units, and that the budget can be reached at all.
        self.uniform = uniform_policy(model, self.budget, dimensions, stages=stages, **units)
        names = self.sites.require(dimensions)
        # Where dropping tokens saves nothing it would only hurt.
        self.dimensions = tuple(name for name in names if name != "tokens" or self.pricing.rewards_dropping_tokens)
        self.stages = stages
        self.stage_blocks = default_stages(self.sites.depth) if stages is None else tuple(stages)
        self.fuse, self._step = fuse_tokens, neuron_step(self.costs, round_to)
        check_one_of("token_ratio", token_ratio, ("shared", "stages"), SearchError)
        least = {"heads": min_heads, "neurons": -(-min_neurons // self._step) * self._step, "tokens": 0}
        bounds, tied = _checked_bounds(bounds, self.dimensions), _checked_groups(groups, self.dimensions)
        tied["tokens"] = 1 if token_ratio == "shared" else None
        # The uniform policies of some of the dimensions, those of most first.
        self.uniform_of_fewer: list[Policy] = []
        for count in range(len(self.dimensions) - 1, 0, -1):
            for some in itertools.combinations(self.dimensions, count):
                with contextlib.suppress(BudgetError):  # out of reach of these alone
                    self.uniform_of_fewer.append(uniform_policy(model, self.budget, some, stages=stages, **units))
        # Which blocks (stages for tokens) each axis moves, by dimension.
        self._members: dict[str, list[tuple[int, np.ndarray]]] = {name: [] for name in DIMENSIONS}
        axes: list[Axis] = []
        for name in self.dimensions:
            for axis, members in self._axes(name, bounds.get(name), tied.get(name), least[name]):
                self._members[name].append((len(axes), members))
                axes.append(axis)
        super().__init__(axes)
        self.constraint = Constraint(self.utilisation, 1.0)
        self._check_reachable(budget)

    def _axes(self, dimension: str, bounds: Any, count: int | None, least: int) -> Iterator[tuple[Axis, np.ndarray]]:
        """The axes of one dimension, and the blocks that each moves."""
        step = self._step if dimension == "neurons" else 1
        sizes = {
            "heads": self.costs.heads,
            "neurons": self.costs.neurons,
            "tokens": np.full(len(self.stage_blocks), self.costs.num_tokens),
        }[dimension]
        fewer = [getattr(policy, dimension) for policy in self.uniform_of_fewer]
        low, high = _bounds_of(dimension, bounds, sizes, getattr(self.uniform, dimension), fewer)
        if dimension != "tokens":  # whole units inside the bounds
            fewest = np.maximum(np.ceil(sizes * low / step - 1e-6) * step, np.minimum(sizes, least))
            low = np.minimum(fewest, sizes) / np.maximum(sizes, 1)
        for number, members in enumerate(_tied(dimension, count, len(sizes))):
            members = members[sizes[members] > 0]
            if not len(members):
                continue
            name = "tokens" if dimension == "tokens" and count == 1 else f"{dimension}.{number}"
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
        tokens, _ = self._tokens(self._stage_ratios(points))
        heads, neurons = self._counts(points, "heads")[0], self._counts(points, "neurons")[0]
        return realised(self.costs, heads, neurons, tokens[0].tolist(), self.stages)

    def nearest(self, policy: Policy) -> np.ndarray:
        """The point (axes,) of `policy`, or one just below it: tied blocks and stages cannot keep what differs."""
        counts = self.sites.counts(policy)
        point = self.high.copy()
        for dimension in ("heads", "neurons"):
            for axis, members in self._members[dimension]:
                point[axis] = (getattr(counts, dimension)[members] / getattr(self.costs, dimension)[members]).min()
        if self._members["tokens"]:
            kept, _ = self._tokens(counts.tokens[None])
            self._set_tokens(point[None], kept)
            if (self._tokens(self._stage_ratios(point[None]))[0] != kept).any():  # no one ratio keeps just that
                for axis, members in self._members["tokens"]:
                    point[axis] = kept[0, members].min()
        return self.snap(point[None])[0]

    def snap(self, points: np.ndarray) -> np.ndarray:
        """See `Space.snap`: every ratio the smallest that keeps the same counts of its blocks."""
        points = np.clip(points, self.low, self.high)
        snapped = points.copy()
        for dimension in ("heads", "neurons"):
            if axes := [axis for axis, _ in self._members[dimension]]:
                blocks, first = self._blocks_of(dimension)
                sizes = getattr(self.costs, dimension)
                ratios = (self._counts(points, dimension) / np.maximum(sizes, 1))[:, blocks]
                snapped[:, axes] = np.maximum(np.maximum.reduceat(ratios, first, axis=1), self.low[axes])
        self._set_tokens(snapped, self._stage_ratios(points))
        return snapped

    def _blocks_of(self, dimension: str) -> tuple[np.ndarray, np.ndarray]:
        """Blocks that an axis moves, axis by axis, and where in that list each axis begins."""
        members = [members for _, members in self._members[dimension]]
        return np.concatenate(members), np.cumsum([0, *map(len, members[:-1])])

    def _counts(self, points: np.ndarray, dimension: str) -> np.ndarray:
        """(n, axes) -> heads or neurons in whole units (n, blocks); see `keep_count`."""
        sizes: np.ndarray = getattr(self.costs, dimension)
        step = self._step if dimension == "neurons" else 1
        ratios = np.ones((len(points), len(sizes)))
        if self._members[dimension]:
            ratios[:, self._blocks_of(dimension)[0]] = points[
                :, [a for a, blocks in self._members[dimension] for _ in blocks]
            ]
        return np.where(ratios >= 1, sizes, np.floor(sizes * ratios / step + 1e-6) * step)

    def _kept(self, points: np.ndarray) -> Kept:
        """What is kept at points (n, axes)."""
        drops = []
        if self._members["tokens"]:
            ratios, _ = self._tokens(self._stage_ratios(points))
            drops = [TokenDrop(block, ratios[:, stage]) for stage, block in enumerate(self.stage_blocks)]
        return Kept(self._counts(points, "heads"), self._counts(points, "neurons"), drops, self.fuse)

    def _stage_ratios(self, points: np.ndarray) -> np.ndarray:
        """(n, axes) -> keep ratio asked of each token stage, (n, stages)."""
        ratios = np.ones((len(points), len(self.stage_blocks)))
        for axis, members in self._members["tokens"]:
            ratios[:, members] = points[:, [axis]]
        return ratios

    def _tokens(self, ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ratios (n, stages) -> the ratios that are kept, and the smallest that keep as much: (n, stages) each.

        They differ at the ends: the prefix tokens and one patch stay, and to drop a single token, which the fused one
        then takes the place of, would only cost.
        """
        kept, smallest = np.ones_like(ratios), np.ones_like(ratios)
        tokens = np.full(len(ratios), float(self.costs.num_tokens))
        for stage in range(ratios.shape[1]) if self._members["tokens"] else ():
            left = self.costs.tokens_left(tokens, ratios[:, stage])
            left = np.where(left > tokens - 1 - self.fuse, tokens, left)
            needed = np.minimum(left, tokens - self.fuse)
            kept[:, stage] = left / tokens
            smallest[:, stage] = np.where(needed <= self.costs.num_prefix + 1, 0.0, needed / tokens)
            tokens = np.where(left < tokens, left + self.fuse, tokens)
        return kept, smallest

    def _set_tokens(self, points: np.ndarray, ratios: np.ndarray) -> None:
        """Write ratios (n, stages) into points (n, axes): the smallest that keep as many tokens, or 1 if all stay."""
        kept, smallest = self._tokens(ratios)
        for axis, members in self._members["tokens"]:
            all_stay = (kept[:, members] == 1).all(axis=1) & (self.high[axis] == 1)
            needed = np.where(all_stay, 1.0, smallest[:, members].max(axis=1))
            points[:, axis] = np.clip(needed, self.low[axis], self.high[axis])

    # --- what points cost -----------------------------------------------------------------------------------------

    def utilisation(self, points: np.ndarray) -> np.ndarray:
        """Cost of points (n, axes) divided by the budget, (n,): affordable up to 1, by the tightest limit."""
        return np.max(list(self.pricing.utilisations(self._kept(points)).values()), axis=0)

    def macs(self, points: np.ndarray) -> np.ndarray:
        """MACs of one image, (n, axes) -> (n,)."""
        return np.asarray(self.costs.macs(self._kept(points)))

    def latency(self, points: np.ndarray) -> np.ndarray | None:
        """Seconds per image, (n, axes) -> (n,), as the budget's table has it; None without a limit of latency."""
        seconds = self.pricing.prices.get("latency")
        return None if seconds is None else np.asarray(seconds(self._kept(points)))

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
    return {name: bounds[name] for name in dimensions if bounds.get(name) is not None}


def _checked_groups(groups: Any, dimensions: tuple[str, ...]) -> dict[str, int | None]:
    wrong = isinstance(groups, Mapping) and any(type(count) not in (int, type(None)) for count in groups.values())
    if groups is None or type(groups) is int:
        return {name: groups for name in ("heads", "neurons") if name in dimensions}
    if wrong or not isinstance(groups, Mapping) or set(groups) - {"heads", "neurons"}:
        raise SearchError(
            f"groups={groups!r}: expected a number of groups, or one by dimension such as {{'heads': 3}} (tokens have "
            "token_ratio)"
        )
    return dict(groups)


def _bounds_of(
    dimension: str, bounds: Any, sizes: np.ndarray, uniform: tuple[float, ...], fewer: list[tuple[float, ...]]
) -> tuple[Any, Any]:
    """Smallest and largest keep ratio of each block or stage, (blocks,) each."""
    if bounds is None:
        if dimension == "heads":  # few and coarse: down to the fewest
            return np.zeros(len(sizes)), np.ones(len(sizes))
        ratios = [_LEAST_OF_UNIFORM * np.array(uniform), *map(np.array, fewer)]
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
