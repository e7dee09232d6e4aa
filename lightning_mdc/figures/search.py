"""Pictures of a search: how it went, what trials cost, which parameters matter. Without a display, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_mdc.figures import style
from lightning_mdc.figures.style import BLUE, GRAY, GREEN, INK, PAPER, RED, WIDTH, new_figure, plain
from lightning_mdc.gp_ei.process import Belief, GpEi
from lightning_mdc.gp_ei.study import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRIAL, _BEST, _FAILED = BLUE, GREEN, RED
# Panels of the dependence picture, values per curve, and trials that a curve is averaged over.
_PANELS, _GRID, _BACKGROUND = 8, 30, 100


def progress_figure(trials: Sequence[Trial], direction: str, value: str = "value") -> Figure:
    """Values by trial number: dots as they came, a line for the best so far, crosses for trials that failed.

    `value` is what they are called.
    """
    figure, (panel,) = new_figure(WIDTH, 3.1)
    done, limits = _draw_trials(panel, trials, [trial.number for trial in trials], direction)
    title = ""
    if done:
        best = (np.minimum if direction == "minimize" else np.maximum).accumulate(
            [trial.value or 0.0 for trial in done]
        )
        numbers = [trial.number for trial in done]
        end = max(trial.number for trial in trials)
        panel.step([*numbers, end], np.clip([*best, best[-1]], *limits), where="post", color=_BEST, lw=1.8)
        where = int(np.flatnonzero(best == best[-1])[0])
        style.ring(panel, numbers[where], best[-1], label="best")
        over = sum(trial.status != "running" for trial in trials)
        title = f"best value {best[-1]:.6g}: trial {numbers[where]} of {over}"
    _finish(panel, "trial", value, limits, title)
    style.few_ticks(panel.xaxis, integer=True)
    return figure


def cost_figure(trials: Sequence[Trial], direction: str, target: float, value: str = "value") -> Figure:
    """What trials cost against what they are worth, with a line at the target. `value` is what that is called."""
    figure, (panel,) = new_figure(WIDTH, 3.1)
    trials = [trial for trial in trials if trial.cost is not None]
    costs = [trial.cost or 0.0 for trial in trials]
    panel.axvline(target, color=INK, lw=1, ls=(0, (4, 3)), zorder=0, label=f"target {target:.6g}")
    done, limits = _draw_trials(panel, trials, costs, direction)
    title = ""
    if done:
        best = (min if direction == "minimize" else max)(done, key=lambda trial: trial.value or 0.0)
        style.ring(panel, best.cost or 0.0, best.value or 0.0, label="best")
        title = f"best value {best.value:.6g} at cost {best.cost:.6g}: trial {best.number}"
    left = min(costs, default=target)
    # Trials may all cost within a hair of the target: wide enough that the axis can say so in plain numbers.
    margin = max(0.08 * (target - left), 1e-4 * abs(target), 1e-12)
    panel.set_xlim(left - margin, target + margin)
    panel.ticklabel_format(axis="x", useOffset=False)
    style.few_ticks(panel.xaxis, 6)
    _finish(panel, "cost", value, limits, title)
    return figure


def improvement_figure(trials: Sequence[Trial]) -> Figure:
    """Expected improvement of every trial that the Gaussian process chose, when it chose it, on a logarithmic scale.

    Where the dots have come down, the process expects little of another trial: the search has converged.
    """
    figure, (panel,) = new_figure(WIDTH, 2.6)
    chosen = [trial for trial in trials if trial.improvement is not None]
    drawn = [trial.number for trial in trials if trial.improvement is None]
    # Below this it is rounding.
    least = 1e-12
    values = np.array([max(trial.improvement or 0.0, least) for trial in chosen])
    if len(chosen):
        panel.scatter([trial.number for trial in chosen], values, s=22, color=_TRIAL, alpha=0.75, linewidths=0)
        panel.set_yscale("log")
        panel.set_ylim(max(values.min(), values.max() * 1e-6) / 2, values.max() * 2)
    if drawn:
        bottom = panel.get_xaxis_transform()
        label = "drawn at random, or given"
        panel.plot(drawn, np.zeros(len(drawn)), "|", color=GRAY, ms=7, transform=bottom, clip_on=False, label=label)
        _legend_below(panel)
    panel.set_xlabel("trial")
    panel.set_ylabel("expected improvement")
    style.few_ticks(panel.xaxis, integer=True)
    plain(panel)
    return figure


def dependence_figure(search: GpEi) -> Figure:
    """Partial dependence of the process on the numeric axes that matter most, eight of them at most.

    A curve is the expected value along one axis, averaged over the trials' other coordinates. Ticks below are where
    trials were, the circle is the best one.
    """
    process, points = search.model(), np.array([o.point for o in search.history if o.value is not None])
    axes = np.flatnonzero(search.space.numeric & (search.space.high > search.space.low))
    if process is None or not len(points) or not len(axes):
        return style.text_figure("no dependence to show: too few trials, or no numeric parameter")
    background = points[np.linspace(0, len(points) - 1, min(len(points), _BACKGROUND)).astype(int)]
    curves = {axis: _dependence(search, process, background, axis) for axis in axes.tolist()}
    shown = sorted(curves, key=lambda axis: -np.ptp(curves[axis][1]))[:_PANELS]
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    figure, panels = new_figure(max(1.7 * columns, WIDTH), 1.7 * lines + 0.5, lines, columns, sharey=True)
    for panel, axis in zip(panels, shown, strict=False):
        _draw_dependence(panel, search, points[:, axis], axis, curves[axis])
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    for panel in panels[::columns]:
        panel.set_ylabel("expected value", fontsize=9)
    more = f"; the {len(shown)} of {len(curves)} that matter most" if len(curves) > len(shown) else ""
    figure.suptitle(f"value against each parameter, the others as in the trials{more}", color=INK, fontsize=10)
    return figure


def _dependence(search: GpEi, process: Belief, background: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Values along the axis of that number and what is expected there, both (grid,)."""
    space, axis = search.space, search.space.axes[number]
    low, high, step = axis.low, axis.high, axis.step
    count = round((high - low) / step) + 1 if step > 0 else _GRID
    if count <= _GRID and step > 0:
        grid = np.linspace(low, high, count)
    else:
        grid = np.geomspace(low, high, _GRID) if axis.log else np.linspace(low, high, _GRID)
    points = np.repeat(background[None], len(grid), axis=0)
    points[:, :, number] = grid[:, None]
    expected = process.expected(points.reshape(-1, len(space)))
    sign = 1.0 if search.direction == "minimize" else -1.0
    return grid, sign * expected.reshape(len(grid), -1).mean(axis=1)


