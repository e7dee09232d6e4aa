"""Training a student under a frozen teacher; with no teacher, plain supervised training."""

from lightning_mdc.distillation.module import DistillationModule
from lightning_mdc.distillation.teacher import Teacher

__all__ = ["DistillationModule", "Teacher"]
