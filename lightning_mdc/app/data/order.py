"""Which process sees which image at which training step: one order of the images, whatever the number of processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler


def order_seed() -> int:
    """The seed of the order of images, from the run's (``PL_GLOBAL_SEED``, which `seed_everything` sets), as Lightning.

    The environment says the same on all ranks, which a random state need not. Spread out, because a sampler counts
    epochs up from it: else seed 1 would see in its second epoch what seed 2 sees in its first.
    """
    seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


class TrainingSampler(DistributedSampler[Any]):
    """Process r of W reads images r, r + W, ... of one random order per epoch, from a step in mid-epoch if asked to.

    With B/W images per process and step, the images of step i are the i-th B of that order on any number of processes.
    Lightning leaves a DistributedSampler in place and tells it the epoch.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        num_processes: int,
        rank: int,
        seed: int,
        drop_last: bool,
        repeats: int = 1,
        epoch: int = 0,
        skip: int = 0,
    ) -> None:
        """
        Args:
            drop_last: leave out the last n mod W images; else some are read twice to fill up.
            repeats: augmented versions of each image, next to one another in the order, so that they go to different
                processes or into one batch; an epoch stays n images, so it holds a part of the data set.
            epoch: the one to begin with. Told here as well as by Lightning, because worker processes ask for images as
                soon as there is an iterator, which is before Lightning says which epoch it resumes.
            skip: images of this process to leave out in that epoch, because they were seen before.
        """
        super().__init__(dataset, num_processes, rank, shuffle=True, seed=seed, drop_last=drop_last)
        self._repeated = (
            None
            if repeats == 1
            # Not rounded down to a multiple of 256 images, which can be none.
            else RepeatAugSampler(dataset, num_processes, rank, num_repeats=repeats, selected_round=0)
        )
        self._begin(epoch, skip)

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self._begin(epoch, 0)

    def _begin(self, epoch: int, skip: int) -> None:
        super().set_epoch(epoch)
        self.skip = skip
        # A data set may count by epoch: undecodable images, for one.
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        return islice(self._order(), self.skip, self.num_samples)

    def _order(self) -> Iterator[Any]:
        if self._repeated is None:
            return super().__iter__()
        self._repeated.set_epoch(self.seed + self.epoch)  # which is what timm's sampler seeds with
        return iter(self._repeated)


class StreamLoader(DataLoader[Any]):
    """Tells a stream which pass this is: timm's readers shuffle by it, and Lightning tells samplers only."""

    passes = 0

    def __iter__(self) -> Any:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.passes)
        self.passes += 1
        return super().__iter__()
