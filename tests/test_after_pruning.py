"""What makes modules smaller or faster still takes slim models, token stages included: int8, and ExecuTorch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_mdc as mdc
from lightning_mdc.errors import ArtifactError
from tests.kinds import images, make


def slim_of(reduction: str) -> nn.Module:
    model = make()
    model.blocks = model.blocks[:2]
    scores = mdc.score(model, [images(8)], "activation")
    plan = mdc.make_plan(model, scores, mdc.Policy(0.5, 0.5, 0.6), mdc.TokenOptions(reduction=reduction))
    return mdc.slim(model, plan)


@torch.no_grad()
@pytest.mark.parametrize("reduction", ["fuse", "merge-proportional"])
def test_int8_of_a_slim_model_is_close_and_comes_back(reduction, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    slim = slim_of(reduction)
    int8 = copy.deepcopy(slim)
    quantization.quantize_(int8, quantization.Int8DynamicActivationInt8WeightConfig())
    wanted = slim(images())
    assert 0 < (int8(images()) - wanted).norm() < 0.1 * wanted.norm()
    torch.save(int8.state_dict(), tmp_path / "int8.pt")
    again = copy.deepcopy(slim)
    again.load_state_dict(torch.load(tmp_path / "int8.pt"), assign=True)
    assert torch.equal(again(images()), int8(images()))
    with pytest.raises(ArtifactError, match="Int8Tensor"):
        mdc.save(int8, tmp_path / "int8")


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("reduction", ["fuse", "drop", "merge"])
def test_a_program_of_executorch_computes_what_the_slim_model_does(reduction, tmp_path):
    exir = pytest.importorskip("executorch.exir")
    slim = slim_of(reduction)
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(slim, (images(2),), dynamic_shapes=({0: batch},))
    path = tmp_path / "slim.pte"
    path.write_bytes(exir.to_edge_transform_and_lower(program).to_executorch().buffer)
    for given in (images(1), images(5, seed=1), torch.full_like(images(3), 0.5)):
        torch.testing.assert_close(run(path, given), slim(given), atol=1e-4, rtol=1e-4)


def run(path: Path, batch: torch.Tensor) -> Any:
    from executorch.runtime import Runtime

    return Runtime.get().load_program(path).load_method("forward").execute([batch])[0]
