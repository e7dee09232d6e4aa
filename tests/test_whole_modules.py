"""Modules that are more than their vision transformer: what is saved, loaded, exported and counted of them."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightning import LightningModule
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.artifact import CONFIG, REST, WEIGHTS
from lightning_mdc.errors import ArtifactError, UnsupportedModelError
from tests.kinds import DIM, SIZE, counted_macs, images, make, randomised

pytestmark = pytest.mark.slow  # CI runs them

SIDE = SIZE // 8


class Segmenter(LightningModule):
    """A DINOv2-like backbone and a decoder of the dense map, with a batch norm, a table of whole numbers, an alias of
    the backbone and two names for one weight."""

    def __init__(self, seed: int = 0, classes: int = 3) -> None:
        super().__init__()
        self.backbone = make("registers", seed)
        self.alias = self.backbone
        self.decoder = nn.Sequential(nn.ConvTranspose2d(DIM, 8, 2, 2), nn.BatchNorm2d(8), nn.Conv2d(8, classes, 1))
        self.lifted, self.tied = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.tied.weight = self.lifted.weight
        self.register_buffer("order", torch.arange(classes).flip(0))
        randomised(self.decoder, seed + 1)
        nn.init.normal_(self.lifted.weight, std=0.2)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.backbone.forward_features(images)[:, 5:]
        grid = self.tied(self.lifted(tokens)).transpose(1, 2).unflatten(2, (SIDE, SIDE))
        return self.decoder(grid)[:, self.order]


class Backbone(LightningModule):
    """As most people write theirs: what is computed is in the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make()
        self.neck = nn.Linear(7, 2)


class TwoTowers(nn.Module):
    """An image with a text."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.visual = nn.Embedding(11, 7), make()

    def forward(self, text: Tensor, images: Tensor) -> Tensor:
        return self.visual(images) @ self.text(text).T


def halved(model: nn.Module, **where: Any) -> nn.Module:
    scores = mdc.score(model, criterion="random", dimensions=("heads", "neurons"), **where)
    return mdc.slim(model, mdc.make_plan(model, scores, mdc.Policy(heads=0.5, neurons=0.5), **where), **where)


def trained(slim: bool = True, seed: int = 0) -> Segmenter:
    """After `fit`: its batch norm has seen images, its backbone is slim."""
    module = Segmenter(seed)
    module.train()(images(8, seed=2))
    if slim:
        module.backbone = module.alias = halved(module.backbone)
    return module.eval()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The warnings since last asked."""
    caplog.set_level("WARNING", "lightning_mdc")
    monkeypatch.setattr(logging.getLogger("lightning_mdc"), "propagate", True)

    def lines() -> list[str]:
        found = [record.getMessage() for record in caplog.records if record.name.startswith("lightning_mdc")]
        caplog.clear()
        return found

    return lines


# --- saving and loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slim", [True, False])
@pytest.mark.parametrize("constructor", [True, False])
@torch.no_grad()
def test_all_weights_of_a_module_come_back(slim: bool, constructor: bool, tmp_path: Path, said: Any) -> None:
    module = trained(slim)
    mdc.save(module, tmp_path / "m", constructor=constructor)
    mine = Segmenter(seed=7)
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    loaded = mdc.load(tmp_path / "m", model=mine)
    assert said() == []
    assert torch.equal(loaded(images()), module(images()))
    assert not torch.equal(loaded(images()), mine.eval()(images()))
    assert {name: (t.shape, t.dtype) for name, t in loaded.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in module.state_dict().items()
    }
    assert type(loaded) is Segmenter
    assert not any(part.training for part in loaded.modules())
    assert loaded.alias is loaded.backbone
    assert loaded.tied.weight is loaded.lifted.weight
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in mine.state_dict().items())  # a copy was made


@torch.no_grad()
def test_without_a_module_the_transformer_comes_alone_which_is_told(tmp_path: Path, said: Any) -> None:
    module = trained()
    mdc.save(module, tmp_path / "m")
    assert said() == []
    for mine in (None, make("registers", seed=3)):
        loaded = mdc.load(tmp_path / "m", model=mine)
        assert torch.equal(loaded(images()), module.backbone(images()))
        (line,) = said()
        assert "of the Segmenter that was saved, its vision transformer backbone alone" in line
        assert "load(directory, model=mine)" in line  # which the test above does
    mdc.save(module.backbone, tmp_path / "m")  # over the other one, of which nothing is left
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == sorted([CONFIG, WEIGHTS])
    mdc.load(tmp_path / "m")
    assert said() == []


