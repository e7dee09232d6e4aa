"""What pruning leaves in the run of whoever trains: shown on a Trainer's own loggers, none of which can end it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_mdc.distributed import is_first
from lightning_mdc.figures import decision as decisions
from lightning_mdc.figures import loggers as ways
from lightning_mdc.figures.decision import Decision
from lightning_mdc.figures.items import Item
from lightning_mdc.figures.search_items import incumbents, trial_numbers
from lightning_mdc.randomness import isolated_rng

if TYPE_CHECKING:
    from lightning_mdc.gp_ei.study import Trial

log = logging.getLogger(__name__)


class Dashboard:
    """The loggers of one fit. Nothing here raises: a logger that fails is left alone from then on, and what cannot be
    drawn is left out, each with one warning. Random states are left alone. Ranks other than 0 show nothing.

    Args:
        loggers: such as ``trainer.loggers``. Without any, nothing is computed; without one that takes pictures, nothing
            is drawn.
    """

    def __init__(self, loggers: Iterable[Logger]) -> None:
        self._loggers = list(loggers)
        self._trials: set[int] = set()
        self._is_warned = False

    def trial(self, trial: Trial, best: float | None) -> None:
        """A trial that is over and the best value so far, as ``SearchOptions(on_trial=...)`` is told."""
        self._trials.add(trial.number)
        self._show(lambda: [trial_numbers(trial, best)])

    def decided(self, decision: Decision) -> None:
        """What was decided, and trials that an earlier start of the search ran. Asked before masks are on."""
        self._show(lambda: self._earlier(decision))
        self._show(lambda: decisions.numbers(decision))
        for part in decisions.pictures(decision):
            self._show(part, drawn=True)

    def in_force(self, metrics: Mapping[str, float], step: int) -> None:
        """What masks keep from this step of the Trainer on."""
        for logger in tuple(self._loggers) if is_first() else ():
            self._try(logger, lambda logger: logger.log_metrics(dict(metrics), step=step))

    def _earlier(self, decision: Decision) -> Iterator[Item]:
        trials = () if decision.search is None else decision.search.trials
        for trial, best in zip(trials, incumbents(trials, "maximize"), strict=True):
            if trial.number not in self._trials:
                yield trial_numbers(trial, best)

    def _show(self, items: Callable[[], Iterable[Item]], drawn: bool = False) -> None:
        loggers = [logger for logger in self._loggers if not drawn or ways.has_pictures(logger)]
        if not loggers or not is_first():
            return
        with isolated_rng():
            try:
                for item in items():
                    for logger in loggers:
                        self._try(logger, partial(ways.show, item=item))
            except Exception as error:  # a picture is not worth a training
                if not self._is_warned:
                    rank_zero_warn(f"loggers lack what could not be drawn ({_words(error)}); training goes on")
                self._is_warned = True
                log.debug("what could not be drawn", exc_info=True)

    def _try(self, logger: Logger, call: Callable[[Logger], None]) -> None:
        if logger not in self._loggers:
            return
        try:
            call(logger)
        except Exception as error:  # of a library, a network, a disk: whatever it is, training is worth more
            self._loggers.remove(logger)
            name = type(logger).__name__
            rank_zero_warn(f"{name} failed and is shown no more of the pruning ({_words(error)}); training goes on")
            log.debug("%s", name, exc_info=True)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
