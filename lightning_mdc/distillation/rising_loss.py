"""Says early that a training unlearns what its weights knew."""

from __future__ import annotations

from typing import Any

import lightning
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

# A mean over fewer batches would be chance.
_BATCHES = 20


def is_far_above(loss: float, start: float) -> bool:
    """Whether no chance of the first batch explains a mean `loss` that high; also if it is no number any more.

    Small losses double by chance, so half a nat is allowed on top: from 0.25 on 1.0 is far above. With ten classes and
    a network that has unlearnt them the loss is at least 2; a network that knows nothing begins there and falls.
    """
    return not loss <= 2 * start + 0.5


class RisingLossWarning(lightning.Callback):
    """Warns once, where the mean loss of 20 batches is far above that of the first batch; not in a resumed run."""

    def __init__(self) -> None:
        self.start: Tensor | None = None
        self.losses: list[Tensor] = []
        self.watches = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.watches = trainer.global_step == 0
        self.start, self.losses = None, []

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.watches:
            return
        self.losses.append(outputs["loss"] * trainer.accumulate_grad_batches)
        self.start = self.losses[0] if self.start is None else self.start
        if len(self.losses) < _BATCHES:  # without asking a GPU for a number in every step
            return
        loss, start = float(sum(self.losses) / _BATCHES), float(self.start)
        self.losses.clear()
        if is_far_above(loss, start):
            self.watches = False
            rank_zero_warn(
                f"the loss is {loss:.3g} (mean of {_BATCHES} batches) and was {start:.3g} in the first batch: this"
                f" training unlearns what the weights knew; lower optimizer lr={pl_module.optimizer_kwargs['lr']}, or"
                " leave optimizer out: the default is for weights that are trained already"
            )
