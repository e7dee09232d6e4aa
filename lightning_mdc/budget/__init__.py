"""What does a policy cost? Closed-form MACs and parameters, budgets, and the uniform policy that meets one."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_mdc.budget.costs import BlockMacs, CostModel, TokenDrop, num_params
from lightning_mdc.errors import BudgetError
from lightning_mdc.models import find_sites
from lightning_mdc.policy import Plan, Policy

__all__ = [
    "BlockMacs",
    "Budget",
    "CostModel",
    "TokenDrop",
    "as_budget",
    "image_size",
    "macs",
    "num_params",
    "plan_macs",
    "policy_macs",
]

InputSize = int | Sequence[int]


@dataclass(frozen=True)
class Budget:
    """What the slim model may cost. Each limit is a fraction of dense in (0, 1], or an absolute number above 1.

    Several limits hold together. Latency is not priced yet: a table of measured block times has to come first.

    Raises:
        BudgetError: no limit, or one that is not positive and finite.
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        if self.latency is not None:
            raise BudgetError(f"latency={self.latency!r}: latency budgets are not available yet; use macs= or params=")
        if self.macs is None and self.params is None:
            raise BudgetError("Budget() limits nothing; give macs= or params=")
        for name in ("macs", "params"):
            limit = getattr(self, name)
            if limit is None:
                continue
            number = _number(limit)
            if number is None or not 0 < number < math.inf:
                raise BudgetError(
                    f"{name}={limit!r:.80}: expected a fraction of dense in (0, 1] or an absolute number like 1.84e9"
                )
            object.__setattr__(self, name, number)  # a tensor's value, say

    def limits(self, dense_macs: float, dense_params: float) -> dict[str, float]:
        """Absolute limits by name, MACs and parameters."""
        dense = {"macs": dense_macs, "params": dense_params}
        given = {name: getattr(self, name) for name in dense if getattr(self, name) is not None}
        return {name: limit * dense[name] if limit <= 1 else float(limit) for name, limit in given.items()}


def as_budget(budget: float | Budget) -> Budget:
    """A plain number is a fraction of the dense MACs.

    Raises:
        BudgetError: the number is no fraction in (0, 1].
    """
    if isinstance(budget, Budget):
        return budget
    fraction = _number(budget)
    if fraction is None or not 0 < fraction <= 1:
        raise BudgetError(
            f"budget={budget!r}: a plain number is a fraction of the dense MACs in (0, 1]; "
            "for absolute limits pass Budget(macs=1.84e9) or Budget(params=...)"
        )
    return Budget(macs=fraction)


def _number(value: Any) -> float | None:
    """`value` as a float if it is one number (a tensor or numpy scalar is, text and booleans are not)."""
    if isinstance(value, (bool, str)):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


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
    sites = find_sites(model)
    return CostModel(sites, image_size(input_size)).of_counts(sites.counts(policy))


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
