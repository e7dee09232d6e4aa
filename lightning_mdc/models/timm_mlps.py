"""timm's transformers that lose neurons at least, whatever their attention is: staged, convolving, in two branches.

A closed table says which. What no units stand for is not known by the kind: it is counted, by torch, in one pass over
the whole model without weights, and so is how many tokens each MLP sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from timm import models
from timm.layers import to_2tuple
from timm.models import pvt_v2
from torch import Tensor, nn

from lightning_mdc.errors import UnsupportedModelError
from lightning_mdc.models import timm_factory
from lightning_mdc.models.anatomy import Anatomy, Behaviour, Block, Family, Size, Slice, Units, columns_of, rows_of
from lightning_mdc.models.compiled import probing, unwrap
from lightning_mdc.models.parts import computes_as, own_methods
from lightning_mdc.models.swapping import original_class, plain_copy
from lightning_mdc.models.timm_eva import eva_blocks
from lightning_mdc.models.timm_vit import PLAIN, BlockKind, block_of, counted, neurons_of, not_plain

# --- which ------------------------------------------------------------------------------------------------------------


def _of_embedding(name: str) -> Callable[[Any], tuple[tuple[int, int], int]]:
    def read(model: Any) -> tuple[tuple[int, int], int]:
        embed = model.get_submodule(name)
        return tuple(embed.img_size), to_2tuple(embed.patch_size)[0]

    return read


def _of_positions(model: Any) -> tuple[tuple[int, int], int]:
    """VOLO has a position for each place on the grid that the outlookers leave."""
    patch = model.feature_info[0]["reduction"]
    height, width = (side * patch * model.pooling_scale for side in model.pos_embed.shape[1:3])
    return (height, width), patch


def _of_stages(model: Any) -> tuple[tuple[int, int], int]:
    """MViT's stages know the grid that they give."""
    patch = model.feature_info[0]["reduction"]
    height, width = (side * patch for side in model.stages[0].feat_size)
    return (height, width), patch


def _of_weights(model: Any) -> tuple[tuple[int, int], int]:
    """Where the model takes images of any size: that of the images it was trained on."""
    _, height, width = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
    return (height, width), model.feature_info[0]["reduction"]


class _Kind(NamedTuple):
    """Models of one class of timm's.

    Attributes:
        name: of the class.
        read: model -> (height, width) of its own images, pixels of a patch's side.
        no_tokens, no_heads: why these cannot leave. Heads: where `blocks` does not say.
        blocks: what its blocks are if their heads can leave; None: only its MLPs are known.
        any_size: whether it takes images of other sizes.
    """

    name: str
    read: Callable[[Any], tuple[tuple[int, int], int]]
    no_tokens: str
    no_heads: str = ""
    blocks: BlockKind | None = None
    any_size: bool = False


_AS_WIDE = "puts its heads together to the width of the model, which fewer would not have"
_ROTARY = "blocks.0 is given rotary positions of the whole grid, and what the last one gives is put back on it"
_PLACES = "tokens are places of a grid, which"


