"""A search and the policy it found, as curves and tables for a logger."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_mdc.figures.items import Cell, Numbers, Panel, Table
from lightning_mdc.gp_ei.study import Row
from lightning_mdc.policy import DIMENSIONS, Policy

_PANELS = (
    Panel("search/progress", "Value by trial, and the best so far", "line", "trial", ("value", "incumbent")),
    Panel("search/expected", "Expected improvement of each trial", "line", "trial", ("improvement",)),
    Panel("search/tradeoff", "Value by cost", "scatter", "cost", ("value",)),
)


def incumbents(rows: Sequence[Row], direction: str) -> list[float | None]:
    """The best value so far after each trial; None before there is one. An estimate of a stopped trial is never it.

    Args:
        direction: ``minimize`` or ``maximize``.
    """
    better = min if direction == "minimize" else max
    best: float | None = None
    found = []
    for row in rows:
        if row.status == "done" and row.value is not None:
            best = row.value if best is None else better(best, row.value)
        found.append(best)
    return found


def trial_numbers(row: Row, incumbent: float | None) -> Numbers:
    """One trial as a point of the search's curves; `incumbent` is the best value so far, this one counted."""
    known = {"value": row.value, "incumbent": incumbent, "cost": row.cost, "improvement": row.improvement}
    values = {f"search/{name}": float(value) for name, value in known.items() if value is not None}
    return Numbers(values, "search/trial", row.number)


def search_table(rows: Sequence[Row], direction: str) -> Table:
    """All trials, a line each, with every keep ratio; `direction` as in `incumbents`."""
    names = tuple(dict.fromkeys(name for row in rows for name in row.params))
    columns = ("trial", "value", "incumbent", "cost", "macs", "improvement", "status", "seconds", *names)
    lines = []
    for row, best in zip(rows, incumbents(rows, direction), strict=True):
        facts = (row.number, row.value, best, row.cost, row.facts.get("macs"), row.improvement, row.status, row.seconds)
        lines.append((*facts, *(_cell(row.params.get(name)) for name in names)))
    return Table("search/trials", columns, tuple(lines), _PANELS)


def policy_table(policy: Policy) -> Table:
    """A line per keep ratio."""
    rows = [(name, number, float(ratio)) for name in DIMENSIONS for number, ratio in enumerate(getattr(policy, name))]
    return Table("policy/ratios", ("dimension", "block or stage", "keep ratio"), tuple(rows))


def _cell(value: Any) -> Cell:
    if isinstance(value, np.generic):
        value = value.item()
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value)
