"""Feature maps after a token drop: refused where they cannot work, instead of garbage."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from lightning_mdc.errors import UnsupportedModelError


def guard_intermediates(model: nn.Module) -> None:
    """Make ``model.forward_intermediates`` refuse feature maps, which need every token in its place."""
    if hasattr(type(model), "forward_intermediates"):
        model.forward_intermediates = _GuardedIntermediates(model)  # type: ignore[assignment]


def unguard_intermediates(model: nn.Module) -> None:
    """Undo `guard_intermediates`."""
    model.__dict__.pop("forward_intermediates", None)


class _GuardedIntermediates:
    """Stands in for the method on one instance. An object, not a bound method: pickle and deepcopy keep it right.

    It holds the model weakly. With a cycle, slim models nobody needs any more, a search's, would pile up in memory.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __reduce__(self) -> Any:
        return _GuardedIntermediates, (self._model(),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output_fmt = args[5] if len(args) > 5 else kwargs.get("output_fmt", "NCHW")
        if output_fmt == "NCHW":
            raise UnsupportedModelError(
                "forward_intermediates(output_fmt='NCHW'): tokens leave inside this model, so there is no full feature "
                "map to return; ask for output_fmt='NLC', or prune with tokens=1.0"
            )
        model = self._model()
        method: Any = type(model).forward_intermediates  # type: ignore[union-attr]
        return method(model, *args, **kwargs)
