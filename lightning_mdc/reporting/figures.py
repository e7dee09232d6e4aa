"""Pictures of what was kept. Drawn without a display; colours are told apart by colour-blind readers (Okabe-Ito)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_mdc.policy import DIMENSIONS, Plan, Policy, default_stages, kept_tokens

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


def policy_figure(policy: Policy, uniform: Policy, title: str) -> Figure:
    """Keep ratios per block (per stage for tokens) of a policy, as bars, with the uniform policy's as a line."""
    names = [name for name in DIMENSIONS if any(r < 1 for p in (policy, uniform) for r in getattr(p, name))]
    names = names or list(DIMENSIONS)
    depth = max(len(getattr(policy, name)) for name in names)
    figure = Figure(figsize=(max(6.4, 0.4 * depth + 2), 1.7 * len(names) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = np.atleast_1d(np.asarray(figure.subplots(len(names), 1)))
    for panel, name in zip(panels, names, strict=True):
        ratios, even = (np.asarray(getattr(p, name)) for p in (policy, uniform))
        places = np.arange(len(ratios))
        even = np.broadcast_to(even, ratios.shape) if len(even) == 1 else even
        panel.bar(places, np.ones(len(ratios)), width=0.8, color=_DENSE)
        panel.bar(places, ratios, width=0.8, color=_COLOURS[name], label="this policy")
        for place, ratio in zip(places, even, strict=True):
            label = "uniform" if place == 0 else None
            panel.plot([place - 0.4, place + 0.4], [ratio, ratio], color=_INK, linewidth=1.6, label=label)
        stages = policy.stages or default_stages(depth)
        blocks = stages if name == "tokens" and len(stages) == len(ratios) else places
        panel.set_xticks(places, [str(block) for block in blocks])
        panel.set_xlabel("token stage after the attention of block" if name == "tokens" else "block", color=_INK)
        panel.set_title(f"{_LABELS[name] if name != 'tokens' else 'tokens'} kept", loc="left", fontsize=10, color=_INK)
        panel.set_ylim(0, 1.02)
        panel.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=8, frameon=False, ncols=2, borderaxespad=0.2)
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
