"""What is left of a model that was trained to the end, after pruning and the same short finetune for all?

    .venv/bin/python benchmarks/finetuned.py --data FOLDER --work FOLDER     # a row at a time; goes on where it stopped
    .venv/bin/python benchmarks/finetuned.py --data FOLDER --work FOLDER --method "searched, all three" --at "60 %"
    .venv/bin/python benchmarks/finetuned.py --quick                         # on digits: trains the dense model first

Slim models are made as in ``pretrained.py``, from the same folder, and share its finished searches. Each is then
trained as ``mdc train`` does with weights that were given: its recipe, the dense model as teacher, mirror images the
only augmentation. The dense model has the same training. All are tested on the same images, so that differences are
paired.

Every finished row is kept in ``--work``. Leaves ``benchmarks/results/finetuned.json`` and ``.png``, the table in
``docs/benchmarks.md`` and its headline in the README.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pretrained
import torch
from accuracy import spread
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from pages import ROOT, folder_of, write_pages
from pretrained import (
    BUDGETS,
    DEFAULT,
    HEALED,
    MERGED,
    METHODS,
    PEERS,
    PLAIN,
    PLAINLY,
    SINGLE,
    WEIGHTS,
    Method,
    apart,
    best,
    in_batches,
    of,
    place,
    sample,
    top1,
)
from recipes import Recipe, finetune
from targets import Target, verdicts
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.app import build
from lightning_mdc.app.settings import plain as settings_of
from lightning_mdc.budget import num_params
from lightning_mdc.errors import BudgetError
from lightning_mdc.figures.style import BLUE, GRAY, GREEN, ORANGE, PURPLE, RED, save_figure
from lightning_mdc.files import write_json

DENSE, WHOLE = "dense, same training", "100 %"
# The most telling first.
ROWS: dict[str, Method] = {
    name: METHODS[name]
    for name in (
        DEFAULT,
        MERGED,
        PLAINLY,
        f"{PLAIN}, sequential",
        "Torch-Pruning, Taylor",
        "all three",
        "neurons alone",
        "neurons and tokens",
        "tokens alone",
    )
}
# Healed before the finetune, on so many of its images, whose labels healing does not look at.
HEALED_ON: dict[str, int | None] = {
    f"{PLAINLY}; healed": 4096,
    f"{PLAINLY}; healed on all": None,
    HEALED: 4096,
    f"{HEALED} on all": None,
}
HEAL_EPOCHS = 3
OURS = (PLAINLY, MERGED, DEFAULT, *HEALED_ON)  # the last that was run is held to dense
PAIRS_OF = (f"{PLAIN}, sequential", "neurons and tokens")
NO_LOSS = (-0.2, -0.5)  # points at 60 %: the mean, and the lower end of the 95 % interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pretrained.add_options(parser, test_images=10000)
    parser.add_argument(
        "--method", action="append", choices=[DENSE, *ROWS, *HEALED_ON], metavar="NAME", help="these alone"
    )
    parser.add_argument("--at", action="append", choices=[*BUDGETS], metavar="WHERE", help="these alone")
    parser.add_argument("--images", type=int, default=10000, help="training images (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--precision", default="bf16-mixed", help="of training and test (default: %(default)s)")
    asked = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    results = folder_of(asked.quick)
    path = results / "finetuned.json"
    if asked.quick:
        path.unlink(missing_ok=True)
        asked.method = asked.method or [DENSE, DEFAULT, HEALED, PAIRS_OF[0]]
        asked.at, asked.seeds = asked.at or ["50 %"], 1
        asked.trials, asked.calibration, asked.precision = 4, 192, "32-true"
        asked.work = asked.work or results / "finetuned-work"
        shutil.rmtree(asked.work, ignore_errors=True)  # rows of older code
    pretrained.check_folders(parser, asked)
    if not asked.table_only:
        for found in Benchmark(asked).measured():
            write_json(path, found | {"targets": [target.facts() for target in judged(found)]})
    found = json.loads(path.read_text())
    print(text(found))
    save_figure(figure(found), results / "finetuned.png")
    if not asked.quick:
        write_pages("finetuned", found)


# --- measuring --------------------------------------------------------------------------------------------------------


class Benchmark(pretrained.Benchmark):
    """As before any finetune, and the training."""

    def __init__(self, asked: argparse.Namespace) -> None:
        super().__init__(asked, {key: getattr(asked, key) for key in ("images", "epochs", "precision")})
        self.settings = self.settings_of_training(asked.images)
        # Not the data module that draws calibration images: this one has fewer, and mirrors them.
        self.training = build.build_data(self.settings)

    def looked_at(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """As precise as the training."""
        with self.in_precision():
            return super().looked_at(model)

    def settings_of_training(self, images: int) -> dict[str, Any]:
        """Those of ``mdc train`` with a dense model that was given."""
        asked = self.asked
        overrides = [f"data.max_train_images={images}", "data.num_workers=0"]
        if asked.quick:
            overrides = ["experiment=digits", "distillation.recipe=finetune"]
        else:
            overrides += [
                *("experiment=cifar10", f"data.root={asked.data / 'cifar10-train.tar'}"),
                *(f"data.test_root={asked.data / 'cifar10-test.tar'}", f"model.name={pretrained.MODEL}"),
                *(f"model.args.img_size={pretrained.SIZE}", "model.args.patch_size=14"),
                *(f"model.checkpoint={asked.data / WEIGHTS}", f"data.batch_size={pretrained.BATCH}"),
                *("data.augmentation.auto_augment=null", "data.augmentation.scale=[1.0,1.0]"),
                "data.augmentation.ratio=[1.0,1.0]",
            ]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return settings_of(compose("train", overrides))

    def wanted(self) -> Iterator[tuple[str, str, int]]:
        names, places = self.asked.method or [DENSE, *ROWS, *HEALED_ON], self.asked.at or BUDGETS
        for seed in range(self.asked.seeds):
            yield from ((name, WHOLE, seed) for name in names if name == DENSE)
            yield from ((name, at, seed) for at in places for name in names if name != DENSE)

    def measured(self) -> Iterator[dict[str, Any]]:
        optimizer = self.settings["distillation"]["optimizer"]
        recipe = str(Recipe(optimizer["opt"], optimizer["lr"], optimizer.get("layer_decay")))
        facts = {"recipe": recipe, "images": len(self.training.splits.train)}  # type: ignore[arg-type]
        yield from (found | facts for found in super().measured())

    def row(self, name: str, at: str, seed: int) -> dict[str, Any]:
        row: dict[str, Any] = {"method": name, "at": at, "seed": seed}
        spent: dict[str, float] = {}
        begun = time.perf_counter()
        try:
            method = name.partition("; healed")[0]
            model = copy.deepcopy(self.dense) if name == DENSE else self.slim(method, at, seed, spent)
        except BudgetError as error:
            return row | {"failure": str(error), "seconds": {"all": time.perf_counter() - begun}}
        row |= {"macs": mdc.macs(model), "params": num_params(model)}
        if name in HEALED_ON:
            started = time.perf_counter()
            self.heal(model, HEALED_ON[name], seed)
            spent["heal"] = time.perf_counter() - started
        row["before"] = self.judged(self.said if name == DENSE else self.looked_at(model)[1])
        started = time.perf_counter()
        self.finetune(model, seed)
        spent["finetune"] = time.perf_counter() - started
        row |= self.judged(self.looked_at(model)[1])
        spent["all"] = time.perf_counter() - begun
        return row | {"seconds": {key: round(value, 1) for key, value in spent.items()}}

    def finetune(self, model: nn.Module, seed: int) -> None:
        options, clip = self.settings["distillation"], self.settings["trainer"]["gradient_clip_val"]
        finetune(model, self.dense, self.training, options, self.asked.epochs, self.asked.precision, clip, seed)

    def heal(self, model: nn.Module, images: int | None, seed: int) -> None:
        shown = in_batches(sample(self.training.splits.calibration, images, seed))
        with self.in_precision():
            mdc.heal(model, self.dense, shown, HEAL_EPOCHS, seed=seed, progress=False)

    def in_precision(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.asked.precision == "bf16-mixed")


# --- what it says -----------------------------------------------------------------------------------------------------


def budgets_of(found: dict[str, Any]) -> list[str]:
    return [at for at in sorted(BUDGETS, reverse=True) if any(row["at"] == at for row in found["rows"])]


def beside_dense(found: dict[str, Any], name: str, at: str) -> tuple[float, float, float]:
    """How many points a method is ahead of the dense model with the same training, paired: (mean, lower end of the 95 %
    interval, upper end)."""
    points, error = apart(found, (name, at), (DENSE, WHOLE))
    return points, points - 1.96 * error, points + 1.96 * error


def judged(found: dict[str, Any]) -> Iterator[Target]:
    """What was to be reached after the finetune, in points of top-1; of what was run."""
    for at in budgets_of(found):
        run = [name for name in OURS if not math.isnan(top1(found, name, at))]
        if at == "60 %" and run:
            mean, lower, _ = beside_dense(found, run[-1], at)
            yield Target(f"{at}: {run[-1]} − {DENSE} (points)", mean, ">=", NO_LOSS[0])
            yield Target(f"{at}: lower end of its 95 % interval (points)", lower, ">=", NO_LOSS[1])
        if DEFAULT not in run:
            continue
        for what, names in (("Torch-Pruning", PEERS), ("best single dimension", SINGLE), ("best pair", PAIRS_OF)):
            tried = [name for name in names if not math.isnan(top1(found, name, at))]
            if not tried:
                continue
            rival = max(tried, key=lambda name: top1(found, name, at))
            points, error = apart(found, (DEFAULT, at), (rival, at))
            wanted = 0.0 if at == "60 %" else round(1.96 * error, 2)  # by more than the noise
            yield Target(f"{at}: searched − {what} (points)", points, ">=", wanted)


def rows_of(found: dict[str, Any]) -> list[str]:
    """The lines of the table."""
    budgets = budgets_of(found)
    lines = [f"| share of the MACs | {' | '.join(budgets)} | min |", f"|---|{'---:|' * (len(budgets) + 1)}"]
    for name in (DENSE, *HEALED_ON, *ROWS):
        rows = [row for row in found["rows"] if row["method"] == name]
        if not rows:
            continue
        cells = [cell(found, name, WHOLE if name == DENSE else at) for at in budgets]
        minutes = [sum(value for key, value in row["seconds"].items() if key != "all") / 60 for row in rows]
        lines.append(f"| {name} | {' | '.join(cells)} | {sum(minutes) / len(minutes):.0f} |")
    return lines


def cell(found: dict[str, Any], name: str, at: str) -> str:
    rows = [row for row in found["rows"] if place(row)[:2] == (name, at)]
    if not any("top1" in row for row in rows):
        return "out of reach" if rows else ""
    before = [100 * row["before"]["top1"] for row in rows]
    return f"{spread(before)} → {spread(100 * of(found, name, at, 'top1'))}"


def how(found: dict[str, Any]) -> str:
    seeds = len({row["seed"] for row in found["rows"]})
    over = f"mean of {seeds} seeds ± standard deviation" if seeds > 1 else "one seed"
    return (
        f"Test top-1 in % straight after pruning → after the finetune; {over}; "
        f"an empty cell was not run. {found['name']}: {found['model']}, {found['macs'] / 1e6:.0f} MMACs, dense "
        f"{100 * found['dense']['top1']:.1f} %. Finetune: {found['epochs']} epoch(s) of {found['images']} training "
        f"images, {found['precision']}, {found['recipe']}, half labels and half dense teacher; {found['tested']} test "
        "images, the same for all."
    )


def text(found: dict[str, Any]) -> str:
    """A row per method; how it was measured; the default beside dense; targets."""
    more = (
        " Rows are those of the table before any finetune; healed: before the finetune, by `mdc.heal`, in "
        f"{HEAL_EPOCHS} epochs of {HEALED_ON[HEALED]} of these images, or of all, without their labels; min: minutes "
        f"to score, search, compensate, heal and train, on {found['threads']} thread(s). Measured by `python "
        f"benchmarks/finetuned.py --data FOLDER --work FOLDER --images {found['images']} --test-images "
        f"{found['test_images']}`; a row alone by `--method NAME --at WHERE`."
    )
    return "\n".join([*rows_of(found), "", how(found) + more, "", differences(found), "", verdicts(judged(found))])


def headline(found: dict[str, Any]) -> str:
    """For README.md: what was reached and what was not, and the rows."""
    missed = [str(target) for target in judged(found) if not target.is_met]
    misses = f" **Missed:** {'; '.join(missed)}." if missed else ""
    lost = differences(found, (DEFAULT, *HEALED_ON))
    return "\n".join([f"{how(found)} {lost}{misses}", "", *rows_of(found)])


def differences(found: dict[str, Any], names: Iterable[str] = OURS) -> str:
    """What ours lose against the dense model, in a sentence."""
    of_each = []
    for name in names:
        measured = ((at, *beside_dense(found, name, at)) for at in budgets_of(found))
        parts = [
            f"{mean:+.1f} ({lower:+.1f} to {upper:+.1f}) at {at}"
            for at, mean, lower, upper in measured
            if not math.isnan(mean)
        ]
        if parts:
            of_each.append(f"*{name}*: {', '.join(parts)}")
    return f"Points beside *{DENSE}*, and the 95 % interval over the same images: {'; '.join(of_each)}."


def figure(found: dict[str, Any]) -> Figure:
    """Top-1 after the finetune by share of the MACs."""
    shown = {
        HEALED: PURPLE,
        DEFAULT: RED,
        PAIRS_OF[0]: BLUE,
        "all three": ORANGE,
        "neurons alone": GREEN,
        "Torch-Pruning, Taylor": GRAY,
    }
    reference = best(found, [DENSE], WHOLE)
    return pretrained.curves(found, shown, (DENSE, reference), "test top-1 after the finetune, %")


if __name__ == "__main__":
    main()
