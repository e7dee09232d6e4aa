"""What timm's attentions with relative positions share: a packed qkv, and a bias for each pair of places and head.

Most of them reshape to the width of the model, which fewer heads do not have: where heads leave, a mixin takes the
place of their forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mdc.models.anatomy import Behaviour, Size, Slice, Units, columns_of, rows_of


class AnyHeads:
    """Mixin: such an attention with any number of heads, which together need not be as wide as the model."""

    def forward(
        self: Any,
        x: Tensor,
        mask: Tensor | None = None,
        shared_rel_pos_bias: None = None,  # heads are not cut where blocks share their bias
        shared_rel_pos: None = None,
    ) -> Tensor:
        """x: (images, tokens, dim); of windows (images * windows, area, dim) and a mask (windows, area, area)."""
        heads = self.num_heads
        if getattr(self, "q_bias", None) is None:
            packed = self.qkv(x)
        else:
            packed = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, self.k_bias, self.v_bias]))
        q, k, v = packed.reshape(*x.shape[:2], 3, heads, packed.shape[-1] // max(3 * heads, 1)).permute(2, 0, 3, 1, 4)
        bias = None
        if heads:
            q, k = self.compared(q, k)
            bias = self.position_bias()
        if bias is not None and mask is not None:
            bias = bias + mask.repeat(x.shape[0] // mask.shape[0], 1, 1)[:, None]
        dropout = self.attn_drop.p if self.training else 0.0
        scale = getattr(self, "scale", 1.0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
        result: Tensor = self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))
        return result

    def compared(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as their products count."""
        return q, k

    def position_bias(self: Any) -> Tensor | None:
        """What is added to the logits, (1, heads, tokens, tokens)."""
        bias: Tensor = self._get_rel_pos_bias()
        return bias


class NoneToo:
    """Mixin: an attention whose own forward takes any number of heads but none."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if self.num_heads:
            result: Tensor = super().forward(x)  # type: ignore[misc]
        else:
            result = self.proj_drop(self.proj(x[..., :0]))
        return result


class PositionBias(NamedTuple):
    """What a bias of positions is made of.

    Attributes:
        slices, sizes: per head, beside those of the attention's Linear layers.
        fixed, per_head: its MACs, whatever the number of heads and for each.
        per_token: tokens -> its MACs for each head and token.
    """

    slices: Sequence[Slice] = ()
    sizes: Sequence[Size] = ()
    fixed: int = 0
    per_head: int = 0
    per_token: Callable[[Any], Any] = lambda tokens: 0


def bias_table(owner: nn.Module) -> PositionBias:
    """A table with a column per head."""
    return PositionBias([Slice(owner, "relative_position_bias_table", 1, width=1)])


def bias_mlp(first: nn.Linear, last: nn.Linear, positions: int) -> PositionBias:
    """An MLP over so many relative positions, which puts out a number per head."""
    names = ["weight", *(["bias"] if last.bias is not None else [])]
    return PositionBias(
        [Slice(last, name, width=1) for name in names],
        [Size(last, "out_features", lambda kept: kept)],
        fixed=positions * first.weight.numel(),
        per_head=positions * last.in_features,
    )


def heads_of(
    index: int,
    name: str,
    attn: Any,
    mixin: type,
    bias: PositionBias,
    window: int | None = None,
    pooled: int = 1,
) -> Units:
    """The heads of an attention of block `index`, called `name`, that `mixin` computes where there are fewer.

    A token attends to all, or to those of its window of so many; so many queries are pooled to one.
    """
    counter = "num_heads" if hasattr(attn, "num_heads") else "heads"
    count = getattr(attn, counter)
    width = attn.proj.in_features // count if count else 1  # of no heads any width is true
    of_qkv, of_proj = (layer.weight.numel() // max(count, 1) for layer in (attn.qkv, attn.proj))
    (rows, row_sizes), (columns, column_sizes) = rows_of(attn.qkv, 3, width), columns_of(attn.proj, width)
    biases = [Slice(attn, n) for n in ("q_bias", "k_bias", "v_bias") if getattr(attn, n, None) is not None]

    def macs(heads: Any, tokens: Any) -> Any:
        queries, keys = tokens // pooled, tokens if window is None else window
        of_queries = queries * (of_proj + 2 * keys * width + bias.per_token(tokens))
        return heads * (tokens * of_qkv + of_queries + bias.per_head) + np.greater(heads, 0) * bias.fixed

    return Units(
        dimension="heads",
        block=index,
        name=name,
        count=count,
        width=width,
        slices=(*rows, *columns, *biases, *bias.slices),
        sizes=(*row_sizes, *column_sizes, Size(attn, counter, lambda kept: kept), *bias.sizes),
        reader=attn.proj,
        macs=macs,
        behaviours=(Behaviour(attn, mixin),),
    )
