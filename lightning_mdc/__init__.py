"""Multi-dimensional compression of vision transformers: heads, MLP neurons and tokens pruned jointly by dependence.

After Hou & Kung, "Multi-Dimensional Model Compression of Vision Transformer" (arXiv 2201.00043).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# ruff: noqa: F401 (what is imported is in __all__, by way of _HOMES)
if TYPE_CHECKING:
    from lightning_mdc import errors
    from lightning_mdc.artifact import load, save
    from lightning_mdc.budget import Budget, LatencyTable, macs, plan_macs, policy_macs
    from lightning_mdc.budget.uniform import uniform_policy
    from lightning_mdc.callback import MultiDimPruneCallback
    from lightning_mdc.checkpoint import plan_from_checkpoint
    from lightning_mdc.compression import Compressed, compress
    from lightning_mdc.distillation import DistillationModule, Teacher
    from lightning_mdc.distillation.healing import heal
    from lightning_mdc.distillation.weight_sharing import WeightSharingModule
    from lightning_mdc.export import export_model
    from lightning_mdc.importance import HSIC, Calibration, Moments, Scores, Taylor, score
    from lightning_mdc.importance.hsic import hsic
    from lightning_mdc.policy import Plan, Policy, Space, TokenOptions
    from lightning_mdc.policy_search.driver import SearchOptions, SearchResult, Trial, search
    from lightning_mdc.policy_search.held_out import HeldOut
    from lightning_mdc.surgery import make_plan, masked, slim

# Where each public name lives. Looked up when asked for: Hydra imports the sweeper, and with it this package, at every
# start of every app, which must not wait for torch.
_HOMES = {
    "artifact": ("load", "save"),
    "budget": ("Budget", "LatencyTable", "macs", "plan_macs", "policy_macs"),
    "budget.uniform": ("uniform_policy",),
    "callback": ("MultiDimPruneCallback",),
    "checkpoint": ("plan_from_checkpoint",),
    "compression": ("Compressed", "compress"),
    "distillation": ("DistillationModule", "Teacher"),
    "distillation.healing": ("heal",),
    "distillation.weight_sharing": ("WeightSharingModule",),
    "export": ("export_model",),
    "importance": ("HSIC", "Calibration", "Moments", "Scores", "Taylor", "score"),
    "importance.hsic": ("hsic",),
    "policy": ("Plan", "Policy", "Space", "TokenOptions"),
    "policy_search.driver": ("SearchOptions", "SearchResult", "Trial", "search"),
    "policy_search.held_out": ("HeldOut",),
    "surgery": ("make_plan", "masked", "slim"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("budget", "distillation", "errors", "figures", "importance", "models", "policy_search", "surgery", "tokens")

__all__ = ["errors", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
