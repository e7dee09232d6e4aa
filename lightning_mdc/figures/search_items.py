"""A search, the policy it found and what is kept, as curves and tables for a logger."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_mdc.figures.items import Cell, Numbers, Panel, Table
from lightning_mdc.figures.plan import kept_by_block
from lightning_mdc.gp_ei.study import Trial
from lightning_mdc.policy import DIMENSIONS, Plan, Policy

if TYPE_CHECKING:
    from lightning_mdc.budget import CostModel

_PANELS = (
    Panel("search/progress", "Value by trial, and the best so far", "line", "trial", ("value", "incumbent")),
    Panel("search/expected", "Expected improvement of each trial", "line", "trial", ("improvement",)),
    Panel("search/tradeoff", "Value by cost", "scatter", "cost", ("value",)),
)


def incumbents(trials: Sequence[Trial], direction: str) -> list[float | None]:
    """The best value so far after each trial; None before there is one.

    Args:
        direction: ``minimize`` or ``maximize``.
    """
    better = min if direction == "minimize" else max
    values = (trial.value if trial.status == "done" else None for trial in trials)
    return list(accumulate(values, lambda *both: better((v for v in both if v is not None), default=None)))


def trial_numbers(trial: Trial, incumbent: float | None) -> Numbers:
    """One trial as a point of the search's curves; `incumbent` is the best value so far, this one counted."""
    known = {"value": trial.value, "incumbent": incumbent, "cost": trial.cost, "improvement": trial.improvement}
    values = {f"search/{name}": float(value) for name, value in known.items() if value is not None}
    return Numbers(values, "search/trial", trial.number)


def search_table(trials: Sequence[Trial], direction: str) -> Table:
    """All trials, a line each, with every keep ratio; `direction` as in `incumbents`."""
    names = tuple(dict.fromkeys(name for trial in trials for name in trial.params))
    columns = ("trial", "value", "incumbent", "cost", "macs", "improvement", "status", "seconds", *names)
    lines = (
        (
            *(trial.number, trial.value, best, trial.cost, trial.facts.get("macs")),
            *(trial.improvement, trial.status, trial.seconds),
            *(_cell(trial.params.get(name)) for name in names),
        )
        for trial, best in zip(trials, incumbents(trials, direction), strict=True)
    )
    return Table("search/trials", columns, tuple(lines), _PANELS)


def policy_table(policy: Policy) -> Table:
    """A line per keep ratio."""
    rows = [(name, number, float(ratio)) for name in DIMENSIONS for number, ratio in enumerate(getattr(policy, name))]
    return Table("policy/ratios", ("dimension", "block or stage", "keep ratio"), tuple(rows))


def kept_tables(costs: CostModel, plan: Plan) -> Iterator[Table]:
    """What each block of the model that `costs` prices keeps, a table with its bars per dimension."""
    for units in kept_by_block(plan, costs.num_tokens, costs.num_prefix):
        rows = tuple(
            (f"block {block:02d}", kept, dense, kept / dense if dense else None)
            for block, (kept, dense) in enumerate(zip(units.kept, units.dense, strict=True))
        )
        bars = Panel(f"kept/{units.dimension}", f"{units.dimension} kept", "bar", "block", ("kept",))
        yield Table(f"kept/{units.dimension}_by_block", ("block", "kept", "dense", "keep ratio"), rows, (bars,))


def _cell(value: Any) -> Cell:
    if isinstance(value, np.generic):
        value = value.item()
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value)
