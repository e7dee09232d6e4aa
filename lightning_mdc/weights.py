"""Weights from a file as people have them, made to fit a model: whatever they lie in, whoever named them.

What timm knows of other forms, positions of another image size or the names of DINO, DeiT and CLIP, is timm's to do,
by the ``checkpoint_filter_fn`` beside its models. What does not fit then is told by its name.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict, load_checkpoint
from torch import Tensor, nn

from lightning_mdc.errors import ArtifactError, MdcError
from lightning_mdc.unpickling import Foreign, read

log = logging.getLogger(__name__)

_Tensors = Mapping[str, Tensor]


def load_weights(
    model: nn.Module,
    path: str | Path,
    name: str = "checkpoint",
    error: type[MdcError] = ArtifactError,
    *,
    new_head: bool = True,
) -> None:
    """Give `model` the weights in the file at `path`: torch's, Lightning's or safetensors; averaged ones where it has
    such. Of a file nothing is unpickled but tensors and plain values; what else it holds is passed over.

    Args:
        name: of the argument that `path` is, for messages.
        error: to raise.
        new_head: whether the head may stay as it is where the file has none, or one of another size; that is logged.

    Raises:
        MdcError: of the kind `error`: the file cannot be read, or does not fit; names what does not.
    """
    what = f"{name}={str(path)!r}"
    if Path(path).suffix.lower() == ".npz":
        _load_arrays(model, path, what, error, new_head)
    else:
        model.load_state_dict(fitted(model, _read(path, what, error), what, error, new_head=new_head), strict=False)


def classes_in(
    path: str | Path, model: nn.Module, name: str = "checkpoint", error: type[MdcError] = ArtifactError
) -> int | None:
    """How many classes the head tells apart that the file at `path` has for `model`; 0 if it has none, None for arrays
    of JAX. Else as `load_weights`.
    """
    what = f"{name}={str(path)!r}"
    if Path(path).suffix.lower() == ".npz":
        return None
    _, found = _found(model, _read(path, what, error), model.state_dict(), what, error)
    return next((len(found[f"{head}weight"]) for head in classifiers_of(model) if f"{head}weight" in found), 0)


def fitted(
    model: nn.Module, tensors: _Tensors, what: str, error: type[MdcError], *, new_head: bool = True
) -> dict[str, Tensor]:
    """`tensors` by the names of `model` and of its shapes: all that it has, but for a head that stays as it is.

    `what` says where they come from, as in ``"checkpoint='dino.pth'"``; else as `load_weights`.
    """
    expected = model.state_dict()
    prefix, found = _found(model, tensors, expected, what, error)
    wrong = [name for name, own in expected.items() if name not in found or found[name].shape != own.shape]
    classifiers = classifiers_of(model)
    # Whole or not at all: a weight without its bias is no head.
    new = tuple(head for head in classifiers if any(name.startswith(head) for name in wrong)) if new_head else ()
    wrong = [name for name in wrong if not name.startswith(new)]
    unknown = [name for name in found if name not in expected]
    absent = tuple(head for head in classifiers if not any(name.startswith(head) for name in expected))
    parts = {child for child, _ in model.named_children()}
    spare = [name for name in unknown if name.startswith(new + absent) or _is_another_part(name, parts)]
    if wrong or len(spare) < len(unknown):
        sizes = [f"{name} {_shape(found[name])} for {_shape(expected[name])}" for name in wrong if name in found]
        missing = [name for name in wrong if name not in found]
        differences = {"lacks": missing, "has other shapes of": sizes, "has unknown": unknown}
        listed = ", ".join(f"{verb} {_listed(names)}" for verb, names in differences.items() if names)
        raise error(
            f"{what} does not fit {type(model).__name__}: it {listed}; build the model that was trained, or give "
            "weights of this one"
        )
    left = [*(name for name in spare if not name.startswith(new)), *_dropped(tensors, prefix, found)]
    of_new = [f"{name} {_shape(tensor)}" for name, tensor in sorted(found.items()) if name.startswith(new)]
    resampled = [
        f"{name} {_shape(tensors[prefix + name])} to {_shape(own)}"
        for name, own in expected.items()
        if not name.startswith(new) and prefix + name in tensors and tensors[prefix + name].shape != own.shape
    ]
    notes = [
        *([f"the head is new, the file has {_listed(of_new) if of_new else 'none'}"] if new else []),
        *([f"resampled {_listed(resampled)}"] if resampled else []),
        *([f"left out {_listed(left)}"] if left else []),
    ]
    if notes:  # what is new answers at random: that must be heard
        log.log(logging.WARNING if new else logging.INFO, "  %s: %s", what, "; ".join(notes))
    return {name: tensor for name, tensor in found.items() if name in expected and not name.startswith(new)}


# --- what is whose ----------------------------------------------------------------------------------------------------


def _found(
    model: nn.Module, tensors: _Tensors, expected: _Tensors, what: str, error: type[MdcError]
) -> tuple[str, _Tensors]:
    """(prefix, what is under it), as timm adapts it to `model`: the prefix under which most of `model` is found."""
    # What has fewer than half of the names is no prefix of this model.
    shared = Counter(prefix for name in tensors for prefix in _prefixes(name))
    candidates = {
        prefix: adapted(model, _under(tensors, prefix), expected)
        for prefix in ("", *(prefix for prefix, count in shared.items() if 2 * count >= len(expected)))
    }
    fitting = {
        prefix: sum(name in found and found[name].shape == own.shape for name, own in expected.items())
        for prefix, found in candidates.items()
    }
    best = max(fitting, key=fitting.__getitem__)  # of equals the first, which is the shortest
    equals = [prefix for prefix, count in fitting.items() if count == fitting[best] and not prefix.startswith(best)]
    if equals:
        raise error(
            f"{what} holds several networks that fit {type(model).__name__} alike, {_listed([best, *equals])}; save "
            "the weights of one of them by themselves"
        )
    return best, candidates[best]


def _prefixes(name: str) -> Iterator[str]:
    """``"model.net.head.weight"`` -> ``"model."``, ``"model.net."``, ``"model.net.head."``"""
    return accumulate(f"{part}." for part in name.split(".")[:-1])


def _under(tensors: _Tensors, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def adapted(model: nn.Module, tensors: dict[str, Tensor], expected: _Tensors) -> _Tensors:
    """`tensors` as timm takes those of other forms for models of this kind; what fits as it is stays as it is."""
    if {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in expected.items()}:
        return tensors
    modules = (sys.modules.get(kind.__module__) for kind in type(model).__mro__)
    adapt: Any = next((found for module in modules if (found := getattr(module, "checkpoint_filter_fn", None))), None)
    if adapt is None:
        return tensors
    # DeiT III's names, which timm adapts for models that were made by that name alone.
    options = {"adapt_layer_scale": True} if "adapt_layer_scale" in inspect.signature(adapt).parameters else {}
    try:
        return adapt(dict(tensors), model, **options)
    except Exception:  # what it cannot adapt, such as positions that are no square, is told with its shape
        return tensors


def classifiers_of(model: nn.Module) -> tuple[str, ...]:
    """What the names of the classifier's tensors begin with; a distilled model has two."""
    ask: Any = getattr(model, "get_classifier", None)
    classifiers = () if ask is None else ask()
    classifiers = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    return tuple(f"{name}." for name, module in model.named_modules() if any(module is head for head in classifiers))


