"""What costs of a vision transformer are computed from: its units per block, and the tokens that flow through it."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from lightning_mdc.errors import BudgetError
from lightning_mdc.models import Anatomy
from lightning_mdc.policy import Plan, Policy, TokenOptions
from lightning_mdc.tokens.flow import tokens_after, tokens_kept
from lightning_mdc.tokens.reduction import reduction_class

InputSize = int | Sequence[int]


@dataclass(frozen=True)
class TokenDrop:
    """A token stage as far as cost is concerned: `keep` may be an array of keep ratios, one per policy."""

    block: int
    keep: Any
    scored: bool = True  # False when a prior alone decides, so that no attention row is computed


@dataclass(frozen=True)
class Kept:
    """What slim models keep, as far as cost is concerned. With any leading shape, so that thousands of policies are
    priced at once.

    Attributes:
        units: by dimension how many, (..., blocks); may be fractional (a solver's relaxation). All of what is missing.
        drops: where tokens leave, beside the token stages that are built in.
        reduction, restore: as of a `Plan`.
    """

    units: Mapping[str, Any] = field(default_factory=dict)
    drops: Sequence[TokenDrop] = ()
    reduction: str = "fuse"
    restore: bool = False


@dataclass(frozen=True)
class BlockTokens:
    """How many tokens one block sees: arrays, or numbers, one per policy.

    Attributes:
        before: that reach its attention.
        stay: of these, that go on as themselves; None where there is no token stage.
        after: that reach its MLP, those that the reduction makes included.
        scored: False when a prior alone decides which stay.
    """

    before: Any
    stay: Any
    after: Any
    scored: bool = False


@dataclass(frozen=True)
class BlockMacs:
    """Where the MACs of one image go.

    Attributes:
        attention: of the half of each block before its token point, token scores and reduction included, (blocks,).
        mlp: of the half after it, (blocks,).
        outside: of patch embedding, head, and whatever else is outside the blocks.
    """

    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    outside: int

    @property
    def total(self) -> int:
        return sum(self.attention) + sum(self.mlp) + self.outside


class CostModel:
    """Prices what is kept of one model at one input size: (..., blocks) counts give (...) costs.

    Attributes:
        num_tokens, num_prefix: that reach the first block, and the prefix tokens of them.
        sizes: by dimension, units per block, int (blocks,): 0 where a block cannot lose any. Those the model can lose.
        everything: the model as it is, token stages that are built in included.
    """

    def __init__(self, anatomy: Anatomy, input_size: tuple[int, int] | None = None) -> None:
        size = anatomy.input_size[1:] if input_size is None else input_size
        grid = anatomy.grid_of(size)
        self.anatomy, self.size = anatomy, size
        self.num_prefix = anatomy.num_prefix_tokens
        self.num_tokens = grid[0] * grid[1] + self.num_prefix
        self.sizes = {name: np.array(sizes, dtype=np.int64) for name, sizes in anatomy.sizes.items() if sizes}
        self._params = {name: _each(anatomy, name, "params") for name in self.sizes}
        self._fixed_params = num_params(anatomy.model) - sum(int(self._params[d] @ n) for d, n in self.sizes.items())
        # By the tokens at the end, of which a reduction may make more; one number if they do not matter.
        self._outside = anatomy.fixed_macs(size, np.arange(2 * self.num_tokens))
        self._built_in = [_drop(stage) for stage in anatomy.stages]
        self.everything = Kept(self.sizes)
        if (plan := anatomy.built_in) is not None:
            self.everything = Kept(self.sizes, (), plan.reduction, plan.restore)

    # --- what it costs ------------------------------------------------------------------------------------------------

    def macs(self, kept: Kept) -> Any:
        """MACs of one image, (...).

        With N tokens, width D, a = heads * head_dim, m neurons a block has ``N D 3a + 2 N^2 a + N a D + 2 N D m`` of
        them; its family knows. In a token stage the MLP sees the tokens that are left, and the score row adds ``N a``
        (``N^2 a`` for mean attention received). LayerNorm, softmax, activations and biases are not counted, which is
        how `torch.utils.flop_counter.FlopCounterMode` counts.
        """
        attention, mlp, outside = self._parts(kept)
        return sum(attention) + sum(mlp) + outside

    def _parts(self, kept: Kept) -> tuple[list[Any], list[Any], Any]:
        """MACs of each block's halves, and of all outside the blocks, (...) each."""
        flow = self.flow(kept)
        counts = {name: np.asarray(kept.units.get(name, sizes)) for name, sizes in self.sizes.items()}
        halves: tuple[list[Any], list[Any]] = ([], [])
        for index, (block, tokens) in enumerate(zip(self.anatomy.blocks, flow, strict=True)):
            seen = (tokens.before, tokens.after)
            spent = [0 if rest is None else rest(seen[half]) for half, rest in enumerate(block.rest)]
            for name, units in block.units.items():
                half = units.after_point
                spent[half] = spent[half] + units.macs(counts[name][..., index], seen[half])
            if tokens.stay is not None:
                spent[0] = spent[0] + self._stage_macs(index, tokens, counts, kept.reduction)
            for of_all, macs in zip(halves, spent, strict=True):
                of_all.append(macs)
        at_end = self.num_tokens if kept.restore else flow[-1].after
        outside = self._outside[np.asarray(at_end, dtype=np.int64)] if np.ndim(self._outside) else self._outside
        return *halves, outside

    def _stage_macs(self, index: int, tokens: BlockTokens, counts: Mapping[str, np.ndarray], reduction: str) -> Any:
        """MACs of scoring the tokens and of reducing those that leave."""
        point = self.anatomy.blocks[index].point
        assert point is not None  # Anatomy.check has refused other models
        scoring: Any = point.attention.count
        if point.attention.dimension in self.anatomy.blocks[index].units:
            scoring = counts[point.attention.dimension][..., index]
        seen, width = tokens.before, point.attention.width
        rows = len(self.anatomy.class_rows) or seen
        scores = rows * seen * scoring * width if tokens.scored else 0
        keys = np.where(np.greater(scoring, 0), point.key_width or width, self.anatomy.dim)
        reduced = reduction_class(reduction).macs(tokens.stay - self.num_prefix, seen - tokens.stay, keys)
        return np.where(np.less(tokens.stay, seen), scores + reduced, 0)

    def flow(self, kept: Kept) -> list[BlockTokens]:
        """The tokens that each block sees."""
        if self.anatomy.tokens_at is not None:
            return [BlockTokens(before, None, after) for before, after in self.anatomy.tokens_at(self.size)]
        by_block = {drop.block: drop for drop in (*kept.drops, *self._built_in)}
        tokens: Any = np.float64(self.num_tokens)
        blocks = []
        for block in range(self.anatomy.depth):
            drop = by_block.get(block)
            if drop is None:
                blocks.append(BlockTokens(tokens, None, tokens))
                continue
            stay = tokens_kept(tokens, drop.keep, self.num_prefix)
            after = tokens_after(tokens, stay, kept.reduction)
            blocks.append(BlockTokens(tokens, stay, after, drop.scored))
            tokens = after
        return blocks

    def params(self, kept: Kept) -> Any:
        """Parameters, (...)."""
        counts = {name: np.asarray(kept.units.get(name, sizes)) for name, sizes in self.sizes.items()}
        return self._fixed_params + sum(counts[name] @ each for name, each in self._params.items())

    # --- what is kept -------------------------------------------------------------------------------------------------

    def kept(self, units: Mapping[str, Any], stages: Sequence[int], ratios: Any, tokens: TokenOptions) -> Kept:
        """What is kept with so many `units`, and `ratios` (..., stages) of the tokens that reach each stage."""
        drops = [
            TokenDrop(block, ratios[..., number], tokens.score != "dependence") for number, block in enumerate(stages)
        ]
        reduction, restore = tokens.reduction, self.anatomy.restores(tokens.restore)
        if self._built_in:
            reduction, restore = self.everything.reduction, self.everything.restore
        return Kept(units, drops, reduction, restore)

    def kept_by(self, policy: Policy, tokens: TokenOptions | None = None) -> Kept:
        """What the slim model of `policy` keeps.

        Raises:
            PolicyError: the policy does not fit the model.
        """
        counts = self.anatomy.counts(policy)
        return self.kept(counts.units, counts.stages, counts.tokens, TokenOptions() if tokens is None else tokens)

    def kept_by_plan(self, plan: Plan) -> Kept:
        """What the slim model of `plan` keeps."""
        units = {name: [len(indices) for indices in kept] for name, kept in plan.kept.items() if kept}
        tokens = self.everything if self._built_in else plan
        return Kept(units, [_drop(stage) for stage in plan.leaving], tokens.reduction, tokens.restore)

    def of_model(self) -> int:
        """MACs of the model as it is, built-in token stages included."""
        return int(self.macs(self.everything))

    def of_plan(self, plan: Plan) -> int:
        """MACs of the slim model of `plan`, exactly."""
        return int(self.macs(self.kept_by_plan(plan)))

    def by_block(self, plan: Plan | None = None) -> BlockMacs:
        """Where the MACs of the slim model of `plan` go; without one, those of the model as it is."""
        attention, mlp, outside = self._parts(self.everything if plan is None else self.kept_by_plan(plan))
        return BlockMacs(tuple(map(int, attention)), tuple(map(int, mlp)), int(outside))


def _drop(stage: Any) -> TokenDrop:
    return TokenDrop(stage.block, stage.keep, scored=stage.score != "dependence")


def _each(anatomy: Anatomy, dimension: str, attribute: str) -> np.ndarray:
    found = [0 if units is None else getattr(units, attribute) for units in anatomy.units(dimension)]
    return np.array(found, dtype=np.int64)


def num_params(model: nn.Module) -> int:
    """Parameters of any module."""
    return sum(p.numel() for p in model.parameters())


def image_size(input_size: Any) -> tuple[int, int] | None:
    """(height, width) of an input size given as a side, (height, width) or (channels, height, width).

    Raises:
        BudgetError: it is none of these.
    """
    if input_size is None:
        return None
    whole = isinstance(input_size, numbers.Integral)
    sides = (input_size, input_size) if whole else tuple(input_size) if isinstance(input_size, Sequence) else ()
    if len(sides) not in (2, 3) or not all(isinstance(side, numbers.Integral) and int(side) > 0 for side in sides):
        raise BudgetError(f"input_size={input_size!r}: expected a side, (height, width) or (channels, height, width)")
    return int(sides[-2]), int(sides[-1])
