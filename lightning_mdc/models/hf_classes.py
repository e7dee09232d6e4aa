"""transformers' own classes: known by their names without importing it, as JSON and back through closed tables."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

from torch import nn

from lightning_mdc.errors import ArtifactError
from lightning_mdc.models.parts import other_than, unlike_linear
from lightning_mdc.models.swapping import original_class
from lightning_mdc.models.timm_constructor import look_up

# What a configuration says of where it comes from, not of what it describes.
_ORIGIN = ("_name_or_path", "transformers_version", "architectures")
# What would have code fetched.
_REMOTE = {"auto_map", "attn_implementation", "_attn_implementation", "experts_implementation", "quantization_config"}
_ATTENTIONS = ("sdpa", "eager")  # equal to any other but for rounding
_LARGEST = 2**20


def known_class(module: nn.Module, packages: Mapping[str, str]) -> type | None:
    """Of `packages` (name of a class -> its package in ``transformers.models``), the class that `module` is of."""
    for kind in original_class(module).__mro__:
        package = packages.get(kind.__name__)
        if package is not None and kind.__module__ == f"transformers.models.{package}.modeling_{package}":
            return kind
    return None


def computes_as(module: nn.Module, packages: Mapping[str, str]) -> bool:
    """Whether `module` is of one of these classes, and has its forward, none of its own."""
    kind: Any = known_class(module, packages)
    if kind is None or "forward" in vars(module):
        return False
    # The library wraps the forward of each subclass of a layer anew.
    return inspect.unwrap(original_class(module).forward) is inspect.unwrap(kind.forward)  # type: ignore[attr-defined]


def own_forward(module: nn.Module, kind: type) -> str:
    """Why `module`, of that class, does not compute as it."""
    if "forward" in vars(module):
        return other_than("it", module, f"transformers' {kind.__name__}")
    return f"its class overrides forward of transformers' {kind.__name__}"


def altered(name: str, module: nn.Module, packages: Mapping[str, str], linears: Iterable[str] = ()) -> str | None:
    """What is in the way in the part called `name`, if it does not compute as one of these classes does, or one of its
    children with the names `linears` is no Linear layer; None if nothing is."""
    if not computes_as(module, packages):
        return other_than(name, module, "transformers' own with its own forward")
    return unlike_linear(name, module, linears)


def describe(model: Any, packages: Mapping[str, str], **options: Any) -> dict[str, Any]:
    """Class, configuration and constructor's `options` of a model, JSON-ready."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in {*_ORIGIN, *_REMOTE}}
    attention = model.config._attn_implementation
    return {
        "class": known_class(model, packages).__name__,  # type: ignore[union-attr]
        "attention": attention if attention in _ATTENTIONS else _ATTENTIONS[0],
        "options": options,
        "transformers_config": json.loads(json.dumps(config)),
    }


def check_spec(
    spec: Mapping[str, Any], packages: Mapping[str, str], options: Collection[str], tensors: Collection[str]
) -> None:
    """Refuse, with an `ArtifactError`, what `describe` does not write, and another depth than the `tensors` have."""
    config = spec.get("transformers_config")
    if set(spec) != {"class", "attention", "options", "transformers_config"} or not isinstance(config, dict):
        raise ArtifactError("the constructor's fields are not those this version writes")
    look_up(packages, spec["class"], "class")
    look_up(dict.fromkeys(_ATTENTIONS), spec["attention"], "attention")
    given = spec["options"]
    if not isinstance(given, dict) or set(given) - set(options) or not all(type(v) is bool for v in given.values()):
        raise ArtifactError(f"constructor options {given!r:.80}: expected true or false for {', '.join(options)}")
    for name, value in _entries(config):
        if name in _REMOTE:
            raise ArtifactError(f"transformers_config has {name!r}, which this version does not write")
        if type(value) is int and abs(value) > _LARGEST:
            raise ArtifactError(f"transformers_config {name}={value!r} is out of range")
    of_vision = config["vision_config"] if isinstance(config.get("vision_config"), dict) else config
    depth, depths = of_vision.get("num_hidden_layers"), of_vision.get("depths")
    if depths is not None and not (isinstance(depths, list) and all(type(blocks) is int for blocks in depths)):
        raise ArtifactError(f"transformers_config depths={depths!r:.80}: expected whole numbers")
    layers = re.compile(r".*\blayers?\.\d+\." if depths is None else r".*\bblocks\.\d+\.")
    found = len({match[0] for name in tensors if (match := layers.match(name))})
    planned = depth if depths is None else sum(depths)
    if planned != found:
        raise ArtifactError(f"{planned!r} layers do not fit the {found} that there are weights of")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """All names in a nest of JSON, with what they name."""
    pairs = value.items() if isinstance(value, dict) else ((str(i), v) for i, v in enumerate(value))
    for name, inside in pairs:
        yield name, inside
        if isinstance(inside, (dict, list)):
            yield from _entries(inside)


def build(spec: Mapping[str, Any], packages: Mapping[str, str]) -> nn.Module:
    """The dense model that `describe` described.

    Raises:
        ArtifactError: transformers is missing, or too old to have the class.
    """
    package = look_up(packages, spec["class"], "class")
    try:
        kind = getattr(import_module(f"transformers.models.{package}.modeling_{package}"), spec["class"])
    except (ImportError, AttributeError) as error:
        raise ArtifactError(
            f"{spec['class']} is of transformers, of which there is none or one that is too old ({error}); pip install "
            "'lightning-mdc[hf]'"
        ) from error
    config = kind.config_class.from_dict(dict(spec["transformers_config"]))
    model: nn.Module = kind._from_config(config, attn_implementation=spec["attention"], **spec["options"])
    return model
