"""What becomes of the tokens that leave at a token stage: one class each. To add one, `register` it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lightning_mdc.errors import PlanError


class Evidence(NamedTuple):
    """What a block's attention says of its tokens.

    Attributes:
        q, k: (batch, heads, tokens, head_dim), of the heads that are kept; there may be none.
        scale: of the logits ``q k^T``.
    """

    q: Tensor
    k: Tensor
    scale: float


class Reduction(nn.Module):
    """What becomes of the tokens that leave. Without parameters; an image's tokens depend on no other image.

    Tokens are counted after the prefix tokens, which stay.
    """

    name: ClassVar[str]
    extra: ClassVar[int] = 0  # tokens that it adds to the kept ones
    drops: ClassVar[bool] = False  # whether a token may go nowhere
    counts_sizes: ClassVar[bool] = False  # whether it has to know how many positions each token stands for
    proportional: ClassVar[bool] = False  # whether later attentions weigh tokens by their sizes

    @abstractmethod
    def forward(self, tokens: Tensor, kept: Tensor, leaving: Tensor, sizes: Tensor | None, evidence: Evidence) -> Any:
        """The tokens that go on, (batch, kept + extra, dim), and where each went, int64 (batch, tokens); -1: nowhere.

        Args:
            tokens: (batch, tokens, dim), the residual stream after attention.
            kept, leaving: int64 (batch, n) each, indices of the tokens that stay, in their order, and of the others.
            sizes: (batch, tokens), how many positions of the input each token stands for; None: one each, or it has
                not asked for them.
            evidence: of the block's attention, prefix tokens included.
        """

    @classmethod
    def macs(cls, kept: Any, leaving: Any, head_dim: Any) -> Any:
        """MACs of one image; numbers or arrays. Gathers and sums cost none.

        kept, leaving: patch tokens; head_dim: channels of a mean key, or of a token where no head is kept.
        """
        return 0 * kept


REDUCTIONS: dict[str, type[Reduction]] = {}
R = TypeVar("R", bound=type[Reduction])


def register(cls: R) -> R:
    """Make a reduction known by its name."""
    REDUCTIONS[cls.name] = cls
    return cls


def reduction_class(name: str) -> type[Reduction]:
    """The registered reduction of that name.

    Raises:
        PlanError: there is none; lists those known.
    """
    if name not in REDUCTIONS:
        raise PlanError(f"reduction={name!r} is unknown; known are {', '.join(sorted(REDUCTIONS))}")
    return REDUCTIONS[name]


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (batch, tokens, dim) at index (batch, n): (batch, n, dim)."""
    # `gather` would look up an index for every channel: on a CPU it takes three times as long, in training too.
    batch, num_tokens, _ = x.shape
    offsets = torch.arange(batch, device=x.device)[:, None] * num_tokens
    return x.flatten(0, 1).index_select(0, (offsets + index).flatten()).unflatten(0, index.shape)


def moved(kept: Tensor, leaving: Tensor, destination: Tensor) -> Tensor:
    """Where each token went: the i-th kept one to i, the leaving ones to `destination` (batch, leaving)."""
    order = torch.cat([kept, leaving], dim=1)
    there = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return torch.zeros_like(order).scatter(1, order, torch.cat([there, destination], dim=1))
