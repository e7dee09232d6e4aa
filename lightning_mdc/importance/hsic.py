"""The Hilbert-Schmidt independence criterion, as pure tensor maths.

HSIC is the squared Hilbert-Schmidt norm of the cross-covariance operator (Gretton et al. 2005). Its biased estimate
from n samples is ``trace(H K H . H L H) / (n - 1)^2`` with ``H = I - 1/n``. Kernels after Hou & Kung (arXiv 2201.00043,
section 3): K the mean of Gaussians ``exp(-d / (2 sigma^2))``, L linear.

Gram matrices are handed around as K - 1: centring removes any constant, and digits stay that ``exp`` would lose on
samples that lie close together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mdc.errors import CalibrationError

SIGMAS = (16.0, 8.0, 4.0, 2.0, 1.0)  # each half of the last, so that one exponential serves all


def hsic(x: Tensor, y: Tensor) -> Tensor:
    """Dependence between the rows of `x` and of `y`: Gaussian-mixture kernel on x, linear kernel on y.

    x: (n, p); y: (n, c). Returns a scalar tensor; float64 in, float64 out. 0 means independent, but the estimate of
    independent data is about 1/n above it, so only values from equal n compare.

    Raises:
        CalibrationError: shapes that do not fit, or fewer than 2 samples.
    """
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise CalibrationError(f"hsic(x, y): expected tensors, got {type(x).__name__} and {type(y).__name__}")
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise CalibrationError(
            f"hsic(x, y): expected (n, p) and (n, c) with the same n, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if len(x) < 2:
        raise CalibrationError(f"hsic(x, y): {len(x)} samples; dependence needs at least 2")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return dependence(gaussian_gram(x.to(dtype)[None]), linear_weights(y.to(dtype)))[0]


def gaussian_gram(x: Tensor) -> Tensor:
    """K - 1 of each unit: (units, n, p) -> (units, n, n), K the mean of Gaussians with `SIGMAS`."""
    x = x - x.mean(dim=1, keepdim=True)  # distances do not care, digits do
    products = x @ x.transpose(1, 2)
    half_norms = products.diagonal(dim1=1, dim2=2) / 2
    # products - half_norms is -d / 2; rounding may leave it just above 0.
    power = products.sub_(half_norms[:, :, None]).sub_(half_norms[:, None, :]).clamp_(max=0)
    power = power.div_(SIGMAS[0] ** 2).expm1_()
    total = power.clone()
    for _ in SIGMAS[1:]:
        # Halving sigma raises the Gaussian to its fourth power: twice (1 + u)^2 - 1 = u^2 + 2 u.
        for _ in range(2):
            power.addcmul_(power, power, value=0.5).mul_(2)
        total.add_(power)
    return total.div_(len(SIGMAS))


def linear_weights(y: Tensor) -> Tensor:
    """(n, c) -> (n, n): what to weigh a Gram matrix with so that the sum is its HSIC with the linear kernel of y."""
    y = y - y.mean(dim=0)
    return y @ y.T / (len(y) - 1) ** 2


def dependence(gram: Tensor, weights: Tensor) -> Tensor:
    """HSIC of each Gram matrix, (units, n, n), with what `weights` (n, n) were made of: (units,)."""
    return gram.flatten(1) @ weights.flatten()


def pairwise_dependence(gram: Tensor) -> Tensor:
    """HSIC between all pairs of Gram matrices: (units, n, n) -> (units, units)."""
    rows = gram.mean(dim=-1, keepdim=True)
    centred = (gram - rows - rows.transpose(-1, -2) + gram.mean(dim=(-1, -2), keepdim=True)).flatten(1)
    return centred @ centred.T / (gram.shape[-1] - 1) ** 2
