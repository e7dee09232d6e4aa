"""Ridge regression's one difficulty: second moments are positive semidefinite only up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor

# Share of the channels' mean variance that is added to each: what a channel says below it is noise of the sample.
RIDGE = 1e-4
# What it is a share of. A few channels of huge variance, which trained transformers have, make the mean large.
RIDGES = ("mean", "clipped", "channel", "largest")
# Variances are clipped at so many times the median one; a channel's own counts for at least this share of their mean.
_CLIPPED, _FLAT = 3.0, 1e-3


def ridge_of(variances: Tensor, kind: str, share: float = RIDGE) -> Tensor:
    """What is added to each channel's variance, (channels,): `share` of what `kind`, of `RIDGES`, says."""
    if not len(variances):
        return variances
    mean = variances.mean()
    clipped = variances.clamp_max(_CLIPPED * variances.median()).mean()
    clipped = clipped if clipped > 0 else mean  # most channels are silent
    if kind == "channel":
        return share * variances.clamp_min(_FLAT * clipped)
    return (share * {"mean": mean, "clipped": clipped, "largest": variances.max()}[kind]).expand(len(variances))


def ridge_cholesky(symmetric: Tensor, ridge: float | Tensor) -> Tensor:
    """Cholesky factor of ``symmetric + ridge I``, (n, n), with a larger ridge where rounding outweighs it. ridge: one
    number, or one for each, (n,)."""
    identity = torch.eye(len(symmetric), dtype=symmetric.dtype, device=symmetric.device)
    factor, failed = torch.linalg.cholesky_ex(symmetric + ridge * identity)
    if failed:  # how large rounding is, the negative eigenvalue tells
        lowest = float(torch.linalg.eigvalsh(symmetric)[0])
        factor = torch.linalg.cholesky(symmetric - 2 * lowest * identity)
    return factor


def ridge_weights(xx: Tensor, xy: Tensor, ridge: Tensor) -> Tensor:
    """Weights (n, m) with which x best gives y, for second moments `xx` (n, n) and `xy` (n, m), and a ridge (n,); 0
    without a ridge: then nothing varies."""
    if not (ridge > 0).any():
        return torch.zeros_like(xy)
    return torch.cholesky_solve(xy, ridge_cholesky(xx, ridge))
