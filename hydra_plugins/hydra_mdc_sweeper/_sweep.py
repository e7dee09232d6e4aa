"""The sweep: read the parameters, ask the study which trials are next, launch them, tell it what came back, save."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import CompactHydraException, ConfigCompositionException
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from lightning_mdc.errors import MdcError, SearchError, as_number, check_number, check_whole
from lightning_mdc.gp_ei.process import GpEi
from lightning_mdc.gp_ei.projection import Constraint
from lightning_mdc.gp_ei.space import Space
from lightning_mdc.gp_ei.study import Study, Trial, observations, read_metadata

from . import _cost, _recorded, _results
from ._conf import MdcGpEiConf
from ._folders import Folders, in_context_of, without_hydra
from ._params import Params, read_params, text

log = logging.getLogger(__name__)

_STUDY = "study.jsonl"
# What to write instead of keys of Optuna's sweeper.
_INSTEAD = {
    "sampler": "seed, n_initial_points and xi are hydra.sweeper.seed, .n_initial_points and .xi",
    "storage": "the file of trials is hydra.sweeper.study",
    "study_name": "the file of trials is hydra.sweeper.study",
    "search_space": "what is searched is hydra.sweeper.params, in Hydra's sweep syntax",
    "custom_search_space": "a search over what a function prices is hydra.sweeper.constraint.callable",
}


class SweepError(CompactHydraException, SearchError):
    """An `MdcError` that Hydra shows as its message alone."""


class Sweep:
    """One sweep of one app.

    Args:
        settings: see `MdcGpEiConf`.
        config: Hydra's, of the sweep.
        context: Hydra's, whose loader composes the trials' configs.
        task_function: the app's.
    """

    params: Params
    folders: Folders
    study: Study

    def __init__(
        self, settings: Mapping[str, Any], config: DictConfig, context: HydraContext, task_function: TaskFunction
    ) -> None:
        self.config, self.loader = config, context.config_loader
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(MdcGpEiConf), settings))
        assert isinstance(typed, MdcGpEiConf)
        self.settings = typed
        given = self.settings.study
        self.study_path = (Path(config.hydra.sweep.dir) / _STUDY if given is None else Path(given)).absolute()
        with _as_sweep_errors():
            metadata = read_metadata(self.study_path)
        if "sweep_dir" in metadata:
            self._use_folder(self.study_path.parent / metadata["sweep_dir"])
        self.study_id = metadata.get("study_id", secrets.token_hex(8))
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context,
            task_function=_recorded.Recorded(task_function, self.study_id),
            config=config,
        )

    def _use_folder(self, folder: Path) -> None:
        """Make `folder` the one of this sweep; of its jobs too, which compose their config from overrides."""
        folder = Path(os.path.normpath(folder))
        with read_write(self.config.hydra), open_dict(self.config.hydra):
            self.config.hydra.sweep.dir = str(folder)
            self.config.hydra.overrides.hydra.append(f"hydra.sweep.dir={text(str(folder))}")

    # --- from start to end ----------------------------------------------------------------------------------------

    def run(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Run the sweep; returns what ``optimization_results.yaml`` says.

        Raises:
            SweepError: see `SearchError` and `BudgetError`.
        """
        with _as_sweep_errors():
            self._check_keys()
            n_trials = self.settings.n_trials
            check_whole("n_trials", n_trials, 1, SearchError)
            check_number("n_jobs", self.settings.n_jobs, "no more than n_trials", SearchError, least=1, most=n_trials)
            share = "a share of the trials"
            check_number("max_failure_rate", self.settings.max_failure_rate, share, SearchError, least=0, most=1)
            self.params = read_params(self.settings.params, arguments)
            self.folders = Folders(self.loader, self.config, self.params, self.study_id)
            config = self._checked_config()
            with in_context_of(config):
                app_config = without_hydra(config)
                space, constraint, first = _cost.build(self.settings.constraint, self.params, app_config)
                on_end = self.settings.on_end and _cost.locate(self.settings.on_end, "hydra.sweeper.on_end")
                with Study(self._search(space, constraint, first), self.study_path, self._about()) as self.study:
                    self._begin_or_go_on()
                    self._run_trials()
                results = self._finish()
                if on_end:
                    trials = _results.trials(self.study, self.params, self.folders)
                    on_end({**results, "trials": trials, "study": str(self.study_path)}, self.folders.root, app_config)
                return results

    def _run_trials(self) -> None:
        began, before = time.perf_counter(), len(self.study.finished)
        left_behind = {trial.number for trial in self.study.running}
        self._check_failures()
        try:
            while batch := self._next():
                for ended in self._ended(batch, left_behind):
                    trial = self.study.finish(ended.number, ended.value, seconds=ended.seconds, note=ended.note)
                    self._report(trial, (time.perf_counter() - began) / (len(self.study.finished) - before))
                _results.save(self.study, self.params, self.folders)
                self._check_failures()
        except (KeyboardInterrupt, SystemExit) as stop:  # the latter is SIGTERM, see `Recorded`
            # Python prints notes last, below the traceback.
            stop.add_note(f"The sweep was interrupted: {self._counts()}; {self._how_to_go_on()}.")
            raise

    def _next(self) -> tuple[Trial, ...]:
        """The next batch: trials that were left running, or as many new ones as are launched together."""
        if self.study.running:
            return self.study.running[: self.settings.n_jobs]
        missing = self.settings.n_trials - len(self.study.trials)
        if missing <= 0:
            return ()
        batch = self.study.next(min(missing, self.settings.n_jobs))
        if not batch:
            log.info("the search ends after %d trials: there is no other point to try", len(self.study.trials))
        return batch

    def _finish(self) -> dict[str, Any]:
        study, folder = self.study, self.folders.root
        _results.save(study, self.params, self.folders)
        _results.draw(study, folder)
        best = "no trial succeeded"
        if study.best is not None:
            best = f"best value {study.best.value:.6g}: trial {study.best.number}"
        log.info("%s; %s; results are in %s", self._counts(), best, folder)
        return _results.results(study, self.params, self.folders)

    # --- before the first trial -----------------------------------------------------------------------------------

    def _check_keys(self) -> None:
        for key, instead in _INSTEAD.items():
            value = getattr(self.settings, key)
            if isinstance(value, dict):
                value = {name: given for name, given in value.items() if given is not None}
            if value:
                raise SearchError(
                    f"hydra.sweeper.{key}={value!r} is a key of Optuna's sweeper, which mdc_gp_ei has no use for: "
                    f"leave it out; {instead}"
                )

    def _checked_config(self) -> DictConfig:
        """The config of a trial, but for what is searched: that is as the app's config has it.

        Trials with each value of every choice, numbers from the middle, are composed before any is run, so that a
        parameter that Hydra does not know shows now.
        """
        space = Space(self.params.axes)
        most = max((len(axis.choices) for axis in space.axes if axis.choices is not None), default=1)
        points = np.where(space.numeric, (space.low + space.high) / 2, np.arange(most)[:, None])
        points = np.clip(points, space.low, space.high)
        configs = [self.folders.composed(self.params.overrides(space.params(point))) for point in points]
        try:
            return self.folders.composed(self.params.fixed_lines)
        except ConfigCompositionException:  # a group that has no default is searched
            return configs[0]

    def _search(self, space: Space, constraint: Constraint | None, first: np.ndarray | None) -> GpEi:
        settings = self.settings
        at_once = constraint is None or (settings.constraint is not None and settings.constraint.vectorized)
        return GpEi(
            space,
            constraint,
            direction=settings.direction,
            seed=settings.seed,
            n_initial_points=settings.n_initial_points,
            first=first,
            prior=observations(settings.warm_start, space, settings.direction, self.study_path),
            n_candidates=(2000 if at_once else 200) if settings.n_candidates is None else settings.n_candidates,
            xi=settings.xi,
        )

    def _about(self) -> dict[str, Any]:
        """What makes two sweeps the same, beside what the search itself is."""
        constraint, about = self.settings.constraint, None
        if constraint is not None and constraint.callable is not None:
            about = {"callable": constraint.callable, "target": constraint.target, "tolerance": constraint.tolerance}
        fixed = {parameter.key: text(parameter.fixed) for parameter in self.params.parameters if not parameter.axes}
        return {"sweeper": "mdc_gp_ei", "constraint": about, "fixed": fixed}

    def _begin_or_go_on(self) -> None:
        folder = self.folders.root
        folder.mkdir(parents=True, exist_ok=True)
        if "study_id" not in self.study.metadata:
            # A study in the sweep's folder moves along when that is moved.
            inside = self.study_path.parent == folder
            self.study.add_metadata(study_id=self.study_id, sweep_dir="." if inside else str(folder))
        if self.study.trials:
            log.info("going on with %s: %s; the folder is %s", self.study_path, self._counts(), folder)
        else:
            axes, trials = len(self.study.search.space), self.settings.n_trials
            log.info("%d parameters to search in %d trials; the folder is %s", axes, trials, folder)
        if not (folder / "multirun.yaml").exists():
            OmegaConf.save(self.config, folder / "multirun.yaml")

    # --- a batch --------------------------------------------------------------------------------------------------

    def _ended(self, batch: Sequence[Trial], left_behind: set[int]) -> list[Trial]:
        """All trials of a batch with value, seconds and note, once they have been run; without a value they failed.

        None is told to the study before all have ended: a sweep that is killed meanwhile goes on exactly as if it had
        not been.
        """
        ended: dict[int, Trial] = {}
        for trial in batch:
            record = self.folders.final_record(trial) if trial.number in left_behind else None
            if record is not None and _recorded.is_over(record) and "returned" not in record:
                log.info("trial %d ended while the sweep did not run: taken from its folder", trial.number)
                ended[trial.number] = _with_record(trial, record)
            else:
                self.folders.forget(trial)
        while missing := [trial for trial in batch if trial.number not in ended]:
            ended |= {trial.number: trial for trial in self._launch(_up_to_gap(missing))}
        return [ended[trial.number] for trial in batch]

    def _launch(self, trials: Sequence[Trial]) -> list[Trial]:
        """Have trials of consecutive numbers run: launchers count up from the first."""
        overrides = [self.params.overrides(trial.params) for trial in trials]
        try:
            jobs = self.launcher.launch(overrides, initial_job_idx=trials[0].number)
        except Exception as error:
            return self._recovered(trials, error)
        return [self._with_return(trial, job) for trial, job in zip(trials, jobs, strict=True)]

    def _with_return(self, trial: Trial, job: JobReturn) -> Trial:
        seconds = (self.folders.record(trial) or {}).get("seconds")
        try:
            returned = job.return_value
        except Exception as error:
            return replace(trial, seconds=seconds, note=_recorded.one_line(error))
        value = as_number(returned)
        if value is None:
            raise self._no_number(trial, _recorded.described(returned))
        return replace(trial, value=value, seconds=seconds)

    def _recovered(self, trials: Sequence[Trial], error: Exception) -> list[Trial]:
        """What became of trials whose launch failed: a worker died, mostly, and took the results of others along.

        Trials that had not begun are left out, to be launched again.
        """
        records = [(t, record) for t in trials if (record := self.folders.final_record(t)) is not None]
        if not records:
            raise SearchError(
                f"the launcher failed before any of the trials {_numbers(trials)} began: {_recorded.one_line(error)}; "
                f"{self._how_to_go_on()}"
            ) from error
        log.warning("launching trials %s ended with %s", _numbers(trials), _recorded.one_line(error))
        ended = []
        for trial, record in records:
            if "returned" in record:
                raise self._no_number(trial, record["returned"]) from error
            died = replace(trial, note=f"its process died ({_recorded.one_line(error)})")
            ended.append(_with_record(trial, record) if _recorded.is_over(record) else died)
        return ended

    def _no_number(self, trial: Trial, returned: str) -> SearchError:
        return SearchError(
            f"trial {trial.number} returned {returned}, not a number; return a float from the @hydra.main function: "
            f"what to {self.settings.direction}; {self._how_to_go_on()}"
        )

    # --- how it goes ----------------------------------------------------------------------------------------------

    def _check_failures(self) -> None:
        """End the sweep if too many trials failed."""
        over, rate = self.study.finished, self.settings.max_failure_rate
        failed = [trial for trial in over if trial.status == "failed"]
        if not failed or len(failed) <= rate * len(over):
            return
        others = f" (and {_numbers(failed[1:])})" if failed[1:] else ""
        raise SearchError(
            f"{len(failed)} of {len(over)} trials failed, more than max_failure_rate={rate:g} allows: trial "
            f"{failed[0].number}{others}: {failed[0].note}. The traceback is in {self.folders.of(failed[0])}/"
            f"{_recorded.FILE}. Raise hydra.sweeper.max_failure_rate to go on all the same; {self._how_to_go_on()}"
        )

    def _report(self, trial: Trial, seconds_each: float) -> None:
        study, total = self.study, max(self.settings.n_trials, len(self.study.trials))
        value = f"failed ({trial.note})" if trial.value is None else f"{trial.value:.6g}"
        best = f", best {study.best.value:.6g} (trial {study.best.number})" if study.best else ""
        cost = "" if trial.cost is None else f", cost {trial.cost:.6g}"
        left = total - len(study.finished)
        estimate = f", about {_duration(left * seconds_each)} left" if left else ""
        log.info("trial %d: %s%s%s; %d of %d%s", trial.number, value, best, cost, total - left, total, estimate)

    def _counts(self) -> str:
        finished, running = self.study.finished, len(self.study.running)
        failed = sum(trial.status == "failed" for trial in finished)
        more = (f", {failed} of them failed" if failed else "") + (f", {running} not over" if running else "")
        return f"{len(finished)} trials{more}"

    def _how_to_go_on(self) -> str:
        return f"to go on, add hydra.sweeper.study={text(str(self.study_path))} to the same command"


@contextmanager
def _as_sweep_errors() -> Iterator[None]:
    """Errors of ours as Hydra shows them best."""
    try:
        yield
    except SweepError:
        raise
    except MdcError as error:
        raise SweepError(str(error)) from error


def _with_record(trial: Trial, record: Mapping[str, Any]) -> Trial:
    value = record.get("value")
    value = None if value is None else float(value)
    return replace(trial, value=value, seconds=record.get("seconds"), note=record.get("error", ""))


def _up_to_gap(trials: Sequence[Trial]) -> list[Trial]:
    """Trials up to the first gap in their numbers."""
    _, run = next(groupby(enumerate(trials), key=lambda pair: pair[1].number - pair[0]))
    return [trial for _, trial in run]


def _numbers(trials: Sequence[Trial]) -> str:
    return ", ".join(str(trial.number) for trial in trials[:10]) + (", ..." if len(trials) > 10 else "")


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
