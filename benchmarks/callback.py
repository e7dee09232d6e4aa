"""What does the callback find by itself? Its searched policy against the uniform one, before and after finetuning.

    .venv/bin/python benchmarks/callback.py
    .venv/bin/python benchmarks/callback.py --quick

Two LightningModules that know nothing of the project are trained on scikit-learn's digits: a classifier, and a feature
backbone under a decoder that paints the image again, without labels. Then README's five lines finetune each of them at
half of the MACs, with the callback as it is and with ``policy="uniform"``, both compensated. How far the output is from
the dense model's is measured on images that neither training, scoring nor search has seen, when the first step begins
and after the last one. The pauses are what the callback's decision took.

Leaves ``benchmarks/results/callback.json``, ``.png`` and the table in ``docs/benchmarks.md``; ``--quick`` only prints
its table.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pages import publish
from targets import Target, verdicts
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import lightning_mdc as mdc
from lightning_mdc.app.data import DigitsDataModule
from lightning_mdc.figures.style import BLUE, GRAY, new_figure, plain

BUDGET = 0.5
WAYS = ("searched", "uniform")
SIZE = {"img_size": 12, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 6, "num_heads": 4}


class Classifier(L.LightningModule):
    """Digits by cross-entropy."""

    def __init__(self, rate: float = 1e-2) -> None:
        super().__init__()
        self.net = VisionTransformer(num_classes=10, **SIZE)
        self.rate = rate

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = create_optimizer_v2(self, "muon", lr=self.rate, weight_decay=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    @staticmethod
    def distance(dense: Tensor, found: Tensor) -> float:
        """Mean KL(dense ‖ found) in nats."""
        return float(F.kl_div(found.log_softmax(-1), dense.log_softmax(-1), reduction="batchmean", log_target=True))


class Painter(Classifier):
    """A feature backbone; a decoder makes of every token the patch that it came from."""

    def __init__(self, rate: float = 1e-2) -> None:
        super().__init__(rate)
        self.net = VisionTransformer(num_classes=0, **SIZE)
        self.decoder = nn.Linear(SIZE["embed_dim"], SIZE["patch_size"] ** 2)

    def forward(self, images: Tensor) -> Tensor:
        side, patch = SIZE["img_size"], SIZE["patch_size"]
        patches = self.decoder(self.net.forward_features(images)[:, 1:])
        return F.fold(patches.transpose(1, 2), (side, side), patch, stride=patch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(0.5 * torch.randn_like(batch[0]) + batch[0]), batch[0])

    @staticmethod
    def distance(dense: Tensor, found: Tensor) -> float:
        """Squared error as a share of the dense output's variance."""
        return float((found - dense).square().sum() / (dense - dense.mean()).square().sum())


MODULES: dict[str, type[Classifier]] = {"classifier": Classifier, "backbone and decoder": Painter}


