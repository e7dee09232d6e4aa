"""The policy search as a Hydra sweep of ``train.py``: what its trials cost, one trial, and what comes after the last.

``mdc train -m hydra/sweeper=mdc_gp_ei budget=0.6`` starts one; see ``conf/hydra/sweeper/mdc_gp_ei.yaml``, which
names what is here. Trials are jobs of their own, with ``stage=trial``, on this machine or on others. The dense model,
its scores, and what else all of them need lie in ``<runs>/.cache``, in a folder named by what they were made from, and
are made by the trial that comes first.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from matplotlib.figure import Figure
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_mdc.app import build, pipeline, terminal, tracking
from lightning_mdc.app.fingerprints import fingerprint_of, fingerprints
from lightning_mdc.app.run_folder import RunFolder
from lightning_mdc.app.settings import plain, token_options
from lightning_mdc.app.steps import Run, compensation_of_trials, held_out_batches, pruned
from lightning_mdc.app.tracking import RunInfo, Trackers
from lightning_mdc.app.tracking.contents import sweep_items, trial_items
from lightning_mdc.app.trainer import num_processes
from lightning_mdc.budget import CostModel, macs
from lightning_mdc.budget.pricing import Pricing
from lightning_mdc.errors import ConfigError
from lightning_mdc.figures.items import Item
from lightning_mdc.figures.plan import policy_figure
from lightning_mdc.figures.style import save_figure
from lightning_mdc.files import replacing, write_text
from lightning_mdc.gp_ei.study import read_study
from lightning_mdc.models import find_anatomy
from lightning_mdc.policy import DIMENSIONS, Policy
from lightning_mdc.policy_search.driver import starting_points
from lightning_mdc.policy_search.held_out import HeldOut, gathered
from lightning_mdc.policy_search.policy_space import PolicySpace

log = logging.getLogger(__name__)

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
        """The trials to begin with, as `search` does without moments, which no trial has yet: the uniform policy, then
        those of fewer dimensions.

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


# --- one trial --------------------------------------------------------------------------------------------------------


def trial(settings: build.Settings, folder: Path) -> float:
    """What the policy that the settings give is worth on the held-out images; leaves ``policy.json`` in `folder`.

    Raises:
        ConfigError: the settings give no policy.
        MdcError: see `pipeline.check`.
    """
    if (count := num_processes(settings)) > 1:
        raise ConfigError(
            f"stage=trial is the work of one process, but trainer.devices={settings['trainer']['devices']!r} makes "
            f"{count}; use trainer.devices=1, and hydra.sweeper.n_jobs with a launcher for trials side by side"
        )
    with tracking.opened(build.build_trackers(settings), tracking.run_info(folder, settings, "trial")) as trackers:
        run = prepared(settings, trackers)
        model = run.model(run.weights).to(run.device)
        policy = build.given_policy(settings, model)
        if policy is None:
            raise ConfigError("stage=trial judges a policy that is given; give policy.keep.heads=..., or policy.file")
        _, slim_model = pruned(run, model, policy, compensation_of_trials(run, model))
        held_out = build_held_out(run, model)
        value = held_out(slim_model)
        write_text(folder / "policy.json", policy.to_json())
        trackers.show(lambda: _items(settings, model, slim_model, policy, value))
        if not terminal.in_sweep():  # else the sweeper says it
            log.info("trial: %s %.4f", held_out.metric, value)
        return value


def _items(
    settings: build.Settings, model: nn.Module, slim_model: nn.Module, policy: Policy, value: float
) -> Iterator[Item]:
    """What of the trial is put on dashboards."""
    tokens = token_options(settings)
    cost = Pricing(CostModel(find_anatomy(model)), build.build_budget(settings), tokens).utilisation(policy)
    options = {**settings["policy"], "kind": "uniform", "file": None, "keep": {}}
    uniform = build.given_policy({**settings, "policy": options}, model)
    assert uniform is not None  # of this kind it is
    return trial_items(policy, uniform, value, cost, macs(slim_model) / macs(model))


def prepared(settings: build.Settings, trackers: Trackers | None = None) -> Run:
    """The run in the cache that all trials of these settings share, with its dense model, scores and shared weights.

    What has to be trained first is watched with `trackers`.
    """
    prints = fingerprints(settings, frozenset())
    folder = RunFolder(pipeline.cache_folder(settings, prints))
    run = Run(settings, folder, prints, trackers=trackers or Trackers())
    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])
    folder.create()
    # Of trials that start together one makes what is missing, the others wait for it.
    with FileLock(folder / ".lock"):
        missing = tuple(name for name in pipeline.shared_by_trials(settings) if not run.is_done(name))
        if missing:
            pipeline.check(settings, missing)
        for name in missing:
            pipeline.run_step(run, name)
    return run


def build_held_out(run: Run, model: nn.Module) -> HeldOut:
    """What trials are judged on. The prepared images lie in the cache, so that only the first trial reads files."""
    num_images = run.settings["search"]["images"]
    fingerprint = fingerprint_of({"images": num_images}, {"dense": run.fingerprints["dense"]})
    path = run.folder / f"held_out-{fingerprint[:12]}.safetensors"
    with FileLock(run.folder / ".lock"):
        if not path.exists():
            images, labels = gathered(held_out_batches(run), num_images)
            assert labels is not None  # our data modules have them
            with replacing(path) as beside:
                save_file({"images": images.contiguous(), "labels": labels.contiguous()}, beside)
    tensors = load_file(path)
    return build.build_held_out(run.settings["search"], [(tensors["images"], tensors["labels"])], model, run.device)


# --- after the last trial ---------------------------------------------------------------------------------------------


def finish(results: Mapping[str, Any], sweep_dir: Path, config: DictConfig) -> None:
    """Write the best policy as ``best_policy.json``, draw it beside the uniform one, say how to finetune with it.

    The search as a whole is shown on the dashboards of the trials, as one more run of their group.
    """
    if results["best_params"] is None:
        _show_sweep(sweep_dir, Path(results["study"]), plain(config), None)
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
    _show_sweep(sweep_dir, Path(results["study"]), settings, figure)
    given = [text for text in HydraConfig.get().overrides.task if not text.lstrip("+").startswith((_KEEP, "stage="))]
    others = [f"{key}={value}" for key, value in params.items() if not key.startswith(_KEEP)]
    command = [*terminal.program(), f"policy.file={path}", *given, *others]
    print(f"Finetune with the best policy (trial {results['best_trial']}; the dense model is in the cache):")
    print("  " + shlex.join(command))


def _show_sweep(folder: Path, study: Path, settings: build.Settings, best: Figure | None) -> None:
    trackers = build.build_trackers(settings)
    info = RunInfo(folder, f"{settings['name']}: the search", folder.name, "sweep", settings)
    with tracking.opened({key: tracker for key, tracker in trackers.items() if tracker.shows_items}, info) as watched:
        watched.show(lambda: sweep_items(read_study(study), folder, best))
