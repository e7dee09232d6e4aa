"""What every model says of every test image, behind the accuracy of each class; and a few of them to look at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from lightning_mdc.app.report.results import reading
from lightning_mdc.figures.tokens import Example
from lightning_mdc.files import replacing

# Why an image is shown, in the order of the report.
MOST_CHANGED, FIRST, LEAST_CHANGED = "most changed", "first of the test images", "least changed"


@dataclass(frozen=True)
class ClassChange:
    """One class under dense and under slim.

    Attributes:
        name: of the class.
        images: test images of it.
        dense, slim: of these, how many are right; of several finetuned slim models the mean.
    """

    name: str
    images: int
    dense: float
    slim: float

    @property
    def change(self) -> float:
        """Of the fraction that is right; 0 without images."""
        return (self.slim - self.dense) / self.images if self.images else 0.0


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Labels and predicted classes of the test images, in one order for all models.

    Attributes:
        labels: (images,) whole numbers.
        predicted: (images,) by the model's folder in the run's folder: ``"dense"``, ``"slim"``, ``"finetuned/seed0"``.
        class_names: in the order of the labels.
    """

    labels: np.ndarray
    predicted: Mapping[str, np.ndarray]
    class_names: tuple[str, ...]

    @property
    def images_by_class(self) -> np.ndarray:
        """Test images of each class, (classes,)."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    def correct_by_class(self, model: str) -> np.ndarray:
        """Images of each class that `model` gets right, (classes,)."""
        right = self.labels[self.predicted[model] == self.labels]
        return np.bincount(right, minlength=len(self.class_names))

    @property
    def slim_models(self) -> tuple[str, ...]:
        """The slim models to speak of: the finetuned ones, by seed, if there are any."""
        finetuned = [model for model in self.predicted if model.startswith("finetuned/")]
        return tuple(sorted(finetuned, key=lambda model: (len(model), model))) or ("slim",)

    def class_changes(self) -> tuple[ClassChange, ...]:
        """How each class that has test images fared, the worst first."""
        dense = self.correct_by_class("dense")
        slim = np.mean([self.correct_by_class(model) for model in self.slim_models], axis=0)
        rows = zip(self.class_names, self.images_by_class.tolist(), dense.tolist(), slim.tolist(), strict=True)
        found = [ClassChange(*row) for row in rows if row[1]]
        return tuple(sorted(found, key=lambda change: (change.change, change.name)))

    def save(self, path: Path) -> None:
        """Write a safetensors file, so that it is there whole or not at all."""
        arrays = {f"predicted/{model}": classes for model, classes in self.predicted.items()} | {"labels": self.labels}
        facts = {"class_names": self.class_names}
        _save_arrays(path, {name: array.astype(np.int32) for name, array in arrays.items()}, facts)

    @classmethod
    def load(cls, path: Path) -> Outcomes:
        """What `save` wrote.

        Raises:
            ConfigError: it cannot be read.
        """
        with reading(path, "predictions"):
            arrays, facts = _load_arrays(path)
            labels = arrays.pop("labels")
            predicted = {name.removeprefix("predicted/"): classes for name, classes in arrays.items()}
            return cls(labels, predicted, tuple(facts["class_names"]))


@dataclass(frozen=True)
class Examples:
    """Example images of one run: what the slim model still looks at, and what dense and slim say of them.

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
        arrays = {name: np.stack([getattr(item, name) for item in self.items]) for name in ("image", "kept")}
        said = [(item.why, item.label, item.dense, item.slim, item.change) for item in self.items]
        _save_arrays(path, arrays, {**vars(self), "items": said})

    @classmethod
    def load(cls, path: Path) -> Examples:
        """What `save` wrote.

        Raises:
            ConfigError: it cannot be read.
        """
        with reading(path, "examples"):
            arrays, facts = _load_arrays(path)
            items = tuple(
                Example(image, why, label, tuple(dense), tuple(slim), change, kept)
                for image, kept, (why, label, dense, slim, change) in zip(
                    arrays["image"], arrays["kept"], facts.pop("items"), strict=True
                )
            )
            others: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()}
            return cls(items, **others)


def _save_arrays(path: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """A safetensors file of arrays and JSON-ready facts."""
    # safetensors writes memory as it lies, and stacking keeps the order of channels that come first in it.
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with replacing(path) as unfinished:
        save_file(contiguous, unfinished, metadata={"facts": json.dumps(facts)})


def _load_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, facts) that `_save_arrays` wrote."""
    with safe_open(str(path), framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return arrays, json.loads((file.metadata() or {})["facts"])
