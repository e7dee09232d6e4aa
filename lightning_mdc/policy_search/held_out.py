"""What a policy is worth: a slim model's predictions on held-out training images, which are prepared once."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_mdc.distributed import gather, rank, world_size
from lightning_mdc.errors import SearchError, UnsupportedModelError, check_prediction, check_whole
from lightning_mdc.importance.calibration import num_images
from lightning_mdc.importance.scoring import run_on
from lightning_mdc.importance.variety import Variety
from lightning_mdc.models import (
    Anatomy,
    Prediction,
    check_unmasked,
    evaluating,
    find_anatomy,
    find_model,
    gives_logits,
    probing,
    standing_in,
)
from lightning_mdc.policy_search.closeness import Closeness
from lightning_mdc.prediction import (
    are_probabilities,
    check_classes,
    class_numbers,
    inverse_link,
    labels_in,
    log_probabilities,
    plain,
    read,
)
from lightning_mdc.randomness import isolated_rng

METRICS = ("auto", "accuracy", "loss", "kl")
# With fewer images, many policies tie in top-1, and the best of many trials is the luckiest.
_ENOUGH_FOR_TOP1 = 1000
_OTHERWISE = "pass a torchmetrics Metric, or metric='kl' with dense="
# Held-out images, in a random order, of which some have to differ.
_LOOKED_AT = 64
_NOT_TOLD = torch.tensor([0.0, -math.inf], dtype=torch.float64)


@dataclass(frozen=True)
class Judgement:
    """What one pass over the held-out images says of a model.

    Attributes:
        value: of the metric, higher is better.
        facts: what else the same predictions tell, whatever the metric: ``"accuracy"``, the top-1 as a fraction, if
            there are labels; ``"kl"``, the mean KL(dense ‖ model) in nats, if there is a dense model of classes.
    """

    value: float
    facts: Mapping[str, float] = field(default_factory=dict)


class Judge(ABC):
    """An ``evaluate`` for `search` that tells more than its number: a slim model in, higher is better."""

    metric: str | Metric

    @abstractmethod
    def judge(self, model: nn.Module) -> Judgement:
        """What `model` is worth on all images; in a distributed run all ranks ask, and get the same."""

    def __call__(self, model: nn.Module) -> float:
        """The metric of `model` on all images."""
        return self.judge(model).value


class HeldOut(Judge):
    """``evaluate`` for `search`: a slim model in, a number out, higher is better.

    The images are decoded and moved once, and visited in a random but fixed order. In a distributed run every rank
    makes one, looks at its part of the images, and all get the same number.

    Args:
        batches: ``(images, labels)`` batches, as a DataLoader yields them, on every rank the same. Use a held-out part
            of the *training* data: what the policy is chosen on cannot be reported.
        metric: ``"accuracy"``: top-1, ties broken by the mean probability of the true class, which counts for less than
            one image. ``"loss"``: minus the cross-entropy. ``"kl"``: minus the distance to the dense model's own
            output, whatever its shape, for which labels do not matter; see `Closeness`. ``"auto"``: accuracy of 1000
            labelled images or more, or where there is no dense model; else ``"kl"``. Or a torchmetrics `Metric` of
            (predictions, labels), which reads both as they are, negated if lower is better.
        dense: the dense model, for ``"kl"``, as metric or fact; looked at once, here.
        prediction: makes of a model's output what is judged, and is taken as it is: class probabilities, or how
            probable the second of two classes is; for a `Metric` or ``"kl"`` anything. None: of (images, classes) the
            softmax, unless one is built in; for a `Metric` the output itself; for ``"kl"`` the output itself unless it
            is known to be logits (of which a sigmoid is taken where labels are yes or no for each class).
        batch_size: images per forward pass.
        device: where to; None: where the first batch is.
        max_images: use the first so many.
        seed: of the order.

    Raises:
        SearchError: no images, images of several sizes or with NaN, no labels or others than the metric needs, an
            unknown metric, or a dense model with masks on.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        metric: str | Metric = "auto",
        *,
        dense: nn.Module | None = None,
        prediction: Prediction | None = None,
        batch_size: int = 128,
        device: torch.device | str | None = None,
        max_images: int | None = None,
        seed: int = 0,
    ) -> None:
        # By name, or not: a torchmetrics Metric answers == with a Metric.
        name = None if isinstance(metric, Metric) else metric
        if name is not None and name not in METRICS:
            raise SearchError(f"metric={metric!r}: expected one of {METRICS} or a torchmetrics Metric")
        check_whole("batch_size", batch_size, 1, SearchError)
        check_prediction(prediction, SearchError)
        if name == "kl" and dense is None:
            raise SearchError("metric='kl' compares with the dense model; pass dense=")
        if dense is not None:
            consequence = "policies would be compared with the pruned model"
            check_unmasked(dense, SearchError, consequence, "take the masks off, by remove_masks(model)")
        check_whole("max_images", max_images, 1, SearchError, or_none="all")
        images, labels = gathered(batches, max_images)
        classes = _classes(labels, len(images), name)
        if name == "auto":
            is_enough = dense is None or (classes is not None and len(images) >= _ENOUGH_FOR_TOP1)
            name = "accuracy" if labels is not None and is_enough else "kl"
        if labels is None and (name != "kl" or dense is None):
            raise SearchError(
                f"metric={metric!r} needs labels, batches of (images, labels) with tensors of numbers; or dense=, to "
                "compare with"
            )
        if isinstance(metric, Metric) and len(images) < world_size():
            raise SearchError(f"metric={metric!r}: {len(images)} images for {world_size()} processes; give more")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        of_this_rank = order[rank() :: world_size()]
        self.metric: str | Metric = metric if isinstance(metric, Metric) else str(name)
        self._name = name
        if self._is_of_classes and labels is not None:
            classes = class_numbers(labels, len(images), otherwise=_OTHERWISE, **self._who)
        self.batch_size, self.num_images, self.prediction = batch_size, len(images), prediction
        self.images = images[of_this_rank].to(device or images.device)
        self.labels = None if labels is None else labels[of_this_rank].to(self.images.device)
        self._classes = None if classes is None else classes[of_this_rank].to(self.images.device)
        self._range = (0, 0) if classes is None else (int(classes.min()), int(classes.max()))  # on all ranks
        anatomy = None if dense is None else _anatomy_in(dense)
        self._dense_holds_it = anatomy is not None and anatomy.model is not dense
        self._closeness: Closeness | None = None
        if dense is not None:
            says = partial(self._dense_output, dense)
            of_logits = inverse_link(labels) if _gives_logits(dense, partial(says, 0)) else None
            self._closeness = Closeness(self._num_batches, says, prediction, of_logits)
        # What is told of every model beside the metric's value.
        self._tells_kl = self._closeness is not None and self._closeness.is_divergence
        self._tells_top1 = classes is not None and (dense is None or self._tells_kl)
        variety = Variety()
        variety.look(self.images[:_LOOKED_AT])
        if variety.are_alike:
            variety.warn("held-out", "policies are judged on nothing that they could see")

    @property
    def _who(self) -> dict[str, Any]:
        return {"error": SearchError, "who": f"metric={self.metric!r}"}

    @property
    def _is_of_classes(self) -> bool:
        return self._name in ("accuracy", "loss")

    @property
    def _num_batches(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def judge(self, model: nn.Module) -> Judgement:
        """The metric of `model`, and whatever else one pass over the images tells.

        Ranks talk once, when all have seen their images: an error on one is an error on all of them.

        Raises:
            SearchError: its output is not what the metric needs.
            RankError: another rank failed.
        """
        sums = sum(gather(partial(self._sums_of_this_rank, model)))
        count, total, right, sigmoids, *errors = sums.tolist()  # type: ignore[union-attr]
        if count == sigmoids:
            raise SearchError(
                "metric='loss': the model's output is between 0 and 1 and no distribution over classes (a sigmoid?); "
                "pass prediction=, which makes probabilities of it, or a torchmetrics Metric"
            )
        distance = 0.0 if self._closeness is None else self._closeness.distance(torch.tensor(errors), count)
        value = total / count if self._is_of_classes else -distance
        if isinstance(self.metric, Metric):
            with self._computing(self.metric):
                value = float(self.metric.compute())  # of all ranks
            value = -value if self.metric.higher_is_better is False else value
        facts = {"accuracy": right / count} if self._tells_top1 and not math.isnan(right) else {}
        return Judgement(value, facts | ({"kl": distance} if self._tells_kl else {}))

    def _sums_of_this_rank(self, model: nn.Module) -> Tensor:
        """Images, the sum of their values, how many are right, how many seem to have been put through sigmoids, and
        their errors; float64, on the CPU. A torchmetrics metric has no value per image: it is updated."""
        sums = torch.zeros(4 + (0 if self._closeness is None else self._closeness.num_errors), dtype=torch.float64)
        anatomy = _anatomy_in(model)
        bare = anatomy if anatomy is not None and anatomy.model is model else None  # no module around it, with a head
        if self._is_of_classes and self.prediction is None and bare is not None and not bare.classifies:
            raise SearchError(
                f"metric={self.metric!r} needs classes, but what {type(model).__name__} puts out are features; pass "
                "metric='kl' with dense=, which compares outputs, or prediction=, which makes probabilities of them"
            )
        if self._dense_holds_it and bare is not None:
            raise SearchError(
                f"dense= is a module that holds the vision transformer, and what is judged is a {type(model).__name__} "
                "alone, whose output is another; pass the transformer itself as dense=, or judge within the module, as "
                "compress and the callback do by themselves"
            )
        if isinstance(self.metric, Metric):
            self.metric.to(self.images.device).reset()
        with torch.inference_mode(), evaluating(model):
            for number in range(self._num_batches):
                output = self._output(model, number)
                labels = None if self.labels is None else self.labels.split(self.batch_size)[number]
                images = len(self.images.split(self.batch_size)[number])
                sums[0] += images
                if self._closeness is not None:
                    sums[4:] += self._closeness.errors(number, output)
                if isinstance(self.metric, Metric):
                    self._update(self.metric, output, labels)
                if self._is_of_classes or self._tells_top1:
                    sums[1:3] += self._of_classes(output, number)
                if self._name == "loss" and self.prediction is None and _are_sigmoids(read(output)):
                    sums[3] += images  # logits of a few may be between 0 and 1, too
        return sums

    def _of_classes(self, output: Any, batch: int) -> Tensor:
        """Sum of the images' values by the metric, if it is of classes, and how many are right, NaN where that is not
        asked and nobody can say: (2,), float64, on the CPU."""
        assert self._classes is not None  # __init__ refuses it
        classes = self._classes.split(self.batch_size)[batch]
        try:
            found = log_probabilities(output, self.prediction, **self._who).to(classes.device)
            check_classes(*self._range, found.shape[1], otherwise=_OTHERWISE, **self._who)
            if len(found) != len(classes):
                raise SearchError(f"metric={self.metric!r}: {len(found)} predictions of {len(classes)} labelled images")
        except SearchError:
            if self._is_of_classes:
                raise
            return torch.tensor([0.0, math.nan], dtype=torch.float64)
        right = (found.argmax(dim=1) == classes).double()
        certain = found.gather(1, classes[:, None])[:, 0].double()
        values = certain if self._name == "loss" else right + certain.exp() / (self.num_images + 1)
        return torch.stack([values.sum(), right.sum()]).cpu()

    def _update(self, metric: Metric, output: Any, labels: Tensor | None) -> None:
        assert labels is not None  # __init__ refuses it
        found = read(output, self.prediction)
        with self._computing(metric):
            metric.update(found.to(labels.device).contiguous() if isinstance(found, Tensor) else found, labels)

    @contextmanager
    def _computing(self, metric: Metric) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            labels = self.labels
            assert labels is not None
            raise SearchError(
                f"metric={metric!r} cannot be computed of labels {tuple(labels.shape)} of {labels.dtype}, "
                f"{labels.min().item():g} to {labels.max().item():g}: {str(error).strip().partition(chr(10))[0]}; "
                + ("make labels integers, labels.long(), or " if labels.is_floating_point() else "")
                + "pass prediction=, which makes of the model's output what the metric reads, or another metric"
            ) from error

    def _dense_output(self, dense: nn.Module, batch: int) -> Any:
        with torch.inference_mode(), evaluating(dense):
            return self._output(dense, batch)

    def _output(self, model: nn.Module, batch: int) -> Any:
        images, parameter = self.images.split(self.batch_size)[batch], next(model.parameters(), self.images)
        images = images.to(parameter.device, parameter.dtype if images.is_floating_point() else None)
        return run_on(model, images)


class InPlace(Judge):
    """``evaluate`` for `search`: how close a module's output stays to its own, with a slim transformer in the place of
    its dense one. Of batches of any kind, without labels.

    Args:
        module: the module, on all ranks the same; left as it is.
        batches: of this rank, maybe none.
        run: what the module says about one of them.
        prediction: see `Closeness`.
        submodule: of the vision transformer in `module`, as an attribute path; None finds it if there is just one.

    Attributes:
        images: how many there are, over all ranks.
        seconds: what one pass of the dense module over its own batches took this rank.

    Raises:
        SearchError: there are no images, or outputs without float tensors.
    """

    metric = "kl"

    def __init__(
        self,
        module: nn.Module,
        batches: Sequence[Any],
        run: Callable[[nn.Module, Any], Any],
        prediction: Prediction | None = None,
        submodule: str | None = None,
    ) -> None:
        self.module, self.batches, self._run = module, batches, run
        self._dense = find_model(module, submodule)[1]
        self.images = sum(gather(lambda: sum(num_images(batch) or 0 for batch in batches)))
        if not self.images:
            raise SearchError("there are no held-out images to judge policies on; give batches of some")
        begun = time.perf_counter()
        says, anatomy = partial(self._output, self._dense), find_anatomy(self._dense)
        is_logits = bool(len(batches)) and gives_logits(anatomy, partial(says, 0))
        of_logits = inverse_link(labels_in(batches[0])) if is_logits else None
        self._closeness = Closeness(len(batches), says, prediction, of_logits)
        self.seconds = time.perf_counter() - begun

    def judge(self, model: nn.Module) -> Judgement:
        """Of the module with `model` in place; the dense one is at distance 0.

        Raises:
            SearchError: the output is of another form than the dense model's.
            RankError: another rank failed.
        """
        if model is self._dense:
            return Judgement(0.0)
        errors = sum(gather(partial(self._errors_of_this_rank, model)))
        distance = self._closeness.distance(torch.as_tensor(errors), self.images)
        return Judgement(-distance, {"kl": distance} if self._closeness.is_divergence else {})

    def _errors_of_this_rank(self, model: nn.Module) -> Tensor:
        errors = torch.zeros(self._closeness.num_errors, dtype=torch.float64)
        for batch in range(len(self.batches)):
            errors += self._closeness.errors(batch, self._output(model, batch))
        return errors

    def _output(self, model: nn.Module, batch: int) -> Any:
        """What the module says about a batch with `model` in place, which may be its own."""
        with standing_in(self.module, self._dense, model) as whole, running_as_written(whole):
            return self._run(whole, self.batches[batch])


@contextmanager
def running_as_written(module: nn.Module) -> Iterator[None]:
    """Inside, `module` is in eval mode and uncompiled, computes no gradients, and draws nothing that shows outside."""
    with torch.no_grad(), evaluating(module), probing(()), isolated_rng():
        yield


def _gives_logits(model: nn.Module, run: Callable[[], Any]) -> bool:
    """Whether what `run` makes `model` put out are logits; those of what holds no vision transformer are."""
    anatomy = _anatomy_in(model)
    return anatomy is None or gives_logits(anatomy, run)


def _anatomy_in(model: nn.Module) -> Anatomy | None:
    """Of the vision transformer in `model`, if there is one."""
    try:
        return find_anatomy(model)
    except UnsupportedModelError:
        return None


def _are_sigmoids(output: Tensor) -> bool:
    """Whether an output of which probabilities were to be made lies between 0 and 1."""
    return bool((output >= 0).all()) and bool((output <= 1).all()) and not are_probabilities(output)


def _classes(labels: Tensor | None, images: int, name: str | None) -> Tensor | None:
    """Class numbers of the images, (images,), if that is what the labels are. Floats are, for a metric by name, where
    they are whole."""
    if labels is None or (name is None and labels.is_floating_point()):
        return None
    try:
        return class_numbers(labels, images, error=SearchError, who="top-1", otherwise=_OTHERWISE)
    except SearchError:
        return None


def gathered(batches: Iterable[Any], max_images: int | None) -> tuple[Tensor, Tensor | None]:
    """The first `max_images` images (n, ...) and labels (n, ...) of the batches, or all. Labels that are no numbers are
    none.

    Raises:
        SearchError: there are none, or labels for some only; images of several sizes, or with NaN.
    """
    images: list[Tensor] = []
    labels: list[Tensor] = []
    count = 0
    if not isinstance(batches, Iterable):
        raise SearchError(f"batches is a {type(batches).__name__}: expected a DataLoader or a list of batches")
    for batch in batches:
        parts = batch if isinstance(batch, (tuple, list)) else (batch,)
        if not parts or not isinstance(parts[0], Tensor) or not parts[0].ndim:
            raise SearchError(
                f"batches of {type(batch).__name__}: expected (images, labels), tensors both; make such of others, "
                "e.g. [(batch['image'], batch['label']) for batch in loader]"
            )
        images.append(plain(parts[0]))
        if images[-1].shape[1:] != images[0].shape[1:]:
            raise SearchError(
                f"images of {tuple(images[-1].shape[1:])} after {tuple(images[0].shape[1:])}: held-out images are of "
                "one size; give them in one"
            )
        if images[-1].isnan().any():
            raise SearchError("held-out images hold NaN: every model would be worth NaN; look at what the loader gives")
        found = _numbers(parts[1]) if len(parts) > 1 else None
        if found is not None:
            if found.shape[:1] != images[-1].shape[:1]:
                raise SearchError(
                    f"labels of shape {tuple(found.shape)} for {len(images[-1])} images: held-out images have a label "
                    "each; judge others (bags, pairs) by an evaluate of your own"
                )
            labels.append(found)
        count += len(parts[0])
        if max_images is not None and count >= max_images:
            break
    if not count:
        raise SearchError("there are no held-out images to judge policies on; give batches of some")
    if labels and len(labels) != len(images):
        raise SearchError("some batches have labels and some have none; give all of them labels")
    return torch.cat(images)[:max_images], torch.cat(labels)[:max_images] if labels else None


def _numbers(labels: Any) -> Tensor | None:
    try:
        return plain(torch.as_tensor(labels))
    except (RuntimeError, TypeError, ValueError):  # names, boxes
        return None
