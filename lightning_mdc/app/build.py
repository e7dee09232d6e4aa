"""From the settings of ``train.py`` to objects: data, model, criterion, budget, training module, Trainer.

Settings are plain nested dicts, as the YAML files under ``conf/`` say. What cannot be built is a `ConfigError`, or the
error of the part that refused.
"""

from __future__ import annotations

import atexit
import copy
import difflib
import inspect
import json
import logging
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import lightning as L
import timm
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import get_object, instantiate
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
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from safetensors import SafetensorError
from timm.models import load_checkpoint
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_mdc.app.data import ImageDataModule
from lightning_mdc.app.tracking import Tracker
from lightning_mdc.artifact import load
from lightning_mdc.budget import Budget, as_budget
from lightning_mdc.budget.uniform import uniform_policy
from lightning_mdc.distillation import DistillationModule, check_teacher
from lightning_mdc.distillation.weight_sharing import WeightSharingModule
from lightning_mdc.distributed import is_lost_peer, leave_process_group, rank
from lightning_mdc.errors import ConfigError, DistributedError, check_whole
from lightning_mdc.gp_ei.study import observations
from lightning_mdc.importance import Criterion, Scores
from lightning_mdc.models import find_sites
from lightning_mdc.models.timm_block import TokenStageBlock
from lightning_mdc.policy import DIMENSIONS, Policy, check_dimensions
from lightning_mdc.policy_search.held_out import METRICS, HeldOut, gathered
from lightning_mdc.policy_search.policy_space import PolicySpace
from lightning_mdc.progress import on_terminal
from lightning_mdc.randomness import rng_state, set_rng_state
from lightning_mdc.surgery.compensation import check_compensable

log = logging.getLogger(__name__)

Settings = Mapping[str, Any]

# With fewer images, many policies tie in top-1, and the best of many trials is the luckiest.
_ENOUGH_FOR_TOP1 = 1000

# Keys of a training's settings that say how long, how often and under what, see `steps`.
_NOT_THE_MODULES = ("epochs", "seeds", "reference_seeds", "teacher", "ema_decay")

# Of the Trainer's arguments, those that a machine can be without.
_WHERE_TO_TRAIN = ("accelerator", "devices", "num_nodes", "strategy", "precision")

