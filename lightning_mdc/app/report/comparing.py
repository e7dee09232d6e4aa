"""Several runs beside each other: what each costs and keeps, and in which settings they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_mdc.app.report.record import RunRecord
from lightning_mdc.app.report.result_figures import runs_figure
from lightning_mdc.app.report.results import FINETUNED, REFERENCE, mean_top1
from lightning_mdc.app.report.tables import Table
from lightning_mdc.app.settings import flat
from lightning_mdc.errors import ConfigError
from lightning_mdc.figures.charts import Chart
from lightning_mdc.figures.numbers import percent
from lightning_mdc.figures.plan import kept_by_block, kept_overview_figure

# Settings that differ between any two runs, or change no result.
_SILENT = ("resume", "stage", "skip", "runs", "logger", "latency")
_COLUMNS = ("MACs", "parameters", "dense", "dense, same training", "slim", "points", "as fast, by batch size")


@dataclass(frozen=True)
class Comparison:
    """What there is to say of several runs.

    Attributes:
        title: how many.
        table: a row per run.
        differences: a row per setting that is not the same in all, a column per run.
        charts: pictures.
        folders: (name, folder) of each run.
    """

    title: str
    table: Table
    differences: Table
    charts: tuple[Chart, ...]
    folders: tuple[tuple[str, Path], ...]


def compare(folders: Sequence[Path]) -> Comparison:
    """The comparison of the runs in these folders, finished or not.

    Raises:
        ConfigError: a folder holds no run, or is named twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError(f"runs {[str(folder) for folder in folders]}: one is named twice; name each once")
    records = dict(zip(_names(folders), map(RunRecord, folders), strict=True))
    return Comparison(
        title=f"{len(records)} runs side by side",
        table=Table(
            ("run", *_COLUMNS),
            tuple((name, *_row(record)) for name, record in records.items()),
        ),
        differences=_differences(records),
        charts=tuple(_charts(records)),
        folders=tuple((name, record.folder) for name, record in records.items()),
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """As much of the end of each path as tells them apart: ``digits/2026-01-31_12-00-00``."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(2, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _row(record: RunRecord) -> tuple[str, ...]:
    results = record.results
    if results is None:
        return ("not finished", *[""] * (len(_COLUMNS) - 1))
    dense, slim, reference = results.dense, results.slimmest, results.of(REFERENCE)
    return (
        percent(slim.macs / dense.macs),
        percent(slim.params / dense.params),
        percent(dense.top1),
        percent(mean_top1(reference)) if reference else "",
        percent(results.slim_top1) + ("" if results.of(FINETUNED) else " (not finetuned)"),
        f"{100 * (results.slim_top1 - dense.top1):+.1f}",
        ", ".join(f"{results.speedup(size):.2f}x" for size in results.batch_sizes),
    )


def _differences(records: Mapping[str, RunRecord]) -> Table:
    all_settings = {name: {k: v for k, v in flat(record.settings) if v != {}} for name, record in records.items()}
    keys = sorted({key for settings in all_settings.values() for key in settings if key.split(".")[0] not in _SILENT})
    rows = []
    for key in keys:
        values = [str(settings.get(key, "–")) for settings in all_settings.values()]
        if len(set(values)) > 1:
            rows.append((key, *values))
    return Table(("setting", *records), tuple(rows))


def _charts(records: Mapping[str, RunRecord]) -> Iterator[Chart]:
    results = {name: record.results for name, record in records.items() if record.results is not None}
    if results:
        yield Chart(
            "runs",
            "Accuracy against cost",
            "Each run's slim model (blue; finetuned, if it was: the mean over seeds), joined to its dense one (gray).",
            runs_figure(results),
        )
    kept = [
        (name, kept_by_block(record.plan, record.dense.num_tokens, record.dense.num_prefix))
        for name, record in records.items()
        if record.plan is not None and record.dense is not None
    ]
    if kept:
        yield Chart(
            "kept",
            "What was kept",
            "Fraction of all heads, neurons and tokens (summed over blocks) that each run kept.",
            kept_overview_figure(kept),
        )
