"""How an item is shown by Lightning's loggers: of Weights & Biases, TensorBoard, MLflow, CSV files, and any other."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_mdc.distributed import is_first
from lightning_mdc.figures.items import Cell, Document, Histogram, Item, Numbers, Panel, Picture, Summary, Table
from lightning_mdc.files import csv_text, replacing, write_text

# What wandb's list of runs shows of a curve, where the last value is not what counts.
_BEST_OF = {"search/value": "max,last", "search/incumbent": "max", "search/improvement": "min,last"}


def show(logger: Logger, item: Item) -> None:
    """Show `item` on a logger, such as one of ``trainer.loggers``; one whose class is none that is known here is given
    the numbers.

    Ranks other than 0 show nothing.
    """
    if is_first():
        (_way(logger) or _as_numbers)(logger, item)


def has_pictures(logger: Logger) -> bool:
    """Whether it has a place for more than numbers."""
    return _way(logger) is not None


def _way(logger: Logger) -> Callable[[Any, Item], None] | None:
    known: Mapping[type[Logger], Callable[[Any, Item], None]] = {
        WandbLogger: _on_wandb,
        TensorBoardLogger: _on_tensorboard,
        MLFlowLogger: _on_mlflow,
        CSVLogger: _on_csv,
    }
    return next((shows for kind, shows in known.items() if isinstance(logger, kind)), None)


def _as_numbers(logger: Logger, item: Item) -> None:
    """By what every logger has. Its step is where a number is on its own axis: its keys have no other."""
    match item:
        case Numbers():
            logger.log_metrics(dict(item.values), step=item.at)
        case Summary():
            logger.log_metrics(dict(item.values), step=0)


def _pixels(picture: Picture) -> np.ndarray:
    """(height, width, 3), uint8."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB"))


def _text(item: Histogram | Table) -> str:
    """As a CSV file."""
    if isinstance(item, Table):
        return csv_text(item.columns, item.rows)
    return csv_text(["value"], ([value] for value in item.values.tolist()))


# --- CSV --------------------------------------------------------------------------------------------------------------


def _on_csv(logger: CSVLogger, item: Item) -> None:
    """Numbers are rows of its ``metrics.csv``; all else, with the key ``search/trials`` for example, are files
    ``<log_dir>/search/trials.csv`` or ``.png``."""
    folder = Path(logger.log_dir)
    match item:
        case Numbers():
            logger.log_metrics({**item.values, item.axis: item.at}, step=item.at)
        case Summary():
            logger.log_metrics(dict(item.values), step=0)
        case Histogram() | Table():
            write_text(folder / f"{item.key}.csv", _text(item))
        case Picture():
            with replacing(folder / f"{item.key}.png") as unfinished:
                unfinished.write_bytes(item.png)


# --- MLflow -----------------------------------------------------------------------------------------------------------


def _on_mlflow(logger: MLFlowLogger, item: Item) -> None:
    """Numbers are its metrics; all else, with the key ``search/trials`` for example, are artifacts
    ``search/trials.csv`` or ``.png``."""
    match item:
        case Numbers() | Summary():
            _as_numbers(logger, item)
        case Histogram() | Table():
            logger.experiment.log_text(logger.run_id, _text(item), f"{item.key}.csv")
        case Picture():
            logger.experiment.log_image(logger.run_id, _pixels(item), f"{item.key}.png")
        case Document() if logger._log_model:
            logger.experiment.log_text(logger.run_id, item.text, item.name)


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
            run.define_metric(item.axis, hidden=True)  # else it would be drawn, against the user's own steps
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
        case Document() if logger._log_model:
            artifact = wandb.Artifact(f"{item.kind}-{run.id}", type=item.kind, metadata=dict(item.facts))
            with artifact.new_file(item.name, encoding="utf-8") as file:
                file.write(item.text)
            run.log_artifact(artifact)


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
