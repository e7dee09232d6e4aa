"""Handwritten digits that come with scikit-learn: real images, no download."""

from dataclasses import dataclass
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


@dataclass(kw_only=True, eq=False, repr=False)
class DigitsDataModule(ImageDataModule):
    """1797 grayscale images of 8×8 pixels in ten classes: 1197 train, 240 search-validation, 360 test.

    The split depends on ``split_seed`` alone, not on the seed of the run: all finetune seeds face one test split.
    Mirror images of digits are no digits, so no image is flipped. What the arguments mean is said in
    ``conf/data/digits.yaml``.

    Raises:
        DataError: a count or fraction is out of range.
    """

    batch_size: int = 64
    img_size: int = 12
    in_chans: int = 1
    num_workers: int = 0
    val_fraction: float = 0.1333
    test_fraction: float = 0.2
    max_train_images: int | None = None
    augment: bool = True
    rotation: float = 10.0
    translation: float = 0.1
    scaling: float = 0.1
    split_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data_config = {"mean": (DIGITS_MEAN,) * self.in_chans, "std": (DIGITS_STD,) * self.in_chans}

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

        augmentation = v2.RandomAffine(
            degrees=self.rotation,
            translate=(self.translation, self.translation),
            scale=(1 - self.scaling, 1 + self.scaling),
            interpolation=InterpolationMode.BILINEAR,
            fill=-DIGITS_MEAN / DIGITS_STD,  # what a black pixel is after normalisation
        )
        return Splits(
            train=tensors(train, augmentation if self.augment else None),
            val=tensors(split.val),
            test=tensors(split.test),
            calibration=tensors(train),
            class_names=tuple(str(name) for name in digits.target_names),
        )


@dataclass(eq=False)
class TensorImages(Dataset[tuple[Tensor, int]]):
    """Images held in memory, (n, in_chans, H, W), with an optional random transform."""

    images: Tensor
    labels: list[int]
    augmentation: Any = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        return (image if self.augmentation is None else self.augmentation(image)), self.labels[index]
