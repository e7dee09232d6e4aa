"""timm's transformers that lose neurons at least: what torch counts is what is priced, and timm's names build them."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import GluMlp, Mlp
from timm.models import PyramidVisionTransformerV2
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.errors import ArtifactError, UnsupportedModelError
from lightning_mdc.models import find_anatomy
from tests.family_suite import FamilySuite, random_plan
from tests.kinds import MLP_KINDS, SIZE, counted_macs, images, make

UNNAMED = ("volo", "mvitv2", "nest")  # not of timm.create_model
DAILY = ("pvt_v2", "tnt")  # a convolution in the MLP; two MLPs in a block, one on windows
LEGGED = [kind for kind in ("crossvit", "qwen3", "deepseek") if kind in MLP_KINDS]  # whose heads leave, too


@pytest.mark.parametrize("kind", [k if k in DAILY else pytest.param(k, marks=pytest.mark.slow) for k in MLP_KINDS])
class TestMlps(FamilySuite):
    @pytest.fixture
    def dense(self, kind: str) -> nn.Module:
        return make(kind)

    @pytest.fixture(autouse=True)
    def _unnamed(self, kind: str) -> None:
        self.is_named = kind not in UNNAMED

    def saved_and_loaded(self, slim: nn.Module, dense: nn.Module, folder: Path) -> nn.Module:
        if self.is_named:
            return super().saved_and_loaded(slim, dense, folder)
        mdc.save(slim, folder, constructor=False)
        return mdc.load(folder, model=dense)


def readers_of(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The last layer of each MLP in the order in which they run, by hooks."""
    last = {"Mlp": "fc2", "GluMlp": "fc2", "MlpWithDepthwiseConv": "fc2", "Gemma4GatedMlp": "down_proj.linear"}
    ran: list[tuple[str, nn.Linear]] = []
    handles = []
    for name, module in model.named_modules():
        if type(module).__name__ in last:
            reader: Any = module.get_submodule(last[type(module).__name__])
            handles.append(reader.register_forward_hook(lambda reader, *_, name=name: ran.append((name, reader))))
    model(images(1))
    for handle in handles:
        handle.remove()
    return ran


@pytest.mark.parametrize("kind", MLP_KINDS)
@torch.no_grad()
def test_a_masked_unit_is_one_whose_outputs_are_zeroed_by_hand(kind: str) -> None:
    model, x = make(kind), images()
    plan, zeroed = random_plan(model), copy.deepcopy(model)
    readers = readers_of(zeroed)
    assert [name for name, _ in readers] == [units.name for units in find_anatomy(model).units("neurons") if units]
    for (_, reader), neurons in zip(readers, plan.neurons, strict=True):
        reader.weight[:, [neuron for neuron in range(reader.in_features) if neuron not in neurons]] = 0
    for (name, _), heads in zip(readers, plan.heads, strict=bool(plan.heads)):
        attn: Any = zeroed.get_submodule(f"{name.removesuffix('.mlp')}.attn")
        of_heads = attn.proj.weight.view(len(attn.proj.weight), attn.num_heads, -1)
        of_heads[:, [head for head in range(attn.num_heads) if head not in heads]] = 0
    slim = mdc.slim(model, plan)
    with mdc.masked(model, plan):
        torch.testing.assert_close(model(x), zeroed(x), rtol=0, atol=1e-5 * float(zeroed(x).abs().max().clamp(min=1)))
        assert mdc.macs(model) == counted_macs(zeroed)  # masks neither cost nor save
    torch.testing.assert_close(slim(x), zeroed(x), rtol=0, atol=1e-5 * float(zeroed(x).abs().max().clamp(min=1)))
    assert mdc.plan_macs(model, plan) == mdc.macs(slim) == counted_macs(slim) < counted_macs(model)
    assert bool(plan.heads) == (kind in LEGGED)
