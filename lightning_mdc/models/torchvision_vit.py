"""torchvision's `VisionTransformer`: vit_b_16 to vit_h_14. Only the torchvision_* files know torchvision's names.

Its attention is torch's `nn.MultiheadAttention`, which is as wide as the model in any case and takes the weights of
``out_proj`` without calling it. Where heads leave, and while they are watched, ours computes the same of the same
parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import MLP

from lightning_mdc.errors import ArtifactError, UnsupportedModelError
from lightning_mdc.models.anatomy import (
    Anatomy,
    Behaviour,
    Block,
    Channels,
    Family,
    Size,
    Slice,
    TokenPoint,
    Units,
    columns_of,
    rows_of,
)
from lightning_mdc.models.compiled import unwrap
from lightning_mdc.models.parts import computes_as, other_than, own_methods, qualified_name, unlike_linear
from lightning_mdc.models.swapping import original_class
from lightning_mdc.models.timm_constructor import (
    check_args,
    check_depth,
    check_positive,
    norm_from,
    norm_spec,
    one_size,
)
from lightning_mdc.models.timm_vit import CountedMacs, counted_macs
from lightning_mdc.policy import UNIT_DIMENSIONS, Plan
from lightning_mdc.tokens.block import attention_called, stage_of, through
from lightning_mdc.tokens.reduction import Evidence

_FILE = "torchvision.models.vision_transformer"


class TorchvisionViT(Family):
    """The family of `torchvision.models.vision_transformer.VisionTransformer`."""

    name = "torchvision_vit"
    description = "torchvision's VisionTransformer (vit_b_16 to vit_h_14)"

    def accepts(self, module: nn.Module) -> bool:
        return is_of(_FILE, module, "VisionTransformer") and self.refusal(module) is None

    def refusal(self, module: nn.Module) -> str | None:
        """The part that computes another way than torchvision's."""
        if not is_of(_FILE, module, "VisionTransformer"):
            return None
        from torchvision.models import vision_transformer as tv

        if (own := own_methods(module, (tv.VisionTransformer,), ("forward", "_process_input"))) is not None:
            return own
        encoder: Any = module.encoder
        for name, part, kind in (("encoder", encoder, tv.Encoder), ("encoder.layers", encoder.layers, nn.Sequential)):
            if not computes_as(part, (kind,)):
                return other_than(name, part, f"torchvision's {kind.__name__} with its own forward")
        return None

    def anatomy(self, model: Any) -> Anatomy:
        blocks = tuple(_block(index, name, part, model.hidden_dim) for index, (name, part) in enumerate(_blocks(model)))
        side = model.image_size // model.patch_size
        return Anatomy(
            model=model,
            name=original_class(model).__name__,
            family=self,
            blocks=blocks,
            dim=model.hidden_dim,
            num_prefix_tokens=1,
            class_rows=(0,),
            grid=(side, side),
            input_size=(_in_chans(model), model.image_size, model.image_size),
            grid_of=partial(_grid_of, model),
            fixed_macs=lambda size, tokens: _outside_macs(model),
            reader=LayersReader,
            container=model.encoder.layers,
            no_tokens=_no_tokens(blocks),
            classifies=isinstance(list(model.heads.modules())[-1], nn.Linear),  # else people read what it would see
        )

    def describe(self, model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        _, block = next(_blocks(model))
        args = {
            **{name: getattr(model, name) for name in _ATTRIBUTES},
            "num_layers": len(model.encoder.layers),
            "num_heads": one_size(sizes, "heads", lambda: block.self_attention.num_heads),
            "mlp_dim": one_size(sizes, "neurons", lambda: block.mlp[3].in_features),
        }
        where = "heads.head" if "head" in model.heads._modules else "heads"
        return {
            "norm": norm_spec(block.ln_1, "encoder.layers.encoder_layer_0.ln_1"),
            "head": head_spec(model, where),
            "args": args,
        }

    def check_spec(self, spec: Mapping[str, Any], tensors: Collection[str]) -> None:
        _check_fields(spec)
        check_depth(spec["args"]["num_layers"], tensors, r"encoder\.layers\.encoder_layer_\d+\.")

    def build(self, spec: Mapping[str, Any]) -> nn.Module:
        from torchvision.models.vision_transformer import VisionTransformer

        _check_fields(spec)
        model = VisionTransformer(**spec["args"], norm_layer=norm_from(spec["norm"]))
        whole = spec["head"]["at"] == "heads"
        put_head(model, spec["head"], model.hidden_dim if whole else model.heads.head.in_features)
        return model


def is_of(file: str, module: nn.Module, name: str) -> bool:
    """Whether the module's class is, or comes from, the class of that name in that file, which need not be imported."""
    return any(kind.__module__ == file and kind.__name__ == name for kind in type(module).__mro__)


def _blocks(model: Any) -> Iterator[tuple[str, Any]]:
    for name, block in model.encoder.layers._modules.items():  # one that is in two places counts twice
        yield f"encoder.layers.{name}", unwrap(block)


# --- what a block is made of ------------------------------------------------------------------------------------------


def _block(index: int, name: str, block: Any, dim: int) -> Block:
    if (reason := _odd(name, block)) is not None:
        reasons = dict.fromkeys(UNIT_DIMENSIONS, reason)
        return Block(name, block, {}, reasons, rest=(CountedMacs(block, dim, name), None))
    heads = _heads(index, name, block)
    point = TokenPoint(
        EncoderHalves, heads, Channels(block.ln_1, 0, dim), calls=block.self_attention
    )  # no module puts values out
    neurons = neurons_of(index, f"{name}.mlp", block.mlp)
    if isinstance(neurons, Units):
        return Block(
            name, block, {"heads": heads, "neurons": neurons}, {}, point, stage_of(block), (None, None), block.ln_2
        )
    rest = (None, CountedMacs(block.mlp, dim, f"{name}.mlp"))
    return Block(name, block, {"heads": heads}, {"neurons": neurons}, point, stage_of(block), rest, block.ln_2)


def _odd(name: str, block: Any) -> str | None:
    """Why nothing of a block can leave; None if its heads can."""
    from torchvision.models.vision_transformer import EncoderBlock

    if not computes_as(block, (EncoderBlock,)):
        return other_than(name, block, "torchvision's EncoderBlock with its own forward")
    attn = block.self_attention
    expected = "such an nn.MultiheadAttention as torchvision's"
    if not computes_as(attn, (nn.MultiheadAttention,)):
        return other_than(f"{name}.self_attention", attn, expected)
    if not attn.batch_first or attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn:
        return f"{name}.self_attention is not {expected}"
    return unlike_linear(f"{name}.self_attention", attn, ("out_proj",))


def _heads(index: int, name: str, block: Any) -> Units:
    attn = block.self_attention
    count, width = attn.num_heads, attn.head_dim
    columns, sizes = columns_of(attn.out_proj, width)
    rows = [Slice(attn, part, 0, 3) for part in ("in_proj_weight", "in_proj_bias") if getattr(attn, part) is not None]
    per_head = (attn.in_proj_weight.numel() + attn.out_proj.weight.numel()) // max(count, 1)
    return Units(
        dimension="heads",
        block=index,
        name=f"{name}.self_attention",
        count=count,
        width=width,
        slices=(*rows, *columns),
        sizes=(*sizes, *(Size(owner, "num_heads", lambda kept: kept) for owner in (attn, block))),
        reader=attn.out_proj,
        macs=lambda heads, tokens: tokens * heads * per_head + 2 * tokens * tokens * heads * width,
        behaviours=(Behaviour(attn, AnyHeads, calls_reader=True),),
    )


def neurons_of(index: int, name: str, mlp: nn.Module) -> Units | str:
    """The neurons of torchvision's MLP of two layers, or why they cannot be cut."""
    children = list(mlp.children())
    if not computes_as(mlp, (MLP,)) or len(children) != 5:
        return other_than(name, mlp, "torchvision's MLP of two Linear layers with its own forward")
    if (reason := unlike_linear(name, mlp, ("0", "3"))) is not None:
        return reason
    maker: Any = children[0]
    reader: Any = children[3]
    (rows, row_sizes), (columns, column_sizes) = rows_of(maker), columns_of(reader)
    count = reader.in_features
    weights = (maker.weight.numel() + reader.weight.numel()) // max(count, 1)
    return Units(
        dimension="neurons",
        block=index,
        name=name,
        count=count,
        width=1,
        slices=(*rows, *columns),
        sizes=(*row_sizes, *column_sizes),
        reader=reader,
        macs=lambda neurons, tokens: tokens * neurons * weights,
        after_point=True,
    )


def _no_tokens(blocks: tuple[Block, ...]) -> str | None:
    """Why tokens cannot leave; None if they can."""
    for block in blocks:
        if block.stage is not None:
            return f"{block.name} already drops tokens: this model is slim; prune tokens of the dense one"
        if block.point is None:
            return block.reasons["heads"]
    return None


class AnyHeads:
    """Mixin: nn.MultiheadAttention of any number of heads, as torchvision's blocks call it; it calls `out_proj`."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = True, **masks: Any
    ) -> tuple[Tensor, None]:
        """query (batch, tokens, dim), which is key and value as well -> the same shape.

        Raises:
            UnsupportedModelError: another key or value, a mask, or the attention weights are asked for.
        """
        masked = any(mask is not None for name, mask in masks.items() if name.endswith("mask"))
        if key is not query or value is not query or need_weights or masked or masks.get("is_causal"):
            raise UnsupportedModelError(
                "self_attention has fewer heads, or is watched, and is then only called as torchvision's blocks do: "
                "with one tensor as query, key and value, need_weights=False and no mask"
            )
        return attended(self, query)[0], None


def attended(attn: Any, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What nn.MultiheadAttention makes of x (batch, tokens, dim); and q, k (batch, heads, tokens, head_dim)."""
    packed = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = packed.unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    dropout = attn.dropout if attn.training else 0.0
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    return attn.out_proj(y.transpose(1, 2).flatten(2)), q, k


# --- where tokens leave -----------------------------------------------------------------------------------------------


class EncoderHalves:
    """Mixin: torchvision's EncoderBlock in two halves, which compute what its forward does."""

    # The children are torchvision's; to the type checker they are anything.
    ln_1: Any
    self_attention: Any
    dropout: Any
    ln_2: Any
    mlp: Any

    def attend(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Evidence]:
        normed = self.ln_1(x)
        y, evidence = attention_called(self.self_attention, partial(self._attended, bias), *3 * (normed,), paired=True)
        return x + self.dropout(y), evidence

    def _attended(self, bias: Tensor | None, x: Tensor) -> tuple[Tensor, Evidence]:
        y, q, k = attended(self.self_attention, x, bias)
        return y, Evidence(q, k, self.self_attention.head_dim**-0.5)

    def finish(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.mlp(self.ln_2(x))
        return result


class LayersReader:
    """Mixin: the layers of an encoder, called one after another, inside which tokens leave."""

    plan: Plan

    def forward(self: Any, x: Tensor) -> Tensor:
        """As torchvision's; if the plan restores them, every position has a token again."""
        return through(self, x, 1, self.plan.restore)


# --- what it costs outside the blocks ---------------------------------------------------------------------------------


def _in_chans(model: Any) -> int:
    return next(layer.in_channels for layer in model.conv_proj.modules() if isinstance(layer, nn.Conv2d))


def _grid_of(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    if tuple(size) != (model.image_size, model.image_size):
        raise UnsupportedModelError(
            f"input_size={tuple(size)}: this {original_class(model).__name__} takes {model.image_size}x"
            f"{model.image_size} images only; create it with another image_size"
        )
    side = model.image_size // model.patch_size
    return side, side


def _outside_macs(model: Any) -> int:
    """Of patch embedding and heads."""
    embedding = counted_macs(model.conv_proj, (1, _in_chans(model), model.image_size, model.image_size), "conv_proj")
    return embedding + counted_macs(model.heads, (1, model.hidden_dim), "heads")


# --- constructor arguments --------------------------------------------------------------------------------------------

_ATTRIBUTES = (
    *("image_size", "patch_size", "hidden_dim", "num_classes"),
    *("dropout", "attention_dropout", "representation_size"),
)
_ARGS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("image_size", "patch_size", "num_layers", "num_heads", "hidden_dim", "mlp_dim"), (int,)),
    **dict.fromkeys(("dropout", "attention_dropout"), (int, float)),
    "num_classes": (int,),
    "representation_size": (int, type(None)),
}


def _check_fields(spec: Mapping[str, Any]) -> None:
    check_args(spec, {"norm", "head"}, _ARGS)
    check_positive(spec["args"], "image_size", "num_layers", "num_heads", "hidden_dim", "mlp_dim")
    check_head(spec["head"], "heads", "heads.head")


def head_spec(model: nn.Module, at: str) -> dict[str, Any]:
    """The last layer, which people put another in the place of: where it `at`, and how many classes it has, if any.

    Raises:
        ArtifactError: it is neither a Linear nor an Identity.
    """
    head = model.get_submodule(at)
    if type(head) not in (nn.Linear, nn.Identity):
        raise ArtifactError(f"{at} is a {qualified_name(head)}, neither a Linear layer nor an Identity")
    return {"at": at, "classes": getattr(head, "out_features", None)}


def check_head(head: Any, *places: str) -> None:
    """Refuse, with an `ArtifactError`, what is no `head_spec` of one of those places."""
    fields = isinstance(head, dict) and set(head) == {"at", "classes"} and head["at"] in places
    if not fields or not (head["classes"] is None or (type(head["classes"]) is int and 0 < head["classes"] < 2**20)):
        raise ArtifactError(f"constructor field head={head!r:.80}: expected classes, and one of {', '.join(places)}")


def put_head(model: nn.Module, head: Mapping[str, Any], width: int) -> None:
    """Put in place the layer of a `head_spec`, which reads `width` channels."""
    holder, _, name = head["at"].rpartition(".")
    layer = nn.Identity() if head["classes"] is None else nn.Linear(width, head["classes"])
    setattr(model.get_submodule(holder), name, layer)
