"""TensorBoard: event files in ``<run>/logs/tensorboard``, one folder per training and ``run`` for all else."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lightning_mdc.app.settings import flat
from lightning_mdc.app.tracking.tracker import Model, RunInfo, Shown, Tracker
from lightning_mdc.errors import ConfigError
from lightning_mdc.figures import tensorboard_logger
from lightning_mdc.figures.items import Summary

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorboardTracker(Tracker):
    """Lightning's `TensorBoardLogger` for curves, torch's `SummaryWriter` for all else.

    Raises:
        ConfigError: tensorboard is not installed.
    """

    def __init__(self) -> None:
        if find_spec("tensorboard") is None:
            raise ConfigError(
                "logger=tensorboard needs the package tensorboard, which is not installed; run pip install tensorboard "
                "(or install this package as lightning-mdc[tensorboard])"
            )
        self._writer: SummaryWriter | None = None
        self._summary: dict[str, float] = {}

    def start(self, info: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._info, self._folder = info, info.folder / "logs" / "tensorboard"
        self._writer = SummaryWriter(str(self._folder / "run"))

    def curves(self, training: str) -> Logger:
        return TensorBoardLogger(self._folder.parent, name="tensorboard", version=training, default_hp_metric=False)

    def show(self, item: Shown) -> None:
        assert self._writer is not None
        match item:
            case Summary():  # at the end, beside the settings
                self._summary |= item.values
            case Model():
                self._writer.add_text(f"models/{item.name}", f"`{item.folder}`, made from {item.parent or 'nothing'}")
            case _:
                tensorboard_logger.show(self._writer, item)

    def finish(self, failed: bool) -> None:
        if self._writer is None:
            return
        # TensorBoard takes no lists, and no None.
        settings = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in flat(self._info.settings)}
        self._writer.add_hparams(settings, self._summary, run_name=".")
        self._writer.close()

    @property
    def location(self) -> str | None:
        return f"tensorboard --logdir {self._folder}"
