"""Compiled modules: seeing through them, and making them see hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

_hooked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_users_setting: bool | None = None  # of torch, while it is ours


def unwrap(module: nn.Module) -> nn.Module:
    """`module` without the wrapper of ``torch.compile(module)``, which keeps the original as its only child."""
    original = module._modules.get("_orig_mod")
    return module if original is None else original


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


def show_hooks(model: nn.Module, *, compiled: bool) -> None:
    """Have compiled code see the hooks just put on `model`, until `hide_hooks`.

    Compiled code does not look at hooks again: what has run before would run on as before, and blocks compiled one by
    one would share the code of whichever ran first. So torch guards code with hooks from here on, and if `compiled`
    (see `is_compiled`) it forgets what it has compiled so far, which it can only do for everybody's code at once.
    """
    global _users_setting
    _hooked.add(model)
    if _users_setting is None:
        _users_setting = torch._dynamo.config.skip_nnmodule_hook_guards
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    if compiled:
        torch.compiler.reset()


def hide_hooks(model: nn.Module) -> None:
    """Undo `show_hooks`, once the hooks on `model` or on a model inside are gone. Guarded code sees that by itself."""
    global _users_setting
    for module in model.modules():
        _hooked.discard(module)
    if not _hooked and _users_setting is not None:
        torch._dynamo.config.skip_nnmodule_hook_guards, _users_setting = _users_setting, None
