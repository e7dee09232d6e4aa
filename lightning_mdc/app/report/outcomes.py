"""What every model says of every test image: behind the accuracy of each class."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lightning_mdc.errors import ConfigError
from lightning_mdc.files import replacing


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
        """Of the share that is right; 0 without images."""
        return (self.slim - self.dense) / self.images if self.images else 0.0


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Labels and predicted classes of the test images, in one order for all models.

    Attributes:
        labels: (images,) whole numbers.
        predicted: (images,) by the model's place in the run's folder: ``"dense"``, ``"slim"``, ``"finetuned/seed0"``.
        class_names: in the order of the labels.
    """

    labels: np.ndarray
    predicted: Mapping[str, np.ndarray]
    class_names: tuple[str, ...]

    @property
    def images_by_class(self) -> np.ndarray:
        """Test images of each class, (classes,)."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    def correct_by_class(self, place: str) -> np.ndarray:
        """Images of each class that the model at `place` gets right, (classes,)."""
        right = self.labels[self.predicted[place] == self.labels]
        return np.bincount(right, minlength=len(self.class_names))

    @property
    def slim_places(self) -> tuple[str, ...]:
        """Of the slim models to speak of: the finetuned ones if there are any."""
        finetuned = [place for place in self.predicted if place.startswith("finetuned/")]
        return tuple(sorted(finetuned, key=lambda place: (len(place), place))) or ("slim",)

    def class_changes(self) -> tuple[ClassChange, ...]:
        """How each class that has test images fared, the worst first."""
        dense = self.correct_by_class("dense")
        slim = np.mean([self.correct_by_class(place) for place in self.slim_places], axis=0)
        rows = zip(self.class_names, self.images_by_class.tolist(), dense.tolist(), slim.tolist(), strict=True)
        found = [ClassChange(*row) for row in rows if row[1]]
        return tuple(sorted(found, key=lambda change: (change.change, change.name)))

    def save(self, path: Path) -> None:
        """Write a safetensors file, so that it is there whole or not at all."""
        tensors = {"labels": self.labels}
        tensors |= {f"predicted/{place}": classes for place, classes in self.predicted.items()}
        plain = {name: np.ascontiguousarray(array, dtype=np.int32) for name, array in tensors.items()}
        with replacing(path) as beside:
            save_file(plain, beside, metadata={"class_names": json.dumps(self.class_names)})

    @classmethod
    def load(cls, path: Path) -> Outcomes:
        """What `save` wrote.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            with safe_open(str(path), framework="numpy") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                names = json.loads((file.metadata() or {})["class_names"])
            labels = tensors.pop("labels")
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{path} holds no predictions ({error}); run the stage 'test' again") from error
        predicted = {name.removeprefix("predicted/"): classes for name, classes in tensors.items()}
        return cls(labels, predicted, tuple(names))
