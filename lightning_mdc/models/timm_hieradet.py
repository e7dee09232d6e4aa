"""timm's `HieraDet`, the image encoder of Segment Anything 2: Hiera's stages on a grid, which some blocks see as a
whole and the others in windows.

Heads and neurons can leave; tokens are places of the grid and cannot.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

from timm.models import hieradet_sam2 as hieradet
from torch import Tensor, nn

from lightning_mdc.errors import ArtifactError, UnsupportedModelError
from lightning_mdc.models.anatomy import Anatomy, Block, Family
from lightning_mdc.models.compiled import unwrap
from lightning_mdc.models.parts import own_methods
from lightning_mdc.models.swapping import original_class
from lightning_mdc.models.timm_attention import PositionBias, heads_of
from lightning_mdc.models.timm_constructor import (
    act_from,
    act_spec,
    check_args,
    check_depth,
    in_chans,
    norm_from,
    norm_spec,
)
from lightning_mdc.models.timm_hiera import STAGE_ARGS, check_stages, head_macs, stage_args
from lightning_mdc.models.timm_vit import configured_size, foreign_part, not_plain, two_halves

_MODEL_METHODS = ("forward", "forward_features", "forward_head", "_pos_embed")


class _NoneToo:
    """Mixin: its own forward takes any number of heads but none."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if self.num_heads:
            result: Tensor = super().forward(x)  # type: ignore[misc]
        else:
            pooled = x if self.q_pool is None else self.q_pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            result = self.proj(pooled[..., :0])
        return result


