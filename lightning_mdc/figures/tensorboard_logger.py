"""How an item is shown by TensorBoard: on the ``experiment`` of Lightning's `TensorBoardLogger`."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from lightning_mdc.figures.items import Histogram, Item, Numbers, Picture, Summary, Table

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def show(writer: SummaryWriter, item: Item) -> None:
    """Show `item`; TensorBoard has no tables, so they are text."""
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
            from PIL import Image

            pixels = np.asarray(Image.open(io.BytesIO(item.png)).convert("RGB"))
            writer.add_image(item.key, pixels, 0, dataformats="HWC")
            writer.add_text(item.key, item.caption)
        case Table():
            writer.add_text(item.key, _markdown(item))
    writer.flush()


def _markdown(table: Table) -> str:
    lines = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)
