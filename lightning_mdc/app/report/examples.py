"""A few test images with what the slim model still looks at, and what dense and slim say of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightning_mdc.app.report.saved import load_arrays, reading, save_arrays
from lightning_mdc.figures.tokens import Example

# Why an image is shown, in the order of the report.
MOST_CHANGED, FIRST, LEAST_CHANGED = "most changed", "first of the test images", "least changed"


@dataclass(frozen=True)
class Examples:
    """Example images of one run.

    Attributes:
        items: the most changed first.
        model: the slim one, its folder in the run's folder, such as ``"finetuned/seed0"``.
        grid: (height, width) in patches.
        blocks: after whose attention each token stage comes.
        class_names: in the order of the labels.
        looked_at: of how many test images they were chosen.
    """

    items: tuple[Example, ...]
    model: str
    grid: tuple[int, int]
    blocks: tuple[int, ...]
    class_names: tuple[str, ...]
    looked_at: int

    def save(self, path: Path) -> None:
        """Write a safetensors file, so that it is there whole or not at all."""
        facts = {
            "items": [[e.why, e.label, *e.dense, *e.slim, e.change] for e in self.items],
            "model": self.model,
            "grid": self.grid,
            "blocks": self.blocks,
            "class_names": self.class_names,
            "looked_at": self.looked_at,
        }
        arrays = {
            "images": np.stack([example.image for example in self.items]),
            "kept": np.stack([example.kept for example in self.items]).astype(np.uint8),
        }
        save_arrays(path, arrays, facts)

    @classmethod
    def load(cls, path: Path) -> Examples:
        """What `save` wrote.

        Raises:
            ConfigError: it cannot be read.
        """
        with reading(path, "examples"):
            arrays, facts = load_arrays(path)
            items = tuple(
                Example(image, why, label, (dense, sure), (slim, slim_sure), change, left)
                for image, left, (why, label, dense, sure, slim, slim_sure, change) in zip(
                    arrays["images"], arrays["kept"].astype(bool), facts["items"], strict=True
                )
            )
            grid, blocks, names = (tuple(facts[name]) for name in ("grid", "blocks", "class_names"))
            return cls(items, facts["model"], grid, blocks, names, facts["looked_at"])
