"""Pictures of what each dimension of each block bears alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_mdc.figures.style import (
    GRAY,
    INK,
    LABELS,
    WIDTH,
    colour_bar,
    new_figure,
    percent_ticks,
    plain,
    text_figure,
)
from lightning_mdc.policy_search.sensitivity import Cut, Sensitivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.figure import Figure

_NOT_YET, _NOTHING_YET = "#f2f2f2", "no cut has been tried yet"
# On a map's colours, which are the same on a light page and on a dark one; the theme's would not be read there.
_ON_PALE, _ON_DARK = "#1c1c1c", "#fdfdfd"
_WORDS = {"accuracy": "top-1", "kl": "KL to dense (nats)"}
# Below this KL two curves differ by noise; above it they are drawn by orders of magnitude.
_SMALL_KL = 0.01
# More cells than this are too narrow for numbers in them.
_MOST_NUMBERS = 14


def sensitivity_figure(sensitivity: Sensitivity, measure: str = "accuracy") -> Figure:
    """Accuracy or KL against the keep ratio, a panel per dimension, a line per block from pale (early) to dark (late).

    Args:
        sensitivity: also of a measurement that is under way.
        measure: ``"accuracy"`` or ``"kl"``.
    """
    names = sensitivity.dimensions
    if not names:
        return text_figure(_NOTHING_YET)
    figure, panels = new_figure(WIDTH, 1.9 * len(names) + 0.5, len(names), sharex=True, sharey=True)
    blocks = sorted({cut.block for cut in sensitivity.cuts})
    colours = _colours(blocks[-1] + 1)
    for panel, name in zip(panels, names, strict=True):
        for block in sensitivity.blocks(name):
            curve = sensitivity.curve(name, block)
            keep, values = [cut.keep for cut in curve], [getattr(cut, measure) for cut in curve]
            panel.plot(keep, values, "-o", ms=2.6, lw=1.3, color=colours(block), label=f"block {block}")
        _finish(panel, name, measure)
    dense = max((cut.accuracy for cut in sensitivity.cuts if cut.keep == 1), default=None)
    for panel in panels:
        if measure == "accuracy" and dense is not None:
            panel.axhline(dense, color=GRAY, lw=0.8, ls=(0, (4, 3)), zorder=0)
    if measure == "kl":  # one scale for all panels
        panels[-1].set_ylim(0, 1.3 * max(max(cut.kl for cut in sensitivity.cuts), _SMALL_KL))
    panels[-1].set_xlim(1.02, -0.02)
    panels[-1].set_xlabel("kept of this block's units, all other blocks whole", fontsize=9, color=INK)
    _depth_bar(panels, colours)
    return figure


def sensitivity_map(sensitivity: Sensitivity) -> Figure:
    """Percentage points of top-1 lost, by block and keep ratio: a map per dimension; what is not yet known is pale."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    names = sensitivity.dimensions
    rows = [len(sensitivity.blocks(name)) for name in names]
    if not names:
        return text_figure(_NOTHING_YET)
    figure, panels = new_figure(WIDTH, 0.24 * sum(rows) + 0.75 * len(names) + 0.5, len(names), height_ratios=rows)
    dense = max((cut.accuracy for cut in sensitivity.cuts if cut.keep == 1), default=0.0)
    worst = max(dense - min(cut.accuracy for cut in sensitivity.cuts), 0.01)
    norm, colours = Normalize(0, 100 * worst), colormaps["magma_r"].with_extremes(bad=_NOT_YET)
    for panel, name in zip(panels, names, strict=True):
        columns = _columns(sensitivity, name)
        lost = np.full((len(sensitivity.blocks(name)), len(columns)), np.nan)
        for row, block in enumerate(sensitivity.blocks(name)):
            for cut in sensitivity.curve(name, block):
                lost[row, columns.index(_percent(cut))] = 100 * (dense - cut.accuracy)
        panel.imshow(lost, cmap=colours, norm=norm, aspect="auto")
        _numbers(panel, lost, norm)
        panel.set_xticks(range(len(columns)), [f"{column} %" for column in columns])
        panel.set_yticks(range(len(lost)), [str(block) for block in sensitivity.blocks(name)])
        panel.set_ylabel("block")
        plain(panel, f"{LABELS[name]} kept")
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    colour_bar(panels, ScalarMappable(norm, colours), "top-1 lost (percentage points)")
    return figure


def _colours(depth: int) -> ListedColormap:
    """A colour per block; neither end of the map vanishes on a light page or a dark one."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis_r"](np.linspace(0.12, 0.72, depth)))


def _depth_bar(panels: list[Axes], colours: ListedColormap) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm

    depth = colours.N
    norm = BoundaryNorm(np.arange(depth + 1) - 0.5, depth)
    bar = colour_bar(panels, ScalarMappable(norm, colours), "block", ticks=range(0, depth, -(-depth // 12)))
    bar.ax.minorticks_off()


def _finish(panel: Axes, name: str, measure: str) -> None:
    panel.set_ylabel(_WORDS[measure])
    plain(panel, LABELS[name])
    panel.set_xticks([1, 0.75, 0.5, 0.25, 0], ["100 %", "75 %", "50 %", "25 %", "0 %"])
    if measure == "kl":
        panel.set_yscale("symlog", linthresh=_SMALL_KL)
    else:
        percent_ticks(panel.yaxis, decimals=0)


def _percent(cut: Cut) -> int:
    return round(100 * cut.keep)


def _columns(sensitivity: Sensitivity, name: str) -> list[int]:
    """Keep ratios in percent, from whole to nothing; blocks with other numbers of units may have others."""
    return sorted({_percent(cut) for cut in sensitivity.cuts if cut.dimension == name}, reverse=True)


def _numbers(panel: Axes, lost: np.ndarray, norm: Normalize) -> None:
    if lost.shape[1] > _MOST_NUMBERS:
        return
    for (row, column), points in np.ndenumerate(lost):
        if np.isfinite(points):
            colour = _ON_DARK if norm(points) > 0.55 else _ON_PALE
            text = f"{points:.0f}" if abs(points) >= 9.95 else f"{points:.1f}".replace("-0.0", "0.0")
            panel.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
