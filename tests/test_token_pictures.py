"""Pictures of what a slim model looks at: are the patches shown the ones that the model kept?"""

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.app.report.outcomes import Examples
from lightning_mdc.figures.tokens import Example, answers, faded, tokens_figure
from lightning_mdc.tokens.surviving_patches import surviving_patches, watched_patches
from tests.kinds import images, make, randomised

KINDS = ["vit", "deit_distilled", "registers", "registers_without_class", "average_pool", "any_size"]


def slim_of(model: nn.Module, x: Tensor, **options) -> nn.Module:
    scores = mdc.score(model, [x], "activation", progress=False)
    return mdc.slim(
        model, mdc.make_plan(model, scores, mdc.Policy(heads=0.5, tokens=[0.7, 0.6, 0.8]), mdc.TokenOptions(**options))
    )


def kept_by_looking(slim: nn.Module, x: Tensor, num_patches: int) -> list[Tensor]:
    """For each token stage which patches' rows are still in the residual stream, found by comparing their numbers.

    With nothing added by attention and MLP the stream stays what the embedding was, so each row tells its patch.
    """
    seen: list[Tensor] = []
    with torch.no_grad():
        for block in slim.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
    handles = [slim.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))]
    for block in slim.blocks:
        if hasattr(block, "select"):
            handles.append(block.norm2.register_forward_pre_hook(lambda module, args: seen.append(args[0])))
    with torch.no_grad():
        slim(x)
    for handle in handles:
        handle.remove()
    patches = seen[0][:, -num_patches:]
    return [(patches[:, :, None] == tokens[:, None]).all(dim=-1).any(dim=-1) for tokens in seen[1:]]


@pytest.mark.parametrize("reduction", ["fuse", "drop"])
@pytest.mark.parametrize("kind", KINDS)
def test_survivors_are_the_patches_that_the_model_kept(kind: str, reduction: str) -> None:
    x = images(8)
    slim = slim_of(make(kind), x, reduction=reduction)
    expected = kept_by_looking(slim, x, 16)
    logits, survivors = surviving_patches(slim, x)
    assert torch.equal(logits, slim(x))
    assert survivors.shape == (8, 3, 16)
    for stage, truth in enumerate(expected):
        assert torch.equal(survivors[:, stage], truth)
    assert survivors[:, 0].sum(dim=1).min() >= survivors[:, 1].sum(dim=1).max() > 0  # fewer and fewer
    assert len({tuple(row) for row in survivors[:, 0].tolist()}) > 1  # each image its own


def test_survivors_under_a_prior_and_of_a_t2t_vit() -> None:
    x = images(8)
    slim = slim_of(make("vit"), x, score="attention*dependence")
    truth = kept_by_looking(slim, x, 16)
    assert torch.equal(surviving_patches(slim, x)[1], torch.stack(truth, dim=1))
    x = images(8, 64)
    model = timm.create_model("t2t_vit_14", img_size=64, depth=4, embed_dim=48, num_heads=4, num_classes=7)
    slim = slim_of(randomised(model), x)
    truth = kept_by_looking(slim, x, 16)
    assert torch.equal(surviving_patches(slim, x)[1], torch.stack(truth, dim=1))


def test_watching_leaves_no_trace_and_a_dense_model_keeps_everything() -> None:
    x = images(4)
    slim = slim_of(make("vit"), x).train()
    before = {name: tensor.clone() for name, tensor in slim.state_dict().items()}
    surviving_patches(slim, x)
    assert slim.training
    assert not any(module._forward_hooks for module in slim.modules() if type(module).__name__ == "TokenSelection")
    assert all(torch.equal(tensor, before[name]) for name, tensor in slim.state_dict().items())
    assert surviving_patches(make("vit"), x)[1].shape == (4, 0, 16)


