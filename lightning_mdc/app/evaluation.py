"""What models say of the test images, and a few of these to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mdc.app.report.examples import FIRST, LEAST_CHANGED, MOST_CHANGED, Examples
from lightning_mdc.app.report.outcomes import Outcomes
from lightning_mdc.distributed import everyones
from lightning_mdc.figures.tokens import Example
from lightning_mdc.models import evaluating, find_sites
from lightning_mdc.progress import bar, steps_of
from lightning_mdc.tokens.survivors import surviving_patches

# Of how many images examples are chosen, and how many of each kind are shown.
_LOOKED_AT, _EACH = 2000, 4


def outcomes(
    models: Mapping[str, nn.Module], loader: Iterable[Any], device: torch.device, class_names: Sequence[str]
) -> Outcomes:
    """What every model predicts, by its place in the run's folder. In a distributed run every rank looks at the images
    of its own loader, and all get the outcomes of all.

    Args:
        models: by place; left where they are.
        loader: ``(images, labels)`` batches, in the same order each time.
        device: of the models.
        class_names: in the order of the labels.
    """
    labels: np.ndarray = np.empty(0, dtype=np.int64)
    predicted = {}
    for place, model in models.items():
        mine = _predictions(model, loader, device, place)
        labels, predicted[place] = (torch.cat(parts).numpy() for parts in zip(*everyones(mine), strict=True))
    return Outcomes(labels, predicted, tuple(class_names))


def _predictions(model: nn.Module, loader: Iterable[Any], device: torch.device, title: str) -> tuple[Tensor, Tensor]:
    """(labels, predicted classes), (n,) each."""
    labels, classes = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.long)]
    with torch.inference_mode(), evaluating(model), bar(f"Testing {title}", steps_of(loader)) as advance:
        for images, targets in loader:
            classes.append(model(images.to(device)).argmax(dim=-1).cpu())
            labels.append(torch.as_tensor(targets))
            advance()
    return torch.cat(labels), torch.cat(classes)


@dataclass(frozen=True, eq=False)
class _Seen:
    """An image, what the models say of it, and by how much they differ."""

    image: Tensor
    label: int
    dense: tuple[int, float]
    slim: tuple[int, float]
    change: float


def examples(
    dense: nn.Module,
    slim: nn.Module,
    place: str,
    loader: Iterable[Any],
    device: torch.device,
    class_names: Sequence[str],
    to_pixels: Callable[[Tensor], np.ndarray],
) -> Examples:
    """A few images on which dense and slim differ most, a few on which they differ least, and the first ones.

    "Differ" is KL(dense ‖ slim) of the two predictions; of many images only the first 2000 are looked at.

    Args:
        place: of the slim model in the run's folder.
        loader: ``(images, labels)`` batches.
        device: of the models.
        class_names: in the order of the labels.
        to_pixels: images as the models see them (n, channels, height, width) -> (n, height, width, 3), uint8.
    """
    first: list[_Seen] = []
    most: list[_Seen] = []
    least: list[_Seen] = []
    looked_at = 0
    for images, labels in loader:
        seen = _compared(dense, slim, images[: _LOOKED_AT - looked_at].to(device), labels)
        looked_at += len(seen)
        first += seen[: _EACH - len(first)]
        most = sorted([*most, *seen], key=lambda each: -each.change)[:_EACH]
        least = sorted([*least, *seen], key=lambda each: each.change)[:_EACH]
        if looked_at >= _LOOKED_AT:
            break
    kinds = ((MOST_CHANGED, most), (FIRST, first), (LEAST_CHANGED, least))
    chosen = [(why, each) for why, kind in kinds for each in kind]
    stacked = torch.stack([each.image for _, each in chosen])
    _, survivors = surviving_patches(slim, stacked.to(device))
    sites = find_sites(slim)
    items = tuple(
        Example(pixels, why, each.label, each.dense, each.slim, each.change, kept)
        for pixels, kept, (why, each) in zip(to_pixels(stacked), survivors.numpy(), chosen, strict=True)
    )
    grid = sites.grid_of((stacked.shape[-2], stacked.shape[-1]))
    return Examples(items, place, grid, tuple(stage.block for stage in sites.stages), tuple(class_names), looked_at)


def _compared(dense: nn.Module, slim: nn.Module, images: Tensor, labels: Any) -> list[_Seen]:
    with torch.inference_mode(), evaluating(dense, slim):
        theirs, ours = (F.log_softmax(model(images).float(), dim=-1).cpu() for model in (dense, slim))
    changes = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1)
    return [
        _Seen(image, int(label), _said(before), _said(after), float(change))
        for image, label, before, after, change in zip(images.cpu(), labels, theirs, ours, changes, strict=False)
    ]


def _said(log_probabilities: Tensor) -> tuple[int, float]:
    """(class, probability) of a prediction (classes,)."""
    best = int(log_probabilities.argmax())
    return best, float(log_probabilities[best].exp())
