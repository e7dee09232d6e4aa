"""Multi-dimensional compression of vision transformers: heads, MLP neurons and tokens pruned jointly by dependence.

After Hou & Kung, "Multi-Dimensional Model Compression of Vision Transformer" (arXiv 2201.00043).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mdc import errors
    from lightning_mdc.artifact import load, save
    from lightning_mdc.budget import Budget, macs, plan_macs, policy_macs
    from lightning_mdc.callback import MultiDimPruneCallback, plan_from_checkpoint
    from lightning_mdc.distillation import DistillationModule
    from lightning_mdc.importance import HSIC, Scores, make_plan, score
    from lightning_mdc.importance.hsic import hsic
    from lightning_mdc.policy import Plan, Policy
    from lightning_mdc.policy_search.driver import SearchResult, Trial, search
    from lightning_mdc.policy_search.held_out import HeldOut
    from lightning_mdc.surgery import masked, slim

# Where each public name lives. Looked up when asked for: a Hydra sweep needs no more than `policy_search`, and starts
# without torch, also where there is none.
_HOMES = {
    "artifact": ("load", "save"),
    "budget": ("Budget", "macs", "plan_macs", "policy_macs"),
    "callback": ("MultiDimPruneCallback", "plan_from_checkpoint"),
    "distillation": ("DistillationModule",),
    "importance": ("HSIC", "Scores", "make_plan", "score"),
    "importance.hsic": ("hsic",),
    "policy": ("Plan", "Policy"),
    "policy_search.driver": ("SearchResult", "Trial", "search"),
    "policy_search.held_out": ("HeldOut",),
    "surgery": ("masked", "slim"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("data", "errors", "models", "policy_search", "reporting")

__all__ = [
    "HSIC",
    "Budget",
    "DistillationModule",
    "HeldOut",
    "MultiDimPruneCallback",
    "Plan",
    "Policy",
    "Scores",
    "SearchResult",
    "Trial",
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
    "search",
    "slim",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    elif name in _HOMES or name in _MODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
