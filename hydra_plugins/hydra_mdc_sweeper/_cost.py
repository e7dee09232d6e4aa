"""What a trial costs, asked of a function or class of the app."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from omegaconf import DictConfig

from lightning_mdc.errors import BudgetError, SearchError, as_number, check_number
from lightning_mdc.gp_ei.projection import Constraint
from lightning_mdc.gp_ei.space import Axis, Space

from ._conf import ConstraintConf
from ._params import Params
from ._recorded import one_line


def locate(path: str, setting: str) -> Callable[..., Any]:
    """The function or class at a dotted path.

    Raises:
        SearchError: there is none.
    """
    try:
        function = pkgutil.resolve_name(path)
    except Exception as error:
        raise SearchError(
            f"{setting}={path!r} cannot be imported ({one_line(error)}); give the dotted path of a function, "
            "package.module.name, importable from where the app starts"
        ) from error
    if not callable(function):
        raise SearchError(f"{setting}={path!r} is no function or class, but {type(function).__name__}")
    return function


def build(
    settings: ConstraintConf | None, params: Params, config: DictConfig
) -> tuple[Space, Constraint | None, np.ndarray | None]:
    """The space of the sweep, the constraint on it, and points (n, axes) to try first; None where there is none.

    Args:
        config: the app's, for a class that is made from it.

    Raises:
        SearchError: the settings contradict each other, or the callable cannot be had.
    """
    if settings is None or settings.callable is None:
        if settings is not None and (settings.target is not None or settings.tolerance is not None):
            raise SearchError("constraint.target is given, but no constraint.callable that says what a trial costs")
        return Space(params.axes), None, None
    if settings.target is None:
        raise SearchError(f"constraint.callable={settings.callable!r} needs constraint.target: the most it may return")
    if settings.tolerance is not None:
        check_number("constraint.tolerance", settings.tolerance, "how far below the target", SearchError, least=0)
    function = locate(settings.callable, "hydra.sweeper.constraint.callable")
    if inspect.isclass(function):
        function = _made(function, settings.callable, config)
    prices = _Prices(function, settings.callable, params, settings.vectorized)
    space = _CanonicalSpace(prices) if hasattr(function, "snap") else Space(params.axes)
    first = prices.first() if hasattr(function, "first") else None
    return space, Constraint(prices.cost, settings.target, settings.tolerance), first


def _made(kind: Callable[..., Any], path: str, config: DictConfig) -> Callable[..., Any]:
    try:
        function = kind(config)
    except Exception as error:
        raise SearchError(f"constraint.callable: {path}(config) raised {one_line(error)}") from error
    if not callable(function):
        raise SearchError(f"constraint.callable: instances of {path} cannot be called; give it __call__(self, params)")
    return function


class _Prices:
    """The app's function, on points."""

    def __init__(self, function: Callable[..., Any], path: str, params: Params, vectorized: bool) -> None:
        self.function, self.path, self.params, self.vectorized = function, path, params, vectorized
        self.space = Space(params.axes)

    def cost(self, points: np.ndarray) -> np.ndarray:
        """(n, axes) -> (n,)."""
        return self._asked(self._costs, points) if len(points) else np.empty(0)

    def snap(self, points: np.ndarray) -> np.ndarray:
        """(n, axes) -> (n, axes), points that mean the same made equal."""
        return self._asked(partial(self._changed, "snap"), points)

    def first(self) -> np.ndarray:
        """(n, axes): what to try first; one point unless vectorised."""
        return self._changed("first", ((self.space.low + self.space.high) / 2)[None])

    def _asked(self, of: Callable[[np.ndarray], np.ndarray], points: np.ndarray) -> np.ndarray:
        """`of` all points or, where the app takes one at a time, of each."""
        if self.vectorized:
            return of(points)
        # Neighbouring points are often the same one, once snapped.
        unique, inverse = np.unique(points, axis=0, return_inverse=True)
        return np.concatenate([of(point[None]) for point in unique])[inverse.reshape(-1)]

    def _given(self, points: np.ndarray) -> dict[str, Any]:
        """The parameters of one point (1, axes) or, vectorised, of points (n, axes)."""
        given, start = dict(self.params.fixed), 0
        if not self.vectorized:
            return given | self.params.values(self.space.params(points[0]))
        for parameter in self.params.searched:
            own = points[:, start : start + len(parameter.axes)]
            start += len(parameter.axes)
            given[parameter.name] = _values(parameter.axes[0], own if parameter.is_list else own[:, 0])
        return given

    def _call(self, method: str, given: dict[str, Any]) -> Any:
        try:
            return getattr(self.function, method)(given)
        except (SearchError, BudgetError):
            raise
        except Exception as error:
            called = self.path if method == "__call__" else f"{self.path}.{method}"
            raise SearchError(f"constraint.callable: {called} raised {one_line(error)} for {_shown(given)}") from error

    def _costs(self, points: np.ndarray) -> np.ndarray:
        given = self._given(points)
        values = self._call("__call__", given)
        try:
            costs = np.asarray(values if self.vectorized else [as_number(values)], dtype=np.float64)
        except (TypeError, ValueError):
            costs = np.empty(0)
        if costs.shape == (len(points),) and not np.isnan(costs).any():
            return costs
        returned = f"constraint.callable: {self.path} returned {values!r}, no number, for {_shown(given)}"
        if self.vectorized:
            returned = (
                f"constraint.callable: {self.path} was given {len(points)} trials at once and returned "
                f"{' '.join(repr(values).split())[:100]}; expected {len(points)} numbers (constraint.vectorized=true)"
            )
        raise SearchError(returned)

    def _changed(self, method: str, points: np.ndarray) -> np.ndarray:
        """What a method makes of the parameters of points.

        Vectorised, ``first`` may make any number of one.
        """
        params, parts = self._call(method, self._given(points)), []
        count = -1 if method == "first" and self.vectorized else len(points)
        called = f"constraint.callable: {self.path}.{method}"
        for parameter in self.params.searched:
            if not isinstance(params, Mapping) or parameter.name not in params:
                raise SearchError(f"{called} returned no {parameter.name!r}; it has to return all that it is given")
            try:
                parts.append(_numbers(parameter.axes[0], params[parameter.name]).reshape(count, len(parameter.axes)))
            except (TypeError, ValueError) as error:
                value = _short(params[parameter.name])
                raise SearchError(f"{called} returned {value} for {parameter.name!r}: {one_line(error)}") from error
        if len({len(part) for part in parts}) > 1:
            raise SearchError(f"{called} returned arrays of different lengths, {[len(part) for part in parts]}")
        return np.concatenate(parts, axis=1)


