"""Models whose tokens are bound to their places (windows, relative positions, pooling): heads and neurons leave."""

import copy
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.budget import CostModel, measure_latency_table
from lightning_mdc.distillation.losses import hidden_state_loss
from lightning_mdc.errors import BudgetError, UnsupportedModelError
from lightning_mdc.importance import Criterion
from lightning_mdc.models import find_anatomy
from tests.family_suite import random_plan
from tests.kinds import BASE, BOUND_KINDS, STAGED, counted_macs, everyday, images, make, randomised


def readers_of(model: nn.Module, dimension: str) -> list[nn.Linear]:
    """What reads heads or neurons, by the names that timm gives, in order; not of heads that talk to each other."""
    names = (".attn.proj", ".attn_out_proj") if dimension == "heads" else (".mlp.fc2", ".mlp_out_proj")
    return [
        module
        for path, module in model.named_modules()
        if path.endswith(names)
        and not (dimension == "neurons" and ".attn." in path)  # of positions
        and not hasattr(model.get_submodule(path.rpartition(".")[0]), "proj_l")
    ]


@pytest.mark.parametrize("kind", [kind for kind in BOUND_KINDS if kind != "beit_swiglu"])  # a norm is over its neurons
@torch.no_grad()
def test_a_masked_unit_is_one_whose_outputs_are_zeroed_by_hand(kind: str) -> None:
    model, x = make(kind), images()
    plan, zeroed = random_plan(model), copy.deepcopy(model)
    for dimension, sizes in plan.sizes.items():
        units = [(count, kept) for count, kept in zip(sizes, plan.kept[dimension], strict=True) if count]
        for reader, (count, kept) in zip(readers_of(zeroed, dimension), units, strict=True):
            gone = [unit for unit in range(count) if unit not in kept]
            reader.weight.unflatten(1, (count, -1))[:, gone] = 0
    with mdc.masked(model, plan):
        torch.testing.assert_close(model(x), zeroed(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", everyday("swin_v2", *(kind for kind in BOUND_KINDS if kind != "swin_v2")))
def test_blocks_may_lose_all_heads_and_all_neurons(kind: str) -> None:
    model, x = make(kind), images()
    scores = mdc.score(model, [images(8)], "activation", progress=False)
    depth = find_anatomy(model).depth
    heads, neurons = ((ratios * depth)[:depth] for ratios in ([0, 1, 0.5, 0], [0.5, 0, 1, 0]))
    plan = mdc.make_plan(model, scores, mdc.Policy(heads=heads, neurons=neurons))
    slim = mdc.slim(model, plan)
    with mdc.masked(model, plan):
        torch.testing.assert_close(model(x), slim(x), rtol=0, atol=1e-5)
    assert mdc.macs(slim) == counted_macs(slim) == mdc.plan_macs(model, plan)
    again = mdc.slim(slim, random_plan(slim))  # what is slim is cut again
    assert mdc.macs(again) == counted_macs(again) < mdc.macs(slim)
    with mdc.masked(slim, random_plan(slim)):
        torch.testing.assert_close(slim(x), again(x), rtol=0, atol=1e-5)


class Seen(Criterion):
    """Keeps what it is shown."""

    name, dimensions = "seen", ("heads", "neurons")

    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = {}

    def observe(self, activations: Tensor, group: Any) -> dict[str, Tensor]:
        self.seen.setdefault(group.name, []).append(activations)
        return {"sum": activations.sum(dim=(0, 1, 3))}

    def finish(self, sums: Mapping[str, Tensor], group: Any) -> Tensor:
        return sums["sum"]


@pytest.mark.parametrize("kind", ["swin", "swin_filled_up", "swin_v2_cr", "beit", "sam", "pit"])
def test_a_criterion_sees_the_tokens_of_each_image(kind: str) -> None:
    model, x = make(kind), images(3)
    together, alone = Seen(), Seen()
    mdc.score(model, [x], together, progress=False)
    mdc.score(model, list(x.split(1)), alone, progress=False)
    flow = CostModel(find_anatomy(model)).flow(CostModel(find_anatomy(model)).everything)
    for units in find_anatomy(model).all_units:
        (of_all,) = together.seen[units.name]
        torch.testing.assert_close(of_all, torch.cat(alone.seen[units.name]), rtol=0, atol=1e-5)
        tokens = flow[units.block].after if units.after_point else flow[units.block].before
        assert of_all.shape == (3, tokens, units.count, units.width)


@pytest.mark.parametrize("criterion", ["hsic", "taylor"])
def test_criteria_that_compare_images_score_windows(criterion: str) -> None:
    model = make("swin")
    labels = torch.arange(8) % 7
    scores = mdc.score(model, [(images(8), labels)], criterion, progress=False)
    assert [len(heads) for heads in scores.heads] == [2, 2, 4, 4]
    assert all(len(set(heads.tolist())) == len(heads) for heads in scores.heads)


@torch.no_grad()
def test_units_are_refitted_in_windows() -> None:
    model, batch = make("swin_v2"), images(24)
    scores = mdc.score(model, [batch], progress=False, moments=True)
    plan = mdc.make_plan(model, scores, mdc.Policy(heads=0.5, neurons=0.7))
    plain = mdc.slim(model, plan)
    refitted = mdc.slim(model, plan, compensate="lstsq", moments=scores.moments)
    dense = model(batch)
    assert (refitted(batch) - dense).square().mean() < (plain(batch) - dense).square().mean()


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [4, (3, 5), 20])
def test_a_model_of_any_size_is_priced_at_any_size(window: Any) -> None:
    model = randomised(SwinTransformer(**STAGED, window_size=window, strict_img_size=False))
    for size in ((32, 32), (48, 40), (36, 20)):
        assert mdc.macs(model, input_size=size) == counted_macs(model, *size)
    with pytest.raises(UnsupportedModelError, match=r"input_size=\(33, 32\): not a multiple of the \(2, 2\) patches"):
        mdc.macs(model, input_size=(33, 32))


def test_sams_relative_positions_are_priced_at_images_of_its_shape() -> None:
    model = make("sam")
    for size in (32, 48):
        assert mdc.macs(model, input_size=size) == counted_macs(model, size)
    with pytest.raises(UnsupportedModelError, match=r"input_size=\(32, 48\): with relative positions, only images of"):
        mdc.macs(model, input_size=(32, 48))


def test_hieradet_is_priced_where_its_windows_of_positions_fit() -> None:
    model = make("hieradet")
    for size in ((32, 32), (24, 40)):
        assert mdc.macs(model, input_size=size) == counted_macs(model, *size)
    with pytest.raises(UnsupportedModelError, match=r"input_size=\(28, 32\): not a multiple of \(8, 8\), which a wind"):
        mdc.macs(model, input_size=(28, 32))


@pytest.mark.parametrize("kind", ["swin", "swin_v2_cr", "beit", "relpos_mlp", "pit", "hiera", "cait"])
def test_a_model_of_one_size_says_so(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"input_size=\(48, 48\): this .* takes \(32, 32\) images only"):
        mdc.macs(make(kind), input_size=48)


@torch.no_grad()
def test_what_another_input_size_was_set_of_comes_back(tmp_path: Path) -> None:
    models = [SwinTransformer(**STAGED, window_size=7), Beit(**BASE, use_rel_pos_bias=True)]
    for number, model in enumerate(models):
        model.set_input_size((48, 64))
        randomised(model)
        mdc.save(model, tmp_path / str(number))
        x = torch.randn(2, 3, 48, 64)
        assert torch.equal(mdc.load(tmp_path / str(number))(x), model(x))
        assert mdc.macs(model) == counted_macs(model, 48, 64)


# --- what is refused --------------------------------------------------------------------------------------------------


class _OwnBlock(SwinTransformerBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class _OwnAttention(WindowAttention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask)


def test_a_part_of_ones_own_is_named() -> None:
    model: Any = randomised(SwinTransformer(**STAGED, window_size=4))
    model.layers[1].blocks[0].attn.__class__ = _OwnAttention
    anatomy = find_anatomy(model)
    assert anatomy.num_heads == (2, 2, 0, 4)  # costs that block's heads only
    assert "layers.1.blocks.0.attn is a" in anatomy.blocks[2].reasons["heads"]
    assert mdc.macs(model) == counted_macs(model)
    model.layers[1].blocks[1].__class__ = _OwnBlock
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.blocks\.1 is a .*_OwnBlock, not timm's SwinTransf"):
        find_anatomy(model)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: Beit(**BASE, use_shared_rel_pos_bias=True), r"rel_pos_bias \(RelativePositionBias\) is one bias"),
        (lambda: VisionTransformerRelPos(**BASE, shared_rel_pos=True), r"shared_rel_pos \(RelPosMlp\) is one bias"),
    ],
)
@torch.no_grad()
def test_a_shared_bias_leaves_the_neurons(model: Any, why: str) -> None:
    dense, x = randomised(model()), images()
    assert find_anatomy(dense).dimensions == ("neurons",)
    with pytest.raises(UnsupportedModelError, match=f"cannot lose heads: {why}.*Dimensions that do work: neurons"):
        mdc.uniform_policy(dense, 0.8, ("heads",))
    assert mdc.macs(dense) == counted_macs(dense)
    plan = random_plan(dense)
    slim = mdc.slim(dense, plan)
    assert mdc.macs(slim) == counted_macs(slim)
    with mdc.masked(dense, plan):
        torch.testing.assert_close(dense(x), slim(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("swin", r"layers\.0\.blocks\.0\.attn \(WindowAttention\) attends in windows"),
        ("beit", r"blocks\.0\.attn \(Attention\) has a bias for each pair of places"),
        ("sam", r"blocks\.0 \(Block\) takes its tokens as a grid"),
        ("hiera", r"blocks\.0\.attn \(MaskUnitAttention\) attends in mask units"),
        ("cait", r"blocks\.0\.attn \(TalkingHeadAttn\) mixes the attention maps of all heads"),
        ("parallel", r"blocks\.0 \(ParallelThingsBlock\) has 2 attentions side by side"),
        ("fused", r"blocks\.0 \(ParallelScalingBlock\) runs attention and MLP at once"),
        ("pit", r"transformers\.1\.pool \(Pooling\) is a convolution over the grid"),
    ],
)
def test_tokens_are_refused_by_the_true_reason(kind: str, why: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"cannot lose tokens: {why}.*work: heads, neurons"):
        mdc.uniform_policy(make(kind), 0.8, ("tokens",))


