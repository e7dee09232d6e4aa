"""The files for lightning-hydra-template, copied into an app that is laid out as the template is, run."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import lightning
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

import lightning_mdc as mdc
from hydra_plugins.hydra_mdc_sweeper import _results
from tests import strangers
from tests.test_docs import ROOT, blocks

FILES = ROOT / "docs" / "lightning-hydra-template" / "configs"
HERE = "tests.test_hydra_template"
# What the template has, as far as these files meet it.
CONFIGS = {
    "train": """
        defaults:
          - _self_
          - data: spots
          - model: stranger
          - callbacks: default
          - trainer: default
          - paths: default
          - hydra: default
          - experiment: null
          - hparams_search: null
          - optional local: default
          - debug: null
        task_name: train
        seed: null
    """,
    "data/spots": f"{{_target_: {HERE}.Data, batch_size: 16}}",
    "model/stranger": f"""
        _target_: {HERE}.Module
        optimizer: {{_target_: torch.optim.Adam, _partial_: true, lr: 0.001, weight_decay: 0.0}}
    """,
    "callbacks/default": "{defaults: [model_checkpoint, _self_], model_checkpoint: {monitor: val/acc, mode: max}}",
    "callbacks/model_checkpoint": """
        model_checkpoint:
          _target_: lightning.pytorch.callbacks.ModelCheckpoint
          dirpath: ${paths.output_dir}/checkpoints
          monitor: null
          mode: min
    """,
    "trainer/default": """
        _target_: lightning.pytorch.trainer.Trainer
        default_root_dir: ${paths.output_dir}
        max_epochs: 1
        accelerator: cpu
        logger: false
        enable_progress_bar: false
        enable_model_summary: false
    """,
    "paths/default": "{log_dir: logs, output_dir: '${hydra:runtime.output_dir}'}",
    "hydra/default": """
        run: {dir: '${paths.log_dir}/${task_name}/run'}
        sweep: {dir: '${paths.log_dir}/${task_name}/multirun', subdir: '${hydra.job.num}'}
    """,
}


class Data(lightning.LightningDataModule):
    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return strangers.loader(batch_size=self.batch_size)

    val_dataloader = train_dataloader


class Module(strangers.Stranger):
    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.optimizer = optimizer

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        correct = (self(batch[0]).argmax(-1) == batch[1]).float().mean()
        self.log_dict({"val/acc": correct, "val/acc_best": correct})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(params=self.parameters())


@pytest.fixture
def train(tmp_path, monkeypatch) -> Callable[..., list[lightning.Trainer]]:
    """Runs the app as ``python src/train.py overrides`` would, and gives the trainers of its jobs."""
    for name, text in CONFIGS.items():
        path = tmp_path / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("# @package _global_\n" * (name == "train") + text)
    shutil.copytree(FILES, tmp_path / "configs", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_results, "draw", lambda *_: None)  # pictures take longer than all the rest
    trainers: list[lightning.Trainer] = []

    @hydra.main(version_base="1.3", config_path=str(tmp_path / "configs"), config_name="train.yaml")
    def main(cfg: DictConfig) -> float | None:
        callbacks = [hydra.utils.instantiate(each) for each in cfg.callbacks.values()]
        trainers.append(hydra.utils.instantiate(cfg.trainer, callbacks=callbacks))
        trainers[-1].fit(hydra.utils.instantiate(cfg.model), datamodule=hydra.utils.instantiate(cfg.data))
        metric = cfg.get("optimized_metric")
        return None if metric is None else trainers[-1].callback_metrics[metric].item()

    def run(*overrides: str) -> list[lightning.Trainer]:
        monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
        GlobalHydra.instance().clear()
        main()
        return trainers

    before = logging.getLogger().level, logging.getLogger().handlers[:]
    yield run
    logging.getLogger().level, logging.getLogger().handlers[:] = before


def pruning(trainer: lightning.Trainer) -> mdc.MultiDimPruneCallback:
    return next(each for each in trainer.callbacks if isinstance(each, mdc.MultiDimPruneCallback))


def test_the_callback_prunes_beside_the_templates_own(train):
    sigmoid = "callbacks.mdc.prediction={_target_: hydra.utils.get_method, path: torch.sigmoid}"
    space = "+callbacks.mdc.space={_target_: lightning_mdc.Space, min_heads: 2, bounds: {heads: [0.5, 1]}}"
    (trainer,) = train("callbacks=mdc", "callbacks.mdc.n_trials=2", "trainer.max_epochs=2", sigmoid, space)
    prune = pruning(trainer)
    assert prune.method.prediction is torch.sigmoid
    assert min(map(len, prune.plan.heads)) >= 2
    assert trainer.checkpoint_callback.monitor == "val/acc"
    assert list(Path("logs/train/run/checkpoints").glob("*.ckpt"))
    slim = mdc.load("logs/train/run/slim")
    assert mdc.macs(slim) <= 0.6 * mdc.macs(trainer.model.encoder)


def test_the_search_is_a_multirun_by_itself(train):
    trainers = train(
        "hparams_search=mdc_gp_ei",
        "callbacks=mdc",
        "callbacks.mdc.policy=uniform",
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.n_initial_points=2",
        "+trainer.limit_train_batches=1",
    )
    assert len(trainers) == 3
    assert all(pruning(trainer).plan is not None for trainer in trainers)
    found = OmegaConf.load("logs/train/multirun/optimization_results.yaml")
    values = [trainer.callback_metrics["val/acc_best"].item() for trainer in trainers]
    assert found.best_value == max(values)
    assert set(found.best_params) == {"model.optimizer.lr", "model.optimizer.weight_decay", "data.batch_size"}
    assert mdc.macs(mdc.load("logs/train/multirun/2/slim")) < mdc.macs(trainers[2].model.encoder)


def test_what_stands_for_optunas_settings_is_taken(train):
    (settings,) = [block.text for block in blocks(ROOT / "docs" / "coming-from.md") if block.language == "yaml"]
    (Path("configs") / "experiment").mkdir()
    Path("configs/experiment/mine.yaml").write_text(settings)
    trainers = train("-m", "experiment=mine", "+optimized_metric=val/acc_best", "hydra.sweeper.n_trials=1")
    found = OmegaConf.load("logs/train/multirun/optimization_results.yaml")
    (trainer,) = trainers
    assert found.best_params["model.optimizer.lr"] == trainer.model.optimizer.keywords["lr"]