@torch.no_grad()
def test_a_transformer_alone_goes_into_a_module_that_keeps_its_rest(tmp_path: Path, said: Any) -> None:
    module, mine = trained(), trained(slim=False, seed=5)
    mdc.save(module.backbone, tmp_path / "m")
    loaded = mdc.load(tmp_path / "m", model=mine)
    assert "the rest of Segmenter stays as it is" in said()[0]
    mine.backbone = mine.alias = module.backbone
    assert torch.equal(loaded(images()), mine(images()))


@torch.no_grad()
def test_a_weight_of_the_transformer_that_the_rest_uses_too(tmp_path: Path) -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make()
            self.cls_token = self.net.cls_token

    module = Shares()
    mdc.save(module, tmp_path / "m")
    loaded = mdc.load(tmp_path / "m", model=randomised(Shares(), 9))
    assert loaded.cls_token is loaded.net.cls_token
    assert torch.equal(loaded.cls_token, module.cls_token)


@torch.no_grad()
def test_a_compiled_module_is_saved_under_its_own_names(tmp_path: Path) -> None:
    module = trained()
    expected = module(images())
    module.decoder = torch.compile(module.decoder, backend="aot_eager")
    mdc.save(torch.compile(module, backend="aot_eager"), tmp_path / "m")
    assert torch.equal(mdc.load(tmp_path / "m", model=Segmenter(4))(images()), expected)


def test_another_module_or_an_edited_rest_is_refused(tmp_path: Path) -> None:
    mdc.save(trained(), tmp_path / "m")
    with pytest.raises(ArtifactError, match=r"rest\.safetensors does not fit Segmenter: decoder\.2\.bias, .* without"):
        mdc.load(tmp_path / "m", model=Segmenter(classes=4))
    assert mdc.load(tmp_path / "m") is not None  # as it advises
    (tmp_path / "m" / REST).unlink()
    with pytest.raises(ArtifactError, match="changed after it was saved"):
        mdc.load(tmp_path / "m")


@pytest.mark.slow
def test_a_fresh_process_gets_the_transformer_and_one_line(tmp_path: Path) -> None:
    module = trained()
    mdc.save(module, tmp_path / "m")
    torch.save((images(), module.backbone(images())), tmp_path / "expected.pt")
    program = (
        "import sys, torch, lightning_mdc as mdc\n"
        "x, expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "sys.exit(not torch.equal(mdc.load(sys.argv[1] + '/m')(x), expected))\n"
    )
    root = Path(mdc.__file__).parents[1]
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, check=True, cwd=root, capture_output=True, text=True)
    assert [line for line in done.stderr.splitlines() if "vision transformer backbone alone" in line]


# What a constructor cannot express is advised to be saved without: that works, whole numbers of batch norms included.
@pytest.mark.parametrize("stem", ["batch norms", pytest.param("mobileclip", marks=pytest.mark.slow)])
@torch.no_grad()
def test_what_is_saved_without_a_constructor_is_loaded(stem: str, tmp_path: Path) -> None:
    if stem == "mobileclip":
        model = timm.create_model("vit_base_mci_224", depth=1, img_size=64).eval()
        x = images(2, 64)
    else:
        model, x = make(), images()
        model.head = nn.Sequential(nn.Linear(DIM, 20), nn.BatchNorm1d(20), nn.Linear(20, 7))
        model.register_buffer("seen", torch.tensor([3, 4]))  # nor has it to be a batch norm's
        with pytest.raises(ArtifactError, match=r"constructor=False.*load\(directory, model=my_dense_model\)"):
            mdc.save(model.train(), tmp_path / "d")
        model(x)
    mdc.save(model, tmp_path / "d", constructor=False)
    loaded = mdc.load(tmp_path / "d", model=model)
    assert torch.equal(loaded(x), model.eval()(x))
    whole = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}
    assert whole
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in whole.items())


# --- counting and exporting -------------------------------------------------------------------------------------------


def test_macs_are_those_of_the_whole_module(said: Any) -> None:
    for module in (trained(slim=False), trained()):
        alone = mdc.macs(module, submodule="backbone")
        assert alone == mdc.macs(module.backbone) == counted_macs(module.backbone)
        assert mdc.macs(module) == counted_macs(module) != alone
        assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    assert said() == []


