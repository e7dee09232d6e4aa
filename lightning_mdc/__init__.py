"""Multi-dimensional compression of vision transformers: heads, MLP neurons and tokens pruned jointly by dependence.

After Hou & Kung, "Multi-Dimensional Model Compression of Vision Transformer" (arXiv 2201.00043).
"""

from lightning_mdc import errors
from lightning_mdc.artifact import load, save
from lightning_mdc.budget import Budget, macs, plan_macs, policy_macs
from lightning_mdc.callback import MultiDimPruneCallback, plan_from_checkpoint
from lightning_mdc.distillation import DistillationModule
from lightning_mdc.importance import HSIC, Scores, make_plan, score
from lightning_mdc.importance.hsic import hsic
from lightning_mdc.policy import Plan, Policy
from lightning_mdc.surgery import masked, slim

__all__ = [
    "HSIC",
    "Budget",
    "DistillationModule",
    "MultiDimPruneCallback",
    "Plan",
    "Policy",
    "Scores",
    "errors",
    "hsic",
    "load",
    "macs",
    "make_plan",
    "masked",
    "plan_from_checkpoint",
    "plan_macs",
    "policy_macs",
    "save",
    "score",
    "slim",
]
