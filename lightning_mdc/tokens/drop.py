"""The tokens that leave are gone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_mdc.tokens.reduction import Evidence, Reduction, moved, register, rows


@register
class Drop(Reduction):
    """Drops the tokens that leave."""

    name = "drop"
    drops = True

    def forward(self, tokens: Tensor, kept: Tensor, leaving: Tensor, sizes: Tensor | None, evidence: Evidence) -> Any:
        return rows(tokens, kept), moved(kept, leaving, torch.full_like(leaving, -1))
