"""How every picture looks: colours that colour-blind readers tell apart (Okabe-Ito), few lines, no display needed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_mdc.files import replacing

# INK, PALE, GRAY and PAPER are swapped for those of the reader's theme where a page shows the picture, see `page`.
INK, GRAY, PALE, PAPER = "#333333", "#b8b8b8", "#e3e3e3", "#ffffff"
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
COLOURS = {"heads": BLUE, "neurons": ORANGE, "tokens": GREEN}
# A picture is as wide as a column of the page, which a phone shows whole; only many blocks need more.
WIDTH = 4.8


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, layout: Any = "constrained", **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of that size in inches, and its panels row by row."""
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    panels = np.asarray(figure.subplots(rows, columns, squeeze=False, **options)).reshape(-1)
    return figure, list(panels)


def width_of_blocks(depth: int) -> float:
    """Inches for a bar per block."""
    return max(WIDTH, 0.36 * depth + 1.2)


def plain(panel: Axes, title: str = "") -> None:
    """Only the lines that are read off."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(GRAY)
    panel.tick_params(labelsize=8, colors=INK)
    for label in (panel.xaxis.label, panel.yaxis.label):
        label.set_color(INK)
        label.set_fontsize(9)
    if title:
        panel.set_title(title, loc="left", fontsize=9.5, color=INK)


def legend_above(panel: Axes, columns: int = 3) -> None:
    """Beside the title, where no data are."""
    panel.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        fontsize=8,
        frameon=False,
        ncols=columns,
        borderaxespad=0.2,
        labelcolor=INK,
        handlelength=1.2,
        columnspacing=1.0,
    )


def named(name: str, most: int = 22) -> str:
    """A name that somebody gave, to be drawn: no formula, and of several synonyms or many letters the beginning."""
    short = name.split(",")[0].strip() or name
    return (short if len(short) <= most else f"{short[: most - 1]}…").replace("$", r"\$")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG so that it is there whole or not at all."""
    with replacing(path) as beside, warnings.catch_warnings():
        # Of names in scripts that there are no letters for.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(beside, dpi=160, format="png")
