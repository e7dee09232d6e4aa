"""What a slim model may be limited in: one class per cost, known by its name. To add one, `register` it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from lightning_mdc.budget.cost_model import CostModel, Kept
from lightning_mdc.errors import BudgetError, as_number
from lightning_mdc.policy import TokenOptions


class Cost(ABC):
    """A cost of slim models, known before they are made.

    Attributes:
        name: by which `Budget` takes a limit of it.
        options: what else `Budget` takes for it, and whether that makes another budget (else it is a source only).
        rewards_dropping_tokens: whether fewer tokens cost less.
        remedy: what may help where a limit cannot be reached, or "".
    """

    name: ClassVar[str]
    options: ClassVar[Mapping[str, bool]] = {}
    rewards_dropping_tokens: ClassVar[bool] = True
    remedy: ClassVar[str] = ""

    @abstractmethod
    def price(self, costs: CostModel, kept: Kept, options: Mapping[str, Any]) -> Any:
        """What is `kept` costs, (...): of thousands of slim models at once."""

    def checked(self, limit: Any, options: Mapping[str, Any]) -> float | str:
        """The limit as a plain number, a fraction of dense up to 1 and absolute above it.

        Raises:
            BudgetError: it is none; or an option is wrong.
        """
        number = as_number(limit)
        if number is None or not 0 < number < math.inf:
            raise BudgetError(
                f"{self.name}={limit!r:.80}: expected a fraction of dense in (0, 1] or an absolute number like 1.84e9"
            )
        return number

    def settled(self, options: Mapping[str, Any], costs: CostModel, tokens: TokenOptions) -> Mapping[str, Any]:
        """`options` with all that prices of this model are computed from."""
        return options

    def absolute(self, limit: Any, dense: float) -> float:
        """What a checked limit allows, given what the dense model costs."""
        return limit * dense if limit <= 1 else float(limit)

    def in_words(self, limit: Any, share: float, absolute: float) -> str:
        """That share of the limit, in the limit's own terms."""
        return f"{share * limit:.4g}" if limit <= 1 else f"{share * limit:.4g} {self.name}"


COSTS: dict[str, Cost] = {}
C = TypeVar("C", bound=Cost)


def register(cost: C) -> C:
    """Make a cost known by its name: ``Budget(NAME=limit)``."""
    COSTS[cost.name] = cost
    return cost
