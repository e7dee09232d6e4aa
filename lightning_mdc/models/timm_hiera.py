"""timm's `Hiera`: stages whose first block pools the queries and widens the stream, attention in mask units first and
over all tokens later.

Heads and neurons can leave; tokens are places in a mask unit and cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from timm.layers import ClNormMlpClassifierHead
from timm.models import hiera
from torch import Tensor, nn

from lightning_mdc.errors import ArtifactError
from lightning_mdc.models.anatomy import Anatomy, Block, Family, Size
from lightning_mdc.models.compiled import unwrap
from lightning_mdc.models.parts import own_methods, qualified_name
from lightning_mdc.models.swapping import original_class
from lightning_mdc.models.timm_attention import PositionBias, heads_of
from lightning_mdc.models.timm_constructor import act_spec, check_args, check_depth, in_chans, norm_from, norm_spec
from lightning_mdc.models.timm_vit import check_size, counted_macs, foreign_part, not_plain, two_halves

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
        if (own := own_methods(module, (hiera.Hiera,), _MODEL_METHODS)) is not None:
            return own
        if len(module.tokens_spatial_shape) != 2:
            return f"its input has {len(module.tokens_spatial_shape)} dimensions, and images have 2"
        parts: list[tuple[str, Any, tuple[type, ...]]] = [("patch_embed", module.patch_embed, (hiera.PatchEmbed,))]
        parts += [(f"blocks.{index}", block, (hiera.HieraBlock,)) for index, block in enumerate(_blocks(module))]
        if (found := foreign_part(parts)) is not None:
            return found
        for index, block in enumerate(_blocks(module)):
            if (found := not_plain(f"blocks.{index}.attn", block.attn, (hiera.MaskUnitAttention,))) is not None:
                return found
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
    found = two_halves(index, name, block, block.dim, heads, block.norm2)
    if block.proj is None:
        return found
    return replace(found, rest=(lambda tokens: tokens * block.proj.weight.numel(), found.rest[1]))


def _own_size(model: Any) -> tuple[int, int]:
    height, width = (count * step for count, step in zip(model.tokens_spatial_shape, model.patch_stride, strict=True))
    return height, width


def _outside_macs(model: Any, num_tokens: int) -> int:
    """Of patch embedding and head, which so many tokens reach."""
    embedding: int = math.prod(model.tokens_spatial_shape) * model.patch_embed.proj.weight.numel()
    return embedding + head_macs(model, (num_tokens,))


def head_macs(model: Any, grid: tuple[int, ...]) -> int:
    """Of the head, which a grid of tokens reaches."""
    head = model.head
    if not isinstance(head, ClNormMlpClassifierHead):
        return counted_macs(head, (1, *grid, model.num_features), "head")
    layers = sum(part.weight.numel() for part in head.modules() if isinstance(part, nn.Linear))
    return layers * (1 if head.pool_type else math.prod(grid))


# --- constructor arguments --------------------------------------------------------------------------------------------

STAGE_ARGS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        ("stages", "q_stride", "patch_kernel", "patch_stride", "patch_padding", "global_pos_size"), (list,)
    ),
    **dict.fromkeys(("in_chans", "embed_dim", "num_heads", "num_classes", "q_pool"), (int,)),
    **dict.fromkeys(("dim_mul", "head_mul", "drop_rate", "drop_path_rate"), (int, float)),
    "global_pool": (str,),
    "init_values": (float, type(None)),
}
_ARGS: dict[str, tuple[type, ...]] = STAGE_ARGS | {
    **dict.fromkeys(("img_size", "mask_unit_size", "mask_unit_attn"), (list,)),
    **dict.fromkeys(("mlp_ratio", "patch_drop_rate"), (int, float)),
    **dict.fromkeys(("use_expand_proj", "sep_pos_embed", "abs_win_pos_embed"), (bool,)),
}


def firsts_of(model: Any) -> list[int]:
    """The first block of each stage."""
    return [0, *(end + 1 for end in model.stage_ends[:-1])]


def stage_args(model: Any, sizes: Mapping[str, tuple[int, ...]], heads_now: Callable[[Any], int]) -> dict[str, Any]:
    """What the stages are like; `heads_now` tells how many heads an attention has, of which none can leave."""
    blocks, firsts = list(_blocks(model)), firsts_of(model)
    heads = sizes.get("heads") or (0,) * len(blocks)
    num_heads = [heads[first] or heads_now(blocks[first].attn) for first in firsts]
    dims = [blocks[first].dim_out for first in firsts]
    conv = model.patch_embed.proj
    return {
        "in_chans": in_chans(model),
        "embed_dim": dims[0],
        "num_heads": num_heads[0],
        "num_classes": model.num_classes,
        "global_pool": model.head.pool_type,
        "stages": [end + 1 - first for first, end in zip(firsts, model.stage_ends, strict=True)],
        "q_stride": list(model.q_stride),
        "dim_mul": dims[1] / dims[0] if len(dims) > 1 else 2.0,
        "head_mul": num_heads[1] / num_heads[0] if len(dims) > 1 else 2.0,
        "patch_kernel": list(conv.kernel_size),
        "patch_stride": list(conv.stride),
        "patch_padding": list(conv.padding),
        "drop_rate": model.head.drop.p,
        "drop_path_rate": getattr(blocks[-1].drop_path1, "drop_prob", None) or 0.0,
        "init_values": None if isinstance(blocks[0].ls1, nn.Identity) else 1e-5,  # only whether there is one
    }


def _args(model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    blocks, firsts = list(_blocks(model)), firsts_of(model)
    hidden = (sizes.get("neurons") or (0,))[-1] or blocks[-1].mlp.fc2.in_features
    # The attention of a stage begins one block late.
    in_units = [blocks[min(first + 1, len(blocks) - 1)].attn.use_mask_unit_attn for first in firsts]
    in_units[0] = blocks[0].attn.use_mask_unit_attn
    widening = next((block for block in blocks if block.do_expand), None)
    return stage_args(model, sizes, lambda attn: attn.heads) | {
        "img_size": list(_own_size(model)),
        "q_pool": model.q_pool,
        "mask_unit_size": list(model.mask_unit_size),
        "mask_unit_attn": in_units,
        "use_expand_proj": widening is None or widening.proj is not None,
        # int(dim * ratio) gives the hidden size back in each stage: a quarter of a unit keeps the last off the edge.
        "mlp_ratio": (hidden + 0.25) / model.num_features,
        "patch_drop_rate": model.patch_drop_rate,
        "sep_pos_embed": model.pos_embed_spatial is not None,
        "abs_win_pos_embed": model.pos_embed_win is not None,
        "global_pos_size": list(model.pos_embed.shape[2:]) if model.pos_embed_win is not None else [14, 14],
    }


def _check_fields(spec: Mapping[str, Any]) -> None:
    check_args(spec, ("norm",), _ARGS)
    args = spec["args"]
    check_stages(args, "img_size", "mask_unit_size")
    if len(args["mask_unit_attn"]) != len(args["stages"]):
        raise ArtifactError("constructor argument mask_unit_attn: expected one answer per stage")


def check_stages(args: Mapping[str, Any], *pairs: str) -> None:
    """Refuse, with an `ArtifactError`, stages that are none, and of `pairs` and what comes in pairs else other numbers
    than two positive ones."""
    pairs = (*pairs, "q_stride", "patch_kernel", "patch_stride", "patch_padding", "global_pos_size")
    for name in (*pairs, "stages", "embed_dim", "num_heads", "in_chans"):
        numbers = args[name] if isinstance(args[name], list) else [args[name]]
        least = 0 if name == "patch_padding" else 1
        fits = len(numbers) == 2 if name in pairs else len(numbers) > 0
        if not fits or not all(type(size) is int and least <= size <= 65536 for size in numbers):
            raise ArtifactError(f"constructor argument {name}={args[name]!r} is out of range: expected positive sizes")
    if not 0 <= args["q_pool"] < len(args["stages"]):
        raise ArtifactError(f"constructor argument q_pool={args['q_pool']!r} does not fit the stages")
