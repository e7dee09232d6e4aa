"""Dependence given the other units: they leave one after another, each time the one the others can best do without.

A block's ``proj`` or ``fc2`` puts out ``y = W z`` of its units' channels z. With linear kernels, how much y depends on
unit u given the other units K is the Hilbert-Schmidt norm of their normalised conditional cross-covariance,

    ``|| C_yu|K  C_uu|K^(-1/2) ||^2``,   ``C_ab|K = C_ab - C_aK C_KK^-1 C_Kb``,

the variance of y that u explains and the others do not. A unit that says what others say as well adds nothing, however
active it is. Backward elimination by dependence is BAHSIC (Song, Smola, Gretton, Bedo & Borgwardt, "Feature Selection
via Dependence Maximization", JMLR 2012); conditional covariance as its measure is after Chen, Stern, Wainwright &
Jordan, "Kernel Feature Selection via Conditional Covariance Minimization" (NeurIPS 2017). With P the inverse covariance
and W refitted to the units that are left, the measure is ``tr(W_u P_uu^-1 W_u^T)``: the closed form of the optimal
brain surgeon (Hassibi & Stork, NeurIPS 1992).

All that y varies by counts alike there. With a metric M on it, ``tr(W_u P_uu^-1 W_u^T M)``, what the prediction p
depends on counts more: ``M = C_yp C_pp^-1 C_py`` is dependence by linear kernels (HSIC) of y on p, normalised by p;
``M = E[g g^T]``, g the gradient at y of -log p of a label that the model itself would draw, is what Fisher's
information says of y (the factor of K-FAC: Martens & Grosse, "Optimizing Neural Networks with Kronecker-factored
Approximate Curvature", ICML 2015).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from lightning_mdc.errors import CalibrationError, check_number, check_one_of
from lightning_mdc.importance.criteria import CRITERIA, HSIC, Criterion, Needs, UnitGroup, register
from lightning_mdc.importance.ridge import RIDGE, ridge_cholesky
from lightning_mdc.models import unit_channels
from lightning_mdc.policy import UNIT_DIMENSIONS

# Channels that leave before all others are updated at once: enough for large matrix products.
_AT_ONCE = 64
# Share of channels that have left at which matrices are copied without them.
_GONE = 0.25

METRICS = ("identity", "fisher", "hsic")
# Numbers of a prediction at most whose covariance is taken: 128 MB.
_MOST_PREDICTED = 4096


@register
class ConditionalDependence(Criterion):
    """What a unit adds to its layer's output that the other units cannot make up for.

    A score is the share of the output's variance that is lost once this unit has left, and all with lower scores before
    it, while the others are refitted (as ``compensate="lstsq"`` does); 1 for the last. Token positions score as by raw
    `HSIC`. For heads and neurons it looks at moments of the channels alone (`Moments` says how much memory they take):
    no prediction, labels or gradients, unless `metric` asks for them. With Fisher's metric its name is ``"fisher"``.

    Args:
        metric: what of the output's variance counts. ``"identity"``: all of it alike. ``"fisher"``: as far as the
            prediction changes by it, from a forward and backward pass more, for labels drawn from the prediction
            (where that is not of probabilities, from a normal distribution about it); where the model gives no
            gradients, ``"identity"``, which is said. ``"hsic"``: as far as the prediction depends on it linearly; no
            gradients.
        metric_weight: share of the metric, in [0, 1]; the rest is the identity, both at mean 1. None: 0.5.

    Raises:
        CalibrationError: another metric, another share, or a share of the identity alone.
    """

    name = "conditional"

    def __init__(self, metric: str = "identity", metric_weight: float | None = None) -> None:
        check_one_of("metric", metric, METRICS, CalibrationError)
        if metric == "identity" and metric_weight is not None:
            raise CalibrationError(
                f"metric_weight={metric_weight!r:.80} is not looked at: metric='identity' has nothing to weigh; leave "
                "it out, or choose metric='fisher' or 'hsic'"
            )
        self.metric, self.metric_weight = metric, 0.5 if metric_weight is None else metric_weight
        check_number("metric_weight", self.metric_weight, "a share", CalibrationError, least=0, most=1)
        self.metric_weight = float(self.metric_weight)  # numpy's has no digest of its value
        self._of_tokens = HSIC(hsic_weight=1.0, activation_weight=0.0)
        if metric == "fisher":
            self.without_gradients = ConditionalDependence()
            if self.name == ConditionalDependence.name:
                self.name = "fisher"

    def needs(self, dimension: str) -> Needs:
        if dimension not in UNIT_DIMENSIONS:
            return self._of_tokens.needs(dimension)
        return Needs(moments=True, prediction=self.metric == "hsic", output_gradients=self.metric == "fisher")

    def observe(self, activations: Tensor, group: UnitGroup) -> dict[str, Tensor]:
        if group.units is None:
            return self._of_tokens.observe(activations, group)
        if self.metric != "hsic":
            return {}
        # (images, channels): what a prediction, of which an image has one, can say of an image's tokens is their mean.
        return {"z": activations.mean(dim=1, dtype=torch.promote_types(activations.dtype, torch.float32)).flatten(1)}

    def observe_output_gradients(self, gradients: Tensor, group: UnitGroup) -> dict[str, Tensor]:
        return {"gg": gradients.T @ gradients}

    def contract(self, seen: Mapping[str, Tensor], prediction: Tensor, group: UnitGroup) -> Mapping[str, Tensor]:
        if group.units is None:
            return self._of_tokens.contract(seen, prediction, group)
        if prediction.shape[1] > _MOST_PREDICTED:
            raise CalibrationError(
                f"metric='hsic': the prediction has {prediction.shape[1]} numbers, and their covariance is taken; pass "
                f"prediction=, which makes at most {_MOST_PREDICTED} of the model's output, or metric='fisher'"
            )
        z, p = _wide(seen["z"]), _wide(prediction)
        return {"zp": z.T @ p, "pp": p.T @ p, "z": z.sum(dim=0), "p": p.sum(dim=0)}

    def finish(self, sums: Mapping[str, Tensor], group: UnitGroup) -> Tensor:
        if group.units is None:
            return self._of_tokens.finish(sums, group)
        assert group.moments is not None  # they are needed
        weight = _wide(group.units.reader.weight.detach())
        covariance = group.moments.to(weight.device).covariance()
        if self.metric != "identity":
            weight = metric_root(self._of_output(sums, weight), self.metric_weight) @ weight
        return lost_by_elimination(covariance, weight, group.count)

    def _of_output(self, sums: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        """The metric on what a layer of `weight` (out, channels) puts out, of any scale: (out, out)."""
        if self.metric == "fisher":
            return _wide(sums["gg"])
        images = _wide(sums["images"])
        p = sums["p"] / images
        pp = sums["pp"] / images - torch.outer(p, p)
        yp = weight @ (sums["zp"] / images - torch.outer(sums["z"] / images, p))
        noise = RIDGE * float(pp.diagonal().mean())
        if not noise > 0:  # the same for all images
            return torch.zeros_like(yp @ yp.T)
        explained = torch.linalg.solve_triangular(ridge_cholesky(pp, noise), yp.T, upper=False)
        return explained.T @ explained


CRITERIA["fisher"] = partial(ConditionalDependence, "fisher")


def _wide(x: Tensor) -> Tensor:
    """In float64, where that is to be had."""
    return (x if x.device.type in ("cpu", "cuda") else x.cpu()).double()


def metric_root(metric: Tensor, share: float) -> Tensor:
    """R with ``R^T R = share M + (1 - share) I``, M the `metric` (out, out) scaled so that its mean diagonal is 1: what
    a layer's weight is multiplied with to lose what M says. A metric of zeros, which says nothing, is I.
    """
    identity = torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    mean = metric.diagonal().mean()
    mixed = share * metric / mean + (1 - share) * identity if mean > 0 else identity
    values, vectors = torch.linalg.eigh(mixed)
    return values.clamp_min(0).sqrt()[:, None] * vectors.T


def lost_by_elimination(covariance: Tensor, weight: Tensor, num_units: int) -> Tensor:
    """Share of the variance of ``weight @ z`` lost when each unit leaves, those the others can best do without first.

    Args:
        covariance: of the channels z, (channels, channels) float64; each unit owns ``channels / num_units`` in a row.
        weight: (out, channels), float64.
        num_units: how many units the channels are of.

    Returns:
        (units,), in [0, 1], all 0 if nothing varies. Sorted, it is what leaving so many units costs at least.
    """
    losses = covariance.new_zeros(num_units)
    noise = RIDGE * float(covariance.diagonal().mean()) if num_units else 0.0
    if not noise > 0:
        return losses
    precision = torch.cholesky_inverse(ridge_cholesky(covariance, noise))
    eliminated = _channels if num_units == len(covariance) else _units
    order, costs = eliminated(precision, weight, num_units)
    losses[order] = costs.clamp_min(0).cumsum(0)
    total = float(losses.max())
    return losses / total if total > 0 else losses


def _units(precision: Tensor, weight: Tensor, num_units: int) -> tuple[Tensor, Tensor]:
    """(units in the order they leave, variance that each costs then), one unit after another."""
    width = len(precision) // num_units
    left, order, costs = list(range(num_units)), [], []
    while left:
        # Variance of the output that each unit alone explains, tr(W_u P_uu^-1 W_u^T).
        own = precision.view(len(left), width, len(left), width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        of_unit = weight.view(-1, len(left), width).permute(1, 2, 0)  # (units, width, out)
        factor = torch.linalg.cholesky(own)
        loss = torch.linalg.solve_triangular(factor, of_unit, upper=False).square().sum(dim=(1, 2))
        best = int(loss.argmin())
        costs.append(loss[best])
        order.append(left.pop(best))
        stays = torch.arange(len(loss), device=loss.device) != best
        kept, out = (unit_channels(which.nonzero()[:, 0], width) for which in (stays, ~stays))
        taken_over = torch.cholesky_solve(precision[out][:, kept], factor[best])
        precision = precision[kept][:, kept] - precision[kept][:, out] @ taken_over
        weight = weight[:, kept] - weight[:, out] @ taken_over
    return torch.tensor(order, device=weight.device), torch.stack(costs)


def _channels(precision: Tensor, weight: Tensor, num_units: int) -> tuple[Tensor, Tensor]:
    """`_units` where each has one channel: ``|W_u|^2 / P_uu``. The same order, much sooner.

    Of W it keeps the Gram matrix ``G = W^T W``. When channels leave, what changes in P and G is of low rank: it is kept
    as rows, with which the diagonals, and from them all losses, are brought up to date at once, and the rest of the
    matrices for `_AT_ONCE` channels together.
    """
    gram = weight.T @ weight
    channels = torch.arange(num_units, device=weight.device)
    left, order, costs = num_units, [], []
    gone = torch.zeros(num_units, dtype=torch.bool, device=weight.device)
    while left:
        count = min(_AT_ONCE, left)
        variance, norms = precision.diagonal().clone().masked_fill_(gone, 1), gram.diagonal().clone()
        never = torch.zeros_like(variance).masked_fill_(gone, float("inf"))
        # When channel u leaves, P loses a a^T with a = P_u / sqrt(P_uu), and W loses c a^T with c = W_u / sqrt(P_uu),
        # so G loses a b^T + b a^T with b = G_u / sqrt(P_uu) - a |c|^2 / 2.
        a, b = precision.new_empty(2, count, len(channels))
        leaving = []
        for done in range(count):
            loss = (norms / variance).add_(never)
            best = int(loss.argmin())
            of_a, of_b = a[:done, best], b[:done, best]
            row = torch.sub(precision[best], of_a @ a[:done], out=a[done])
            gram_row = torch.sub(gram[best], of_b @ a[:done] + of_a @ b[:done], out=b[done])
            own = row[best].clone()
            gram_row.sub_(row * (gram_row[best] / own / 2)).div_(own.sqrt())
            row.div_(own.sqrt())
            variance.addcmul_(row, row, value=-1)
            norms.addcmul_(row, gram_row, value=-2)
            variance[best], never[best] = 1, float("inf")
            costs.append(loss[best])
            leaving.append(best)
        order.append(channels[leaving])
        gone[leaving] = True
        left -= count
        if len(channels) - left >= _GONE * len(channels):
            kept = (~gone).nonzero()[:, 0]
            precision, gram = (each.index_select(0, kept).index_select(1, kept) for each in (precision, gram))
            a, b, channels, gone = a[:, kept], b[:, kept], channels[kept], gone[kept]
        precision.addmm_(a.T, a, alpha=-1)
        gram.addmm_(torch.cat([a, b]).T, torch.cat([b, a]), alpha=-1)
    return torch.cat(order), torch.stack(costs)
