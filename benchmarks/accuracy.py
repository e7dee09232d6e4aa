"""What accuracy is left? Top-1 straight after pruning and after a short finetune: ours, each dimension and criterion of
ours alone, and Torch-Pruning, all cut from one dense model to the same MACs.

    .venv/bin/python train.py experiment=cifar10 data.root=… data.test_root=… stage=[dense]
    .venv/bin/python benchmarks/accuracy.py --run runs/cifar10/…             # goes on where it was stopped
    .venv/bin/python benchmarks/accuracy.py --run runs/cifar10/… --method "ours, uniform" --budget 0.6
    .venv/bin/python benchmarks/accuracy.py --quick                          # on digits: trains the dense model first

A seed draws the calibration images, and orders the training images of the finetune: an epoch under the dense model as
teacher, without augmentation. "Dense, same training" is the dense model given the same epoch and the same teacher: what
a row lost, it lost against that. A search judges on held-out training images. Torch-Pruning has as many heads and
neurons as our uniform policy of those two; it searches nothing and nothing is compensated, so its distance to "ours,
searched" is that of whole tools, not of criteria.

Every finished row is kept in ``--work``. Leaves ``benchmarks/results/accuracy.json`` and ``.png``, the table in
``docs/benchmarks.md``.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import peers
import torch
from matplotlib.figure import Figure
from pages import folder_of, write_pages
from targets import Target, verdicts
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from tqdm.auto import tqdm
from weight_sharing import Images, labelled, training, values

import lightning_mdc as mdc
from lightning_mdc.app import build
from lightning_mdc.app.fingerprints import fingerprint_of
from lightning_mdc.app.run_folder import newest_run
from lightning_mdc.budget import num_params
from lightning_mdc.distillation import DistillationModule
from lightning_mdc.errors import BudgetError
from lightning_mdc.figures.style import new_figure, save_figure
from lightning_mdc.files import write_json
from lightning_mdc.importance.criteria import Random
from lightning_mdc.policy_search.held_out import HeldOut

ROOT = Path(__file__).resolve().parents[1]
DIMENSIONS = ("heads", "neurons", "tokens")
BATCH = 128
REFERENCE = "dense, same training"


@dataclass(frozen=True)
class Method:
    """One way to a slim model.

    Attributes:
        criterion: of ours, or of Torch-Pruning with `peer`.
        compensate: see `lightning_mdc.slim`.
        dimensions: what is cut.
        searched: whether the policy is; else it is uniform.
        peer: Torch-Pruning chooses the units.
    """

    criterion: str = "conditional"
    compensate: str = "lstsq"
    dimensions: tuple[str, ...] = DIMENSIONS
    searched: bool = False
    peer: bool = False


METHODS: dict[str, Method] = {
    "ours, uniform": Method(),
    "ours, searched": Method(searched=True),
    "ours, uniform, sequential": Method(compensate="sequential"),
    "ours, searched, sequential": Method(compensate="sequential", searched=True),
    "Torch-Pruning, Taylor": Method("taylor", "none", ("heads", "neurons"), peer=True),
    "Torch-Pruning, magnitude": Method("magnitude", "none", ("heads", "neurons"), peer=True),
    "ours, heads alone": Method(dimensions=("heads",)),
    "ours, neurons alone": Method(dimensions=("neurons",)),
    "ours, tokens alone": Method(dimensions=("tokens",)),
    "ours, heads and neurons": Method(dimensions=("heads", "neurons")),
    "hsic as in the paper": Method("hsic", "none"),
    "conditional, not compensated": Method(compensate="none"),
    **{f"{name}, lstsq": Method(name) for name in ("hsic", "taylor", "magnitude", "activation", "random")},
}
OURS = ("ours, uniform", "ours, searched")
SEQUENTIAL = tuple(f"{name}, sequential" for name in OURS)
PEERS = tuple(name for name, method in METHODS.items() if method.peer)
SINGLE = tuple(name for name, method in METHODS.items() if len(method.dimensions) == 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run of train.py with a dense model; --quick makes one on digits")
    parser.add_argument("--method", action="append", choices=[*METHODS, REFERENCE], help="these alone; may be repeated")
    parser.add_argument("--budget", type=float, action="append", help="of the MACs (default: 0.6, 0.5 and 0.4)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=40, help="of each search")
    parser.add_argument("--calibration", type=int, default=512, help="images")
    parser.add_argument("--images", type=int, default=10_000, help="training images of a finetune at most")
    parser.add_argument("--epochs", type=int, default=1, help="of a finetune")
    parser.add_argument("--work", type=Path, help="folder for what is finished (default: RUN/accuracy)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch; one per core if not given")
    parser.add_argument("--quick", action="store_true", help="digits, one budget, one seed; pages stay as they are")
    parser.add_argument("--table-only", action="store_true", help="draw and write from the JSON that is there")
    asked = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    results = folder_of(asked.quick)
    path = results / "accuracy.json"
    if asked.table_only:
        found = json.loads(path.read_text())
    else:
        if asked.quick:
            asked.budget, asked.seeds, asked.trials = asked.budget or [0.5], 1, 8
            asked.work = asked.work or results / "accuracy-work"
            shutil.rmtree(asked.work, ignore_errors=True)  # rows of older code
        elif asked.run is None:
            parser.error("--run: give the folder of a run of train.py with a dense model (or --quick)")
        found = Benchmark(asked.run or digits_run(), asked).measured()
    print(text(found))
    if asked.method and not asked.quick:  # some rows are not the table
        return
    write_json(path, found | {"targets": [target.facts() for target in judged(found)]})
    save_figure(figure(found), results / "accuracy.png")
    if not asked.quick:
        write_pages("accuracy", found)


def digits_run() -> Path:
    """The newest run on digits that has a dense model, or a fresh one: half a minute on two cores."""
    for folder in sorted((ROOT / "runs" / "digits").glob("*"), reverse=True):
        if (folder / "dense" / "model.safetensors").is_file():
            return folder
    subprocess.run([sys.executable, "train.py", "experiment=digits", "stage=[dense]"], cwd=ROOT, check=True)
    run = newest_run(ROOT / "runs" / "digits")
    assert run is not None  # it was just made
    return run


# --- measuring --------------------------------------------------------------------------------------------------------


class Benchmark:
    """One dense model, its data, and what is asked of them."""

    def __init__(self, run: Path, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.settings = json.loads((run / "settings.json").read_text())
        self.dense = mdc.load(run / "dense").eval()
        data = build.build_data(self.settings)
        self.test, self.held_out = labelled(data.test_dataloader(), None), labelled(data.val_dataloader(), 1000)
        order = np.random.default_rng(0).permutation(len(data.splits.calibration))  # type: ignore[arg-type]
        chosen = Subset(data.splits.calibration, order[: asked.images].tolist())
        self.train = labelled(DataLoader(chosen, BATCH, num_workers=self.settings["data"]["num_workers"]), None)
        self.options = {name: getattr(asked, name) for name in ("calibration", "images", "epochs", "trials")}
        mark = fingerprint_of({**self.options, "model": self.settings}, {"run": run.name})
        self.work: Path = (asked.work or run / "accuracy") / mark[:12]
        self.work.mkdir(parents=True, exist_ok=True)

    def measured(self) -> dict[str, Any]:
        """All numbers."""
        path = self.work / "rows.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        methods = self.asked.method or [REFERENCE, *METHODS]
        budgets = self.asked.budget or [0.6, 0.5, 0.4]
        wanted = [
            (method, budget, seed)
            for seed in range(self.asked.seeds)
            for method in methods
            for budget in ([1.0] if method == REFERENCE else budgets)
        ]
        left = [place for place in wanted if place not in map(_place, rows)]
        for place in tqdm(left, "Models", initial=len(wanted) - len(left), total=len(wanted), unit="model"):
            rows.append(self.row(*place))
            with path.open("a") as file:  # others may add their rows meanwhile
                file.write(json.dumps(rows[-1]) + "\n")
        return {
            **self.options,
            "name": self.settings["name"],
            "model": f"{type(self.dense).__name__}, {len(mdc.models.find_anatomy(self.dense).blocks)} blocks",
            "macs": mdc.macs(self.dense),
            "params": num_params(self.dense),
            "train_images": len(self.train[1]),
            "test_images": len(self.test[1]),
            "held_out_images": len(self.held_out[1]),
            "dense": values(self.dense, self.test)["top1"],
            "rows": [row for row in rows if _place(row) in wanted],
        }

    def row(self, name: str, budget: float, seed: int) -> dict[str, Any]:
        begun = time.perf_counter()
        row: dict[str, Any] = {"method": name, "budget": budget, "seed": seed}
        try:
            slim = copy.deepcopy(self.dense) if name == REFERENCE else self.slim(name, budget, seed)
        except BudgetError as error:
            return row | {"failure": str(error)}
        row |= {"macs": mdc.macs(slim), "before": values(slim, self.test)["top1"]}
        self.finetune(slim, seed)
        return row | {"after": values(slim, self.test)["top1"], "seconds": round(time.perf_counter() - begun, 1)}

    def slim(self, name: str, budget: float, seed: int) -> nn.Module:
        """The model that one method makes."""
        method, dense = METHODS[name], self.dense
        batches = self.calibration(seed)
        policy = mdc.uniform_policy(dense, budget, method.dimensions)
        if method.peer:
            return peers.torch_pruning(dense, policy, method.criterion, batches)  # type: ignore[arg-type]
        criterion = Random(seed) if method.criterion == "random" else method.criterion
        by_moments = method.searched or method.compensate == "lstsq"
        scores = mdc.score(dense, batches, criterion, moments=by_moments or None, progress=False)
        if method.searched:
            judge = HeldOut([self.held_out], "accuracy", batch_size=250)
            policy = mdc.search(
                dense,
                scores,
                judge,
                budget,
                self.asked.trials,
                seed,
                method.dimensions,
                compensate="lstsq",
                options=mdc.SearchOptions(progress=False),
            ).policy
            images, labels = self.held_out
            batches = [*batches, *zip(images.split(BATCH), labels.split(BATCH), strict=True)]  # as `compress` refits
        plan = mdc.make_plan(dense, scores, policy)
        given = {"lstsq": {"moments": scores.moments}, "sequential": {"batches": batches}}.get(method.compensate, {})
        return mdc.slim(dense, plan, method.compensate, **given).eval()

    def calibration(self, seed: int) -> list[Images]:
        """Batches of a sample of the training images."""
        images, labels = self.train
        chosen = torch.from_numpy(np.random.default_rng(seed).permutation(len(images))[: self.asked.calibration])
        return list(zip(images[chosen].split(BATCH), labels[chosen].split(BATCH), strict=True))

    def finetune(self, slim: nn.Module, seed: int) -> None:
        """With the run's own recipe of distillation, for so few epochs."""
        options = self.settings["distillation"]
        kinds = {name: options[name] for name in ("kd", "kd_weight", "temperature", "label_smoothing")}
        L.seed_everything(seed, verbose=False)
        module = DistillationModule(slim.train(), self.dense, **kinds, **training(options, self.asked.epochs))
        loader = DataLoader(TensorDataset(*self.train), BATCH, shuffle=True, drop_last=len(self.train[1]) >= BATCH)
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=self.asked.epochs,
            gradient_clip_val=self.settings["trainer"]["gradient_clip_val"],
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader)
        slim.cpu().eval()


