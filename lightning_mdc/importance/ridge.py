"""Ridge regression's one difficulty: second moments are positive semidefinite only up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor

# Share of the channels' mean variance that is added to each: what a channel says below it is noise of the sample.
RIDGE = 1e-4


def ridge_cholesky(symmetric: Tensor, ridge: float) -> Tensor:
    """Cholesky factor of ``symmetric + ridge I``, (n, n), with a larger ridge where rounding outweighs it."""
    identity = torch.eye(len(symmetric), dtype=symmetric.dtype, device=symmetric.device)
    factor, failed = torch.linalg.cholesky_ex(symmetric + ridge * identity)
    if failed:  # how large rounding is, the negative eigenvalue tells
        lowest = float(torch.linalg.eigvalsh(symmetric)[0])
        factor = torch.linalg.cholesky(symmetric - 2 * lowest * identity)
    return factor


def ridge_weights(xx: Tensor, xy: Tensor, ridge: float) -> Tensor:
    """Weights (n, m) with which x best gives y, for second moments `xx` (n, n) and `xy` (n, m); 0 without a ridge: then
    nothing varies."""
    if not len(xx) or not ridge > 0:
        return torch.zeros_like(xy)
    return torch.cholesky_solve(xy, ridge_cholesky(xx, ridge))
