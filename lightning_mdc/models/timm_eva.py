"""timm's `Eva`: EVA-02, DINOv3, Perception Encoder, vit_*_rope and rope_mixed, Sapiens2, eva_giant.

Two classes of attention, rotary positions or none, grouped queries. What of its parts is timm_vit's is read there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm import layers
from timm.layers import AttentionRope, PatchEmbed, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from lightning_mdc.errors import ArtifactError
from lightning_mdc.models.anatomy import (
    Anatomy,
    Behaviour,
    Channels,
    Size,
    Slice,
    TokenPoint,
    Units,
    affine_of,
    columns_of,
    rows_of,
)
from lightning_mdc.models.compiled import unwrap
from lightning_mdc.models.parts import qualified_name
from lightning_mdc.models.timm_constructor import (
    check_args,
    check_depth,
    check_positive,
    in_chans,
    look_up,
    name_of,
    norm_from,
    norm_spec,
    one_size,
)
from lightning_mdc.models.timm_vit import BlockKind, TimmReader, TimmVisionTransformer, spanning
from lightning_mdc.tokens.block import attention_called
from lightning_mdc.tokens.reduction import Evidence
from lightning_mdc.tokens.selection import Carried

_ROPES = {
    name: getattr(layers, kind)
    for name, kind in {
        "cat": "RotaryEmbeddingCat",
        "mixed": "RotaryEmbeddingMixed",
        "dinov3": "RotaryEmbeddingDinoV3",
        "mrope": "RotaryEmbeddingMRope",  # newer timm only
    }.items()
    if hasattr(layers, kind)
}


class TimmEva(TimmVisionTransformer):
    """The family of `timm.models.eva.Eva`."""

    name = "timm_eva"
    description = "timm Eva: EVA-02, DINOv3, Perception Encoder, vit_*_rope, rope_mixed, Sapiens2, eva_giant"
    models = (Eva,)

    def anatomy(self, model: Any) -> Anatomy:
        found = super().anatomy(model)
        if found.no_tokens is None and model.rope is not None and type(model.rope) not in _ROPES.values():
            known = ", ".join(kind.__name__ for kind in _ROPES.values())
            return replace(found, no_tokens=f"rope is a {qualified_name(model.rope)}; known are {known}")
        return found

    def block_kind(self, model: Any) -> BlockKind:
        return eva_blocks(turn_alike=not is_mixed(model.rope))

    def describe(self, model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return _describe(model, sizes)

    def check_spec(self, spec: Mapping[str, Any], tensors: Collection[str]) -> None:
        _check_fields(spec)
        check_depth(spec["args"]["depth"], tensors)

    def build(self, spec: Mapping[str, Any]) -> nn.Module:
        _check_fields(spec)
        args = {name: tuple(value) if isinstance(value, list) else value for name, value in spec["args"].items()}
        return Eva(**args, norm_layer=norm_from(spec["norm"]))

    def complete(self, model: Any, again: Callable[[], nn.Module]) -> None:
        for block in model.blocks:
            if getattr(block.attn, "k_bias", None) is not None:  # always 0
                block.attn.k_bias = torch.zeros_like(block.attn.q_bias)
        if (rope := model.rope) is not None:
            given = inspect.signature(type(rope)).parameters
            with torch.random.fork_rng(devices=[]):  # frequencies that are learnt begin at random; these are not taken
                fresh = type(rope)(**{name: getattr(rope, name) for name in given if hasattr(rope, name)})
            rope._buffers.update(fresh.to(next(model.parameters()).dtype)._buffers)


def is_mixed(rope: nn.Module | None) -> bool:
    """Whether each head of each block has rotary positions of its own."""
    return type(rope) is _ROPES["mixed"]


def eva_blocks(turn_alike: bool) -> BlockKind:
    """Eva's blocks. turn_alike: whether there is one rotary table for all heads."""
    heads = partial(_heads, turn_alike=turn_alike)
    return BlockKind(EvaBlock, EvaBlockPostNorm, (EvaAttention, AttentionRope), heads, _point, EvaReader)


# --- heads ------------------------------------------------------------------------------------------------------------


def _head_dim(attn: Any) -> int:
    # The oldest timm we support does not keep it.
    return getattr(attn, "head_dim", None) or round(attn.scale**-2)


