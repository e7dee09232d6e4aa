"""Pictures of scores: which units of which block matter, and which of them the plan keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_mdc.figures.style import COLOURS, INK, PALE, PAPER, RED, WIDTH, colour_bar, few_ticks, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAP = "viridis"
# More columns than a picture has pixels for are averaged.
_COLUMNS = 400
# More units than this are too narrow for crosses.
_MOST_CROSSES = 40


def units_figure(scores: Sequence[np.ndarray], kept: Sequence[Sequence[int]] | None, unit: str) -> Figure:
    """Importance of each `unit` ("head") of each block, scaled to [0, 1] within its block, and which are removed: a map
    of all, or where they are many a row of ranks.

    Args:
        scores: per block, (units,).
        kept: per block, indices; None before there is a plan.
    """
    few = max(len(block) for block in scores) <= _MOST_CROSSES
    return (_all_units if few else _ranked_units)(scores, kept, unit)


def _all_units(scores: Sequence[np.ndarray], kept: Sequence[Sequence[int]] | None, unit: str) -> Figure:
    """Block x unit, with a cross on those that are removed."""
    most = max(len(block) for block in scores)
    image = np.full((len(scores), most), np.nan)
    for row, block in enumerate(scores):
        image[row, : len(block)] = _to_unit(block)
    figure, panel = _block_map(image, unit, (-0.5, most - 0.5))
    for row, units in enumerate(kept or ()):
        gone = sorted(set(range(len(scores[row]))) - set(units))
        panel.plot(gone, [row] * len(gone), "x", color=PAPER, ms=6, mew=2.6)
        panel.plot(gone, [row] * len(gone), "x", color=RED, ms=5, mew=1.5)
    panel.set_xticks(range(most))
    return figure


def _ranked_units(scores: Sequence[np.ndarray], kept: Sequence[Sequence[int]] | None, unit: str) -> Figure:
    """Block x unit, the most important first, with a line where it is cut."""
    most = max(len(block) for block in scores)
    columns = min(most, _COLUMNS)
    image = np.full((len(scores), columns), np.nan)
    for row, block in enumerate(scores):
        width = max(1, round(columns * len(block) / most))
        parts = np.array_split(np.sort(_to_unit(block))[::-1], min(width, len(block)))
        image[row, :width] = _stretched([part.mean() for part in parts], width)
    figure, panel = _block_map(image, f"{unit}s, ranked", (0, most))
    for row, units in enumerate(kept or ()):
        if len(units) < len(scores[row]):
            for colour, wide in ((PAPER, 4.0), (RED, 2.0)):
                panel.plot([len(units)] * 2, [row - 0.45, row + 0.45], color=colour, lw=wide, solid_capstyle="butt")
    return figure


def tokens_figure(scores: Sequence[np.ndarray], blocks: Sequence[int], grid: tuple[int, int]) -> Figure:
    """Importance of each patch position at each token stage, as a map of the image, scaled to [0, 1] within a stage.

    Args:
        scores: per stage, (positions,) in row-major order.
        blocks: of the stages.
        grid: (height, width) in patches.
    """
    count = len(scores)
    figure, panels = new_figure(WIDTH, WIDTH / max(count, 2) * grid[0] / grid[1] + 0.5, 1, count)
    for panel, stage, block in zip(panels, scores, blocks, strict=True):
        panel.imshow(_to_unit(stage).reshape(grid), cmap=_MAP, vmin=0, vmax=1, interpolation="nearest")
        panel.set_axis_off()
        panel.set_title(f"block {block}", fontsize=9, color=INK, loc="left")
    return figure


def histograms_figure(scores: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """How importance is spread, one panel per dimension: all units, scaled to [0, 1] within their block or stage."""
    shown = {name: blocks for name, blocks in scores.items() if blocks}
    figure, panels = new_figure(WIDTH, 1.9, 1, len(shown))
    for panel, (name, blocks) in zip(panels, shown.items(), strict=True):
        values = np.concatenate([_to_unit(block) for block in blocks])
        bins = min(30, max(5, math.isqrt(len(values))))
        panel.hist(values, bins=bins, range=(0, 1), color=COLOURS[name], linewidth=0)
        panel.set_xlabel("importance")
        few_ticks(panel.xaxis, 2)
        few_ticks(panel.yaxis, 3, integer=True)
        plain(panel, name)
    return figure


def _block_map(image: np.ndarray, units: str, extent: tuple[float, float]) -> tuple[Figure, Axes]:
    """A row of colours per block; `extent` is what the left and right edge are on the axis of the units."""
    depth = len(image)
    figure, (panel,) = new_figure(WIDTH, 0.2 * depth + 1.1)
    panel.set_facecolor(PALE)
    picture = panel.imshow(
        np.ma.masked_invalid(image),
        cmap=_MAP,
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(*extent, depth - 0.5, -0.5),
    )
    panel.set_xlabel(units)
    panel.set_ylabel("block")
    few_ticks(panel.yaxis, 12, integer=True)
    plain(panel)
    colour_bar(panel, picture, aspect=14, ticks=[0, 1]).ax.set_yticklabels(["least", "most"])
    return figure, panel


def _to_unit(scores: np.ndarray) -> np.ndarray:
    """To [0, 1]: only the order within a block decides, and blocks differ in scale."""
    low, high = float(scores.min()), float(scores.max())
    return (scores - low) / (high - low) if high > low else np.zeros_like(scores, dtype=float)


def _stretched(values: Sequence[float], columns: int) -> np.ndarray:
    """`values` repeated to so many columns."""
    return np.asarray(values)[np.arange(columns) * len(values) // columns]
