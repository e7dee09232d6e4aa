"""Draws what a wandb dashboard shows of a run from its offline file, without wandb's server: ``docs/wandb.png``.

``python train.py logger=wandb_offline``, then ``python -m benchmarks.wandb_picture runs/digits/2026-01-31_12-00-00``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_mdc.figures.style import BLUE, GREEN, INK, ORANGE, new_figure
from tests.wandb_file import OfflineRun, read

_SUMMARY = (
    *("top1/dense", "top1/slim", "top1/finetuned", "macs_ratio", "params_ratio", "latency_ratio", "budget"),
    "search/best",
)


def draw(run: OfflineRun) -> Figure:
    """Six panels and the summary columns, each under the key that it has in wandb."""
    figure, flat = new_figure(11, 7.2, 3, 3)
    figure.suptitle(f"{run.about.project} / {run.about.display_name}", x=0.01, ha="left", color=INK)
    panels = np.reshape(flat, (3, 3))
    for panel, training, loss in zip(panels[0], ("dense", "finetuned/seed0", "finetuned/seed1"), "tkk", strict=True):
        key = f"{training}/train/{'task' if loss == 't' else 'kd'}_step"
        lines = [line for line in run.history if key in line]
        panel.plot([line[f"{training}/step"] for line in lines], [line[key] for line in lines], color=BLUE, lw=1)
        _label(panel, key, f"{training}/step")
    trials = run.table("search/trials")
    numbers = [row["trial"] for row in trials]
    panels[1, 0].plot(numbers, [row["value"] for row in trials], "o", ms=3, color=BLUE)
    panels[1, 0].step(numbers, [row["incumbent"] for row in trials], where="post", color=GREEN)
    _label(panels[1, 0], "search/progress", "trial")
    expected = [row for row in trials if row["improvement"] is not None]
    panels[1, 1].plot([row["trial"] for row in expected], [row["improvement"] for row in expected], color=ORANGE)
    _label(panels[1, 1], "search/expected", "trial")
    _histogram(panels[1, 2], run, "scores/neurons/block02")
    for panel, dimension in zip(panels[2, :2], ("heads", "neurons"), strict=True):
        rows = run.table(f"kept/{dimension}_by_block")
        panel.bar(range(len(rows)), [row["kept"] for row in rows], color=GREEN)
        _label(panel, f"kept/{dimension}", "block")
    panels[2, 2].set_axis_off()
    text = "\n".join(f"{name:<16}{run.summary[name]:>9.4g}" for name in _SUMMARY if name in run.summary)
    panels[2, 2].text(0, 1, f"summary\n\n{text}", va="top", family="monospace", fontsize=9, color=INK)
    return figure


def _histogram(panel: Axes, run: OfflineRun, key: str) -> None:
    found = run.of_type("histogram")[key]
    edges = np.asarray(found["bins"])
    panel.bar(edges[:-1], found["values"], width=np.diff(edges), align="edge", color=BLUE)
    _label(panel, key, "score")


def _label(panel: Axes, title: str, x: str) -> None:
    panel.set_title(title, loc="left", fontsize=9, color=INK)
    panel.set_xlabel(x, fontsize=8, color=INK)
    panel.tick_params(labelsize=8, colors=INK)
    panel.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run made with logger=wandb_offline")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent.parent / "docs" / "wandb.png")
    arguments = parser.parse_args()
    file = sorted(arguments.run.glob("logs/wandb/offline-run-*/run-*.wandb"))[-1]
    draw(read(file)).savefig(arguments.to, dpi=100)
    print(f"{arguments.to}, {arguments.to.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
