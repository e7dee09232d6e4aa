"""Physical pruning: a new, smaller module with sliced Linear layers and built-in token stages."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import nn

from lightning_mdc.models import Sites, find_sites, unwrap
from lightning_mdc.policy import Plan
from lightning_mdc.surgery.compensation import ActivationStatistics, check_compensation, refit_consumer
from lightning_mdc.surgery.cutting import cut_units
from lightning_mdc.surgery.intermediates import guard_intermediates
from lightning_mdc.surgery.masks import remove_masks


def slim(
    model: nn.Module, plan: Plan, *, compensate: str = "none", statistics: ActivationStatistics | None = None
) -> nn.Module:
    """A physically smaller copy of the vision transformer in `model`, as `plan` says; the dense one is unchanged.

    The copy keeps class, state_dict keys, mode, device, dtype, requires_grad and ``pretrained_cfg``; a compiled model
    gives an ordinary copy. Its ``mdc_plan`` attribute holds the plan relative to the dense model.

    Args:
        model: a supported model or a module that holds one.
        plan: what is kept.
        compensate: ``"none"`` slices the weights. ``"lstsq"`` also refits, by least squares, each layer that reads
            heads or neurons: from the kept ones it then puts out what it put out from all, as nearly as it can. That
            costs nothing at run time.
        statistics: of `model`; needed by ``"lstsq"``.

    Raises:
        PlanError: the plan is for another model.
        CompensationError: `compensate` is unknown, or the statistics are missing or of another model.
        UnsupportedModelError: there is no supported vision transformer in `model`, or there are several; or a norm over
            the units stands in the way of compensation.
    """
    dense = find_sites(model)
    dense.check(plan)
    check_compensation(dense, compensate, statistics)
    copied = plain_copy(dense.model)
    sites = find_sites(copied)
    for dimension in ("heads", "neurons"):
        for index, (site, kept) in enumerate(zip(sites.units(dimension), getattr(plan, dimension), strict=True)):
            if statistics is not None:
                refit_consumer(site, kept, getattr(statistics, dimension)[index])
            cut_units(site, kept)
    for stage in plan.tokens:
        if stage.keep < 1:
            new = sites.family.token_stage_block(sites, stage.block, stage, plan.fuse)
            setattr(sites.container, str(stage.block), new)
    if plan.drops_tokens:
        guard_intermediates(copied)
    copied.mdc_plan = _since_dense(dense, plan)  # type: ignore[assignment]
    return copied


def plan_of(model: nn.Module) -> Plan | None:
    """The plan a slim model was made with, relative to its dense origin; None for a dense model."""
    plan = getattr(find_sites(model).model, "mdc_plan", None)
    return plan if isinstance(plan, Plan) else None


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy with nothing of it compiled or masked."""
    copied = copy.deepcopy(model)
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if unwrap(child) is not child:  # a block compiled by itself
                setattr(parent, name, unwrap(child))
    remove_masks(copied)
    return copied


def _since_dense(sites: Sites, plan: Plan) -> Plan:
    """`plan` with indices of the dense model, where `sites` is already slim."""
    before = getattr(sites.model, "mdc_plan", None)
    if not isinstance(before, Plan):
        return plan

    def compose(first: tuple[tuple[int, ...], ...], then: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(a[i] for i in b) for a, b in zip(first, then, strict=True))

    dropping = before if before.drops_tokens else plan  # not both: Sites.check has refused that
    heads, neurons = compose(before.heads, plan.heads), compose(before.neurons, plan.neurons)
    return replace(before, heads=heads, neurons=neurons, tokens=dropping.tokens, fuse=dropping.fuse)
