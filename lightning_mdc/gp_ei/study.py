"""A search that survives anything: numbered trials around `GpEi`, each one on disk before it starts and when it ends.

The file is JSON, a line each: what the search is about, then ``asked`` and ``told`` lines; see `Journal`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lightning_mdc.errors import SearchError
from lightning_mdc.gp_ei.journal import Journal, bytes_of, line_of
from lightning_mdc.gp_ei.process import GpEi, Observation
from lightning_mdc.gp_ei.space import Space

log = logging.getLogger(__name__)

_FORMAT = "lightning_mdc.search.1"


@dataclass(frozen=True)
class Trial:
    """One point that was tried, or is being tried.

    Attributes:
        number: from 0, in the order they were asked.
        params: values by the names of the axes.
        cost: what the constraint says they cost; None without one.
        value: of the objective; None while running and if it failed.
        status: ``"running"``, ``"done"`` or ``"failed"``.
        seconds: how long it took.
        note: why it failed, or what else is worth knowing.
        improvement: expected of it when it was asked for, in units of the value; None if it was drawn at random.
        facts: numbers that came with the value and that the search does not look at, such as the top-1.
    """

    number: int
    params: Mapping[str, Any]
    cost: float | None = None
    value: float | None = None
    status: str = "running"
    seconds: float | None = None
    note: str = ""
    improvement: float | None = None
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass
class StudyFile:
    """What a study file says.

    Attributes:
        header: what the search is about: ``space``, ``direction``, ``n_initial_points``, ``about``; empty if there is
            no such line.
        metadata: see `Study.add_metadata`; ``metric`` names what trials are worth, if it has a name.
        prior: parameters and values that the search began with.
        by_number: the trials; those that are over in the order in which they ended, after all that are running.
        readable, unreadable: the lines that could be read, and what is wrong with the others.
        is_torn: whether the last line has no end, which is what a kill in the middle of a write leaves.
    """

    header: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    prior: list[tuple[dict[str, Any], float]] = field(default_factory=list)
    by_number: dict[int, Trial] = field(default_factory=dict)
    readable: list[bytes] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    is_torn: bool = False

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials by number."""
        return tuple(self.by_number[number] for number in sorted(self.by_number))

    @property
    def best(self) -> Trial | None:
        """The best trial that is done so far, the first of equals; None if there is none."""
        sign = 1.0 if self.header["direction"] == "minimize" else -1.0
        done = [trial for trial in self.trials if trial.value is not None]
        return min(done, key=lambda trial: sign * (trial.value or 0.0), default=None)

    @property
    def running(self) -> tuple[Trial, ...]:
        """Trials that are not over: being run, or left behind by a process that was killed."""
        return tuple(trial for trial in self.trials if trial.status == "running")

    @property
    def finished(self) -> tuple[Trial, ...]:
        """Trials that are over, whether they succeeded or not."""
        return tuple(trial for trial in self.trials if trial.status != "running")


