"""Which patches of an image are still there, as tokens of their own, after each token stage of a slim model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_mdc.models import evaluating, find_anatomy, probing
from lightning_mdc.tokens.selection import TokenSelection


def surviving_patches(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, survivors) of a slim model: (batch, classes), and bool (batch, stages, patches).

    Patches are in row-major order. One that has gone into a fused token does not count as there, even where that token
    is kept. Stages are those of ``find_anatomy(model).stages``; a dense model has none.

    Args:
        images: (batch, channels, height, width), on the model's device.
    """
    anatomy = find_anatomy(model)
    height, width = anatomy.grid_of((images.shape[-2], images.shape[-1]))
    num_patches = height * width
    tokens = torch.arange(num_patches).expand(len(images), -1)  # which patch each is; -1: a fused one
    survivors: list[Tensor] = []

    def watch(stage: TokenSelection, args: tuple[Any, ...], output: Any) -> None:
        nonlocal tokens
        split = stage.split(*args)
        if split is not None:
            kept = tokens.gather(1, split[0].cpu())
            tokens = torch.cat([kept, kept.new_full((len(kept), stage.reduce.extra), -1)], dim=1)
        there = torch.zeros(len(tokens), num_patches + 1, dtype=torch.bool)
        survivors.append(there.scatter_(1, tokens % (num_patches + 1), True)[:, :-1])  # -1 to the last column

    stages = (module for module in anatomy.model.modules() if isinstance(module, TokenSelection))
    with probing((stage.register_forward_hook, watch) for stage in stages), torch.inference_mode(), evaluating(model):
        logits = model(images)
    empty = torch.empty(len(images), 0, num_patches, dtype=torch.bool)
    return logits, torch.stack(survivors, dim=1) if survivors else empty
