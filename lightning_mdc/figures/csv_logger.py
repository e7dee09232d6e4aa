"""How an item is shown by Lightning's `CSVLogger`: numbers as rows of its ``metrics.csv``, all else as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_mdc.figures.items import Histogram, Item, Numbers, Picture, Summary, Table
from lightning_mdc.files import csv_text, replacing, write_text

if TYPE_CHECKING:
    from lightning.pytorch.loggers import CSVLogger


def show(logger: CSVLogger, item: Item) -> None:
    """Show `item`; a table or picture with the key ``search/trials`` is ``<log_dir>/search/trials.csv`` or ``.png``."""
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
