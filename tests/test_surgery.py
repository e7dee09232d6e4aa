"""Masks and slim models: equal to each other, reversible, and good citizens of compile, export and autocast."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.errors import PlanError, UnsupportedModelError
from lightning_mdc.surgery import apply_masks, is_masked, remove_masks
from lightning_mdc.tokens.selection import best_and_rest, regroup, resample_prior
from tests.kinds import KINDS, POST_NORM, everyday, images, make, randomised


def planned(model: nn.Module, policy: mdc.Policy | None = None, **options: object) -> mdc.Plan:
    scores = mdc.score(model, [images(8)], "activation", progress=False)  # which units is not the point
    return mdc.make_plan(model, scores, policy or mdc.Policy(0.5, 0.4, 0.6), **options)  # type: ignore[arg-type]


def agree(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("token_score", ["attention", "dependence", "attention*dependence"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_masked_equals_slim(kind: str, token_score: str) -> None:
    model, x = make(kind), images()
    before, keys = model(x), list(model.state_dict())
    plan = planned(model, token_score=token_score)
    slim = mdc.slim(model, plan)
    with mdc.masked(model, plan) as masked_model:
        assert masked_model is model
        masked = model(x)
        assert list(model.state_dict()) == keys
        assert not agree(masked, before, 1e-3)  # else the comparison below says nothing
    assert agree(masked, slim(x))
    assert torch.equal(model(x), before)
    assert list(slim.state_dict()) == keys
    assert type(slim) is type(model)


@pytest.mark.parametrize("kind", ["vit", "deit_distilled", "average_pool", "beit3_scale_norms", "swiglu_normed"])
@torch.no_grad()
def test_blocks_without_heads_or_neurons(kind: str) -> None:
    model, x = make(kind), images()
    policy = mdc.Policy(heads=[0, 1, 0.5, 0], neurons=[0.5, 0, 1, 0], tokens=[0.8, 0.7, 0.5])
    for token_score in ("attention", "dependence"):
        plan = planned(model, policy, token_score=token_score)
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
    assert [stage.prior for stage in headless_later.tokens] == [None] * 3


@torch.no_grad()
def test_post_norm_masked_equals_slim() -> None:
    model, x = randomised(POST_NORM()), images()
    plan = mdc.make_plan(model, mdc.score(model, [x], progress=False), mdc.Policy(0.5, 0.4))
    with mdc.masked(model, plan):
        assert agree(model(x), mdc.slim(model, plan)(x))


@pytest.mark.parametrize("kind", KINDS)
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
def test_token_stages_keep_the_prefix_and_the_best_and_fuse_the_rest() -> None:
    x = torch.arange(2 * 6 * 1, dtype=torch.float32).reshape(2, 6, 1)
    scores = torch.tensor([[0.1, 0.5, 0.2, 0.9], [0.9, 0.1, 0.8, 0.2]])
    best, rest = best_and_rest(scores, 2)
    kept = regroup(x, best, rest, num_prefix_tokens=2, fuse=True)
    assert kept[..., 0].tolist() == [[0, 1, 3, 5, 3.0], [6, 7, 8, 10, 10.0]]  # order kept; mean of 2 and 4, of 9 and 11
    assert torch.equal(regroup(x, best, rest, 2, fuse=False), kept[:, :-1])


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
    plan = planned(model, token_score="attention*dependence")
    with torch.no_grad(), mdc.masked(model, plan):
        assert agree(model(images(2, 64)), mdc.slim(model, plan)(images(2, 64)))


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


def test_gradients_flow_to_what_is_kept_and_only_there() -> None:
    model, x = make(), images()
    plan = planned(model)
    with mdc.masked(model, plan):
        model(x).square().sum().backward()
    dropped = sorted(set(range(192)) - set(plan.neurons[2]))
    assert model.blocks[2].mlp.fc1.weight.grad[dropped].abs().max() == 0
    assert model.blocks[2].mlp.fc1.weight.grad[list(plan.neurons[2])].abs().min() > 0
    slim = mdc.slim(model, plan)
    slim(x).square().sum().backward()
    kept = model.blocks[2].mlp.fc1.weight.grad[list(plan.neurons[2])]
    torch.testing.assert_close(slim.blocks[2].mlp.fc1.weight.grad, kept, rtol=1e-3, atol=1e-5)
    assert slim.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["vit", "gated" if "gated" in KINDS else "glu", "beit3_scale_norms"])
def test_training_masks_weights_and_comes_to_the_same(kind: str) -> None:
    model, x = make(kind), images()
    plan, weights = planned(model), [block.mlp.fc2.weight for block in model.blocks]
    keys = list(model.state_dict())

    def gradients(net: nn.Module, network: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        net.zero_grad()
        network(x).square().sum().backward()
        return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    with mdc.masked(model, plan):
        in_training = model(x)
        with torch.no_grad():
            assert torch.equal(in_training, model(x))  # there activations are masked
        got = gradients(model, model)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model.blocks[0].mlp.fc2(x)
        assert list(model.state_dict()) == keys
    assert all(block.mlp.fc2.weight is weight for block, weight in zip(model.blocks, weights, strict=True))

    def activations_masked(x: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch, mdc.masked(model, plan):
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            return model(x)

    expected = gradients(model, activations_masked)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0, msg=name)


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


@pytest.mark.parametrize("kind", COMPILED_KINDS)
@torch.no_grad()
def test_slim_models_compile_whole_and_export(kind: str) -> None:
    model, x = shallow(kind), images()
    slim = mdc.slim(model, planned(model, token_score="attention*dependence"))
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


@torch.no_grad()
def test_masks_on_a_compiled_model_make_the_compiler_forget_once() -> None:
    model, x = shallow(), images()
    plan = planned(model)
    other, compilations = counted(lambda y: (y.sin() + 1).square())
    other(x)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    with mdc.masked(compiled, plan):
        compiled(x)
        other(x)
    compiled(x)
    other(x)
    assert len(compilations) == 2  # before, and within


@pytest.mark.parametrize("setting", [True, False])
def test_torchs_setting_comes_back_as_the_user_had_it(setting: bool) -> None:
    first, second = make(), make("glu")
    config = torch._dynamo.config
    with config.patch(skip_nnmodule_hook_guards=setting):
        with mdc.masked(first, planned(first)):
            apply_masks(second, planned(second))
        assert not config.skip_nnmodule_hook_guards  # the second is still masked
        remove_masks(second)
        assert config.skip_nnmodule_hook_guards == setting
        with mdc.masked(first, planned(first, mdc.Policy())):  # masks nothing
            assert config.skip_nnmodule_hook_guards == setting


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


@torch.no_grad()
def test_without_gradients_what_is_masked_may_be_infinite() -> None:
    model = make()
    plan = planned(model, mdc.Policy(neurons=0.5))
    dropped = next(i for i in range(192) if i not in plan.neurons[1])
    model.blocks[1].mlp.fc1.bias[dropped] = float("inf")
    with mdc.masked(model, plan):
        assert agree(model(images()), mdc.slim(model, plan)(images()))


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


def test_feature_maps_after_a_drop_are_refused() -> None:
    model, x = make(), images(2)
    plan = planned(model)
    slim = mdc.slim(model, plan)
    for broken in (slim, copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
        with pytest.raises(UnsupportedModelError, match="output_fmt='NLC'"):
            broken.forward_intermediates(x)
        assert [y.shape[1] for y in broken.forward_intermediates(x, output_fmt="NLC")[1]] == [16, 10, 6, 4]
    fewer_heads = planned(slim, mdc.Policy(heads=0.5))
    with mdc.masked(slim, fewer_heads):
        pass
    for still in (slim, mdc.slim(slim, fewer_heads)):  # masks that came and went took no guard along
        with pytest.raises(UnsupportedModelError, match="output_fmt='NLC'"):
            still.forward_intermediates(x)
    with mdc.masked(model, plan), pytest.raises(UnsupportedModelError, match="NCHW"):
        model.get_intermediate_layers(x, reshape=True)
    assert model.forward_intermediates(x)[1][0].shape == (2, 48, 4, 4)
    with pytest.raises(UnsupportedModelError, match="attn_mask"):
        slim(x, attn_mask=torch.zeros(17, 17))