def _place(row: dict[str, Any]) -> tuple[str, float, int]:
    return row["method"], row["budget"], row["seed"]


# --- what it says -----------------------------------------------------------------------------------------------------


def means(found: dict[str, Any], method: str, budget: float, when: str) -> np.ndarray:
    """Top-1 in percent of each seed, (seeds,); empty where the budget is out of reach."""
    rows = (row for row in found["rows"] if row["method"] == method and row["budget"] == budget)
    return 100 * np.array([row[when] for row in rows if when in row])


def budgets_of(found: dict[str, Any]) -> list[float]:
    return sorted({row["budget"] for row in found["rows"] if row["method"] != REFERENCE}, reverse=True)


def judged(found: dict[str, Any]) -> Iterable[Target]:
    """What was to be reached, in points of top-1 after the finetune."""

    def best(names: Iterable[str], budget: float) -> float:
        return max((float(top.mean()) for n in names if (top := means(found, n, budget, "after")).size), default=np.nan)

    budgets = budgets_of(found)
    reference = means(found, REFERENCE, 1.0, "after")
    if 0.6 in budgets and reference.size:
        yield Target(
            "at 60 %: ours − dense, same training (points)", best(OURS, 0.6) - float(reference.mean()), ">=", 0
        )
    for budget in budgets:
        at = f"at {100 * budget:.0f} %"
        yield Target(f"{at}: ours − best of Torch-Pruning (points)", best(OURS, budget) - best(PEERS, budget), ">=", 0)
        others = [name for name in METHODS if name not in OURS + SEQUENTIAL]
        yield Target(f"{at}: ours − best of all others (points)", best(OURS, budget) - best(others, budget), ">=", 0)
        single = best(OURS, budget) - best(SINGLE, budget)
        yield Target(f"{at}: joint − best single dimension (points)", single, ">=", 0)


