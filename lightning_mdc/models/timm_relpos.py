"""timm's ViTs whose attention adds a bias for each pair of places: `Beit` and `VisionTransformerRelPos`.

Heads and neurons can leave; a bias is for all tokens of the grid, so these cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from timm.layers import PatchEmbed, RelPosBias, RelPosMlp, SwiGLU
from timm.models import beit
from timm.models import vision_transformer_relpos as relpos
from torch import Tensor, nn

from lightning_mdc.errors import UnsupportedModelError
from lightning_mdc.models.anatomy import Anatomy, Block, Family, Size, Units
from lightning_mdc.models.compiled import unwrap
from lightning_mdc.models.parts import computes_as, own_methods, qualified_name
from lightning_mdc.models.swapping import original_class
from lightning_mdc.models.timm_attention import AnyHeads, PositionBias, bias_mlp, bias_table, heads_of
from lightning_mdc.models.timm_constructor import (
    act_from,
    act_spec,
    check_args,
    check_depth,
    check_positive,
    in_chans,
    look_up,
    norm_from,
    norm_spec,
    one_size,
)
from lightning_mdc.models.timm_vit import counted_macs, foreign_part, not_plain, two_halves

# --- the kinds --------------------------------------------------------------------------------------------------------


class _BeitHeads(AnyHeads):
    def position_bias(self: Any) -> Tensor | None:
        return None if self.relative_position_bias_table is None else self._get_rel_pos_bias()


class _RelPosHeads(AnyHeads):
    q_norm: nn.Module
    k_norm: nn.Module

    def compared(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(q), self.k_norm(k)

    def position_bias(self: Any) -> Tensor | None:
        return None if self.rel_pos is None else self.rel_pos.get_bias()


def _beit_bias(attn: Any) -> PositionBias | None:
    return PositionBias() if attn.relative_position_bias_table is None else bias_table(attn)


def _relpos_bias(attn: Any) -> PositionBias | None:
    """What the heads' bias is made of; None if it is of another class than timm's own."""
    owner = attn.rel_pos
    if owner is None:
        return PositionBias()
    if not computes_as(owner, (RelPosBias, RelPosMlp), ("forward", "get_bias")):
        return None
    bias, square = bias_table(owner), tuple(owner.bias_shape[:2])
    sizes = [Size(owner, "bias_shape", lambda kept: (*square, kept))]
    if isinstance(owner, RelPosMlp):
        bias = bias_mlp(owner.mlp.fc1, owner.mlp.fc2, owner.rel_coords_log.shape[0] * owner.rel_coords_log.shape[1])
        sizes.append(Size(owner, "num_heads", lambda kept: kept))
    return bias._replace(sizes=[*bias.sizes, *sizes])


class _Kind(NamedTuple):
    """One of the two.

    Attributes:
        model, blocks, attention: its classes.
        heads: mixin for its attention.
        bias: of an attention, what its bias of positions is made of.
        shared: what the model calls a bias that all blocks share.
    """

    model: type
    blocks: Mapping[str, type]
    attention: type
    heads: type
    bias: Callable[[Any], PositionBias | None]
    shared: str


_KINDS = {
    "Beit": _Kind(beit.Beit, {"Block": beit.Block}, beit.Attention, _BeitHeads, _beit_bias, "rel_pos_bias"),
    "VisionTransformerRelPos": _Kind(
        relpos.VisionTransformerRelPos,
        {"RelPosBlock": relpos.RelPosBlock, "ResPostRelPosBlock": relpos.ResPostRelPosBlock},
        relpos.RelPosAttention,
        _RelPosHeads,
        _relpos_bias,
        "shared_rel_pos",
    ),
}
_MODEL_METHODS = ("forward", "forward_features", "forward_head")


class TimmRelPos(Family):
    """The family of timm's `Beit` and `VisionTransformerRelPos`."""

    name = "timm_relpos"
    description = "timm Beit and VisionTransformerRelPos (heads, unless blocks share their bias, and neurons)"

    def accepts(self, module: nn.Module) -> bool:
        return _kind(module) is not None and self.refusal(module) is None

    def refusal(self, module: nn.Module) -> str | None:
        """The part that computes another way than timm's."""
        kind = _kind(module)
        if kind is None:
            return None
        if (own := own_methods(module, (kind.model,), _MODEL_METHODS)) is not None:
            return own
        kinds = tuple(kind.blocks.values())
        parts: list[tuple[str, Any, tuple[type, ...]]] = [("patch_embed", module.patch_embed, (PatchEmbed,))]
        parts += [(f"blocks.{index}", block, kinds) for index, block in enumerate(_blocks(module))]
        return foreign_part(parts)

    def anatomy(self, model: Any) -> Anatomy:
        kind = _kind(model)
        assert kind is not None  # it was accepted
        blocks = tuple(_block(index, block, model, kind) for index, block in enumerate(_blocks(model)))
        return Anatomy(
            model=model,
            name=original_class(model).__name__,
            family=self,
            blocks=blocks,
            dim=model.embed_dim,
            num_prefix_tokens=model.num_prefix_tokens,
            class_rows=(0,) if model.global_pool == "token" else (),
            grid=tuple(model.patch_embed.grid_size),
            input_size=(in_chans(model), *model.patch_embed.img_size),
            grid_of=partial(_grid_of, model),
            fixed_macs=partial(_outside_macs, model),
            no_tokens=f"blocks.0.attn ({kind.attention.__name__}) has a bias for each pair of places of the whole grid",
            classifies=not isinstance(model.head, nn.Identity),
        )

    def describe(self, model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        kind = _kind(model)
        assert kind is not None
        block = next(_blocks(model))
        name = next(name for name, known in kind.blocks.items() if original_class(block) is known)
        args = _common_args(model, sizes) | _OWN_ARGS[kind.model.__name__](model, block)
        spec = {"class": kind.model.__name__, "block": name, "norm": norm_spec(block.norm1, "blocks.0.norm1")}
        return spec | {"act": act_spec(block.mlp.act, "blocks.0.mlp.act"), "args": args}

    def check_spec(self, spec: Mapping[str, Any], tensors: Collection[str]) -> None:
        _check_fields(spec)
        check_depth(spec["args"]["depth"], tensors)

    def build(self, spec: Mapping[str, Any]) -> nn.Module:
        kind = _check_fields(spec)
        args = {name: tuple(value) if isinstance(value, list) else value for name, value in spec["args"].items()}
        args["norm_layer"] = norm_from(spec["norm"])
        block = look_up(kind.blocks, spec["block"], "block")
        if kind.model is relpos.VisionTransformerRelPos:
            args |= {"act_layer": act_from(spec["act"]), "block_fn": block}
        elif args["use_fc_norm"] == (args["global_pool"] == "avg"):
            del args["use_fc_norm"]  # which older timm cannot be told
        model: nn.Module = kind.model(**args)
        return model


def _kind(module: nn.Module) -> _Kind | None:
    return next((kind for kind in _KINDS.values() if isinstance(module, kind.model)), None)


def _blocks(model: Any) -> Iterator[Any]:
    return map(unwrap, model.blocks)


# --- what it is made of -----------------------------------------------------------------------------------------------


def _block(index: int, block: Any, model: Any, kind: _Kind) -> Block:
    name = f"blocks.{index}"
    heads = _heads(index, f"{name}.attn", block.attn, model, kind)
    second_half = block.mlp if isinstance(block, relpos.ResPostRelPosBlock) else block.norm2
    return two_halves(index, name, block, model.embed_dim, heads, second_half)


def _heads(index: int, name: str, attn: Any, model: Any, kind: _Kind) -> Units | str:
    """The heads, or why they cannot be cut."""
    if (shared := getattr(model, kind.shared)) is not None:
        return f"{kind.shared} ({type(shared).__name__}) is one bias, of the heads of all blocks alike"
    if (reason := not_plain(name, attn, (kind.attention,))) is not None:
        return reason
    bias = kind.bias(attn)
    if bias is None:
        return f"{name}.rel_pos is a {qualified_name(attn.rel_pos)}, neither timm's RelPosBias nor its RelPosMlp"
    return heads_of(index, name, attn, kind.heads, bias)


def _grid_of(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    embed = model.patch_embed
    if tuple(size) != tuple(embed.img_size):
        raise UnsupportedModelError(
            f"input_size={tuple(size)}: this {original_class(model).__name__} takes {tuple(embed.img_size)} images "
            "only; call model.set_input_size first"
        )
    return tuple(embed.grid_size)


def _outside_macs(model: Any, size: tuple[int, int], num_tokens: Any) -> Any:
    """Of patch embedding, a shared bias, and head."""
    height, width = _grid_of(model, size)
    total: Any = height * width * model.patch_embed.proj.weight.numel()
    shared = getattr(model, "shared_rel_pos", None)
    if isinstance(shared, RelPosMlp):
        positions = shared.rel_coords_log.shape[0] * shared.rel_coords_log.shape[1]
        total += positions * (shared.mlp.fc1.weight.numel() + shared.mlp.fc2.weight.numel())
    if isinstance(model.head, nn.Linear):
        return total + model.head.weight.numel() * (1 if model.global_pool else num_tokens)
    is_headless = isinstance(model.head, nn.Identity)
    return total + (0 if is_headless else counted_macs(model.head, (1, model.embed_dim), "head"))


# --- constructor arguments --------------------------------------------------------------------------------------------

_ARGS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("img_size", "patch_size"), (list,)),
    **dict.fromkeys(("in_chans", "num_classes", "embed_dim", "depth", "num_heads"), (int,)),
    **dict.fromkeys(("mlp_ratio", "drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"), (int, float)),
    "global_pool": (str,),
    "qkv_bias": (bool,),
    "init_values": (float, type(None)),
}
_ARGS_OF: dict[str, dict[str, tuple[type, ...]]] = {
    "Beit": {
        **dict.fromkeys(("swiglu_mlp", "scale_mlp", "use_abs_pos_emb", "use_rel_pos_bias", "use_fc_norm"), (bool,)),
        "use_shared_rel_pos_bias": (bool,),
        "pos_drop_rate": (int, float),
    },
    "VisionTransformerRelPos": {
        **dict.fromkeys(("qk_norm", "class_token", "fc_norm", "shared_rel_pos"), (bool,)),
        "rel_pos_type": (str,),
        "rel_pos_dim": (int, type(None)),
    },
}


