"""Reports as one HTML file each: no network, no script, readable on a phone, light or dark as the reader has it."""

from __future__ import annotations

import io
import re
from itertools import groupby
from typing import TYPE_CHECKING, Any

import jinja2
import matplotlib as mpl
from markupsafe import Markup

from lightning_mdc.figures import style

if TYPE_CHECKING:
    from lightning_mdc.app.report.charts import Chart
    from lightning_mdc.app.report.comparing import Comparison
    from lightning_mdc.app.report.report import Report

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


def page(report: Report) -> str:
    """One run."""
    sections = [(name, list(found)) for name, found in groupby(report.charts, key=lambda chart: chart.section)]
    return _render("report.html.j2", report=report, sections=sections)


def comparison_page(comparison: Comparison) -> str:
    """Several runs."""
    return _render("comparison.html.j2", comparison=comparison)


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lightning_mdc.app.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = svg
    return environment.get_template(template).render(**values)


def svg(chart: Chart) -> Markup:
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