@pytest.mark.parametrize("call", ["forward", "forward_features"])
def test_under_masks_the_patches_are_those_of_the_slim_model_on_what_reaches_it(call: str) -> None:
    class Own(nn.Module):
        """Somebody's module, with a normalisation of its own; one more call, on other images, comes after."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.encoder = model

        def forward(self, x: Tensor) -> Tensor:
            run = getattr(self.encoder, call)
            first = run(3 * x - 1)
            run(torch.zeros_like(x))
            return first

    x, model = images(8), make("vit").eval()
    plan = mdc.make_plan(model, mdc.score(model, [x], "activation", progress=False), mdc.Policy(heads=0.5, tokens=0.7))
    module = Own(model)
    with mdc.masked(model, plan):
        output, seen, survivors = watched_patches(model, lambda: module(x))
    assert torch.equal(seen, 3 * x - 1)
    assert torch.equal(survivors, surviving_patches(mdc.slim(model, plan), 3 * x - 1)[1])
    assert survivors.shape == (8, 3, 16)
    assert not output.requires_grad
    with pytest.raises(mdc.errors.CalibrationError, match="was not called on images"):
        watched_patches(model, lambda: None)


def test_exactly_the_patches_that_are_gone_are_faded() -> None:
    image = np.random.default_rng(0).integers(0, 200, (8, 12, 3), dtype=np.uint8)
    kept = np.array([True, False, True, False, True, True])  # 2 x 3 patches of 4 x 4 pixels
    shown = faded(image, kept, (2, 3))
    for patch, stays in enumerate(kept):
        row, column = divmod(patch, 3)
        pixels = np.s_[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
        assert np.array_equal(shown[pixels], image[pixels]) == stays
        assert stays or (shown[pixels] > image[pixels]).all()


def an_example(number: int, stages: int = 2) -> Example:
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 255, (3, 8, 8), dtype=np.uint8).transpose(1, 2, 0)  # as it comes from a tensor of channels
    kept = np.arange(16) < np.array([12, 7, 3])[:stages, None]
    return Example(pixels, "first of the test images", 3, (3, 0.97), (1, 0.554), 0.25, kept)


def test_the_picture_shows_every_stage_and_what_was_said() -> None:
    names = ("cat", "dog", "ship", "truck")
    examples = [an_example(0), an_example(1)]
    said = [answers(example, names) for example in examples]
    figure = tokens_figure([e.image for e in examples], [e.kept for e in examples], (1, 4), (4, 4), said)
    pictures = [panel.images[0].get_array() for panel in figure.axes]
    assert len(pictures) == 6
    assert np.array_equal(pictures[3], an_example(1).image)
    assert np.array_equal(pictures[5], faded(an_example(1).image, an_example(1).kept[1], (4, 4)))
    assert answers(an_example(0), names) == "is truck · dense: truck (97 %) · slim: dog (55 %)"
    assert figure.axes[0].get_title(loc="left") == answers(an_example(0), names)
    assert [text.get_text() for panel in figure.axes[:3] for text in panel.texts] == [
        "block 1: 12 of 16",
        "block 4: 7 of 16",
    ]


@pytest.mark.parametrize("stages", [0, 2])
def test_examples_go_to_a_file_and_back(tmp_path, stages: int) -> None:
    items = tuple(an_example(number, stages) for number in range(3))
    examples = Examples(items, "finetuned/seed0", (4, 4), (1, 4)[:stages], ("a", "b", "c", "d"), 360)
    examples.save(tmp_path / "examples.safetensors")
    read = Examples.load(tmp_path / "examples.safetensors")
    for name in ("model", "grid", "blocks", "class_names", "looked_at"):
        assert getattr(read, name) == getattr(examples, name)
    for before, after in zip(items, read.items, strict=True):
        assert np.array_equal(before.image, after.image)
        assert np.array_equal(before.kept, after.kept)
        assert (before.why, before.label, before.dense, before.slim) == (
            after.why,
            after.label,
            after.dense,
            after.slim,
        )
    (tmp_path / "examples.safetensors").write_bytes(b"torn")
    with pytest.raises(mdc.errors.ConfigError, match="runs the step test again"):
        Examples.load(tmp_path / "examples.safetensors")
