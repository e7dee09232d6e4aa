"""Where are the heads, the neurons and the tokens? One adapter file per model family; everybody else asks here."""

from __future__ import annotations

from torch import nn

from lightning_mdc.errors import UnsupportedModelError
from lightning_mdc.models.compiled import hide_hooks, is_compiled, probing, show_hooks, unwrap
from lightning_mdc.models.masking import MaskHook, check_unmasked, is_masked
from lightning_mdc.models.modes import evaluating
from lightning_mdc.models.sites import (
    BlockSite,
    Counts,
    Family,
    Sites,
    UnitSite,
    unit_channels,
)
from lightning_mdc.models.t2t_vit import T2TViT
from lightning_mdc.models.timm_vit import TimmVisionTransformer

__all__ = [
    "FAMILIES",
    "BlockSite",
    "Counts",
    "Family",
    "MaskHook",
    "Sites",
    "UnitSite",
    "check_unmasked",
    "evaluating",
    "find_model",
    "find_sites",
    "hide_hooks",
    "is_compiled",
    "is_masked",
    "probing",
    "show_hooks",
    "unit_channels",
    "unwrap",
]

FAMILIES: tuple[Family, ...] = (T2TViT(), TimmVisionTransformer())  # the first to accept a model has it


def find_sites(model: nn.Module, path: str | None = None) -> Sites:
    """The sites of the one vision transformer in `model` (itself, or anywhere inside).

    Raises:
        UnsupportedModelError: there is none, there are several and `path` does not say which, or none of its units
            can leave.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"model={model!r:.80}: expected a torch.nn.Module that is or holds a vision transformer"
        )
    _, transformer = find_model(model, path)
    sites = next(family for family in FAMILIES if family.accepts(transformer)).sites(transformer)
    if not sites.dimensions:
        reason = next(iter(sites.reasons.values()))
        raise UnsupportedModelError(f"{sites.name}: {reason}. Dimensions that do work: none. {_supported()}")
    return sites


def find_model(module: nn.Module, path: str | None = None) -> tuple[str, nn.Module]:
    """(attribute path, vision transformer) inside `module`; the path is ``""`` for the module itself.

    Compiled modules are seen through: the path names the attribute as its owner knows it, the model is the original.
    """
    if path is not None:
        return path, _at(module, path)
    candidates = _candidates(module)
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        listed = ", ".join(f"{p or '(itself)'} ({type(m).__name__})" for p, m in candidates)
        raise UnsupportedModelError(
            f"model=None, but {type(module).__name__} holds {len(candidates)} vision transformers: {listed}; "
            f"say which, e.g. model={candidates[0][0]!r}"
        )
    raise UnsupportedModelError(f"{_complaint(module)} {_supported()}")


def _candidates(module: nn.Module) -> list[tuple[str, nn.Module]]:
    candidates: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()

    def visit(path: str, child: nn.Module) -> None:
        child = unwrap(child)
        if id(child) in seen:
            return
        seen.add(id(child))
        if any(family.accepts(child) for family in FAMILIES):
            candidates.append((path, child))
            return
        for name, grandchild in child.named_children():
            visit(f"{path}.{name}" if path else name, grandchild)

    visit("", module)
    return candidates


def _at(module: nn.Module, path: str) -> nn.Module:
    current = unwrap(module)
    for step in path.split(".") if path else ():
        child = current._modules.get(step)
        if child is None:
            raise UnsupportedModelError(
                f"model={path!r}: {type(current).__name__} has no submodule {step!r}; it has "
                f"{', '.join(current._modules) or 'none'}"
            )
        current = unwrap(child)
    if not any(family.accepts(current) for family in FAMILIES):
        raise UnsupportedModelError(f"model={path!r}: {_complaint(current)} {_supported()}")
    return current


def _complaint(module: nn.Module) -> str:
    """What is wrong with `module`, naming its first attention or block, for a message."""
    owner, reason = type(module).__name__, ""
    for name, child in module.named_modules():
        kind = type(child).__name__
        if name and ("Attention" in kind or "Block" in kind):
            reason = (
                f": {name} is a {type(child).__module__}.{kind} inside a {owner}, which no adapter knows (rotary or "
                "relative positions, windows and fused blocks tie units together)"
            )
            break
    return f"{owner} holds no supported vision transformer{reason}. Dimensions that do work: none."


def _supported() -> str:
    return "Supported: " + "; ".join(family.description for family in FAMILIES) + "."
