"""Multiply-accumulates ("FLOPs" in this literature): as a cost, and of models, policies and plans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_mdc.budget.cost_model import CostModel, InputSize, Kept, image_size
from lightning_mdc.budget.costs import Cost, register
from lightning_mdc.errors import UnsupportedModelError
from lightning_mdc.models import find_anatomy, find_whole
from lightning_mdc.models.swapping import plain_copy
from lightning_mdc.models.timm_vit import counted_macs
from lightning_mdc.policy import Plan, Policy, TokenOptions


class Macs(Cost):
    """MACs of one image."""

    name = "macs"

    def price(self, costs: CostModel, kept: Kept, options: Mapping[str, Any]) -> Any:
        return costs.macs(kept)


register(Macs())


def macs(model: nn.Module, input_size: InputSize | None = None, submodule: str | None = None) -> int:
    """Multiply-accumulates of one image through `model` (dense or slim), all of it counted.

    Equals ``FlopCounterMode().get_total_flops() / 2`` in eval mode. A module that is more than its vision transformer
    is counted by running it on one image, on the meta device; with `submodule`, the attribute path of the transformer,
    that alone is. What budgets, policies and plans are about is the transformer alone, always.

    `input_size` is a side, (height, width) or (channels, height, width) in pixels; None means the model's own. Masks
    cost nothing and save nothing: with them on, a model counts as without.

    Raises:
        UnsupportedModelError: no family knows the model, it cannot take that input size, or a module around it cannot
            be run on images alone.
    """
    path, whole, anatomy = find_whole(model, submodule)
    costs = CostModel(anatomy, image_size(input_size))
    if whole is anatomy.model:
        return costs.of_model()
    shape = (1, anatomy.input_size[0], *costs.size)
    try:
        return counted_macs(plain_copy(whole).to("meta"), shape, type(whole).__name__)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{error}; pass submodule={path!r} to count its vision transformer alone"
        ) from error


def policy_macs(
    model: nn.Module,
    policy: Policy,
    tokens: TokenOptions | None = None,
    input_size: InputSize | None = None,
    submodule: str | None = None,
) -> int:
    """MACs of the slim model that `policy` makes of the vision transformer in `model`, without making it. See `macs`.

    Raises:
        PolicyError: the policy does not fit the model.
    """
    costs = CostModel(find_anatomy(model, submodule), image_size(input_size))
    return int(costs.macs(costs.kept_by(policy, tokens)))


def plan_macs(model: nn.Module, plan: Plan, input_size: InputSize | None = None, submodule: str | None = None) -> int:
    """MACs of the slim model that `plan` makes of the dense transformer in `model`, without making it. See `macs`.

    Raises:
        PlanError: the plan is for another model.
    """
    anatomy = find_anatomy(model, submodule)
    anatomy.check(plan)
    return CostModel(anatomy, image_size(input_size)).of_plan(plan)
