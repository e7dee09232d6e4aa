"""A timm model as what `timm.create_model` made it of, and back: a name of timm's registry and plain arguments.

For models whose parts do not tell all of their constructor's arguments. That it is the same model again is for the
caller to compare.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import timm
from timm.models import is_model, is_model_pretrained, model_entrypoint
from torch import nn

from lightning_mdc.errors import ArtifactError
from lightning_mdc.models.timm_constructor import as_tuple, parts_of
from lightning_mdc.models.timm_hub import RECIPE

_FIELDS = {"name", "input_size", "args"}
_PLACES = {"device", "dtype"}  # of a constructor's arguments those that say nothing of the model
_DEPTHS = {"depth", "depths", "layers", "num_levels"}
_LARGEST = 65536


def describe(model: Any, kinds: Sequence[type[nn.Module]]) -> dict[str, Any]:
    """Of a model of one of these `kinds`: its name in timm's registry, the size of its images, arguments; JSON-ready.

    Raises:
        ArtifactError: timm's `create_model` did not make it, or from something that is no JSON; names it.
    """
    config, given = getattr(model, "pretrained_cfg", None) or {}, getattr(model, "_model_args", {})
    made = (
        given.get("constructor") if set(given) == set(RECIPE) else None
    )  # a slim one, or one that was saved and loaded
    name = (config.get("architecture") if made is None else made["name"]) or ""
    if made is None and not is_model(name):
        raise ArtifactError("it has no name in timm's registry; those that timm.create_model made have")
    with_tag = f"{name}.{config.get('tag')}"
    if made is None and is_model_pretrained(with_tag):  # some read numbers off what they were trained as
        name = with_tag
    known = _arguments(kinds)
    args = dict(given if made is None else made["args"])  # newer timm keeps them
    for current in ("num_classes", "in_chans", "global_pool"):
        value = getattr(model, current, None)
        if isinstance(value, int | str) and current in _arguments([type(model)]):
            args[current] = value  # as it may have been changed since
    for argument, value in args.items():
        if argument not in known:
            raise ArtifactError(
                f"timm.create_model was given {argument}={value!r:.80}, which is no argument of its class"
            )
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"timm.create_model was given {argument}={value!r:.80}, which is no JSON") from error
    size = config["input_size"] if made is None else made["input_size"]
    return {"name": name, "input_size": list(size), "args": args}


def check_spec(
    spec: Mapping[str, Any], kinds: Sequence[type[nn.Module]], tensors: Collection[str] | None = None
) -> None:
    """Whether `build` may make a model of one of these `kinds`; with `tensors`, the names in its state, whether it has
    no more blocks than these.

    Raises:
        ArtifactError: it may not; names the field.
    """
    name, args, size = (spec.get(field) for field in ("name", "args", "input_size"))
    if set(spec) != _FIELDS or not isinstance(args, dict) or not isinstance(size, list):
        raise ArtifactError("the constructor's fields are not those this version writes")
    modules = {kind.__module__ for kind in kinds}
    if not isinstance(name, str) or not is_model(name) or model_entrypoint(name).__module__ not in modules:
        raise ArtifactError(f"constructor field name={name!r:.80} is no model of timm's that this family knows")
    if len(size) != 3 or not all(type(side) is int and 0 < side <= _LARGEST for side in size):
        raise ArtifactError(f"constructor field input_size={size!r:.80}: expected channels, height and width")
    known = _arguments(kinds)
    for argument, value in args.items():
        if argument not in known:
            raise ArtifactError(f"constructor argument {argument!r:.80} is unknown")
        parts = parts_of(value)
        if len(parts) > 1024 or not all(_is_plain(part) for part in parts):
            raise ArtifactError(f"constructor argument {argument}={value!r:.80} is out of range")
        if argument.endswith("_rate") and not all(0 <= part < 1 for part in parts):
            raise ArtifactError(f"constructor argument {argument}={value!r:.80} is no rate in [0, 1)")
        if argument in _DEPTHS and tensors is not None and sum(parts) > len(tensors):
            raise ArtifactError(f"{argument}={value!r:.80} does not fit the {len(tensors)} tensors that there are")


def build(spec: Mapping[str, Any], kinds: Sequence[type[nn.Module]]) -> nn.Module:
    """The model that `describe` described, with fresh weights; else as `check_spec`."""
    check_spec(spec, kinds)
    args = {argument: as_tuple(value) for argument, value in spec["args"].items()}
    overlay = {"input_size": tuple(spec["input_size"])}
    return timm.create_model(spec["name"], pretrained=False, pretrained_cfg_overlay=overlay, **args)


def _arguments(kinds: Sequence[type[nn.Module]]) -> set[str]:
    return {name for kind in kinds for name in inspect.signature(kind).parameters} - _PLACES


def _is_plain(value: Any) -> bool:
    """Numbers that are sizes and rates, yes or no, a word."""
    if isinstance(value, str):
        return len(value) < 64
    return value is None or isinstance(value, bool) or (isinstance(value, int | float) and 0 <= value <= _LARGEST)
