"""Some images of a data set under one transform, and what happens when one of them can't be decoded."""

from __future__ import annotations

import logging
import os
import struct
import tarfile
import zlib
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightning_mdc.errors import DataError

log = logging.getLogger(__name__)

# What PIL, tarfile and the file system raise at damaged images.
_DAMAGE = (
    OSError,  # PIL.UnidentifiedImageError is one
    SyntaxError,  # a broken PNG
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    tarfile.TarError,
    Image.DecompressionBombError,
)


class CorruptImageError(DataError):
    """An image can't be decoded."""

    def __init__(self, message: str) -> None:
        # torch raises the error of a worker process again with the worker's whole traceback as its message, of which
        # the last line is what we said.
        super().__init__(message.strip().splitlines()[-1].rpartition(f"{type(self).__name__}: ")[-1])


class ImageView(Dataset[tuple[Tensor, int]]):
    """Some images of a data set under one transform, with labels that are known without decoding."""

    def __init__(
        self,
        source: Any,
        indices: np.ndarray,
        labels: np.ndarray,
        transform: Any,
        mode: str,
        max_corrupt_images: int = 0,
    ) -> None:
        """
        Args:
            source: data set of PIL images, of timm or torchvision; read without a transform of its own.
            indices: positions in ``source``, (n,).
            labels: class of every image of ``source``.
            mode: PIL's name of the pixel format the model reads.
            max_corrupt_images: how many may be replaced in an epoch by the next one that can be decoded.
        """
        self.source = source
        self.indices = indices
        self.labels = labels[indices].tolist()
        self.transform = transform
        self.mode = mode
        self.max_corrupt_images = max_corrupt_images
        # Which were found corrupt in this epoch, in memory that worker processes share. They write to different places,
        # and an image that two of them meet counts once, so no lock is needed.
        self.corrupt = torch.zeros(len(indices) if max_corrupt_images else 0, dtype=torch.bool).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Corrupt images are counted anew."""
        self.corrupt.zero_()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """
        Raises:
            CorruptImageError: the image can't be decoded, and no more of them are to be replaced.
        """
        for tried in range(len(self)):
            index = (index + bool(tried)) % len(self)
            try:
                image = _decode(self.source, int(self.indices[index]), self.mode)
            except _DAMAGE as error:
                self._note_corrupt(index, error)
            else:
                return self.transform(image), self.labels[index]
        raise CorruptImageError(f"none of the {len(self)} training images can be decoded; replace them")

    def _note_corrupt(self, index: int, error: Exception) -> None:
        file = _file_of(self.source, int(self.indices[index]))
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if not self.max_corrupt_images:
            raise CorruptImageError(
                f"{file} can't be decoded ({reason}); replace it, or remove it and start anew"
            ) from error
        if self.corrupt[index]:
            return
        self.corrupt[index] = True
        count = int(self.corrupt.sum())
        if count > self.max_corrupt_images:
            raise CorruptImageError(
                f"max_corrupt_images={self.max_corrupt_images} is exceeded by {file}, which can't be decoded"
                f" ({reason}); replace it and those warned about before, or raise max_corrupt_images"
            ) from error
        log.warning(
            "%s can't be decoded (%s); trained on the next image instead (%d of at most %d in this epoch)",
            file,
            reason,
            count,
            self.max_corrupt_images,
        )


def _decode(source: Any, index: int, mode: str) -> Image.Image:
    """One image of a data set, decoded.

    timm's data sets are read past their own ``__getitem__``: at a damaged image that returns the next one, whose label
    is another.
    """
    reader = getattr(source, "reader", None)
    if reader is None:
        image: Image.Image = source[index][0]
        return image.convert(mode) if image.mode != mode else image
    with reader[index][0] as file, Image.open(file) as encoded:
        image = encoded.convert(source.input_img_mode or mode)
    return image.convert(mode) if image.mode != mode else image


def _file_of(source: Any, index: int) -> str:
    """The file of an image, within a tar as ``images.tar: cat/1.png``; else its number in the data set."""
    reader = getattr(source, "reader", source)
    samples = getattr(reader, "samples", None)
    if samples is None:
        return f"image {index} of {getattr(reader, 'root', None) or type(reader).__name__}"
    sample = samples[index]
    if isinstance(sample[0], tarfile.TarInfo):
        info, tar, _ = sample
        return f"{os.path.join(reader.root, tar) if tar else reader.root}: {info.name}"
    return str(sample[0])
