"""The policy search as a Hydra sweep of ``train.py``: what its trials cost, and what comes after the last one.

``mdc train -m hydra/sweeper=mdc_gp_ei budget=0.6`` starts one; see ``conf/hydra/sweeper/mdc_gp_ei.yaml``, which
names what is here. Trials are jobs of their own, see `sweep_trial`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from matplotlib.figure import Figure
from omegaconf import DictConfig

from lightning_mdc.app import build, terminal, tracking
from lightning_mdc.app.settings import plain
from lightning_mdc.app.tracking import RunInfo
from lightning_mdc.app.tracking.contents import sweep_items
from lightning_mdc.errors import ConfigError
from lightning_mdc.figures.plan import policy_figure
from lightning_mdc.figures.style import save_figure
from lightning_mdc.files import write_text
from lightning_mdc.gp_ei.study import read_study
from lightning_mdc.policy import DIMENSIONS
from lightning_mdc.policy_search.driver import starting_points
from lightning_mdc.policy_search.policy_space import PolicySpace

_KEEP = "policy.keep."


# --- what a trial costs -----------------------------------------------------------------------------------------------


class PolicyCost:
    """The cost of trials as a fraction of the budget, by their ``policy.keep.*``: one at 1 uses the budget up.

    For ``hydra.sweeper.constraint``, vectorised: each parameter that is searched is an array of n trials, (n,), or
    (n, count) where it is a list of ratios; every other one is a value that all trials have.
    """

    def __init__(self, config: DictConfig) -> None:
        self.settings = plain(config)
        data = build.build_data(self.settings)
        data.setup()
        with torch.device("meta"):
            self.model = build.build_model(self.settings, data, weights=False)
        self._spaces: dict[tuple[Any, ...], PolicySpace] = {}

    def __call__(self, params: Mapping[str, Any]) -> np.ndarray:
        """(n,) costs."""
        space, points, _ = self._points(params)
        return space.utilisation(space.snap(points))  # below min_heads a ratio costs what min_heads cost

    def snap(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """`params` with every ratio the smallest that keeps the same units."""
        space, points, columns = self._points(params)
        return _with_ratios(params, columns, space.snap(points))

    def first(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The trials to begin with, as `search` does: the uniform policy, then those of fewer dimensions.

        What is no keep ratio they take from the first of `params`.
        """
        space, _, columns = self._points(params)
        points = starting_points(space)
        rows = {
            key: np.repeat(value[:1], len(points), axis=0) if isinstance(value, np.ndarray) else value
            for key, value in params.items()
        }
        return _with_ratios(rows, columns, points)

    def _points(self, params: Mapping[str, Any]) -> tuple[PolicySpace, np.ndarray, dict[str, slice]]:
        """The space that these parameters span, their points (n, axes), and which columns belong to which.

        What is not searched (no array) is the same for all.
        """
        given = {f"{_KEEP}{name}": ratios for name, ratios in self.settings["policy"]["keep"].items()}
        given |= {key: value for key, value in params.items() if key.startswith(_KEEP)}
        given = {key: value for key, value in given.items() if value is not None}
        if not given:
            raise ConfigError(f"the sweep moves no keep ratio; give it a parameter such as {_KEEP}heads")
        num_trials = max((len(value) for value in given.values() if isinstance(value, np.ndarray)), default=1)
        all_kept: dict[str, float | list[float]] = {}
        columns, parts, start = {}, [], 0
        for key in sorted(given, key=[f"{_KEEP}{name}" for name in DIMENSIONS].index):
            ratios = np.asarray(given[key], dtype=np.float64)
            if not isinstance(given[key], np.ndarray):
                ratios = np.broadcast_to(ratios, (num_trials, *ratios.shape))
            is_list = ratios.ndim == 2
            part = ratios if is_list else ratios[:, None]
            all_kept[key.removeprefix(_KEEP)] = [1.0] * part.shape[1] if is_list else 1.0
            columns[key] = slice(start, start + part.shape[1])
            parts.append(part)
            start += part.shape[1]
        shape = tuple((name, len(ones) if isinstance(ones, list) else None) for name, ones in all_kept.items())
        if shape not in self._spaces:
            budget = build.build_budget(self.settings)
            self._spaces[shape] = build.keep_space(self.settings, self.model, all_kept, budget)
        return self._spaces[shape], np.concatenate(parts, axis=1), columns


def _with_ratios(params: Mapping[str, Any], columns: Mapping[str, slice], points: np.ndarray) -> dict[str, Any]:
    """`params` with the ratios of `points` (n, axes), where they are searched."""
    replaced = dict(params)
    for key, axes in columns.items():
        if isinstance(params.get(key), np.ndarray):
            replaced[key] = points[:, axes] if params[key].ndim == 2 else points[:, axes.start]
    return replaced


# --- after the last trial ---------------------------------------------------------------------------------------------


def finish(results: Mapping[str, Any], sweep_dir: Path, config: DictConfig) -> None:
    """Write the best policy as ``best_policy.json``, draw it beside the uniform one, say how to finetune with it.

    The search as a whole is shown on the dashboards of the trials, as one more run of their group.
    """
    if results["best_params"] is None:
        _show_sweep(sweep_dir, plain(config), None)
        print("No trial succeeded, so there is no policy to finetune with.")
        return
    cost, params = PolicyCost(config), dict(results["best_params"])
    settings = cost.settings
    keep = {name: ratios for name, ratios in settings["policy"]["keep"].items() if ratios is not None}
    keep |= {key.removeprefix(_KEEP): value for key, value in params.items() if key.startswith(_KEEP)}
    space = build.keep_space(settings, cost.model, keep, build.build_budget(settings))
    best = space.policy(space.point(build.keep_params(keep)))
    path = sweep_dir / "best_policy.json"
    write_text(path, best.to_json())
    figure = policy_figure(best, space.uniform, f"{settings['name']}: trial {results['best_trial']}")
    save_figure(figure, sweep_dir / "policy.png")
    _show_sweep(sweep_dir, settings, figure)
    given = [text for text in HydraConfig.get().overrides.task if not text.lstrip("+").startswith((_KEEP, "stage="))]
    others = [f"{key}={value}" for key, value in params.items() if not key.startswith(_KEEP)]
    command = [*terminal.program(), f"policy.file={path}", *given, *others]
    print(f"Finetune with the best policy (trial {results['best_trial']}; the dense model is in the cache):")
    print("  " + shlex.join(command))


def _show_sweep(folder: Path, settings: build.Settings, best: Figure | None) -> None:
    trackers = build.build_trackers(settings)
    study = Path(HydraConfig.get().sweeper.study or folder / "study.jsonl")
    info = RunInfo(folder, f"{settings['name']}: the search", folder.name, "sweep", settings)
    with tracking.opened({key: tracker for key, tracker in trackers.items() if tracker.shows_items}, info) as watched:
        watched.show(lambda: sweep_items(read_study(study), folder, best))
