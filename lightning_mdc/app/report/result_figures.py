"""Pictures of what it comes to: accuracy against cost, time, and the classes that lost or gained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from lightning_mdc.app.report.outcomes import ClassChange
from lightning_mdc.app.report.results import Results
from lightning_mdc.figures import style
from lightning_mdc.figures.numbers import seconds
from lightning_mdc.figures.style import BLUE, GRAY, GREEN, INK, PALE, RED, WIDTH, beside, named, new_figure, plain

# Classes in the picture; the table has all.
_CLASSES = 20


@dataclass(frozen=True)
class Point:
    """A policy or model to compare.

    Attributes:
        cost: as a fraction of dense.
        value: higher is better.
        name: written beside it; empty: one of the cloud.
        chosen: whether it is the one that was taken.
    """

    cost: float
    value: float
    name: str = ""
    chosen: bool = False


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other one beats: cheaper and at least as good, or as cheap and better; the cheapest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.value)):
        if not best or point.value > best[-1].value:
            best.append(point)
    return best


def front_figure(points: Sequence[Point], cost: str, value: str, percent: bool) -> Figure:
    """Value against cost of all points, a line along the best for each cost, a ring around what was chosen.

    Args:
        cost, value: what they are called.
        percent: whether values are fractions, to be read in per cent.
    """
    figure, (panel,) = new_figure(WIDTH, 3.1)
    cloud = [p for p in points if not p.name]
    if cloud:
        panel.scatter([p.cost for p in cloud], [p.value for p in cloud], s=18, color=BLUE, alpha=0.55, linewidths=0)
    best = front(points)
    panel.step([p.cost for p in best], [p.value for p in best], where="post", color=GREEN, lw=1.5, zorder=1)
    for point in points:
        if point.name:
            colour = GREEN if point.chosen else INK
            panel.scatter([point.cost], [point.value], s=30, color=colour, linewidths=0, zorder=3)
            beside(panel, point.name, (point.cost, point.value), (5, 4))
        if point.chosen:
            style.ring(panel, point.cost, point.value, s=90, zorder=3)
    panel.set_xlabel(cost)
    panel.set_ylabel(value)
    style.percent_ticks(panel.xaxis)
    if percent:
        style.percent_ticks(panel.yaxis)
    panel.margins(0.08)
    plain(panel)
    return figure


def latency_figure(results: Results) -> Figure:
    """Time per image of dense and slim, a panel per batch size: bars on scales of their own."""
    dense, slim = results.dense, results.slimmest
    sizes = results.batch_sizes
    figure, panels = new_figure(WIDTH, 0.85 * len(sizes) + 0.3, len(sizes))
    for panel, size in zip(panels, sizes, strict=True):
        times = [slim.latency[size], dense.latency[size]]
        panel.barh([0, 1], times, 0.7, color=[BLUE, PALE])
        faster = f"{seconds(times[0])}, {results.speedup(size):.2f}x as fast"
        for row, (time, text) in enumerate(zip(times, (faster, seconds(times[1])), strict=True)):
            beside(panel, text, (time, row), (4, 0), va="center")
        panel.set_yticks([0, 1], ["slim", "dense"])
        panel.set_xlim(0, max(times) * 1.45)
        panel.set_xticks([])
        plain(panel, f"batch {size}: time per image")
        panel.spines["bottom"].set_visible(False)
    return figure


def classes_figure(changes: Sequence[ClassChange]) -> Figure:
    """Change of each class's accuracy in points, the worst first; of many classes the worst and the best."""
    shown = list(changes)
    if len(shown) > _CLASSES:
        shown = [*shown[: _CLASSES * 3 // 4], *shown[-_CLASSES // 4 :]]
    figure, (panel,) = new_figure(WIDTH, 0.2 * len(shown) + 0.7)
    points = [100 * each.change for each in shown]
    rows = range(len(shown))
    panel.barh(rows, points, 0.75, color=[RED if p < 0 else GREEN for p in points])
    reach = max(1.0, *map(abs, points))
    for row, point in zip(rows, points, strict=True):
        offset, align = (4, "left") if point >= 0 else (-4, "right")
        text = f"{point:+.1f}" if point else "0"
        beside(panel, text, (point, row), (offset, 0), ha=align, va="center", fontsize=7.5)
    panel.set_xlim(-1.3 * reach, 1.3 * reach)
    panel.set_yticks(rows, [named(each.name) for each in shown])
    panel.invert_yaxis()
    panel.axvline(0, color=GRAY, lw=1)
    panel.set_xlabel("change of accuracy against dense, in points")
    plain(panel)
    return figure


def runs_figure(results: Mapping[str, Results]) -> Figure:
    """Top-1 against MACs of several runs: dense as a gray dot, the slim model joined to it by a line."""
    figure, (panel,) = new_figure(WIDTH, 3.3)
    for name, run in results.items():
        slim = (run.slimmest.macs / run.dense.macs, run.slim_top1)
        panel.plot(*zip((1.0, run.dense.top1), slim, strict=True), color=PALE, lw=1.2, zorder=1)
        panel.scatter(1.0, run.dense.top1, s=26, color=GRAY, linewidths=0)
        panel.scatter(*slim, s=34, color=BLUE, linewidths=0)
        beside(panel, named(name, 40), slim, (5, 4))
    panel.set_xlabel("MACs, as a fraction of the run's dense model")
    panel.set_ylabel("top-1 on the test images")
    for axis in (panel.xaxis, panel.yaxis):
        style.percent_ticks(axis)
    panel.margins(0.1)
    plain(panel)
    return figure
