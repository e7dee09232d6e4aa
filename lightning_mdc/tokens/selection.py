"""Which tokens stay at a token stage.

After Hou & Kung (arXiv 2201.00043, section 3): tokens are ranked by the class token's attention; dependence enters as a
prior over positions. Token dropping between a block's attention and its MLP follows EViT (Liang et al., arXiv
2202.07800).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mdc.errors import PlanError
from lightning_mdc.policy import TokenStage
from lightning_mdc.tokens.flow import tokens_kept
from lightning_mdc.tokens.reduction import Evidence, reduction_class, rows


class Carried(NamedTuple):
    """What travels beside the tokens from the first token stage on. Tokens are counted after the prefix tokens.

    Attributes:
        places: the token that each position of the input is in now, int64 (batch, positions); -1: it was dropped.
        last: the value that each position had when it was dropped, (batch, positions, dim); None: nobody asks.
        own: the position that each token had in the input, int64 (batch, tokens); -1: it is a new one (fused).
    """

    places: Tensor
    last: Tensor | None
    own: Tensor

    def sizes(self, num_tokens: int) -> Tensor:
        """How many positions each token stands for: int64 (batch, tokens)."""
        return self.sums(torch.ones_like(self.places), num_tokens)

    def sums(self, values: Tensor, num_tokens: int) -> Tensor:
        """Sum of `values` (batch, positions) over the positions of each token: (batch, tokens)."""
        nowhere_first = values.new_zeros(values.shape[0], num_tokens + 1)
        return nowhere_first.scatter_add(1, self.places + 1, values)[:, 1:]


class TokenSelection(nn.Module):
    """A token stage: it scores the tokens, keeps the best and reduces the rest. Slim blocks and masks both run it.

    A module of its own, so that a hook can watch which tokens it keeps.
    """

    prior: Tensor | None

    def __init__(
        self, stage: TokenStage, num_prefix_tokens: int, class_rows: tuple[int, ...], reduction: str, keeps_last: bool
    ) -> None:
        super().__init__()
        self.stage = stage
        self.num_prefix_tokens = num_prefix_tokens
        self.class_rows = class_rows
        self.keeps_last = keeps_last
        self.reduce = reduction_class(reduction)()
        # From the plan, not from the weights: the state_dict keeps the dense model's keys.
        prior = None if stage.prior is None else torch.tensor(stage.prior, dtype=torch.float32, device="cpu")
        self.register_buffer("prior", prior, persistent=False)

    def init_non_persistent_buffers(self) -> None:
        """Take from the plan what no state_dict holds: transformers asks its modules for it, as timm's have it."""
        if self.prior is not None:
            self.prior.copy_(torch.tensor(self.stage.prior))

    def forward(self, x: Tensor, evidence: Evidence, carried: Carried | None) -> tuple[Tensor, Carried | None]:
        """The tokens that go on, and what travels beside them; `x` itself if nothing is to leave.

        x: (batch, tokens, dim), the residual stream between attention and MLP.
        """
        split = self.split(x, evidence, carried)
        if split is None:
            return x, carried
        prefix, tokens = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        if carried is None:  # every position still is a token of its own
            places = torch.arange(tokens.shape[1], device=x.device).expand(x.shape[0], -1)
            carried = Carried(places, torch.zeros_like(tokens) if self.keeps_last else None, places)
        sizes = carried.sizes(tokens.shape[1]) if self.reduce.counts_sizes else None
        reduced, moved = self.reduce(tokens, *split, sizes, evidence)
        own = F.pad(carried.own.gather(1, split[0]), (0, self.reduce.extra), value=-1)
        return torch.cat([prefix, reduced], dim=1), self._moved(carried, tokens, moved, own)

    def _moved(self, carried: Carried, tokens: Tensor, moved: Tensor, own: Tensor) -> Carried:
        there = carried.places >= 0
        before = carried.places.clamp_min(0)
        places = torch.where(there, moved.gather(1, before), -1)
        last = carried.last
        if last is not None:
            leaves = there & (places < 0)
            last = torch.where(leaves[:, :, None], rows(tokens, before), last)
        return Carried(places, last, own)

    def split(self, x: Tensor, evidence: Evidence, carried: Carried | None) -> tuple[Tensor, Tensor] | None:
        """Which tokens stay, (batch, kept) in their order, and which leave; None if none is to leave.

        Indices count the tokens after the prefix. Arguments as of `forward`.
        """
        num_tokens, num_prefix_tokens = x.shape[1], self.num_prefix_tokens
        num_kept = int(tokens_kept(num_tokens, self.stage.keep, num_prefix_tokens))
        if num_kept == num_tokens:
            return None
        prior = self._prior(x, carried)
        has_heads = evidence.q.shape[1] > 0
        if prior is not None and (self.stage.score == "dependence" or not has_heads):
            scores = prior.expand(x.shape[0], -1)
        elif not has_heads:
            scores = x.detach()[:, num_prefix_tokens:].abs().mean(dim=-1)
        else:
            scores = attention_scores(evidence, self.class_rows)[:, num_prefix_tokens:]
            if prior is not None and self.stage.score == "attention*dependence":
                scores = scores * prior
        return best_and_rest(scores, num_kept - num_prefix_tokens)

    def _prior(self, x: Tensor, carried: Carried | None) -> Tensor | None:
        """The prior of each token, (batch or 1, tokens): the mean over the positions that it stands for."""
        if self.prior is None:
            return None
        assert self.stage.grid is not None  # TokenStage checks it
        num_tokens = x.shape[1] - self.num_prefix_tokens
        positions = num_tokens if carried is None else carried.places.shape[1]
        prior = resample_prior(self.prior.to(x.device), self.stage.grid, positions)
        if carried is None:
            return prior[None]
        return carried.sums(prior.expand_as(carried.places), num_tokens) / carried.sizes(num_tokens)

    def extra_repr(self) -> str:
        return f"keep={self.stage.keep:.4g}, score={self.stage.score}, reduction={self.reduce.name}"


