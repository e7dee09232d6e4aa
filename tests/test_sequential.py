"""Compensation from the first block to the last: against a loop in numpy, layer by layer, token by token."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.errors import CompensationError
from lightning_mdc.importance.moments import LayerMoments
from lightning_mdc.importance.ridge import RIDGE
from lightning_mdc.models import find_anatomy
from lightning_mdc.surgery.lockstep import halt, walking
from lightning_mdc.surgery.sequential import made_up, of_tokens
from lightning_mdc.tokens.selection import Carried
from tests.kinds import BASE, BOUND_KINDS, EVA_KINDS, KINDS, TORCHVISION_KINDS, images, make, randomised

MAKERS: dict[str, Callable[[], nn.Module]] = {
    **(KINDS | BOUND_KINDS | EVA_KINDS),
    **{f"torchvision_{kind}": maker for kind, maker in TORCHVISION_KINDS.items()},
}
# Where a norm is taken over units: what stays changes when others leave, which only this way of compensating sees.
NORMED = "rms_norms"
EVERY_DAY = ("vit", "swiglu", "swin_v2", "swin_filled_up", "beit", "pit", "dinov3", "rope_mixed", "torchvision_vit")


def plan_for(model: nn.Module, heads: float = 1.0, neurons: float = 1.0, tokens: float = 1.0) -> mdc.Plan:
    scores = mdc.score(model, [images(4)], "random")
    return mdc.make_plan(model, scores, mdc.Policy(heads=heads, neurons=neurons, tokens=tokens))


def share_lost(small: nn.Module, dense: nn.Module, batches: list[Tensor]) -> float:
    """Of the variance of what the dense model puts out."""
    with torch.no_grad():
        wanted, given = (torch.cat([model(batch) for batch in batches]) for model in (dense, small))
    return float((given - wanted).square().sum() / (wanted - wanted.mean(dim=0)).square().sum())


# --- the whole way ----------------------------------------------------------------------------------------------------


def test_it_is_what_a_loop_over_layers_gives() -> None:
    """Of a ViT with LayerScale, written out: both streams, ridge regression on the rows of one layer after another."""
    model: VisionTransformer = randomised(VisionTransformer(**BASE, init_values=0.1))  # type: ignore[assignment]
    plan = plan_for(model, heads=0.5, neurons=0.4)
    batches = [images(16, seed=seed) for seed in (1, 2)]
    got = mdc.slim(model, plan, "sequential", batches=batches)

    small: VisionTransformer = mdc.slim(model, plan).double()  # type: ignore[assignment]
    dense = model.double()
    with torch.no_grad():
        x = torch.cat(batches).double()
        wanted = stream = dense._pos_embed(dense.patch_embed(x))
        for theirs, ours in zip(dense.blocks, small.blocks, strict=True):
            for half, norm, scale, reader in (
                ("attn", "norm1", "ls1", ours.attn.proj),
                ("mlp", "norm2", "ls2", ours.mlp.fc2),
            ):
                seen: list[Tensor] = []
                hook = reader.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
                part = getattr(ours, half)
                wanted = wanted + theirs.get_submodule(scale)(
                    theirs.get_submodule(half)(theirs.get_submodule(norm)(wanted))
                )
                part(ours.get_submodule(norm)(stream))
                hook.remove()
                gamma = ours.get_submodule(scale).gamma
                refit_by_numpy(reader, seen[0], (wanted - stream) / gamma)
                stream = stream + gamma * part(ours.get_submodule(norm)(stream))
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(got.state_dict()[name].double(), tensor, rtol=2e-3, atol=2e-3, msg=name)


def refit_by_numpy(reader: nn.Linear, z: Tensor, target: Tensor) -> None:
    """Least squares with as many more rows as the ridge is worth: of what is added to the weights that are there."""
    rows, missing = (each.flatten(0, 1).numpy() for each in (z, target - reader(z)))
    apart, middle = rows - rows.mean(axis=0), missing.mean(axis=0)
    ridge = RIDGE * (apart**2).mean(axis=0).mean()
    more = np.sqrt(ridge * len(rows)) * np.eye(rows.shape[1])
    wanted = np.vstack([missing - middle, np.zeros((rows.shape[1], missing.shape[1]))])
    update, *_ = np.linalg.lstsq(np.vstack([apart, more]), wanted, rcond=None)
    reader.weight += torch.from_numpy(update.T)
    assert reader.bias is not None
    reader.bias += torch.from_numpy(middle - rows.mean(axis=0) @ update)


@pytest.mark.parametrize(
    "kind", [kind if kind in EVERY_DAY else pytest.param(kind, marks=pytest.mark.slow) for kind in MAKERS]
)
def test_every_kind_comes_closer_to_the_dense_model(kind: str) -> None:
    model = randomised(MAKERS[kind]())
    batches = [images(16, seed=seed) for seed in (1, 2)]
    plan = plan_for(model, heads=0.5 if find_anatomy(model).num_heads else 1.0, neurons=0.5)
    cut, refitted = mdc.slim(model, plan), mdc.slim(model, plan, "sequential", batches=batches)
    assert share_lost(refitted, model, batches) < 0.5 * share_lost(cut, model, batches)


@pytest.mark.parametrize("reduction", ["fuse", "drop", "merge"])
def test_tokens_that_leave_are_made_up_for(reduction: str) -> None:
    """From the first stage on, also where no head or neuron leaves."""
    model, batches = make(), [images(16, seed=seed) for seed in (1, 2, 3)]
    scores = mdc.score(model, [images(4)], "random")
    plan = mdc.make_plan(model, scores, mdc.Policy(tokens=0.5, stages=(1,)), mdc.TokenOptions(reduction=reduction))
    cut, refitted = mdc.slim(model, plan), mdc.slim(model, plan, "sequential", batches=batches)
    assert share_lost(refitted, model, batches) < share_lost(cut, model, batches)
    changed = {
        name for name, tensor in cut.state_dict().items() if not torch.equal(tensor, refitted.state_dict()[name])
    }
    layers = ["blocks.1.mlp.fc2", *(f"blocks.{block}.{of}" for block in (2, 3) for of in ("attn.proj", "mlp.fc2"))]
    assert changed == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


def test_what_comes_before_the_first_loss_stays() -> None:
    model = make()
    scores = mdc.score(model, [images(4)], "random")
    plan = mdc.make_plan(model, scores, mdc.Policy(heads=(1, 1, 0.5, 1), neurons=(1, 1, 1, 1)))
    refitted = mdc.slim(model, plan, "sequential", batches=[images(16)]).state_dict()
    for name, tensor in model.state_dict().items():
        if name.startswith(("blocks.0.", "blocks.1.")) or not name.startswith("blocks."):
            assert torch.equal(tensor, refitted[name]), name
    everything = mdc.slim(model, plan_for(model), "sequential", batches=[images(4)]).state_dict()
    assert all(torch.equal(tensor, everything[name]) for name, tensor in model.state_dict().items())


def test_a_norm_over_the_units_does_not_stand_in_the_way() -> None:
    model, batches = make(NORMED), [images(16, seed=seed) for seed in (1, 2)]
    plan = plan_for(model, heads=0.5, neurons=0.5)
    refitted = mdc.slim(model, plan, "sequential", batches=batches)
    assert share_lost(refitted, model, batches) < 0.5 * share_lost(mdc.slim(model, plan), model, batches)


class Holder(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x.flip(-1) * 2)


def test_a_module_shows_the_transformer_what_it_shows_it_always() -> None:
    model, batches = make(), [images(16, seed=seed) for seed in (1, 2)]
    holder, plan = Holder(model), plan_for(model, heads=0.5, neurons=0.5)
    inside = mdc.slim(holder, plan, "sequential", batches=batches)
    alone = mdc.slim(model, plan, "sequential", batches=[batch.flip(-1) * 2 for batch in batches])
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, inside.state_dict()[name])
    assert holder.encoder is model


def test_bf16_and_many_small_batches() -> None:
    model = make()
    plan, batches = plan_for(model, heads=0.5, neurons=0.5), [images(16, seed=seed) for seed in (1, 2)]
    singly = [image[None] for batch in batches for image in batch]
    whole, parts = (mdc.slim(model, plan, "sequential", batches=each).state_dict() for each in (batches, singly))
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, parts[name], rtol=1e-3, atol=1e-4)
    half = mdc.slim(model.bfloat16(), plan, "sequential", batches=[batch.bfloat16() for batch in batches])
    cut = mdc.slim(model, plan)
    batches = [batch.bfloat16() for batch in batches]
    assert share_lost(half, model, batches) < 0.5 * share_lost(cut, model, batches)


def test_what_cannot_be_is_refused() -> None:
    model = make()
    plan, moments = plan_for(model, heads=0.5), mdc.score(model, [images(4)], "magnitude", moments=True).moments
    with pytest.raises(CompensationError, match=r"batches=None.*looks at images"):
        mdc.slim(model, plan, "sequential")
    with pytest.raises(CompensationError, match="moments are given, but compensate='sequential'"):
        mdc.slim(model, plan, "sequential", batches=[images(4)], moments=moments)
    with pytest.raises(CompensationError, match="batches are given, but compensate='lstsq'"):
        mdc.slim(model, plan, "lstsq", batches=[images(4)], moments=moments)
    with pytest.raises(CompensationError, match="no batches"):
        mdc.slim(model, plan, "sequential", batches=[])


# --- a layer ----------------------------------------------------------------------------------------------------------


def test_no_other_update_leaves_less() -> None:
    """What is left, and the ridge's penalty, are least: a step in any direction from there only adds to them."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 7)) + rng.normal(size=7)
    missing = rng.normal(size=(200, 3)) + z[:, :3]
    both = np.hstack([z, missing])
    apart = both - both.mean(axis=0)
    moments = LayerMoments(*map(torch.tensor, (len(z), both.mean(axis=0), apart.T @ apart)))
    update, shift = (each.numpy() for each in made_up(moments, 7, centred=True))
    ridge = RIDGE * z.var(axis=0).mean()

    def loss(update: np.ndarray, shift: np.ndarray) -> float:
        return float(((missing - z @ update.T - shift) ** 2).sum() / len(z) + ridge * (update**2).sum())

    least = loss(update, shift)
    assert least < loss(0 * update, 0 * shift)
    for seed in range(20):
        step = np.random.default_rng(seed).normal(size=(3, 8)) * 1e-2
        assert loss(update + step[:, :7], shift + step[:, 7]) > least


