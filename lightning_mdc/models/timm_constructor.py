"""A timm VisionTransformer as constructor arguments and back, through closed tables of classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from timm import layers
from timm.layers import HybridEmbed, PatchEmbed
from timm.layers import activations as timm_activations
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from timm.models.vitamin import GeGluMlp
from torch import nn

from lightning_mdc.errors import ArtifactError
from lightning_mdc.models.compiled import unwrap
from lightning_mdc.models.parts import qualified_name
from lightning_mdc.models.timm_stem import build_stem, check_stem, describe_stem

# What a saved model may be made of. Loading looks classes up here and nowhere else.
_MODELS = {"VisionTransformer": VisionTransformer, "VisionTransformerDistilled": VisionTransformerDistilled}
_BLOCKS = {kind.__name__: kind for kind in (Block, ResPostBlock, ParallelThingsBlock, ParallelScalingBlock)}
_ATTENTIONS = {"Attention": layers.Attention, "DiffAttention": layers.DiffAttention}
MLPS = {"Mlp": layers.Mlp, "GluMlp": layers.GluMlp, "SwiGLU": layers.SwiGLU}  # whose neurons can leave
_MLPS = MLPS | {"GeGluMlp": GeGluMlp}
NORMS = {
    "timm.LayerNorm": layers.LayerNorm,
    "torch.LayerNorm": nn.LayerNorm,
    "timm.RmsNorm": layers.RmsNorm,
    "timm.LayerNormFp32": layers.LayerNormFp32,
    "timm.RmsNormFp32": layers.RmsNormFp32,
    "timm.SimpleNorm": layers.SimpleNorm,
    "timm.SimpleNormFp32": layers.SimpleNormFp32,
}
_ACTIVATIONS = {
    f"torch.{cls.__name__}": cls for cls in (nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU)
} | {
    f"timm.{name}": getattr(timm_activations, name)
    for name in ("GELU", "GELUTanh", "QuickGELU", "Swish", "Sigmoid", "Tanh", "Mish", "SquaredReLU")
    if hasattr(timm_activations, name)  # SquaredReLU is new
}


def in_chans(model: Any) -> int:
    """Channels of the images; older timm keeps them in the patch embedding only."""
    embed = model.embeds if hasattr(model, "embeds") else model.patch_embed
    return getattr(model, "in_chans", None) or getattr(embed, "in_chans", None) or embed.proj.in_channels


def describe(
    model: VisionTransformer,
    sizes: Mapping[str, tuple[int, ...]],
    embeddings: tuple[type[Any], ...] = (PatchEmbed, HybridEmbed),
) -> dict[str, Any]:
    """JSON-ready constructor arguments of the dense model that `model` comes from.

    `sizes` are the dense model's units per block, by dimension; 0, or none at all, where a block cannot lose any.
    `embeddings` are the classes of patch embedding that `build`, as the caller uses it, makes.

    Raises:
        ArtifactError: a part that no constructor argument expresses; names it.
    """
    block = _one_of_each(unwrap(model.blocks[0]))
    embed, attn, mlp = model.patch_embed, block.attn, block.mlp
    if type(embed) not in embeddings:
        raise ArtifactError(
            f"patch_embed is a {qualified_name(embed)}, which no constructor argument of ours expresses"
        )
    attention = name_of(_ATTENTIONS, attn, "blocks.0.attn", subclasses=True)
    embed_norm = getattr(embed, "norm", nn.Identity())
    neurons = one_size(sizes, "neurons", lambda: (mlp.w2 if isinstance(mlp, GeGluMlp) else mlp.fc2).in_features)
    hidden = 2 * neurons if isinstance(mlp, layers.GluMlp) else neurons
    return {
        "class": "VisionTransformerDistilled" if isinstance(model, VisionTransformerDistilled) else "VisionTransformer",
        "block": name_of(_BLOCKS, unwrap(model.blocks[0]), "blocks.0", subclasses=True),
        "stem": describe_stem(embed) if isinstance(embed, HybridEmbed) else None,
        "attn": attention,
        "mlp": name_of(_MLPS, mlp, "blocks.0.mlp", subclasses=True),
        "glu_gate_last": bool(getattr(mlp, "gate_last", False)),
        "norm": norm_spec(block.norm1, "blocks.0.norm1"),
        "embed_norm": None if isinstance(embed_norm, nn.Identity) else norm_spec(embed_norm, "patch_embed.norm"),
        "act": act_spec(mlp.act, "blocks.0.mlp.act"),
        "gated": getattr(attn, "gate", None) is not None,
        "head_dim": attn.head_dim * (2 if attention == "DiffAttention" else 1),  # of v; its q and k are pairs
        "args": {
            "depth": len(model.blocks),
            "num_heads": one_size(sizes, "heads", lambda: attn.num_heads),
            # int(dim * ratio) must give the hidden size back; half a unit keeps the product off the edge.
            "mlp_ratio": (hidden + 0.5) / model.embed_dim,
            **_model_args(model),
            **block_args(block),
            "drop_path_rate": getattr(_one_of_each(unwrap(model.blocks[-1])).drop_path1, "drop_prob", None) or 0.0,
        },
    }


def _one_of_each(block: Any) -> Any:
    """A block, or one attention and one MLP of those side by side or at once, by the names that a block gives them."""
    if isinstance(block, ParallelScalingBlock):
        return _as_if_apart(block)
    if not isinstance(block, ParallelThingsBlock):
        return block
    first, second = block.attns[0], block.ffns[0]
    return SimpleNamespace(attn=first.attn, mlp=second.mlp, norm1=first.norm, ls1=first.ls, drop_path1=first.drop_path)


def _as_if_apart(block: Any) -> Block:
    """A block without weights that has apart what `block` has at once, of the same arguments."""
    dim = block.in_proj.in_features
    with torch.device("meta"):
        apart = Block(
            dim,
            num_heads=dim // block.head_dim,
            mlp_ratio=(block.mlp_out_proj.in_features + 0.5) / dim,
            qkv_bias=block.in_proj.bias is not None,
            qk_norm=not isinstance(block.q_norm, nn.Identity),
            proj_bias=block.attn_out_proj.bias is not None,
            proj_drop=block.mlp_drop.p,
            attn_drop=block.attn_drop.p,
            init_values=None if isinstance(block.ls, nn.Identity) else 1e-5,
            drop_path=getattr(block.drop_path, "drop_prob", None) or 0.0,
        )
    apart.norm1, apart.mlp.act = block.in_norm, block.mlp_act
    return apart


def _model_args(model: Any) -> dict[str, Any]:
    """Arguments that are read off the parts around the blocks."""
    embed = model.patch_embed
    return {
        "img_size": list(embed.img_size),
        "patch_size": list(embed.patch_size),
        "in_chans": in_chans(model),
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "class_token": model.has_class_token,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": embed.dynamic_img_pad,
        "drop_rate": model.head_drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "patch_drop_rate": getattr(model.patch_drop, "prob", 0.0),
    }


def block_args(block: Any) -> dict[str, Any]:
    """Arguments that are read off one block, as all are alike."""
    attn, mlp = block.attn, block.mlp
    is_post_norm = isinstance(block, ResPostBlock)
    scaled = block.init_values is not None if is_post_norm else isinstance(block.ls1, layers.LayerScale)
    return {
        "qkv_bias": attn.qkv.bias is not None,
        "qk_norm": not isinstance(attn.q_norm, nn.Identity),
        "scale_attn_norm": not isinstance(attn.norm, nn.Identity),
        "scale_mlp_norm": not isinstance(mlp.norm, nn.Identity),
        "proj_bias": attn.proj.bias is not None,
        "init_values": 1e-5 if scaled else None,  # only whether there is one; the values are weights
        "proj_drop_rate": attn.proj_drop.p,
        "attn_drop_rate": attn.attn_drop.p,
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


def build(spec: Mapping[str, Any], models: Mapping[str, Any] = _MODELS) -> VisionTransformer:
    """The dense model that `describe` described, made by that one of `models` (name -> constructor) it names.

    Raises:
        ArtifactError: a field is missing, unknown or of the wrong type.
    """
    _check_fields(spec)
    args = dict(spec["args"])
    args["img_size"], args["patch_size"] = tuple(args["img_size"]), tuple(args["patch_size"])
    mlp: Any = look_up(_MLPS, spec["mlp"], "mlp")
    if mlp is layers.GluMlp:
        mlp = partial(mlp, gate_last=spec["glu_gate_last"])
    norm = norm_from(spec["norm"])
    model: VisionTransformer = look_up(models, spec["class"], "class")(
        **args,
        **({} if spec["stem"] is None else {"embed_layer": build_stem(spec["stem"], args["in_chans"])}),
        attn_layer=look_up(_ATTENTIONS, spec["attn"], "attn"),
        block_fn=look_up(_BLOCKS, spec["block"], "block"),
        mlp_layer=mlp,
        norm_layer=norm,
        embed_norm_layer=None if spec["embed_norm"] is None else norm_from(spec["embed_norm"]),
        act_layer=act_from(spec["act"]),
        weight_init="skip" if torch.get_default_device().type == "meta" else "",
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
                scale_norm=args["scale_attn_norm"],
                proj_bias=args["proj_bias"],
                attn_drop=args["attn_drop_rate"],
                proj_drop=args["proj_drop_rate"],
                norm_layer=norm,
                **({"gated": True} if spec["gated"] else {}),
            )
    return model


def check_spec(spec: Mapping[str, Any], tensors: Collection[str]) -> None:
    """Whether `build` may try to make the model whose state has `tensors` (names): it takes time per block even on the
    meta device, so a depth that the file has no weights for is not even tried.

    Raises:
        ArtifactError: it may not; as `build`, too.
    """
    _check_fields(spec)
    check_depth(spec["args"]["depth"], tensors)
    if spec["stem"] is not None:
        check_stem(spec["stem"], sum(name.startswith("patch_embed.") for name in tensors))


def check_depth(depth: int, tensors: Collection[str], blocks: str = r"blocks\.\d+\.") -> None:
    """Refuse, with an `ArtifactError`, another depth than there are different `blocks` (a pattern) among `tensors`."""
    found = {match[0] for name in tensors if (match := re.match(blocks, name))}
    if depth != len(found):
        raise ArtifactError(f"depth={depth!r} does not fit the {len(found)} blocks that there are weights of")


_FIELDS = {"class", "block", "stem", "attn", "mlp", "glu_gate_last", "norm", "embed_norm", "act", "gated", "head_dim"}


def _check_fields(spec: Mapping[str, Any]) -> None:
    check_args(spec, _FIELDS, _ARG_TYPES)
    check_positive(spec["args"], "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")
    if type(spec["head_dim"]) is not int or not 0 < spec["head_dim"] <= 65536:
        raise ArtifactError(f"constructor field head_dim={spec['head_dim']!r} is out of range")
    if spec["stem"] is not None:
        check_stem(spec["stem"])
    for name in ("gated", "glu_gate_last"):
        if not isinstance(spec[name], bool):
            raise ArtifactError(f"constructor field {name}={spec[name]!r}: expected true or false")


def check_args(spec: Mapping[str, Any], fields: Collection[str], types: Mapping[str, tuple[type, ...]]) -> None:
    """Refuse a spec that has not just `fields` and `args`, and these of `types`, rates from 0 to 1.

    Raises:
        ArtifactError: it has not; names the first that is wrong.
    """
    if set(spec) != {*fields, "args"} or not isinstance(spec["args"], dict) or set(spec["args"]) != set(types):
        raise ArtifactError("the constructor's fields are not those this version writes")
    for name, value in spec["args"].items():
        # bool is an int to Python, not to us
        if not isinstance(value, types[name]) or (isinstance(value, bool) and bool not in types[name]):
            raise ArtifactError(f"constructor argument {name}={value!r} has the wrong type")
        if name.endswith("_rate") and not 0 <= spec["args"][name] < 1:
            raise ArtifactError(f"constructor argument {name}={value!r} is no rate in [0, 1)")


def check_positive(args: Mapping[str, Any], *names: str) -> None:
    """Refuse, with an `ArtifactError`, sizes and counts that are none; those of images and patches come in pairs."""
    for name in names:
        numbers = args[name] if isinstance(args[name], list) else [args[name]]
        is_pair = len(numbers) == 2 or name not in ("img_size", "patch_size")
        if not is_pair or not all(type(number) is int and 0 < number <= 65536 for number in numbers):
            raise ArtifactError(f"constructor argument {name}={args[name]!r} is out of range: expected positive sizes")


def parts_of(value: Any) -> list[Any]:
    """What is in a JSON list, of lists perhaps; what is no list is alone."""
    return [part for inner in value for part in parts_of(inner)] if isinstance(value, list) else [value]


def as_tuple(value: Any) -> Any:
    """A JSON list, of lists perhaps, as constructors take it."""
    return tuple(map(as_tuple, value)) if isinstance(value, list) else value


def one_size(sizes: Mapping[str, tuple[int, ...]], dimension: str, now: Callable[[], int]) -> int:
    """Units of each dense block; as many as there are `now` where none can leave."""
    counts = set(sizes.get(dimension, ())) - {0}
    if len(counts) > 1:
        raise ArtifactError(
            f"the dense blocks have different numbers of {dimension} ({sorted(counts)}): no constructor"
        )
    return counts.pop() if counts else now()


def name_of(table: Mapping[str, type], module: nn.Module, where: str, subclasses: bool = False) -> str:
    for name, kind in table.items():
        if type(module) is kind or (subclasses and isinstance(module, kind)):
            return name
    raise ArtifactError(f"{where} is a {qualified_name(module)}; known are {', '.join(table)}")


def look_up(table: Mapping[str, Any], name: Any, field: str) -> Any:
    """What a field of a spec names, from a closed table; an `ArtifactError` if that does not have it."""
    if not isinstance(name, str) or name not in table:
        raise ArtifactError(f"constructor field {field}={name!r:.80} is not one of {', '.join(table)}")
    return table[name]


def norm_spec(norm: Any, where: str) -> dict[str, Any]:
    """A known norm, JSON-ready; an `ArtifactError` that says `where` if it is another."""
    return {"class": name_of(NORMS, norm, where), "eps": float(norm.eps)}


def act_spec(act: Any, where: str) -> dict[str, Any]:
    """A known activation, JSON-ready; an `ArtifactError` that says `where` if it is another."""
    approximate = {"approximate": act.approximate} if hasattr(act, "approximate") else {}
    return {"class": name_of(_ACTIVATIONS, act, where)} | approximate


def act_from(spec: Any) -> Any:
    """What makes the activation of an `act_spec`."""
    approximate = isinstance(spec, dict) and spec.get("approximate", "none")
    if not isinstance(spec, dict) or set(spec) - {"approximate"} != {"class"} or approximate not in ("none", "tanh"):
        raise ArtifactError(f"constructor act {spec!r:.80}: expected a class, and approximate 'none' or 'tanh'")
    options = {"approximate": approximate} if "approximate" in spec else {}
    return partial(look_up(_ACTIVATIONS, spec["class"], "act"), **options)


def norm_from(spec: Any) -> Any:
    """What makes norms of a `norm_spec`, given their width."""
    if not isinstance(spec, dict) or set(spec) != {"class", "eps"} or not isinstance(spec["eps"], float):
        raise ArtifactError(f"constructor norm {spec!r:.80}: expected class and eps")
    if not 0 < spec["eps"] < 1:
        raise ArtifactError(f"constructor norm eps={spec['eps']!r} is out of range")
    return partial(look_up(NORMS, spec["class"], "norm"), eps=spec["eps"])
