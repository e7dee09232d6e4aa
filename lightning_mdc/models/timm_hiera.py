"""timm's `Hiera`: stages whose first block pools the queries and widens the stream, attention in mask units first and
over all tokens later.

Heads and neurons can leave; tokens are places in a mask unit and cannot.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from timm.layers import ClNormMlpClassifierHead
from timm.models import hiera
from torch import Tensor, nn

from lightning_mdc.errors import ArtifactError
from lightning_mdc.models.anatomy import Anatomy, Block, Family, Size
from lightning_mdc.models.compiled import unwrap
from lightning_mdc.models.swapping import original_class
from lightning_mdc.models.timm_attention import PositionBias, heads_of
from lightning_mdc.models.timm_constructor import (
    act_spec,
    check_args,
    check_depth,
    in_chans,
    norm_from,
    norm_spec,
    qualified_name,
)
from lightning_mdc.models.timm_vit import check_size, computes_as, counted_macs, foreign_part, is_plain, two_halves

_MODEL_METHODS = ("forward", "forward_features", "forward_head", "_pos_embed")


class _NoneToo:
    """Mixin: its own forward takes any number of heads but none."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if self.heads:
            result: Tensor = super().forward(x)  # type: ignore[misc]
        else:
            result = self.proj(x[:, : x.shape[1] // self.q_stride, :0])
        return result


class TimmHiera(Family):
    """The family of timm's `Hiera`."""

    name = "timm_hiera"
    description = "timm Hiera (heads and neurons)"

    def accepts(self, module: nn.Module) -> bool:
        return isinstance(module, hiera.Hiera) and self.refusal(module) is None

    def refusal(self, module: nn.Module) -> str | None:
        """The part that computes another way than timm's."""
        if not isinstance(module, hiera.Hiera):
            return None
        if not computes_as(module, (hiera.Hiera,), _MODEL_METHODS):
            return "its class overrides a forward of timm's Hiera"
        if len(module.tokens_spatial_shape) != 2:
            return f"its input has {len(module.tokens_spatial_shape)} dimensions, and images have 2"
        parts: list[tuple[str, Any, tuple[type, ...]]] = [("patch_embed", module.patch_embed, (hiera.PatchEmbed,))]
        parts += [(f"blocks.{index}", block, (hiera.HieraBlock,)) for index, block in enumerate(_blocks(module))]
        if (found := foreign_part(parts)) is not None:
            return found
        for index, block in enumerate(_blocks(module)):
            if not is_plain(block.attn, (hiera.MaskUnitAttention,)):
                return f"blocks.{index}.attn is a {qualified_name(block.attn)}, not timm's MaskUnitAttention as it is"
        return None

    def anatomy(self, model: Any) -> Anatomy:
        grid, own = tuple(model.tokens_spatial_shape), _own_size(model)
        tokens, blocks = [], []
        reaching = math.prod(grid)
        for index, block in enumerate(_blocks(model)):
            blocks.append(_block(index, block))
            tokens.append((reaching, reaching // block.attn.q_stride))
            reaching = tokens[-1][1]

        def grid_of(size: tuple[int, int]) -> tuple[int, int]:
            check_size(model, size, own)
            return grid[0], grid[1]

        return Anatomy(
            model=model,
            name=original_class(model).__name__,
            family=self,
            blocks=tuple(blocks),
            dim=model.num_features,
            num_prefix_tokens=0,
            class_rows=(),
            grid=(grid[0], grid[1]),
            input_size=(in_chans(model), *own),
            grid_of=grid_of,
            fixed_macs=lambda size, _: _outside_macs(model, reaching),
            tokens_at=lambda size: tokens,
            no_tokens="blocks.0.attn (MaskUnitAttention) attends in mask units, where tokens are places",
            classifies=not isinstance(getattr(model.head, "fc", model.head), nn.Identity),
        )

    def describe(self, model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        block = next(_blocks(model))
        norm, act = norm_spec(block.norm1, "blocks.0.norm1"), act_spec(block.mlp.act, "blocks.0.mlp.act")
        if act != act_spec(nn.GELU(), ""):
            raise ArtifactError(
                f"blocks.0.mlp.act is a {qualified_name(block.mlp.act)}, which no constructor makes here"
            )
        return {"norm": norm, "args": _args(model, sizes)}

    def check_spec(self, spec: Mapping[str, Any], tensors: Collection[str]) -> None:
        _check_fields(spec)
        check_depth(sum(spec["args"]["stages"]), tensors)

    def build(self, spec: Mapping[str, Any]) -> nn.Module:
        _check_fields(spec)
        args = {name: tuple(value) if isinstance(value, list) else value for name, value in spec["args"].items()}
        return hiera.Hiera(**args, norm_layer=norm_from(spec["norm"]))


def _blocks(model: Any) -> Iterator[Any]:
    return map(unwrap, model.blocks)


# --- what it is made of -----------------------------------------------------------------------------------------------


def _block(index: int, block: Any) -> Block:
    name, attn = f"blocks.{index}", block.attn
    window = attn.window_size * attn.q_stride if attn.use_mask_unit_attn else None
    out = PositionBias(sizes=[Size(attn, "dim_out", lambda kept: kept * attn.head_dim)])
    heads = heads_of(index, f"{name}.attn", attn, _NoneToo, out, window, attn.q_stride)
    # Units of a window stay one after another in the sequence: the reader sees all of an image at once.
    found = two_halves(index, name, block, block.dim, replace(heads, in_windows=False), block.norm2)
    if block.proj is None:
        return found
    return replace(found, rest=(lambda tokens: tokens * block.proj.weight.numel(), found.rest[1]))


def _own_size(model: Any) -> tuple[int, int]:
    height, width = (count * step for count, step in zip(model.tokens_spatial_shape, model.patch_stride, strict=True))
    return height, width


def _outside_macs(model: Any, num_tokens: int) -> int:
    """Of patch embedding and head, which so many tokens reach."""
    head = model.head
    total: int = math.prod(model.tokens_spatial_shape) * model.patch_embed.proj.weight.numel()
    if not isinstance(head, ClNormMlpClassifierHead):
        return total + counted_macs(head, (1, num_tokens, model.num_features), "head")
    layers = sum(part.weight.numel() for part in head.modules() if isinstance(part, nn.Linear))
    return total + layers * (1 if head.pool_type else num_tokens)


# --- constructor arguments --------------------------------------------------------------------------------------------

_LISTS = ("img_size", "stages", "q_stride", "mask_unit_size", "patch_kernel", "patch_stride", "patch_padding")
_ARGS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys((*_LISTS, "mask_unit_attn", "global_pos_size"), (list,)),
    **dict.fromkeys(("in_chans", "embed_dim", "num_heads", "num_classes", "q_pool"), (int,)),
    **dict.fromkeys(
        ("dim_mul", "head_mul", "mlp_ratio", "drop_rate", "drop_path_rate", "patch_drop_rate"), (int, float)
    ),
    **dict.fromkeys(("use_expand_proj", "sep_pos_embed", "abs_win_pos_embed"), (bool,)),
    "global_pool": (str,),
    "init_values": (float, type(None)),
}


def _args(model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    blocks, conv = list(_blocks(model)), model.patch_embed.proj
    heads, neurons = (sizes.get(dimension) or (0,) * len(blocks) for dimension in ("heads", "neurons"))
    stages = [end - start for start, end in zip([-1, *model.stage_ends], model.stage_ends, strict=False)]
    firsts = [end + 1 - stage for stage, end in zip(stages, model.stage_ends, strict=True)]
    num_heads = [heads[first] or blocks[first].attn.heads for first in firsts]
    dims = [blocks[first].dim_out for first in firsts]
    # The attention of a stage begins one block late.
    in_units = [blocks[min(first + 1, len(blocks) - 1)].attn.use_mask_unit_attn for first in firsts]
    in_units[0] = blocks[0].attn.use_mask_unit_attn
    widening = next((block for block in blocks if block.do_expand), None)
    return {
        "img_size": list(_own_size(model)),
        "in_chans": in_chans(model),
        "embed_dim": dims[0],
        "num_heads": num_heads[0],
        "num_classes": model.num_classes,
        "global_pool": model.head.pool_type,
        "stages": stages,
        "q_pool": model.q_pool,
        "q_stride": list(model.q_stride),
        "mask_unit_size": list(model.mask_unit_size),
        "mask_unit_attn": in_units,
        "use_expand_proj": widening is None or widening.proj is not None,
        "dim_mul": dims[1] / dims[0] if len(dims) > 1 else 2.0,
        "head_mul": num_heads[1] / num_heads[0] if len(dims) > 1 else 2.0,
        "patch_kernel": list(conv.kernel_size),
        "patch_stride": list(conv.stride),
        "patch_padding": list(conv.padding),
        # int(dim * ratio) gives the hidden size back in each stage: a quarter of a unit keeps the last off the edge.
        "mlp_ratio": ((neurons[-1] or blocks[-1].mlp.fc2.in_features) + 0.25) / dims[-1],
        "drop_rate": model.head.drop.p,
        "drop_path_rate": getattr(blocks[-1].drop_path1, "drop_prob", None) or 0.0,
        "patch_drop_rate": model.patch_drop_rate,
        "init_values": None if isinstance(blocks[0].ls1, nn.Identity) else 1e-5,  # only whether there is one
        "sep_pos_embed": model.pos_embed_spatial is not None,
        "abs_win_pos_embed": model.pos_embed_win is not None,
        "global_pos_size": list(model.pos_embed.shape[2:]) if model.pos_embed_win is not None else [14, 14],
    }


def _check_fields(spec: Mapping[str, Any]) -> None:
    check_args(spec, ("norm",), _ARGS)
    args = spec["args"]
    for name in (*_LISTS, "global_pos_size", "embed_dim", "num_heads", "in_chans"):
        numbers = args[name] if isinstance(args[name], list) else [args[name]]
        least = 0 if name == "patch_padding" else 1
        is_pair = len(numbers) == 2 or name in ("stages", "embed_dim", "num_heads", "in_chans")
        if not numbers or not is_pair or not all(type(size) is int and least <= size <= 65536 for size in numbers):
            raise ArtifactError(f"constructor argument {name}={args[name]!r} is out of range: expected positive sizes")
    stages = len(args["stages"])
    if len(args["mask_unit_attn"]) != stages or not 0 <= args["q_pool"] < stages:
        raise ArtifactError("constructor arguments mask_unit_attn and q_pool do not fit the stages")
