"""Names of `timm_names.csv` on the meta device: what can be pruned, what it costs, whether it comes back."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import lightning_mdc as mdc
from lightning_mdc.artifact import check_savable
from lightning_mdc.importance import Scores
from lightning_mdc.models import find_anatomy
from tests import timm_names

ROWS = {name: row for name, row in timm_names.read().items() if timm.is_model(name)}  # an older timm has not all
# One of each way in which they are constructed, for every day.
KINDS = (
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_base_patch16_rpn_224",  # post-norm
    "vit_base_patch16_siglip_224",  # attention pooling
    "vit_tiny_r_s16_p8_224",
    "vitamin_small_224",
    "vit_dwee_patch16_reg1_gap_256",  # differential attention
    "vit_pe_core_tiny_patch16_384",  # attention pooling
    "vit_small_patch16_rope_mixed_224",
    "t2t_vit_7",
    "swin_tiny_patch4_window7_224",
    "swin_s3_tiny_224",  # windows of two sizes
    "beit_base_patch16_224",
    "vit_relpos_small_patch16_rpn_224",
    "pit_ti_distilled_224",
    "samvit_base_patch16_224",
    "hiera_tiny_224",
    "naflexvit_base_patch16_radio_v3",
    "pvt_v2_b0",
    "qwen3_vit_88m_enc",  # as wide as its tag says
)


@pytest.mark.parametrize("name", [n if n in KINDS else pytest.param(n, marks=pytest.mark.slow) for n in ROWS])
def test_a_name_is_pruned_in_its_dimensions_and_comes_back(name: str, tmp_path: Path) -> None:
    row, model = ROWS[name], timm_names.create(name)
    anatomy = find_anatomy(model)
    assert set(row["dimensions"].split()) <= set(anatomy.dimensions)
    assert mdc.macs(model) == int(row["macs"])
    again = rebuilt(model)
    assert shapes(again) == shapes(model)
    scores = Scores(*([torch.rand(n) for n in sizes] for sizes in (anatomy.num_heads, anatomy.num_neurons)), [])
    plan = mdc.make_plan(model, scores, mdc.Policy(**dict.fromkeys(anatomy.dimensions, 0.5)))
    slim = mdc.slim(model, plan)
    assert shapes(mdc.slim(again, plan)) == shapes(slim) != shapes(model)
    check_savable(slim, tmp_path / "m")


def rebuilt(model: nn.Module) -> nn.Module:
    anatomy = find_anatomy(model)
    described = anatomy.family.describe(model, anatomy.sizes)
    spec = json.loads(json.dumps(described))
    anatomy.family.check_spec(spec, model.state_dict())
    with torch.device("meta"):
        return anatomy.family.build(spec)


def shapes(model: nn.Module) -> dict[str, Any]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
