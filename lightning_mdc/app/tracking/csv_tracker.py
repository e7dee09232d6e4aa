"""Training curves as CSV files: ``<run>/logs/<training>/version_0/metrics.csv``."""

from __future__ import annotations

from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_mdc.app.tracking.tracker import RunInfo, Shown, Tracker


class CsvTracker(Tracker):
    """Lightning's `CSVLogger`; all else a run leaves are files anyway."""

    shows_items = False
    remedy = "is the disk full, or the folder not writable?"

    def start(self, info: RunInfo) -> None:
        self._folder = info.folder / "logs"

    def curves(self, training: str) -> Logger:
        return CSVLogger(self._folder, name=training.replace("/", "-"))

    def show(self, item: Shown) -> None:
        raise TypeError(f"{type(item).__name__} is no training curve")  # see shows_items

    def finish(self, failed: bool) -> None:
        """Nothing is open."""
