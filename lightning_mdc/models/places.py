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


@contextmanager
def standing_in(holder: nn.Module, model: nn.Module, other: nn.Module) -> Iterator[nn.Module]:
    """Inside, `other` is in the place of `model`.

    Yields what is to be called: `holder`, or `other` where `holder` is the model itself.
    """
    if holder is model:
        yield other
        return
    places = put_in_place(holder, model, other)
    try:
        yield holder
    finally:
        for parent, name, before in places:
            setattr(parent, name, before)
