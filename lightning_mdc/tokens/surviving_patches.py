"""Which patches of an image are still there, as tokens of their own, after each token stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mdc.errors import CalibrationError
from lightning_mdc.models import Anatomy, evaluating, find_anatomy, probing
from lightning_mdc.tokens.block import StagedBlock
from lightning_mdc.tokens.selection import TokenSelection


def surviving_patches(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, survivors) of a slim model: (batch, classes), and (batch, stages, patches) as of `watched_patches`.

    Args:
        images: (batch, channels, height, width), on the model's device.
    """
    with evaluating(model):
        logits, _, survivors = watched_patches(model, lambda: model(images))
    return logits, survivors


def watched_patches(model: nn.Module, run: Callable[[], Any]) -> tuple[Any, Tensor, Tensor]:
    """(what `run` returned, images, survivors) of a call of a vision transformer that is slim or has masks on.

    Images are those that reach the transformer, (batch, channels, height, width), whatever has been done to them
    before; where it is called several times, those of the first call. Survivors are bool, (batch, stages, patches),
    patches in row-major order. One that has gone into a fused token does not count as there, even where that token is
    kept. A dense model has no stages.

    Args:
        run: calls the model, or a module that holds it. Gradients are off.

    Raises:
        CalibrationError: it has not called it on images.
    """
    anatomy = find_anatomy(model)
    stages = list(_stages(anatomy.model))
    seen: list[Tensor] = []
    tokens = torch.empty(0, dtype=torch.long)  # which patch each is; -1: a fused one
    survivors: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not seen and args and isinstance(args[0], Tensor) and args[0].ndim == 4:
            seen.append(args[0])

    def watch(stage: TokenSelection, args: tuple[Any, ...], output: Any) -> None:
        nonlocal tokens
        if not seen or len(survivors) == len(stages):
            return
        num_patches = _num_patches(anatomy, seen[0])
        if not survivors:
            tokens = torch.arange(num_patches).expand(len(seen[0]), -1)
        split = stage.split(*args)
        if split is not None:
            kept = tokens.gather(1, split[0].cpu())
            tokens = torch.cat([kept, kept.new_full((len(kept), stage.reduce.extra), -1)], dim=1)
        there = torch.zeros(len(tokens), num_patches + 1, dtype=torch.bool)
        survivors.append(there.scatter_(1, tokens % (num_patches + 1), True)[:, :-1])  # -1 to the last column

    # Who calls a part of the transformer, such as forward_features, does not call the transformer itself.
    looks = ((part.register_forward_pre_hook, look) for part in anatomy.model.modules())
    watches = ((stage.register_forward_hook, watch) for stage in stages)
    with probing([*looks, *watches]), torch.no_grad():
        result = run()
    if not seen:
        raise CalibrationError(f"{anatomy.name} was not called on images, so there are none to show its tokens on")
    nothing = torch.empty(len(seen[0]), 0, _num_patches(anatomy, seen[0]), dtype=torch.bool)
    return result, seen[0], torch.stack(survivors, dim=1) if survivors else nothing


def _stages(model: nn.Module) -> Iterator[TokenSelection]:
    """The token stages that run now, in order: of a slim model, or of masks."""
    for module in model.modules():
        if isinstance(module, StagedBlock) and module.role.select is not None:
            yield module.role.select


def _num_patches(anatomy: Anatomy, images: Tensor) -> int:
    height, width = anatomy.grid_of((images.shape[-2], images.shape[-1]))
    return height * width
