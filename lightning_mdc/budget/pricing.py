"""What policies of one model cost, as shares of a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lightning_mdc.budget.cost_model import CostModel, TokenDrop
from lightning_mdc.budget.latency import LatencyTable
from lightning_mdc.budget.limits import Budget
from lightning_mdc.budget.measuring import measure_latency_table
from lightning_mdc.models import Sites
from lightning_mdc.policy import Policy


class Pricing:
    """Prices counts of heads and neurons and token drops against every limit of a budget; see `CostModel`.

    Where latency is limited and the budget brings no table, it is measured: for half a minute or more, the first time.
    In a distributed run all ranks have to ask, the first one measures.

    Attributes:
        budget: with its latency table, where there is a limit of latency.
        table: that table, or None.
        dense: costs of the model as it is by the names of `Budget`: MACs, parameters, seconds per image.
        limits: what the slim model may cost, absolute, by the same names.

    Raises:
        BudgetError: the latency table is of another model, or cannot be measured; see `measure_latency_table`.
    """

    def __init__(self, costs: CostModel, budget: Budget) -> None:
        self.costs, self.budget = costs, budget
        self.table = None if budget.latency is None else latency_table(budget, costs.sites)
        self.dense = {"macs": float(costs.of_model()), "params": float(costs.params(costs.heads, costs.neurons))}
        if self.table is not None:
            self.budget = replace(budget, table=self.table, batch_size=None, device=None)
            self.dense["latency"] = self.table.of_dense(costs)
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

    def cost(
        self, name: str, heads: Any, neurons: Any, drops: Sequence[TokenDrop] = (), fuse: bool = True
    ) -> np.ndarray:
        """What the limit `name` counts, (...). heads, neurons: (..., blocks)."""
        if name == "macs":
            return np.asarray(self.costs.macs(heads, neurons, drops, fuse=fuse))
        if name == "params":
            return np.asarray(self.costs.params(heads, neurons))
        assert self.table is not None  # there is a limit of latency
        return np.asarray(self.table.seconds(self.costs, heads, neurons, drops, fuse=fuse))

    def utilisations(
        self, heads: Any, neurons: Any, drops: Sequence[TokenDrop] = (), fuse: bool = True
    ) -> dict[str, np.ndarray]:
        """Cost / limit, by the limit's name, (...): affordable up to 1. heads, neurons: (..., blocks)."""
        return {name: self.cost(name, heads, neurons, drops, fuse) / limit for name, limit in self.limits.items()}

    def utilisation(self, policy: Policy, fuse: bool = True) -> float:
        """Cost / limit of one policy, under the tightest limit."""
        heads, neurons, drops = self.costs.arguments_of(policy)
        return max(float(share) for share in self.utilisations(heads, neurons, drops, fuse=fuse).values())

    def in_words(self, name: str, utilisation: float) -> str:
        """So much of the limit `name` as the budget puts it: a fraction of dense, or an absolute number."""
        limit = getattr(self.budget, name)
        if isinstance(limit, str):
            return f"{utilisation * self.limits[name] * 1e3:.4g}ms"
        return f"{utilisation * limit:.4g}" if limit <= 1 else f"{utilisation * limit:.4g} {name}"


def latency_table(budget: Budget, sites: Sites) -> LatencyTable:
    """The table that a limit of latency is priced by: the budget's own, or one that is measured.

    Raises:
        BudgetError: it is of another model, or cannot be measured; see `measure_latency_table`.
    """
    table: Any = budget.table
    if table is None:
        table = measure_latency_table(sites.model, budget.batch_size or 1, device=budget.device)
    elif isinstance(table, Mapping):
        table = LatencyTable.from_fields(table)
    elif not isinstance(table, LatencyTable):
        table = LatencyTable.load(table)
    table.check(sites)
    return table
