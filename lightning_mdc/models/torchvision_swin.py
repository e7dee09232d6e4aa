"""torchvision's `SwinTransformer`, V2 too: swin_t to swin_v2_b.

Heads and neurons can leave; tokens are places in a window and cannot. Its attention is a function that takes weights
without calling the layers they are of, and is as wide as the model: ours stands in where heads leave, and while they
are watched.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn

from lightning_mdc.errors import ArtifactError, UnsupportedModelError
from lightning_mdc.models.anatomy import Anatomy, Behaviour, Block, Family, Slice, Units
from lightning_mdc.models.compiled import unwrap
from lightning_mdc.models.parts import computes_as, other_than, own_methods, unlike_linear
from lightning_mdc.models.swapping import original_class
from lightning_mdc.models.timm_attention import bias_mlp, bias_table, heads_of
from lightning_mdc.models.timm_constructor import check_args, check_depth, check_positive, norm_from, norm_spec
from lightning_mdc.models.timm_vit import CountedMacs, counted_macs
from lightning_mdc.models.torchvision_vit import check_head, head_spec, is_of, neurons_of, put_head

_FILE = "torchvision.models.swin_transformer"


class TorchvisionSwin(Family):
    """The family of `torchvision.models.swin_transformer.SwinTransformer`."""

    name = "torchvision_swin"
    description = "torchvision's SwinTransformer, V2 too (heads and neurons)"

    def accepts(self, module: nn.Module) -> bool:
        return is_of(_FILE, module, "SwinTransformer") and self.refusal(module) is None

    def refusal(self, module: nn.Module) -> str | None:
        """The part that computes another way than torchvision's."""
        if not is_of(_FILE, module, "SwinTransformer"):
            return None
        from torchvision.models import swin_transformer as tv

        if (own := own_methods(module, (tv.SwinTransformer,), ("forward",))) is not None:
            return own
        parts: list[tuple[str, nn.Module, tuple[type, ...]]] = []
        for name, stage, merging in _stages(module):
            parts.append((name, stage, (nn.Sequential,)))
            if merging is not None:
                parts.append((f"{name}, before it", merging, (tv.PatchMerging, tv.PatchMergingV2)))
        for name, block in _blocks(module):
            parts.append((name, block, (tv.SwinTransformerBlock, tv.SwinTransformerBlockV2)))
        for name, part, kinds in parts:
            if not computes_as(part, kinds):
                return other_than(name, part, f"torchvision's {kinds[0].__name__} with its own forward")
        attentions = (tv.ShiftedWindowAttention, tv.ShiftedWindowAttentionV2)
        for name, block in _blocks(module):
            attn = block.attn
            if not computes_as(attn, attentions, ("forward", "get_relative_position_bias")):
                return other_than(f"{name}.attn", attn, "torchvision's ShiftedWindowAttention with its own forward")
            if (reason := unlike_linear(f"{name}.attn", attn, ("qkv", "proj"))) is not None:
                return reason
        return None

    def anatomy(self, model: Any) -> Anatomy:
        blocks = tuple(_block(index, name, block) for index, (name, block) in enumerate(_blocks(model)))
        embed, window = model.features[0][0], next(_blocks(model))[1].attn.window_size
        # Any size will do. At this one the last stage is one window: 224 for windows of 7, 256 for those of 8.
        merged = 2 ** (len(list(_stages(model))) - 1)
        height, width = (patch * seen * merged for patch, seen in zip(embed.kernel_size, window, strict=True))
        return Anatomy(
            model=model,
            name=original_class(model).__name__,
            family=self,
            blocks=blocks,
            dim=model.norm.normalized_shape[0],
            num_prefix_tokens=0,
            class_rows=(),
            grid=_grid_of(model, (height, width)),
            input_size=(embed.in_channels, height, width),
            grid_of=partial(_grid_of, model),
            fixed_macs=lambda size, tokens: _outside_macs(model, size),
            tokens_at=partial(_tokens_at, model),
            no_tokens=f"{blocks[0].name}.attn (ShiftedWindowAttention) attends in windows, where tokens are places",
            classifies=isinstance(model.head, nn.Linear),
        )

    def describe(self, model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        name, block = next(_blocks(model))
        return {
            "version": 2 if _is_v2(block.attn) else 1,
            "norm": norm_spec(block.norm1, f"{name}.norm1"),
            "head": head_spec(model, "head"),
            "args": _args(model, sizes),
        }

    def check_spec(self, spec: Mapping[str, Any], tensors: Collection[str]) -> None:
        _check_fields(spec)
        check_depth(sum(spec["args"]["depths"]), tensors, r"features\.\d+\.\d+\.norm1\.")

    def build(self, spec: Mapping[str, Any]) -> nn.Module:
        from torchvision.models import swin_transformer as tv

        _check_fields(spec)
        second = {"block": tv.SwinTransformerBlockV2, "downsample_layer": tv.PatchMergingV2}
        model = tv.SwinTransformer(
            **spec["args"], norm_layer=norm_from(spec["norm"]), **(second if spec["version"] == 2 else {})
        )
        put_head(model, spec["head"], model.head.in_features)
        return model


def _stages(model: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name of each stage, the stage, and the merging before it."""
    merging = None
    for name, part in list(model.features.named_children())[1:]:
        if is_of(_FILE, part, "PatchMerging") or is_of(_FILE, part, "PatchMergingV2"):
            merging = part
        else:
            yield f"features.{name}", part, merging
            merging = None


def _blocks(model: Any) -> Iterator[tuple[str, Any]]:
    for stage_name, stage, _ in _stages(model):
        for name, block in stage._modules.items():
            yield f"{stage_name}.{name}", unwrap(block)


# --- what a block is made of ------------------------------------------------------------------------------------------


def _is_v2(attn: Any) -> bool:
    return getattr(attn, "logit_scale", None) is not None


def _block(index: int, name: str, block: Any) -> Block:
    attn = block.attn
    if _is_v2(attn):
        bias = bias_mlp(attn.cpb_mlp[0], attn.cpb_mlp[2], math.prod(attn.relative_coords_table.shape[:-1]))
        bias = bias._replace(slices=[*bias.slices, Slice(attn, "logit_scale", width=1)])
    else:
        bias = bias_table(attn)
    heads = heads_of(index, f"{name}.attn", attn, AnyHeads, bias, window=math.prod(attn.window_size))
    units = {"heads": replace(heads, behaviours=(Behaviour(attn, AnyHeads, calls_reader=True),))}
    second_half = block.mlp if _is_v2(attn) else block.norm2
    neurons = neurons_of(index, f"{name}.mlp", block.mlp)
    if isinstance(neurons, Units):
        units["neurons"] = neurons
        return Block(name, block, units, second_half=second_half)
    rest = (None, CountedMacs(block.mlp, attn.proj.out_features, f"{name}.mlp"))
    return Block(name, block, units, {"neurons": neurons}, rest=rest, second_half=second_half)


class AnyHeads:
    """Mixin: torchvision's ShiftedWindowAttention, or V2, of any number of heads; it calls `proj`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x: (images, height, width, dim) -> the same shape."""
        height, width = x.shape[1:3]
        window = tuple(self.window_size)
        x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
        sides = (x.shape[1], x.shape[2])
        shift = [0 if seen >= side else by for side, seen, by in zip(sides, window, self.shift_size, strict=True)]
        windows = window_partition(x.roll((-shift[0], -shift[1]), (1, 2)), window).flatten(1, 2)
        mask = _mask(sides, window, shift).to(x) if any(shift) else None
        y = self.proj(_attended(self, windows, mask))
        y = F.dropout(y, self.dropout, self.training).unflatten(1, window)
        y = window_reverse(y, window, *sides).roll(shift, (1, 2))
        return y[:, :height, :width].contiguous()


def _attended(attn: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """What heads make of x (images * windows, area, dim), (images * windows, area, heads * head_dim).

    mask: (windows, area, area), added to the logits.
    """
    heads, bias, cosine = attn.num_heads, attn.qkv.bias, _is_v2(attn)
    if cosine and bias is not None:  # keys have none, whatever the parameter says
        of_q, of_k, of_v = bias.chunk(3)
        bias = torch.cat([of_q, torch.zeros_like(of_k), of_v])
    packed = F.linear(x, attn.qkv.weight, bias)
    width = packed.shape[-1] // max(3 * heads, 1)
    q, k, v = packed.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4).unbind(0)
    places = None
    if heads:
        places = attn.get_relative_position_bias()
        if mask is not None:
            places = places + mask.repeat(x.shape[0] // mask.shape[0], 1, 1)[:, None]
        if cosine:
            q = F.normalize(q, dim=-1) * attn.logit_scale.clamp(max=math.log(100.0)).exp()
            k = F.normalize(k, dim=-1)
    dropout = attn.attention_dropout if attn.training else 0.0
    scale = 1.0 if cosine else max(width, 1) ** -0.5
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=places, dropout_p=dropout, scale=scale)
    return y.transpose(1, 2).flatten(2)


def _mask(sides: tuple[int, int], window: tuple[int, ...], shift: list[int]) -> Tensor:
    """-100 between places that are neighbours only because the map was rolled, else 0: (windows, area, area)."""
    rows, columns = (
        ((at := torch.arange(side)) >= side - seen).long() + (at >= side - by) if by else torch.zeros(side).long()
        for side, seen, by in zip(sides, window, shift, strict=True)
    )
    regions = window_partition((3 * rows[:, None] + columns)[None, :, :, None], window).flatten(1)
    return -100.0 * (regions[:, None] != regions[:, :, None])


# --- what it costs outside the blocks ---------------------------------------------------------------------------------


def _grid_of(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    height, width = (side // patch for side, patch in zip(size, model.features[0][0].kernel_size, strict=True))
    if min(height, width) < 1:
        raise UnsupportedModelError(f"input_size={tuple(size)}: images are smaller than a patch of this model")
    return height, width


def _grids(model: Any, size: tuple[int, int]) -> Iterator[tuple[Any, Any, tuple[int, int]]]:
    """Each stage, the merging before it, and the grid that its blocks see."""
    height, width = _grid_of(model, size)
    for _, stage, merging in _stages(model):
        if merging is not None:
            height, width = (height + 1) // 2, (width + 1) // 2
        yield stage, merging, (height, width)


def _tokens_at(model: Any, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Attention sees whole windows, filled up at the border; the MLP sees the grid."""
    tokens = []
    for stage, _, grid in _grids(model, size):
        blocks: list[Any] = [unwrap(block) for block in stage]
        for window in (block.attn.window_size for block in blocks):
            windows = math.prod(-(-side // seen) for side, seen in zip(grid, window, strict=True))
            tokens.append((windows * math.prod(window), math.prod(grid)))
    return tokens


def _outside_macs(model: Any, size: tuple[int, int]) -> int:
    """Of patch embedding, merging and head."""
    total = math.prod(_grid_of(model, size)) * model.features[0][0].weight.numel()
    for _, merging, grid in _grids(model, size):
        if merging is not None:
            total += math.prod(grid) * merging.reduction.weight.numel()
    return total + counted_macs(model.head, (1, model.norm.normalized_shape[0]), "head")


# --- constructor arguments --------------------------------------------------------------------------------------------

_ARGS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("patch_size", "depths", "num_heads", "window_size"), (list,)),
    **dict.fromkeys(("embed_dim", "num_classes"), (int,)),
    **dict.fromkeys(("mlp_ratio", "dropout", "attention_dropout", "stochastic_depth_prob"), (int, float)),
}


def _args(model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    stages: list[list[Any]] = [[unwrap(block) for block in stage] for _, stage, _ in _stages(model)]
    depths = [len(blocks) for blocks in stages]
    firsts = [sum(depths[:stage]) for stage in range(len(depths))]
    embed, last = model.features[0][0], stages[-1][-1]
    neurons = (sizes.get("neurons") or (0,))[-1] or last.mlp[3].in_features
    return {
        "patch_size": list(embed.kernel_size),
        "depths": depths,
        "num_heads": [sizes["heads"][first] for first in firsts],
        "window_size": list(last.attn.window_size),
        "embed_dim": embed.out_channels,
        "num_classes": model.num_classes,
        # int(dim * ratio) gives the hidden size back in each stage: a quarter of a unit keeps the last off the edge.
        "mlp_ratio": (neurons + 0.25) / last.attn.proj.out_features,
        "dropout": last.attn.dropout,
        "attention_dropout": last.attn.attention_dropout,
        "stochastic_depth_prob": round(last.stochastic_depth.p, 10),  # the constructor multiplies and divides it
    }


def _check_fields(spec: Mapping[str, Any]) -> None:
    check_args(spec, {"version", "norm", "head"}, _ARGS)
    args = spec["args"]
    check_positive(args, "depths", "num_heads", "embed_dim", "window_size", "patch_size")
    if spec["version"] not in (1, 2) or len(args["depths"]) != len(args["num_heads"]) or len(args["window_size"]) != 2:
        raise ArtifactError("constructor arguments version, depths, num_heads and window_size do not go together")
    check_head(spec["head"], "head")
