"""Sweep syntax to axes, and values back to overrides."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    IntervalSweep,
    Override,
    OverrideType,
    Quote,
    QuotedString,
    ValueType,
)
from hydra.errors import OverrideParseException

from lightning_mdc.errors import SearchError
from lightning_mdc.gp_ei.space import Axis

_MOST_VALUES = 100_000
_TAG, _QUOTES = re.compile(r"\btag\s*\("), re.compile(r"'[^']*'|\"[^\"]*\"")
_NULL_IN_FUNCTION = re.compile(r"\b[a-z]+\(.*\bnull\b")
_LIST_TAG = re.compile(r"x([1-9][0-9]*)")
# What Hydra's grammar reads as this very text, if it is no word for something else.
_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
_RESERVED = {"true", "false", "null", "nan", "inf"}


class _Grid(Axis):
    """The numbers of a range, as Hydra hands them out: the third of range(0.1, 1, 0.1) is 0.3, not 0.1 + 0.1 + 0.1."""

    def value(self, number: float) -> Any:
        return round(number, 12 - math.floor(math.log10(self.step))) + 0.0


@dataclass(frozen=True)
class Parameter:
    """One override of every trial: of a fixed value, or of a value, or a list of values, that the search chooses.

    Attributes:
        key: as the override has it, ``+`` and package included.
        axes: one, or one per value of a list; none if the value is fixed.
        is_list: whether the value is a list of what the axes say.
        line: the override of a fixed value.
        fixed: the fixed value.
    """

    key: str
    axes: tuple[Axis, ...] = ()
    is_list: bool = False
    line: str = ""
    fixed: Any = None

    @property
    def name(self) -> str:
        """The key as others know it."""
        return self.key.lstrip("+~")

    def value(self, values: Mapping[str, Any]) -> Any:
        """The parameter's value, given those of all axes by name."""
        if not self.axes:
            return self.fixed
        own = [values[axis.name] for axis in self.axes]
        return own if self.is_list else own[0]

    def override(self, values: Mapping[str, Any]) -> str:
        """The override for a trial, given the values of all axes by name."""
        return f"{self.key}={text(self.value(values))}" if self.axes else self.line


@dataclass(frozen=True)
class Params:
    """All overrides of a sweep's trials, in order."""

    parameters: tuple[Parameter, ...]

    @property
    def axes(self) -> tuple[Axis, ...]:
        """What the search moves."""
        return tuple(axis for parameter in self.parameters for axis in parameter.axes)

    @property
    def searched(self) -> tuple[Parameter, ...]:
        """Parameters that the search chooses."""
        return tuple(parameter for parameter in self.parameters if parameter.axes)

    @property
    def fixed(self) -> dict[str, Any]:
        """Values that every trial has in common, by name."""
        kept = (p for p in self.parameters if not p.axes and not p.key.startswith("~"))
        return {parameter.name: parameter.fixed for parameter in kept}

    @property
    def fixed_lines(self) -> list[str]:
        """Overrides that every trial has in common."""
        return [parameter.line for parameter in self.parameters if not parameter.axes]

    def overrides(self, values: Mapping[str, Any]) -> list[str]:
        """All overrides of a trial, given the values of all axes by name."""
        return [parameter.override(values) for parameter in self.parameters]

    def values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Searched parameters by name; lists as lists."""
        return {parameter.name: parameter.value(values) for parameter in self.searched}


def read_params(params: Mapping[str, Any], arguments: Sequence[str]) -> Params:
    """The overrides of ``hydra.sweeper.params`` and of the command line; of two for one key the later holds.

    Raises:
        SearchError: there is nothing to search, or a sweep that a Gaussian process can do nothing with.
        OverrideParseException: what is there cannot be read; Hydra's own.
    """
    lines = [f"{key}={value if isinstance(value, str) else text(value)}" for key, value in params.items()]
    parameters: dict[str, Parameter] = {}
    for override in _parsed([*lines, *arguments]):
        parameter = _parameter(override)
        parameters[parameter.name] = parameter
    all_params = Params(tuple(parameters.values()))
    if not all_params.searched:
        raise SearchError(
            "there is nothing to search: none of the overrides is a sweep; add one, such as 'x=interval(0, 1)' on the "
            "command line, or to hydra.sweeper.params"
        )
    return all_params


def _parsed(lines: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(lines))
    except OverrideParseException as error:
        if without_null(error.override) is None:
            raise
        raise SearchError(f"{error.override}: {without_null(error.override)}") from error


def without_null(line: str) -> str | None:
    """What to write instead of an override in which a function of Hydra's has a null, which Hydra refuses; None if it
    has none."""
    key, _, value = line.partition("=")
    if not _NULL_IN_FUNCTION.search(value):
        return None
    choice = re.fullmatch(r"choice\((.*)\)", value.strip())
    given = f"{key}={choice[1].replace(' ', '')}" if choice else f"{key}=null,1"
    return f"Hydra's functions take no null; list the values without one: {given}"


def text(value: Any) -> str:
    """A value as Hydra's override grammar reads it back unchanged."""
    element = Override(type=OverrideType.CHANGE, key_or_group="", value_type=ValueType.ELEMENT, _value=_quoted(value))
    return element.get_value_element_as_str()