def test_a_token_is_held_to_the_mean_of_its_positions() -> None:
    x = torch.randn(2, 1 + 4, 3)
    places = torch.tensor([[0, 1, 1, -1], [1, 0, 0, 0]])
    found = of_tokens(x, Carried(places, None, torch.zeros(2, 2, dtype=torch.long)), 1)
    for image in range(2):
        assert torch.equal(found[image, 0], x[image, 0])
        for token in range(2):
            members = [x[image, 1 + position] for position in range(4) if places[image, position] == token]
            torch.testing.assert_close(found[image, 1 + token], torch.stack(members).mean(dim=0))


# --- side by side -----------------------------------------------------------------------------------------------------


def test_passes_go_on_together_and_one_at_a_time() -> None:
    said: list[str] = []

    def run(name: str) -> None:
        for place in range(2):
            said.append(f"{name}{place}")
            halt(place)

    with walking([lambda: run("a"), lambda: run("b")]) as walks:
        seen = [[walk.to_next() for walk in walks] for _ in range(3)]
    assert seen == [[0, 0], [1, 1], [None, None]]
    assert said == ["a0", "b0", "a1", "b1"]
    before = threading.active_count()
    with walking([lambda: run("a")]) as walks:
        assert walks[0].to_next() == 0
    assert threading.active_count() == before  # what was left of it is left out


