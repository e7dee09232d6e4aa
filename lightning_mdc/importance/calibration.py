"""How many images are looked at, and an own, seeded look at training data, which leaves its loaders as they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

from lightning_mdc.errors import CalibrationError, check_whole


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


def is_map_style(loaders: Any) -> bool:
    """Whether `loaders` (a DataLoader or a nest of them) can be sampled by index."""
    leaves, _ = tree_flatten(loaders)
    return bool(leaves) and all(
        isinstance(leaf, DataLoader) and not isinstance(leaf.dataset, IterableDataset) for leaf in leaves
    )


class CalibrationBatches(Sequence[Any]):
    """A seeded list of batches over the loaders' own data sets with their own collate, each made when asked for.

    `loaders` is a DataLoader or any nest of them, as ``train_dataloader`` may return; a batch has the same structure.
    """

    def __init__(self, loaders: Any, calibration: Calibration, seed: int) -> None:
        self._leaves, self._structure = tree_flatten(loaders)
        self._indices = [_sample(leaf, calibration, seed) for leaf in self._leaves]

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


def _sample(loader: DataLoader[Any], calibration: Calibration, seed: int) -> list[list[int]]:
    """Indices of equal-sized batches, drawn without replacement: of as many images as whole batches have."""
    total = len(loader.dataset)  # type: ignore[arg-type]
    if not total:
        raise CalibrationError("the training data set is empty: there is nothing to score on")
    # A sampler over some indices splits the data set: the others are not for training.
    pool = list(loader.sampler.indices) if isinstance(loader.sampler, SubsetRandomSampler) else range(total)
    order = [pool[i] for i in torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()]
    size, wanted = calibration.batch_size, calibration.images
    if loader.batch_sampler is None:  # the data set yields whole batches itself, of as many images as the first has
        size, wanted = 1, -(-wanted // (num_images(loader.dataset[order[0]]) or 1))
    elif size is None:
        size = getattr(loader.batch_sampler, "batch_size", None) or loader.batch_size or 32
    size, wanted = min(size, len(pool), wanted), min(wanted, len(pool))
    return [order[start : start + size] for start in range(0, wanted - size + 1, size)]


def num_images(batch: Any) -> int | None:
    """Images in a batch of any structure; None if it holds no tensor."""
    return next((len(leaf) for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor) and leaf.ndim), None)
