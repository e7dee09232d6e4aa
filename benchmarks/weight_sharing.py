"""Does weight sharing make the search judge policies better? On trained models, by what policies are worth finetuned.

    .venv/bin/python benchmarks/weight_sharing.py --run runs/digits/… --run runs/cifar10/… --work weight-sharing

Takes runs of ``train.py`` that have a dense model and its scores (``stage=[dense,score]``). Per run, random policies on
the budget are judged on held-out training images, as in the search, by the dense weights and by the weights after the
stage; then each policy is cut from either and finetuned for a while under the dense model, and tested. How well does
the judgement before rank the accuracies after?

Each finished finetuning is written to ``--work``, and a killed benchmark goes on from there. Leaves
``benchmarks/results/weight_sharing.json`` and ``.png``, and the table in ``docs/benchmarks.md``.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from matplotlib.figure import Figure
from pages import RESULTS, write_pages
from scipy import stats
from torch import Tensor, nn
from tqdm.auto import tqdm

import lightning_mdc as mdc
from lightning_mdc.app import build
from lightning_mdc.app.data import ImageDataModule
from lightning_mdc.app.fingerprints import fingerprint_of
from lightning_mdc.distillation import DistillationModule
from lightning_mdc.distillation.weight_sharing import WeightSharingModule
from lightning_mdc.figures.style import new_figure, save_figure
from lightning_mdc.files import write_json, write_text
from lightning_mdc.models import find_anatomy
from lightning_mdc.policy_search.held_out import gathered

ROOT = Path(__file__).resolve().parents[1]
# What policies are judged by before finetuning, higher is better.
VALUES = {"top1": "top-1", "loss": "cross-entropy", "kl": "KL to dense"}
# What they are worth on the test images after it, higher is better. Cross-entropy tells apart what top-1 on few images
# does not.
OUTCOMES = {"top1": "top-1", "loss": "cross-entropy"}
# Weights that policies are judged with, and weights that they are finetuned from. ACROSS has the outcomes of WITHOUT.
WITHOUT, WITH, ACROSS = ("dense", "dense"), ("shared", "shared"), ("shared", "dense")
RESAMPLES = 4000

Images = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, action="append", default=[], help="a run of train.py; may be given twice")
    parser.add_argument("--work", type=Path, help="folder for what is finished; needed to measure")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--policies", type=int, default=16, help="with more of them, the benchmark goes on")
    parser.add_argument("--sharing-epochs", type=int, default=10)
    parser.add_argument("--finetune-epochs", type=int, default=5)
    parser.add_argument("--finetune-images", type=int, help="training images of a finetuning at most")
    parser.add_argument("--images", type=int, default=2000, help="held-out images at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads of torch; one per core if not given")
    parser.add_argument("--table-only", action="store_true", help="draw and write from the JSON that is there")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path = RESULTS / "weight_sharing.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"models": {}}
    runs = [] if arguments.table_only else arguments.run
    if runs and arguments.work is None:
        parser.error("--work: give a folder for what is finished")
    for run in runs:
        settings = json.loads((run / "settings.json").read_text())
        measured = Benchmark(run, settings, arguments).measured()
        measured["correlations"] = {f"{v}, {o}": correlations(measured, v, o) for o in OUTCOMES for v in VALUES}
        result = {"models": result["models"] | {settings["name"]: measured}}
        write_json(path, result)
    if not result["models"]:
        parser.error("--run: give the folder of at least one run of train.py with a dense model and scores")
    save_figure(figure(result), RESULTS / "weight_sharing.png")
    print(text(result))
    write_pages("weight_sharing", result)


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Benchmark:
    """One run of ``train.py`` and what is asked of it."""

    run: Path
    settings: dict[str, Any]
    arguments: argparse.Namespace

    def __post_init__(self) -> None:
        asked = self.arguments
        # All but the number of policies, of which there may be more later.
        same = ("budget", "sharing_epochs", "finetune_epochs", "finetune_images", "images", "seed")
        self.options = {name: getattr(asked, name) for name in same}
        mark = fingerprint_of({**self.options, "model": self.settings}, {"run": self.run.name})
        self.work: Path = asked.work / f"{self.settings['name']}-{mark[:12]}"
        self.work.mkdir(parents=True, exist_ok=True)
        self.scores = mdc.Scores.load(self.run / "scores.safetensors")
        data = build.build_data(self.settings)
        self.held_out = labelled(data.val_dataloader(), asked.images)
        self.test = labelled(data.test_dataloader(), None)
        self.sharing_data = data
        most = asked.finetune_images or self.settings["data"].get("max_train_images")
        self.finetune_data = build.build_data(
            {**self.settings, "data": {**self.settings["data"], "max_train_images": most}}
        )

    def measured(self) -> dict[str, Any]:
        """All numbers of one model."""
        models = {"dense": mdc.load(self.run / "dense"), "shared": self.shared()}
        said = {weights: log_probabilities(model, self.held_out[0]) for weights, model in models.items()}
        dense = models["dense"]
        # Policies that the stage has not seen: of another seed.
        draws = WeightSharingModule(dense, self.scores, self.arguments.budget, seed=self.arguments.seed + 1)
        path = self.work / "finetunings.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        wanted = [(number, weights) for number in range(self.arguments.policies) for weights in models]
        left = [pair for pair in wanted if pair not in {_place(row) for row in rows}]
        bar = {"initial": len(wanted) - len(left), "total": len(wanted), "unit": "model"}
        for number, weights in tqdm(left, desc=f"{self.settings['name']}: finetuning", **bar):
            started = time.perf_counter()
            plan = mdc.make_plan(dense, self.scores, draws.policy(number))
            slim = mdc.slim(models[weights], plan).eval()
            row = {"policy": number, "weights": weights, "macs": mdc.macs(slim)}
            row |= {"judged": values(slim, self.held_out, said[weights]), "test_before": values(slim, self.test)}
            self.finetune(slim, dense)
            row |= {"test_after": values(slim, self.test), "seconds": round(time.perf_counter() - started, 1)}
            rows.append(row)
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        blocks = len(find_anatomy(dense).blocks)
        return {
            **self.options,
            "model": f"{type(dense).__name__}, {blocks} blocks, {mdc.macs(dense) / 1e6:.1f} MMACs",
            "finetune_images": len(self.finetune_data.splits.train),  # type: ignore[arg-type]
            "sharing_images": len(self.sharing_data.splits.train),  # type: ignore[arg-type]
            "held_out_images": len(self.held_out[1]),
            "test_images": len(self.test[1]),
            "dense_test_top1": {weights: values(model, self.test)["top1"] for weights, model in models.items()},
            "rows": sorted((row for row in rows if row["policy"] < self.arguments.policies), key=_place),
        }

    def shared(self) -> nn.Module:
        """The dense model after the stage, trained once; a killed training goes on from its last epoch."""
        place = self.work / "shared"
        if (self.work / "shared.done").exists():
            return mdc.load(place)
        options = self.settings.get("sharing", self.settings["distillation"])
        L.seed_everything(self.arguments.seed, verbose=False)
        module = WeightSharingModule(
            mdc.load(self.run / "dense").train(),
            self.scores,
            self.arguments.budget,
            seed=self.arguments.seed,
            **training(options, self.arguments.sharing_epochs),
        )
        last = self.work / "checkpoint" / "last.ckpt"
        keep = ModelCheckpoint(last.parent, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
        started = time.perf_counter()
        self.fit(
            module, self.sharing_data, self.arguments.sharing_epochs, [keep, _Told()], last if last.exists() else None
        )
        mdc.save(module.student.cpu().eval(), place)
        write_json(self.work / "shared.done", {"seconds": round(time.perf_counter() - started, 1)})
        return mdc.load(place)

    def finetune(self, slim: nn.Module, teacher: nn.Module) -> None:
        """As ``train.py`` does, for fewer epochs."""
        options, epochs = self.settings["distillation"], self.arguments.finetune_epochs
        kinds = {name: options[name] for name in ("kd", "kd_weight", "temperature", "label_smoothing")}
        # The same order of images and the same augmentation for all.
        L.seed_everything(self.arguments.seed, verbose=False)
        module = DistillationModule(slim.train(), teacher, **kinds, **training(options, epochs))
        self.fit(module, self.finetune_data, epochs, [], None)
        slim.cpu().eval()

    def fit(
        self,
        module: DistillationModule,
        data: ImageDataModule,
        epochs: int,
        callbacks: list[Callback],
        begun: Path | None,
    ) -> None:
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            gradient_clip_val=self.settings["trainer"]["gradient_clip_val"],
            limit_val_batches=0,
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=bool(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data, ckpt_path=begun)


class _Told(Callback):
    """A line per epoch: the stage is the longest single training."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        shown = ", ".join(f"{name} {float(value):.4f}" for name, value in trainer.callback_metrics.items())
        tqdm.write(f"weight sharing: epoch {trainer.current_epoch + 1} of {trainer.max_epochs}, {shown}")


