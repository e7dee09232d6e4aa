"""Criteria: how much does each unit matter? To add one, write a class and decorate it with `register`.

A criterion says what it sums over batches, in `observe`, and what it makes of the sums, in `finish`. Where it compares
units with the model's prediction, `observe` keeps what is needed until that is known (little: memory counts here), and
`contract` makes the sums of it.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lightning_mdc.errors import CalibrationError, check_number
from lightning_mdc.importance import hsic as hsic_maths
from lightning_mdc.importance.moments import LayerMoments
from lightning_mdc.importance.scores import min_max
from lightning_mdc.models import Units
from lightning_mdc.policy import DIMENSIONS

# Neurons or token positions looked at at a time. It bounds the copy of their activations: 13 MB for 256 neurons, 16
# images and 197 tokens.
_UNITS_AT_ONCE = 256

# Images in a batch that dependence is estimated from: with fewer, independent data seem dependent (0.048 even at 8).
MIN_IMAGES = 4


@dataclass(frozen=True)
class Needs:
    """What a criterion needs to score units of one dimension.

    Attributes:
        images: how many in a batch at least; 0: no images at all.
        equal_batches: whether all batches have to have the same number of images.
        prediction: whether it looks at the model's prediction.
        gradients: whether at gradients of a loss, for which there have to be labels, or one of the user's own.
        moments: whether at first and second moments of what layers read from units.
        output_gradients: whether at gradients, where layers that read units put out, of how unlikely the model finds a
            label that is drawn from its own prediction; no labels are needed.
    """

    images: int = 1
    equal_batches: bool = False
    prediction: bool = False
    gradients: bool = False
    moments: bool = False
    output_gradients: bool = False

    @classmethod
    def all_of(cls, needs: Iterable[Needs]) -> Needs:
        """What is needed to meet all of them."""
        together = [vars(each).values() for each in needs]
        return cls(*(max(values) for values in zip(*together, strict=True)))


@dataclass(frozen=True)
class UnitGroup:
    """Units that are scored together: those of one block, or one token stage's positions.

    Attributes:
        dimension: what they are, of `policy.DIMENSIONS`.
        name: where they are in the model, e.g. ``blocks.3.mlp``.
        count: how many there are.
        units: what the anatomy knows of them; None for token positions.
        moments: in `Criterion.finish`, of what reads the units, where they are needed.
    """

    dimension: str
    name: str
    count: int
    units: Units | None = None
    moments: LayerMoments | None = None


class Criterion(ABC):
    """How much does each unit matter? Stateless; sums live with the caller.

    Activations have shape (images, tokens, units, channels): heads with head_dim channels, neurons with one, and for
    the token dimension the value vectors of the patch positions, (images, 1, positions, channels). They need not be
    contiguous in memory. A criterion that needs gradients is given the change of the loss instead, (images, units): the
    gradient of a gate of ones on the unit.
    """

    name: str  # of the class, or of an instance with options that have a name of their own
    loss: Callable[[Any, Any], Any] | None = None  # of (output, batch), whose gradients it needs; None: cross-entropy
    dimensions: ClassVar[tuple[str, ...]] = DIMENSIONS  # that it can score
    # What scores from the same sums where a model gives no gradients at what its layers put out, if it can be done.
    without_gradients: Criterion | None = None

    def __str__(self) -> str:
        """Its name, and what of its options is a plain value and not as by default."""
        usual = vars(CRITERIA[self.name]()) if self.name in CRITERIA else {}
        options = [
            f"{name}={value}"
            for name, value in vars(self).items()
            if isinstance(value, (str, int, float)) and value != usual.get(name)
        ]
        return f"{self.name}({', '.join(options)})" if options else self.name

    def needs(self, dimension: str) -> Needs:
        """What it has to be given for this dimension."""
        return Needs()

    def observe(self, activations: Tensor, group: UnitGroup) -> dict[str, Tensor]:
        """Sums over this batch, of any shape, always the same; or what `contract` makes them of."""
        return {}

    def observe_output_gradients(self, gradients: Tensor, group: UnitGroup) -> dict[str, Tensor]:
        """Where they are needed: sums over this batch of `gradients`, (images * tokens, out), in fp32 or wider."""
        return {}

    def contract(self, seen: Mapping[str, Tensor], prediction: Tensor, group: UnitGroup) -> Mapping[str, Tensor]:
        """Where the prediction is needed: the sums, from what was observed. prediction: (images, classes)."""
        return seen

    @abstractmethod
    def finish(self, sums: Mapping[str, Tensor], group: UnitGroup) -> Tensor:
        """Scores (units,) from sums over all batches; ``sums["batches"]`` and ``sums["images"]`` are counts."""


CRITERIA: dict[str, Callable[[], Criterion]] = {}
C = TypeVar("C", bound=type[Criterion])


def register(cls: C) -> C:
    """Make a criterion known by its name."""
    CRITERIA[cls.name] = cls
    return cls


def as_criterion(criterion: str | Criterion) -> Criterion:
    """The criterion itself, or the registered one of that name with its default options.

    Raises:
        CalibrationError: an unknown name; lists those known.
    """
    if isinstance(criterion, Criterion):
        return criterion
    if not isinstance(criterion, str) or criterion not in CRITERIA:
        raise CalibrationError(f"criterion={criterion!r} is unknown; known are {', '.join(sorted(CRITERIA))}")
    return CRITERIA[criterion]()


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

    def needs(self, dimension: str) -> Needs:
        return Needs(images=MIN_IMAGES, equal_batches=True, prediction=True)  # the estimate depends on their number

    def observe(self, activations: Tensor, group: UnitGroup) -> dict[str, Tensor]:
        if group.units is None:
            return {"grams": _grams(activations[:, 0].transpose(0, 1))}  # of (positions, n, channels)
        if group.units.width > 1:  # (heads, n, tokens)
            return {"grams": _grams(activations.mean(dim=-1, dtype=torch.float32).permute(2, 0, 1))}
        grams = {"grams": _grams(activations[..., 0].permute(2, 0, 1))}  # of (neurons, n, tokens)
        return grams | ({"magnitude": _magnitude(activations)} if self.activation_weight else {})

    def contract(self, seen: Mapping[str, Tensor], prediction: Tensor, group: UnitGroup) -> Mapping[str, Tensor]:
        grams = seen["grams"]
        relevance = hsic_maths.dependence(grams, hsic_maths.linear_weights(prediction.to(grams.dtype)))
        if group.units is None:
            return {"hsic": min_max(relevance) if self.activation_weight else relevance}
        if group.units.width > 1:
            pairs = hsic_maths.pairwise_dependence(grams)
            others = (pairs.sum(dim=1) - pairs.diagonal()) / max(len(grams) - 1, 1)
            return {"hsic": relevance - self.redundancy_weight * others}
        return {"hsic": relevance} | {name: value for name, value in seen.items() if name == "magnitude"}

    def finish(self, sums: Mapping[str, Tensor], group: UnitGroup) -> Tensor:
        mean = sums["hsic"] / sums["batches"]
        if group.units is None or group.units.width > 1:
            return mean
        if not self.activation_weight:
            return self.hsic_weight * mean
        return self.hsic_weight * min_max(mean) + self.activation_weight * min_max(sums["magnitude"])


@register
class Activation(Criterion):
    """Summed magnitude of a unit's activations in an image, averaged over images."""

    name = "activation"

    def observe(self, activations: Tensor, group: UnitGroup) -> dict[str, Tensor]:
        return {"magnitude": _magnitude(activations)}

    def finish(self, sums: Mapping[str, Tensor], group: UnitGroup) -> Tensor:
        return sums["magnitude"] / sums["images"]


