"""What a benchmark was to reach, beside what it measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

SIGN = {"<=": "≤", ">=": "≥"}


@dataclass(frozen=True)
class Target:
    """One promise: `measured` is to stand in this `relation` to `wanted`. What was not measured (NaN) is missed."""

    what: str
    measured: float
    relation: Literal["<=", ">="]
    wanted: float

    @property
    def is_met(self) -> bool:
        return self.measured <= self.wanted if self.relation == "<=" else self.measured >= self.wanted

    def __str__(self) -> str:
        return f"{self.what} {self.measured:.3g}, wanted {SIGN[self.relation]} {self.wanted:g}"

    def facts(self) -> dict[str, Any]:
        """JSON-ready; `from_facts` reads it."""
        return {**vars(self), "met": self.is_met}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Target:
        """Whether it is met is asked of the numbers again."""
        return cls(facts["what"], float(facts["measured"]), facts["relation"], float(facts["wanted"]))


def verdicts(targets: Iterable[Target]) -> str:
    """A markdown table: each target, what was measured, and whether that meets it."""
    rows = [
        f"| {t.what} | {t.measured:.3g} | {SIGN[t.relation]} {t.wanted:g} | {'pass' if t.is_met else 'miss'} |"
        for t in targets
    ]
    return "\n".join(["| target | measured | wanted | |", "|---|---:|---:|---|", *rows])
