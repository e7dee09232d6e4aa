"""What of a policy sweep is put on dashboards: each trial's outcome, and the search as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lightning_mdc.figures.items import Item, Picture, Summary
from lightning_mdc.figures.plan import policy_figure
from lightning_mdc.figures.search_items import incumbents, policy_table, search_table, trial_numbers
from lightning_mdc.gp_ei.study import Trial
from lightning_mdc.policy import Policy

# What the sweeper draws beside its study, and what to read from it.
_PICTURES = {
    "progress": "What each trial was worth, and the best so far",
    "cost": "Value of each trial by its cost, as a fraction of the budget",
    "dependence": "What the value depends on, by the Gaussian process of the search",
}


def _trial(result: Mapping[str, Any]) -> Trial:
    """A trial of a sweep, from one of ``results["trials"]``; lists of ratios become a parameter for each."""
    params: dict[str, Any] = {}
    for name, value in result["params"].items():
        params |= {f"{name}.{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
    names = ("number", "cost", "value", "status", "seconds", "improvement")
    return Trial(params=params, **{name: result.get(name) for name in names})  # type: ignore[arg-type]


def trial_items(policy: Policy, uniform: Policy, value: float, cost: float, macs_ratio: float) -> Iterator[Item]:
    """One trial.

    Args:
        uniform: to compare it with.
        value: on the held-out images.
        cost: as a fraction of the budget.
        macs_ratio: as a fraction of dense.
    """
    yield Summary({"value": value, "cost": cost, "macs_ratio": macs_ratio})
    yield policy_table(policy)
    figure = policy_figure(policy, uniform, "What each block keeps")
    yield Picture.of("policy", "What each block keeps, and what the uniform policy would", figure)


def sweep_items(results: Mapping[str, Any], folder: Path, direction: str, best: Figure | None) -> Iterator[Item]:
    """The whole search.

    Args:
        results: as `lightning_mdc.app.sweep.finish` gets them.
        folder: of the sweep, with the sweeper's pictures.
        direction: ``minimize`` or ``maximize``.
        best: the best policy, drawn; None if no trial succeeded.
    """
    trials = [_trial(result) for result in results["trials"]]
    best_so_far = incumbents(trials, direction)
    for trial, incumbent in zip(trials, best_so_far, strict=True):
        yield trial_numbers(trial, incumbent)
    if best_so_far and best_so_far[-1] is not None:
        yield Summary({"search/best": best_so_far[-1], "search/best_trial": float(results["best_trial"])})
    yield search_table(trials, direction)
    for name, caption in _PICTURES.items():
        if (path := folder / f"{name}.png").exists():
            yield Picture(f"charts/search/{name}", caption, path.read_bytes())
    if best is not None:
        yield Picture.of("policy", "The best policy of the sweep, and the uniform one", best)
