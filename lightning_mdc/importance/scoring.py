"""Run a criterion over a model: probes on, batches through, probes off, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import length_hint
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mdc.distributed import gather, on_every_rank, summed
from lightning_mdc.errors import CalibrationError
from lightning_mdc.importance.criteria import Criterion, UnitGroup, as_criterion
from lightning_mdc.importance.scores import Scores
from lightning_mdc.models import Sites, check_unmasked, evaluating, find_sites, probing
from lightning_mdc.policy import Policy, default_stages
from lightning_mdc.progress import bar
from lightning_mdc.randomness import isolated_rng

# Bytes that a batch's observations may take until its prediction is known. Above it, the prediction is computed by a
# pass of its own, and nothing has to be remembered.
_MEMORY_LIMIT = 2 * 2**30


def score(
    model: nn.Module,
    batches: Iterable[Any] = (),
    criterion: str | Criterion = "conditional",
    *,
    dimensions: Iterable[str] | None = None,
    stages: Sequence[int] | None = None,
    prediction: Callable[[Any], Tensor] | None = None,
    progress: bool = True,
    over_ranks: bool = False,
) -> Scores:
    """How much every head, neuron and token position of the vision transformer in `model` matters.

    Args:
        model: a supported model or a module that holds one; called as ``model(images)``. Left exactly as it was, on
            whatever device it is.
        batches: what a DataLoader yields, ``(images, labels)`` or ``images``. Read once.
        criterion: ``"conditional"``, ``"hsic"``, ``"taylor"``, ``"activation"``, ``"magnitude"``, ``"random"``, a name
            of your own (see `criteria.register`), or an instance.
        dimensions: None means all that the model can lose.
        stages: blocks of the token stages; None means quarters of the depth.
        prediction: turns the model's output into probabilities (images, classes); None means softmax.
        progress: show a bar (on a terminal).
        over_ranks: in a distributed run, every rank gives its own share of the batches, or none; the scores are of all
            of them and the same on all ranks, which all have to call this.

    Raises:
        CalibrationError: no batches, batches the criterion cannot use, a model with masks on, or NaN scores.
        UnsupportedModelError: there is no supported vision transformer in `model`, or there are several; names the
            module in the way.
    """
    criterion = as_criterion(criterion)
    sites = find_sites(model)
    if not isinstance(batches, Iterable):
        raise CalibrationError(f"batches={batches!r:.80}: expected a DataLoader or a list of batches")
    scorer = Scorer(sites, criterion, dimensions, stages)

    def observe() -> None:
        shown = bar("Scoring", length_hint(batches), shown=progress)
        with isolated_rng(), evaluating(model), scorer.watching(), shown as advance:
            for images, labels in _as_tensors(batches, criterion):
                scorer.update(partial(_predict, model, on_device_of(sites, images), prediction), labels)
                advance()

    if criterion.needs_images:
        on_every_rank(observe) if over_ranks else observe()  # before ranks exchange sums, all know who failed
    if over_ranks:
        scorer.sum_over_ranks()
    return scorer.scores()


def _predict(model: nn.Module, images: Tensor, prediction: Callable[[Any], Tensor] | None) -> Tensor:
    return as_prediction(model(images), prediction)


class Scorer:
    """Adds up a criterion's sums over the forward passes made while it is `watching`.

    Every entry of `sums` is a plain sum over batches, so that ranks can share them out.

    Args:
        sites: of the model, which has no masks on.
        criterion: what is summed up.
        dimensions, stages: see `score`.

    Raises:
        CalibrationError: the model has masks on, or stages that are not in it.
        UnsupportedModelError: it cannot lose units of one of the `dimensions`.
    """

    def __init__(
        self,
        sites: Sites,
        criterion: Criterion,
        dimensions: Iterable[str] | None = None,
        stages: Sequence[int] | None = None,
    ) -> None:
        check_unmasked(
            sites.model,
            CalibrationError,
            "units that are left out would score as if they did nothing",
            "score it before masks are put on, or after they are taken off",
        )
        self.sites, self.criterion = sites, criterion
        self.dimensions = sites.dimensions if dimensions is None else sites.require(dimensions)
        # As a policy's stages are: increasing, and in the model.
        self.stages = default_stages(sites.depth) if stages is None else Policy(stages=stages).stages or ()
        if self.stages and self.stages[-1] >= sites.depth:
            raise CalibrationError(f"stages={list(self.stages)}: {sites.name} has only {sites.depth} blocks")
        device = next(sites.model.parameters()).device
        self.sums: dict[str, Tensor] = {name: torch.zeros((), device=device) for name in ("batches", "images")}
        self.groups = dict(self._groups())
        self._pass = _Pass()
        self._two_passes = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The probes are on inside."""
        try:
            with probing(self._probes()):
                yield
        finally:
            self._pass = _Pass()

    def _probes(self) -> Iterator[tuple[Callable[[Any], Any], Callable[..., Any]]]:
        for name, group in self.groups.items():
            if group.site is not None:
                yield group.site.consumer.register_forward_pre_hook, partial(self._see_units, name, group.num_units)
            else:
                attention = self.sites.blocks[self.stages[int(name.split(".")[1])]].attention
                assert attention is not None  # every block has one where tokens may leave
                yield attention.qkv.register_forward_hook, partial(self._see_values, name)

    def update(self, predict: Callable[[], Tensor], labels: Tensor | None = None) -> None:
        """Add one batch. `predict` runs the model and returns probabilities (images, classes).

        Raises:
            CalibrationError: too few images, or labels are needed and missing.
        """
        images = self._see_gradients(predict, labels) if self.criterion.needs_gradients else self._see_pass(predict)
        self.sums["batches"] += 1
        self.sums["images"] += images

    def _see_pass(self, predict: Callable[[], Tensor]) -> int:
        with torch.no_grad():
            self._pass = _Pass(remembers=not self._two_passes)
            prediction = self._checked(predict())
            if self._pass.overflowed or self._two_passes:
                # Too much to remember until the prediction is known: now that it is, look again.
                self._two_passes = True
                self._pass = _Pass(prediction=prediction)
                predict()
            for name, seen in self._pass.seen.items():
                self._add(name, seen, prediction)
        return len(prediction)

    def _see_gradients(self, predict: Callable[[], Tensor], labels: Tensor | None) -> int:
        if labels is None:
            raise CalibrationError(
                f"criterion={self.criterion.name!r} needs labels: give batches of (images, labels), labels (images,)"
            )
        with torch.enable_grad():
            self._pass = _Pass(gates={})
            prediction = self._checked(predict())
            if labels.is_floating_point() or labels.shape != prediction.shape[:1]:
                raise CalibrationError(
                    f"labels of shape {tuple(labels.shape)} and type {labels.dtype}: criterion={self.criterion.name!r} "
                    f"needs one class number for each of the {len(prediction)} images (no one-hot, no mixup)"
                )
            labels = labels.long()
            if int(labels.min()) < 0 or int(labels.max()) >= prediction.shape[1]:
                raise CalibrationError(
                    f"labels {int(labels.min())} to {int(labels.max())}: the model has {prediction.shape[1]} classes"
                )
            assert self._pass.gates is not None
            loss = F.nll_loss(prediction.clamp_min(1e-12).log(), labels.to(prediction.device), reduction="sum")
            gradients = torch.autograd.grad(loss, list(self._pass.gates.values()), allow_unused=True)
        with torch.no_grad():
            for (name, gate), gradient in zip(self._pass.gates.items(), gradients, strict=True):
                change = torch.zeros_like(gate) if gradient is None else gradient
                seen = self.criterion.observe(_dimension(name), change.flatten(1), self.groups[name])
                self._add(name, seen, prediction.detach())
        return len(prediction)

    def sum_over_ranks(self) -> None:
        """From here on `sums` are those of all ranks; one that saw no batch adds nothing."""
        own = {name: (tuple(value.shape), value.dtype) for name, value in self.sums.items()}
        known = {name: kind for kinds in gather(lambda: own) for name, kind in kinds.items()}
        device = self.sums["batches"].device
        for name, (shape, dtype) in sorted(known.items()):
            value = self.sums.get(name)
            self.sums[name] = summed(torch.zeros(shape, dtype=dtype, device=device) if value is None else value)

    def scores(self) -> Scores:
        """Scores from the sums so far, on the CPU.

        Raises:
            CalibrationError: no batch was seen, or scores are NaN.
        """
        if self.criterion.needs_images and self.sums["batches"] == 0:
            raise CalibrationError(
                f"criterion={self.criterion.name!r} needs images, but no usable batch was given; pass batches of at "
                f"least {self.criterion.min_batch} images, e.g. a DataLoader"
            )
        lists: dict[str, list[Tensor]] = {"heads": [], "neurons": [], "tokens": []}
        for name, group in self.groups.items():
            sums = {key[len(name) + 1 :]: value for key, value in self.sums.items() if key.startswith(f"{name}.")}
            counts = {key: self.sums[key] for key in ("batches", "images")}
            result = self.criterion.finish(_dimension(name), sums | counts, group).detach().float().cpu()
            if not result.isfinite().all():
                raise CalibrationError(
                    f"scores {name} are not finite: the model gives NaN or infinity on the calibration images; check "
                    "its weights and the images' range"
                )
            lists[_dimension(name)].append(result)
        stages = self.stages if "tokens" in self.dimensions else ()
        return Scores(**lists, stages=stages, criterion=self.criterion.name, images=int(self.sums["images"].item()))

    def _groups(self) -> Iterator[tuple[str, UnitGroup]]:
        for dimension in self.dimensions:
            if dimension == "tokens":
                positions = self.sites.grid[0] * self.sites.grid[1]
                for stage, block in enumerate(self.stages):
                    yield f"tokens.{stage}", UnitGroup(f"{self.sites.blocks[block].name}.tokens", positions, None)
                continue
            for index, site in enumerate(self.sites.units(dimension)):
                yield f"{dimension}.{index}", UnitGroup(site.name, site.num_units, site)

    # --- probes: a gate changes what passes through, everything else only looks ---------------------------------------

    def _see_units(self, name: str, num_units: int, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        (x,) = args  # (images, tokens, channels)
        gated = self._see(name, x.unflatten(-1, (num_units, -1)))
        return None if gated is None else (gated.flatten(-2),)

    def _see_values(self, name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        prefix, width = self.sites.num_prefix_tokens, output.shape[-1] // 3
        gated = self._see(name, output[:, None, prefix:, 2 * width :])
        if gated is None:
            return None
        values = torch.cat([output[:, :prefix, 2 * width :], gated[:, 0]], dim=1)
        return torch.cat([output[..., : 2 * width], values], dim=-1)

    def _see(self, name: str, activations: Tensor) -> Tensor | None:
        """Take note of (images, tokens, units, channels); returns them gated when gradients are wanted."""
        if self._pass.gates is not None:
            images, _, units, _ = activations.shape
            gate = activations.new_ones((images, 1, units, 1), requires_grad=True)
            self._pass.gates[name] = gate
            return activations * gate
        if self._pass.prediction is None and (not self._pass.remembers or self._pass.overflowed):
            return None
        with torch.autocast(activations.device.type, enabled=False), full_precision():
            seen = self.criterion.observe(_dimension(name), activations, self.groups[name])
        if self._pass.prediction is not None:
            self._add(name, seen, self._pass.prediction)
        else:
            self._pass.remember(name, seen)
        return None

    def _add(self, name: str, seen: tuple[Tensor, ...], prediction: Tensor) -> None:
        with torch.autocast(prediction.device.type, enabled=False), full_precision():
            for key, value in self.criterion.contract(_dimension(name), seen, prediction).items():
                total = self.sums.get(f"{name}.{key}")
                self.sums[f"{name}.{key}"] = value if total is None else total + value

    def _checked(self, prediction: Tensor) -> Tensor:
        if len(prediction) < self.criterion.min_batch:
            raise CalibrationError(
                f"a batch of {len(prediction)} images: criterion={self.criterion.name!r} needs at least "
                f"{self.criterion.min_batch} in each; raise the batch size"
            )
        return prediction


@dataclass
class _Pass:
    """What one forward pass has seen so far."""

    remembers: bool = True
    prediction: Tensor | None = None  # known from a pass before: contract at once, remember nothing
    gates: dict[str, Tensor] | None = None
    seen: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    overflowed: bool = False

    def remember(self, name: str, seen: tuple[Tensor, ...]) -> None:
        self.seen[name] = seen
        if sum(t.nbytes for tensors in self.seen.values() for t in tensors) > _MEMORY_LIMIT:
            self.seen.clear()
            self.overflowed = True


def as_prediction(output: Any, prediction: Callable[[Any], Tensor] | None = None) -> Tensor:
    """Probabilities (images, classes) from a model's output, in fp32 or wider.

    Raises:
        CalibrationError: the output is no (images, classes) tensor and `prediction` does not make one of it.
    """
    result = output if prediction is None else prediction(output)
    if not isinstance(result, Tensor) or result.ndim != 2 or not result.is_floating_point():
        shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise CalibrationError(
            f"the model's output ({shape}) is no float tensor (images, classes); pass prediction=, a function that "
            "makes one of it, e.g. prediction=lambda out: out.logits.softmax(-1)"
        )
    if prediction is None and result.shape[1] < 2:
        raise CalibrationError(
            "the model has one output, whose softmax is always 1: nothing depends on it; pass prediction=torch.sigmoid"
        )
    result = result.to(torch.promote_types(result.dtype, torch.float32))
    return result.softmax(dim=-1) if prediction is None else result


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, matmuls of fp32 are of fp32."""
    # TF32 has three digits; a Gram matrix of close samples would have none left.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _dimension(name: str) -> str:
    return name.split(".", 1)[0]


def on_device_of(sites: Sites, images: Tensor) -> Tensor:
    """The images where the model is, in its precision."""
    parameter = next(sites.model.parameters())
    return images.to(parameter.device, parameter.dtype if images.is_floating_point() else None)


def split_batch(batch: Any) -> tuple[Tensor, Tensor | None]:
    """(images, labels or None) of what a DataLoader yields, ``images`` or ``(images, labels)``."""
    parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    if not parts or not isinstance(parts[0], Tensor) or parts[0].ndim != 4:
        given = type(batch).__name__ if not isinstance(parts[0] if parts else None, Tensor) else tuple(parts[0].shape)
        raise CalibrationError(
            f"a batch is {given}; expected images (n, channels, height, width) or (images, labels). For other batches "
            "use MultiDimPruneCallback and override calibration_step"
        )
    if not len(parts[0]):
        raise CalibrationError("a batch holds no image; leave empty batches out")
    labels = parts[1] if len(parts) > 1 and isinstance(parts[1], Tensor) else None
    return parts[0], labels


def _as_tensors(batches: Iterable[Any], criterion: Criterion) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The batches, cut and joined to the size of the first where the criterion compares like with like.

    The biased HSIC depends on the number of images (0.048 at 8, 0.005 at 64 for independent data). A remainder under
    half the size is dropped.
    """
    pairs = (split_batch(batch) for batch in batches)
    if not criterion.needs_equal_batches:
        yield from pairs
        return
    size = 0
    images: Tensor | None = None
    labels: Tensor | None = None
    for more_images, more_labels in pairs:
        if images is not None and more_images.shape[1:] != images.shape[1:]:
            raise CalibrationError(
                f"images of {tuple(more_images.shape[1:])} after {tuple(images.shape[1:])}: batches need one image size"
            )
        size = size or len(more_images)
        images = more_images if images is None else torch.cat([images, more_images])
        labels = more_labels if labels is None or more_labels is None else torch.cat([labels, more_labels])
        while len(images) >= size:
            yield images[:size], None if labels is None else labels[:size]
            images, labels = images[size:], None if labels is None else labels[size:]
    if images is not None and len(images) > 0 and 2 * len(images) >= size and len(images) >= criterion.min_batch:
        yield images, labels