def _quoted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _quoted(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_quoted(inner) for inner in value]
    if not isinstance(value, str) or (_PLAIN.fullmatch(value) and value.lower() not in _RESERVED):
        return value
    return QuotedString(value, Quote.single)


def _parameter(override: Override) -> Parameter:
    key = override.get_key_element()
    if not override.is_sweep_override():
        return Parameter(key, line=str(override.input_line), fixed=override.value())
    if override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        raise SearchError(
            f"{override.input_line}: glob(...) depends on what files there are; name them: choice(a, b, c)"
        )
    sweep: Any = override.value()
    log, count = _tags(override, sweep.tags)
    name = key.lstrip("+")
    names = [name] if count is None else [f"{name}.{i}" for i in range(count)]
    return Parameter(key, tuple(_axis(override, sweep, n, log) for n in names), is_list=count is not None)


def _tags(override: Override, tags: set[str]) -> tuple[bool, int | None]:
    """Whether the scale is logarithmic, and how many values a list has; None if it is no list."""
    if len(_TAG.findall(_QUOTES.sub("", str(override.input_line)))) > (1 if tags else 0):
        raise SearchError(
            f"{override.input_line}: Hydra drops a tag inside a function; tag once, outermost: tag(log, ...)"
        )
    counts = [int(match[1]) for tag in tags if (match := _LIST_TAG.fullmatch(tag))]
    if len(counts) > 1 or len(counts) + ("log" in tags) < len(tags):
        raise SearchError(
            f"{override.input_line}: tags {sorted(tags)}: expected log (ratios count), xN (a list of N such values), "
            "or both"
        )
    return "log" in tags, counts[0] if counts else None


def _axis(override: Override, sweep: Any, name: str, log: bool) -> Axis:
    if isinstance(sweep, IntervalSweep):
        low, high = sweep.start, sweep.end
        assert low is not None and high is not None
        if isinstance(low, int) and isinstance(high, int):  # int(interval(1, 8)), both ends included
            return Axis(name, low, high, step=1, log=log, integer=True)
        return Axis(name, low, high, log=log)
    if override.is_range_sweep():
        # No further than we would take: it may be range(1e12). Hydra 1.3 counts 0.4 in range(0.1, 0.4, 0.1): rounding.
        values: Any = islice(override.sweep_iterator(), _MOST_VALUES + 1)
        end, nothing = float(sweep.stop), 1e-6 * abs(float(sweep.step))
        return _range_axis(override, name, sorted({value for value in values if abs(value - end) > nothing}), log)
    if log:
        raise SearchError(f"{override.input_line}: tag log: a choice has no scale; give an interval or a range")
    return Axis(name, choices=tuple(_choice(override, value) for value in sweep.list))


def _range_axis(override: Override, name: str, values: list[Any], log: bool) -> Axis:
    if not values:
        raise SearchError(f"{override.input_line}: the range is empty; mind that its end is not part of it")
    if len(values) > _MOST_VALUES:
        raise SearchError(
            f"{override.input_line}: the range has more than {_MOST_VALUES} values; give int(interval(a, b)) or "
            "interval(a, b)"
        )
    integer = all(isinstance(value, int) for value in values)
    low, high = values[0], values[-1]
    step = (high - low) / (len(values) - 1) if len(values) > 1 else 1.0
    if any(abs(low + i * step - value) > 1e-6 * step for i, value in enumerate(values)):
        raise SearchError(f"{override.input_line}: its values are not evenly spaced; give choice(a, b, c)")
    return (Axis if integer else _Grid)(name, low, high, step=step, log=log, integer=integer)


def _choice(override: Override, value: Any) -> Any:
    """A choice as plain data."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_choice(override, inner) for inner in value]
    if isinstance(value, dict):
        return {str(key): _choice(override, inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        raise SearchError(f"{override.input_line}: {value} is no value to choose; leave it out")
    return value
