"""Criteria: how much does each unit matter? To add one, write a class and decorate it with `register`.

A criterion sees activations in `observe` while the model runs (keep only what is needed: memory counts here) and the
prediction in `contract`, which gives sums to add up over batches and ranks. `finish` turns the sums into scores.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from lightning_mdc.errors import CalibrationError, check_number
from lightning_mdc.importance import hsic as hsic_maths
from lightning_mdc.importance.scores import min_max
from lightning_mdc.models import UnitSite

# Neurons or token positions looked at at a time. It bounds the copy of their activations: 13 MB for 256 neurons, 16
# images and 197 tokens.
_UNITS_AT_ONCE = 256

# Images in a batch that dependence is estimated from: with fewer, independent data seem dependent (0.048 even at 8).
MIN_IMAGES = 4


@dataclass(frozen=True)
class UnitGroup:
    """Units that are scored together: one block's heads or neurons, or one stage's token positions.

    Attributes:
        name: where they are in the model, e.g. ``blocks.3.mlp``.
        site: of the heads or neurons; None for token positions.
    """

    name: str
    num_units: int
    site: UnitSite | None


class Criterion(ABC):
    """How much does each unit matter? Stateless; sums live with the caller.

    Activations have shape (images, tokens, units, channels): heads with head_dim channels, neurons with one, and for
    the token dimension the value vectors of the patch positions, (images, 1, positions, channels). They need not be
    contiguous in memory.
    """

    name: ClassVar[str]
    needs_images: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = False  # of the loss, so labels as well
    needs_equal_batches: ClassVar[bool] = False
    min_batch: ClassVar[int] = 1

    def observe(self, dimension: str, activations: Tensor, group: UnitGroup) -> tuple[Tensor, ...]:
        """What to remember of one forward pass until the prediction is known."""
        raise NotImplementedError

    def contract(self, dimension: str, seen: tuple[Tensor, ...], prediction: Tensor) -> dict[str, Tensor]:
        """Sums over this batch, of any shape, always the same. prediction: (images, classes)."""
        raise NotImplementedError

    @abstractmethod
    def finish(self, dimension: str, sums: Mapping[str, Tensor], group: UnitGroup) -> Tensor:
        """Scores (units,) from sums over all batches; ``sums["batches"]`` and ``sums["images"]`` are counts."""


_REGISTRY: dict[str, Callable[[], Criterion]] = {}
C = TypeVar("C", bound=type[Criterion])


def register(cls: C) -> C:
    """Make a criterion known by its name."""
    _REGISTRY[cls.name] = cls
    return cls


def as_criterion(criterion: str | Criterion) -> Criterion:
    """The criterion itself, or the registered one of that name with its default options.

    Raises:
        CalibrationError: an unknown name; lists those known.
    """
    if isinstance(criterion, Criterion):
        return criterion
    if criterion not in _REGISTRY:
        raise CalibrationError(f"criterion={criterion!r} is unknown; known are {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[criterion]()


@register
class HSIC(Criterion):
    """Statistical dependence between a unit's activation and the model's prediction (Hou & Kung, section 3).

    Neurons: a blend of HSIC and summed magnitude, both min-max normalised over the block. Heads: HSIC of the head's
    channel mean, less its mean HSIC with the block's other heads (maximum relevance, minimum redundancy). Tokens: HSIC
    of a position's value vector, min-max normalised, averaged over batches. ``HSIC(hsic_weight=1,
    activation_weight=0)`` is the raw criterion: nothing normalised.

    Args:
        hsic_weight, activation_weight: the blend for neurons.
        redundancy_weight: what a head's mean dependence on other heads costs it.
    """

    name = "hsic"
    needs_equal_batches = True  # the estimate depends on the number of images
    min_batch = MIN_IMAGES

    def __init__(
        self, hsic_weight: float = 0.1, activation_weight: float = 0.9, redundancy_weight: float = 0.1
    ) -> None:
        weights = {"hsic_weight": hsic_weight, "activation_weight": activation_weight}
        for name, value in (weights | {"redundancy_weight": redundancy_weight}).items():
            check_number(name, value, "a weight", CalibrationError, least=0)
        if hsic_weight == activation_weight == 0:
            raise CalibrationError("hsic_weight=0 and activation_weight=0: nothing is left to score with")
        self.hsic_weight, self.activation_weight = hsic_weight, activation_weight
        self.redundancy_weight = redundancy_weight

    def observe(self, dimension: str, activations: Tensor, group: UnitGroup) -> tuple[Tensor, ...]:
        if dimension == "heads":
            return (_grams(activations.mean(dim=-1, dtype=torch.float32).permute(2, 0, 1)),)  # of (heads, n, tokens)
        if dimension == "tokens":
            return (_grams(activations[:, 0].transpose(0, 1)),)  # of (positions, n, channels)
        grams = _grams(activations[..., 0].permute(2, 0, 1))  # of (neurons, n, tokens)
        return (grams, _magnitude(activations)) if self.activation_weight else (grams,)

    def contract(self, dimension: str, seen: tuple[Tensor, ...], prediction: Tensor) -> dict[str, Tensor]:
        grams = seen[0]
        relevance = hsic_maths.dependence(grams, hsic_maths.linear_weights(prediction.to(grams.dtype)))
        if dimension == "heads":
            pairs = hsic_maths.pairwise_dependence(grams)
            others = (pairs.sum(dim=1) - pairs.diagonal()) / max(len(grams) - 1, 1)
            return {"hsic": relevance - self.redundancy_weight * others}
        if dimension == "tokens" and self.activation_weight:
            return {"hsic": min_max(relevance)}
        return {"hsic": relevance} | ({"magnitude": seen[1]} if len(seen) > 1 else {})

    def finish(self, dimension: str, sums: Mapping[str, Tensor], group: UnitGroup) -> Tensor:
        mean = sums["hsic"] / sums["batches"]
        if dimension != "neurons":
            return mean
        if not self.activation_weight:
            return self.hsic_weight * mean
        return self.hsic_weight * min_max(mean) + self.activation_weight * min_max(sums["magnitude"])


@register
class Activation(Criterion):
    """Summed magnitude of a unit's activations in an image, averaged over images."""

    name = "activation"

    def observe(self, dimension: str, activations: Tensor, group: UnitGroup) -> tuple[Tensor, ...]:
        return (_magnitude(activations),)

    def contract(self, dimension: str, seen: tuple[Tensor, ...], prediction: Tensor) -> dict[str, Tensor]:
        return {"magnitude": seen[0]}

    def finish(self, dimension: str, sums: Mapping[str, Tensor], group: UnitGroup) -> Tensor:
        return sums["magnitude"] / sums["images"]


