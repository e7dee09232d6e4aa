"""What a loader trains on, and batches of it made as its own are, while it stays as it was: the one place that looks
into anybody's DataLoader."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, chain
from types import FunctionType, GeneratorType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    get_worker_info,
)

from lightning_mdc.distributed import gather
from lightning_mdc.errors import CalibrationError
from lightning_mdc.importance.calibration import TOGETHER, Calibration, joined, num_images, too_few
from lightning_mdc.randomness import generators_in, isolated_rng, seed_all

# Of a sampler that may never end, so many times what is wanted.
_ENDLESS = 10


def is_map_style(loaders: Any) -> bool:
    """Whether `loaders` (a DataLoader or a nest of them) can be sampled by key: what they give is made of a data set
    that has keys, and by the DataLoader alone."""
    leaves, _ = tree_flatten(loaders)
    return bool(leaves) and all(
        isinstance(leaf, DataLoader)
        and not isinstance(leaf.dataset, IterableDataset)
        and type(leaf).__iter__ is DataLoader.__iter__  # what another one does to batches is only seen going by
        for leaf in leaves
    )


def calibration_batches(
    loaders: Any,
    calibration: Calibration,
    seed: int,
    *,
    judged: bool = False,
    least: int = 1,
    say: Callable[[str], None] | None = None,
) -> tuple[CalibrationBatches, CalibrationBatches]:
    """Seeded batches to score units on, and others to judge policies on, if any are `judged`; of other images.

    Batches to score on are all of one size, but for those that a batch sampler of the user's puts together. In a
    distributed run all ranks have to call this, and get the same.

    Args:
        loaders: a DataLoader or any nest of them, as ``train_dataloader`` may return; see `is_map_style`.
        least: images that have to be in a batch to score on. Smaller ones of the loader's become such of 32.
        say: tells in a line where there are fewer images than are wanted for both.

    Raises:
        CalibrationError: there are no images, or too few; a sampler cannot be copied.
    """
    if calibration.batch_size is not None and calibration.batch_size < least:
        raise CalibrationError(
            f"calibration.batch_size={calibration.batch_size}: the criterion needs at least {least} images together; "
            "leave it out, or give it more"
        )
    leaves, structure = tree_flatten(loaders)
    wanted = calibration.images + calibration.judging * judged
    pools = [pool_of(leaf, wanted, seed) for leaf in leaves]
    if say is not None and judged and all(leaf.batch_sampler is not None for leaf in leaves):  # not whole batches
        total = min(
            len(distinct(chain.from_iterable(pool))) if has_own_batches(leaf) else len(pool)
            for leaf, pool in zip(leaves, pools, strict=True)
        )
        if total < wanted:
            say(calibration.in_words(total))
    drawn = [_sample(leaf, pool, calibration, seed, judged, least) for leaf, pool in zip(leaves, pools, strict=True)]
    scoring, judging = ([keys[kind] for keys in drawn] for kind in (0, 1))
    return CalibrationBatches(leaves, structure, scoring, seed), CalibrationBatches(leaves, structure, judging, seed)


class CalibrationBatches(Sequence[Any]):
    """A list of batches of the nest that ``train_dataloader`` returns, each made when asked for.

    What is random about a batch depends on its number alone, and moves nothing on.

    Args:
        leaves, structure: the loaders, and what nest of them there is.
        keys: of each batch, by loader.
        seed: of the first batch; those that follow have the numbers after it.
        rank, world_size: of all batches, those with numbers ``rank``, ``rank + world_size``, ...
    """

    def __init__(
        self,
        leaves: Sequence[DataLoader[Any]],
        structure: TreeSpec,
        keys: list[list[list[Any]]],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._all = (leaves, structure, keys, seed)
        count = min(map(len, keys))
        self.seeds = [seed + number for number in range(rank, count, world_size)]
        self._structure = structure
        self._parts = [
            batches_of(leaf, of_leaf[rank:count:world_size], self.seeds)
            for leaf, of_leaf in zip(leaves, keys, strict=True)
        ]

    def of_rank(self, rank: int, world_size: int) -> CalibrationBatches:
        """The share of one of so many ranks."""
        return CalibrationBatches(*self._all, rank, world_size)

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: Any) -> Any:
        return tree_unflatten([batches[index] for batches in self._parts], self._structure)


# --- which images -----------------------------------------------------------------------------------------------------


def _sample(
    loader: DataLoader[Any], pool: Sequence[Any], calibration: Calibration, seed: int, judged: bool, least: int
) -> tuple[list[list[Any]], list[list[Any]]]:
    """Keys drawn without replacement: of batches to score on, and of batches to judge on."""
    order = [pool[i] for i in torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()]
    size, each = calibration.batch_size, 1
    if loader.batch_sampler is None:  # the data set yields whole batches itself, of as many images as the first has
        each = num_images(batches_of(loader, [order[:1]], [seed])[0]) or 1
        scored, judging = (-(-images // each) for images in (calibration.images, calibration.judging))
        calibration = replace(calibration, images=scored, judging=judging)
        size = -(-(size or (TOGETHER if each < least else each)) // each)
        least = -(-least // each)
    elif has_own_batches(loader):
        large = [batch for batch in order if len(batch) >= least]  # an epoch may end with a small one
        if size is None and 2 * len(large) > len(order):
            whole = _whole_batches(large, calibration, judged)
            if whole is not None:
                return whole
        order = distinct(chain.from_iterable(order))
    if size is None:
        size = getattr(loader.batch_sampler, "batch_size", None) or TOGETHER
        size = TOGETHER if size < least else size
    scored, judging = calibration.shares(len(order), judged=judged)
    if scored < least:
        raise too_few(scored * each, least * each)
    size = min(size, scored)
    others = order[scored : scored + judging]
    return (
        [order[start : start + size] for start in range(0, scored - size + 1, size)],
        [others[start : start + size] for start in range(0, len(others), size)],
    )


def _whole_batches(
    batches: list[list[Any]], calibration: Calibration, judged: bool
) -> tuple[list[list[Any]], list[list[Any]]] | None:
    """Of the batches that the user's batch sampler gives, first ones to score on and next ones to judge on, without
    what is in those; None if that leaves nothing."""
    scored, judging = calibration.shares(len(distinct(chain.from_iterable(batches))), judged=judged)
    enough = next(number for number, seen in enumerate(accumulate(map(len, batches)), start=1) if seen >= scored)
    enough = min(enough, len(batches) - judged)
    seen = {identity_of(key) for key in chain.from_iterable(batches[:enough])}
    others: list[list[Any]] = []
    for batch in batches[enough:]:
        if sum(map(len, others)) >= judging:
            break
        if unseen := [key for key in batch if identity_of(key) not in seen]:
            others.append(unseen)
    if judged and not (enough and others):
        return None
    # Where batches are compared, their size is that of the first.
    usual, _ = Counter(map(len, batches)).most_common(1)[0]
    return sorted(batches[:enough], key=lambda batch: len(batch) != usual), others


# --- which keys -------------------------------------------------------------------------------------------------------


def has_own_batches(loader: DataLoader[Any]) -> bool:
    """Whether a batch sampler of the user's decides what is in a batch with what."""
    return loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler


def pool_of(loader: DataLoader[Any], wanted: int, seed: int) -> Sequence[Any]:
    """What training is on, each once and the same on all ranks: keys of the data set, whatever they are (numbers,
    names, tuples with a box or a size); where the loader `has_own_batches`, lists of keys.

    A sampler that nothing is known of is copied, and the copy is iterated over with a seed of ours.

    Args:
        wanted: how many keys; an endless sampler is asked for a few times as many.

    Raises:
        CalibrationError: there are none, or the sampler cannot be copied.
    """
    own = has_own_batches(loader)
    batch_sampler: Any = loader.batch_sampler
    source: Any = batch_sampler if own else loader.sampler if batch_sampler is None else batch_sampler.sampler
    if not own:
        source = _undistributed(source)
    found: Sequence[Any]
    if type(source) in (RandomSampler, SequentialSampler):  # all, in time
        found = range(len(source.data_source))
    elif type(source) is DistributedSampler:
        found = range(len(source.dataset))  # type: ignore[arg-type]
    elif type(source) is SubsetRandomSampler:
        found = distinct(source.indices)
    else:
        shares = gather(lambda: _walked(source, loader.dataset, wanted, seed, own))
        found = _sorted(distinct(key for share in shares for key in share))
    if not len(found):
        sized = not hasattr(loader.dataset, "__len__") or len(loader.dataset)
        what = f"{type(source).__name__} gives no keys of the training data set" if sized else "the data set is empty"
        raise CalibrationError(f"train_dataloader: {what}: there is nothing to score on")
    return found