def test_a_default_dtype_is_that_of_each_pass_alone() -> None:
    seen: list[torch.dtype] = []

    def run() -> None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            halt(0)
            seen.append(torch.get_default_dtype())
            halt(1)
        finally:
            torch.set_default_dtype(before)

    with walking([run, run]) as walks:
        for _ in range(2):
            for walk in walks:
                walk.to_next()
                assert torch.get_default_dtype() == torch.float32
    assert seen == [torch.bfloat16] * 2
    assert torch.get_default_dtype() == torch.float32


def test_an_error_of_a_pass_is_raised_where_it_is_waited_for() -> None:
    class Broken(nn.Module):
        def __init__(self, encoder: nn.Module) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 3:
                raise KeyError("pixel_values")
            return self.encoder(x)

    model = make()
    before = threading.active_count()
    with pytest.raises(KeyError, match="pixel_values"):
        mdc.slim(Broken(model), plan_for(model, heads=0.5), "sequential", batches=[images(40), images(3)])
    assert threading.active_count() == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# --- delivered --------------------------------------------------------------------------------------------------------


def test_a_search_says_how_it_tries() -> None:
    model = make()
    scores = mdc.score(model, [images(16)], moments=True)
    with pytest.raises(CompensationError, match="search with 'lstsq'"):
        mdc.search(model, scores, lambda small: 0.0, 0.7, n_trials=1, compensate="sequential")