def _is_another_part(name: str, parts: set[str]) -> bool:
    """Whether it belongs to something beside the network: a head of pretraining, a decoder, what stands for a patch
    that is masked. A token, a position or a block too many is not."""
    part, dot, _ = name.partition(".")
    return name == "mask_token" or (bool(dot) and part not in parts)


def _dropped(tensors: _Tensors, prefix: str, found: _Tensors) -> list[str]:
    """Names in the file of what is not in `found`, neither under its name nor under another."""
    kept = {tensor.data_ptr() for tensor in found.values()}
    return [
        name
        for name, tensor in tensors.items()
        if not (name.startswith(prefix) and (name.removeprefix(prefix) in found or tensor.data_ptr() in kept))
    ]


# --- reading ----------------------------------------------------------------------------------------------------------


# Where weights lie in a file that holds more, the averaged ones before the others.
_PLACES = ("state_dict_ema", "model_ema", "state_dict", "model")


def _read(path: str | Path, what: str, error: type[MdcError]) -> dict[str, Tensor]:
    """The tensors in the file, by dotted names where mappings lie in mappings."""
    if not Path(path).is_file():
        raise error(f"{what} is no file; give a file of weights (.safetensors, .pth, .ckpt)")
    try:
        content = load_file(path) if Path(path).suffix == ".safetensors" else read(path)
        if content is not Foreign:
            content = next((content[place] for place in _PLACES if content.get(place) is not None), content)
        tensors = {} if content is Foreign else dict(_tensors(clean_state_dict(content)))
    except Exception as reason:  # a damaged file fails in as many ways as there are formats
        first = next(iter(str(reason).strip().splitlines()), type(reason).__name__)
        raise error(f"{what} cannot be read as weights ({first[:200]}); get a fresh copy") from reason
    if tensors:
        return {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    if foreign := _foreign(path):
        raise error(
            f"{what} holds more than weights, {_listed(foreign)}, in which they lie, and to unpickle that could run "
            f"anything; if you trust it, save its weights by themselves: torch.save(torch.load({str(path)!r}, "
            "weights_only=False).state_dict(), 'weights.pth')"
        )
    raise error(f"{what} holds no tensors; give a file of weights")


def _tensors(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{name}.")


def _foreign(path: str | Path) -> list[str]:
    """What of a file would have to be unpickled, by names that are read without doing it."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # none of torch's files: the error at hand says more
        return []


def _load_arrays(model: nn.Module, path: str | Path, what: str, error: type[MdcError], new_head: bool) -> None:
    """From JAX's arrays (``.npz``), as Google has published ViTs: a format that timm's models read themselves."""
    classifiers = classifiers_of(model)
    before = {name: own.clone() for name, own in model.state_dict().items() if name.startswith(classifiers)}
    try:
        load_checkpoint(model, str(path))
    except Exception as reason:
        raise error(
            f"{what} does not fit {type(model).__name__}: {reason}; build the model that was trained"
        ) from reason
    if before and all(torch.equal(model.state_dict()[name], own) for name, own in before.items()):
        if not new_head:
            raise error(f"{what} has no head that fits {type(model).__name__}; give weights that have")
        log.warning("  %s: the head is new", what)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _listed(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