def _draw_dependence(
    panel: Axes, search: GpEi, tried: np.ndarray, number: int, curve: tuple[np.ndarray, np.ndarray]
) -> None:
    axis = search.space.axes[number]
    panel.plot(*curve, color=_TRIAL, lw=1.8)
    panel.plot(tried, np.zeros(len(tried)), "|", color=GRAY, ms=7, transform=panel.get_xaxis_transform(), clip_on=False)
    if search.best is not None:
        best = search.best.point[number]
        x, y = (np.log(v) for v in (best, curve[0])) if axis.log else (best, curve[0])
        height = np.interp(x, y, curve[1])
        style.ring(panel, best, height, s=50, facecolors=PAPER, zorder=3)
    if axis.log:
        panel.set_xscale("log")
    else:
        style.few_ticks(panel.xaxis, 4, integer=axis.integer)
    plain(panel, axis.name)


# --- what they share --------------------------------------------------------------------------------------------------


def _limits(values: Sequence[float], direction: str) -> tuple[float, float]:
    """The range worth looking at: trials far worse than the rest are drawn at its edge."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    first, third = np.quantile(values, [0.25, 0.75])
    far = 4 * (third - first)
    if far > 0 and direction == "minimize":
        high = min(high, third + far)
    elif far > 0:
        low = max(low, first - far)
    return (low, high) if low < high else (low - 0.5 * max(abs(low), 1e-9), high + 0.5 * max(abs(high), 1e-9))


def _draw_trials(
    panel: Axes, trials: Sequence[Trial], x: Sequence[float], direction: str
) -> tuple[list[Trial], tuple[float, float]]:
    """(those that are done, the range of their values that is shown): dots, and along the bottom a cross for those that
    failed."""
    done = [trial for trial in trials if trial.status == "done"]
    values = np.array([trial.value for trial in done], dtype=float)
    at = np.array([where for where, trial in zip(x, trials, strict=True) if trial.status == "done"], dtype=float)
    low, high = _limits(values.tolist(), direction)
    inside = (values >= low) & (values <= high)
    looks: dict[str, Any] = {"color": _TRIAL, "alpha": 0.75, "linewidths": 0}
    panel.scatter(at[inside], values[inside], s=22, label="trial", **looks)
    for outside, edge, marker in ((values > high, high, "^"), (values < low, low, "v")):
        if outside.any():
            far = f"far worse, to {values[outside].max() if edge == high else values[outside].min():.3g}"
            panel.scatter(at[outside], np.full(outside.sum(), edge), s=26, marker=marker, label=far, **looks)
    if failed := [where for where, trial in zip(x, trials, strict=True) if trial.status == "failed"]:
        label, bottom = f"failed ({len(failed)} of {len(trials)})", np.full(len(failed), 0.03)
        panel.plot(
            failed, bottom, "x", color=_FAILED, ms=6, mew=1.6, transform=panel.get_xaxis_transform(), label=label
        )
    return done, (low, high)


def _finish(panel: Axes, x: str, y: str, limits: tuple[float, float], title: str) -> None:
    low, high = limits
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.set_ylim(low - 0.12 * (high - low), high + 0.06 * (high - low))
    plain(panel, title)
    _legend_below(panel)


def _legend_below(panel: Axes) -> None:
    panel.figure.legend(
        loc="outside lower left",
        fontsize=8,
        frameon=False,
        ncols=5,
        handletextpad=0.2,
        columnspacing=1.2,
        labelcolor=INK,
    )