# What timm and torch raise at arguments they cannot use.
_REFUSALS = (
    TypeError,
    ValueError,
    RuntimeError,
    AssertionError,
    KeyError,
    OSError,
    SafetensorError,
    pickle.UnpicklingError,
)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The settings as nested dicts, interpolations resolved.

    Raises:
        ConfigError: a value is missing or refers to something that is not there.
    """
    try:
        settings = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}=??? has to be given, e.g. {error.full_key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key} cannot be worked out: {error}") from error
    assert isinstance(settings, dict)
    return settings  # type: ignore[return-value]


def build(settings: Settings, group: str, **more: Any) -> Any:
    """The object that ``_target_`` of a config group names, with the group's other keys as arguments.

    Raises:
        ConfigError: there is no such name, or it takes no such argument.
    """
    options = dict(settings[group])
    target = options.pop("_target_")
    try:
        kind = get_object(target)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(f"{group}._target_={target!r} names nothing that can be imported: {error}") from error
    try:
        return kind(**options, **more)
    except TypeError as error:
        raise ConfigError(f"{group}={options!r} is refused by {target}: {error}; correct that key") from error


# --- data and model ---------------------------------------------------------------------------------------------------


def build_data(settings: Settings) -> ImageDataModule:
    """The LightningDataModule. What it leaves open (size, normalisation) is the model's to say.

    Raises:
        ConfigError: data and model disagree on the image size.
        DataError: see the data module.
    """
    data, model = settings["data"], settings["model"]
    more: dict[str, Any] = {}
    side = model["args"].get("img_size")
    if side is not None and data.get("img_size") not in (None, side):
        raise ConfigError(
            f"model.args.img_size={side} differs from data.img_size={data['img_size']}; give only one of them"
        )
    if side is not None:
        more["img_size"] = side
    if "data_config" in data and data["data_config"] is None and model["name"] is not None:
        _check_name(model["name"])
        cfg = timm.get_pretrained_cfg(model["name"])
        more["data_config"] = {} if cfg is None else cfg.to_dict()
    return build({"data": {key: value for key, value in data.items() if key not in more}}, "data", **more)


def build_model(settings: Settings, data: ImageDataModule, *, weights: bool = True) -> nn.Module:
    """The dense model, sized to the data: a timm model by name, or timm's `VisionTransformer` by its arguments.

    Args:
        weights: load those that ``model.pretrained`` or ``model.checkpoint`` name.

    Raises:
        ConfigError: an unknown name, arguments timm refuses, or a checkpoint that does not fit.
    """
    model = settings["model"]
    size = data.img_size
    facts = {"img_size": size, "in_chans": data.in_chans, "num_classes": data.num_classes}
    args = {key: value for key, value in {**model["args"], **facts}.items() if value is not None}
    if model["name"] is not None:
        _check_name(model["name"])
    elif model["pretrained"]:
        raise ConfigError("model.pretrained=true, but model.name=null: weights belong to a name; give model.name")
    try:
        if model["name"] is None:
            network = VisionTransformer(**args)
        else:
            network = timm.create_model(model["name"], pretrained=model["pretrained"] and weights, **args)
    except _REFUSALS as error:
        shown = {key: value for key, value in args.items() if key not in facts}
        raise ConfigError(
            f"model.name={model['name']!r} with model.args={shown} for images of {data.in_chans}x{size}x{size} is "
            f"refused by timm: {error or type(error).__name__}; correct model.args, or data.img_size"
        ) from error
    checkpoint = model["checkpoint"]
    if checkpoint is not None and not Path(checkpoint).exists():
        raise ConfigError(
            f"model.checkpoint={checkpoint!r} does not exist; give a weights file or a folder written by mdc.save"
        )
    if checkpoint is not None and weights:
        network = _with_checkpoint(network, checkpoint)
    _note_preprocessing(network, data)
    return network


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not timm.is_model(name):
        close = difflib.get_close_matches(str(name), timm.list_models("*vit*") + timm.list_models("deit*"), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists them all"
        raise ConfigError(f"model.name={name!r} is no model of timm; {hint}")


def _with_checkpoint(network: nn.Module, checkpoint: str) -> nn.Module:
    path = Path(checkpoint)
    try:
        if path.is_dir():
            network.load_state_dict(load(path).state_dict())
        else:
            load_checkpoint(network, str(path), weights_only=True)
    except _REFUSALS as error:
        first = str(error).strip().splitlines()
        raise ConfigError(
            f"model.checkpoint={checkpoint!r} does not fit model.name and model.args: {' '.join(first[:2])[:300]}; "
            "build the model it was trained as"
        ) from error
    return network


def _note_preprocessing(network: nn.Module, data: ImageDataModule) -> None:
    """A saved model must say how its images were prepared; else whoever loads it assumes ImageNet's mean and std."""
    known = getattr(network, "pretrained_cfg", None) or {}
    used = getattr(data, "data_config", {})
    size = (data.in_chans, data.img_size, data.img_size)
    cfg = {**known, **used, "input_size": size, "num_classes": data.num_classes}
    network.pretrained_cfg = cfg  # type: ignore[assignment]
    if hasattr(network, "default_cfg"):
        network.default_cfg = cfg  # type: ignore[assignment]


# --- what to prune ----------------------------------------------------------------------------------------------------


def build_criterion(settings: Settings) -> Criterion:
    """The criterion of the ``importance`` group.

    Raises:
        ConfigError: the group names something else.
    """
    criterion = build(settings, "importance")
    if not isinstance(criterion, Criterion):
        raise ConfigError(f"importance._target_={settings['importance']['_target_']!r} is no Criterion")
    return criterion