def _common_args(model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    embed, blocks = model.patch_embed, list(_blocks(model))
    block, last = blocks[0], blocks[-1]
    gammas = [getattr(block, name, None) for name in ("gamma_1", "ls1")]
    scaled = any(gamma is not None and not isinstance(gamma, nn.Identity) for gamma in gammas)
    return {
        "img_size": list(embed.img_size),
        "patch_size": list(embed.patch_size),
        "in_chans": in_chans(model),
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": one_size(sizes, "heads", lambda: block.attn.num_heads),
        # int(dim * ratio) must give the hidden size back; half a unit keeps the product off the edge.
        "mlp_ratio": (one_size(sizes, "neurons", lambda: block.mlp.fc2.in_features) + 0.5) / model.embed_dim,
        "init_values": 1e-5 if scaled else None,  # only whether there is one; the values are weights
        "drop_rate": model.head_drop.p,
        "proj_drop_rate": block.attn.proj_drop.p,
        "attn_drop_rate": block.attn.attn_drop.p,
        "drop_path_rate": getattr(last.drop_path1, "drop_prob", None) or 0.0,
    }


def _beit_args(model: Any, block: Any) -> dict[str, Any]:
    return {
        "qkv_bias": block.attn.q_bias is not None,
        "swiglu_mlp": isinstance(block.mlp, SwiGLU),
        "scale_mlp": not isinstance(block.mlp.norm, nn.Identity),
        "pos_drop_rate": model.pos_drop.p,
        "use_abs_pos_emb": model.pos_embed is not None,
        "use_rel_pos_bias": block.attn.relative_position_bias_table is not None,
        "use_shared_rel_pos_bias": model.rel_pos_bias is not None,
        "use_fc_norm": not isinstance(model.fc_norm, nn.Identity),
    }


def _relpos_args(model: Any, block: Any) -> dict[str, Any]:
    bias = block.attn.rel_pos if model.shared_rel_pos is None else model.shared_rel_pos
    of_mlp = isinstance(bias, RelPosMlp)
    return {
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "class_token": model.cls_token is not None,
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "shared_rel_pos": model.shared_rel_pos is not None,
        "rel_pos_type": ("mlp-swin" if bias.mode == "swin" else "mlp") if of_mlp else "bias",
        "rel_pos_dim": bias.mlp.fc1.out_features if of_mlp else None,
    }


_OWN_ARGS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "Beit": _beit_args,
    "VisionTransformerRelPos": _relpos_args,
}


def _check_fields(spec: Mapping[str, Any]) -> _Kind:
    kind: _Kind = look_up(_KINDS, spec.get("class"), "class")
    check_args(spec, ("class", "block", "norm", "act"), _ARGS | _ARGS_OF[kind.model.__name__])
    check_positive(spec["args"], "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")
    return kind
