"""Compiled modules: seeing through them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


def unwrap(module: nn.Module) -> nn.Module:
    """`module` without the wrapper of ``torch.compile(module)``, which keeps the original as its only child."""
    original = getattr(module, "_orig_mod", None)  # TorchScript's modules have no dictionary to ask
    return original if isinstance(original, nn.Module) else module


def is_compiled(module: nn.Module) -> bool:
    """Whether `module` or a part of it runs compiled: in place, in a wrapper, or by Lightning.

    A function compiled around it, or a wrapper that holds `module`, leaves nothing in `module` that could be seen.
    """
    return any(
        unwrap(part) is not part
        or part._compiled_call_impl is not None
        or getattr(part, "_compiler_ctx", None) is not None  # Lightning's, of a whole LightningModule
        for part in module.modules()
    )


@contextmanager
def probing(probes: Iterable[tuple[Callable[[Any], Any], Callable[..., Any]]]) -> Iterator[None]:
    """Inside, hooks are on, each given as (how it is registered, the hook); compiled code, which would not see them,
    runs as it was written meanwhile."""
    with torch.compiler.set_stance("force_eager"), ExitStack() as stack:
        for register, hook in probes:
            stack.callback(register(hook).remove)
        yield
