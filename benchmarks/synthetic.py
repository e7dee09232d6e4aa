"""A stand-in for an accuracy that costs nothing to evaluate: 25 keep ratios of DeiT-S at 60 % of its MACs.

Blocks differ in how much they bear, losses grow faster than linearly, and what a block loses in heads weighs more
where it also lost neurons: as in real sensitivity curves. The budget is priced by the real cost model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import timm

from lightning_mdc.policy import default_stages
from lightning_mdc.policy_search.policy_space import PolicySpace

BLOCKS = 12


class Problem:
    """Maximise `value` over the points of `space` that cost no more than the budget."""

    budget = 0.6

    def __init__(self) -> None:
        rng = np.random.default_rng(2201_00043)
        shape = 1.0 + 0.8 * np.cos(np.linspace(0, np.pi, BLOCKS)) ** 2  # the ends bear more than the middle
        self.heads = shape * rng.lognormal(0.0, 1.5, BLOCKS)
        self.neurons = shape * rng.lognormal(0.0, 1.5, BLOCKS)
        self.powers = rng.uniform(1.4, 2.6, (2, BLOCKS))
        self.both = rng.lognormal(-0.5, 0.7, BLOCKS)
        self.tokens, self.token_power = 22.0, 2.2

    @cached_property
    def space(self) -> PolicySpace:
        return PolicySpace(timm.create_model("deit_small_patch16_224"), self.budget)

    @cached_property
    def _scalars(self) -> tuple[list[list[int]], tuple[int, ...], dict[float, float]]:
        costs = self.space.costs
        heads, neurons = costs.anatomy.units("heads"), costs.anatomy.units("neurons")
        widths = [units.width for units in heads]
        weights = [units.macs(1, 1) - 2 * units.width for units in heads], [units.macs(1, 1) for units in neurons]
        sizes = costs.sizes["heads"].tolist(), costs.sizes["neurons"].tolist()
        return [*sizes, widths, *weights], default_stages(BLOCKS), {}

    @property
    def uniform(self) -> np.ndarray:
        """The point (1, 25) where every search that can be told where to begin begins."""
        return self.space.nearest(self.space.uniform)[None]

    def value(self, points: np.ndarray) -> np.ndarray:
        """(n, 25) keep ratios -> (n,), in points of an accuracy that starts at 80."""
        lost = 1.0 - np.atleast_2d(points)
        heads, neurons, tokens = lost[:, :BLOCKS], lost[:, BLOCKS : 2 * BLOCKS], lost[:, -1]
        loss = (self.heads * heads ** self.powers[0]).sum(axis=1) + (self.neurons * neurons ** self.powers[1]).sum(
            axis=1
        )
        loss += (self.both * heads * neurons).sum(axis=1) + self.tokens * tokens**self.token_power
        return 80.0 - 2.0 * loss

    def utilisation(self, point: Sequence[float]) -> float:
        """`PolicySpace.utilisation` of one point (25,) in plain numbers, for those who ask a million times."""
        (all_heads, all_neurons, head_dims, head_weights, neuron_weights), stages, fixed = self._scalars
        costs, tokens, total = self.space.costs, float(self.space.costs.num_tokens), 0.0
        for block in range(BLOCKS):
            heads = math.floor(all_heads[block] * point[block] + 1e-6)
            neurons = math.floor(all_neurons[block] * point[BLOCKS + block] + 1e-6)
            width = heads * head_dims[block]
            total += tokens * heads * head_weights[block] + 2 * tokens * tokens * width
            if block in stages:
                kept = max(math.floor(tokens * point[-1] + 1e-6), costs.num_prefix + 1)
                if kept < tokens - 1:  # else nothing is saved, and nothing dropped
                    total += len(costs.anatomy.class_rows) * tokens * width
                    tokens = kept + 1.0
            total += tokens * neurons * neuron_weights[block]
        if tokens not in fixed:
            fixed[tokens] = float(costs.anatomy.fixed_macs(costs.size, tokens))
        return (total + fixed[tokens]) / self.space.pricing.limits["macs"]
