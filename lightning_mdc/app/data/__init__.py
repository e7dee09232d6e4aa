"""LightningDataModules with a search-validation split held out of the training data."""

from lightning_mdc.app.data.digits import DigitsDataModule
from lightning_mdc.app.data.image_folder import ImageFolderDataModule
from lightning_mdc.app.data.module import ImageDataModule, Splits
from lightning_mdc.app.data.splits import SplitIndices, split_indices

__all__ = [
    "DigitsDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "SplitIndices",
    "Splits",
    "split_indices",
]
