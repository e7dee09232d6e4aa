"""Parameters as a cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_mdc.budget.cost_model import CostModel, Kept
from lightning_mdc.budget.costs import Cost, register


class Params(Cost):
    """Parameters of the vision transformer."""

    name = "params"
    rewards_dropping_tokens = False

    def price(self, costs: CostModel, kept: Kept, options: Mapping[str, Any]) -> Any:
        return costs.params(kept)


register(Params())
