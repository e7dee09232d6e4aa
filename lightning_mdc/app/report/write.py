"""Writes what `mdc report` makes: the report of a run into its folder, a page of several runs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightning_mdc.app.report.charts import save_charts
from lightning_mdc.app.report.comparing import Comparison, compare
from lightning_mdc.app.report.page import comparison_page, page
from lightning_mdc.app.report.record import RunRecord
from lightning_mdc.app.report.report import PICTURES, Report, markdown, report_of
from lightning_mdc.files import write_text


def write_report(folder: Path) -> Report:
    """Write ``report.html``, ``report.md`` and ``pictures/`` into a run's folder; returns what they say.

    Raises:
        ConfigError: the folder holds no run.
    """
    report = report_of(RunRecord(folder))
    shutil.rmtree(folder / PICTURES, ignore_errors=True)  # of an earlier report, which may have had others
    pictures = {key: path.relative_to(folder) for key, path in save_charts(report.charts, folder / PICTURES).items()}
    report = replace(report, charts=tuple(chart for chart in report.charts if chart.key in pictures))
    write_text(folder / "report.md", markdown(report, pictures))
    write_text(folder / "report.html", page(report))
    return report


def write_comparison(folders: Sequence[Path], path: Path) -> Comparison:
    """Write the comparison of these runs as a page; returns what it says.

    Raises:
        ConfigError: see `compare`.
    """
    comparison = compare(folders)
    write_text(path, comparison_page(comparison))
    return comparison
