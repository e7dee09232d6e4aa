"""Each token that leaves is averaged into the kept one most like it (ToMe, Bolya et al., arXiv 2210.09461).

Alike are tokens whose keys, averaged over heads, point the same way. Of the tokens of ToMe's bipartite matching one
side is given here: those that leave, by their score.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_mdc.tokens.reduction import Evidence, Reduction, moved, register, rows


@register
class Merge(Reduction):
    """Averages each token that leaves into the kept one most like it, by how many positions each stands for."""

    name = "merge"
    counts_sizes = True

    def forward(self, tokens: Tensor, kept: Tensor, leaving: Tensor, sizes: Tensor | None, evidence: Evidence) -> Any:
        # Without heads there are no keys: then the tokens themselves.
        keys = evidence.k.mean(dim=1)[:, -tokens.shape[1] :] if evidence.k.shape[1] else tokens
        keys = normalize(keys.detach().float(), dim=-1)
        alike = rows(keys, leaving) @ rows(keys, kept).transpose(1, 2)  # (batch, leaving, kept)
        # Of equally alike ones the first, which `argmax` does not promise.
        places = torch.arange(kept.shape[1], device=kept.device)
        target = torch.where(alike == alike.amax(dim=2, keepdim=True), places, places[-1]).amin(dim=2)
        weight = torch.ones_like(tokens[..., 0]) if sizes is None else sizes.to(tokens.dtype)
        own, theirs = weight.gather(1, kept), weight.gather(1, leaving)
        total = own.scatter_add(1, target, theirs)
        channels = target[:, :, None].expand(-1, -1, tokens.shape[2])
        arriving = rows(tokens, leaving) * theirs[..., None]
        summed = (rows(tokens, kept) * own[..., None]).scatter_add(1, channels, arriving)
        return summed / total[..., None], moved(kept, leaving, target)

    @classmethod
    def macs(cls, kept: Any, leaving: Any, head_dim: Any) -> Any:
        return leaving * kept * head_dim


@register
class ProportionalMerge(Merge):
    """As `Merge`; later attentions count a merged token as often as it stands for positions."""

    name = "merge-proportional"
    proportional = True
