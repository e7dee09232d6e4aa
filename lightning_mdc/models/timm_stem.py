"""The convolutional stems of timm's hybrids (what a `HybridEmbed` stands on) as lists of sizes and back, through a
closed table. What timm's hybrids have in common is constant here: a stem built otherwise does not come back equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from timm.layers import HybridEmbed, StdConv2dSame
from timm.models import FeatureListNet
from timm.models.resnet import resnet50d
from timm.models.resnetv2 import ResNetV2, create_resnetv2_stem
from timm.models.vision_transformer_hybrid import ConvStem
from timm.models.vitamin import MbConvStages, VitCfg
from torch import nn

from lightning_mdc.errors import ArtifactError

_WEIGHT_STANDARDISED = {"stem_type": "same", "preact": False, "conv_layer": partial(StdConv2dSame, eps=1e-8)}


def _resnet_v2(in_chans: int, layers: list[int]) -> nn.Module:
    """ResNet-26 and -50 as in the ViT paper (arXiv 2010.11929)."""
    return ResNetV2(layers, in_chans=in_chans, num_classes=0, global_pool="", **_WEIGHT_STANDARDISED)


def _resnet_v2_stem(in_chans: int) -> nn.Module:
    return create_resnetv2_stem(in_chans, **_WEIGHT_STANDARDISED)


def _resnet_d(in_chans: int, layers: list[int]) -> nn.Module:
    """ResNet-D's first stages; resnet26d and resnet50d differ in their number of layers only."""
    return resnet50d(in_chans=in_chans, layers=layers, features_only=True, out_indices=[len(layers)])


def _conv_stem(in_chans: int, channels: list[int], kernel_size: list[int], stride: list[int]) -> nn.Module:
    """MobileCLIP's (arXiv 2311.17049)."""
    return ConvStem(in_chans, len(channels), channels, kernel_size, stride, padding=0, act_layer=nn.GELU)


def _mb_conv(in_chans: int, layers: list[int], channels: list[int]) -> nn.Module:
    """ViTamin's (arXiv 2404.02132); the first of `channels` are the stem's, the last the embedding's."""
    stem_width, *embed_dim = channels
    return MbConvStages(
        VitCfg(embed_dim=tuple(embed_dim), depths=tuple(layers), stem_width=stem_width), in_chans=in_chans
    )


def _resnet_d_sizes(backbone: Any) -> dict[str, list[int]]:
    return {"layers": [len(stage) for name, stage in backbone.items() if name.startswith("layer")]}


def _conv_stem_sizes(backbone: Any) -> dict[str, list[int]]:
    convs = [layer.conv for layer in backbone]
    return {
        "channels": [conv.out_channels for conv in convs],
        "kernel_size": [conv.kernel_size[0] for conv in convs],
        "stride": [conv.stride[0] for conv in convs],
    }


def _mb_conv_sizes(backbone: Any) -> dict[str, list[int]]:
    stages = backbone.stages
    channels = [backbone.stem.out_chs, *(stage[-1].out_chs for stage in stages), backbone.pool.proj.out_channels]
    return {"layers": [len(stage) for stage in stages], "channels": channels}


# Class of the backbone, its sizes, and how it is made of in_chans and them.
_STEMS: dict[str, tuple[type[nn.Module], Callable[[Any], dict[str, list[int]]], Callable[..., nn.Module]]] = {
    "ResNetV2": (ResNetV2, lambda backbone: {"layers": [len(stage.blocks) for stage in backbone.stages]}, _resnet_v2),
    "ResNetV2.stem": (nn.Sequential, lambda _: {}, _resnet_v2_stem),
    "ResNetD": (FeatureListNet, _resnet_d_sizes, _resnet_d),
    "ConvStem": (ConvStem, _conv_stem_sizes, _conv_stem),
    "MbConvStages": (MbConvStages, _mb_conv_sizes, _mb_conv),
}


def describe_stem(embed: HybridEmbed) -> dict[str, Any]:
    """What `build_stem` makes it from again.

    Raises:
        ArtifactError: its backbone is of no class we know.
    """
    kind = type(embed.backbone)
    for name, (known, sizes, _) in _STEMS.items():
        if kind is known:
            return {"class": name, "proj": isinstance(embed.proj, nn.Conv2d), "sizes": sizes(embed.backbone)}
    raise ArtifactError(
        f"patch_embed.backbone is a {kind.__module__}.{kind.__qualname__}; known are {', '.join(_STEMS)}"
    )


def check_stem(stem: Any, num_tensors: int | None = None) -> None:
    """Whether `build_stem` may try: a spec of the right form, of no more layers than there are tensors in the file.

    Raises:
        ArtifactError: it may not.
    """
    fields = isinstance(stem, dict) and set(stem) == {"class", "proj", "sizes"} and isinstance(stem["proj"], bool)
    if not fields or stem["class"] not in list(_STEMS):
        raise ArtifactError(f"constructor field stem={stem!r:.80}: expected proj, sizes and one of {', '.join(_STEMS)}")
    sizes = stem["sizes"]
    if not isinstance(sizes, dict) or not all(
        isinstance(values, list) and all(type(value) is int and 0 < value <= 65536 for value in values)
        for values in sizes.values()
    ):
        raise ArtifactError(f"constructor field stem.sizes={sizes!r:.80}: expected lists of positive sizes")
    layers = sum(sizes.get("layers", []))
    if num_tensors is not None and layers > num_tensors:
        raise ArtifactError(f"constructor field stem: {layers} layers do not fit the {num_tensors} tensors there are")


def build_stem(stem: Mapping[str, Any], in_chans: int) -> Callable[..., HybridEmbed]:
    """The constructor of a patch embedding on a new backbone."""
    make = _STEMS[stem["class"]][2]
    return partial(HybridEmbed, backbone=make(in_chans, **stem["sizes"]), proj=stem["proj"])
