"""From the settings of ``train.py`` to objects: data, model, criterion, budget, policy, held-out images, trackers.

What cannot be built is a `ConfigError`, or the error of the part that refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lightning_mdc.app.data import ImageDataModule
from lightning_mdc.app.settings import Settings, policy_space, token_options
from lightning_mdc.app.tracking import Tracker
from lightning_mdc.app.trainer import REFUSALS, training_device
from lightning_mdc.artifact import load
from lightning_mdc.budget import Budget, as_budget
from lightning_mdc.budget.uniform import uniform_policy
from lightning_mdc.errors import ConfigError, MdcError
from lightning_mdc.gp_ei.study import observations
from lightning_mdc.importance import Criterion
from lightning_mdc.models import find_anatomy
from lightning_mdc.policy import DIMENSIONS, TOKENS, UNIT_DIMENSIONS, Policy, check_dimensions
from lightning_mdc.policy_search.held_out import HeldOut
from lightning_mdc.policy_search.policy_space import PolicySpace
from lightning_mdc.surgery.compensation import check_compensable
from lightning_mdc.weights import fitted, load_weights

T = TypeVar("T")


def made(group: str, kind: type[T], options: Settings, **more: Any) -> T:
    """What Hydra makes of a group: the object that ``_target_`` names, with the other keys as arguments,
    and `more`, which are not the user's.

    Raises:
        ConfigError: there is no such name, it takes no such argument, or what it makes is not of this kind.
        MdcError: what the object refuses itself.
    """
    try:
        found = instantiate({**options, **more}, _convert_="all")
    except InstantiationException as error:
        wrapped = error
    else:
        if not isinstance(found, kind):
            raise ConfigError(f"{group}._target_={options['_target_']!r} is no {kind.__name__}; derive it from that")
        return found
    # Raised from here, not from within: Hydra's error has this one as its cause.
    target, cause = options["_target_"], wrapped.__cause__
    reason = " ".join(str(cause or wrapped).split())
    if isinstance(cause, ImportError):
        raise ConfigError(f"{group}._target_={target!r} names nothing that can be imported: {reason}") from wrapped
    if cause is None or (isinstance(cause, (TypeError, ValueError)) and not isinstance(cause, MdcError)):
        shown = {key: value for key, value in options.items() if key != "_target_"}
        raise ConfigError(f"{group}={shown!r} is refused by {target}: {reason}; correct that key") from wrapped
    raise cause


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
        check_name("model.name", model["name"])
        cfg = timm.get_pretrained_cfg(model["name"])
        more["data_config"] = {} if cfg is None else cfg.to_dict()
    return made("data", ImageDataModule, data, **more)


def build_model(settings: Settings, data: ImageDataModule, *, weights: bool = True) -> nn.Module:
    """The dense model, sized to the data: a timm model by name, or timm's `VisionTransformer` by its arguments. With
    ``model.args.num_classes=0`` it has no classifier.

    Args:
        weights: load those that ``model.pretrained`` or ``model.checkpoint`` name.

    Raises:
        ConfigError: an unknown name, arguments timm refuses, or a checkpoint that does not fit.
    """
    model = settings["model"]
    size = data.img_size
    classes = 0 if is_backbone(settings) else data.num_classes
    facts = {"img_size": size, "in_chans": data.in_chans, "num_classes": classes}
    args = {key: value for key, value in {**model["args"], **facts}.items() if value is not None}
    if model["name"] is not None:
        check_name("model.name", model["name"])
    elif model["pretrained"]:
        raise ConfigError("model.pretrained=true, but model.name=null: weights belong to a name; give model.name")
    try:
        if model["name"] is None:
            network = VisionTransformer(**args)
        else:
            network = timm.create_model(model["name"], pretrained=model["pretrained"] and weights, **args)
    except REFUSALS as error:
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
        if Path(checkpoint).is_dir():
            what = f"model.checkpoint={checkpoint!r}"
            network.load_state_dict(fitted(network, load(checkpoint).state_dict(), what, ConfigError), strict=False)
        else:
            load_weights(network, checkpoint, "model.checkpoint", ConfigError)
    _note_preprocessing(network, data)
    return network


def is_backbone(settings: Settings) -> bool:
    """Whether the model is asked for without a classifier."""
    return settings["model"]["args"].get("num_classes") == 0


def check_name(argument: str, name: Any) -> None:
    """Refuse what is no model of timm; `argument` is what it was given as.

    Raises:
        ConfigError: with names that are much like it.
    """
    if not isinstance(name, str) or not timm.is_model(name):
        close = difflib.get_close_matches(str(name), timm.list_models("*vit*") + timm.list_models("deit*"), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists them all"
        raise ConfigError(f"{argument}={name!r} is no model of timm; {hint}")


def _note_preprocessing(network: nn.Module, data: ImageDataModule) -> None:
    """A saved model must say how its images were prepared; else whoever loads it assumes ImageNet's mean and std."""
    known = getattr(network, "pretrained_cfg", None) or {}
    used = getattr(data, "data_config", {})
    size = (data.in_chans, data.img_size, data.img_size)
    cfg = {**known, **used, "input_size": size, "num_classes": network.num_classes}
    network.pretrained_cfg = cfg  # type: ignore[assignment]
    if hasattr(network, "default_cfg"):
        network.default_cfg = cfg  # type: ignore[assignment]


# --- what to prune ----------------------------------------------------------------------------------------------------


def build_criterion(settings: Settings) -> Criterion:
    """The criterion of the ``importance`` group.

    Raises:
        ConfigError: the group names something else.
    """
    return made("importance", Criterion, settings["importance"])  # type: ignore[type-abstract]


