"""Pictures of a search: is what they show what was found?"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_mdc.figures.search import cost_figure, dependence_figure, improvement_figure, progress_figure
from lightning_mdc.figures.style import save_figure
from lightning_mdc.gp_ei.process import GpEi
from lightning_mdc.gp_ei.space import Axis, Space
from lightning_mdc.gp_ei.study import Trial

VALUES = [0.5, 0.7, None, 0.4, 0.45, 0.1, None, 0.3]
ROWS = [
    Trial(i, {"x": i / 8}, cost=0.5 + i / 100, value=value, status="failed" if value is None else "done")
    for i, value in enumerate(VALUES)
]
RUNNING = Trial(8, {"x": 1.0}, cost=0.6)


def dots(figure, label: str) -> list[tuple[float, float]]:
    """Where the dots of that name in the legend are."""
    (found,) = [dots for dots in figure.axes[0].collections if dots.get_label() == label]
    return [(x, y) for x, y in np.asarray(found.get_offsets()).tolist()]


def crosses(figure) -> list[float]:
    return [x for line in figure.axes[0].lines if str(line.get_label()).startswith("failed") for x in line.get_xdata()]


def title(figure) -> str:
    return figure.axes[0].get_title(loc="left")


@pytest.mark.parametrize(
    ("direction", "best", "steps"),
    [("minimize", (5, 0.1), [0.5, 0.5, 0.4, 0.4, 0.1, 0.1, 0.1]), ("maximize", (1, 0.7), [0.5] + [0.7] * 6)],
)
def test_progress_shows_trials_failures_and_the_best_so_far(direction, best, steps):
    figure = progress_figure([*ROWS, RUNNING], direction)
    assert dots(figure, "trial") == [(i, value) for i, value in enumerate(VALUES) if value is not None]
    assert crosses(figure) == [2, 6]
    assert dots(figure, "best") == [best]
    (line,) = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 7]
    assert line.get_ydata().tolist() == steps
    assert line.get_xdata().tolist() == [0, 1, 3, 4, 5, 7, 8]
    assert title(figure) == f"best value {best[1]}: trial {best[0]} of 8"


def test_a_trial_far_worse_than_the_rest_does_not_hide_them():
    far = Trial(8, {"x": 1.0}, value=1e6, status="done")
    figure = progress_figure([*ROWS, far], "minimize")
    assert figure.axes[0].get_ylim()[1] < 10
    ((x, y),) = dots(figure, "far worse, to 1e+06")
    assert (x, y < 10) == (8, True)
    # On the other side it is no outlier but the best.
    assert dots(progress_figure([*ROWS, far], "maximize"), "best") == [(8, 1e6)]


def test_cost_shows_trials_against_the_target():
    figure = cost_figure([*ROWS, RUNNING], "maximize", 0.6)
    assert dots(figure, "trial") == [(0.5 + i / 100, value) for i, value in enumerate(VALUES) if value is not None]
    assert crosses(figure) == [0.52, 0.56]
    assert dots(figure, "best") == [(0.51, 0.7)]
    (line,) = [line for line in figure.axes[0].lines if line.get_label() == "target 0.6"]
    assert line.get_xdata() == [0.6, 0.6]
    low, high = figure.axes[0].get_xlim()
    assert low < 0.5 < 0.6 < high


@pytest.mark.parametrize("rows", [[], [RUNNING], [ROWS[2]], [ROWS[0]], [ROWS[0]] * 2])
def test_few_trials_can_be_drawn(rows, tmp_path):
    for figure in (progress_figure(rows, "minimize"), cost_figure(rows, "maximize", 0.6)):
        save_figure(figure, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 3000


def told(axes: list[Axis], objective, direction: str, n: int = 60) -> GpEi:
    space = Space(axes)
    search = GpEi(space, direction=direction)
    points = space.snap(space.from_unit(np.random.default_rng(0).random((n, len(axes)))))
    search.tell(points, [objective(point) for point in points])
    return search


def test_improvement_shows_what_was_expected_of_the_trials_that_were_chosen():
    rows = [Trial(i, {"x": i / 8}, improvement=None if i < 3 else 10.0**-i) for i in range(8)]
    figure = improvement_figure(rows)
    (panel,) = figure.axes
    found = np.asarray(panel.collections[0].get_offsets())
    assert found[:, 0].tolist() == [3, 4, 5, 6, 7]
    assert found[:, 1] == pytest.approx([10.0**-i for i in range(3, 8)])
    assert panel.get_yscale() == "log"
    (drawn,) = panel.lines
    assert drawn.get_xdata().tolist() == [0, 1, 2]
    assert not improvement_figure(rows[:2]).axes[0].collections  # a search that was killed early


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_dependence_shows_the_shape_of_what_matters(direction):
    axes = [Axis("idle", 0, 1), Axis("n", 1, 9, step=1, integer=True), Axis("kind", choices=("a", "b"))]
    axes += [Axis("lr", 1e-4, 1e-1, log=True), Axis("still", 2, 2)]
    search = told(axes, lambda p: 0.05 * (p[1] - 3) ** 2 + 0.5 * np.log10(p[3]) + p[2], direction)
    figure = dependence_figure(search)
    # A choice has no curve, nor an axis of one value; the rest by how much it matters.
    assert [panel.get_title(loc="left") for panel in figure.axes if panel.get_title(loc="left")] == ["n", "lr", "idle"]
    curves = {panel.get_title(loc="left"): panel.lines[0].get_xydata() for panel in figure.axes if panel.lines}
    n, lr, idle = curves["n"], curves["lr"], curves["idle"]
    assert n[:, 0].tolist() == list(range(1, 10))
    assert n[:, 1] - n[2, 1] == pytest.approx(0.05 * (n[:, 0] - 3) ** 2, abs=0.1)
    assert lr[:, 1] - lr[0, 1] == pytest.approx(0.5 * (np.log10(lr[:, 0]) + 4), abs=0.1)
    assert np.ptp(idle[:, 1]) < 0.1
    (panel,) = [panel for panel in figure.axes if panel.get_title(loc="left") == "lr"]
    assert panel.get_xscale() == "log"
    assert panel.collections[0].get_offsets()[0][0] == search.best.point[3]


def test_dependence_of_many_axes_shows_the_eight_that_matter_most(tmp_path):
    axes = [Axis(f"x.{i}", 0, 1) for i in range(12)]
    weights = np.array([0, 9, 0, 8, 0, 7, 0, 6, 5, 4, 3, 2])
    search = told(axes, lambda p: float(weights @ p), "maximize", 80)
    figure = dependence_figure(search)
    assert [panel.get_title(loc="left") for panel in figure.axes] == [
        f"x.{i}" for i in np.argsort(-weights, kind="stable")[:8]
    ]
    save_figure(figure, tmp_path / "figure.png")
    assert "the 8 of 12 that matter most" in figure.get_suptitle()


@pytest.mark.parametrize("axes", [[Axis("x")], [Axis("kind", choices=("a", "b", "c"))]])
def test_dependence_says_so_when_there_is_nothing_to_show(axes):
    search = told(axes, lambda p: float(p[0]), "minimize", 1 if axes[0].choices is None else 3)
    (text,) = dependence_figure(search).axes[0].texts
    assert "no dependence to show" in text.get_text()


@pytest.mark.slow
def test_neither_torch_nor_pyplot_is_needed():
    script = (
        "import sys; from lightning_mdc.figures.search import progress_figure\n"
        "assert 'matplotlib' not in sys.modules  # before something is drawn\n"
        "progress_figure([], 'minimize')\n"
        "found = {'torch', 'matplotlib.pyplot', 'skopt'} & set(sys.modules); assert not found, found"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", script], check=True, env=env)
