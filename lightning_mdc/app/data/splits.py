"""Which images train, which ones guide the search, which ones are reported on, for every data set."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from lightning_mdc.errors import DataError, check_number, check_whole

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class SplitIndices:
    """Disjoint, sorted positions in one data set."""

    train: Indices
    val: Indices
    test: Indices


def check_fraction(name: str, value: float) -> None:
    """Raises: DataError: ``value`` is no fraction in [0, 1)."""
    check_number(name, value, "a fraction of the images", DataError, least=0, below=1)


def split_indices(
    labels: Sequence[int] | NDArray[np.integer], val_fraction: float, test_fraction: float, seed: int
) -> SplitIndices:
    """Cuts a data set into train, search-validation and test, each class in proportion.

    An image that is alone in its class counts with the largest class. A split of fewer images than there are classes
    is drawn without regard to classes.

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
    test, rest = _sample(np.arange(n), label_array, num_test, seed)
    val, train = _sample(rest, label_array, num_val, seed)
    return SplitIndices(train, val, test)


def cap_indices(
    indices: Indices, labels: Sequence[int] | NDArray[np.integer], max_images: int | None, seed: int, name: str
) -> Indices:
    """At most ``max_images`` of ``indices``, each class in proportion; ``None`` keeps all.

    Args:
        indices: positions in the data set, (m,).
        labels: class of each image of the whole data set, (n,).
        name: the argument to blame in the error.

    Raises:
        DataError: ``max_images`` is no whole number of at least 1.
    """
    check_whole(name, max_images, 1, DataError, or_none="all of them")
    if max_images is None or max_images >= len(indices):
        return indices
    return _sample(indices, np.asarray(labels, dtype=np.int64), max_images, seed)[0]


def _ceil(count: float) -> int:
    """Rounds up, so that a fraction > 0 is never an empty split; 0.1 * 30 = 3.0000000000000004 stays 3."""
    return math.ceil(count - 1e-9)


def _sample(indices: Indices, labels: Indices, total: int, seed: int) -> tuple[Indices, Indices]:
    """`total` of `indices`, each class in proportion, and the others; both sorted."""
    if not total:
        return indices[:0], indices
    _, of_image, sizes = np.unique(labels[indices], return_inverse=True, return_counts=True)
    # scikit-learn refuses a class of one image, and a part that is too small to have an image of every class.
    classes = np.where(sizes[of_image] == 1, sizes.argmax(), of_image)
    too_small = min(total, len(indices) - total) < len(np.unique(classes))
    parts = train_test_split(indices, train_size=total, random_state=seed, stratify=None if too_small else classes)
    return np.sort(parts[0]), np.sort(parts[1])
