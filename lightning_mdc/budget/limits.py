"""What a slim model may cost: limits of MACs, parameters, latency, or a registered cost of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mdc.budget.costs import COSTS
from lightning_mdc.budget.latency_table import LatencyTable
from lightning_mdc.errors import BudgetError, as_number


@dataclass(frozen=True, init=False, eq=False, repr=False)
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
        others: limits of costs that were registered, by name, and their options.

    Attributes:
        limits: by the name of the cost, what was given.
        options: what else was given, by name.

    Raises:
        BudgetError: no limit, or one that is not positive and finite; or something that one cost alone has and no limit
            of it.
    """

    limits: Mapping[str, float | str]
    options: Mapping[str, Any]

    def __init__(
        self,
        macs: float | None = None,
        params: float | None = None,
        latency: float | str | None = None,
        batch_size: int | None = None,
        device: str | None = None,
        table: LatencyTable | Mapping[str, Any] | str | Path | None = None,
        **others: Any,
    ) -> None:
        given: dict[str, Any] = {"macs": macs, "params": params, "latency": latency}
        given |= {"batch_size": batch_size, "device": device, "table": table, **others}
        given = {name: value for name, value in given.items() if value is not None}
        owners = {option: name for name, cost in COSTS.items() for option in cost.options}
        if unknown := sorted(set(given) - {*COSTS, *owners}):
            raise BudgetError(f"Budget({unknown[0]}=...): known limits are {', '.join(COSTS)}")
        options = {name: value for name, value in given.items() if name in owners}
        for name, value in options.items():
            if (owner := owners[name]) not in given:
                raise BudgetError(f"{name}={value!r:.80}: is for a limit of {owner}, and there is none; give {owner}=")
        if len(options) == len(given):
            raise BudgetError(f"Budget() limits nothing; give {'=, '.join(COSTS)}=")
        limits = {
            name: cost.checked(given[name], {option: options[option] for option in cost.options if option in options})
            for name, cost in COSTS.items()
            if name in given
        }
        object.__setattr__(self, "limits", limits)
        object.__setattr__(self, "options", options)

    def replaced(self, **changes: Any) -> Budget:
        """This budget with other limits or options; None takes one away."""
        return Budget(**{**self.limits, **self.options, **changes})

    def as_dict(self) -> dict[str, Any]:
        """What was given by name, JSON-ready; all but what latency and the like are taken from, a table."""
        sources = {name for cost in COSTS.values() for name, counts in cost.options.items() if not counts}
        return {name: value for name, value in {**self.limits, **self.options}.items() if name not in sources}

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{name}={value!r}' for name, value in self.as_dict().items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Budget) and self.as_dict() == other.as_dict()

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.as_dict().items())))


def as_budget(budget: float | Budget) -> Budget:
    """A plain number is a fraction of the dense MACs.

    Raises:
        BudgetError: the number is no fraction in (0, 1].
    """
    if isinstance(budget, Budget):
        return budget
    fraction = as_number(budget)
    if fraction is None or not 0 < fraction <= 1:
        shown = f"{budget!r:.80}".splitlines()[0]  # a model's has many
        raise BudgetError(
            f"budget={shown}: a plain number is a fraction of the dense MACs in (0, 1]; "
            "for absolute limits pass Budget(macs=1.84e9), Budget(params=...) or Budget(latency='1.8ms')"
        )
    return Budget(macs=fraction)
