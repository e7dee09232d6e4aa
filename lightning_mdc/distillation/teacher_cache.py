"""What a teacher said of an image, found again by its content: a teacher of unaugmented images is asked once."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_mdc.errors import DistillationError

DEFAULT_NUM_IMAGES = 2**18  # in fp32, 1 GiB for 1000 classes

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # by the bytes of a pixel


class TeacherCache:
    """A teacher's logits of up to `num_images` images, in host memory; images beyond them are always computed.

    Whatever the order and the batches, an image is known by its pixels, so that one that was augmented is just another
    image. It answers as the teacher does; to the last bit, where the teacher's arithmetic does not depend on what else
    is in the batch. The teacher must not change meanwhile (`clear`). Copies share what is kept, as they share the
    teacher. Every process of a distributed run has its own.

    Attributes:
        hits, misses: images looked up, and asked for, since `clear`.
    """

    def __init__(self, teacher: Callable[[Tensor], Tensor], num_images: int = DEFAULT_NUM_IMAGES) -> None:
        self.teacher = teacher
        self.num_images = num_images
        self.clear()

    def clear(self) -> None:
        """Forget all, and free the memory."""
        self.hits = self.misses = 0
        self._rows: dict[bytes, int] = {}
        self._logits: Tensor | None = None  # (num_images, classes)
        self._arithmetic: Any = None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def is_full(self) -> bool:
        """Whether further images are not kept."""
        return len(self) >= self.num_images

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (n, classes), on the device of the images (n, in_chans, H, W)."""
        device = images.device
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        if self._arithmetic != (arithmetic := (images.dtype, autocast)):
            self.clear()
            self._arithmetic = arithmetic
        keys = digests(images)
        unknown = [place for place, key in enumerate(keys) if key not in self._rows]
        self.hits += len(keys) - len(unknown)
        self.misses += len(unknown)
        if len(unknown) == len(keys):
            logits = self.teacher(images)
            self._keep(keys, logits)
            return logits
        assert self._logits is not None  # something is known
        known = [place for place, key in enumerate(keys) if key in self._rows]
        found = self._logits[[self._rows[keys[place]] for place in known]].to(device)
        if not unknown:
            return found
        computed = self.teacher(images[unknown])
        self._keep([keys[place] for place in unknown], computed)
        logits = computed.new_empty(len(keys), computed.shape[1])
        logits[unknown], logits[known] = computed, found
        return logits

    def _keep(self, keys: list[bytes], logits: Any) -> None:
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            return  # whoever asked will refuse it
        if self._logits is None:
            # The system hands out its pages as they are written: what is not used costs nothing.
            self._logits = torch.empty(self.num_images, logits.shape[1], dtype=logits.dtype, device="cpu")
        for key, row in zip(keys, logits.cpu(), strict=True):
            if not self.is_full and key not in self._rows:
                self._logits[len(self)] = row
                self._rows[key] = len(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> TeacherCache:
        return self


def check_teacher_cache(value: bool | int) -> int:
    """How many images are to be kept.

    Raises:
        DistillationError: the setting says no such number.
    """
    if value is True:
        return DEFAULT_NUM_IMAGES
    if not isinstance(value, int) or value < 0:
        raise DistillationError(
            f"teacher_cache={value!r} is no number of images; give False, True ({DEFAULT_NUM_IMAGES} images), or how"
            " many images' logits may be kept"
        )
    return int(value)


def digests(images: Tensor) -> list[bytes]:
    """What tells images (n, ...) apart, on any device the same: 128 bits of their bytes, and their shape.

    Two sums of the 32-bit words of an image, each word times a fixed random 64-bit number, modulo 2^64 (multilinear
    hashing: Carter & Wegman 1979; Lemire & Kaser, arXiv 1202.4961). The sums of two different images are equal with a
    probability of at most 2^-66. Exact integer sums, so the order in which a device adds does not matter.
    """
    words = images.contiguous().flatten(1).view(_WORDS[images.element_size()])  # (n, words)
    factors = _factors(words.shape[1], words.device)
    # Image by image: the 64-bit products of a whole batch fit in no cache of a CPU, and take ten times as long.
    sums = torch.stack([(row * factors).sum(dim=1) for row in words])  # (n, 2)
    shape = repr(tuple(images.shape[1:])).encode()
    return [row.tobytes() + shape for row in sums.cpu().numpy()]


@lru_cache(maxsize=4)
def _factors(words: int, device: torch.device) -> Tensor:
    """(2, words), of a generator of its own: the global ones are the training's."""
    generator = torch.Generator().manual_seed(0)
    # Of the full 64 bits, made of two halves: randint's range ends below.
    high, low = torch.randint(0, 2**32, (2, 2, words), generator=generator)
    return ((high << 32) | low).to(device)
