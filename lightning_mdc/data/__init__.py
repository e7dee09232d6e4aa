"""LightningDataModules with a search-validation split held out of the training data."""

from lightning_mdc.data.digits import DigitsDataModule
from lightning_mdc.data.image_folder import ImageFolderDataModule
from lightning_mdc.data.module import ImageDataModule, Splits
from lightning_mdc.data.splits import SplitIndices, split_indices

__all__ = [
    "DigitsDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "SplitIndices",
    "Splits",
    "split_indices",
]
