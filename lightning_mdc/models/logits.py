"""Are these logits? Only what a classifier that a family knows has said, and nothing has changed since."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_mdc.models.anatomy import Anatomy
from lightning_mdc.models.compiled import probing
from lightning_mdc.models.outputs import prediction_in


def are_logits(output: Any, said: Any) -> bool:
    """Whether `output` is what the classifying transformer has `said`: (images, 2 classes or more), maybe cast."""
    output, said = prediction_in(output), prediction_in(said)
    if not isinstance(output, Tensor) or not isinstance(said, Tensor) or output.shape != said.shape:
        return False
    if output.ndim != 2 or output.shape[1] < 2 or not output.is_floating_point():
        return False
    return output is said or torch.equal(output.to(said), said)


def gives_logits(anatomy: Anatomy, run: Callable[[], Any]) -> bool:
    """Whether what `run` gives are logits of the transformer's classifier; it is run once for that."""
    if not anatomy.classifies:
        return False
    said: list[Any] = [None]

    def hear(module: Any, args: Any, output: Any) -> None:
        said[0] = output

    with torch.no_grad(), probing([(anatomy.model.register_forward_hook, hear)]):
        output = run()
    return are_logits(output, said[0])