def text(found: dict[str, Any]) -> str:
    """A row per method: top-1 straight after pruning → after the finetune, per budget; targets; how it was measured."""
    names = [name for name in (REFERENCE, *METHODS) if any(row["method"] == name for row in found["rows"])]
    lines = [
        *table(found, names),
        "",
        f"Test top-1 in % straight after pruning → after the finetune: mean over {num_seeds(found)} seeds (of "
        f"calibration, search and finetune) ± standard deviation. {found['name']}: {found['model']}, "
        f"{found['macs'] / 1e6:.1f} MMACs, {found['params'] / 1e6:.2f} M parameters, dense "
        f"{100 * found['dense']:.1f} %. Finetune: {found['epochs']} epoch(s) of {found['train_images']} training "
        f"images, not augmented, under the dense teacher. {found['test_images']} test images (one standard error of a "
        f"single model: {noise(found):.1f} points), {found['calibration']} calibration images, searches of "
        f"{found['trials']} trials on {found['held_out_images']} held-out training images. *Ours*: criterion "
        "`conditional`, `compensate=lstsq`; each row can be measured alone, `--method 'ours, uniform'`. Measured by "
        "`python benchmarks/accuracy.py --run RUN`.",
        "",
        verdicts(judged(found)),
    ]
    return "\n".join(lines)


