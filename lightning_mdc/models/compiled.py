"""Compiled modules: seeing through them, and making them see hooks."""

from __future__ import annotations

import sys
import weakref

import torch
from torch import nn

_hooked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def unwrap(module: nn.Module) -> nn.Module:
    """`module` without the wrapper of ``torch.compile(module)``, which keeps the original as its only child."""
    original = module._modules.get("_orig_mod")
    return module if original is None else original


def show_hooks(model: nn.Module) -> None:
    """Have compiled code see the hooks just put on `model`, until `hide_hooks`.

    Compiled code does not look at hooks again: what was compiled before would run on as before, and blocks compiled one
    by one would share the code of whichever was compiled first. So it is compiled again, with hooks guarded.
    """
    _hooked.add(model)
    _compile_again()


def hide_hooks(model: nn.Module) -> None:
    """Have compiled code see that the hooks on `model`, or on a model inside, are gone."""
    for module in model.modules():
        _hooked.discard(module)
    _compile_again()


def _compile_again() -> None:
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and importing it takes seconds
        return
    torch._dynamo.config.skip_nnmodule_hook_guards = not _hooked  # True is torch's default
    torch.compiler.reset()