# --- what looks at tokens on a grid -----------------------------------------------------------------------------------


def test_hidden_states_on_a_grid_are_compared_by_their_mean_token() -> None:
    student, teacher = torch.randn(3, 4, 5, 8), torch.randn(3, 4, 5, 8)
    flat = hidden_state_loss([student.flatten(1, 2)], [teacher.flatten(1, 2)], 0)
    torch.testing.assert_close(hidden_state_loss([student], [teacher], 0), flat)


@pytest.mark.parametrize("kind", ["swin", "pit", "parallel"])
def test_the_latency_of_stages_is_measured(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    table = measure_latency_table(model, seconds=0.2, cache=tmp_path, progress=False)
    assert len(table.kinds) == 2  # one of each stage, or of each half
    dense, half = (table.of_policy(model, mdc.Policy(heads=keep, neurons=keep)) for keep in (1.0, 0.5))
    assert 0 < half <= dense


@pytest.mark.parametrize(("kind", "block"), [("hiera", r"blocks\.1"), ("cait", r"blocks_token_only\.0")])
def test_the_latency_of_blocks_that_change_the_shape_is_refused(kind: str, block: str, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=rf"{block} \(.*\) gives tokens of another shape.*limit macs or params"):
        measure_latency_table(make(kind), seconds=0.2, cache=tmp_path, progress=False)


@pytest.mark.parametrize("kind", everyday("swin", "pit", "parallel", "sam", "hiera", "cait"))
def test_searched_within_the_budget(kind: str) -> None:
    model, rng = make(kind), random.Random(0)
    scores = mdc.score(model, [images(8)], progress=False)
    found = mdc.search(model, scores, lambda slim: rng.random(), budget=0.7, n_trials=4)
    assert all(trial.macs is None or trial.macs <= 0.7 * mdc.macs(model) for trial in found.history)
    assert mdc.policy_macs(model, found.policy) <= 0.7 * mdc.macs(model)
    assert math.isfinite(found.value)
