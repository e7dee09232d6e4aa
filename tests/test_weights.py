"""Weights from files as people have them: each layout gives the very model, and what does not fit is named."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_mdc as mdc
from lightning_mdc.app.build import build_model
from lightning_mdc.distillation import Teacher
from lightning_mdc.errors import ArtifactError, ConfigError, DistillationError
from lightning_mdc.weights import load_weights
from tests.kinds import BASE, DEPTH, DIM, HEADS, images, make, randomised

State = dict[str, Tensor]


def vit(seed: int = 1, kind: type[nn.Module] = VisionTransformer, **options: Any) -> nn.Module:
    return randomised(kind(**(BASE | options)), seed)


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def written(state: Any, path: Path) -> Path:
    torch.save(state, path)
    return path


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The lines since last asked."""
    caplog.set_level("INFO", "lightning_mdc")
    monkeypatch.setattr(logging.getLogger("lightning_mdc"), "propagate", True)

    def lines() -> list[str]:
        found = [record.getMessage() for record in caplog.records if record.name == "lightning_mdc.weights"]
        caplog.clear()
        return found

    return lines


# --- layouts ----------------------------------------------------------------------------------------------------------


def nothing(state: State) -> State:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


LAYOUTS: dict[str, Callable[[State], Any]] = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"epoch": 3, "arch": "vit", "state_dict": s},
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    "net": lambda s: {"net": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    "averaged": lambda s: {"state_dict": nothing(s), "state_dict_ema": s},
    "averaged, other name": lambda s: {"model": nothing(s), "model_ema": s},
    "module.": lambda s: {"state_dict": prefixed(s, "module.")},
    "backbone.": lambda s: prefixed(s, "backbone."),
    "module.model.net.": lambda s: prefixed(s, "module.model.net."),
    "compiled": lambda s: {"state_dict": prefixed(s, "student._orig_mod.")},
    "compiled blocks": lambda s: {n.replace("attn.", "_orig_mod.attn."): t for n, t in prefixed(s, "net.").items()},
    "DINO's": lambda s: {"teacher": prefixed(s, "backbone."), "epoch": 3},
    "OpenCLIP's": lambda s: prefixed(s, "visual.trunk."),
    "under a smaller one": lambda s: prefixed(s, "a.") | prefixed(vit(embed_dim=24).state_dict(), "b."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_every_layout_gives_the_very_model(layout: str, tmp_path: Path) -> None:
    original, model = make(), vit()
    load_weights(model, written(LAYOUTS[layout](original.state_dict()), tmp_path / "weights.pth"))
    assert torch.equal(model(images()), original(images()))


def test_safetensors_in_half_precision(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in make().state_dict().items()}
    save_file(prefixed(state, "model."), tmp_path / "weights.safetensors")
    model = vit()
    load_weights(model, tmp_path / "weights.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name].float()), name


class Foreign:
    """A class of somebody's project; to unpickle it runs what it likes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("unpickled",)


class Trained(lightning.LightningModule):
    def __init__(self, width: Any = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = make()
        self.projector = nn.Linear(4, 4)  # of the loss, not of the network

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.network.parameters(), lr=0.01)


def test_a_checkpoint_of_lightning(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", max_steps=2, default_root_dir=tmp_path, barebones=False, **quiet)
    module = Trained()
    trainer.fit(module, DataLoader(list(zip(images(4), [0, 1, 2, 3], strict=True)), batch_size=2))
    trainer.save_checkpoint(path := tmp_path / "last.ckpt")
    model = vit()
    load_weights(model, path, "model.checkpoint")
    with torch.no_grad():
        assert torch.equal(model(images()), module.network.eval()(images()))
    assert said() == [f"  model.checkpoint={str(path)!r}: left out projector.weight, projector.bias"]

    content = torch.load(path, weights_only=True)
    for foreign in (Foreign(), Path("/data")):  # what lies beside the weights is passed over
        written(content | {"hyper_parameters": {"width": foreign}}, path)
        load_weights(other := vit(2), path, "model.checkpoint", ConfigError)
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


def of_jax(model: nn.Module) -> dict[str, np.ndarray]:
    """As Google publishes ViTs: kernels transposed, q, k and v apart."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found = {"cls": state["cls_token"], "Transformer/posembed_input/pos_embedding": state["pos_embed"]}
    found |= {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    norms = {"Transformer/encoder_norm": "norm"}
    for i in range(DEPTH):
        theirs, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        norms |= {f"{theirs}/LayerNorm_0": f"{ours}.norm1", f"{theirs}/LayerNorm_2": f"{ours}.norm2"}
        for j, part in enumerate(("query", "key", "value")):
            rows = slice(j * DIM, (j + 1) * DIM)
            weight, bias = state[f"{ours}.attn.qkv.weight"][rows], state[f"{ours}.attn.qkv.bias"][rows]
            found[f"{attention}/{part}/kernel"] = weight.T.reshape(DIM, HEADS, -1)
            found[f"{attention}/{part}/bias"] = bias.reshape(HEADS, -1)
        found[f"{attention}/out/kernel"] = state[f"{ours}.attn.proj.weight"].T.reshape(HEADS, -1, DIM)
        found[f"{attention}/out/bias"] = state[f"{ours}.attn.proj.bias"]
        for j, layer in enumerate(("fc1", "fc2")):
            found[f"{theirs}/MlpBlock_3/Dense_{j}/kernel"] = state[f"{ours}.mlp.{layer}.weight"].T
            found[f"{theirs}/MlpBlock_3/Dense_{j}/bias"] = state[f"{ours}.mlp.{layer}.bias"]
    for theirs, ours in norms.items():
        found |= {f"{theirs}/scale": state[f"{ours}.weight"], f"{theirs}/bias": state[f"{ours}.bias"]}
    return found


@torch.no_grad()
def test_arrays_of_jax(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    original, model, other = make(), vit(), vit(num_classes=3)
    np.savez(path := tmp_path / "augreg.npz", **of_jax(original))
    load_weights(model, path)
    assert torch.equal(model(images()), original(images()))
    assert said() == []
    load_weights(other, path)
    assert torch.equal(other.forward_features(images()), original.forward_features(images()))
    assert said() == [f"  checkpoint={str(path)!r}: the head is new"]
    with pytest.raises(ArtifactError, match="has no head that fits"):
        load_weights(other, path, new_head=False)
    with pytest.raises(ArtifactError, match=r"augreg\.npz' does not fit T2TVisionTransformer"):
        load_weights(timm.create_model("t2t_vit_7", depth=1), path)


# --- another head, another size, other names --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_file", "of_model", "note"),
    [
        ({}, {"num_classes": 3}, "the head is new, the file has head.bias 7, head.weight 7x48"),
        ({"num_classes": 0}, {}, "the head is new, the file has none"),
        ({}, {"num_classes": 0}, "left out head.weight, head.bias"),
    ],
)
@torch.no_grad()
def test_another_head_is_new_or_left_out_and_said(of_file, of_model, note, tmp_path, said) -> None:
    original, model = vit(0, **of_file), vit(1, **of_model)
    before = copy.deepcopy(model.head.state_dict())
    load_weights(model, path := written({"model": original.state_dict()}, tmp_path / "w.pth"))
    assert torch.equal(model.forward_features(images()), original.forward_features(images()))
    assert model.head.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.head.state_dict().items())
    assert said() == [f"  checkpoint={str(path)!r}: {note}"]


@torch.no_grad()
def test_both_heads_of_a_distilled_model_are_new(tmp_path: Path) -> None:
    """And a head without its bias is none."""
    original, model = vit(0, VisionTransformerDistilled), vit(1, VisionTransformerDistilled, num_classes=3)
    before = copy.deepcopy(model)
    load_weights(model, path := written(original.state_dict(), tmp_path / "w.pth"))
    assert torch.equal(model.forward_features(images()), original.forward_features(images()))
    for name in ("head", "head_dist"):
        assert torch.equal(getattr(model, name).weight, getattr(before, name).weight)
    state = original.state_dict()
    del state["head_dist.bias"]
    load_weights(model := vit(1, VisionTransformerDistilled), written(state, path))
    assert torch.equal(model.head.weight, original.head.weight)
    assert not torch.equal(model.head_dist.weight, original.head_dist.weight)


@pytest.mark.parametrize(("size", "grid"), [(64, (8, 8)), ((48, 16), (6, 2)), ((16, 64), (2, 8))])
@torch.no_grad()
def test_positions_are_resampled_as_timm_does(size, grid, tmp_path, said) -> None:
    original, model = make(), vit(img_size=size)
    load_weights(model, path := written(prefixed(original.state_dict(), "net."), tmp_path / "w.pth"))
    expected = original.state_dict()
    note = []
    if grid != (2, 8):  # as many positions: taken for what they are
        expected["pos_embed"] = resample_abs_pos_embed(original.pos_embed, list(grid), num_prefix_tokens=1)
        shape = "x".join(map(str, expected["pos_embed"].shape))
        note = [f"  checkpoint={str(path)!r}: resampled pos_embed 1x17x48 to {shape}"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert said() == note


DINO = {"img_size": 98, "depth": 2, "embed_dim": 48, "num_heads": 4}


@torch.no_grad()
def test_a_backbone_of_dinov2_for_smaller_images_and_a_head(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    """What issue 17 tells of: 37 x 37 patches, no head, a mask token."""
    name = "vit_small_patch14_dinov2"
    original = randomised(timm.create_model(name, **(DINO | {"img_size": 518}), num_classes=0))
    path = written(original.state_dict() | {"mask_token": torch.zeros(1, 48)}, tmp_path / "dinov2.pth")
    model = timm.create_model(name, **DINO, num_classes=10)
    load_weights(model, path)
    original.set_input_size((98, 98))  # timm's own way
    assert torch.equal(model.forward_features(images(2, 98)), original.forward_features(images(2, 98)))
    assert said() == [
        f"  checkpoint={str(path)!r}: the head is new, the file has none; resampled pos_embed 1x1370x48 to 1x50x48; "
        "left out mask_token"
    ]


@torch.no_grad()
def test_registers_by_metas_names(tmp_path: Path) -> None:
    model = timm.create_model("vit_small_patch14_reg4_dinov2", **DINO, num_classes=0)
    state = randomised(vit(img_size=98, patch_size=14, depth=2, num_classes=0, init_values=1)).state_dict()
    registers = torch.randn(1, 4, 48)
    load_weights(model, written(state | {"register_tokens": registers, "mask_token": registers[:, 0]}, tmp_path / "w"))
    assert torch.equal(model.reg_token, registers)
    assert torch.equal(model.cls_token, state["cls_token"] + state["pos_embed"][:, :1])
    assert torch.equal(model.pos_embed, state["pos_embed"][:, 1:])
    assert torch.equal(model.blocks[1].mlp.fc2.weight, state["blocks.1.mlp.fc2.weight"])


@torch.no_grad()
def test_layer_scales_by_metas_names(tmp_path: Path) -> None:
    original, model = make("deit3_layer_scale"), vit(init_values=1e-3, no_embed_class=True)
    state = original.state_dict()
    state = {n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for n, t in state.items()}
    load_weights(model, written({"model": state}, tmp_path / "deit_3.pth"))
    assert torch.equal(model(images()), original(images()))


@torch.no_grad()
def test_files_of_t2t_vit_for_other_classes_and_images(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    small: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 4}
    original = randomised(timm.create_model("t2t_vit_14", img_size=64, num_classes=7, **small))
    state = {name.replace("patch_embed.", "tokens_to_token."): t for name, t in original.state_dict().items()}
    path = written({"state_dict_ema": prefixed(state, "module.")}, tmp_path / "81.5_T2T_ViT_14.pth.tar")
    model = timm.create_model("t2t_vit_14", img_size=96, num_classes=3, **small).eval()
    load_weights(model, path)
    original.set_input_size((96, 96))
    assert torch.equal(model.forward_features(images(2, 96)), original.forward_features(images(2, 96)))
    assert said()[0].endswith("the file has head.bias 7, head.weight 7x48; resampled pos_embed 1x17x48 to 1x37x48")


# --- what does not fit ------------------------------------------------------------------------------------------------


def without(*names: str) -> State:
    return {name: tensor for name, tensor in make().state_dict().items() if name not in names}


MISFITS: dict[str, tuple[Callable[[], Any], str]] = {
    "fewer blocks": (
        lambda: vit(depth=3).state_dict(),
        r"lacks blocks\.3\.norm1\.weight, blocks\.3\.norm1\.bias, blocks\.3\.attn\.qkv\.weight and 9 more; build the",
    ),
    "more blocks": (lambda: vit(depth=5).state_dict(), r"it has unknown blocks\.4\.norm1\.weight, .* and 9 more"),
    "wider": (
        lambda: vit(embed_dim=64).state_dict(),
        r"has other shapes of cls_token 1x1x64 for 1x1x48, pos_embed .*mo",
    ),
    "deeper, with a prefix": (lambda: prefixed(vit(depth=5).state_dict(), "net."), r"it has unknown blocks\.4\.norm1"),
    "no square": (
        lambda: vit(img_size=(48, 16)).state_dict(),
        r"it has other shapes of pos_embed 1x13x48 for 1x17x48;",
    ),
    "registers": (lambda: make("registers").state_dict(), r"it has other shapes of pos_embed .*has unknown reg_token"),
    "another pooling": (
        lambda: vit(fc_norm=True).state_dict(),
        r"it lacks norm\.weight, norm\.bias, has unknown fc_norm\.weight, fc_norm\.bias;",
    ),
    "one missing": (lambda: without("blocks.2.attn.proj.bias"), r"it lacks blocks\.2\.attn\.proj\.bias;"),
    "something else": (lambda: nn.Linear(2, 2).state_dict(), r"it lacks cls_token.*has unknown weight, bias;"),
    "two": (
        lambda: {"student": make().state_dict(), "teacher": prefixed(vit().state_dict(), "backbone.")},
        r"holds several networks that fit VisionTransformer alike, student\., teacher\.backbone\.; save",
    ),
    "no tensors": (lambda: {"epoch": 3}, "holds no tensors"),
    "a name": (lambda: {"model": "vit_small"}, "cannot be read as weights"),
    "a list": (lambda: [1, 2], "cannot be read as weights"),
    "foreign": (lambda: {"state_dict": Foreign()}, r"holds more than weights, _pytest\.outcomes\..*unpickle"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_named_and_nothing_is_changed(case: str, tmp_path: Path) -> None:
    content, words = MISFITS[case]
    model = vit(2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArtifactError, match=rf"^checkpoint='.*w\.pth' .*{words}"):
        load_weights(model, written(content(), tmp_path / "w.pth"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path) -> None:
    for name, words in (
        ("w.pth", "get a fresh copy"),
        ("w.safetensors", "get a fresh copy"),
        ("w.npz", "does not fit"),
    ):
        (tmp_path / name).write_bytes(b"no weights")
        with pytest.raises(ArtifactError, match=words):
            load_weights(vit(), tmp_path / name)
    with pytest.raises(ArtifactError, match="is no file"):
        load_weights(vit(), tmp_path / "nowhere.pth")


# --- who uses it ------------------------------------------------------------------------------------------------------


def dense(checkpoint: Path, classes: int, size: int) -> nn.Module:
    args = {"patch_size": 8, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}
    settings = {"model": {"name": None, "pretrained": False, "checkpoint": str(checkpoint), "args": args}}
    data: Any = SimpleNamespace(img_size=size, in_chans=3, num_classes=classes)
    return build_model(settings, data)


@pytest.mark.parametrize("is_folder", [False, True])
@torch.no_grad()
def test_a_dense_model_of_other_classes_and_images(is_folder: bool, tmp_path: Path, said) -> None:
    original, path = make(), tmp_path / "dense"
    mdc.save(original, path) if is_folder else written(prefixed(original.state_dict(), "backbone."), path)
    model = dense(path, classes=3, size=64)
    original.set_input_size((64, 64))
    assert torch.equal(model.forward_features(images(2, 64)), original.forward_features(images(2, 64)))
    assert said() == [
        f"  model.checkpoint={str(path)!r}: the head is new, the file has head.bias 7, head.weight 7x48; "
        "resampled pos_embed 1x17x48 to 1x65x48"
    ]
    mdc.save(vit(depth=3), path) if is_folder else written(vit(depth=3).state_dict(), path)
    with pytest.raises(
        ConfigError, match=r"^model\.checkpoint='.*dense' does not fit VisionTransformer: it lacks blocks"
    ):
        dense(path, classes=3, size=64)


@torch.no_grad()
def test_a_teacher_of_other_images_and_for_hidden_states_without_a_head(tmp_path: Path, said) -> None:
    name, args = "vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}
    original, student = make(), vit(img_size=64)
    path = written({"state_dict": prefixed(original.state_dict(), "model.")}, tmp_path / "teacher.ckpt")
    teacher = Teacher(name, path, args | {"img_size": 64})
    module = mdc.DistillationModule(student, teacher)
    original.set_input_size((64, 64))
    x = images(2, 64)
    assert torch.equal(module.teacher(x), original(x))
    assert said() == [f"  Teacher.checkpoint={str(path)!r}: resampled pos_embed 1x17x48 to 1x65x48"]

    written(vit(0, num_classes=0).state_dict(), path)
    # Its answers would be noise.
    with pytest.raises(
        DistillationError, match=r"Teacher\.checkpoint=.* does not fit .* lacks head\.weight, head\.bias;"
    ):
        mdc.DistillationModule(student, teacher)
    module = mdc.DistillationModule(student, teacher, kd_weight=0, hidden_weight=1)
    assert torch.equal(module.teacher.network.forward_features(x), original.forward_features(x))
    assert "the head is new, the file has none" in said()[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_saved_model_in_one_of_ones_own_of_other_classes_and_images(dtype: torch.dtype, tmp_path: Path, said) -> None:
    original, mine, x = make(), vit(num_classes=3, img_size=64), images(2, 64)
    scores = mdc.score(original, [images(8)], progress=False)
    plan = mdc.make_plan(original, scores, mdc.Policy(heads=0.5, neurons=0.6, tokens=0.7))
    mdc.save(mdc.slim(original, plan).to(dtype), tmp_path / "slim", constructor=False)
    loaded = mdc.load(tmp_path / "slim", model=mine)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype}
    assert torch.equal(loaded.head.weight, mine.head.weight.to(dtype))
    if dtype == torch.float32:
        original.set_input_size((64, 64))
        assert torch.equal(loaded.forward_features(x), mdc.slim(original, plan).forward_features(x))
    assert said()[0].endswith("model.safetensors: the head is new, the file has head.bias 7, head.weight 7x48; "
                              "resampled pos_embed 1x17x48 to 1x65x48")  # fmt: skip
    assert loaded(x.to(dtype)).shape == (2, 3)
    mdc.save(mdc.slim(vit(init_values=1.0), plan), tmp_path / "slim", constructor=False)
    with pytest.raises(
        ArtifactError, match=r"safetensors does not fit VisionTransformer: .*has unknown blocks\.0\.ls1"
    ):
        mdc.load(tmp_path / "slim", model=mine)
