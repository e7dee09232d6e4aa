"""Training a student under a frozen teacher; with no teacher, plain supervised training."""

from lightning_mdc.distillation.module import DistillationModule
from lightning_mdc.distillation.teacher import check_teacher

__all__ = ["DistillationModule", "check_teacher"]
