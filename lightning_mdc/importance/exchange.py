"""Kept and removed units change places while the layer loses less by it.

Backward elimination (`conditional`) never takes back what it has removed, so its choice of so many units need not be
the best one. Exchanges go on from it, each time by the pair that lowers the loss most: the variance of ``y = W z`` that
the kept channels cannot explain, ``tr(W S_DD|K W^T)`` (D removed, K kept, `S_DD|K` the covariance of D given K).

All pairs are judged at once. With ``A = S_KK^-1 S_KD``, ``s_u = 1 / (S_KK^-1)_uu``, W refitted to K (W') and
``R = W_D S_DD|K``: if u leaves, the loss grows by ``s_u |W'_u|^2``; if v comes then, it falls by

    ``| R_v + s_u A_uv W'_u |^2 / ((S_DD|K)_vv + s_u A_uv^2)``.

All of that stands in one symmetric matrix, [-S_KK^-1, A; A^T, S_DD|K], that follows an exchange by two updates of rank
one (the sweep operator: Goodnight, "A Tutorial on the SWEEP Operator", The American Statistician 1979).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mdc.importance.ridge import RIDGE, ridge_cholesky
from lightning_mdc.models import unit_channels

# Share of the output's variance that an exchange has to win at least: above rounding, so that they come to an end.
_LEAST = 1e-9


def exchanged(covariance: Tensor, weight: Tensor, kept: Sequence[int], num_units: int, most: int) -> tuple[int, ...]:
    """The kept units after at most so many exchanges, sorted; `kept` itself where none lowers the loss.

    Args:
        covariance: of the channels z, (channels, channels) float64; each unit owns ``channels / num_units`` in a row.
        weight: (out, channels), float64.
        kept: units.
        num_units: how many units the channels are of.
        most: exchanges.
    """
    noise = RIDGE * float(covariance.diagonal().mean()) if num_units else 0.0
    if not 0 < len(kept) < num_units or not noise > 0:
        return tuple(kept)
    covariance = covariance + noise * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    width = len(covariance) // num_units
    least = _LEAST * float(((weight @ covariance) * weight).sum())
    step = _Channels(covariance, weight, kept) if width == 1 else _Units(covariance, weight, kept, width)
    for _ in range(most):
        if not step.exchange(least):
            break
    # Of many small gains rounding may have made losses.
    before, after = (unexplained(covariance, weight, of_units(some, width, weight)) for some in (kept, step.kept))
    return tuple(sorted(step.kept)) if after < before else tuple(kept)


def unexplained(covariance: Tensor, weight: Tensor, kept: Tensor) -> float:
    """Variance of ``weight @ z`` that the `kept` channels leave unexplained."""
    products = weight @ covariance
    total = float((products * weight).sum())
    factor = ridge_cholesky(covariance[kept][:, kept], 0.0)
    return total - float(torch.linalg.solve_triangular(factor, products[:, kept].T, upper=False).square().sum())


def of_units(units: Sequence[int], width: int, like: Tensor) -> Tensor:
    """Channel numbers of these units, sorted."""
    return unit_channels(torch.tensor(sorted(units), device=like.device), width)


class _Units:
    """Exchanges of units of several channels: few, and each pair is tried."""

    def __init__(self, covariance: Tensor, weight: Tensor, kept: Sequence[int], width: int) -> None:
        self._covariance, self._weight, self._width = covariance, weight, width
        self._removed = [unit for unit in range(len(covariance) // width) if unit not in kept]
        self.kept = list(kept)
        self._loss = self._lost(self.kept)

    def _lost(self, kept: Sequence[int]) -> float:
        return unexplained(self._covariance, self._weight, of_units(kept, self._width, self._weight))

    def exchange(self, least: float) -> bool:
        """Exchange the best pair, if it lowers the loss by more than `least`."""
        pairs = [(leaves, comes) for leaves in range(len(self.kept)) for comes in range(len(self._removed))]
        losses = [self._lost(self._with(*pair)) for pair in pairs]
        best = min(range(len(pairs)), key=losses.__getitem__)
        if self._loss - losses[best] <= least:
            return False
        leaves, comes = pairs[best]
        self._loss = losses[best]
        self.kept[leaves], self._removed[comes] = self._removed[comes], self.kept[leaves]
        return True

    def _with(self, leaves: int, comes: int) -> list[int]:
        return [*self.kept[:leaves], self._removed[comes], *self.kept[leaves + 1 :]]


class _Channels:
    """Exchanges of units of one channel, all pairs at once."""

    def __init__(self, covariance: Tensor, weight: Tensor, kept: Sequence[int]) -> None:
        k = torch.tensor(kept, device=weight.device)
        self._is_kept = torch.zeros(len(covariance), dtype=torch.bool, device=weight.device)
        self._is_kept[k] = True
        d = (~self._is_kept).nonzero()[:, 0]
        inverse = torch.cholesky_inverse(ridge_cholesky(covariance[k][:, k], 0.0))
        given = inverse @ covariance[k][:, d]  # A
        self._swept = torch.empty_like(covariance)
        left = covariance[d][:, d] - covariance[d][:, k] @ given
        self._swept[k[:, None], k], self._swept[k[:, None], d] = -inverse, given
        self._swept[d[:, None], k], self._swept[d[:, None], d] = given.T, left
        # Below it, the row of y: W' and R.
        self._of_y = torch.empty_like(weight)
        self._of_y[:, k] = weight[:, k] + weight[:, d] @ given.T
        self._of_y[:, d] = weight[:, d] @ left

    @property
    def kept(self) -> list[int]:
        return self._is_kept.nonzero()[:, 0].tolist()

    def exchange(self, least: float) -> bool:
        """Exchange the best pair, if it lowers the loss by more than `least`."""
        k, d = self._is_kept.nonzero()[:, 0], (~self._is_kept).nonzero()[:, 0]
        falls = self._falls(k, d)
        best = int(falls.argmax())
        if not float(falls.flatten()[best]) > least:
            return False
        for channel in (int(k[best // len(d)]), int(d[best % len(d)])):
            self._sweep(channel)
        return True

    def _falls(self, k: Tensor, d: Tensor) -> Tensor:
        """What the loss falls by if each kept channel gives its place to each removed one: (kept, removed)."""
        diagonal, norms = self._swept.diagonal(), self._of_y.square().sum(dim=0)
        s = -1 / diagonal[k]
        by_u = self._swept[k[:, None], d] * s[:, None]  # s A
        together = self._of_y[:, k].T @ self._of_y[:, d]
        comes = norms[d] + by_u * (2 * together + by_u * norms[k][:, None])
        return comes / (diagonal[d] + by_u.square() / s[:, None]) - (s * norms[k])[:, None]

    def _sweep(self, channel: int) -> None:
        """Take a channel out of the kept ones, or among them."""
        own = float(self._swept[channel, channel])
        row, column = self._swept[channel].clone(), self._of_y[:, channel].clone()
        self._swept.addr_(row, row, alpha=-1 / own)
        self._of_y.addr_(column, row, alpha=-1 / own)
        sign = -1 if self._is_kept[channel] else 1
        self._swept[channel] = self._swept[:, channel] = sign * row / own
        self._swept[channel, channel] = -1 / own
        self._of_y[:, channel] = sign * column / own
        self._is_kept[channel] = ~self._is_kept[channel]
