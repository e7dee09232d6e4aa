"""Every error this package raises on purpose. One base, so that callers can catch ours and nothing else.

Messages name the argument, its value, the reason and the remedy, in that order.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from typing import Any


class MdcError(Exception):
    """Base of all errors of lightning_mdc."""


class UnsupportedModelError(MdcError):
    """No family knows the model, or a part of it cannot lose the units it was asked to lose."""


class PolicyError(MdcError, ValueError):
    """A policy does not fit the model, or is no policy."""


class PlanError(MdcError, ValueError):
    """A plan does not fit the model, or is no plan."""


class BudgetError(MdcError, ValueError):
    """A budget is malformed or cannot be reached."""


class CalibrationError(MdcError, ValueError):
    """The batches given for scoring cannot be scored, or scores do not fit the model."""


class CompensationError(MdcError, ValueError):
    """What removed units did cannot be given back: an unknown way, or moments that are missing or do not fit."""


class SearchError(MdcError, ValueError):
    """A search cannot start, or cannot go on: its space, its objective or its study file is not what it has to be."""


class ArtifactError(MdcError):
    """A saved model is missing, damaged, foreign, or cannot be expressed."""


class DistillationError(MdcError, ValueError):
    """Student, teacher and loss settings do not fit together."""


class DataError(MdcError, ValueError):
    """A data set cannot be found or split as asked."""


class ConfigError(MdcError, ValueError):
    """A setting of ``train.py`` is unknown or contradicts another."""


class CompressionError(MdcError, ValueError):
    """Settings of the whole method contradict each other."""


class CallbackError(MdcError, ValueError):
    """The callback's settings contradict each other or the Trainer it was given to."""


class DistributedError(MdcError, RuntimeError):
    """The processes of a distributed run cannot be started, or one of them went away."""


class RankError(DistributedError):
    """Another process of the run failed, and this one cannot go on without it.

    Attributes:
        rank: of the process that failed.
        kind: name of its error's class, such as ``"OutOfMemoryError"``.
        text: its error's message.
    """

    def __init__(self, rank: int, kind: str, text: str) -> None:
        super().__init__(rank, kind, text)  # by which it is pickled, as between the processes of a sweep
        self.rank, self.kind, self.text = rank, kind, text

    def __str__(self) -> str:
        return f"rank {self.rank} failed: {self.kind}: {self.text}"


def as_number(value: Any) -> float | None:
    """`value` as a float if it is one number, as a scalar of numpy or torch is, and text and booleans are not."""
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if is_bool or isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except Exception:  # a tensor of many numbers, say
        return None


def check_whole(name: str, value: Any, least: int, error: type[MdcError], or_none: str | None = None) -> None:
    """Refuse what is no whole number of at least `least`.

    Args:
        name: of the argument, for the message.
        error: to raise.
        or_none: what None means, as in ``"all"``, where that is allowed too.

    Raises:
        MdcError: of the kind `error`.
    """
    if value is None and or_none is not None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        otherwise = "" if or_none is None else f", or None for {or_none}"
        raise error(f"{name}={value!r:.80}: expected a whole number of at least {least}{otherwise}")


def check_prediction(prediction: Any, error: type[MdcError]) -> None:
    """Refuse, with an `error`, what is no function of a model's output."""
    if prediction is not None and not callable(prediction):
        raise error(f"prediction={prediction!r:.80}: expected a function of what the model returns")


def check_number(
    name: str,
    value: Any,
    what: str,
    error: type[MdcError],
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Refuse what is no finite number within limits.

    Args:
        name: of the argument, for the message.
        what: the number is, as in ``"the teacher's share of the loss"``.
        error: to raise.
        least, above, most, below: the limits.

    Raises:
        MdcError: of the kind `error`.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if (
        is_number
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (below is None or value < below)
    ):
        return
    limits = {"of at least": least, "above": above, "at most": most, "below": below}
    words = " and ".join(f"{how} {limit:g}" for how, limit in limits.items() if limit is not None)
    raise error(f"{name}={value!r:.80}: expected {what}, a number {words}")


def check_kind(name: str, value: Any, kind: type, error: type[MdcError]) -> None:
    """Refuse, with an `error`, a value that is neither a `kind` nor None."""
    if value is not None and not isinstance(value, kind):
        raise error(f"{name}={value!r:.80}: expected a {kind.__name__}, such as {kind.__name__}()")


def check_one_of(name: str, value: Any, choices: tuple[Any, ...], error: type[MdcError]) -> None:
    """Refuse what is none of `choices`, which are text, True, False or None; 1 is not True.

    Raises:
        MdcError: of the kind `error`.
    """
    # Text may be of a class of its own, a StrEnum say.
    found = value in choices if isinstance(value, str) else any(value is choice for choice in choices)
    if not found:
        raise error(f"{name}={value!r:.80}: expected {' or '.join(map(repr, choices))}")


def error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from or while handling, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
