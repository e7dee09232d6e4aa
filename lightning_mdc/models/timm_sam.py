"""timm's `VisionTransformerSAM`, the image encoder of Segment Anything: attention in windows and, in some blocks, over
the whole grid, with relative positions that depend on the queries.

Heads and neurons can leave; tokens are places of a grid and cannot.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from timm.layers import ClassifierHead, NormMlpClassifierHead, PatchEmbed
from timm.models import vision_transformer_sam as sam
from torch import nn

from lightning_mdc.errors import ArtifactError, UnsupportedModelError
from lightning_mdc.models.anatomy import Anatomy, Block, Family
from lightning_mdc.models.compiled import unwrap
from lightning_mdc.models.parts import own_methods
from lightning_mdc.models.swapping import original_class
from lightning_mdc.models.timm_attention import NoneToo, PositionBias, heads_of
from lightning_mdc.models.timm_constructor import (
    act_from,
    act_spec,
    check_args,
    check_depth,
    check_positive,
    in_chans,
    norm_from,
    norm_spec,
    one_size,
)
from lightning_mdc.models.timm_swin import grid_of
from lightning_mdc.models.timm_vit import counted_macs, foreign_part, not_plain, two_halves

_MODEL_METHODS = ("forward", "forward_features", "forward_head")


class TimmSAM(Family):
    """The family of timm's `VisionTransformerSAM`."""

    name = "timm_sam"
    description = "timm VisionTransformerSAM (heads and neurons)"

    def accepts(self, module: nn.Module) -> bool:
        return isinstance(module, sam.VisionTransformerSAM) and self.refusal(module) is None

    def refusal(self, module: nn.Module) -> str | None:
        """The part that computes another way than timm's."""
        if not isinstance(module, sam.VisionTransformerSAM):
            return None
        if (own := own_methods(module, (sam.VisionTransformerSAM,), _MODEL_METHODS)) is not None:
            return own
        parts: list[tuple[str, Any, tuple[type, ...]]] = [("patch_embed", module.patch_embed, (PatchEmbed,))]
        for index, block in enumerate(_blocks(module)):
            parts.append((f"blocks.{index}", block, (sam.Block,)))
        if (found := foreign_part(parts)) is not None:
            return found
        for index, block in enumerate(_blocks(module)):
            if (found := not_plain(f"blocks.{index}.attn", block.attn, (sam.Attention,))) is not None:
                return found
        return None

    def anatomy(self, model: Any) -> Anatomy:
        return Anatomy(
            model=model,
            name=original_class(model).__name__,
            family=self,
            blocks=tuple(_block(index, block, model) for index, block in enumerate(_blocks(model))),
            dim=model.embed_dim,
            num_prefix_tokens=0,
            class_rows=(),
            grid=tuple(model.patch_embed.grid_size),
            input_size=(in_chans(model), *model.patch_embed.img_size),
            grid_of=partial(_grid_of, model),
            fixed_macs=lambda size, _: _outside_macs(model, size),
            tokens_at=partial(_tokens_at, model),
            no_tokens="blocks.0 (Block) takes its tokens as a grid, which it cuts into windows",
            classifies=not isinstance(getattr(model.head, "fc", model.head), nn.Identity),
        )

    def describe(self, model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        block = next(_blocks(model))
        norm, act = norm_spec(block.norm1, "blocks.0.norm1"), act_spec(block.mlp.act, "blocks.0.mlp.act")
        return {"norm": norm, "act": act, "args": _args(model, block, sizes)}

    def check_spec(self, spec: Mapping[str, Any], tensors: Collection[str]) -> None:
        _check_fields(spec)
        check_depth(spec["args"]["depth"], tensors)

    def build(self, spec: Mapping[str, Any]) -> nn.Module:
        _check_fields(spec)
        args = {name: tuple(value) if isinstance(value, list) else value for name, value in spec["args"].items()}
        return sam.VisionTransformerSAM(**args, norm_layer=norm_from(spec["norm"]), act_layer=act_from(spec["act"]))


def _blocks(model: Any) -> Iterator[Any]:
    return map(unwrap, model.blocks)


# --- what it is made of -----------------------------------------------------------------------------------------------


def _block(index: int, block: Any, model: Any) -> Block:
    name, window = f"blocks.{index}", block.window_size**2 or None
    bias = PositionBias()
    if block.attn.use_rel_pos:
        bias = PositionBias(per_token=partial(_bias_macs, block, tuple(model.patch_embed.grid_size)))
    heads = heads_of(index, f"{name}.attn", block.attn, NoneToo, bias, window)
    return two_halves(index, name, block, model.embed_dim, heads, block.norm2)


def _bias_macs(block: Any, own_grid: tuple[int, int], tokens: Any) -> Any:
    """For a head and a token: its query meets the relative positions of all rows and of all columns that it sees."""
    if block.window_size:
        return 2 * block.window_size * block.attn.head_dim
    height = np.rint(np.sqrt(tokens * own_grid[0] / own_grid[1])).astype(np.int64)  # `_grid_of` knows no other shape
    return (height + tokens // height) * block.attn.head_dim


def _grid_of(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    height, width = grid_of(model, size)
    own_height, own_width = model.patch_embed.grid_size
    if height * own_width != width * own_height and any(block.attn.use_rel_pos for block in _blocks(model)):
        raise UnsupportedModelError(
            f"input_size={tuple(size)}: with relative positions, only images of the shape of "
            f"{tuple(model.patch_embed.img_size)} are priced"
        )
    return height, width


def _tokens_at(model: Any, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Attention sees whole windows, filled up at the border; the MLP sees the grid."""
    grid, tokens = _grid_of(model, size), []
    for side in (block.window_size for block in _blocks(model)):
        filled = [-(-length // side) * side for length in grid] if side else grid
        tokens.append((math.prod(filled), math.prod(grid)))
    return tokens


def _outside_macs(model: Any, size: tuple[int, int]) -> int:
    """Of patch embedding, neck and head."""
    grid, head = _grid_of(model, size), model.head
    convolutions = [model.patch_embed.proj, *(part for part in model.neck.modules() if isinstance(part, nn.Conv2d))]
    total: int = math.prod(grid) * sum(layer.weight.numel() for layer in convolutions)
    if not isinstance(head, (ClassifierHead, NormMlpClassifierHead)):
        return total + counted_macs(head, (1, model.num_features, *grid), "head")
    layers = sum(part.weight.numel() for part in head.modules() if isinstance(part, (nn.Linear, nn.Conv2d)))
    return total + layers * (1 if model.global_pool else math.prod(grid))


# --- constructor arguments --------------------------------------------------------------------------------------------

_ARGS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("img_size", "patch_size", "global_attn_indexes"), (list,)),
    **dict.fromkeys(("in_chans", "num_classes", "embed_dim", "depth", "num_heads"), (int,)),
    **dict.fromkeys(("window_size", "neck_chans"), (int,)),
    **dict.fromkeys(("mlp_ratio", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate"), (int, float)),
    **dict.fromkeys(("attn_drop_rate", "drop_path_rate"), (int, float)),
    **dict.fromkeys(("qkv_bias", "qk_norm", "pre_norm", "use_abs_pos", "use_rel_pos", "use_rope"), (bool,)),
    "global_pool": (str,),
    "init_values": (float, type(None)),
    "head_hidden_size": (int, type(None)),
    "ref_feat_shape": (list, type(None)),
}


def _args(model: Any, block: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    embed, attn, blocks = model.patch_embed, block.attn, list(_blocks(model))
    neck = [part for part in model.neck.modules() if isinstance(part, nn.Conv2d)]
    ropes: list[Any] = [getattr(rope, "ref_feat_shape", None) for rope in (model.rope_global, model.rope_window)]
    return {
        "img_size": list(embed.img_size),
        "patch_size": list(embed.patch_size),
        "in_chans": in_chans(model),
        "num_classes": model.num_classes,
        "embed_dim": model.embed_dim,
        "depth": len(blocks),
        "num_heads": one_size(sizes, "heads", lambda: attn.num_heads),
        # int(dim * ratio) must give the hidden size back; half a unit keeps the product off the edge.
        "mlp_ratio": (one_size(sizes, "neurons", lambda: block.mlp.fc2.in_features) + 0.5) / model.embed_dim,
        "qkv_bias": attn.qkv.bias is not None,
        "qk_norm": not isinstance(attn.q_norm, nn.Identity),
        "init_values": None if isinstance(block.ls1, nn.Identity) else 1e-5,  # only whether there is one
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "drop_rate": model.head.drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "patch_drop_rate": getattr(model.patch_drop, "prob", 0.0),
        "proj_drop_rate": attn.proj_drop.p,
        "attn_drop_rate": attn.attn_drop.p,
        "drop_path_rate": getattr(blocks[-1].drop_path1, "drop_prob", None) or 0.0,
        "use_abs_pos": model.pos_embed is not None,
        "use_rel_pos": attn.use_rel_pos,
        "use_rope": model.rope_global is not None,
        "window_size": max(part.window_size for part in blocks),
        "global_attn_indexes": [index for index, part in enumerate(blocks) if not part.window_size],
        "neck_chans": neck[0].out_channels if neck else 0,
        "global_pool": model.global_pool,
        "head_hidden_size": model.head.num_features if isinstance(model.head, NormMlpClassifierHead) else None,
        "ref_feat_shape": None if None in ropes else [list(shape) for shape in ropes],
    }


def _check_fields(spec: Mapping[str, Any]) -> None:
    check_args(spec, ("norm", "act"), _ARGS)
    args = spec["args"]
    check_positive(args, "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")
    if not all(type(number) is int and 0 <= number < args["depth"] for number in args["global_attn_indexes"]):
        raise ArtifactError(f"constructor argument global_attn_indexes={args['global_attn_indexes']!r}: no blocks")
    if not 0 <= args["window_size"] <= 65536 or not 0 <= args["neck_chans"] <= 65536:
        raise ArtifactError("constructor arguments window_size and neck_chans: expected sizes")