_OF_ANY_TIMM = (
    _Kind("VOLO", _of_positions, f"{_PLACES} Outlooker unfolds and Downsample convolves", f"the attention {_AS_WIDE}"),
    _Kind(
        "CrossVit",
        _of_embedding("patch_embed.0"),
        "blocks.0 (MultiScaleBlock) has branches with tokens of their own, which it fuses",
        blocks=PLAIN,
        any_size=True,
    ),
    _Kind(
        "ConVit",
        _of_embedding("patch_embed"),
        "blocks.0.attn (GPSA) has a score for each pair of places",
        f"the attention (GPSA, MHSA) {_AS_WIDE}",
    ),
    _Kind(
        "TNT",
        _of_embedding("pixel_embed"),
        "blocks.0 has pixels of its own for every token",
        "blocks have two attentions each (attn_in, attn_out), of a class that is not known here",
    ),
    _Kind(
        "MultiScaleVit",
        _of_stages,
        f"{_PLACES} MultiScaleAttention pools",
        "MultiScaleAttention pools what its heads compare, and what one of them costs is not known here",
    ),
    _Kind(
        "DaVit",
        _of_weights,
        f"{_PLACES} SpatialBlock cuts into windows and ConvPosEnc convolves",
        f"the attention (WindowAttention, ChannelAttention) {_AS_WIDE}",
        any_size=True,
    ),
    _Kind(
        "Twins",
        _of_embedding("patch_embeds.0"),
        f"{_PLACES} PosConv convolves",
        f"the attention {_AS_WIDE}",
        any_size=True,
    ),
    _Kind(
        "PyramidVisionTransformerV2",
        _of_weights,
        f"{_PLACES} MlpWithDepthwiseConv convolves",
        f"the attention {_AS_WIDE}",
        any_size=True,
    ),
    _Kind("Nest", _of_embedding("patch_embed"), f"{_PLACES} ConvPool pools", f"the attention {_AS_WIDE}"),
    _Kind(
        "Xcit",
        _of_embedding("patch_embed"),
        f"{_PLACES} LPI convolves",
        f"the attention (XCA) is between channels, and {_AS_WIDE}",
        any_size=True,
    ),
)


def _towers() -> Iterator[_Kind]:
    """Vision towers of large language models."""
    if not hasattr(models, "deepseek_vit"):  # newer timm only, as its like
        return
    eva = eva_blocks(turn_alike=True)
    deepseek = replace(
        eva, pre_norm=models.deepseek_vit.DeepseekVitBlock, post_norm=models.deepseek_vit.DeepseekVitBlock
    )
    for suffix, trunk in (("Encoder", ""), ("Classifier", "encoder.")):
        read = _of_embedding(f"{trunk}patch_embed")
        yield _Kind(f"Qwen3Vit{suffix}", read, _ROTARY, blocks=eva, any_size=True)
        yield _Kind(f"DeepseekVit{suffix}", read, _ROTARY, blocks=deepseek, any_size=True)
        yield _Kind(
            f"Gemma4Vit{suffix}",
            _of_weights,
            "blocks.0 is given rotary positions of all tokens",
            "the attention is a Gemma4Attention, which is not known here",
            any_size=True,
        )


_KINDS = {getattr(models, kind.name): kind for kind in (*_OF_ANY_TIMM, *_towers())}
_MLPS = ("mlp", "mlp_in")  # what they are called in all of these
_HYBRIDS = {
    *("coat", "edgenext", "efficientformer", "efficientformer_v2", "efficientvit_mit", "efficientvit_msra", "fastvit"),
    *("gcvit", "iformer", "levit", "lowformer", "maxxvit", "metaformer", "mobilevit", "nextvit", "repvit", "shvit"),
    *("swiftformer", "tiny_vit", "visformer"),
}
_METHODS = ("forward", "forward_features", "forward_head")


