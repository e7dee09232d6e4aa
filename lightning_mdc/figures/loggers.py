"""Lightning's loggers, each shown an item in its own way: `wandb_logger`, `tensorboard_logger`, `csv_logger`."""

from __future__ import annotations

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from lightning_mdc.distributed import is_first
from lightning_mdc.figures import csv_logger, tensorboard_logger, wandb_logger
from lightning_mdc.figures.items import Item


def show(logger: Logger, item: Item) -> bool:
    """Show `item` on a logger, such as one of ``trainer.loggers``; False if its class is none that is known here.

    Ranks other than 0 show nothing.
    """
    if not isinstance(logger, WandbLogger | TensorBoardLogger | CSVLogger):
        return False
    if not is_first():
        return True
    if isinstance(logger, WandbLogger):
        wandb_logger.show(logger.experiment, item)
    elif isinstance(logger, TensorBoardLogger):
        tensorboard_logger.show(logger.experiment, item)
    else:
        csv_logger.show(logger, item)
    return True
