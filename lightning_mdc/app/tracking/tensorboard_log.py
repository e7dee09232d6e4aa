"""TensorBoard: event files in ``<run>/logs/tensorboard``, one folder per training and ``run`` for all else."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lightning_mdc.app.tracking.tracker import About, Tracker
from lightning_mdc.errors import ConfigError
from lightning_mdc.figures.items import Histogram, Item, Model, Numbers, Picture, Summary, Table


class TensorboardTracker(Tracker):
    """Lightning's `TensorBoardLogger` for curves, torch's `SummaryWriter` for all else.

    Raises:
        ConfigError: tensorboard is not installed.
    """

    remedy = "is the disk full, or the folder not writable? choose another logger"

    def __init__(self) -> None:
        if find_spec("tensorboard") is None:
            raise ConfigError(
                "logger=tensorboard needs the package tensorboard, which is not installed; run pip install tensorboard "
                "(or install this package as lightning-mdc[tensorboard])"
            )
        self._writer: Any = None
        self._summary: dict[str, float] = {}

    def start(self, about: About) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._about, self._home = about, about.folder / "logs" / "tensorboard"
        self._writer = SummaryWriter(str(self._home / "run"))

    def curves(self, training: str) -> Logger:
        return TensorBoardLogger(self._home.parent, name="tensorboard", version=training, default_hp_metric=False)

    def show(self, item: Item) -> None:
        from PIL import Image

        match item:
            case Numbers():
                for key, value in item.values.items():
                    self._writer.add_scalar(key, value, item.at)
            case Histogram():
                self._writer.add_histogram(item.key, item.values, 0)
            case Picture():
                pixels = np.asarray(Image.open(io.BytesIO(item.png)).convert("RGB"))
                self._writer.add_image(item.key, pixels, 0, dataformats="HWC")
                self._writer.add_text(item.key, item.caption)
            case Table():
                self._writer.add_text(item.key, _markdown(item))
            case Summary():
                self._summary |= item.values
            case Model():
                self._writer.add_text(f"models/{item.name}", f"`{item.folder}`, made from {item.parent or 'nothing'}")
        self._writer.flush()

    def finish(self, failed: bool) -> None:
        if self._writer is None:
            return
        settings = dict(_flat(self._about.settings))
        self._writer.add_hparams(settings, self._summary, run_name=".")
        self._writer.close()

    @property
    def place(self) -> str | None:
        return f"tensorboard --logdir {self._home}"


def _markdown(table: Table) -> str:
    lines = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of what TensorBoard takes for a hyperparameter."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, (bool, int, float, str)) else str(value)
