"""What a logger can be shown: values, each with the key that names its panel. Knows no logger's library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from lightning_mdc.figures.style import png_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell: TypeAlias = str | float | None


@dataclass(frozen=True)
class Numbers:
    """One point of some curves.

    Attributes:
        values: by key; what is not known (yet) is left out.
        axis: key of what they are drawn against, such as ``search/trial``.
        at: where on that axis.
    """

    values: Mapping[str, float]
    axis: str
    at: int


@dataclass(frozen=True, eq=False)
class Histogram:
    """How `values` (n,) are spread."""

    key: str
    values: np.ndarray


@dataclass(frozen=True)
class Picture:
    """A drawn chart, as the bytes of a PNG file."""

    key: str
    caption: str
    png: bytes

    @classmethod
    def of(cls, key: str, caption: str, figure: Figure) -> Picture:
        """A figure, drawn; under ``charts/``, because ``search/value`` is a picture's key and a number's."""
        return cls(f"charts/{key}", caption, png_of(figure))


@dataclass(frozen=True)
class Panel:
    """A chart that the logger's dashboard draws itself from a table: what one can hover over and zoom into.

    Attributes:
        key: of the panel.
        title: of the panel.
        kind: ``line`` (one per column of `y`), ``scatter`` or ``bar`` (of the first column of `y`).
        x: column; of a bar, its label.
        y: columns.
    """

    key: str
    title: str
    kind: Literal["line", "scatter", "bar"]
    x: str
    y: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Rows of cells; all cells of a column are of one kind, or None."""

    key: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    panels: tuple[Panel, ...] = ()


@dataclass(frozen=True)
class Summary:
    """One number per run and key: the columns that a list of runs is sorted by."""

    values: Mapping[str, float]


@dataclass(frozen=True)
class Document:
    """A text file that goes with a model, for loggers that keep models.

    Attributes:
        kind: what it is: ``plan``.
        name: of the file, such as ``plan.json``.
        text: what is in it.
        facts: about it, to find it by.
    """

    kind: str
    name: str
    text: str
    facts: Mapping[str, float]


Item: TypeAlias = Numbers | Histogram | Picture | Table | Summary | Document
