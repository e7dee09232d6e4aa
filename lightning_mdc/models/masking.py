"""Whether masks are on a model. Who would take a masked model for the dense one asks here first."""

from __future__ import annotations

from torch import nn

from lightning_mdc.errors import MdcError


class MaskHook:
    """Base of the hooks that mask. They hold nothing of the model: a deepcopy of it copies them and nothing else."""


def is_masked(model: nn.Module) -> bool:
    """Whether any mask is on `model` or a part of it."""
    return any(
        isinstance(hook, MaskHook)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    )


def check_unmasked(model: nn.Module, error: type[MdcError], consequence: str, remedy: str) -> None:
    """Refuse a model that has masks on, with an `error` that names what would go wrong and what to do instead."""
    if is_masked(model):
        raise error(f"model={type(model).__name__} has masks on: {consequence}; {remedy}")
