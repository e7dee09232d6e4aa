"""The tokens that leave become one token, their mean (EViT, Liang et al., arXiv 2202.07800)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_mdc.tokens.reduction import Evidence, Reduction, moved, register, rows


@register
class Fuse(Reduction):
    """Averages the tokens that leave into one that goes on."""

    name = "fuse"
    extra = 1

    def forward(self, tokens: Tensor, kept: Tensor, leaving: Tensor, sizes: Tensor | None, evidence: Evidence) -> Any:
        fused = rows(tokens, leaving).mean(dim=1, keepdim=True)
        last = torch.full_like(leaving, kept.shape[1])
        return torch.cat([rows(tokens, kept), fused], dim=1), moved(kept, leaving, last)
