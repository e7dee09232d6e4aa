"""Our behaviour in a library's modules, for masks and slim models alike: a module's class changes, the module stays.

The class is a subclass of the module's own, of the same name. So who holds the module, its parameters, hooks, mode and
state_dict keys notice nothing, deepcopy and pickle work, and compiled code, which is guarded by the class, is compiled
again by itself. While a module is masked,

- a tensor that units own is read as that of the kept units: ``module.weight`` selects their entries, whenever it is
  asked for, from the parameter, which stays where it is (as `torch.nn.utils.parametrize` does it, but for its keys);
- a size that follows from the number of units is that of the slim model.

A masked model thus computes, and differentiates, exactly what the slim one does: what is masked takes no part, be it
infinite.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_mdc.errors import MdcError, UnsupportedModelError
from lightning_mdc.models.anatomy import Behaviour, Units
from lightning_mdc.models.compiled import unwrap

log = logging.getLogger(__name__)

_ENTRIES, _SIZES, _ATTRIBUTES, _UNDER = "_mdc_entries", "_mdc_sizes", "_mdc_attributes", "_mdc_under"


class _Recipe(NamedTuple):
    """What a class of ours is made of: a library's, with mixins before it, tensors and sizes that it stands in for."""

    original: type
    mixins: tuple[type, ...] = ()
    tensors: frozenset[str] = frozenset()
    sizes: frozenset[str] = frozenset()


class Swapped:
    """Base of all classes made here."""

    _mdc_recipe: _Recipe

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class made at run time cannot be found by name; what it is made of can.
        state: dict[str, Any] = {**super().__getstate__()}  # type: ignore[dict-item]
        if _UNDER in state:
            state[_UNDER] = _recipe(state[_UNDER])
        return _blank, tuple(self._mdc_recipe), state

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if _UNDER in state:
            vars(self)[_UNDER] = _class(_Recipe(*state[_UNDER]))


def original_class(module: nn.Module) -> type:
    """The library's class of a module, whatever is swapped."""
    return _recipe(type(module)).original


def with_mixins(module: nn.Module, *mixins: type) -> None:
    """Put `mixins` before the class of `module`, for good."""
    recipe = _recipe(type(module))
    module.__class__ = _class(recipe._replace(mixins=(*mixins, *recipe.mixins)))


# --- masks ------------------------------------------------------------------------------------------------------------


def is_masked(model: nn.Module) -> bool:
    """Whether any mask is on `model` or a part of it."""
    return any(_UNDER in vars(module) for module in model.modules())


def check_unmasked(model: nn.Module, error: type[MdcError], consequence: str, remedy: str) -> None:
    """Refuse a model that has masks on, with an `error` that names what would go wrong and what to do instead."""
    if is_masked(model):
        raise error(f"model={type(model).__name__} has masks on: {consequence}; {remedy}")


def mask_units(chosen: Iterable[tuple[Units, tuple[int, ...]]]) -> None:
    """Have modules compute with the kept ones of their units, given with their indices, until `unmask`."""
    for units, kept in chosen:
        for part in units.slices:
            entries = units.left(part, kept, part.tensor.shape[part.dim]).to(part.tensor.device)
            _mask(part.module, entries={part.name: (part.dim, entries)})
        for size in units.sizes:
            _mask(size.module, sizes={size.name: size.of(len(kept))})
        for behaviour in units.behaviours:
            _mask(behaviour.module, _missing(behaviour), sizes=behaviour.attributes(kept))


def mask_with_mixins(module: nn.Module, mixins: Iterable[type], **attributes: Any) -> None:
    """Put `mixins` before the class of `module`, with `attributes` that no one else sees, until `unmask`."""
    _mask(module, mixins=tuple(mixins))
    vars(module).update(attributes)
    vars(module)[_ATTRIBUTES] = tuple(attributes)


def _mask(
    module: nn.Module,
    mixins: tuple[type, ...] = (),
    entries: Mapping[str, tuple[int, Tensor]] | None = None,
    sizes: Mapping[str, Any] | None = None,
) -> None:
    own = vars(module)
    own.setdefault(_UNDER, type(module))
    for name, entry in (entries or {}).items():
        known = own.setdefault(_ENTRIES, {})
        known[name] = (*known.get(name, ()), entry)
    own.setdefault(_SIZES, {}).update(sizes or {})
    recipe = _recipe(type(module))
    module.__class__ = _class(
        recipe._replace(
            mixins=(*mixins, *recipe.mixins),
            tensors=frozenset(own.get(_ENTRIES, ())),
            sizes=frozenset(own[_SIZES]),
        )
    )


def unmask(model: nn.Module) -> None:
    """Take all masks off `model` and its parts."""
    for module in model.modules():
        own = vars(module)
        if _UNDER in own:
            module.__class__ = own.pop(_UNDER)
            for name in (_ENTRIES, _SIZES, *own.pop(_ATTRIBUTES, ())):
                own.pop(name, None)


