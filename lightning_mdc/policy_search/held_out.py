"""What a policy is worth: a slim model's predictions on held-out training images, which are prepared once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_mdc.distributed import rank, summed, world_size
from lightning_mdc.errors import SearchError, check_whole
from lightning_mdc.models import evaluating

METRICS = ("accuracy", "loss", "kl")
# A trial is not judged on fewer images: a variance estimated from less says little.
_FEWEST = 100


@dataclass(frozen=True)
class Judgement:
    """What one pass over the held-out images says of a model.

    Attributes:
        value: of the metric, higher is better.
        stopped: it was given up before all images were seen; value and facts are of those that were.
        facts: what else the same predictions tell, whatever the metric: ``"accuracy"``, the top-1 as a fraction, if
            there are labels; ``"kl"``, the mean KL(dense ‖ model) in nats, if there is a dense model.
    """

    value: float
    stopped: bool = False
    facts: Mapping[str, float] = field(default_factory=dict)


class HeldOut:
    """``evaluate`` for `search`: a slim model in, a number out, higher is better.

    The images are decoded and moved once, and visited in a random but fixed order. In a distributed run every rank
    takes its share of the images, and all get the same number.

    Args:
        batches: ``(images, labels)`` batches, as a DataLoader yields them, on every rank the same. Use a held-out part
            of the *training* data: what the policy is chosen on cannot be reported.
        metric: ``"accuracy"``: top-1, ties broken by the mean probability of the true class, which counts for less than
            one image. ``"loss"``: minus the cross-entropy. ``"kl"``: minus KL(dense ‖ slim), for which labels do not
            matter. Or a torchmetrics `Metric` of (predictions, labels), negated if lower is better.
        dense: the dense model, for ``"kl"``, as metric or fact; looked at once, here.
        batch_size: images per forward pass.
        device: where to; None: where the first batch is.
        max_images: use the first so many.
        seed: of the order.

    Raises:
        SearchError: no images, no labels where they are needed, or an unknown metric.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        metric: str | Metric = "accuracy",
        *,
        dense: nn.Module | None = None,
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
        if name == "kl" and dense is None:
            raise SearchError("metric='kl' compares with the dense model; pass dense=")
        check_whole("max_images", max_images, 1, SearchError, or_none="all")
        images, labels = gathered(batches, max_images)
        if labels is None and name != "kl":
            raise SearchError(f"metric={metric!r} needs labels; batches must be (images, labels)")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        ranks = world_size()
        mine = order[rank() :: ranks]
        self.metric, self.batch_size, self.num_images = metric, batch_size, len(images)
        self._batches = math.ceil(math.ceil(len(images) / ranks) / batch_size)  # of the rank with most images
        self.images = images[mine].to(device or images.device)
        self.labels = None if labels is None else labels[mine].to(self.images.device)
        if name is not None and self.labels is not None:
            self.labels = self.labels.long()
        classes = self.labels is not None and self.labels.ndim == 1 and not self.labels.is_floating_point()
        # What is told of every model beside the metric's value.
        self._facts = ("accuracy",) * classes + ("kl",) * (dense is not None)
        self._dense: Tensor | None = None
        if dense is not None:
            self._dense = torch.cat(list(self._log_probabilities(dense)))

    def __call__(self, model: nn.Module) -> float:
        """The metric of `model` on all images."""
        return self.judge(model).value

    def judge(self, model: nn.Module, best: float | None = None, confidence: float = 0.99) -> Judgement:
        """The metric of `model`, and whatever else one pass over the images tells.

        With `best`, a model is given up as soon as the images seen say, with this confidence, that it will not come up
        to it; its value is then an estimate. The bound is Student's for the mean of a sample drawn without replacement,
        at a level shared out over all looks, so a trial that would have won is given up with a chance of at most
        ``1 - confidence``.

        Raises:
            SearchError: with a torchmetrics metric, which cannot be judged image by image.
        """
        if isinstance(self.metric, Metric):
            if best is not None:
                raise SearchError(f"early_stop: {type(self.metric).__name__} has no value per image; use {METRICS}")
            return self._of_metric(model, self.metric)
        # Images, their values, squares, and each fact.
        sums = torch.zeros(3 + len(self._facts), dtype=torch.float64)
        looks = self._batches - 1
        batches = enumerate(self._log_probabilities(model))
        for look in range(self._batches):
            # A rank with an image less may have a batch less: it looks all the same, so that all look as often.
            for number, log_probabilities in itertools.islice(batches, 1):
                sums += self._summed_up(number, log_probabilities)
            if best is not None and look < looks:
                together = summed(sums)
                if self._is_hopeless(together, best, (1 - confidence) / looks):
                    return self._judgement(together, stopped=True)
        return self._judgement(summed(sums), stopped=False)

    def accuracy(self, value: float) -> float:
        """The top-1 in a value of metric ``"accuracy"``, without what breaks ties."""
        return math.floor(value * self.num_images + 1e-9) / self.num_images

    def _is_hopeless(self, sums: Tensor, best: float, risk: float) -> bool:
        count, total, squares = sums[:3].tolist()
        if count < _FEWEST or count >= self.num_images:
            return False
        mean = total / count
        variance = max(0.0, squares / count - mean * mean) * count / (count - 1)
        if self.metric == "accuracy":  # all seen right, or all wrong, does not make the rest certain
            variance = max(variance, 1 / count)
        unseen = 1 - count / self.num_images
        bound = float(stats.t.isf(risk, count - 1)) * math.sqrt(variance / count * unseen)
        return mean + bound < best

    def _summed_up(self, number: int, log_probabilities: Tensor) -> Tensor:
        """Of batch `number`: images, the sum of their values, of the squares, of each fact; float64, on the CPU."""
        part = slice(number * self.batch_size, (number + 1) * self.batch_size)
        facts = self._facts_by_image(part, log_probabilities)
        if self.metric == "kl":
            values = -facts["kl"]
        else:
            assert self.labels is not None
            values = log_probabilities.gather(1, self.labels[part, None])[:, 0].double()
            if self.metric == "accuracy":
                values = facts["accuracy"] + values.exp() / (self.num_images + 1)
        sums = [values.sum(), values.square().sum(), *(by_image.sum() for by_image in facts.values())]
        return torch.stack([values.new_tensor(len(values)), *sums]).cpu()

    def _facts_by_image(self, part: slice, log_probabilities: Tensor) -> dict[str, Tensor]:
        """Each fact about every image of a batch, float64 (batch,)."""
        known = {}
        if "accuracy" in self._facts and self.labels is not None:
            known["accuracy"] = (log_probabilities.argmax(dim=1) == self.labels[part]).double()
        if self._dense is not None:
            dense = self._dense[part]
            known["kl"] = F.kl_div(log_probabilities, dense, reduction="none", log_target=True).sum(dim=1).double()
        return known

    def _judgement(self, sums: Tensor, stopped: bool) -> Judgement:
        count, total, _, *facts = sums.tolist()
        named = {name: fact / count for name, fact in zip(self._facts, facts, strict=True)}
        return Judgement(total / count, stopped, named)

    def _log_probabilities(self, model: nn.Module) -> Iterator[Tensor]:
        with torch.inference_mode(), evaluating(model):
            parameter = next(model.parameters(), self.images)
            for images in self.images.split(self.batch_size):
                images = images.to(parameter.device, parameter.dtype if images.is_floating_point() else None)
                yield F.log_softmax(model(images).float(), dim=-1).to(self.images.device)

    def _of_metric(self, model: nn.Module, metric: Metric) -> Judgement:
        assert self.labels is not None
        metric = metric.to(self.images.device)
        metric.reset()
        facts = torch.zeros(1 + len(self._facts), dtype=torch.float64)  # images, then each fact
        for number, log_probabilities in enumerate(self._log_probabilities(model)):
            part = slice(number * self.batch_size, (number + 1) * self.batch_size)
            metric.update(log_probabilities.exp(), self.labels[part])
            by_image = self._facts_by_image(part, log_probabilities).values()
            facts += torch.tensor([len(log_probabilities), *(each.sum() for each in by_image)], dtype=torch.float64)
        count, *totals = summed(facts).tolist()
        value = float(metric.compute())
        value = -value if metric.higher_is_better is False else value
        return Judgement(value, facts={name: fact / count for name, fact in zip(self._facts, totals, strict=True)})


def gathered(batches: Iterable[Any], max_images: int | None) -> tuple[Tensor, Tensor | None]:
    """The first `max_images` images (n, ...) and labels (n,) of the batches, or all.

    Raises:
        SearchError: there are none, or labels for some only.
    """
    images: list[Tensor] = []
    labels: list[Tensor] = []
    count = 0
    for batch in batches:
        parts = batch if isinstance(batch, (tuple, list)) else (batch,)
        if not isinstance(parts[0], Tensor):
            raise SearchError(f"batches of {type(batch).__name__}: expected (images, labels), tensors both")
        images.append(parts[0])
        if len(parts) > 1:
            labels.append(torch.as_tensor(parts[1]))
        count += len(parts[0])
        if max_images is not None and count >= max_images:
            break
    if not count:
        raise SearchError("there are no held-out images to judge policies on; give batches of some")
    if labels and len(labels) != len(images):
        raise SearchError("some batches have labels and some have none; give all of them labels")
    return torch.cat(images)[:max_images], torch.cat(labels)[:max_images] if labels else None
