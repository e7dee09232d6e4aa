"""transformers' own ViT, DeiT, DINOv2, DINOv3, CLIP and SigLIP, as models, classifiers and backbones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from tests.family_suite import FamilySuite
from tests.kinds import CLASSES, DEPTH, DIM, HEADS, SIZE, randomised

transformers = pytest.importorskip("transformers", minversion="5")

SIZES: dict[str, Any] = {
    "image_size": SIZE,
    "patch_size": 8,
    "hidden_size": DIM,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
}
WITH_MLP = SIZES | {"intermediate_size": 100}
# The rotary base is small, so that neighbours turn differently and a wrong table shows.
DINOV3 = WITH_MLP | {"num_register_tokens": 2, "rope_theta": 4.0, "pos_embed_rescale": None}  # drawn in training
STAGES = {"out_features": ["stage1", "stage2", "stage4"]}
TEXT = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": 9, "num_hidden_layers": 1}


def maker(model: str, config: str, classes: bool = False, **options: Any) -> Callable[..., Any]:
    def make(**more: Any) -> Any:
        labels = {"num_labels": CLASSES} if classes else {}
        return getattr(transformers, model)(getattr(transformers, config)(**(options | labels | more)))

    return make


def two_towers(of_vision: dict[str, Any]) -> dict[str, Any]:
    return {"vision_config": of_vision, "text_config": TEXT}


MODELS: dict[str, Callable[..., Any]] = {
    "vit": maker("ViTForImageClassification", "ViTConfig", classes=True, **WITH_MLP),
    "dinov3": maker("DINOv3ViTModel", "DINOv3ViTConfig", **DINOV3),
    "dinov2": maker("Dinov2Model", "Dinov2Config", **SIZES, mlp_ratio=2),
    "siglip": maker("SiglipVisionModel", "SiglipVisionConfig", **WITH_MLP),
    "clip_projection": maker("CLIPVisionModelWithProjection", "CLIPVisionConfig", **WITH_MLP, projection_dim=9),
    "vit_eager": maker("ViTForImageClassification", "ViTConfig", classes=True, **WITH_MLP, attn_implementation="eager"),
    "vit_model": maker("ViTModel", "ViTConfig", **WITH_MLP, qkv_bias=False),
    "deit": maker("DeiTForImageClassification", "DeiTConfig", classes=True, **WITH_MLP),
    "deit_model": maker("DeiTModel", "DeiTConfig", **WITH_MLP),
    "deit_distilled": maker("DeiTForImageClassificationWithTeacher", "DeiTConfig", classes=True, **WITH_MLP),
    "dinov2_classes": maker(
        "Dinov2ForImageClassification", "Dinov2Config", classes=True, **SIZES, mlp_ratio=2, use_swiglu_ffn=True
    ),
    "registers": maker("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **SIZES, mlp_ratio=2),
    "registers_classes": maker(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", classes=True, **SIZES, mlp_ratio=2
    ),
    "dinov3_gated": maker("DINOv3ViTModel", "DINOv3ViTConfig", **DINOV3, use_gated_mlp=True),
    "dinov3_eager": maker("DINOv3ViTModel", "DINOv3ViTConfig", **DINOV3, attn_implementation="eager"),
    "clip": maker("CLIPVisionModel", "CLIPVisionConfig", **WITH_MLP),
    "clip_classes": maker("CLIPForImageClassification", "CLIPConfig", classes=True, **two_towers(WITH_MLP)),
    "siglip_headless": maker("SiglipVisionModel", "SiglipVisionConfig", **WITH_MLP, vision_use_head=False),
    "siglip_classes": maker("SiglipForImageClassification", "SiglipConfig", classes=True, **two_towers(WITH_MLP)),
}
BEIT = WITH_MLP | {"drop_path_rate": 0.0, "layer_scale_init_value": 0.5}
SWIN: dict[str, Any] = {
    **{"image_size": SIZE, "patch_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    "drop_path_rate": 0.0,
}
BOUND: dict[str, Callable[..., Any]] = {
    "swin": maker("SwinForImageClassification", "SwinConfig", classes=True, **SWIN),
    "beit": maker("BeitForImageClassification", "BeitConfig", classes=True, **BEIT, use_relative_position_bias=True),
    "beit_shared": maker("BeitModel", "BeitConfig", **BEIT, use_shared_relative_position_bias=True),
    "swin_model": maker("SwinModel", "SwinConfig", **SWIN | {"window_size": 3}, attn_implementation="eager"),
}
MODELS |= BOUND
BACKBONES: dict[str, Callable[..., Any]] = {
    "dinov3": maker("DINOv3ViTBackbone", "DINOv3ViTConfig", **DINOV3, **STAGES),
    "dinov2": maker("Dinov2Backbone", "Dinov2Config", **SIZES, **STAGES, mlp_ratio=2),
    "registers": maker("Dinov2WithRegistersBackbone", "Dinov2WithRegistersConfig", **SIZES, **STAGES, mlp_ratio=2),
}
DAILY = ("vit", "dinov3", "swin", "beit")


def make(kind: str, **more: Any) -> Any:
    return randomised(MODELS[kind](**more))


def tower_of(model: Any) -> Any:
    """Which takes images and gives tokens."""
    return next(m for m in model.modules() if hasattr(m, "embeddings"))


# One without a pooler says all of its tokens, of which fewer are left than the suite's tests look for.
@pytest.mark.parametrize(
    "kind", [k if k in DAILY else pytest.param(k, marks=pytest.mark.slow) for k in MODELS if k != "siglip_headless"]
)
class TestHuggingFace(FamilySuite):
    @pytest.fixture
    def dense(self, kind: str) -> nn.Module:
        return make(kind)

    def features(self, model: nn.Module, x: Tensor) -> Tensor:
        features: Tensor = tower_of(model)(x).last_hidden_state
        return features