def table(found: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Lines of a Markdown table with a row for each of these methods."""
    budgets = budgets_of(found)
    lines = [f"| | {' | '.join(f'{100 * b:.0f} % of the MACs' for b in budgets)} |", f"|---|{'---:|' * len(budgets)}"]
    for name in names:
        cells = []
        for budget in budgets:
            own = 1.0 if name == REFERENCE else budget
            before, after = (means(found, name, own, when) for when in ("before", "after"))
            tried = any((row["method"], row["budget"]) == (name, own) for row in found["rows"])
            nothing = "out of reach" if tried else ""
            cells.append(f"{before.mean():.1f} → {spread(after)}" if after.size else nothing)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def num_seeds(found: dict[str, Any]) -> int:
    return len({row["seed"] for row in found["rows"]})


def noise(found: dict[str, Any]) -> float:
    """The standard error of one model's top-1, in points."""
    return float(100 * np.sqrt(found["dense"] * (1 - found["dense"]) / found["test_images"]))


def spread(values: Sequence[float] | np.ndarray) -> str:
    """Mean ± standard deviation, of several."""
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def figure(found: dict[str, Any]) -> Figure:
    """Top-1 after the finetune against MACs: ours, the peers, single dimensions."""
    picture, (panel,) = new_figure(7.6, 4.2)
    shown = (*OURS, *PEERS, *SINGLE, "hsic as in the paper")
    colours = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#BBBBBB", "#888888", "#555555", "#CC79A7")
    budgets = budgets_of(found)
    for name, colour in zip(shown, colours, strict=True):
        points = [(b, top.mean()) for b in budgets if (top := means(found, name, b, "after")).size]
        if points:
            panel.plot(*zip(*points, strict=True), "o-", color=colour, label=name, lw=2 if name in OURS else 1.2)
    reference = means(found, REFERENCE, 1.0, "after")
    if reference.size:
        panel.axhline(reference.mean(), color="#333333", lw=1, ls="--", label=REFERENCE)
    panel.set_xticks(budgets, [f"{100 * b:.0f} %" for b in budgets])
    panel.invert_xaxis()
    panel.set_xlabel("MACs, of dense")
    panel.set_ylabel("test top-1 after the finetune, %")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)
    return picture


if __name__ == "__main__":
    main()
