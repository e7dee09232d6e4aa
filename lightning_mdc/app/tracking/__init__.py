"""Where is a run watched? Dashboards (wandb, TensorBoard) and curves (CSV); none of them can stop a run.

`published` says what of a run is shown, `Tracker` what a dashboard has to be able to do; each dashboard is one file
here and one in ``conf/logger/``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from lightning_mdc.app.report.record import RunRecord
from lightning_mdc.app.tracking.contents import published
from lightning_mdc.app.tracking.tracker import About, Tracker, Trackers

log = logging.getLogger(__name__)

__all__ = ["About", "Tracker", "Trackers", "about_run", "opened", "show_stage"]


@contextmanager
def opened(trackers: Mapping[str, Tracker], about: About) -> Iterator[Trackers]:
    """Dashboards that are open inside, and say how it ended; at the end it is said where they are."""
    watched = Trackers(trackers, about)
    try:
        yield watched
    except BaseException:
        watched.finish(failed=True)
        _say_where(watched)
        raise
    watched.finish(failed=False)
    if about.kind != "trial":  # the sweep has a line per trial already
        _say_where(watched)


def _say_where(watched: Trackers) -> None:
    for key, place in watched.places.items():
        log.info("%-8s %s", f"{key}:", place)


def show_stage(watched: Trackers, folder: Path, name: str, mark: str | None) -> None:
    """Show what stage `name` left in the run's folder; see `Trackers.show_stage`."""
    watched.show_stage(name, mark, lambda: published(RunRecord(folder), name))


def about_run(folder: Path, settings: Mapping[str, Any], kind: str = "pipeline") -> About:
    """A run or trial by its folder and, in a sweep of Hydra's, by what is its own there."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return About(folder, f"{settings['name']} {folder.name}", kind=kind, settings=settings)
    hydra = HydraConfig.get()
    group = Path(hydra.sweep.dir).name
    if kind == "trial":
        return About(folder, f"trial {folder.name}", group, kind, settings)
    name = f"{hydra.job.num}: {hydra.job.override_dirname}"
    return About(folder, name[:128], group, kind, settings)
