"""Whether images show anything: what is learnt of images that do not differ is noise."""

from __future__ import annotations

import warnings
import zlib

import torch
from torch import Tensor

from lightning_mdc.distributed import rank


class Variety:
    """In what the images differ that were looked at."""

    def __init__(self) -> None:
        self._distinct: set[int] = set()
        self._count = 0
        self._are_flat = True

    def look(self, images: Tensor) -> None:
        """At images (n, ..., channels, height, width); those of one pixel stand for something else."""
        if images.ndim < 4 or images.shape[-2:].numel() == 1:
            return
        self._count += len(images)
        self._are_flat = self._are_flat and bool((images == images[..., :1, :1]).all())
        for image in images.detach().cpu():
            self._distinct.add(zlib.crc32(image.contiguous().flatten().view(torch.uint8).numpy()))

    @property
    def are_alike(self) -> bool:
        """Whether there are several, and all are the same."""
        return self._count > 1 and len(self._distinct) == 1

    def warn(self, of: str, consequence: str) -> None:
        """Say, once, that they do not differ, if they do not: of which images, and what follows."""
        if self._count < 2 or not (self._are_flat or 2 * len(self._distinct) < self._count):
            return
        are = f"all {self._count} {of} images are {'alike' if self.are_alike else 'of one colour each'}"
        if not (self.are_alike or self._are_flat):
            are = f"of {self._count} {of} images only {len(self._distinct)} differ"
        if rank() == 0:
            words = f"{are}: {consequence}; look at what the loader gives, and at the normalisation"
            warnings.warn(words, stacklevel=3)
