"""Mixup and CutMix by timm, for batches of any size."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from lightning_mdc.errors import DistillationError, check_number, check_one_of

# How many classes there are the module knows; smoothing is the loss's, and mixing smoothed labels gives the same.
_KEYS = set(inspect.signature(Mixup).parameters) - {"num_classes", "label_smoothing", "multi_label"}


class Mixing:
    """Mixes images and labels of a batch; the last image of an odd batch stays as it is."""

    def __init__(self, options: Mapping[str, Any], num_classes: int) -> None:
        self.num_classes = num_classes
        self.mixup = Mixup(**options, num_classes=num_classes, label_smoothing=0.0)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed images (n, in_chans, H, W) and class probabilities (n, classes), from images, which are left as they
        are, and classes (n,)."""
        if labels.ndim != 1 or labels.is_floating_point():
            raise DistillationError(
                f"labels of shape {tuple(labels.shape)} ({labels.dtype}) are no classes to mix; give class numbers"
                " (n,), or turn mixing off with mixup=None where the data are mixed already"
            )
        even = len(images) // 2 * 2  # timm mixes pairs
        targets = F.one_hot(labels, self.num_classes).float()
        if not even:
            return images, targets
        mixed, mixed_targets = self.mixup(images[:even].clone(), labels[:even])
        return torch.cat([mixed, images[even:]]), torch.cat([mixed_targets.to(targets), targets[even:]])


def check_mixup(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """`options` if there is something to mix, ``None`` if not; a `DistillationError` if timm's `Mixup` would fail."""
    unknown = sorted(set(options) - _KEYS)
    if unknown:
        raise DistillationError(
            f"mixup={dict(options)!r} has unknown keys {unknown}; known are {sorted(_KEYS)} (label_smoothing is an"
            " argument of its own)"
        )
    for name in ("mixup_alpha", "cutmix_alpha"):
        what = "the parameter of a Beta distribution, 0 for no mixing"
        check_number(f"mixup {name}", options.get(name, 0.0), what, DistillationError, least=0)
    for name in ("prob", "switch_prob"):
        check_number(f"mixup {name}", options.get(name, 0.0), "a probability", DistillationError, least=0, most=1)
    check_one_of("mixup mode", options.get("mode", "batch"), ("batch", "pair", "elem"), DistillationError)
    minmax = options.get("cutmix_minmax")
    if minmax is not None and not (
        isinstance(minmax, (list, tuple))
        and len(minmax) == 2
        and all(isinstance(share, (int, float)) for share in minmax)
        and 0 <= minmax[0] < minmax[1] <= 1
    ):
        raise DistillationError(
            f"mixup cutmix_minmax={minmax!r}: give the smallest and the largest side of the patch, [0.2, 0.8]"
        )
    if minmax is None and not options.get("mixup_alpha", 1.0) and not options.get("cutmix_alpha", 0.0):
        return None
    return dict(options)
