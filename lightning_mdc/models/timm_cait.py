"""timm's `Cait`: blocks whose heads talk to each other, then blocks in which only a class token attends.

Neurons can leave everywhere, heads where the class token attends; tokens cannot.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models import cait
from torch import Tensor, nn

from lightning_mdc.models.anatomy import Anatomy, Behaviour, Block, Family, Size, Units, columns_of, rows_of
from lightning_mdc.models.compiled import unwrap
from lightning_mdc.models.parts import own_methods
from lightning_mdc.models.swapping import original_class
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
from lightning_mdc.models.timm_vit import check_size, counted_macs, foreign_part, not_plain, two_halves

_MODEL_METHODS = ("forward", "forward_features", "forward_head")


class _AnyHeads:
    """Mixin: the class token's attention with any number of heads."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x: (images, 1 + tokens, dim) -> (images, 1, dim)."""
        width = self.proj.in_features // max(self.num_heads, 1)
        made = (self.q(x[:, :1]), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (self.num_heads, width)).transpose(1, 2) for part in made)
        dropout = self.attn_drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        result: Tensor = self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))
        return result


class TimmCait(Family):
    """The family of timm's `Cait`."""

    name = "timm_cait"
    description = "timm Cait (neurons; heads where the class token attends)"

    def accepts(self, module: nn.Module) -> bool:
        return isinstance(module, cait.Cait) and self.refusal(module) is None

    def refusal(self, module: nn.Module) -> str | None:
        """The part that computes another way than timm's."""
        if not isinstance(module, cait.Cait):
            return None
        if (own := own_methods(module, (cait.Cait,), _MODEL_METHODS)) is not None:
            return own
        parts: list[tuple[str, Any, tuple[type, ...]]] = [("patch_embed", module.patch_embed, (PatchEmbed,))]
        for kind, attention, blocks in (
            (cait.LayerScaleBlock, cait.TalkingHeadAttn, _blocks(module)),
            (cait.LayerScaleBlockClassAttn, cait.ClassAttn, _class_blocks(module)),
        ):
            for name, block in blocks:
                parts += [(name, block, (kind,)), (f"{name}.attn", block.attn, (attention,))]
        return foreign_part(parts)

    def anatomy(self, model: Any) -> Anatomy:
        patches = math.prod(model.patch_embed.grid_size)
        blocks = [_block(index, name, block, model.embed_dim) for index, (name, block) in enumerate(_blocks(model))]
        tokens = [(patches, patches)] * len(blocks)
        for name, block in _class_blocks(model):
            blocks.append(_class_block(len(blocks), name, block, model.embed_dim))
            tokens.append((patches + 1, 1))
        return Anatomy(
            model=model,
            name=original_class(model).__name__,
            family=self,
            blocks=tuple(blocks),
            dim=model.embed_dim,
            num_prefix_tokens=0,  # the class token comes late
            class_rows=(),
            grid=tuple(model.patch_embed.grid_size),
            input_size=(in_chans(model), *model.patch_embed.img_size),
            grid_of=partial(_grid_of, model),
            fixed_macs=lambda size, _: _outside_macs(model, patches),
            tokens_at=lambda size: tokens,
            no_tokens=f"blocks.0.attn (TalkingHeadAttn) mixes {_MIXES}, so queries and keys alone do not rank tokens",
            classifies=not isinstance(model.head, nn.Identity),
        )

    def describe(self, model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        block = next(_blocks(model))[1]
        norm, act = norm_spec(block.norm1, "blocks.0.norm1"), act_spec(block.mlp.act, "blocks.0.mlp.act")
        return {"norm": norm, "act": act, "args": _args(model, block, sizes)}

    def check_spec(self, spec: Mapping[str, Any], tensors: Collection[str]) -> None:
        _check_fields(spec)
        args = spec["args"]
        check_depth(args["depth"] + args["depth_token_only"], tensors, r"blocks(_token_only)?\.\d+\.")

    def build(self, spec: Mapping[str, Any]) -> nn.Module:
        _check_fields(spec)
        args = {name: tuple(value) if isinstance(value, list) else value for name, value in spec["args"].items()}
        return cait.Cait(**args, norm_layer=norm_from(spec["norm"]), act_layer=act_from(spec["act"]))


_MIXES = "the attention maps of all heads (proj_l, proj_w)"


def _blocks(model: Any) -> Iterator[tuple[str, Any]]:
    return ((f"blocks.{index}", unwrap(block)) for index, block in enumerate(model.blocks))


def _class_blocks(model: Any) -> Iterator[tuple[str, Any]]:
    return ((f"blocks_token_only.{index}", unwrap(block)) for index, block in enumerate(model.blocks_token_only))


# --- what it is made of -----------------------------------------------------------------------------------------------


def _block(index: int, name: str, block: Any, dim: int) -> Block:
    return two_halves(index, name, block, dim, f"{name}.attn (TalkingHeadAttn) mixes {_MIXES}", block.norm2)


def _class_block(index: int, name: str, block: Any, dim: int) -> Block:
    heads = not_plain(f"{name}.attn", block.attn, (cait.ClassAttn,)) or _heads(index, f"{name}.attn", block.attn)
    return two_halves(index, name, block, dim, heads, block.norm2)


def _heads(index: int, name: str, attn: Any) -> Units:
    count = attn.num_heads
    width = attn.proj.in_features // count if count else 1  # of no heads any width is true
    parts = [*(rows_of(layer, width=width) for layer in (attn.q, attn.k, attn.v)), columns_of(attn.proj, width)]
    of_one, of_each = (
        sum(layer.weight.numel() for layer in layers) // max(count, 1)
        for layers in ((attn.q, attn.proj), (attn.k, attn.v))
    )
    return Units(
        dimension="heads",
        block=index,
        name=name,
        count=count,
        width=width,
        slices=tuple(part for slices, _ in parts for part in slices),
        sizes=(*(size for _, sizes in parts for size in sizes), Size(attn, "num_heads", lambda kept: kept)),
        reader=attn.proj,
        macs=lambda heads, tokens: heads * (of_one + tokens * (of_each + 2 * width)),  # one query
        behaviours=(Behaviour(attn, _AnyHeads),),
    )


def _grid_of(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    check_size(model, size, model.patch_embed.img_size)
    height, width = model.patch_embed.grid_size
    return height, width


def _outside_macs(model: Any, patches: int) -> int:
    """Of patch embedding and head."""
    total: int = patches * model.patch_embed.proj.weight.numel()
    if isinstance(model.head, nn.Linear):
        return total + model.head.weight.numel() * (1 if model.global_pool else patches + 1)
    is_headless = isinstance(model.head, nn.Identity)
    return total + (0 if is_headless else counted_macs(model.head, (1, model.embed_dim), "head"))


# --- constructor arguments --------------------------------------------------------------------------------------------

_ARGS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("img_size", "patch_size"), (list,)),
    **dict.fromkeys(("in_chans", "num_classes", "embed_dim", "depth", "num_heads", "depth_token_only"), (int,)),
    **dict.fromkeys(("mlp_ratio", "mlp_ratio_token_only", "drop_rate", "pos_drop_rate"), (int, float)),
    **dict.fromkeys(("proj_drop_rate", "attn_drop_rate", "drop_path_rate"), (int, float)),
    "global_pool": (str,),
    "qkv_bias": (bool,),
}