class TimmHieraDet(Family):
    """The family of timm's `HieraDet`."""

    name = "timm_hieradet"
    description = "timm HieraDet (SAM 2; heads and neurons)"

    def accepts(self, module: nn.Module) -> bool:
        return isinstance(module, hieradet.HieraDet) and self.refusal(module) is None

    def refusal(self, module: nn.Module) -> str | None:
        """The part that computes another way than timm's."""
        if not isinstance(module, hieradet.HieraDet):
            return None
        if (own := own_methods(module, (hieradet.HieraDet,), _MODEL_METHODS)) is not None:
            return own
        parts: list[tuple[str, Any, tuple[type, ...]]] = [
            ("patch_embed", module.patch_embed, (hieradet.HieraPatchEmbed,))
        ]
        parts += [
            (f"blocks.{index}", block, (hieradet.MultiScaleBlock,)) for index, block in enumerate(_blocks(module))
        ]
        if (found := foreign_part(parts)) is not None:
            return found
        for index, block in enumerate(_blocks(module)):
            if (found := not_plain(f"blocks.{index}.attn", block.attn, (hieradet.MultiScaleAttention,))) is not None:
                return found
        return None

    def anatomy(self, model: Any) -> Anatomy:
        own = configured_size(model) or _size_of_positions(model)
        return Anatomy(
            model=model,
            name=original_class(model).__name__,
            family=self,
            blocks=tuple(_block(index, block) for index, block in enumerate(_blocks(model))),
            dim=model.num_features,
            num_prefix_tokens=0,
            class_rows=(),
            grid=_grid_of(model, own),
            input_size=(in_chans(model), *own),
            grid_of=partial(_grid_of, model),
            fixed_macs=lambda size, _: _outside_macs(model, size),
            tokens_at=partial(_tokens_at, model),
            no_tokens="blocks.0 (MultiScaleBlock) takes its tokens as a grid, which it cuts into windows",
            classifies=not isinstance(getattr(model.head, "fc", model.head), nn.Identity),
        )

    def describe(self, model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        block = next(_blocks(model))
        norm, act = norm_spec(block.norm1, "blocks.0.norm1"), act_spec(block.mlp.act, "blocks.0.mlp.act")
        args = stage_args(model, sizes, lambda attn: attn.num_heads) | {
            "q_pool": len(model.q_pool_blocks),
            "window_spec": list(model.window_spec),
            "global_att_blocks": list(model.global_att_blocks or ()),
            "global_pos_size": list(model.global_pos_size),
        }
        return {"norm": norm, "act": act, "args": args}

    def check_spec(self, spec: Mapping[str, Any], tensors: Collection[str]) -> None:
        _check_fields(spec)
        check_depth(sum(spec["args"]["stages"]), tensors)

    def build(self, spec: Mapping[str, Any]) -> nn.Module:
        _check_fields(spec)
        args = {name: tuple(value) if isinstance(value, list) else value for name, value in spec["args"].items()}
        return hieradet.HieraDet(**args, norm_layer=norm_from(spec["norm"]), act_layer=act_from(spec["act"]))


def _blocks(model: Any) -> Iterator[Any]:
    return map(unwrap, model.blocks)


# --- what it is made of -----------------------------------------------------------------------------------------------


def _block(index: int, block: Any) -> Block:
    name, pooled = f"blocks.{index}", math.prod(block.q_stride or (1,))
    window = math.prod(block.window_size) if block.is_windowed else None
    heads = heads_of(index, f"{name}.attn", block.attn, _NoneToo, PositionBias(), window, pooled)
    return two_halves(index, name, block, block.dim, heads, block.norm2)


def _size_of_positions(model: Any) -> tuple[int, int]:
    """Of images that have a window for each global position."""
    height, width = (
        count * model.window_spec[0] * step
        for count, step in zip(model.global_pos_size, model.patch_embed.proj.stride, strict=True)
    )
    return height, width


def _grid_of(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    conv = model.patch_embed.proj
    ways = zip(size, conv.kernel_size, conv.stride, conv.padding, strict=True)
    height, width = ((side + 2 * pad - kernel) // step + 1 for side, kernel, step, pad in ways)
    if min(height, width) < 1 or height % model.window_spec[0] or width % model.window_spec[0]:
        sides = tuple(model.window_spec[0] * step for step in conv.stride)
        raise UnsupportedModelError(f"input_size={tuple(size)}: not a multiple of {sides}, which a window takes")
    return height, width


def _grids(model: Any, size: tuple[int, int]) -> Iterator[tuple[Any, tuple[int, int], tuple[int, int]]]:
    """Each block, with the grid that reaches it and the grid that it gives."""
    height, width = _grid_of(model, size)
    for block in _blocks(model):
        rows, columns = block.q_stride or (1, 1)
        pooled = height // rows, width // columns
        yield block, (height, width), pooled
        height, width = pooled


def _tokens_at(model: Any, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Attention sees whole windows, filled up at the border; the MLP sees the grid, of which queries were pooled."""
    tokens = []
    for block, grid, pooled in _grids(model, size):
        if block.is_windowed:
            grid = tuple(-(-side // seen) * seen for side, seen in zip(grid, block.window_size, strict=True))
        tokens.append((math.prod(grid), math.prod(pooled)))
    return tokens


def _outside_macs(model: Any, size: tuple[int, int]) -> int:
    """Of patch embedding, what widens the stream, and head."""
    grids = list(_grids(model, size))
    total: int = math.prod(grids[0][1]) * model.patch_embed.proj.weight.numel()
    for block, grid, _ in grids:
        if isinstance(block.proj, nn.Linear):
            total += math.prod(grid) * block.proj.weight.numel()
    return total + head_macs(model, grids[-1][2])


# --- constructor arguments --------------------------------------------------------------------------------------------

_ARGS: dict[str, tuple[type, ...]] = STAGE_ARGS | dict.fromkeys(("window_spec", "global_att_blocks"), (list,))


def _check_fields(spec: Mapping[str, Any]) -> None:
    check_args(spec, ("norm", "act"), _ARGS)
    args = spec["args"]
    check_stages(args)
    windows, globally = args["window_spec"], args["global_att_blocks"]
    if len(windows) != len(args["stages"]) or not all(type(side) is int and 0 < side <= 65536 for side in windows):
        raise ArtifactError(f"constructor argument window_spec={windows!r}: expected one size per stage")
    if not all(type(index) is int and 0 <= index < sum(args["stages"]) for index in globally):
        raise ArtifactError(f"constructor argument global_att_blocks={globally!r}: no blocks")
