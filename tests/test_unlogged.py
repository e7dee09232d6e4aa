"""Calibration is no training step: what a module logs while we look at images is logged by nobody."""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torchmetrics import MeanMetric

import lightning_mdc as mdc
from tests.strangers import Spots, Stranger, loader, trainer

pytestmark = pytest.mark.slow  # CI runs them

# What a module may do while it is called.
HABITS: dict[str, Callable[[Any, Tensor], Any]] = {
    "on_step": lambda module, x: module.log("seen", x.mean(), on_step=True),
    "log_dict": lambda module, x: module.log_dict({"seen": x.mean()}, on_step=True, on_epoch=False),
    "both": lambda module, x: module.log("seen", x.mean(), on_step=True, on_epoch=True),
    "the logger": lambda module, x: module.logger.log_metrics({"seen": 1.0}, step=module.global_step),
    "loggers": lambda module, x: [each.log_metrics({"seen": 1.0}, module.global_step) for each in module.loggers],
    "the experiment": lambda module, x: module.logger.experiment.log_metrics({"seen": 1.0}, step=module.global_step),
}


class Talks(Stranger):
    def __init__(self, habit: str = "on_step") -> None:
        super().__init__()
        self.habit, self.mean = HABITS[habit], MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        self.habit(self, x)
        self.mean.update(x.mean())
        return super().forward(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])


def logged(logger: CSVLogger, name: str) -> list[int]:
    """Steps with a value; the mean of an epoch is one, too."""
    logger.save()
    path = Path(logger.log_dir) / "metrics.csv"
    with path.open() if path.exists() else io.StringIO() as file:
        return [
            int(row["step"])
            for row in csv.DictReader(file)
            if any(row.get(name + by) for by in ("", "_step", "_epoch"))
        ]


def fitted(root: Path, module: Stranger, callback: Any, **options: Any) -> CSVLogger:
    logger = CSVLogger(root)
    run = trainer(root, callback, epochs=1, logger=logger, log_every_n_steps=1, limit_train_batches=2, **options)
    run.fit(module, loader())
    return logger


def uniform() -> mdc.MultiDimPruneCallback:
    calibration = mdc.Calibration(images=16)
    return mdc.MultiDimPruneCallback(0.5, "uniform", "activation", compensate="none", calibration=calibration)


@pytest.mark.parametrize(
    "habit",
    [h if h in ("on_step", "the experiment") else pytest.param(h, marks=pytest.mark.slow) for h in HABITS],
)
def test_what_a_forward_logs_is_that_of_the_training_alone(habit: str, tmp_path: Path) -> None:
    module = Talks(habit)
    logger = fitted(tmp_path, module, uniform())
    assert logged(logger, "seen") in ([0, 1], [0, 1, 1])
    assert module.mean.weight == 2  # and so are its metrics
    assert not {"log", "log_dict"} & vars(module).keys()


def test_a_step_that_is_used_to_calibrate_and_a_number_of_the_users_log_nothing(tmp_path: Path) -> None:
    class Steps(mdc.MultiDimPruneCallback):
        def calibration_step(self, pl_module: Any, batch: Any) -> Any:
            Stranger.training_step(pl_module, batch, 0)
            return pl_module(batch[0])

    def evaluate(module: Any) -> float:
        module.validation_step((Spots().images[:4], torch.zeros(4, dtype=torch.long)), 0)
        return 1.0

    calibration = mdc.Calibration(images=16)
    callback = Steps(0.5, n_trials=1, evaluate=evaluate, compensate="lstsq", calibration=calibration)
    logger = fitted(tmp_path, Talks(), callback)
    assert all(logged(logger, name) == [] for name in ("loss", "correct", "surprise"))


def test_what_is_pruned_is_logged_at_the_step_it_is_from(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_exception=True)
    assert logged(fitted(tmp_path / "a", Stranger(), uniform(), enable_checkpointing=False), "mdc/macs") == [0]
    callback = uniform()
    trainer(tmp_path, callback, checkpoints, epochs=1).fit(module := Stranger(), loader())
    path, resumed, looked_at = tmp_path / "epoch=0.ckpt", CSVLogger(tmp_path / "b"), CSVLogger(tmp_path / "c")
    trainer(tmp_path, uniform(), epochs=2, logger=resumed).fit(Stranger(), loader(), loader(), ckpt_path=path)
    assert logged(resumed, "mdc/macs") == [5]
    for run, checkpoint in ((callback, None), (uniform(), path)):
        trainer(tmp_path, run, logger=looked_at).test(module, loader(), ckpt_path=checkpoint, verbose=False)
    assert logged(looked_at, "mdc/macs") == []