def _args(model: Any, block: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    embed, attn, depth = model.patch_embed, block.attn, len(model.blocks)
    neurons, last = sizes.get("neurons", ()), unwrap(model.blocks_token_only[-1])
    hidden = one_size({"neurons": neurons[:depth]}, "neurons", lambda: block.mlp.fc2.in_features)
    last_hidden = one_size({"neurons": neurons[depth:]}, "neurons", lambda: last.mlp.fc2.in_features)  # type: ignore
    return {
        "img_size": list(embed.img_size),
        "patch_size": list(embed.patch_size),
        "in_chans": in_chans(model),
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": depth,
        "depth_token_only": len(model.blocks_token_only),
        "num_heads": attn.num_heads,
        # int(dim * ratio) must give the hidden size back; half a unit keeps the product off the edge.
        "mlp_ratio": (hidden + 0.5) / model.embed_dim,
        "mlp_ratio_token_only": (last_hidden + 0.5) / model.embed_dim,
        "qkv_bias": attn.qkv.bias is not None,
        "drop_rate": model.head_drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "proj_drop_rate": attn.proj_drop.p,
        "attn_drop_rate": attn.attn_drop.p,
        "drop_path_rate": getattr(block.drop_path, "drop_prob", None) or 0.0,
    }


def _check_fields(spec: Mapping[str, Any]) -> None:
    check_args(spec, ("norm", "act"), _ARGS)
    args = spec["args"]
    check_positive(args, "img_size", "patch_size", "in_chans", "embed_dim", "num_heads", "depth", "depth_token_only")