class Watch(L.Callback):
    """What the module says of unseen images when the first step begins, how long that took to come, and what it says
    after the last step, while masks are on."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begun = time.perf_counter()  # given to the Trainer before the callback: its decision comes next

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            self.seconds = time.perf_counter() - self.begun
            self.output = said(pl_module, self.images)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last = said(pl_module, self.images)


def said(module: nn.Module, images: Tensor) -> Tensor:
    was_training = module.training
    with torch.no_grad():
        output = module.eval()(images)
    module.train(was_training)
    return output


def fit(module: L.LightningModule, data: DataLoader[Any], epochs: int, callbacks: Sequence[L.Callback]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        trainer = L.Trainer(
            max_epochs=epochs,
            callbacks=list(callbacks),
            default_root_dir=folder,
            accelerator="cpu",
            enable_progress_bar=False,
            **quiet,
        )
        trainer.fit(module, data)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    digits = DigitsDataModule()
    digits.setup("fit")
    splits = digits.splits
    unseen = torch.cat([splits.val.images, splits.test.images])
    rows = []
    with tqdm(total=len(MODULES) * arguments.seeds * len(WAYS), desc="Callback", unit="fit") as progress:
        for what, kind in MODULES.items():
            for seed in range(arguments.seeds):
                L.seed_everything(seed, verbose=False)
                data = DataLoader(splits.train, batch_size=32, shuffle=True)
                dense = kind()
                fit(dense, data, arguments.epochs, [])
                expected = said(dense, unseen)
                for way in WAYS:
                    module = kind(rate=1e-3)
                    module.load_state_dict(dense.state_dict())
                    L.seed_everything(seed, verbose=False)
                    watch, prune = Watch(unseen), mdc.MultiDimPruneCallback(BUDGET, way)
                    fit(module, copy.copy(data), arguments.finetuning, [watch, prune])
                    rows.append(
                        {
                            "module": what,
                            "seed": seed,
                            "way": way,
                            "before": kind.distance(expected, watch.output),
                            "after": kind.distance(expected, watch.last),
                            "seconds": watch.seconds,
                            "macs": mdc.macs(prune.slim_model(module)) / mdc.macs(dense),
                        }
                    )
                    progress.update()
    result = {
        "rows": rows,
        "images": len(unseen),
        "epochs": arguments.epochs,
        "finetuning": arguments.finetuning,
        "threads": torch.get_num_threads(),
    }
    return result | {"targets": [target.facts() for target in targets(result)]}


def values(result: dict[str, Any], module: str, way: str, key: str) -> list[float]:
    """One number of every seed."""
    return [row[key] for row in result["rows"] if (row["module"], row["way"]) == (module, way)]


def targets(result: dict[str, Any]) -> list[Target]:
    found = []
    for module in MODULES:
        before, after = ([values(result, module, way, key) for way in WAYS] for key in ("before", "after"))
        share = sum(mine < other for mine, other in zip(*before, strict=True)) / len(before[0])
        means = [statistics.mean(each) for each in after]
        found.append(Target(f"{module}: share of seeds in which searched is closer, before finetuning", share, ">=", 1))
        found.append(Target(f"{module}: distance after finetuning, searched / uniform", means[0] / means[1], "<=", 1))
    longest = max(values(result, "classifier", "searched", "seconds"))
    return [*found, Target("digits: seconds that the default callback adds", longest, "<=", 30)]


def text(result: dict[str, Any]) -> str:
    """The table, targets, and how it was measured."""
    lines = [
        "| module | policy | distance before finetuning, by seed | after, by seed | pause |",
        "| --- | --- | --- | --- | ---: |",
    ]
    for module in MODULES:
        for way in WAYS:
            before, after, seconds = (values(result, module, way, key) for key in ("before", "after", "seconds"))
            shown = (", ".join(f"{value:.3g}" for value in each) for each in (before, after))
            lines.append(f"| {module} | {way} | {' | '.join(shown)} | {statistics.median(seconds):.1f} s |")
    return "\n".join(
        [
            *lines,
            "",
            verdicts(targets(result)),
            "",
            f"A small ViT on digits at {BUDGET:.0%} of the MACs; {result['epochs']} epochs of training, "
            f"{result['finetuning']} of finetuning. Distance to the dense model's output on {result['images']} images "
            "that nothing else has seen: KL in nats of the classifier, squared error as a share of the variance of the "
            f"decoder's picture. {result['threads']} CPU thread(s). Measured by `python benchmarks/callback.py`.",
        ]
    )


def figure(result: dict[str, Any]) -> Figure:
    """Distances before finetuning, a pair of points a seed."""
    picture, panels = new_figure(8, 2.8, columns=2)
    for panel, module in zip(panels, MODULES, strict=True):
        for way, colour in zip(WAYS, (BLUE, GRAY), strict=True):
            before, after = (values(result, module, way, key) for key in ("before", "after"))
            panel.scatter(before, after, color=colour, label=way)
        panel.set_xlabel("distance before finetuning")
        panel.set_ylabel("after")
        panel.legend(frameon=False)
        plain(panel, module)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, short trainings")
    parser.add_argument("--seeds", type=int, help="default: 5; quick: 1")
    parser.add_argument("--epochs", type=int, help="of training (default: 15; quick: 8)")
    parser.add_argument("--finetuning", type=int, help="epochs of it (default: 5; quick: 1)")
    parser.add_argument("--table-only", action="store_true", help="draw and write from the JSON that is there")
    arguments = parser.parse_args()
    arguments.seeds = arguments.seeds or (1 if arguments.quick else 5)
    arguments.epochs = arguments.epochs or (8 if arguments.quick else 15)
    arguments.finetuning = arguments.finetuning or (1 if arguments.quick else 5)
    publish("callback", arguments, partial(measure, arguments), figure, text)


if __name__ == "__main__":
    main()