def build_budget(settings: Settings) -> Budget:
    """``budget``: a fraction of the dense MACs, or limits by name, ``{macs: 1.84e9}``.

    Latency is measured on the Trainer's device, unless the limits say otherwise.

    Raises:
        BudgetError: see `Budget`.
        ConfigError: a limit of another name.
    """
    budget = settings["budget"]
    if not isinstance(budget, Mapping):
        return as_budget(budget)
    try:
        limits = Budget(**budget)
    except TypeError as error:
        raise ConfigError(
            f"budget={budget!r}: expected a fraction, or limits named macs, params or latency (with batch_size, device "
            "or table)"
        ) from error
    measures_here = limits.latency is not None and limits.table is None and limits.device is None
    return replace(limits, device=str(device(settings))) if measures_here else limits


def given_policy(settings: Settings, model: nn.Module) -> Policy | None:
    """The policy that the ``policy`` settings give: a file, keep ratios, or the uniform one; None: search for it.

    Raises:
        ConfigError: they give two, or an unknown kind.
        BudgetError, PolicyError: see `Policy`.
    """
    options = settings["policy"]
    keep = {name: ratios for name, ratios in options["keep"].items() if ratios is not None}
    if options["kind"] not in ("searched", "uniform"):
        raise ConfigError(f"policy.kind={options['kind']!r}: expected searched or uniform")
    if options["file"] is not None and keep:
        raise ConfigError("policy.file and policy.keep both give a policy; give one of them")
    if options["file"] is not None:
        policy = Policy.load(options["file"])
        find_sites(model).counts(policy)
        return policy
    if keep:
        space = keep_space(settings, model, keep, 1.0)
        Policy(**{name: keep.get(name, 1.0) for name in DIMENSIONS})  # says which ratio is none
        return space.policy(space.snap(space.point_anywhere(keep_params(keep))[None])[0])
    if options["kind"] == "searched":
        return None
    names = ("dimensions", "min_heads", "min_neurons", "round_to")
    return uniform_policy(
        model, build_budget(settings), stages=settings["surgery"]["stages"], **{name: options[name] for name in names}
    )


def keep_space(settings: Settings, model: nn.Module, keep: Mapping[str, Any], budget: float | Budget) -> PolicySpace:
    """All policies that can be written like `keep`: as many ratios per dimension as it gives, dimensions it has.

    Raises:
        SearchError: too many ratios, or an unknown dimension.
    """
    counts = {name: len(ratios) if isinstance(ratios, list) else 1 for name, ratios in keep.items()}
    return PolicySpace(
        model,
        budget,
        check_dimensions(keep),
        bounds=dict.fromkeys(keep, (0.0, 1.0)),
        groups={name: counts[name] for name in ("heads", "neurons") if name in keep},
        token_ratio="stages" if isinstance(keep.get("tokens"), list) else "shared",
        stages=settings["surgery"]["stages"],
        **{name: settings["policy"][name] for name in ("min_heads", "min_neurons", "round_to")},
        fuse_tokens=settings["surgery"]["fuse_tokens"],
    )


def keep_params(keep: Mapping[str, Any]) -> dict[str, Any]:
    """``{"heads": [0.5, 1], "tokens": 0.8}`` by the names of `keep_space`: ``heads.0``, ``heads.1``, ``tokens``."""
    params: dict[str, Any] = {}
    for name, ratios in keep.items():
        if name == "tokens" and not isinstance(ratios, list):
            params[name] = ratios
        else:
            each = ratios if isinstance(ratios, list) else [ratios]
            params |= {f"{name}.{number}": ratio for number, ratio in enumerate(each)}
    return params


def space_options(settings: Settings) -> dict[str, Any]:
    """What of the settings says which policies there are: keyword arguments of `PolicySpace`."""
    policy, search = settings["policy"], settings["search"]
    return {
        **{name: policy[name] for name in ("dimensions", "min_heads", "min_neurons", "round_to")},
        **{name: search[name] for name in ("bounds", "groups", "token_ratio")},
        "stages": settings["surgery"]["stages"],
    }


