"""Training, from the settings of ``train.py``: the training modules, the Trainer, and the processes it works in."""

from __future__ import annotations

import atexit
import copy
import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.strategies import ParallelStrategy
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from safetensors import SafetensorError
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_mdc.app.settings import Settings
from lightning_mdc.app.terminal import in_sweep
from lightning_mdc.distillation import DistillationModule, Teacher
from lightning_mdc.distributed import is_lost_peer, leave_process_group, rank
from lightning_mdc.errors import ConfigError, DistributedError
from lightning_mdc.progress import on_terminal
from lightning_mdc.randomness import rng_state, set_rng_state

log = logging.getLogger(__name__)

# Keys of a training's settings that are said to the step or to the Trainer, not to the training module.
_NOT_THE_MODULES = ("epochs", "seeds", "reference_seeds", "ema_decay", "recipe")

# Of the Trainer's arguments, those that a machine can be without.
_WHERE_TO_TRAIN = ("accelerator", "devices", "num_nodes", "strategy", "precision")

# What timm, torch and Lightning raise at arguments they cannot use.
REFUSALS = (
    TypeError,
    ValueError,
    RuntimeError,
    AssertionError,
    KeyError,
    OSError,
    SafetensorError,
    UnpicklingError,
    MisconfigurationException,
    InstantiationException,
)

# --- training modules -------------------------------------------------------------------------------------------------


def build_module(options: Settings, student: nn.Module, teacher: nn.Module | str | None) -> DistillationModule:
    """The training module of the ``dense`` or ``distillation`` settings.

    Raises:
        DistillationError: see `DistillationModule`.
    """
    return DistillationModule(student, _teacher(options, teacher), **module_options(options))


def _teacher(options: Settings, source: Any) -> Teacher | None:
    """`source` with the settings ``teacher_*``; None without one, unless they say that there should be."""
    own = {key.removeprefix("teacher_"): value for key, value in options.items() if key.startswith("teacher_")}
    return Teacher(source, **own) if source is not None or own.get("checkpoint") or own.get("args") else None


def check_training(settings: Settings, model: nn.Module) -> None:
    """Refuse what the training modules would refuse, before anything is trained. Builds no teacher.

    Raises:
        DistillationError: what is wrong.
    """
    if settings["dense"]["epochs"] or model.num_classes:  # else there is nothing that labels could teach
        build_module(settings["dense"], model, None)
    if settings["sharing"]["epochs"]:
        build_module({k: v for k, v in settings["sharing"].items() if k != "shared_weight"}, model, None)
    options = settings["distillation"]
    if options["teacher"] not in (None, "dense"):
        _teacher(options, options["teacher"])  # which checks itself
        options = {**options, "teacher_checkpoint": None, "teacher_args": {}}
    build_module(options, model, None if options["teacher"] is None else copy.deepcopy(model))


def module_options(options: Settings) -> dict[str, Any]:
    """Keyword arguments of a training module, without its teacher and what is said to the step or to the Trainer."""
    kwargs = {k: v for k, v in options.items() if k not in _NOT_THE_MODULES and not k.startswith("teacher")}
    schedule, epochs = dict(kwargs["schedule"]), options["epochs"]
    if epochs and isinstance(schedule.get("warmup_epochs"), (int, float)):
        # Else one epoch under a recipe for thirty would end before the rate has risen.
        schedule["warmup_epochs"] = min(schedule["warmup_epochs"], epochs / 5)
    return {**kwargs, "schedule": schedule}


# --- the Trainer ------------------------------------------------------------------------------------------------------