def best_and_rest(scores: Tensor, num_best: int) -> tuple[Tensor, Tensor]:
    """Indices of the best, (batch, num_best), and of the others, both in their old order, of scores (batch, patches).

    Of equal scores the one with the lower index is the better, in eager mode and in every exported program. Few
    runtimes have a stable sort, and `topk` promises no order: only its values are looked at.
    """
    scores = scores.masked_fill(scores.isnan(), math.inf)
    least = scores.topk(num_best, dim=1).values[:, -1:]
    above, tied = scores > least, scores == least
    best = above | (tied & (tied.cumsum(1) <= num_best - above.sum(1, keepdim=True)))
    among_best, indices = best.cumsum(1), torch.arange(scores.shape[1], device=scores.device)
    places = torch.where(best, among_best - 1, indices + num_best - among_best)
    order = torch.zeros_like(places).scatter(1, places, indices.expand_as(places))
    return order[:, :num_best], order[:, num_best:]


def attention_scores(evidence: Evidence, class_rows: tuple[int, ...]) -> Tensor:
    """Attention each token gets, averaged over heads: from the class rows, or from all rows if there are none.

    There is at least one head. Returns (batch, tokens), fp32 or wider, without gradient. Costs
    ``rows * tokens * heads * head_dim`` MACs on top of the (fused) attention, which hides its map.
    """
    q, k = evidence.q.detach(), evidence.k.detach()
    if class_rows:
        q = q[:, :, : len(class_rows)]  # class rows come first in every supported model
    logits = (q * evidence.scale) @ k.transpose(-2, -1)  # (batch, heads, rows, tokens)
    return torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).mean(dim=(1, 2))


def resample_prior(prior: Tensor, grid: tuple[int, int], num_positions: int) -> Tensor:
    """`prior` (height * width,) for another number of positions on a grid of the same shape.

    Raises:
        PlanError: no such grid has that many positions.
    """
    if prior.numel() == num_positions:
        return prior
    image, size = prior.reshape(1, 1, *grid), grid_like(grid, num_positions)
    return F.interpolate(image, size=size, mode="bilinear", align_corners=False).flatten()


def grid_like(grid: tuple[int, int], num_positions: int) -> tuple[int, int]:
    """The grid of the shape of `grid` that has so many positions.

    Raises:
        PlanError: there is none.
    """
    height = round(math.sqrt(num_positions * grid[0] / grid[1]))
    width = num_positions // max(height, 1)
    if height * width != num_positions:
        raise PlanError(
            f"a token prior of {grid[0]}x{grid[1]} patches cannot be resampled to {num_positions} positions; "
            "use images of the same aspect ratio, or score='attention'"
        )
    return height, width
