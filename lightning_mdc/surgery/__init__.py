"""Make a plan true in the network: as reversible masks, or physically."""

from lightning_mdc.models import is_masked
from lightning_mdc.surgery.compensation import COMPENSATIONS
from lightning_mdc.surgery.masks import apply_masks, masked, remove_masks
from lightning_mdc.surgery.plan import make_plan
from lightning_mdc.surgery.slim import plan_of, slim

__all__ = [
    "COMPENSATIONS",
    "apply_masks",
    "is_masked",
    "make_plan",
    "masked",
    "plan_of",
    "remove_masks",
    "slim",
]
