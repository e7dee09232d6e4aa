"""A search that survives anything: numbered trials around `GpEi`, each one on disk before it starts and when it ends.

The file is JSON, a line each: what the search is about, then ``asked`` and ``told`` lines. Lines are only ever appended
(one write, synced), so that a process killed at any moment leaves at most one torn line, which the next one drops.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lightning_mdc.errors import SearchError
from lightning_mdc.files import replacing
from lightning_mdc.gp_ei.process import GpEi, Observation
from lightning_mdc.gp_ei.space import Space

try:
    import fcntl
except ImportError:  # not on Windows: two searches on one file are not noticed there
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

# Device and inode of the files that searches of this process have open.
_OPEN: set[tuple[int, int]] = set()

_FORMAT = "lightning_mdc.search.1"
# running: asked, not told. stopped: given up early; its value is an estimate and never the best.
STATUSES = ("running", "done", "failed", "stopped")


@dataclass(frozen=True)
class Row:
    """One trial.

    Attributes:
        number: from 0, in the order they were asked.
        params: values by the names of the axes.
        cost: what the constraint says they cost; None without one.
        improvement: expected of it when it was asked for, in units of the value; None if it was drawn at random.
        value: of the objective; None while running and if it failed.
        status: ``"running"``, ``"done"``, ``"failed"`` or ``"stopped"``.
        seconds: how long it took.
        note: why it failed, or what else is worth knowing.
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
class _Journal:
    """What a file holds: its header, what went before the first trial, the trials, and what could not be read."""

    header: dict[str, Any] | None = None
    prior: list[tuple[dict[str, Any], float]] = field(default_factory=list)
    rows: dict[int, Row] = field(default_factory=dict)
    remembered: dict[str, Any] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    readable: list[bytes] = field(default_factory=list)
    torn: bool = False


