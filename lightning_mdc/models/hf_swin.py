"""Hugging Face's Swin: attention in windows, which every other block shifts, in stages of falling resolution.

Heads and neurons can leave; tokens are places in a window and cannot.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn

from lightning_mdc.models.anatomy import Anatomy, Block, Family, Units
from lightning_mdc.models.compiled import unwrap
from lightning_mdc.models.hf_classes import altered, build, check_spec, computes_as, describe, known_class, own_forward
from lightning_mdc.models.hf_vit import MAKERS, PROJECTIONS, READERS, heads_of, neurons_of, pair
from lightning_mdc.models.timm_vit import CountedMacs, counted_macs

_TOWERS = {"SwinModel": "", "SwinForImageClassification": "swin", "SwinBackbone": "swin"}
_PACKAGES = dict.fromkeys(_TOWERS, "swin")
_STAGE, _LAYER, _MERGING = {"SwinStage": "swin"}, {"SwinLayer": "swin"}, {"SwinPatchMerging": "swin"}
_ATTENTION, _MLP = {"SwinAttention": "swin"}, {"SwinMLP": "swin"}


class HfSwin(Family):
    """The family of transformers' `SwinModel` and what stands on it."""

    name = "hf_swin"
    description = "transformers' Swin models, classifiers and backbones (heads and neurons)"

    def accepts(self, module: nn.Module) -> bool:
        return computes_as(module, _PACKAGES) and self.refusal(module) is None

    def refusal(self, module: nn.Module) -> str | None:
        """The part that computes another way than transformers'."""
        kind = known_class(module, _PACKAGES)
        if kind is None:
            return None
        if not computes_as(module, _PACKAGES):
            return own_forward(module, kind)
        tower = _tower(module)
        if not computes_as(tower, _PACKAGES):
            return altered(_TOWERS[kind.__name__], tower, _PACKAGES)
        for name, stage in _stages(tower):
            parts = [(name, stage, _STAGE)]
            if stage.downsample is not None:
                parts.append((f"{name}.downsample", stage.downsample, _MERGING))
            parts += [(f"{name}.blocks.{i}", unwrap(block), _LAYER) for i, block in enumerate(stage.blocks)]
            for path, part, known in parts:
                if (own := altered(path, part, known)) is not None:
                    return own
        return None

    def anatomy(self, model: Any) -> Anatomy:
        kind: Any = known_class(model, _PACKAGES)
        tower = _tower(model)
        config, size, blocks = tower.config, pair(tower.config.image_size), tuple(_blocks(model, tower))
        labels = getattr(model, "num_labels", 0)
        return Anatomy(
            model=model,
            name=kind.__name__,
            family=self,
            blocks=blocks,
            dim=tower.num_features,
            num_prefix_tokens=0,
            class_rows=(),
            grid=_grid_of(tower, size),
            input_size=(config.num_channels, *size),
            grid_of=partial(_grid_of, tower),
            fixed_macs=lambda size, _: _outside_macs(model, tower, size),
            tokens_at=partial(_tokens_at, tower),
            no_tokens=f"{blocks[0].name}.attention (SwinAttention) attends in windows, where tokens are places",
            classifies=labels > 1 and config.problem_type in (None, "single_label_classification"),
        )

    def describe(self, model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        options = {}
        if not _TOWERS[known_class(model, _PACKAGES).__name__]:  # type: ignore[union-attr]
            options["add_pooling_layer"] = model.pooler is not None
            options["use_mask_token"] = model.embeddings.mask_token is not None
        return describe(model, _PACKAGES, **options)

    def check_spec(self, spec: Mapping[str, Any], tensors: Collection[str]) -> None:
        check_spec(spec, _PACKAGES, ("add_pooling_layer", "use_mask_token"), tensors)

    def build(self, spec: Mapping[str, Any]) -> nn.Module:
        return build(spec, _PACKAGES)


def _tower(model: Any) -> Any:
    kind: Any = known_class(model, _PACKAGES)
    path = _TOWERS[kind.__name__]
    return unwrap(model._modules[path]) if path else model


def _stages(tower: Any) -> Iterator[tuple[str, Any]]:
    for index, stage in enumerate(tower.encoder.layers):
        yield f"encoder.layers.{index}", unwrap(stage)


def _blocks(model: Any, tower: Any) -> Iterator[Block]:
    index, before = 0, "" if tower is model else "swin."
    for name, stage in _stages(tower):
        for place, block in enumerate(stage.blocks):
            yield _block(index, f"{before}{name}.blocks.{place}", unwrap(block))
            index += 1


def _block(index: int, name: str, block: Any) -> Block:
    attn, mlp, dim = block.attention, block.mlp, block.layernorm_before.normalized_shape[0]
    area = attn.relative_position_bias.window_area
    units: dict[str, Units] = {}
    reasons: dict[str, str] = {}
    rest: list[Any] = [None, None]
    in_attn = altered(f"{name}.attention", attn, _ATTENTION, PROJECTIONS)
    in_mlp = altered(f"{name}.mlp", mlp, _MLP, MAKERS + READERS)
    if in_attn is None:
        units["heads"] = heads_of(index, f"{name}.attention", attn, attn.relative_position_bias, area)
    else:
        reasons["heads"] = in_attn
        rest[0] = CountedMacs(attn, dim, f"{name}.attention", area)
    if in_mlp is None:
        units["neurons"] = neurons_of(index, f"{name}.mlp", mlp)
    else:
        reasons["neurons"], rest[1] = in_mlp, CountedMacs(mlp, dim, f"{name}.mlp")
    return Block(name, block, units, reasons, rest=(rest[0], rest[1]), second_half=block.layernorm_after)


# --- what it costs outside the blocks ---------------------------------------------------------------------------------


def _grid_of(tower: Any, size: tuple[int, int]) -> tuple[int, int]:
    height, width = (-(-side // patch) for side, patch in zip(size, pair(tower.config.patch_size), strict=True))
    return height, width


def _grids(tower: Any, size: tuple[int, int]) -> Iterator[tuple[Any, tuple[int, int]]]:
    """Each stage, with the grid that its blocks see."""
    height, width = _grid_of(tower, size)
    for _, stage in _stages(tower):
        yield stage, (height, width)
        if stage.downsample is not None:
            height, width = (height + 1) // 2, (width + 1) // 2


def _tokens_at(tower: Any, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Attention sees whole windows, filled up at the border; the MLP sees the grid."""
    window = tower.config.window_size
    return [
        (math.prod(-(-side // window) for side in grid) * window**2, math.prod(grid))
        for stage, grid in _grids(tower, size)
        for _ in stage.blocks
    ]


def _outside_macs(model: Any, tower: Any, size: tuple[int, int]) -> int:
    """Of patch embedding, merging and classifier."""
    total: int = math.prod(_grid_of(tower, size)) * tower.embeddings.patch_embeddings.projection.weight.numel()
    for stage, (height, width) in _grids(tower, size):
        if stage.downsample is not None:
            total += ((height + 1) // 2) * ((width + 1) // 2) * stage.downsample.reduction.weight.numel()
    head = unwrap(model._modules.get("classifier", nn.Identity()))
    if isinstance(head, nn.Linear):
        return total + head.weight.numel()
    return total + (0 if isinstance(head, nn.Identity) else counted_macs(head, (1, tower.num_features), "classifier"))
