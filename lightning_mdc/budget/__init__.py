"""What does a policy cost? Closed-form MACs and parameters, measured latency, budgets, and the uniform policy."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from lightning_mdc.budget.costs import BlockMacs, CostModel, TokenDrop, num_params
from lightning_mdc.budget.latency_table import LatencyTable
from lightning_mdc.errors import BudgetError, check_whole
from lightning_mdc.models import Sites, find_sites
from lightning_mdc.policy import Plan, Policy

__all__ = [
    "BlockMacs",
    "Budget",
    "CostModel",
    "LatencyTable",
    "TokenDrop",
    "as_budget",
    "image_size",
    "macs",
    "num_params",
    "plan_macs",
    "policy_macs",
]

InputSize = int | Sequence[int]


_DURATION = re.compile(r"\s*((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(s|ms|us|µs)\s*", re.IGNORECASE | re.ASCII)
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


@dataclass(frozen=True, repr=False)
class Budget:
    """What the slim model may cost. Several limits hold together.

    Latency is measured, not counted: the parts of the model are timed once, for half a minute or more, on the device it
    is for, and the table is kept for later (see `LatencyTable.of`). A fraction of it is one of the dense model's time.

    Args:
        macs, params: a fraction of dense in (0, 1], or an absolute number above 1.
        latency: a fraction of dense in (0, 1], or time per image with its unit, ``"1.8ms"`` or ``"250us"``.
        batch_size: images per forward pass, for latency; None: 1.
        device: where to measure latency; None: where the model is.
        table: a `LatencyTable`, its file, or what was read of its JSON, to take latency from instead of measuring it
            here: from the device the model will run on, say.

    Raises:
        BudgetError: no limit, or one that is not positive and finite; or something that latency alone has and no
            latency.
    """

    macs: float | None = None
    params: float | None = None
    latency: float | str | None = None
    batch_size: int | None = None
    device: str | None = None
    table: LatencyTable | Mapping[str, Any] | str | Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.macs is None and self.params is None and self.latency is None:
            raise BudgetError("Budget() limits nothing; give macs=, params= or latency=")
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
        self._check_latency()

    def _check_latency(self) -> None:
        given = {name: getattr(self, name) for name in ("batch_size", "device", "table")}
        given = {name: value for name, value in given.items() if value is not None}
        if self.latency is None:
            if given:
                name, value = next(iter(given.items()))
                raise BudgetError(f"{name}={value!r:.80}: is for a limit of latency, and there is none; give latency=")
            return
        if isinstance(self.latency, str):
            if not 0 < _seconds(self.latency) < math.inf:
                raise BudgetError(
                    f"latency={self.latency!r:.80}: expected a time per image such as '1.8ms', '250us' or '0.1s', or a "
                    "fraction of dense in (0, 1]"
                )
        else:
            number = _number(self.latency)
            if number is None or not 0 < number <= 1:
                raise BudgetError(
                    f"latency={self.latency!r:.80}: a plain number is a fraction of dense in (0, 1]; for a time per "
                    "image give its unit, latency='1.8ms'"
                )
            object.__setattr__(self, "latency", number)
        check_whole("batch_size", self.batch_size, 1, BudgetError, or_none="the default")
        if self.table is not None and len(given) > 1:
            name, value = next(iter(given.items()))
            raise BudgetError(f"{name}={value!r}: a table says itself what it is of; give {name}= or table=")

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{name}={value!r}' for name, value in self.facts().items() if value is not None)})"

    def facts(self) -> dict[str, Any]:
        """JSON-ready, without the table."""
        # Studies from before there were latency budgets have these three.
        facts: dict[str, Any] = {"macs": self.macs, "params": self.params, "latency": self.latency}
        if self.latency is not None:
            facts |= {"batch_size": self.batch_size, "device": self.device}
        return facts

    def measured(self, sites: Sites) -> Budget:
        """This budget with the latency table of the model of `sites`, if latency is limited: measured, or read.

        In a distributed run all ranks have to ask: the first one measures.

        Raises:
            BudgetError: the table is of another model, or cannot be measured; see `LatencyTable.of`.
        """
        if self.latency is None:
            return self
        table: Any = self.table
        if table is None:
            table = LatencyTable.of(sites.model, self.batch_size or 1, device=self.device)
        elif isinstance(table, Mapping):
            table = LatencyTable.from_fields(table)
        elif not isinstance(table, LatencyTable):
            table = LatencyTable.load(table)
        table.check(sites)
        return replace(self, table=table, batch_size=None, device=None)

    def limits(self, dense: Mapping[str, float]) -> dict[str, float]:
        """Absolute limits by name, of what `dense` knows: MACs, parameters, seconds per image."""
        limits = {}
        for name, whole in dense.items():
            limit = getattr(self, name)
            if isinstance(limit, str):
                limits[name] = _seconds(limit)
            elif limit is not None:
                limits[name] = limit * whole if limit <= 1 else float(limit)
        return limits


def _seconds(text: str) -> float:
    """Of a duration such as ``"1.8ms"``; NaN if it is none."""
    found = _DURATION.fullmatch(text)
    return math.nan if found is None else float(found[1]) * _SECONDS[found[2].lower()]


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
            "for absolute limits pass Budget(macs=1.84e9), Budget(params=...) or Budget(latency='1.8ms')"
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
