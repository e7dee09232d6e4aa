"""What happens at a token stage: score the tokens, keep the best, fuse the rest.

After Hou & Kung (arXiv 2201.00043, section 3): tokens are ranked by the class token's attention; dependence enters as a
prior over positions. Token dropping between a block's attention and its MLP, with one fused token, follows EViT
(Liang et al., arXiv 2202.07800).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mdc.errors import PlanError
from lightning_mdc.policy import TokenStage, kept_tokens


class TokenSelection(nn.Module):
    """A token stage: it scores the tokens, keeps the best and fuses the rest. Slim blocks and masks both run it.

    A module of its own, so that a hook can watch which tokens it keeps.
    """

    prior: Tensor | None

    def __init__(self, stage: TokenStage, num_prefix_tokens: int, class_rows: tuple[int, ...], fuse: bool) -> None:
        super().__init__()
        self.stage = stage
        self.num_prefix_tokens = num_prefix_tokens
        self.class_rows = class_rows
        self.fuse = fuse
        # From the plan, not from the weights: the state_dict keeps the dense model's keys.
        prior = None if stage.prior is None else torch.tensor(stage.prior, dtype=torch.float32, device="cpu")
        self.register_buffer("prior", prior, persistent=False)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """The tokens that go on, as `regroup` makes them; `x` itself if nothing is to drop.

        x: (batch, tokens, dim), the residual stream between attention and MLP. q, k: (batch, heads, tokens, head_dim)
        of that attention, for the heads that are kept (there may be none). scale: of its logits.
        """
        split = self.split(x, q, k, scale)
        return x if split is None else regroup(x, *split, self.num_prefix_tokens, self.fuse)

    def split(self, x: Tensor, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
        """Which patches stay, (batch, kept) in their old order, and which go; None if nothing is to drop.

        Indices count the tokens after the prefix. Arguments as of `forward`.
        """
        num_tokens, num_prefix_tokens = x.shape[1], self.num_prefix_tokens
        num_kept = kept_tokens(num_tokens, self.stage.keep, num_prefix_tokens)
        if num_kept == num_tokens:
            return None
        prior = self.prior
        if prior is not None:
            assert self.stage.grid is not None  # TokenStage checks it
            prior = resample_prior(prior.to(x.device), self.stage.grid, num_tokens - num_prefix_tokens)
            prior = prior[None].expand(x.shape[0], -1)
        if prior is not None and (self.stage.score == "dependence" or q.shape[1] == 0):
            scores = prior
        elif q.shape[1] == 0:
            scores = x.detach()[:, num_prefix_tokens:].abs().mean(dim=-1)
        else:
            scores = attention_scores(q, k, scale, self.class_rows)[:, num_prefix_tokens:]
            if prior is not None and self.stage.score == "attention*dependence":
                scores = scores * prior
        return best_and_rest(scores, num_kept - num_prefix_tokens)

    def extra_repr(self) -> str:
        return f"keep={self.stage.keep:.4g}, score={self.stage.score}, fuse={self.fuse}"


def best_and_rest(scores: Tensor, num_best: int) -> tuple[Tensor, Tensor]:
    """Indices of the best, (batch, num_best) in their old order, and of the others, of scores (batch, patches)."""
    # A stable sort, so that masks and slim model agree even on ties.
    order = scores.argsort(dim=1, descending=True, stable=True)
    return order[:, :num_best].sort(dim=1).values, order[:, num_best:]


def regroup(x: Tensor, best: Tensor, rest: Tensor, num_prefix_tokens: int, fuse: bool) -> Tensor:
    """The prefix tokens, the `best` others, and (if `fuse`) the mean of the `rest`: (batch, kept + fuse, dim).

    x: (batch, tokens, dim); best, rest: indices (batch, n) among the tokens after the prefix.
    """
    parts = [x[:, :num_prefix_tokens], _rows(x, num_prefix_tokens + best)]
    if fuse:
        parts.append(_rows(x, num_prefix_tokens + rest).mean(dim=1, keepdim=True))
    return torch.cat(parts, dim=1)


def attention_scores(q: Tensor, k: Tensor, scale: float, class_rows: tuple[int, ...]) -> Tensor:
    """Attention each token gets, averaged over heads: from the class rows, or from all rows if there are none.

    q, k: (batch, heads, tokens, head_dim), heads >= 1. Returns (batch, tokens), fp32 or wider, without gradient.
    Costs ``rows * tokens * heads * head_dim`` MACs on top of the (fused) attention, which hides its map.
    """
    q, k = q.detach(), k.detach()
    if class_rows:
        q = q[:, :, : len(class_rows)]  # class rows come first in every supported model
    logits = (q * scale) @ k.transpose(-2, -1)  # (batch, heads, rows, tokens)
    return torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).mean(dim=(1, 2))


def resample_prior(prior: Tensor, grid: tuple[int, int], num_positions: int) -> Tensor:
    """`prior` (height * width,) for another number of positions on a grid of the same shape.

    Raises:
        PlanError: no such grid has that many positions.
    """
    if prior.numel() == num_positions:
        return prior
    height = round(math.sqrt(num_positions * grid[0] / grid[1]))
    width = num_positions // max(height, 1)
    if height * width != num_positions:
        raise PlanError(
            f"a token prior of {grid[0]}x{grid[1]} patches cannot be resampled to {num_positions} positions; "
            "use images of the same aspect ratio, or token_score='attention'"
        )
    image = prior.reshape(1, 1, *grid)
    return F.interpolate(image, size=(height, width), mode="bilinear", align_corners=False).flatten()


def _rows(x: Tensor, index: Tensor) -> Tensor:
    # `gather` would look up an index for every channel: on a CPU it takes three times as long, in training too.
    batch, num_tokens, _ = x.shape
    rows = torch.arange(batch, device=x.device)[:, None] * num_tokens + index
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, index.shape)