def build_trainer(
    settings: Settings,
    options: Settings,
    checkpoints: Path,
    loggers: Sequence[Logger],
    title: str,
    best: BestEpoch | None = None,
) -> L.Trainer:
    """A Trainer that leaves ``last.ckpt`` in `checkpoints` after every epoch, now and then in between, and at SIGTERM.

    `options` are those of the training: ``epochs``, and ``ema_decay`` if it has one. With `best` the start is judged on
    all held-out images, too.

    Raises:
        ConfigError: Lightning refuses the ``trainer`` settings.
    """
    terminal = on_terminal()
    minutes = settings["checkpoint_minutes"]
    keep: dict[str, Any] = {"dirpath": checkpoints, "filename": "last", "enable_version_counter": False}
    callbacks: list[Callback] = [
        _LastCheckpoint(**keep, save_on_train_epoch_end=True, save_on_exception=True),
        *([] if minutes is None else [ModelCheckpoint(**keep, train_time_interval=timedelta(minutes=minutes))]),
        _RandomState(),
        *([RichProgressBar()] if terminal else []),
        _PlainProgress(title),
        *([LearningRateMonitor(logging_interval="step")] if loggers else []),
        *([] if best is None else [best]),
    ]
    if options.get("ema_decay") is not None:
        callbacks.append(EMAWeightAveraging(decay=options["ema_decay"]))
    arguments = {**settings["trainer"], "strategy": _strategy(settings)}
    if every := arguments["check_val_every_n_epoch"]:  # or more often, so that the last epoch is not left out
        arguments["check_val_every_n_epoch"] = max(n for n in range(1, every + 1) if options["epochs"] % n == 0)
    if ignores_clipping(settings):
        arguments["gradient_clip_val"] = None
    try:
        return L.Trainer(
            **arguments,
            max_epochs=options["epochs"],
            logger=list(loggers),
            callbacks=callbacks,
            default_root_dir=checkpoints,
            enable_progress_bar=terminal,
            enable_model_summary=False,
            num_sanity_val_steps=0 if best is None else -1,
        )
    except REFUSALS as error:
        raise _trainer_refused(settings, error) from error


def _strategy(settings: Settings) -> Strategy | str:
    """Lightning's strategy object where the settings name a class, else its name.

    Raises:
        ConfigError: there is no such class, or it refuses its arguments.
    """
    strategy = settings["trainer"]["strategy"]
    if not isinstance(strategy, Mapping):
        return cast(str, strategy)
    try:
        return cast(Strategy, instantiate(strategy, _convert_="all"))
    except REFUSALS as error:
        raise _trainer_refused(settings, error) from error


def _trainer_refused(settings: Settings, error: Exception) -> ConfigError:
    shown = {key: value for key, value in settings["trainer"].items() if key in _WHERE_TO_TRAIN}
    if isinstance(shown["strategy"], Mapping):
        shown["strategy"] = shown["strategy"].get("_target_")
    return ConfigError(f"trainer={shown!r} is refused by Lightning: {error}; correct trainer.KEY")


def ddp(**options: Any) -> DDPStrategy:
    """Lightning's strategy, with the buffers of a module left alone, as torch's release calls it.

    No buffer of a vision transformer changes, and a sync of them before each forward pass would wait for ever where
    ranks have unequal numbers of batches to validate.
    """
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DDPStrategy(**{name: False, **options})


def fsdp(**options: Any) -> FSDPStrategy:
    """Lightning's strategy, with every block as a shard and checkpoints that hold the whole model."""
    blocks = {Block, ResPostBlock}  # with a token stage they still are
    return FSDPStrategy(**{"auto_wrap_policy": blocks, "state_dict_type": "full", **options})


# --- where it works ---------------------------------------------------------------------------------------------------


def training_device(settings: Settings) -> torch.device:
    """Where the Trainer would train: scoring, testing and timing run there too."""
    return _where_to_train(json.dumps(settings["trainer"]))[0]


def num_processes(settings: Settings) -> int:
    """How many processes, on all nodes, the ``trainer`` settings ask for."""
    return _where_to_train(json.dumps(settings["trainer"]))[1]


@lru_cache
def _where_to_train(trainer: str) -> tuple[torch.device, int]:
    """(device of this process, number of processes), which a Trainer knows. A start asks several times.

    Args:
        trainer: the ``trainer`` settings, as JSON.
    """
    settings = {"trainer": json.loads(trainer), "checkpoint_minutes": None}
    made = build_trainer(settings, {"epochs": 1}, Path("."), [], "")
    return made.strategy.root_device, made.world_size


def shards_parameters(settings: Settings) -> bool:
    """Whether parameters are spread over ranks while training, so that no rank has the whole network."""
    strategy = _strategy(settings)
    return isinstance(strategy, FSDPStrategy) or (isinstance(strategy, str) and strategy.startswith("fsdp"))


def ignores_clipping(settings: Settings) -> bool:
    """Whether ``trainer.gradient_clip_val`` is left out, as Lightning cannot take the norm over shards.

    It stays in the settings, so that what was trained under another strategy is not taken for something else.
    """
    return shards_parameters(settings) and settings["trainer"].get("gradient_clip_algorithm") != "value"


