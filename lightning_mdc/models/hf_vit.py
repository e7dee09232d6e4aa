"""Hugging Face's ViT, DeiT, DINOv2 (with registers), DINOv3, CLIP, SigLIP and BEiT: models, classifiers, backbones.

transformers calls the blocks in loops of its own, which hand what a model is called with on to all of them: so the
`Way` of one call reaches every block. Only the hf_* files know transformers' attribute names; none imports it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lightning_mdc.errors import UnsupportedModelError
from lightning_mdc.models.anatomy import (
    Anatomy,
    Behaviour,
    Block,
    Channels,
    Family,
    Size,
    TokenPoint,
    Units,
    columns_of,
    rows_of,
)
from lightning_mdc.models.compiled import unwrap
from lightning_mdc.models.hf_classes import altered, build, check_spec, computes_as, describe, known_class, own_forward
from lightning_mdc.models.swapping import original_class
from lightning_mdc.models.timm_attention import bias_table
from lightning_mdc.models.timm_eva import rope_of
from lightning_mdc.models.timm_vit import CountedMacs, counted_macs
from lightning_mdc.policy import UNIT_DIMENSIONS, Plan
from lightning_mdc.tokens.block import StagedBlock, attention_called, check_grid, refuse_masks, restored, stage_of
from lightning_mdc.tokens.reduction import Evidence
from lightning_mdc.tokens.selection import Carried


class _Model(NamedTuple):
    """Of a class of models: its package, its `tower` (which begins the loop over the blocks; "": itself), and the rows
    that its output reads; (): of all tokens."""

    package: str
    tower: str
    class_rows: tuple[int, ...]


_MODELS = {
    "ViTModel": _Model("vit", "", (0,)),
    "ViTForImageClassification": _Model("vit", "vit", (0,)),
    "DeiTModel": _Model("deit", "", (0,)),
    "DeiTForImageClassification": _Model("deit", "deit", (0,)),
    "DeiTForImageClassificationWithTeacher": _Model("deit", "deit", (0, 1)),
    "Dinov2Model": _Model("dinov2", "", (0,)),
    "Dinov2ForImageClassification": _Model("dinov2", "dinov2", ()),
    "Dinov2Backbone": _Model("dinov2", "", (0,)),
    "Dinov2WithRegistersModel": _Model("dinov2_with_registers", "", (0,)),
    "Dinov2WithRegistersForImageClassification": _Model("dinov2_with_registers", "dinov2_with_registers", ()),
    "Dinov2WithRegistersBackbone": _Model("dinov2_with_registers", "", (0,)),
    "DINOv3ViTModel": _Model("dinov3_vit", "", (0,)),
    "DINOv3ViTBackbone": _Model("dinov3_vit", "", (0,)),
    "CLIPVisionModel": _Model("clip", "", (0,)),
    "CLIPVisionModelWithProjection": _Model("clip", "vision_model", (0,)),
    "CLIPForImageClassification": _Model("clip", "vision_model", ()),
    "SiglipVisionModel": _Model("siglip", "", ()),
    "SiglipForImageClassification": _Model("siglip", "vision_model", ()),
    "BeitModel": _Model("beit", "", ()),
    "BeitForImageClassification": _Model("beit", "beit", ()),
    "BeitBackbone": _Model("beit", "beit", ()),
}
_BLOCKS = {
    "vit": "layers",
    "deit": "layers",
    "dinov2": "encoder.layer",
    "dinov2_with_registers": "encoder.layer",
    "dinov3_vit": "model.layer",
    "clip": "encoder.layers",
    "siglip": "encoder.layers",
    "beit": "layers",
}
_PACKAGES = {name: model.package for name, model in _MODELS.items()}
_LAYERS = {
    "ViTLayer": "vit",
    "DeiTLayer": "deit",
    "Dinov2Layer": "dinov2",
    "Dinov2WithRegistersLayer": "dinov2_with_registers",
    "DINOv3ViTLayer": "dinov3_vit",
    "CLIPEncoderLayer": "clip",
    "SiglipEncoderLayer": "siglip",
    "BeitLayer": "beit",
}
_ATTENTIONS = {
    "ViTAttention": "vit",
    "DeiTAttention": "deit",
    "Dinov2Attention": "dinov2",
    "Dinov2WithRegistersAttention": "dinov2_with_registers",
    "DINOv3ViTAttention": "dinov3_vit",
    "CLIPAttention": "clip",
    "SiglipAttention": "siglip",
    "BeitAttention": "beit",
}
_MLPS = {
    "ViTMLP": "vit",
    "DeiTMLP": "deit",
    "Dinov2MLP": "dinov2",
    "Dinov2SwiGLUFFN": "dinov2",
    "Dinov2WithRegistersMLP": "dinov2_with_registers",
    "Dinov2WithRegistersSwiGLUFFN": "dinov2_with_registers",
    "DINOv3ViTMLP": "dinov3_vit",
    "DINOv3ViTGatedMLP": "dinov3_vit",
    "CLIPMLP": "clip",
    "SiglipMLP": "siglip",
    "BeitMLP": "beit",
}
_BIAS = "relative_position_bias"
_OPTIONS = ("add_pooling_layer", "use_mask_token")
_OF_PATCHES = dict.fromkeys(("Siglip2VisionModel", "Siglip2ForImageClassification"), "siglip2")


class HfViT(Family):
    """The family of transformers' vision transformers whose blocks see all tokens."""

    name = "hf_vit"
    description = (
        "transformers' ViT, DeiT, DINOv2 (with registers), DINOv3, CLIP, SigLIP and BEiT (heads and neurons) vision "
        "models, classifiers and backbones"
    )

    def accepts(self, module: nn.Module) -> bool:
        """Whether this is one of transformers' models whose parts compute as transformers has them."""
        return computes_as(module, _PACKAGES) and self.refusal(module) is None

    def refusal(self, module: nn.Module) -> str | None:
        """What makes one of the models another one."""
        if known_class(module, _OF_PATCHES) is not None:
            return (
                "it takes images as patches with a mask and their shapes (NaFlex), each of another number, which are "
                "neither priced nor pruned; SigLIP 2 of one image size (siglip2-*-patch*-SIZE) is a SiglipVisionModel, "
                "which is"
            )
        kind = known_class(module, _PACKAGES)
        if kind is None:
            return None
        if not computes_as(module, _PACKAGES):
            return own_forward(module, kind)
        tower = _tower(module)
        if not computes_as(tower, _PACKAGES):
            return altered(_MODELS[kind.__name__].tower, tower, _PACKAGES)
        try:
            _listed_blocks(tower)
        except AttributeError:
            return "this release of transformers builds it otherwise than 5.24, which is known"
        if not isinstance(module._modules.get("fpn", nn.Identity()), nn.Identity):
            return "fpn makes maps of its feature maps, whose cost is not known; use a backbone with add_fpn=False"
        return None

    def anatomy(self, model: Any) -> Anatomy:
        kind: Any = known_class(model, _PACKAGES)
        tower: Any = _tower(model)
        config = tower.config
        size = pair(config.image_size)
        grid = partial(_grid_of, pair(config.patch_size))
        blocks = _blocks(model)
        return Anatomy(
            model=model,
            name=kind.__name__,
            family=self,
            blocks=blocks,
            dim=config.hidden_size,
            num_prefix_tokens=_num_prefix_tokens(tower.embeddings),
            class_rows=_MODELS[kind.__name__].class_rows,
            grid=grid(size),
            input_size=(config.num_channels, *size),
            grid_of=grid,
            fixed_macs=partial(_fixed_macs, model),
            reader=HfReader,
            container=None if tower is model else tower,
            no_tokens=_no_tokens(tower, blocks),
            classifies=_classifies(model),
        )

    def describe(self, model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        options = {}
        if hasattr(model, "pooler"):
            options["add_pooling_layer"] = model.pooler is not None
            if not hasattr(model.config, "use_mask_token"):
                options["use_mask_token"] = model.embeddings.mask_token is not None
        return describe(model, _PACKAGES, **options)

    def check_spec(self, spec: Mapping[str, Any], tensors: Collection[str]) -> None:
        check_spec(spec, _PACKAGES, _OPTIONS, tensors)

    def build(self, spec: Mapping[str, Any]) -> nn.Module:
        return build(spec, _PACKAGES)


def _package(module: nn.Module, packages: Mapping[str, str]) -> str:
    """Of a class that is known."""
    kind: Any = known_class(module, packages)
    return packages[kind.__name__]


def _tower(model: Any) -> nn.Module:
    kind: Any = known_class(model, _PACKAGES)
    path = _MODELS[kind.__name__].tower
    found: nn.Module = unwrap(model._modules[path]) if path else model
    return found


def _listed_blocks(tower: nn.Module) -> list[nn.Module]:
    """The blocks as the library's loop has them, compiled or not."""
    listed = tower.get_submodule(_BLOCKS[_package(tower, _PACKAGES)])
    return [block for block in listed._modules.values() if block is not None]  # one that is in two places, twice


def pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _grid_of(patch: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    if size[0] < patch[0] or size[1] < patch[1]:
        raise UnsupportedModelError(f"input_size={tuple(size)}: smaller than a patch of {patch} pixels")
    return size[0] // patch[0], size[1] // patch[1]


def _num_prefix_tokens(embeddings: Any) -> int:
    single = ("cls_token", "class_embedding", "distillation_token")
    registers = getattr(embeddings, "register_tokens", None)
    return sum(hasattr(embeddings, name) for name in single) + (0 if registers is None else registers.shape[1])


def _classifies(model: Any) -> bool:
    """Whether its output is logits, one per class."""
    config = model.config
    return (
        hasattr(model, "num_labels")
        and any(isinstance(head, nn.Linear) for head in _heads_of(model).values())
        and model.num_labels > 1
        and config.problem_type in (None, "single_label_classification")
    )


# --- what a block is made of ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """Of the parts of a block: the norms before its halves, its attention, and what each half's result goes through
    before it is added."""

    norms: tuple[str, str]
    attention: str
    after: tuple[tuple[str, ...], tuple[str, ...]]


def _blocks(model: Any) -> tuple[Block, ...]:
    tower: Any = _tower(model)
    kind: Any = known_class(model, _PACKAGES)
    path = ".".join(filter(None, (_MODELS[kind.__name__].tower, _BLOCKS[_package(tower, _PACKAGES)])))
    return tuple(
        _block_of(index, f"{path}.{index}", unwrap(block), tower) for index, block in enumerate(_listed_blocks(tower))
    )


def _block_of(index: int, name: str, block: Any, tower: Any) -> Block:
    dim = tower.config.hidden_size
    if (own := altered(name, block, _LAYERS)) is not None:
        reasons = dict.fromkeys(UNIT_DIMENSIONS, own)
        return Block(name, block, {}, reasons, rest=(CountedMacs(block, dim, name), None))
    package = _package(block, _LAYERS)
    names = _HALVES[package].names
    attn, mlp = block._modules[names.attention], block.mlp
    units: dict[str, Units] = {}
    reasons = {}
    rest: list[Any] = [None, None]
    point = None
    in_attn = altered(f"{name}.{names.attention}", attn, _ATTENTIONS, PROJECTIONS)
    in_mlp = altered(f"{name}.mlp", mlp, _MLPS, MAKERS + READERS)
    if getattr(tower, "shared_position_bias", None) is not None:
        reasons["heads"] = "shared_position_bias has a column for the heads of all blocks"
        rest[0] = partial(heads_of(index, name, attn).macs, attn.num_attention_heads)
    elif in_attn is None:
        heads = units["heads"] = heads_of(index, f"{name}.{names.attention}", attn, block._modules.get(_BIAS))
        if package != "beit":
            point = TokenPoint(_HALVES[package], heads, Channels(attn.v_proj, 0, attn.v_proj.out_features), calls=attn)
    else:
        reasons["heads"] = in_attn
        rest[0] = CountedMacs(attn, dim, f"{name}.{names.attention}")
    if in_mlp is None:
        units["neurons"] = neurons_of(index, f"{name}.mlp", mlp)
    else:
        reasons["neurons"], rest[1] = in_mlp, CountedMacs(mlp, dim, f"{name}.mlp")
    second_half = block._modules[names.norms[1]]
    alone: Any = _alone_turning if package == "dinov3_vit" else _alone
    if package == "beit":
        alone = partial(_alone, resolution=pair(tower.config.image_size))
    return Block(name, block, units, reasons, point, stage_of(block), (rest[0], rest[1]), second_half, alone)


def heads_of(index: int, name: str, attn: Any, bias: Any = None, window: int | None = None) -> Units:
    """The heads of transformers' attention of block `index`, called `name`.

    `bias` owns a table of positions with a column per head. A token attends to all, or to those of its `window`.
    """
    width, out = attn.head_dim, _out(attn)
    makers = (attn.q_proj, attn.k_proj, attn.v_proj)
    parts = [*(rows_of(maker, width=width) for maker in makers), columns_of(out, width)]
    count = attn.q_proj.out_features // width
    per_head = sum(layer.weight.numel() for layer in (*makers, out)) // max(count, 1)
    counts = (of for of in ("num_heads", "num_attention_heads") if hasattr(attn, of))
    table = () if bias is None else bias_table(bias).slices

    def macs(heads: Any, tokens: Any) -> Any:
        return tokens * heads * (per_head + 2 * width * (tokens if window is None else window))

    return Units(
        dimension="heads",
        block=index,
        name=name,
        count=count,
        width=width,
        slices=(*(part for slices, _ in parts for part in slices), *table),
        sizes=(
            *(size for _, sizes in parts for size in sizes),
            *(Size(attn, of, lambda kept: kept) for of in counts),
        ),
        reader=out,
        macs=macs,
        behaviours=(Behaviour(attn, AnyHeads), *([] if bias is None else [Behaviour(bias, AnyTable)])),
    )


class AnyHeads:
    """Mixin: transformers' attention, which may have no heads at all: nothing then tells its views their shape."""

    q_proj: Any

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        if self.q_proj.out_features:
            found: tuple[Tensor, Tensor | None] = super().forward(hidden_states, *args, **options)  # type: ignore[misc]
            return found
        batch, tokens, _ = hidden_states.shape
        return _out(self)(hidden_states[..., :0]), hidden_states.new_zeros(batch, 0, tokens, tokens)


class AnyTable:
    """Mixin: a bias of positions, which may be of no heads."""

    relative_position_bias_table: Tensor

    def forward(self, *args: Any, **options: Any) -> Tensor:
        if self.relative_position_bias_table.shape[1]:
            found: Tensor = super().forward(*args, **options)  # type: ignore[misc]
            return found
        return self.relative_position_bias_table.new_zeros(1, 0, 1, 1)


def _out(attn: Any) -> nn.Linear:
    """The layer that reads the heads."""
    found: nn.Linear = attn._modules.get("o_proj") or attn.out_proj
    return found


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj")
MAKERS, READERS = ("fc1", "gate_proj", "up_proj"), ("fc2", "down_proj")


def neurons_of(index: int, name: str, mlp: Any) -> Units:
    makers = [mlp._modules[maker] for maker in MAKERS if maker in mlp._modules]
    reader: Any = next(mlp._modules[reader] for reader in READERS if reader in mlp._modules)
    parts = [*map(rows_of, makers), columns_of(reader)]
    count = reader.in_features
    weights = sum(layer.weight.numel() for layer in (*makers, reader)) // max(count, 1)
    return Units(
        dimension="neurons",
        block=index,
        name=name,
        count=count,
        width=1,
        slices=tuple(part for slices, _ in parts for part in slices),
        sizes=tuple(size for _, sizes in parts for size in sizes),
        reader=reader,
        macs=lambda neurons, tokens: tokens * neurons * weights,
        after_point=True,
    )


def _no_tokens(tower: nn.Module, blocks: tuple[Block, ...]) -> str | None:
    """Why tokens cannot leave; None if they can."""
    if _package(tower, _PACKAGES) == "beit":
        return f"{blocks[0].name} (BeitLayer) has a bias for each pair of places of the whole grid"
    for block in blocks:
        if block.stage is not None:
            return f"{block.name} already drops tokens: this model is slim; prune tokens of the dense one"
    return next((next(iter(block.reasons.values())) for block in blocks if block.point is None), None)


def _alone(block: nn.Module, x: Tensor, **options: Any) -> Tensor:
    found: Tensor = block(x, attention_mask=None, **options)
    return found


def _alone_turning(block: Any, x: Tensor) -> Tensor:
    """No prefix tokens, and none that turns."""
    still = x.new_zeros(x.shape[1], block.attention.head_dim)
    found: Tensor = block(x, position_embeddings=(still + 1, still))
    return found


# --- what it costs outside the blocks ---------------------------------------------------------------------------------


def _heads_of(model: Any) -> dict[str, nn.Module]:
    """What reads one vector per image, by name."""
    names = ("classifier", "cls_classifier", "distillation_classifier", "visual_projection")
    found = {name: unwrap(model._modules[name]) for name in names if name in model._modules}
    pooler: Any = getattr(_tower(model), "pooler", None)
    return {**found, "pooler.dense": pooler.dense} if hasattr(pooler, "dense") else found


def _fixed_macs(model: Any, size: tuple[int, int], num_tokens: Any) -> Any:
    """MACs of patch embedding, pooling and heads; `num_tokens` (int or array) reach the pooling."""
    tower: Any = _tower(model)
    dim, embeddings = tower.config.hidden_size, tower.embeddings
    found = getattr(embeddings, "patch_embeddings", None) or embeddings.patch_embedding
    height, width = _grid_of(pair(tower.config.patch_size), size)
    total: Any = height * width * getattr(found, "projection", found).weight.numel()
    for name, head in _heads_of(model).items():
        if isinstance(head, nn.Linear):
            total = total + head.weight.numel()
        elif not isinstance(head, nn.Identity):
            both = 2 if "dinov2" in _package(model, _PACKAGES) else 1  # the class token, and the mean of the others
            total = total + counted_macs(head, (1, both * dim), name)
    if getattr(tower, "use_head", False):  # SigLIP's, whose one query attends to all tokens
        mlp = tower.head.mlp
        total = total + 2 * dim * dim * (1 + num_tokens) + 2 * dim * num_tokens
        total = total + mlp.fc1.weight.numel() + mlp.fc2.weight.numel()
    return total


# --- where tokens leave -----------------------------------------------------------------------------------------------


class Way:
    """Of one call of a model: what travels beside the tokens from block to block.

    A block that gradient checkpointing calls again finds what it had found before.
    """

    def __init__(self, last: nn.Module | None = None, restore: bool = False, shows: bool = False) -> None:
        """`restore`: positions behind the `last` block, and if it `shows` hidden states, behind each one."""
        self._last, self._restore, self._shows = last, restore, shows
        self._now: tuple[Tensor | None, Carried | None] = (None, None)
        self._before: dict[int, tuple[Tensor | None, Carried | None]] = {}

    def alone(self) -> Way:
        """For a copy of the next block, called outside the model, which puts out its tokens."""
        way = Way()
        way._now = self._now
        return way

    def before(self, block: nn.Module, x: Tensor) -> tuple[Tensor, Carried | None]:
        """The tokens that reach a block that is given x, and what travels beside them."""
        tokens, carried = self._before.setdefault(id(block), self._now)
        # A copy of the block may be wider than the model.
        return (x if tokens is None else tokens.to(x.dtype)), carried

    def behind(self, block: StagedBlock, x: Tensor, carried: Carried | None) -> Tensor:
        """What a block gives that has come to these tokens."""
        self._now = (x if self._shows else None, carried)
        shown = self._restore and (self._shows or block is self._last)
        return restored(x, carried, block.role.num_prefix_tokens) if shown else x


class _Halves(StagedBlock):
    """Mixin: a block of transformers' in two halves, which compute operation by operation what its forward does."""

    names: ClassVar[Names]

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        journey: Way | None = None,
        **options: Any,
    ) -> Tensor:
        """As transformers' own; the `options` are for others that the model calls with them, too."""
        self.check_asked(journey)
        if journey is None:
            refuse_masks(attention_mask)
            journey = Way()  # in a model it is the reader that refuses: traced, transformers makes a mask of nothing
        x, carried = journey.before(self, hidden_states)
        rope = None if position_embeddings is None else turned(position_embeddings, carried)
        x, carried = self.staged(x, carried, rope)
        return journey.behind(self, x, carried)

    def attend(self, x: Tensor, bias: Tensor | None, rope: Any = None) -> tuple[Tensor, Evidence]:
        attn, normed = getattr(self, self.names.attention), getattr(self, self.names.norms[0])(x)

        def compute(x: Tensor) -> tuple[Tensor, Evidence]:
            y, q, k = attended(attn, x, bias, rope)
            return y, Evidence(q, k, _scale(attn))

        y, evidence = attention_called(attn, compute, normed, paired=True)
        return x + self._after(0, y), evidence

    def finish(self, x: Tensor) -> Tensor:
        mlp: Any = self.mlp
        return x + self._after(1, mlp(getattr(self, self.names.norms[1])(x)))

    def _after(self, half: int, y: Tensor) -> Tensor:
        for name in self.names.after[half]:
            y = getattr(self, name)(y)
        return y


class VitHalves(_Halves):
    """Of ViT and DeiT."""

    names = Names(("layernorm_before", "layernorm_after"), "attention", (("dropout",), ("dropout",)))


class DinoHalves(_Halves):
    """Of DINOv2 and DINOv3."""

    names = Names(("norm1", "norm2"), "attention", (("layer_scale1", "drop_path"), ("layer_scale2", "drop_path")))


class ClipHalves(_Halves):
    """Of CLIP and SigLIP."""

    names = Names(("layer_norm1", "layer_norm2"), "self_attn", ((), ()))


_HALVES: dict[str, type[_Halves]] = {
    **dict.fromkeys(("vit", "deit", "beit"), VitHalves),  # of BEiT the names alone are used
    **dict.fromkeys(("dinov2", "dinov2_with_registers", "dinov3_vit"), DinoHalves),
    **dict.fromkeys(("clip", "siglip"), ClipHalves),
}


def _scale(attn: Any) -> float:
    return float(attn.scaling if hasattr(attn, "scaling") else attn.scale)


def attended(attn: Any, x: Tensor, bias: Tensor | None, rope: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What transformers' attention computes of x (batch, tokens, dim), by its own functions; and q, k.

    q and k, (batch, heads, tokens, head_dim), are turned, if there is a `rope`.
    """
    library: Any = sys.modules[original_class(attn).__module__]
    makers, width = (attn.q_proj, attn.k_proj, attn.v_proj), attn.head_dim
    q, k, v = (maker(x).unflatten(-1, (maker.out_features // width, width)).transpose(1, 2) for maker in makers)
    if rope is not None:
        q, k = library.apply_rotary_pos_emb(q, k, *rope)
    run = library.ALL_ATTENTION_FUNCTIONS.get_interface(
        attn.config._attn_implementation, library.eager_attention_forward
    )
    dropout = getattr(attn, "attention_dropout", None) or getattr(attn, "dropout", 0.0)
    options = {"scaling": _scale(attn), "dropout": dropout if attn.training else 0.0, "is_causal": False}
    y, _ = run(attn, q, k, v, bias, **options)
    return _out(attn)(y.flatten(2)), q, k


def turned(position_embeddings: tuple[Tensor, Tensor], carried: Carried | None) -> tuple[Tensor, Tensor]:
    """How the tokens that are left turn, cos and sin, of how all positions do; a fused token turns by nothing."""
    if carried is None:
        return position_embeddings
    cos, sin = position_embeddings
    sin, cos = rope_of(torch.cat([sin, cos], dim=-1), carried.own).chunk(2, dim=-1)
    return cos, sin


class HfReader:
    """Mixin: a tower inside which tokens leave."""

    plan: Plan
    config: Any

    def forward(self, pixel_values: Tensor, *args: Any, **options: Any) -> Any:
        """As transformers' own; if the plan restores them, every position has a token again, in all that it gives.

        Raises:
            PlanError: a prior over positions is for a grid of another shape than these images have.
            UnsupportedModelError: an attention mask is given; attention maps are asked for, or hidden states where
                positions are not restored.
        """
        by_name = inspect.signature(super().forward).bind(pixel_values, *args, **options) if args else None  # type: ignore[misc]
        refuse_masks((options if by_name is None else by_name.arguments).get("attention_mask"))
        restore = self.plan.restore
        shows = self._asked("output_hidden_states", options) or hasattr(self, "out_features")
        if self._asked("output_attentions", options):
            raise UnsupportedModelError(
                "output_attentions=True: tokens leave inside this model, so its attention maps are of fewer and fewer "
                "tokens; ask the dense model, or prune with tokens=1.0"
            )
        if shows and not restore:
            raise UnsupportedModelError(
                f"{'feature maps' if hasattr(self, 'out_features') else 'output_hidden_states=True'}: tokens leave "
                "inside this model, so its blocks give fewer than there are positions; prune with "
                "TokenOptions(restore=True), or with tokens=1.0"
            )
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        check_grid(self.plan, size, _grid_of(pair(self.config.patch_size), size))
        way = Way(unwrap(_listed_blocks(self)[-1]), restore, shows)  # type: ignore[arg-type]
        return super().forward(pixel_values, *args, journey=way, **options)  # type: ignore[misc]

    def _asked(self, name: str, options: Mapping[str, Any]) -> bool:
        given = options.get(name)
        found = getattr(self.config, name, False) if given is None else given
        return found is not None and found is not False
