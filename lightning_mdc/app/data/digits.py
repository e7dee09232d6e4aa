"""Handwritten digits that come with scikit-learn: real images, no download."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from lightning_mdc.app.data.module import ImageDataModule, Splits
from lightning_mdc.app.data.splits import cap_indices, split_indices

# Over all 1797 images at 8×8, with pixels in [0, 1].
DIGITS_MEAN = 0.3053
DIGITS_STD = 0.3760


class DigitsDataModule(ImageDataModule):
    """1797 grayscale images of 8×8 pixels in ten classes: 1197 train, 240 search-validation, 360 test.

    The split depends on ``split_seed`` alone, not on the seed of the run: all finetune seeds face one test split.
    """

    def __init__(
        self,
        batch_size: int = 64,
        img_size: int = 12,
        in_chans: int = 1,
        val_fraction: float = 0.1333,
        test_fraction: float = 0.2,
        max_train_images: int | None = None,
        augment: bool = True,
        rotation: float = 10.0,
        translation: float = 0.1,
        scaling: float = 0.1,
        split_seed: int = 0,
        num_workers: int = 0,
        **loading: Any,
    ) -> None:
        """
        Args:
            img_size: side in pixels; the 8×8 originals are resized bilinearly, by default so that patches of 2×2 make
                36 tokens.
            in_chans: 3 repeats the gray channel.
            val_fraction: share of all images held out for the search.
            test_fraction: share of all images held out for reporting.
            max_train_images: train on fewer, chosen with ``split_seed``.
            augment: random affine training images; mirror images of digits are no digits, so no flips.
            rotation: largest angle, degrees.
            translation: largest shift, as a fraction of the side.
            scaling: largest change of scale, as a fraction.
            loading: further keyword arguments of `ImageDataModule`: ``pin_memory``, ``repeated_augmentation``, ...

        Raises:
            DataError: a count or fraction is out of range.
        """
        super().__init__(in_chans, img_size, batch_size, num_workers, **loading)
        self.data_config = {"mean": (DIGITS_MEAN,) * in_chans, "std": (DIGITS_STD,) * in_chans}
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.max_train_images = max_train_images
        self.split_seed = split_seed
        self.augmentation = (
            v2.RandomAffine(
                degrees=rotation,
                translate=(translation, translation),
                scale=(1 - scaling, 1 + scaling),
                interpolation=InterpolationMode.BILINEAR,
                fill=-DIGITS_MEAN / DIGITS_STD,  # what a black pixel is after normalisation
            )
            if augment
            else None
        )

    def make_splits(self) -> Splits:
        digits = load_digits()
        pixels = torch.from_numpy(digits.images).float()[:, None] / 16  # (n, 1, 8, 8) in [0, 1]
        if self.img_size != pixels.shape[-1]:
            size = (self.img_size, self.img_size)
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
        images = ((pixels - DIGITS_MEAN) / DIGITS_STD).expand(-1, self.in_chans, -1, -1).contiguous()
        labels = digits.target.astype(np.int64)

        split = split_indices(labels, self.val_fraction, self.test_fraction, self.split_seed)
        train = cap_indices(split.train, labels, self.max_train_images, self.split_seed, "max_train_images")

        def tensors(indices: np.ndarray, augmentation: Any = None) -> "TensorImages":
            return TensorImages(images[torch.from_numpy(indices)], labels[indices].tolist(), augmentation)

        return Splits(
            train=tensors(train, self.augmentation),
            val=tensors(split.val),
            test=tensors(split.test),
            calibration=tensors(train),
            class_names=tuple(str(name) for name in digits.target_names),
        )


class TensorImages(Dataset[tuple[Tensor, int]]):
    """Images held in memory, (n, in_chans, H, W), with an optional random transform."""

    def __init__(self, images: Tensor, labels: list[int], augmentation: Any = None) -> None:
        self.images = images
        self.labels = labels
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        return (image if self.augmentation is None else self.augmentation(image)), self.labels[index]
