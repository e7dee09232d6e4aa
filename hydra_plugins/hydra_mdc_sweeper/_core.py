"""The sweep: read the parameters, ask the study which trials are next, launch them, tell it what came back, save."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import CompactHydraException, ConfigCompositionException
from hydra.types import TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from lightning_mdc.errors import MdcError, SearchError
from lightning_mdc.gp_ei.process import GpEi
from lightning_mdc.gp_ei.projection import Constraint
from lightning_mdc.gp_ei.space import Space
from lightning_mdc.gp_ei.study import Row, Study, has_begun, observations, recall

from . import _cost, _recorded, _results
from ._folders import Folders, in_context_of, without_hydra
from ._params import Params, read_params, text
from .mdc_sweeper import MdcGpEiConf, MdcGpEiSweeper

log = logging.getLogger(__name__)

_STUDY = "study.jsonl"


class SweepError(CompactHydraException, SearchError):
    """An `MdcError` that Hydra shows as its message alone."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended; without a value it failed."""

    value: float | None
    seconds: float | None = None
    note: str = ""


class Sweep:
    """One sweep of one app.

    Args:
        sweeper: that Hydra made; has its settings, context and config.
        task_function: the app's.
    """

    params: Params
    folders: Folders
    study: Study

    def __init__(self, sweeper: MdcGpEiSweeper, task_function: TaskFunction) -> None:
        assert sweeper.config is not None and sweeper.hydra_context is not None
        self.sweeper, self.config, self.loader = sweeper, sweeper.config, sweeper.hydra_context.config_loader
        self.settings = _typed(sweeper.settings)
        given = self.settings.study
        self.study_path = (Path(self.config.hydra.sweep.dir) / _STUDY if given is None else Path(given)).absolute()
        with _shown():
            remembered = recall(self.study_path)
        if "sweep_dir" in remembered:
            self._go_on_in(self.study_path.parent / remembered["sweep_dir"])
        self.mark = remembered.get("mark", secrets.token_hex(8))
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=sweeper.hydra_context,
            task_function=_recorded.Recorded(task_function, self.mark),
            config=self.config,
        )

    def _go_on_in(self, folder: Path) -> None:
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
        with _shown():
            self._check_settings()
            self.params = read_params(self.settings.params, arguments)
            self.folders = Folders(self.loader, self.config, self.params, self.mark)
            samples = self._samples()
            self.sweeper.validate_batch_is_legal(samples)
            config = self._app_config(samples[0])
            with in_context_of(config):
                app_config = without_hydra(config)
                space, constraint, first = _cost.build(self.settings.constraint, self.params, app_config)
                on_end = self.settings.on_end and _cost.locate(self.settings.on_end, "hydra.sweeper.on_end")
                with Study(self._search(space, constraint, first), self.study_path, self._about()) as self.study:
                    self._open_folder()
                    self._run_trials()
                results = self._finish()
                if on_end:
                    trials = _results.trials(self.study, self.params, self.folders)
                    on_end({**results, "trials": trials}, self.folders.root, app_config)
                return results

    def _run_trials(self) -> None:
        began, before = time.perf_counter(), len(self.study.finished)
        left_behind = {row.number for row in self.study.rows if row.status == "running"}
        self._judge()
        try:
            while batch := self._next():
                for row, outcome in self._outcomes(batch, left_behind):
                    told = self.study.finish(row.number, outcome.value, seconds=outcome.seconds, note=outcome.note)
                    self._report(told, (time.perf_counter() - began) / (len(self.study.finished) - before))
                _results.save(self.study, self.params, self.folders)
                self._judge()
        except (KeyboardInterrupt, SystemExit) as stop:  # the latter is SIGTERM, see `Recorded`
            # Python prints notes last, below the traceback.
            stop.add_note(f"The sweep was interrupted: {self._counts()}; {self._how_to_go_on()}.")
            raise

    def _next(self) -> tuple[Row, ...]:
        """The next batch: trials that were left running, or as many new ones as are launched together."""
        running = tuple(row for row in self.study.rows if row.status == "running")
        if running:
            return running[: self.settings.n_jobs]
        missing = self.settings.n_trials - len(self.study.rows)
        if missing <= 0:
            return ()
        batch = self.study.next(min(missing, self.settings.n_jobs))
        if not batch:
            log.info("the search ends after %d trials: there is no other point to try", len(self.study.rows))
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

    def _check_settings(self) -> None:
        n_trials, n_jobs, rate = self.settings.n_trials, self.settings.n_jobs, self.settings.max_failure_rate
        if n_trials < 1:
            raise SearchError(f"n_trials={n_trials}: expected at least 1")
        if not 1 <= n_jobs <= n_trials:
            raise SearchError(f"n_jobs={n_jobs}: expected at least 1 and no more than n_trials={n_trials}")
        if not 0 <= rate <= 1:
            raise SearchError(f"max_failure_rate={rate}: expected a share between 0 and 1")

    def _samples(self) -> list[list[str]]:
        """Overrides of trials for Hydra to compose before any is run, so that a parameter it does not know shows now.

        One trial with each value of every choice; numbers from the middle.
        """
        space = Space(self.params.axes)
        most = max((len(axis.choices) for axis in space.axes if axis.choices is not None), default=1)
        points = np.where(space.numeric, (space.low + space.high) / 2, np.arange(most)[:, None])
        points = np.clip(points, space.low, space.high)
        return [self.params.overrides(space.params(point)) for point in points]

    def _app_config(self, sample: list[str]) -> DictConfig:
        """The config of a trial, but for what is searched: that is as the app's config has it."""
        try:
            return self.folders.composed(self.params.fixed_lines)
        except ConfigCompositionException:  # a group that has no default is searched
            return self.folders.composed(sample)

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
            prior=() if settings.warm_start is None else self._warm_start(settings.warm_start, space),
            n_candidates=(2000 if at_once else 200) if settings.n_candidates is None else settings.n_candidates,
            xi=settings.xi,
        )

    def _warm_start(self, path: str, space: Space) -> Any:
        if has_begun(self.study_path):
            log.info("warm_start is not read again: %s goes on with what it began with", self.study_path)
            return ()
        prior = observations(path, space, self.settings.direction)
        log.info("warm start: %d trials of %s inform this sweep", len(prior), path)
        return prior

    def _about(self) -> dict[str, Any]:
        """What makes two sweeps the same, beside what the search itself is."""
        constraint, about = self.settings.constraint, None
        if constraint is not None and constraint.callable is not None:
            about = {"callable": constraint.callable, "target": constraint.target, "tolerance": constraint.tolerance}
        fixed = {parameter.key: text(parameter.fixed) for parameter in self.params.parameters if not parameter.axes}
        return {"sweeper": "mdc_gp_ei", "constraint": about, "fixed": fixed}

    def _open_folder(self) -> None:
        folder = self.folders.root
        folder.mkdir(parents=True, exist_ok=True)
        if "mark" not in self.study.remembered:
            # A study in the sweep's folder moves along when that is moved.
            inside = self.study_path.parent == folder
            self.study.remember(mark=self.mark, sweep_dir="." if inside else str(folder))
        if self.study.rows:
            log.info("going on with %s: %s; the folder is %s", self.study_path, self._counts(), folder)
        else:
            axes, trials = len(self.study.search.space), self.settings.n_trials
            log.info("%d parameters to search in %d trials; the folder is %s", axes, trials, folder)
        if not (folder / "multirun.yaml").exists():
            OmegaConf.save(self.config, folder / "multirun.yaml")

    # --- a batch --------------------------------------------------------------------------------------------------

    def _outcomes(self, batch: Sequence[Row], left_behind: set[int]) -> list[tuple[Row, Outcome]]:
        """How all trials of a batch ended.

        Nothing is told before all have: a sweep that is killed meanwhile goes on exactly as if it had not been.
        """
        outcomes: dict[int, Outcome] = {}
        for row in batch:
            record = self.folders.final_record(row) if row.number in left_behind else None
            if record is not None and _recorded.is_over(record) and "returned" not in record:
                log.info("trial %d ended while the sweep did not run: taken from its folder", row.number)
                outcomes[row.number] = _outcome_of(record)
            else:
                self.folders.forget(row)
        while missing := [row for row in batch if row.number not in outcomes]:
            outcomes |= self._launch(_first_run(missing))
        return [(row, outcomes[row.number]) for row in batch]

    def _launch(self, rows: Sequence[Row]) -> dict[int, Outcome]:
        """Have trials of consecutive numbers run: launchers count up from the first."""
        overrides = [self.params.overrides(row.params) for row in rows]
        try:
            jobs = self.launcher.launch(overrides, initial_job_idx=rows[0].number)
        except Exception as error:
            return self._rescue(rows, error)
        return {row.number: self._outcome(row, job) for row, job in zip(rows, jobs, strict=True)}

    def _outcome(self, row: Row, job: JobReturn) -> Outcome:
        seconds = (self.folders.record(row) or {}).get("seconds")
        try:
            returned = job.return_value
        except Exception as error:
            return Outcome(None, seconds, _recorded.words(error))
        value = _recorded.number(returned)
        if value is None:
            raise self._wrong(row, _recorded.described(returned))
        return Outcome(value, seconds)

    def _rescue(self, rows: Sequence[Row], error: Exception) -> dict[int, Outcome]:
        """What became of trials whose launch failed: a worker died, mostly, and took the results of others along.

        Trials that had not begun are left out, to be launched again.
        """
        records = [(row, record) for row in rows if (record := self.folders.final_record(row)) is not None]
        if not records:
            raise SearchError(
                f"the launcher failed before any of the trials {_numbers(rows)} began: {_recorded.words(error)}; "
                f"{self._how_to_go_on()}"
            ) from error
        log.warning("launching trials %s ended with %s", _numbers(rows), _recorded.words(error))
        outcomes = {}
        for row, record in records:
            if "returned" in record:
                raise self._wrong(row, record["returned"]) from error
            died = Outcome(None, note=f"its process died ({_recorded.words(error)})")
            outcomes[row.number] = _outcome_of(record) if _recorded.is_over(record) else died
        return outcomes

    def _wrong(self, row: Row, returned: str) -> SearchError:
        return SearchError(
            f"trial {row.number} returned {returned}, not a number; return a float from the @hydra.main function: what "
            f"to {self.settings.direction}; {self._how_to_go_on()}"
        )

    # --- how it goes ----------------------------------------------------------------------------------------------

    def _judge(self) -> None:
        """Whether too many trials failed."""
        over, rate = self.study.finished, self.settings.max_failure_rate
        failed = [row for row in over if row.status == "failed"]
        if not failed or len(failed) <= rate * len(over):
            return
        others = f" (and {_numbers(failed[1:])})" if failed[1:] else ""
        raise SearchError(
            f"{len(failed)} of {len(over)} trials failed, more than max_failure_rate={rate:g} allows: trial "
            f"{failed[0].number}{others}: {failed[0].note}. The traceback is in {self.folders.of(failed[0])}/"
            f"{_recorded.FILE}. Raise hydra.sweeper.max_failure_rate to go on all the same; {self._how_to_go_on()}"
        )

    def _report(self, row: Row, seconds_each: float) -> None:
        study, total = self.study, max(self.settings.n_trials, len(self.study.rows))
        value = f"failed ({row.note})" if row.value is None else f"{row.value:.6g}"
        best = f", best {study.best.value:.6g} (trial {study.best.number})" if study.best else ""
        cost = "" if row.cost is None else f", cost {row.cost:.6g}"
        left = total - len(study.finished)
        estimate = f", about {_duration(left * seconds_each)} left" if left else ""
        log.info("trial %d: %s%s%s; %d of %d%s", row.number, value, best, cost, total - left, total, estimate)

    def _counts(self) -> str:
        rows = self.study.rows
        failed, running = (sum(row.status == status for row in rows) for status in ("failed", "running"))
        more = (f", {failed} of them failed" if failed else "") + (f", {running} not over" if running else "")
        return f"{len(rows) - running} trials{more}"

    def _how_to_go_on(self) -> str:
        return f"to go on, add hydra.sweeper.study={text(str(self.study_path))} to the same command"


@contextmanager
def _shown() -> Iterator[None]:
    """Errors of ours as Hydra shows them best."""
    try:
        yield
    except SweepError:
        raise
    except MdcError as error:
        raise SweepError(str(error)) from error


def _typed(settings: dict[str, Any]) -> MdcGpEiConf:
    merged = OmegaConf.merge(OmegaConf.structured(MdcGpEiConf), settings)
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


def _outcome_of(record: dict[str, Any]) -> Outcome:
    value = record.get("value")
    return Outcome(None if value is None else float(value), record.get("seconds"), record.get("error", ""))


def _first_run(rows: Sequence[Row]) -> list[Row]:
    """Rows up to the first gap in their numbers."""
    _, run = next(groupby(enumerate(rows), key=lambda pair: pair[1].number - pair[0]))
    return [row for _, row in run]


def _numbers(rows: Sequence[Row]) -> str:
    return ", ".join(str(row.number) for row in rows[:10]) + (", ..." if len(rows) > 10 else "")


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
