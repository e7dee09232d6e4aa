"""T2T-ViT (Yuan et al. 2021, arXiv 2101.11986) for timm's registry, and its family.

The backbone is timm's `VisionTransformer`; its patch embedding is replaced by the tokens-to-token module of the paper's
section 3.1. Importing this file registers ``t2t_vit_7`` to ``t2t_vit_24`` and ``t2t_vit_t_14`` to ``t2t_vit_t_24``.
Weight files of the authors load unchanged: `T2TVisionTransformer` knows their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lightning_mdc.errors import ArtifactError, UnsupportedModelError
from lightning_mdc.models.compiled import unwrap
from lightning_mdc.models.timm_constructor import build, describe, look_up
from lightning_mdc.models.timm_vit import TimmVisionTransformer

STRIDES = (4, 2, 2)  # of the three soft splits
PATCH_SIZE = math.prod(STRIDES)
DROPOUT = 0.1  # inside the performer layers, in training


# --- the tokens-to-token module ---------------------------------------------------------------------------------------


def random_features(x: Tensor, w: Tensor) -> Tensor:
    """Positive random features of the softmax kernel: ``exp(w x - |x|^2 / 2) / sqrt(m)``.

    Choromanski et al., "Rethinking Attention with Performers" (arXiv 2009.14794), lemma 1.
    x: (batch, tokens, dim); w: (m, dim). Returns (batch, tokens, m).
    """
    return torch.exp(x @ w.T - x.square().sum(dim=-1, keepdim=True) / 2) / math.sqrt(w.shape[0])


def performer_attention(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Attention in linear time: ``y_t = phi(q_t) . sum_s phi(k_s) v_s / (phi(q_t) . sum_s phi(k_s))``.

    q, k, v: (batch, tokens, dim); w: (m, dim). Returns (batch, tokens, dim) in the precision of q.
    """
    # Features reach e^16 and are summed over thousands of tokens: half precision has neither the range nor the digits,
    # whatever autocast asks for.
    wide = torch.promote_types(q.dtype, torch.float32)
    with _autocast_off(q.device.type):
        phi_q, phi_k = (random_features(x.to(wide), w.to(wide)) for x in (q, k))
        kv = phi_k.transpose(1, 2) @ v.to(wide)  # (batch, m, dim)
        normaliser = phi_q @ phi_k.sum(dim=1).unsqueeze(-1)  # (batch, tokens, 1)
        y = phi_q @ kv / (normaliser + 1e-8)
    return y.to(q.dtype)


