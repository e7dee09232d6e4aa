"""Multiply-accumulates of one block in closed form, given its numbers of heads, neurons and tokens.

With N tokens, width D, a = heads * head_dim, m neurons: ``N D 3a + 2 N^2 a + N a D + 2 N D m`` MACs (DESIGN: "FLOPs" in
this literature are MACs). A gate or a GLU adds its own Linear. In a token stage the MLP sees the tokens that are left,
and the score row adds N a (N^2 a for mean attention received). LayerNorm, softmax, activations and biases are not
counted, which is how `torch.utils.flop_counter.FlopCounterMode` counts.

Numbers may be arrays that broadcast against each other, so that thousands of policies are priced at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


def attention_macs(tokens: Any, heads: Any, head_dim: int, weights_per_head: int) -> Any:
    """Of the projections of all heads, and of the two products of every token with every other."""
    return tokens * heads * weights_per_head + 2 * tokens * tokens * heads * head_dim


def token_score_macs(tokens: Any, heads: Any, head_dim: int, num_rows: int) -> Any:
    """Of the attention that `num_rows` class or distillation tokens pay to all; 0 rows: that all pay to all."""
    return (num_rows or tokens) * tokens * heads * head_dim


def mlp_macs(tokens: Any, neurons: Any, weights_per_neuron: int) -> Any:
    """Of the Linear layers of an MLP."""
    return tokens * neurons * weights_per_neuron


@dataclass(frozen=True)
class BlockMacs:
    """Where the MACs of one image go.

    Attributes:
        attention: of each block's attention and token scores, (blocks,).
        mlp: of each block's MLP, (blocks,).
        outside: of patch embedding, head, and whatever else is outside the blocks.
    """

    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    outside: int

    @property
    def total(self) -> int:
        return sum(self.attention) + sum(self.mlp) + self.outside