class Study(StudyFile):
    """The trials of one search, in memory and, with a `path`, on disk: a study file that is being written.

    Args:
        search: what asks for points; fresh. What the file holds is told to it.
        path: of the file, made if it is not there; None: nothing is written.
        about: what else makes two searches the same, JSON-ready: the budget, the data, the metric.

    Raises:
        SearchError: the file belongs to another search (says where they differ), is none of ours, is being used by
            another process, or cannot be written.
    """

    def __init__(self, search: GpEi, path: str | Path | None = None, about: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.search = search
        header = {
            "format": _FORMAT,
            "space": search.space.describe(),
            "direction": search.direction,
            "seed": search.seed,
            "n_initial_points": search.n_initial_points,
            "about": dict(about or {}),
        }
        self.header = json.loads(json.dumps(header, sort_keys=True))  # as a reader sees it: tuples are lists there
        self._journal = None if path is None else Journal(Path(path))
        if self._journal is not None:
            try:
                self._begin_or_go_on(self._journal)
            except BaseException:
                self.close()
                raise

    def next(self, n: int = 1) -> tuple[Trial, ...]:
        """The trials to run now: those a killed process left running, then new ones, `n` in all.

        Fewer, perhaps none, when the space has no other points left.
        """
        running = self.running[:n]
        if len(running) == n:
            return running
        space, constraint = self.search.space, self.search.constraint
        pending = np.array([space.point(trial.params) for trial in running]) if running else None
        first = max(self.by_number, default=-1) + 1
        points, improvements = self.search.ask(n - len(running), pending)
        new = []
        for number, (point, improvement) in enumerate(zip(points, improvements, strict=True), start=first):
            cost = None if constraint is None else float(np.asarray(constraint.cost(point[None]))[0])
            new.append(Trial(number, space.params(point), cost, improvement=improvement))
        self._write(
            *({"asked": t.number, "params": t.params, "cost": t.cost, "improvement": t.improvement} for t in new)
        )
        self.by_number |= {trial.number: trial for trial in new}
        return (*running, *new)

    def finish(
        self,
        number: int,
        value: float | None,
        *,
        seconds: float | None = None,
        note: str = "",
        facts: Mapping[str, float] | None = None,
    ) -> Trial:
        """Report how a running trial ended. No value, NaN or infinity: it failed.

        Raises:
            SearchError: no such trial is running, or the file cannot be written (the trial is still running then).
        """
        trial = self.by_number.get(number)
        if trial is None or trial.status != "running":
            raise SearchError(f"trial {number} is not running: it was never asked for, or is over")
        if value is not None and not math.isfinite(value):
            value, note = None, note or f"its value is {value}"
        status = "failed" if value is None else "done"
        finite = {name: float(fact) for name, fact in (facts or {}).items() if math.isfinite(fact)}
        line = {"told": number, "status": status, "value": value, "seconds": seconds}
        self._write(line | ({"note": note} if note else {}) | ({"facts": finite} if finite else {}))
        trial = replace(trial, value=value, status=status, seconds=seconds, note=note, facts=finite)
        self.by_number[number] = trial
        self.search.tell(self.search.space.point(trial.params)[None], [value])
        return trial

    def add_metadata(self, **facts: Any) -> None:
        """Keep something JSON-ready that is worth knowing when the search goes on; of one name the latest holds."""
        self._write({"metadata": facts})
        self.metadata |= facts

    def close(self) -> None:
        """Let go of the file."""
        if self._journal is not None:
            self._journal.close()

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- the file -------------------------------------------------------------------------------------------------

    def _begin_or_go_on(self, journal: Journal) -> None:
        search, data = self.search, journal.read()
        found = _parse(data, search.space)
        if not found.header and not found.by_number:
            # The header comes last: without it, this is a file that was being begun, and safe to begin again.
            begin: list[Mapping[str, Any]] = [
                {"prior": search.space.params(o.point), "value": o.value} for o in search.prior if o.value is not None
            ]
            begin.append(self.header)
            if not b"".join(map(line_of, begin)).startswith(data):
                raise SearchError(f"{journal.path} is no study file: it has no header; give another path")
            journal.clear()
            self._write(*begin)
            if prior := len(begin) - 1:
                log.info("warm start: %d trials of an earlier search inform this one", prior)
            return
        _check_same_search(journal.path, found.header or self.header, self.header)
        if found.unreadable or found.is_torn:
            _mend(journal, found, self.header)
        if found.header and found.header["space"] != self.header["space"]:  # in another order, or with more choices
            self._write(self.header)
        vars(self).update(vars(found) | {"header": self.header})
        search.prior = tuple(
            Observation(search.space.point(params, anywhere=True), value) for params, value in found.prior
        )
        for trial in found.by_number.values():
            if trial.status != "running":
                search.tell(search.space.point(trial.params)[None], [trial.value])

    def _write(self, *records: Mapping[str, Any]) -> None:
        if self._journal is None:
            return
        try:
            self._journal.append(records)
        except OSError as error:
            raise SearchError(
                f"study file {self._journal.path} cannot be written: {error}; the {len(self.finished)} trials in it "
                "are safe: make room and start again with the same file"
            ) from error


def _mend(journal: Journal, found: StudyFile, header: Mapping[str, Any]) -> None:
    """Leave only readable lines in the file; what was there stays beside it if any was damaged."""
    if found.unreadable:
        log.warning(
            "study file %s is damaged: %s; %d trials could be read and are kept, the file as it was is %s",
            journal.path,
            "; ".join(found.unreadable[:5]),
            len(found.by_number),
            journal.copy_aside(),
        )
    journal.replace(found.readable if found.header else [line_of(header), *found.readable])


def _check_same_search(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differences = _differences(before, now)
    if differences:
        raise SearchError(
            f"study file {path} belongs to another search: {'; '.join(differences[:3])}"
            f"{f' and {len(differences) - 3} more' if len(differences) > 3 else ''}. "
            "Give the old settings to go on with it, or another path to start anew"
        )


def _differences(before: Any, now: Any, where: str = "") -> list[str]:
    """What differs, leaf by leaf, in words."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = sorted({*before, *now})
        return [line for k in keys for line in _differences(before.get(k), now.get(k), f"{where}.{k}" if where else k)]
    if where == "space":
        before, now = ({axis["name"]: axis for axis in axes} for axes in (before, now))
        only = [f"its parameter {name!r} is not in this search" for name in sorted(set(before) - set(now))]
        only += [f"parameter {name!r} is not in it" for name in sorted(set(now) - set(before))]
        return only or _differences(before, now, "parameter")
    if where.startswith("parameter.") and where.endswith(".choices") and before and now:
        # Values by name, whatever their order; those that are new have not been tried yet.
        gone = [choice for choice in before if json.dumps(choice) not in map(json.dumps, now)]
        return [f"{where.removesuffix('.choices')} could be {choice!r}, which is no choice now" for choice in gone]
    return [] if before == now else [f"{where} was {before!r}, now {now!r}"]


# --- reading a file ---------------------------------------------------------------------------------------------------


def _parse(data: bytes, space: Space | None = None) -> StudyFile:
    """What a file says, as far as it can be read; without a space nothing is checked against it."""
    study = StudyFile()
    *lines, rest = data.split(b"\n")
    study.is_torn = rest != b""
    for number, line in enumerate(lines, start=1):
        try:
            _add(json.loads(line), study, space)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            study.unreadable.append(f"line {number} ({str(error) or type(error).__name__:.80})")
        else:
            study.readable.append(line + b"\n")
    return study


def _add(record: dict[str, Any], study: StudyFile, space: Space | None) -> None:
    """Add what one line says.

    Raises:
        ValueError, KeyError, TypeError: it says nothing sensible.
    """
    if "format" in record:
        if record["format"] != _FORMAT:
            raise ValueError(f"format {record['format']!r}")
        study.header = record
    elif "prior" in record:
        if space is not None:
            space.point(record["prior"], anywhere=True)
        study.prior.append((record["prior"], float(record["value"])))
    elif "metadata" in record:
        study.metadata |= record["metadata"]
    elif "asked" in record:
        number, cost, improvement = record["asked"], record["cost"], record["improvement"]
        if space is not None and study.header and not _differences(study.header["space"], space.describe(), "space"):
            space.point(record["params"])  # of another space everything is: that is said once, by the header
        if not isinstance(number, int) or number < 0 or number in study.by_number:
            raise ValueError(f"trial number {number!r}")
        study.by_number[number] = Trial(number, record["params"], _float(cost), improvement=_float(improvement))
    else:
        trial, value, status = study.by_number[record["told"]], record["value"], record["status"]
        if status != ("failed" if value is None else "done"):
            raise ValueError(f"status {status!r} with value {value!r}")
        ended = replace(
            trial,
            value=_float(value),
            status=status,
            seconds=_float(record["seconds"]),
            note=str(record.get("note", "")),
            facts={str(name): float(fact) for name, fact in record.get("facts", {}).items()},
        )
        del study.by_number[trial.number]  # and back at the end: finished trials are in the order they were told
        study.by_number[trial.number] = ended


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _read(path: str | Path, space: Space | None = None, called: str | None = None) -> StudyFile:
    try:
        return _parse(bytes_of(Path(path)), space)
    except OSError as error:
        raise SearchError(f"{called or f'study file {path}'} cannot be read: {error}; give another path") from error


def read_study(path: str | Path) -> StudyFile:
    """The trials in a study file, also of a search that is under way.

    Raises:
        SearchError: it cannot be read, or has no header (yet).
    """
    study = _read(path)
    if not study.header:
        raise SearchError(f"{path} is no study file: it has no header")
    return study


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of a study file (see `Study.add_metadata`), also of a damaged one; nothing if there is no file.

    Raises:
        SearchError: it is there and cannot be read.
    """
    try:
        return _read(path).metadata
    except SearchError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return {}
        raise


def observations(
    path: str | Path | None,
    space: Space,
    direction: str,
    begun: str | Path | None = None,
    metric: str | None = None,
) -> tuple[Observation, ...]:
    """What an earlier search found, for another one over the same parameters (of another budget, say).

    Args:
        path: the earlier one's study file; None: there was none.
        space, direction: of the other one.
        begun: the other one's own study file; if it is begun, it holds what it began with, and `path` is not read.
        metric: what its values mean; None: not known.

    Raises:
        SearchError: the file cannot be read, or its parameters, its direction or its metric are others.
    """
    if path is None:
        return ()
    with contextlib.suppress(OSError):  # of one that cannot be read the search itself will say so
        if begun is not None and _parse(bytes_of(Path(begun))).header:
            log.info("warm_start is not read again: %s goes on with what it began with", begun)
            return ()
    called = f"warm_start={str(path)!r}"
    study = _read(path, space, called)
    if not study.header:
        raise SearchError(f"{called} is no study file; give one that an earlier search has written")
    if study.header["direction"] != direction:
        raise SearchError(
            f"{called} was to {study.header['direction']}, this search is to {direction}: its values mean the opposite"
        )
    if None not in (metric, judged_by := study.metadata.get("metric")) and metric != judged_by:
        raise SearchError(
            f"{called} was judged by metric={judged_by!r}, this search is by {metric!r}: its values mean something else"
        )
    known, axes = [axis["name"] for axis in study.header["space"]], [axis.name for axis in space.axes]
    if sorted(known) != sorted(axes):
        raise SearchError(
            f"{called} searched {len(known)} parameters ({', '.join(known[:3])}, ...), this one {len(axes)} "
            f"({', '.join(axes[:3])}, ...); use the same dimensions and groups"
        )
    done = [trial for trial in study.by_number.values() if trial.value is not None]
    return tuple(Observation(space.point(trial.params, anywhere=True), trial.value) for trial in done)
