"""Whether masks are on a model. Who would take a masked model for the dense one asks here first."""

from __future__ import annotations

from torch import nn

from lightning_mdc.errors import MdcError


class MaskHook:
    """Base of the hooks that mask. Plain objects, no bound methods: a deepcopy of the model copies them and nothing
    else."""


def is_masked(model: nn.Module) -> bool:
    """Whether any mask is on `model` or a part of it."""
    return any(
        isinstance(hook, MaskHook)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    )


def check_unmasked(model: nn.Module, error: type[MdcError], consequence: str, remedy: str) -> None:
    """Refuse a model that has masks on.

    Args:
        error: to raise.
        consequence: what would go wrong, for the message.
        remedy: what to do instead, for the message.

    Raises:
        MdcError: of the kind `error`.
    """
    if is_masked(model):
        raise error(f"model={type(model).__name__} has masks on: {consequence}; {remedy}")