@register
class Taylor(Criterion):
    """First-order change of the loss if the unit were removed, ``|sum activation * gradient|`` per image, averaged.

    Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019).

    Args:
        loss: ``loss(output, batch)`` gives one number, of what the model puts out and the batch as the loader gave it;
            a sum over images, or a mean where batches are of one size. None: the cross-entropy of classes, for which
            batches have labels.
    """

    name = "taylor"

    def __init__(self, loss: Callable[[Any, Any], Any] | None = None) -> None:
        if loss is not None and not callable(loss):
            raise CalibrationError(f"loss={loss!r:.80}: expected a function of (output, batch) that gives one number")
        self.loss = loss

    def needs(self, dimension: str) -> Needs:
        return Needs(gradients=True)

    def observe(self, activations: Tensor, group: UnitGroup) -> dict[str, Tensor]:
        return {"change": activations.float().abs().sum(dim=0)}

    def finish(self, sums: Mapping[str, Tensor], group: UnitGroup) -> Tensor:
        return sums["change"] / sums["images"]


@register
class Magnitude(Criterion):
    """L2 norm of all weights of a unit. Needs no images; weights know nothing of positions, so tokens all score 1."""

    name = "magnitude"

    def needs(self, dimension: str) -> Needs:
        return Needs(images=0)

    def finish(self, sums: Mapping[str, Tensor], group: UnitGroup) -> Tensor:
        if group.units is None:
            return torch.ones(group.count)
        squares = torch.zeros(group.count)
        for part in group.units.slices:
            if part.name in part.module._parameters and part.tensor.ndim > 1:  # weights; no biases, no norms
                of_entry = part.tensor.detach().float().square().movedim(part.dim, 0).flatten(1).sum(dim=1)
                own = of_entry.cpu()[group.units.entries(part, range(group.count))]
                squares = squares + own.view(part.groups, group.count, -1).sum(dim=(0, 2))
        return squares.sqrt()


@register
class Random(Criterion):
    """Random scores, the same for the same seed: what any criterion has to beat."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def needs(self, dimension: str) -> Needs:
        return Needs(images=0)

    def finish(self, sums: Mapping[str, Tensor], group: UnitGroup) -> Tensor:
        # One stream per group, so that scores do not depend on what else is scored.
        digest = hashlib.sha256(f"{self.seed} {group.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        return torch.rand(group.count, generator=generator)


def _magnitude(activations: Tensor) -> Tensor:
    return activations.abs().sum(dim=(0, 1, 3), dtype=torch.promote_types(activations.dtype, torch.float32))


def _grams(features: Tensor) -> Tensor:
    """`hsic.gaussian_gram` of (units, n, p) features, in fp32 or wider: (units, n, n)."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    chunks = features.split(_UNITS_AT_ONCE)
    return torch.cat([hsic_maths.gaussian_gram(chunk.to(dtype).contiguous()) for chunk in chunks])
