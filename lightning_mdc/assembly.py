"""From the settings of ``train.py`` to objects: data, model, criterion, budget, training module, Trainer.

Settings are plain nested dicts, as the YAML files under ``conf/`` say. What cannot be built is a `ConfigError`, or the
error of the part that refused.
"""

from __future__ import annotations

import difflib
import logging
import pickle
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch
from hydra.utils import get_object
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from safetensors import SafetensorError
from timm.models import load_checkpoint
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lightning_mdc.artifact import load
from lightning_mdc.budget import Budget, as_budget
from lightning_mdc.data import ImageDataModule
from lightning_mdc.distillation import DistillationModule
from lightning_mdc.errors import ConfigError
from lightning_mdc.importance import Criterion
from lightning_mdc.models import find_sites
from lightning_mdc.policy import DIMENSIONS, Policy, check_dimensions
from lightning_mdc.policy_search.held_out import METRICS, HeldOut
from lightning_mdc.policy_search.policy_space import PolicySpace
from lightning_mdc.policy_search.study import observations
from lightning_mdc.randomness import rng_state, set_rng_state

log = logging.getLogger(__name__)

Settings = Mapping[str, Any]

# With fewer images, many policies tie in top-1, and the best of many trials is the luckiest.
_ENOUGH_FOR_TOP1 = 1000

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

    Raises:
        BudgetError: see `Budget`.
        ConfigError: a limit of another name.
    """
    budget = settings["budget"]
    if not isinstance(budget, Mapping):
        return as_budget(budget)
    try:
        return Budget(**budget)
    except TypeError as error:
        raise ConfigError(f"budget={budget!r}: expected a fraction, or limits named macs or params") from error


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
    return Policy.uniform(
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
        if type(options[name]) is not int or options[name] < 1:
            raise ConfigError(f"search.{name}={options[name]!r}: expected a whole number of at least 1")
    if options["metric"] not in ("auto", *METRICS):
        raise ConfigError(f"search.metric={options['metric']!r}: expected auto or one of {', '.join(METRICS)}")
    confidence = options["early_stop"]
    if confidence is not None and not (isinstance(confidence, float) and 0.5 <= confidence < 1):
        raise ConfigError(f"search.early_stop={confidence!r}: expected a confidence in [0.5, 1), or null")
    space = PolicySpace(
        model, build_budget(settings), fuse_tokens=settings["surgery"]["fuse_tokens"], **space_options(settings)
    )
    if options["warm_start"] is not None:
        observations(options["warm_start"], space, "maximize")


def build_held_out(settings: Settings, batches: Iterable[Any], model: nn.Module, device: torch.device) -> HeldOut:
    """What trials are judged on: the first ``search.images`` of the held-out training images."""
    options = settings["search"]
    more = {"dense": model, "batch_size": options["batch_size"], "device": device}
    if options["metric"] != "auto":
        return HeldOut(batches, options["metric"], max_images=options["images"], **more)
    held_out = HeldOut(batches, "accuracy", max_images=options["images"], **more)
    if held_out.num_images >= _ENOUGH_FOR_TOP1:
        return held_out
    return HeldOut([(held_out.images, held_out.labels)], "kl", **more)


# --- training ---------------------------------------------------------------------------------------------------------


def build_module(
    options: Settings, epochs: int, student: nn.Module, teacher: nn.Module | None, num_classes: int | None = None
) -> DistillationModule:
    """The training module of the ``dense`` or ``distillation`` settings.

    Raises:
        DistillationError: see `DistillationModule`.
    """
    ours = {"epochs", "seeds", "reference_seeds"}
    kwargs = {key: value for key, value in options.items() if key not in ours}
    schedule = dict(kwargs["schedule"])
    if epochs and isinstance(schedule.get("warmup_epochs"), (int, float)):
        # Else one epoch under a recipe for thirty would end before the rate has risen.
        schedule["warmup_epochs"] = min(schedule["warmup_epochs"], epochs / 5)
    return DistillationModule(student, teacher, **{**kwargs, "schedule": schedule}, num_classes=num_classes)


def build_trainer(settings: Settings, epochs: int, checkpoints: Path, logger: Logger | bool, title: str) -> L.Trainer:
    """A Trainer that leaves ``last.ckpt`` in `checkpoints` after every epoch.

    Raises:
        ConfigError: Lightning refuses the ``trainer`` settings, or they ask for several devices.
    """
    terminal = sys.stderr.isatty()
    callbacks: list[Callback] = [
        ModelCheckpoint(checkpoints, filename="last", save_on_train_epoch_end=True, enable_version_counter=False),
        _RandomState(),
        TQDMProgressBar() if terminal else _PlainProgress(title),
    ]
    options = dict(settings["trainer"])
    try:
        trainer = L.Trainer(
            **options,
            max_epochs=epochs,
            logger=logger,
            callbacks=callbacks,
            default_root_dir=checkpoints,
            enable_progress_bar=terminal,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
    except (*_REFUSALS, MisconfigurationException) as error:
        raise ConfigError(f"trainer={options!r} is refused by Lightning: {error}; correct that key") from error
    if trainer.world_size > 1:
        raise ConfigError(
            f"trainer.devices={options['devices']!r} starts {trainer.world_size} processes, but the stages of train.py "
            "run in one; use trainer.devices=1, or MultiDimPruneCallback in a script of your own"
        )
    return trainer


def build_logger(settings: Settings, folder: Path, stage: str) -> Logger | bool:
    """The experiment logger of the ``logger`` group, writing under `folder`; False for none."""
    if settings["logger"].get("_target_") is None:
        return False
    logger: Logger = build(settings, "logger", save_dir=str(folder), name=stage)
    return logger


def device(settings: Settings) -> torch.device:
    """Where the Trainer would train: scoring, testing and timing run there too."""
    trainer = build_trainer(settings, 1, Path("."), False, "")
    return trainer.strategy.root_device


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
    """A line now and then, where no bar can be drawn."""

    def __init__(self, title: str) -> None:
        self.title = title

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 0
        if epoch == epochs or epoch % max(1, epochs // 5) == 0:
            numbers = (f"{key} {float(value):.4f}" for key, value in trainer.callback_metrics.items())
            log.info("  %s: epoch %d of %d, %s", self.title, epoch, epochs, ", ".join(numbers))
