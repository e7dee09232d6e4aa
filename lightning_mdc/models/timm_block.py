"""The slim form of a timm block at which tokens leave."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mdc.errors import UnsupportedModelError
from lightning_mdc.policy import TokenStage
from lightning_mdc.tokens.selection import TokenSelection


class TokenStageBlock(nn.Module):
    """A pre-norm timm block that drops tokens between its attention and its MLP.

    Takes over the block's children under their own names, so state_dict keys stay. With nothing to drop it computes
    what the block computed, operation by operation. K is static per input size: compile and export see no branch on
    data.
    """

    # The children are timm's; to the type checker they are anything.
    norm1: Any
    attn: Any
    ls1: Any
    drop_path1: Any
    norm2: Any
    mlp: Any
    ls2: Any
    drop_path2: Any

    def __init__(
        self, block: nn.Module, stage: TokenStage, num_prefix_tokens: int, class_rows: tuple[int, ...], fuse: bool
    ) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.training = block.training
        self.select = TokenSelection(stage, num_prefix_tokens, class_rows, fuse)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x: (batch, tokens, dim) -> (batch, kept tokens + fused token, dim).

        Raises:
            UnsupportedModelError: an attention mask is given; it would not fit the tokens that are left.
        """
        if attn_mask is not None or is_causal:
            raise UnsupportedModelError(
                "attn_mask / is_causal: tokens leave inside this slim model, so a mask over the input's tokens does "
                "not fit its later blocks; call it without, or prune with tokens=1.0"
            )
        y, q, k = self._attend(self.norm1(x))
        x = x + self.drop_path1(self.ls1(y))
        x = self.select(x, q, k, self.attn.scale)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _attend(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # What timm's Attention does, with q and k handed out: they are needed for the scores, and the fused kernel
        # hides its map. (b, n, 3 * h * d) -> three of (b, h, n, d)
        attn = self.attn
        batch, num_tokens, _ = x.shape
        qkv = attn.qkv(x).reshape(batch, num_tokens, 3, attn.num_heads, attn.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if attn.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if self.training else 0.0)
        else:
            y = attn.attn_drop(((q * attn.scale) @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        y = attn.norm(y.transpose(1, 2).reshape(batch, num_tokens, attn.attn_dim))
        gate = getattr(attn, "gate", None)
        if gate is not None:
            y = y * gate(x).sigmoid()
        return attn.proj_drop(attn.proj(y)), q, k
