"""Healing: each block ends closer to the dense one's output, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.errors import CompressionError, DistillationError, MdcError
from lightning_mdc.models import find_anatomy
from tests.kinds import BASE, BOUND_KINDS, EVA_KINDS, KINDS, TORCHVISION_KINDS, images, make, randomised

MAKERS: dict[str, Callable[[], nn.Module]] = {
    **(KINDS | BOUND_KINDS | EVA_KINDS),
    **{f"torchvision_{kind}": maker for kind, maker in TORCHVISION_KINDS.items()},
}
EVERY_DAY = ("vit", "swiglu", "swin_v2", "beit", "pit", "dinov3", "rope_mixed", "torchvision_vit")
RARE = [pytest.param(kind, marks=pytest.mark.slow) for kind in MAKERS if kind not in EVERY_DAY]
BATCHES = [images(24, seed=seed) for seed in (1, 2, 3)]


def slim_of(model: nn.Module, how: mdc.TokenOptions | None = None, **kept: Any) -> nn.Module:
    policy = mdc.Policy(**(kept or {"heads": 0.5, "neurons": 0.4}))
    plan = mdc.make_plan(model, mdc.score(model, BATCHES, "random", progress=False), policy, how)
    return mdc.slim(model, plan, "sequential", batches=BATCHES)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def far(model: nn.Module, dense: nn.Module) -> float:
    """Mean squared difference of what the last block puts out."""
    last = []
    for each in (model, dense):
        seen: list[Tensor] = []
        handle = find_anatomy(each).blocks[-1].module.register_forward_hook(lambda m, a, y, seen=seen: seen.append(y))
        with torch.no_grad():
            for batch in BATCHES:
                each(batch)
        handle.remove()
        last.append(torch.cat([y if isinstance(y, Tensor) else y[0] for y in seen]))
    return F.mse_loss(*last).item()


# --- what it does -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*EVERY_DAY, *RARE])
def test_the_last_block_ends_closer_to_the_dense_one(kind: str) -> None:
    model = randomised(MAKERS[kind]())
    small = slim_of(model)
    at_first, modes = far(small, model), [module.training for module in small.modules()]
    dense = weights(model)
    left = mdc.heal(small, model, BATCHES, epochs=4)
    # Blocks of one token, as CaiT's last, may not get any closer; and what is given to them has changed.
    assert far(small, model) < at_first * (1.1 if max(left) == 1 else 1)
    assert len(left) == len(find_anatomy(small).blocks)
    assert min(left) < 1
    assert max(left) <= 1
    assert [module.training for module in small.modules()] == modes
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("reduction", ["fuse", "drop", "merge"])
def test_tokens_that_left_are_compared_with_what_they_stand_for(reduction: str) -> None:
    model = randomised(VisionTransformer(**BASE))
    small = slim_of(model, mdc.TokenOptions(reduction=reduction), heads=0.5, neurons=0.5, tokens=0.6)
    left = mdc.heal(small, model, BATCHES, epochs=4)
    assert max(left) <= 1
    assert sum(left) < len(left) - 0.02


@pytest.mark.parametrize("options", [{}, {"output_hidden_states": True}])
@pytest.mark.parametrize("kind", ["vit", "dinov3", "siglip"])
def test_transformers_models_that_lose_tokens_are_healed(kind: str, options: dict[str, Any]) -> None:
    hf_vit = pytest.importorskip("tests.test_hf_vit")
    model = randomised(hf_vit.make(kind, **options))
    small = slim_of(model, mdc.TokenOptions(restore=True), heads=0.5, neurons=0.5, tokens=0.6)
    left = mdc.heal(small, model, BATCHES, epochs=4)
    assert max(left) <= 1
    assert sum(left) < len(left) - 0.01


def test_what_is_left_is_what_a_loop_over_images_measures() -> None:
    """Of the first block, whose input no healing changes; a batch of one image counts as one."""
    model = randomised(VisionTransformer(**BASE))
    batches = [*BATCHES[:2], 5 * images(1, seed=4)]
    small = slim_of(model)

    def squared() -> float:
        total = 0.0
        with torch.no_grad():
            for image in torch.cat(batches):
                x = model._pos_embed(model.patch_embed(image[None]))
                total += float((small.blocks[0](x) - model.blocks[0](x)).square().sum())  # type: ignore[operator, index]
        return total

    at_first = squared()
    assert mdc.heal(small, model, batches)[0] == pytest.approx(squared() / at_first, rel=1e-3)


def test_only_blocks_that_have_lost_something_or_follow_one_are_trained() -> None:
    model = randomised(VisionTransformer(**BASE))
    depth = len(model.blocks)
    small = slim_of(model, neurons=[1.0, *[0.5] * (depth - 1)])
    before = weights(small)
    left = mdc.heal(small, model, BATCHES)
    changed = {name for name, value in small.state_dict().items() if not torch.equal(value, before[name])}
    assert left[0] == 1
    assert max(left[1:]) < 1
    assert changed
    assert all(name.startswith("blocks.") and not name.startswith("blocks.0.") for name in changed)


def test_a_model_that_has_lost_nothing_stays_as_it_is() -> None:
    model = randomised(VisionTransformer(**BASE))
    small = mdc.slim(model, mdc.make_plan(model, mdc.score(model, BATCHES, "random", progress=False), mdc.Policy()))
    assert mdc.heal(small, model, BATCHES) == [1.0] * len(model.blocks)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in small.state_dict().items())


def test_a_rate_that_is_far_too_high_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = randomised(VisionTransformer(**BASE))
    small = slim_of(model)
    before = weights(small)
    assert mdc.heal(small, model, BATCHES, lr=1e6) == [1.0] * len(model.blocks)
    assert "lr=1e+06 is too high" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


def test_the_same_seed_gives_the_same_weights() -> None:
    model = randomised(VisionTransformer(**BASE))
    healed = []
    for seed in (0, 0, 1):
        small = slim_of(model)
        mdc.heal(small, model, BATCHES, epochs=1, seed=seed)
        healed.append(weights(small)["blocks.1.mlp.fc2.weight"])
    assert torch.equal(healed[0], healed[1])
    assert not torch.equal(healed[0], healed[2])


@pytest.mark.parametrize("within", ["bfloat16", "autocast", "inference_mode", "no_grad", "frozen"])
def test_it_trains_whatever_is_around_it(within: str) -> None:
    model = randomised(VisionTransformer(**BASE))
    if within == "bfloat16":
        model.to(torch.bfloat16)
    if within == "frozen":
        model.requires_grad_(False)
    around = {"autocast": torch.autocast("cpu", torch.bfloat16), "inference_mode": torch.inference_mode()}
    around["no_grad"] = torch.no_grad()
    small = slim_of(model)
    state = [(p.dtype, p.requires_grad) for p in small.parameters()]
    with around.get(within, nullcontext()):  # type: ignore[attr-defined]
        left = mdc.heal(small, model, BATCHES, epochs=4)
    assert max(left) < 1
    assert [(p.dtype, p.requires_grad) for p in small.parameters()] == state
    assert all(p.grad is None for p in small.parameters())


def test_autocast_learns_what_fp32_does() -> None:
    """Autocast keeps the weights that it has cast, of which a step knows nothing."""
    model = randomised(VisionTransformer(**BASE))
    exactly = mdc.heal(slim_of(model), model, BATCHES, epochs=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert mdc.heal(slim_of(model), model, BATCHES, epochs=4) == pytest.approx(exactly, abs=0.01)


def test_a_transformer_inside_another_module_is_healed_in_its_place() -> None:
    class Holder(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, x: Tensor) -> Tensor:
            return self.backbone(2 * x)  # type: ignore[no-any-return]

    model = randomised(VisionTransformer(**BASE))
    holder = Holder(model)
    small = slim_of(model)
    assert max(mdc.heal(small, holder, BATCHES, submodule="backbone")) < 1
    assert holder.backbone is model


def test_what_a_users_hook_makes_of_a_blocks_output_is_compared() -> None:
    model = randomised(VisionTransformer(**BASE))
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: 0.5 * output)
    small = slim_of(model)
    at_first = far(small, model)
    mdc.heal(small, model, BATCHES, epochs=4)
    assert far(small, model) < at_first


@pytest.mark.parametrize("way", ["compiled", "inference_mode", "both"])
def test_the_dense_model_is_run_as_it_is_held(way: str) -> None:
    class Inference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = model

        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return self.backbone(x)  # type: ignore[no-any-return]

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = small, model

        def forward(self, x: Tensor) -> Tensor:
            return self.student(x) - self.teacher(x)  # type: ignore[no-any-return]

    model = randomised(VisionTransformer(**BASE))
    small = slim_of(model)
    wanted = mdc.heal(slim_of(model), model, BATCHES)
    if way == "compiled":
        got = mdc.heal(small, torch.compile(model, backend="eager"), BATCHES)  # type: ignore[arg-type]
    else:
        path = {"inference_mode": "backbone", "both": "teacher"}[way]
        got = mdc.heal(small, Inference() if way == "inference_mode" else Both(), BATCHES, submodule=path)
    assert got == pytest.approx(wanted, rel=1e-4)


def test_a_compiled_model_is_compressed() -> None:
    model = randomised(VisionTransformer(**BASE))
    compiled: Any = torch.compile(model, backend="eager")
    got, wanted = (mdc.compress(each, BATCHES, 0.6, "uniform").model for each in (compiled, model))
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(got.state_dict()[name], value)


def test_compress_heals_what_it_made() -> None:
    model = make("vit")
    made = mdc.compress(model, BATCHES, 0.6, "uniform")
    healed = mdc.compress(model, BATCHES, 0.6, "uniform", heal=2)
    mdc.heal(made.model, model, BATCHES, 2)
    got, wanted = weights(healed.model), weights(made.model)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value)


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": 1.5}, "epochs=1.5"),
        ({"lr": -1.0}, "lr=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"batches": []}, "no images"),
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, object], said: str) -> None:
    model = randomised(VisionTransformer(**BASE))
    given = {"batches": BATCHES, **wrong}
    with pytest.raises(DistillationError, match=said):
        mdc.heal(slim_of(model), model, **given)  # type: ignore[arg-type]


def test_another_models_slim_one_is_refused() -> None:
    model, other = randomised(VisionTransformer(**BASE)), randomised(VisionTransformer(**{**BASE, "depth": 2}))
    with pytest.raises(DistillationError, match="blocks where dense"):
        mdc.heal(slim_of(model), other, BATCHES)


def test_a_dense_model_that_tokens_leave_already_is_refused() -> None:
    model = slim_of(randomised(VisionTransformer(**BASE)), tokens=0.5)
    with pytest.raises(DistillationError, match="tokens leave it already"):
        mdc.heal(model, model, BATCHES)


def test_a_masked_model_is_refused() -> None:
    model = randomised(VisionTransformer(**BASE))
    plan = mdc.make_plan(model, mdc.score(model, BATCHES, "random", progress=False), mdc.Policy(heads=0.5))
    small = slim_of(model)
    with mdc.masked(model, plan), pytest.raises(DistillationError, match="masks on"):
        mdc.heal(small, model, BATCHES)


def test_images_that_the_model_does_not_take_are_refused() -> None:
    model = randomised(VisionTransformer(**BASE))
    with pytest.raises(MdcError, match="cannot be run on a batch"):
        mdc.heal(slim_of(model), model, [torch.zeros(4, 5, 32, 32)])


def test_the_slim_model_comes_first() -> None:
    model = randomised(VisionTransformer(**BASE))
    with pytest.raises(DistillationError, match="give the slim model first"):
        mdc.heal(model, slim_of(model), BATCHES)


def test_weights_that_are_no_numbers_are_refused() -> None:
    model = randomised(VisionTransformer(**BASE))
    small = slim_of(model)
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[0] = float("nan")
    with pytest.raises(DistillationError, match=r"blocks\.1 .* not finite"):
        mdc.heal(small, model, BATCHES)


def test_a_pass_that_ends_before_the_last_block_is_refused() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = model

        def forward(self, x: Tensor) -> Any:
            return self.backbone.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)

    model = randomised(VisionTransformer(**BASE))
    with pytest.raises(DistillationError, match=r"blocks\.2 is not called"):
        mdc.heal(slim_of(model), Half(), BATCHES, submodule="backbone")


def test_compress_refuses_epochs_that_are_none() -> None:
    with pytest.raises(CompressionError, match="heal=-1"):
        mdc.compress(make("vit"), BATCHES, heal=-1)
