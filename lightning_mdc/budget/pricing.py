"""What policies of one model cost, as shares of a budget."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning_mdc.budget.cost_model import CostModel, Kept
from lightning_mdc.budget.costs import COSTS
from lightning_mdc.budget.limits import Budget
from lightning_mdc.errors import PlanError, check_kind
from lightning_mdc.policy import Policy, TokenOptions


class Pricing:
    """Prices what is kept against every limit of a budget; see `CostModel`.

    Where latency is limited and the budget brings no table, it is measured; in a distributed run all ranks have to ask.

    Attributes:
        budget: with its latency table, where there is a limit of latency.
        tokens: what happens at a token stage.
        prices: by the names of `Budget`, what prices what is kept: MACs, parameters, seconds per image, (...).
        limits: what the slim model may cost, absolute, by the same names.

    Raises:
        BudgetError: the latency table is of another model, or cannot be measured; see `measure_latency_table`.
    """

    def __init__(self, costs: CostModel, budget: Budget, tokens: TokenOptions | None = None) -> None:
        check_kind("tokens", tokens, TokenOptions, PlanError)
        self.costs, self.budget = costs, budget
        self.tokens = TokenOptions() if tokens is None else tokens
        self.prices: dict[str, Callable[[Kept], Any]] = {}
        self.limits: dict[str, float] = {}
        for name, limit in budget.limits.items():
            cost = COSTS[name]
            given = {option: budget.options[option] for option in cost.options if option in budget.options}
            options = cost.settled(given, costs, self.tokens)
            self.budget = self.budget.replaced(**dict.fromkeys(cost.options) | dict(options))
            self.prices[name] = partial(cost.price, costs, options=options)
            self.limits[name] = cost.absolute(limit, float(self.prices[name](costs.everything)))

    @property
    def fraction(self) -> float | None:
        """The budget as a plain number: a fraction of the dense MACs and nothing else; None if it is not."""
        limit = self.budget.limits.get("macs")
        return limit if len(self.limits) == 1 and isinstance(limit, float) and limit <= 1 else None

    @property
    def rewards_dropping_tokens(self) -> bool:
        """Whether fewer tokens cost less: they save no parameter."""
        return any(COSTS[name].rewards_dropping_tokens for name in self.limits)

    def utilisations(self, kept: Kept) -> dict[str, Any]:
        """Cost / limit, by the limit's name, (...): affordable up to 1."""
        return {name: self.prices[name](kept) / limit for name, limit in self.limits.items()}

    def utilisation(self, policy: Policy) -> float:
        """Cost / limit of one policy, under the tightest limit."""
        return max(map(float, self.utilisations(self.costs.kept_by(policy, self.tokens)).values()))

    def in_words(self, name: str, utilisation: float) -> str:
        """So much of the limit `name` as the budget puts it: a fraction of dense, or an absolute number."""
        return COSTS[name].in_words(self.budget.limits[name], utilisation, self.limits[name])
