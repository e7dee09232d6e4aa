"""Tables: cells are made once, as text, so that the printed table and the Markdown one cannot differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import rich.box
import rich.table

from lightning_mdc.app.report.outcomes import ClassChange
from lightning_mdc.app.report.results import DENSE, FINETUNED, REFERENCE, SLIM, Result, Results, mean_correct
from lightning_mdc.figures.numbers import counted, percent, scaled, seconds


@dataclass(frozen=True)
class Table:
    """Header and rows of text; the first column names the row."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """A GitHub table, numbers to the right."""
        rule = ("---", *("---:" for _ in self.header[1:]))
        lines = [[_escaped(cell) for cell in cells] for cells in (self.header, *self.rows)]
        lines.insert(1, list(rule))
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"

    def rich(self, title: str) -> rich.table.Table:
        """The same for a terminal."""
        table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
        for position, name in enumerate(self.header):
            table.add_column(name, justify="right" if position else "left", style="bold" if position == 0 else None)
        for row in self.rows:
            table.add_row(*row)
        return table


def comparison(results: Results) -> Table:
    """Models side by side, one column each (several seeds of one model are averaged); a row per quantity."""
    dense = results.dense
    groups = [rows for kind in (DENSE, SLIM, FINETUNED, REFERENCE) if (rows := results.of(kind))]

    def of_dense(of: Callable[[Result], int], unit: str = "") -> tuple[str, ...]:
        return tuple(f"{scaled(of(rows[0]))}{unit} ({of(rows[0]) / of(dense):.1%})" for rows in groups)

    cells: dict[str, Sequence[str]] = {
        "top-1": [count(mean_correct(rows), dense.images) for rows in groups],
        "agreement with dense": [count(mean(row.agreeing for row in rows), dense.images) for rows in groups],
        "MACs": of_dense(lambda row: row.macs),
        "parameters": of_dense(lambda row: row.params),
        "weights file": of_dense(lambda row: row.size, "B"),
    }
    for batch_size in results.batch_sizes:
        cells[f"time per image, batch {batch_size}"] = [_time(rows[0], dense, batch_size) for rows in groups]
    return Table(
        header=("", *(_title(rows) for rows in groups)),
        rows=tuple((name, *row) for name, row in cells.items()),
    )


def by_seed(results: Results) -> Table:
    """Top-1 and agreement of every finetuned model, one row per seed."""
    rows = [
        (row.model, str(row.seed), count(row.correct, row.images), count(row.agreeing, row.images))
        for row in results.rows
        if row.seed is not None
    ]
    return Table(header=("model", "seed", "top-1", "agreement with dense"), rows=tuple(rows))


def by_class(changes: Sequence[ClassChange]) -> Table:
    """Accuracy of every class under dense and slim, in the order given."""
    return Table(
        header=("class", "test images", "dense", "slim", "change in points"),
        rows=tuple(
            (
                each.name,
                str(each.images),
                percent(each.dense / each.images),
                percent(each.slim / each.images),
                f"{100 * each.change:+.1f}",
            )
            for each in changes
        ),
    )


def count(number: float, total: int) -> str:
    """n/N and per cent: ``351/360 (97.50 %)``; a mean over seeds keeps one decimal, ``350.7/360``."""
    return f"{counted(number)}/{total} ({number / total:.2%})".replace("%", " %")


def _escaped(cell: str) -> str:
    """Text that Markdown shows as it is."""
    return cell.replace("|", r"\|").replace("<", "&lt;")


def _title(rows: Sequence[Result]) -> str:
    return rows[0].model if len(rows) == 1 else f"{rows[0].model} (mean of {len(rows)} seeds)"


def _time(row: Result, dense: Result, batch_size: int) -> str:
    faster = dense.latency[batch_size] / row.latency[batch_size]
    return seconds(row.latency[batch_size]) + ("" if row is dense else f" ({faster:.2f}x as fast)")