def _heads(index: int, name: str, attn: Any, turn_alike: bool) -> Units:
    """The heads of either attention; where several queries share a key, the unit is a key with its queries.

    turn_alike: whether there is one rotary table for all heads.
    """
    width, queries = _head_dim(attn), getattr(attn, "num_kv_groups", 1)
    count, gate = attn.num_heads // queries, getattr(attn, "gate", None)
    makers = [attn.q_proj, attn.k_proj, attn.v_proj] if attn.qkv is None else [attn.qkv]
    parts = [columns_of(attn.proj, queries * width)]
    if attn.qkv is not None:
        parts.append(rows_of(attn.qkv, 3, width))
    else:
        parts.append(rows_of(attn.q_proj, width=queries * width))
        for slices, sizes in (rows_of(attn.k_proj, width=width), rows_of(attn.v_proj, width=width)):
            parts.append((tuple(replace(part, width=width) for part in slices), sizes))
    if gate is not None:
        parts.append(rows_of(gate, width=queries * width))
    if not isinstance(attn.norm, nn.Identity):
        parts.append(affine_of(attn.norm, queries * width))
    biases = tuple(
        Slice(attn, bias) for bias in ("q_bias", "k_bias", "v_bias") if getattr(attn, bias, None) is not None
    )
    counts = {"num_heads": queries, "num_kv_heads": 1, "attn_dim": queries * width, "kv_dim": width}
    weights = sum(layer.weight.numel() for layer in (*makers, attn.proj, gate) if layer is not None)
    per_unit = weights // count if count else 0
    return Units(
        dimension="heads",
        block=index,
        name=name,
        count=count,
        width=queries * width,
        slices=(*(part for slices, _ in parts for part in slices), *biases),
        sizes=(
            *(size for _, sizes in parts for size in sizes),
            *(Size(attn, of, partial(int.__mul__, each)) for of, each in counts.items() if hasattr(attn, of)),
        ),
        reader=attn.proj,
        macs=lambda units, tokens: tokens * units * per_unit + 2 * tokens * tokens * units * queries * width,
        norm=spanning(f"{name}.norm", attn.norm),
        behaviours=_behaviours(attn, turn_alike),
    )


def _behaviours(attn: Any, turn_alike: bool) -> tuple[Behaviour, ...]:
    if turn_alike:
        return (Behaviour(attn, AnyHeads),) if isinstance(attn, EvaAttention) else ()
    before = getattr(attn, "rope_heads", None) or range(attn.num_heads)  # of a slim model that is cut again
    return (Behaviour(attn, AnyHeads, lambda kept: {"rope_heads": tuple(before[head] for head in kept)}),)


class AnyHeads:
    """Mixin: timm's attention, of fewer heads than the model's width or its rotary tables have room for.

    Attributes:
        rope_heads: which of the heads' rotary tables are its own; None: there is one for all.
    """

    rope_heads: tuple[int, ...] | None = None

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return attended(self, x, rope, attn_mask, is_causal)[0]


def attended(
    attn: Any, x: Tensor, rope: Tensor | None, mask: Tensor | None, is_causal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """What timm's EvaAttention and AttentionRope compute of x (batch, tokens, dim), operation by operation; and q, k.

    q and k, (batch, heads, tokens, head_dim), are those that meet: turned, and k once for each query.
    """
    gate = getattr(attn, "gate", None)
    q, k, v = _projected(attn, x)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        heads = getattr(attn, "rope_heads", None)
        if heads is not None:
            rope = rope.index_select(-3, torch.tensor(heads, dtype=torch.long, device=rope.device))
        q, k = (_turned(attn, tokens, rope).type_as(v) for tokens in (q, k))
    queries = getattr(attn, "num_kv_groups", 1)
    if queries > 1:
        k, v = k.repeat_interleave(queries, dim=1), v.repeat_interleave(queries, dim=1)
    if attn.fused_attn or is_causal or (mask is not None and mask.dtype == torch.bool):
        dropout = attn.attn_drop.p if attn.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
    else:
        logits = (q * attn.scale) @ k.transpose(-2, -1)
        y = attn.attn_drop((logits if mask is None else logits + mask).softmax(dim=-1)) @ v
    y = attn.norm(y.transpose(1, 2).flatten(2))
    if gate is not None:
        y = y * gate(x).sigmoid()
    return attn.proj_drop(attn.proj(y)), q, k


def _projected(attn: Any, x: Tensor) -> tuple[Tensor, ...]:
    """q, k, v: (batch, heads, tokens, head_dim); k and v may have fewer heads."""
    width = _head_dim(attn)
    if attn.qkv is None:
        makers = (attn.q_proj, attn.k_proj, attn.v_proj)
        counts = (attn.num_heads, *2 * (getattr(attn, "num_kv_heads", attn.num_heads),))
        return tuple(
            maker(x).unflatten(-1, (count, width)).transpose(1, 2) for maker, count in zip(makers, counts, strict=True)
        )
    if getattr(attn, "q_bias", None) is None:
        qkv = attn.qkv(x)
    else:
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        qkv = attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, attn.qkv.weight, bias)
    return tuple(qkv.unflatten(-1, (3, attn.num_heads, width)).permute(2, 0, 3, 1, 4).unbind(0))


