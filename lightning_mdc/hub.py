"""Saved models by `timm.create_model`: slim ones of timm's families, and dense ones that came by `mdc.save`.

timm reads ``config.json`` and the weights, drops the head of another number of classes, adapts the first layer and the
positions; what is ours is the model in between, from a recipe that is trusted no more than by `mdc.load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg
from torch import Tensor, nn

from lightning_mdc.artifact import WEIGHTS, read_header, read_plan, rebuilt
from lightning_mdc.errors import ArtifactError
from lightning_mdc.models import FAMILIES
from lightning_mdc.models.timm_hub import ENTRYPOINT, RECIPE
from lightning_mdc.surgery import slim
from lightning_mdc.weights import adapted


def create(pretrained: bool = False, *, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
    """What timm's registry has as ``mdc_model``: the model of a recipe, with fresh weights or the `pretrained` ones.

    Args:
        pretrained_cfg: what timm knows of images and weights, and where these are.
        kwargs: the recipe (``family``, ``constructor``, ``plan``), timm's own, and arguments of the model that are to
            be others than the saved ones, such as ``num_classes``, ``in_chans``, ``img_size`` or ``drop_path_rate``.

    Raises:
        ArtifactError: the recipe is none, damaged or hostile, or the model has no such argument.
    """
    recipe = {name: kwargs.pop(name, None) for name in RECIPE}
    if recipe["constructor"] is None:
        raise ArtifactError(
            f"{ENTRYPOINT} builds what is saved with a constructor, and here is none; give the folder or repository of "
            "such a model: timm.create_model('local-dir:FOLDER', pretrained=True)"
        )
    cfg = (
        dict(pretrained_cfg if isinstance(pretrained_cfg, Mapping) else vars(pretrained_cfg)) if pretrained_cfg else {}
    )
    folder = Path(cfg.get("file") or cfg.get("hf_hub_id") or "model_args")  # of the hub: as people call it, no path
    # Nothing is allocated until it is known to be right.
    plan = read_plan(recipe)
    shapes = read_header(folder / WEIGHTS) if cfg.get("file") and (folder / WEIGHTS).is_file() else None
    rebuilt(recipe, plan, shapes, folder)
    args = recipe["constructor"].get("args", {})
    size = (args.get("in_chans", 3), *_sides(args.get("img_size", 224)))
    return build_model_with_cfg(
        partial(_fresh, recipe, plan),
        ENTRYPOINT,
        pretrained,
        # Without these timm takes images and classes to be ImageNet's.
        pretrained_cfg={"input_size": size, "num_classes": args.get("num_classes", 0)} | cfg,
        pretrained_filter_fn=_filtered,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )


def _fresh(recipe: Mapping[str, Any], plan: Any, *, device: Any = None, dtype: Any = None, **others: Any) -> nn.Module:
    """The model of a recipe with fresh weights, made with `others` in the place of saved arguments."""
    args = recipe["constructor"].get("args", {})
    if unknown := sorted(set(others) - set(args)):
        raise ArtifactError(
            f"{unknown[0]}={others[unknown[0]]!r:.80}: this {recipe['family']} is saved without such an argument; it "
            f"has {', '.join(args)}"
        )
    given = {name: list(_sides(value)) if name == "img_size" else value for name, value in others.items()}
    family = next(family for family in FAMILIES if family.name == recipe["family"])
    model = family.build({**recipe["constructor"], "args": args | given})
    return (model if plan is None else slim(model, plan)).to(device=device, dtype=dtype)


def _sides(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _filtered(tensors: dict[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    return adapted(model, tensors, model.state_dict())
