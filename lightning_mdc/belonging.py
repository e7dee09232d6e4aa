"""Do the weights in a module and the plan of a callback belong together?"""

from __future__ import annotations

import torch
from torch import nn

Fingerprint = list[str | int]


def fingerprint(model: nn.Module) -> Fingerprint:
    """Of its weights, alike on any device: what they are of, and sums of their bytes."""
    tensors = [parameter.detach().reshape(-1) for parameter in model.parameters()]
    sums = [int(tensor.view(torch.uint8).sum(dtype=torch.int64)) for tensor in tensors]
    return [" ".join(str(tensor.dtype) for tensor in tensors), *sums]


def is_other(model: nn.Module, left: Fingerprint | None) -> bool:
    """Whether `model` has other weights than it was `left` with, as far as that is known: in another precision they
    cannot be compared."""
    now = None if left is None else fingerprint(model)
    return now is not None and left is not None and now[0] == left[0] and now != left


def complaint(ckpt_path: str | None, *, has_plan: bool, is_other: bool, fits: bool) -> str | None:
    """What to warn of when a Trainer begins to fit, or to look at, a module without a state from a checkpoint.

    Args:
        ckpt_path: of a checkpoint that weights were loaded from, which has no state.
        has_plan: whether the callback has a plan already.
        is_other: whether the plan goes with other weights.
        fits: whether the module is to be trained.
    """
    if ckpt_path:
        reason = (
            f"ckpt_path={ckpt_path!r} holds no state of this callback: it was written with save_weights_only=True, or "
            "by a Trainer without it"
        )
        if has_plan:
            consequence = "the plan of the fit before is kept, which these weights need not have been trained with"
            remedy = "If they are another model's, call callback.reset() before"
        elif fits:
            consequence = "whatever was pruned when it was written is not known, and a new plan is made"
            remedy = "To go on with a plan, give a checkpoint that has it"
        else:
            consequence = "the dense model is what is measured now"
            remedy = "Give a checkpoint that was saved with the callback, and with save_weights_only=False"
    elif has_plan and is_other:
        reason = "the weights of this module are not those that the plan of this callback goes with"
        consequence = "the plan is kept all the same"
        remedy = "If this is another model, or the next fold, call callback.reset() before, for a plan of its own"
    elif not has_plan and not fits:
        reason, consequence = "there is no plan yet", "the dense model is what is measured now"
        remedy = "Call trainer.fit before, or give the checkpoint that has the plan as ckpt_path"
    else:
        return None
    return f"{reason}; {consequence}. {remedy}"
