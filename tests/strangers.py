"""A LightningModule this project knows nothing about, and what trains it in processes of their own for the
callback's tests."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import lightning_mdc as mdc

SIDE = 16


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=SIDE, patch_size=4, in_chans=1, num_classes=5, embed_dim=32, depth=4, num_heads=4, drop_rate=0.1
    )


class Stranger(lightning.LightningModule):
    """Own normalisation inside forward, own optimizer, own data order."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(2 * x - 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("correct", (self(batch[0]).argmax(-1) == batch[1]).float().mean())
        self.log("surprise", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Twins(Stranger):
    """Has two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.other = network(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x) + self.other(x)


class Spots(Dataset[tuple[Tensor, int]]):
    """Where is the bright spot? Five places; fixed images."""

    def __init__(self, count: int = 80) -> None:
        generator = torch.Generator().manual_seed(7)
        self.labels = torch.randint(0, 5, (count,), generator=generator)
        self.images = 0.3 * torch.rand(count, 1, SIDE, SIDE, generator=generator)
        for image, label in zip(self.images, self.labels, strict=True):
            image[0, 3 * label : 3 * label + 3, 4:9] += 0.7

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(Spots(), **({"batch_size": 16} | options))


def trainer(root: Path, *callbacks: lightning.Callback, epochs: int = 2, **options: Any) -> lightning.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        default_root_dir=root,
        **(quiet | {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)} | options),
    )


class Killed(lightning.Callback):
    """Ends the process as a power cut would, at the start of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            os.kill(os.getpid(), signal.SIGKILL)


def train(root: Path, killed_at: int | None, resume: bool) -> None:
    """Four epochs with checkpoints under `root`; leaves final weights, predictions and the slim model there."""
    torch.manual_seed(3)
    module, callback = Stranger(), mdc.MultiDimPruneCallback(0.5, "uniform", restore_rng=True)
    checkpoints = ModelCheckpoint(root, filename="{epoch}", save_top_k=-1, enable_version_counter=False, save_last=True)
    extra = [] if killed_at is None else [Killed(killed_at)]
    fit = trainer(root, callback, checkpoints, *extra, epochs=4, logger=CSVLogger(root))
    fit.fit(module, loader(shuffle=True), loader(), ckpt_path=root / "last.ckpt" if resume else None)
    torch.save(module.state_dict(), root / "final.pt")
    mdc.save(callback.slim_model(module.eval()), root / "slim")


class UnevenBatches(IterableDataset[Any]):
    """Whole batches, a stream of other sizes on the second rank."""

    def __iter__(self) -> Iterator[Any]:
        second = torch.distributed.is_initialized() and torch.distributed.get_rank() == 1
        spots = Spots()
        for size in (8, 6, 8, 6, 8, 8) if second else (8,) * 6:
            yield spots.images[:size], spots.labels[:size]


def train_ddp(rank: int, root: Path, devices: int, data: str) -> None:
    """One epoch; every rank writes down the plan it holds."""
    torch.manual_seed(3)
    # Sums in another order round otherwise. Not enough for another plan by this criterion; by elimination, units that
    # tie nearly leave in another order.
    callback = mdc.MultiDimPruneCallback(0.5, "uniform", "hsic", calibration=mdc.Calibration(images=64))
    options = {"strategy": "ddp", "devices": devices, "use_distributed_sampler": True} if devices > 1 else {}
    fit = trainer(root, callback, epochs=1, **options)
    stream: DataLoader[Any] = DataLoader(UnevenBatches(), batch_size=None)
    fit.fit(Stranger(), loader(shuffle=True) if data == "map" else stream)
    assert fit.global_rank == rank
    assert callback.plan is not None
    (root / f"plan-{devices}-{rank}.json").write_text(callback.plan.to_json())
    assert callback.scores is not None
    (root / f"images-{devices}-{rank}").write_text(str(callback.scores.images))


if __name__ == "__main__":
    folder, killed_at, how = sys.argv[1:]
    train(Path(folder), killed_at=int(killed_at) if killed_at != "-" else None, resume=how == "resume")
