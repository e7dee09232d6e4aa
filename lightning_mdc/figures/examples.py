"""A few test images with what the slim model still looks at, and what dense and slim say of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lightning_mdc.errors import ConfigError
from lightning_mdc.files import replacing

# Why an image is shown, in the order of the report.
MOST_CHANGED, FIRST, LEAST_CHANGED = "most changed", "first of the test images", "least changed"


@dataclass(frozen=True, eq=False)
class Example:
    """One test image.

    Attributes:
        image: (height, width, 3), uint8, as the model sees it.
        why: `MOST_CHANGED`, `FIRST` or `LEAST_CHANGED`.
        label: its class.
        dense, slim: (class, probability) that each predicts.
        change: KL(dense ‖ slim) of the two predictions, in nats.
        kept: (stages, patches), bool: whether a patch is still there as a token of its own after each token stage.
    """

    image: np.ndarray
    why: str
    label: int
    dense: tuple[int, float]
    slim: tuple[int, float]
    change: float
    kept: np.ndarray


@dataclass(frozen=True)
class Examples:
    """Example images of one run.

    Attributes:
        items: the most changed first.
        place: of the slim model in the run's folder, such as ``"finetuned/seed0"``.
        grid: (height, width) in patches.
        blocks: after whose attention each token stage comes.
        class_names: in the order of the labels.
        looked_at: of how many test images they were chosen.
    """

    items: tuple[Example, ...]
    place: str
    grid: tuple[int, int]
    blocks: tuple[int, ...]
    class_names: tuple[str, ...]
    looked_at: int

    def save(self, path: Path) -> None:
        """Write a safetensors file, so that it is there whole or not at all."""
        facts = {
            "items": [[e.why, e.label, *e.dense, *e.slim, e.change] for e in self.items],
            "place": self.place,
            "grid": self.grid,
            "blocks": self.blocks,
            "class_names": self.class_names,
            "looked_at": self.looked_at,
        }
        tensors = {
            # safetensors writes memory as it lies, and stacking keeps the order of channels that come first in it.
            "images": np.ascontiguousarray(np.stack([example.image for example in self.items])),
            "kept": np.ascontiguousarray(np.stack([example.kept for example in self.items]), dtype=np.uint8),
        }
        with replacing(path) as beside:
            save_file(tensors, beside, metadata={"examples": json.dumps(facts)})

    @classmethod
    def load(cls, path: Path) -> Examples:
        """What `save` wrote.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            with safe_open(str(path), framework="numpy") as file:
                images, kept = file.get_tensor("images"), file.get_tensor("kept").astype(bool)
                facts: dict[str, Any] = json.loads((file.metadata() or {})["examples"])
            items = tuple(
                Example(image, why, label, (dense, sure), (slim, slim_sure), change, left)
                for image, left, (why, label, dense, sure, slim, slim_sure, change) in zip(
                    images, kept, facts["items"], strict=True
                )
            )
            grid, blocks, names = (tuple(facts[name]) for name in ("grid", "blocks", "class_names"))
            return cls(items, facts["place"], grid, blocks, names, facts["looked_at"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} holds no examples ({error}); run the stage 'test' again") from error
