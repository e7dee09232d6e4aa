"""Pictures with what they are and what to read from them: of a plan, a search, scores and kept tokens, wherever they
are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightning_mdc.figures import importance as importance_figures
from lightning_mdc.figures import plan as plan_figures
from lightning_mdc.figures import search as search_figures
from lightning_mdc.figures.items import Picture
from lightning_mdc.figures.numbers import percent, scaled
from lightning_mdc.policy import DIMENSIONS, TOKENS, UNIT_DIMENSIONS, Plan, Policy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_mdc.budget import CostModel
    from lightning_mdc.gp_ei.process import GpEi
    from lightning_mdc.gp_ei.study import Trial
    from lightning_mdc.importance import Scores

FADED = "Patches that are gone as tokens of their own are faded."


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes:
        key: names files and panels: ``"kept"``, ``"search/value"``.
        title: what it is.
        caption: what to read from it, a sentence or two.
        figure: to be drawn.
        section: of the report it belongs to.
    """

    key: str
    title: str
    caption: str
    figure: Figure
    section: str = ""

    @property
    def picture(self) -> Picture:
        """It, drawn for a logger."""
        return Picture.of(self.key, f"{self.title}. {self.caption}", self.figure)


def plan_charts(costs: CostModel, plan: Plan) -> Iterator[Chart]:
    """What is kept of the model that `costs` prices, and where its MACs went."""
    before, after = costs.by_block(), costs.by_block(plan)
    yield Chart(
        "kept",
        "What each block kept",
        "Bars are what is left, pale is what the dense model has. Tokens are those that the block's MLP sees.",
        plan_figures.kept_figure(plan_figures.kept_by_block(plan, costs.num_tokens, costs.num_prefix)),
    )
    yield Chart(
        "macs",
        "Where the MACs went",
        f"Of the {scaled(before.total)}MACs of an image {scaled(after.total)} are left, "
        f"{percent(after.total / before.total)}. The bars named “rest” are patch embedding and classifier.",
        plan_figures.macs_figure(before, after),
    )


def policy_chart(policy: Policy, uniform: Policy | None) -> Chart:
    """The policy, beside the uniform one if that is known."""
    beside = "" if uniform is None else " The line is what the same share everywhere would be."
    caption = f"How much each block was asked to keep.{beside}"
    return Chart("policy", "The policy", caption, plan_figures.policy_figure(policy, uniform))


def search_charts(
    trials: Sequence[Trial], process: Callable[[], GpEi], direction: str = "maximize", metric: str = "value"
) -> Iterator[Chart]:
    """How a search went.

    Args:
        process: gives its Gaussian process, told of all trials; asked only if that chose any.
        direction: ``minimize`` or ``maximize``.
        metric: what the values are.
    """
    yield Chart(
        "search/value",
        "Is it still improving?",
        f"Every trial is a policy on the budget: {metric} on held-out training images, higher is better. "
        "The line is the best so far.",
        search_figures.progress_figure(trials, direction, metric),
    )
    has_chosen = any(trial.improvement is not None for trial in trials)
    if has_chosen:
        yield Chart(
            "search/improvement",
            "Has it converged?",
            "What the Gaussian process expected to gain when it chose a trial. Where the dots have come down, more "
            "trials promise little.",
            search_figures.improvement_figure(trials),
        )
    yield Chart(
        "search/cost",
        "How close to the budget?",
        "What each trial costs as a fraction of the budget, against what it is worth. None is above the line.",
        search_figures.cost_figure(trials, direction, 1.0, metric),
    )
    if has_chosen:
        yield Chart(
            "search/dependence",
            "Which ratios matter?",
            "What the Gaussian process expects as one keep ratio moves and the others are as in the trials. The ring "
            "is the best trial.",
            search_figures.dependence_figure(process()),
        )


def importance_charts(scores: Scores, plan: Plan | None, grid: tuple[int, int] | None) -> Iterator[Chart]:
    """Which units matter.

    Args:
        plan: what is kept of them; None before there is one.
        grid: (height, width) in patches, of the images that were scored on; None: not known.
    """
    arrays = {name: [t.double().numpy() for t in scores.units(name)] for name in DIMENSIONS}
    tokens = arrays[TOKENS]
    how = f"By {scores.criterion}, over {scores.images} images." if scores.images else f"By {scores.criterion}."
    removed = "" if plan is None else "; a cross is one that was removed, or they are ranked and cut at the line"
    for name in UNIT_DIMENSIONS:
        if arrays[name]:
            yield Chart(
                f"importance/{name}",
                name.capitalize(),
                f"{how} Scaled within each block{removed}.",
                importance_figures.units_figure(arrays[name], plan.kept[name] if plan else None, name.rstrip("s")),
            )
    if tokens and grid is not None and len(tokens[0]) == np.prod(grid):
        yield Chart(
            "importance/tokens",
            "Token positions",
            f"{how} Which tokens leave is decided image by image, unless the token score asks for these maps.",
            importance_figures.tokens_figure(tokens, scores.stages, grid),
        )
    yield Chart(
        "importance/histograms",
        "How it is spread",
        "Many units near 0 can go; where all are alike, none stands out.",
        importance_figures.histograms_figure(arrays),
    )
