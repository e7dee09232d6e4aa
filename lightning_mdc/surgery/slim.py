"""Physical pruning: a new, smaller module with sliced Linear layers and built-in token stages."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from lightning_mdc.errors import CompensationError, check_one_of
from lightning_mdc.importance.moments import Moments
from lightning_mdc.importance.ridge import RIDGES
from lightning_mdc.importance.scoring import on_device_of, run_on, split_batch
from lightning_mdc.models import Anatomy, called_instead, evaluating, find_anatomy, runnable, standing_in
from lightning_mdc.models.swapping import check_unmasked, cut_units, plain_copy, with_mixins
from lightning_mdc.models.timm_hub import is_timms, make_known
from lightning_mdc.policy import ByDimension, Plan
from lightning_mdc.randomness import isolated_rng
from lightning_mdc.surgery.compensation import check_compensation, refit_readers
from lightning_mdc.surgery.lockstep import together
from lightning_mdc.surgery.sequential import refit_in_sequence
from lightning_mdc.surgery.token_stages import roles
from lightning_mdc.tokens.block import Lent, with_stage

log = logging.getLogger(__name__)


@torch.inference_mode(False)  # a tensor that is made in it cannot be trained, ever
def slim(
    model: nn.Module,
    plan: Plan,
    compensate: str = "none",
    *,
    moments: Moments | None = None,
    batches: Iterable[Any] | None = None,
    ridge: str | None = None,
    submodule: str | None = None,
) -> nn.Module:
    """A physically smaller copy of the vision transformer in `model`, as `plan` says; the dense one is unchanged.

    The copy is of the same class (where tokens leave, of a subclass of the same name), and keeps state_dict keys, mode,
    device, dtype, requires_grad and ``pretrained_cfg``; a compiled model gives an ordinary copy. Its ``mdc_plan``
    attribute holds the plan relative to the dense model.

    Args:
        model: a supported model or a module that holds one.
        plan: what is kept.
        compensate: ``"none"`` slices the weights. ``"lstsq"`` also refits, by least squares, each layer that reads
            heads or neurons: from the kept ones it then puts out what it put out from all, as nearly as it can. That
            costs nothing at run time. ``"sequential"`` does so from the first block to the last, on what each layer is
            given in the slim model, so that it makes up for what went before, too; see `surgery.sequential`.
        moments: of `model`, for ``"lstsq"``: `moments` of scores.
        batches: of images, for ``"sequential"``; what `score` takes. Read once, and kept. Of several calls of the
            transformer in a pass the first counts.
        ridge: what is added to each channel's variance is a small share of: ``"mean"`` of all channels; ``"clipped"``,
            the mean without what some have far above the others; ``"channel"``, its own; ``"largest"``. None:
            ``"mean"``.
        submodule: of the vision transformer in `model`, as an attribute path; None finds it if there is just one.

    Raises:
        PlanError: the plan is for another model.
        CalibrationError: `batches` hold no images that the model can be run on.
        CompensationError: `compensate` or `ridge` is unknown, or the moments are missing or of another model.
        UnsupportedModelError: there is no supported vision transformer in `model`, or there are several; or a norm over
            the units stands in the way of compensation.
    """
    dense = find_anatomy(model, submodule)
    dense.check(plan)
    check_compensation(dense, compensate, moments, batches)
    if batches is not None:
        consequence = "what is to be made up for would be missing from its own output already"
        check_unmasked(dense.model, CompensationError, consequence, "leave the masked block first")
    check_one_of("ridge", ridge, (None, *RIDGES), CompensationError)
    if ridge is not None and compensate == "none":
        raise CompensationError(f"ridge={ridge!r} is not looked at: compensate='none' refits nothing; leave it out")
    ridge = ridge or "mean"
    copied = plain_copy(dense.model)
    anatomy = find_anatomy(copied)
    if moments is not None:
        refit_readers(anatomy, plan, moments, ridge)
    for units in anatomy.all_units:
        cut_units(units, plan.kept[units.dimension][units.block])
    stage_tokens(anatomy, plan)
    if plan.leaving and not plan.restore and dense.classifies:
        _say_fewer_tokens(dense.name)
    copied.mdc_plan = made_by = _since_dense(dense, plan)  # type: ignore[assignment]
    if batches is not None:
        _refit_on(runnable(model, submodule), dense, find_anatomy(copied), batches, ridge)
    if is_timms(copied):
        make_known(anatomy, made_by)
    return copied


def _refit_on(model: nn.Module, dense: Anatomy, small: Anatomy, batches: Iterable[Any], ridge: str) -> None:
    images = [on_device_of(dense, part) for part in together(split_batch(batch)[0] for batch in batches)]
    whole = called_instead(model, dense.model, small.model)
    passes = [(partial(run_on, model, batch), partial(run_on, whole, batch)) for batch in images]
    in_place = partial(standing_in, model, dense.model, small.model)
    with evaluating(model, small.model), isolated_rng():
        refit_in_sequence(dense, small, passes, standing_in=in_place, ridge=ridge)


@cache
def _say_fewer_tokens(name: str) -> None:
    log.info(
        "%s pools over the tokens that are left: its forward_features gives fewer than before; where a grid is read, "
        "prune with TokenOptions(restore=True)",
        name,
    )


def stage_tokens(anatomy: Anatomy, plan: Plan) -> None:
    """Build the token stages of `plan` into the model, in place."""
    staged = roles(anatomy, plan)
    for index, role in staged.items():
        block = anatomy.blocks[index]
        assert block.point is not None  # Anatomy.check has refused other models
        with_mixins(block.module, *with_stage(block.point.halves))
        if block.point.calls is not None and not isinstance(block.point.calls, Lent):
            with_mixins(block.point.calls, Lent)
        vars(block.module)["role"] = role
        if role.select is not None:
            device = next(block.module.parameters()).device
            # Where there are no weights yet, what comes from the plan is there all the same.
            block.module.add_module("select", role.select if device.type == "meta" else role.select.to(device))
    if staged and anatomy.reader is not None:  # None: of blocks alone, which are timed
        with_mixins(anatomy.passage, anatomy.reader)
        if anatomy.sequence is not None:
            with_mixins(anatomy.sequence, Lent)
        vars(anatomy.passage)["plan"] = plan


def plan_of(model: nn.Module) -> Plan | None:
    """The plan a slim model was made with, relative to its dense origin; None for a dense model."""
    plan = getattr(find_anatomy(model).model, "mdc_plan", None)
    return plan if isinstance(plan, Plan) else None


def _since_dense(anatomy: Anatomy, plan: Plan) -> Plan:
    """`plan` with indices of the dense model, where that of `anatomy` is already slim."""
    before = getattr(anatomy.model, "mdc_plan", None)
    if not isinstance(before, Plan):
        return plan
    kept = {
        dimension: tuple(tuple(a[i] for i in b) for a, b in zip(before.kept[dimension], then, strict=True))
        for dimension, then in plan.kept.items()
    }
    dropping = before if before.leaving else plan  # not both: Anatomy.check has refused that
    return replace(
        before,
        kept=ByDimension(kept),
        tokens=dropping.tokens,
        reduction=dropping.reduction,
        restore=dropping.restore,
        input_size=plan.input_size,
    )
