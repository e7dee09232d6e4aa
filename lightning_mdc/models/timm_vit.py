"""timm's `VisionTransformer` and everything built from its `Attention`, `Mlp`, `GluMlp` and `SwiGLU`.

ViT, DeiT, distilled DeiT, DeiT-III, register-token, average-pool and attention-pool models; tokens can leave wherever
attention has no idea of a position. The only file that knows timm's attribute names.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm import layers
from timm.layers import AttentionPoolLatent, PatchEmbed
from timm.layers import activations as timm_activations
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_mdc.errors import ArtifactError, UnsupportedModelError
from lightning_mdc.models.compiled import unwrap
from lightning_mdc.models.sites import AttentionSite, BlockSite, Producer, Sites, TokenSite, UnitSite
from lightning_mdc.models.token_stage import drop_tokens
from lightning_mdc.policy import TokenStage

_WHOLE_MODEL_METHODS = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")
_PLAIN_MLPS: tuple[type[nn.Module], ...] = (layers.Mlp, layers.GluMlp, layers.SwiGLU)

# What a saved model may be made of. Loading looks classes up here and nowhere else.
_MODELS = {"VisionTransformer": VisionTransformer, "VisionTransformerDistilled": VisionTransformerDistilled}
_BLOCKS = {"Block": Block, "ResPostBlock": ResPostBlock}
_MLPS = {"Mlp": layers.Mlp, "GluMlp": layers.GluMlp, "SwiGLU": layers.SwiGLU}
_NORMS = {
    "timm.LayerNorm": layers.LayerNorm,
    "torch.LayerNorm": nn.LayerNorm,
    "timm.RmsNorm": layers.RmsNorm,
} | {
    f"timm.{name}": getattr(layers, name)
    for name in ("LayerNormFp32", "RmsNormFp32", "SimpleNorm", "SimpleNormFp32")
    if hasattr(layers, name)
}
_ACTIVATIONS = {
    f"torch.{cls.__name__}": cls for cls in (nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU)
} | {
    f"timm.{name}": getattr(timm_activations, name)
    for name in ("GELU", "GELUTanh", "QuickGELU", "Swish", "Sigmoid", "Tanh", "Mish", "SquaredReLU")
    if hasattr(timm_activations, name)
}


class TokenStageBlock(nn.Module):
    """A pre-norm timm block that drops tokens between its attention and its MLP.

    Takes over the block's children under their own names, so state_dict keys stay. With nothing to drop it computes
    what the block computed, operation by operation. K is static per input size: compile and export see no branch on
    data.
    """

    prior: Tensor | None

    def __init__(
        self, block: nn.Module, stage: TokenStage, num_prefix_tokens: int, class_rows: tuple[int, ...], fuse: bool
    ) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.training = block.training
        self.stage = stage
        self.num_prefix_tokens = num_prefix_tokens
        self.class_rows = class_rows
        self.fuse = fuse
        # From the plan, not from the weights: the state_dict keeps the dense model's keys.
        prior = None if stage.prior is None else torch.tensor(stage.prior, dtype=torch.float32, device="cpu")
        self.register_buffer("prior", prior, persistent=False)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x: (batch, tokens, dim) -> (batch, kept tokens + fused token, dim).

        Raises:
            UnsupportedModelError: an attention mask is given; it would not fit the tokens that are left.
        """
        if attn_mask is not None or is_causal:
            raise UnsupportedModelError(
                "attn_mask / is_causal: tokens leave inside this slim model, so a mask over the input's tokens does not "
                "fit its later blocks; call it without, or prune with tokens=1.0"
            )
        y, q, k = self._attend(self.norm1(x))
        x = x + self.drop_path1(self.ls1(y))
        x = drop_tokens(
            x,
            q,
            k,
            self.stage,
            self.prior,
            scale=self.attn.scale,
            class_rows=self.class_rows,
            num_prefix_tokens=self.num_prefix_tokens,
            fuse=self.fuse,
        )
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _attend(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # What timm's Attention does, with q and k handed out: they are needed for the scores, and the fused kernel
        # hides its map. (b, n, 3 * h * d) -> three of (b, h, n, d)
        attn = self.attn
        batch, num_tokens, _ = x.shape
        qkv = attn.qkv(x).reshape(batch, num_tokens, 3, attn.num_heads, attn.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if attn.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if self.training else 0.0)
        else:
            y = attn.attn_drop(((q * attn.scale) @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        y = attn.norm(y.transpose(1, 2).reshape(batch, num_tokens, attn.attn_dim))
        gate = getattr(attn, "gate", None)
        if gate is not None:
            y = y * gate(x).sigmoid()
        return attn.proj_drop(attn.proj(y)), q, k

    def extra_repr(self) -> str:
        return f"keep={self.stage.keep:.4g}, score={self.stage.score}, fuse={self.fuse}"


class TimmVisionTransformer:
    """Adapter for `timm.models.vision_transformer.VisionTransformer`."""

    name = "timm_vit"
    description = (
        "timm VisionTransformer built from timm.layers.Attention and Mlp, GluMlp or SwiGLU: ViT, DeiT, distilled DeiT, "
        "DeiT-III, register tokens, average or attention pooling (SigLIP), CLIP-style norm_pre"
    )

    def accepts(self, module: nn.Module) -> bool:
        """Whether this is a VisionTransformer whose forward is timm's own."""
        cls = type(module)
        if not isinstance(module, VisionTransformer):
            return False
        return any(
            issubclass(cls, base) and _inherits(cls, base, _WHOLE_MODEL_METHODS)
            for base in (VisionTransformer, VisionTransformerDistilled)
        )

    def sites(self, model: nn.Module) -> Sites:
        """Where the units of `model` are; see `Sites`."""
        assert isinstance(model, VisionTransformer)
        reasons: dict[str, str] = {}
        blocks = tuple(_block_site(f"blocks.{i}", unwrap(b), reasons) for i, b in enumerate(model.blocks))
        pool = model.attn_pool if hasattr(model, "attn_pool") else None
        if getattr(pool, "pos_embed", None) is not None:
            reasons.setdefault("tokens", "attn_pool (AttentionPoolLatent) adds a position to every token it pools")
        distilled = isinstance(model, VisionTransformerDistilled)
        height, width = model.patch_embed.img_size
        stages = [unwrap(b) for b in model.blocks if isinstance(unwrap(b), TokenStageBlock)]
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
            input_size=(_in_chans(model), height, width),
            fuse=stages[0].fuse if stages else True,
            reasons=reasons,
            grid_of=partial(_grid_of, model),
            fixed_macs=partial(_fixed_macs, model),
        )

    def token_stage_block(self, sites: Sites, index: int, stage: TokenStage, fuse: bool) -> nn.Module:
        """The block as a `TokenStageBlock` sharing its children."""
        return TokenStageBlock(sites.blocks[index].module, stage, sites.num_prefix_tokens, sites.class_rows, fuse)

    def describe(self, model: nn.Module, num_heads: tuple[int, ...], num_neurons: tuple[int, ...]) -> dict[str, Any]:
        """Constructor arguments read off the modules.

        Raises:
            ArtifactError: a part that no constructor argument expresses; names it.
        """
        assert isinstance(model, VisionTransformer)
        return _describe(model, num_heads, num_neurons)

    def build(self, spec: Mapping[str, Any]) -> nn.Module:
        """The dense model of `describe`, from the closed tables above.

        Raises:
            ArtifactError: a field is missing, unknown or of the wrong type.
        """
        return _build(spec)


def _inherits(cls: type, base: type, methods: tuple[str, ...]) -> bool:
    return all(getattr(cls, name, None) is getattr(base, name, None) for name in methods)


def _is_plain(module: nn.Module, kinds: type | tuple[type, ...]) -> bool:
    """Whether the module is of one of `kinds` and computes what they compute, on Linear layers that can be sliced."""
    for kind in kinds if isinstance(kinds, tuple) else (kinds,):
        if isinstance(module, kind) and _inherits(type(module), kind, ("forward",)):
            children = (module._modules.get(name) for name in ("qkv", "gate", "proj", "fc1", "fc1_g", "fc1_x", "fc2"))
            return all(
                child is None or (isinstance(child, nn.Linear) and _inherits(type(child), nn.Linear, ("forward",)))
                for child in children
            )
    return False


def _qualified(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


# --- where things are -------------------------------------------------------------------------------------------------


def _block_site(name: str, block: nn.Module, reasons: dict[str, str]) -> BlockSite:
    stage = block.stage if isinstance(block, TokenStageBlock) else None
    pre_norm = stage is not None or (isinstance(block, Block) and _inherits(type(block), Block, ("forward",)))
    post_norm = isinstance(block, ResPostBlock) and _inherits(type(block), ResPostBlock, ("forward",))
    if not pre_norm and not post_norm:
        reason = f"{name} is a {_qualified(block)}, neither timm's Block nor ResPostBlock (parallel, fused or its own)"
        for dimension in ("heads", "neurons", "tokens"):
            reasons.setdefault(dimension, reason)
        return BlockSite(name, block, None, None, None, None, None)
    heads, attention = _head_site(f"{name}.attn", block.attn, reasons)
    neurons = _neuron_site(f"{name}.mlp", block.mlp, reasons)
    if post_norm:
        reasons.setdefault("tokens", f"{name} is a post-norm block ({_qualified(block)}); tokens need pre-norm")
    elif attention is None:
        reasons.setdefault("tokens", reasons["heads"])
    tokens = TokenSite(residual_norm=block.norm2, mlp_out=block.drop_path2) if pre_norm else None
    return BlockSite(name, block, heads, neurons, attention, tokens, stage)


def _head_site(
    name: str, attn: nn.Module, reasons: dict[str, str]
) -> tuple[UnitSite, AttentionSite] | tuple[None, None]:
    if not _is_plain(attn, layers.Attention):
        reasons.setdefault("heads", f"{name} is a {_qualified(attn)}, not timm.layers.Attention with its own forward and Linear layers")
        return None, None
    gate = getattr(attn, "gate", None)
    producers = [Producer(attn.qkv, copies=3)] + ([Producer(gate)] if gate is not None else [])
    norm = _spanning_norm(f"{name}.norm", attn.norm, "heads", reasons)
    heads = UnitSite(
        name=name,
        num_units=attn.num_heads,
        unit_width=attn.head_dim,
        producers=tuple(producers),
        norm=norm,
        consumer=attn.proj,
        owner=attn,
        size_attributes={"num_heads": 1, "attn_dim": attn.head_dim},
    )
    return heads, AttentionSite(qkv=attn.qkv, q_norm=attn.q_norm, k_norm=attn.k_norm, scale=attn.scale)


def _neuron_site(name: str, mlp: nn.Module, reasons: dict[str, str]) -> UnitSite | None:
    if not _is_plain(mlp, _PLAIN_MLPS):
        reason = f"{name} is a {_qualified(mlp)}, not timm's Mlp, GluMlp or SwiGLU with their own forward and Linear layers"
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
    if type(norm) not in _NORMS.values():
        reasons.setdefault(dimension, f"{name} is a {_qualified(norm)}; known norms are {', '.join(_NORMS)}")
    return norm


# --- what it costs outside the blocks ---------------------------------------------------------------------------------


def _in_chans(model: VisionTransformer) -> int:
    return getattr(model, "in_chans", None) or model.patch_embed.proj.in_channels


def _grid_of(model: VisionTransformer, size: tuple[int, int]) -> tuple[int, int]:
    embed = model.patch_embed
    if tuple(size) == tuple(embed.img_size):
        return tuple(embed.grid_size)
    if not model.dynamic_img_size:
        raise UnsupportedModelError(
            f"input_size={tuple(size)}: this {type(model).__name__} takes {tuple(embed.img_size)} images only; create it "
            "with dynamic_img_size=True, or call model.set_input_size first"
        )
    return tuple(embed.dynamic_feat_size(size))


def _fixed_macs(model: VisionTransformer, size: tuple[int, int], num_tokens: Any) -> Any:
    """MACs of patch embedding, pooling and classifier; `num_tokens` (int or array) reach the pooling."""
    height, width = _grid_of(model, size)
    embed, dim = model.patch_embed, model.embed_dim
    sequence = (1, height * width + model.num_prefix_tokens, dim)
    if type(embed) is PatchEmbed:
        total: Any = height * width * embed.proj.weight.numel()
    else:
        total = _counted_macs(embed, (1, _in_chans(model), *size), "patch_embed")
    pool = model.attn_pool if hasattr(model, "attn_pool") else None
    if pool is not None:
        pooled = num_tokens if model.pool_include_prefix else num_tokens - model.num_prefix_tokens
        total = total + _pool_macs(pool, pooled, dim)
    for i, block in enumerate(model.blocks):
        # A part no site stands for is priced as it is; tokens cannot leave such a model, so its length is known.
        for part in ("attn", "mlp"):
            child = getattr(unwrap(block), part, None)
            known = layers.Attention if part == "attn" else _PLAIN_MLPS
            if child is not None and not _is_plain(child, known):
                total = total + _counted_macs(child, sequence, f"blocks.{i}.{part}")
    heads = [model.head, model.head_dist] if isinstance(model, VisionTransformerDistilled) else [model.head]
    for head in heads:
        if isinstance(head, nn.Linear):
            total = total + head.weight.numel()
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
    raise UnsupportedModelError(f"attn_pool is a {_qualified(pool)}, whose cost is not known; supported: none, map, prr")


def _counted_macs(module: nn.Module, shape: tuple[int, ...], name: str) -> int:
    """MACs of a part without a formula of its own (a hybrid's CNN stem, a custom head), counted on the meta device."""
    try:
        stand_in = copy.deepcopy(module).to("meta").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            stand_in(torch.empty(shape, device="meta"))
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} is a {_qualified(module)}, whose cost cannot be counted: {error}"
        ) from error
    return counter.get_total_flops() // 2


# --- how to build it again --------------------------------------------------------------------------------------------


def _describe(model: VisionTransformer, num_heads: tuple[int, ...], num_neurons: tuple[int, ...]) -> dict[str, Any]:
    block, embed = unwrap(model.blocks[0]), model.patch_embed
    attn, mlp, is_post_norm = block.attn, block.mlp, isinstance(block, ResPostBlock)
    if type(embed) is not PatchEmbed:
        raise ArtifactError(f"patch_embed is a {_qualified(embed)}, which no constructor argument of ours expresses")
    scaled = block.init_values is not None if is_post_norm else isinstance(block.ls1, layers.LayerScale)
    neurons = _one_size(num_neurons, "neurons")
    hidden = 2 * neurons if isinstance(mlp, layers.GluMlp) else neurons
    return {
        "class": "VisionTransformerDistilled" if isinstance(model, VisionTransformerDistilled) else "VisionTransformer",
        "block": "ResPostBlock" if is_post_norm else "Block",
        "mlp": next(name for name, kind in _MLPS.items() if isinstance(mlp, kind)),
        "glu_gate_last": bool(getattr(mlp, "gate_last", False)),
        "norm": _norm_spec(block.norm1, "blocks.0.norm1"),
        "embed_norm": None if isinstance(embed.norm, nn.Identity) else _norm_spec(embed.norm, "patch_embed.norm"),
        "act": {"class": _name_of(_ACTIVATIONS, mlp.act, "blocks.0.mlp.act")} | _own(mlp.act, "approximate"),
        "gated": getattr(attn, "gate", None) is not None,
        "head_dim": attn.head_dim,
        "args": {
            "img_size": list(embed.img_size),
            "patch_size": list(embed.patch_size),
            "in_chans": _in_chans(model),
            "num_classes": model.num_classes,
            "global_pool": model.global_pool,
            "embed_dim": model.embed_dim,
            "depth": len(model.blocks),
            "num_heads": _one_size(num_heads, "heads"),
            # int(dim * ratio) must give the hidden size back; half a unit keeps the product off the edge.
            "mlp_ratio": (hidden + 0.5) / model.embed_dim,
            "qkv_bias": attn.qkv.bias is not None,
            "qk_norm": not isinstance(attn.q_norm, nn.Identity),
            "scale_attn_norm": not isinstance(attn.norm, nn.Identity),
            "scale_mlp_norm": not isinstance(mlp.norm, nn.Identity),
            "proj_bias": attn.proj.bias is not None,
            "init_values": 1e-5 if scaled else None,  # only whether there is one; the values are weights
            "class_token": model.has_class_token,
            "pos_embed": "none" if model.pos_embed is None else "learn",
            "no_embed_class": model.no_embed_class,
            "reg_tokens": model.num_reg_tokens,
            "pre_norm": not isinstance(model.norm_pre, nn.Identity),
            "final_norm": not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
            "fc_norm": not isinstance(model.fc_norm, nn.Identity),
            "pool_include_prefix": getattr(model, "pool_include_prefix", False),
            "dynamic_img_size": model.dynamic_img_size,
            "dynamic_img_pad": embed.dynamic_img_pad,
            "drop_rate": model.head_drop.p,
            "pos_drop_rate": model.pos_drop.p,
            "patch_drop_rate": getattr(model.patch_drop, "prob", 0.0),
            "proj_drop_rate": attn.proj_drop.p,
            "attn_drop_rate": attn.attn_drop.p,
            "drop_path_rate": getattr(unwrap(model.blocks[-1]).drop_path1, "drop_prob", None) or 0.0,
        },
    }


# JSON types of the constructor arguments; None is allowed where the constructor allows it.
_ARG_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("img_size", "patch_size"), (list,)),
    **dict.fromkeys(("in_chans", "num_classes", "embed_dim", "depth", "num_heads", "reg_tokens"), (int,)),
    **dict.fromkeys(("global_pool", "pos_embed"), (str,)),
    **dict.fromkeys(("qkv_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "proj_bias", "class_token"), (bool,)),
    **dict.fromkeys(("no_embed_class", "pre_norm", "final_norm", "fc_norm", "pool_include_prefix"), (bool,)),
    **dict.fromkeys(("dynamic_img_size", "dynamic_img_pad"), (bool,)),
    **dict.fromkeys(("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate"), (int, float)),
    **dict.fromkeys(("attn_drop_rate", "drop_path_rate", "mlp_ratio"), (int, float)),
    "init_values": (float, type(None)),
}


def _build(spec: Mapping[str, Any]) -> VisionTransformer:
    _check_spec(spec)
    args = dict(spec["args"])
    args["img_size"], args["patch_size"] = tuple(args["img_size"]), tuple(args["patch_size"])
    # Older timm lacks these; they are passed only where they say something.
    for name in ("pool_include_prefix", "scale_attn_norm", "scale_mlp_norm"):
        if not args[name]:
            args.pop(name)
    mlp: Any = _look_up(_MLPS, spec["mlp"], "mlp")
    if mlp is layers.GluMlp:
        mlp = partial(mlp, gate_last=spec["glu_gate_last"])
    norm = _norm_from(spec["norm"])
    model: VisionTransformer = _look_up(_MODELS, spec["class"], "class")(
        **args,
        block_fn=_look_up(_BLOCKS, spec["block"], "block"),
        mlp_layer=mlp,
        norm_layer=norm,
        embed_norm_layer=None if spec["embed_norm"] is None else _norm_from(spec["embed_norm"]),
        act_layer=partial(
            _look_up(_ACTIVATIONS, spec["act"]["class"], "act"),
            **{key: value for key, value in spec["act"].items() if key == "approximate"},
        ),
        weight_init="skip",
    )
    if spec["gated"] or spec["head_dim"] * args["num_heads"] != args["embed_dim"]:
        # The model's constructor has no way to say these, its attention's has.
        for block in model.blocks:
            block.attn = layers.Attention(
                args["embed_dim"],
                num_heads=args["num_heads"],
                attn_head_dim=spec["head_dim"],
                qkv_bias=args["qkv_bias"],
                qk_norm=args["qk_norm"],
                scale_norm=spec["args"]["scale_attn_norm"],
                proj_bias=args["proj_bias"],
                attn_drop=args["attn_drop_rate"],
                proj_drop=args["proj_drop_rate"],
                norm_layer=norm,
                **({"gated": True} if spec["gated"] else {}),
            )
    return model


def _check_spec(spec: Mapping[str, Any]) -> None:
    expected = {"class", "block", "mlp", "glu_gate_last", "norm", "embed_norm", "act", "gated", "head_dim", "args"}
    if set(spec) != expected or not isinstance(spec["args"], dict) or set(spec["args"]) != set(_ARG_TYPES):
        raise ArtifactError("the constructor's fields are not those this version writes")
    for name, value in spec["args"].items():
        # bool is an int to Python, not to us
        if not isinstance(value, _ARG_TYPES[name]) or (isinstance(value, bool) and bool not in _ARG_TYPES[name]):
            raise ArtifactError(f"constructor argument {name}={value!r} has the wrong type")
    for name in ("img_size", "patch_size"):
        sides = spec["args"][name]
        if len(sides) != 2 or not all(type(side) is int and 0 < side <= 65536 for side in sides):
            raise ArtifactError(f"constructor argument {name}={sides!r}: expected two positive sizes")
    for name in ("in_chans", "embed_dim", "depth", "num_heads"):
        if not 0 < spec["args"][name] <= 65536:
            raise ArtifactError(f"constructor argument {name}={spec['args'][name]!r} is out of range")
    if type(spec["head_dim"]) is not int or not 0 < spec["head_dim"] <= 65536:
        raise ArtifactError(f"constructor field head_dim={spec['head_dim']!r} is out of range")
    if not isinstance(spec["act"], dict) or not isinstance(spec["norm"], dict):
        raise ArtifactError("constructor fields act and norm must be objects")


def _one_size(sizes: tuple[int, ...], dimension: str) -> int:
    if not sizes or len(set(sizes)) != 1:
        raise ArtifactError(f"the dense blocks have different numbers of {dimension} ({list(sizes)}): no constructor")
    return sizes[0]


def _name_of(table: Mapping[str, type], module: nn.Module, where: str) -> str:
    for name, kind in table.items():
        if type(module) is kind:
            return name
    raise ArtifactError(f"{where} is a {_qualified(module)}; known are {', '.join(table)}")


def _own(module: nn.Module, *names: str) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def _look_up(table: Mapping[str, Any], name: Any, field: str) -> Any:
    if not isinstance(name, str) or name not in table:
        raise ArtifactError(f"constructor field {field}={name!r} is not one of {', '.join(table)}")
    return table[name]


def _norm_spec(norm: nn.Module, where: str) -> dict[str, Any]:
    return {"class": _name_of(_NORMS, norm, where), "eps": float(norm.eps)}


def _norm_from(spec: Mapping[str, Any]) -> Any:
    if set(spec) != {"class", "eps"} or not isinstance(spec["eps"], float):
        raise ArtifactError(f"constructor norm {dict(spec)!r}: expected class and eps")
    return partial(_look_up(_NORMS, spec["class"], "norm"), eps=spec["eps"])
