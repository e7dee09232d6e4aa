"""A library's block with a token stage between its halves, and the way through all blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mdc.errors import PlanError, UnsupportedModelError
from lightning_mdc.policy import Plan, TokenStage
from lightning_mdc.tokens.reduction import Evidence, rows
from lightning_mdc.tokens.selection import Carried, TokenSelection, grid_like


@dataclass(frozen=True)
class Role:
    """What a block does with tokens.

    Attributes:
        select: the token stage between its halves; None: it has none.
        proportional: its attention counts a token as often as it stands for positions.
        asks: it has to know what happened to the tokens before.
        num_prefix_tokens: tokens at the front that are no positions.
    """

    select: TokenSelection | None
    proportional: bool
    asks: bool
    num_prefix_tokens: int


class Journey:
    """Of one call of one block: what comes with the tokens, and what goes on with them."""

    def __init__(self, before: Carried | None = None) -> None:
        self.before = self.after = before

    def alone(self) -> Journey:
        """For a copy of the block, called outside the model."""
        return Journey(self.before)


class StagedBlock(nn.Module):
    """Mixin before a block's own class, and before the family's halves of it:

    - ``attend(x, bias) -> (x, Evidence)``: attention and its residual, of x (batch, tokens, dim); bias
      (batch, 1, 1, tokens) or None is added to the logits. ``attend(x, bias, rope)`` where tokens are turned by their
      positions;
    - ``finish(x) -> x``: the rest.

    K is static per input size: compile and export see no branch on data. Halves that derive from it take what a library
    calls its block with.
    """

    role: Role
    attend: Callable[..., tuple[Tensor, Evidence]]
    finish: Callable[[Tensor], Tensor]

    def forward(
        self, x: Tensor, *args: Any, rope: Tensor | None = None, journey: Journey | None = None, **kwargs: Any
    ) -> Tensor:
        """x: (batch, tokens, dim) -> (batch, tokens that go on, dim); what travels with them in `journey`.

        Args:
            rope: how the tokens turn, as the library's block takes it.

        Raises:
            UnsupportedModelError: an attention mask is given; it would not fit the tokens that are left.
            PlanError: the block is called by itself, and has to know what happened before.
        """
        refuse_masks(*args, *kwargs.values())
        journey = Journey() if journey is None else journey
        self.check_asked(journey.before)
        x, journey.after = self.staged(x, journey.before, rope)
        return x

    def check_asked(self, known: Any) -> None:
        """Refuse, with a `PlanError`, what is None where the block has to know what happened before."""
        if self.role.asks and known is None:
            raise PlanError(
                "this block has to know which positions its tokens stand for; call the model, not its blocks one by one"
            )

    def staged(self, x: Tensor, carried: Carried | None, rope: Any = None) -> tuple[Tensor, Carried | None]:
        """The tokens that go on, and what travels beside them."""
        _refuse_symbols(x)
        x, evidence = self.attend(x, self._log_sizes(x, carried), *(() if rope is None else (rope,)))
        if self.role.select is not None:
            x, carried = self.role.select(x, evidence, carried)
        return self.finish(x), carried

    def _log_sizes(self, x: Tensor, carried: Carried | None) -> Tensor | None:
        if carried is None or not self.role.proportional:
            return None
        prefix = self.role.num_prefix_tokens
        sizes = carried.sizes(x.shape[1] - prefix).to(x.dtype)
        return torch.cat([sizes.new_ones(sizes.shape[0], prefix), sizes], dim=1).log()[:, None, None]


def refuse_masks(*options: Any) -> None:
    """Refuse, with an `UnsupportedModelError`, masks over the input's tokens: what is neither None nor False."""
    _refuse_symbols(*options)
    if any(option is not None and option is not False for option in options):
        raise UnsupportedModelError(
            "attn_mask / is_causal: tokens leave inside this model, so a mask over the input's tokens does not fit its "
            "later blocks; call it without, or prune with tokens=1.0"
        )


def _refuse_symbols(*values: Any) -> None:
    if any(isinstance(value, torch.fx.Proxy) for value in values):
        raise UnsupportedModelError(
            "torch.fx cannot trace this model (create_feature_extractor, say): how many tokens go on follows from "
            "the number that it hides; read features by forward_intermediates, features_only or hooks, or trace it "
            "by torch.export"
        )


class Lent(nn.Module):
    """Mixin: a module that computes what its caller says, who restates it while tokens leave: hooks see its call."""

    def forward(self, *args: Any, instead: Callable[..., Any] | None = None, **options: Any) -> Any:
        """As ever, or `instead` of these arguments."""
        return super().forward(*args, **options) if instead is None else instead(*args)


