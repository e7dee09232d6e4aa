"""Other tools' slim models, with as many heads and neurons as ours: only the choice of units differs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.models import find_anatomy

MISSING = "Torch-Pruning is missing: pip install -e '.[bench]'"


def torch_pruning(
    model: nn.Module, policy: mdc.Policy, importance: str, batches: Iterable[tuple[Tensor, Tensor]] = ()
) -> nn.Module:
    """A slim copy of a vision transformer by Torch-Pruning, with as many heads and neurons per block as `policy` keeps;
    tokens all stay.

    Args:
        model: the dense model.
        policy: heads and neurons.
        importance: ``"taylor"``, summed over the gradients of the batches, or ``"magnitude"``.
        batches: (images, labels) for the gradients of Taylor's.
    """
    try:
        import torch_pruning as tp
    except ImportError as error:
        raise SystemExit(MISSING) from error
    slim = copy.deepcopy(model).eval()
    counts = find_anatomy(model).counts(policy)
    fewer: dict[nn.Module, float] = {}
    num_heads: dict[nn.Module, int] = {}
    for units in find_anatomy(slim).all_units:
        # Its weight's rows are the units'.
        makes = next(part.module for part in units.slices if isinstance(part.module, nn.Linear) and part.dim == 0)
        kept = int(counts.units[units.dimension][units.block])
        # It rounds against us where a product is a hair above or below the whole number.
        fewer[makes] = max(0.0, 1 - kept / units.count - 1e-6)
        if units.dimension == "heads":
            num_heads[makes] = units.count
    layers = (layer for layer in slim.modules() if isinstance(layer, (nn.Linear, nn.Conv2d)))
    score = {"taylor": tp.importance.GroupTaylorImportance, "magnitude": tp.importance.GroupMagnitudeImportance}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the class token is no layer
        pruner = tp.pruner.BasePruner(
            slim,
            torch.zeros(1, *find_anatomy(model).input_size),
            importance=score[importance](),
            # Of the channels inside a head, none of which leaves; at 0 no head would be looked at either.
            pruning_ratio=0.5,
            pruning_ratio_dict={layer: ratio for layer, ratio in fewer.items() if layer not in num_heads},
            num_heads=dict(num_heads),
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio_dict={layer: fewer[layer] for layer in num_heads},
            ignored_layers=[layer for layer in layers if layer not in fewer],
        )
        slim.zero_grad()
        for images, labels in batches:
            F.cross_entropy(slim(images), labels).backward()
        pruner.step()
    slim.zero_grad()
    for module in slim.modules():  # what is left to the user: the sizes that attention modules keep of themselves
        qkv: Any = getattr(module, "qkv", None)
        if qkv in pruner.num_heads:
            module.num_heads, module.attn_dim = pruner.num_heads[qkv], qkv.out_features // 3
    wanted = mdc.policy_macs(model, mdc.Policy(heads=policy.heads, neurons=policy.neurons))
    if (left := mdc.macs(slim)) != wanted:
        raise RuntimeError(f"Torch-Pruning left {left} MACs, wanted were {wanted}")
    return slim