class _CanonicalSpace(Space):
    """A space of which the app knows what means the same."""

    def __init__(self, prices: _Prices) -> None:
        super().__init__(prices.params.axes)
        self._prices = prices

    def snap(self, points: np.ndarray) -> np.ndarray:
        """See `Space.snap`."""
        snapped = super().snap(points)
        return np.clip(self._prices.snap(snapped), self.low, self.high) if len(snapped) else snapped


def _shown(params: Mapping[str, Any]) -> str:
    shown = {key: _short(value) for key, value in params.items()}
    return "{" + ", ".join(f"{key!r}: {value}" for key, value in shown.items()) + "}"


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"array {value.shape}"
    return " ".join(repr(value).split())[:200]


def _values(axis: Axis, numbers: np.ndarray) -> np.ndarray:
    """Coordinates of like axes as values, in an array of the same shape."""
    if axis.choices is None:
        return numbers.astype(np.int64) if axis.integer else numbers
    values = np.empty(numbers.shape, dtype=object)
    for index in np.ndindex(numbers.shape):
        values[index] = axis.value(float(numbers[index]))
    return values


def _numbers(axis: Axis, values: Any) -> np.ndarray:
    """The inverse of `_values`."""
    if axis.choices is None:
        numbers = np.asarray(values, dtype=np.float64)
        if not np.isfinite(numbers).all():
            raise ValueError("not finite")
        return numbers
    flat = np.ravel(values).tolist() if isinstance(values, (np.ndarray, list)) else [values]
    return np.array([axis.number(value) for value in flat])
