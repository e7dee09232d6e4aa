"""T2T-ViT against numpy, against numbers from the authors' code, and through the whole of pruning."""

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.errors import ArtifactError, UnsupportedModelError
from lightning_mdc.models import find_anatomy
from lightning_mdc.models.t2t_vit import T2TViT, TokensToToken, performer_attention, sinusoid
from lightning_mdc.policy import default_stages
from tests.kinds import counted_macs

SIZE = 64
SMALL: dict[str, Any] = {"img_size": SIZE, "depth": 4, "embed_dim": 48, "num_heads": 4, "num_classes": 7}
KINDS = {"performer": "t2t_vit_14", "transformer": "t2t_vit_t_14"}
POLICY = mdc.Policy(heads=[0.5], neurons=[0.6], tokens=[0.7])
FROZEN = {
    "performer": ["pos_embed", "patch_embed.attention1.w", "patch_embed.attention2.w"],
    "transformer": ["pos_embed"],
}


def noise(shape: tuple[int, ...], seed: float) -> Tensor:
    """The same numbers everywhere, all distinct, of variance 1."""
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    return ((torch.sin(n * 12.9898 + seed) * 43758.5453).frac() * 1.7).reshape(shape).float()


def their_name(name: str) -> str:
    return name.replace("patch_embed.", "tokens_to_token.")


def filled(model: nn.Module) -> nn.Module:
    """`model`, in eval mode, with weights that depend on their names, in the authors' spelling, only."""
    state = {their_name(name): tensor for name, tensor in model.state_dict().items()}
    for i, (name, tensor) in enumerate(sorted(state.items())):
        if name != "pos_embed":
            scale = 0.2 if tensor.ndim == 1 else 1.0 if name.endswith(".w") else tensor.shape[-1] ** -0.5
            if "kqv" in name:
                scale *= 0.4  # features fall with e^(-|x|^2 / 2): larger ones would vanish beside the 1e-8
            tensor.copy_(noise(tensor.shape, i) * scale + ("norm" in name and name.endswith("weight")))
    return model.eval()


def make(kind: str = "performer", **options: Any) -> nn.Module:
    return filled(timm.create_model(KINDS[kind], **(SMALL | options)))


def images(count: int = 4, height: int = SIZE, width: int = SIZE) -> Tensor:
    return noise((count, 3, height, width), 0.5)


def planned(model: nn.Module) -> mdc.Plan:
    return mdc.make_plan(model, mdc.score(model, [images(8)], progress=False), POLICY)


# --- numbers ----------------------------------------------------------------------------------------------------------


