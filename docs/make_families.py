"""Writes README's and ``docs/models.md``'s table of what can be pruned, by asking models of each row: ``make docs``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import timm
import torch
import torchvision.models
from timm.layers import Attention
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn

from lightning_mdc.errors import UnsupportedModelError
from lightning_mdc.models import find_anatomy
from lightning_mdc.policy import DIMENSIONS, TOKENS

DOCS = Path(__file__).resolve().parent
PAGES = (DOCS.parent / "README.md", DOCS / "models.md")


class OwnAttention(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(2 * x)


class OwnMlp(nn.Module):
    def __init__(self, in_features: int, **options: object) -> None:
        super().__init__()
        self.layer = nn.Linear(in_features, in_features)


def vit(**options: object) -> Callable[[], nn.Module]:
    return lambda: VisionTransformer(depth=2, embed_dim=64, num_heads=2, **options)  # type: ignore[arg-type]


def post_norm_eva() -> nn.Module:
    return Eva(depth=2, embed_dim=64, num_heads=2, use_post_norm=True)


def hugging_face(model: str, config: str, **options: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers  # takes its time

        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
        return made

    return make


def torchvision_model(name: str) -> nn.Module:
    return torchvision.models.get_model(name)


# What a row says, and the models that it is true of: names of timm, or what makes one.
ROWS: Sequence[tuple[str, Sequence[str | Callable[[], nn.Module]]]] = (
    (
        "timm's ViT, DeiT (distilled too), DeiT-III, DINOv2, SigLIP, CLIP; register tokens, q/k norm, gated attention, "
        "GLU and SwiGLU MLPs, CNN stems",
        (
            *("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"),
            *("vit_small_patch14_dinov2", "vit_base_patch16_siglip_224", "vit_base_patch16_clip_224"),
            *("vit_small_patch14_reg4_dinov2", "vit_small_r26_s32_224", "vit_giant_patch14_dinov2"),
        ),
    ),
    ('T2T-ViT, ours: `timm.create_model("t2t_vit_14")` after `import lightning_mdc.models`', ("t2t_vit_14",)),
    (
        "timm's EVA-02, DINOv3, Perception Encoder, Sapiens2 and other ViTs with rotary positions",
        (
            *("eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_pe_core_tiny_patch16_384"),
            *("vit_small_patch16_rope_224", "vit_small_patch16_rope_mixed_224"),
            *timm.list_models("vit_base_patch16_sapiens2"),  # an older timm has none
        ),
    ),
    (
        "timm's NaFlexVit (tokens: of plain images)",
        ("naflexvit_base_patch16_gap", "naflexvit_base_patch16_radio_v3"),
    ),
    (
        "Hugging Face's ViT, DeiT, DINOv2 (with registers too), DINOv3, CLIP and SigLIP",
        tuple(
            hugging_face(*names)
            for names in (
                *(("ViTForImageClassification", "ViTConfig"), ("DeiTModel", "DeiTConfig")),
                *(("Dinov2Backbone", "Dinov2Config"), ("DINOv3ViTModel", "DINOv3ViTConfig")),
                ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig"),
                *(("CLIPVisionModel", "CLIPVisionConfig"), ("SiglipVisionModel", "SiglipVisionConfig")),
            )
        ),
    ),
    (
        "Hugging Face's BEiT and Swin",
        (
            hugging_face("BeitForImageClassification", "BeitConfig", use_relative_position_bias=True),
            hugging_face("SwinForImageClassification", "SwinConfig"),
        ),
    ),
    ("torchvision's ViT", (partial(torchvision_model, "vit_b_16"),)),
    ("ViTamin, a block with an MLP of its own", ("vitamin_small_224", vit(mlp_layer=OwnMlp))),
    (
        "post-norm blocks",
        (vit(block_fn=ResPostBlock), post_norm_eva),
    ),
    (
        "timm's and torchvision's Swin in all versions, both versions of SAM's encoder, Hiera, BEiT, ViTs with "
        "relative positions, PiT, attention and MLP at once (`*_xp_*`, `vit_pwee_*`)",
        (
            *(partial(torchvision_model, name) for name in ("swin_t", "swin_v2_t")),
            *("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"),
            *("beit_base_patch16_224", "vit_relpos_small_patch16_224", "pit_ti_224"),
            *("samvit_base_patch16_224", "sam2_hiera_tiny", "hiera_tiny_224"),
            "vit_base_patch16_xp_224",
        ),
    ),
    (
        "timm's CrossViT, the vision towers of Qwen3-VL and DeepSeek",
        (
            "crossvit_tiny_240",
            *timm.list_models(["qwen3_vit_88m*", "deepseek_vit_412m_enc"]),  # an older timm has none
        ),
    ),
    (
        "timm's VOLO, ConViT, TNT, MViTv2, DaViT, Twins, PVTv2, Nest, XCiT, Gemma 4's vision tower",
        (
            *("volo_d1_224", "convit_tiny", "tnt_s_patch16_224", "mvitv2_tiny", "davit_tiny"),
            *("twins_svt_small", "pvt_v2_b0", "nest_tiny", "xcit_nano_12_p8_224"),
            *timm.list_models("gemma4_vit_167m_enc"),
        ),
    ),
    (
        "differential attention, a block with an attention of its own",
        ("vit_dlittle_patch16_reg1_gap_256", vit(attn_layer=OwnAttention)),
    ),
    (
        "timm's attentions side by side (`*_18x2_*`): each of them, and each MLP, counts as a block",
        ("vit_small_patch16_18x2_224",),
    ),
    ("CaiT: heads where the class token attends", ("cait_xxs24_224",)),
)


def answers(model: str | Callable[[], nn.Module]) -> tuple[str, ...]:
    """Whether the model can lose each dimension."""
    with torch.device("meta"):
        made = timm.create_model(model) if isinstance(model, str) else model()
    try:
        anatomy = find_anatomy(made)
    except UnsupportedModelError:
        return ("no",) * len(DIMENSIONS)
    cells = []
    for dimension in DIMENSIONS:
        units = anatomy.units(dimension) if dimension != TOKENS else ()
        some = "yes" if all(units) else "some blocks"
        cells.append(some if dimension in anatomy.dimensions else "no")
    return tuple(cells)


@cache
def table() -> str:
    """The table in Markdown. All models of a row have to give the same answers."""
    lines = [f"| model | {' | '.join(DIMENSIONS)} |", "|---" * (len(DIMENSIONS) + 1) + "|"]
    for words, models in ROWS:
        (cells,) = {answers(model) for model in models}
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(page: str) -> str:
    """The text of a page with the table of now."""
    heading = "## What it can prune\n\n"
    return re.sub(rf"(?<={heading})(\|.*\n)+", lambda _: table() + "\n", page)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_table(page.read_text()))
