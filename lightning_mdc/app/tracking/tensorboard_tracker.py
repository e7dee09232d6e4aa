"""TensorBoard: event files in ``<run>/logs/tensorboard``, one folder per training and ``run`` for all else."""

from __future__ import annotations

from importlib.util import find_spec

from lightning.pytorch.loggers import TensorBoardLogger

from lightning_mdc.app.settings import flat
from lightning_mdc.app.tracking.tracker import Model, RunInfo, Shown, Tracker
from lightning_mdc.errors import ConfigError
from lightning_mdc.figures import loggers
from lightning_mdc.figures.items import Summary


class TensorboardTracker(Tracker):
    """Lightning's `TensorBoardLogger`, one for each training and one for all else.

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
        self._run: TensorBoardLogger | None = None
        self._summary: dict[str, float] = {}

    def start(self, info: RunInfo) -> None:
        self._info, self._folder = info, info.folder / "logs" / "tensorboard"
        run = self.curves("run")
        _ = run.experiment  # makes the file
        self._run = run

    def curves(self, training: str) -> TensorBoardLogger:
        return TensorBoardLogger(self._folder.parent, name="tensorboard", version=training, default_hp_metric=False)

    def show(self, item: Shown) -> None:
        assert self._run is not None
        match item:
            case Summary():  # at the end, beside the settings
                self._summary |= item.values
            case Model():
                text = f"`{item.folder}`, made from {item.parent or 'nothing'}"
                self._run.experiment.add_text(f"models/{item.name}", text)
            case _:
                loggers.show(self._run, item)

    def finish(self, failed: bool) -> None:
        if self._run is None:
            return
        # TensorBoard takes no lists, and no None.
        found = {k: v for k, v in flat(self._info.settings) if v != {}}
        settings = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in found.items()}
        self._run.experiment.add_hparams(settings, self._summary, run_name=".")
        self._run.experiment.close()

    @property
    def location(self) -> str | None:
        return f"tensorboard --logdir {self._folder}"
