"""Hidden states: the loss against numpy, which blocks are compared, and hooks that leave no trace."""

import copy
import gc
import weakref

import lightning as L
import numpy as np
import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import lightning_mdc as mdc
from lightning_mdc.distillation import DistillationModule, Teacher
from lightning_mdc.distillation.losses import hidden_state_loss
from lightning_mdc.errors import DistillationError
from tests.test_distillation import batch, loader, trainer

SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 3}


def network(seed: int = 0, kind=VisionTransformer, **options) -> nn.Module:
    torch.manual_seed(seed)
    model = kind(**{**SHAPE, **options})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def slimmed(dense: nn.Module, heads=(1, 0, 0.5, 0.5), neurons=(1, 0, 0.5, 0.5), tokens=0.5) -> nn.Module:
    """By default block 1 keeps nothing of its own."""
    policy = mdc.Policy(heads=list(heads), neurons=list(neurons), tokens=tokens)
    return mdc.slim(dense, mdc.make_plan(dense, mdc.score(dense, [batch(8)]), policy))


def outputs(model: nn.Module, images: torch.Tensor) -> list[np.ndarray]:
    """What each block puts out, computed block by block."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    found = []
    for block in model.blocks:
        x = block(x)
        found.append(x.detach().double().numpy())
    return found


def normalised(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)


@pytest.mark.parametrize(
    ("options", "prefix"),
    [
        ({}, 1),
        ({"kind": VisionTransformerDistilled}, 2),
        ({"reg_tokens": 3}, 4),
        ({"class_token": False, "global_pool": "avg"}, 0),
    ],
)
def test_loss_is_the_formula_on_blocks_that_keep_something(options, prefix):
    dense = network(0, **options)
    student, teacher = slimmed(dense), network(1, **options).eval()
    images, labels = batch()
    module = DistillationModule(student, teacher, hidden_weight=0.7, kd_weight=0.3)
    with module.training_form():
        parts = module.loss_parts(images, labels)
    mine, theirs = outputs(student, images), outputs(teacher, images)
    assert mine[3].shape[1] < theirs[3].shape[1]  # tokens have left
    losses = []
    for block in (0, 2, 3):
        s, t = (x[:, :prefix] if prefix else x.mean(axis=1) for x in (mine[block], theirs[block]))
        losses.append(np.mean((normalised(s) - normalised(t)) ** 2))
    np.testing.assert_allclose(parts["hidden"].item(), np.mean(losses), rtol=1e-4)
    expected = 0.7 * parts["task"] + 0.3 * parts["kd"] + 0.7 * parts["hidden"]
    torch.testing.assert_close(parts["loss"], expected)


def test_equal_hidden_states_cost_nothing_whatever_their_size():
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    assert hidden_state_loss([x], [3 * x + 1], 2) < 1e-9
    assert hidden_state_loss([x], [-x], 2) == pytest.approx(4, rel=1e-3)
    assert hidden_state_loss([x.bfloat16()], [x.bfloat16()], 0).dtype == torch.float32


@pytest.mark.parametrize("grad_checkpointing", [False, True, "reentrant"])
def test_gradients_flow_through_the_hooks(grad_checkpointing, monkeypatch):
    reentrant = grad_checkpointing == "reentrant"
    monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: reentrant)
    dense = network(0)
    student, teacher = slimmed(dense).train(), network(1).eval()
    images, labels = batch()
    module = DistillationModule(
        student, teacher, hidden_weight=1.0, kd_weight=0.0, grad_checkpointing=bool(grad_checkpointing)
    )
    with module.training_form():
        parts = module.loss_parts(images, labels)
        parts["hidden"].backward()
    # By hand: the same blocks one after another, without a hook.
    twin = copy.deepcopy(student)
    twin.zero_grad()
    x, t, losses = twin.patch_embed(images), teacher.patch_embed(images), []
    x, t = twin._pos_embed(x), teacher._pos_embed(t)
    for index in range(4):
        x, t = twin.blocks[index](x), teacher.blocks[index](t)
        if index != 1:
            s, d = (nn.functional.layer_norm(y[:, :1], (16,)) for y in (x, t.detach()))
            losses.append((s - d).square().mean())
    (sum(losses) / 3).backward()
    for (name, got), wanted in zip(student.named_parameters(), twin.parameters(), strict=True):
        if wanted.grad is None:
            assert got.grad is None, name
        else:
            torch.testing.assert_close(got.grad, wanted.grad, msg=name)
    assert student.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.slow
def test_compiled_networks_give_the_same_losses_and_gradients():
    dense = network(0)
    start, teacher = slimmed(dense).train(), network(1).eval()
    images, labels = batch()
    found = []
    for compile in (False, {"backend": "aot_eager"}):
        student = copy.deepcopy(start)
        module = DistillationModule(
            student,
            Teacher(teacher, compile=compile),
            hidden_weight=1.0,
            compile=compile,
            grad_checkpointing=bool(compile),
        )
        with module.training_form():
            with torch.no_grad():
                module.eval()(images)  # as a sanity check would, before the first step
                module.train()
            parts = module.loss_parts(images, labels)
            parts["loss"].backward()
        found.append((parts, [parameter.grad for parameter in student.parameters() if parameter.grad is not None]))
    torch.testing.assert_close(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1])


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_nothing_outlives_the_step_and_no_hook_the_fit(tmp_path, grad_checkpointing):
    dense = network(0)
    student, teacher = slimmed(dense), dense
    module = DistillationModule(student, teacher, hidden_weight=1.0, grad_checkpointing=grad_checkpointing)
    inside: list[int] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            states = pl_module._hidden_states
            inside.append(len(states.student) + len(states.teacher))
            assert hooks(student) == hooks(teacher) == 3
            copied = copy.deepcopy(pl_module)  # as other callbacks do in mid-run
            assert copied.teacher is pl_module.teacher

    run = trainer(tmp_path, callbacks=[Look()])
    run.fit(module, loader(), loader())
    assert inside == [0] * 4
    assert run.callback_metrics["train/hidden"] > 0
    assert hooks(student) == hooks(teacher) == 0
    assert module._hidden_states is None


def test_hidden_states_are_freed():
    dense = network(0)
    module = DistillationModule(slimmed(dense), dense, hidden_weight=1.0)
    seen: list[weakref.ref] = []
    dense.blocks[2].register_forward_hook(lambda block, args, output: seen.append(weakref.ref(output)))
    with module.training_form():
        module.loss_parts(*batch())["loss"].backward()
        gc.collect()
        assert seen[0]() is None


def test_hooks_go_when_fit_fails(tmp_path):
    dense = network(0)
    student = slimmed(dense)

    class Broken(DistillationModule):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path).fit(Broken(student, dense, hidden_weight=1.0), loader())
    assert hooks(student) == hooks(dense) == 0


def test_what_cannot_be_compared_is_refused():
    student = network(0)
    no_vit = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    no_vit.num_classes = 3
    cases = [
        (student, network(1, depth=3), "teacher=VisionTransformer has 3 blocks and student=VisionTransformer has 4"),
        (student, network(1, embed_dim=32), "has 32 channels and .* has 16"),
        (student, network(1, reg_tokens=2), "has 3 prefix tokens and .* has 1"),
        (student, no_vit, "teacher=Sequential does not have just one: Sequential holds no supported"),
        (no_vit, student, "student=Sequential does not have just one: Sequential holds no supported"),
        (student, None, "hidden_weight=1.0 needs a teacher"),
    ]
    for one, other, words in cases:
        with pytest.raises(DistillationError, match=words):
            DistillationModule(one, other, hidden_weight=1.0)
    for value in (-1.0, float("nan"), float("inf"), True):
        with pytest.raises(DistillationError, match="hidden_weight="):
            DistillationModule(student, network(1), hidden_weight=value)


def test_loss_parts_outside_fit_say_what_to_do():
    module = DistillationModule(network(0), network(1), hidden_weight=1.0)
    with pytest.raises(DistillationError, match=r"with module.training_form\(\)"):
        module.loss_parts(*batch())


def test_blocks_that_get_no_gradient_are_refused():
    student = network(0).requires_grad_(False)
    student.head.requires_grad_(True)
    module = DistillationModule(student, network(1), hidden_weight=1.0)
    with module.training_form():
        with pytest.raises(DistillationError, match="the student's blocks are frozen"):
            module.loss_parts(*batch())
        with torch.no_grad():
            assert module.loss_parts(*batch())["hidden"] > 0
