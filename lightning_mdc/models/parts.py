"""Is a part of a model as its library made it? If not, what is in the way, and what can be done about it.

Adapters, parametrisations, quantised or compiled layers and forwards put on an instance are told here for all families;
what tensors of units are, once there are units, by `obstacles`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_mdc.models.anatomy import Anatomy, Block, Slice, Units
from lightning_mdc.models.compiled import unwrap
from lightning_mdc.models.swapping import original_class


def qualified_name(module: nn.Module) -> str:
    """Module and class name, for messages."""
    return f"{original_class(module).__module__}.{original_class(module).__qualname__}"


def computes_as(module: nn.Module, kinds: tuple[type, ...], methods: tuple[str, ...] = ("forward",)) -> bool:
    """Whether the module is of one of `kinds` and has its `methods`, none of its own."""
    return any(
        isinstance(module, kind)
        and all(getattr(original_class(module), name, None) is getattr(kind, name, None) for name in methods)
        for kind in kinds
    ) and not set(methods) & set(vars(module))


def own_methods(module: nn.Module, kinds: tuple[type, ...], methods: Iterable[str]) -> str | None:
    """Which of `methods` the module has of its own, in words; None if it has those of one of `kinds`."""
    own = [name for name in methods if not computes_as(module, kinds, (name,))]
    put = [name for name in own if name in vars(module)]
    if put:
        return f"{put[0]} was {_PUT.format(name=put[0])}"
    return f"its class overrides {', '.join(own)} of {_library(kinds[0])} {kinds[0].__name__}" if own else None


_PUT = "replaced on the instance, which surgery cannot follow; take it off again (del module.{name}), and use a hook"
_LIBRARIES = {"timm": "timm's", "torchvision": "torchvision's", "transformers": "transformers'"}


def _library(kind: type) -> str:
    return _LIBRARIES.get(kind.__module__.partition(".")[0], f"{kind.__module__.partition('.')[0]}'s")


def altered(name: str, module: nn.Module, kinds: tuple[type, ...], linears: Iterable[str] = ()) -> str | None:
    """What is in the way in the part called `name`, if it is not as one of `kinds` is, or one of its children with the
    names `linears` is no Linear layer; None if nothing is."""
    if not computes_as(module, kinds):
        by_library: dict[str, list[str]] = defaultdict(list)
        for kind in kinds:
            by_library[_library(kind)].append(kind.__name__)
        known = (f"{library} {' or '.join(names)}" for library, names in by_library.items())
        return other_than(name, module, f"{' or '.join(known)} with its own forward")
    return unlike_linear(name, module, linears)


def unlike_linear(name: str, module: nn.Module, linears: Iterable[str]) -> str | None:
    """What is in the way in the first of the children `linears` of the module called `name` that is no Linear layer."""
    for child in linears:
        layer = module._modules.get(child)
        if layer is not None and not computes_as(layer, (nn.Linear,)):
            return other_than(f"{name}.{child}", layer, "an nn.Linear with its own forward")
    return None


_ADAPTER = ("base_layer", "lora_A", "lora_B", "lora_a", "lora_b", "lora_down", "lora_up")
_QUANTISED = ("quant", "torchao", "bitsandbytes", "8bit", "4bit", "int8", "int4", "fp8")


def other_than(name: str, module: nn.Module, expected: str) -> str:
    """What the part called `name` is, which is not what is `expected`, and what can be done about it."""
    kind, parts = qualified_name(module), {*module._modules, *module._parameters, *vars(module)}
    if unwrap(module) is not module:
        return f"{name} is compiled by itself; put the original (its _orig_mod) back, and compile blocks or the model"
    if "_hf_hook" in parts:
        return f"{name} has a hook of accelerate around it; accelerate.hooks.remove_hook_from_submodules(model) first"
    if "forward" in vars(module):
        return f"{name}.forward was {_PUT.format(name='forward')}"
    if parts & set(_ADAPTER) or "lora" in kind.lower():
        return (
            f"{name} is a {kind}, an adapter around a Linear layer; merge it into the layer (of peft: "
            "model.merge_and_unload()), prune, and adapt the slim model"
        )
    if any(word in kind.lower() for word in _QUANTISED):
        return f"{name} is a {kind}, a quantised layer; prune the model before that, then quantise the slim one"
    inside = [child for child, part in module._modules.items() if isinstance(part, nn.Linear)]
    hint = f"; if it does nothing but that, put its {inside[0]} in its place" if len(inside) == 1 else ""
    return f"{name} is a {kind}, not {expected}{hint}"


# --- the tensors of units ---------------------------------------------------------------------------------------------


def obstacles(anatomy: Anatomy) -> Anatomy:
    """`anatomy` without those units whose tensors cannot be cut, and why: they are computed by something else or are
    of a foreign kind, or are other units' as well. Where one block is in two places, tokens cannot leave."""
    owners: dict[int, list[Units]] = defaultdict(list)
    for units in anatomy.all_units:
        for part in _touched(units):
            owners[id(_own(part))].append(units)
    name_of = _names(anatomy.model)
    blocks = tuple(_without(block, partial(_obstacle, owners, name_of)) for block in anatomy.blocks)
    found = replace(anatomy, blocks=blocks)
    modules: dict[int, str] = {}
    for block in anatomy.blocks:
        first = modules.setdefault(id(block.module), block.name)
        if first != block.name and anatomy.no_tokens is None:
            return replace(found, no_tokens=f"{block.name} and {first} are one module; {_APART}")
    return found