def _autocast_off(device_type: str) -> AbstractContextManager[Any]:
    # Not every device has autocast: the meta device, on which costs are checked, has none.
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class PerformerLayer(nn.Module):
    """A token layer with `performer_attention`. The residual is v, as the input has another width than the output."""

    def __init__(self, in_dim: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(in_dim, **dd)
        self.kqv = nn.Linear(in_dim, 3 * dim, **dd)
        # The random directions are drawn once and kept with the weights.
        self.w = nn.Parameter(torch.empty(dim // 2, dim, **dd), requires_grad=False)
        self.proj = nn.Linear(dim, dim, **dd)
        self.dropout = nn.Dropout(DROPOUT)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = nn.Sequential(nn.Linear(dim, dim, **dd), nn.GELU(), nn.Linear(dim, dim, **dd), nn.Dropout(DROPOUT))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the random directions: orthogonal rows of norm sqrt(m). The layers inside have a method of their own."""
        # In single precision first: there is no QR decomposition in half.
        directions = nn.init.orthogonal_(torch.empty(self.w.shape, device=self.w.device))
        with torch.no_grad():
            self.w.copy_(directions * math.sqrt(self.w.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, tokens, in_dim) -> (batch, tokens, dim)."""
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        x = v + self.dropout(self.proj(performer_attention(q, k, v, self.w)))
        return x + self.mlp(self.norm2(x))

    def macs(self, num_tokens: int) -> int:
        """MACs for that many tokens: Linear layers; w with q and k; phi(k) with v; phi(q) with both sums."""
        features, dim = self.w.shape
        return num_tokens * (_linear_weights(self) + 4 * features * dim + features)


class TokenAttention(nn.Module):
    """Ordinary attention with one head, from `in_dim` to `dim` channels. The residual is v."""

    def __init__(self, in_dim: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(in_dim, 3 * dim, bias=False, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.scale = in_dim**-0.5  # of the input's width, not of q's: so the published weights were trained

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, tokens, in_dim) -> (batch, tokens, dim)."""
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)  # (batch, 1 head, tokens, dim)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return v.squeeze(1) + self.proj(y.squeeze(1))


class TransformerLayer(nn.Module):
    """A token layer with `TokenAttention`."""

    def __init__(self, in_dim: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(in_dim, **dd)
        self.attn = TokenAttention(in_dim, dim, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, tokens, in_dim) -> (batch, tokens, dim)."""
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def macs(self, num_tokens: int) -> int:
        """MACs for that many tokens: Linear layers; the two products of attention."""
        return num_tokens * (_linear_weights(self) + 2 * num_tokens * self.attn.proj.in_features)


def _linear_weights(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


TOKEN_LAYERS: dict[str, type[PerformerLayer | TransformerLayer]] = {
    "performer": PerformerLayer,
    "transformer": TransformerLayer,
}


class TokensToToken(nn.Module):
    """Image to tokens in three overlapping soft splits with a token layer after the first two (section 3.1).

    Stands where timm's `PatchEmbed` would, with what the rest of timm asks a patch embedding for. A position of the
    result covers 16 x 16 pixels. The children have the names they have in the authors' weight files.
    """

    dynamic_img_pad = False

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = PATCH_SIZE,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        output_fmt: str = "NLC",
        token_layer: str = "performer",
        token_dim: int = 64,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if token_layer not in TOKEN_LAYERS:
            raise UnsupportedModelError(f"token_layer={token_layer!r}: expected one of {', '.join(TOKEN_LAYERS)}")
        if dynamic_img_pad:
            raise UnsupportedModelError(
                "dynamic_img_pad=True: soft splits overlap, so padding would change the tokens at the border; resize "
                f"images to a multiple of {PATCH_SIZE} and use dynamic_img_size=True"
            )
        dd = {"device": device, "dtype": dtype}
        layer = TOKEN_LAYERS[token_layer]
        self.token_layer = token_layer
        self.token_dim = token_dim
        self.strict_img_size = strict_img_size
        self.output_fmt = output_fmt
        self.soft_split0 = nn.Unfold(kernel_size=7, stride=STRIDES[0], padding=2)
        self.soft_split1 = nn.Unfold(kernel_size=3, stride=STRIDES[1], padding=1)
        self.soft_split2 = nn.Unfold(kernel_size=3, stride=STRIDES[2], padding=1)
        self.attention1 = layer(in_chans * 7 * 7, token_dim, **dd)
        self.attention2 = layer(token_dim * 3 * 3, token_dim, **dd)
        self.project = nn.Linear(token_dim * 3 * 3, embed_dim, bias=bias, **dd)
        self.patch_size = (PATCH_SIZE, PATCH_SIZE)
        self.set_input_size(img_size, patch_size)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Take images of that (height, width).

        Raises:
            UnsupportedModelError: a side is no multiple of 16, or another patch size is asked for.
        """
        if patch_size is not None and tuple(to_2tuple(patch_size)) != self.patch_size:
            raise UnsupportedModelError(
                f"patch_size={patch_size}: T2T-ViT's soft splits make one token of {PATCH_SIZE} x {PATCH_SIZE} pixels, "
                "no other size; leave patch_size out"
            )
        if img_size is not None:
            self.img_size = _splittable("img_size", img_size)
            self.grid_size = self.dynamic_feat_size(self.img_size)
            self.num_patches = self.grid_size[0] * self.grid_size[1]

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Grid of tokens for images of that (height, width)."""
        return img_size[0] // PATCH_SIZE, img_size[1] // PATCH_SIZE

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per token and side."""
        return PATCH_SIZE if as_scalar else self.patch_size

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, channels, height, width) -> (batch, tokens, embed_dim), or as a map for output_fmt="NHWC".

        Raises:
            UnsupportedModelError: images of another size than the model was made for.
        """
        height, width = x.shape[-2:]
        if self.strict_img_size and (height, width) != self.img_size:
            raise UnsupportedModelError(
                f"images of {height}x{width}: this T2T-ViT takes {self.img_size[0]}x{self.img_size[1]}; resize them, "
                "create the model with dynamic_img_size=True, or call model.set_input_size first"
            )
        if not self.strict_img_size:
            _splittable("images", (height, width))
        x = self.attention1(self.soft_split0(x).transpose(1, 2))  # (batch, height/4 * width/4, token_dim)
        x = self.soft_split1(_as_map(x, height // 4)).transpose(1, 2)
        x = self.attention2(x)  # (batch, height/8 * width/8, token_dim)
        x = self.soft_split2(_as_map(x, height // 8)).transpose(1, 2)
        x = self.project(x)  # (batch, height/16 * width/16, embed_dim)
        return x.unflatten(1, self.dynamic_feat_size((height, width))) if self.output_fmt == "NHWC" else x

    def macs(self, img_size: tuple[int, int]) -> int:
        """MACs of one image of that (height, width)."""
        area = img_size[0] * img_size[1]
        layers = self.attention1.macs(area // 4**2) + self.attention2.macs(area // 8**2)
        return layers + area // 16**2 * _linear_weights(self.project)

    def extra_repr(self) -> str:
        return f"token_layer={self.token_layer}, token_dim={self.token_dim}, img_size={self.img_size}"


def _splittable(name: str, size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = to_2tuple(size)
    if height < PATCH_SIZE or width < PATCH_SIZE or height % PATCH_SIZE or width % PATCH_SIZE:
        nearest = " x ".join(str(max(1, round(side / PATCH_SIZE)) * PATCH_SIZE) for side in (height, width))
        raise UnsupportedModelError(
            f"{name}={height}x{width}: T2T-ViT splits images by {', '.join(map(str, STRIDES))} in turn, so both sides "
            f"must be multiples of {PATCH_SIZE}; use e.g. {nearest}"
        )
    return height, width


def _as_map(tokens: Tensor, height: int) -> Tensor:
    """(batch, height * width, dim) in row-major order -> (batch, dim, height, width)."""
    return tokens.transpose(1, 2).unflatten(-1, (height, -1))


# --- the model --------------------------------------------------------------------------------------------------------


def sinusoid(num_positions: int, dim: int) -> Tensor:
    """Position embedding of Vaswani et al. (arXiv 1706.03762, section 3.5): sin on even channels, cos on odd ones.

    Returns (1, num_positions, dim), fp32 on the CPU, computed in fp64.
    """
    position = torch.arange(num_positions, dtype=torch.float64, device="cpu")[:, None]
    channel = torch.arange(dim, dtype=torch.float64, device="cpu")
    angle = position / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()[None]


class T2TVisionTransformer(VisionTransformer):
    """timm's VisionTransformer on a `TokensToToken` embedding, with a frozen sinusoid over the flat positions.

    Takes the arguments of timm's class, and `token_layer` ("performer" or "transformer") with its width `token_dim`.
    Loads state dicts of its own and of the authors' code.
    """

    def __init__(self, *, token_layer: str = "performer", token_dim: int = 64, **kwargs: Any) -> None:
        super().__init__(embed_layer=partial(TokensToToken, token_layer=token_layer, token_dim=token_dim), **kwargs)
        self.in_chans = kwargs.get("in_chans", 3)  # the oldest timm we support does not tell
        if self.pos_embed is not None:
            self.pos_embed.requires_grad_(False)
            self._fill_pos_embed()  # timm fills nothing in with weight_init="skip"; this is no weight

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Weights as timm draws them, but the class token, and the sinusoid, as T2T-ViT has them."""
        super().init_weights(mode, needs_reset)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None:
            self._fill_pos_embed()

    def _fill_pos_embed(self) -> None:
        with torch.no_grad():
            self.pos_embed.copy_(sinusoid(*self.pos_embed.shape[1:]))

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """As `TokensToToken.set_input_size`; the position embedding is resampled."""
        frozen = self.pos_embed is not None and not self.pos_embed.requires_grad
        super().set_input_size(img_size, patch_size)
        if frozen:
            self.pos_embed.requires_grad_(False)  # the oldest timm we support makes a trainable one

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The way modules take older forms of their state: before any of it is looked at, children's included.
        own = {key.removeprefix(prefix): state_dict.pop(key) for key in [*state_dict] if key.startswith(prefix)}
        state_dict.update({f"{prefix}{key}": value for key, value in checkpoint_filter_fn(own, self).items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: T2TVisionTransformer) -> dict[str, Any]:
    """Weights by the authors' names under the model's, their positions resampled: as timm's models have it, too."""
    old, new = "tokens_to_token.", "patch_embed."
    named = {new + key.removeprefix(old) if key.startswith(old) else key: value for key, value in state_dict.items()}
    if "pos_embed" in named and model.pos_embed is not None:
        named["pos_embed"] = _resampled(named["pos_embed"], model)
    return named


def _resampled(pos_embed: Tensor, model: T2TVisionTransformer) -> Tensor:
    """A position embedding of another, square, grid on the model's grid; unchanged if it is of neither."""
    num_prefix_tokens = 0 if model.no_embed_class else model.num_prefix_tokens
    num_positions = pos_embed.shape[1] - num_prefix_tokens if pos_embed.ndim == 3 else 0
    square = num_positions > 0 and math.isqrt(num_positions) ** 2 == num_positions
    if not square or pos_embed.shape[1] == model.pos_embed.shape[1]:
        return pos_embed
    return resample_abs_pos_embed(
        pos_embed, new_size=model.patch_embed.grid_size, num_prefix_tokens=num_prefix_tokens, verbose=True
    )


# --- timm's registry --------------------------------------------------------------------------------------------------

_CFG = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "fixed_input_size": True,
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "classifier": "head",
}
# Table 1 of the paper: widths and heads by number of blocks.
_LITE = {"embed_dim": 256, "num_heads": 4, "mlp_ratio": 2.0}
_OF_14 = {"depth": 14, "embed_dim": 384, "num_heads": 6, "mlp_ratio": 3.0}
_OF_19 = {"depth": 19, "embed_dim": 448, "num_heads": 7, "mlp_ratio": 3.0}
_OF_24 = {"depth": 24, "embed_dim": 512, "num_heads": 8, "mlp_ratio": 3.0}
_ORDINARY = {"token_layer": "transformer"}  # attention in the token layers: T2T-ViT_t
_SIZES: dict[str, dict[str, Any]] = {
    "t2t_vit_7": _LITE | {"depth": 7},
    "t2t_vit_10": _LITE | {"depth": 10},
    "t2t_vit_12": _LITE | {"depth": 12},
    "t2t_vit_14": _OF_14,
    "t2t_vit_19": _OF_19,
    "t2t_vit_24": _OF_24,
    "t2t_vit_t_14": _OF_14 | _ORDINARY,
    "t2t_vit_t_19": _OF_19 | _ORDINARY,
    "t2t_vit_t_24": _OF_24 | _ORDINARY,
}

default_cfgs = generate_default_cfgs({name: dict(_CFG) for name in _SIZES})


def _entrypoint(name: str) -> Callable[..., T2TVisionTransformer]:
    def create(pretrained: bool = False, **kwargs: Any) -> T2TVisionTransformer:
        out_indices = kwargs.pop("out_indices", 3)
        return build_model_with_cfg(
            T2TVisionTransformer,
            name,
            pretrained,
            feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
            **({"qkv_bias": False, "norm_layer": nn.LayerNorm} | _SIZES[name] | kwargs),
        )

    create.__name__ = create.__qualname__ = name
    return register_model(create)


globals().update({name: _entrypoint(name) for name in _SIZES})


# --- the family -------------------------------------------------------------------------------------------------------

_OWN = ("token_layer", "token_dim")  # of a description, beside timm's


class T2TViT(TimmVisionTransformer):
    """The family of `T2TVisionTransformer`: timm's, but for the tokens-to-token module, whose units all stay."""

    name = "t2t_vit"
    description = (
        "timm VisionTransformer on T2T-ViT's tokens-to-token module (t2t_vit_7, 10, 12, 14, 19, 24; t2t_vit_t_14, 19, "
        "24; registered with timm by lightning_mdc.models)"
    )

    def accepts(self, module: nn.Module) -> bool:
        return isinstance(module, T2TVisionTransformer) and super().accepts(module)

    def embedding_macs(self, model: Any, size: tuple[int, int]) -> int:
        """In closed form: it is asked for at every pricing of a policy."""
        embed = unwrap(model.patch_embed)
        return embed.macs(size) if type(embed) is TokensToToken else super().embedding_macs(model, size)

    def describe(self, model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        spec = describe(model, sizes, embeddings=(TokensToToken,))
        embed = model.patch_embed
        own = {"class": "T2TVisionTransformer", "token_layer": embed.token_layer, "token_dim": embed.token_dim}
        return spec | own

    def check_spec(self, spec: Mapping[str, Any], tensors: Collection[str]) -> None:
        super().check_spec({key: value for key, value in spec.items() if key not in _OWN}, tensors)

    def build(self, spec: Mapping[str, Any]) -> nn.Module:
        timms = dict(spec)
        layer, token_dim = (timms.pop(key, None) for key in _OWN)
        look_up(TOKEN_LAYERS, layer, "token_layer")
        if type(token_dim) is not int or not 1 < token_dim <= 65536:
            raise ArtifactError(f"constructor field token_dim={token_dim!r:.80} is out of range")
        model = partial(T2TVisionTransformer, token_layer=layer, token_dim=token_dim)
        return build(timms, models={"T2TVisionTransformer": model})