def test_in_one_line_it_is_the_default_also_where_a_norm_is_taken_over_units() -> None:
    for kind in ("vit", NORMED):
        model, shown = make(kind), images(48)
        few = mdc.Calibration(images=32, judging=16)
        found = mdc.compress(model, [shown], 0.7, n_trials=2, calibration=few)
        by_hand = mdc.slim(model, found.plan, "sequential", batches=[shown[:32], shown[32:]])
        for name, tensor in by_hand.state_dict().items():
            assert torch.equal(tensor, found.model.state_dict()[name])


def test_what_is_not_finite_is_refused_by_the_layers_name() -> None:
    model, shown = make("vit"), images(16)
    plan = mdc.make_plan(model, mdc.score(model, [shown]), mdc.Policy(heads=0.5, neurons=0.5))
    shown[3, 0, 0, 0] = float("nan")
    with pytest.raises(CompensationError, match=r"sequential': what blocks\.0\.attn.* is not finite on these images"):
        mdc.slim(model, plan, "sequential", batches=[shown])


def test_a_masked_model_is_no_model_to_make_up_for() -> None:
    model, shown = make("vit"), images(16)
    plan = mdc.make_plan(model, mdc.score(model, [shown]), mdc.Policy(heads=0.5, neurons=0.5))
    with mdc.masked(model, plan), pytest.raises(CompensationError, match=r"has masks on: .* leave the masked block"):
        mdc.slim(model, plan, "sequential", batches=[shown])


def test_small_batches_go_together() -> None:
    model = make()
    plan, x = plan_for(model, neurons=0.4), images(40)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    small = mdc.slim(model, plan, "sequential", batches=x.split(1))
    assert sorted(seen) == [8, 8, 32, 32]  # dense and slim
    expected = mdc.slim(model, plan, "sequential", batches=[x[:32], x[32:]])
    torch.testing.assert_close(small.state_dict(), expected.state_dict())


def test_images_of_several_sizes_stay_apart() -> None:
    model = randomised(VisionTransformer(**BASE, dynamic_img_size=True))
    plan = plan_for(model, neurons=0.4)
    batches = [images(2, size=size) for size in (16, 16, 32, 16)]
    seen: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    mdc.slim(model, plan, "sequential", batches=batches)
    assert sorted(shape[0] for shape in seen) == [2, 2, 2, 2, 4, 4]
