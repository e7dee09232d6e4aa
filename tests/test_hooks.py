"""Other people's hooks, parametrisations, features: with masks on and on a slim model they see what it computes."""

import functools
import threading

import pytest
import torch
from timm.models._features import FeatureHooks
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import lightning_mdc as mdc
from lightning_mdc.errors import UnsupportedModelError
from lightning_mdc.models import find_anatomy
from tests.kinds import EVA_KINDS, SIZE, TORCHVISION_KINDS, images, make, randomised

LEAVING = mdc.Policy(0.5, 0.5, 0.5)  # of 17 tokens 9, 5 and 3 go on


def plan_for(model, policy=LEAVING, **options):
    scores = mdc.score(model, criterion="magnitude", dimensions=("heads", "neurons"))
    return mdc.make_plan(model, scores, policy, **options)


def seen_by(model, module, plan):
    """Shapes that hooks on `module` see go in and come out: with masks on, and in the slim model."""
    shapes = []

    def hook(module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        shapes.append((args[0].shape[1], first.shape[1]))

    module.register_forward_hook(hook)  # before any mask
    with torch.no_grad():
        with mdc.masked(model, plan):
            model(images(2))
        with_masks, shapes[:] = list(shapes), []
        mdc.slim(model, plan)(images(2))
    return with_masks, shapes


@pytest.mark.parametrize(
    ("path", "tokens"),
    [("blocks.1", (17, 9)), ("blocks.2.attn", (9, 9)), ("blocks.2.mlp", (5, 5)), ("blocks.1.norm2", (9, 9))],
)
def test_hooks_see_the_tokens_of_their_place(path, tokens):
    model = make()
    assert seen_by(model, model.get_submodule(path), plan_for(model)) == ([tokens], [tokens])


def test_a_hook_on_the_sequence_of_blocks_sees_it():
    model = make()
    plan = plan_for(model, tokens=mdc.TokenOptions(restore=True))
    assert seen_by(model, model.blocks, plan) == ([(17, 17)], [(17, 17)])


OF_TORCHVISION = "encoder.layers.encoder_layer_2.self_attention"


@pytest.mark.parametrize(
    ("kind", "path"), [(EVA_KINDS["rope"], "blocks.2.attn"), (TORCHVISION_KINDS["vit"], OF_TORCHVISION)]
)
def test_hooks_on_attentions_of_other_libraries(kind, path):
    model = randomised(kind())
    assert seen_by(model, model.get_submodule(path), plan_for(model)) == ([(9, 9)], [(9, 9)])


def test_hooks_on_an_attention_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
    model = randomised(transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=SIZE, patch_size=8)))
    assert seen_by(model, model.layers[2].attention, plan_for(model)) == ([(9, 9)], [(9, 9)])


def test_what_hooks_change_is_changed_in_the_slim_model_too():
    model = make()
    plan = plan_for(model)
    untouched = mdc.slim(model, plan)(images())
    model.blocks[1].attn.register_forward_hook(lambda module, args, output: output * 0.5)
    model.blocks.register_forward_pre_hook(lambda module, args: (args[0] * 0.9,))
    with torch.no_grad():
        slim = mdc.slim(model, plan)(images())
        with mdc.masked(model, plan):
            assert torch.equal(model(images()), slim)
    assert not torch.allclose(slim, untouched)


def test_global_hooks_see_every_attention():
    model = make()
    slim, shapes = mdc.slim(model, plan_for(model)), []

    def hook(module, args, output):
        if type(module).__name__ == "Attention":
            shapes.append(output.shape[1])

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        slim(images(2))
    finally:
        handle.remove()
    assert shapes == [17, 17, 9, 5]


class Recorder:
    """Keeps what it sees, beside something that cannot be copied."""

    def __init__(self):
        self.lock, self.seen = threading.Lock(), []

    def __call__(self, module, args, output):
        self.seen.append(output)  # with its graph

    def named(self, name, module, args, output):
        self.seen.append(name)


@pytest.mark.parametrize("hook", [lambda r: r, lambda r: r.__call__, lambda r: functools.partial(r.named, "3")])
def test_a_slim_models_hooks_write_where_their_owner_reads(hook):
    model, recorder = make(), Recorder()
    model.blocks[3].register_forward_hook(hook(recorder))
    model(images(2))
    slim = mdc.slim(model, plan_for(model))
    recorder.seen.clear()
    slim(images(2))
    assert len(recorder.seen) == 1


def test_timms_feature_hooks_go_on_with_a_slim_model():
    model = make()
    features = FeatureHooks(["blocks.1", "blocks.3"], model.named_modules())
    slim = mdc.slim(model, plan_for(model))
    with torch.no_grad():
        slim(images(2))
    assert [tuple(part.shape) for part in features.get_output(torch.device("cpu")).values()] == [(2, 9, 48), (2, 3, 48)]


def test_what_a_pass_left_in_a_module_is_no_obstacle_and_what_cannot_be_copied_is_named():
    model = make()
    model.blocks[2].register_forward_hook(lambda module, args, output: setattr(module, "seen", [output]))
    output = model(images(2))
    model.blocks[3].last = output
    slim = mdc.slim(model, plan_for(model))
    assert torch.equal(slim.blocks[3].last, output)
    model.blocks[1].attn.lock = threading.Lock()
    with pytest.raises(UnsupportedModelError, match=r"its blocks\.1\.attn\.lock cannot be copied; take it off"):
        mdc.slim(model, plan_for(model))


def test_pricing_shows_hooks_nothing():
    model, recorder = make(), Recorder()
    model.head = nn.Sequential(nn.Linear(48, 7))  # what has no formula of its own is counted on a copy
    model.head.register_forward_hook(recorder)
    assert mdc.macs(model) == mdc.macs(make())
    assert recorder.seen == []


def test_torch_fx_is_refused_by_name_where_tokens_leave():
    model = make()
    slim = mdc.slim(model, plan_for(model))
    with pytest.raises(UnsupportedModelError, match=r"torch\.fx cannot trace .*forward_intermediates"):
        create_feature_extractor(slim, {"blocks.3": "out"})
    whole = mdc.slim(model, plan_for(model, mdc.Policy(0.5, 0.5)))
    assert create_feature_extractor(whole, {"blocks.3": "out"})(images(2))["out"].shape == (2, 17, 48)
    with pytest.raises(UnsupportedModelError, match=r"torch\.fx or torch\.export made .*prune the model it was"):
        find_anatomy(create_feature_extractor(model, {"head": "out"}))
