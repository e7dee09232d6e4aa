"""What is a vision transformer made of? One file per model family answers; everybody else asks here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_mdc.errors import UnsupportedModelError
from lightning_mdc.models.anatomy import Anatomy, Block, Counts, Family, Units, unit_channels
from lightning_mdc.models.compiled import is_compiled, probing, unwrap
from lightning_mdc.models.hf_swin import HfSwin
from lightning_mdc.models.hf_vit import HfViT
from lightning_mdc.models.logits import are_logits, gives_logits
from lightning_mdc.models.modes import evaluating
from lightning_mdc.models.outputs import Prediction, prediction_in
from lightning_mdc.models.parts import obstacles, uninitialised, unloaded
from lightning_mdc.models.places import called_instead, put_in_place, standing_in
from lightning_mdc.models.swapping import check_unmasked, is_masked, original_class, unmasked_classes
from lightning_mdc.models.t2t_vit import T2TViT
from lightning_mdc.models.timm_cait import TimmCait
from lightning_mdc.models.timm_eva import TimmEva
from lightning_mdc.models.timm_hiera import TimmHiera
from lightning_mdc.models.timm_hieradet import TimmHieraDet
from lightning_mdc.models.timm_hub import mdc_model
from lightning_mdc.models.timm_mlps import TimmMlps
from lightning_mdc.models.timm_naflex import TimmNaFlex
from lightning_mdc.models.timm_pit import TimmPiT
from lightning_mdc.models.timm_relpos import TimmRelPos
from lightning_mdc.models.timm_sam import TimmSAM
from lightning_mdc.models.timm_swin import TimmSwin
from lightning_mdc.models.timm_vit import TimmVisionTransformer
from lightning_mdc.models.torchvision_swin import TorchvisionSwin
from lightning_mdc.models.torchvision_vit import TorchvisionViT

__all__ = [
    "FAMILIES",
    "Anatomy",
    "Block",
    "Counts",
    "Family",
    "Prediction",
    "Units",
    "are_logits",
    "called_instead",
    "check_unmasked",
    "evaluating",
    "find_anatomy",
    "find_model",
    "find_whole",
    "gives_logits",
    "is_compiled",
    "is_masked",
    "mdc_model",
    "prediction_in",
    "probing",
    "put_in_place",
    "register",
    "runnable",
    "standing_in",
    "unit_channels",
    "unwrap",
]

log = logging.getLogger(__name__)

FAMILIES: list[Family] = []  # the first to accept a model has it
F = TypeVar("F", bound=Family)


def register(family: F) -> F:
    """Make a family known, ahead of those that are: its models are found in everything that takes a model.

    One of the same name takes the place of the one that is there.

    Raises:
        UnsupportedModelError: it is no instance of a `Family`.
    """
    if not isinstance(family, Family):
        raise UnsupportedModelError(f"family={family!r:.80}: expected an instance of a Family, such as MyFamily()")
    FAMILIES[:] = [family, *(other for other in FAMILIES if other.name != family.name)]
    return family


register(HfSwin())
register(HfViT())
register(TimmCait())
register(TimmEva())
register(TimmHiera())
register(TimmHieraDet())
register(TimmNaFlex())
register(TimmMlps())
register(TimmPiT())
register(TimmRelPos())
register(TimmSAM())
register(TimmSwin())
register(TimmVisionTransformer())
register(T2TViT())
register(TorchvisionSwin())
register(TorchvisionViT())


def find_anatomy(model: nn.Module, submodule: str | None = None) -> Anatomy:
    """The anatomy of the one vision transformer in `model` (itself, or anywhere inside); with masks on, without them.

    Raises:
        UnsupportedModelError: there is none, there are several and `submodule` does not say which, or none of its units
            can leave and no tokens have left.
    """
    _, transformer = find_model(model, submodule)
    with unmasked_classes(transformer):
        anatomy = _anatomy_of(transformer)
    if not anatomy.dimensions and not anatomy.stages:
        reason = next(iter(anatomy.reasons.values()))
        raise UnsupportedModelError(f"{anatomy.name}: {reason}. Dimensions that do work: none. {_supported()}")
    return anatomy


def _no_module(model: Any) -> str:
    """What was given instead of a model, and how it becomes one."""
    given, remedy = f"model={model!r:.80}", ""
    if isinstance(model, type):
        given, remedy = f"model={model.__name__} is a class", "; make a model of it first"
    elif isinstance(model, (str, PathLike)):
        remedy = (
            "; make the model first, as timm.create_model does of a name, or mdc.load of a folder that mdc.save wrote"
        )
    elif isinstance(model, Mapping):
        given = f"model={type(model).__name__} of {', '.join(map(str, list(model)[:3]))}, ..."
        remedy = "; build the model, and load these weights into it (load_state_dict)"
    elif isinstance(model, (list, tuple)):
        given, remedy = f"model={type(model).__name__} of {len(model)}", "; give them one by one"
    elif callable(model):
        remedy = "; if it makes the model, call it first"
    return f"{given}: expected a torch.nn.Module that is or holds a vision transformer{remedy}"


def _anatomy_of(transformer: nn.Module) -> Anatomy:
    name = original_class(transformer).__name__
    if (lazy := uninitialised(transformer)) is not None:
        raise UnsupportedModelError(
            f"{name}: {lazy} has no shape yet (a lazy module); call the model on a batch once, then it has"
        )
    family = next(family for family in FAMILIES if family.accepts(transformer))
    try:
        anatomy = family.anatomy(transformer)
    except (AttributeError, IndexError, StopIteration) as error:  # of a part that was taken away or put in its place
        raise UnsupportedModelError(
            f"{name}: a part of it is missing, or is not what its class makes there ({error}); put it back, or "
            "register a family that knows it (see docs/extending.md)"
        ) from error
    if not anatomy.depth:
        raise UnsupportedModelError(f"{name}: it has no blocks")
    return obstacles(anatomy)


def find_model(module: nn.Module, submodule: str | None = None) -> tuple[str, nn.Module]:
    """(attribute path, vision transformer) inside `module`; the path is ``""`` for the module itself.

    Compiled modules are seen through: the path names the attribute as its owner knows it, the model is the original.
    """
    if not isinstance(module, nn.Module):
        raise UnsupportedModelError(_no_module(module))
    if submodule is not None:
        return submodule, _at(module, submodule)
    candidates = _candidates(module)
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        listed = ", ".join(f"{p or '(itself)'} ({type(m).__name__})" for p, m in candidates)
        raise UnsupportedModelError(
            f"submodule=None, but {type(module).__name__} holds {len(candidates)} vision transformers: {listed}; "
            f"say which, e.g. submodule={candidates[0][0]!r}"
        )
    raise UnsupportedModelError(f"{_complaint(module)} {_supported()}")


def find_whole(module: nn.Module, submodule: str | None = None) -> tuple[str, nn.Module, Anatomy]:
    """(attribute path of the vision transformer, what is run, the transformer's anatomy): run is all of `module`, or
    the transformer alone where `submodule` names it, or `module` has no forward of its own, which is logged.

    Raises:
        UnsupportedModelError: see `find_anatomy`.
    """
    anatomy, whole = find_anatomy(module, submodule), unwrap(module)
    path, transformer = find_model(module, submodule)
    return path, transformer if submodule is not None else _callable(whole, path, transformer), anatomy


def runnable(module: nn.Module, submodule: str | None = None) -> nn.Module:
    """`module`, to be called on images; where it has no forward of its own, the vision transformer in it, which is
    logged.

    Raises:
        UnsupportedModelError: there is none, or it has no weights yet.
    """
    path, transformer = find_model(module, submodule)
    if (name := unloaded(module)) is not None:
        raise UnsupportedModelError(
            f"model={type(module).__name__}: {name} has no values yet (on the meta device); load its weights first"
        )
    return _callable(module, path, transformer)


def _callable(module: nn.Module, path: str, transformer: nn.Module) -> nn.Module:
    # torch's own, which a ModuleDict has, and Lightning's, which calls it.
    if unwrap(module).forward.__qualname__ not in ("_forward_unimplemented", "LightningModule.forward"):
        return module
    if len(list(module.parameters())) > len(list(transformer.parameters())):
        log.warning("%s has no forward: its vision transformer %s is taken alone", type(module).__name__, path)
    return transformer


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
    if not isinstance(path, str):
        raise UnsupportedModelError(
            f"submodule is a {type(path).__name__}: expected an attribute path, such as 'backbone.vit'"
        )
    current = unwrap(module)
    for step in path.split(".") if path else ():
        child = current._modules.get(step)
        if child is None:
            raise UnsupportedModelError(
                f"submodule={path!r}: {type(current).__name__} has no submodule {step!r}; it has "
                f"{', '.join(current._modules) or 'none'}"
            )
        current = unwrap(child)
    if not any(family.accepts(current) for family in FAMILIES):
        raise UnsupportedModelError(f"submodule={path!r}: {_complaint(current)} {_supported()}")
    return current


def _complaint(module: nn.Module) -> str:
    """Why nothing in `module` is supported: what a family says of the part that looks like its own, or the first part
    that looks like a transformer's."""
    owner = type(module).__name__
    if isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        how = "TorchScript" if isinstance(module, torch.jit.ScriptModule) else "torch.fx or torch.export"
        return (
            f"{owner} is what {how} made of a model, which has no layers to cut; prune the model it was made of, then "
            "make it again."
        )
    for name, child in module.named_modules():
        for family in FAMILIES:
            if (reason := family.refusal(unwrap(child))) is not None:
                where = f"{name} ({type(child).__name__})" if name else owner
                return f"{where}: {reason}. Dimensions that do work: none."
    for name, child in module.named_modules():
        kind = type(child).__name__
        if name and ("Attention" in kind or "Block" in kind):
            return (
                f"{owner} holds no supported vision transformer: {name} is a {type(child).__module__}.{kind} inside a "
                f"{owner}, which no family knows. Dimensions that do work: none."
            )
    return f"{owner} holds no supported vision transformer. Dimensions that do work: none."


def _supported() -> str:
    return "Supported: " + "; ".join(family.description for family in FAMILIES) + "."