def _place(row: dict[str, Any]) -> tuple[int, str]:
    return row["policy"], row["weights"]


def training(options: dict[str, Any], epochs: int) -> dict[str, Any]:
    """Optimizer and schedule of a run's settings, for so many epochs; as `build` shortens the warm-up."""
    schedule = dict(options["schedule"])
    schedule["warmup_epochs"] = min(schedule["warmup_epochs"], epochs / 5)
    # Runs from before there was a layer decay had none.
    return {"optimizer": {"layer_decay": None, **options["optimizer"]}, "schedule": schedule}


def labelled(loader: Any, most: int | None) -> Images:
    images, labels = gathered(loader, most)
    assert labels is not None  # these loaders give them
    return images, labels


@torch.inference_mode()
def log_probabilities(model: nn.Module, images: Tensor) -> Tensor:
    """Images (n, ...) -> (n, classes)."""
    model.eval()
    return torch.cat([F.log_softmax(model(part), dim=-1) for part in images.split(128)])


def values(model: nn.Module, data: Images, dense: Tensor | None = None) -> dict[str, float]:
    """As `HeldOut`: top-1, minus cross-entropy and, given what dense says, (n, classes), minus KL(dense ‖ model)."""
    images, labels = data
    said = log_probabilities(model, images)
    found = {
        "top1": (said.argmax(dim=-1) == labels).double().mean().item(),
        "loss": -F.nll_loss(said, labels).item(),
    }
    if dense is not None:
        found["kl"] = -F.kl_div(said, dense, log_target=True, reduction="batchmean").item()
    return found


