"""What of a run is put on dashboards, and by which stage it is made. Knows no dashboard, and changes nothing."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_mdc.app.report import DENSE, FINETUNED, REFERENCE, SLIM, comparison, kept_by_block
from lightning_mdc.app.report.charts import charts
from lightning_mdc.app.report.record import RunRecord
from lightning_mdc.app.report.results import Result, mean_correct
from lightning_mdc.figures.items import Histogram, Item, Model, Numbers, Panel, Picture, Summary, Table
from lightning_mdc.gp_ei.study import Trial
from lightning_mdc.policy import DIMENSIONS, Policy

_SUMMARY_NAMES = {DENSE: "dense", SLIM: "slim", FINETUNED: "finetuned", REFERENCE: "reference"}

_SEARCH_PANELS = (
    Panel("search/progress", "Value by trial, and the best so far", "line", "trial", ("value", "incumbent")),
    Panel("search/expected", "Expected improvement of each trial", "line", "trial", ("improvement",)),
    Panel("search/tradeoff", "Value by cost", "scatter", "cost", ("value",)),
)


def published(record: RunRecord, stage: str) -> Iterator[Item]:
    """What `stage` left in the run's folder, as far as it is there; numbers and tables before pictures."""
    if (summary := _summary(record, stage)).values:
        yield summary
    yield from _STAGES.get(stage, _nothing)(record)
    for chart in charts(record, stage):
        yield picture(chart.key, f"{chart.title}. {chart.caption}", chart.figure)


def picture(key: str, caption: str, figure: Figure) -> Picture:
    """A figure, drawn; under ``charts/``, because ``search/value`` is a picture's key and a number's."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return Picture(f"charts/{key}", caption, file.getvalue())


# --- the search, here and in a sweep ----------------------------------------------------------------------------------


def trial_numbers(trial: Trial, incumbent: float | None) -> Numbers:
    """One trial as a point of the search's curves; `incumbent` is the best value so far, this one counted."""
    known = {"value": trial.value, "incumbent": incumbent, "cost": trial.cost, "improvement": trial.improvement}
    values = {f"search/{name}": float(value) for name, value in known.items() if value is not None}
    return Numbers(values, "search/trial", trial.number)


def search_table(trials: Iterable[Trial], direction: str) -> Table:
    """All trials, a line each, with every keep ratio.

    Args:
        direction: ``minimize`` or ``maximize``.
    """
    trials = tuple(trials)
    names = tuple(dict.fromkeys(name for trial in trials for name in trial.params))
    best: float | None = None
    lines = []
    for trial in trials:
        if trial.status == "done" and trial.value is not None:
            better = min if direction == "minimize" else max
            best = trial.value if best is None else better(best, trial.value)
        known = (trial.number, trial.value, best, trial.cost, trial.facts.get("macs"), trial.improvement)
        lines.append((*known, trial.status, trial.seconds, *(_cell(trial.params.get(name)) for name in names)))
    columns = ("trial", "value", "incumbent", "cost", "macs", "improvement", "status", "seconds", *names)
    return Table("search/trials", columns, tuple(lines), _SEARCH_PANELS)


def policy_table(policy: Policy) -> Table:
    """A line per keep ratio."""
    rows = [(name, place, float(ratio)) for name in DIMENSIONS for place, ratio in enumerate(getattr(policy, name))]
    return Table("policy/ratios", ("dimension", "block or stage", "keep ratio"), tuple(rows))


def _cell(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value)


# --- what each stage leaves -------------------------------------------------------------------------------------------


def _nothing(record: RunRecord) -> Iterator[Item]:
    return iter(())


def _dense(record: RunRecord) -> Iterator[Item]:
    yield from _model(record, "dense", None)


def _score(record: RunRecord) -> Iterator[Item]:
    if record.scores is None:
        return
    for name in DIMENSIONS:
        for place, values in enumerate(getattr(record.scores, name)):
            block = record.scores.stages[place] if name == "tokens" and record.scores.stages else place
            if len(values):
                yield Histogram(f"scores/{name}/block{block:02d}", values.numpy())


def _share(record: RunRecord) -> Iterator[Item]:
    yield from _model(record, "shared", "dense")


def _search(record: RunRecord) -> Iterator[Item]:
    if (study := record.study) is not None:
        yield search_table(study.trials, study.header["direction"])
    if record.policy is not None:
        yield policy_table(record.policy)


