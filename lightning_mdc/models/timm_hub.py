"""Saved models as timm's hub has them: the layout of ``config.json``, and the entrypoint that timm finds there.

``timm.create_model("local-dir:FOLDER")``, or ``"hf-hub:NAME"``, looks the name ``architecture`` up in timm's registry
and calls what it finds with ``model_args``, here the recipe of the model. Importing this file registers our name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from timm.models import register_model
from torch import nn

from lightning_mdc.models.anatomy import Anatomy, Family
from lightning_mdc.policy import Plan
from lightning_mdc.weights import classifiers_of

ENTRYPOINT = "mdc_model"
RECIPE = ("family", "constructor", "plan")  # a model without its weights; no plan: a dense one
# What timm's layout has beside ``pretrained_cfg``, which ours has too.
FIELDS = ("architecture", "num_classes", "num_features", "global_pool", "model_args")
LABELS = ("label_names", "label_descriptions")  # in the file beside pretrained_cfg, once read inside it; if known


@register_model
def mdc_model(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A model of a folder that `mdc.save` wrote or timm's ``push_to_hf_hub`` uploaded: `lightning_mdc.hub.create`."""
    # By name, when it is asked for: who makes models slim asks this package what they are made of.
    return import_module("lightning_mdc.hub").create(pretrained, **kwargs)


def is_timms(model: nn.Module) -> bool:
    """Whether this is one of timm's models, or of a class derived from one."""
    return any(kind.__module__.startswith("timm.models.") for kind in type(model).__mro__)


def as_timm_writes_it(anatomy: Anatomy, recipe: Mapping[str, Any], cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of timm's layout; `cfg` is what is known of ``pretrained_cfg``, of the model or of one it comes from.

    What timm makes a model's head and its images by are those that the model has now.
    """
    model: Any = anatomy.model
    of_weights = {key: value for key, value in cfg.items() if key not in ("architecture", "num_classes", *LABELS)}
    if tuple(cfg.get("input_size", anatomy.input_size)) != anatomy.input_size:  # these are for another size
        of_weights = {key: value for key, value in of_weights.items() if key not in ("test_input_size", "pool_size")}
    made_for_a_size = "img_size" in ((recipe["constructor"] or {}).get("args") or {})  # else timm has none to hand over
    heads = [name.removesuffix(".") for name in classifiers_of(model)]
    pool = getattr(model, "global_pool", None)
    return {
        "architecture": ENTRYPOINT,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": pool if isinstance(pool, str) else None,
        "model_args": dict(recipe),
        "pretrained_cfg": {
            "classifier": heads[0] if len(heads) == 1 else heads,
            "fixed_input_size": made_for_a_size and not getattr(model, "dynamic_img_size", False),
            **of_weights,
            "input_size": list(anatomy.input_size),
        },
        **{key: cfg[key] for key in LABELS if key in cfg},
    }


def described(anatomy: Anatomy, plan: Plan | None) -> dict[str, Any]:
    """Constructor arguments of the dense model that became this one by `plan`; as `Family.describe`."""
    sizes = (anatomy if plan is None else plan).sizes
    # Through JSON and back, as a reader will see it.
    spec: dict[str, Any] = json.loads(json.dumps(anatomy.family.describe(anatomy.model, sizes)))
    return spec


def recipe(family: Family, constructor: Mapping[str, Any] | None, plan: Plan | None) -> dict[str, Any]:
    """What a model can be made of again, as JSON."""
    values = (family.name, constructor, None if plan is None else json.loads(plan.to_json()))
    return dict(zip(RECIPE, values, strict=True))


def make_known(anatomy: Anatomy, plan: Plan | None) -> None:
    """Let timm's ``push_to_hf_hub`` upload a model of timm's as what it is, and no longer as the dense one."""
    model: Any = anatomy.model
    try:
        constructor = described(anatomy, plan)
    except Exception:  # a part that a constructor cannot make may fail in any way; `create` will say that there is none
        constructor = None
    model._model_args = recipe(anatomy.family, constructor, plan)
    cfg = getattr(model, "pretrained_cfg", None)
    if isinstance(cfg, Mapping) and "architecture" in cfg:
        model.pretrained_cfg = model.default_cfg = {**cfg, "architecture": ENTRYPOINT}
