"""How many images a model is looked at with, and what becomes of batches of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from lightning_mdc.errors import CalibrationError, check_whole

# Bytes of images that are kept between one look at them and the next.
_MEMORY_LIMIT = 2 * 2**30
# Images that batches are put together to where they are too small for a criterion, or for a pass of their own.
TOGETHER = 32


@dataclass(frozen=True)
class Calibration:
    """Images that a model is looked at with, before anything leaves.

    Args:
        images: that units are scored on.
        judging: that policies are judged on; none of those above.
        batch_size: images in a batch; None: as the loader has it, or 32 where the criterion needs more than that. The
            callback also goes back through the module on a whole batch, which takes the memory of a training step.

    Raises:
        CalibrationError: a number below 1.
    """

    images: int = 512
    judging: int = 512
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_whole("images", self.images, 1, CalibrationError)
        check_whole("judging", self.judging, 1, CalibrationError)
        check_whole("batch_size", self.batch_size, 1, CalibrationError, or_none="that of the loader")

    def shares(self, total: int, *, judged: bool) -> tuple[int, int]:
        """How many of `total` images are scored on, and how many judged on, if any are: all that are wanted, or two
        thirds and one third."""
        if not judged:
            return min(self.images, total), 0
        if total >= self.images + self.judging:
            return self.images, self.judging
        scored = min(self.images, total - total // 3)
        return scored, min(self.judging, total - scored)

    def in_words(self, total: int) -> str:
        """What becomes of `total` images that are fewer than wanted."""
        scored, judged = self.shares(total, judged=True)
        return f"calibration: of {total} images {scored} are scored on and {judged} judged on"


class Remembered(Sequence[Any]):
    """Batches that are made when they are first asked for, and kept on the CPU as far as they fit into memory.

    Args:
        count: how many there are.
        make: one of them.
    """

    def __init__(self, count: int, make: Callable[[int], Any]) -> None:
        self._count, self._make, self._left = count, make, _MEMORY_LIMIT
        self._kept: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if index not in self._kept:
            if index >= self._count:
                raise IndexError(index)
            batch = tree_map_only(Tensor, Tensor.cpu, self._make(index))
            self._left -= sum(leaf.nbytes for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor))
            if self._left < 0:
                return batch
            self._kept[index] = batch
        return self._kept[index]


def num_images(batch: Any) -> int | None:
    """Images in a batch of any structure; None if it holds no tensor."""
    for leaf in tree_flatten(batch)[0]:
        if isinstance(leaf, Tensor) and leaf.ndim:
            return len(leaf)
        if isinstance(leaf, Mapping) and (found := num_images(dict(leaf))) is not None:  # what transformers give
            return found
    return None


def images_in(batch: Any) -> int:
    """Images in a batch of any structure.

    Raises:
        CalibrationError: it holds no tensor.
    """
    found = num_images(batch)
    if found is None:
        raise CalibrationError(
            f"a training batch is a {type(batch).__name__} without a tensor (images, ...) in it: how many images it "
            "has is not known; let the loader's collate_fn make tensors"
        )
    return found


def put_together(batches: Sequence[Any], least: int) -> list[Any]:
    """Batches of at least so many images each; small ones are put together to 32, and what is still less is left out.

    Raises:
        CalibrationError: there are fewer images in all, or the batches do not go together.
    """
    if not batches:
        return []
    counts = [images_in(batch) for batch in batches]
    size = TOGETHER if counts[0] < least else least
    groups: list[list[Any]] = [[]]
    held = 0
    for batch, count in zip(batches, counts, strict=True):
        if size == least and count < least:  # the last of an epoch
            continue
        groups[-1].append(batch)
        held += count
        if held >= size:
            groups.append([])
            held = 0
    if held < least:
        groups.pop()
    if not groups:
        raise too_few(sum(counts), least)
    return [group[0] if len(group) == 1 else joined(group) for group in groups]


def too_few(images: int, least: int) -> CalibrationError:
    """There are only so many images to score on."""
    return CalibrationError(
        f"there are {images} training images to score on, and the criterion needs at least {least} together; train on "
        "more, or choose a criterion that single images will do for ('activation', 'magnitude')"
    )


def joined(batches: Sequence[Any]) -> Any:
    """One batch of several that are structured alike: tensors (images, ...) and lists of names one after another, what
    is the same in all once.

    Raises:
        CalibrationError: they do not go together.
    """
    flat = [tree_flatten(batch, is_leaf=_is_names) for batch in batches]
    counts = [images_in(batch) for batch in batches]
    reason = "they are structured differently"
    if all(structure == flat[0][1] for _, structure in flat):
        try:
            parts = zip(*(leaves for leaves, _ in flat), strict=True)
            return tree_unflatten([_joined(leaves, counts) for leaves in parts], flat[0][1])
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error)
    raise CalibrationError(
        f"training batches of {counts[0]} are too small to score on, and cannot be put together: {reason}. Let the "
        "loader give larger batches of images of one size (first dimension: images), as calibration_step takes them, "
        "or choose a criterion that single images will do for ('activation', 'magnitude')"
    )


def _is_names(node: Any) -> bool:
    return isinstance(node, (list, tuple)) and bool(node) and all(isinstance(each, str) for each in node)


def _joined(leaves: Sequence[Any], counts: Sequence[int]) -> Any:
    """What stands at one place in several batches of so many images."""
    first = leaves[0]
    if isinstance(first, Tensor):
        if all(leaf.shape[:1] == (count,) for leaf, count in zip(leaves, counts, strict=True)):
            return torch.cat(list(leaves))
        if all(torch.equal(leaf, first) for leaf in leaves):
            return first
        raise ValueError(f"a tensor {tuple(first.shape)} beside {counts[0]} images")
    if isinstance(first, Mapping):
        return type(first)(joined([dict(leaf) for leaf in leaves]))  # type: ignore[call-arg]
    if _is_names(first) and all(len(leaf) == count for leaf, count in zip(leaves, counts, strict=True)):
        return type(first)(name for leaf in leaves for name in leaf)
    if all(leaf == first for leaf in leaves):
        return first
    raise ValueError(f"a {type(first).__name__} that is not the same in all")
