"""Writes what `mdc report` makes: the report of a run into its folder, a page of several runs.

A page is one HTML file: no network, no script, readable on a phone, light or dark as the reader has it.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from markupsafe import Markup

from lightning_mdc.app.report.charts import charts, save_charts
from lightning_mdc.app.report.comparing import Comparison, compare
from lightning_mdc.app.report.record import RunRecord
from lightning_mdc.app.report.report import Report
from lightning_mdc.figures import style
from lightning_mdc.figures.charts import Chart
from lightning_mdc.files import write_text

# Colours of the pictures that the page's style sheet redefines for a dark background.
_THEMED = {
    style.INK: "ink",
    "#000000": "ink",
    style.GRAY: "gray",
    style.PALE: "pale",
    style.PAPER: "paper",
    style.BLUE: "blue",
    style.ORANGE: "orange",
    style.GREEN: "green",
    style.RED: "red",
    style.PURPLE: "purple",
}
# A picture may be shown a little smaller than drawn; below that it scrolls, so that a phone's reader can read it.
_SMALLEST = 0.69


def write_report(folder: Path) -> Report:
    """Write ``report.html``, ``report.md`` and ``pictures/`` into a run's folder; returns what they say.

    Raises:
        ConfigError: the folder holds no run.
    """
    record, pictures = RunRecord(folder), folder / "pictures"
    found = charts(record)
    shutil.rmtree(pictures, ignore_errors=True)  # of an earlier report, which may have had others
    report = Report(record, save_charts(found, pictures))
    for name in ("report.md", "report.html"):
        _write(folder / name, f"{name}.j2", report=report)
    return report


def write_comparison(folders: Sequence[Path], path: Path) -> Comparison:
    """Write the comparison of these runs as a page; returns what it says.

    Raises:
        ConfigError: see `compare`.
    """
    comparison = compare(folders)
    _write(path, "comparison.html.j2", comparison=comparison)
    return comparison


def _write(path: Path, template: str, **values: Any) -> None:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lightning_mdc.app.report", "templates"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["svg"] = _svg
    write_text(path, environment.get_template(template).render(**values))


def _svg(chart: Chart) -> Markup:
    """The picture as an element of a page: its colours are those of the page, its names its own."""
    written = io.StringIO()
    # The salt makes names in the file the same every time.
    with mpl.rc_context({"svg.hashsalt": chart.key, "svg.fonttype": "path"}):
        chart.figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    text = written.getvalue()
    # Two images that look the same would have one id; nothing refers to an image.
    text = re.sub(r' id="image\w+"', "", text[text.index("<svg") :])
    name = re.sub(r"\W", "-", chart.key)
    for before in (' id="', "url(#", 'xlink:href="#'):
        text = text.replace(before, f"{before}{name}-")
    for colour, variable in _THEMED.items():
        text = re.sub(re.escape(colour), f"var(--{variable})", text, flags=re.IGNORECASE)
    width = chart.figure.get_figwidth() * 96
    shape = f'role="img" aria-label="{Markup.escape(chart.title)}" style="min-width: {_SMALLEST * width:.0f}px"'
    return Markup(text.replace("<svg ", f"<svg {shape} ", 1))
