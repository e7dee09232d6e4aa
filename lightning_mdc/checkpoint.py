"""What `MultiDimPruneCallback` keeps in a checkpoint of Lightning, and how it is found there again."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mdc.errors import CallbackError
from lightning_mdc.importance import Scores
from lightning_mdc.policy import Plan
from lightning_mdc.policy_search.driver import SearchResult
from lightning_mdc.unpickling import read

_FORMAT = 1
_NAME = "MultiDimPruneCallback"


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a fit has come to.

    Attributes:
        plan: what is kept when the schedule is through; None: not decided yet.
        planned_for: what was asked for, in words.
        search: how the policy was found; None where it was not searched for.
        scores: that the plan rests on.
        progress: how far the schedule has got, 0 to 1.
    """

    plan: Plan | None = None
    planned_for: str | None = None
    search: SearchResult | None = None
    scores: Scores | None = None
    progress: float = 0.0

    def state(self) -> dict[str, Any]:
        """As tensors and text (no class of ours, so that any loader can read it)."""
        return {
            "format": _FORMAT,
            "plan": None if self.plan is None else self.plan.to_json(),
            "planned_for": self.planned_for,
            "search": None if self.search is None else self.search.to_json(),
            "progress": self.progress,
            "scores": {} if self.scores is None else self.scores.tensors(),
            "scores_facts": {} if self.scores is None else self.scores.facts(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Outcome:
        """What `state` gave.

        Raises:
            CallbackError: it was written by another version.
        """
        if state.get("format") != _FORMAT or not state.keys() >= cls().state().keys():
            raise CallbackError(
                f"the checkpoint's {_NAME} state has format {state.get('format')!r}, expected {_FORMAT}; it was "
                "written by another version"
            )
        return cls(
            plan=None if state["plan"] is None else Plan.from_json(state["plan"]),
            planned_for=state["planned_for"],
            search=None if state["search"] is None else SearchResult.from_json(state["search"]),
            scores=Scores.from_parts(state["scores"], state["scores_facts"]) if state["scores_facts"] else None,
            progress=state["progress"],
        )


def key_of(submodule: str | None) -> str:
    """Under which a callback's state lies: one per model, whatever subclass of the callback prunes it."""
    return f"{_NAME}{ {'submodule': submodule}!r}"


def states_in(checkpoint: Any) -> dict[str | None, dict[str, Any]]:
    """The states of our callbacks, by their `submodule`; empty where nothing was pruned, or only weights were saved."""
    states = checkpoint.get("callbacks") if isinstance(checkpoint, dict) else None
    return {
        _submodule_in(key): state
        for key, state in (states if isinstance(states, dict) else {}).items()
        if isinstance(state, dict) and {"format", "plan", "planned_for"} <= state.keys()
    }


def _submodule_in(key: str) -> str | None:
    _, brace, arguments = key.partition("{")
    return ast.literal_eval(brace + arguments)["submodule"]


def plan_from_checkpoint(path: str | Path, submodule: str | None = None) -> Plan:
    """The plan a `MultiDimPruneCallback` left in a Lightning checkpoint, for `slim` in another process.

    `submodule` is the callback's argument of that name, if there were several callbacks. Whatever else the checkpoint
    holds, hyper-parameters of classes that are not installed here, say, is not unpickled.

    Raises:
        CallbackError: the file is unreadable, or holds no plan (or several).
    """
    try:
        checkpoint = read(path)
    except Exception as error:  # a damaged file fails in many ways
        raise CallbackError(f"checkpoint={str(path)!r} cannot be read: {error}") from error
    states = {own: state for own, state in states_in(checkpoint).items() if submodule in (None, own)}
    plans = [outcome.plan for outcome in map(Outcome.from_state, states.values())]
    if len(plans) != 1 or plans[0] is None:
        reason = "no plan; it was not written by a Trainer with that callback, or with save_weights_only=True"
        raise CallbackError(
            f"checkpoint={str(path)!r} holds {len(plans)} {_NAME} states{'' if plans else f': {reason}'}"
            f"{' (the plan is not decided yet)' if None in plans else ''}"
            f"{'; say which with submodule=' if len(plans) > 1 else ''}"
        )
    return plans[0]
