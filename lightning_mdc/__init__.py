"""Multi-dimensional compression of vision transformers: heads, MLP neurons and tokens pruned jointly by dependence.

After Hou & Kung, "Multi-Dimensional Model Compression of Vision Transformer" (arXiv 2201.00043).
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

    from lightning_mdc import errors
    from lightning_mdc.artifact import load, save
    from lightning_mdc.budget import Budget, LatencyTable, macs, plan_macs, policy_macs
    from lightning_mdc.callback import MultiDimPruneCallback, plan_from_checkpoint
    from lightning_mdc.distillation import DistillationModule
    from lightning_mdc.export import export_model
    from lightning_mdc.importance import HSIC, Scores, make_plan, score
    from lightning_mdc.importance.hsic import hsic
    from lightning_mdc.policy import Plan, Policy
    from lightning_mdc.policy_search.driver import SearchResult, Trial, search
    from lightning_mdc.policy_search.held_out import HeldOut
    from lightning_mdc.surgery import ActivationStatistics, masked, slim
    from lightning_mdc.weight_sharing import WeightSharingModule

# Where each public name lives. Looked up when asked for: a Hydra sweep needs no more than `policy_search`, and starts
# without torch, also where there is none.
_HOMES = {
    "artifact": ("load", "save"),
    "budget": ("Budget", "LatencyTable", "macs", "plan_macs", "policy_macs"),
    "callback": ("MultiDimPruneCallback", "plan_from_checkpoint"),
    "distillation": ("DistillationModule",),
    "export": ("export_model",),
    "importance": ("HSIC", "Scores", "make_plan", "score"),
    "importance.hsic": ("hsic",),
    "policy": ("Plan", "Policy"),
    "policy_search.driver": ("SearchResult", "Trial", "search"),
    "policy_search.held_out": ("HeldOut",),
    "surgery": ("ActivationStatistics", "masked", "slim"),
    "weight_sharing": ("WeightSharingModule",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("data", "errors", "models", "policy_search", "reporting")

__all__ = [
    "HSIC",
    "ActivationStatistics",
    "Budget",
    "DistillationModule",
    "HeldOut",
    "LatencyTable",
    "MultiDimPruneCallback",
    "Plan",
    "Policy",
    "Scores",
    "SearchResult",
    "Trial",
    "WeightSharingModule",
    "errors",
    "export_model",
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


class _WithTimm:
    """Puts our model families into timm's registry as soon as somebody imports timm.

    After ``import lightning_mdc`` timm's names have to include T2T-ViT, but to import timm here would import torch too:
    seconds at the start of every sweep, and no start at all where there is no torch.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((s for finder in others if (s := finder.find_spec(fullname, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                # Importing it registers. If it is what imports timm just now, it is left to come to that by itself.
                importlib.import_module(f"{__name__}.models")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "timm" in sys.modules:
    importlib.import_module(f"{__name__}.models")
else:
    sys.meta_path.insert(0, _WithTimm())
