"""timm's NaFlexVit: plain images lose tokens; batches of patches lose heads and neurons, and are refused where tokens
leave."""

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models.naflexvit import NaFlexVit, batch_patchify
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.errors import ArtifactError, UnsupportedModelError
from lightning_mdc.models import find_anatomy
from tests.family_suite import FamilySuite, random_plan
from tests.kinds import NAFLEX_KINDS, counted_macs, everyday, images, randomised
from tests.test_timm_eva import by_masking, splits_of, token_plan

ROPES = [kind for kind in ("naflex_rope", "naflex_mixed") if kind in NAFLEX_KINDS]


def make(kind: str) -> Any:
    return randomised(NAFLEX_KINDS[kind]())


@pytest.mark.parametrize("kind", everyday("naflex_rope", *(k for k in NAFLEX_KINDS if k != "naflex_rope")))
class TestNaFlex(FamilySuite):
    @pytest.fixture
    def dense(self, kind: str) -> nn.Module:
        return make(kind)


def patches(count: int = 5) -> dict[str, Tensor]:
    """Two rows of four patches of each image, of which those of the second image end earlier."""
    found, (height, width) = batch_patchify(images(count)[:, :, :16], (8, 8))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=-1).expand(count, -1, -1)
    valid = torch.ones(found.shape[:2], dtype=torch.bool)
    valid[1, 4:] = False
    return {"patches": found, "patch_coord": places.clone(), "patch_valid": valid}


@pytest.mark.parametrize("kind", [kind for kind in NAFLEX_KINDS if kind != "naflex_factorized"])  # reads images only
@torch.no_grad()
def test_batches_of_patches_lose_heads_and_neurons(kind: str) -> None:
    model, x = make(kind), patches()
    plan = random_plan(model)
    plan = mdc.Plan(plan.kept, plan.sizes)
    zeroed = copy.deepcopy(model)
    for index, block in enumerate(zeroed.blocks):
        for dimension, reader in (("heads", block.attn.proj), ("neurons", block.mlp.fc2)):
            count, kept = plan.sizes[dimension][index], plan.kept[dimension][index]
            gone = [unit for unit in range(count) if unit not in kept]
            reader.weight.unflatten(1, (count, -1))[:, gone] = 0
    expected = zeroed(x)
    assert not torch.allclose(expected, model(x), atol=1e-3)
    torch.testing.assert_close(mdc.slim(model, plan)(x), expected, rtol=0, atol=1e-5)
    with mdc.masked(model, plan):
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", everyday("naflex_rope", "naflex"))
def test_batches_of_patches_are_refused_where_tokens_leave(kind: str) -> None:
    model, x = make(kind), patches()
    slim = mdc.slim(model, random_plan(model))
    for call in (slim, slim.forward_features, slim.forward_intermediates):
        with pytest.raises(UnsupportedModelError, match="tokens leave inside this model, so its input has to be plain"):
            call(x)
    with pytest.raises(UnsupportedModelError, match="without a mask over patches"):
        slim(x["patches"], patch_coord=x["patch_coord"], patch_valid=x["patch_valid"])


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("reduction", ["drop", "fuse"])
@torch.no_grad()
def test_tokens_that_stay_turn_as_if_all_were_there(kind: str, reduction: str) -> None:
    model, x = make(kind), images()
    slim = mdc.slim(model, token_plan(model, reduction))
    features, splits = splits_of(slim, x)
    expected = by_masking(model, x, splits, reduction == "fuse")
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    assert (features - by_masking(model, x, splits, reduction == "fuse", shift=1)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", everyday(*ROPES[::-1], "naflex"))
def test_what_is_read_between_the_blocks_is_what_runs(kind: str) -> None:
    model, x = make(kind), images(3)
    slim = mdc.slim(model, random_plan(model, restore=True))
    features, maps = slim.forward_intermediates(x, indices=[3], norm=True)
    torch.testing.assert_close(features, slim.forward_features(x), rtol=0, atol=1e-5)
    assert maps[0].shape == (3, 48, 4, 4)
    with pytest.raises(UnsupportedModelError, match="output_fmt='NCHW'"):
        mdc.slim(model, random_plan(model, restore=False)).forward_intermediates(x)


@pytest.mark.parametrize("kind", ROPES)
def test_patches_dropped_in_training_take_their_turns_with_them(kind: str) -> None:
    mixed = kind == "naflex_mixed"
    options = {"rope_type": "mixed" if mixed else "axial", "rope_temperature": 4.0, "patch_drop_rate": 0.5}
    made = NaFlexVit(patch_size=8, embed_dim=48, depth=4, num_heads=4, num_classes=7, global_pool="avg", **options)
    model, x = randomised(made).train(), images()
    nothing_leaves = token_plan(model, "drop")
    stages = tuple(type(stage)(stage.block, 1.0) for stage in nothing_leaves.tokens)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    kept = mdc.Plan(nothing_leaves.kept, nothing_leaves.sizes, stages, "drop", restore=False)
    torch.testing.assert_close(mdc.slim(model, kept)(x), expected, rtol=0, atol=1e-5)
    plan = random_plan(model, prior=False)
    torch.manual_seed(1)
    with mdc.masked(model, plan):
        masked = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(mdc.slim(model, plan)(x), masked, rtol=0, atol=1e-5)


def test_images_of_any_size_are_priced() -> None:
    for kind, padded in (("naflex", False), ("naflex_factorized", True), ("naflex_rope", False)):
        model = make(kind)
        model.embeds.dynamic_img_pad = padded
        for size in ((32, 32), (48, 24), *([(35, 41)] if padded else [])):
            assert mdc.macs(model, input_size=size) == counted_macs(model, *size)
    with pytest.raises(UnsupportedModelError, match=r"input_size=\(35, 32\): not a multiple of the \(8, 8\) patches"):
        mdc.macs(make("naflex"), input_size=(35, 32))


def test_a_timm_name_is_of_the_size_of_its_configuration() -> None:
    with torch.device("meta"):
        model = timm.create_model("naflexvit_base_patch16_gap")
    assert find_anatomy(model).input_size == (3, *model.pretrained_cfg["input_size"][1:])


@pytest.mark.parametrize(
    "change", [{"rope_type": "os.system"}, {"depth": 3}, {"pos_embed_grid_size": [0, 4]}, {"embed_dim": "48"}]
)
def test_a_file_that_says_something_else_is_refused(change: dict[str, Any]) -> None:
    model = make("naflex")
    anatomy = find_anatomy(model)
    spec = anatomy.family.describe(model, anatomy.sizes)
    anatomy.family.check_spec(spec, model.state_dict())
    with pytest.raises(ArtifactError):
        anatomy.family.check_spec(spec | {"args": spec["args"] | change}, model.state_dict())