def check_search(settings: Settings, model: nn.Module) -> None:
    """Refuse what `search` would refuse, before anything is trained.

    Raises:
        ConfigError, SearchError, BudgetError: what is wrong.
    """
    options = settings["search"]
    for name in ("n_trials", "n_initial_points", "images", "batch_size"):
        check_whole(f"search.{name}", options[name], 1, ConfigError)
    if options["metric"] not in ("auto", *METRICS):
        raise ConfigError(f"search.metric={options['metric']!r}: expected auto or one of {', '.join(METRICS)}")
    space = PolicySpace(
        model, build_budget(settings), fuse_tokens=settings["surgery"]["fuse_tokens"], **space_options(settings)
    )
    if options["warm_start"] is not None:
        observations(options["warm_start"], space, "maximize")


def check_compensation(settings: Settings, model: nn.Module, policy: Policy | None) -> None:
    """Refuse to compensate for what cannot be, before anything is trained. `policy`: if one is given.

    Raises:
        UnsupportedModelError: names the module in the way.
    """
    sites, wanted = find_sites(model), settings["policy"]["dimensions"]
    for name in ("heads", "neurons"):
        if policy is None:
            pruned = name in (sites.dimensions if wanted is None else wanted)
        else:
            pruned = any(ratio < 1 for ratio in getattr(policy, name))
        for block in sites.blocks if pruned else ():
            check_compensable(getattr(block, name), settings["surgery"]["compensate"])


def build_held_out(settings: Settings, batches: Iterable[Any], model: nn.Module, device: torch.device) -> HeldOut:
    """What trials are judged on: the first ``search.images`` of the held-out training images."""
    options = settings["search"]
    images, labels = gathered(batches, options["images"])
    metric = options["metric"]
    if metric == "auto":
        metric = "accuracy" if len(images) >= _ENOUGH_FOR_TOP1 else "kl"
    return HeldOut([(images, labels)], metric, dense=model, batch_size=options["batch_size"], device=device)


# --- training ---------------------------------------------------------------------------------------------------------


def build_module(options: Settings, student: nn.Module, teacher: nn.Module | str | None) -> DistillationModule:
    """The training module of the ``dense`` or ``distillation`` settings.

    Raises:
        DistillationError: see `DistillationModule`.
    """
    return DistillationModule(student, teacher, **_module_options(options))


def check_training(settings: Settings, model: nn.Module) -> None:
    """Refuse what the training modules would refuse, before anything is trained. Builds no teacher.

    Raises:
        DistillationError: what is wrong.
    """
    build_module(settings["dense"], model, None)
    if settings["sharing"]["epochs"]:
        build_module({k: v for k, v in settings["sharing"].items() if k != "shared_weight"}, model, None)
    options = settings["distillation"]
    if options["teacher"] not in (None, "dense"):
        check_teacher(options["teacher"], options["teacher_checkpoint"], options["teacher_args"])
        options = {**options, "teacher_checkpoint": None, "teacher_args": {}}
    build_module(options, model, None if options["teacher"] is None else copy.deepcopy(model))


def _module_options(options: Settings) -> dict[str, Any]:
    """Keyword arguments of a training module, without what is said to the step or to the Trainer."""
    kwargs = {key: value for key, value in options.items() if key not in _NOT_THE_MODULES}
    schedule, epochs = dict(kwargs["schedule"]), options["epochs"]
    if epochs and isinstance(schedule.get("warmup_epochs"), (int, float)):
        # Else one epoch under a recipe for thirty would end before the rate has risen.
        schedule["warmup_epochs"] = min(schedule["warmup_epochs"], epochs / 5)
    return {**kwargs, "schedule": schedule}


def build_trainer(
    settings: Settings, options: Settings, checkpoints: Path, loggers: Sequence[Logger], title: str
) -> L.Trainer:
    """A Trainer that leaves ``last.ckpt`` in `checkpoints` after every epoch, and now and then in between.

    `options` are those of the training: ``epochs``, and ``ema_decay`` if it has one.

    Raises:
        ConfigError: Lightning refuses the ``trainer`` settings.
    """
    terminal = on_terminal()
    minutes = settings["checkpoint_minutes"]
    keep: dict[str, Any] = {"dirpath": checkpoints, "filename": "last", "enable_version_counter": False}
    callbacks: list[Callback] = [
        ModelCheckpoint(**keep, save_on_train_epoch_end=True),
        *([] if minutes is None else [ModelCheckpoint(**keep, train_time_interval=timedelta(minutes=minutes))]),
        _RandomState(),
        *([RichProgressBar()] if terminal else []),
        _PlainProgress(title),
        *([LearningRateMonitor(logging_interval="step")] if loggers else []),
    ]
    if options.get("ema_decay") is not None:
        callbacks.append(EMAWeightAveraging(decay=options["ema_decay"]))
    arguments = {**settings["trainer"], "strategy": _strategy(settings)}
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
            num_sanity_val_steps=0,
        )
    except (*_REFUSALS, MisconfigurationException) as error:
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
    atexit.unregister(leave_process_group)  # of an earlier call
    atexit.register(leave_process_group)  # Lightning does so for nccl only
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DDPStrategy(**{name: False, **options})


