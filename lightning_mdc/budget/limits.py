"""What a slim model may cost: limits of MACs, parameters and latency."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_mdc.budget.latency import LatencyTable
from lightning_mdc.errors import BudgetError, as_number, check_whole

_DURATION = re.compile(r"\s*((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(s|ms|us|µs)\s*", re.IGNORECASE | re.ASCII)
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


@dataclass(frozen=True, repr=False)
class Budget:
    """What the slim model may cost. Several limits hold together.

    Latency is measured, not counted: where a policy is priced, the parts of the model are timed once, for half a minute
    or more, on the device it is for, and the table is kept for later (see `measure_latency_table`). A fraction of it is
    one of the dense model's time.

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
            number = as_number(limit)
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
            number = as_number(self.latency)
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
        return f"Budget({', '.join(f'{name}={value!r}' for name, value in self.as_dict().items())})"

    def as_dict(self) -> dict[str, float | str | int]:
        """What was given by name, JSON-ready; all but the table."""
        given = {name: getattr(self, name) for name in ("macs", "params", "latency", "batch_size", "device")}
        return {name: value for name, value in given.items() if value is not None}

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
    match = _DURATION.fullmatch(text)
    return math.nan if match is None else float(match[1]) * _SECONDS[match[2].lower()]


def as_budget(budget: float | Budget) -> Budget:
    """A plain number is a fraction of the dense MACs.

    Raises:
        BudgetError: the number is no fraction in (0, 1].
    """
    if isinstance(budget, Budget):
        return budget
    fraction = as_number(budget)
    if fraction is None or not 0 < fraction <= 1:
        raise BudgetError(
            f"budget={budget!r}: a plain number is a fraction of the dense MACs in (0, 1]; "
            "for absolute limits pass Budget(macs=1.84e9), Budget(params=...) or Budget(latency='1.8ms')"
        )
    return Budget(macs=fraction)