class TimmMlps(Family):
    """The family of timm's transformers of which neurons at least can leave."""

    name = "timm_mlps"
    description = (
        "timm CrossVit, Qwen3Vit, DeepseekVit (heads and neurons), VOLO, ConVit, TNT, MultiScaleVit (MViTv2), DaVit, "
        "Twins, PyramidVisionTransformerV2, Nest, Xcit, Gemma4Vit (neurons)"
    )

    def accepts(self, module: nn.Module) -> bool:
        return _class_of(module) is not None and self.refusal(module) is None

    def refusal(self, module: nn.Module) -> str | None:
        """The method of its own that makes one of these another model; of timm's other transformers, what they are."""
        library, _, file = type(module).__module__.rpartition(".")
        if library == "timm.models" and file in _HYBRIDS:
            return f"it is one of {library}.{file}, half a CNN: no family says which of its channels would be units"
        found = _class_of(module)
        return None if found is None else own_methods(module, (found,), _METHODS)

    def anatomy(self, model: Any) -> Anatomy:
        found = _class_of(model)
        assert found is not None  # it was accepted
        kind = _KINDS[found]
        size, patch = kind.read(model)
        blocks = tuple(_blocks(model, kind))
        seen = cache(partial(_seen, model, blocks))

        def grid_of(asked: tuple[int, int]) -> tuple[int, int]:
            if tuple(asked) != size:
                if not kind.any_size:
                    raise UnsupportedModelError(
                        f"input_size={tuple(asked)}: this {kind.name} takes {size} images only; "
                        "create it with img_size="
                    )
                seen(tuple(asked))  # says if it cannot take them
            return asked[0] // patch, asked[1] // patch

        return Anatomy(
            model=model,
            name=original_class(model).__name__,
            family=self,
            blocks=blocks,
            dim=model.num_features,
            num_prefix_tokens=0,  # not the same everywhere, and nobody asks where no tokens leave
            class_rows=(),
            grid=grid_of(size),
            input_size=(_in_chans(model), *size),
            grid_of=grid_of,
            fixed_macs=lambda asked, _: seen(tuple(asked)).outside,
            tokens_at=lambda asked: seen(tuple(asked)).tokens,
            no_tokens=kind.no_tokens,
            classifies=model.num_classes > 0,
        )

    def describe(self, model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return timm_factory.describe(model, tuple(_KINDS))

    def check_spec(self, spec: Mapping[str, Any], tensors: Collection[str]) -> None:
        timm_factory.check_spec(spec, tuple(_KINDS), tensors)

    def build(self, spec: Mapping[str, Any]) -> nn.Module:
        return timm_factory.build(spec, tuple(_KINDS))


def _class_of(module: nn.Module) -> type[nn.Module] | None:
    return next((known for known in _KINDS if isinstance(module, known)), None)


def _in_chans(model: Any) -> int:
    found: int | None = getattr(model, "in_chans", None)
    if found is None:  # older timm, where all of these begin with a convolution
        found = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    return found


# --- what a block is made of ------------------------------------------------------------------------------------------


def _blocks(model: nn.Module, kind: _Kind) -> Iterator[Block]:
    """In order of execution, which in all of these is the order in which they were registered."""
    index, last = 0, ""
    for name, module in model.named_modules():
        if last and name.startswith(f"{last}."):
            continue
        part = unwrap(module)
        if kind.blocks is not None and isinstance(part, kind.blocks.pre_norm):
            # What no units stand for is counted for the whole model.
            yield replace(block_of(kind.blocks, index, name, part, 0), rest=(None, None), point=None)
        elif kind.blocks is None and name.rpartition(".")[2] in _MLPS:
            yield _mlp(index, name, part, kind.no_heads)
        else:
            continue
        index, last = index + 1, name


def _mlp(index: int, name: str, mlp: Any, no_heads: str) -> Block:
    """A block of which only the MLP is known. It is the block's module, too: in all of these it takes tokens and gives
    tokens, which the block around it does not."""
    neurons, reasons = _neurons(index, name, mlp), {"heads": no_heads}
    if isinstance(neurons, str):
        return Block(name, mlp, {}, reasons | {"neurons": neurons}, second_half=mlp)
    return Block(name, mlp, {"neurons": neurons}, reasons, second_half=mlp)


def _neurons(index: int, name: str, mlp: Any) -> Units | str:
    if not_plain("", mlp, (pvt_v2.MlpWithDepthwiseConv,)) is None and _is_depthwise(mlp.dwconv):
        conv = mlp.dwconv
        names = ["weight", *(["bias"] if conv.bias is not None else [])]
        sizes = [Size(conv, size, lambda kept: kept) for size in ("in_channels", "out_channels", "groups")]
        filters = (tuple(Slice(conv, tensor) for tensor in names), tuple(sizes))
        parts = [rows_of(mlp.fc1), filters, columns_of(mlp.fc2)]
        return _units(index, name, parts, mlp.fc2, (Behaviour(conv, _AnyChannels),))
    if hasattr(models, "gemma4_vit") and computes_as(mlp, (models.gemma4_vit.Gemma4GatedMlp,)):
        layers = [getattr(mlp, each) for each in ("gate_proj", "up_proj", "down_proj")]
        if all(_is_clippable(layer) for layer in layers):
            gate, up, down = (layer.linear for layer in layers)
            return _units(index, name, [rows_of(gate), rows_of(up), columns_of(down)], down)
    return neurons_of(index, name, mlp)


def _is_depthwise(conv: Any) -> bool:
    return computes_as(conv, (nn.Conv2d,)) and conv.groups == conv.out_channels


def _is_clippable(layer: Any) -> bool:
    kinds = (models.gemma4_vit.Gemma4ClippableLinear,)
    return computes_as(layer, kinds) and computes_as(layer.linear, (nn.Linear,))


def _units(
    index: int,
    name: str,
    parts: list[tuple[tuple[Slice, ...], tuple[Size, ...]]],
    reader: nn.Linear,
    behaviours: tuple[Behaviour, ...] = (),
) -> Units:
    count = reader.in_features
    slices = tuple(part for of_layer, _ in parts for part in of_layer)
    per_neuron = sum(part.tensor.numel() for part in slices if part.name == "weight") // max(count, 1)
    return Units(
        dimension="neurons",
        block=index,
        name=name,
        count=count,
        width=1,
        slices=slices,
        sizes=tuple(size for _, sizes in parts for size in sizes),
        reader=reader,
        macs=lambda neurons, tokens: tokens * neurons * per_neuron,
        after_point=True,
        behaviours=behaviours,
    )


class _AnyChannels:
    """Mixin: a convolution that may have no channels left."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x) if x.shape[1] else x  # type: ignore[misc]
        return result


# --- what no units stand for ------------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """Of one image of some size: MACs that no units stand for, and tokens in either half of each block."""

    outside: int
    tokens: list[tuple[int, int]]


def _seen(model: nn.Module, blocks: tuple[Block, ...], size: tuple[int, int]) -> _Seen:
    """Found by one image that goes through the model on the meta device.

    Raises:
        UnsupportedModelError: the model cannot take images of that size.
    """
    names = {id(module): name.replace("_orig_mod.", "") for name, module in model.named_modules()}
    stand_in = _without_weights(model)
    tokens: dict[str, int] = dict.fromkeys((units.name for block in blocks for units in block.units.values()), 0)

    def look(units: Units, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        tokens[units.name] += math.prod(args[0].shape[:-1])

    readers = [units for block in blocks for units in block.units.values()]
    probes = [
        (stand_in.get_submodule(names[id(units.reader)]).register_forward_pre_hook, partial(look, units))
        for units in readers
    ]
    like = next(stand_in.parameters())
    image = torch.empty(1, _in_chans(model), *size, device="meta", dtype=like.dtype)
    try:
        with probing(probes):
            total = counted(lambda: stand_in(image))
    except Exception as error:
        raise UnsupportedModelError(
            f"input_size={size}: this {original_class(model).__name__} cannot take such images: {error}"
        ) from error
    halves = []
    for block in blocks:
        seen = {units.after_point: tokens[units.name] for units in block.units.values()}
        halves.append((seen.get(False, seen.get(True, 0)), seen.get(True, seen.get(False, 0))))
    return _Seen(total - sum(units.macs(units.count, tokens[units.name]) for units in readers), halves)


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy on the meta device, with nobody's hooks."""
    tensors: dict[int, Any] = {}
    loose = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    for tensor in (*model.parameters(), *model.buffers(), *loose):  # older timm's ConViT has tables of no buffer
        bare = tensor.detach().to("meta")
        tensors[id(tensor)] = nn.Parameter(bare, False) if isinstance(tensor, nn.Parameter) else bare
    copied = plain_copy(model, tensors).eval()
    for module in copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return copied
