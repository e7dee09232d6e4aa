"""What a policy is worth: a slim model's predictions on held-out training images, which are prepared once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_mdc.distributed import gather, on_every_rank, rank, world_size
from lightning_mdc.errors import SearchError, check_whole
from lightning_mdc.models import check_unmasked, evaluating

METRICS = ("accuracy", "loss", "kl")


@dataclass(frozen=True)
class Judgement:
    """What one pass over the held-out images says of a model.

    Attributes:
        value: of the metric, higher is better.
        facts: what else the same predictions tell, whatever the metric: ``"accuracy"``, the top-1 as a fraction, if
            there are labels; ``"kl"``, the mean KL(dense ‖ model) in nats, if there is a dense model.
    """

    value: float
    facts: Mapping[str, float] = field(default_factory=dict)


class HeldOut:
    """``evaluate`` for `search`: a slim model in, a number out, higher is better.

    The images are decoded and moved once, and visited in a random but fixed order. In a distributed run every rank
    makes one, looks at its part of the images, and all get the same number.

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
        SearchError: no images, no labels where they are needed, an unknown metric, or a dense model with masks on.
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
        if dense is not None:
            consequence = "policies would be compared with the pruned model"
            check_unmasked(dense, SearchError, consequence, "take the masks off, by remove_masks(model)")
        check_whole("max_images", max_images, 1, SearchError, or_none="all")
        images, labels = gathered(batches, max_images)
        if labels is None and name != "kl":
            raise SearchError(f"metric={metric!r} needs labels; batches must be (images, labels)")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        of_this_rank = order[rank() :: world_size()]
        self.metric, self.batch_size, self.num_images = metric, batch_size, len(images)
        self.images = images[of_this_rank].to(device or images.device)
        self.labels = None if labels is None else labels[of_this_rank].to(self.images.device)
        if name is not None and self.labels is not None:
            self.labels = self.labels.long()
        classes = self.labels is not None and self.labels.ndim == 1 and not self.labels.is_floating_point()
        # What is told of every model beside the metric's value.
        self._facts = ("accuracy",) * classes + ("kl",) * (dense is not None)
        self._dense: Tensor | None = None
        if dense is not None:
            self._dense = on_every_rank(lambda: torch.cat(list(self._log_probabilities(dense))))

    def __call__(self, model: nn.Module) -> float:
        """The metric of `model` on all images."""
        return self.judge(model).value

    def judge(self, model: nn.Module) -> Judgement:
        """The metric of `model`, and whatever else one pass over the images tells.

        Ranks talk once, when all have seen their images: an error on one is an error on all of them.

        Raises:
            RankError: another rank failed.
        """
        count, total, *facts = torch.stack(gather(partial(self._sums_of_this_rank, model))).sum(dim=0).tolist()
        value = total / count
        if isinstance(self.metric, Metric):
            value = float(self.metric.compute())  # of all ranks
            value = -value if self.metric.higher_is_better is False else value
        return Judgement(value, {name: fact / count for name, fact in zip(self._facts, facts, strict=True)})

    def _sums_of_this_rank(self, model: nn.Module) -> Tensor:
        """Images, the sum of their values, of each fact; (2 + facts,), float64, on the CPU. A torchmetrics metric has
        no value per image: it is updated.
        """
        sums = torch.zeros(2 + len(self._facts), dtype=torch.float64)
        if isinstance(self.metric, Metric):
            self.metric.to(self.images.device).reset()
        for number, log_probabilities in enumerate(self._log_probabilities(model)):
            part = slice(number * self.batch_size, (number + 1) * self.batch_size)
            facts = self._facts_by_image(part, log_probabilities)
            if isinstance(self.metric, Metric):
                assert self.labels is not None  # __init__ refuses it
                self.metric.update(log_probabilities.exp(), self.labels[part])
                values = log_probabilities.new_zeros(len(log_probabilities), dtype=torch.float64)
            else:
                values = self._values_by_image(part, log_probabilities, facts)
            by_image = (torch.ones_like(values), values, *facts.values())
            sums += torch.stack([each.sum() for each in by_image]).cpu()
        return sums

    def _values_by_image(self, part: slice, log_probabilities: Tensor, facts: Mapping[str, Tensor]) -> Tensor:
        """The metric of every image of a batch, float64 (batch,)."""
        if self.metric == "kl":
            return -facts["kl"]
        assert self.labels is not None
        values = log_probabilities.gather(1, self.labels[part, None])[:, 0].double()
        return facts["accuracy"] + values.exp() / (self.num_images + 1) if self.metric == "accuracy" else values

    def _facts_by_image(self, part: slice, log_probabilities: Tensor) -> dict[str, Tensor]:
        """Each fact about every image of a batch, float64 (batch,)."""
        facts = {}
        if "accuracy" in self._facts and self.labels is not None:
            facts["accuracy"] = (log_probabilities.argmax(dim=1) == self.labels[part]).double()
        if self._dense is not None:
            dense = self._dense[part]
            facts["kl"] = F.kl_div(log_probabilities, dense, reduction="none", log_target=True).sum(dim=1).double()
        return facts

    def _log_probabilities(self, model: nn.Module) -> Iterator[Tensor]:
        with torch.inference_mode(), evaluating(model):
            parameter = next(model.parameters(), self.images)
            for images in self.images.split(self.batch_size):
                images = images.to(parameter.device, parameter.dtype if images.is_floating_point() else None)
                yield F.log_softmax(model(images).float(), dim=-1).to(self.images.device)


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
