"""Pictures of what was kept. Drawn without a display; colours are told apart by colour-blind readers (Okabe-Ito)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_mdc.policy import Plan, kept_tokens

_DENSE, _INK = "#e3e3e3", "#333333"
_COLOURS = {"heads": "#0072B2", "neurons": "#E69F00", "tokens": "#009E73"}
_LABELS = {"heads": "attention heads", "neurons": "MLP neurons", "tokens": "tokens in the MLP"}


@dataclass(frozen=True)
class Kept:
    """Units per block, kept and dense, of one dimension: both (blocks,)."""

    dimension: str
    kept: tuple[int, ...]
    dense: tuple[int, ...]


def kept_by_block(plan: Plan, num_tokens: int, num_prefix_tokens: int) -> tuple[Kept, ...]:
    """What each block keeps of heads, neurons and tokens; a dimension that cannot be cut is left out.

    Args:
        num_tokens: of the dense model, prefix tokens counted.
        num_prefix_tokens: of these, the ones that always stay.
    """
    keep = {stage.block: stage.keep for stage in plan.tokens}
    tokens, counts = num_tokens, []
    for block in range(plan.depth):
        left = kept_tokens(tokens, keep.get(block, 1.0), num_prefix_tokens)
        if left < tokens:
            tokens = left + plan.fuse
        counts.append(tokens)
    found = (
        Kept("heads", tuple(len(kept) for kept in plan.heads), plan.num_heads),
        Kept("neurons", tuple(len(kept) for kept in plan.neurons), plan.num_neurons),
        Kept("tokens", tuple(counts), (num_tokens,) * plan.depth),
    )
    return tuple(units for units in found if units.dense)


def kept_figure(units: tuple[Kept, ...], title: str) -> Figure:
    """Bars per block, one panel per dimension; the pale bar behind each is what the dense model has."""
    depth = len(units[0].dense)
    figure = Figure(figsize=(max(6.4, 0.45 * depth + 2), 2.1 * len(units) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = np.atleast_1d(np.asarray(figure.subplots(len(units), 1, sharex=True)))
    for panel, dimension in zip(panels, units, strict=True):
        _draw(panel, dimension)
    panels[-1].set_xlabel("block")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title, color=_INK, fontsize=12)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG so that it is there whole or not at all."""
    beside = path.with_name(f".{path.name}.tmp")
    figure.savefig(beside, dpi=160, format="png")
    beside.replace(path)


def _draw(panel: Axes, units: Kept) -> None:
    blocks = np.arange(len(units.dense))
    panel.bar(blocks, units.dense, width=0.8, color=_DENSE, label="dense")
    panel.bar(blocks, units.kept, width=0.8, color=_COLOURS[units.dimension], label="kept")
    size = 9 if len(blocks) <= 16 else 7
    for block, kept in zip(blocks, units.kept, strict=True):
        panel.annotate(
            str(kept),
            (block, kept),
            (0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=_INK,
            fontsize=size,
        )
    share = sum(units.kept) / max(sum(units.dense), 1)
    panel.set_title(f"{share:.0%} of {_LABELS[units.dimension]}", loc="left", fontsize=10, color=_INK)
    panel.set_ylabel(units.dimension)
    panel.set_ylim(0, max(units.dense) * 1.2)
    panel.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    panel.spines[["top", "right"]].set_visible(False)
    # Beside the title, above the bars.
    panel.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=8, frameon=False, ncols=2, borderaxespad=0.2)