@contextmanager
def processes(settings: Settings) -> Iterator[None]:
    """All processes that the ``trainer`` settings ask for are there inside, connected: started by Lightning, or by
    SLURM or torchrun, which Lightning sees. When one fails, so do the others.

    Raises:
        ConfigError: they can't be started from here.
        DistributedError: another process of the run went away.
    """
    atexit.register(leave_process_group)  # Lightning does so for nccl only
    total = num_processes(settings)
    if total == 1:
        yield
        return
    options = settings["trainer"]
    # Lightning starts further processes by the same command line again; a Trainer then finds itself in one of them.
    fabric = L.Fabric(
        accelerator=options["accelerator"], devices=options["devices"], num_nodes=options["num_nodes"], strategy="ddp"
    )
    assert isinstance(fabric.strategy, ParallelStrategy)
    environment = fabric.strategy.cluster_environment
    by_itself = environment is None or not environment.creates_processes_externally
    if by_itself and in_sweep():
        raise ConfigError(
            f"-m with {total} processes: each would start the whole sweep again; use trainer.devices=1, or a launcher "
            "that starts the processes of a job, such as hydra/launcher=submitit_slurm with tasks_per_node"
        )
    try:
        fabric.launch()
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        raise ConfigError(
            f"trainer.devices={options['devices']!r}, trainer.num_nodes={options['num_nodes']!r}: {total} processes "
            f"can't be started: {error}"
        ) from error
    try:
        yield
    except BaseException as error:
        for child in getattr(fabric.strategy.launcher, "procs", ()):
            child.kill()  # it would wait in vain for this process
        if is_lost_peer(error):
            raise DistributedError(
                f"another of the {total} processes of this run is gone (rank {rank()} noticed); what it printed before "
                "says why, and nothing means it was killed. The run goes on from its last checkpoint with resume=true, "
                "with any number of devices that divides data.batch_size"
            ) from error
        raise


# --- callbacks --------------------------------------------------------------------------------------------------------


class _RandomState(Callback):
    """Random states go into the checkpoint, so that a run resumed from an epoch's end equals the uninterrupted one.

    They are put back as soon as they are read. `on_fit_start` would be too late: configure_optimizers has asked for the
    number of steps by then, which makes the loader's iterator, which draws the epoch's first random number.
    """

    def state_dict(self) -> dict[str, Any]:
        return rng_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_rng_state(state_dict)


class _LastCheckpoint(ModelCheckpoint):
    """Saves at SIGTERM, too, at which Lightning ends all ranks between two steps; not after an error or Ctrl-C, which
    come within one: what a loss of NaN has made of the weights is nothing to go on from."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException):
            super().on_exception(trainer, pl_module, exception)


class BestEpoch(ModelCheckpoint):
    """Keeps ``best.ckpt``, the epoch that gets the most held-out images right, of equals the latest.

    Attributes:
        path: of the file.
        before: fraction of the held-out images that are right before the first step, by Lightning's check of
            validation; None without such images.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder,
            "best",
            monitor="val/top1",
            mode="max",
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.path = folder / "best.ckpt"
        self.before: float | None = None

    @property
    def after(self) -> float | None:
        """Fraction of the held-out images that the best epoch gets right; None: no epoch was judged."""
        return None if self.best_model_score is None else float(self.best_model_score)

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        top1 = trainer.callback_metrics.get("val/top1")  # there is none without held-out images
        if top1 is not None and trainer.global_step == 0:  # else it is that of a resumed training
            self.before = float(top1)

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        return super().check_monitor_top_k(trainer, current) or bool(current == self.best_model_score)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.before = state_dict["before"]


class _PlainProgress(Callback):
    """A line now and then: what is left of a training in a log, and where no bar can be drawn."""

    def __init__(self, title: str) -> None:
        self.title = title

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 0
        if epoch == epochs or epoch % max(1, epochs // 5) == 0:
            means = [key for key in trainer.callback_metrics if "/" in key and not key.startswith("lr-")]
            means = [key for key in means if not key.endswith("_step")]
            every = trainer.check_val_every_n_epoch or 1
            if epoch % every:  # those of an earlier epoch are still there
                means = [key for key in means if not key.startswith("val/")]
            numbers = (f"{key} {float(trainer.callback_metrics[key]):.4f}" for key in means)
            log.info("  %s: epoch %d of %d, %s", self.title, epoch, epochs, ", ".join(numbers))
