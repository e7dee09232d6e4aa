"""timm's `VisionTransformer` and everything built from its `Attention`, `Mlp`, `GluMlp` and `SwiGLU`.

ViT, DeiT, distilled DeiT, DeiT-III, register-token, average-pool and attention-pool models; tokens can leave wherever
attention has no idea of a position. Only the timm_* files know timm's attribute names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, cast

import torch
from timm import layers
from timm.layers import AttentionPoolLatent, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_mdc.errors import UnsupportedModelError
from lightning_mdc.models.compiled import unwrap
from lightning_mdc.models.sites import AttentionSite, BlockSite, Producer, Sites, TokenSite, UnitSite
from lightning_mdc.models.timm_block import TokenStageBlock
from lightning_mdc.models.timm_constructor import MLPS, NORMS, build, check_spec, describe, in_chans, qualified_name
from lightning_mdc.policy import TokenStage

_WHOLE_MODEL_METHODS = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")
_PARTS: dict[str, tuple[type, ...]] = {"attn": (layers.Attention,), "mlp": tuple(MLPS.values())}  # of a block


class TimmVisionTransformer:
    """Adapter for `timm.models.vision_transformer.VisionTransformer`."""

    name = "timm_vit"
    description = (
        "timm VisionTransformer built from timm.layers.Attention and Mlp, GluMlp or SwiGLU: ViT, DeiT, distilled DeiT, "
        "DeiT-III, register tokens, average or attention pooling (SigLIP), CLIP-style norm_pre"
    )

    def accepts(self, module: nn.Module) -> bool:
        """Whether this is a VisionTransformer whose forward is timm's own."""
        return _computes_as(module, (VisionTransformer, VisionTransformerDistilled), _WHOLE_MODEL_METHODS)

    def sites(self, model: Any) -> Sites:
        reasons: dict[str, str] = {}
        blocks = tuple(_block_site(f"blocks.{i}", unwrap(b), reasons) for i, b in enumerate(model.blocks))
        if getattr(model.attn_pool, "pos_embed", None) is not None:
            reasons.setdefault("tokens", "attn_pool (AttentionPoolLatent) adds a position to every token it pools")
        stages = [block for block in blocks if block.stage is not None]
        if stages:
            reasons["tokens"] = (
                f"{stages[0].name} already drops tokens: this model is slim; prune tokens of the dense one"
            )
        distilled = isinstance(model, VisionTransformerDistilled)
        height, width = model.patch_embed.img_size
        return Sites(
            model=model,
            name=type(model).__name__,
            family=self,
            blocks=blocks,
            container=model.blocks,
            dim=model.embed_dim,
            num_prefix_tokens=model.num_prefix_tokens,
            class_rows=((0, 1) if distilled else (0,)) if model.global_pool == "token" else (),
            grid=tuple(model.patch_embed.grid_size),
            input_size=(in_chans(model), height, width),
            fuse=cast(TokenStageBlock, stages[0].module).select.fuse if stages else True,
            drops_patches_at_random=not isinstance(model.patch_drop, nn.Identity),
            reasons=reasons,
            grid_of=partial(_grid_of, model),
            fixed_macs=partial(_fixed_macs, model, self.embedding_macs),
        )

    def token_stage_block(self, sites: Sites, index: int, stage: TokenStage, fuse: bool) -> nn.Module:
        return TokenStageBlock(sites.blocks[index].module, stage, sites.num_prefix_tokens, sites.class_rows, fuse)

    def embedding_macs(self, model: Any, size: tuple[int, int]) -> int:
        """MACs of the patch embedding for images of that (height, width)."""
        embed = model.patch_embed
        if type(embed) is PatchEmbed:
            height, width = _grid_of(model, size)
            return height * width * embed.proj.weight.numel()
        return _counted_macs(embed, (1, in_chans(model), *size), "patch_embed")

    def describe(self, model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return describe(model, sizes)

    def check_spec(self, spec: Mapping[str, Any], tensors: Collection[str]) -> None:
        check_spec(spec, tensors)

    def build(self, spec: Mapping[str, Any]) -> nn.Module:
        return build(spec)


def _computes_as(module: nn.Module, kinds: tuple[type, ...], methods: tuple[str, ...] = ("forward",)) -> bool:
    """Whether the module is of one of `kinds` and has its `methods`, none of its own."""
    return any(
        isinstance(module, kind)
        and all(getattr(type(module), name, None) is getattr(kind, name, None) for name in methods)
        for kind in kinds
    )


def _is_plain(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    """Whether the module computes what one of `kinds` does, on Linear layers that can be sliced."""
    children = (module._modules.get(name) for name in ("qkv", "gate", "proj", "fc1", "fc1_g", "fc1_x", "fc2"))
    return _computes_as(module, kinds) and all(
        # no parametrisation, no torch.nn.utils.prune
        child is None or (_computes_as(child, (nn.Linear,)) and "weight" in child._parameters)
        for child in children
    )


# --- where things are -------------------------------------------------------------------------------------------------


def _block_site(name: str, block: Any, reasons: dict[str, str]) -> BlockSite:
    stage = block.select.stage if isinstance(block, TokenStageBlock) else None
    pre_norm = stage is not None or _computes_as(block, (Block,))
    post_norm = _computes_as(block, (ResPostBlock,))
    if not pre_norm and not post_norm:
        reason = (
            f"{name} is a {qualified_name(block)}, neither timm's Block nor ResPostBlock (parallel, fused or its own)"
        )
        for dimension in ("heads", "neurons", "tokens"):
            reasons.setdefault(dimension, reason)
        return BlockSite(name, block, None, None, None, None, None)
    heads, attention = _head_site(f"{name}.attn", block.attn, reasons)
    neurons = _neuron_site(f"{name}.mlp", block.mlp, reasons)
    if post_norm:
        reasons.setdefault("tokens", f"{name} is a post-norm block ({qualified_name(block)}); tokens need pre-norm")
    elif attention is None:
        reasons.setdefault("tokens", reasons["heads"])
    tokens = TokenSite(residual_norm=block.norm2, mlp_out=block.drop_path2) if pre_norm else None
    return BlockSite(name, block, heads, neurons, attention, tokens, stage)


def _head_site(name: str, attn: Any, reasons: dict[str, str]) -> tuple[UnitSite, AttentionSite] | tuple[None, None]:
    if not _is_plain(attn, _PARTS["attn"]):
        reasons.setdefault(
            "heads",
            f"{name} is a {qualified_name(attn)}, not timm.layers.Attention with its own forward and Linear layers",
        )
        return None, None
    gate = getattr(attn, "gate", None)  # newer timm only
    heads = UnitSite(
        name=name,
        num_units=attn.num_heads,
        unit_width=attn.head_dim,
        producers=(Producer(attn.qkv, copies=3),) + (() if gate is None else (Producer(gate),)),
        norm=_spanning_norm(f"{name}.norm", attn.norm, "heads", reasons),
        consumer=attn.proj,
        owner=attn,
        size_attributes={"num_heads": 1, "attn_dim": attn.head_dim},
    )
    return heads, AttentionSite(qkv=attn.qkv, q_norm=attn.q_norm, k_norm=attn.k_norm, scale=attn.scale)


def _neuron_site(name: str, mlp: Any, reasons: dict[str, str]) -> UnitSite | None:
    if not _is_plain(mlp, _PARTS["mlp"]):
        reason = f"{name} is a {qualified_name(mlp)}, not timm's Mlp, GluMlp or SwiGLU with its own forward and Linears"
        reasons.setdefault("neurons", reason)
        reasons.setdefault("tokens", f"{reason}: its cost with fewer tokens is not known")
        return None
    if isinstance(mlp, layers.SwiGLU):
        producers: tuple[Producer, ...] = (Producer(mlp.fc1_g), Producer(mlp.fc1_x))
    else:
        producers = (Producer(mlp.fc1, copies=2 if isinstance(mlp, layers.GluMlp) else 1),)
    return UnitSite(
        name=name,
        num_units=mlp.fc2.in_features,
        unit_width=1,
        producers=producers,
        norm=_spanning_norm(f"{name}.norm", mlp.norm, "neurons", reasons),
        consumer=mlp.fc2,
        owner=mlp,
        size_attributes={},
    )


def _spanning_norm(name: str, norm: nn.Module, dimension: str, reasons: dict[str, str]) -> nn.Module | None:
    if isinstance(norm, nn.Identity):
        return None
    if type(norm) not in NORMS.values():
        reasons.setdefault(dimension, f"{name} is a {qualified_name(norm)}; known norms are {', '.join(NORMS)}")
    return norm


# --- what it costs outside the blocks ---------------------------------------------------------------------------------


def _grid_of(model: VisionTransformer, size: tuple[int, int]) -> tuple[int, int]:
    embed = model.patch_embed
    if tuple(size) == tuple(embed.img_size):
        return tuple(embed.grid_size)
    if not model.dynamic_img_size:
        raise UnsupportedModelError(
            f"input_size={tuple(size)}: this {type(model).__name__} takes {tuple(embed.img_size)} images only; create "
            "it with dynamic_img_size=True, or call model.set_input_size first"
        )
    grid = tuple(embed.dynamic_feat_size(size))
    if min(grid) < 1 or (not embed.dynamic_img_pad and any(s % p for s, p in zip(size, embed.patch_size, strict=True))):
        raise UnsupportedModelError(
            f"input_size={tuple(size)}: not a multiple of the {tuple(embed.patch_size)} patches of this model"
        )
    return grid


def _fixed_macs(
    model: VisionTransformer,
    embedding_macs: Callable[[Any, tuple[int, int]], int],
    size: tuple[int, int],
    num_tokens: Any,
) -> Any:
    """MACs of patch embedding, pooling and classifier; `num_tokens` (int or array) reach the pooling."""
    height, width = _grid_of(model, size)
    dim = model.embed_dim
    sequence = (1, height * width + model.num_prefix_tokens, dim)
    total: Any = embedding_macs(model, size)
    if model.attn_pool is not None:
        pooled = num_tokens if model.pool_include_prefix else num_tokens - model.num_prefix_tokens
        total = total + _pool_macs(model.attn_pool, pooled, dim)
    for i, block in enumerate(model.blocks):
        # A part no site stands for is priced as it is; tokens cannot leave such a model, so its length is known.
        for part, known in _PARTS.items():
            child = getattr(unwrap(block), part, None)
            if child is not None and not _is_plain(child, known):
                total = total + _counted_macs(child, sequence, f"blocks.{i}.{part}")
    heads = [model.head, model.head_dist] if isinstance(model, VisionTransformerDistilled) else [model.head]
    for head in heads:
        if isinstance(head, nn.Linear):
            total = total + head.weight.numel() * (1 if model.global_pool else num_tokens)
        elif not isinstance(head, nn.Identity):
            total = total + _counted_macs(head, (1, dim), "head")
    return total


def _pool_macs(pool: nn.Module, num_tokens: Any, dim: int) -> Any:
    if isinstance(pool, AttentionPoolLatent):
        inner = pool.kv.out_features // 2
        total = num_tokens * pool.kv.weight.numel() + 2 * pool.latent_len * num_tokens * inner
        mlp = [] if pool.mlp is None else [pool.mlp.fc1, pool.mlp.fc2]
        linears = [layer for layer in (pool.q, pool.proj, *mlp) if isinstance(layer, nn.Linear)]
        return total + pool.latent_len * sum(layer.weight.numel() for layer in linears)
    if type(pool).__name__ == "AttentionPoolPrr":  # newer timm only: attention without projections
        return 2 * num_tokens * num_tokens * dim
    raise UnsupportedModelError(
        f"attn_pool is a {qualified_name(pool)}, whose cost is not known; supported: none, map, prr"
    )


def _counted_macs(module: nn.Module, shape: tuple[int, ...], name: str) -> int:
    """MACs of a part without a formula of its own (a hybrid's CNN stem, a custom head), counted on the meta device."""
    try:
        stand_in = copy.deepcopy(module).to("meta").eval().requires_grad_(False)
        # torch's counter has no formula for every kernel of fused attention.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            stand_in(torch.empty(shape, device="meta"))
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} is a {qualified_name(module)}, whose cost cannot be counted: {error}"
        ) from error
    return counter.get_total_flops() // 2
