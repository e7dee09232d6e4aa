"""What every LightningDataModule of ours answers: four data sets, and the facts a model needs to fit them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_mdc.errors import DataError


@dataclass(frozen=True)
class Splits:
    """The data sets of one task. Each yields ``(image (in_chans, H, W) float32, label int)``."""

    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]
    calibration: Dataset[Any]
    class_names: tuple[str, ...]


class ImageDataModule(LightningDataModule):
    """Loaders over four data sets.

    - *train*: augmented.
    - *val*: the search-validation split, a held-out part of the training data. The policy search and early stopping may
      look at it; it is never reported.
    - *test*: for reporting, looked at by nothing that decides.
    - *calibration*: the training images under the evaluation transforms; units are scored on these.

    A subclass implements :meth:`make_splits`; it runs once, at the first question, so ``num_classes`` is known before
    there is a Trainer.
    """

    def __init__(self, in_chans: int, img_size: int, batch_size: int, num_workers: int) -> None:
        """
        Raises:
            DataError: ``in_chans`` is not 1 or 3, or a count is out of range.
        """
        super().__init__()
        if in_chans not in (1, 3):
            raise DataError(f"in_chans={in_chans!r} is no image format; give 1 (grayscale) or 3 (RGB)")
        for name, value, least in (
            ("img_size", img_size, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise DataError(f"{name}={value!r} is no count; give an integer of at least {least}")
        self.in_chans = in_chans
        self.img_size = img_size
        self.batch_size = batch_size
        self.num_workers = num_workers

    def make_splits(self) -> Splits:
        raise NotImplementedError

    @cached_property
    def splits(self) -> Splits:
        """The data sets, read on first use."""
        return self.make_splits()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class, in the order of the labels."""
        return self.splits.class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def setup(self, stage: str | None = None) -> None:
        # Bad data should fail here, before a model is moved or a logger opened.
        _ = self.splits

    def calibration_dataset(self) -> Dataset[Any]:
        """The training images under the evaluation transforms, in a fixed order."""
        return self.splits.calibration

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.splits.train, training=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Search-validation images: held out of training, never reported."""
        return self._loader(self.splits.val)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.splits.test)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.splits.test)

    def _loader(self, dataset: Dataset[Any], training: bool = False) -> DataLoader[Any]:
        streamed = isinstance(dataset, IterableDataset)
        # A ragged last batch weighs its few images more; but a data set smaller than one batch must not vanish.
        drop_last = training and not streamed and len(dataset) >= self.batch_size  # type: ignore[arg-type]
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=training and not streamed,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
