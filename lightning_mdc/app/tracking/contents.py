"""What of a run, by its steps, and of a policy sweep is put on dashboards. Knows no dashboard, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from lightning_mdc.app.report.charts import charts
from lightning_mdc.app.report.record import RunRecord
from lightning_mdc.app.report.results import DENSE, FINETUNED, REFERENCE, SLIM, Results, mean_top1
from lightning_mdc.app.report.tables import comparison
from lightning_mdc.app.tracking.tracker import Model, Shown
from lightning_mdc.figures.items import Histogram, Item, Panel, Picture, Summary, Table
from lightning_mdc.figures.plan import policy_figure
from lightning_mdc.figures.search_items import incumbents, kept_tables, policy_table, search_table, trial_numbers
from lightning_mdc.files import read_json
from lightning_mdc.gp_ei.study import StudyFile
from lightning_mdc.policy import DIMENSIONS, Policy

_SUMMARY_NAMES = {DENSE: "dense", SLIM: "slim", FINETUNED: "finetuned", REFERENCE: "reference"}
# What the sweeper draws beside its study, and what to read from it.
_PICTURES = {
    "progress": "What each trial was worth, and the best so far",
    "cost": "Value of each trial by its cost, as a fraction of the budget",
    "dependence": "What the value depends on, by the Gaussian process of the search",
}


def published(record: RunRecord, step: str) -> Iterator[Shown]:
    """What `step` left in the run's folder, as far as it is there; numbers and tables before pictures."""
    if (summary := _summary(record, step)).values:
        yield summary
    match step:
        case "dense":
            yield from _model(record, "dense", None)
        case "share":
            yield from _model(record, "shared", "dense")
        case "score":
            yield from _score(record)
        case "search":
            yield from _search(record)
        case "slim":
            yield from _slim(record)
        case "distill":
            for seed in record.settings.get("distillation", {}).get("seeds", ()):  # others are of earlier settings
                yield from _model(record, f"finetuned/seed{seed}", "slim")
        case "test":
            yield from _test(record)
        case "sensitivity":
            yield from _sensitivity(record)
    for chart in charts(record, step):
        yield chart.picture


# --- what each step leaves --------------------------------------------------------------------------------------------


def _score(record: RunRecord) -> Iterator[Shown]:
    if record.scores is None:
        return
    for name in DIMENSIONS:
        scores = getattr(record.scores, name)
        blocks = record.scores.stages if name == "tokens" and record.scores.stages else range(len(scores))
        for block, values in zip(blocks, scores, strict=True):
            if len(values):
                yield Histogram(f"scores/{name}/block{block:02d}", values.numpy())


def _search(record: RunRecord) -> Iterator[Shown]:
    if (study := record.study) is not None:
        yield search_table(study.trials, study.header["direction"])
    if record.policy is not None:
        yield policy_table(record.policy)


def _slim(record: RunRecord) -> Iterator[Shown]:
    if record.plan is not None and record.dense is not None:
        yield from kept_tables(record.dense, record.plan)
    yield from _model(record, "slim", record.weights)


def _test(record: RunRecord) -> Iterator[Shown]:
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
        correct = [outcomes.correct_by_class(model) for model in outcomes.predicted]
        rows = tuple(
            (name, int(n), *(float(c[number] / n) if n else None for c in correct))
            for number, (name, n) in enumerate(zip(outcomes.class_names, images, strict=True))
        )
        yield Table("results/by-class", ("class", "images", *(f"top-1 {model}" for model in outcomes.predicted)), rows)


def _sensitivity(record: RunRecord) -> Iterator[Shown]:
    if record.sensitivity is not None:
        columns = ("dimension", "block", "keep", "accuracy", "kl", "cost")
        rows = tuple(tuple(getattr(cut, name) for name in columns) for cut in record.sensitivity.cuts)
        yield Table("sensitivity/cuts", columns, rows)


def _model(record: RunRecord, name: str, parent: str | None) -> Iterator[Model]:
    folder = record.folder / name
    if (config := read_json(folder / "config.json")) is not None:
        yield Model(name, folder, parent, config)


# --- the numbers that runs are sorted by ------------------------------------------------------------------------------


def _summary(record: RunRecord, step: str) -> Summary:
    values: dict[str, float] = {}
    if step == "search":
        budget = record.settings.get("budget")
        if isinstance(budget, (int, float)):
            values["budget"] = float(budget)
        best = record.study.best if record.study is not None else None
        if best is not None and best.value is not None:
            values["search/best"] = best.value
    elif step == "slim" and record.plan is not None and record.dense is not None:
        values["macs_ratio"] = record.dense.of_plan(record.plan) / record.dense.of_model()
    elif step == "test" and record.results is not None:
        values = _of_results(record.results)
    return Summary(values)


def _of_results(results: Results) -> dict[str, float]:
    dense, slim = results.dense, results.slimmest
    values = {f"top1/{name}": mean_top1(rows) for kind, name in _SUMMARY_NAMES.items() if (rows := results.of(kind))}
    values |= {"macs_ratio": slim.macs / dense.macs, "params_ratio": slim.params / dense.params}
    ratios = {size: slim.latency[size] / dense.latency[size] for size in results.batch_sizes}
    values |= {f"latency_ratio/batch{size}": ratio for size, ratio in ratios.items()}
    if ratios:
        values["latency_ratio"] = ratios[max(ratios)]
    return values


# --- a sweep of the policy --------------------------------------------------------------------------------------------


def trial_items(policy: Policy, uniform: Policy, value: float, cost: float, macs_ratio: float) -> Iterator[Item]:
    """One trial.

    Args:
        uniform: to compare it with.
        value: on the held-out images.
        cost: as a fraction of the budget.
        macs_ratio: as a fraction of dense.
    """
    yield Summary({"value": value, "cost": cost, "macs_ratio": macs_ratio})
    yield policy_table(policy)
    figure = policy_figure(policy, uniform, "What each block keeps")
    yield Picture.of("policy", "What each block keeps, and what the uniform policy would", figure)


def sweep_items(study: StudyFile, folder: Path, best: Figure | None) -> Iterator[Item]:
    """The whole search.

    Args:
        folder: of the sweep, with the sweeper's pictures.
        best: the best policy, drawn; None if no trial succeeded.
    """
    direction = study.header["direction"]
    for trial, incumbent in zip(study.trials, incumbents(study.trials, direction), strict=True):
        yield trial_numbers(trial, incumbent)
    if study.best is not None and study.best.value is not None:
        yield Summary({"search/best": study.best.value, "search/best_trial": float(study.best.number)})
    yield search_table(study.trials, direction)
    for name, caption in _PICTURES.items():
        if (path := folder / f"{name}.png").exists():
            yield Picture(f"charts/search/{name}", caption, path.read_bytes())
    if best is not None:
        yield Picture.of("policy", "The best policy of the sweep, and the uniform one", best)
