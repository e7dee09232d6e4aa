"""When what leaves is taken: at once, or gradually until two thirds of the training are over."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_mdc.errors import CallbackError, check_one_of, check_whole


@dataclass(frozen=True)
class Schedule:
    """`kind` is the ``schedule`` of `MultiDimPruneCallback`; `start`, `end` and `unit` see there. Cubic: as Zhu & Gupta
    2017 have it.

    Raises:
        CallbackError: settings that are none, or contradict each other.
    """

    kind: Literal["one-shot", "cubic"] = "one-shot"
    start: int = 0
    end: int | None = None
    unit: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        check_one_of("schedule", self.kind, ("one-shot", "cubic"), CallbackError)
        check_one_of("unit", self.unit, ("epoch", "step"), CallbackError)
        check_whole("start", self.start, 0, CallbackError)
        check_whole("end", self.end, self.start + 1, CallbackError, or_none="the end of training")
        if self.end is not None and self.kind == "one-shot":
            raise CallbackError(
                f"end={self.end} means nothing to schedule='one-shot'; pass schedule='cubic', or no end"
            )

    def in_training(self, trainer: Trainer) -> Schedule:
        """The same with an `end`, for the training that is about to begin; its data have to be there.

        Raises:
            CallbackError: it cannot be known when the schedule has to be through, or the training is over by then.
        """
        if self.kind == "one-shot" or self.end is not None:
            return self
        length, example = training_length(trainer, self.unit), f"end={self.start + 10}"
        if length is None:
            raise CallbackError(
                "schedule='cubic' with an endless Trainer, or one of which nobody knows how many "
                f"{self.unit}s it takes (a stream has no length, and max_time counts none): say when it is through, "
                f"e.g. {example}"
            )
        end = max(self.start + 1, round(length * 2 / 3))
        if end >= length and not getattr(trainer, "fast_dev_run", False):
            raise CallbackError(
                f"schedule='cubic' with start={self.start}, in a training of {length} {self.unit}s: it is over before "
                f"the schedule is; train longer{', or pass unit=' + repr('step') if self.unit == 'epoch' else ''}"
            )
        timer = next((other for other in _callbacks(trainer) if isinstance(other, Timer)), None)
        if timer is not None and timer.time_remaining() is not None:
            rank_zero_warn(
                f"schedule='cubic' is through at {self.unit} {end}, whatever max_time says: if time may be up before, "
                f"say when it has to be through, e.g. {example}"
            )
        return replace(self, end=end)

    def has_begun(self, trainer: Trainer) -> bool:
        return self._now(trainer) >= self.start

    def progress(self, trainer: Trainer) -> float:
        """How much of what is to leave has left by now, 0 to 1, of a schedule `in_training` that has begun."""
        if self.end is None:
            return 1.0
        done = (self._now(trainer) - self.start) / (self.end - self.start)
        return 1 - (1 - min(1.0, done)) ** 3

    def _now(self, trainer: Trainer) -> int:
        return trainer.current_epoch if self.unit == "epoch" else trainer.global_step


def training_length(trainer: Trainer, unit: Literal["epoch", "step"]) -> int | None:
    """How many epochs or optimizer steps the Trainer takes, by whichever of its limits comes first; an epoch that is
    not finished counts. None: without end, or not known before, as a stream has no length."""
    epochs = None if trainer.max_epochs in (None, -1) else trainer.max_epochs
    steps = None if trainer.max_steps == -1 else trainer.max_steps
    if (epochs if unit == "step" else steps) is None:  # no need to know how long an epoch is
        return steps if unit == "step" else epochs
    batches = trainer.num_training_batches
    if batches in (0, math.inf):
        return None
    epoch, taken = 0, 0
    while (epochs is None or epoch < epochs) and (steps is None or taken < steps):
        taken += math.ceil(batches / _accumulated(trainer, epoch))
        epoch += 1
    return epoch if unit == "epoch" else min(taken, steps or taken)


def _accumulated(trainer: Trainer, epoch: int) -> int:
    """Batches that make an optimizer step."""
    changing = next((other for other in _callbacks(trainer) if isinstance(other, GradientAccumulationScheduler)), None)
    return trainer.accumulate_grad_batches if changing is None else changing.get_accumulate_grad_batches(epoch)


def _callbacks(trainer: Trainer) -> list[Any]:
    return trainer.callbacks  # type: ignore[attr-defined]
