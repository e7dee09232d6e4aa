"""Draws what a wandb dashboard shows of a run from its offline file, without wandb's server.

``docs/wandb.png``, of `train.py`: ``python train.py logger=wandb_offline``, then ``python -m benchmarks.wandb_picture
runs/digits/2026-01-31_12-00-00``.

``docs/callback-wandb.png``, of README's five lines: ``python -m benchmarks.wandb_picture`` trains a module of its own
with Lightning's WandbLogger and the callback, in a minute.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from matplotlib import image as mpl_image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.app.data.digits import DigitsDataModule
from lightning_mdc.figures.style import BLUE, COLOURS, GREEN, INK, ORANGE, new_figure
from tests.wandb_file import OfflineRun, read, read_finished

DOCS = Path(__file__).parent.parent / "docs"
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
    _text(panels[2, 2], "\n".join(f"{name:<16}{run.summary[name]:>9.4g}" for name in _SUMMARY if name in run.summary))
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


# --- the callback in somebody's run -----------------------------------------------------------------------------------

# Pictures by row, and the columns of the table of runs; what the run does not have is left out.
_MEDIA = (
    ("charts/kept", "charts/macs", "charts/tokens"),
    ("charts/importance/heads", "charts/importance/neurons", "charts/importance/tokens"),
    ("charts/search/value", "charts/search/improvement", "charts/policy"),
)
_COLUMNS = ("macs_dense", "macs_slim", "macs_ratio", "params_dense", "params_slim", "params_ratio", "utilisation")


class Digits(lightning.LightningModule):
    """Any user's module."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"img_size": 12, "patch_size": 2, "embed_dim": 64, "depth": 6, "num_heads": 4}
        self.vit = VisionTransformer(in_chans=1, num_classes=10, **sizes)

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/top1", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def train(folder: Path) -> OfflineRun:
    """A dense training, then README's five lines with a WandbLogger."""
    torch.manual_seed(0)
    module, data = Digits(), DigitsDataModule()
    quiet = {"accelerator": "cpu", "enable_checkpointing": False, "enable_model_summary": False}
    lightning.Trainer(max_epochs=40, logger=False, **quiet).fit(module, data)
    logger = WandbLogger(name="my-run", project="digits", save_dir=folder, mode="offline", log_model=True)
    prune = mdc.MultiDimPruneCallback(budget=0.6)
    trainer = lightning.Trainer(
        max_epochs=5, callbacks=[prune], logger=logger, log_every_n_steps=5, default_root_dir=folder, **quiet
    )
    trainer.fit(module, data)
    logger.experiment.finish()
    return read_finished(folder)


def draw_callback(run: OfflineRun) -> Figure:
    """Curves, summary columns and media, each under the key that it has in wandb."""
    media = run.of_type("image-file")
    rows = [keys for keys in _MEDIA if any(key in media for key in keys)]
    figure, flat = new_figure(12, 2.4 + 2.9 * len(rows), 1 + len(rows), 3, height_ratios=[0.8] + [1] * len(rows))
    figure.suptitle(f"{run.about.project} / {run.about.display_name}", x=0.01, ha="left", color=INK)
    panels = np.reshape(flat, (1 + len(rows), 3))
    _curve(panels[0, 0], run, ("train/loss",), "trainer/global_step", (BLUE,))
    if "search/value" in run.keys:
        _curve(panels[0, 1], run, ("search/value", "search/incumbent"), "search/trial", (BLUE, GREEN))
    else:
        kept = [f"keep_ratio/{dimension}" for dimension in COLOURS]
        _curve(panels[0, 1], run, kept, "keep_ratio/block", COLOURS.values())
    names = [*(f"mdc/{column}" for column in _COLUMNS), "search/best", "val/top1"]
    values = [(name, run.summary[name]) for name in names if name in run.summary]
    lines = (f"{name:<18}{value:>12,.0f}" if value > 100 else f"{name:<18}{value:>12.4f}" for name, value in values)
    _text(panels[0, 2], "\n".join(lines))
    for row, keys in zip(panels[1:], rows, strict=True):
        for panel, key in zip(row, keys, strict=True):
            panel.set_axis_off()
            if key in media:
                panel.imshow(mpl_image.imread(run.folder / "files" / media[key]["path"]), interpolation="lanczos")
                panel.set_title(key, loc="left", fontsize=9, color=INK)
    return figure


def _curve(panel: Axes, run: OfflineRun, keys: Any, axis: str, colours: Any) -> None:
    for key, colour in zip(keys, colours, strict=True):
        lines = [line for line in run.history if key in line and axis in line]
        panel.plot([line[axis] for line in lines], [line[key] for line in lines], ".-", ms=4, lw=1, color=colour)
    _label(panel, ", ".join(keys), axis)


def _text(panel: Axes, text: str) -> None:
    panel.set_axis_off()
    panel.text(0, 1, f"summary\n\n{text}", va="top", family="monospace", fontsize=9, color=INK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a run made with logger=wandb_offline")
    parser.add_argument("--to", type=Path, help="the picture; docs/wandb.png, or without a run docs/callback-wandb.png")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.run is None:
            figure, to = draw_callback(train(Path(folder))), DOCS / "callback-wandb.png"
        else:
            file = sorted(arguments.run.glob("logs/wandb/offline-run-*/run-*.wandb"))[-1]
            figure, to = draw(read(file)), DOCS / "wandb.png"
        to = arguments.to or to
        figure.savefig(to, dpi=100)
    print(f"{to}, {to.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