class Study:
    """The trials of one search, in memory and, with a `path`, on disk.

    Args:
        search: what asks for points; fresh. What the file holds is told to it.
        path: of the file, made if it is not there; None: nothing is written.
        about: what else makes two searches the same, JSON-ready: the budget, the data, the metric.

    Raises:
        SearchError: the file belongs to another search (says where they differ), is none of ours, is being used by
            another process, or cannot be written.
    """

    def __init__(self, search: GpEi, path: str | Path | None = None, about: Mapping[str, Any] | None = None) -> None:
        self.search, self.path = search, None if path is None else Path(path)
        self.remembered: dict[str, Any] = {}
        self._rows: dict[int, Row] = {}
        self._file: Any = None
        self._identity: tuple[int, int] = (-1, -1)
        prior = [(search.space.params(o.point), o.value) for o in search.prior]
        header = {
            "format": _FORMAT,
            "space": search.space.describe(),
            "direction": search.direction,
            "seed": search.seed,
            "n_initial_points": search.n_initial_points,
            "about": dict(about or {}),
        }
        # As a reader of the file will see it: tuples are lists there.
        self.header: dict[str, Any] = json.loads(json.dumps(header, sort_keys=True))
        if self.path is not None:
            self._open(prior)

    # --- trials ---------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> tuple[Row, ...]:
        """All trials by number."""
        return tuple(self._rows[number] for number in sorted(self._rows))

    @property
    def finished(self) -> tuple[Row, ...]:
        """Trials that are over, whether they succeeded or not."""
        return tuple(row for row in self.rows if row.status != "running")

    @property
    def best(self) -> Row | None:
        """The best trial that is done, the first of equals; None if there is none."""
        return _best(self.rows, self.search.direction)

    def next(self, n: int = 1) -> tuple[Row, ...]:
        """The trials to run now: those a killed process left running, then new ones, `n` in all.

        Fewer, perhaps none, when the space has no other points left.
        """
        rows = [row for row in self.rows if row.status == "running"][:n]
        if len(rows) == n:
            return tuple(rows)
        space = self.search.space
        pending = np.array([space.point(row.params) for row in rows]) if rows else None
        number = max(self._rows, default=-1) + 1
        lines = []
        for point, improvement in zip(*self.search.ask_with_improvement(n - len(rows), pending), strict=True):
            constraint = self.search.constraint
            cost = None if constraint is None else float(np.asarray(constraint.cost(point[None]))[0])
            row = Row(number, space.params(point), cost, improvement=improvement)
            rows.append(row)
            lines.append({"asked": number, "params": row.params, "cost": cost, "improvement": improvement})
            number += 1
        self._append(*lines)
        self._rows |= {row.number: row for row in rows}
        return tuple(rows)

    def finish(
        self,
        number: int,
        value: float | None,
        *,
        status: str | None = None,
        seconds: float | None = None,
        note: str = "",
        facts: Mapping[str, float] | None = None,
    ) -> Row:
        """Report how a running trial ended. No value, NaN or infinity: it failed.

        Raises:
            SearchError: no such trial is running, or the file cannot be written (the trial is still running then).
        """
        row = self._rows.get(number)
        if row is None or row.status != "running":
            raise SearchError(f"trial {number} is not running: it was never asked for, or is over")
        worked = value is not None and math.isfinite(value)
        if value is not None and not worked:
            note = note or f"its value is {value}"
        if not worked:
            value, status = None, "failed"
        known = {name: float(fact) for name, fact in (facts or {}).items() if math.isfinite(fact)}
        row = replace(row, value=value, status=status or "done", seconds=seconds, note=note, facts=known)
        self._append(
            {
                "told": number,
                "status": row.status,
                "value": value,
                "seconds": seconds,
                **({"note": note} if note else {}),
                **({"facts": known} if known else {}),
            }
        )
        self._rows[number] = row
        self.search.tell(self.search.space.point(row.params)[None], [value])
        return row

    def remember(self, **facts: Any) -> None:
        """Keep something JSON-ready that is worth knowing when the search goes on; of a name the latest holds."""
        self._append({"remember": facts})
        self.remembered |= facts

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
        _OPEN.discard(self._identity)

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- the file -------------------------------------------------------------------------------------------------

    def _open(self, prior: Sequence[tuple[Mapping[str, Any], float | None]]) -> None:
        assert self.path is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: one write, one line; nothing is left to be written at exit.
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise SearchError(f"study file {self.path} cannot be written: {error}; give another path") from error
        try:
            self._lock()
            self._file.seek(0)
            data = self._file.read()
            journal = _parse(data, self.search.space)
            if journal.header is None and not journal.rows:
                # The header comes last: without it, this is a file that was being begun, and safe to begin again.
                begin = [{"prior": dict(params), "value": value} for params, value in prior if value is not None]
                begin.append(self.header)
                if not b"".join(map(_line, begin)).startswith(data):
                    raise SearchError(f"{self.path} is no study file: it has no header; give another path")
                self._file.truncate(0)
                self._append(*begin)
                return
            self._compare(journal.header)
            if journal.unreadable or journal.torn:
                self._mend(journal)
        except BaseException:
            self.close()
            raise
        self._rows, self.remembered = journal.rows, journal.remembered
        self.search.prior = tuple(
            Observation(self.search.space.point_anywhere(params), value) for params, value in journal.prior
        )
        for row in journal.rows.values():
            if row.status != "running":
                self.search.tell(self.search.space.point(row.params)[None], [row.value])

    def _lock(self) -> None:
        in_use = SearchError(
            f"study file {self.path} is in use by another search; wait for it, stop it, or give another path"
        )
        stat = os.fstat(self._file.fileno())
        identity = (stat.st_dev, stat.st_ino)
        if identity in _OPEN:  # record locks do not hold within a process
            raise in_use
        if fcntl is not None:
            self._lock_against_others(in_use)
        _OPEN.add(identity)
        self._identity = identity

    def _lock_against_others(self, in_use: SearchError) -> None:
        try:
            # Not flock: a forked data loader would go on holding that after we are killed.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise in_use from error
        except OSError as error:  # a file system without locks
            log.debug("study file %s cannot be locked: %s", self.path, error)

    def _compare(self, theirs: dict[str, Any] | None) -> None:
        if theirs is None or theirs == self.header:
            return
        differences = list(_differences(theirs, self.header))
        raise SearchError(
            f"study file {self.path} belongs to another search: {'; '.join(differences[:3])}"
            f"{f' and {len(differences) - 3} more' if len(differences) > 3 else ''}. "
            "Give the old settings to go on with it, or another path to start anew"
        )

    def _mend(self, journal: _Journal) -> None:
        """Leave only readable lines in the file; what was there stays beside it if any was damaged."""
        assert self.path is not None
        lines = journal.readable
        if journal.header is None:
            lines = [_line(self.header), *lines]
        if journal.unreadable:
            number = 1
            while (aside := self.path.with_name(f"{self.path.name}.damaged{number}")).exists():
                number += 1
            self._file.seek(0)
            aside.write_bytes(self._file.read())
            log.warning(
                "study file %s is damaged: %s; %d trials could be read and are kept, the file as it was is %s",
                self.path,
                "; ".join(journal.unreadable[:5]),
                len(journal.rows),
                aside,
            )
        with replacing(self.path) as beside:
            beside.write_bytes(b"".join(lines))
        self.close()
        self._file = self.path.open("a+b", buffering=0)
        self._lock()

    def _append(self, *records: Mapping[str, Any]) -> None:
        if self._file is None or not records:
            return
        data = b"".join(_line(record) for record in records)
        size = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(data) != len(data):
                raise OSError("only a part could be written")
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(size)  # half a line would make the next one unreadable
            raise SearchError(
                f"study file {self.path} cannot be written: {error}; the {len(self.finished)} trials in it are safe: "
                "make room and start again with the same file"
            ) from error


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, allow_nan=False).encode() + b"\n"


