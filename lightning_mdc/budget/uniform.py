"""The uniform policy: one keep ratio for all dimensions, in whole units, as close under the budget as units allow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import nn

from lightning_mdc.budget.cost_model import CostModel, InputSize, image_size
from lightning_mdc.budget.costs import COSTS
from lightning_mdc.budget.grid import Counts, Grid
from lightning_mdc.budget.limits import Budget, as_budget
from lightning_mdc.budget.pricing import Pricing
from lightning_mdc.errors import BudgetError, PolicyError, check_kind
from lightning_mdc.models import find_anatomy
from lightning_mdc.policy import DIMENSIONS, TOKENS, Policy, Space, TokenOptions


def uniform_policy(
    model: nn.Module,
    budget: float | Budget = 0.6,
    dimensions: Iterable[str] | None = None,
    space: Space | None = None,
    tokens: TokenOptions | None = None,
    *,
    input_size: InputSize | None = None,
    submodule: str | None = None,
) -> Policy:
    """The policy that takes the same share of every dimension and just meets the budget.

    One ratio is solved for on the relaxed (fractional) problem; heads and tokens are rounded to whole units, then the
    neurons, the finest unit, take up what rounding left over or took away.

    Args:
        model: a supported vision transformer, or a module that holds one.
        budget: fraction of the dense MACs in (0, 1], or a `Budget`.
        dimensions: what may be pruned; None: all the model can lose, tokens where a classifier is known or they are
            restored.
        space: the fewest units, multiples of them, and token stages; None: ``Space()``.
        tokens: what happens at a token stage; None: ``TokenOptions()``.
        input_size: in pixels, see `macs`; None: the model's own.
        submodule: of the vision transformer in `model`; see `find_anatomy`.

    Raises:
        BudgetError: the budget cannot be reached; the message says what can.
        PolicyError: `space` says what a uniform policy has none of, or stages that the model has not.
        UnsupportedModelError: the model cannot lose units of a dimension asked for.
        PlanError: `tokens` are given where none can leave, or none do by default.
    """
    anatomy = find_anatomy(model, submodule)
    check_kind("space", space, Space, PolicyError)
    space = Space() if space is None else space
    check_uniform(space)
    costs = CostModel(anatomy, image_size(input_size))
    pricing = Pricing(costs, as_budget(budget), tokens)
    return uniform_counts(pricing, anatomy.to_prune(dimensions, tokens), space)


def check_uniform(space: Space) -> None:
    """Refuse, with a `PolicyError`, what a uniform policy has none of."""
    for name in ("groups", "bounds", "token_ratio"):
        if getattr(space, name) != getattr(Space, name):
            raise PolicyError(
                f"space.{name}={getattr(space, name)!r:.80} is for a search; a uniform policy has one ratio for all"
            )


def uniform_counts(pricing: Pricing, dimensions: Sequence[str], space: Space) -> Policy:
    """`uniform_policy` of a model whose prices are known."""
    solver = _Solver(Grid(pricing.costs, dimensions, space, pricing.tokens), pricing, dimensions)
    solver.check_reachable()
    units, stay = solver.solve()
    return solver.grid.policy(units, solver.grid.ratios(stay))


def _spread(total: int, least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """`total` units over blocks, each between `least` and `most` and equally filled up to one unit.

    Equal blocks: ``_spread(7, [1, 1, 1], [4, 4, 4])`` is ``[3, 2, 2]``.
    """
    room = most - least
    if not room.sum():
        return least.copy()
    exact = room * ((total - least.sum()) / room.sum())
    counts = least + np.floor(exact + 1e-9).astype(np.int64)
    for block in np.argsort(-(exact - np.floor(exact + 1e-9)), kind="stable")[: total - counts.sum()]:
        counts[block] += 1
    return counts


def _largest(low: int, high: int, feasible: Callable[[int], bool]) -> int | None:
    """The largest whole number in [low, high] that is feasible, for a predicate true up to some point; None if none."""
    if high < low or not feasible(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if feasible(middle) else (low, middle - 1)
    return low


@dataclass
class _Solver:
    """Tries counts against the cost model: units per block by dimension, and tokens that stay per stage."""

    grid: Grid
    pricing: Pricing
    dimensions: Sequence[str]
    tightest: str = ""

    @property
    def drops_tokens(self) -> bool:
        """Where dropping tokens saves nothing it would only hurt."""
        return TOKENS in self.dimensions and self.pricing.rewards_dropping_tokens

    def utilisation(self, units: Counts, stay: list[int] | float) -> float:
        """Cost / budget under the tightest limit: feasible up to 1. `stay` may be one ratio for all stages."""
        ratios = self.grid.ratios(stay) if isinstance(stay, list) else np.full(len(self.grid.stages), stay)
        shares = self.pricing.utilisations(self.grid.kept(units, ratios))
        self.tightest = max(shares, key=lambda name: float(shares[name]))
        return float(shares[self.tightest])

    def check_reachable(self) -> None:
        least, fewest = self.grid.least, 0.0 if self.drops_tokens else 1.0
        smallest = self.utilisation(least, fewest)
        if smallest <= 1:
            return
        in_words = partial(self.pricing.in_words, self.tightest)
        remedies = ["raise budget"]
        for name in self.dimensions:
            if name in self.grid.sizes and name not in self.grid.fine and least[name].any():
                without = self.utilisation({**least, name: least[name] * 0}, fewest)
                remedies.append(f"pass Space(min_{name}=0) (reaches {in_words(without)})")
        if len(self.dimensions) < len(DIMENSIONS):
            remedies.append("allow more dimensions")
        remedies += [COSTS[name].remedy for name in self.pricing.limits if COSTS[name].remedy]
        units = ", ".join(f"{counts.min()} {name.removesuffix('s')}(s)" for name, counts in least.items())
        raise BudgetError(
            f"budget={self.pricing.fraction or self.pricing.budget} is below the smallest reachable cost "
            f"{in_words(smallest)} of this model ({units} per block"
            f"{', one patch token' if self.drops_tokens else ''}); {' or '.join(remedies)}"
        )

    def solve(self) -> tuple[Counts, list[int]]:
        grid, ratio = self.grid, self._relaxed_ratio()
        coarse = [name for name in grid.sizes if name not in grid.fine]
        units = dict(grid.least)
        for name in coarse:
            units[name] = np.maximum(units[name], np.rint(grid.sizes[name] * ratio).astype(np.int64))
        stay = self._stay(ratio)
        for name in coarse:
            if self.utilisation(units, stay) > 1:  # rounding up took more than the fine units can give back
                units[name] = self._most_units(name, int(units[name].sum()), units, stay)
        if self.utilisation(units, stay) > 1:
            parts = _largest(0, 4096, lambda part: self.utilisation(units, self._stay(ratio * part / 4096)) <= 1)
            stay = self._stay(ratio * (parts or 0) / 4096)
        for name in grid.fine:
            units[name] = self._most_units(name, None, units, stay)
        if all((units[name] == grid.sizes[name]).all() for name in grid.fine):  # rounding down left more than they take
            for name in coarse:
                more = self._most_units(name, None, units, stay)
                units[name] = more if more.sum() >= units[name].sum() else units[name]
            stay = self._most_tokens(units, stay)
        return units, stay

    def _relaxed_ratio(self) -> float:
        def feasible(part: int) -> bool:
            ratio = part / 65536
            units = {name: np.maximum(self.grid.least[name], sizes * ratio) for name, sizes in self.grid.sizes.items()}
            return self.utilisation(units, ratio if self.drops_tokens else 1.0) <= 1

        return 1.0 if feasible(65536) else (_largest(0, 65535, feasible) or 0) / 65536

    def _stay(self, ratio: float) -> list[int]:
        ratios = np.full(len(self.grid.stages), ratio if self.drops_tokens else 1.0)
        return [int(count) for count in self.grid.tokens(ratios)[1]]

    def _most_units(self, name: str, total: int | None, units: Counts, stay: list[int]) -> np.ndarray:
        """The most units of a dimension beside the other ones of `units`: up to `total`; the fewest if none fit."""
        step, sizes, fewest = self.grid.step[name], self.grid.sizes[name], self.grid.least[name]
        least, most = fewest // step, -(-sizes // step)

        def spread(groups: int) -> np.ndarray:
            return np.maximum(np.minimum(_spread(groups, least, most) * step, sizes), fewest)

        def feasible(groups: int) -> bool:
            return self.utilisation({**units, name: spread(groups)}, stay) <= 1

        found = _largest(int(least.sum()), int(most.sum()) if total is None else total, feasible)
        return fewest if found is None else spread(found)

    def _most_tokens(self, units: Counts, stay: list[int]) -> list[int]:
        for stage in reversed(range(len(stay) if self.drops_tokens else 0)):

            def with_count(count: int, stage: int = stage, others: list[int] = stay) -> list[int]:
                return [*others[:stage], count, *others[stage + 1 :]]

            most = self.grid.reaching(stay)[stage] - 1 - self.grid.extra  # keeping more saves nothing
            best = _largest(stay[stage], most, lambda c: self.utilisation(units, with_count(c)) <= 1)
            stay = stay if best is None else with_count(best)
        return stay
