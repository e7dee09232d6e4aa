"""What models say of the test images, and a few of these to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import length_hint
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mdc.app.report.outcomes import FIRST, LEAST_CHANGED, MOST_CHANGED, Examples, Outcomes
from lightning_mdc.distributed import gather
from lightning_mdc.figures.tokens import Example
from lightning_mdc.models import evaluating, find_anatomy
from lightning_mdc.progress import bar
from lightning_mdc.tokens.surviving_patches import surviving_patches

# Of how many images examples are chosen, and how many of each kind are shown.
_LOOKED_AT, _EACH = 2000, 4


def outcomes(
    models: Mapping[str, nn.Module], loader: Iterable[Any], device: torch.device, class_names: Sequence[str]
) -> Outcomes:
    """What every model predicts. In a distributed run every rank looks at the images of its own loader, and all ranks
    get the outcomes of all.

    Args:
        models: by artifact, such as ``"finetuned/seed0"``. One at a time is on `device`, all are on the CPU afterwards.
        loader: ``(images, labels)`` batches, in the same order each time.
        device: where they run.
        class_names: in the order of the labels.
    """
    labels: np.ndarray = np.empty(0, dtype=np.int64)
    predicted = {}
    for artifact, model in models.items():
        of_ranks = gather(partial(_predictions, model, loader, device, f"Testing {artifact}"))
        model.cpu()
        labels, predicted[artifact] = (torch.cat(parts).numpy() for parts in zip(*of_ranks, strict=True))
    return Outcomes(labels, predicted, tuple(class_names))


def _predictions(model: nn.Module, loader: Iterable[Any], device: torch.device, title: str) -> tuple[Tensor, Tensor]:
    """(labels, predicted classes), (n,) each."""
    labels, classes = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.long)]
    model.to(device)
    with torch.inference_mode(), evaluating(model), bar(title, length_hint(loader)) as advance:
        for images, targets in loader:
            classes.append(model(images.to(device)).argmax(dim=-1).cpu())
            labels.append(torch.as_tensor(targets))
            advance()
    return torch.cat(labels), torch.cat(classes)


def examples(
    dense: nn.Module,
    slim: nn.Module,
    slim_artifact: str,
    loader: Iterable[Any],
    device: torch.device,
    class_names: Sequence[str],
    to_pixels: Callable[[Tensor], np.ndarray],
) -> Examples:
    """A few images on which dense and slim differ most, a few on which they differ least, and the first ones.

    "Differ" is KL(dense ‖ slim) of the two predictions; of many images only the first 2000 are looked at.

    Args:
        slim_artifact: where the slim model lies in the run's folder.
        loader: ``(images, labels)`` batches.
        device: of the models.
        class_names: in the order of the labels.
        to_pixels: images as the models see them (n, channels, height, width) -> (n, height, width, 3), uint8.
    """
    first: list[Example] = []
    most: list[Example] = []
    least: list[Example] = []
    looked_at, size = 0, (0, 0)
    for images, labels in loader:
        size = (images.shape[-2], images.shape[-1])
        images = images[: _LOOKED_AT - looked_at]
        batch = _compared(dense, slim, images.to(device), labels, to_pixels(images))
        looked_at += len(batch)
        first += batch[: _EACH - len(first)]
        most = sorted([*most, *batch], key=lambda example: -example.change)[:_EACH]
        least = sorted([*least, *batch], key=lambda example: example.change)[:_EACH]
        if looked_at >= _LOOKED_AT:
            break
    kinds = ((MOST_CHANGED, most), (FIRST, first), (LEAST_CHANGED, least))
    items = tuple(replace(example, why=why) for why, kind in kinds for example in kind)
    anatomy = find_anatomy(slim)
    blocks = tuple(stage.block for stage in anatomy.stages)
    return Examples(items, slim_artifact, anatomy.grid_of(size), blocks, tuple(class_names), looked_at)


def _compared(dense: nn.Module, slim: nn.Module, images: Tensor, labels: Any, pixels: np.ndarray) -> list[Example]:
    with torch.inference_mode(), evaluating(dense):
        logits = dense(images)
    slim_logits, survivors = surviving_patches(slim, images)
    by_dense, by_slim = (F.log_softmax(each.float(), dim=-1).cpu() for each in (logits, slim_logits))
    changes = F.kl_div(by_slim, by_dense, reduction="none", log_target=True).sum(dim=1)
    return [
        Example(image, "", int(label), _top1(before), _top1(after), float(change), kept)
        for image, label, before, after, change, kept in zip(
            pixels, labels, by_dense, by_slim, changes, survivors.numpy(), strict=False
        )
    ]


def _top1(log_probabilities: Tensor) -> tuple[int, float]:
    """(class, probability) of a prediction (classes,)."""
    best = int(log_probabilities.argmax())
    return best, float(log_probabilities[best].exp())