def _parse(data: bytes, space: Space | None) -> _Journal:
    journal = _Journal()
    lines = data.split(b"\n")
    journal.torn = lines[-1] != b""  # what a kill in the middle of a write leaves; not damage
    for number, line in enumerate(lines[:-1], start=1):
        try:
            _take(json.loads(line), journal, space)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            journal.unreadable.append(f"line {number} ({str(error) or type(error).__name__:.80})")
        else:
            journal.readable.append(line + b"\n")
    return journal


def _take(record: dict[str, Any], journal: _Journal, space: Space | None) -> None:
    """Add what one line says; without a space nothing is checked against it.

    Raises:
        ValueError, KeyError, TypeError: it says nothing sensible.
    """
    if "format" in record:
        if record["format"] != _FORMAT:
            raise ValueError(f"format {record['format']!r}")
        journal.header = record
    elif "prior" in record:
        if space is not None:
            space.point_anywhere(record["prior"])
        journal.prior.append((record["prior"], float(record["value"])))
    elif "remember" in record:
        journal.remembered |= record["remember"]
    elif "asked" in record:
        number, cost = record["asked"], record["cost"]
        if space is not None and journal.header is not None and journal.header["space"] == space.describe():
            space.point(record["params"])  # of another space everything is: that is said once, by the header
        if not isinstance(number, int) or number < 0 or number in journal.rows:
            raise ValueError(f"trial number {number!r}")
        improvement = record.get("improvement")  # not in the files of the first release
        journal.rows[number] = Row(
            number,
            record["params"],
            None if cost is None else float(cost),
            improvement=None if improvement is None else float(improvement),
        )
    else:
        row, value, seconds = journal.rows[record["told"]], record["value"], record["seconds"]
        if record["status"] not in STATUSES[1:] or (value is None) != (record["status"] == "failed"):
            raise ValueError(f"status {record['status']!r} with value {value!r}")
        del journal.rows[row.number]  # and back at the end: finished trials are in the order they were told
        journal.rows[row.number] = replace(
            row,
            value=None if value is None else float(value),
            status=record["status"],
            seconds=None if seconds is None else float(seconds),
            note=str(record.get("note", "")),
            facts={str(name): float(fact) for name, fact in record.get("facts", {}).items()},
        )


