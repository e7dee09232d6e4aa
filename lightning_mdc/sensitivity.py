"""How much each dimension of each block matters alone: accuracy and KL as it goes from whole to nothing."""

from __future__ import annotations

import csv
import io
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from lightning_mdc.errors import ConfigError
from lightning_mdc.run_folder import write_text


@dataclass(frozen=True)
class Cut:
    """One dimension of one block cut, all else whole.

    Attributes:
        dimension: ``"heads"``, ``"neurons"`` or ``"tokens"``.
        block: for tokens, the block of the token stage.
        keep: realised keep ratio; 1 is the dense model.
        accuracy: top-1 on the held-out images, a fraction.
        kl: mean KL(dense ‖ cut) of the predictions, in nats.
        cost: MACs as a fraction of dense.
    """

    dimension: str
    block: int
    keep: float
    accuracy: float
    kl: float
    cost: float


@dataclass(frozen=True)
class Sensitivity:
    """All cuts that were tried, in the order they were tried."""

    cuts: tuple[Cut, ...]

    def save(self, path: Path) -> None:
        """Write a CSV file with a header, a line per cut."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([field.name for field in fields(Cut)])
        writer.writerows(astuple(cut) for cut in self.cuts)
        write_text(path, text.getvalue())

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """What `save` wrote.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            rows = csv.DictReader(path.read_text().splitlines())
            return cls(
                tuple(
                    Cut(
                        row["dimension"],
                        int(row["block"]),
                        *(float(row[name]) for name in ("keep", "accuracy", "kl", "cost")),
                    )
                    for row in rows
                )
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path} holds no sensitivities ({error}); run the stage 'sensitivity' again") from error
