"""timm's pooling-based vision transformer: timm's own blocks in stages, between which a convolution pools the grid.

Heads and neurons can leave; tokens are pixels of what is pooled and cannot.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

from timm.models import pit
from torch import nn

from lightning_mdc.errors import ArtifactError
from lightning_mdc.models.anatomy import Anatomy, Block, Family
from lightning_mdc.models.compiled import unwrap
from lightning_mdc.models.parts import own_methods
from lightning_mdc.models.swapping import original_class
from lightning_mdc.models.timm_constructor import check_args, check_depth, check_positive
from lightning_mdc.models.timm_vit import PLAIN, block_of, check_size, counted_macs, foreign_part

_MODEL_METHODS = ("forward", "forward_features", "forward_head")


class TimmPiT(Family):
    """The family of timm's `PoolingVisionTransformer`."""

    name = "timm_pit"
    description = "timm PoolingVisionTransformer (PiT; heads and neurons)"

    def accepts(self, module: nn.Module) -> bool:
        return isinstance(module, pit.PoolingVisionTransformer) and self.refusal(module) is None

    def refusal(self, module: nn.Module) -> str | None:
        """The part that computes another way than timm's."""
        if not isinstance(module, pit.PoolingVisionTransformer):
            return None
        if (own := own_methods(module, (pit.PoolingVisionTransformer,), _MODEL_METHODS)) is not None:
            return own
        parts: list[tuple[str, Any, tuple[type, ...]]] = [("patch_embed", module.patch_embed, (pit.ConvEmbedding,))]
        for index, stage in enumerate(module.transformers):
            parts.append((f"transformers.{index}", stage, (pit.Transformer,)))
            if index:
                parts.append((f"transformers.{index}.pool", stage.pool, (pit.Pooling,)))
        return foreign_part(parts)

    def anatomy(self, model: Any) -> Anatomy:
        blocks: list[Block] = []
        tokens: list[tuple[int, int]] = []
        for number, (stage, grid, dim) in enumerate(_stages(model)):
            for place, block in enumerate(stage.blocks):
                name = f"transformers.{number}.blocks.{place}"
                blocks.append(block_of(PLAIN, len(blocks), name, unwrap(block), dim))
                tokens.append((math.prod(grid) + model.num_tokens,) * 2)
        return Anatomy(
            model=model,
            name=original_class(model).__name__,
            family=self,
            blocks=tuple(blocks),
            dim=model.embed_dim,
            num_prefix_tokens=model.num_tokens,
            class_rows=tuple(range(model.num_tokens)),
            grid=tuple(model.patch_embed.grid_size),
            input_size=(model.patch_embed.conv.in_channels, *model.patch_embed.img_size),
            grid_of=partial(_grid_of, model),
            fixed_macs=lambda size, _: _outside_macs(model),
            tokens_at=lambda size: tokens,
            no_tokens="transformers.1.pool (Pooling) is a convolution over the grid of all tokens",
            classifies=not isinstance(model.head, nn.Identity),
        )

    def describe(self, model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        depths = [len(stage.blocks) for stage in model.transformers]
        embed = model.patch_embed
        blocks: list[Any] = [unwrap(block) for stage in model.transformers for block in stage.blocks]
        first, last = blocks[0], blocks[-1]
        hidden = (sizes.get("neurons") or (0,))[-1] or last.mlp.fc2.in_features
        return {
            "args": {
                "img_size": list(embed.img_size),
                "patch_size": list(embed.patch_size),
                "stride": embed.conv.stride[0],
                "base_dims": list(model.base_dims),
                "depth": depths,
                "heads": list(model.heads),
                # int(dim * ratio) gives the hidden size back in each stage: a quarter keeps the last off the edge.
                "mlp_ratio": (hidden + 0.25) / model.embed_dim,
                "num_classes": model.num_classes,
                "in_chans": embed.conv.in_channels,
                "global_pool": model.global_pool,
                "distilled": model.head_dist is not None,
                "drop_rate": model.head_drop.p,
                "pos_drop_rate": model.pos_drop.p,
                "proj_drop_rate": first.attn.proj_drop.p,
                "attn_drop_rate": first.attn.attn_drop.p,
                "drop_path_rate": getattr(last.drop_path1, "drop_prob", None) or 0.0,
            }
        }

    def check_spec(self, spec: Mapping[str, Any], tensors: Collection[str]) -> None:
        _check_fields(spec)
        check_depth(sum(spec["args"]["depth"]), tensors, r"transformers\.\d+\.blocks\.\d+\.")

    def build(self, spec: Mapping[str, Any]) -> nn.Module:
        _check_fields(spec)
        args = spec["args"]
        sides = {name: tuple(args[name]) for name in ("img_size", "patch_size")}
        return pit.PoolingVisionTransformer(**args | sides)


def _stages(model: Any) -> Iterator[tuple[Any, tuple[int, int], int]]:
    """Each stage, with the grid and the width that its blocks see."""
    grid, dim = tuple(model.patch_embed.grid_size), model.patch_embed.conv.out_channels
    for stage in model.transformers:
        if stage.pool is not None:
            conv = stage.pool.conv
            ways = zip(grid, conv.kernel_size, conv.stride, conv.padding, strict=True)
            grid, dim = tuple((side + 2 * pad - size) // step + 1 for side, size, step, pad in ways), conv.out_channels
        yield stage, grid, dim


def _grid_of(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    check_size(model, size, model.patch_embed.img_size)
    return tuple(model.patch_embed.grid_size)


def _outside_macs(model: Any) -> int:
    """Of embedding, pooling and heads."""
    total = math.prod(model.patch_embed.grid_size) * model.patch_embed.conv.weight.numel()
    for stage, grid, _ in _stages(model):
        if stage.pool is not None:
            total += math.prod(grid) * stage.pool.conv.weight.numel() + model.num_tokens * stage.pool.fc.weight.numel()
    for name in ("head", "head_dist"):
        head = getattr(model, name)
        if isinstance(head, nn.Linear):
            total += head.weight.numel() * (1 if model.global_pool else model.num_tokens)
        elif head is not None and not isinstance(head, nn.Identity):
            total += counted_macs(head, (1, model.embed_dim), name)
    return total


_ARGS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("img_size", "patch_size", "base_dims", "depth", "heads"), (list,)),
    **dict.fromkeys(("stride", "num_classes", "in_chans"), (int,)),
    **dict.fromkeys(("mlp_ratio", "drop_rate", "pos_drop_rate", "proj_drop_rate"), (int, float)),
    **dict.fromkeys(("attn_drop_rate", "drop_path_rate"), (int, float)),
    "global_pool": (str,),
    "distilled": (bool,),
}


def _check_fields(spec: Mapping[str, Any]) -> None:
    check_args(spec, (), _ARGS)
    args = spec["args"]
    check_positive(args, "img_size", "patch_size", "base_dims", "depth", "heads", "stride", "in_chans")
    if not len(args["base_dims"]) == len(args["depth"]) == len(args["heads"]):
        raise ArtifactError("constructor arguments base_dims, depth and heads: expected one number per stage of each")
