"""All pictures that a run gives occasion to, each with what it shows: for the page, the dashboards and the files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lightning_mdc.app.report import result_figures
from lightning_mdc.app.report.outcomes import FIRST, LEAST_CHANGED, MOST_CHANGED
from lightning_mdc.app.report.record import RunRecord
from lightning_mdc.app.report.result_figures import Point
from lightning_mdc.app.settings import policy_space, token_options
from lightning_mdc.budget import Budget
from lightning_mdc.budget.uniform import uniform_policy
from lightning_mdc.errors import MdcError
from lightning_mdc.figures import importance as importance_figures
from lightning_mdc.figures import plan as plan_figures
from lightning_mdc.figures import search as search_figures
from lightning_mdc.figures import sensitivity as sensitivity_figures
from lightning_mdc.figures import tokens as token_figures
from lightning_mdc.figures.numbers import percent, scaled
from lightning_mdc.figures.style import save_figure
from lightning_mdc.gp_ei.process import GpEi
from lightning_mdc.gp_ei.space import Axis, Space
from lightning_mdc.gp_ei.study import StudyFile
from lightning_mdc.policy import DIMENSIONS, TOKENS, UNIT_DIMENSIONS, Policy

log = logging.getLogger(__name__)

# Of the dense MACs: policies that differ by less than this are all on one budget, and there is no front to see.
_NARROW = 0.02


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


def charts(record: RunRecord, step: str | None = None) -> list[Chart]:
    """The pictures of a run, in the order of a report; those that have nothing to show (yet) are left out.

    Args:
        step: only those that come with the result of this step.
    """
    found: list[Chart] = []
    for section, steps, part in _PARTS:
        if step is not None and step not in steps:
            continue
        try:
            found.extend(replace(chart, section=section) for chart in part(record))  # as many as can be drawn
        # Half of a run, or files that somebody edited: the other pictures are still worth looking at.
        except (MdcError, ValueError, KeyError, IndexError, TypeError):
            log.warning("some pictures of %s could not be drawn", record.folder, exc_info=True)
    return found


def save_charts(found: Sequence[Chart], folder: Path) -> tuple[Chart, ...]:
    """Write each as ``<folder>/<key>.png``; returns those that could be drawn."""
    drawn = []
    for chart in found:
        try:
            save_figure(chart.figure, folder / f"{chart.key}.png")
        except (ValueError, RuntimeError):  # a name that cannot be drawn, say; the others still can
            log.warning("%s could not be drawn", chart.key, exc_info=True)
        else:
            drawn.append(chart)
    return tuple(drawn)


# --- section by section -----------------------------------------------------------------------------------------------


def _removed(record: RunRecord) -> Iterator[Chart]:
    plan, dense = record.plan, record.dense
    if plan is not None and dense is not None:
        kept = plan_figures.kept_by_block(plan, dense.num_tokens, dense.num_prefix)
        before, after = dense.by_block(), dense.by_block(plan)
        yield Chart(
            "kept",
            "What each block kept",
            "Bars are what is left, pale is what the dense model has. Tokens are those that the block's MLP sees.",
            plan_figures.kept_figure(kept),
        )
        yield Chart(
            "macs",
            "Where the MACs went",
            f"Of the {scaled(before.total)}MACs of an image {scaled(after.total)} are left, "
            f"{percent(after.total / before.total)}. The bars named “rest” are patch embedding and classifier.",
            plan_figures.macs_figure(before, after),
        )


def _policy(record: RunRecord) -> Iterator[Chart]:
    if (policy := record.policy) is not None:
        uniform = _uniform(record)
        beside = "" if uniform is None else " The line is what the same share everywhere would be."
        yield Chart(
            "policy",
            "The policy",
            f"How much each block was asked to keep.{beside}",
            plan_figures.policy_figure(policy, uniform),
        )


def _search(record: RunRecord) -> Iterator[Chart]:
    study = record.study
    if study is None or not study.trials:
        return
    direction, metric = study.header["direction"], _metric(study)
    yield Chart(
        "search/value",
        "Is it still improving?",
        f"Every trial is a policy on the budget: {metric} on held-out training images, higher is better. "
        "The line is the best so far.",
        search_figures.progress_figure(study.trials, direction, metric),
    )
    has_chosen = any(trial.improvement is not None for trial in study.trials)
    if has_chosen:
        yield Chart(
            "search/improvement",
            "Has it converged?",
            "What the Gaussian process expected to gain when it chose a trial. Where the dots have come down, more "
            "trials promise little.",
            search_figures.improvement_figure(study.trials),
        )
    yield from _front(record, study, metric)
    yield Chart(
        "search/cost",
        "How close to the budget?",
        "What each trial costs as a fraction of the budget, against what it is worth. None is above the line.",
        search_figures.cost_figure(study.trials, direction, 1.0, metric),
    )
    if has_chosen:
        yield Chart(
            "search/dependence",
            "Which ratios matter?",
            "What the Gaussian process expects as one keep ratio moves and the others are as in the trials. The ring "
            "is the best trial.",
            search_figures.dependence_figure(_process(study)),
        )


def _front(record: RunRecord, study: StudyFile, metric: str) -> Iterator[Chart]:
    """Accuracy against cost of everything that was evaluated under any budget."""
    dense_macs, reference = study.header["about"].get("dense_macs"), study.metadata.get("dense", {})
    best = study.best
    # Top-1 is what readers ask for, whatever the search looked at.
    worth, name = ("accuracy", "accuracy") if "accuracy" in reference else ("value", metric)
    points = [Point(1.0, reference[worth], record.weights)] if worth in reference else []
    for other in record.studies:
        for trial in other.trials:
            value = trial.facts.get("accuracy") if worth == "accuracy" else trial.value
            if trial.status == "done" and value is not None and dense_macs and "macs" in trial.facts:
                chosen = trial is best
                points.append(Point(trial.facts["macs"] / dense_macs, value, "chosen" if chosen else "", chosen))
    # Of sensitivity, the cuts that were judged on the same images.
    cuts = record.sensitivity.cuts if record.sensitivity is not None else ()
    if worth == "accuracy" and any(cut.keep == 1 and cut.accuracy == reference["accuracy"] for cut in cuts):
        points += [Point(cut.cost, cut.accuracy) for cut in cuts if cut.keep < 1]
    costs = [point.cost for point in points]
    if not any(point.chosen for point in points) or max(costs) - min(costs) < _NARROW:
        return
    yield Chart(
        "search/front",
        "What does a MAC buy?",
        "Every policy that was evaluated, not finetuned, on held-out training images. The line joins those that "
        "no other one beats, the ring is the one that was chosen.",
        result_figures.front_figure(points, "MACs, as a fraction of dense", name, percent=name == "accuracy"),
    )


def _tokens(record: RunRecord) -> Iterator[Chart]:
    examples = record.examples
    if examples is None:
        return
    among = f"Of the first {examples.looked_at} test images those on which slim and dense"
    for key, why, title, caption in (
        ("tokens/most-changed", MOST_CHANGED, "Most changed", f"{among} differ most."),
        ("tokens/first", FIRST, "As they come", "The first test images."),
        ("tokens/least-changed", LEAST_CHANGED, "Least changed", f"{among} agree best."),
    ):
        items = [example for example in examples.items if example.why == why]
        if items:
            gone = " Patches that are gone as tokens of their own are faded." if len(examples.blocks) else ""
            figure = token_figures.tokens_figure(items, examples.blocks, examples.grid, examples.class_names)
            yield Chart(key, title, f"{caption}{gone}", figure)


def _speed(record: RunRecord) -> Iterator[Chart]:
    if record.results is not None:
        yield Chart(
            "latency",
            "How fast?",
            f"Measured on {record.results.device}; the median of readings taken in turn.",
            result_figures.latency_figure(record.results),
        )


def _classes(record: RunRecord) -> Iterator[Chart]:
    changes, outcomes = record.class_changes, record.outcomes
    if changes and outcomes is not None:
        seeds = len(outcomes.slim_models)
        yield Chart(
            "classes",
            "Which classes pay?",
            "Change of each class's accuracy on the test images, the worst first"
            + (f"; the mean over {seeds} finetuning seeds." if seeds > 1 else "."),
            result_figures.classes_figure(changes),
        )


def _sensitivity(record: RunRecord) -> Iterator[Chart]:
    sensitivity = record.sensitivity
    if sensitivity is None or not sensitivity.cuts:
        return
    alone = "One dimension of one block is cut, all else stays whole; not finetuned, on held-out training images."
    yield Chart(
        "sensitivity/accuracy",
        "What it costs in accuracy",
        f"{alone} Steep lines are blocks to leave alone.",
        sensitivity_figures.sensitivity_figure(sensitivity, "accuracy"),
    )
    yield Chart(
        "sensitivity/kl",
        "How far predictions move",
        f"{alone} KL({record.weights} ‖ cut) also sees what does not turn an answer into a wrong one.",
        sensitivity_figures.sensitivity_figure(sensitivity, "kl"),
    )
    yield Chart(
        "sensitivity/map",
        "Which blocks can spare what",
        f"{alone} The darker, the more accuracy is lost.",
        sensitivity_figures.sensitivity_map(sensitivity),
    )


def _importance(record: RunRecord) -> Iterator[Chart]:
    scores, plan, dense = record.scores, record.plan, record.dense
    if scores is None:
        return
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
    if tokens and dense is not None and len(tokens[0]) == np.prod(dense.anatomy.grid):
        yield Chart(
            "importance/tokens",
            "Token positions",
            f"{how} Which tokens leave is decided image by image, unless surgery.token_score asks for these maps.",
            importance_figures.tokens_figure(tokens, scores.stages, dense.anatomy.grid),
        )
    yield Chart(
        "importance/histograms",
        "How it is spread",
        "Many units near 0 can go; where all are alike, none stands out.",
        importance_figures.histograms_figure(arrays),
    )


# Section of the report, steps with whose results it comes, and what it shows, in order; importance again once there is
# a plan.
_PARTS: tuple[tuple[str, tuple[str, ...], Callable[[RunRecord], Iterator[Chart]]], ...] = (
    ("What was removed", ("slim",), _removed),
    ("What was removed", ("search",), _policy),
    ("The search", ("search",), _search),
    ("What it still looks at", ("test",), _tokens),
    ("Speed, and who pays for it", ("test",), _speed),
    ("Speed, and who pays for it", ("test",), _classes),
    ("What can be removed", ("sensitivity",), _sensitivity),
    ("What matters", ("score", "slim"), _importance),
)


# --- what a study file says -------------------------------------------------------------------------------------------


def _metric(study: StudyFile) -> str:
    """What the values are."""
    name = study.metadata.get("metric", "value")
    return {"kl": "−KL to dense", "loss": "−cross-entropy"}.get(name, str(name))


def _process(study: StudyFile) -> GpEi:
    """The Gaussian process of a search, told again what the file says."""
    axes = [
        Axis(axis["name"], choices=tuple(axis["choices"])) if "choices" in axis else Axis(**axis)
        for axis in study.header["space"]
    ]
    process = GpEi(Space(axes), direction=study.header["direction"], seed=study.header["seed"])
    over = [trial for trial in study.trials if trial.status != "running"]
    process.tell(np.array([process.space.point(trial.params) for trial in over]), [trial.value for trial in over])
    return process


def _uniform(record: RunRecord) -> Policy | None:
    """The policy that would give up the same share of everything, for comparison."""
    policy, dense = record.policy, record.dense
    study = record.study
    if policy is None or dense is None or study is None:
        return None
    budget = study.header["about"].get("budget")
    if not isinstance(budget, dict) or budget.get("latency") is not None:  # nothing is measured for a picture
        return None
    settings = record.settings
    space = replace(policy_space(settings), stages=policy.stages)
    dimensions = settings["policy"]["dimensions"]
    return uniform_policy(dense.anatomy.model, Budget(**budget), dimensions, space, token_options(settings))
