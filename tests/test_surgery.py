"""Masks and slim models: equal to each other, reversible, and good citizens of compile, export and autocast."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.layers import PatchDropout
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.errors import PlanError, UnsupportedModelError
from lightning_mdc.policy import TokenStage
from lightning_mdc.surgery import apply_masks, is_masked, remove_masks
from lightning_mdc.tokens import Evidence, Reduction, register
from lightning_mdc.tokens.block import restored
from lightning_mdc.tokens.reduction import REDUCTIONS, rows
from lightning_mdc.tokens.selection import TokenSelection, resample_prior
from tests.kinds import KINDS, counted_macs, daily, everyday, images, make, randomised


def planned(model: nn.Module, policy: mdc.Policy | None = None, **options: Any) -> mdc.Plan:
    scores = mdc.score(model, [images(8)], "activation", progress=False)  # which units is not the point
    return mdc.make_plan(model, scores, policy or mdc.Policy(0.5, 0.4, 0.6), mdc.TokenOptions(**options))


def test_tokens_are_ranked_by_dependence_too_where_positions_are_scored() -> None:
    model, tokens = make(), mdc.TokenOptions(score=None)
    scores = mdc.score(model, [images(8)], progress=False)
    plan = mdc.make_plan(model, scores, mdc.Policy(tokens=0.6), tokens)
    assert plan == mdc.make_plan(model, scores, mdc.Policy(tokens=0.6), mdc.TokenOptions("attention*dependence"))
    assert plan.tokens[0].prior is not None
    units = mdc.score(model, [images(8)], dimensions=["heads"], progress=False)
    unknown = mdc.make_plan(model, units, mdc.Policy(tokens=0.6), tokens)
    assert unknown == mdc.make_plan(model, units, mdc.Policy(tokens=0.6), mdc.TokenOptions("attention"))


def agree(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).detach().abs().max() <= tolerance * max(1.0, float(b.detach().abs().max())))


@pytest.mark.parametrize("kind", ["vit", "deit_distilled", "average_pool", "beit3_scale_norms", "swiglu_normed"])
@torch.no_grad()
def test_blocks_without_heads_or_neurons(kind: str) -> None:
    model, x = make(kind), images()
    policy = mdc.Policy(heads=[0, 1, 0.5, 0], neurons=[0.5, 0, 1, 0], tokens=[0.8, 0.7, 0.5])
    for token_score in ("attention", "dependence"):
        plan = planned(model, policy, score=token_score)
        slim = mdc.slim(model, plan)
        assert slim.blocks[0].attn.qkv.weight.shape == (0, 48)
        assert slim.blocks[3].mlp.fc2.weight.shape == (48, 0)
        with mdc.masked(model, plan):
            assert agree(model(x), slim(x))


def test_a_headless_first_stage_uses_the_prior() -> None:
    model = make()
    headless_first = planned(model, mdc.Policy(heads=[1, 0, 1, 1], tokens=0.5))
    assert headless_first.tokens[0].prior is not None
    assert headless_first.tokens[1].prior is None
    headless_later = planned(model, mdc.Policy(heads=[1, 1, 0, 1], tokens=0.5))
    assert [stage.prior is None for stage in headless_later.tokens] == [True, False, True]


@pytest.mark.parametrize("kind", daily(KINDS))
@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_keeping_everything_changes_no_bit(kind: str, fused: bool) -> None:
    model, x = make(kind), images()
    for block in model.blocks:
        block.attn.fused_attn = fused
    expected = model(x)
    everything = planned(model, mdc.Policy())
    with mdc.masked(model, everything):
        assert not is_masked(model)
        assert torch.equal(model(x), expected)
    # The stage block itself, told to keep all: its own restatement of attention must not differ in a bit.
    stages = planned(model, mdc.Policy(tokens=0.5)).tokens
    slim = mdc.slim(model, planned(model, mdc.Policy(tokens=0.5)))
    for stage in stages:
        slim.blocks[stage.block].select.stage = type(stage)(stage.block, 1.0)
    assert torch.equal(slim(x), expected)


@torch.no_grad()
def test_the_tokens_kept_are_those_the_class_token_attends_to() -> None:
    model, x = make(), images(3)
    plan = planned(model, mdc.Policy(tokens=[0.5, 1, 1]))
    slim, seen = mdc.slim(model, plan), {}
    slim.blocks[1].norm2.register_forward_pre_hook(lambda _, args: seen.update(reduced=args[0]))

    hidden = model.blocks[0](model.norm_pre(model._pos_embed(model.patch_embed(x))))
    block = model.blocks[1]
    qkv = block.attn.qkv(block.norm1(hidden)).reshape(3, 17, 3, 4, 12).permute(2, 0, 3, 1, 4)
    attention = (qkv[0] @ qkv[1].transpose(-1, -2) / 12**0.5).softmax(-1)[:, :, 0, 1:].mean(1)
    after = hidden + block.attn(block.norm1(hidden))
    slim(x)
    assert seen["reduced"].shape == (3, 9, 48)  # 17 tokens at 0.5: 8 stay, and one fused
    for i in range(3):
        best = attention[i].topk(7).indices.sort().values + 1
        torch.testing.assert_close(seen["reduced"][i, 1:8], after[i, best])
        rest = [t for t in range(1, 17) if t not in best.tolist()]
        torch.testing.assert_close(seen["reduced"][i, 8], after[i, rest].mean(0))


def test_priors_are_resampled_to_other_grids() -> None:
    prior = torch.arange(12.0)
    assert torch.equal(resample_prior(prior, (3, 4), 12), prior)
    assert resample_prior(prior, (3, 4), 48).reshape(6, 8)[0, 0] == pytest.approx(0)
    with pytest.raises(PlanError, match="3x4 patches cannot be resampled to 13"):
        resample_prior(prior, (3, 4), 13)
    model = make("any_size")
    plan = planned(model, score="attention*dependence")
    with torch.no_grad(), mdc.masked(model, plan):
        assert agree(model(images(2, 64)), mdc.slim(model, plan)(images(2, 64)))
        with pytest.raises(PlanError, match=r"64x16 have 8x2 patches, but the token prior is for a grid like 4x4"):
            model(images(1, 64)[..., :16])  # sixteen positions as well


# --- traces -----------------------------------------------------------------------------------------------------------


def test_slim_leaves_the_dense_model_alone_and_keeps_its_ways() -> None:
    model = make().double().train()
    model.pretrained_cfg = {"mean": (0.1, 0.2, 0.3)}
    model.blocks[0].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    slim = mdc.slim(model, planned(model.eval()))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert slim.pretrained_cfg == {"mean": (0.1, 0.2, 0.3)}
    assert slim.head.weight.dtype == torch.float64
    assert not slim.training
    assert mdc.slim(model.train(), slim.mdc_plan).training
    assert not slim.blocks[0].attn.qkv.weight.requires_grad
    assert slim.blocks[1].attn.qkv.weight.requires_grad
    assert slim.head.weight.data_ptr() != model.head.weight.data_ptr()


def test_masks_come_off_after_an_error_and_do_not_stack() -> None:
    model, calls = make(), []
    handle = model.blocks[1].mlp.fc2.register_forward_pre_hook(lambda *_: calls.append(1))
    plan = planned(model)
    with mdc.masked(model, plan), pytest.raises(PlanError, match="masked already"):
        apply_masks(model, plan)
    assert not is_masked(model)
    with pytest.raises(AssertionError, match="Input height"), mdc.masked(model, plan):
        model(images(1, size=5))
    assert not is_masked(model)
    assert "forward_intermediates" not in vars(model)
    calls.clear()
    model(images(1))
    assert calls  # somebody else's hook is still there
    handle.remove()


@torch.no_grad()
def test_copies_of_a_masked_model_stand_on_their_own() -> None:
    model, x = make("beit3_scale_norms"), images()
    plan, dense = planned(model), model(x)
    apply_masks(model, plan)
    masked = model(x)
    copied = copy.deepcopy(model)
    assert torch.equal(mdc.slim(model, plan)(x), mdc.slim(copied, plan)(x))  # a slim model carries no masks
    remove_masks(model)
    assert torch.equal(copied(x), masked)
    assert torch.equal(model(x), dense)
    remove_masks(copied)
    assert torch.equal(copied(x), dense)


@torch.no_grad()
def test_slimming_a_slim_model_again() -> None:
    model, x = make(), images()
    first = mdc.slim(model, planned(model, mdc.Policy(0.75, 0.5, 1.0)))
    second_plan = planned(first, mdc.Policy(0.7, 0.5, 0.6))
    second = mdc.slim(first, second_plan)
    with mdc.masked(model, second.mdc_plan):  # composed: relative to the dense model
        assert agree(model(x), second(x))
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1 already drops tokens"):
        planned(second, mdc.Policy(tokens=0.9))
    third = mdc.uniform_policy(second, 0.8, ("heads", "neurons"))
    assert mdc.policy_macs(second, mdc.Policy()) == mdc.macs(second)
    assert 0.75 * mdc.macs(second) < mdc.policy_macs(second, third) <= 0.8 * mdc.macs(second)
    plan = planned(second, third)
    assert mdc.plan_macs(second, plan) == mdc.macs(mdc.slim(second, plan)) == mdc.policy_macs(second, third)


def test_plans_of_another_model_are_refused() -> None:
    plan = planned(make())
    other = randomised(KINDS["vit"]())
    other.blocks = other.blocks[:3]
    with pytest.raises(PlanError, match="plan is for another model: it knows 4 blocks"):
        mdc.slim(other, plan)


# --- company ----------------------------------------------------------------------------------------------------------


def shallow(kind: str = "vit") -> nn.Module:
    """Two blocks, a token stage in each: compilers take seconds for every block."""
    model = make(kind)
    model.blocks = model.blocks[:2]
    return model


COMPILED_KINDS = everyday("deit_distilled", "vit", "average_pool", "rms_norms")


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMPILED_KINDS)
@torch.no_grad()
def test_slim_models_compile_whole_and_export(kind: str) -> None:
    model, x = shallow(kind), images()
    slim = mdc.slim(model, planned(model, score="attention*dependence"))
    eager = slim(x)
    assert agree(torch.compile(slim, fullgraph=True, backend="aot_eager")(x), eager, 1e-4)
    exported = torch.export.export(slim, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
    assert agree(exported(x), eager, 1e-4)
    assert agree(exported(x[:3]), eager[:3], 1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_slim_models_compile_with_inductor() -> None:
    import shutil

    if not any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++")):
        pytest.skip("inductor needs a C++ compiler, and there is none here")
    slim = mdc.slim(make(), planned(make()))
    assert agree(torch.compile(slim, fullgraph=True)(images()), slim(images()), 1e-4)


@pytest.mark.parametrize("kind", COMPILED_KINDS)
@torch.no_grad()
def test_masks_take_effect_around_compiled_code(kind: str) -> None:
    model, x = shallow(kind), images()
    plan = planned(model)
    dense, slim = model(x), mdc.slim(model, plan)(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert agree(compiled(x), dense)
    with mdc.masked(compiled, plan):  # compiled before: the masks must be seen
        assert agree(compiled(x), slim)
    assert agree(compiled(x), dense)  # compiled under masks: they must be gone
    in_place = copy.deepcopy(model)
    in_place.compile(backend="aot_eager")
    with mdc.masked(in_place, plan):
        assert agree(in_place(x), slim)
    assert agree(in_place(x), dense)
    assert not agree(dense, slim, 1e-3)


@pytest.mark.slow
@torch.no_grad()
def test_masks_take_effect_on_blocks_compiled_one_by_one() -> None:
    model, x = make(), images()
    dense = model(x)
    # All blocks share one piece of code; without guards a block without masks lends it to one with.
    plans = [planned(model, p) for p in (mdc.Policy(heads=[1, 0.5, 0.5, 0.5]), mdc.Policy(neurons=[1, 1, 0.3, 0.3]))]
    plans.append(planned(model, mdc.Policy(1.0, 1.0, 0.6)))
    slims = [mdc.slim(model, plan)(x) for plan in plans]
    for i in range(4):
        model.blocks[i] = torch.compile(model.blocks[i], backend="aot_eager")
    for plan, slim in zip(plans, slims, strict=True):
        assert agree(model(x), dense)
        with mdc.masked(model, plan):
            assert agree(model(x), slim)
        assert not agree(dense, slim, 1e-3)


def counted(function: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[int]]:
    """`function`, compiled, and a list that gets longer with each compilation of it."""
    compilations: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
        compilations.append(len(graph.graph.nodes))
        return graph.forward

    return torch.compile(function, backend=backend), compilations


@torch.no_grad()
def test_masks_leave_other_peoples_compiled_code_alone() -> None:
    model, x = make(), images()
    plans = [planned(model), planned(model, mdc.Policy(neurons=0.3)), planned(model, mdc.Policy())]
    other, compilations = counted(lambda y: (y.sin() + 1).square())
    other(x)
    for plan in plans:
        with mdc.masked(model, plan):
            model(x)
            other(x)
        other(x)
    assert len(compilations) == 1


@pytest.mark.slow
@torch.no_grad()
def test_masks_take_effect_in_a_compiled_parent() -> None:
    model, x = shallow(), images()
    plan = planned(model)
    dense, slim = model(x), mdc.slim(model, plan)(x)
    parent = nn.Sequential(nn.Identity(), model)
    parent.compile(backend="aot_eager")
    assert agree(parent(x), dense)
    with mdc.masked(parent, plan):
        assert agree(parent(x), slim)
    assert agree(parent(x), dense)


@pytest.mark.slow
@torch.no_grad()
def test_what_was_first_compiled_under_masks_is_compiled_again_without() -> None:
    """Also what cannot be seen from the model: its code knows of the hooks it was compiled with."""
    model, x = shallow(), images()
    plans = [planned(model), planned(model, mdc.Policy(heads=0.5))]
    dense, slims = model(x), [mdc.slim(model, plan)(x) for plan in plans]
    compiled = torch.compile(lambda images: model(images), backend="aot_eager")
    for plan, slim in zip(plans, slims, strict=True):
        with mdc.masked(model, plan):
            assert agree(compiled(x), slim)
    assert agree(compiled(x), dense)


def test_autocast_and_gradient_checkpointing() -> None:
    model, x = make(), images()
    plan = planned(model)
    slim = mdc.slim(model, plan).train()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert slim(x).dtype == torch.bfloat16
        with mdc.masked(model, plan):
            assert agree(model(x).float(), slim(x).float(), 1e-2)

    def gradient(checkpointing: bool, net: nn.Module) -> Tensor:
        net.set_grad_checkpointing(checkpointing)
        net.zero_grad()
        net(x).square().sum().backward()
        return net.patch_embed.proj.weight.grad.clone()

    torch.testing.assert_close(gradient(True, slim), gradient(False, slim))
    with mdc.masked(model.train(), plan):
        torch.testing.assert_close(gradient(True, model), gradient(False, model))


@pytest.mark.parametrize("reduction", ["fuse", "drop", "merge"])
@torch.no_grad()
def test_features_between_blocks_are_refused_or_restored(reduction: str) -> None:
    model, x = make(), images(2)
    plan = planned(model, reduction=reduction, restore=False)
    slim = mdc.slim(model, plan)
    for broken in (slim, copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
        with pytest.raises(UnsupportedModelError, match="output_fmt='NLC'"):
            broken.forward_intermediates(x)
        lengths = [y.shape[1] for y in broken.forward_intermediates(x, output_fmt="NLC")[1]]
        assert lengths[0] == 16
        assert lengths[3] < lengths[2] < lengths[1] < 16
    fewer_heads = planned(slim, mdc.Policy(heads=0.5))
    with mdc.masked(slim, fewer_heads):
        pass
    for still in (slim, mdc.slim(slim, fewer_heads)):  # masks that came and went took nothing along
        with pytest.raises(UnsupportedModelError, match="output_fmt='NLC'"):
            still.forward_intermediates(x)
    with mdc.masked(model, plan), pytest.raises(UnsupportedModelError, match="NCHW"):
        model.get_intermediate_layers(x, reshape=True)
    assert model.forward_intermediates(x)[1][0].shape == (2, 48, 4, 4)
    with pytest.raises(UnsupportedModelError, match="attn_mask"):
        slim(x, attn_mask=torch.zeros(17, 17))
    restored = mdc.slim(model, planned(model, reduction=reduction, restore=True))
    last, maps = restored.forward_intermediates(x)
    assert [y.shape for y in maps] == [(2, 48, 4, 4)] * 4
    assert torch.equal(last, restored.forward_features(x))
    torch.testing.assert_close(restored.norm(maps[3].flatten(2).transpose(1, 2)), last[:, 1:], rtol=0, atol=1e-5)
    assert agree(restored(x), slim(x))


# --- what becomes of tokens, against loops ----------------------------------------------------------------------------


def selected(
    x: Tensor, stages: list[TokenStage], reduction: str, evidence: Evidence, prefix: int = 1
) -> tuple[Any, ...]:
    """x (batch, tokens, dim) through stages one after another, restored at the end, and what each put out."""
    prefix, carried, seen = 1, None, []
    for stage in stages:
        select = TokenSelection(stage, prefix, (0,), reduction, keeps_last=True)
        kept = evidence._replace(q=evidence.q[:, :, : x.shape[1]], k=evidence.k[:, :, : x.shape[1]])
        x, carried = select(x, kept, carried)
        seen.append(x)
    return restored(x, carried, prefix), *seen


def test_dropped_positions_come_back_as_they_were_and_fused_ones_as_their_token() -> None:
    x = torch.arange(2 * 7, dtype=torch.float32).reshape(2, 7, 1)
    nothing = Evidence(torch.zeros(2, 0, 7, 1), torch.zeros(2, 0, 7, 1), 1.0)
    first = TokenStage(0, 5 / 7, "dependence", (0.1, 0.5, 0.2, 0.9, 0.8, 0.7), (2, 3))  # 0 and 2 leave
    dropped, left = selected(x, [first], "drop", nothing)
    assert left[0, :, 0].tolist() == [0, 2, 4, 5, 6]
    assert torch.equal(dropped, x)
    fused, left = selected(x, [first], "fuse", nothing)
    assert left[0, :, 0].tolist() == [0, 2, 4, 5, 6, 2]  # the mean of 1 and 3
    assert fused[0, :, 0].tolist() == [0, 2, 2, 2, 4, 5, 6]
    # At a second stage the fused token has the mean prior of its two positions, 0.15, and leaves with position 1.
    second = TokenStage(1, 4 / 6, "dependence", first.prior, first.grid)
    both, _, left = selected(x, [first, second], "fuse", nothing)
    assert left[0, :, 0].tolist() == [0, 4, 5, 6, 2]
    assert both[0, :, 0].tolist() == [0, 2, 2, 2, 4, 5, 6]


def test_merged_tokens_are_means_by_size_over_the_positions_they_stand_for() -> None:
    generator = torch.Generator().manual_seed(0)
    x, q, k = (torch.randn(3, *shape, generator=generator) for shape in ((9, 4), (2, 9, 5), (2, 9, 5)))
    prior = tuple(torch.rand(8, generator=generator).tolist())
    stages = [TokenStage(0, 6 / 9, "dependence", prior, (2, 4)), TokenStage(1, 4 / 6, "dependence", prior, (2, 4))]
    restored_, first, second = selected(x, stages, "merge", Evidence(q, k, 1.0))
    for image in range(3):
        groups = [[position] for position in range(8)]  # of positions, by token
        for count, out in ((5, first), (3, second)):
            means = [sum(prior[p] for p in group) / len(group) for group in groups]
            order = sorted(range(len(groups)), key=lambda token: -means[token])
            kept, leaving = sorted(order[:count]), order[count:]
            keys = k[image, :, 1 : 1 + len(groups)].mean(dim=0)
            keys = keys / keys.norm(dim=-1, keepdim=True)
            merged = [list(groups[token]) for token in kept]
            for token in leaving:
                alike = [float(keys[token] @ keys[other]) for other in kept]
                merged[alike.index(max(alike))] += groups[token]
            groups = merged
            expected = torch.stack([x[image, 1:][group].mean(dim=0) for group in groups])
            torch.testing.assert_close(out[image, 1:], expected, rtol=0, atol=1e-5)
        for token, group in enumerate(groups):
            assert torch.equal(restored_[image, 1:][group], second[image, 1 + token].expand(len(group), -1))


@torch.no_grad()
def test_attention_proportional_to_size_is_attention_to_every_position() -> None:
    """Tokens that were alike before they were merged get the attention that all of them would have got."""
    model = make()
    with torch.no_grad():
        model.pos_embed.zero_()
    x = images(2)[:, :, :8, :8].tile(1, 1, 4, 4)  # sixteen equal patches
    plan = planned(model, mdc.Policy(tokens=[0.3, 1, 1]), reduction="merge-proportional")
    assert agree(mdc.slim(model, plan)(x), model(x))
    assert not agree(mdc.slim(model, planned(model, mdc.Policy(tokens=[0.3, 1, 1]), reduction="merge"))(x), model(x))


def test_an_unknown_reduction_is_told() -> None:
    with pytest.raises(PlanError, match="reduction='mix' is unknown; known are drop, fuse, merge"):
        planned(make(), reduction="mix")


def test_a_reduction_of_ones_own() -> None:
    class KeepSecond(Reduction):
        """The first of those that leave goes on, all others are gone."""

        name, extra, drops = "keep-second", 1, True

        def forward(self, tokens: Tensor, kept: Tensor, leaving: Tensor, sizes: Any, evidence: Evidence) -> Any:
            goes_on = torch.cat([kept, leaving[:, :1]], dim=1)
            order = torch.cat([goes_on, leaving[:, 1:]], dim=1)
            there = torch.arange(order.shape[1]).expand_as(order)
            there = torch.where(there < goes_on.shape[1], there, -1)
            return rows(tokens, goes_on), torch.zeros_like(order).scatter(1, order, there)

    register(KeepSecond)
    try:
        model, x = make(), images()
        plan = planned(model, reduction="keep-second", restore=True)
        slim = mdc.slim(model, plan)
        with mdc.masked(model, plan):
            assert agree(model(x), slim(x))
        assert slim.forward_features(x).shape == (6, 17, 48)
        assert mdc.plan_macs(model, plan) == mdc.macs(slim) == counted_macs(slim)
    finally:
        del REDUCTIONS["keep-second"]


# --- copies, wrappers and half-known models ---------------------------------------------------------------------------


@torch.no_grad()
def test_copies_of_what_is_compiled_in_place_are_their_own() -> None:
    slim, x = mdc.slim(make(), planned(make())), images()
    slim.compile(backend="eager")
    for copied in (
        copy.deepcopy(slim),
        pickle.loads(pickle.dumps(slim)),
        mdc.slim(slim, planned(slim, mdc.Policy(0.5))),
    ):
        for parameter in copied.parameters():
            parameter.zero_()
        assert copied(x).abs().max() == 0
    assert slim(x).abs().max() > 0


@torch.no_grad()
def test_feature_maps_are_refused_however_they_are_asked_for() -> None:
    model, x = make("average_pool"), images(2)
    slim = mdc.slim(model, planned(model, restore=False))
    with pytest.raises(UnsupportedModelError, match="NCHW"):
        slim.forward_intermediates(x, [3], False, False, False, "NCHW", True)
    (tokens,) = slim.forward_intermediates(x, [3], False, False, False, "NLC", True)
    assert tokens.shape[0] == 2
    assert tokens.shape[1] < 16
    with pytest.raises(UnsupportedModelError, match="attn_mask"):
        slim.forward_intermediates(x, [3], False, False, False, "NLC", True, False, torch.zeros(16, 16))


@pytest.mark.parametrize("reduction", ["fuse", "merge"])
def test_what_travels_goes_through_wrappers_of_blocks(reduction: str) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, x = make("average_pool"), images()
    slim = mdc.slim(model, planned(model, reduction=reduction, restore=True)).train()
    expected = slim.forward_features(x)
    expected.square().sum().backward()
    gradient = slim.patch_embed.proj.weight.grad.clone()
    slim.zero_grad()
    for index, block in enumerate(slim.blocks):
        slim.blocks[index] = checkpoint_wrapper(block)
    features = slim.forward_features(x)
    features.square().sum().backward()
    assert torch.equal(features, expected)
    torch.testing.assert_close(slim.patch_embed.proj.weight.grad, gradient)


def test_masks_that_cannot_go_on_are_not_on() -> None:
    model = make()
    plan = replace(planned(model), reduction="mrge")
    with pytest.raises(PlanError, match="reduction='mrge' is unknown"), mdc.masked(model, plan):
        pass
    assert not is_masked(model)


def test_masks_on_one_of_two_leave_the_others_on() -> None:
    owner = nn.ModuleDict({"a": make(), "b": make("glu")})
    plans = {name: planned(network) for name, network in owner.items()}
    with mdc.masked(owner, plans["a"], "a"):
        with mdc.masked(owner, plans["b"], "b"):
            assert is_masked(owner["b"])
        assert not is_masked(owner["b"])
        assert is_masked(owner["a"])
    assert not is_masked(owner)


def test_replicas_of_a_masked_model_compute_with_what_is_kept() -> None:
    """As DataParallel makes them: parameters are plain attributes of a copy."""
    model = make()
    with mdc.masked(model, planned(model)):
        linear = model.blocks[0].mlp.fc1
        replica = linear._replicate_for_data_parallel()
        replica.weight, replica.bias = linear._parameters["weight"] * 1.0, linear._parameters["bias"] * 1.0
        x = torch.randn(2, 3, 48)
        torch.testing.assert_close(replica(x), linear(x))


def test_tokens_alone_of_blocks_that_can_lose_nothing_else() -> None:
    model = make()
    for block in model.blocks:
        block.mlp = randomised(_OwnMlp())
        block.attn.norm = nn.Softsign()
    policy = mdc.uniform_policy(model, 0.9)
    plan = mdc.make_plan(model, mdc.score(model, [images(8)], progress=False), policy)
    assert plan.leaving
    assert mdc.macs(mdc.slim(model, plan)) == mdc.plan_macs(model, plan) <= 0.9 * mdc.macs(model)


class _OwnMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_prior_where_positions_are_not_known_is_refused() -> None:
    model = make()
    plan = planned(model, score="dependence")
    model.patch_drop = PatchDropout(0.5, num_prefix_tokens=1)
    with pytest.raises(PlanError, match="drops patches at random"):
        mdc.slim(model, plan)