def _turned(attn: Any, x: Tensor, rope: Tensor) -> Tensor:
    prefix, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)
    return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)], dim=2)


# --- where tokens leave -----------------------------------------------------------------------------------------------


def _point(block: Any, heads: Units) -> TokenPoint:
    attn = block.attn
    if attn.qkv is None:
        values = Channels(attn.v_proj, 0, attn.v_proj.out_features)
    elif getattr(attn, "q_bias", None) is None or attn.qkv_bias_separate:
        channels = attn.qkv.out_features
        values = Channels(attn.qkv, channels * 2 // 3, channels)
    else:  # the weights of `qkv` are used without calling it, so no module puts values out
        values = Channels(block.norm1, 0, attn.qkv.in_features)
    return TokenPoint(EvaHalves, heads, values, key_width=_head_dim(attn), calls=attn)


class EvaHalves:
    """Mixin: timm's EvaBlock in two halves, which compute operation by operation what its forward does."""

    # The children are timm's; to the type checker they are anything.
    norm1: Any
    attn: Any
    gamma_1: Any
    drop_path1: Any
    norm2: Any
    mlp: Any
    gamma_2: Any
    drop_path2: Any

    def attend(self, x: Tensor, bias: Tensor | None, rope: Tensor | None = None) -> tuple[Tensor, Evidence]:
        y, evidence = attention_called(self.attn, partial(self._attended, bias, rope), self.norm1(x))
        if self.gamma_1 is not None:
            y = self.gamma_1 * y
        return x + self.drop_path1(y), evidence

    def _attended(self, bias: Tensor | None, rope: Tensor | None, x: Tensor) -> tuple[Tensor, Evidence]:
        y, q, k = attended(self.attn, x, rope, bias)
        return y, Evidence(q, k, self.attn.scale)

    def finish(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm2(x))
        if self.gamma_2 is not None:
            y = self.gamma_2 * y
        result: Tensor = x + self.drop_path2(y)
        return result


class EvaReader(TimmReader):
    """Mixin: an Eva inside which tokens leave, each taking with it how its position turns it."""

    rope_mixed: bool

    def _embedded(self, x: Tensor) -> tuple[Any, ...]:
        x, rope = self._pos_embed(self.patch_embed(x))
        x = self.norm_pre(x)
        if rope is None:
            return (x,)
        return x, lambda block, carried: self._turned(rope[block] if self.rope_mixed else rope, carried)

    def _turned(self, rope: Tensor, carried: Carried | None) -> Tensor:
        return rope if carried is None else rope_of(rope, carried.own)


def rope_of(rope: Tensor, own: Tensor) -> Tensor:
    """How the tokens that are left turn; one that is none of the input's turns by nothing (sin 0, cos 1).

    Args:
        rope: sin and cos of all positions, (positions, 2 d); of each head, (heads, positions, 2 d); or of each image,
            too, (batch, 1 or heads, positions, 2 d).
        own: position that each token is of, int64 (batch, tokens); -1: of none.

    Returns (batch, 1 or heads, tokens, 2 d).
    """
    *before, positions, channels = rope.shape
    still = torch.cat([rope.new_zeros(channels // 2), rope.new_ones(channels // 2)])
    rope = torch.cat([rope, still.expand(*before, 1, channels)], dim=-2)
    index = torch.where(own < 0, positions, own)
    if len(before) == 2:
        return rope.gather(2, index[:, None, :, None].expand(-1, before[1], -1, channels))
    found = rope.index_select(-2, index.flatten()).unflatten(-2, index.shape)
    return found.transpose(0, 1) if before else found[:, None]


# --- as constructor arguments -----------------------------------------------------------------------------------------

_LIST_OR_NONE, _NUMBER_OR_NONE = (list, type(None)), (int, float, type(None))
# JSON types of the constructor arguments. Older timm has not all of them.
_ARG_TYPES: dict[str, tuple[type, ...]] = {
    name: kinds
    for names, kinds in (
        ("img_size patch_size", (list,)),
        ("in_chans num_classes embed_dim depth num_heads num_reg_tokens swiglu_align_to", (int,)),
        ("global_pool attn_type rope_type rope_grid_indexing", (str,)),
        ("qkv_bias qkv_fused qk_norm swiglu_mlp scale_mlp scale_attn_inner attn_only_layer_scale", (bool,)),
        ("class_token no_embed_class use_abs_pos_emb use_rot_pos_emb rope_rotate_half use_post_norm", (bool,)),
        ("use_pre_transformer_norm use_post_transformer_norm use_fc_norm dynamic_img_size dynamic_img_pad", (bool,)),
        ("drop_rate pos_drop_rate patch_drop_rate proj_drop_rate attn_drop_rate drop_path_rate", (int, float)),
        ("mlp_ratio rope_grid_offset rope_temperature head_init_scale", (int, float)),
        ("init_values rope_shift_coords rope_jitter_coords rope_rescale_coords attn_pool_mlp_ratio", _NUMBER_OR_NONE),
        ("num_kv_heads rope_mrope_section ref_feat_shape", _LIST_OR_NONE),
        ("attn_pool_num_heads", (int, type(None))),
    )
    for name in names.split()
    if name in inspect.signature(Eva).parameters
}
_MOST_PATCHES = 2**20  # of which rotary tables are made whatever the file holds


def _describe(model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """JSON-ready constructor arguments of the dense model, of units of these `sizes`, that `model` comes from.

    Raises:
        ArtifactError: a part that no constructor argument expresses; names it.
    """
    if type(model.patch_embed) is not PatchEmbed:
        raise ArtifactError(f"patch_embed is a {qualified_name(model.patch_embed)}, which no constructor makes here")
    num_heads, kv_heads = head_counts(model, sizes)
    block: Any = unwrap(model.blocks[0])
    found = {
        "depth": len(model.blocks),
        "num_heads": num_heads,
        "num_kv_heads": None if set(kv_heads) == {num_heads} else kv_heads,
        **_model_args(model),
        **block_args(block, one_size(sizes, "neurons", lambda: block.mlp.fc2.in_features), model.embed_dim),
        **rope_args(model.rope, block.attn),
        "drop_path_rate": getattr(unwrap(model.blocks[-1]).drop_path1, "drop_prob", None) or 0.0,
    }
    return {"norm": norm_spec(block.norm1, "blocks.0.norm1"), "args": {name: found[name] for name in _ARG_TYPES}}


def head_counts(model: Any, sizes: Mapping[str, tuple[int, ...]]) -> tuple[int, list[int]]:
    """Heads of every dense block, and of each block those that have keys."""
    units = sizes.get("heads") or (0,) * len(model.blocks)
    heads: set[int] = set()
    kv_heads: list[int] = []
    for block, count in zip(model.blocks, units, strict=True):
        attn: Any = unwrap(block).attn
        queries = getattr(attn, "num_kv_groups", 1)
        kv_heads.append(count or attn.num_heads // queries)
        heads.add(kv_heads[-1] * queries)
    if len(heads) > 1:
        raise ArtifactError(f"the dense blocks have different numbers of heads ({sorted(heads)}): no constructor")
    return heads.pop(), kv_heads


def _model_args(model: Any) -> dict[str, Any]:
    """Arguments that are read off the parts around the blocks."""
    embed, pool = model.patch_embed, model.attn_pool
    return {
        "img_size": list(embed.img_size),
        "patch_size": list(embed.patch_size),
        "in_chans": in_chans(model),
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "class_token": model.cls_token is not None,
        "num_reg_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
        "no_embed_class": model.no_embed_class,
        "use_abs_pos_emb": model.pos_embed is not None,
        "use_pre_transformer_norm": not isinstance(model.norm_pre, nn.Identity),
        "use_post_transformer_norm": not isinstance(model.norm, nn.Identity),
        "use_fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "attn_pool_num_heads": None if pool is None else pool.num_heads,
        # int(dim * ratio) must give the hidden size back; half a unit keeps the product off the edge.
        "attn_pool_mlp_ratio": None if pool is None else (pool.mlp.fc1.out_features + 0.5) / model.embed_dim,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": embed.dynamic_img_pad,
        "drop_rate": model.head_drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "patch_drop_rate": getattr(model.patch_drop, "prob", 0.0),
        "head_init_scale": model.head_init_scale,
    }


def block_args(block: Any, neurons: int, dim: int) -> dict[str, Any]:
    """Arguments that are read off one block, as all are alike."""
    attn, mlp = block.attn, block.mlp
    maker = attn.q_proj if attn.qkv is None else attn.qkv
    gammas = [getattr(block, name, None) is not None for name in ("gamma_1", "gamma_2")]
    split, normed = isinstance(mlp, layers.SwiGLU), not isinstance(mlp.norm, nn.Identity)
    return {
        "mlp_ratio": (neurons + 0.5) / dim,
        "use_post_norm": isinstance(block, EvaBlockPostNorm),
        "attn_type": "rope" if isinstance(attn, AttentionRope) else "eva",
        "qkv_fused": attn.qkv is not None,
        "qkv_bias": getattr(attn, "q_bias", None) is not None or maker.bias is not None,
        "qk_norm": not isinstance(attn.q_norm, nn.Identity),
        "scale_attn_inner": not isinstance(attn.norm, nn.Identity),
        "swiglu_mlp": split or isinstance(mlp, layers.GluMlp),
        "scale_mlp": normed,
        "swiglu_align_to": 1 if split and not normed else 0,  # the way to have layers of their own
        "init_values": 1e-5 if gammas[0] else None,  # only whether there is one; the values are weights
        "attn_only_layer_scale": gammas == [True, False],
        "proj_drop_rate": attn.proj_drop.p,
        "attn_drop_rate": attn.attn_drop.p,
    }


def rope_args(rope: Any, attn: Any) -> dict[str, Any]:
    """Arguments that are read off the rotary positions; timm's own values where there are none."""
    section, of_shape = getattr(rope, "mrope_section", None), getattr(rope, "ref_feat_shape", None)
    return {
        "use_rot_pos_emb": rope is not None,
        "rope_type": "cat" if rope is None else name_of(_ROPES, rope, "rope"),
        "rope_rotate_half": bool(getattr(attn, "rotate_half", False)),
        "rope_grid_offset": getattr(rope, "grid_offset", 0.0),
        "rope_grid_indexing": getattr(rope, "grid_indexing", "ij"),
        "rope_temperature": getattr(rope, "temperature", 10000.0),
        **{f"rope_{name}": getattr(rope, name, None) for name in ("shift_coords", "jitter_coords", "rescale_coords")},
        "rope_mrope_section": None if section is None else list(section),
        "ref_feat_shape": None if of_shape is None else list(of_shape),
    }


def _check_fields(spec: Mapping[str, Any]) -> None:
    check_args(spec, {"norm"}, _ARG_TYPES)
    args = spec["args"]
    check_positive(args, "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")
    look_up(_ROPES, args["rope_type"], "rope_type")
    if args["img_size"][0] * args["img_size"][1] > _MOST_PATCHES * args["patch_size"][0] * args["patch_size"][1]:
        raise ArtifactError(f"constructor argument img_size={args['img_size']!r} is out of range")
    for name in ("num_kv_heads", "rope_mrope_section", "ref_feat_shape"):
        if any(type(size) is not int or not 0 < size <= 65536 for size in args.get(name) or ()):
            raise ArtifactError(f"constructor argument {name}={args[name]!r}: expected positive sizes")
