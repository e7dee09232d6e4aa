"""One dashboard (`Tracker`), and several of them at once, none of which can stop a run (`Trackers`)."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from lightning.pytorch.loggers import Logger

from lightning_mdc.distributed import is_first
from lightning_mdc.figures.items import Item, Summary
from lightning_mdc.files import read_json, write_json

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class RunInfo:
    """What a dashboard is told of the run (of the trial, of the sweep) that it is opened for.

    Attributes:
        folder: of the run.
        name: to be listed under.
        group: of runs that belong together, the folder name of their sweep; None if there is none.
        kind: ``pipeline``, ``trial`` or ``sweep``.
        settings: all of them.
    """

    folder: Path
    name: str
    group: str | None = None
    kind: str = "pipeline"
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A saved model.

    Attributes:
        name: its folder in the run's folder, such as ``finetuned/seed0``.
        folder: with its files.
        parent: name of the model that it was made from; None if it was trained from scratch or loaded.
        metadata: what its ``config.json`` says.
    """

    name: str
    folder: Path
    parent: str | None
    metadata: Mapping[str, Any]


Shown: TypeAlias = Item | Model


class Tracker(ABC):
    """One dashboard. It is made when settings are checked, so ``__init__`` looks at its arguments and does no more.

    `start` comes first and `finish` last, and they may fail with whatever the library behind fails with: `Trackers`
    sees to it that the run goes on.
    """

    #: Whether it has a place for more than the curves of trainings.
    shows_items = True
    #: What to do when it fails.
    remedy = "the run goes on without it"

    @abstractmethod
    def start(self, info: RunInfo) -> None:
        """Open the dashboard, or go on with the one that an earlier start of the same run opened."""

    @abstractmethod
    def curves(self, training: str) -> Logger:
        """What Lightning's Trainer writes the curves of one training to."""

    def show(self, item: Shown) -> None:
        """Put one thing on the dashboard; asked for only if it `shows_items`."""
        raise NotImplementedError

    @abstractmethod
    def finish(self, failed: bool) -> None:
        """Close it, as that of a run that ended well or did not."""

    @property
    def location(self) -> str | None:
        """Where to look, an address or a command; None if it is nothing to speak of."""
        return None


class _FailSafe:
    """Calls of a tracker that cannot stop a run: the first that fails is logged in one line, and is the last but
    `finish`.
    """

    def __init__(self, key: str, tracker: Tracker) -> None:
        self.key, self.tracker, self.works = key, tracker, True

    def __call__(self, call: Callable[[Tracker], T], is_last: bool = False) -> T | None:
        if not (self.works or is_last):
            return None
        try:
            return call(self.tracker)
        except Exception as error:  # of a library, a network, a disk: whatever it is, training is worth more
            if self.works:
                log.warning(
                    "logger.%s could not be closed (%s: %s); %s"
                    if is_last
                    else "logger.%s failed (%s: %s) and is off for the rest of this run; %s",
                    self.key,
                    type(error).__name__,
                    " ".join(str(error).split())[:300],
                    self.tracker.remedy,
                )
            log.debug("logger.%s", self.key, exc_info=True)
            self.works = is_last and self.works  # where it is can still be said
            return None


class _FailSafeCurves(Logger):
    """A Lightning logger whose failures stop no training."""

    def __init__(self, guarded: _FailSafe, logger: Logger) -> None:
        super().__init__()
        self._guarded, self._logger = guarded, logger

    @property
    def name(self) -> str | None:
        return self._logger.name

    @property
    def version(self) -> int | str | None:
        return self._logger.version

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._guarded(lambda _: self._logger.log_metrics(metrics, step))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self._guarded(lambda _: self._logger.log_hyperparams(params, *args, **kwargs))

    def save(self) -> None:
        self._guarded(lambda _: self._logger.save())

    def finalize(self, status: str) -> None:
        self._guarded(lambda _: self._logger.finalize(status))


class Trackers:
    """All dashboards of a run; of none, if there are none. Nothing here raises, and ranks other than 0 have none.

    Args:
        trackers: by the key of their settings under ``logger``.
        info: the run.
    """

    def __init__(self, trackers: Mapping[str, Tracker] | None = None, info: RunInfo | None = None) -> None:
        self.info = info
        self._trackers = [_FailSafe(key, tracker) for key, tracker in (trackers or {}).items() if is_first()]
        # Fingerprints of what was shown, by dashboard and step; by start of this run, too.
        self._shown: dict[str, dict[str, str]] = {}
        if info is not None:
            for tracker in self._trackers:
                tracker(lambda tracker: tracker.start(info))
            self._shown_file = info.folder / "logs" / "shown.json"
            known = read_json(self._shown_file)
            # None if it was never written, anything if it was damaged: then all is shown again.
            if isinstance(known, dict) and all(isinstance(steps, dict) for steps in known.values()):
                self._shown = known

    def curves(self, training: str) -> list[Logger]:
        """Where Lightning writes the curves of `training`, such as ``finetuned/seed0``."""
        made = [(tracker, tracker(lambda tracker: tracker.curves(training))) for tracker in self._trackers]
        return [_FailSafeCurves(tracker, logger) for tracker, logger in made if logger is not None]

    def show(self, items: Callable[[], Iterable[Shown]], step: str = "", fingerprint: str | None = None) -> None:
        """Put what `items` makes on every dashboard that has a place for it; it is not asked if none has.

        Args:
            step: that left it. What an earlier start of this run has shown of it is not shown again, but for the
                summary.
            fingerprint: of what the step left; None: it did not end.
        """
        showing = [tracker for tracker in self._trackers if tracker.works and tracker.tracker.shows_items]
        if not showing:
            return
        fresh = [t for t in showing if fingerprint is None or self._shown.get(t.key, {}).get(step) != fingerprint]
        try:
            for item in items():
                for tracker in showing if isinstance(item, Summary) else fresh:
                    tracker(lambda tracker, item=item: tracker.show(item))  # type: ignore[misc]
        except Exception as error:  # a picture that cannot be drawn is not worth a run
            log.warning("dashboards lack what could not be drawn (%s: %s)", type(error).__name__, error)
            log.debug("dashboards", exc_info=True)
        if fingerprint is None or not fresh:
            return
        for tracker in fresh:
            if tracker.works:
                self._shown.setdefault(tracker.key, {})[step] = fingerprint
        try:
            write_json(self._shown_file, self._shown)
        except OSError as error:  # the dashboards have it; a resumed run will show it twice
            log.debug("%s: %s", self._shown_file, error)

    def finish(self, failed: bool) -> None:
        """Close all of them."""
        for tracker in self._trackers:
            tracker(lambda tracker: tracker.finish(failed), is_last=True)

    @property
    def locations(self) -> dict[str, str]:
        """Where to look, by key."""
        found = {tracker.key: tracker(lambda tracker: tracker.location) for tracker in self._trackers}
        return {key: location for key, location in found.items() if location}
