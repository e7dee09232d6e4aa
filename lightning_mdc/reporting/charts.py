"""All pictures that a run gives occasion to, each with what it shows: for the page, the dashboards and the files."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure

from lightning_mdc.reporting.record import RunRecord


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes:
        key: names files and panels: ``"kept"``, ``"search/value"``.
        title: what it is.
        caption: what to read from it, a sentence or two.
        figure: to be drawn.
    """

    key: str
    title: str
    caption: str
    figure: Figure


def charts(record: RunRecord) -> list[Chart]:
    """The pictures of a run, in the order of a report; those that have nothing to show (yet) are left out."""
    return []
