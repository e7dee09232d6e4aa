"""Exported programs compute what the model does, on any batch; ties fall the same way everywhere; errors are told."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc import __main__ as command_line
from lightning_mdc import export
from lightning_mdc.errors import ArtifactError, UnsupportedModelError
from lightning_mdc.tokens.selection import best_and_rest
from lightning_mdc.tokens.surviving_patches import surviving_patches
from tests import kinds
from tests.kinds import SIZE, everyday, images

pytestmark = pytest.mark.slow  # CI runs them

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")

# Two heads; register tokens; no class row (mean attention); attention pooling; norms over units and a packed GLU.
EXPORTED = everyday("deit_distilled", "registers", "average_pool", "attention_pool", "swiglu_packed_normed")


def make(kind: str = "vit", depth: int = 1) -> nn.Module:
    """A token stage in every block; exporters take seconds for each."""
    model = kinds.make(kind)
    model.blocks = model.blocks[:depth]
    return model


def slim_of(model: nn.Module, token_score: str = "attention*dependence") -> nn.Module:
    scores = mdc.score(model, [images(8)], "activation")
    return mdc.slim(model, mdc.make_plan(model, scores, mdc.Policy(0.5, 0.5, 0.6), mdc.TokenOptions(token_score)))


def run_onnx(path: Path, batch: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])


def run_program(path: Path, batch: Tensor) -> Tensor:
    return torch.export.load(path).module()(batch)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", EXPORTED)
def test_programs_equal_the_model_at_any_batch(kind, tmp_path):
    slim = slim_of(make(kind, depth=2))
    for name, run in (("slim.onnx", run_onnx), ("slim.pt2", run_program)):
        made = mdc.export_model(slim, tmp_path / "new" / name)
        assert made.path == tmp_path / "new" / name
        assert made.size == made.path.stat().st_size
        assert made.difference < 1e-4
        for batch in (images(1, seed=3), images(5, seed=4)):
            torch.testing.assert_close(run(made.path, batch), slim(batch), atol=1e-4, rtol=1e-4)
    assert len(list(tmp_path.rglob("*"))) == 3  # nothing else is left


@pytest.mark.slow
@torch.no_grad()
def test_t2t_vit_goes_to_onnx_from_inside_a_module(tmp_path):
    model = timm.create_model("t2t_vit_7", img_size=SIZE, num_classes=7, embed_dim=32, num_heads=4, depth=2).eval()
    slim = slim_of(model, "attention")
    mdc.export_model(nn.ModuleDict({"backbone": slim}), tmp_path / "slim.onnx")
    for batch in (images(1, seed=3), images(5, seed=4)):
        torch.testing.assert_close(run_onnx(tmp_path / "slim.onnx", batch), slim(batch), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_model_stays_as_it_is_and_may_be_anything(tmp_path):
    """Training mode, half precision, compiled, inside another module: the program is of the eval mode, in fp32."""
    inner = slim_of(make()).to(torch.bfloat16)
    wanted = inner.float()(images())
    inner.to(torch.bfloat16).train()
    outer = nn.ModuleDict({"backbone": torch.compile(inner, backend="aot_eager")})
    mdc.export_model(outer, tmp_path / "slim.bin", format="torch_export")
    assert inner.training
    assert {parameter.dtype for parameter in inner.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in inner.parameters())
    assert torch.equal(run_program(tmp_path / "slim.bin", images()), wanted)


@torch.no_grad()
def test_another_input_size_is_exported_if_the_model_takes_it(tmp_path):
    slim = slim_of(make("any_size"), "attention")
    mdc.export_model(slim, tmp_path / "slim.pt2", input_size=48)
    torch.testing.assert_close(run_program(tmp_path / "slim.pt2", images(size=48)), slim(images(size=48)))
    with pytest.raises(UnsupportedModelError, match="input_size"):
        mdc.export_model(slim_of(make()), tmp_path / "slim.pt2", input_size=48)


# --- ties -------------------------------------------------------------------------------------------------------------


class _Chooses(nn.Module):
    def forward(self, scores: Tensor) -> Tensor:
        return torch.cat(best_and_rest(scores, 5), dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_equal_scores_the_first_ones_stay_in_every_program(dtype, tmp_path):
    scores = torch.randint(0, 4, (7, 16), generator=torch.Generator().manual_seed(0)).to(dtype) / 3
    expected = []
    for row in scores.tolist():
        order = sorted(range(16), key=lambda i, row=row: (-row[i], i))
        expected.append(sorted(order[:5]) + sorted(order[5:]))
    assert _Chooses()(scores).tolist() == expected
    assert torch.compile(_Chooses(), backend="aot_eager", fullgraph=True)(scores).tolist() == expected
    if dtype == torch.float32:  # programs are
        for write, run in export._FUNCTIONS.values():
            write(_Chooses(), scores[:2], tmp_path / "chooses")
            assert run(tmp_path / "chooses", scores).tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_and_slim_models_agree_on_ties(dtype):
    model = make().to(dtype)
    plan = mdc.make_plan(
        model, mdc.score(model.float(), [images(8)]), mdc.Policy(tokens=0.5), mdc.TokenOptions("dependence")
    )
    model.to(dtype)
    tied = tuple(float(value) for value in np.arange(16) % 3)
    plan = replace(plan, tokens=(replace(plan.tokens[0], prior=tied), *plan.tokens[1:]))
    batch = images().to(dtype)
    slim = mdc.slim(model, plan)
    with mdc.masked(model, plan):
        assert torch.equal(model(batch), slim(batch))


def with_tied_tokens(by: str) -> tuple[nn.Module, list[int]]:
    """A slim model whose token stage cannot tell tokens apart, or only by thirds, and the patches that have to stay."""
    model = make()
    if by == "attention":
        model.blocks[0].attn.qkv.weight[:].zero_()  # whatever the image, all tokens get the same attention
    plan = mdc.make_plan(
        model, mdc.score(model, [images(8)]), mdc.Policy(tokens=0.5), mdc.TokenOptions(by, reduction="drop")
    )
    prior = tuple(float(i % 3) for i in range(16))
    if by == "dependence":
        plan = replace(plan, tokens=(replace(plan.tokens[0], prior=prior),))
    best = sorted(range(16), key=lambda i: (-prior[i] * (by == "dependence"), i))
    return mdc.slim(model, plan), sorted(best[:7])  # half of 17, less the class token


@torch.no_grad()
@pytest.mark.parametrize("by", ["attention", "dependence"])
def test_an_export_by_hand_breaks_ties_as_the_model_does(by, tmp_path):
    slim, staying = with_tied_tokens(by)
    constant = torch.full_like(images(2), 0.5)
    assert surviving_patches(slim, constant)[1][0, 0].nonzero().flatten().tolist() == staying
    torch.onnx.export(
        slim,
        (constant,),
        tmp_path / "slim.onnx",
        dynamo=True,
        input_names=["images"],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    program = torch.export.export(slim, (constant,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)).module()
    for batch in (constant, images(1, seed=3), images(5, seed=4), constant[:1]):
        torch.testing.assert_close(run_onnx(tmp_path / "slim.onnx", batch), slim(batch), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(program(batch), slim(batch), atol=1e-5, rtol=1e-5)


def test_scores_that_are_no_numbers_stay_in_bounds():
    scores = torch.tensor([[float("nan")] * 4, [1.0, float("nan"), float("inf"), 2.0]])
    assert torch.cat(best_and_rest(scores, 2), dim=1).tolist() == [[0, 1, 2, 3], [1, 2, 0, 3]]


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line_exports_a_saved_model(tmp_path, capsys):
    slim = slim_of(make(), "attention")
    mdc.save(slim, tmp_path / "slim")
    assert command_line.main(["export", str(tmp_path / "slim"), str(tmp_path / "slim.pt2")]) == 0
    said = capsys.readouterr()
    facts, path = said.out.splitlines()
    assert facts.startswith("torch_export, 0.")
    assert "of the model's" in facts
    assert path == str(tmp_path / "slim.pt2")
    assert said.err == ""
    torch.testing.assert_close(run_program(Path(path), images(2)), slim(images(2)), atol=1e-4, rtol=1e-4)


def test_the_command_line_says_what_is_wrong(tmp_path, capsys):
    assert command_line.main(["export", str(tmp_path / "nowhere"), str(tmp_path / "slim.onnx")]) == 1
    assert "ArtifactError" in capsys.readouterr().err
    mdc.save(make(), tmp_path / "dense")
    assert command_line.main(["export", str(tmp_path / "dense"), str(tmp_path / "dense.tflite")]) == 1
    assert "does not end like one of the formats, .onnx, .pt2" in capsys.readouterr().err


# --- errors -----------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_told(tmp_path):
    model = make()
    with pytest.raises(ArtifactError, match=r"format='tflite': expected one of 'onnx', 'torch_export'"):
        mdc.export_model(model, tmp_path / "x.onnx", format="tflite")
    with pytest.raises(ArtifactError, match=r"is a folder; give the name of a file"):
        mdc.export_model(model, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"path=.* cannot be written"):
        mdc.export_model(model, tmp_path / "file" / "x.pt2")
    with pytest.raises(UnsupportedModelError):
        mdc.export_model(nn.Linear(2, 2), tmp_path / "x.onnx")
    scores = mdc.score(model, [images(8)])
    plan = mdc.make_plan(model, scores, mdc.Policy(neurons=0.5))
    with mdc.masked(model, plan), pytest.raises(ArtifactError, match=r"masks on.*export mdc\.slim"):
        mdc.export_model(model, tmp_path / "x.pt2")


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else there(name))
    with pytest.raises(ArtifactError, match="pip install onnx onnxscript onnxruntime, or use format='torch_export'"):
        mdc.export_model(make(), tmp_path / "x.onnx")


def test_more_than_a_file_can_hold_is_refused(tmp_path):
    with torch.device("meta"):
        huge = timm.create_model("vit_huge_patch14_224")
    with pytest.raises(ArtifactError, match=r"weights of 2\.5 GB do not fit into one ONNX file"):
        mdc.export_model(huge, tmp_path / "x.onnx")


def test_a_program_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    write, run = export._FUNCTIONS["torch_export"]
    monkeypatch.setitem(export._FUNCTIONS, "torch_export", (write, lambda path, batch: run(path, batch) + 0.1))
    (tmp_path / "x.pt2").write_text("what was there")
    with pytest.raises(ArtifactError, match=r"differ from the model's .* so it was not kept"):
        mdc.export_model(make(), tmp_path / "x.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt2"]
    assert (tmp_path / "x.pt2").read_text() == "what was there"


def test_what_an_exporter_cannot_do_is_told(tmp_path, monkeypatch):
    def refuses(*_: object) -> None:
        raise RuntimeError("no translation for aten.something")

    monkeypatch.setitem(export._FUNCTIONS, "torch_export", (refuses, refuses))
    with pytest.raises(ArtifactError, match=r"cannot be exported as format='torch_export': RuntimeError: no transl"):
        mdc.export_model(make(), tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())