def test_macs_of_a_module_with_masks_on_or_compiled_are_those_of_the_module() -> None:
    module = trained(slim=False)
    scores = mdc.score(module, criterion="random", dimensions=("heads", "neurons"))
    plan = mdc.make_plan(module, scores, mdc.Policy(heads=0.5, neurons=0.5))
    expected = mdc.macs(module)
    with mdc.masked(module, plan):
        assert mdc.macs(module) == expected
    assert mdc.macs(torch.compile(module, backend="aot_eager")) == expected
    # Plans and budgets are about the transformer, wherever it is.
    assert mdc.plan_macs(module, plan) == mdc.macs(mdc.slim(module, plan))
    assert mdc.uniform_policy(module, 0.6) == mdc.uniform_policy(module.backbone, 0.6)


@torch.no_grad()
def test_a_program_is_of_the_whole_module_or_of_its_transformer(tmp_path: Path) -> None:
    module = trained()
    module.backbone.blocks = module.backbone.blocks[:1]  # exporters take seconds for each
    mdc.export_model(module, tmp_path / "whole.pt2")
    mdc.export_model(module, tmp_path / "alone.pt2", submodule="backbone")
    for name, model in (("whole", module), ("alone", module.backbone)):
        program = torch.export.load(tmp_path / f"{name}.pt2").module()
        torch.testing.assert_close(program(images(4)), model(images(4)), atol=1e-4, rtol=1e-4)
    assert module(images()).shape == (6, 3, 2 * SIDE, 2 * SIDE)


@pytest.mark.slow
@torch.no_grad()
def test_onnx_of_a_whole_module(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    module = trained()
    module.backbone.blocks = module.backbone.blocks[:1]
    mdc.export_model(module, tmp_path / "whole.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "whole.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images(4).numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module(images(4)), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_of_a_module_without_a_forward_the_transformer_is_taken_which_is_told(tmp_path: Path, said: Any) -> None:
    module = Backbone()
    assert mdc.macs(module) == mdc.macs(module.net)
    assert "Backbone has no forward: its vision transformer net is taken alone" in said()[0]
    module.net.blocks = module.net.blocks[:1]
    mdc.export_model(module, tmp_path / "net.pt2")
    assert len(said()) == 1
    program = torch.export.load(tmp_path / "net.pt2").module()
    torch.testing.assert_close(program(images(4)), module.net(images(4)), atol=1e-4, rtol=1e-4)
    assert mdc.macs(nn.ModuleDict({"net": module.net})) == mdc.macs(module.net)
    assert said() == []  # it is all there is


@torch.no_grad()
def test_what_does_not_run_on_images_alone_is_refused_with_what_works(tmp_path: Path) -> None:
    module = TwoTowers().eval()
    with pytest.raises(UnsupportedModelError, match=r"TwoTowers.*missing 1 required.*pass submodule='visual'"):
        mdc.macs(module)
    assert mdc.macs(module, submodule="visual") == mdc.macs(module.visual)
    with pytest.raises(ArtifactError, match=r"TwoTowers cannot be.*submodule='visual' exports its vision transformer"):
        mdc.export_model(module, tmp_path / "m.pt2")
    mdc.export_model(module, tmp_path / "m.pt2", submodule="visual")
    mdc.save(module, tmp_path / "m")
    text = torch.arange(3)
    loaded = mdc.load(tmp_path / "m", model=TwoTowers())
    assert torch.equal(loaded(text, images()), module(text, images()))

    class Dict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make()

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"classes": self.net(images)}

    with pytest.raises(ArtifactError, match="Dict puts out a dict, where a program has one tensor"):
        mdc.export_model(Dict(), tmp_path / "d.pt2")
    assert mdc.macs(Dict()) == mdc.macs(make())


@pytest.mark.parametrize("module", [Backbone, lambda: nn.ModuleDict({"net": make(), "neck": nn.Linear(7, 2)})])
def test_of_a_module_without_forward_the_transformer_is_run(module: Callable[[], nn.Module], caplog) -> None:
    whole = module()
    with caplog.at_level(logging.WARNING):
        scores = mdc.score(whole, [images()], "hsic", progress=False)
    assert "has no forward: its vision transformer net is taken alone" in caplog.text
    alone = mdc.score(make(), [images()], "hsic", progress=False)
    assert all(
        torch.equal(*pair) for pair in zip(scores.heads + scores.tokens, alone.heads + alone.tokens, strict=True)
    )
    plan = mdc.make_plan(whole, scores, mdc.Policy(0.5, 0.5, 0.5))
    slim = mdc.slim(whole, plan, "sequential", batches=[images()])
    assert slim(images()).shape == (6, 7)
    found = mdc.compress(whole, [images(12)], policy="uniform", criterion="activation", compensate="none")
    assert found.model(images()).shape == (6, 7)
