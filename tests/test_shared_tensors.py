"""One block, layer or parameter in several places: what cannot be pruned by itself is named, the rest goes on."""

import pytest
import torch
from torch import nn

import lightning_mdc as mdc
from lightning_mdc.errors import ArtifactError, UnsupportedModelError
from lightning_mdc.models import find_anatomy
from tests.kinds import TORCHVISION_KINDS, counted_macs, images, make, randomised


def share(path, *, tensor=None):
    """A model in which block 1 has the part (or its tensor) of block 0."""
    model = make()
    first, second = (model.blocks[i].get_submodule(path) for i in (0, 1))
    if tensor is not None:
        setattr(second, tensor, getattr(first, tensor))
    else:
        owner, _, name = path.rpartition(".")
        setattr(model.blocks[1].get_submodule(owner), name, first)
    return model


def slimmed(model):
    scores = mdc.score(model, [images()], "activation", moments=True, progress=False)
    plan = mdc.make_plan(model, scores, mdc.Policy(0.5, 0.5, 0.5))
    return mdc.slim(model, plan, "lstsq", moments=scores.moments)


def layers_of(kind):
    """A model, and where its blocks are."""
    if kind == "torchvision":
        model = randomised(TORCHVISION_KINDS["vit"]())
        return model, model.encoder, "layers", "encoder.layers.{}.self_attention"
    model = make()
    return model, model, "blocks", "blocks.{}.attn"


@pytest.mark.parametrize("kind", ["timm", "torchvision"])
def test_a_block_used_by_all_layers_is_refused_by_name(kind):
    model, owner, name, attention = layers_of(kind)
    first, *_, last = getattr(owner, name)
    setattr(owner, name, nn.Sequential(first, first, first))
    both = f"{attention.format(0)} and of {attention.format(1)}"
    with pytest.raises(UnsupportedModelError, match=rf"weight is of {both}; .*a copy of its own"):
        mdc.score(model, [images()], progress=False)
    setattr(owner, name, nn.Sequential(first, first, last))
    anatomy = find_anatomy(model)
    assert anatomy.depth == 3
    assert anatomy.dimensions == ("heads", "neurons")
    assert "are one module" in anatomy.no_tokens
    assert mdc.macs(model) == counted_macs(model)


@pytest.mark.parametrize(
    ("path", "tensor", "dimension"),
    [
        ("mlp", None, "neurons"),
        ("attn", None, "heads"),
        ("mlp.fc1", "weight", "neurons"),
        ("attn.qkv", "weight", "heads"),
        ("attn.proj", "bias", "heads"),  # which compensation changes
    ],
)
def test_blocks_that_share_a_tensor_of_units_keep_them(path, tensor, dimension):
    model = share(path, tensor=tensor)
    anatomy = find_anatomy(model)
    assert [dimension in block.units for block in anatomy.blocks] == [False, False, True, True]
    assert "and of blocks.0." in anatomy.blocks[1].reasons[dimension]
    plan = mdc.make_plan(model, mdc.score(model, [images()], "activation", progress=False), mdc.Policy(0.5, 0.5, 0.5))
    with torch.no_grad(), mdc.masked(model, plan):
        masked = model(images())
    slim = mdc.slim(model, plan)
    with torch.no_grad():
        assert torch.equal(slim(images()), masked)
    assert mdc.macs(slim) == counted_macs(slim)


@pytest.mark.parametrize(("path", "tensor"), [("norm1", None), ("norm2", "weight"), ("mlp", None)])
def test_what_is_tied_is_saved_once_and_stays_tied(path, tensor, tmp_path):
    model = share(path, tensor=tensor)
    slim = slimmed(model)
    with pytest.raises(
        ArtifactError, match=r"blocks\.1\.\S+ and blocks\.0\.\S+ are one tensor, and would be two\. save\(.*constr"
    ):
        mdc.save(slim, tmp_path / "m")
    mdc.save(slim, tmp_path / "m", constructor=False)
    loaded = mdc.load(tmp_path / "m", model=share(path, tensor=tensor))
    with torch.no_grad():
        assert torch.equal(loaded(images()), slim(images()))
    first, second = (loaded.blocks[i].get_submodule(path) for i in (0, 1))
    assert first is second if tensor is None else getattr(first, tensor) is getattr(second, tensor)
    with pytest.raises(ArtifactError, match=r"it lacks blocks\.1\." if path != "mlp" else "was saved of a model with"):
        mdc.load(tmp_path / "m", model=make())


def test_weights_that_differ_are_not_put_into_one_tensor(tmp_path):
    mdc.save(slimmed(make()), tmp_path / "m")
    with pytest.raises(ArtifactError, match=r"blocks\.1\.norm1\.weight and blocks\.0\.norm1\.weight differ, but"):
        mdc.load(tmp_path / "m", model=share("norm1"))


def test_tensors_of_one_memory_and_modules_without_any_are_no_ties(tmp_path):
    model = make()
    both = torch.randn(2, 144, 48)
    for block, weight in zip(model.blocks, both, strict=False):
        block.attn.qkv.weight = nn.Parameter(weight)
    for block in model.blocks:
        block.mlp.act = model.blocks[0].mlp.act
    mdc.save(model, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(mdc.load(tmp_path / "m")(images()), model(images()))


class Twice(nn.Module):
    """A student that is its own teacher, and a head that is tied to the transformer's."""

    def __init__(self):
        super().__init__()
        self.student = make()
        self.teacher, self.head = self.student, nn.Linear(48, 7)
        self.head.weight = self.student.head.weight

    def forward(self, x):
        return self.head(self.student.forward_features(x)[:, 0])


def test_a_shared_backbone_and_a_tied_head_are_one(tmp_path):
    module = Twice()
    assert slimmed(module).blocks[0].attn.num_heads == 2
    mdc.save(module, tmp_path / "m")
    loaded = mdc.load(tmp_path / "m", model=Twice())
    assert loaded.student is loaded.teacher
    assert loaded.head.weight is loaded.student.head.weight
    with torch.no_grad():
        assert torch.equal(loaded(images()), module(images()))
