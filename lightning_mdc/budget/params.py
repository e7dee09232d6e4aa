"""Parameters: of any module by counting, and in closed form what one head or neuron brings along."""

from __future__ import annotations

from torch import nn

from lightning_mdc.models import UnitSite


def num_params(model: nn.Module) -> int:
    """Parameters of any module."""
    return sum(p.numel() for p in model.parameters())


def params_per_unit(site: UnitSite) -> int:
    """Parameters that leave with one unit of `site`: weights, biases, and its share of a norm that spans the units."""
    biases = sum(producer.copies for producer in site.producers if producer.linear.bias is not None)
    norm = 0 if site.norm is None else sum(1 for _ in site.norm.parameters())
    return weights_per_unit(site) + site.unit_width * (biases + norm)


def weights_per_unit(site: UnitSite) -> int:
    """Weights of the Linear layers that one unit of `site` has, which are its MACs per token as well."""
    rows = sum(producer.copies * producer.linear.in_features for producer in site.producers)
    return site.unit_width * (rows + site.consumer.out_features)
