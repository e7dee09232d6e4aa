"""Which recipe finetunes best, what was trained from scratch here and what was given? Behind `recipes` in conf.

    .venv/bin/python train.py experiment=digits stage=[dense]
    .venv/bin/python train.py experiment=cifar10 ... stage=[dense]
    .venv/bin/python train.py experiment=cifar10 ... model.checkpoint=... dense.epochs=0 stage=[dense]
    .venv/bin/python benchmarks/recipes.py --run RUN --work FOLDER      # a run at a time; goes on where it was stopped
    .venv/bin/python benchmarks/recipes.py --quick                      # digits, three recipes; trains the dense model

Slim is cut uniformly to 60 % of the MACs and compensated. Slim and dense are trained by each recipe as ``distill``
does, under the dense teacher and with the augmentation of the run, for a few epochs, and are tested before and after:
rates over two decades for AdamW and Muon, which begin and end at a fiftieth, with and without layer decay, and around
the default without gradient clipping and with an average of the weights.

Every finished row is kept in ``--work``. Leaves ``benchmarks/results/recipes.json`` and ``.png`` and the table in
``docs/benchmarks.md``.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from accuracy import digits_run
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from matplotlib.figure import Figure
from pages import folder_of, write_pages
from targets import Target, verdicts
from torch import Tensor, nn
from tqdm.auto import tqdm
from weight_sharing import labelled, training, values

import lightning_mdc as mdc
from lightning_mdc.app import build
from lightning_mdc.app.fingerprints import fingerprint_of
from lightning_mdc.budget import num_params
from lightning_mdc.distillation import DistillationModule
from lightning_mdc.figures.style import new_figure, save_figure
from lightning_mdc.files import write_json

MODELS = ("slim", "dense")
CALIBRATION = 512
LEAST_SHOWN = -10  # points, in the picture


@dataclass(frozen=True)
class Recipe:
    """What is varied: keyword arguments of ``create_optimizer_v2``, and the Trainer's of clipping and averaging."""

    opt: str
    lr: float
    layer_decay: float | None = None
    clip: float | None = 1.0
    ema: float | None = None

    def __str__(self) -> str:
        rate = f"{self.lr:.1e}".replace(".0e", "e").replace("e-0", "e-")
        name = f"{'AdamW' if self.opt == 'adamw' else self.opt.capitalize()} {rate}"
        decay = f", layer decay {self.layer_decay}" if self.layer_decay not in (None, 1.0) else ""
        return name + decay + ("" if self.clip else ", not clipped") + (f", EMA {self.ema}" if self.ema else "")


