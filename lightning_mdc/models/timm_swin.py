"""timm's Swin Transformers, V2 and V2-CR too: attention in windows, which every other block shifts, in stages of
falling resolution and rising width.

Heads and neurons can leave; tokens are places in a window and cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from timm.layers import ClassifierHead, PatchEmbed
from timm.models import swin_transformer as swin
from timm.models import swin_transformer_v2 as swin_v2
from timm.models import swin_transformer_v2_cr as swin_v2_cr
from torch import Tensor, nn

from lightning_mdc.errors import ArtifactError, UnsupportedModelError
from lightning_mdc.models.anatomy import Anatomy, Block, Family, Slice, Units
from lightning_mdc.models.compiled import unwrap
from lightning_mdc.models.parts import own_methods
from lightning_mdc.models.swapping import original_class
from lightning_mdc.models.timm_attention import AnyHeads, PositionBias, bias_mlp, bias_table, heads_of
from lightning_mdc.models.timm_constructor import (
    act_from,
    act_spec,
    as_tuple,
    check_args,
    check_depth,
    in_chans,
    look_up,
    norm_from,
    norm_spec,
    parts_of,
)
from lightning_mdc.models.timm_vit import counted_macs, foreign_part, not_plain, two_halves

# --- the generations --------------------------------------------------------------------------------------------------


class _CosineHeads(AnyHeads):
    """Mixin: V2 compares by cosines, on a scale of each head's own."""

    logit_scale: Tensor

    def compared(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.logit_scale.reshape(-1, 1, 1).clamp(max=math.log(1.0 / 0.01)).exp()
        return F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)


class _SwinV2Heads(_CosineHeads):
    def position_bias(self: Any) -> Tensor:
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)
        return 16 * table[self.relative_position_index].permute(2, 0, 1).sigmoid()[None]


class _SwinV2CrHeads(_CosineHeads):
    def position_bias(self: Any) -> Tensor:
        bias: Tensor = self._relative_positional_encodings()
        return bias


def _scaled(attn: Any, bias: PositionBias) -> PositionBias:
    return bias._replace(slices=[*bias.slices, Slice(attn, "logit_scale", width=1)])


def _swin_v2_bias(attn: Any) -> PositionBias:
    positions = math.prod(attn.relative_coords_table.shape[:-1])
    return _scaled(attn, bias_mlp(attn.cpb_mlp[0], attn.cpb_mlp[2], positions))


def _swin_v2_cr_bias(attn: Any) -> PositionBias:
    return _scaled(attn, bias_mlp(attn.meta_mlp.fc1, attn.meta_mlp.fc2, len(attn.relative_coordinates_log)))


class _Generation(NamedTuple):
    """One of the three.

    Attributes:
        model, stage, block, attention, merging: its classes.
        stages: what the model calls them.
        heads: mixin for its attention.
        bias: of an attention, what its bias of positions is made of.
        is_pre_norm: whether blocks normalise what comes in.
    """

    model: type
    stage: type
    block: type
    attention: type
    merging: type
    stages: str
    heads: type
    bias: Callable[[Any], PositionBias]
    is_pre_norm: bool = False


_GENERATIONS = {
    kind.model.__name__: kind
    for kind in (
        _Generation(
            swin.SwinTransformer,
            swin.SwinTransformerStage,
            swin.SwinTransformerBlock,
            swin.WindowAttention,
            swin.PatchMerging,
            "layers",
            AnyHeads,
            bias_table,
            is_pre_norm=True,
        ),
        _Generation(
            swin_v2.SwinTransformerV2,
            swin_v2.SwinTransformerV2Stage,
            swin_v2.SwinTransformerV2Block,
            swin_v2.WindowAttention,
            swin_v2.PatchMerging,
            "layers",
            _SwinV2Heads,
            _swin_v2_bias,
        ),
        _Generation(
            swin_v2_cr.SwinTransformerV2Cr,
            swin_v2_cr.SwinTransformerV2CrStage,
            swin_v2_cr.SwinTransformerV2CrBlock,
            swin_v2_cr.WindowMultiHeadAttention,
            swin_v2_cr.PatchMerging,
            "stages",
            _SwinV2CrHeads,
            _swin_v2_cr_bias,
        ),
    )
}
_MODEL_METHODS = ("forward", "forward_features", "forward_head")
_PART_METHODS = ("forward", "_attn", "_shifted_window_attn")  # blocks have one more than forward
_EMBEDDINGS = (PatchEmbed, swin_v2_cr.PatchEmbed)


