"""timm's `VisionTransformer` and everything built from its `Attention`, `Mlp`, `GluMlp` and `SwiGLU`.

ViT, DeiT, distilled DeiT, DeiT-III, register-token, average-pool and attention-pool models; tokens can leave wherever
attention has no idea of a position. Only the timm_* files know timm's attribute names.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from timm import layers
from timm.layers import AttentionPoolLatent, PatchEmbed
from timm.models._manipulate import checkpoint as timm_checkpoint
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_mdc.errors import UnsupportedModelError
from lightning_mdc.models.anatomy import (
    Anatomy,
    Block,
    Channels,
    Family,
    Size,
    TokenPoint,
    Units,
    affine_of,
    columns_of,
    rows_of,
)
from lightning_mdc.models.compiled import unwrap
from lightning_mdc.models.parts import altered, computes_as, other_than, own_methods, qualified_name
from lightning_mdc.models.swapping import not_copied, original_class
from lightning_mdc.models.timm_constructor import MLPS, NORMS, build, check_spec, describe, in_chans
from lightning_mdc.models.timm_fused import fused_block_of
from lightning_mdc.policy import TOKENS, UNIT_DIMENSIONS, Plan
from lightning_mdc.tokens.block import (
    attention_called,
    called,
    check_grid,
    refuse_masks,
    restored,
    stage_of,
    step,
    through,
)
from lightning_mdc.tokens.reduction import Evidence
from lightning_mdc.tokens.selection import Carried

_WHOLE_MODEL_METHODS = ("forward", "forward_features", "forward_head", "pool", "_pool", "_pos_embed", "_forward_embeds")


class TimmVisionTransformer(Family):
    """The family of `timm.models.vision_transformer.VisionTransformer`."""

    name = "timm_vit"
    description = (
        "timm VisionTransformer built from timm.layers.Attention and Mlp, GluMlp or SwiGLU: ViT, DeiT, distilled DeiT, "
        "DeiT-III, register tokens, average or attention pooling (SigLIP), CLIP-style norm_pre"
    )
    models: tuple[type, ...] = (VisionTransformer, VisionTransformerDistilled)

    def accepts(self, module: nn.Module) -> bool:
        """Whether this is one of `models` whose forward is timm's own."""
        return computes_as(module, self.models, _WHOLE_MODEL_METHODS)

    def refusal(self, module: nn.Module) -> str | None:
        """The method of its own that makes one of `models` another model."""
        if not isinstance(module, self.models):
            return None
        return own_methods(module, self.models, _WHOLE_MODEL_METHODS)

    def anatomy(self, model: Any) -> Anatomy:
        kind = self.block_kind(model)
        blocks: list[Block] = []
        for index, block in enumerate(model.blocks):
            blocks += _parts_of(kind, len(blocks), f"blocks.{index}", unwrap(block), model.embed_dim)
        size = self.own_size(model)
        distilled = isinstance(model, VisionTransformerDistilled)
        return Anatomy(
            model=model,
            name=original_class(model).__name__,
            family=self,
            blocks=tuple(blocks),
            dim=model.embed_dim,
            num_prefix_tokens=model.num_prefix_tokens,
            class_rows=((0, 1) if distilled else (0,)) if model.global_pool == "token" else (),
            grid=self.grid_of(model, size),
            input_size=(in_chans(model), *size),
            grid_of=partial(self.grid_of, model),
            fixed_macs=lambda size, tokens: self.embedding_macs(model, size) + _head_macs(model, tokens),
            reader=kind.reader,
            sequence=model.blocks if isinstance(model.blocks, nn.Sequential) else None,
            no_tokens=_no_tokens(model, blocks, kind.post_norm),
            classifies=not isinstance(model.head, nn.Identity),
            drops_patches_at_random=getattr(model.patch_drop, "prob", 0) > 0,
        )

    def block_kind(self, model: Any) -> BlockKind:
        """What the blocks of `model` are."""
        return PLAIN

    def own_size(self, model: Any) -> tuple[int, int]:
        """(height, width) of the images that `model` is made for."""
        height, width = model.patch_embed.img_size
        return height, width

    def grid_of(self, model: Any, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in patches of images of that (height, width)."""
        return _grid_of(model, size)

    def embedding_macs(self, model: Any, size: tuple[int, int]) -> int:
        """MACs of the patch embedding for images of that (height, width)."""
        embed = model.patch_embed
        if type(embed) is PatchEmbed:
            height, width = self.grid_of(model, size)
            return height * width * embed.proj.weight.numel()
        return counted_macs(embed, (1, in_chans(model), *size), "patch_embed")

    def describe(self, model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return describe(model, sizes)

    def check_spec(self, spec: Mapping[str, Any], tensors: Collection[str]) -> None:
        check_spec(spec, tensors)

    def build(self, spec: Mapping[str, Any]) -> nn.Module:
        return build(spec)


def foreign_part(
    parts: Iterable[tuple[str, Any, tuple[type, ...]]], methods: tuple[str, ...] = ("forward",)
) -> str | None:
    """What the first of `parts` (name, module, timm's classes) is that computes another way; None if none does."""
    for name, part, kinds in parts:
        if not computes_as(part, kinds, methods):
            return other_than(name, part, f"timm's {kinds[0].__name__} with its own forward")
    return None


def check_size(model: nn.Module, size: tuple[int, int], own: tuple[int, int]) -> None:
    """Refuse, with an `UnsupportedModelError`, images of another size than the model's own."""
    if tuple(size) != tuple(own):
        raise UnsupportedModelError(
            f"input_size={tuple(size)}: this {original_class(model).__name__} takes {tuple(own)} images only; create "
            "it with img_size="
        )


def configured_size(model: Any) -> tuple[int, int] | None:
    """(height, width) of the images that timm's configuration of the model names, if it has one."""
    found = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    return None if found is None else (found[1], found[2])


_LINEARS = (
    *("qkv", "q", "k", "v", "q_proj", "k_proj", "v_proj", "gate", "proj", "fc1", "fc1_g", "fc1_x", "fc2"),
    *("in_proj", "attn_out_proj", "mlp_out_proj"),
)


def not_plain(name: str, module: nn.Module, kinds: tuple[type, ...]) -> str | None:
    """What is in the way in the part called `name`, if it is not as one of `kinds` is, made of Linear layers."""
    return altered(name, module, kinds, _LINEARS)


# --- what a block is made of ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockKind:
    """Blocks of one file of timm's: attention and MLP, each behind a norm, or before one.

    Attributes:
        pre_norm, post_norm: their classes.
        attentions: classes of attention whose heads are known.
        heads: (index of the block, name, attention) -> its heads, whether or not they can be cut.
        point: (block, heads) -> where tokens can leave; of pre-norm blocks only.
        reader: of `Anatomy`.
    """

    pre_norm: type
    post_norm: type
    attentions: tuple[type, ...]
    heads: Callable[[int, str, Any], Units]
    point: Callable[[Any, Units], TokenPoint]
    reader: type


def block_of(kind: BlockKind, index: int, name: str, block: Any, dim: int) -> Block:
    """What the block of that index and name is made of: of that kind, or else one that loses nothing."""
    if not computes_as(block, (kind.pre_norm, kind.post_norm)):
        expected = f"timm's {kind.pre_norm.__name__} or {kind.post_norm.__name__} with its own forward"
        reason = other_than(name, block, expected)
        if isinstance(getattr(block, "out_proj", None), nn.Linear):
            reason = f"{name}.out_proj ({type(block).__name__}) is one layer, which reads heads and neurons at once"
        elif _misplaces_bias(block):
            reason = f"{name} adds its neurons' mlp_bias to queries, keys and values; newer timm does not"
        reasons = dict.fromkeys(UNIT_DIMENSIONS, reason)
        return Block(name, block, {}, reasons, rest=(CountedMacs(block, dim, name), None))
    point = None
    pre_norm = computes_as(block, (kind.pre_norm,))
    if pre_norm and not_plain("", block.attn, kind.attentions) is None:
        point = kind.point(block, kind.heads(index, f"{name}.attn", block.attn))
    heads = _heads_or_reason(kind, index, f"{name}.attn", block.attn)
    found = two_halves(index, name, block, dim, heads, block.norm2 if pre_norm else block.mlp)
    return replace(found, point=point, stage=stage_of(block))


def two_halves(
    index: int,
    name: str,
    block: Any,
    dim: int,
    heads: Units | str,
    second_half: nn.Module,
    window: int | None = None,
) -> Block:
    """A block of timm's with the `heads` of its ``attn``, or why they cannot be cut, and an ``mlp``.

    Attributes of `Block`; `window`: tokens that its attention sees at once, if those are not all.
    """
    units: dict[str, Units] = {}
    reasons: dict[str, str] = {}
    rest: list[Callable[[Any], Any] | None] = [None, None]  # of either half, in case no units stand for it
    if isinstance(heads, Units):
        units["heads"] = heads
    else:
        reasons["heads"], rest[0] = heads, CountedMacs(block.attn, dim, f"{name}.attn", window)
    neurons = neurons_of(index, f"{name}.mlp", block.mlp)
    if isinstance(neurons, Units):
        units["neurons"] = neurons
    else:
        reasons["neurons"], rest[1] = neurons, CountedMacs(block.mlp, dim, f"{name}.mlp")
    return Block(name, block, units, reasons, rest=(rest[0], rest[1]), second_half=second_half)


def _parts_of(kind: BlockKind, index: int, name: str, block: Any, dim: int) -> Iterator[Block]:
    """A block of the model; where it has attentions side by side, and MLPs after them, each is a block of its own."""
    if not_plain("", block, (ParallelScalingBlock,)) is None and block.out_proj is None and not _misplaces_bias(block):
        yield fused_block_of(index, name, block)
        return
    if not computes_as(block, (ParallelThingsBlock,)):
        yield block_of(kind, index, name, block, dim)
        return
    side_by_side = f"{name} (ParallelThingsBlock) has {len(block.attns)} attentions side by side"
    for branches in (block.attns, block.ffns):
        for place, branch in enumerate(branches):
            first = branches is block.attns
            path = f"{name}.{'attns' if first else 'ffns'}.{place}"
            dimension, other = ("heads", "neurons") if first else ("neurons", "heads")
            part = branch.attn if first else branch.mlp
            owner = f"{path}.{'attn' if first else 'mlp'}"
            found = _heads_or_reason(kind, index, owner, part) if first else neurons_of(index, owner, part)
            reasons = {other: f"{path} is one half of a block, without {other}"}
            reasons[TOKENS] = f"{side_by_side}, and no single one to rank its tokens by"
            counted = None
            if isinstance(found, str):
                reasons[dimension], counted = found, CountedMacs(part, dim, owner)
            units = {dimension: found} if isinstance(found, Units) else {}
            rest = (counted, None) if first else (None, counted)
            yield Block(path, branch, units, reasons, rest=rest, second_half=None if first else branch)
            index += 1


def _misplaces_bias(block: Any) -> bool:
    """Whether it is older timm's ParallelScalingBlock without biases of queries, keys and values."""
    return isinstance(getattr(block, "qkv_bias", None), Tensor)


def _heads_or_reason(kind: BlockKind, index: int, name: str, attn: Any) -> Units | str:
    """The heads, or why they cannot be cut."""
    if (reason := not_plain(name, attn, kind.attentions)) is not None:
        return reason
    return _unknown_norm(f"{name}.norm", attn.norm) or kind.heads(index, name, attn)


def _heads(index: int, name: str, attn: Any) -> Units:
    """The heads of timm's own attention."""
    width, gate = attn.head_dim, getattr(attn, "gate", None)  # newer timm only
    parts = [rows_of(attn.qkv, 3, width), columns_of(attn.proj, width)]
    if gate is not None:
        parts.append(rows_of(gate, width=width))
    if not isinstance(attn.norm, nn.Identity):
        parts.append(affine_of(attn.norm, width))
    weights = sum(layer.weight.numel() for layer in (attn.qkv, attn.proj, gate) if layer is not None)
    per_head = weights // attn.num_heads if attn.num_heads else 0
    return Units(
        dimension="heads",
        block=index,
        name=name,
        count=attn.num_heads,
        width=width,
        slices=tuple(part for slices, _ in parts for part in slices),
        sizes=(
            *(size for _, sizes in parts for size in sizes),
            Size(attn, "num_heads", lambda kept: kept),
            Size(attn, "attn_dim", lambda kept: kept * width),
        ),
        reader=attn.proj,
        macs=lambda heads, tokens: tokens * heads * per_head + 2 * tokens * tokens * heads * width,
        norm=spanning(f"{name}.norm", attn.norm),
    )


def _point(block: Any, heads: Units) -> TokenPoint:
    channels = block.attn.qkv.out_features
    values = Channels(block.attn.qkv, channels * 2 // 3, channels)
    return TokenPoint(TimmHalves, heads, values, calls=block.attn)


def neurons_of(index: int, name: str, mlp: Any) -> Units | str:
    """The neurons, or why they cannot be cut."""
    if (reason := not_plain(name, mlp, tuple(MLPS.values()))) is not None:
        return reason
    if (reason := _unknown_norm(f"{name}.norm", mlp.norm)) is not None:
        return reason
    makers = [mlp.fc1_g, mlp.fc1_x] if isinstance(mlp, layers.SwiGLU) else [mlp.fc1]
    parts = [rows_of(maker, 2 if isinstance(mlp, layers.GluMlp) else 1) for maker in makers]
    parts.append(columns_of(mlp.fc2))
    if not isinstance(mlp.norm, nn.Identity):
        parts.append(affine_of(mlp.norm))
    count = mlp.fc2.in_features
    weights = sum(layer.weight.numel() for layer in (*makers, mlp.fc2)) // max(count, 1)
    return Units(
        dimension="neurons",
        block=index,
        name=name,
        count=count,
        width=1,
        slices=tuple(part for slices, _ in parts for part in slices),
        sizes=tuple(size for _, sizes in parts for size in sizes),
        reader=mlp.fc2,
        macs=lambda neurons, tokens: tokens * neurons * weights,
        after_point=True,
        norm=spanning(f"{name}.norm", mlp.norm),
    )


def spanning(name: str, norm: nn.Module) -> str | None:
    return None if isinstance(norm, nn.Identity) else f"{name} ({type(norm).__name__})"


def _unknown_norm(name: str, norm: nn.Module) -> str | None:
    if isinstance(norm, nn.Identity) or original_class(norm) in NORMS.values():
        return None
    return f"{name} is a {qualified_name(norm)}; known norms are {', '.join(NORMS)}"


def _no_tokens(model: Any, blocks: Sequence[Block], post_norm: type) -> str | None:
    """Why tokens cannot leave; None if they can."""
    for block in blocks:
        if block.stage is not None:
            return f"{block.name} already drops tokens: this model is slim; prune tokens of the dense one"
    for block in blocks:
        if block.point is None:
            if computes_as(block.module, (post_norm,)):
                return f"{block.name} is a post-norm block ({qualified_name(block.module)}); tokens need pre-norm"
            return block.reasons.get(TOKENS) or next(iter(block.reasons.values()))
    if getattr(model.attn_pool, "pos_embed", None) is not None:
        return "attn_pool (AttentionPoolLatent) adds a position to every token it pools"
    return None


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


def _head_macs(model: VisionTransformer, num_tokens: Any) -> Any:
    """MACs of pooling and classifier; `num_tokens` (int or array) reach the pooling."""
    dim = model.embed_dim
    total: Any = 0
    if model.attn_pool is not None:
        whole = getattr(model, "pool_include_prefix", True)  # timm's Eva pools all
        pooled = num_tokens if whole else num_tokens - model.num_prefix_tokens
        total = total + _pool_macs(model.attn_pool, pooled, dim)
    heads = [model.head, model.head_dist] if isinstance(model, VisionTransformerDistilled) else [model.head]
    for head in heads:
        if isinstance(head, nn.Linear):
            total = total + head.weight.numel() * (1 if model.global_pool else num_tokens)
        elif not isinstance(head, nn.Identity):
            total = total + counted_macs(head, (1, dim), "head")
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


def counted_macs(module: nn.Module, shape: tuple[int, ...], name: str) -> int:
    """MACs of a part without a formula of its own (a hybrid's CNN stem, a custom head), counted on the meta device."""
    try:
        stand_in = copy.deepcopy(module, not_copied(module)).to("meta", torch.float32).eval().requires_grad_(False)
        for part in stand_in.modules():
            part._forward_hooks.clear()  # other people's are not shown what is no image
        return counted(lambda: stand_in(torch.empty(shape, device="meta")))
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} is a {qualified_name(module)}, whose cost cannot be counted: {error}"
        ) from error


def counted(run: Callable[[], Any]) -> int:
    """MACs of what `run` computes, by torch's counter."""
    # It has no formula for every kernel of fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() // 2


class CountedMacs:
    """MACs of a part without a formula of its own by how many tokens it sees, counted on the meta device; all at once,
    or in windows of so many."""

    # Per part, since anatomies come and go: by number of tokens.
    _known: ClassVar[WeakKeyDictionary[nn.Module, dict[int, int]]] = WeakKeyDictionary()

    def __init__(self, module: nn.Module, dim: int, name: str, window: int | None = None) -> None:
        self._module, self._dim, self._name, self._window = module, dim, name, window

    def __call__(self, tokens: Any) -> Any:
        values, places = np.unique(tokens, return_inverse=True)
        return np.array([self._of(int(value)) for value in values])[places].reshape(np.shape(tokens))

    def _of(self, tokens: int) -> int:
        known = self._known.setdefault(self._module, {})
        if tokens not in known:
            window = self._window or tokens
            known[tokens] = counted_macs(self._module, (tokens // window, window, self._dim), self._name)
        return known[tokens]


# --- where tokens leave -----------------------------------------------------------------------------------------------


class TimmHalves:
    """Mixin: timm's pre-norm Block in two halves, which compute operation by operation what its forward does."""

    # The children are timm's; to the type checker they are anything.
    norm1: Any
    attn: Any
    ls1: Any
    drop_path1: Any
    norm2: Any
    mlp: Any
    ls2: Any
    drop_path2: Any

    def attend(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Evidence]:
        y, evidence = attention_called(self.attn, partial(self._attended, bias), self.norm1(x))
        return x + self.drop_path1(self.ls1(y)), evidence

    def _attended(self, bias: Tensor | None, normed: Tensor) -> tuple[Tensor, Evidence]:
        # What timm's Attention does, with q and k handed out: they are needed for the scores, and the fused kernel
        # hides its map. (b, n, 3 * h * d) -> three of (b, h, n, d)
        attn = self.attn
        batch, num_tokens, _ = normed.shape
        qkv = attn.qkv(normed).reshape(batch, num_tokens, 3, attn.num_heads, attn.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if attn.fused_attn:
            dropout = attn.attn_drop.p if attn.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        else:
            logits = (q * attn.scale) @ k.transpose(-2, -1)
            y = attn.attn_drop((logits if bias is None else logits + bias).softmax(dim=-1)) @ v
        y = attn.norm(y.transpose(1, 2).reshape(batch, num_tokens, attn.attn_dim))
        gate = getattr(attn, "gate", None)
        if gate is not None:
            y = y * gate(normed).sigmoid()
        return attn.proj_drop(attn.proj(y)), Evidence(q, k, attn.scale)

    def finish(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return result


class TimmReader:
    """Mixin: a VisionTransformer inside which tokens leave, and what is read between its blocks."""

    patch_embed: Any
    _pos_embed: Any
    patch_drop: Any
    norm_pre: Any
    blocks: Any
    norm: Any
    num_prefix_tokens: int
    grad_checkpointing: bool
    plan: Plan

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As timm's; if the plan restores them, every position has a token again.

        Raises:
            PlanError: a prior over positions is for a grid of another shape than these images have.
            UnsupportedModelError: an attention mask is given; it would not fit the tokens that are left.
        """
        self._check(x, attn_mask, is_causal)
        x, *ropes = self._embedded(x)
        checkpoint = timm_checkpoint if self.grad_checkpointing else None

        def run(x: Tensor) -> Tensor:
            return through(self.blocks, x, self.num_prefix_tokens, self.plan.restore, checkpoint, *ropes)

        # Where blocks are checkpointed, timm does not call what holds them.
        x = run(x) if checkpoint else called(self.blocks, run, x)
        features: Tensor = self.norm(x)
        return features

    def _embedded(self, x: Tensor) -> tuple[Any, ...]:
        """What reaches the first block, and, where tokens turn, the `ropes` of `through`."""
        return (self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x)))),)

    def _turned(self, rope: Tensor, carried: Carried | None) -> Tensor:
        """How the tokens that are left turn, of how all of them do."""
        return rope

    def _grid(self, x: Tensor) -> tuple[int, int]:
        """(height, width) in patches of images x."""
        height, width = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        return height, width

    def _check(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
        refuse_masks(attn_mask, is_causal)
        check_grid(self.plan, x.shape[-2:], self._grid(x))

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As timm's; if the plan restores them, every position has a token in what each block gives.

        Raises:
            UnsupportedModelError: maps are asked for, and positions are not restored.
        """
        given = inspect.signature(super().forward_intermediates).bind(x, *args, **kwargs)  # type: ignore[misc]
        given.apply_defaults()
        if given.arguments["output_fmt"] == "NCHW" and not self.plan.restore:
            raise UnsupportedModelError(
                "forward_intermediates(output_fmt='NCHW'): tokens leave inside this model, so there is no full feature "
                "map to return; ask for output_fmt='NLC', prune with TokenOptions(restore=True), or with tokens=1.0"
            )
        self._check(x, given.arguments.get("attn_mask"), given.arguments.get("is_causal", False))
        way: list[Any] = [None, None]  # tokens behind the last block, and what travels beside them

        def read(block: nn.Module, x: Tensor, rope: Tensor | None = None, **options: Any) -> Tensor:
            before, carried = way
            rope = None if rope is None else self._turned(rope, carried)
            way[:] = x, carried = step(block, x if before is None else before, carried, rope)
            return restored(x, carried, self.num_prefix_tokens) if self.plan.restore else x

        # timm's own method, on a stand-in whose blocks show what may be read.
        stand_in = copy.copy(self)
        vars(stand_in)["blocks"] = [partial(read, block) for block in self.blocks]
        vars(stand_in)["grad_checkpointing"] = False  # it would call blocks twice
        return super(TimmReader, stand_in).forward_intermediates(x, *args, **kwargs)  # type: ignore[misc]


PLAIN = BlockKind(TimmBlock, ResPostBlock, (layers.Attention,), _heads, _point, TimmReader)
