"""What every LightningDataModule of ours answers: four data sets, their loaders, and the facts a model needs."""

import logging
import multiprocessing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from lightning_mdc import distributed
from lightning_mdc.app.data.order import StreamLoader, TrainingSampler, order_seed
from lightning_mdc.errors import DataError, check_whole

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """The data sets of one task. Each yields ``(image (in_chans, H, W) float32, label int)``."""

    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]
    calibration: Dataset[Any]
    class_names: tuple[str, ...]


class ImageDataModule(LightningDataModule):
    """Loaders over four data sets.

    - *train*: augmented.
    - *val*: the search-validation split, a held-out part of the training data. The policy search and early stopping may
      look at it; it is never reported.
    - *test*: for reporting, looked at by nothing that decides.
    - *calibration*: the training images under the evaluation transforms; units are scored on these.

    A subclass implements :meth:`make_splits`; it runs once, at the first question, so ``num_classes`` is known before
    there is a Trainer.

    In a distributed run every process gets its share of the images from these loaders: of each training step, and of
    val and test without an image being read twice, so a rank may have a batch less than another there. A checkpoint
    taken in mid-epoch holds where in the order of images training was, and resuming goes on from there, also on another
    number of processes.
    """

    # How images were normalised, by timm's names: ``mean`` and ``std`` per channel.
    data_config: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        in_chans: int,
        img_size: int,
        batch_size: int,
        num_workers: int,
        pin_memory: bool | None = None,
        prefetch_factor: int | None = None,
        persistent_workers: bool = True,
        repeated_augmentation: int = 1,
    ) -> None:
        """
        Args:
            batch_size: images per training step over all processes together (and before ``accumulate_grad_batches``);
                each process reads its part.
            num_workers: processes that load images, per training process; 0: none but this one.
            pin_memory: load into page-locked memory; ``None``: where there is a GPU.
            prefetch_factor: batches that each worker loads ahead; ``None``: torch's default.
            persistent_workers: keep workers from epoch to epoch.
            repeated_augmentation: differently augmented versions of each training image, in one step (Hoffer et al.,
                arXiv 1901.09335). An epoch stays as long and holds that many times fewer images.

        Raises:
            DataError: ``in_chans`` is not 1 or 3, a count is out of range, or a switch is no truth value.
        """
        super().__init__()
        if in_chans not in (1, 3):
            raise DataError(f"in_chans={in_chans!r} is no image format; give 1 (grayscale) or 3 (RGB)")
        check_whole("img_size", img_size, 1, DataError)
        check_whole("batch_size", batch_size, 1, DataError)
        check_whole("num_workers", num_workers, 0, DataError)
        check_whole("repeated_augmentation", repeated_augmentation, 1, DataError)
        check_whole("prefetch_factor", prefetch_factor, 1, DataError, or_none="torch's default")
        if pin_memory not in (None, True, False):
            raise DataError(f"pin_memory={pin_memory!r}: expected true, false, or null (where there is a GPU)")
        if persistent_workers not in (True, False):
            raise DataError(f"persistent_workers={persistent_workers!r}: expected true or false")
        self.in_chans = in_chans
        self.img_size = img_size
        self.batch_size = batch_size
        self.num_workers = _startable(num_workers)
        self.pin_memory = pin_memory
        self.prefetch_factor = prefetch_factor
        self.persistent_workers = persistent_workers
        self.repeated_augmentation = repeated_augmentation
        self._opened_on = 1  # processes
        self._order_seed: int | None = None  # of the running fit
        self._resume_at: dict[str, Any] | None = None  # read from a checkpoint, used by the next training loader

    def make_splits(self) -> Splits:
        raise NotImplementedError

    @cached_property
    def splits(self) -> Splits:
        """The data sets, read on first use."""
        self._opened_on = distributed.world_size()
        return self.make_splits()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class, in the order of the labels."""
        return self.splits.class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def setup(self, stage: str | None = None) -> None:
        # A stream's reader takes its share of the shards by the processes there are when it is opened.
        if "splits" in vars(self) and self._opened_on != distributed.world_size() and _is_stream(self.splits.train):
            del self.splits
        # Bad data should fail here, before a model is moved or a logger opened.
        _ = self.splits
        if stage == "fit":
            self._images_per_process()
            self._resume_at = None  # of a fit that never came to its loader

    def calibration_dataset(self) -> Dataset[Any]:
        """The training images under the evaluation transforms, in a fixed order."""
        return self.splits.calibration

    def to_pixels(self, images: Tensor) -> np.ndarray:
        """Images to look at, (n, height, width, 3) in uint8, of images as the model sees them, (n, channels, h, w)."""
        mean, std = (
            torch.tensor(self.data_config.get(name, default)).reshape(1, -1, 1, 1)
            for name, default in (("mean", 0.0), ("std", 1.0))
        )
        pixels = (images.cpu().float() * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
        return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()

    # --- loaders ------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        """This process's part of every step, in an order that depends on the run's seed and the epoch.

        Raises:
            DataError: ``batch_size`` can't be shared out evenly.
        """
        images, dataset = self._images_per_process(), self.splits.train
        resume, self._resume_at = self._resume_at or {}, None
        epoch, batches = resume.get("epoch", 0), resume.get("batches", 0)
        self._order_seed = resume.get("seed", order_seed())
        if _is_stream(dataset):
            return self._stream_loader(dataset, images, epoch)
        # A ragged last batch weighs its few images more; but a data set smaller than one batch must not vanish.
        drop_last = len(dataset) >= self.batch_size  # type: ignore[arg-type]
        rank, processes = self.rank_and_processes()
        sampler = TrainingSampler(
            dataset,
            processes,
            rank,
            seed=self._order_seed,
            drop_last=drop_last,
            repeats=self.repeated_augmentation,
            epoch=epoch,
            skip=batches * images,
        )
        return self._loader(dataset, images, sampler=sampler, drop_last=drop_last)

    def val_dataloader(self) -> DataLoader[Any]:
        """Search-validation images: held out of training, never reported."""
        return self._evaluation_loader(self.splits.val)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._evaluation_loader(self.splits.test)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._evaluation_loader(self.splits.test)

    def _evaluation_loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        rank, processes = self.rank_and_processes()
        images = max(1, self.batch_size // processes)
        if _is_stream(dataset) or processes == 1:
            return self._loader(dataset, images)
        kind: type[DistributedSampler[Any]] = UnrepeatedDistributedSampler
        total = len(dataset)  # type: ignore[arg-type]
        if 0 < total < processes:
            # A rank without any batch would leave the others waiting for its metrics.
            rank_zero_warn(f"{total} images on {processes} processes: some are counted twice; use fewer processes")
            kind = DistributedSampler
        return self._loader(dataset, images, sampler=kind(dataset, processes, rank, shuffle=False))

    def _stream_loader(self, dataset: Dataset[Any], images: int, epoch: int) -> DataLoader[Any]:
        if hasattr(dataset, "set_loader_cfg"):
            dataset.set_loader_cfg(num_workers=self.num_workers)  # timm's readers count their samples by it
        loader = self._loader(dataset, images, kind=StreamLoader)
        assert isinstance(loader, StreamLoader)
        loader.passes = epoch
        return loader

    def _loader(
        self, dataset: Dataset[Any], images: int, kind: type[DataLoader[Any]] = DataLoader, **options: Any
    ) -> DataLoader[Any]:
        """
        Args:
            images: per batch of this process.
        """
        if self.num_workers:
            options |= {"persistent_workers": self.persistent_workers, "prefetch_factor": self.prefetch_factor}
        pin_memory = torch.cuda.is_available() if self.pin_memory is None else self.pin_memory
        return kind(dataset, batch_size=images, num_workers=self.num_workers, pin_memory=pin_memory, **options)

    def rank_and_processes(self) -> tuple[int, int]:
        """Number of this process, from 0, and how many there are in the run that this module feeds."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        return distributed.rank(), distributed.world_size()

    def _images_per_process(self) -> int:
        """Images of one training step that each process reads.

        Raises:
            DataError: not all processes would get as many.
        """
        _, processes = self.rank_and_processes()
        if self.batch_size % processes:
            lower = self.batch_size // processes * processes
            near = [str(size) for size in (lower, lower + processes) if size]
            raise DataError(
                f"batch_size={self.batch_size} counts the images of a step on all {processes} processes together and "
                f"does not divide by {processes}; give {' or '.join(near)}"
            )
        return self.batch_size // processes

    # --- resuming in mid-epoch ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where in the order of training images the fit is; Lightning puts it into every checkpoint."""
        if self.trainer is None or self._order_seed is None:
            return {}
        loop: Any = self.trainer.fit_loop  # its annotations are those of a base class
        epochs, progress = loop.epoch_progress.current, loop.epoch_loop.batch_progress
        # What Lightning tells the sampler as the epoch. At an epoch's end it is the next one already, while the batches
        # are still those of the last.
        epoch = epochs.processed
        done = progress.current.processed if epochs.started > epochs.processed else 0
        is_last = self.trainer.is_last_batch and progress.current.ready == done  # and no failure within it
        if is_last or done >= self.trainer.num_training_batches:
            epoch, done = epoch + 1, 0
        return {"epoch": epoch, "batches": done, "seed": self._order_seed, **self._what_makes_the_order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Raises:
            DataError: the checkpoint was taken in mid-epoch with another order of images.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return  # testing a checkpoint goes on with nothing
        if state_dict["batches"]:
            self._check_order(state_dict)
        self._resume_at = dict(state_dict)

    def _what_makes_the_order(self) -> dict[str, Any]:
        """What a resumed fit must share with the interrupted one, if there is to be a rest of an epoch."""
        train = self.splits.train
        images = None if _is_stream(train) else len(train)  # type: ignore[arg-type]
        return {
            "batch_size": self.batch_size,
            "repeated_augmentation": self.repeated_augmentation,
            "number of training images": images,
        }

    def _check_order(self, state_dict: dict[str, Any]) -> None:
        for name, value in self._what_makes_the_order().items():
            if state_dict[name] != value:
                raise DataError(
                    f"{name}={value!r} was {state_dict[name]!r} when this checkpoint was taken in mid-epoch, so which "
                    "images are left of the epoch is not known; give the old value, or a checkpoint of an epoch's end"
                )
        if _is_stream(self.splits.train):
            rank_zero_warn(
                "this checkpoint was taken in mid-epoch, but a streamed data set can only start over: the rest of the "
                "epoch is read from the stream's beginning"
            )
        else:
            # Lightning looks for a state in the loader; it is here, where it comes early enough for worker processes.
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")


def _startable(num_workers: int) -> int:
    """`num_workers`, or 0 where this process is a worker itself that can't start any."""
    # Those of joblib's launcher have a start method that torch's loaders do not know; those of a Pool may start none.
    known = multiprocessing.get_start_method(allow_none=True) in (None, "fork", "spawn", "forkserver")
    if not num_workers or (known and not multiprocessing.current_process().daemon):
        return num_workers
    _say_without_workers(num_workers)
    return 0


@cache
def _say_without_workers(num_workers: int) -> None:
    """Once in a process, which may run many trials."""
    log.warning(
        "num_workers=%d: this process is one of several that a launcher or pool has started, which can't start loading "
        "processes; it reads images itself, as with num_workers=0",
        num_workers,
    )


def _is_stream(dataset: Dataset[Any]) -> bool:
    return isinstance(dataset, IterableDataset)
