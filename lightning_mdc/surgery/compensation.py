"""What removed units did, given to those that stay: the layer that reads them is refitted, at no cost at run time.

A block's `proj` or `fc2` computes ``W z + b`` from its units' channels z. Without the removed ones (D) it is left with
``W_K z_K + b``. ``compensate="lstsq"`` gives it new weights ``W_K + U`` and a new bias, with the least squared error to
what the dense layer puts out: ``U = W_D S_DK (S_KK + r I)^-1``, where S is the covariance of z and the ridge r is a
small share of its mean diagonal. The ridge pulls to W_K, not to 0: if nothing is removed nothing changes, and the error
is never larger than without compensation.

Of z it needs only the first and second moments, so one pass of the calibration images serves all plans. These are
moments in the dense model: that z changes when earlier blocks lose units is not accounted for. A layer without bias
gets none; its weights alone are refitted (S uncentred).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_mdc.errors import CompensationError, UnsupportedModelError, check_one_of
from lightning_mdc.importance.moments import LayerMoments, Moments
from lightning_mdc.importance.ridge import RIDGE, ridge_of, ridge_weights
from lightning_mdc.models import Anatomy, Units, unit_channels
from lightning_mdc.policy import Plan

COMPENSATIONS = ("none", "lstsq", "sequential")


def refitted(
    weight: Tensor, bias: Tensor | None, moments: LayerMoments, kept: Tensor, share: float = RIDGE, ridge: str = "mean"
) -> tuple[Tensor, Tensor | None]:
    """Weight (out, kept) and bias (out,) of a layer that reads the `kept` channels only, float64.

    Args:
        weight: of the dense layer, (out, channels).
        bias: (out,), or None: there is none then either.
        moments: of what the dense layer reads, on the device of `weight`.
        kept: sorted channel numbers, (kept,) int64.
        share, ridge: how much of what is added to each channel's variance, above 0; see `ridge_of`.
    """
    is_removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    is_removed[kept] = False
    removed = is_removed.nonzero()[:, 0]
    weight = weight.detach().double()
    new_weight, lost = weight[:, kept], weight[:, removed]
    new_bias = None if bias is None else bias.detach().double() + lost @ moments.mean[removed].double()
    centred = bias is not None
    shared = moments.second(kept, removed, centred=centred) @ lost.T  # (kept, out)
    added = ridge_of(moments.variances(centred=centred), ridge, share)[kept]
    update = ridge_weights(moments.second(kept, kept, centred=centred), shared, added).T
    if new_bias is not None:
        new_bias = new_bias - update @ moments.mean[kept].double()
    return new_weight + update, new_bias


def check_compensation(anatomy: Anatomy, compensate: str, moments: Moments | None, batches: Any = None) -> None:
    """Refuse, with a `CompensationError`, an unknown way, what another way needs, and moments that are missing or of
    another model."""
    check_one_of("compensate", compensate, COMPENSATIONS, CompensationError)
    for name, given, way in (("moments", moments, "lstsq"), ("batches", batches, "sequential")):
        if given is not None and compensate != way:
            raise CompensationError(
                f"{name} are given, but compensate={compensate!r} does not use them; pass compensate={way!r}, or leave "
                "them out"
            )
    if compensate == "sequential":
        check_all_tokens(anatomy)
    if compensate == "sequential" and not isinstance(batches, Iterable):
        raise CompensationError(
            f"batches={batches!r:.80}: compensate='sequential' looks at images; pass those that units were scored on"
        )
    if compensate != "lstsq":
        return
    if not isinstance(moments, Moments):
        raise CompensationError(
            f"moments={moments!r:.80}: compensate={compensate!r} needs those of the dense model; pass moments="
            "scores.moments, of scores = score(model, batches, criterion, moments=True)"
        )
    moments.check_fit(anatomy)


def check_all_tokens(anatomy: Anatomy) -> None:
    """Refuse, with a `CompensationError`, to refit a model in sequence where tokens leave already."""
    if anatomy.stages:
        raise CompensationError(
            f"compensate='sequential': tokens leave {anatomy.name} already (block {anatomy.stages[0].block}), and not "
            "always those that leave the slim model; use compensate='lstsq'"
        )


def check_compensable(units: Units, compensate: str, moments: Moments | None = None) -> None:
    """Refuse to give back what units did where a norm is taken over them, or where `moments` leave them out.

    Raises:
        UnsupportedModelError: there is such a norm.
        CompensationError: moments of other dimensions are given.
    """
    if compensate != "lstsq":
        return
    if units.norm is not None:
        raise UnsupportedModelError(
            f"compensate={compensate!r}: {units.norm} is taken over the units, so those that stay change when others "
            "leave, and moments of the dense model do not hold; use compensate='none', or do not prune these units"
        )
    if moments is not None and moments.of(units) is None:
        raise CompensationError(
            f"moments are not of the {units.dimension}, which are to leave; score with this dimension and moments=True"
        )


def compensation_of_trials(compensate: str, pruned: Iterable[Units]) -> str:
    """How policies are tried that are delivered with `compensate`: by moments of the dense model, which one look at the
    images gathers for all of them, where no norm over units stands in the way."""
    if compensate != "sequential":
        return compensate
    return "lstsq" if all(units.norm is None for units in pruned) else "none"


def refit_readers(anatomy: Anatomy, plan: Plan, moments: Moments, ridge: str = "mean") -> None:
    """Refit, in place, the layers of a dense model that read what leaves; weights for what leaves stay as they are.

    Raises:
        CompensationError, UnsupportedModelError: see `check_compensable`.
    """
    for units in anatomy.units_leaving(plan):
        _refit(units, plan.kept[units.dimension][units.block], moments, ridge)


def _refit(units: Units, kept: tuple[int, ...], moments: Moments, ridge: str) -> None:
    check_compensable(units, "lstsq", moments)
    layer = moments.of(units)
    assert layer is not None
    weight, bias = units.reader.weight, units.reader.bias
    # Where float64 is to be had.
    device = weight.device if weight.device.type in ("cpu", "cuda") else torch.device("cpu")
    channels = unit_channels(torch.tensor(kept, dtype=torch.long, device=device), units.width)
    old_bias = None if bias is None else bias.to(device)
    new_weight, new_bias = refitted(weight.to(device), old_bias, layer.to(device), channels, ridge=ridge)
    with torch.no_grad():
        weight[:, channels.to(weight.device)] = new_weight.to(weight.device, weight.dtype)
        if new_bias is not None:
            bias.copy_(new_bias)


def take_readers(small: Anatomy, plan: Plan, dense: Anatomy, *others: Anatomy) -> None:
    """Put what layers of `small`, the slim model of `plan`, were refitted to into those of the `dense` one, and add
    what that changes to the same layers of `others`, such as averages of the dense one. In place."""
    for units in dense.all_units:
        kept = plan.kept[units.dimension][units.block]
        layers = [each.blocks[units.block].units[units.dimension].reader for each in (small, *others)]
        weight, bias, given = units.reader.weight, units.reader.bias, layers.pop(0)
        channels = unit_channels(torch.tensor(kept, dtype=torch.long, device=weight.device), units.width)
        with torch.no_grad():
            for layer in layers:  # an average may be elsewhere than the model
                change = given.weight - weight[:, channels]
                layer.weight[:, channels.to(layer.weight.device)] += change.to(layer.weight)
                if bias is not None:
                    layer.bias.add_((given.bias - bias).to(layer.bias))
            weight[:, channels] = given.weight
            if bias is not None:
                bias.copy_(given.bias)
