"""Passes of our own through a module, of which its loggers and metrics hear nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torchmetrics import Metric


@contextmanager
def unlogged(trainer: Trainer, pl_module: nn.Module) -> Iterator[None]:
    """Inside, whatever `pl_module` logs, by ``self.log`` or on a logger of the Trainer, goes nowhere, and its metrics
    are as before after it: a forward that logs is no training step while we look at images.

    Around all that belongs together: passes that take turns would put back what the other one has put there.
    """
    modules = list(pl_module.modules())
    logging = [vars(module) for module in modules if isinstance(module, LightningModule)]
    before: list[dict[str, Any]] = [{name: own[name] for name in ("log", "log_dict") if name in own} for own in logging]
    metrics = [(module, _state(module)) for module in modules if isinstance(module, Metric)]
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    for own in logging:
        own.update(log=_nothing, log_dict=_nothing)
    try:
        yield
    finally:
        trainer.loggers = loggers
        for own, theirs in zip(logging, before, strict=True):
            del own["log"], own["log_dict"]
            own.update(theirs)
        for metric, state in metrics:
            for name, value in state.items():
                setattr(metric, name, value)


def _state(metric: Metric) -> dict[str, Any]:
    names = (*metric.metric_state, "_update_count", "_computed")
    return {name: copy.deepcopy(getattr(metric, name)) for name in names}


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In the place of ``LightningModule.log``."""
