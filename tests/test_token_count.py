"""Tokens that the family does not count are not ranked as patches, and images the model cannot take are refused."""

import logging

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import lightning_mdc as mdc
from lightning_mdc.errors import CalibrationError, UnsupportedModelError
from tests.kinds import BASE, NAFLEX_KINDS, everyday, images, make, randomised


class Prompts(nn.Module):
    """Four tokens more, behind the class token."""

    def forward(self, x):
        return torch.cat([x[:, :1], x[:, 1:5] * 0, x[:, 1:]], dim=1)


class Registers(VisionTransformer):
    def _pos_embed(self, x):
        return Prompts()(super()._pos_embed(x))


def prompted():
    model = make()
    model.norm_pre = Prompts()
    return model


def prompted_by_hook():
    model = make()
    model.blocks.register_forward_pre_hook(lambda module, args: (Prompts()(args[0]),))
    return model


def prompted_behind_a_block():
    model = make()
    model.blocks[1].register_forward_hook(lambda module, args, output: Prompts()(output))
    return model


def patches_left_out():
    model = make()
    model.patch_drop.register_forward_hook(lambda module, args, output: output[:, ::2])
    return model


def counted_wrongly():
    model = make()
    model.num_prefix_tokens = 3
    return model


CASES = [
    (prompted, "blocks.0", 21),
    (prompted_by_hook, "blocks.0", 21),
    (prompted_behind_a_block, "blocks.2", 21),
    (patches_left_out, "blocks.0", 9),
    (counted_wrongly, "blocks.0", 17),
]


@pytest.mark.parametrize(("make_model", "block", "tokens"), CASES)
def test_other_tokens_than_the_models_own_are_refused_by_their_number(make_model, block, tokens):
    with pytest.raises(UnsupportedModelError, match=rf"{block} is given {tokens} tokens, but .* and 4x4 patches"):
        mdc.score(make_model(), [images()], progress=False)


def test_a_subclass_that_adds_tokens_is_refused_by_the_method_that_does():
    with pytest.raises(UnsupportedModelError, match="Registers: its class overrides _pos_embed of timm's"):
        mdc.score(Registers(**BASE), [images()], progress=False)


def test_tokens_of_hugging_face_are_counted_too():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=32, patch_size=8))
    model.vit.embeddings.register_forward_hook(lambda module, args, output: Prompts()(output))
    with pytest.raises(UnsupportedModelError, match=r"vit\.layers\.0 is given 21 tokens"):
        mdc.score(model.eval(), [images()], progress=False, dimensions=["tokens"])


def test_heads_and_neurons_go_on_and_it_is_said_that_prices_do_not_count_them(caplog):
    with caplog.at_level(logging.WARNING):
        mdc.score(prompted(), [images(), images()], progress=False, dimensions=("heads", "neurons"))
    assert sum("blocks.0 is given 21 tokens" in line and "prices" in line for line in caplog.messages) == 1


@pytest.mark.parametrize("kind", everyday("any_size", "registers", "deit_distilled"))
def test_what_a_model_counts_itself_is_taken(kind):
    shape = (8, 3, 16, 64) if kind == "any_size" else (8, 3, 32, 32)
    mdc.score(make(kind), [torch.randn(shape)], progress=False)


def test_patches_in_place_of_images_are_not_counted():
    model = randomised(NAFLEX_KINDS["naflex"]())
    mdc.score(model, [images()], progress=False)


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        (images().permute(0, 2, 3, 1), r"images are \(6, 32, 32, 3\); .* \(n, 3, height, width\); channels come first"),
        (images()[:, :1], r"images are \(6, 1, 32, 32\); VisionTransformer takes \(n, 3, height, width\)"),
        (images().to(torch.uint8), r"images are torch\.uint8; VisionTransformer takes floating-point"),
    ],
)
def test_images_the_model_cannot_take_are_refused(batch, why):
    with pytest.raises(CalibrationError, match=why):
        mdc.score(make(), [batch], progress=False)


def test_images_of_another_size_are_refused_by_both_sizes():
    with pytest.raises(UnsupportedModelError, match=r"\(64, 64\): this VisionTransformer takes \(32, 32\) images only"):
        mdc.score(make(), [images(size=64)], progress=False)
