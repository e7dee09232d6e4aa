"""Compiled modules: seeing through them, and making them see hooks."""

from __future__ import annotations

import sys

import torch
from torch import nn


def unwrap(module: nn.Module) -> nn.Module:
    """`module` without the wrapper of ``torch.compile(module)``, which keeps the original as its only child."""
    original = module._modules.get("_orig_mod")
    return module if original is None else original


def forget_compiled_code() -> None:
    """Have compiled modules compile again at their next call.

    Compiled code does not look at hooks again (``skip_nnmodule_hook_guards``): with hooks put on or taken off since, it
    would run on as before.
    """
    if "torch._dynamo" in sys.modules:  # else nothing has been compiled, and importing it takes seconds
        torch.compiler.reset()