def fsdp(**options: Any) -> FSDPStrategy:
    """Lightning's strategy, with every block as a shard and checkpoints that hold the whole model."""
    blocks = {Block, ResPostBlock, TokenStageBlock}
    return FSDPStrategy(**{"auto_wrap_policy": blocks, "state_dict_type": "full", **options})


def shards_parameters(settings: Settings) -> bool:
    """Whether parameters are spread over ranks while training, so that no rank has the whole network."""
    strategy = _strategy(settings)
    return isinstance(strategy, FSDPStrategy) or (isinstance(strategy, str) and strategy.startswith("fsdp"))


def ignores_clipping(settings: Settings) -> bool:
    """Whether ``trainer.gradient_clip_val`` is left out, as Lightning cannot take the norm over shards.

    It stays in the settings, so that what was trained under another strategy is not taken for something else.
    """
    return shards_parameters(settings) and settings["trainer"].get("gradient_clip_algorithm") != "value"


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
    except (*_REFUSALS, InstantiationException) as error:
        raise _trainer_refused(settings, error) from error


def build_sharing(settings: Settings, model: nn.Module, scores: Scores) -> WeightSharingModule:
    """The training module of the ``sharing`` settings, over the policies that the search may ask for.

    Raises:
        DistillationError, SearchError, BudgetError: see `WeightSharingModule`.
    """
    surgery = settings["surgery"]
    return WeightSharingModule(
        model,
        scores,
        build_budget(settings),
        **_module_options(settings["sharing"]),
        **space_options(settings),
        token_score=surgery["token_score"],
        fuse_tokens=surgery["fuse_tokens"],
        seed=settings["seed"],
    )


def build_trackers(settings: Settings) -> dict[str, Tracker]:
    """What the ``logger`` group watches the run with, by key; nothing is opened yet.

    Raises:
        ConfigError: a tracker's package is missing, or it refuses its settings.
    """
    # logger=[] leaves no group; null switches one off.
    chosen = {key: options for key, options in (settings.get("logger") or {}).items() if options is not None}
    trackers = {}
    for key, options in chosen.items():
        if not isinstance(options, Mapping) or "_target_" not in options:
            raise ConfigError(
                f"logger.{key}={options!r}: expected a logger, such as logger=wandb or logger=[csv,wandb]"
            )
        tracker = build({f"logger.{key}": options}, f"logger.{key}")
        if not isinstance(tracker, Tracker):
            raise ConfigError(f"logger.{key}._target_={options['_target_']!r} is no Tracker")
        trackers[key] = tracker
    return trackers


def device(settings: Settings) -> torch.device:
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


@contextmanager
def processes(settings: Settings) -> Iterator[None]:
    """All processes that the ``trainer`` settings ask for are there inside, connected: started by Lightning, or by
    SLURM or torchrun, which Lightning sees. When one fails, so do the others.

    Raises:
        ConfigError: they can't be started from here.
        DistributedError: another process of the run went away.
    """
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
    if by_itself and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
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


class _RandomState(Callback):
    """Random states go into the checkpoint, so that a run resumed from an epoch's end equals the uninterrupted one.

    They are put back as soon as they are read. `on_fit_start` would be too late: configure_optimizers has asked for the
    number of steps by then, which makes the loader's iterator, which draws the epoch's first random number.
    """

    def state_dict(self) -> dict[str, Any]:
        return rng_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_rng_state(state_dict)


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
