"""Measured seconds per image as a cost."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_mdc.budget.cost_model import CostModel, Kept
from lightning_mdc.budget.costs import Cost, register
from lightning_mdc.budget.latency_table import LatencyTable
from lightning_mdc.budget.measuring import measure_latency_table
from lightning_mdc.errors import BudgetError, as_number, check_whole
from lightning_mdc.policy import TokenOptions

_DURATION = re.compile(r"\s*((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(s|ms|us|µs)\s*", re.IGNORECASE | re.ASCII)
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


class Latency(Cost):
    """Seconds per image by a `LatencyTable`: the budget's, or one that is measured."""

    name = "latency"
    options: ClassVar[Mapping[str, bool]] = {"batch_size": True, "device": True, "table": False}
    remedy = "measure with a larger batch_size, where starting operations takes less of the time"

    def price(self, costs: CostModel, kept: Kept, options: Mapping[str, Any]) -> Any:
        return options["table"].seconds(costs, kept)

    def checked(self, limit: Any, options: Mapping[str, Any]) -> float | str:
        if isinstance(limit, str):
            if not 0 < _seconds(limit) < math.inf:
                raise BudgetError(
                    f"latency={limit!r:.80}: expected a time per image such as '1.8ms', '250us' or '0.1s', or a "
                    "fraction of dense in (0, 1]"
                )
        elif (number := as_number(limit)) is None or not 0 < number <= 1:
            raise BudgetError(
                f"latency={limit!r:.80}: a plain number is a fraction of dense in (0, 1]; for a time per image give "
                "its unit, latency='1.8ms'"
            )
        else:
            limit = number
        check_whole("batch_size", options.get("batch_size"), 1, BudgetError, or_none="the default")
        if "table" in options and len(options) > 1:
            name, value = next((name, value) for name, value in options.items() if name != "table")
            raise BudgetError(f"{name}={value!r}: a table says itself what it is of; give {name}= or table=")
        return limit

    def settled(self, options: Mapping[str, Any], costs: CostModel, tokens: TokenOptions) -> Mapping[str, Any]:
        """With the table; where it has to be measured, that takes half a minute or more, the first time.

        Raises:
            BudgetError: the table is of another model, input size or reduction, or cannot be measured.
        """
        anatomy, table = costs.anatomy, options.get("table")
        if costs.size != anatomy.input_size[1:]:
            raise BudgetError(
                f"input_size={costs.size}: latency is measured at the model's own, {anatomy.input_size[1:]}; set that "
                "of the model, or limit macs"
            )
        if table is None:
            batch_size, device = options.get("batch_size", 1), options.get("device")
            table = measure_latency_table(anatomy.model, batch_size, device=device, tokens=tokens)
        elif isinstance(table, Mapping):
            table = LatencyTable.from_fields(table)
        elif not isinstance(table, LatencyTable):
            table = LatencyTable.load(table)
        table.check(anatomy, tokens)
        return {"table": table}

    def absolute(self, limit: Any, dense: float) -> float:
        return _seconds(limit) if isinstance(limit, str) else super().absolute(limit, dense)

    def in_words(self, limit: Any, share: float, absolute: float) -> str:
        return f"{share * absolute * 1e3:.4g}ms" if isinstance(limit, str) else super().in_words(limit, share, absolute)


def _seconds(text: str) -> float:
    """Of a duration such as ``"1.8ms"``; NaN if it is none."""
    match = _DURATION.fullmatch(text)
    return math.nan if match is None else float(match[1]) * _SECONDS[match[2].lower()]


register(Latency())