def build_budget(settings: Settings) -> Budget:
    """``budget``: a fraction of the dense MACs, or limits by name, ``{macs: 1.84e9}``.

    Latency is measured on the Trainer's device, unless the limits say otherwise.

    Raises:
        BudgetError: see `Budget`.
    """
    budget = settings["budget"]
    if not isinstance(budget, Mapping):
        return as_budget(budget)
    limits = Budget(**{str(name): limit for name, limit in budget.items()})
    measures_here = "latency" in limits.limits and not {"table", "device"} & set(limits.options)
    return limits.replaced(device=str(training_device(settings))) if measures_here else limits


def given_policy(settings: Settings, model: nn.Module) -> Policy | None:
    """The policy that the ``policy`` settings give: a file, keep ratios, or the uniform one; None: search for it.

    Raises:
        ConfigError: they give two.
        BudgetError, PolicyError: see `Policy`.
    """
    options = settings["policy"]
    keep = {name: ratios for name, ratios in options["keep"].items() if ratios is not None}
    given = {
        "policy.file": options["file"] is not None,
        "policy.keep": bool(keep),
        "policy.kind=uniform": options["kind"] == "uniform",
    }
    if sum(given.values()) > 1:
        both = " and ".join(key for key, is_given in given.items() if is_given)
        raise ConfigError(f"{both} both give a policy; give one of them")
    if options["file"] is not None:
        policy = Policy.load(options["file"])
        find_anatomy(model).counts(policy)
        return policy
    if keep:
        space = keep_space(settings, model, keep, 1.0)
        Policy(**{name: keep.get(name, 1.0) for name in DIMENSIONS})  # says which ratio is none
        return space.policy(space.snap(space.point(keep_params(keep), anywhere=True)[None])[0])
    if options["kind"] == "searched":
        return None
    return uniform_policy(model, build_budget(settings), **{**search_space(settings), "space": policy_space(settings)})


def keep_space(settings: Settings, model: nn.Module, keep: Mapping[str, Any], budget: float | Budget) -> PolicySpace:
    """All policies that can be written like `keep`: as many ratios per dimension as it gives, dimensions it has.

    Raises:
        SearchError: too many ratios, or an unknown dimension.
    """
    counts = {name: len(ratios) if isinstance(ratios, list) else 1 for name, ratios in keep.items()}
    space = replace(
        policy_space(settings),
        bounds=dict.fromkeys(keep, (0.0, 1.0)),
        groups={name: counts[name] for name in UNIT_DIMENSIONS if name in keep},
        token_ratio="stages" if isinstance(keep.get(TOKENS), list) else "shared",
    )
    return PolicySpace(model, budget, check_dimensions(keep), space, token_options(settings))


def keep_params(keep: Mapping[str, Any]) -> dict[str, Any]:
    """``{"heads": [0.5, 1], "tokens": 0.8}`` by the names of `keep_space`: ``heads.0``, ``heads.1``, ``tokens``."""
    params: dict[str, Any] = {}
    for name, ratios in keep.items():
        if name == TOKENS and not isinstance(ratios, list):
            params[name] = ratios
        else:
            each = ratios if isinstance(ratios, list) else [ratios]
            params |= {f"{name}.{number}": ratio for number, ratio in enumerate(each)}
    return params


def search_space(settings: Settings) -> dict[str, Any]:
    """What of the settings says which policies there are to search: keyword arguments of `PolicySpace`."""
    of_a_search = {name: settings["search"][name] for name in ("bounds", "groups", "token_ratio")}
    return {
        "dimensions": settings["policy"]["dimensions"],
        "space": policy_space(settings, **of_a_search),
        "tokens": token_options(settings),
    }


def check_search(settings: Settings, model: nn.Module) -> None:
    """Refuse what `search` would refuse, before anything is trained.

    Raises:
        ConfigError, SearchError, BudgetError: what is wrong.
    """
    space = PolicySpace(model, build_budget(settings), **search_space(settings))
    observations(settings["search"]["warm_start"], space, "maximize")


def check_compensation(settings: Settings, model: nn.Module, policy: Policy | None) -> None:
    """Refuse to compensate for what cannot be, before anything is trained. `policy`: if one is given.

    Raises:
        UnsupportedModelError: names the module in the way.
    """
    anatomy, wanted = find_anatomy(model), settings["policy"]["dimensions"]
    for units in anatomy.all_units:
        if policy is None:
            pruned = units.dimension in (anatomy.dimensions if wanted is None else wanted)
        else:
            pruned = any(ratio < 1 for ratio in policy.ratios[units.dimension])
        if pruned:
            check_compensable(units, settings["surgery"]["compensate"])


def build_held_out(options: Settings, batches: Iterable[Any], model: nn.Module, device: torch.device) -> HeldOut:
    """What policies are judged on: the first ``images`` of the held-out training images, by ``metric``."""
    images, of_a_pass = options["images"], options["batch_size"]
    return HeldOut(batches, options["metric"], dense=model, batch_size=of_a_pass, device=device, max_images=images)


def build_trackers(settings: Settings) -> dict[str, Tracker]:
    """What the ``logger`` group watches the run with, by key; nothing is opened yet.

    Raises:
        ConfigError: a tracker's package is missing, or it refuses its settings.
    """
    trackers = {}
    for key, options in settings["logger"].items():
        if options is None:  # as logger.csv=null, or logger=none
            continue
        if not isinstance(options, Mapping) or "_target_" not in options:
            raise ConfigError(
                f"logger.{key}={options!r}: expected a logger, such as logger=wandb or logger=[csv,wandb]"
            )
        trackers[key] = made(f"logger.{key}", Tracker, options)  # type: ignore[type-abstract]
    return trackers
