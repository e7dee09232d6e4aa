"""Feature maps after a token drop: refused where they cannot work, instead of garbage."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from lightning_mdc.errors import UnsupportedModelError


def guard_intermediates(model: nn.Module) -> None:
    """Make ``model.forward_intermediates`` refuse feature maps, which need every token in its place."""
    if hasattr(type(model), "forward_intermediates"):
        # A method bound to this very instance: deepcopy and pickle carry it along correctly.
        model.forward_intermediates = MethodType(_forward_intermediates, model)  # type: ignore[assignment]


def unguard_intermediates(model: nn.Module) -> None:
    """Undo `guard_intermediates`."""
    model.__dict__.pop("forward_intermediates", None)


def _forward_intermediates(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    output_fmt = args[5] if len(args) > 5 else kwargs.get("output_fmt", "NCHW")
    if output_fmt == "NCHW":
        raise UnsupportedModelError(
            "forward_intermediates(output_fmt='NCHW'): tokens leave inside this model, so there is no full feature map "
            "to return; ask for output_fmt='NLC', or prune with tokens=1.0"
        )
    return type(self).forward_intermediates(self, *args, **kwargs)  # type: ignore[operator]