def _slim(record: RunRecord) -> Iterator[Item]:
    if record.plan is not None and record.dense is not None:
        sites = record.dense.sites
        for units in kept_by_block(record.plan, record.dense.num_tokens, sites.num_prefix_tokens):
            rows = tuple(
                (f"block {block:02d}", kept, dense, kept / dense if dense else None)
                for block, (kept, dense) in enumerate(zip(units.kept, units.dense, strict=True))
            )
            bars = Panel(f"kept/{units.dimension}", f"{units.dimension} kept", "bar", "block", ("kept",))
            columns = ("block", "kept", "dense", "keep ratio")
            yield Table(f"kept/{units.dimension}_by_block", columns, rows, (bars,))
    yield from _model(record, "slim", "shared" if _shares(record) else "dense")


def _distill(record: RunRecord) -> Iterator[Item]:
    for seed in record.settings.get("distillation", {}).get("seeds", ()):  # others are of earlier settings
        yield from _model(record, f"finetuned/seed{seed}", "slim")


def _test(record: RunRecord) -> Iterator[Item]:
    if record.results is not None:
        table = comparison(record.results)
        yield Table("results/side-by-side", ("quantity", *table.header[1:]), table.rows)
        points = tuple(
            (row.model, row.seed, row.top1, row.macs, row.params, min(row.latency.values(), default=None))
            for row in record.results.rows
        )
        tradeoff = Panel("results/tradeoff", "Accuracy and cost of each model", "scatter", "MACs", ("top-1",))
        columns = ("model", "seed", "top-1", "MACs", "parameters", "seconds per image")
        yield Table("results/models", columns, points, (tradeoff,))
    if (outcomes := record.outcomes) is not None:
        images = outcomes.images_by_class
        right = {place: outcomes.correct_by_class(place) for place in outcomes.predicted}
        rows = tuple(
            (name, int(images[number]), *(_share_of(correct[number], images[number]) for correct in right.values()))
            for number, name in enumerate(outcomes.class_names)
        )
        yield Table("results/by-class", ("class", "images", *(f"top-1 {place}" for place in right)), rows)


def _sensitivity(record: RunRecord) -> Iterator[Item]:
    if record.sensitivity is not None:
        columns = ("dimension", "block", "keep", "accuracy", "kl", "cost")
        rows = tuple(tuple(getattr(cut, name) for name in columns) for cut in record.sensitivity.cuts)
        yield Table("sensitivity/cuts", columns, rows)


_STAGES: dict[str, Callable[[RunRecord], Iterator[Item]]] = {
    "dense": _dense,
    "score": _score,
    "share": _share,
    "search": _search,
    "slim": _slim,
    "distill": _distill,
    "test": _test,
    "sensitivity": _sensitivity,
}


def _shares(record: RunRecord) -> bool:
    return bool(record.settings.get("sharing", {}).get("epochs"))


def _share_of(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None


def _model(record: RunRecord, name: str, parent: str | None) -> Iterator[Model]:
    folder = record.folder / name
    if (config := _json(folder / "config.json")) is not None:
        yield Model(name, folder, parent, config)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # a model that was being written
        return None


# --- the numbers that runs are sorted by ------------------------------------------------------------------------------


def _summary(record: RunRecord, stage: str) -> Summary:
    values: dict[str, float] = {}
    if stage == "search":
        budget = record.settings.get("budget")
        if isinstance(budget, (int, float)):
            values["budget"] = float(budget)
        best = record.study.best if record.study is not None else None
        if best is not None and best.value is not None:
            values["search/best"] = best.value
    elif stage == "slim" and record.plan is not None and record.dense is not None:
        values["macs_ratio"] = record.dense.of_plan(record.plan) / record.dense.of_model()
    elif stage == "test" and record.results is not None:
        values = _of_results(record)
    return Summary(values)


def _of_results(record: RunRecord) -> dict[str, float]:
    results = record.results
    assert results is not None
    dense, slim = results.of(DENSE)[0], results.slimmest
    values = {f"top1/{name}": _top1(rows) for kind, name in _SUMMARY_NAMES.items() if (rows := results.of(kind))}
    values |= {"macs_ratio": slim.macs / dense.macs, "params_ratio": slim.params / dense.params}
    ratios = {size: slim.latency[size] / dense.latency[size] for size in results.batch_sizes}
    values |= {f"latency_ratio/batch{size}": ratio for size, ratio in ratios.items()}
    if ratios:
        values["latency_ratio"] = ratios[max(ratios)]
    return values


def _top1(rows: Sequence[Result]) -> float:
    """Of several seeds, on average."""
    return mean_correct(rows) / rows[0].images
