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

from lightning_mdc.app.data.pixels import as_mode, is_see_through
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
    """An image can't be decoded, or not into 8 bits per channel."""

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
        self.saw_through = torch.zeros(1, dtype=torch.bool).share_memory_()  # which is said once

    def set_epoch(self, epoch: int) -> None:
        """Corrupt images are counted anew."""
        self.corrupt.zero_()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """
        Raises:
            CorruptImageError: the image can't be decoded, and no more of them are to be replaced; or it says nothing
                of its range of values.
        """
        for tried in range(len(self)):
            index = (index + bool(tried)) % len(self)
            try:
                image = self._decode(int(self.indices[index]))
            except CorruptImageError:  # a kind of file, not a damaged one: the others are likely the same
                raise
            except _DAMAGE as error:
                self._note_corrupt(index, error)
            else:
                return self.transform(image), self.labels[index]
        raise CorruptImageError(f"none of the {len(self)} training images can be decoded; replace them")

    def _decode(self, index: int) -> Image.Image:
        """One image of the data set, decoded.

        timm's data sets are read past their own ``__getitem__``: at a damaged image that returns the next one, whose
        label is another.
        """
        reader = getattr(self.source, "reader", None)
        if reader is None:
            return self._as_mode(self.source[index][0], index)
        with reader[index][0] as file, Image.open(file) as encoded:
            encoded.load()  # some say where up is after the pixels
            given = self.source.input_img_mode
            return self._as_mode(encoded if given in (None, "", "L", "RGB") else encoded.convert(given), index)

    def _as_mode(self, image: Image.Image, index: int) -> Image.Image:
        if not self.saw_through and is_see_through(image):
            self.saw_through[0] = True
            log.warning(
                "%s is transparent in part, which is left out, as timm does: what lies below is seen; so it is in "
                "others like it",
                _file_of(self.source, index),
            )
        try:
            return as_mode(image, self.mode)
        except DataError as error:
            raise CorruptImageError(f"{_file_of(self.source, index)} {error}") from error

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