_APART = "what leaves one would leave the other; give each a copy of its own (copy.deepcopy) to prune it"


def _touched(units: Units) -> Iterator[Slice]:
    """What surgery changes: what is cut, and the bias of the reader, which makes up for what left."""
    yield from units.slices
    if units.reader.bias is not None:
        yield Slice(units.reader, "bias")


def _own(part: Slice) -> Tensor | None:
    """The parameter or buffer; None if its module has none of that name, but makes it."""
    return part.module._parameters.get(part.name, part.module._buffers.get(part.name))


def _names(model: nn.Module) -> Callable[[nn.Module], str]:
    return lambda module: next((name for name, part in model.named_modules() if part is module), "")


def _without(block: Block, obstacle: Callable[[Units], str | None]) -> Block:
    reasons = {dimension: reason for dimension, units in block.units.items() if (reason := obstacle(units))}
    if not reasons:
        return block
    rest: list[Any] = list(block.rest)
    for dimension in reasons:  # no units stand for what it costs any more
        units = block.units[dimension]
        rest[units.after_point] = partial(_with, rest[units.after_point], units)
    kept = {dimension: units for dimension, units in block.units.items() if dimension not in reasons}
    return replace(block, units=kept, reasons={**block.reasons, **reasons}, rest=(rest[0], rest[1]))


def _with(rest: Callable[[Any], Any] | None, units: Units, tokens: Any) -> Any:
    """MACs of all `units`, and of the `rest` of their half."""
    return units.macs(units.count, tokens) + (0 if rest is None else rest(tokens))


def _obstacle(owners: Mapping[int, list[Units]], name_of: Callable[[nn.Module], str], units: Units) -> str | None:
    for part in _touched(units):
        tensor = _own(part)
        if tensor is None:
            return _computed(f"{name_of(part.module)}.{part.name}", part)
        if type(tensor).__module__.partition(".")[0] != "torch" or tensor.is_quantized:
            return (
                f"{name_of(part.module)}.{part.name} is a {type(tensor).__module__}.{type(tensor).__qualname__}, no "
                "plain tensor; if it is quantised, prune the model before, then quantise the slim one"
            )
        others = [other for other in owners[id(tensor)] if other.block != units.block]  # one block's may be meant
        if others:
            return f"{name_of(part.module)}.{part.name} is of {units.name} and of {others[0].name}; {_APART}"
    return None


def _computed(name: str, part: Slice) -> str:
    """Why a tensor is no parameter of its module, and how it becomes one again."""
    if is_parametrized(part.module, part.name):
        stack: Any = part.module.parametrizations
        kinds = ", ".join(type(each).__name__.lstrip("_") for each in stack[part.name])
        undo = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {part.name!r})"
        return f"{name} has a parametrization ({kinds}); {undo} keeps its value; put it on the slim model again"
    undos = {
        "WeightNorm": f"torch.nn.utils.remove_weight_norm(layer, {part.name!r})",
        "SpectralNorm": f"torch.nn.utils.remove_spectral_norm(layer, {part.name!r})",
    }
    for hook in part.module._forward_pre_hooks.values():
        kind = type(hook)
        if getattr(hook, "_tensor_name", getattr(hook, "name", None)) == part.name:
            undo = undos.get(kind.__name__, f"torch.nn.utils.prune.remove(layer, {part.name!r})")
            return f"{name} is made by a {kind.__name__} before each call; {undo} keeps its value"
    return f"{name} is computed, not a parameter of its layer; make it one"


def uninitialised(model: nn.Module) -> str | None:
    """The first parameter or buffer of a lazy module that has no shape yet; None if there is none."""
    tensors: Iterable[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    return next((name for name, tensor in tensors if is_lazy(tensor)), None)


def unloaded(model: nn.Module) -> str | None:
    """The first parameter or buffer that has a shape and no values, on the meta device; None if there is none."""
    tensors: Iterable[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    return next((name for name, tensor in tensors if tensor.device == torch.device("meta")), None)
