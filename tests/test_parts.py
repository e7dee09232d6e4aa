"""A layer that is not the library's own is named, with the reason and a remedy that can be followed."""

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import lightning_mdc as mdc
from lightning_mdc.errors import UnsupportedModelError
from lightning_mdc.models import find_anatomy
from tests.kinds import EVA_KINDS, TORCHVISION_KINDS, counted_macs, images, make, randomised


class LoRA(nn.Module):
    """As peft's."""

    def __init__(self, base_layer, rank=2):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Adapted(nn.Linear):
    """As loralib's."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.lora_A = nn.Parameter(torch.zeros(2, self.in_features))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, 2))

    def forward(self, x):
        return F.linear(x, self.weight + self.lora_B @ self.lora_A, self.bias)


class Int8(torch.Tensor):
    """As torchao's."""


def quantised(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Int8))
    return layer


def parametrised_bias(layer):
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    return layer


def scaled(layer):
    own = layer.forward
    layer.forward = lambda x: own(x) * 2
    return layer


ALTERED = {
    "peft": (LoRA, r"is a .*LoRA, an adapter .*merge_and_unload"),
    "loralib": (Adapted, r"is a .*Adapted, an adapter .*merge it"),
    "spectral norm": (
        parametrizations.spectral_norm,
        r"\.weight has a par.* \(SpectralNorm\); .*remove_parametriz",
    ),
    "weight norm": (parametrizations.weight_norm, r"\.weight has a parametrization \(WeightNorm\)"),
    "a bias": (parametrised_bias, r"\.bias has a parametrization \(Identity\); .*'bias'"),
    "old weight norm": (nn.utils.weight_norm, r"\.weight is made by a WeightNorm .*remove_weight_norm"),
    "prune": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r"\.weight is made by a L1U.*prune\.remove"),
    "torchao": (quantised, r"\.weight is a .*Int8, no plain tensor; if it is quantised, prune the model before"),
    "compiled": (
        partial(torch.compile, backend="eager"),
        r"is compiled by itself; put the original \(its _orig_mod\) back",
    ),
    "forward": (scaled, r"\.forward was replaced on the instance.*del module\.forward"),
    "wrapped": (
        lambda layer: nn.Sequential(layer, nn.Dropout()),
        r"is a torch.*Sequential, not an nn\.L.* its 0 in",
    ),
}


PATHS = ("attn.qkv", "mlp.fc2")
CASES = [
    pytest.param(path, *ALTERED[case], marks=[] if (i + j) % 2 else pytest.mark.slow, id=f"{case}-{path}")
    for i, case in enumerate(ALTERED)
    for j, path in enumerate(PATHS)
]


@pytest.mark.parametrize(("path", "alter", "why"), CASES)
def test_an_altered_layer_is_named_and_the_rest_is_pruned(path, alter, why):
    model = make()
    block = model.blocks[1]
    owner, name = path.split(".")
    setattr(block.get_submodule(owner), name, alter(block.get_submodule(path)))
    anatomy = find_anatomy(model)
    dimension = "heads" if owner == "attn" else "neurons"
    assert re.match(rf"blocks\.1\.{owner}\.{name} ?{why}", anatomy.blocks[1].reasons[dimension])
    assert list(anatomy.blocks[1].units) == ["neurons" if dimension == "heads" else "heads"]
    assert dimension in anatomy.blocks[2].units


def test_where_every_layer_is_altered_the_error_says_so():
    model = randomised(EVA_KINDS["rope"]())
    for block in model.blocks:
        block.attn.qkv = LoRA(block.attn.qkv)
    with pytest.raises(UnsupportedModelError, match=r"cannot lose heads: blocks\.0\.attn\.qkv is a .*LoRA, an adapter"):
        find_anatomy(model).require(["heads"])
    model = make("hiera")
    model.blocks[2].attn.proj = LoRA(model.blocks[2].attn.proj)
    with pytest.raises(UnsupportedModelError, match=r"Hiera: blocks\.2\.attn\.proj is a .*LoRA, an adapter"):
        find_anatomy(model)


def test_a_parametrised_layer_is_priced_and_computed_as_it_is():
    model = make()
    parametrizations.spectral_norm(model.blocks[1].mlp.fc1)
    model.eval()
    assert mdc.macs(model) == counted_macs(model)
    plan = mdc.make_plan(model, mdc.score(model, [images()], "activation", progress=False), mdc.Policy(0.5, 0.5, 0.5))
    assert [len(kept) for kept in plan.neurons] == [96, 0, 96, 96]
    with torch.no_grad(), mdc.masked(model, plan):
        masked = model(images())
    slim = mdc.slim(model, plan)
    with torch.no_grad():
        assert torch.equal(slim(images()), masked)
    assert mdc.macs(slim) == counted_macs(slim)


def test_torchvisions_layers_are_named_too():
    model = randomised(TORCHVISION_KINDS["vit"]())
    first, second, *_ = model.encoder.layers
    first.mlp[0] = LoRA(first.mlp[0])
    parametrizations.weight_norm(second.self_attention, "in_proj_weight")
    blocks = find_anatomy(model).blocks
    assert "encoder_layer_0.mlp.0 is a tests.test_parts.LoRA, an adapter" in blocks[0].reasons["neurons"]
    assert "self_attention.in_proj_weight has a parametrization (WeightNorm)" in blocks[1].reasons["heads"]


REPLACED = [("", "forward"), ("", "forward_features"), ("blocks.1", "forward"), ("blocks.1.attn", "forward")]


@pytest.mark.parametrize(("owner", "method"), REPLACED)
def test_a_method_replaced_on_an_instance_is_not_lost(owner, method):
    model = make()
    module = model.get_submodule(owner)
    own = getattr(module, method)
    setattr(module, method, lambda x, **options: own(x, **options) * 0.5)
    with pytest.raises(UnsupportedModelError, match=rf"{method} was replaced on the instance.*del module\.{method}"):
        find_anatomy(model).require(["tokens"])


def test_models_that_are_not_all_there_are_named():
    model = make()
    model.blocks[2].mlp.fc1 = nn.LazyLinear(192)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.2\.mlp\.fc1\.weight has no shape yet .*call the model"):
        find_anatomy(model)
    model = make()
    model.blocks[2].mlp.fc1.to("meta")
    with pytest.raises(UnsupportedModelError, match=r"blocks\.2\.mlp\.fc1\.weight has no values yet"):
        mdc.score(model, [images()], progress=False)
    del model.head
    with pytest.raises(UnsupportedModelError, match=r"a part of it is missing.*'head'"):
        find_anatomy(model)
    model.blocks = nn.Sequential()
    model.head = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="it has no blocks"):
        find_anatomy(model)


def test_a_forward_on_an_instance_that_a_copy_cannot_follow_is_said(caplog):
    model = make()
    own = model.blocks[1].mlp.forward
    model.blocks[1].mlp.forward = lambda x: own(x) * 0.5
    scores = mdc.score(model, [images()], "activation", progress=False)
    with caplog.at_level("WARNING"):
        mdc.slim(model, mdc.make_plan(model, scores, mdc.Policy(0.5, 0.5, 0.5)))
    (said,) = caplog.messages
    assert "blocks.1.mlp: its forward was replaced on the instance" in said
