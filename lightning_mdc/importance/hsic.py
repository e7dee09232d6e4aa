"""The Hilbert-Schmidt independence criterion, as pure tensor maths.

HSIC is the squared Hilbert-Schmidt norm of the cross-covariance operator (Gretton et al. 2005). Biased estimate from n
samples: ``trace(H K H . H L H) / (n - 1)^2`` with ``H = I - 1/n``; unbiased: Song et al. 2012, eq. 5. Kernels after Hou
& Kung (arXiv 2201.00043, section 3): K the mean of Gaussians ``exp(-d / (2 sigma^2))``, L linear.

Gram matrices are handed around as K - 1: centring removes any constant, and digits stay that ``exp`` would lose on
samples that lie close together. Their diagonal is 0, so that `pairs` of them say everything.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_mdc.errors import CalibrationError

Estimator = Literal["biased", "unbiased"]
ESTIMATORS: tuple[Estimator, ...] = ("biased", "unbiased")
SIGMAS = (1.0, 2.0, 4.0, 8.0, 16.0)  # each twice the last, so that one exponential serves all

MIN_SAMPLES = 4


def hsic(x: Tensor, y: Tensor, estimator: Estimator = "biased") -> Tensor:
    """Dependence between the rows of `x` and of `y`: Gaussian-mixture kernel on x, linear kernel on y.

    x: (n, p); y: (n, c). Returns a scalar tensor; float64 in, float64 out. 0 means independent; the biased estimate of
    independent data is about 1/n above it, so only equal n compare; ``estimator="unbiased"`` is right for any n ≥ 4.

    Raises:
        CalibrationError: shapes that do not fit, or fewer than 2 (unbiased: 4) samples.
    """
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise CalibrationError(f"hsic(x, y): expected tensors, got {type(x).__name__} and {type(y).__name__}")
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise CalibrationError(
            f"hsic(x, y): expected (n, p) and (n, c) with the same n, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    gram = gaussian_gram(x.to(dtype)[None])
    return dependence(gram, linear_weights(y.to(dtype), estimator))[0]


def gaussian_gram(x: Tensor) -> Tensor:
    """K - 1 of each unit: (units, n, p) -> (units, n, n), K the mean of Gaussians with `SIGMAS`."""
    return _mean_of_gaussians(_negative_half_distances(x))


def gaussian_pairs(x: Tensor, spare: Tensor | None = None) -> Tensor:
    """`gaussian_gram` at half the price, as `pairs` of it: (units, n, p) -> (units, n - 1, ceil(n / 2)).

    `spare`, of the shape and type of x, is overwritten: memory to work in, which can cost more than the work if it
    comes from the system.
    """
    return _mean_of_gaussians(pairs(_negative_half_distances(x, spare)))


def pairs(matrices: Tensor) -> Tensor:
    """Every unordered pair of different samples: a view (..., n - 1, ceil(n / 2)) of (..., n, n), n >= 2.

    Without its first entry a matrix has rows of n + 1 entries that end with one of the diagonal; of the others, the
    first half has every pair once (for odd n, those in the last column twice). For n = 4: 01 02 | 12 13 | 23 30.
    """
    n = matrices.shape[-1]
    return matrices.flatten(-2)[..., 1:].unflatten(-1, (n - 1, n + 1))[..., : (n + 1) // 2]


def pair_weights(weights: Tensor) -> Tensor:
    """`pairs` of symmetric (n, n) weights such that `dependence` of pairs is that of the whole Gram matrices."""
    doubled = 2 * pairs(weights)
    if len(weights) % 2:
        doubled[:, -1] /= 2  # there twice
    return doubled


def _negative_half_distances(x: Tensor, spare: Tensor | None = None) -> Tensor:
    """``-|x_i - x_j|^2 / 2`` of each unit, up to rounding: (units, n, p) -> (units, n, n)."""
    x = torch.sub(x, x.mean(dim=1, keepdim=True), out=spare)  # distances do not care, digits do
    products = x @ x.transpose(1, 2)
    norms = products.diagonal(dim1=1, dim2=2) / 2
    return products.sub_(norms[:, :, None]).sub_(norms[:, None, :])


def _mean_of_gaussians(negative_half_distances: Tensor) -> Tensor:
    # expm1(x) = 2 t / (1 - t), t = tanh(x / 2): of all ways to keep the digits the one that is fast on every CPU.
    half = (negative_half_distances * (1 / (2 * SIGMAS[-1] ** 2))).clamp_(max=0).tanh_()
    power = half.div_(1 - half)
    # Of the widest Gaussian, exp - 1 is scale * power.
    scale = 2.0
    total = power * (scale / len(SIGMAS))
    for _ in SIGMAS[1:]:
        # (1 + u)^4 - 1: halving sigma raises the Gaussian to its fourth power. In two steps,
        # (1 + u)^2 - 1 = 2 (u + u^2 / 2), each of them one operation if factors are left to `scale`.
        power.addcmul_(power, power, value=scale / 2)
        power.addcmul_(power, power, value=scale)
        scale *= 4
        total.add_(power, alpha=scale / len(SIGMAS))
    return total


def linear_weights(y: Tensor, estimator: Estimator) -> Tensor:
    """(n, c) -> (n, n): what to weigh a Gram matrix with so that the sum is its HSIC with the linear kernel of y."""
    y = y - y.mean(dim=0)
    return center(y @ y.T, estimator) * normaliser(len(y), estimator)


def center(gram: Tensor, estimator: Estimator) -> Tensor:
    """Doubly centred (..., n, n) Gram matrices: ``H K H``, or its U-statistic counterpart with a zero diagonal.

    Constants added to all (unbiased: all off-diagonal) entries make no difference.
    """
    n = gram.shape[-1]
    if estimator == "biased":
        rows = gram.mean(dim=-1, keepdim=True)
        return gram - rows - rows.transpose(-1, -2) + gram.mean(dim=(-1, -2), keepdim=True)
    off = 1 - torch.eye(n, dtype=gram.dtype, device=gram.device)
    gram = gram * off
    rows = gram.sum(dim=-1, keepdim=True) / (n - 2)
    total = gram.sum(dim=(-1, -2), keepdim=True) / ((n - 1) * (n - 2))
    return (gram - rows - rows.transpose(-1, -2) + total) * off


def normaliser(n: int, estimator: Estimator) -> float:
    """Factor that turns the sum of products of centred Gram matrices into HSIC.

    Raises:
        CalibrationError: an unknown estimator, or too few samples for it.
    """
    if estimator not in ESTIMATORS:
        raise CalibrationError(f"estimator={estimator!r}: expected one of {ESTIMATORS}")
    least = MIN_SAMPLES if estimator == "unbiased" else 2
    if n < least:
        raise CalibrationError(f"{n} samples: the {estimator} HSIC needs at least {least}; use larger batches")
    return 1 / (n - 1) ** 2 if estimator == "biased" else 1 / (n * (n - 3))


def dependence(gram: Tensor, weights: Tensor) -> Tensor:
    """HSIC of each Gram matrix, (units, n, n), with what `weights` (n, n) were made of: (units,). Or of pairs both."""
    return gram.flatten(1) @ weights.flatten()


def pairwise_dependence(gram: Tensor, estimator: Estimator) -> Tensor:
    """HSIC between all pairs of Gram matrices: (units, n, n) -> (units, units)."""
    centred = center(gram, estimator).flatten(1)
    return centred @ centred.T * normaliser(gram.shape[-1], estimator)
