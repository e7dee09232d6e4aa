"""What policies of one model cost as shares of a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_mdc.budget import Budget
from lightning_mdc.budget.costs import CostModel, TokenDrop
from lightning_mdc.budget.latency_table import LatencyTable
from lightning_mdc.policy import Policy


class Pricing:
    """Prices counts of heads and neurons and token drops against every limit of a budget; see `CostModel`.

    Attributes:
        budget: with its latency table, where there is a limit of latency.
        limits: absolute, by name: MACs, parameters, seconds per image.
        dense: the model as it is, by the same names.
    """

    def __init__(self, costs: CostModel, budget: Budget) -> None:
        self.costs, self.budget = costs, budget.measured(costs.sites)
        self.dense = {"macs": float(costs.of_model()), "params": float(costs.params(costs.heads, costs.neurons))}
        if isinstance(self.budget.table, LatencyTable):
            self.dense["latency"] = self.budget.table.of_dense(costs)
        self.limits = self.budget.limits(self.dense)

    @property
    def fraction(self) -> float | None:
        """The budget as a plain number: a fraction of the dense MACs and nothing else; None if it is not."""
        limit = self.budget.macs
        return limit if set(self.limits) == {"macs"} and limit is not None and limit <= 1 else None

    @property
    def rewards_dropping_tokens(self) -> bool:
        """Whether fewer tokens cost less: they save no parameter."""
        return "macs" in self.limits or "latency" in self.limits

    def loads(
        self, heads: Any, neurons: Any, drops: Sequence[TokenDrop] = (), fuse: bool = True
    ) -> dict[str, np.ndarray]:
        """Shares of each limit, by name, (...): affordable up to 1. heads, neurons: (..., blocks)."""
        loads = {}
        for name, limit in self.limits.items():
            if name == "macs":
                cost = self.costs.macs(heads, neurons, drops, fuse=fuse)
            elif name == "params":
                cost = self.costs.params(heads, neurons)
            else:
                assert isinstance(self.budget.table, LatencyTable)
                cost = self.budget.table.seconds(self.costs, heads, neurons, drops, fuse=fuse)
            loads[name] = np.asarray(cost) / limit
        return loads

    def of_policy(self, policy: Policy, fuse: bool = True) -> float:
        """The tightest limit's share for one policy."""
        heads, neurons, drops = self.costs.arguments_of(policy)
        return max(float(load) for load in self.loads(heads, neurons, drops, fuse=fuse).values())

    def said(self, name: str, load: float) -> str:
        """A share of the limit `name` as the budget puts it: a fraction of dense, or an absolute number."""
        limit = getattr(self.budget, name)
        if isinstance(limit, str):
            return f"{load * self.limits[name] * 1e3:.4g}ms"
        return f"{load * limit:.4g}" if limit <= 1 else f"{load * limit:.4g} {name}"