@register
class Taylor(Criterion):
    """First-order change of the loss if the unit were removed, ``|sum activation * gradient|`` per image, averaged.

    Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019). Here `observe` is given that sum,
    (images, units): the gradient of a gate of ones on the unit.
    """

    name = "taylor"
    needs_gradients = True

    def observe(self, dimension: str, activations: Tensor, group: UnitGroup) -> tuple[Tensor, ...]:
        return (activations.float().abs().sum(dim=0),)

    def contract(self, dimension: str, seen: tuple[Tensor, ...], prediction: Tensor) -> dict[str, Tensor]:
        return {"change": seen[0]}

    def finish(self, dimension: str, sums: Mapping[str, Tensor], group: UnitGroup) -> Tensor:
        return sums["change"] / sums["images"]


@register
class Magnitude(Criterion):
    """L2 norm of all weights of a unit. Needs no images; weights know nothing of positions, so tokens all score 1."""

    name = "magnitude"
    needs_images = False

    def finish(self, dimension: str, sums: Mapping[str, Tensor], group: UnitGroup) -> Tensor:
        site, units = group.site, group.num_units
        if site is None:
            return torch.ones(units)
        squares = site.consumer.weight.detach().float().square().sum(dim=0).view(units, -1).sum(dim=1)
        width = units * site.unit_width
        for producer in site.producers:
            rows = producer.linear.weight.detach().float().square().sum(dim=1)
            squares = squares + rows.view(producer.copies, width).sum(dim=0).view(units, -1).sum(dim=1)
        return squares.sqrt()


@register
class Random(Criterion):
    """Random scores, the same for the same seed: what any criterion has to beat."""

    name = "random"
    needs_images = False

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def finish(self, dimension: str, sums: Mapping[str, Tensor], group: UnitGroup) -> Tensor:
        # One stream per group, so that scores do not depend on what else is scored.
        digest = hashlib.sha256(f"{self.seed} {group.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        return torch.rand(group.num_units, generator=generator)


def _magnitude(activations: Tensor) -> Tensor:
    return activations.abs().sum(dim=(0, 1, 3), dtype=torch.promote_types(activations.dtype, torch.float32))


def _grams(features: Tensor) -> Tensor:
    """`hsic.gaussian_gram` of (units, n, p) features, in fp32 or wider: (units, n, n)."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    chunks = features.split(_UNITS_AT_ONCE)
    return torch.cat([hsic_maths.gaussian_gram(chunk.to(dtype).contiguous()) for chunk in chunks])
