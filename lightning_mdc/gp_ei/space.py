"""What a search may move: named axes, and points on them as arrays.

A set of points is a float array (n, axes): numbers as they are, a choice as the position of the chosen value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_mdc.errors import SearchError


@dataclass(frozen=True)
class Axis:
    """One parameter: a number in [low, high], or one of `choices`.

    Attributes:
        name: of the parameter.
        low, high: smallest and largest value; of a choice, 0 and the position of its last value.
        step: distance of neighbouring values, counted from `low`; 0 means continuous.
        log: whether ratios count rather than differences, as for a learning rate.
        integer: whether values are handed out as int.
        choices: the values of a categorical parameter (text, numbers, booleans, None), else None.

    Raises:
        SearchError: the range is empty or not finite, or there is nothing to choose from.
    """

    name: str
    low: float = 0.0
    high: float = 1.0
    step: float = 0.0
    log: bool = False
    integer: bool = False
    choices: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        if self.choices is not None:
            if not self.choices or len({json.dumps(c) for c in self.choices}) < len(self.choices):
                raise SearchError(
                    f"{self.name}: choice{self.choices!r} is empty or names a value twice; list each once"
                )
            object.__setattr__(self, "low", 0.0)
            object.__setattr__(self, "high", len(self.choices) - 1.0)
            return
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise SearchError(
                f"{self.name}: the range [{self.low}, {self.high}] is empty; give the smaller number first"
            )
        if self.log and self.low <= 0:
            raise SearchError(f"{self.name}: a log scale needs numbers above 0, and the range starts at {self.low}")
        if self.step < 0:
            raise SearchError(f"{self.name}: step={self.step}: expected a positive distance, or 0 for any number")

    def value(self, number: float) -> Any:
        """A coordinate as the parameter's own kind of value."""
        if self.choices is not None:
            return self.choices[int(number)]
        return int(number) if self.integer else float(number)

    def number(self, value: Any, anywhere: bool = False) -> float:
        """The coordinate of a value; with `anywhere` also of a number beyond the range.

        Raises:
            SearchError: it is not on this axis.
        """
        if self.choices is not None:
            for position, choice in enumerate(self.choices):
                if choice == value and type(choice) is type(value):
                    return float(position)
            raise SearchError(f"{self.name}={value!r} is none of {self.choices!r}")
        if anywhere:
            if self.log and float(value) <= 0:
                raise SearchError(f"{self.name}={value}: a log scale needs numbers above 0")
            return float(value)
        slack = 1e-9 * max(1.0, abs(self.low), abs(self.high))
        if isinstance(value, (bool, str)) or value is None or not self.low - slack <= float(value) <= self.high + slack:
            raise SearchError(f"{self.name}={value!r} is no number in [{self.low}, {self.high}]")
        return min(max(float(value), self.low), self.high)


class Space:
    """Axes in order. A subclass may know more about which points mean the same; see `snap`.

    Raises:
        SearchError: no axis, or two of one name.
    """

    def __init__(self, axes: Sequence[Axis]) -> None:
        names = [axis.name for axis in axes]
        if not names or len(set(names)) < len(names):
            raise SearchError(f"a search needs at least one parameter, each once; got {names}")
        self.axes = tuple(axes)
        self.low = np.array([axis.low for axis in axes], dtype=np.float64)
        self.high = np.array([axis.high for axis in axes], dtype=np.float64)
        self.step = np.array([axis.step for axis in axes], dtype=np.float64)
        self._log = np.array([axis.log for axis in axes])
        self._choice = np.array([axis.choices is not None for axis in axes])
        # On its scale, an axis takes [start, start + width): the whole of a step or a choice gets its share of [0, 1].
        self._start = np.where(self._choice, -0.5, self._scaled(self.low))
        self._width = np.where(self._choice, self.high + 1 - 1e-9, self._scaled(self.high + self.step) - self._start)

    def __len__(self) -> int:
        return len(self.axes)

    @property
    def numeric(self) -> np.ndarray:
        """(axes,) bool: which axes have an order."""
        return ~self._choice

    def describe(self) -> list[dict[str, Any]]:
        """JSON-ready: two spaces are the same if this is."""
        return [
            {"name": axis.name, "choices": list(axis.choices)}
            if axis.choices is not None
            else {"name": axis.name, "low": axis.low, "high": axis.high, "step": axis.step, "log": axis.log}
            for axis in self.axes
        ]

    # --- one point <-> parameters by name -------------------------------------------------------------------------

    def params(self, point: np.ndarray) -> dict[str, Any]:
        """A point (axes,) as values by name."""
        return {axis.name: axis.value(x) for axis, x in zip(self.axes, point.tolist(), strict=True)}

    def point(self, params: Mapping[str, Any], anywhere: bool = False) -> np.ndarray:
        """Values by name as a point (axes,); with `anywhere` numbers may be those of a search with other bounds.

        Raises:
            SearchError: a parameter is missing, unknown, or not on its axis.
        """
        names = {axis.name for axis in self.axes}
        if set(params) != names:
            raise SearchError(f"parameters {sorted(params)} are not those of the search, {sorted(names)}")
        return np.array([axis.number(params[axis.name], anywhere) for axis in self.axes])

    # --- many points ----------------------------------------------------------------------------------------------

    def snap(self, points: np.ndarray) -> np.ndarray:
        """Points that can really be had: on the steps, inside the range. (n, axes) -> (n, axes).

        Points that mean the same become equal; no number grows where that would cost more than it says.
        """
        points = np.clip(points, self.low, self.high)
        steps = np.where(self.step > 0, self.step, 1.0)
        # The 1e-6 is that of keep_count: 0.3 / 0.1 must be 3.
        on_step = self.low + np.floor((points - self.low) / steps + 1e-6) * steps
        points = np.where(self._choice, np.rint(points), np.where(self.step > 0, on_step, points))
        return np.clip(points, self.low, self.high)

    def _scaled(self, points: np.ndarray) -> np.ndarray:
        return np.log(points, where=self._log, out=np.array(points, dtype=np.float64))

    def from_unit(self, unit: np.ndarray) -> np.ndarray:
        """(n, axes) in [0, 1] -> points, not snapped; the whole of a step or a choice gets its share of [0, 1]."""
        points = self._start + unit * self._width
        return np.exp(points, where=self._log, out=points)

    def to_unit(self, points: np.ndarray) -> np.ndarray:
        """Points -> (n, axes) in [0, 1], the inverse of `from_unit` up to snapping."""
        width = np.where(self._width > 0, self._width, 1.0)
        return np.clip((self._scaled(points) - self._start) / width, 0.0, 1.0)

    def encode(self, points: np.ndarray) -> np.ndarray:
        """Points as a Gaussian process sees them: numbers scaled to [0, 1], a choice as one column per value."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        scaled = (self._scaled(points) - low) / np.where(high > low, high - low, 1.0)
        columns = [
            scaled[:, [i]] if axis.choices is None else np.eye(len(axis.choices))[points[:, i].astype(int)]
            for i, axis in enumerate(self.axes)
        ]
        return np.concatenate(columns, axis=1)

    def keys(self, points: np.ndarray) -> list[bytes]:
        """One hashable per point, equal for equal points."""
        return [row.tobytes() for row in np.round(self.to_unit(points), 10) + 0.0]
