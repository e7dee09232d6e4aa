"""What was decided about a model, as items for a logger: numbers and tables, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lightning_mdc.budget.pricing import Pricing
from lightning_mdc.figures.charts import FADED, Chart, importance_charts, plan_charts, policy_chart, search_charts
from lightning_mdc.figures.items import Document, Item, Numbers, Picture, Summary
from lightning_mdc.figures.plan import kept_by_block
from lightning_mdc.figures.search_items import kept_tables, search_table
from lightning_mdc.figures.tokens import tokens_figure
from lightning_mdc.surgery import is_masked
from lightning_mdc.surgery.masks import masked
from lightning_mdc.tokens.surviving_patches import watched_patches

if TYPE_CHECKING:
    from lightning_mdc.budget import Budget, CostModel
    from lightning_mdc.importance import Scores
    from lightning_mdc.policy import Plan
    from lightning_mdc.policy_search.driver import SearchResult

# Images that kept tokens are shown on.
_EXAMPLES = 4


@dataclass(frozen=True, eq=False)
class Decision:
    """What is kept of one model, and why.

    Attributes:
        costs: prices the dense model.
        plan: what is kept.
        scores: that it rests on.
        budget: that it was made for; None: a policy was given.
        search: that found the policy; None: nothing was searched.
        look: runs the model, or a module that holds it, on some images, in eval mode; None: there are none to show
            tokens on.
    """

    costs: CostModel
    plan: Plan
    scores: Scores
    budget: Budget | None = None
    search: SearchResult | None = None
    look: Callable[[], Any] | None = None


def numbers(decision: Decision) -> Iterator[Item]:
    """What a list of runs is sorted by, and keep ratios by block; then tables and the plan."""
    facts = _summary(decision)
    yield Summary(facts)
    units = kept_by_block(decision.plan, decision.costs.num_tokens, decision.costs.num_prefix)
    for block in range(decision.plan.depth):
        ratios = {f"keep_ratio/{of.dimension}": of.kept[block] / of.dense[block] for of in units if of.dense[block]}
        yield Numbers(ratios, "keep_ratio/block", block)
    yield from kept_tables(decision.costs, decision.plan)
    if decision.search is not None and decision.search.trials:
        yield search_table(decision.search.trials, "maximize")
    yield Document("plan", "plan.json", decision.plan.to_json(), facts)


def pictures(decision: Decision) -> Iterator[Callable[[], Iterator[Picture]]]:
    """By what they show: one that cannot be drawn is not in the way of the others."""
    yield lambda: _drawn(plan_charts(decision.costs, decision.plan))
    yield lambda: _drawn(_search(decision))
    grid = decision.scores.grid or decision.costs.anatomy.grid_of(decision.costs.size)
    yield lambda: _drawn(importance_charts(decision.scores, decision.plan, grid))
    yield lambda: _drawn(_kept_tokens(decision))


def _drawn(charts: Iterator[Chart]) -> Iterator[Picture]:
    return (chart.picture for chart in charts)


def _summary(decision: Decision) -> dict[str, float]:
    costs, plan, search = decision.costs, decision.plan, decision.search
    found: dict[str, float] = {}
    for name, price in (("macs", costs.macs), ("params", costs.params)):
        dense, slim = price(costs.everything), price(costs.kept_by_plan(plan))
        found |= {f"mdc/{name}_dense": float(dense), f"mdc/{name}_slim": float(slim), f"mdc/{name}_ratio": slim / dense}
    if (share := _utilisation(decision)) is not None:
        found["mdc/utilisation"] = share
    if search is not None:
        found |= {"search/best": search.value, "search/best_trial": float(search.best.number)}
    return found


def _utilisation(decision: Decision) -> float | None:
    """Cost / budget, by the tightest limit; None where it would have to be measured."""
    if decision.search is not None:
        return decision.search.best.cost
    if decision.budget is None or "latency" in decision.budget.limits:
        return None
    shares = Pricing(decision.costs, decision.budget).utilisations(decision.costs.kept_by_plan(decision.plan))
    return max(map(float, shares.values()))


def _search(decision: Decision) -> Iterator[Chart]:
    search = decision.search
    if search is not None and search.space is not None and (process := search.search) is not None:
        yield policy_chart(search.policy, search.space.uniform)
        yield from search_charts(search.trials, lambda: process)


def _kept_tokens(decision: Decision) -> Iterator[Chart]:
    model, plan, look = decision.costs.anatomy.model, decision.plan, decision.look
    if look is None or not plan.leaving:
        return
    with nullcontext() if is_masked(model) else masked(model, plan):
        _, images, kept = watched_patches(model, look)
    blocks = [stage.block for stage in plan.leaving]
    grid = decision.costs.anatomy.grid_of((images.shape[-2], images.shape[-1]))
    shown = [_pixels(image) for image in images[:_EXAMPLES].float().cpu()]
    figure = tokens_figure(shown, list(kept[:_EXAMPLES].numpy()), blocks, grid)
    caption = f"Images that were scored on, as the model sees them, and what is left after each token stage. {FADED}"
    yield Chart("tokens", "What it still looks at", caption, figure)


def _pixels(image: Tensor) -> np.ndarray:
    """(channels, height, width) of any scale -> (height, width, 3), uint8, from its least value to its largest."""
    colours = image if len(image) == 3 else image[:1].expand(3, -1, -1)
    low, high = colours.min(), colours.max()
    scaled = (colours - low) / (high - low).clamp_min(1e-12)
    return (255 * scaled).round().byte().permute(1, 2, 0).numpy()
