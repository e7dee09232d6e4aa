"""How far a model's output is from the dense model's own: class probabilities by divergence, all else by squares."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mdc.distributed import gather
from lightning_mdc.errors import SearchError
from lightning_mdc.models import Prediction
from lightning_mdc.prediction import are_probabilities, float_leaves, read, softmax

# Bytes of the dense model's outputs that are remembered. What does not fit is computed anew for every model.
_MEMORY_LIMIT = 2**30


class Closeness:
    """The dense model's output on some batches, and how far other models' outputs are from it.

    Class probabilities are compared by KL(dense ‖ model) in nats, a mean over images. Everything else, which may be
    any nest of float tensors of any shape, by its squared error as a share of the tensor's variance, a mean over
    tensors. In a distributed run every rank has some of the batches, or none.

    Args:
        batches: how many this rank has.
        dense: the dense model's output on one of them, whatever mode the model is in; asked again for what does not fit
            into memory.
        prediction: makes of an output what is compared, as it is.
        of_logits: makes it of an output (images, classes) where there is no `prediction` and the output is logits; see
            `inverse_link`. None: nothing is made of it.

    Attributes:
        is_divergence: whether it is class probabilities that are compared.

    Raises:
        SearchError: an output without float tensors.
    """

    def __init__(
        self,
        batches: int,
        dense: Callable[[int], Any],
        prediction: Prediction | None = None,
        of_logits: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._dense, self._prediction, self._of_logits = dense, prediction, of_logits
        self._made: Callable[[Tensor], Tensor] | None = None  # what is made of an output's only tensor
        self._remembered: list[list[Tensor] | None] = []
        self.is_divergence = False
        looks = [look for look in gather(lambda: self._look(batches)) if look is not None]
        self.is_divergence = any(is_divergence for is_divergence, _ in looks)
        counts, sums, squares = torch.stack([sums for _, sums in looks]).sum(dim=0)
        self._variances = (squares - sums.square() / counts).clamp_min(1e-30)

    @property
    def num_errors(self) -> int:
        """How many numbers `errors` gives."""
        return 1 if self.is_divergence else len(self._variances)

    def errors(self, batch: int, output: Any) -> Tensor:
        """Summed over a batch: divergences (1,), or squared errors (tensors,); float64, on the CPU.

        Raises:
            SearchError: the output is of another form than the dense model's.
        """
        dense, found = self._of(batch), self._read(output)
        if [tensor.shape for tensor in dense] != [tensor.shape for tensor in found]:
            shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (found, dense)]
            raise SearchError(
                f"a slim model's output has tensors of shapes {shapes[0]}, the dense model's {shapes[1]}, which cannot "
                "be compared; pass prediction=, which makes the same of both, or an evaluate of your own"
            )
        return torch.stack([self._error(old.to(new.device), new) for old, new in zip(dense, found, strict=True)]).cpu()

    def distance(self, errors: Tensor, images: float) -> float:
        """Of so many images, from what `errors` gave for them, summed over batches and ranks; 0 for the dense model."""
        return float(errors[0] / images if self.is_divergence else (errors / self._variances).mean())

    def _look(self, batches: int) -> tuple[bool, Tensor] | None:
        """At the dense model's outputs: what they are; and how many values (row 0) their tensors have, their sums and
        their squares' sums, (3, tensors), float64."""
        total, left = None, float(_MEMORY_LIMIT)
        for batch in range(batches):
            output = self._dense(batch)
            if batch == 0:
                self._settle(output)
            tensors = self._read(output)
            left -= sum(tensor.nbytes for tensor in tensors)
            self._remembered.append(tensors if left >= 0 else None)
            # Squares of numbers far from 0 have no digits left in fp32 for what they vary by.
            facts = [(t.numel(), t.sum(dtype=torch.float64), t.double().square().sum()) for t in tensors]
            sums = torch.tensor(facts, dtype=torch.float64).T
            total = sums if total is None else total + sums
        return None if total is None else (self.is_divergence, total)

    def _of(self, batch: int) -> list[Tensor]:
        remembered = self._remembered[batch]
        return self._read(self._dense(batch)) if remembered is None else remembered

    def _settle(self, output: Any) -> None:
        """What is compared, by the dense model's first output."""
        tensors = float_tensors(read(output, self._prediction))
        if len(tensors) != 1 or tensors[0].ndim != 2 or tensors[0].shape[1] < 2:
            return
        if are_probabilities(tensors[0]):  # a softmax is built in, or `prediction` ends in one
            self._made = _log
        elif self._prediction is None and self._of_logits is not None:
            self._made = _log_softmax if self._of_logits is softmax else self._of_logits
        self.is_divergence = self._made in (_log, _log_softmax)

    def _read(self, output: Any) -> list[Tensor]:
        """What is compared of an output."""
        tensors = float_tensors(read(output, self._prediction))
        return tensors if self._made is None else [self._made(tensors[0])]

    def _error(self, dense: Tensor, found: Tensor) -> Tensor:
        if self.is_divergence:
            divergence = F.kl_div(found, dense, reduction="none", log_target=True)
            return divergence.masked_fill(dense == -math.inf, 0).sum().double()  # of a class that cannot be: nothing
        return (found - dense).square().sum(dtype=torch.float64)


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(1e-12).log()


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1)


def float_tensors(output: Any) -> list[Tensor]:
    """The float tensors in a model's output, any nest of them, in fp32.

    Raises:
        SearchError: there is none.
    """
    tensors = [tensor.float() for tensor in float_leaves(output)]
    if not tensors:
        raise SearchError(
            f"the model's output ({type(output).__name__}) holds no float tensor that could be compared with the dense "
            "model's; pass prediction=, a function that makes one of it, or an evaluate of your own"
        )
    return tensors
