"""How an item is shown by Weights & Biases: on the ``experiment`` of Lightning's `WandbLogger`, a wandb run."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from lightning_mdc.figures.items import Cell, Histogram, Item, Numbers, Panel, Picture, Summary, Table

if TYPE_CHECKING:
    from wandb import Run

# What a list of runs shows of a curve, where the last value is not what counts.
_BEST_OF = {"search/value": "max,last", "search/incumbent": "max", "search/improvement": "min,last"}


def show(run: Run, item: Item) -> None:
    """Show `item`."""
    import wandb
    from PIL import Image

    match item:
        case Numbers():
            for key in item.values:
                run.define_metric(key, step_metric=item.axis, summary=_BEST_OF.get(key))
            run.log({**item.values, item.axis: item.at})
        case Histogram():
            run.log({item.key: wandb.Histogram(item.values.tolist())})
        case Picture():
            image = Image.open(io.BytesIO(item.png)).convert("RGB")
            run.log({item.key: wandb.Image(image, caption=item.caption)})
        case Table():
            panels = {panel.key: _drawn(item, panel) for panel in item.panels}
            run.log({item.key: _table(item.columns, item.rows), **panels})
        case Summary():
            run.summary.update(dict(item.values))


def _table(columns: tuple[str, ...], rows: tuple[tuple[Cell, ...], ...]) -> Any:
    import wandb

    return wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)


def _drawn(table: Table, panel: Panel) -> Any:
    """wandb's own chart of some columns; rows that lack one of them are left out."""
    import wandb

    x = table.columns.index(panel.x)
    y = [table.columns.index(name) for name in panel.y]
    if panel.kind == "line":
        known = [[row for row in table.rows if row[column] is not None] for column in y]
        return wandb.plot.line_series(
            xs=[[row[x] for row in rows] for rows in known],
            ys=[[row[column] for row in rows] for column, rows in zip(y, known, strict=True)],
            keys=list(panel.y),
            title=panel.title,
            xname=panel.x,
        )
    rows = tuple((row[x], row[y[0]]) for row in table.rows if None not in (row[x], row[y[0]]))
    draw = wandb.plot.scatter if panel.kind == "scatter" else wandb.plot.bar
    return draw(_table((panel.x, panel.y[0]), rows), panel.x, panel.y[0], title=panel.title)
