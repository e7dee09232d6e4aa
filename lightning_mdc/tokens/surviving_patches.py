"""Which patches of an image are still there, as tokens of their own, after each token stage of a slim model."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mdc.models import evaluating, find_sites
from lightning_mdc.tokens.selection import TokenSelection


def surviving_patches(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, survivors) of a slim model: (batch, classes), and bool (batch, stages, patches).

    Patches are in row-major order. One that has gone into a fused token does not count as there, even where that token
    is kept. Stages are those of ``find_sites(model).stages``; a dense model has none.

    Args:
        images: (batch, channels, height, width), on the model's device.
    """
    sites = find_sites(model)
    height, width = sites.grid_of((images.shape[-2], images.shape[-1]))
    watched = [_Watched(height * width) for _ in sites.stages]
    selections = [module for module in sites.model.modules() if isinstance(module, TokenSelection)]
    handles = [selection.register_forward_hook(watch) for selection, watch in zip(selections, watched, strict=True)]
    # From one stage to the next: which patch each token is.
    for earlier, later in itertools.pairwise(watched):
        later.earlier = earlier
    try:
        with torch.inference_mode(), evaluating(model):
            logits = model(images)
    finally:
        for handle in handles:
            handle.remove()
    survivors = [watch.survivors for watch in watched]
    empty = torch.empty(len(images), 0, height * width, dtype=torch.bool)
    return logits, torch.stack(survivors, dim=1) if survivors else empty


class _Watched:
    """A hook on a token stage: keeps which patch each of the tokens that leave it is; -1: a fused one."""

    def __init__(self, num_patches: int) -> None:
        self.num_patches = num_patches
        self.earlier: _Watched | None = None
        self.patches = torch.empty(0, dtype=torch.long)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, TokenSelection)
        before = (
            torch.arange(self.num_patches).expand(len(output), -1) if self.earlier is None else self.earlier.patches
        )
        split = module.split(*args)
        if split is None:
            self.patches = before
            return
        best, _ = split
        kept = before.gather(1, best.cpu())
        fused = kept.new_full((len(kept), int(module.fuse)), -1)
        self.patches = torch.cat([kept, fused], dim=1)

    @property
    def survivors(self) -> Tensor:
        """(batch, patches), bool."""
        there = torch.zeros(len(self.patches), self.num_patches + 1, dtype=torch.bool)
        there.scatter_(1, self.patches % (self.num_patches + 1), True)  # -1 to the last column
        return there[:, :-1]
