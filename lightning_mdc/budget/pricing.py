"""What policies of one model cost, as shares of a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from lightning_mdc.budget.cost_model import CostModel, Kept
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
        prices: by the names of `Budget`, what prices what is kept: MACs, parameters, seconds per image, (...).
        limits: what the slim model may cost, absolute, by the same names.

    Raises:
        BudgetError: the latency table is of another model, or cannot be measured; see `measure_latency_table`.
    """

    def __init__(self, costs: CostModel, budget: Budget) -> None:
        self.costs, self.budget = costs, budget
        self.prices: dict[str, Callable[[Kept], Any]] = {"macs": costs.macs, "params": costs.params}
        if budget.latency is not None:
            table = latency_table(budget, costs.sites)
            self.budget = replace(budget, table=table, batch_size=None, device=None)
            self.prices["latency"] = partial(table.seconds, costs)
        self.limits = self.budget.limits({name: float(of(costs.everything)) for name, of in self.prices.items()})

    @property
    def fraction(self) -> float | None:
        """The budget as a plain number: a fraction of the dense MACs and nothing else; None if it is not."""
        limit = self.budget.macs
        return limit if set(self.limits) == {"macs"} and limit is not None and limit <= 1 else None

    @property
    def rewards_dropping_tokens(self) -> bool:
        """Whether fewer tokens cost less: they save no parameter."""
        return "macs" in self.limits or "latency" in self.limits

    def utilisations(self, kept: Kept) -> dict[str, Any]:
        """Cost / limit, by the limit's name, (...): affordable up to 1."""
        return {name: self.prices[name](kept) / limit for name, limit in self.limits.items()}

    def utilisation(self, policy: Policy, fuse: bool) -> float:
        """Cost / limit of one policy, under the tightest limit."""
        kept = replace(self.costs.kept_by(policy), fuse=fuse)
        return max(float(share) for share in self.utilisations(kept).values())

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
