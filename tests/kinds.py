"""Tiny real timm models of every supported kind, with randomised parameters: at initialisation biases are 0 and layer
scales equal, which would hide wrong slices."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention, GluMlp, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.nest import Nest
from timm.models.pit import PoolingVisionTransformer
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from timm.models.vision_transformer_sam import VisionTransformerSAM
from timm.models.volo import VOLO
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import swin_transformer as torchvision_swin
from torchvision.models import vision_transformer as torchvision_vit

SIZE, CLASSES, DEPTH, HEADS, DIM = 32, 7, 4, 4, 48
BASE: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 8,
    "embed_dim": DIM,
    "depth": DEPTH,
    "num_heads": HEADS,
    "num_classes": CLASSES,
}

# Of models whose stages differ in width and resolution: 16 x 16 tokens, then 8 x 8.
STAGED: dict[str, Any] = {
    "img_size": (SIZE, SIZE),
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "num_classes": CLASSES,
}
# 16 x 16 tokens in mask units of 4 x 4, then 8 x 8 in units of 2 x 2, and in all at once.
HIERA_STAGES: dict[str, Any] = {
    "patch_kernel": (3, 3),
    "patch_stride": (2, 2),
    "patch_padding": (1, 1),
    "embed_dim": 16,
    "num_heads": 2,
    "stages": (1, 3),
    "q_pool": 1,
    "global_pos_size": (4, 4),
    "num_classes": CLASSES,
}
HIERA: dict[str, Any] = HIERA_STAGES | {
    "img_size": (SIZE, SIZE),
    "mask_unit_size": (4, 4),
    "mask_unit_attn": (True, False),
}


class GatedAttention(Attention):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, gated=True)


def _vit(**kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: VisionTransformer(**(BASE | kwargs))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "vit": _vit(),
    "deit_distilled": lambda: VisionTransformerDistilled(**BASE),
    "deit3_layer_scale": _vit(init_values=1e-3, no_embed_class=True),
    "registers": _vit(reg_tokens=4),
    "registers_without_class": _vit(reg_tokens=2, class_token=False, global_pool="avg"),
    "average_pool": _vit(class_token=False, global_pool="avg"),
    "attention_pool": _vit(class_token=False, global_pool="map"),
    "clip_norm_pre": _vit(pre_norm=True),
    "qk_norm": _vit(qk_norm=True),
    "beit3_scale_norms": _vit(scale_attn_norm=True, scale_mlp_norm=True),
    "rms_norms": _vit(norm_layer=RmsNorm, scale_attn_norm=True, scale_mlp_norm=True, qk_norm=True),
    "glu": _vit(mlp_layer=GluMlp),
    "swiglu_packed_normed": _vit(mlp_layer=SwiGLUPacked, scale_mlp_norm=True),
    "swiglu": _vit(mlp_layer=SwiGLU),
    "swiglu_normed": _vit(mlp_layer=SwiGLU, scale_mlp_norm=True),
    "no_biases": _vit(qkv_bias=False, proj_bias=False),
    "any_size": _vit(dynamic_img_size=True),
}
if "gated" in inspect.signature(Attention).parameters:  # the oldest timm we support has no gate
    KINDS["gated"] = _vit(attn_layer=GatedAttention)
# Whose tokens cannot leave: most are bound to their places.
BOUND_KINDS: dict[str, Callable[[], nn.Module]] = {
    "swin": lambda: SwinTransformer(**STAGED, window_size=4, drop_path_rate=0.1),
    "swin_filled_up": lambda: SwinTransformer(**STAGED, window_size=(3, 5), qkv_bias=False),
    "swin_v2": lambda: SwinTransformerV2(**STAGED, window_size=4),
    "swin_v2_cr": lambda: SwinTransformerV2Cr(**STAGED, window_size=4, extra_norm_stage=True),
    "beit": lambda: Beit(**BASE, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=1e-5),
    "beit_swiglu": lambda: Beit(**BASE, use_rel_pos_bias=True, swiglu_mlp=True, scale_mlp=True, global_pool="token"),
    "relpos_mlp": lambda: VisionTransformerRelPos(**BASE, qk_norm=True, fc_norm=True),
    "relpos_table": lambda: VisionTransformerRelPos(
        **BASE, rel_pos_type="bias", class_token=True, block_fn=ResPostRelPosBlock
    ),
    "parallel": _vit(block_fn=ParallelThingsBlock, depth=2, init_values=1e-3),
    "sam": lambda: VisionTransformerSAM(
        **(BASE | {"patch_size": 4}), use_rel_pos=True, window_size=3, global_attn_indexes=(1, 3), neck_chans=16
    ),
    "sam_rope": lambda: VisionTransformerSAM(
        **(BASE | {"patch_size": 4}),
        use_rope=True,
        window_size=4,
        global_attn_indexes=(3,),
        qk_norm=True,
        pre_norm=True,
        init_values=1e-3,
        neck_chans=0,
        head_hidden_size=24,
    ),
    "hiera": lambda: Hiera(**HIERA, init_values=1e-3),
    "hiera_abs_win": lambda: Hiera(**HIERA, use_expand_proj=False, abs_win_pos_embed=True, drop_path_rate=0.1),
    "hieradet": lambda: HieraDet(**HIERA_STAGES, window_spec=(4, 3), global_att_blocks=(3,), init_values=1e-3),
    "cait": lambda: Cait(**(BASE | {"depth": 2}), qkv_bias=False),
    "fused": _vit(block_fn=ParallelScalingBlock, init_values=1e-3),
    "pit": lambda: PoolingVisionTransformer(
        img_size=SIZE, patch_size=4, stride=3, base_dims=[8, 8], depth=[2, 2], heads=[2, 4], num_classes=CLASSES
    ),
}
if not hasattr(ParallelScalingBlock(8, 1), "qkv_bias"):  # older timm's puts its bias in the wrong place
    BOUND_KINDS["fused_without_bias"] = _vit(
        block_fn=ParallelScalingBlock, qkv_bias=False, qk_norm=True, norm_layer=RmsNorm
    )


def _created(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    """A model that knows what it was created of, and at which size."""
    overlay = {"input_size": (3, SIZE, SIZE)}
    return lambda: timm.create_model(name, num_classes=CLASSES, pretrained_cfg_overlay=overlay, **kwargs)


_TWO_STAGES: dict[str, Any] = {"embed_dims": (16, 32), "num_heads": (2, 4), "depths": (2, 2)}
_MVIT = MultiScaleVitCfg(
    depths=(1, 2, 1),
    embed_dim=(16, 32, 64),
    num_heads=(1, 2, 4),
    use_cls_token=True,
    stride_q=((1, 1), (2, 2), (2, 2)),
)
# Whose attention is anything, and whose MLPs are timm's; some are not of timm's `create_model`.
MLP_KINDS: dict[str, Callable[[], nn.Module]] = {
    "pvt_v2": _created("pvt_v2_b2_li", **_TWO_STAGES, mlp_ratios=(4, 4), sr_ratios=(2, 1)),
    "tnt": _created(
        "tnt_s_patch16_224",
        **{"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "inner_dim": 8, "depth": 2},
        **{"num_heads_inner": 2, "num_heads_outer": 4, "drop_path_rate": 0.1},
    ),
    "crossvit": _created(
        "crossvit_9_240",
        **{"img_size": SIZE, "img_scale": (1.0, 0.75), "patch_size": (8, 12), "embed_dim": (16, 32)},
        **{"depth": ((1, 2, 0), (1, 1, 0)), "num_heads": (2, 4)},
    ),
    "volo": lambda: VOLO(
        **{"img_size": SIZE, "patch_size": 4, "stem_hidden_dim": 8, "num_classes": CLASSES},
        **{"layers": (1, 2, 1, 1), "embed_dims": (16, 32, 32, 32), "num_heads": (2, 4, 4, 4)},
    ),
    "convit": _created(
        "convit_tiny", img_size=SIZE, patch_size=8, embed_dim=12, num_heads=4, depth=4, local_up_to_layer=2
    ),
    "mvitv2": lambda: MultiScaleVit(_MVIT, img_size=SIZE, num_classes=CLASSES),
    "davit": _created("davit_tiny", **_TWO_STAGES, window_size=3),
    "twins": _created("twins_svt_small", **_TWO_STAGES, img_size=SIZE, mlp_ratios=(4, 4), sr_ratios=(2, 1), wss=(3, 3)),
    "xcit": _created("xcit_nano_12_p8_224", img_size=SIZE, embed_dim=32, depth=3, cls_attn_layers=1),
    "nest": lambda: Nest(**_TWO_STAGES, img_size=SIZE, num_levels=2, num_classes=CLASSES),
}
if timm.is_model("deepseek_vit_412m"):  # newer timm only, as its like
    _SMALL: dict[str, Any] = {"img_size": SIZE, "patch_size": 4, "embed_dim": 32, "num_heads": 4, "depth": 3}
    MLP_KINDS["qwen3"] = _created("qwen3_vit_88m_merge", **_SMALL, pos_embed_grid_size=6, rope_temperature=4.0)
    MLP_KINDS["deepseek"] = _created("deepseek_vit_412m", **_SMALL, rope_temperature=4.0)
    MLP_KINDS["gemma4"] = _created(
        "gemma4_vit_167m_enc",
        **_SMALL,
        **{"head_dim": 8, "intermediate_size": 96, "position_embedding_size": 16},
        **{"pooling_kernel_size": 2, "use_clipped_linears": True},
    )

_TORCHVISION_BASE = {
    **{"image_size": SIZE, "patch_size": 8, "num_classes": CLASSES},
    **{"num_layers": DEPTH, "num_heads": HEADS, "hidden_dim": DIM, "mlp_dim": 96},
}
_TORCHVISION_STAGED = {
    **{"patch_size": [2, 2], "embed_dim": 16, "depths": [2, 1, 1], "num_heads": [2, 4, 4], "window_size": [4, 4]},
    "num_classes": CLASSES,
}
TORCHVISION_KINDS: dict[str, Callable[..., nn.Module]] = {
    "vit": lambda **options: torchvision_vit.VisionTransformer(**(_TORCHVISION_BASE | options)),
    "swin": lambda **options: torchvision_swin.SwinTransformer(**(_TORCHVISION_STAGED | options)),
    "swin_v2": lambda **options: torchvision_swin.SwinTransformer(
        **(_TORCHVISION_STAGED | options),
        block=torchvision_swin.SwinTransformerBlockV2,
        downsample_layer=torchvision_swin.PatchMergingV2,
    ),
}

POST_NORM = _vit(block_fn=ResPostBlock, init_values=1e-5)


def _eva(**kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: Eva(**(BASE | kwargs))


# Rotary bases are small, so that neighbours turn differently and a wrong table shows.
_ROPE: dict[str, Any] = {"use_rot_pos_emb": True, "use_abs_pos_emb": False, "rope_temperature": 4.0}
_CLASS: dict[str, Any] = {"attn_type": "rope", "global_pool": "token", "init_values": 1e-3, "rope_grid_indexing": "xy"}
_SPLIT: dict[str, Any] = {"qkv_fused": False, "swiglu_mlp": True, "global_pool": "token"}
_DINOV3: dict[str, Any] = {"rope_type": "dinov3", "rope_rotate_half": True, "dynamic_img_size": True}
EVA_KINDS: dict[str, Callable[[], nn.Module]] = {
    "eva02": _eva(**(_ROPE | {"use_abs_pos_emb": True}), swiglu_mlp=True, ref_feat_shape=(3, 3)),
    "dinov3": _eva(**_ROPE, **_DINOV3, num_reg_tokens=4, init_values=1e-3, use_fc_norm=False),
    "rope_mixed": _eva(**_ROPE, **_CLASS, rope_type="mixed"),
    "eva02_clip": _eva(**_ROPE, **_SPLIT, scale_mlp=True, scale_attn_inner=True),
    "dinov3_swiglu": _eva(**_ROPE, **_DINOV3, num_reg_tokens=2, swiglu_mlp=True, swiglu_align_to=8, qkv_bias=False),
    "rope": _eva(**_ROPE, **_CLASS, use_fc_norm=False),
    "perception_encoder": _eva(
        **(_ROPE | {"use_abs_pos_emb": True}),
        attn_type="rope",
        global_pool="map",
        use_pre_transformer_norm=True,
        rope_grid_offset=1.0,
        attn_pool_num_heads=2,
    ),
    "eva_giant": _eva(class_token=False),
}
if "num_kv_heads" in inspect.signature(Eva).parameters:  # newer timm only
    EVA_KINDS["sapiens2"] = _eva(
        **(_ROPE | _SPLIT | {"attn_type": "rope", "init_values": 1.0, "norm_layer": RmsNorm}),
        num_kv_heads=(4, 2, 2, 4),
        qk_norm=True,
        attn_only_layer_scale=True,
        num_reg_tokens=2,
    )


def _naflex(**kwargs: Any) -> Callable[[], nn.Module]:
    options = {name: value for name, value in BASE.items() if name != "img_size"}
    return lambda: NaFlexVit(**(options | {"pos_embed_grid_size": (4, 4)} | kwargs))


NAFLEX_KINDS: dict[str, Callable[[], nn.Module]] = {
    "naflex": _naflex(reg_tokens=2, init_values=1e-3, global_pool="avg", fc_norm=True),
    "naflex_factorized": _naflex(
        pos_embed="factorized", class_token=True, global_pool="token", qk_norm=True, embed_proj_type="conv"
    ),
    "naflex_map": _naflex(global_pool="map", act_layer="gelu_tanh", pos_embed_interp_mode="bilinear", pre_norm=True),
    "naflex_rope": _naflex(
        rope_type="axial", rope_temperature=4.0, pos_embed="none", class_token=True, global_pool="token"
    ),
}
if "use_key_only_attn_mask" in NaFlexVitCfg.__dataclass_fields__:  # older timm's own cannot take batches of patches
    NAFLEX_KINDS["naflex_mixed"] = _naflex(rope_type="mixed", rope_temperature=4.0, swiglu_mlp=True, global_pool="avg")
EVA_POST_NORM = _eva(use_post_norm=True, global_pool="token")


def make(kind: str = "vit", seed: int = 0) -> nn.Module:
    """A randomised model of that kind, in eval mode."""
    return randomised((KINDS | BOUND_KINDS | MLP_KINDS)[kind](), seed)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            mean, std = (0.0, 0.12) if parameter.ndim > 1 else (0.4, 0.3)
            parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(count: int = 6, size: int = SIZE, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def counted_macs(model: nn.Module, height: int = SIZE, width: int | None = None) -> int:
    """MACs of one image in eval mode by torch's own counter, which cannot see into every fused attention (2.14)."""
    device = next(model.parameters()).device
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, height, width or height, device=device))
    return int(counter.get_total_flops() // 2)


# Beside each of these another kind goes through the same code every day.
NOT_DAILY = ("registers_without_class", "clip_norm_pre", "qk_norm", "beit3_scale_norms", "swiglu_packed_normed")
NOT_DAILY += ("swiglu_normed", "no_biases", "swin_filled_up", "beit", "relpos_table", "sam_rope", "hiera_abs_win")
NOT_DAILY += ("fused_without_bias",)


def daily(kinds: Iterable[str]) -> list[Any]:
    """Parameters of a test: kinds, of which those that are much like another are for ``make test-slow``."""
    return [pytest.param(kind, marks=pytest.mark.slow) if kind in NOT_DAILY else kind for kind in kinds]


def everyday(first: Any, *others: Any) -> list[Any]:
    """Parameters of a test: the first in every run, the others for ``make test-slow``."""
    return [first, *(pytest.param(other, marks=pytest.mark.slow) for other in others)]