# --- what it says -----------------------------------------------------------------------------------------------------


def paired(result: dict[str, Any], value: str, outcome: str, which: tuple[str, str]) -> tuple[Any, Any]:
    """Per policy, (policies,) each: what it is judged at before finetuning, and its outcome after."""
    by_place = {_place(row): row for row in result["rows"]}
    numbers = sorted({row["policy"] for row in result["rows"]})
    before = np.array([by_place[number, which[0]]["judged"][value] for number in numbers])
    after = np.array([by_place[number, which[1]]["test_after"][outcome] for number in numbers])
    return before, after


def spearman(x: Any, y: Any) -> Any:
    """Rank correlations along the last axis, (..., policies) -> (...); 0 where one side is all ties."""
    ranks = [stats.rankdata(side, axis=-1) for side in (x, y)]
    x, y = (rank - rank.mean(axis=-1, keepdims=True) for rank in ranks)
    norm = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    return np.where(norm > 0, (x * y).sum(axis=-1) / np.where(norm > 0, norm, 1.0), 0.0)


def kendall(x: Any, y: Any) -> float:
    return float(stats.kendalltau(x, y).statistic) if np.ptp(x) > 0 and np.ptp(y) > 0 else 0.0


def correlations(result: dict[str, Any], value: str, outcome: str) -> dict[str, dict[str, Any]]:
    """Rho and tau without the stage, with it, and across, and the differences of the latter two from the first; each
    with a 95 % interval of its rho by bootstrap over policies, which are the same on both sides of a difference."""
    sides = {"without": WITHOUT, "with": WITH, "across": ACROSS}
    pairs = {name: paired(result, value, outcome, which) for name, which in sides.items()}
    policies = len(pairs["without"][0])
    drawn = np.random.default_rng(0).integers(policies, size=(RESAMPLES, policies))
    rho = {name: float(spearman(*pair)) for name, pair in pairs.items()}
    again = {name: spearman(x[drawn], y[drawn]) for name, (x, y) in pairs.items()}
    for name in ("with", "across"):
        rho[f"{name} - without"] = rho[name] - rho["without"]
        again[f"{name} - without"] = again[name] - again["without"]
    found: dict[str, dict[str, Any]] = {
        name: {"spearman": rho[name], "interval": np.percentile(again[name], (2.5, 97.5)).tolist()} for name in rho
    }
    for name, pair in pairs.items():
        found[name]["kendall"] = kendall(*pair)
    return found


