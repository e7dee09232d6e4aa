"""timm's `ParallelScalingBlock`: attention and MLP at once, from one layer that makes what both of them see."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_mdc.models.anatomy import Behaviour, Block, Size, Slice, Units, columns_of
from lightning_mdc.policy import TOKENS


class _AnyUnits:
    """Mixin: the block with any number of heads and neurons."""

    def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x: (images, tokens, dim) -> (images, tokens, dim)."""
        neurons = self.mlp_out_proj.in_features
        made = self.in_proj(self.in_norm(x))
        hidden, packed = made.split([neurons, made.shape[-1] - neurons], dim=-1)
        if self.mlp_bias is not None:
            hidden = hidden + self.mlp_bias
        q, k, v = packed.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        dropout = self.attn_drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)
        y = self.attn_out_proj(y.transpose(1, 2).flatten(2))
        y = y + self.mlp_out_proj(self.mlp_drop(self.mlp_act(hidden)))
        result: Tensor = x + self.drop_path(self.ls(y))
        return result


def fused_block_of(index: int, name: str, block: Any) -> Block:
    """The block of that index and name, whose heads and neurons are read by a layer each."""
    units = {"heads": _heads(index, name, block), "neurons": _neurons(index, name, block)}
    reasons = {TOKENS: f"{name} (ParallelScalingBlock) runs attention and MLP at once, with no place between them"}
    return Block(name, block, units, reasons, second_half=block.mlp_act)


def _heads(index: int, name: str, block: Any) -> Units:
    width, (columns, sizes) = block.head_dim, columns_of(block.attn_out_proj, block.head_dim)
    return Units(
        dimension="heads",
        block=index,
        name=name,
        count=block.num_heads,
        width=width,
        slices=(*_made(block, groups=3, start=block.mlp_out_proj.in_features), *columns),
        sizes=(*sizes, _made_size(block), Size(block, "num_heads", lambda kept: kept)),
        reader=block.attn_out_proj,
        macs=lambda heads, tokens: heads * tokens * width * (4 * block.in_proj.in_features + 2 * tokens),
        behaviours=(Behaviour(block, _AnyUnits),),
    )


def _neurons(index: int, name: str, block: Any) -> Units:
    columns, sizes = columns_of(block.mlp_out_proj)
    biases = () if block.mlp_bias is None else (Slice(block, "mlp_bias"),)
    return Units(
        dimension="neurons",
        block=index,
        name=name,
        count=block.mlp_out_proj.in_features,
        width=1,
        slices=(*_made(block, groups=1, start=0), *biases, *columns),
        sizes=(*sizes, _made_size(block)),
        reader=block.mlp_out_proj,
        macs=lambda neurons, tokens: neurons * tokens * 2 * block.in_proj.in_features,
        after_point=True,
        behaviours=(Behaviour(block, _AnyUnits),),
    )


def _made(block: Any, groups: int, start: int) -> list[Slice]:
    """What makes them: rows of the one layer, behind so many others."""
    names = ["weight", *(["bias"] if block.in_proj.bias is not None else [])]
    return [Slice(block.in_proj, name, 0, groups, start=start) for name in names]


def _made_size(block: Any) -> Size:
    return Size(block.in_proj, "out_features", lambda kept: block.in_proj.weight.shape[0])  # of both dimensions
