"""Which block does what with tokens where a plan lets them leave."""

from __future__ import annotations

from lightning_mdc.models import Anatomy
from lightning_mdc.policy import Plan
from lightning_mdc.tokens.block import Role, StagedBlock
from lightning_mdc.tokens.reduction import reduction_class
from lightning_mdc.tokens.selection import TokenSelection


def roles(anatomy: Anatomy, plan: Plan) -> dict[int, Role]:
    """By index, the blocks that are others while tokens leave; none if none do."""
    if not plan.leaving:
        return {}
    reduction, prefix = reduction_class(plan.reduction), anatomy.num_prefix_tokens
    stages = {stage.block: stage for stage in plan.leaving}
    first = plan.leaving[0].block
    found = {}
    point = anatomy.blocks[first].point
    every = point is not None and issubclass(point.halves, StagedBlock)  # its library calls one block after the other
    for block in range(first, anatomy.depth) if every or reduction.proportional else stages:
        stage, later = stages.get(block), block > first
        select = None
        if stage is not None:
            keeps_last = plan.restore and reduction.drops
            select = TokenSelection(stage, prefix, anatomy.class_rows, plan.reduction, keeps_last)
        asks = later and (every or reduction.counts_sizes or (stage is not None and stage.prior is not None))
        found[block] = Role(select, reduction.proportional and later, asks, prefix)
    return found
