"""Run a criterion over a model: probes on, batches through, probes off, nothing left behind."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from operator import length_hint
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mdc.distributed import gather, on_every_rank, rank, summed
from lightning_mdc.errors import CalibrationError, MdcError, check_whole
from lightning_mdc.importance.calibration import TOGETHER
from lightning_mdc.importance.criteria import Criterion, Needs, UnitGroup, as_criterion
from lightning_mdc.importance.moments import MOMENT_TOKENS, MomentSums
from lightning_mdc.importance.scores import Scores
from lightning_mdc.importance.variety import Variety
from lightning_mdc.models import (
    Anatomy,
    Prediction,
    Units,
    are_logits,
    check_unmasked,
    evaluating,
    find_anatomy,
    probing,
    runnable,
)
from lightning_mdc.models.anatomy import Channels
from lightning_mdc.models.swapping import calling_readers
from lightning_mdc.models.token_count import count_probes
from lightning_mdc.policy import DIMENSIONS, TOKENS, Policy, default_stages
from lightning_mdc.prediction import (
    are_probabilities,
    as_prediction,
    check_classes,
    class_numbers,
    float_leaves,
    inverse_link,
    labels_in,
    log_probabilities,
    plain,
    read,
)
from lightning_mdc.progress import bar
from lightning_mdc.randomness import isolated_rng

# Bytes that a batch's observations may take until its prediction is known. Above it, the prediction is computed by a
# pass of its own, and nothing has to be remembered.
_MEMORY_LIMIT = 2 * 2**30

# The sum that counts on how many ranks a backward pass failed.
_GAVE_UP = "without gradients"
# Images in a backward pass, where we cut the batches: of each, a ViT-L of 224 px keeps 330 MB.
_BACK_AT_ONCE = 16


@torch.inference_mode(False)  # in it no gradients are to be had
def score(
    model: nn.Module,
    batches: Iterable[Any] = (),
    criterion: str | Criterion = "conditional",
    *,
    dimensions: Iterable[str] | None = None,
    stages: Sequence[int] | None = None,
    prediction: Prediction | None = None,
    moments: bool | None = None,
    moment_tokens: int | Literal["all"] | None = None,
    submodule: str | None = None,
    progress: bool = True,
    over_ranks: bool = False,
) -> Scores:
    """How much every head, neuron and token position of the vision transformer in `model` matters.

    Args:
        model: a supported model or a module that holds one; called as ``model(images)``. Left exactly as it was, on
            whatever device it is.
        batches: what a DataLoader yields, ``(images, labels)`` or ``images``. Read once.
        criterion: ``"conditional"``, for which a forward pass is enough; ``"fisher"``, which goes back through the
            model, too, and is what `compress` and the callback take if nothing is said; ``"hsic"``, ``"taylor"``,
            ``"activation"``, ``"magnitude"``, ``"random"``, a name of your own (see `register`), or an instance.
        dimensions: None means all that the model can lose, without tokens if no classifier is known.
        stages: blocks of the token stages; None means quarters of the depth.
        prediction: turns the model's output into what units are to matter for, (images, numbers): probabilities, say.
            None: the softmax of logits of a classifier that is known, else the output as it is. The output is only
            looked at if the criterion needs it for one of the `dimensions`.
        moments: whether to gather on the way what ``slim(compensate="lstsq")`` has to know; see `Moments`. None: if
            the criterion needs it.
        moment_tokens: how many patch tokens of an image, drawn by a fixed seed, moments are of: a number or ``"all"``;
            None means 49. The matrix products for all 196 of a 224 px image take about half as long as the forward
            pass; a pretrained ViT-S without half of its heads and neurons was as accurate after `lstsq` by 24 of 49.
        submodule: of the vision transformer in `model`, as an attribute path; None finds it if there is just one.
        progress: show a bar (on a terminal).
        over_ranks: in a distributed run, every rank gives its own share of the batches, or none; the scores are of all
            of them and the same on all ranks, which all have to call this.

    Raises:
        CalibrationError: no batches, batches the criterion cannot use, a model with masks on, or NaN scores.
        UnsupportedModelError: there is no supported vision transformer in `model`, or there are several; names the
            module in the way.
    """
    anatomy = find_anatomy(model, submodule)
    if not isinstance(batches, Iterable):
        raise CalibrationError(f"batches={batches!r:.80}: expected a DataLoader or a list of batches")
    scorer = Scorer(
        anatomy, as_criterion(criterion), dimensions, stages, prediction, moments=moments, moment_tokens=moment_tokens
    )
    return scored_by(scorer, runnable(model, submodule), batches, progress=progress, over_ranks=over_ranks)


def scored_by(
    scorer: Scorer, model: nn.Module, batches: Iterable[Any], *, progress: bool = True, over_ranks: bool = False
) -> Scores:
    """Scores of `model` by a `Scorer` of its anatomy that has seen nothing yet; see `score`."""

    def observe() -> None:
        shown = bar("Scoring", length_hint(batches), shown=progress)
        with isolated_rng(), evaluating(model), scorer.watching(), shown as advance:
            for images, labels, batch in _as_tensors(batches, scorer.needs):
                images = on_device_of(scorer.anatomy, images)
                parts = [partial(run_on, model, part) for part in images.chunk(-(-len(images) // _BACK_AT_ONCE))]
                scorer.update(partial(run_on, model, images), len(images), labels, batch, parts)
                advance()

    if scorer.needs.images:
        on_every_rank(observe) if over_ranks else observe()  # before ranks exchange sums, all know who failed
    if over_ranks:
        scorer.sum_over_ranks()
    return scorer.scores()


class Scorer:
    """Adds up a criterion's sums over the forward passes made while it is `watching`.

    Every entry of `sums` is a plain sum over batches, so that ranks can share them out.

    Args:
        anatomy: of the model, which has no masks on.
        criterion: what is summed up.
        dimensions, stages, prediction, moments, moment_tokens: see `score`.

    Attributes:
        needs: what there has to be for all of the dimensions together.

    Raises:
        CalibrationError: the model has masks on, stages that are not in it, or options that do not go together.
        UnsupportedModelError: it cannot lose units of one of the `dimensions`.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        criterion: Criterion,
        dimensions: Iterable[str] | None = None,
        stages: Sequence[int] | None = None,
        prediction: Prediction | None = None,
        *,
        moments: bool | None = None,
        moment_tokens: int | Literal["all"] | None = None,
    ) -> None:
        check_unmasked(
            anatomy.model,
            CalibrationError,
            "units that are left out would score as if they did nothing",
            "score it before masks are put on, or after they are taken off",
        )
        self.anatomy, self.criterion, self.prediction = anatomy, criterion, prediction
        self.dimensions = _dimensions(anatomy, criterion, dimensions)
        # As a policy's stages are: increasing, and in the model.
        self.stages = default_stages(anatomy.depth) if stages is None else Policy(stages=stages).stages or ()
        if self.stages and self.stages[-1] >= anatomy.depth:
            raise CalibrationError(f"stages={list(self.stages)}: {anatomy.name} has only {anatomy.depth} blocks")
        if moment_tokens != "all":
            check_whole("moment_tokens", moment_tokens, 1, CalibrationError, or_none=f"{MOMENT_TOKENS}, or 'all'")
        needs = Needs.all_of(criterion.needs(dimension) for dimension in self.dimensions)
        if needs.moments and moments is False:
            raise CalibrationError(
                f"moments=False, but criterion={criterion.name!r} is made of them; leave it out, or choose another "
                "criterion"
            )
        if moment_tokens is not None and not (moments or needs.moments):
            raise CalibrationError(
                f"moment_tokens={moment_tokens}: no moments are gathered; leave it out, or moments=True"
            )
        self.needs = Needs.all_of([needs, Needs(images=1, moments=True)]) if moments else needs
        tokens = None if moment_tokens == "all" else moment_tokens or MOMENT_TOKENS
        self._moments = MomentSums(anatomy, self.dimensions if self.needs.moments else (), tokens)
        device = next(anatomy.model.parameters()).device
        self.sums: dict[str, Tensor] = {name: torch.zeros((), device=device) for name in ("batches", "images")}
        self._door: nn.Module | None = None  # the part that is given images where it is not called as a whole
        self._variety = Variety()
        self.groups = dict(self._groups())
        self._pass = _Pass()
        self._draw = torch.Generator().manual_seed(0)  # labels of the model's own
        self._two_passes = False
        self._failure = ""  # of a backward pass, on this rank
        self._images, self._link = 0, inverse_link()  # of the batch at hand
        self._size: tuple[int, int] | None = None  # of the images seen, in pixels, where positions are scored

    def _groups(self) -> Iterator[tuple[str, UnitGroup]]:
        for dimension in self.dimensions:
            if dimension == TOKENS:
                positions = self.anatomy.grid[0] * self.anatomy.grid[1]
                for stage, block in enumerate(self.stages):
                    yield f"{dimension}.{stage}", UnitGroup(dimension, f"{self._name(block)}.{dimension}", positions)
                continue
            for block, units in enumerate(self.anatomy.units(dimension)):
                if units is not None:
                    yield f"{dimension}.{block}", UnitGroup(dimension, units.name, units.count, units)

    def _name(self, block: int) -> str:
        return self.anatomy.blocks[block].name

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The probes are on inside."""
        try:
            watched = [group.units for group in self.groups.values() if group.units is not None]
            with calling_readers(watched), probing(self._probes()):
                yield
        finally:
            self._pass = _Pass()

    def _probes(self) -> Iterator[tuple[Callable[[Any], Any], Callable[..., Any]]]:
        # Who calls a part of the transformer, such as forward_features, does not call the transformer itself.
        for part in self.anatomy.model.modules():
            yield partial(part.register_forward_pre_hook, with_kwargs=True), self._enter
        yield self.anatomy.model.register_forward_hook, self._hear
        yield from count_probes(self.anatomy, ranked=TOKENS in self.dimensions)
        for name, group in self.groups.items():
            if group.units is not None:
                yield group.units.reader.register_forward_pre_hook, partial(self._see_units, name, group.units)
                if self.criterion.needs(group.dimension).output_gradients:
                    yield group.units.reader.register_forward_hook, partial(self._see_output, name)
            else:
                point = self.anatomy.blocks[self.stages[int(name.split(".")[1])]].point
                assert point is not None  # every block has one where tokens may leave
                values = point.values
                yield values.module.register_forward_hook, partial(self._see_values, name, values)

    def update(
        self,
        run: Callable[[], Any],
        images: int,
        labels: Tensor | None = None,
        batch: Any = None,
        parts: Sequence[Callable[[], Any]] | None = None,
    ) -> Any:
        """Add one batch, and return what the model says of it.

        Args:
            run: runs the model on so many `images` and returns its output.
            batch: what a loss of the user's own is given.
            parts: run it on parts of them, from whose outputs gradients lead to layers; None: `run` does.

        Raises:
            CalibrationError: too few images, or labels or a prediction are needed and missing.
        """
        self._images, self._link = images, inverse_link(labels)
        # First, so that the model has last run without a graph, of which it may keep what it has put out.
        if self.needs.output_gradients and not self._is_without_gradients:
            self._go_back([run] if parts is None else parts)
        with torch.set_grad_enabled(self.needs.gradients):
            self._pass = _Pass(overflowed=self._two_passes)
            output = run()
            self._check_rows(images)
            if self.needs.gradients:
                self._add_changes(output, labels, batch)
            if self.needs.prediction:
                self._judge(self._predicted(output), run)
        self.sums["batches"] += 1
        self.sums["images"] += images
        return output

    def _enter(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Where the transformer is given images, a call of it begins. It may have several in a batch, or be given
        several images for one of the batch's: crops, frames, what is in a bag."""
        is_whole = module is self.anatomy.model
        if self._pass.is_inside or self._pass.goes_back or not (is_whole or self._door in (None, module)):
            return
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim == 4)
        images = next(given, None)
        if images is None and not is_whole:
            return
        if is_whole:
            self._pass.is_inside = True
        else:
            self._door = module
        self._pass.calls.append(_Call(self._images if images is None else len(images)))
        if images is None:
            return
        # What a second call sees is made of the same images, which a second pass has seen before.
        if len(self._pass.calls) == 1 and self._pass.is_first:
            self._variety.look(images)
        if TOKENS in self.dimensions:
            size = images.shape[-2], images.shape[-1]
            if self._size not in (None, size):  # in a later call, too
                self._refuse_sizes(f"images of {tuple(images.shape[1:])} after others")
            self._size = size

    def _refuse_sizes(self, what: str) -> NoReturn:
        raise CalibrationError(
            f"{what}: positions of tokens are scored on one grid; give images of one size, or dimensions=['heads', "
            "'neurons'] with criterion='conditional'"
        )

    def _check_rows(self, images: int) -> None:
        most = max((call.rows for call in self._pass.calls), default=images)
        if most >= self.needs.images:
            return  # smaller calls, on an image to compare with, say, are passed over
        if images >= self.needs.images:
            raise CalibrationError(
                f"of a batch of {images} images {self.anatomy.name} is given {most} at a time, and "
                f"criterion={self.criterion.name!r} needs at least {self.needs.images}; call it on more of them at "
                "once, or choose a criterion that does not look at the prediction, such as 'activation'"
            )
        raise CalibrationError(
            f"{images} images: criterion={self.criterion.name!r} needs at least {self.needs.images} in a batch; give "
            "more images"
        )

    def _hear(self, module: nn.Module, args: Any, output: Any) -> None:
        self._pass.is_inside = False
        self._call.said = output

    @property
    def _call(self) -> _Call:
        """That which runs now, or was the last."""
        if not self._pass.calls:  # it is called on something else than images: one row for each
            self._pass.calls.append(_Call(self._images))
        if self._pass.goes_back and len({call.rows for call in self._pass.calls}) > 1:
            raise CalibrationError(
                f"{self.anatomy.name} has gradient checkpointing on and is called several times, on other numbers of "
                f"images: nobody knows which call runs again; switch it off to score by {self.criterion.name!r}"
            )
        return self._pass.calls[-1]

    def _predicted(self, output: Any) -> Tensor:
        return as_prediction(output, self.prediction, self._link if self._are_logits(output) else None)

    def _are_logits(self, output: Any) -> bool:
        said = [read(call.said) for call in self._pass.calls]
        parts = [one for one in said if isinstance(one, Tensor) and one.ndim]
        if len(parts) > 1 and len({part.shape[1:] for part in parts}) == 1:  # of one batch, it may be
            said.append(torch.cat(parts))
        return self.anatomy.classifies and any(are_logits(output, one) for one in said)

    def _prediction_of(self, number: int, prediction: Tensor) -> Tensor:
        """Of each row of a call: the module's, if it has one for each, or for those of all calls, one after another;
        else what the transformer itself said."""
        call, rows = self._pass.calls[number], [call.rows for call in self._pass.calls]
        if call.rows == len(prediction):
            return prediction
        if sum(rows) == len(prediction):  # parts of the batch
            return prediction.split(rows)[number]
        if self.prediction is not None or call.said is None:
            raise CalibrationError(
                f"{self.anatomy.name} was given {call.rows} images in a call, of which {len(prediction)} predictions "
                "were made, so that nobody knows which belong together; "
                + (
                    "leave prediction= out: each image then counts for what the transformer itself says of it"
                    if call.said is not None
                    else "call the transformer itself, not a method of it: each image then counts for what it says"
                )
            )
        are_classes = self.anatomy.classifies and are_logits(call.said, call.said)
        own = as_prediction(call.said, None, self._link if are_classes else None)
        if call.rows != len(own):
            raise CalibrationError(
                f"{self.anatomy.name} was given {call.rows} images in a call and put out {len(own)} rows: a criterion "
                "that looks at predictions needs one of each image"
            )
        return own

    @torch.no_grad()
    def _judge(self, prediction: Tensor, run: Callable[[], Any]) -> None:
        """Add what waits for the prediction."""
        if self._pass.overflowed:
            # Too much to remember until the prediction is known: now that it is, look again.
            self._two_passes = True
            self._pass = _Pass(prediction=prediction)
            run()
        for number, call in enumerate(self._pass.calls):
            for name, seen in call.seen.items():
                self._add(name, seen, call.rows, self._prediction_of(number, prediction))

    def _add_changes(self, output: Any, labels: Tensor | None, batch: Any) -> None:
        """Add what the loss changes by if units leave."""
        loss = self.criterion.loss(output, batch) if self.criterion.loss else self._cross_entropy(output, labels)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            given = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise CalibrationError(
                f"loss gave {given} that no gradients lead from; expected one number, computed from the model's output"
            )
        gates = self._pass.gates
        self._pass.goes_back = True
        found = torch.autograd.grad(loss.sum(), list(gates.values()), allow_unused=True)
        self._pass.goes_back = False
        with torch.no_grad():
            for ((name, _), gate), gradient in zip(gates.items(), found, strict=True):
                change = torch.zeros_like(gate) if gradient is None else gradient
                self._add(name, self.criterion.observe(change.flatten(1), self.groups[name]), len(gate))

    def _go_back(self, runs: Sequence[Callable[[], Any]]) -> None:
        """Add what the prediction's gradients are at what layers put out, from passes of their own: a part of the batch
        is enough for one, and where they fail nothing else is lost. What the model refuses without gradients, too, it
        will refuse again."""
        try:
            for run in runs:
                with torch.enable_grad():
                    self._pass = _Pass(adds=True)
                    self._add_output_gradients(self._surprise(run()))
        except Exception as error:
            if self.criterion.without_gradients is None:
                raise
            error = error.__cause__ if isinstance(error.__cause__, Exception) else error
            self._failure = str(error).strip().partition("\n")[0] or type(error).__name__
            self.sums[_GAVE_UP] = torch.ones_like(self.sums["batches"])

    def _surprise(self, output: Any) -> Tensor:
        """That of all that the model says, which may be any nest of float tensors."""
        said = [each for each in float_leaves(read(output, self.prediction)) if each.numel()]
        if not said:
            raise CalibrationError(
                f"the model's output ({type(output).__name__}) holds no float tensor, so it has no gradients; pass "
                "prediction=, which makes one of it"
            )
        wide = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in said]
        if self.prediction is None and self._are_logits(output):
            wide = list(map(self._link, wide))
        return torch.stack([surprise(each.reshape(len(each), -1), self._draw) for each in wide]).sum()

    @property
    def _is_without_gradients(self) -> bool:
        """Whether a backward pass failed, on any rank once sums are over all."""
        return _GAVE_UP in self.sums

    def _add_output_gradients(self, loss: Tensor) -> None:
        added, found = self._pass.added, list[Tensor | None]()
        self._pass.goes_back = True
        if loss.requires_grad:
            found += torch.autograd.grad(loss, [zeros for _, zeros in added], allow_unused=True)
        if all(gradient is None for gradient in found):
            raise CalibrationError(
                "no gradients lead from the prediction to the layers; pass prediction= that does not detach it, or let "
                "the module run without no_grad"
            )
        with torch.no_grad(), exactly(loss):
            for (name, zeros), gradient in zip(added, found, strict=True):
                gradient = (torch.zeros_like(zeros) if gradient is None else gradient).flatten(0, -2)
                gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                if not gradient.isfinite().all():
                    raise CalibrationError("gradients of the prediction are not finite; score in fp32 or bf16")
                self._add(name, self.criterion.observe_output_gradients(gradient, self.groups[name]))

    def _cross_entropy(self, output: Any, labels: Tensor | None) -> Tensor:
        """Of classes, summed over images."""
        who: dict[str, Any] = {"error": CalibrationError, "who": f"criterion={self.criterion.name!r}"}
        if self.prediction is None and not self._are_logits(output) and not _are_probabilities(output):
            raise CalibrationError(
                f"criterion={self.criterion.name!r} needs a loss, and the output of {self.anatomy.name} is not known "
                "to be classes; pass Taylor(loss=), a function of (output, batch), or prediction=, which makes "
                "probabilities of it, or choose another criterion"
            )
        if labels is None:
            raise CalibrationError(
                f"criterion={self.criterion.name!r} needs labels: give batches of (images, labels), labels (images,)"
            )
        found, otherwise = log_probabilities(output, self.prediction, **who), "a loss of your own, Taylor(loss=)"
        labels = class_numbers(labels, len(found), otherwise=f"pass {otherwise}", **who)
        check_classes(int(labels.min()), int(labels.max()), found.shape[1], otherwise=f"pass {otherwise}", **who)
        return F.nll_loss(found, labels.to(found.device), reduction="sum")

    def sum_over_ranks(self) -> None:
        """From here on `sums` are those of all ranks; one that saw no batch adds nothing."""
        own = {name: (tuple(value.shape), value.dtype) for name, value in self.sums.items()}
        known = {name: kind for kinds in gather(lambda: own) for name, kind in kinds.items()}
        device = self.sums["batches"].device
        for name, (shape, dtype) in sorted(known.items()):
            value = self.sums.get(name)
            self.sums[name] = summed(torch.zeros(shape, dtype=dtype, device=device) if value is None else value)
        self._moments.sum_over_ranks()
        sizes = {size for size in gather(lambda: self._size) if size is not None}
        if len(sizes) > 1:
            self._refuse_sizes(f"ranks see images of {' and '.join(f'{h} x {w}' for h, w in sorted(sizes))} pixels")
        self._size = next(iter(sizes), None)

    def scores(self) -> Scores:
        """Scores from the sums so far, on the CPU.

        Raises:
            CalibrationError: no batch was seen, or scores are NaN.
        """
        if self.needs.images and self.sums["batches"] == 0:
            raise CalibrationError(
                f"criterion={self.criterion.name!r} needs images, but no usable batch was given; pass batches of at "
                f"least {self.needs.images} images, e.g. a DataLoader"
            )
        criterion = self._criterion_of_sums()
        self.warn_of_failure()
        blocks = {d: len(self.stages if d == TOKENS else self.anatomy.units(d)) for d in self.dimensions}
        values: dict[str, Any] = {d: [torch.zeros(0) for _ in range(blocks.get(d, 0))] for d in DIMENSIONS}
        for name, group in self.groups.items():
            if not group.count:  # of a slim model that has none left there
                continue
            sums = {key[len(name) + 1 :]: value for key, value in self.sums.items() if key.startswith(f"{name}.")}
            if "batches" not in sums and criterion.needs(group.dimension).images:
                raise CalibrationError(f"{group.name} was not run on the calibration images, so it has no scores")
            if self.needs.moments and group.units is not None:
                group = replace(group, moments=self._moments.of(group.units))
            result = criterion.finish(sums, group).detach().float().cpu()
            if not result.isfinite().all():
                raise CalibrationError(
                    f"scores {name} are not finite: the model gives NaN or infinity on the calibration images; check "
                    "its weights and the images' range"
                )
            values[group.dimension][int(name.split(".")[1])] = result
        images = int(self.sums["images"].item())
        stages = self.stages if TOKENS in self.dimensions else ()
        moments = self._moments.moments(images) if self.needs.moments else None
        grid = None if self._size is None else self.anatomy.grid_of(self._size)
        self._variety.warn("calibration", "scores say nothing about images that differ")
        rest: dict[str, Any] = {"stages": stages, "images": images, "moments": moments, "grid": grid}
        return Scores(**values, criterion=criterion.name, **rest)

    def _criterion_of_sums(self) -> Criterion:
        """That which is asked for, or what there is instead where a backward pass failed."""
        instead = self.criterion.without_gradients
        return self.criterion if instead is None or not self._is_without_gradients else instead

    def warn_of_failure(self) -> None:
        """Say, on rank 0, that the prediction's gradients are not to be had, if so, and what is done instead."""
        if self._is_without_gradients and rank() == 0:
            words = self._failure or "gradients of the prediction failed on another rank"
            warnings.warn(
                f"criterion={str(self.criterion)!r}: {words}; {self.anatomy.name} is scored by "
                f"{str(self._criterion_of_sums())!r}, which needs no gradients",
                stacklevel=3,
            )

    # --- probes: a gate changes what passes through, everything else only looks ---------------------------------------

    def _see_units(self, name: str, units: Units, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if self._pass.adds:
            return None
        given, rows = plain(args[0]), self._call.rows
        # (images, tokens, channels), in whatever windows and grids they are seen
        x = given.reshape(rows, math.prod(given.shape[:-1]) // rows, given.shape[-1])
        if self.needs.moments and self._pass.is_first:
            with torch.no_grad(), exactly(x):
                self._moments.add(units, x)
        gated = self._see(name, x.unflatten(-1, (units.count, units.width)))
        return None if gated is None else (gated.flatten(-2).reshape(given.shape),)

    def _see_output(self, name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not self._pass.adds:
            return None
        zeros = torch.zeros_like(plain(output), requires_grad=True)
        if not self._pass.goes_back:
            self._pass.added.append((name, zeros))
        return output + zeros

    def _see_values(self, name: str, at: Channels, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if self._pass.adds:
            return None
        prefix, output = self.anatomy.num_prefix_tokens, plain(output)
        gated = self._see(name, output[:, None, prefix:, at.start : at.stop])
        if gated is None:
            return None
        values = torch.cat([output[:, :prefix, at.start : at.stop], gated[:, 0]], dim=1)
        return torch.cat([output[..., : at.start], values, output[..., at.stop :]], dim=-1)

    def _see(self, name: str, activations: Tensor) -> Tensor | None:
        """Take note of (images, tokens, units, channels); returns them gated when gradients are wanted."""
        group, now = self.groups[name], self._pass
        needs = self.criterion.needs(group.dimension)
        if needs.gradients:
            if now.prediction is not None:
                return None
            images, _, units, _ = activations.shape
            # One for all calls on all of the images: what the loss changes by is the sum of what it does in each.
            key = name, -1 if images == self._images else len(now.calls)
            if key not in now.gates:
                now.gates[key] = activations.new_ones((images, 1, units, 1), requires_grad=True)
            return activations * now.gates[key]
        if now.goes_back:
            return None
        call = self._call
        if call.rows < needs.images:
            return None
        waits = needs.prediction and (now.prediction is None or call.rows != len(now.prediction))
        if now.overflowed if waits else (now.prediction is not None and not needs.prediction):
            return None  # to be seen in the second pass, or seen in the first
        with torch.no_grad(), exactly(activations):
            seen = self.criterion.observe(activations, group)
        if waits:
            if name in call.seen:
                raise CalibrationError(
                    f"{group.name} ran twice in a call of {self.anatomy.name}: nobody knows what for"
                )
            call.seen[name] = seen
            now.remember(seen)
        else:
            self._add(name, seen, call.rows, now.prediction)
        return None

    def _add(
        self, name: str, seen: Mapping[str, Tensor], rows: int | None = None, prediction: Tensor | None = None
    ) -> None:
        """Add sums over so many images, if they are not counted already; without a prediction the criterion needs none
        for them."""
        if prediction is not None:
            with exactly(prediction):
                seen = self.criterion.contract(seen, prediction, self.groups[name])
        device, counts = self.sums["batches"].device, {}
        if rows is not None:
            counts = {"batches": torch.ones((), device=device), "images": torch.full((), float(rows), device=device)}
        for key, value in {**seen, **counts}.items():
            total = self.sums.get(f"{name}.{key}")
            self.sums[f"{name}.{key}"] = value if total is None else total + value


def _dimensions(anatomy: Anatomy, criterion: Criterion, dimensions: Iterable[str] | None) -> tuple[str, ...]:
    """What is scored: what is asked for, or what the model can lose and the criterion can score."""
    wanted = anatomy.default_dimensions() if dimensions is None else anatomy.require(dimensions)
    found = tuple(dimension for dimension in wanted if dimension in criterion.dimensions)
    if not found or (dimensions is not None and found != wanted):
        raise CalibrationError(
            f"dimensions={dimensions!r}: criterion={criterion.name!r} scores {', '.join(criterion.dimensions)} only; "
            f"ask for those of {anatomy.name}'s {', '.join(wanted)}, or choose another criterion"
        )
    return found


def _are_probabilities(output: Any) -> bool:
    found = read(output)
    return isinstance(found, Tensor) and are_probabilities(found)


@dataclass
class _Call:
    """What one call of the transformer has seen so far."""

    rows: int  # images
    seen: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # what waits for the prediction
    said: Any = None


@dataclass
class _Pass:
    """What one forward pass of the module has seen so far."""

    prediction: Tensor | None = None  # known from a pass before: contract at once, remember nothing
    gates: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # by group and, of a part of the images, call
    adds: bool = False  # zeros to what layers put out, for gradients there, and looks at nothing
    added: list[tuple[str, Tensor]] = field(default_factory=list)  # those zeros, by group
    calls: list[_Call] = field(default_factory=list)
    remembered: int = 0  # bytes
    is_inside: bool = False  # of a call of the whole transformer
    goes_back: bool = False  # to gradients: where they are checkpointed, parts of the model run again
    overflowed: bool = False  # nothing (more) is remembered: there will be a second pass

    @property
    def is_first(self) -> bool:
        """Whether nothing that is seen now has been seen before."""
        return self.prediction is None and not self.goes_back and not self.adds

    def remember(self, seen: dict[str, Tensor]) -> None:
        self.remembered += sum(tensor.nbytes for tensor in seen.values())
        if self.remembered > _MEMORY_LIMIT and self.prediction is None:
            for call in self.calls:
                call.seen.clear()
            self.overflowed = True


def surprise(prediction: Tensor, draw: torch.Generator) -> Tensor:
    """How unlikely labels are, drawn from the prediction itself by `draw`, summed over images: () with gradients.

    prediction: (images, numbers). Rows of probabilities give -log p of a class each; others half the squared distance
    to what a normal distribution of unit variance about them gives, but for a constant.
    """
    if are_probabilities(prediction):
        drawn = prediction.detach().cpu().multinomial(1, generator=draw)
        return -prediction.gather(1, drawn.to(prediction.device)).clamp_min(1e-12).log().sum()
    noise = torch.randn(prediction.shape, generator=draw)
    return (prediction * noise.to(prediction)).sum()


@contextmanager
def exactly(tensor: Tensor) -> Iterator[None]:
    """Inside, nothing is cast, and matmuls of fp32 are of fp32."""
    # TF32 has three digits; a Gram matrix of close samples would have none left.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(tensor.device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def on_device_of(anatomy: Anatomy, images: Tensor) -> Tensor:
    """The images where the model is, in its precision, and fit for gradients."""
    parameter = next(anatomy.model.parameters())
    images = images.clone() if images.is_inference() else images
    return images.to(parameter.device, parameter.dtype if images.is_floating_point() else None)


def run_on(model: nn.Module, images: Tensor) -> Any:
    """What `model` says about images of a loader.

    Raises:
        CalibrationError: it does not take them.
    """
    try:
        return model(images)
    except (MdcError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        said = str(error).strip().partition("\n")[0]
        raise CalibrationError(
            f"{type(model).__name__} cannot be run on a batch {tuple(images.shape)} of {images.dtype}: {said}; give "
            "images as it was trained on them"
        ) from error


def split_batch(batch: Any) -> tuple[Tensor, Tensor | None]:
    """(images, labels or None) of what a DataLoader yields, ``images`` or ``(images, labels)``."""
    parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    if not parts or not isinstance(parts[0], Tensor) or parts[0].ndim < 4:
        given = type(batch).__name__ if not isinstance(parts[0] if parts else None, Tensor) else tuple(parts[0].shape)
        raise CalibrationError(
            f"a batch is {given}; expected images (n, channels, height, width) or (images, labels). Of other batches "
            "make such, e.g. [(batch['image'], batch['label']) for batch in loader], or use MultiDimPruneCallback and "
            "override calibration_step"
        )
    if not len(parts[0]):
        raise CalibrationError("a batch holds no image; leave empty batches out")
    return plain(parts[0]), labels_in(batch)


def _as_tensors(batches: Iterable[Any], needs: Needs) -> Iterator[tuple[Tensor, Tensor | None, Any]]:
    """(images, labels, batch), cut and joined to the size of the first where the criterion compares like with like.

    The biased HSIC depends on the number of images (0.048 at 8, 0.005 at 64 for independent data). Batches that are too
    small for it are put together. A remainder under half the size is dropped.
    """
    if not needs.equal_batches:
        for batch in batches:
            yield *split_batch(batch), batch
        return
    size, given = 0, False
    images: Tensor | None = None
    labels: Tensor | None = None
    for more_images, more_labels in map(split_batch, batches):
        if images is not None and more_images.shape[1:] != images.shape[1:]:
            raise CalibrationError(
                f"images of {tuple(more_images.shape[1:])} after {tuple(images.shape[1:])}: images of a batch are "
                "compared; give images of one size, or dimensions=['heads', 'neurons'] with criterion='conditional'"
            )
        size = size or (len(more_images) if len(more_images) >= needs.images else TOGETHER)
        images = more_images if images is None else torch.cat([images, more_images])
        labels = more_labels if labels is None or more_labels is None else torch.cat([labels, more_labels])
        while len(images) >= size:
            first = images[:size], None if labels is None else labels[:size]
            yield *first, first
            images, labels, given = images[size:], None if labels is None else labels[size:], True
    if images is not None and len(images) >= needs.images and (2 * len(images) >= size or not given):
        yield images, labels, (images, labels)
