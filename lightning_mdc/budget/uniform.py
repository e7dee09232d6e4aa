"""The uniform policy: one keep ratio for all dimensions, in whole units, as close under the budget as units allow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from lightning_mdc.budget.cost_model import CostModel, Kept, TokenDrop
from lightning_mdc.budget.latency import ALIGNMENT
from lightning_mdc.budget.limits import Budget, as_budget
from lightning_mdc.budget.pricing import Pricing
from lightning_mdc.errors import BudgetError, check_whole
from lightning_mdc.models import find_sites
from lightning_mdc.policy import DIMENSIONS, Policy, Ratios, default_stages, kept_tokens


def uniform_policy(
    model: nn.Module,
    budget: float | Budget = 0.6,
    dimensions: Iterable[str] | None = None,
    *,
    min_heads: int = 1,
    min_neurons: int = 1,
    round_to: int | None = None,
    stages: Sequence[int] | None = None,
) -> Policy:
    """The policy that takes the same share of every dimension and just meets the budget.

    One ratio is solved for on the relaxed (fractional) problem; heads and tokens are rounded to whole units, then the
    neurons, the finest unit, take up what rounding left over or took away.

    Args:
        model: a supported vision transformer, or a module that holds one.
        budget: fraction of the dense MACs in (0, 1], or a `Budget`.
        dimensions: what may be pruned; None means all three.
        min_heads, min_neurons: the fewest a block keeps.
        round_to: neurons are kept in multiples of it, because odd widths are slower than their MACs say; None: of 8
            if all blocks have at least 512 neurons, else of 1.
        stages: blocks where tokens leave; None means quarters of the depth.

    Raises:
        BudgetError: the budget cannot be reached; the message says what can.
        UnsupportedModelError: the model cannot lose units of a dimension asked for.
    """
    sites = find_sites(model)
    names = sites.require(dimensions)
    for name, value in (("min_heads", min_heads), ("min_neurons", min_neurons)):
        check_whole(name, value, 0, BudgetError)
    if stages is not None:
        sites.counts(Policy(stages=stages))  # refuses blocks the model does not have
    costs = CostModel(sites)
    step = neuron_step(costs, round_to)
    # Neurons move in groups of `step`; a block's last, incomplete group is kept only by keeping them all.
    whole = -(-min_neurons // step) * step
    solver = _Solver(
        costs,
        Pricing(costs, as_budget(budget)),
        names,
        default_stages(sites.depth) if stages is None else tuple(stages),
        step,
        least_heads=np.minimum(costs.heads, min_heads) if "heads" in names else costs.heads,
        least_neurons=np.minimum(costs.neurons, whole) if "neurons" in names else costs.neurons,
    )
    solver.check_reachable()
    heads, neurons, kept = solver.solve()
    return realised(costs, heads, neurons, solver.token_ratios(kept), stages)


def neuron_step(costs: CostModel, round_to: int | None) -> int:
    """Neurons are kept in multiples of it: `round_to`, or for None what is fast and still a fine step.

    Raises:
        BudgetError: `round_to` is no positive whole number.
    """
    if round_to is None:
        # In a narrow block so many at a time would be too coarse.
        return ALIGNMENT if costs.neurons.min() >= 512 else 1
    check_whole("round_to", round_to, 1, BudgetError)
    return round_to


def realised(
    costs: CostModel, heads: np.ndarray, neurons: np.ndarray, tokens: Sequence[float], stages: Sequence[int] | None
) -> Policy:
    """The policy that keeps so many heads and neurons, (blocks,) each, and `tokens` of what reaches each stage.

    What the model cannot lose, or has none of, is kept at 1.
    """

    def ratios(name: str, kept: np.ndarray, sizes: np.ndarray) -> Ratios:
        return 1.0 if name in reasons else np.where(sizes > 0, kept / np.maximum(sizes, 1), 1.0).tolist()

    reasons = costs.sites.reasons
    return Policy(
        heads=ratios("heads", heads, costs.heads),
        neurons=ratios("neurons", neurons, costs.neurons),
        tokens=1.0 if "tokens" in reasons else tokens or 1.0,
        stages=stages,
    )


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
    """Tries counts against the cost model. Counts are (heads, neurons) per block and tokens left per stage."""

    costs: CostModel
    pricing: Pricing
    dimensions: tuple[str, ...]
    stages: tuple[int, ...]
    step: int
    least_heads: np.ndarray
    least_neurons: np.ndarray
    tightest: str = ""

    @property
    def drops_tokens(self) -> bool:
        """Where dropping tokens saves nothing it would only hurt."""
        return "tokens" in self.dimensions and self.pricing.rewards_dropping_tokens

    def utilisation(self, heads: Any, neurons: Any, kept: list[int] | float) -> float:
        """Cost / budget under the tightest limit: feasible up to 1. `kept` may be one ratio for all stages."""
        ratios = self.token_ratios(kept) if isinstance(kept, list) else [kept] * len(self.stages)
        drops = [TokenDrop(block, keep) for block, keep in zip(self.stages, ratios, strict=True)]
        shares = self.pricing.utilisations(Kept(heads, neurons, drops, self.costs.sites.fuse))
        self.tightest = max(shares, key=lambda name: float(shares[name]))
        return float(shares[self.tightest])

    def token_ratios(self, kept: list[int]) -> list[float]:
        """Whole tokens left per stage as ratios of what reaches the stage, e.g. 137 of 197, then 96 of 138."""
        return [count / tokens for count, tokens in zip(kept, self._reaching(kept), strict=False)]

    def _reaching(self, kept: list[int]) -> list[int]:
        """Tokens that reach each stage, and what is behind the last one."""
        tokens = [self.costs.num_tokens]
        for count in kept:
            tokens.append(count + 1 if count < tokens[-1] else tokens[-1])
        return tokens

    def check_reachable(self) -> None:
        smallest = self.utilisation(self.least_heads, self.least_neurons, 0.0 if self.drops_tokens else 1.0)
        if smallest <= 1:
            return
        in_words = partial(self.pricing.in_words, self.tightest)
        remedies = ["raise budget"]
        if "heads" in self.dimensions and self.least_heads.any():
            headless = self.utilisation(self.least_heads * 0, self.least_neurons, 0.0 if self.drops_tokens else 1.0)
            remedies.append(f"pass min_heads=0 (reaches {in_words(headless)})")
        if len(self.dimensions) < len(DIMENSIONS):
            remedies.append("allow more dimensions")
        if "latency" in self.pricing.limits:
            remedies.append("measure with a larger batch_size, where starting operations takes less of the time")
        raise BudgetError(
            f"budget={self.pricing.fraction or self.pricing.budget} is below the smallest reachable cost "
            f"{in_words(smallest)} of this model ({self.least_heads.min()} head(s), {self.least_neurons.min()} "
            f"neuron(s) per block{', one patch token' if self.drops_tokens else ''}); {' or '.join(remedies)}"
        )

    def solve(self) -> tuple[np.ndarray, np.ndarray, list[int]]:
        ratio = self._relaxed_ratio()
        full = self.costs.heads.sum()
        heads = np.maximum(self.least_heads, np.rint(self.costs.heads * ratio).astype(np.int64))
        kept = self._kept(ratio)
        least = self.least_neurons
        if self.utilisation(heads, least, kept) > 1:  # rounding up took more than the neurons can give back
            fewer = self._most_heads(int(heads.sum()), least, kept)
            heads = self.least_heads if fewer is None else fewer
        if self.utilisation(heads, least, kept) > 1:
            parts = _largest(0, 4096, lambda part: self.utilisation(heads, least, self._kept(ratio * part / 4096)) <= 1)
            kept = self._kept(ratio * (parts or 0) / 4096)
        neurons = self._most_neurons(heads, kept)
        if (neurons == self.costs.neurons).all():  # rounding down left more than the neurons can take
            more = self._most_heads(int(full), neurons, kept)
            heads = heads if more is None or more.sum() < heads.sum() else more
            kept = self._most_tokens(heads, neurons, kept)
        return heads, neurons, kept

    def _relaxed_ratio(self) -> float:
        def feasible(part: int) -> bool:
            ratio = part / 65536
            heads = np.maximum(self.least_heads, self.costs.heads * ratio)
            neurons = np.maximum(self.least_neurons, self.costs.neurons * ratio)
            return self.utilisation(heads, neurons, ratio if self.drops_tokens else 1.0) <= 1

        return 1.0 if feasible(65536) else (_largest(0, 65535, feasible) or 0) / 65536

    def _kept(self, ratio: float) -> list[int]:
        kept: list[int] = []
        for _ in self.stages:
            tokens = self._reaching(kept)[-1]
            kept.append(kept_tokens(tokens, ratio, self.costs.num_prefix) if self.drops_tokens else tokens)
        return kept

    def _most_heads(self, most: int, neurons: np.ndarray, kept: list[int]) -> np.ndarray | None:
        def spread(total: int) -> np.ndarray:
            return _spread(total, self.least_heads, self.costs.heads)

        total = _largest(int(self.least_heads.sum()), most, lambda t: self.utilisation(spread(t), neurons, kept) <= 1)
        return None if total is None else spread(total)

    def _most_neurons(self, heads: np.ndarray, kept: list[int]) -> np.ndarray:
        least, most = self.least_neurons // self.step, -(-self.costs.neurons // self.step)

        def spread(total: int) -> np.ndarray:
            groups = np.minimum(_spread(total, least, most) * self.step, self.costs.neurons)
            return np.maximum(groups, self.least_neurons)

        total = _largest(int(least.sum()), int(most.sum()), lambda t: self.utilisation(heads, spread(t), kept) <= 1)
        return self.least_neurons if total is None else spread(total)

    def _most_tokens(self, heads: np.ndarray, neurons: np.ndarray, kept: list[int]) -> list[int]:
        for stage in reversed(range(len(kept) if self.drops_tokens else 0)):

            def with_count(count: int, stage: int = stage, others: list[int] = kept) -> list[int]:
                return [*others[:stage], count, *others[stage + 1 :]]

            # Keeping all but one saves nothing: the fused token takes its place.
            most = self._reaching(kept)[stage] - 2
            best = _largest(kept[stage], most, lambda c: self.utilisation(heads, neurons, with_count(c)) <= 1)
            kept = kept if best is None else with_count(best)
        return kept