@dataclass(frozen=True)
class StudyFile:
    """What a study file says, to look at.

    Attributes:
        header: what the search is about: ``space``, ``direction``, ``n_initial_points``, ``about``.
        rows: all trials by number.
        remembered: see `Study.remember`; ``metric`` names what trials are worth, if it has a name.
    """

    header: Mapping[str, Any]
    rows: tuple[Row, ...]
    remembered: Mapping[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Row | None:
        """The best trial that is done so far, the first of equals; None if there is none."""
        return _best(self.rows, self.header["direction"])


def _best(rows: Sequence[Row], direction: str) -> Row | None:
    sign = 1.0 if direction == "minimize" else -1.0
    done = [row for row in rows if row.status == "done" and row.value is not None]
    return min(done, key=lambda row: (sign * (row.value or 0.0), row.number), default=None)


def read_study(path: str | Path) -> StudyFile:
    """The trials in a study file, also of a search that is under way.

    Raises:
        SearchError: it cannot be read, or has no header (yet).
    """
    try:
        journal = _parse(Path(path).read_bytes(), None)
    except OSError as error:
        raise SearchError(f"study file {path} cannot be read: {error}") from error
    if journal.header is None:
        raise SearchError(f"{path} is no study file: it has no header")
    rows = tuple(journal.rows[number] for number in sorted(journal.rows))
    return StudyFile(journal.header, rows, journal.remembered)


def recall(path: str | Path) -> dict[str, Any]:
    """What a study file remembers (see `Study.remember`), without opening it as a study; nothing if there is no file.

    Raises:
        SearchError: it is there and cannot be read.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SearchError(f"study file {path} cannot be read: {error}; give another path") from error
    remembered: dict[str, Any] = {}
    for line in lines[:-1]:
        try:
            remembered |= json.loads(line)["remember"]
        except (ValueError, KeyError, TypeError):
            continue  # another kind of line; whether it can be read is asked when the study is opened
    return remembered


def _differences(theirs: Any, ours: Any, where: str = "") -> list[str]:
    """What differs, leaf by leaf, in words."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        keys = sorted({*theirs, *ours})
        return [line for k in keys for line in _differences(theirs.get(k), ours.get(k), f"{where}.{k}" if where else k)]
    if where == "space":
        theirs, ours = ({axis["name"]: axis for axis in axes} for axes in (theirs, ours))
        only = [f"its parameter {name!r} is not in this search" for name in sorted(set(theirs) - set(ours))]
        only += [f"parameter {name!r} is not in it" for name in sorted(set(ours) - set(theirs))]
        return only or _differences(theirs, ours, "parameter")
    return [] if theirs == ours else [f"{where} was {theirs!r}, now {ours!r}"]


def has_begun(path: str | Path) -> bool:
    """Whether the file at `path` is one that a search goes on with; one killed while it began it begins again."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError:
        return False
    return any(b'"format": ' in line for line in lines[:-1])


def observations(path: str | Path, space: Space, direction: str) -> tuple[Observation, ...]:
    """What an earlier search found, for another one over the same parameters (of another budget, say).

    Raises:
        SearchError: the file cannot be read, or its parameters or its direction are others.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise SearchError(f"warm_start={str(path)!r} cannot be read: {error}") from error
    journal = _parse(data, space)
    if journal.header is None:
        raise SearchError(f"warm_start={str(path)!r} is no study file; give one that an earlier search has written")
    if journal.header["direction"] != direction:
        raise SearchError(
            f"warm_start={str(path)!r} was to {journal.header['direction']}, this search is to {direction}: its values "
            "mean the opposite"
        )
    theirs, ours = [axis["name"] for axis in journal.header["space"]], [axis.name for axis in space.axes]
    if theirs != ours:
        raise SearchError(
            f"warm_start={str(path)!r} searched {len(theirs)} parameters ({', '.join(theirs[:3])}, ...), this one "
            f"{len(ours)} ({', '.join(ours[:3])}, ...); use the same dimensions and groups"
        )
    rows = [row for row in journal.rows.values() if row.value is not None]
    return tuple(Observation(space.point_anywhere(row.params), row.value) for row in rows)
