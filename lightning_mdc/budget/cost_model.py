"""What the costs of a vision transformer are computed from: its units per block, and the tokens that flow through it.

`CostModel` puts the closed forms of `macs` and `params` together; `latency` adds up what was measured.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from lightning_mdc.budget.macs import BlockMacs, attention_macs, mlp_macs, token_score_macs
from lightning_mdc.budget.params import num_params, params_per_unit, weights_per_unit
from lightning_mdc.errors import BudgetError
from lightning_mdc.models import Sites, UnitSite, find_sites
from lightning_mdc.policy import Plan, Policy

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
        heads, neurons: how many, (..., blocks); may be fractional (a solver's relaxation).
        drops: where tokens leave, beside the token stages that are built in.
        fuse: whether tokens that leave are averaged into one that stays.
    """

    heads: Any
    neurons: Any
    drops: Sequence[TokenDrop] = ()
    fuse: bool = True


@dataclass(frozen=True)
class BlockTokens:
    """How many tokens one block sees: arrays, or numbers, one per policy.

    Attributes:
        attention: that reach its attention.
        mlp: that reach its MLP, the fused token included.
        dropped: whether any leave in between; plain False where there is no token stage.
        scored: False when a prior alone decides which.
    """

    attention: Any
    mlp: Any
    dropped: Any
    scored: bool


class CostModel:
    """Prices what is kept of one model at one input size: (..., blocks) counts give (...) costs."""

    def __init__(self, sites: Sites, input_size: tuple[int, int] | None = None) -> None:
        size = sites.input_size[1:] if input_size is None else input_size
        grid = sites.grid_of(size)
        self.sites = sites
        self.size = size
        self.num_prefix = sites.num_prefix_tokens
        self.num_tokens = grid[0] * grid[1] + sites.num_prefix_tokens
        self.num_rows = len(sites.class_rows)
        heads, neurons = [b.heads for b in sites.blocks], [b.neurons for b in sites.blocks]
        self.heads = _each(heads, lambda site: site.num_units)
        self.neurons = _each(neurons, lambda site: site.num_units)
        self.head_dims = _each(heads, lambda site: site.unit_width)
        # Weights of the Linear layers per unit = MACs per token and unit.
        self.head_weights, self.neuron_weights = _each(heads, weights_per_unit), _each(neurons, weights_per_unit)
        self.head_params, self.neuron_params = _each(heads, params_per_unit), _each(neurons, params_per_unit)
        prunable = int(self.head_params @ self.heads + self.neuron_params @ self.neurons)
        self.fixed_params = num_params(sites.model) - prunable
        self.built_in = [_drop(stage, None) for stage in sites.stages]  # of a model that is already slim

    def tokens_left(self, num_tokens: Any, keep: Any) -> Any:
        """Tokens that go on (fused one not counted) of `num_tokens` at ratio `keep`; whole counts stay whole."""
        return np.minimum(num_tokens, np.maximum(np.floor(num_tokens * keep + 1e-6), self.num_prefix + 1))

    def macs(self, kept: Kept) -> Any:
        """MACs of one image, (...)."""
        attention, mlp, outside = self._parts(kept)
        return sum(attention) + sum(mlp) + outside

    def _parts(self, kept: Kept) -> tuple[list[Any], list[Any], Any]:
        """MACs of each block's attention (token scores included) and MLP, and of all outside the blocks, (...) each."""
        heads, neurons = np.asarray(kept.heads), np.asarray(kept.neurons)
        flow = self.flow(kept)
        attention, mlp = [], []
        for block, tokens in enumerate(flow):
            of_block = tokens.attention, heads[..., block], self.head_dims[block]
            spent = attention_macs(*of_block, self.head_weights[block])
            if tokens.dropped is not False:
                spent = spent + np.where(tokens.dropped & tokens.scored, token_score_macs(*of_block, self.num_rows), 0)
            attention.append(spent)
            mlp.append(mlp_macs(tokens.mlp, neurons[..., block], self.neuron_weights[block]))
        return attention, mlp, self.sites.fixed_macs(self.size, flow[-1].mlp)

    def flow(self, kept: Kept) -> list[BlockTokens]:
        """The tokens that each block sees."""
        by_block = {drop.block: drop for drop in (*kept.drops, *self.built_in)}
        tokens: Any = np.asarray(self.num_tokens, dtype=np.float64)
        blocks = []
        for block in range(self.sites.depth):
            before, drop = tokens, by_block.get(block)
            dropped: Any = False
            if drop is not None:
                left = self.tokens_left(tokens, drop.keep)
                dropped = left < tokens
                tokens = np.where(dropped, left + kept.fuse, tokens)
            blocks.append(BlockTokens(before, tokens, dropped, drop is not None and drop.scored))
        return blocks

    def params(self, kept: Kept) -> Any:
        """Parameters, (...)."""
        prunable = np.asarray(kept.heads) @ self.head_params + np.asarray(kept.neurons) @ self.neuron_params
        return self.fixed_params + prunable

    # --- what is kept ---------------------------------------------------------------------------------------------

    @property
    def everything(self) -> Kept:
        """The model as it is."""
        return Kept(self.heads, self.neurons, fuse=self.sites.fuse)

    def kept_by(self, policy: Policy) -> Kept:
        """What the slim model of `policy` keeps.

        Raises:
            PolicyError: the policy does not fit the model.
        """
        counts = self.sites.counts(policy)
        drops = [TokenDrop(block, keep) for block, keep in zip(counts.stages, counts.tokens, strict=True)]
        return self._kept(counts.heads, counts.neurons, drops, self.sites.fuse)

    def kept_by_plan(self, plan: Plan) -> Kept:
        """What the slim model of `plan` keeps."""
        drops = [_drop(stage, len(plan.heads[stage.block]) if plan.heads else None) for stage in plan.tokens]
        heads, neurons = [len(kept) for kept in plan.heads], [len(kept) for kept in plan.neurons]
        return self._kept(heads, neurons, drops, self.sites.fuse if self.built_in else plan.fuse)

    def _kept(self, heads: Any, neurons: Any, drops: list[TokenDrop], fuse: bool) -> Kept:
        # A dimension that cannot be cut has no counts; it keeps what it has.
        return Kept(heads if len(heads) else self.heads, neurons if len(neurons) else self.neurons, drops, fuse)

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


