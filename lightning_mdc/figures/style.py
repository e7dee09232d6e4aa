"""How every picture looks: colours that colour-blind readers tell apart (Okabe-Ito), few lines, no display needed.

matplotlib is imported when something is drawn, here and in all pictures.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lightning_mdc.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.cm import ScalarMappable
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure

# INK, PALE, GRAY and PAPER are swapped for the theme's where a page shows the picture, see `app.report.write`.
INK, GRAY, PALE, PAPER = "#333333", "#b8b8b8", "#e3e3e3", "#ffffff"
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
COLOURS = {"heads": BLUE, "neurons": ORANGE, "tokens": GREEN}
LABELS = {"heads": "attention heads", "neurons": "MLP neurons", "tokens": "tokens"}
# A picture is as wide as a column of the page, which a phone shows whole; only many blocks need more.
WIDTH = 4.8


def new_figure(
    width: float,
    height: float,
    rows: int = 1,
    columns: int = 1,
    layout: Literal["constrained"] | None = "constrained",
    **options: Any,
) -> tuple[Figure, list[Axes]]:
    """A figure of that size in inches, and its panels row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    panels = np.asarray(figure.subplots(rows, columns, squeeze=False, **options)).reshape(-1)
    return figure, list(panels)


def text_figure(text: str) -> Figure:
    """A line of text, where there is nothing to draw (yet)."""
    figure, (panel,) = new_figure(WIDTH, 1.2)
    panel.set_axis_off()
    panel.text(0, 0.5, text, color=INK)
    return figure


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


def few_ticks(axis: Axis, most: int | Literal["auto"] = "auto", integer: bool = False) -> None:
    """At most so many intervals between round numbers, whole ones if `integer`."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=integer))


def percent_ticks(axis: Axis, decimals: int | None = None) -> None:
    """Fractions are read in per cent; as many decimals as the axis needs if None."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=decimals))


def ring(panel: Axes, x: float, y: float, **options: Any) -> None:
    """Around the dot of the best one."""
    looks = {"s": 60, "facecolors": "none", "edgecolors": GREEN, "lw": 1.8}
    panel.scatter([x], [y], **{**looks, **options})


def colour_bar(
    panels: Axes | list[Axes], colours: ScalarMappable, label: str = "", aspect: float = 40, **options: Any
) -> Colorbar:
    """A slim scale beside the panels, without a frame."""
    first = panels[0] if isinstance(panels, list) else panels
    bar = first.figure.colorbar(colours, ax=panels, aspect=aspect, pad=0.02, **options)
    bar.set_label(label, fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8, colors=INK, length=0)
    bar.outline.set_visible(False)
    return bar


def legend_above(panel: Axes) -> None:
    """Beside the title, where no data are."""
    panel.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        fontsize=8,
        frameon=False,
        ncols=3,
        borderaxespad=0.2,
        labelcolor=INK,
        handlelength=1.2,
        columnspacing=1.0,
    )


def beside(panel: Axes, text: str, point: tuple[float, float], offset: tuple[float, float], **options: Any) -> None:
    """Write `text` beside a point, so many typographic points away from it."""
    panel.annotate(text, point, offset, textcoords="offset points", **{"fontsize": 8, "color": INK, **options})


def named(name: str, most: int = 22) -> str:
    """A name that somebody gave, to be drawn: no formula, and of several synonyms or many letters the beginning."""
    short = name.split(",")[0].strip() or name
    return (short if len(short) <= most else f"{short[: most - 1]}…").replace("$", r"\$")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG so that it is there whole or not at all."""
    with replacing(path) as unfinished, warnings.catch_warnings():
        # Of names in scripts that there are no letters for.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(unfinished, dpi=160, format="png")
    figure.set_layout_engine("none")  # the panels have their places: a page need not find them again, which takes long


def png_of(figure: Figure) -> bytes:
    """A PNG for a dashboard."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