def text(shown: dict[str, Any]) -> str:
    """The table, and what was done with each model."""
    found = shown["models"]
    lines = [
        "| model | judged by | after finetuning | without the stage | with it | difference | judged with, finetuned "
        "without | difference |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, result in found.items():
        for outcome, worth in OUTCOMES.items():
            for value, label in VALUES.items():
                cells = result["correlations"][f"{value}, {outcome}"]
                shown = (cells[key] for key in ("without", "with", "with - without", "across", "across - without"))
                lines.append(f"| {name} | {label} | {worth} | {' | '.join(map(cell, shown))} |")
    lines += ["", *(f"- {note(name, result)}" for name, result in found.items()), ""]
    lines += [
        "Spearman's rank correlation (τ: Kendall's) between what a policy is judged at on held-out training images "
        "before finetuning and what it is worth on the test images after; in brackets 95 % bootstrap intervals over "
        "policies. Measured by `python benchmarks/weight_sharing.py`."
    ]
    return "\n".join(lines)


def cell(correlation: dict[str, Any]) -> str:
    low, high = map(signed, correlation["interval"])
    tau = f", τ {signed(correlation['kendall'])}" if "kendall" in correlation else ""
    return f"{signed(correlation['spearman'])} [{low}, {high}]{tau}"


def note(name: str, result: dict[str, Any]) -> str:
    """One model in words: what was done, and the accuracies before and after."""

    def tops(weights: str, when: str) -> Any:
        return 100 * np.array([row[when]["top1"] for row in result["rows"] if row["weights"] == weights])

    def before_and_after(weights: str) -> str:
        after = tops(weights, "test_after")
        return f"{tops(weights, 'test_before').mean():.1f} → {after.mean():.1f} ± {after.std(ddof=1):.1f} %"

    chance = 100 * np.sqrt(np.mean([p * (1 - p) for p in tops("shared", "test_after") / 100]) / result["test_images"])
    policies = len({row["policy"] for row in result["rows"]})
    dense = result["dense_test_top1"]
    return (
        f"{name}: {result['model']}; {policies} random policies at {100 * result['budget']:.0f} % of the MACs, "
        f"{result['sharing_epochs']} epochs of weight sharing on {result['sharing_images']} images, "
        f"{result['finetune_epochs']} of finetuning on {result['finetune_images']}; "
        f"{result['held_out_images']} held-out and {result['test_images']} test images. Test top-1 of the slim models "
        f"before finetuning → after it (± standard deviation over policies, of which {chance:.1f} is the chance of so "
        f"few images): without the stage {before_and_after('dense')}, with it {before_and_after('shared')}; of the "
        f"dense model {100 * dense['dense']:.1f} %, after the stage {100 * dense['shared']:.1f} %."
    )


def signed(number: float) -> str:
    return f"{number:+.2f}".replace("-", "−")


def figure(shown: dict[str, Any]) -> Figure:
    """Held-out top-1 before finetuning against test top-1 after: a row per model, without and with the stage."""
    found = shown["models"]
    picture, flat = new_figure(7.6, 3.3 * len(found), len(found), 2, sharey="row")
    panels = np.reshape(flat, (len(found), 2))
    for row, (name, result) in zip(panels, found.items(), strict=True):
        for panel, which, title, colour in (
            (row[0], WITHOUT, "without the stage", "#E69F00"),
            (row[1], WITH, "with it", "#0072B2"),
        ):
            before, after = paired(result, "top1", "top1", which)
            panel.scatter(100 * before, 100 * after, color=colour, s=28, alpha=0.8, linewidths=0)
            rho = signed(float(spearman(before, after)))
            panel.set_title(f"{name}, {title}: ρ = {rho}", loc="left", fontsize=10, color="#333333")
            panel.set_xlabel("held-out top-1 before finetuning, %")
            panel.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("test top-1 after finetuning, %")
    return picture


if __name__ == "__main__":
    main()