def attention_by_loops(q: np.ndarray, k: np.ndarray, v: np.ndarray, w: np.ndarray) -> np.ndarray:
    """(tokens, dim) each: every pair of tokens for itself, with the kernel the random features stand for."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        half = (a @ a + b @ b) / 2
        return sum(math.exp(row @ a + row @ b - half) for row in w) / len(w)

    y = np.zeros_like(v)
    for t in range(len(q)):
        weights = [kernel(q[t], k[s]) for s in range(len(k))]
        y[t] = sum(weight * v[s] for s, weight in enumerate(weights)) / (sum(weights) + 1e-8)
    return y


def test_performer_attention_is_a_weighted_mean_over_pairs_of_tokens() -> None:
    q, k, v = (noise((2, 9, 6), seed) * 0.8 for seed in (1, 2, 3))
    w = noise((3, 6), 4) * math.sqrt(3)
    y = performer_attention(q, k, v, w)
    for b in range(2):
        expected = attention_by_loops(*(x[b].double().numpy() for x in (q, k, v)), w.double().numpy())
        np.testing.assert_allclose(y[b].numpy(), expected, rtol=2e-5, atol=1e-6)


class ByHand:
    """The tokens-to-token module in numpy, one image, fp64, window by window, from a state dict."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = {name: tensor.double().numpy() for name, tensor in state.items()}

    def __call__(self, image: np.ndarray) -> np.ndarray:
        _, height, width = image.shape
        x = self.layer("attention1", windows(image, 7, 4, 2))
        x = self.layer("attention2", windows(as_map(x, height // 4, width // 4), 3, 2, 1))
        return self.linear("project", windows(as_map(x, height // 8, width // 8), 3, 2, 1))

    def layer(self, name: str, x: np.ndarray) -> np.ndarray:
        x = self.norm(f"{name}.norm1", x)
        if f"{name}.w" in self.state:
            k, q, v = np.split(self.linear(f"{name}.kqv", x), 3, axis=1)
            x = v + self.linear(f"{name}.proj", attention_by_loops(q, k, v, self.state[f"{name}.w"]))
            first, second = f"{name}.mlp.0", f"{name}.mlp.2"
        else:
            q, k, v = np.split(self.linear(f"{name}.attn.qkv", x), 3, axis=1)
            weights = np.exp(q @ k.T / math.sqrt(x.shape[1]))  # of the layer's input
            y = weights / weights.sum(axis=1, keepdims=True) @ v
            x = v + self.linear(f"{name}.attn.proj", y)
            first, second = f"{name}.mlp.fc1", f"{name}.mlp.fc2"
        hidden = self.linear(first, self.norm(f"{name}.norm2", x))
        gelu = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
        return x + self.linear(second, gelu)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.state[f"{name}.weight"].T + self.state.get(f"{name}.bias", 0)

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]


def windows(image: np.ndarray, size: int, stride: int, padding: int) -> np.ndarray:
    """(channels, height, width) -> (windows, channels * size * size), row by row."""
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    rows = range(0, image.shape[1], stride)
    columns = range(0, image.shape[2], stride)
    return np.stack([padded[:, i : i + size, j : j + size].ravel() for i in rows for j in columns])


def as_map(x: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.stack([[x[i * width + j] for j in range(width)] for i in range(height)]).transpose(2, 0, 1)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_tokens_to_token_computes_what_the_paper_says(kind: str) -> None:
    module = filled(TokensToToken(img_size=(32, 48), embed_dim=20, token_layer=kind, token_dim=10))
    (image,) = images(1, 32, 48)
    expected = ByHand(module.state_dict())(image.double().numpy())
    assert expected.shape == (2 * 3, 20)
    np.testing.assert_allclose(module(image[None])[0].numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "logits"),
    [
        ("performer", [[0.713656, -0.361203, -1.670008], [0.622194, -0.338655, -1.659535]]),
        ("transformer", [[0.729531, 0.752205, -1.838128], [0.726500, 0.750889, -1.843106]]),
    ],
)
@torch.no_grad()
def test_logits_are_those_of_the_authors_code(kind: str, logits: list[list[float]]) -> None:
    # Printed by their code, with `noise` in its weights: 2 blocks of width 48, 4 heads, mlp_ratio 2, 3 classes.
    model = make(kind, depth=2, mlp_ratio=2.0, num_classes=3)
    torch.testing.assert_close(model(images(2)), torch.tensor(logits), rtol=0, atol=2e-5)


def test_positions_are_a_frozen_sinusoid() -> None:
    table = sinusoid(5, 6)
    for position in range(5):
        for channel in range(6):
            angle = position / 10000 ** (2 * (channel // 2) / 6)
            expected = math.cos(angle) if channel % 2 else math.sin(angle)
            assert table[0, position, channel].item() == pytest.approx(expected, abs=1e-7)
    for options in ({}, {"weight_init": "skip"}, {"img_size": (32, 96)}):
        model = timm.create_model("t2t_vit_7", **(SMALL | options))
        rows, columns = model.patch_embed.grid_size
        assert torch.equal(model.pos_embed, sinusoid(1 + rows * columns, 48))
        assert [name for name, p in model.named_parameters() if not p.requires_grad] == FROZEN["performer"]


def test_fresh_weights() -> None:
    model = timm.create_model("t2t_vit_7", **SMALL)
    layer = model.patch_embed.attention2
    before = layer.w.clone()
    torch.testing.assert_close(before @ before.T, 32 * torch.eye(32), rtol=1e-4, atol=1e-4)
    assert model.patch_embed.project.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.cls_token.std() > 0.01
    model.init_weights()
    assert not torch.equal(layer.w, before)
    assert torch.equal(model.pos_embed, sinusoid(17, 48))
    assert timm.create_model("t2t_vit_7", **SMALL).bfloat16().patch_embed.attention1.w.dtype == torch.bfloat16
    assert timm.create_model("t2t_vit_7", **SMALL, dtype=torch.float16).patch_embed.attention1.w.isfinite().all()


# Parameters as the authors' code has them.
PARAMETERS = {
    "t2t_vit_7": 4310222,
    "t2t_vit_10": 5889230,
    "t2t_vit_12": 6941902,
    "t2t_vit_14": 21545550,
    "t2t_vit_19": 39177422,
    "t2t_vit_24": 64105934,
    "t2t_vit_t_14": 21541070,
    "t2t_vit_t_19": 39172942,
    "t2t_vit_t_24": 64101454,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_size_is_registered_and_costs_what_is_counted(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert mdc.macs(model) == counted_macs(model, 224, 224)
    if name == "t2t_vit_14":
        assert mdc.macs(model) == 4783468544
    anatomy = find_anatomy(model)
    assert isinstance(anatomy.family, T2TViT)
    assert anatomy.dimensions == ("heads", "neurons", "tokens")
    settings = timm.data.resolve_model_data_config(model)
    assert (settings["crop_pct"], settings["interpolation"], settings["mean"][0]) == (0.9, "bicubic", 0.485)


@pytest.mark.parametrize(("depth", "stages"), [(14, (3, 7, 10)), (19, (4, 9, 14)), (24, (6, 12, 18))])
def test_a_budget_is_met_with_the_default_stages(depth: int, stages: tuple[int, ...]) -> None:
    assert default_stages(depth) == stages
    with torch.device("meta"):
        model = timm.create_model(f"t2t_vit_{depth}").eval()
    policy = mdc.uniform_policy(model, budget=0.6)
    assert len(policy.tokens) in (1, 3)
    assert 0.59 < mdc.policy_macs(model, policy) / mdc.macs(model) <= 0.6


# --- loading ----------------------------------------------------------------------------------------------------------


def their_file(model: nn.Module, path: Path, key: str = "state_dict_ema", prefix: str = "", **more: Any) -> Path:
    state = {prefix + their_name(name): tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, key: state} | more, path)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["state_dict_ema", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
@torch.no_grad()
def test_the_authors_files_load_unchanged(kind: str, key: str, prefix: str, tmp_path: Path) -> None:
    model = make(kind)
    other = {prefix + their_name(name): torch.zeros_like(t) for name, t in model.state_dict().items()}
    more = {"state_dict": other} if key == "state_dict_ema" else {}
    path = their_file(model, tmp_path / "81.5_T2T_ViT_14.pth.tar", key, prefix, **more)
    loaded = timm.create_model(KINDS[kind], checkpoint_path=str(path), **SMALL).eval()
    assert torch.equal(loaded(images()), model(images()))
    assert [name for name, p in loaded.named_parameters() if not p.requires_grad] == FROZEN[kind]
    again = timm.create_model(KINDS[kind], **SMALL).eval()
    again.load_state_dict(loaded.state_dict())  # as it is saved: under timm's names
    assert torch.equal(again(images()), model(images()))


def test_a_model_inside_another_module_takes_both_forms_too() -> None:
    model = make()
    outer = nn.ModuleDict({"student": make(), "teacher": model})
    state = {their_name(name): tensor + 1 for name, tensor in outer.state_dict().items()}
    outer.load_state_dict(state)
    assert list(outer.state_dict()) != list(state)
    assert torch.equal(model.patch_embed.project.weight, state["teacher.tokens_to_token.project.weight"])
    assert set(state) == {their_name(name) for name in outer.state_dict()}  # not changed under its owner's hands
    del state["teacher.tokens_to_token.attention1.w"]
    with pytest.raises(RuntimeError, match=r"Missing key.*patch_embed\.attention1\.w"):
        outer.load_state_dict(state)


def test_a_file_for_another_image_size_has_its_positions_resampled(tmp_path: Path) -> None:
    model = make()
    with torch.no_grad():
        model.pos_embed.copy_(noise((1, 17, 48), 9))
    path = their_file(model, tmp_path / "file.pth")
    for size, grid in ((96, (6, 6)), ((32, 128), (2, 8)), ((128, 64), (8, 4))):
        larger = timm.create_model("t2t_vit_14", **(SMALL | {"img_size": size}), checkpoint_path=str(path))
        if math.prod(grid) == 16:  # as many positions: taken for what they are
            assert torch.equal(larger.pos_embed, model.pos_embed)
        else:
            expected = resample_abs_pos_embed(model.pos_embed, new_size=list(grid), num_prefix_tokens=1)
            assert torch.equal(larger.pos_embed, expected)
        assert not larger.pos_embed.requires_grad
    odd = {name: t[:, :12] if name == "pos_embed" else t for name, t in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        make().load_state_dict(odd)


def test_a_file_with_other_classes_is_treated_as_by_timm(tmp_path: Path) -> None:
    path = str(their_file(make(), tmp_path / "file.pth"))
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.weight"):
        timm.create_model("t2t_vit_14", **(SMALL | {"num_classes": 3}), checkpoint_path=path)
    overlay = {"file": path, "num_classes": 7}
    options = SMALL | {"num_classes": 3}
    model = timm.create_model("t2t_vit_14", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    assert model.head.out_features == 3
    assert torch.equal(model.patch_embed.project.weight, make().patch_embed.project.weight)
    with pytest.raises(RuntimeError, match="No pretrained weights exist for t2t_vit_14"):
        timm.create_model("t2t_vit_14", pretrained=True, **SMALL)


# --- image sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 225}, r"img_size=225x225.*multiples of 16; use e\.g\. 224 x 224"),
        ({"img_size": (64, 8)}, "img_size=64x8.*64 x 16"),
        ({"patch_size": 8}, "patch_size=8"),
        ({"dynamic_img_pad": True}, "dynamic_img_pad=True.*dynamic_img_size=True"),
        ({"token_layer": "convolution"}, "token_layer='convolution'.*performer, transformer"),
    ],
)
def test_impossible_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        timm.create_model("t2t_vit_7", **(SMALL | options))


@torch.no_grad()
def test_images_of_another_size() -> None:
    model, any_size = make(), make(dynamic_img_size=True)
    assert torch.equal(any_size(images()), model(images()))
    with pytest.raises(UnsupportedModelError, match=r"images of 32x96.*set_input_size"):
        model(images(1, 32, 96))
    with pytest.raises(UnsupportedModelError, match="multiples of 16"):
        any_size(images(1, 40, 64))
    with pytest.raises(UnsupportedModelError, match="patch_size=8"):
        model.set_input_size(patch_size=8)
    model.set_input_size((32, 96))
    assert not model.pos_embed.requires_grad
    torch.testing.assert_close(model(images(2, 32, 96)), any_size(images(2, 32, 96)))
    assert mdc.macs(model) == counted_macs(model, 32, 96) == counted_macs(any_size, 32, 96)
    assert find_anatomy(model).grid == (2, 6)


def test_features_come_as_from_timms_own_models() -> None:
    features = timm.create_model("t2t_vit_14", features_only=True, out_indices=(1, 3), **SMALL)
    assert [tuple(x.shape) for x in features(images(2))] == [(2, 48, 4, 4)] * 2
    assert features.feature_info.reduction() == [16, 16]
    grey = timm.create_model("t2t_vit_14", in_chans=1, **SMALL)
    assert find_anatomy(grey).input_size == (1, SIZE, SIZE)
    _, (first, *_) = grey.forward_intermediates(images(2)[:, :1])
    assert first.shape == (2, 48, 4, 4)


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_performer_sums_are_not_halved_by_autocast(dtype: torch.dtype) -> None:
    q, k, v = (noise((1, 600, 16), seed) for seed in (1, 2, 3))
    w = torch.linalg.qr(noise((16, 8), 4)).Q.T * math.sqrt(8)
    k[:, :100] = w[0]  # features of e^4; 1e9 times what bfloat16 resolves, when summed with the others
    expected = performer_attention(q, k, v, w)
    with torch.autocast("cpu", dtype=dtype):
        assert (q @ k.transpose(1, 2)).dtype == dtype  # autocast is on, and would have had its way
        assert torch.equal(performer_attention(q, k, v, w), expected)
        halves = performer_attention(q.to(dtype), k.to(dtype), v.to(dtype), w)
    assert halves.dtype == dtype
    wide = performer_attention(*(x.to(dtype).float() for x in (q, k, v)), w)
    assert torch.equal(halves, wide.to(dtype))


def test_features_beyond_half_precision_stay_finite() -> None:
    w = nn.init.orthogonal_(torch.empty(32, 64)) * math.sqrt(32)
    x = w[:1].expand(3136, -1)[None]  # e^16 > 65504 in every token of a 224 x 224 image
    with torch.autocast("cpu", dtype=torch.float16):
        y = performer_attention(x.half(), x.half(), x.half(), w)
    torch.testing.assert_close(y, x.half())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast_and_half_models_agree_with_full_precision(kind: str, dtype: torch.dtype) -> None:
    model, x = make(kind), images()
    with torch.autocast("cpu", dtype=dtype):
        tokens, logits = model.patch_embed(x), model(x)
    assert tokens.dtype == logits.dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 0.01
    torch.testing.assert_close(logits.float(), model(x), rtol=0, atol=tolerance)
    half = copy.deepcopy(model).to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), model(x), rtol=0, atol=tolerance)
    double = copy.deepcopy(model).double()(x.double())
    torch.testing.assert_close(double.float(), model(x), rtol=1e-4, atol=1e-5)


def test_training_reaches_all_but_the_frozen() -> None:
    model = make(drop_path_rate=0.1).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images()).square().sum().backward()
    optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert still == FROZEN["performer"]
    assert model(images()).std(dim=0).any()  # dropout and drop path run


# --- pruning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_masked_equals_slim_and_both_cost_what_is_counted(kind: str) -> None:
    model, x = make(kind, drop_path_rate=0.1), images()
    dense = model(x)
    plan = planned(model)
    slim = mdc.slim(model, plan)
    with mdc.masked(model, plan):
        torch.testing.assert_close(model(x), slim(x), rtol=1e-4, atol=1e-5)
    everything = mdc.Policy(heads=[1.0], neurons=[1.0], tokens=POLICY.tokens)
    tokens_only = mdc.make_plan(model, mdc.score(model, criterion="random"), everything)
    with mdc.masked(model, tokens_only):  # masked heads and neurons are computed all the same, tokens do leave
        assert counted_macs(model, SIZE) == mdc.plan_macs(model, tokens_only) < mdc.macs(model)
    assert torch.equal(model(x), dense)
    assert mdc.macs(slim) == counted_macs(slim, SIZE) == mdc.policy_macs(model, POLICY) == mdc.plan_macs(model, plan)
    assert mdc.macs(model) == counted_macs(model, SIZE) > mdc.macs(slim)
    assert [name for name, p in slim.named_parameters() if not p.requires_grad] == FROZEN[kind]
    assert not torch.equal(slim(x), dense)


def test_pricing_does_not_run_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    expected = mdc.policy_macs(model, POLICY)

    def run(*_: object) -> None:
        raise AssertionError("the token module was run to be priced")

    monkeypatch.setattr(TokensToToken, "forward", run)
    assert mdc.policy_macs(model, POLICY) == expected


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_copies_agree(kind: str) -> None:
    model, x = make(kind), images()
    slim = mdc.slim(model, planned(model))
    for net in (model, slim):
        copied = copy.deepcopy(net)
        assert torch.equal(copied(x), net(x))
        copied.load_state_dict({their_name(name): t + 1 for name, t in net.state_dict().items()})
        assert not torch.equal(copied(x), net(x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["performer", "transformer"])
@torch.no_grad()
def test_they_compile_and_export(kind: str) -> None:
    model, x = make(kind), images()
    slim = mdc.slim(model, planned(model))
    torch._dynamo.reset()
    compiled = torch.compile(slim, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), slim(x))
    exported = torch.export.export(slim, (x,)).module()
    torch.testing.assert_close(exported(x), slim(x))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("performer", {}),
        ("transformer", {"drop_path_rate": 0.1}),
        ("performer", {"img_size": (32, 96), "in_chans": 3, "token_dim": 32}),
        ("performer", {"dynamic_img_size": True, "qkv_bias": True, "mlp_ratio": 2.0}),
    ],
)
@torch.no_grad()
def test_models_come_back_from_a_folder(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = make(kind, **options)
    height, width = model.patch_embed.img_size
    x = images(8, height, width)
    plan = mdc.make_plan(model, mdc.score(model, [x], progress=False), POLICY)
    for name, net in (("dense", model), ("slim", mdc.slim(model, plan))):
        mdc.save(net, tmp_path / name)
        loaded = mdc.load(tmp_path / name)
        assert repr(loaded) == repr(net)
        assert torch.equal(loaded(x), net(x))
        assert mdc.macs(loaded) == mdc.macs(net)
        assert [n for n, p in loaded.named_parameters() if not p.requires_grad] == FROZEN[kind]


Damage = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda spec: spec.update(token_layer="os.system"), "token_layer='os.system'"),
        (lambda spec: spec.pop("token_layer"), "token_layer=None"),
        (lambda spec: spec.update(token_dim=10**9), "token_dim=1000000000 is out of range"),
        (lambda spec: spec.update(token_dim=32), "has shape"),
        (lambda spec: spec.update({"class": "VisionTransformer"}), "is not one of T2TVisionTransformer"),
        (lambda spec: spec["args"].update(img_size=[65, 65]), "multiples of 16"),
    ],
)
def test_an_edited_folder_is_refused(damage: Damage, message: str, tmp_path: Path) -> None:
    import json

    mdc.save(make(), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    damage(config["model_args"]["constructor"])
    path.write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=message):
        mdc.load(tmp_path / "m")


def test_an_exchanged_part_is_priced_and_named(tmp_path: Path) -> None:
    model = make()
    model.patch_embed.project = nn.Sequential(model.patch_embed.project)
    assert mdc.macs(model) == counted_macs(model, SIZE)
    with pytest.raises(ArtifactError, match=r"patch_embed\.project is Sequential"):
        mdc.save(model, tmp_path / "m")


# --- fresh processes --------------------------------------------------------------------------------------------------


def run(program: str) -> None:
    subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program], check=True, cwd=Path(__file__).parents[1]
    )


@pytest.mark.slow
def test_ours_first_then_timm(tmp_path: Path) -> None:
    slim = mdc.slim(model := make(), planned(model))
    mdc.save(slim, tmp_path / "m")
    torch.save(slim(images()).detach(), tmp_path / "y.pt")
    torch.save(images(), tmp_path / "x.pt")
    run(
        "import lightning_mdc.models, timm, torch\n"
        "import lightning_mdc as mdc\n"
        "assert len(timm.list_models('t2t_vit*')) == 9\n"
        "timm.create_model('t2t_vit_7', img_size=32)\n"
        f"folder = {str(tmp_path)!r}\n"
        "with torch.no_grad():\n"
        "    y = mdc.load(folder + '/m')(torch.load(folder + '/x.pt'))\n"
        "torch.testing.assert_close(y, torch.load(folder + '/y.pt'))\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import timm, lightning_mdc.models",
        "import lightning_mdc.models, timm",
        "from lightning_mdc.models.timm_vit import TimmVisionTransformer; import timm",
    ],
)
def test_importing_our_models_registers_them_before_and_after_timm(imports: str) -> None:
    run(f"{imports}\ntimm.create_model('t2t_vit_7', img_size=32)\nassert len(timm.list_models('t2t_vit*')) == 9\n")