class TimmSwin(Family):
    """The family of timm's `SwinTransformer`, `SwinTransformerV2` and `SwinTransformerV2Cr`."""

    name = "timm_swin"
    description = "timm SwinTransformer, SwinTransformerV2 and SwinTransformerV2Cr (heads and neurons)"

    def accepts(self, module: nn.Module) -> bool:
        return _generation(module) is not None and self.refusal(module) is None

    def refusal(self, module: nn.Module) -> str | None:
        """The part that computes another way than timm's."""
        kind = _generation(module)
        if kind is None:
            return None
        if (own := own_methods(module, (kind.model,), _MODEL_METHODS)) is not None:
            return own
        parts: list[tuple[str, Any, tuple[type, ...]]] = [("patch_embed", module.patch_embed, _EMBEDDINGS)]
        for name, stage in _stages(module, kind):
            parts.append((name, stage, (kind.stage,)))
            parts.append((f"{name}.downsample", stage.downsample, (kind.merging, nn.Identity)))
        parts += [(name, block, (kind.block,)) for name, block in _blocks(module, kind)]
        return foreign_part(parts, _PART_METHODS)

    def anatomy(self, model: Any) -> Anatomy:
        kind = _generation(model)
        assert kind is not None  # it was accepted
        blocks = tuple(_block(i, name, block, kind) for i, (name, block) in enumerate(_blocks(model, kind)))
        return Anatomy(
            model=model,
            name=original_class(model).__name__,
            family=self,
            blocks=blocks,
            dim=model.num_features,
            num_prefix_tokens=0,
            class_rows=(),
            grid=tuple(model.patch_embed.grid_size),
            input_size=(in_chans(model), *model.patch_embed.img_size),
            grid_of=partial(grid_of, model),
            fixed_macs=lambda size, tokens: _outside_macs(model, kind, size),
            tokens_at=partial(_tokens_at, model, kind),
            no_tokens=f"{blocks[0].name}.attn ({kind.attention.__name__}) attends in windows, where tokens are places",
            classifies=not isinstance(getattr(model.head, "fc", model.head), nn.Identity),
        )

    def describe(self, model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        kind = _generation(model)
        assert kind is not None
        _, block = next(_blocks(model, kind))
        return {
            "class": kind.model.__name__,
            "norm": norm_spec(block.norm1, f"{kind.stages}.0.blocks.0.norm1"),
            "act": act_spec(block.mlp.act, f"{kind.stages}.0.blocks.0.mlp.act"),
            "args": _common_args(model, kind, sizes) | _OWN_ARGS[kind.model.__name__](model, kind),
        }

    def check_spec(self, spec: Mapping[str, Any], tensors: Collection[str]) -> None:
        kind = _check_fields(spec)
        check_depth(sum(spec["args"]["depths"]), tensors, rf"{kind.stages}\.\d+\.blocks\.\d+\.")

    def build(self, spec: Mapping[str, Any]) -> nn.Module:
        kind = _check_fields(spec)
        args = {name: as_tuple(value) for name, value in spec["args"].items()}
        if len(set(args["window_size"])) == 1:  # older timm would take two pairs for height and width
            args["window_size"] = args["window_size"][0]
        if kind.model is swin_v2.SwinTransformerV2:
            args["act_layer"] = act_from(spec["act"])
        model: nn.Module = kind.model(**args, norm_layer=norm_from(spec["norm"]))
        return model


def _generation(module: nn.Module) -> _Generation | None:
    return next((kind for kind in _GENERATIONS.values() if isinstance(module, kind.model)), None)


def _stages(model: Any, kind: _Generation) -> Iterator[tuple[str, Any]]:
    for index, stage in enumerate(getattr(model, kind.stages)):
        yield f"{kind.stages}.{index}", unwrap(stage)


def _blocks(model: Any, kind: _Generation) -> Iterator[tuple[str, Any]]:
    for name, stage in _stages(model, kind):
        for index, block in enumerate(stage.blocks):
            yield f"{name}.blocks.{index}", unwrap(block)


# --- what a block is made of ------------------------------------------------------------------------------------------


def _block(index: int, name: str, block: Any, kind: _Generation) -> Block:
    attn, area = block.attn, math.prod(block.window_size)
    heads: Units | str | None = not_plain(f"{name}.attn", attn, (kind.attention,))
    heads = heads or heads_of(index, f"{name}.attn", attn, kind.heads, kind.bias(attn), window=area)
    return two_halves(index, name, block, block.dim, heads, block.norm2 if kind.is_pre_norm else block.mlp, area)


# --- what it costs outside the blocks ---------------------------------------------------------------------------------


def grid_of(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    embed = model.patch_embed
    if tuple(size) == tuple(embed.img_size):
        return tuple(embed.grid_size)
    if embed.strict_img_size:
        raise UnsupportedModelError(
            f"input_size={tuple(size)}: this {original_class(model).__name__} takes {tuple(embed.img_size)} images "
            "only; create it with strict_img_size=False, or call model.set_input_size first"
        )
    grid = tuple(side // patch for side, patch in zip(size, embed.patch_size, strict=True))
    if min(grid) < 1 or any(side % patch for side, patch in zip(size, embed.patch_size, strict=True)):
        raise UnsupportedModelError(
            f"input_size={tuple(size)}: not a multiple of the {tuple(embed.patch_size)} patches of this model"
        )
    return grid[0], grid[1]


def _grids(model: Any, kind: _Generation, size: tuple[int, int]) -> Iterator[tuple[Any, tuple[int, int]]]:
    """Each stage, with the grid that its blocks see."""
    height, width = grid_of(model, size)
    for _, stage in _stages(model, kind):
        if not isinstance(stage.downsample, nn.Identity):
            height, width = (height + 1) // 2, (width + 1) // 2
        yield stage, (height, width)


def _tokens_at(model: Any, kind: _Generation, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Attention sees whole windows, filled up at the border; the MLP sees the grid."""
    tokens = []
    for stage, grid in _grids(model, kind, size):
        for window in (tuple(unwrap(block).window_size) for block in stage.blocks):  # type: ignore[arg-type]
            windows = math.prod(-(-side // seen) for side, seen in zip(grid, window, strict=True))
            tokens.append((windows * math.prod(window), math.prod(grid)))
    return tokens


def _outside_macs(model: Any, kind: _Generation, size: tuple[int, int]) -> int:
    """Of patch embedding, merging and head."""
    total = math.prod(grid_of(model, size)) * model.patch_embed.proj.weight.numel()
    area = 0
    for stage, grid in _grids(model, kind, size):
        area = math.prod(grid)
        if not isinstance(stage.downsample, nn.Identity):
            total += area * stage.downsample.reduction.weight.numel()
    head = model.head
    if not isinstance(head, ClassifierHead):
        channels_first = kind.model is swin_v2_cr.SwinTransformerV2Cr
        shape = (1, model.num_features, *grid) if channels_first else (1, *grid, model.num_features)
        return total + counted_macs(head, shape, "head")
    if isinstance(head.fc, nn.Linear):
        return total + head.fc.weight.numel() * (1 if head.global_pool.pool_type else area)
    return total + (0 if isinstance(head.fc, nn.Identity) else counted_macs(head.fc, (1, head.num_features), "head.fc"))


# --- constructor arguments --------------------------------------------------------------------------------------------

_ARGS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("img_size", "depths", "num_heads", "window_size"), (list,)),
    **dict.fromkeys(("in_chans", "num_classes", "embed_dim"), (int,)),
    **dict.fromkeys(("always_partition", "strict_img_size"), (bool,)),
    **dict.fromkeys(("drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"), (int, float)),
    "patch_size": (int, list),
    "global_pool": (str,),
}
_ARGS_OF: dict[str, dict[str, tuple[type, ...]]] = {
    "SwinTransformer": {"head_dim": (list,), "mlp_ratio": (list,), "qkv_bias": (bool,)},
    "SwinTransformerV2": {"pretrained_window_sizes": (list,), "mlp_ratio": (int, float), "qkv_bias": (bool,)},
    "SwinTransformerV2Cr": {
        "mlp_ratio": (int, float),
        "extra_norm_period": (int,),
        "extra_norm_stage": (bool,),
        "sequential_attn": (bool,),
    },
}


def _common_args(model: Any, kind: _Generation, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    stages: list[list[Any]] = [[unwrap(block) for block in stage.blocks] for _, stage in _stages(model, kind)]
    embed, last = model.patch_embed, stages[-1][-1]
    depths = [len(blocks) for blocks in stages]
    heads, neurons = (sizes.get(d) or (0,) * sum(depths) for d in ("heads", "neurons"))
    firsts = [sum(depths[:stage]) for stage in range(len(depths))]
    dims = [blocks[0].dim for blocks in stages]
    return {
        "img_size": list(embed.img_size),
        "patch_size": getattr(model, "patch_size", list(embed.patch_size)),
        "in_chans": in_chans(model),
        "num_classes": model.num_classes,
        "global_pool": model.head.global_pool.pool_type,
        "embed_dim": dims[0],
        "depths": depths,
        "num_heads": [heads[first] or blocks[0].attn.num_heads for first, blocks in zip(firsts, stages, strict=True)],
        "window_size": [list(blocks[0].window_size) for blocks in stages],
        "always_partition": stages[0][0].always_partition,
        "strict_img_size": embed.strict_img_size,
        # int(dim * ratio) gives the hidden size back in each stage: a quarter of a unit keeps the last off the edge.
        "mlp_ratio": ((neurons[firsts[-1]] or stages[-1][0].mlp.fc2.in_features) + 0.25) / dims[-1],
        "drop_rate": model.head.drop.p,
        "proj_drop_rate": last.attn.proj_drop.p,
        "attn_drop_rate": last.attn.attn_drop.p,
        "drop_path_rate": getattr(last.drop_path1, "drop_prob", None) or 0.0,
    }


def _swin_args(model: Any, kind: _Generation) -> dict[str, Any]:
    first: list[Any] = [unwrap(stage.blocks[0]) for _, stage in _stages(model, kind)]
    return {
        "head_dim": [round(block.attn.scale**-2) for block in first],
        "mlp_ratio": [block.mlp_ratio for block in first],
        "qkv_bias": first[0].attn.qkv.bias is not None,
    }


def _swin_v2_args(model: Any, kind: _Generation) -> dict[str, Any]:
    first: list[Any] = [unwrap(stage.blocks[0]) for _, stage in _stages(model, kind)]
    return {
        "pretrained_window_sizes": [list(block.attn.pretrained_window_size) for block in first],
        "mlp_ratio": first[0].mlp_ratio,
        "qkv_bias": first[0].attn.q_bias is not None,
    }


def _swin_v2_cr_args(model: Any, kind: _Generation) -> dict[str, Any]:
    normed = [
        [not isinstance(unwrap(block).norm3, nn.Identity) for block in stage.blocks]
        for _, stage in _stages(model, kind)
    ]
    inside = [blocks.index(True) + 1 for blocks in normed if any(blocks[:-1])]
    return {
        "extra_norm_period": min(inside, default=0),
        "extra_norm_stage": all(blocks[-1] for blocks in normed) and len(normed) > 1,
        "sequential_attn": next(_blocks(model, kind))[1].attn.sequential_attn,
    }


_OWN_ARGS: dict[str, Callable[[Any, _Generation], dict[str, Any]]] = {
    "SwinTransformer": _swin_args,
    "SwinTransformerV2": _swin_v2_args,
    "SwinTransformerV2Cr": _swin_v2_cr_args,
}


def _check_fields(spec: Mapping[str, Any]) -> _Generation:
    kind: _Generation = look_up(_GENERATIONS, spec.get("class"), "class")
    check_args(spec, ("class", "norm", "act"), _ARGS | _ARGS_OF[kind.model.__name__])
    args = spec["args"]
    depths = args["depths"]
    if not depths or not all(type(depth) is int and 0 < depth <= 4096 for depth in depths):
        raise ArtifactError(f"constructor argument depths={depths!r}: expected the number of blocks of each stage")
    for name, value in args.items():
        listed = isinstance(value, list)
        if listed and len(value) != (2 if name in ("img_size", "patch_size") else len(depths)):
            raise ArtifactError(f"constructor argument {name}={value!r} has the wrong length")
        if name != "global_pool" and not all(0 <= number < 2**20 for number in parts_of(value)):
            raise ArtifactError(f"constructor argument {name}={value!r} is out of range")
    return kind
