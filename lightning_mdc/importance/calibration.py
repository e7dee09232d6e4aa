"""How many images a model is looked at with, and an own, seeded look at training data, which leaves its loaders as they
were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

from lightning_mdc.errors import CalibrationError, check_whole

# Bytes of images that are kept between one look at them and the next.
_MEMORY_LIMIT = 2 * 2**30


@dataclass(frozen=True)
class Calibration:
    """Images that a model is looked at with, before anything leaves.

    Args:
        images: that units are scored on.
        judging: that policies are judged on; none of those above.
        batch_size: images in a batch; None: as the loader has it.

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


def is_map_style(loaders: Any) -> bool:
    """Whether `loaders` (a DataLoader or a nest of them) can be sampled by index."""
    leaves, _ = tree_flatten(loaders)
    return bool(leaves) and all(
        isinstance(leaf, DataLoader) and not isinstance(leaf.dataset, IterableDataset) for leaf in leaves
    )


class CalibrationBatches(Sequence[Any]):
    """A list of batches over the loaders' own data sets with their own collate, each made when asked for.

    Args:
        leaves, structure: the loaders, and what nest of them ``train_dataloader`` returned; a batch has its structure.
        indices: of each batch, by loader.
    """

    def __init__(self, leaves: Sequence[DataLoader[Any]], structure: TreeSpec, indices: list[list[list[int]]]) -> None:
        self._leaves, self._structure, self._indices = leaves, structure, indices

    def __len__(self) -> int:
        return min(map(len, self._indices))

    def __getitem__(self, index: Any) -> Any:
        parts = []
        for leaf, indices in zip(self._leaves, self._indices, strict=True):
            batched = leaf.batch_sampler is not None
            one = DataLoader(
                leaf.dataset,
                batch_sampler=[indices[index]] if batched else None,
                sampler=None if batched else indices[index],
                batch_size=1 if batched else None,
                collate_fn=leaf.collate_fn,
                generator=torch.Generator(),  # its own: nobody else's stream moves on
            )
            parts.append(next(iter(one)))
        return tree_unflatten(parts, self._structure)


def calibration_batches(
    loaders: Any,
    calibration: Calibration,
    seed: int,
    *,
    judged: bool = False,
    say: Callable[[str], None] | None = None,
) -> tuple[CalibrationBatches, CalibrationBatches]:
    """Seeded batches to score units on, all of one size, and others to judge policies on, if any are `judged`.

    `loaders` is a DataLoader or any nest of them, as ``train_dataloader`` may return. `say` tells in a line where there
    are fewer images than are wanted for both.

    Raises:
        CalibrationError: there are no images.
    """
    leaves, structure = tree_flatten(loaders)
    total = min(len(_pool(leaf)) for leaf in leaves)
    counts_images = all(leaf.batch_sampler is not None for leaf in leaves)  # not whole batches
    if say is not None and judged and counts_images and total < calibration.images + calibration.judging:
        say(calibration.in_words(total))
    drawn = [_sample(leaf, calibration, seed, judged) for leaf in leaves]
    scoring, judging = ([batches[kind] for batches in drawn] for kind in (0, 1))
    return CalibrationBatches(leaves, structure, scoring), CalibrationBatches(leaves, structure, judging)


def _sample(
    loader: DataLoader[Any], calibration: Calibration, seed: int, judged: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """Indices drawn without replacement: of equal-sized batches to score on, of as many images as whole batches have;
    and of batches to judge on."""
    pool = _pool(loader)
    order = [pool[i] for i in torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()]
    size = calibration.batch_size
    if loader.batch_sampler is None:  # the data set yields whole batches itself, of as many images as the first has
        each = num_images(loader.dataset[order[0]]) or 1
        size, calibration = (
            1,
            replace(calibration, images=-(-calibration.images // each), judging=-(-calibration.judging // each)),
        )
    elif size is None:
        size = getattr(loader.batch_sampler, "batch_size", None) or loader.batch_size or 32
    scored, judging = calibration.shares(len(pool), judged=judged)
    size = min(size, scored)
    others = order[scored : scored + judging]
    return (
        [order[start : start + size] for start in range(0, scored - size + 1, size)],
        [others[start : start + size] for start in range(0, len(others), size)],
    )


def _pool(loader: DataLoader[Any]) -> Sequence[int]:
    """Indices of what is trained on."""
    total = len(loader.dataset)  # type: ignore[arg-type]
    if not total:
        raise CalibrationError("the training data set is empty: there is nothing to score on")
    # A sampler over some indices splits the data set: the others are not for training.
    return list(loader.sampler.indices) if isinstance(loader.sampler, SubsetRandomSampler) else range(total)


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
    return next((len(leaf) for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor) and leaf.ndim), None)
