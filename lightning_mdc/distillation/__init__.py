"""Training a student under a frozen teacher; with no teacher, plain supervised training."""

from lightning_mdc.distillation.losses import hard_distillation_loss, hidden_state_loss, soft_distillation_loss
from lightning_mdc.distillation.module import DistillationModule
from lightning_mdc.distillation.optimization import DEFAULT_OPTIMIZER, DEFAULT_SCHEDULE
from lightning_mdc.distillation.teacher import FrozenTeacher, check_teacher

__all__ = [
    "DEFAULT_OPTIMIZER",
    "DEFAULT_SCHEDULE",
    "DistillationModule",
    "FrozenTeacher",
    "check_teacher",
    "hard_distillation_loss",
    "hidden_state_loss",
    "soft_distillation_loss",
]
