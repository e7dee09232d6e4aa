"""Another module in the place of one, for good or for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_mdc.models.compiled import unwrap


def put_in_place(holder: nn.Module, model: nn.Module, other: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put `other` wherever `model` (or what it is compiled to) is in `holder`, which may have several names for it.

    Returns what was where: (parent, name, module).
    """
    places = [
        (parent, name, child)
        for parent in holder.modules()
        for name, child in parent._modules.items()
        if child is not None and unwrap(child) is model and unwrap(parent) is parent
    ]
    for parent, name, _ in places:
        setattr(parent, name, other)
    return places


def called_instead(holder: nn.Module, model: nn.Module, other: nn.Module) -> nn.Module:
    """What to call where `other` is in the place of `model`: `holder`, or `other` if that is the model itself, as it is
    or compiled."""
    return other if unwrap(holder) is model else holder


@contextmanager
def standing_in(holder: nn.Module, model: nn.Module, other: nn.Module) -> Iterator[nn.Module]:
    """Inside, `other` is in the place of `model`.

    Yields what is `called_instead`.
    """
    called = called_instead(holder, model, other)
    places = [] if called is other else put_in_place(holder, model, other)
    try:
        yield called
    finally:
        for parent, name, before in places:
            setattr(parent, name, before)