def plain_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy with nothing of it compiled or masked; `memo`, by ``id`` what is in it instead of a copy."""
    memo = {**not_copied(model), **(memo or {})}
    try:
        copied = copy.deepcopy(model, dict(memo))
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise UnsupportedModelError(f"{original_class(model).__name__}: {_uncopied(model, memo)} ({error})") from error
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if unwrap(child) is not child:  # a block compiled by itself
                setattr(parent, name, unwrap(child))
    unmask(copied)
    for name, module in copied.named_modules():
        own = vars(module).get("forward")
        if own is not None and getattr(own, "__self__", None) is not module:
            log.warning(
                "%s: its forward was replaced on the instance, and in a copy still computes with the weights of the "
                "original; take it off (del module.forward), and use a hook",
                name or original_class(copied).__name__,
            )
    return copied


def not_copied(model: nn.Module) -> dict[int, Any]:
    """By ``id``, what a copy of `model` shares with it: what hooks write to, which its owner reads, and the values of
    what a forward pass left in its modules, without how they came to be."""
    parts = {id(module) for module in model.modules()}
    shared: dict[int, Any] = {}
    for module in model.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        for hook in (hook for of_kind in hooks for hook in of_kind.values()):
            function = hook.func if isinstance(hook, partial) else hook
            owner = getattr(function, "__self__", function)
            if id(owner) not in parts:  # its own hooks are those of the copy
                shared[id(owner)] = owner
                shared[id(hook)] = hook
        for value in [*vars(module).values(), *module._buffers.values()]:
            for left in (
                value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else [value]
            ):
                if isinstance(left, Tensor) and not left.is_leaf:
                    shared[id(left)] = left.detach()
    return shared


def _uncopied(model: nn.Module, memo: Mapping[int, Any]) -> str:
    """The attribute of a module in `model` that cannot be copied, in words."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            try:
                copy.deepcopy(value, dict(memo)) if attribute != "_modules" else None
            except Exception:
                at = f"{name}.{attribute}" if name else attribute
                return f"its {at} cannot be copied; take it off the model before pruning"
    return "it cannot be copied"


@contextmanager
def unmasked_classes(model: nn.Module) -> Iterator[None]:
    """Inside, modules are of the classes they have without masks, so that their sizes are those of the dense model."""
    masked = [(module, type(module)) for module in model.modules() if _UNDER in vars(module)]
    for module, _ in masked:
        module.__class__ = vars(module)[_UNDER]
    try:
        yield
    finally:
        for module, masked_class in masked:
            module.__class__ = masked_class


# --- company ----------------------------------------------------------------------------------------------------------


class _Watched:
    """Mixin that changes nothing but the class."""


def seen_by_compilers(modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Inside, compiled code sees hooks that are put on `modules`; after it, what was compiled before runs again.

    Compiled code does not look at hooks again, but at classes it does.
    """
    return _meanwhile([(module, (_Watched,)) for module in modules])


def calling_readers(units: Iterable[Units]) -> AbstractContextManager[None]:
    """Inside, the readers of `units` are called, and hooks on them too, also where a library does without."""
    behaviours = (behaviour for each in units for behaviour in each.behaviours if behaviour.calls_reader)
    return _meanwhile([(behaviour.module, _missing(behaviour)) for behaviour in behaviours])


@contextmanager
def _meanwhile(mixins: Sequence[tuple[nn.Module, tuple[type, ...]]]) -> Iterator[None]:
    before = [(module, type(module)) for module, _ in mixins]
    for module, of_module in mixins:
        with_mixins(module, *of_module)
    try:
        yield
    finally:
        for module, kind in before:
            module.__class__ = kind


# --- slim -------------------------------------------------------------------------------------------------------------


def cut_units(units: Units, kept: tuple[int, ...]) -> None:
    """Leave the `kept` units only, in place."""
    if len(kept) == units.count:
        return
    for part in units.slices:
        old = part.tensor
        new = old.detach().index_select(part.dim, units.left(part, kept, old.shape[part.dim]).to(old.device))
        if part.name in part.module._parameters:
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(part.module, part.name, new)
    for size in units.sizes:
        setattr(size.module, size.name, size.of(len(kept)))
    for behaviour in units.behaviours:
        with_mixins(behaviour.module, *_missing(behaviour))
        vars(behaviour.module).update(behaviour.attributes(kept))


def _missing(behaviour: Behaviour) -> tuple[type, ...]:
    """The mixin, unless the module has it already: a slim model can be cut again."""
    return () if isinstance(behaviour.module, behaviour.mixin) else (behaviour.mixin,)


# --- classes ----------------------------------------------------------------------------------------------------------


def _recipe(kind: type) -> _Recipe:
    return kind._mdc_recipe if issubclass(kind, Swapped) else _Recipe(kind)


@cache
def _class(recipe: _Recipe) -> type:
    original, mixins, tensors, sizes = recipe
    if not (mixins or tensors or sizes):
        return original
    namespace: dict[str, Any] = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    namespace |= {"_mdc_recipe": recipe, "__doc__": original.__doc__}
    namespace |= {name: _kept_entries(name) for name in tensors} | {name: _kept_size(name) for name in sizes}
    return type(original.__name__, (Swapped, *mixins, original), namespace)


def _blank(*recipe: Any) -> Any:
    return object.__new__(_class(_Recipe(*recipe)))


def _kept_entries(name: str) -> property:
    def get(self: nn.Module) -> Tensor | None:
        # In its own dictionary a replica of DataParallel has it.
        places = (self._parameters, self._buffers, vars(self))
        tensor: Tensor | None = next((place[name] for place in places if place.get(name) is not None), None)
        if tensor is None:
            return None
        for dim, entries in vars(self)[_ENTRIES][name]:
            tensor = tensor.index_select(dim, entries.to(tensor.device))
        return tensor

    return property(get, _setter(name))


def _kept_size(name: str) -> property:
    def get(self: nn.Module) -> Any:
        return vars(self)[_SIZES][name]

    return property(get, _setter(name))


def _setter(name: str) -> Callable[[nn.Module, Any], None]:
    def set_own(self: nn.Module, value: Any) -> None:
        vars(self)[name] = value  # what is set while a mask is on is there when it is off

    return set_own
