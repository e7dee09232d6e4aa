"""Pictures of what each block kept, how much it was asked to keep, and where its MACs went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightning_mdc.figures import style
from lightning_mdc.figures.numbers import scaled
from lightning_mdc.figures.style import BLUE, COLOURS, INK, LABELS, ORANGE, PALE, legend_above, new_figure, plain
from lightning_mdc.policy import DIMENSIONS, TOKENS, Plan, Policy, default_stages
from lightning_mdc.tokens.flow import tokens_after, tokens_kept

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_mdc.budget.cost_model import BlockMacs


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
    keep = {stage.block: stage.keep for stage in plan.leaving}
    tokens, counts = num_tokens, []
    for block in range(plan.depth):
        left = tokens_kept(tokens, keep.get(block, 1.0), num_prefix_tokens)
        tokens = int(tokens_after(tokens, left, plan.reduction))
        counts.append(tokens)
    units = [Kept(name, tuple(map(len, plan.kept[name])), sizes) for name, sizes in plan.sizes.items() if sizes]
    return *units, Kept(TOKENS, tuple(counts), (num_tokens,) * plan.depth)


def kept_figure(units: tuple[Kept, ...]) -> Figure:
    """Bars per block, one panel per dimension; the pale bar behind each is what the dense model has."""
    depth = len(units[0].dense)
    figure, panels = new_figure(style.width_of_blocks(depth), 1.7 * len(units) + 0.6, len(units), sharex=True)
    for panel, (dimension, kept, dense) in zip(panels, map(astuple, units), strict=True):
        panel.bar(range(depth), dense, width=0.8, color=PALE, label="dense")
        panel.bar(range(depth), kept, width=0.8, color=COLOURS[dimension], label="kept")
        for block, count in enumerate(kept):
            size = 8 if depth <= 16 else 6.5
            style.beside(panel, str(count), (block, count), (0, 2), ha="center", va="bottom", fontsize=size)
        panel.set_ylabel(dimension)
        panel.set_ylim(0, max(dense) * 1.2)
        style.few_ticks(panel.yaxis, 4, integer=True)
        plain(panel, f"{sum(kept) / max(sum(dense), 1):.0%} of {LABELS[dimension]}")
        legend_above(panel)
    panels[-1].set_xlabel("block")
    style.few_ticks(panels[-1].xaxis, integer=True)
    return figure


def policy_figure(policy: Policy, uniform: Policy | None, title: str = "") -> Figure:
    """Keep ratios per block (per token stage for tokens) of a policy, as bars, with the uniform policy's as a line."""
    both = [p for p in (policy, uniform) if p is not None]
    names = [name for name in DIMENSIONS if any(r < 1 for p in both for r in p.ratios[name])]
    names = names or list(DIMENSIONS)
    depth = max(len(policy.ratios[name]) for name in names)
    figure, panels = new_figure(style.width_of_blocks(depth), 1.6 * len(names) + 0.6, len(names))
    for panel, name in zip(panels, names, strict=True):
        ratios = np.asarray(policy.ratios[name])
        numbers = np.arange(len(ratios))
        panel.bar(numbers, np.ones(len(ratios)), width=0.8, color=PALE)
        panel.bar(numbers, ratios, width=0.8, color=COLOURS[name], label="this policy")
        if uniform is not None:
            even = np.broadcast_to(np.asarray(uniform.ratios[name]), ratios.shape)
            for number, ratio in enumerate(even):
                label = "uniform" if number == 0 else None
                panel.plot([number - 0.4, number + 0.4], [ratio, ratio], color=INK, linewidth=1.6, label=label)
        stages = policy.stages or default_stages(depth)
        blocks = stages if name == TOKENS and len(stages) == len(ratios) else numbers
        panel.set_xticks(numbers, [str(block) for block in blocks])
        panel.set_xlabel("token stage after the attention of block" if name == TOKENS else "block")
        plain(panel, f"{LABELS[name]} kept")
        panel.set_ylim(0, 1.02)
        panel.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        legend_above(panel)
    figure.suptitle(title, color=INK, fontsize=11)
    return figure


def macs_figure(dense: BlockMacs, slim: BlockMacs) -> Figure:
    """Where the MACs of an image went: attention and MLP stacked per block, dense (left, pale) beside slim (right)."""
    depth = len(dense.attention)
    figure, (panel,) = new_figure(style.width_of_blocks(depth + 1), 3.1)
    columns = np.arange(depth + 1)  # the last one for all that is in no block
    for model, shift, alpha, name in ((dense, -0.2, 0.38, "dense"), (slim, 0.2, 1.0, "slim")):
        lower = np.zeros(depth + 1)
        for part, amounts, colour in (
            ("attention", (*model.attention, 0), BLUE),
            ("MLP", (*model.mlp, 0), ORANGE),
            ("embedding and head", (*(0,) * depth, model.outside), INK),
        ):
            heights = np.asarray(amounts, dtype=float)
            label = part if name == "slim" else None
            panel.bar(columns + shift, heights, 0.38, bottom=lower, color=colour, alpha=alpha, label=label, linewidth=0)
            lower += heights
    panel.set_xticks(columns, [*map(str, range(depth)), "rest"])
    panel.set_xlabel("block: dense pale on the left, slim on the right")
    panel.set_ylabel("MACs per image")
    panel.yaxis.set_major_formatter(lambda macs, _: scaled(macs).strip())
    tallest = max(dense.outside, *(a + m for a, m in zip(dense.attention, dense.mlp, strict=True)))
    panel.set_ylim(0, 1.06 * tallest)
    plain(panel)
    legend_above(panel)
    return figure


def kept_overview_figure(runs: Sequence[tuple[str, tuple[Kept, ...]]]) -> Figure:
    """Fraction of all heads, neurons and tokens that each of several runs kept, a group of bars each."""
    figure, (panel,) = new_figure(max(style.WIDTH, 1.1 * len(runs) + 1), 2.6)
    for number, dimension in enumerate(DIMENSIONS):
        fractions = {
            run: sum(units.kept) / max(sum(units.dense), 1)
            for run, (_, kept) in enumerate(runs)
            for units in kept
            if units.dimension == dimension
        }
        at = np.fromiter(fractions, dtype=float) + 0.27 * (number - 1)
        panel.bar(at, list(fractions.values()), 0.25, color=COLOURS[dimension], label=LABELS[dimension])
    panel.set_xticks(range(len(runs)), [style.named(name, 40) for name, _ in runs], rotation=20, ha="right")
    panel.set_ylim(0, 1.15)
    panel.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    plain(panel)
    legend_above(panel)
    return figure
