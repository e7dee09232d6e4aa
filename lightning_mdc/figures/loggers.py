"""How an item is shown by Lightning's loggers: of Weights & Biases, TensorBoard and CSV files."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from lightning_mdc.distributed import is_first
from lightning_mdc.figures.items import Cell, Histogram, Item, Numbers, Panel, Picture, Summary, Table
from lightning_mdc.files import csv_text, replacing, write_text

# What wandb's list of runs shows of a curve, where the last value is not what counts.
_BEST_OF = {"search/value": "max,last", "search/incumbent": "max", "search/improvement": "min,last"}


def show(logger: Logger, item: Item) -> bool:
    """Show `item` on a logger, such as one of ``trainer.loggers``; False if its class is none that is known here.

    Ranks other than 0 show nothing.
    """
    known: Mapping[type[Logger], Callable[[Any, Item], None]] = {
        WandbLogger: _on_wandb,
        TensorBoardLogger: _on_tensorboard,
        CSVLogger: _on_csv,
    }
    show_on = next((shows for kind, shows in known.items() if isinstance(logger, kind)), None)
    if show_on is not None and is_first():
        show_on(logger, item)
    return show_on is not None


def _pixels(picture: Picture) -> np.ndarray:
    """(height, width, 3), uint8."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB"))


# --- CSV --------------------------------------------------------------------------------------------------------------


def _on_csv(logger: CSVLogger, item: Item) -> None:
    """Numbers are rows of its ``metrics.csv``; all else, with the key ``search/trials`` for example, are files
    ``<log_dir>/search/trials.csv`` or ``.png``."""
    folder = Path(logger.log_dir)
    match item:
        case Numbers():
            logger.log_metrics({**item.values, item.axis: item.at})
        case Summary():
            logger.log_metrics(dict(item.values))
        case Histogram():
            write_text(folder / f"{item.key}.csv", csv_text(["value"], ([value] for value in item.values.tolist())))
        case Table():
            write_text(folder / f"{item.key}.csv", csv_text(item.columns, item.rows))
        case Picture():
            with replacing(folder / f"{item.key}.png") as unfinished:
                unfinished.write_bytes(item.png)


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def _on_tensorboard(logger: TensorBoardLogger, item: Item) -> None:
    writer = logger.experiment
    match item:
        case Numbers():
            for key, value in item.values.items():
                writer.add_scalar(key, value, item.at)
        case Summary():
            for key, value in item.values.items():
                writer.add_scalar(key, value, 0)
        case Histogram():
            writer.add_histogram(item.key, item.values, 0)
        case Picture():
            writer.add_image(item.key, _pixels(item), 0, dataformats="HWC")
            writer.add_text(item.key, item.caption)
        case Table():  # it has no tables, so they are text
            lines = [item.columns, ["---"] * len(item.columns), *item.rows]
            cells = (("" if cell is None else str(cell) for cell in line) for line in lines)
            writer.add_text(item.key, "\n".join(f"| {' | '.join(line)} |" for line in cells))
    writer.flush()


# --- Weights & Biases -------------------------------------------------------------------------------------------------


def _on_wandb(logger: WandbLogger, item: Item) -> None:
    import wandb

    run = logger.experiment
    match item:
        case Numbers():
            for key in item.values:
                run.define_metric(key, step_metric=item.axis, summary=_BEST_OF.get(key))
            run.log({**item.values, item.axis: item.at})
        case Histogram():
            run.log({item.key: wandb.Histogram(item.values.tolist())})
        case Picture():
            run.log({item.key: wandb.Image(_pixels(item), caption=item.caption)})
        case Table():
            panels = {panel.key: _wandb_panel(item, panel) for panel in item.panels}
            run.log({item.key: _wandb_table(item.columns, item.rows), **panels})
        case Summary():
            run.summary.update(dict(item.values))


def _wandb_table(columns: tuple[str, ...], rows: tuple[tuple[Cell, ...], ...]) -> Any:
    import wandb

    return wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)


def _wandb_panel(table: Table, panel: Panel) -> Any:
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
    return draw(_wandb_table((panel.x, panel.y[0]), rows), panel.x, panel.y[0], title=panel.title)