def _drop(stage: Any, num_heads: int | None) -> TokenDrop:
    return TokenDrop(stage.block, stage.keep, scored=stage.score != "dependence" or num_heads == 0)


def _each(sites: Sequence[UnitSite | None], value: Callable[[UnitSite], int]) -> np.ndarray:
    return np.array([0 if site is None else value(site) for site in sites], dtype=np.int64)


def macs(model: nn.Module, input_size: InputSize | None = None) -> int:
    """Multiply-accumulates of one image through `model` (dense or slim), the whole model counted.

    Equals ``FlopCounterMode().get_total_flops() / 2`` in eval mode. `input_size` is a side, (height, width) or
    (channels, height, width) in pixels; None means the model's own.

    Raises:
        UnsupportedModelError: no adapter knows the model, or it cannot take that input size.
    """
    return CostModel(find_sites(model), image_size(input_size)).of_model()


def policy_macs(model: nn.Module, policy: Policy, input_size: InputSize | None = None) -> int:
    """MACs of the slim model that `policy` makes of `model`, without making it.

    Token scores are taken as by attention, the default; see `plan_macs` for a plan that says otherwise.

    Raises:
        PolicyError: the policy does not fit the model.
    """
    costs = CostModel(find_sites(model), image_size(input_size))
    return int(costs.macs(costs.kept_by(policy)))


def plan_macs(model: nn.Module, plan: Plan, input_size: InputSize | None = None) -> int:
    """MACs of the slim model that `plan` makes of the dense `model`, without making it.

    Raises:
        PlanError: the plan is for another model.
    """
    sites = find_sites(model)
    sites.check(plan)
    return CostModel(sites, image_size(input_size)).of_plan(plan)


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
