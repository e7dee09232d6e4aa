"""The whole numbers of units and tokens that policies of one model may keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_mdc.budget.cost_model import CostModel, Kept
from lightning_mdc.budget.latency_table import ALIGNMENT
from lightning_mdc.policy import TOKENS, Policy, Ratios, Space, TokenOptions
from lightning_mdc.tokens.flow import tokens_after, tokens_kept
from lightning_mdc.tokens.reduction import reduction_class

Counts = dict[str, np.ndarray]


class Grid:
    """How many units may stay in each block, and tokens at each stage, where `dimensions` are pruned.

    Attributes:
        sizes: by dimension, units per block, (blocks,).
        fine: the dimensions whose units are single channels: they take up what rounding others left.
        step: by dimension, what units are kept in multiples of; a block's last, incomplete group only with all others.
        least: by dimension, the fewest that a block keeps, (blocks,): all of what is not pruned.
        stages: the blocks of the token stages; none if tokens cannot leave.
        extra: how many tokens go on beside those that stay: to have no more of them leave saves nothing.

    Raises:
        PolicyError: `space` has a token stage at a block that the model has not.
    """

    def __init__(
        self, costs: CostModel, dimensions: Sequence[str], space: Space, tokens: TokenOptions | None = None
    ) -> None:
        self.costs, self.space = costs, space
        self.options = TokenOptions() if tokens is None else tokens
        self.sizes = costs.sizes
        stages = costs.anatomy.check_stages(space.stages)
        self.stages = () if TOKENS in costs.anatomy.reasons else stages
        self.extra = reduction_class(self.options.reduction).extra
        widths = {d: {units.width for units in costs.anatomy.units(d) if units is not None} for d in self.sizes}
        self.fine = tuple(name for name in self.sizes if widths[name] == {1})
        self.step, self.least = {}, {}
        for name, sizes in self.sizes.items():
            self.step[name] = self._step(sizes) if name in self.fine else 1
            whole = -(-space.least(name) // self.step[name]) * self.step[name]
            self.least[name] = np.minimum(sizes, whole) if name in dimensions else sizes

    def _step(self, sizes: np.ndarray) -> int:
        if self.space.round_to is None:
            # In a narrow block so many at a time would be too coarse.
            return ALIGNMENT if (sizes[sizes > 0] >= 512).all() else 1
        return self.space.round_to

    def tokens(self, ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that reach each stage and that stay there, where `ratios` (..., stages) of them are asked for.

        All stay where the ones that the reduction makes would take the places of those that leave.
        """
        reaching, stay = np.empty_like(ratios), np.empty_like(ratios)
        tokens: Any = np.full(ratios.shape[:-1], float(self.costs.num_tokens))
        for stage in range(ratios.shape[-1]):
            left = tokens_kept(tokens, ratios[..., stage], self.costs.num_prefix)
            left = np.where(left + self.extra >= tokens, tokens, left)
            reaching[..., stage], stay[..., stage] = tokens, left
            tokens = tokens_after(tokens, left, self.options.reduction)
        return reaching, stay

    def ratios(self, stay: Sequence[int]) -> np.ndarray:
        """So many tokens at each stage as ratios of what reaches it, e.g. 137 of 197, then 96 of 138: (stages,)."""
        return np.array([count / tokens for count, tokens in zip(stay, self.reaching(stay), strict=False)])

    def reaching(self, stay: Sequence[int]) -> list[int]:
        """Tokens that reach each stage, and what is behind the last one."""
        tokens = [self.costs.num_tokens]
        for count in stay:
            tokens.append(int(tokens_after(tokens[-1], count, self.options.reduction)))
        return tokens

    def kept(self, units: Mapping[str, Any], ratios: Any) -> Kept:
        """What is kept, with `ratios` (..., stages) of the tokens that reach each stage."""
        return self.costs.kept(units, self.stages, ratios, self.options)

    def policy(self, units: Counts, ratios: np.ndarray) -> Policy:
        """The policy that keeps so many units, (blocks,) each, and `ratios` (stages,) of what reaches each stage.

        What the model cannot lose, or has none of, is kept at 1.
        """
        kept: dict[str, Ratios] = {
            name: np.where(sizes > 0, units[name] / np.maximum(sizes, 1), 1.0).tolist()
            for name, sizes in self.sizes.items()
        }
        if TOKENS not in self.costs.anatomy.reasons:
            kept[TOKENS] = ratios.tolist() or 1.0
        return Policy(**kept, stages=self.space.stages, input_size=self.costs.size)
