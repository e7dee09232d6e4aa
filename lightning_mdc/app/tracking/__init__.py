"""Where is a run watched? Dashboards (wandb, TensorBoard) and curves (CSV); none of them can stop a run.

`published` says what of a run is shown, `Tracker` what a dashboard has to be able to do; each dashboard is one file
here, about a run's life, and one in ``conf/logger/``; `lightning_mdc.figures.loggers` draws items on it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from lightning_mdc.app.report.record import RunRecord
from lightning_mdc.app.terminal import in_sweep
from lightning_mdc.app.tracking.contents import published
from lightning_mdc.app.tracking.tracker import RunInfo, Tracker, Trackers

log = logging.getLogger(__name__)

__all__ = ["RunInfo", "Tracker", "Trackers", "opened", "run_info", "show_step"]


@contextmanager
def opened(trackers: Mapping[str, Tracker], info: RunInfo) -> Iterator[Trackers]:
    """Dashboards that are open inside, and say how it ended; at the end it is said where they are."""
    watched = Trackers(trackers, info)
    failed = True
    try:
        yield watched
        failed = False
    finally:
        watched.finish(failed)
        if failed or info.kind != "trial":  # the sweep has a line per trial already
            for key, location in watched.locations.items():
                log.info("%-8s %s", f"{key}:", location)


def show_step(trackers: Trackers, folder: Path, name: str, fingerprint: str | None) -> None:
    """Show what step `name` left in the run's folder; see `Trackers.show`."""
    trackers.show(lambda: published(RunRecord(folder), name), name, fingerprint)


def run_info(folder: Path, settings: Mapping[str, Any], kind: str = "pipeline") -> RunInfo:
    """A run or trial by its folder and, in a sweep of Hydra's, by what is its own there."""
    if not in_sweep():
        return RunInfo(folder, f"{settings['name']} {folder.name}", kind=kind, settings=settings)
    hydra = HydraConfig.get()
    group = Path(hydra.sweep.dir).name
    if kind == "trial":
        return RunInfo(folder, f"trial {folder.name}", group, kind, settings)
    name = f"{hydra.job.num}: {hydra.job.override_dirname}"
    return RunInfo(folder, name, group, kind, settings)
