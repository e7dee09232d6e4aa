"""Slicing Linear layers and norms down to kept units, in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_mdc.models import UnitSite, unit_channels


def cut_units(site: UnitSite, kept: tuple[int, ...]) -> None:
    """Slice one block's heads or neurons in place."""
    if len(kept) == site.num_units:
        return
    channels = unit_channels(torch.tensor(kept, dtype=torch.long), site.unit_width)
    width = site.num_units * site.unit_width
    for producer in site.producers:
        rows = torch.cat([channels + copy_ * width for copy_ in range(producer.copies)])
        _slice(producer.linear, "weight", 0, rows)
        _slice(producer.linear, "bias", 0, rows)
        producer.linear.out_features = len(rows)
    if site.norm is not None:
        narrow_norm(site.norm, channels)
    _slice(site.consumer, "weight", 1, channels)
    site.consumer.in_features = len(channels)
    for name, multiple in site.size_attributes.items():
        setattr(site.owner, name, len(kept) * multiple)


def narrow_norm(norm: nn.Module, channels: Tensor) -> None:
    """Restrict a normalisation over channels to some of them, in place."""
    for name in ("weight", "bias"):
        _slice(norm, name, 0, channels)
    norm.normalized_shape = (len(channels),)  # type: ignore[assignment]


def _slice(module: nn.Module, name: str, dim: int, index: Tensor) -> None:
    old = module._parameters.get(name)
    if old is None:
        return
    # contiguous: index_select along dim 1 already is, and a view would keep the dense tensor alive
    new = old.detach().index_select(dim, index.to(old.device)).contiguous()
    setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
