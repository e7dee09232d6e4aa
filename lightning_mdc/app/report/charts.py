"""All pictures that a run gives occasion to, each with what it shows: for the page, the dashboards and the files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lightning_mdc.app.report import result_figures
from lightning_mdc.app.report.outcomes import FIRST, LEAST_CHANGED, MOST_CHANGED
from lightning_mdc.app.report.record import RunRecord
from lightning_mdc.app.report.result_figures import Point
from lightning_mdc.app.settings import policy_space, token_options
from lightning_mdc.budget import Budget
from lightning_mdc.budget.uniform import uniform_policy
from lightning_mdc.errors import MdcError
from lightning_mdc.figures import sensitivity as sensitivity_figures
from lightning_mdc.figures import tokens as token_figures
from lightning_mdc.figures.charts import FADED, Chart, importance_charts, plan_charts, policy_chart, search_charts
from lightning_mdc.figures.style import save_figure
from lightning_mdc.gp_ei.process import GpEi
from lightning_mdc.gp_ei.space import Axis, Space
from lightning_mdc.gp_ei.study import StudyFile
from lightning_mdc.policy import Policy

log = logging.getLogger(__name__)

# Of the dense MACs: policies that differ by less than this are all on one budget, and there is no front to see.
_NARROW = 0.02


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
    if record.plan is not None and record.dense is not None:
        yield from plan_charts(record.dense, record.plan)


def _policy(record: RunRecord) -> Iterator[Chart]:
    if (policy := record.policy) is not None:
        yield policy_chart(policy, _uniform(record))


def _search(record: RunRecord) -> Iterator[Chart]:
    study = record.study
    if study is None or not study.trials:
        return
    metric = _metric(study)
    yield from search_charts(study.trials, lambda: _process(study), study.header["direction"], metric)
    yield from _front(record, study, metric)


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
            gone = f" {FADED}" if len(examples.blocks) else ""
            images, kept = [example.image for example in items], [example.kept for example in items]
            said = [token_figures.answers(example, examples.class_names) for example in items]
            figure = token_figures.tokens_figure(images, kept, examples.blocks, examples.grid, said)
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
    if record.scores is not None:
        grid = None if record.dense is None else record.dense.anatomy.grid
        yield from importance_charts(record.scores, record.plan, grid)


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
