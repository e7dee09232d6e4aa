"""Where trials write, and what they left there."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from lightning_mdc.files import read_json
from lightning_mdc.gp_ei.study import Trial

from . import _recorded
from ._params import Params

log = logging.getLogger(__name__)

_POLL = 0.5  # seconds between looks at a trial that somebody else still runs


class Folders:
    """The folders of a sweep's trials.

    Args:
        loader, config: Hydra's, of the sweep.
        params: of the sweep.
        study_id: see `Recorded`.
    """

    def __init__(self, loader: ConfigLoader, config: DictConfig, params: Params, study_id: str) -> None:
        self.loader, self.config, self.params, self.study_id = loader, config, params, study_id
        self.root = Path(config.hydra.sweep.dir).absolute()
        sweep: Any = OmegaConf.to_container(config.hydra.sweep, resolve=False)
        self._numbered = sweep["subdir"] == "${hydra.job.num}" and not any(
            parameter.name.startswith("hydra.") for parameter in params.parameters
        )
        self._known: dict[int, Path | None] = {}

    def composed(self, overrides: Sequence[str]) -> DictConfig:
        """The config of a job, as Hydra's launchers compose it."""
        return self.loader.load_sweep_config(self.config, list(overrides))

    def of(self, trial: Trial) -> Path | None:
        """The folder of a trial; None if that depends on what only the job knows."""
        if trial.number not in self._known:
            self._known[trial.number] = self.root / str(trial.number) if self._numbered else self._asked_of_hydra(trial)
        return self._known[trial.number]

    def inside(self, trial: Trial) -> str | None:
        """The folder of a trial as seen from that of the sweep."""
        folder = self.of(trial)
        return None if folder is None else os.path.relpath(folder, self.root)

    def record(self, trial: Trial) -> dict[str, Any] | None:
        """What the trial has written about itself; nothing that another study, or another trial, left there."""
        path = self._record_path(trial)
        record = None if path is None else read_json(path)
        if not isinstance(record, dict) or (record.get("study"), record.get("trial")) != (self.study_id, trial.number):
            return None
        return record

    def final_record(self, trial: Trial) -> dict[str, Any] | None:
        """The trial's record once no process runs it any more: jobs on other machines outlive a launcher."""
        path, waiting = self._record_path(trial), False
        while (record := self.record(trial)) is not None and not _recorded.is_over(record):
            assert path is not None
            if not _recorded.is_alive(path):
                return self.record(trial)  # it may have ended between both looks
            if not waiting:
                who = f"process {record.get('pid')} on {record.get('host')}"
                log.info("trial %d is still being run by %s: waiting for it", trial.number, who)
            waiting = True
            time.sleep(_POLL)
        return record

    def forget(self, trial: Trial) -> None:
        """Delete the record of an earlier attempt."""
        if (path := self._record_path(trial)) is not None:
            path.unlink(missing_ok=True)

    def _record_path(self, trial: Trial) -> Path | None:
        folder = self.of(trial)
        return None if folder is None else folder / _recorded.FILE

    def _asked_of_hydra(self, trial: Trial) -> Path | None:
        config = self.composed(self.params.overrides(trial.params))
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.job.num = trial.number
        with in_context_of(config):
            try:
                return Path(config.hydra.sweep.dir).absolute() / str(config.hydra.sweep.subdir)
            except OmegaConfBaseException as error:
                log.debug("the folder of trial %d is not known beforehand: %s", trial.number, error)
                return None


@contextmanager
def in_context_of(config: DictConfig) -> Iterator[None]:
    """``${hydra:...}`` and `HydraConfig` mean this config, as they do in a job."""
    hydra: Any = HydraConfig.instance()
    before = hydra.cfg
    hydra.set_config(config)
    try:
        yield
    finally:
        hydra.cfg = before


def without_hydra(config: DictConfig) -> DictConfig:
    """A job's config as the app's function gets it."""
    copy = config.copy()
    with read_write(copy), open_dict(copy):
        del copy["hydra"]
    return copy
