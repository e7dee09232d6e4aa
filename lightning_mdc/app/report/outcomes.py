"""What every model says of every test image: behind the accuracy of each class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightning_mdc.app.report.saved import load_arrays, reading, save_arrays


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
        save_arrays(path, {name: array.astype(np.int32) for name, array in arrays.items()}, facts)

    @classmethod
    def load(cls, path: Path) -> Outcomes:
        """What `save` wrote.

        Raises:
            ConfigError: it cannot be read.
        """
        with reading(path, "predictions"):
            arrays, facts = load_arrays(path)
            labels = arrays.pop("labels")
            predicted = {name.removeprefix("predicted/"): classes for name, classes in arrays.items()}
            return cls(labels, predicted, tuple(facts["class_names"]))