def _undistributed(sampler: Any) -> Any:
    """The sampler of which Lightning gives each rank a share."""
    while isinstance(sampler, DistributedSampler) and hasattr(sampler.dataset, "_sampler"):
        sampler = sampler.dataset._sampler
    return sampler


def _walked(source: Iterable[Any], dataset: Any, wanted: int, seed: int, own_batches: bool) -> list[Any]:
    """Keys, or batches of them, of an epoch; of more, as long as they add some, where one has fewer than wanted."""
    limit = max(_ENDLESS * wanted, _length(dataset), 0 if own_batches else _length(source))
    found: list[Any] = []
    known: set[Any] = set()
    in_vain = 0
    with isolated_rng():
        seed_all(seed)
        copy = _copy_of(source, dataset)
        while limit > 0 and len(known) < wanted and in_vain <= 2 * len(known):
            epoch: list[Any] = []
            keys: set[Any] = set()
            for item in copy:
                group = list(item) if own_batches else [item]
                epoch.append(group if own_batches else item)
                keys.update(map(identity_of, group))
                limit -= len(group) or 1
                if limit <= 0:
                    break
            if not epoch:
                break
            if keys <= known:  # by chance, or there are no more
                in_vain += len(epoch)
            else:
                found += epoch
                known |= keys
                in_vain = 0
    return found


def _length(sized: Any) -> int:
    try:
        length = len(sized)
    except (TypeError, NotImplementedError, AttributeError):
        return 0
    return int(length)


def identity_of(key: Any) -> Any:
    """What is equal for equal keys and can be hashed: tensors and arrays compare in their own way."""
    if isinstance(key, list):
        return tuple(map(identity_of, key))
    return key if isinstance(key, (int, str)) else repr(key)


def distinct(keys: Iterable[Any]) -> list[Any]:
    """Each of `keys` once, in their order."""
    return list({identity_of(key): key for key in keys}.values())


def _sorted(keys: list[Any]) -> list[Any]:
    """In an order that does not depend on how they were shuffled or shared out among ranks, if they have one."""
    try:
        return sorted(keys, key=identity_of)
    except TypeError:
        return keys


# --- a sampler that moves on while the user's stays where it is -------------------------------------------------------

_PLAIN = frozenset({int, float, bool, str, bytes, type(None), list, tuple, dict, set})


class _Copier(pickle.Pickler):
    """Pickles what a sampler consists of; data sets, code, and what cannot be pickled (files, locks) are kept."""

    def __init__(self, file: io.BytesIO, dataset: Any) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.kept: list[Any] = []
        self._dataset = dataset

    def persistent_id(self, thing: Any) -> int | None:
        if type(thing) in _PLAIN or not self._is_shared(thing):
            return None
        self.kept.append(thing)
        return len(self.kept) - 1

    def _is_shared(self, thing: Any) -> bool:
        if thing is self._dataset or isinstance(thing, (DataLoader, nn.Module, type, FunctionType, ModuleType)):
            return True
        if isinstance(thing, Dataset):  # but for one that a sampler is made to look like, to be shared out
            return not any(isinstance(value, Sampler) for value in vars(thing).values())
        if isinstance(thing, GeneratorType):
            raise TypeError(f"it holds {thing.__name__}(), a generator")
        if isinstance(thing, Sampler):
            return False
        try:
            thing.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        except Exception:
            return True
        return False


class _Renewer(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, kept: list[Any]) -> None:
        super().__init__(file)
        self._kept = kept

    def persistent_load(self, number: int) -> Any:
        return self._kept[number]


def _copy_of(source: Any, dataset: Any) -> Any:
    """Another sampler in the same state, with generators of its own."""
    file = io.BytesIO()
    copier = _Copier(file, dataset)
    try:
        copier.dump(source)
        file.seek(0)
        return _Renewer(file, copier.kept).load()
    except Exception as error:
        raise CalibrationError(
            f"train_dataloader: its {type(source).__name__} cannot be copied ({error}), and to iterate over the very "
            "one would change the order of training; let it be picklable, and make generators in its __iter__"
        ) from error