FINETUNE, SCRATCH = Recipe("adamw", 5e-5, 0.75), Recipe("muon", 1e-3)
# In the order of what they tell: a benchmark that is stopped has the most of it.
RECIPES = tuple(
    dict.fromkeys(
        (
            FINETUNE,
            replace(SCRATCH, lr=4e-3),
            *(replace(FINETUNE, lr=lr) for lr in (1.5e-5, 1.5e-4)),
            replace(FINETUNE, layer_decay=None),
            *(replace(SCRATCH, lr=lr, layer_decay=0.75) for lr in (1e-4, 4e-4)),
            replace(FINETUNE, ema=0.9),
            replace(FINETUNE, clip=None),
            SCRATCH,
            *(replace(FINETUNE, lr=lr) for lr in (5e-6, 5e-4)),
            *(replace(FINETUNE, lr=lr, layer_decay=None) for lr in (1.5e-5, 1.5e-4)),
            *(replace(SCRATCH, lr=lr) for lr in (4e-4, 1e-4)),
            *(replace(FINETUNE, lr=lr, layer_decay=None) for lr in (5e-6, 5e-4)),
            *(replace(SCRATCH, lr=lr, layer_decay=0.75) for lr in (4e-5, 1e-3, 4e-3)),
            replace(SCRATCH, clip=None),
            replace(SCRATCH, ema=0.9),
        )
    )
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run of train.py with a dense model; --quick makes one on digits")
    parser.add_argument("--work", type=Path, help="folder for what is finished (default: RUN/recipes)")
    parser.add_argument("--model", action="append", choices=MODELS, help="these alone; may be repeated")
    parser.add_argument("--recipes", type=int, help="so many of them, the most telling ones; all if not given")
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--images", type=int, help="training images of an epoch at most; the run's if not given")
    parser.add_argument("--test-images", type=int, help="the same of test images")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--precision", default="32-true", help="of the Trainer (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch; one per core if not given")
    parser.add_argument("--quick", action="store_true", help="digits, three recipes; pages stay as they are")
    parser.add_argument("--table-only", action="store_true", help="draw and write from the JSON that is there")
    asked = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    results = folder_of(asked.quick)
    path = results / "recipes.json"
    if asked.quick:
        path.unlink(missing_ok=True)
        asked.recipes, asked.work = asked.recipes or 3, asked.work or results / "recipes-work"
        shutil.rmtree(asked.work, ignore_errors=True)  # rows of older code
    elif asked.run is None and not asked.table_only:
        parser.error("--run: give the folder of a run of train.py with a dense model (or --quick)")
    if not asked.table_only:
        benchmark = Benchmark(asked.run or digits_run(), asked)
        for measured in benchmark.measured():
            found = {"runs": stored(path)["runs"] | {benchmark.name: measured}}  # others may write theirs meanwhile
            write_json(path, found | {"targets": [target.facts() for target in judged(found)]})
    found = stored(path)
    print(text(found))
    save_figure(figure(found), results / "recipes.png")
    if not asked.quick:
        write_pages("recipes", found)


def stored(path: Path) -> dict[str, Any]:
    """What was measured of all runs so far."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    return found


# --- measuring --------------------------------------------------------------------------------------------------------


class Benchmark:
    """One dense model, its data, and what is asked of them."""

    def __init__(self, run: Path, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.settings = json.loads((run / "settings.json").read_text())
        self.name: str = self.settings["name"]
        fewer = {"max_train_images": asked.images, "max_test_images": asked.test_images}
        fewer = {key: most for key, most in fewer.items() if key in self.settings["data"] and most is not None}
        self.settings["data"] |= fewer
        self.dense = mdc.load(run / "dense").eval()
        self.data = build.build_data(self.settings)
        self.test = labelled(self.data.test_dataloader(), None)
        self.options = {key: getattr(asked, key) for key in ("budget", "images", "epochs", "precision", "test_images")}
        mark = fingerprint_of({**self.options, "model": self.settings["model"]}, {"run": run.name})
        self.work: Path = (asked.work or run / "recipes") / f"{self.name}-{mark[:12]}"
        self.work.mkdir(parents=True, exist_ok=True)

    def measured(self) -> Iterator[dict[str, Any]]:
        """All numbers so far, after every row."""
        path = self.work / "rows.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        optimizer = self.settings["distillation"]["optimizer"]
        about = {
            **self.options,
            "model": f"{type(self.dense).__name__}, {len(mdc.models.find_anatomy(self.dense).blocks)} blocks",
            "macs": mdc.macs(self.dense),
            "params": num_params(self.dense),
            "train_images": len(self.data.splits.train),  # type: ignore[arg-type]
            "test_images": len(self.test[1]),
            "batch_size": self.data.batch_size,
            "before": {},
            "in_force": str(Recipe(optimizer["opt"], optimizer["lr"], optimizer.get("layer_decay"))),
            "rows": rows,
        }
        starts = {"slim": self.slim(), "dense": self.dense}
        about["before"] = {name: values(model, self.test) for name, model in starts.items()}
        wanted = [(recipe, name) for recipe in RECIPES[: self.asked.recipes] for name in self.asked.model or MODELS]
        left = [each for each in wanted if _place(*each) not in {(row["recipe"], row["model"]) for row in rows}]
        yield about
        for recipe, name in tqdm(left, self.name, initial=len(wanted) - len(left), total=len(wanted), unit="model"):
            rows.append(self.row(recipe, name, starts[name]))
            with path.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            yield about

    def row(self, recipe: Recipe, name: str, start: nn.Module) -> dict[str, Any]:
        begun = time.perf_counter()
        model, losses = copy.deepcopy(start), _Losses()
        self.finetune(model, recipe, losses)
        row: dict[str, Any] = {"recipe": str(recipe), "model": name, **asdict(recipe)}
        row |= {"after": values(model, self.test), "losses": [round(float(loss), 4) for loss in losses.found]}
        return row | {"seconds": round(time.perf_counter() - begun, 1)}

    def slim(self) -> nn.Module:
        """Cut uniformly and compensated."""
        images, labels = labelled(self.data._evaluation_loader(self.data.splits.calibration), CALIBRATION)
        batches = list(zip(images.split(64), labels.split(64), strict=True))
        scores = mdc.score(self.dense, batches, moments=True, progress=False)
        plan = mdc.make_plan(self.dense, scores, mdc.uniform_policy(self.dense, self.asked.budget))
        return mdc.slim(self.dense, plan, "lstsq", moments=scores.moments).eval()

    def finetune(self, model: nn.Module, recipe: Recipe, losses: Callback) -> None:
        """As the step distill does, by another recipe."""
        options = copy.deepcopy(self.settings["distillation"])
        options["optimizer"] |= {key: getattr(recipe, key) for key in ("opt", "lr", "layer_decay")}
        options["schedule"] |= {"warmup_lr": recipe.lr / 50, "min_lr": recipe.lr / 50}
        callbacks = [losses, *([] if recipe.ema is None else [EMAWeightAveraging(decay=recipe.ema)])]
        asked = self.asked
        finetune(model, self.dense, self.data, options, asked.epochs, asked.precision, recipe.clip, callbacks=callbacks)


def finetune(
    model: nn.Module,
    teacher: nn.Module,
    data: L.LightningDataModule,
    options: dict[str, Any],
    epochs: int,
    precision: str,
    clip: float | None,
    seed: int = 0,
    callbacks: list[Callback] | None = None,
) -> None:
    """Train a model in place as the step distill does with these `options` (settings of ``distillation``).

    The same seed: the same order of images and the same augmentation.
    """
    kinds = {name: options[name] for name in ("kd", "kd_weight", "temperature", "label_smoothing")}
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,  # type: ignore[arg-type]
        max_epochs=epochs,
        gradient_clip_val=clip,
        limit_val_batches=0,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(DistillationModule(model.train(), teacher, **kinds, **training(options, epochs)), datamodule=data)
    model.cpu().eval()


class _Losses(Callback):
    """The loss of every batch."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.found.append(outputs["loss"])


def _place(recipe: Recipe, name: str) -> tuple[str, str]:
    return str(recipe), name


# --- what it says -----------------------------------------------------------------------------------------------------


def gain(run: dict[str, Any], recipe: str, model: str) -> float:
    """Points of test top-1 that the recipe adds; NaN if it was not run."""
    after = next((row["after"] for row in run["rows"] if (row["recipe"], row["model"]) == (recipe, model)), None)
    return np.nan if after is None else 100 * (after["top1"] - run["before"][model]["top1"])


def noise(run: dict[str, Any]) -> float:
    """The standard error of one model's top-1, in points."""
    top1 = run["before"]["dense"]["top1"]
    return float(100 * np.sqrt(top1 * (1 - top1) / run["test_images"]))


def judged(found: dict[str, Any]) -> Iterator[Target]:
    """What was to be reached: the default does no harm, and is the best but for chance."""
    for name, run in found["runs"].items():
        for model in MODELS:
            gains = [gain(run, row["recipe"], model) for row in run["rows"] if row["model"] == model]
            if not gains:
                continue
            ours = gain(run, run["in_force"], model)
            yield Target(f"{name}, {model}: the default adds (points)", ours, ">=", 0)
            yield Target(f"{name}, {model}: best of all − the default (points)", max(gains) - ours, "<=", 1)


def text(found: dict[str, Any]) -> str:
    """A row per recipe, a column per run and model; targets; how it was measured."""
    rows = {(name, row["model"]) for name, run in found["runs"].items() for row in run["rows"]}
    columns = [(name, model) for name in found["runs"] for model in MODELS if (name, model) in rows]
    measured = {row["recipe"] for run in found["runs"].values() for row in run["rows"]}
    lines = [
        f"| recipe | {' | '.join(f'{name}, {model}' for name, model in columns)} |",
        f"|---|{'---:|' * len(columns)}",
        f"| *before* | {' | '.join(percent(found['runs'][name]['before'][model]) for name, model in columns)} |",
    ]
    for recipe in [str(recipe) for recipe in RECIPES if str(recipe) in measured]:
        cells = (cell(found["runs"][name], recipe, model) for name, model in columns)
        lines.append(f"| {recipe} | {' | '.join(cells)} |")
    notes = (note(name, run) for name, run in found["runs"].items())
    return "\n".join(
        (
            *lines,
            "",
            "Test top-1 in % (cross-entropy) after the training; **bold**: what `train.py` takes by itself; empty: not "
            "run. One seed. Measured by `python benchmarks/recipes.py --run RUN`.",
            "",
            *notes,
            "",
            verdicts(judged(found)),
        )
    )


def percent(value: dict[str, float]) -> str:
    return f"{100 * value['top1']:.1f} ({-value['loss']:.3f})"


def cell(run: dict[str, Any], recipe: str, model: str) -> str:
    found = next((row for row in run["rows"] if (row["recipe"], row["model"]) == (recipe, model)), None)
    if found is None:
        return ""
    return f"**{percent(found['after'])}**" if recipe == run["in_force"] else percent(found["after"])


def note(name: str, run: dict[str, Any]) -> str:
    """One run in words."""
    return (
        f"- {name}: {run['model']}, {run['macs'] / 1e6:.1f} MMACs, {run['params'] / 1e6:.2f} M parameters; slim has "
        f"{100 * run['budget']:.0f} % of the MACs. {run['epochs']} epoch(s) of {run['train_images']} training images "
        f"in batches of {run['batch_size']}, {run['precision']}; {run['test_images']} test images, one standard error "
        f"{noise(run):.1f} points."
    )


def figure(found: dict[str, Any]) -> Figure:
    """What each rate adds to slim, by optimizer and layer decay: a panel per run."""
    runs = {name: run for name, run in found["runs"].items() if run["rows"]}
    picture, panels = new_figure(3.6 * max(1, len(runs)), 3.4, 1, max(1, len(runs)))
    kinds = {
        ("adamw", 0.75): "#0072B2",
        ("adamw", None): "#56B4E9",
        ("muon", 0.75): "#D55E00",
        ("muon", None): "#E69F00",
    }
    for panel, (name, run) in zip(panels, runs.items(), strict=False):
        for (opt, decay), colour in kinds.items():
            rows = [
                row
                for row in run["rows"]
                if (row["opt"], row["layer_decay"], row["clip"], row["ema"]) == (opt, decay, 1.0, None)
                and row["model"] == "slim"
            ]
            points = sorted((row["lr"], max(LEAST_SHOWN, gain(run, row["recipe"], "slim"))) for row in rows)
            if points:
                label = f"{'AdamW' if opt == 'adamw' else 'Muon'}{', layer decay' if decay else ''}"
                panel.plot(*zip(*points, strict=True), "o-", color=colour, label=label, lw=1.5)
        panel.axhline(0, color="#333333", lw=1, ls="--")
        panel.set_xscale("log")
        panel.set_title(name, loc="left", fontsize=10, color="#333333")
        panel.set_xlabel("peak learning rate")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"test top-1 of slim, change in points\n({-LEAST_SHOWN} and more lost: at {LEAST_SHOWN})")
    picture.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
    return picture


if __name__ == "__main__":
    main()
