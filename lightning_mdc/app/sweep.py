"""The policy search as a Hydra sweep of ``train.py``: what a trial does, what it costs, what comes after the last one.

``python train.py -m hydra/sweeper=mdc_gp_ei budget=0.6`` starts one; see ``conf/hydra/sweeper/mdc_gp_ei.yaml``. Every
trial is a job of its own, on this machine or another one; the dense model, its scores and the prepared images lie in
``<runs>/cache``, keyed by what they were made from, and are made by the trial that comes first.
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
from hydra.types import RunMode
from matplotlib.figure import Figure
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_mdc.app import build, pipeline, tracking
from lightning_mdc.app import report as reporting
from lightning_mdc.app.run_folder import RunFolder, fingerprint
from lightning_mdc.app.settings import plain
from lightning_mdc.app.steps import Run, held_out_batches
from lightning_mdc.app.tracking import About, Trackers
from lightning_mdc.app.tracking.sweeps import sweep_items, trial_items
from lightning_mdc.app.trainer import num_processes
from lightning_mdc.budget import CostModel, macs
from lightning_mdc.budget.pricing import Pricing
from lightning_mdc.errors import ConfigError
from lightning_mdc.figures.items import Item
from lightning_mdc.files import replacing, write_text
from lightning_mdc.importance import Scores
from lightning_mdc.models import find_sites
from lightning_mdc.policy import DIMENSIONS, Policy
from lightning_mdc.policy_search.driver import starting_points
from lightning_mdc.policy_search.held_out import HeldOut, gathered
from lightning_mdc.policy_search.policy_space import PolicySpace
from lightning_mdc.surgery import slim
from lightning_mdc.surgery.plan import make_plan

log = logging.getLogger(__name__)

_KEEP = "policy.keep."


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
    with tracking.opened(build.build_trackers(settings), tracking.about_run(folder, settings, "trial")) as trackers:
        return _trial(settings, folder, trackers)


def _trial(settings: build.Settings, folder: Path, trackers: Trackers) -> float:
    run = prepared(settings, trackers)
    model = run.model(run.weights).to(run.device)
    policy = build.given_policy(settings, model)
    if policy is None:
        raise ConfigError("stage=trial judges a policy that is given; give policy.keep.heads=..., or policy.file")
    surgery = settings["surgery"]
    scores = Scores.load(run.folder / "scores.safetensors")
    plan = make_plan(model, scores, policy, token_score=surgery["token_score"], fuse_tokens=surgery["fuse_tokens"])
    held_out = _held_out(run, model)
    small = slim(model, plan, **run.compensation)
    value = held_out(small)
    write_text(folder / "policy.json", policy.to_json())
    trackers.show(lambda: _to_show(settings, model, small, policy, value))
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:  # the sweeper says it
        return value
    log.info("trial: %s %.4f", held_out.metric, value)
    return value


def _to_show(
    settings: build.Settings, model: nn.Module, small: nn.Module, policy: Policy, value: float
) -> Iterator[Item]:
    pricing = Pricing(CostModel(find_sites(model)), build.build_budget(settings))
    cost = pricing.of_policy(policy, fuse=settings["surgery"]["fuse_tokens"])
    uniform = {**settings, "policy": {**settings["policy"], "kind": "uniform", "file": None, "keep": {}}}
    even = build.given_policy(uniform, model)
    assert even is not None  # of this kind it is
    return trial_items(policy, even, value, cost, macs(small) / macs(model))


def prepared(settings: build.Settings, trackers: Trackers | None = None) -> Run:
    """The cached run that all trials of these settings share, with its dense model, scores and shared weights.

    What has to be trained first is watched with `trackers`.
    """
    marks = pipeline.fingerprints(settings, frozenset())
    folder = RunFolder(pipeline.cache_folder(settings, marks))
    run = Run(settings, folder, marks, trackers=trackers or Trackers())
    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])
    run.folder.create()
    # Of trials that start together one makes what is missing, the others wait for it.
    with FileLock(run.folder / ".lock"):
        missing = [name for name in pipeline.cached(settings) if not pipeline.is_done(run, name)]
        if missing:
            pipeline.check(settings, tuple(missing))
        for name in missing:
            pipeline.run_stage(run, name)
    return run


def _held_out(run: Run, model: nn.Module) -> HeldOut:
    options = run.settings["search"]
    mark = fingerprint({"images": options["images"]}, {"dense": run.marks["dense"]})
    path = run.folder / f"held_out-{mark[:12]}.safetensors"
    with FileLock(run.folder / ".lock"):
        if not path.exists():
            images, labels = gathered(held_out_batches(run), options["images"])
            assert labels is not None  # our data modules have them
            with replacing(path) as beside:
                save_file({"images": images.contiguous(), "labels": labels.contiguous()}, beside)
    tensors = load_file(path)
    return build.build_held_out(run.settings, [(tensors["images"], tensors["labels"])], model, run.device)


# --- what a trial costs -----------------------------------------------------------------------------------------------


class PolicyLoad:
    """Prices trials by their ``policy.keep.*``: cost as a fraction of the budget, affordable up to 1. For
    ``hydra.sweeper.constraint``, vectorised: every parameter is an array (n,), or (n, count) for a list.
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
        return space.load(space.snap(points))  # no less than the fewest units

    def snap(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """`params` with every ratio the smallest that keeps the same units."""
        space, points, columns = self._points(params)
        return _replaced(params, columns, space.snap(points))

    def first(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Where `search` begins too: the uniform policy, then those of fewer dimensions; the rest as in `params`."""
        space, _, columns = self._points(params)
        points = starting_points(space)
        rows = {
            key: np.repeat(value[:1], len(points), axis=0) if isinstance(value, np.ndarray) else value
            for key, value in params.items()
        }
        return _replaced(rows, columns, points)

    def _points(self, params: Mapping[str, Any]) -> tuple[PolicySpace, np.ndarray, dict[str, slice]]:
        """The space that these parameters span, their points (n, axes), and which columns belong to which.

        What is not searched (no array) is the same for all.
        """
        given = {f"{_KEEP}{name}": ratios for name, ratios in self.settings["policy"]["keep"].items()}
        given |= {key: value for key, value in params.items() if key.startswith(_KEEP)}
        given = {key: value for key, value in given.items() if value is not None}
        if not given:
            raise ConfigError(f"the sweep moves no keep ratio; give it a parameter such as {_KEEP}heads")
        n = max((len(value) for value in given.values() if isinstance(value, np.ndarray)), default=1)
        keep: dict[str, Any] = {}
        columns, parts, start = {}, [], 0
        for name in sorted(given, key=[f"{_KEEP}{d}" for d in DIMENSIONS].index):
            value = given[name]
            part = np.asarray(value, dtype=np.float64)
            if not isinstance(value, np.ndarray):
                part = np.broadcast_to(part, (n, *part.shape))
            is_list = part.ndim == 2
            part = part if is_list else part[:, None]
            keep[name.removeprefix(_KEEP)] = [1.0] * part.shape[1] if is_list else 1.0
            columns[name] = slice(start, start + part.shape[1])
            parts.append(part)
            start += part.shape[1]
        shape = tuple((name, len(ones) if isinstance(ones, list) else None) for name, ones in keep.items())
        if shape not in self._spaces:
            budget = build.build_budget(self.settings)
            self._spaces[shape] = build.keep_space(self.settings, self.model, keep, budget)
        return self._spaces[shape], np.concatenate(parts, axis=1), columns


def _replaced(params: Mapping[str, Any], columns: Mapping[str, slice], points: np.ndarray) -> dict[str, Any]:
    """`params` with the ratios of `points` (n, axes), where they are searched."""
    searched = {key: place for key, place in columns.items() if isinstance(params.get(key), np.ndarray)}
    ratios = {key: points[:, place] for key, place in searched.items()}
    return {**params, **{key: r if np.ndim(params[key]) == 2 else r[:, 0] for key, r in ratios.items()}}


# --- after the last trial ---------------------------------------------------------------------------------------------


def finish(results: Mapping[str, Any], sweep_dir: Path, config: DictConfig) -> None:
    """Write the best policy as ``best_policy.json``, draw it beside the uniform one, say how to finetune with it.

    The search as a whole is shown on the dashboards of the trials, as one more run of their group.
    """
    if results["best_params"] is None:
        _show_sweep(results, sweep_dir, plain(config), None)
        print("No trial succeeded, so there is no policy to finetune with.")
        return
    load = PolicyLoad(config)
    found = dict(results["best_params"])
    given_keep = {name: ratios for name, ratios in load.settings["policy"]["keep"].items() if ratios is not None}
    keep = given_keep | {key.removeprefix(_KEEP): value for key, value in found.items() if key.startswith(_KEEP)}
    space = build.keep_space(load.settings, load.model, keep, build.build_budget(load.settings))
    best = space.policy(space.point(build.keep_params(keep)))
    path = sweep_dir / "best_policy.json"
    write_text(path, best.to_json())
    figure = reporting.policy_figure(best, space.uniform, f"{load.settings['name']}: trial {results['best_trial']}")
    reporting.save_figure(figure, sweep_dir / "policy.png")
    _show_sweep(results, sweep_dir, load.settings, figure)
    given = [text for text in HydraConfig.get().overrides.task if not text.lstrip("+").startswith((_KEEP, "stage="))]
    others = [f"{key}={value}" for key, value in found.items() if not key.startswith(_KEEP)]
    command = ["python", "train.py", f"policy.file={path}", *given, *others]
    print(f"Finetune with the best policy (trial {results['best_trial']}; the dense model is in the cache):")
    print("  " + shlex.join(command))


def _show_sweep(results: Mapping[str, Any], folder: Path, settings: build.Settings, best: Figure | None) -> None:
    trackers = build.build_trackers(settings)
    about = About(folder, f"{settings['name']}: the search", folder.name, "sweep", settings)
    with tracking.opened({key: each for key, each in trackers.items() if each.shows_items}, about) as watched:
        direction = HydraConfig.get().sweeper.direction
        watched.show(lambda: sweep_items(results, folder, direction, best))
