"""One dashboard (`Tracker`), and several of them at once, none of which can stop a run (`Trackers`)."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch.loggers import Logger

from lightning_mdc.distributed import is_first
from lightning_mdc.figures.items import Item, Summary
from lightning_mdc.files import write_json

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class About:
    """What a dashboard is about.

    Attributes:
        folder: of the run (of the trial, of the sweep).
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
    def start(self, about: About) -> None:
        """Open the dashboard, or go on with the one that an earlier start of the same run opened."""

    @abstractmethod
    def curves(self, training: str) -> Logger:
        """What Lightning's Trainer writes the curves of one training to."""

    @abstractmethod
    def show(self, item: Item) -> None:
        """Put one thing on the dashboard."""

    @abstractmethod
    def finish(self, failed: bool) -> None:
        """Close it, as that of a run that ended well or did not."""

    @property
    def place(self) -> str | None:
        """Where to look; None if it is nothing to speak of."""
        return None


class _Guard:
    """Between a tracker and the run: the first failure is said in one line, and is the last call but `finish`."""

    def __init__(self, key: str, tracker: Tracker) -> None:
        self.key, self.tracker, self.works = key, tracker, True

    def __call__(self, call: Callable[[], T]) -> T | None:
        if not self.works:
            return None
        try:
            return call()
        except Exception as error:  # of a library, a network, a disk: whatever it is, training is worth more
            self.works = False
            reason = " ".join(str(error).split())[:300]
            log.warning(
                "logger.%s failed (%s: %s) and is off for the rest of this run; %s",
                self.key,
                type(error).__name__,
                reason,
                self.tracker.remedy,
            )
            log.debug("logger.%s", self.key, exc_info=True)
            return None

    def finish(self, failed: bool) -> None:
        try:
            self.tracker.finish(failed)
        except Exception as error:
            if self.works:
                log.warning("logger.%s could not be closed (%s); %s", self.key, error, self.tracker.remedy)
            log.debug("logger.%s", self.key, exc_info=True)


class _GuardedCurves(Logger):
    """A Lightning logger whose failures stop no training."""

    def __init__(self, guard: _Guard, inner: Logger) -> None:
        super().__init__()
        self._guard, self._inner = guard, inner

    @property
    def name(self) -> str | None:
        return self._inner.name

    @property
    def version(self) -> int | str | None:
        return self._inner.version

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._guard(lambda: self._inner.log_metrics(metrics, step))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self._guard(lambda: self._inner.log_hyperparams(params, *args, **kwargs))

    def save(self) -> None:
        self._guard(self._inner.save)

    def finalize(self, status: str) -> None:
        self._guard(lambda: self._inner.finalize(status))


class Trackers:
    """All dashboards of a run; of none, if there are none. Nothing here raises, and ranks other than 0 have none.

    Args:
        trackers: by the key of their settings under ``logger``.
        about: the run.
    """

    def __init__(self, trackers: Mapping[str, Tracker] | None = None, about: About | None = None) -> None:
        self.about = about
        self._guards = [_Guard(key, tracker) for key, tracker in (trackers or {}).items() if is_first()]
        for guard in self._guards:
            self._call(guard, lambda tracker: tracker.start(about) if about is not None else None)
        self._shown: dict[str, dict[str, str]] = {} if about is None else _read_shown(about.folder)

    def curves(self, training: str) -> list[Logger]:
        """Where Lightning writes the curves of `training`, such as ``finetuned/seed0``."""
        made = [(guard, self._call(guard, lambda tracker: tracker.curves(training))) for guard in self._guards]
        return [_GuardedCurves(guard, logger) for guard, logger in made if logger is not None]

    def show(self, items: Callable[[], Iterable[Item]]) -> None:
        """Put what `items` makes on every dashboard that has a place for it; it is not asked if none has."""
        self._show(items, self._showing())

    def show_stage(self, name: str, mark: str | None, items: Callable[[], Iterable[Item]]) -> None:
        """The same for what stage `name` left. What an earlier start of this run has shown is not shown again.

        Args:
            mark: fingerprint of what the stage left; None: it did not end.
        """
        showing = self._showing()
        fresh = [guard for guard in showing if mark is None or self._shown.get(guard.key, {}).get(name) != mark]
        again = [guard for guard in showing if guard not in fresh]
        self._show(items, fresh, again)
        if mark is None or self.about is None or not fresh:
            return
        for guard in fresh:
            if guard.works:
                self._shown.setdefault(guard.key, {})[name] = mark
        try:
            write_json(_shown_file(self.about.folder), self._shown)
        except OSError as error:  # the dashboards have it; a resumed run will show it twice
            log.debug("%s: %s", _shown_file(self.about.folder), error)

    def finish(self, failed: bool) -> None:
        """Close all of them."""
        for guard in self._guards:
            guard.finish(failed)

    @property
    def places(self) -> dict[str, str]:
        """Where to look, by key."""
        found = {guard.key: self._call(guard, lambda tracker: tracker.place) for guard in self._guards}
        return {key: place for key, place in found.items() if place}

    def _showing(self) -> list[_Guard]:
        return [guard for guard in self._guards if guard.works and guard.tracker.shows_items]

    def _show(
        self, items: Callable[[], Iterable[Item]], guards: Sequence[_Guard], summary_only: Sequence[_Guard] = ()
    ) -> None:
        if not guards and not summary_only:
            return
        try:
            for item in items():
                to = guards if not isinstance(item, Summary) else (*guards, *summary_only)
                for guard in to:
                    self._call(guard, lambda tracker, item=item: tracker.show(item))  # type: ignore[misc]
        except Exception as error:  # a picture that cannot be drawn is not worth a run
            log.warning("dashboards lack what could not be drawn (%s: %s)", type(error).__name__, error)
            log.debug("dashboards", exc_info=True)

    @staticmethod
    def _call(guard: _Guard, call: Callable[[Tracker], T]) -> T | None:
        return guard(lambda: call(guard.tracker))


def _shown_file(folder: Path) -> Path:
    return folder / "logs" / "shown.json"


def _read_shown(folder: Path) -> dict[str, dict[str, str]]:
    try:
        shown = json.loads(_shown_file(folder).read_text())
        return {key: dict(stages) for key, stages in shown.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # never written, or damaged: all is shown again
        return {}