def called(module: nn.Module, compute: Callable[..., Any], *args: Any) -> Any:
    """``compute(*args)``, as a call of `module`, with its hooks, if it is lent."""
    return module(*args, instead=compute) if isinstance(module, Lent) else compute(*args)


def attention_called(
    attention: nn.Module, compute: Callable[[Tensor], tuple[Tensor, Evidence]], *args: Tensor, paired: bool = False
) -> tuple[Tensor, Evidence]:
    """What `compute` makes of the first of `args`, as a call of `attention` with all of them.

    Args:
        paired: whether its library's attention gives a pair, the second of which is its map or None.
    """
    found: list[Evidence] = []

    def instead(x: Tensor, *_: Tensor) -> Any:
        y, evidence = compute(x)
        found.append(evidence)
        return (y, None) if paired else y

    given = called(attention, instead, *args)
    return (given[0] if paired else given), found[-1]


def with_stage(halves: type) -> tuple[type, ...]:
    """The mixins of a block that takes part where tokens leave."""
    return (halves,) if issubclass(halves, StagedBlock) else (StagedBlock, halves)


def check_grid(plan: Plan, size: Sequence[int], grid: Sequence[int]) -> None:
    """Refuse, with a `PlanError`, images of that (height, width) and `grid` in patches if a prior over positions of
    `plan` is for a grid of another shape."""
    for prior_grid in {stage.grid for stage in plan.leaving if stage.grid is not None}:
        if grid_like(prior_grid, grid[0] * grid[1]) != tuple(grid):
            raise PlanError(
                f"images of {size[0]}x{size[1]} have {grid[0]}x{grid[1]} patches, but the token prior is for a grid "
                f"like {prior_grid[0]}x{prior_grid[1]}; use images of that shape, or score='attention'"
            )


def stage_of(block: nn.Module) -> TokenStage | None:
    """The token stage that is built into a slim model's block."""
    select = block.role.select if isinstance(block, StagedBlock) else None
    return None if select is None else select.stage


# --- through all blocks -----------------------------------------------------------------------------------------------


def through(
    blocks: Iterable[nn.Module],
    x: Tensor,
    num_prefix_tokens: int,
    restore: bool,
    checkpoint: Callable[..., Any] | None = None,
    ropes: Callable[[int, Carried | None], Tensor | None] = lambda block, carried: None,
) -> Tensor:
    """x (batch, tokens, dim) through the blocks of a model inside which tokens leave; a family's `reader` calls it.

    Args:
        restore: whether every position has a token again behind them: (batch, tokens, dim) then, else fewer tokens.
        checkpoint: calls a function with tensors, and again in the backward pass, as `torch.utils.checkpoint` does.
        ropes: (index of a block, what travels beside the tokens) -> how those turn that reach it; None: not at all.
    """
    carried: Carried | None = None
    for index, block in enumerate(blocks):
        rope = ropes(index, carried)
        if checkpoint is None:
            x, carried = step(block, x, carried, rope)
        else:
            x, *travels = checkpoint(partial(_flat_step, block), x, rope, *(() if carried is None else carried))
            carried = Carried(*travels) if travels else None
    return restored(x, carried, num_prefix_tokens) if restore else x


def step(
    block: nn.Module, x: Tensor, carried: Carried | None, rope: Tensor | None = None
) -> tuple[Tensor, Carried | None]:
    """x through one block, and what travels beside it behind it."""
    inside: Any = block
    while not isinstance(inside, StagedBlock) and len(inside._modules) == 1:  # wrapped: compiled, sharded, checkpointed
        inside = next(iter(inside._modules.values()))
    turns = {} if rope is None else {"rope": rope}
    if not isinstance(inside, StagedBlock):
        return block(x, **turns), carried
    journey = Journey(carried)
    x = block(x, journey=journey, **turns)
    return x, journey.after


def _flat_step(block: nn.Module, x: Tensor, rope: Tensor | None, *travels: Any) -> tuple[Any, ...]:
    x, carried = step(block, x, Carried(*travels) if travels else None, rope)
    return x, *(() if carried is None else carried)


def restored(x: Tensor, carried: Carried | None, num_prefix_tokens: int) -> Tensor:
    """A token in every position: its own, that of the token it went into, or its own last value.

    x: (batch, tokens, dim). Returns (batch, prefix + positions, dim).
    """
    if carried is None:
        return x
    tokens = rows(x[:, num_prefix_tokens:], carried.places.clamp_min(0))
    if carried.last is not None:
        tokens = torch.where((carried.places >= 0)[:, :, None], tokens, carried.last)
    return torch.cat([x[:, :num_prefix_tokens], tokens], dim=1)
