"""Reversible pruning: parameters, buffers, state_dict keys, hooks and who holds what stay as they are.

While masks are on, modules compute with the entries of their tensors that kept units own, and blocks with token stages
run as in the slim model; see `lightning_mdc.models.swapping`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_mdc.errors import PlanError
from lightning_mdc.models import find_anatomy, find_model
from lightning_mdc.models.swapping import is_masked, mask_units, mask_with_mixins, unmask
from lightning_mdc.policy import Plan
from lightning_mdc.surgery.token_stages import roles
from lightning_mdc.tokens.block import Lent, with_stage


@contextmanager
def masked(model: nn.Module, plan: Plan, submodule: str | None = None) -> Iterator[nn.Module]:
    """``with masked(model, plan):`` the model computes what ``slim(model, plan)`` would; after it, it is as before.

    Yields `model`. Compiled code is compiled again where that is needed.

    Args:
        submodule: of the vision transformer in `model`, as an attribute path; None finds it if there is just one.

    Raises:
        PlanError: the plan is for another model, or the model is masked already.
    """
    apply_masks(model, plan, submodule)
    try:
        yield model
    finally:
        remove_masks(model, submodule)


def apply_masks(model: nn.Module, plan: Plan, submodule: str | None = None) -> None:
    """Put the masks of `plan` on, until `remove_masks`; arguments and errors as of `masked`."""
    anatomy = find_anatomy(model, submodule)
    anatomy.check(plan)
    if is_masked(anatomy.model):
        raise PlanError(
            f"{anatomy.name} is masked already; leave the first `masked` block, or call remove_masks(model)"
        )
    staged = roles(anatomy, plan)  # refuses what it does not know before anything is changed
    mask_units((units, plan.kept[units.dimension][units.block]) for units in anatomy.units_leaving(plan))
    for index, role in staged.items():
        block = anatomy.blocks[index]
        assert block.point is not None  # Anatomy.check has refused other models
        mask_with_mixins(block.module, with_stage(block.point.halves), role=role)
        if block.point.calls is not None and not isinstance(block.point.calls, Lent):
            mask_with_mixins(block.point.calls, (Lent,))
    if staged:
        assert anatomy.reader is not None  # where tokens may leave
        mask_with_mixins(anatomy.passage, (anatomy.reader,), plan=plan)
        if anatomy.sequence is not None:
            mask_with_mixins(anatomy.sequence, (Lent,))


def remove_masks(model: nn.Module, submodule: str | None = None) -> None:
    """Take our masks off `model` and all in it, or off the `submodule` of that path; other people's hooks stay."""
    unmask(model if submodule is None else find_model(model, submodule)[1])
