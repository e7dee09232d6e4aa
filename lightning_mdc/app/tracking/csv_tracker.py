"""Training curves as CSV files: ``<run>/logs/<training>/version_0/metrics.csv``."""

from __future__ import annotations

from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_mdc.app.tracking.tracker import RunInfo, Tracker


class CsvTracker(Tracker):
    """Lightning's `CSVLogger`; all else a run leaves are files anyway."""

    remedy = "is the disk full, or the folder not writable?"
    shows_items = False

    def start(self, info: RunInfo) -> None:
        self._folder = info.folder / "logs"

    def curves(self, training: str) -> Logger:
        return CSVLogger(self._folder, name=training.replace("/", "-"))

    def finish(self, failed: bool) -> None:
        """Nothing is open."""
