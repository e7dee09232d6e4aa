"""Other tools' slim models, with as many heads and neurons as ours: only the choice of units differs."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import lightning_mdc as mdc

IMPORTANCES = ("taylor", "magnitude")
MISSING = "needs Torch-Pruning: pip install -e '.[bench]'"


def torch_pruning(
    model: VisionTransformer, policy: mdc.Policy, importance: str, batches: Iterable[tuple[Tensor, Tensor]]
) -> nn.Module:
    """A slim copy of a timm vision transformer by Torch-Pruning, with as many heads and neurons per block as `policy`
    keeps; tokens all stay.

    Args:
        model: the dense model.
        policy: heads and neurons.
        importance: ``"taylor"``, summed over the gradients of the batches, or ``"magnitude"``.
        batches: (images, labels) for the gradients of Taylor's.
    """
    try:
        import torch_pruning as tp
    except ImportError as error:
        raise SystemExit(f"{__file__} {MISSING}") from error
    slim = copy.deepcopy(model).eval()
    counts = mdc.models.find_sites(model).counts(policy)
    blocks: Any = list(slim.blocks)
    heads = {block.attn.qkv: block.attn.num_heads for block in blocks}
    fewer_heads = {qkv: 1 - kept / heads[qkv] - 1e-6 for qkv, kept in zip(heads, counts.heads, strict=True)}
    fewer_neurons = {
        block.mlp.fc1: 1 - (kept + 0.5) / block.mlp.fc1.out_features if kept < block.mlp.fc1.out_features else 0.0
        for block, kept in zip(blocks, counts.neurons, strict=True)
    }
    score = {"taylor": tp.importance.GroupTaylorImportance, "magnitude": tp.importance.GroupMagnitudeImportance}
    pruner = tp.pruner.BasePruner(
        slim,
        torch.zeros(1, *mdc.models.find_sites(model).input_size),
        importance=score[importance](),
        # Of channels inside a head, which do not leave; at 0 no head would be looked at either.
        pruning_ratio=0.5,
        pruning_ratio_dict=fewer_neurons,
        num_heads=dict(heads),
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio_dict={qkv: max(ratio, 0.0) for qkv, ratio in fewer_heads.items()},
        ignored_layers=[slim.patch_embed, slim.head, *(m for b in blocks for m in (b.attn.proj, b.mlp.fc2))],
    )
    if importance == "taylor":
        slim.zero_grad()
        for images, labels in batches:
            F.cross_entropy(slim(images), labels).backward()
    pruner.step()
    slim.zero_grad()
    for block in blocks:
        block.attn.num_heads = pruner.num_heads[block.attn.qkv]
        block.attn.attn_dim = block.attn.qkv.out_features // 3
    return slim
