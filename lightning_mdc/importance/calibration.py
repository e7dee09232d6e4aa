"""An own, seeded look at somebody's training data, which leaves their loaders as they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

from lightning_mdc.errors import CalibrationError


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

    def __init__(self, loaders: Any, batches: int, images: int | None, seed: int) -> None:
        self._leaves, self._structure = tree_flatten(loaders)
        self._indices = [_sample(leaf, batches, images, seed) for leaf in self._leaves]

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


def _sample(loader: DataLoader[Any], batches: int, images: int | None, seed: int) -> list[list[int]]:
    """Indices of equal-sized batches, drawn without replacement."""
    total = len(loader.dataset)  # type: ignore[arg-type]
    if not total:
        raise CalibrationError("the training data set is empty: there is nothing to score on")
    if loader.batch_sampler is None:  # the data set yields whole batches itself
        if images is not None:
            raise CalibrationError(
                f"calibration_images={images}: this loader's data set yields whole batches (batch_size=None), "
                "whose images cannot be counted beforehand; use calibration_batches"
            )
        size = 1
    else:
        size = getattr(loader.batch_sampler, "batch_size", None) or loader.batch_size or 32
    wanted = batches * size if images is None else images
    # A sampler over some indices splits the data set: the others are not for training.
    pool = list(loader.sampler.indices) if isinstance(loader.sampler, SubsetRandomSampler) else range(total)
    size, wanted = min(size, len(pool), wanted), min(wanted, len(pool))
    order = [pool[i] for i in torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()]
    return [order[start : start + size] for start in range(0, wanted - size + 1, size)]


def num_images(batch: Any) -> int | None:
    """Images in a batch of any structure; None if it holds no tensor."""
    return next((len(leaf) for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor) and leaf.ndim), None)
