"""timm's `NaFlexVit`: images of any size and shape, on blocks of timm's ViT, or of its Eva where positions turn tokens.

Heads, neurons, and tokens of plain images; batches of patches with a mask keep their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from typing import Any

from timm.layers import Attention, Mlp, apply_keep_indices_nlc
from timm.models.eva import EvaBlock
from timm.models.naflexvit import NaFlexEmbeds, NaFlexVit, NaFlexVitCfg
from torch import Tensor, nn

from lightning_mdc.errors import ArtifactError, UnsupportedModelError
from lightning_mdc.models import timm_constructor, timm_eva
from lightning_mdc.models.compiled import unwrap
from lightning_mdc.models.parts import computes_as, other_than, qualified_name
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
from lightning_mdc.models.timm_eva import EvaReader, TimmEva, is_mixed
from lightning_mdc.models.timm_vit import PLAIN, BlockKind, configured_size
from lightning_mdc.tokens.selection import Carried


class TimmNaFlex(TimmEva):
    """The family of `timm.models.naflexvit.NaFlexVit`."""

    name = "timm_naflex"
    description = "timm NaFlexVit (tokens of plain images)"
    models = (NaFlexVit,)

    def refusal(self, module: nn.Module) -> str | None:
        if isinstance(module, NaFlexVit) and not computes_as(module.embeds, (NaFlexEmbeds,)):
            return other_than("embeds", module.embeds, "timm's NaFlexEmbeds with its own forward")
        return super().refusal(module)

    def accepts(self, module: nn.Module) -> bool:
        return super().accepts(module) and self.refusal(module) is None

    def block_kind(self, model: Any) -> BlockKind:
        kind = super().block_kind(model) if isinstance(unwrap(model.blocks[0]), EvaBlock) else PLAIN
        return replace(kind, reader=NaFlexReader)

    def own_size(self, model: Any) -> tuple[int, int]:
        """Of timm's configuration, or else that whose patches have a position each."""
        if (configured := configured_size(model)) is not None:
            return configured
        rows, columns = model.embeds.pos_embed_grid_size or NaFlexVitCfg.pos_embed_grid_size
        height, width = model.embeds.patch_size
        return rows * height, columns * width

    def grid_of(self, model: Any, size: tuple[int, int]) -> tuple[int, int]:
        embeds = model.embeds
        height, width = embeds.dynamic_feat_size(size)
        fits = all(side % patch == 0 for side, patch in zip(size, embeds.patch_size, strict=True))
        if min(height, width) < 1 or (embeds.is_linear and not embeds.dynamic_img_pad and not fits):
            raise UnsupportedModelError(
                f"input_size={tuple(size)}: not a multiple of the {tuple(embeds.patch_size)} patches of this model"
            )
        return height, width

    def embedding_macs(self, model: Any, size: tuple[int, int]) -> int:
        height, width = self.grid_of(model, size)
        macs: int = height * width * model.embeds.proj.weight.numel()
        return macs

    def describe(self, model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return _describe(model, sizes)

    def check_spec(self, spec: Mapping[str, Any], tensors: Collection[str]) -> None:
        _check_fields(spec)
        check_depth(spec["args"]["depth"], tensors)

    def build(self, spec: Mapping[str, Any]) -> nn.Module:
        _check_fields(spec)
        args = {name: tuple(value) if isinstance(value, list) else value for name, value in spec["args"].items()}
        norms = {"norm_layer": norm_from(spec["norm"])}
        if spec["embed_norm"] is not None:
            norms["embed_norm_layer"] = norm_from(spec["embed_norm"])
        return NaFlexVit(**args, **norms, act_layer=act_from(spec["act"]))


# --- where tokens leave -----------------------------------------------------------------------------------------------


class NaFlexReader(EvaReader):
    """Mixin: a NaFlexVit inside which tokens of plain images leave."""

    embeds: Any
    rope: Any
    training: bool
    _forward_embeds: Callable[..., dict[str, Any]]

    def forward_features(  # type: ignore[override]
        self,
        patches: Tensor,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """As timm's, of images (batch, channels, height, width).

        Raises:
            UnsupportedModelError: patches are given in place of images, or a mask.
            PlanError: a prior over positions is for a grid of another shape than these images have.
        """
        _refuse_patches(patches, patch_coord, patch_valid)
        return super().forward_features(patches, attn_mask)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        _refuse_patches(x, kwargs.get("patch_coord"), kwargs.get("patch_valid"))
        return super().forward_intermediates(x, *args, **kwargs)

    def _embedded(self, x: Tensor) -> tuple[Any, ...]:
        embedded = self._forward_embeds(x, None, None, None)
        x, rope, indices = (embedded[name] for name in ("patches", "rope_embeds", "keep_indices"))
        if rope is None:
            return (x,)
        mixed = is_mixed(self.rope)

        def ropes(block: int, carried: Carried | None) -> Tensor:
            table = rope[block] if mixed else rope
            if mixed and indices is not None:  # some patches were dropped at random
                table = apply_keep_indices_nlc(x, table, indices)
            return self._turned(table, carried)

        return x, ropes

    def _grid(self, x: Tensor) -> tuple[int, int]:
        height, width = self.embeds.dynamic_feat_size(x.shape[-2:])
        return height, width


def _refuse_patches(x: Any, *options: Tensor | None) -> None:
    if isinstance(x, dict) or any(option is not None for option in options):
        raise UnsupportedModelError(
            "patches, patch_coord, patch_valid: tokens leave inside this model, so its input has to be plain images "
            "(batch, channels, height, width), without a mask over patches; give those, or prune with tokens=1.0"
        )


# --- as constructor arguments -----------------------------------------------------------------------------------------

_ROPE_TYPES = {"": None, "axial": "cat", "mixed": "mixed", "dinov3": "dinov3", "mrope": "mrope"}
_LIST_OR_NONE, _NUMBER_OR_NONE = (list, type(None)), (int, float, type(None))
# JSON types of the constructor arguments. Older timm has not all of them.
_ARG_TYPES: dict[str, tuple[type, ...]] = {"in_chans": (int,), "num_classes": (int,)} | {
    name: kinds
    for names, kinds in (
        ("patch_size", (list,)),
        ("embed_dim depth num_heads reg_tokens swiglu_align_to", (int,)),
        ("global_pool pos_embed pos_embed_interp_mode embed_proj_type attn_type rope_type rope_grid_indexing", (str,)),
        ("qkv_bias qk_norm proj_bias scale_mlp_norm scale_attn_inner_norm use_key_only_attn_mask class_token", (bool,)),
        ("pos_embed_ar_preserving pos_embed_antialias pos_embed_align_corners pos_embed_use_grid_sample", (bool,)),
        ("dynamic_img_pad patchify_channels_last pre_norm final_norm pool_include_prefix attn_gated", (bool,)),
        ("fc_norm", (bool, type(None))),
        ("swiglu_mlp qkv_fused attn_only_layer_scale enable_patch_interpolator rope_rotate_half", (bool,)),
        ("drop_rate pos_drop_rate patch_drop_rate proj_drop_rate attn_drop_rate drop_path_rate", (int, float)),
        ("mlp_ratio rope_grid_offset rope_temperature", (int, float)),
        ("init_values rope_shift_coords rope_jitter_coords rope_rescale_coords attn_pool_mlp_ratio", _NUMBER_OR_NONE),
        ("num_kv_heads pos_embed_grid_size rope_ref_feat_shape rope_mrope_section", _LIST_OR_NONE),
        ("attn_pool_num_heads", (int, type(None))),
    )
    for name in names.split()
    if name in {field.name for field in fields(NaFlexVitCfg)}
}


def _describe(model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """JSON-ready constructor arguments of the dense model, of units of these `sizes`, that `model` comes from."""
    block: Any = unwrap(model.blocks[0])
    num_heads, kv_heads = timm_eva.head_counts(model, sizes)
    neurons = one_size(sizes, "neurons", lambda: block.mlp.fc2.in_features)
    found = {
        "in_chans": in_chans(model),
        "num_classes": model.num_classes,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": num_heads,
        "num_kv_heads": None if set(kv_heads) == {num_heads} else kv_heads,
        **_model_args(model),
        **_embeds_args(model.embeds),
        **_block_args(block, neurons, model.embed_dim),
        **_rope_args(model.rope, block.attn),
        "drop_path_rate": getattr(unwrap(model.blocks[-1]).drop_path1, "drop_prob", None) or 0.0,
    }
    embed_norm, pool = model.embeds.norm, model.attn_pool
    return {
        "norm": norm_spec(block.norm1, "blocks.0.norm1"),
        "embed_norm": None if isinstance(embed_norm, nn.Identity) else norm_spec(embed_norm, "embeds.norm"),
        "act": act_spec((block if pool is None else pool).mlp.act, "blocks.0.mlp.act"),
        "args": {name: found[name] for name in _ARG_TYPES},
    }


def _model_args(model: Any) -> dict[str, Any]:
    pool = model.attn_pool
    normed, normed_pool = (not isinstance(norm, nn.Identity) for norm in (model.norm, model.fc_norm))
    return {
        "global_pool": model.global_pool,
        "pool_include_prefix": model.pool_include_prefix,
        "use_key_only_attn_mask": getattr(model, "use_key_only_attn_mask", False),
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": normed or normed_pool,
        "fc_norm": None if normed and normed_pool else normed_pool,  # both: older timm, if it is not said
        "attn_pool_num_heads": None if pool is None else pool.num_heads,
        # int(dim * ratio) must give the hidden size back; half a unit keeps the product off the edge.
        "attn_pool_mlp_ratio": None if pool is None else (pool.mlp.fc1.out_features + 0.5) / model.embed_dim,
        "drop_rate": model.head_drop.p,
        "patch_drop_rate": getattr(model.patch_drop, "prob", 0.0),
    }


def _embeds_args(embeds: Any) -> dict[str, Any]:
    grid = embeds.pos_embed_grid_size
    same = ("pos_embed_interp_mode", "pos_embed_ar_preserving", "pos_embed_use_grid_sample", "dynamic_img_pad")
    newer = {"pos_embed_antialias": True, "pos_embed_align_corners": False}
    return {
        "patch_size": list(embeds.patch_size),
        "class_token": embeds.has_class_token,
        "reg_tokens": embeds.num_reg_tokens,
        "pos_embed": embeds.pos_embed_type,
        "pos_embed_grid_size": None if grid is None else list(grid),
        **{name: getattr(embeds, name) for name in same},
        **{name: getattr(embeds, name, default) for name, default in newer.items()},
        "pos_drop_rate": embeds.pos_drop.p,
        "patchify_channels_last": getattr(embeds, "channels_last", True),
        "embed_proj_type": "linear" if embeds.is_linear else "conv",
        "enable_patch_interpolator": embeds.enable_patch_interpolator,
    }


def _block_args(block: Any, neurons: int, dim: int) -> dict[str, Any]:
    if isinstance(block, EvaBlock):
        args = timm_eva.block_args(block, neurons, dim)
        args["scale_mlp_norm"], args["scale_attn_inner_norm"] = args["scale_mlp"], args["scale_attn_inner"]
        return args | {"proj_bias": True, "attn_gated": getattr(block.attn, "gate", None) is not None}
    for name, part, kind in (("attn", block.attn, Attention), ("mlp", block.mlp, Mlp)):
        if not isinstance(part, kind):
            raise ArtifactError(f"blocks.0.{name} is a {qualified_name(part)}, not timm's {kind.__name__}")
    args = timm_constructor.block_args(block)
    args["scale_attn_inner_norm"] = args["scale_attn_norm"]
    flags = dict.fromkeys(("attn_gated", "swiglu_mlp", "attn_only_layer_scale"), False)
    ratio = (neurons + 0.5) / dim
    return args | flags | {"attn_type": "standard", "qkv_fused": True, "swiglu_align_to": 0, "mlp_ratio": ratio}


def _rope_args(rope: Any, attn: Any) -> dict[str, Any]:
    args = timm_eva.rope_args(rope, attn)
    kind = None if rope is None else args["rope_type"]
    args["rope_type"] = next(name for name, known in _ROPE_TYPES.items() if known == kind)
    return args | {"rope_ref_feat_shape": args["ref_feat_shape"]}


def _check_fields(spec: Mapping[str, Any]) -> None:
    check_args(spec, {"norm", "embed_norm", "act"}, _ARG_TYPES)
    args = spec["args"]
    check_positive(args, "patch_size", "in_chans", "embed_dim", "depth", "num_heads")
    look_up(_ROPE_TYPES, args["rope_type"], "rope_type")
    for name in ("num_kv_heads", "pos_embed_grid_size", "rope_ref_feat_shape", "rope_mrope_section"):
        if any(type(size) is not int or not 0 < size <= 65536 for size in args.get(name) or ()):
            raise ArtifactError(f"constructor argument {name}={args[name]!r}: expected positive sizes")
