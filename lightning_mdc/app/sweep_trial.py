"""One trial of a sweep of ``train.py``, a job with ``stage=trial``: what is the given policy worth?

Trials run on this machine or on others. The dense model, its scores, and what else all of them need lie in
``<runs>/.cache``, in a folder named by what they were made from, and are made by the trial that comes first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_mdc.app import build, pipeline, tracking
from lightning_mdc.app.fingerprints import fingerprint_of, fingerprints
from lightning_mdc.app.run_folder import RunFolder
from lightning_mdc.app.steps import Run, held_out_batches, pruned
from lightning_mdc.app.terminal import in_sweep
from lightning_mdc.app.tracking import Trackers
from lightning_mdc.app.tracking.contents import trial_items
from lightning_mdc.app.trainer import num_processes
from lightning_mdc.budget import CostModel, macs
from lightning_mdc.budget.pricing import Pricing
from lightning_mdc.errors import ConfigError
from lightning_mdc.figures.items import Item
from lightning_mdc.files import replacing, write_text
from lightning_mdc.models import find_sites
from lightning_mdc.policy import Policy
from lightning_mdc.policy_search.held_out import HeldOut, gathered

log = logging.getLogger(__name__)


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
        _, slim_model = pruned(run, model, policy)
        held_out = build_held_out(run, model)
        value = held_out(slim_model)
        write_text(folder / "policy.json", policy.to_json())
        trackers.show(lambda: _items(settings, model, slim_model, policy, value))
        if not in_sweep():  # else the sweeper says it
            log.info("trial: %s %.4f", held_out.metric, value)
        return value


def _items(
    settings: build.Settings, model: nn.Module, slim_model: nn.Module, policy: Policy, value: float
) -> Iterator[Item]:
    """What of the trial is put on dashboards."""
    pricing = Pricing(CostModel(find_sites(model)), build.build_budget(settings))
    cost = pricing.utilisation(policy, fuse=settings["surgery"]["fuse_tokens"])
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
    return build.build_held_out(run.settings, [(tensors["images"], tensors["labels"])], model, run.device)
