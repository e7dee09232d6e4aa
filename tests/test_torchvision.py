"""torchvision's own vision transformers, which take the weights of what reads heads without calling it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformer, SwinTransformerBlock
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

import lightning_mdc as mdc
from lightning_mdc.models import find_anatomy
from tests.family_suite import FamilySuite, random_plan
from tests.kinds import CLASSES, DIM, HEADS, SIZE, TORCHVISION_KINDS, counted_macs, images, randomised


def vit(**options: Any) -> Any:
    return randomised(TORCHVISION_KINDS["vit"](**options))


class TestVisionTransformer(FamilySuite):
    @pytest.fixture
    def dense(self) -> nn.Module:
        return vit()

    def features(self, model: Any, x: Tensor) -> Tensor:
        tokens = model._process_input(x)
        features: Tensor = model.encoder(torch.cat([model.class_token.expand(len(x), -1, -1), tokens], dim=1))
        return features


@pytest.mark.parametrize("kind", ["swin", "swin_v2"])
class TestSwin(FamilySuite):
    @pytest.fixture
    def dense(self, kind: str) -> nn.Module:
        return randomised(TORCHVISION_KINDS[kind]())


def units_only(model: nn.Module, keep: float = 0.5) -> mdc.Plan:
    plan = random_plan(model, keep=keep)
    return mdc.Plan(plan.kept, plan.sizes)


def readers(model: Any) -> list[dict[str, nn.Linear]]:
    """By block, what reads its heads and its neurons."""
    if isinstance(model, VisionTransformer):
        return [{"heads": block.self_attention.out_proj, "neurons": block.mlp[3]} for block in model.encoder.layers]
    blocks = [part for part in model.modules() if isinstance(part, SwinTransformerBlock)]
    return [{"heads": block.attn.proj, "neurons": block.mlp[3]} for block in blocks]


@pytest.mark.parametrize("kind", TORCHVISION_KINDS)
@torch.no_grad()
def test_units_leave_as_if_nobody_read_them(kind: str) -> None:
    """An oracle that knows nothing of ours: torchvision's own model, in which nobody reads what is removed."""
    model = randomised(TORCHVISION_KINDS[kind]())
    slim = mdc.slim(model, units_only(model))
    for small in (slim, mdc.slim(slim, units_only(slim))):
        whole, expected = small.mdc_plan, copy.deepcopy(model)
        for index, of_block in enumerate(readers(expected)):
            for dimension, reader in of_block.items():
                gone = set(range(whole.sizes[dimension][index])) - set(whole.kept[dimension][index])
                reader.weight.unflatten(1, (whole.sizes[dimension][index], -1))[:, list(gone)] = 0
        torch.testing.assert_close(small(images()), expected(images()), rtol=0, atol=1e-5)


def test_a_dense_model_is_watched_without_a_trace() -> None:
    """What heads give, as it is computed here by hand; the model gives the same meanwhile, and is the same after it."""
    model, x = vit(), images(8)
    outputs, given = [], []
    block, before = model.encoder.layers[0], {name: type(module) for name, module in model.named_modules()}
    model.register_forward_hook(lambda module, args, output: outputs.append(output))
    block.ln_1.register_forward_hook(lambda module, args, output: given.append(output))
    with torch.no_grad():
        dense = model(x)
        keys = list(model.state_dict())
    scores = mdc.score(model, [x], "activation", moments=True, moment_tokens="all", progress=False)
    torch.testing.assert_close(outputs[1], dense, rtol=0, atol=1e-6)
    attn = block.self_attention
    q, k, v = (given[0] @ attn.in_proj_weight.T + attn.in_proj_bias).unflatten(-1, (3, HEADS, -1)).unbind(2)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * (DIM // HEADS) ** -0.5
    heads = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).flatten(2)
    moments = scores.moments.layers["heads"][0]
    torch.testing.assert_close(moments.mean, heads.mean((0, 1)), rtol=1e-4, atol=1e-5)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(model(x), dense)