# --- batches of them --------------------------------------------------------------------------------------------------


def batches_of(loader: DataLoader[Any], keys: list[list[Any]], seeds: Sequence[int]) -> Sequence[Any]:
    """A batch for each of `keys`, by the loader's own data set and collate, made when it is asked for.

    Made where the loader makes its own: in a process like its workers, if it has some. Their ``worker_init_fn`` may
    open what the data set reads; and what the data set opens itself would be in the way of workers that start later.

    Args:
        keys: of each batch; of as many whole batches that are put together, where the data set yields such.
        seeds: of what is drawn for each batch.
    """
    made = _Made(loader, keys, seeds)
    return _InWorker(made, loader) if loader.num_workers else _Here(made)


class _Made(Dataset[Any]):
    """The batches, by number, in whatever process this is."""

    def __init__(self, loader: DataLoader[Any], keys: list[list[Any]], seeds: Sequence[int]) -> None:
        self.dataset, self.collate, self.keys, self.seeds = loader.dataset, loader.collate_fn, keys, seeds
        self._whole = loader.batch_sampler is None
        self._usual = getattr(loader.batch_sampler, "batch_size", None) or 1

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Any:
        seed_all(self.seeds[index], generators_in(self.dataset, self.collate))
        keys = self.keys[index]
        one = DataLoader(
            self.dataset,
            batch_sampler=None if self._whole else [keys],
            sampler=keys if self._whole else None,
            batch_size=None if self._whole else 1,
            collate_fn=self.collate,
            generator=torch.Generator(),  # its own: nobody else's stream moves on
        )
        try:
            parts = list(one)
        except Exception as error:
            if self._whole or len(keys) <= self._usual:
                raise  # as in training
            raise CalibrationError(
                f"train_dataloader: {len(keys)} images, which units are to be scored on, cannot be put into one batch "
                f"as {self._usual} can: {error}; give images one size, or choose a criterion that single images will "
                "do for ('activation', 'magnitude')"
            ) from error
        return parts[0] if len(parts) == 1 else joined(parts)


class _Here(Sequence[Any]):
    """Made in this process, whose random states, and those that the data set holds, are as before."""

    def __init__(self, made: _Made) -> None:
        self._made = made

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, index: Any) -> Any:
        with isolated_rng(generators_in(self._made.dataset, self._made.collate)):
            return self._made[index]


class _InWorker(Sequence[Any]):
    """Made one after another, a little ahead, in a process that is set up as the loader's workers are, and which ends
    with the last of them."""

    def __init__(self, made: _Made, loader: DataLoader[Any]) -> None:
        self._made, self._num_workers = made, loader.num_workers
        self._like: dict[str, Any] = {
            "worker_init_fn": partial(_begin, loader.worker_init_fn),
            "multiprocessing_context": loader.multiprocessing_context,
            "timeout": loader.timeout,
        }
        self._at = 0  # the next batch
        self._ahead: Iterator[Any] | None = None  # it, and those after it

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self._ahead is None or index != self._at:
            self._ahead = None  # the process before ends first
            self._ahead = iter(
                DataLoader(
                    self._made,
                    sampler=range(index, len(self)),
                    batch_size=None,
                    collate_fn=_as_it_is,
                    num_workers=1,
                    generator=torch.Generator(),
                    **self._like,
                )
            )
        try:
            batch = next(self._ahead)
        except Exception as error:
            self._ahead = None
            raise CalibrationError(
                f"train_dataloader: a batch to look at cannot be made in a worker process like its own "
                f"(num_workers={self._num_workers}): {_last_line(error)}"
            ) from error.with_traceback(None)  # which would hold the process; where it was is in the error's words
        self._at = index + 1
        if self._at == len(self):
            self._ahead = None
        return batch


def _last_line(error: Exception) -> str:
    """What was raised in another process, without where it was."""
    return (str(error).strip().splitlines() or [repr(error)])[-1]


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin(worker_init_fn: Any, worker: int) -> None:
    """Set a worker up as the user's are, whose data set is the user's, too."""
    info: Any = get_worker_info()
    object.__setattr__(info, "dataset", info.dataset.dataset)  # of a frozen value; it is `_Made` that was sent here
    if worker_init_fn is not None:
        worker_init_fn(worker)
