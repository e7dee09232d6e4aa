"""What a dashboard can be shown: values, each with the key that names its panel. Knows no tracker's library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np


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


@dataclass(frozen=True)
class Panel:
    """A chart that the dashboard draws itself from a table: what one can hover over and zoom into.

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
    """Rows of cells, each a number, text or None; all cells of a column are of one kind."""

    key: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    panels: tuple[Panel, ...] = ()


@dataclass(frozen=True)
class Summary:
    """One number per run and key: the columns that a list of runs is sorted by."""

    values: Mapping[str, float]


@dataclass(frozen=True)
class Model:
    """A saved model.

    Attributes:
        name: its place in the run's folder, such as ``finetuned/seed0``.
        folder: with its files.
        parent: name of the model that it was made from; None if it was trained from scratch or loaded.
        metadata: what its ``config.json`` says.
    """

    name: str
    folder: Path
    parent: str | None
    metadata: Mapping[str, Any]


Item: TypeAlias = Numbers | Histogram | Picture | Table | Summary | Model