def labelled() -> list[tuple[Tensor, Tensor]]:
    return [(images(8), torch.arange(8) % CLASSES)]


def test_gradients_reach_every_head() -> None:
    scores = mdc.score(vit(), labelled(), "taylor", progress=False)
    assert all((of_block > 0).all() for of_block in (*scores.heads, *scores.neurons, *scores.tokens))


def test_attention_is_called_as_torchvision_calls_it() -> None:
    model, x = vit(), torch.zeros(2, 5, DIM)
    attention = mdc.slim(model, units_only(model)).encoder.layers[0].self_attention
    assert attention(x, x, x, need_weights=False)[0].shape == x.shape
    mask = torch.zeros(5, 5)
    for options in ({}, {"need_weights": False, "attn_mask": mask}, {"need_weights": False, "is_causal": True}):
        with pytest.raises(mdc.errors.UnsupportedModelError, match=r"one tensor as query, .* and no mask"):
            attention(x, x, x, **options)
    with pytest.raises(mdc.errors.UnsupportedModelError, match="one tensor as query"):
        attention(x, x.clone(), x, need_weights=False)


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["swin", "swin_v2"])
@pytest.mark.parametrize("size", [(32, 32), (26, 44), (12, 30)])
def test_windows_of_any_image_are_shifted_filled_up_and_counted(kind: str, size: tuple[int, int]) -> None:
    """Windows that are shifted along both sides, along one, or not, and filled up: ours, while watched, is theirs."""
    model, outputs = randomised(TORCHVISION_KINDS[kind](window_size=[4, 6])), []
    x = torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = model(x)
        model.register_forward_hook(lambda module, args, output: outputs.append(output))
        scores = mdc.score(model, [x], "activation", moments=True, moment_tokens="all", progress=False)
        torch.testing.assert_close(outputs[0], dense, rtol=0, atol=1e-5)
        assert torch.equal(model(x), dense)
    # 4 images in whole windows of the first stage's map, which has a place per 2 x 2 pixels.
    rows, columns = -(-size[0] // 8) * 4, -(-size[1] // 12) * 6
    assert scores.moments.layers["heads"][0].rows == 4 * rows * columns
    assert scores.moments.layers["neurons"][0].rows == 4 * (size[0] // 2) * (size[1] // 2)
    model._forward_hooks.clear()
    slim = mdc.slim(model, units_only(model))
    for each in (model, slim):
        assert mdc.macs(each, input_size=size) == counted_macs(each, *size)


def test_gradients_reach_every_head_of_windows() -> None:
    scores = mdc.score(randomised(TORCHVISION_KINDS["swin_v2"]()), labelled(), "taylor", progress=False)
    assert all((of_block > 0).all() for of_block in (*scores.heads, *scores.neurons))


@torch.no_grad()
def test_a_block_can_lose_all_of_its_heads() -> None:
    for kind in TORCHVISION_KINDS:
        model = randomised(TORCHVISION_KINDS[kind]())
        plan = units_only(model)
        plan = mdc.Plan({**plan.kept, "heads": ((), *plan.kept["heads"][1:])}, plan.sizes)
        slim = mdc.slim(model, plan)
        with mdc.masked(model, plan):
            torch.testing.assert_close(slim(images()), model(images()), rtol=0, atol=1e-5)
        assert mdc.macs(slim) == counted_macs(slim)


# --- heads that people replace ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_head_in_the_place_of_torchvisions_is_saved(tmp_path: Path) -> None:
    for number, (place, head) in enumerate(
        (
            ("head", nn.Linear(DIM, 3)),
            ("heads", nn.Linear(DIM, 3)),
            ("head", nn.Identity()),
            ("heads", nn.Identity()),
        )
    ):
        model = vit(representation_size=20) if place == "heads" else vit()
        setattr(model.heads if place == "head" else model, place, head)
        assert mdc.macs(model) == mdc.macs(vit()) - DIM * (CLASSES - getattr(head, "out_features", 0))
        tokens = isinstance(head, nn.Linear)
        assert find_anatomy(model).default_dimensions() == ("heads", "neurons", *(("tokens",) if tokens else ()))
        slim = mdc.slim(model, random_plan(model))
        mdc.save(slim, tmp_path / str(number))
        assert torch.equal(mdc.load(tmp_path / str(number))(images()), slim(images()))


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec["args"].update(num_layers=3),
        lambda spec: spec["args"].update(mlp_dim=-1),
        lambda spec: spec["head"].update(at="encoder"),
        lambda spec: spec["head"].update(classes=0),
        lambda spec: spec["args"].pop("dropout"),
    ],
)
def test_a_file_that_says_something_else_is_refused(change: Any) -> None:
    model = vit()
    anatomy = find_anatomy(model)
    spec = anatomy.family.describe(model, anatomy.sizes)
    anatomy.family.check_spec(spec, model.state_dict())
    change(spec)
    with pytest.raises(mdc.errors.ArtifactError):
        anatomy.family.check_spec(spec, model.state_dict())


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_refusal_names_the_module_and_the_cause() -> None:
    class Own(VisionTransformer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flip(-1))

    class OwnBlock(EncoderBlock):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Named(VisionTransformer):
        pass

    options = {"image_size": SIZE, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": DIM, "mlp_dim": 96}
    with pytest.raises(mdc.errors.UnsupportedModelError, match="overrides forward of torchvision's VisionTransformer"):
        mdc.macs(Own(**options))
    assert find_anatomy(Named(**options)).num_heads == (4, 4)
    model = vit()
    with pytest.raises(mdc.errors.UnsupportedModelError, match="takes 32x32 images only"):
        mdc.macs(model, input_size=(64, 64))
    model.encoder.layers[1] = OwnBlock(HEADS, DIM, 96, 0.0, 0.0)
    model.encoder.layers[2].mlp[3] = nn.utils.parametrizations.weight_norm(model.encoder.layers[2].mlp[3])
    anatomy = find_anatomy(model)
    assert (anatomy.num_heads, anatomy.num_neurons) == ((4, 0, 4, 4), (96, 0, 0, 96))
    assert mdc.macs(model) == mdc.macs(vit())
    with pytest.raises(mdc.errors.UnsupportedModelError, match=r"encoder_layer_1 is a .*OwnBlock, not torchvision's E"):
        mdc.uniform_policy(model, 0.8, ("tokens",))


def test_what_a_swin_does_otherwise_is_named() -> None:
    class OwnAttention(ShiftedWindowAttention):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Own(SwinTransformer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flip(-1))

    options = {"patch_size": [2, 2], "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": [4, 4]}
    with pytest.raises(mdc.errors.UnsupportedModelError, match="overrides forward of torchvision's Swin"):
        mdc.macs(Own(**options))
    model: Any = randomised(SwinTransformer(**options))
    before = mdc.macs(model)
    model.features[3][0].mlp[3] = nn.utils.parametrizations.weight_norm(model.features[3][0].mlp[3])
    assert find_anatomy(model).num_neurons == (64, 0)
    assert mdc.macs(model) == before
    with pytest.raises(mdc.errors.UnsupportedModelError, match=r"features\.1\.0\.attn .* attends in windows"):
        mdc.uniform_policy(model, 0.8, ("tokens",))
    model.features[1][0].attn = OwnAttention(16, [4, 4], [0, 0], 2)
    with pytest.raises(mdc.errors.UnsupportedModelError, match=r"features\.1\.0\.attn is a .*OwnAttention, not torchv"):
        mdc.macs(model)


@torch.no_grad()
def test_a_swin_with_another_head_is_saved(tmp_path: Path) -> None:
    for head in (nn.Linear(64, 3), nn.Identity()):
        model: Any = randomised(TORCHVISION_KINDS["swin_v2"](stochastic_depth_prob=0.3, dropout=0.1))
        model.head = head
        mdc.save(model, tmp_path / "swin")
        assert torch.equal(mdc.load(tmp_path / "swin")(images()), model(images()))
