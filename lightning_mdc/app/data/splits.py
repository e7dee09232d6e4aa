"""Which images train, which ones guide the search, which ones are reported on: pure numpy, for every data set."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_mdc.errors import DataError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class SplitIndices:
    """Disjoint, sorted positions in one data set."""

    train: Indices
    val: Indices
    test: Indices


def check_fraction(name: str, value: float) -> None:
    """Raises: DataError: ``value`` is no fraction in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise DataError(f"{name}={value!r} is no fraction of the images; give a number in [0, 1), such as 0.1")


def split_indices(
    labels: Sequence[int] | NDArray[np.integer], val_fraction: float, test_fraction: float, seed: int
) -> SplitIndices:
    """Cuts a data set into train, search-validation and test, each class in proportion.

    Args:
        labels: class of each image, (n,).
        val_fraction: share of all n images held out for the search; rounded up to whole images.
        test_fraction: share of all n images held out for reporting; rounded up.
        seed: the same seed gives the same split on every machine; a split never depends on the global RNG.

    Raises:
        DataError: a fraction is out of range, or nothing is left to train on.
    """
    check_fraction("val_fraction", val_fraction)
    check_fraction("test_fraction", test_fraction)
    label_array = np.asarray(labels, dtype=np.int64)
    n = len(label_array)
    num_val, num_test = _ceil(n * val_fraction), _ceil(n * test_fraction)
    if num_val + num_test >= n:
        raise DataError(
            f"val_fraction={val_fraction}, test_fraction={test_fraction} hold out {num_val} + {num_test} of {n} images"
            " and leave none to train on; lower them"
        )
    rng = np.random.default_rng(seed)
    everything = np.arange(n)
    test = everything[_sample(label_array, num_test, rng)]
    rest = np.setdiff1d(everything, test)
    val = rest[_sample(label_array[rest], num_val, rng)]
    return SplitIndices(train=np.setdiff1d(rest, val), val=val, test=test)


def cap_indices(
    indices: Indices, labels: Sequence[int] | NDArray[np.integer], max_images: int | None, seed: int, name: str
) -> Indices:
    """At most ``max_images`` of ``indices``, each class in proportion; ``None`` keeps all.

    Args:
        indices: positions in the data set, (m,).
        labels: class of each image of the whole data set, (n,).
        name: the argument to blame in the error.

    Raises:
        DataError: ``max_images`` is not a positive integer.
    """
    if max_images is None:
        return indices
    if isinstance(max_images, bool) or not isinstance(max_images, int) or max_images < 1:
        raise DataError(f"{name}={max_images!r} is no positive number of images; give one, or None for all of them")
    if max_images >= len(indices):
        return indices
    chosen = _sample(np.asarray(labels, dtype=np.int64)[indices], max_images, np.random.default_rng(seed))
    return indices[chosen]


def _ceil(count: float) -> int:
    """Rounds up, so that a fraction > 0 is never an empty split; 0.1 * 30 = 3.0000000000000004 stays 3."""
    return math.ceil(count - 1e-9)


def _sample(labels: Indices, total: int, rng: np.random.Generator) -> Indices:
    """Sorted positions of ``total`` labels, each class in proportion by largest remainder."""
    classes, sizes = np.unique(labels, return_counts=True)
    share = sizes * (total / max(len(labels), 1))
    counts = np.floor(share + 1e-9).astype(np.int64)
    by_remainder = np.argsort(counts - share, kind="stable")
    counts[by_remainder[: total - counts.sum()]] += 1
    chosen = [rng.permutation(np.flatnonzero(labels == c))[:count] for c, count in zip(classes, counts, strict=True)]
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)
