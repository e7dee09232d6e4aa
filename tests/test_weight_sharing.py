"""Weight sharing: the loss against slim models, the draws against the budget, and one run however it is cut up."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import FSDPStrategy
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_mdc as mdc
from lightning_mdc.app.data import DigitsDataModule
from lightning_mdc.distillation.weight_sharing import WeightSharingModule
from lightning_mdc.errors import (
    BudgetError,
    CalibrationError,
    DistillationError,
    MdcError,
    PlanError,
    PolicyError,
    SearchError,
)
from lightning_mdc.surgery import masked
from lightning_mdc.surgery.masks import is_masked
from tests.kinds import CLASSES, make
from tests.kinds import images as pictures
from tests.processes import two_ranks

pytestmark = pytest.mark.slow  # CI runs them

CONSTANT_SGD = {"optimizer": {"opt": "sgd", "lr": 0.01, "weight_decay": 0.0}, "schedule": {"sched": "none"}}


def random_scores(model: nn.Module, seed: int = 0) -> mdc.Scores:
    """Of a model of `tests.kinds`, with the default token stages."""
    generator = torch.Generator().manual_seed(seed)

    def scores(counts: list[int]) -> list[Tensor]:
        return [torch.rand(count, generator=generator) for count in counts]

    heads = [block.attn.num_heads for block in model.blocks]
    neurons = [block.mlp.fc2.in_features for block in model.blocks]
    return mdc.Scores(scores(heads), scores(neurons), scores([16] * 3), (1, 2, 3))


def sharing(model: nn.Module, budget: Any = 0.5, **options: Any) -> WeightSharingModule:
    return WeightSharingModule(model, random_scores(model), budget, **options)


def labelled(count: int = 6) -> tuple[Tensor, Tensor]:
    return pictures(count), torch.arange(count) % CLASSES


def loader(count: int = 24, size: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*labelled(count)), batch_size=size)


def trainer(root: Path, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    plain = {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": False, "default_root_dir": root}
    return L.Trainer(**(quiet | plain | options))


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "deit_distilled", "average_pool", "beit3_scale_norms"])
def test_loss_is_that_of_the_dense_and_the_slim_models(kind: str) -> None:
    model = make(kind)
    module = sharing(model, temperature=2.0, shared_weight=0.7, label_smoothing=0.1, seed=3)
    images, labels = labelled()
    smallest, drawn = module.smallest_plan, module.plan(0)
    assert smallest.leaving
    assert drawn.leaving
    dense = model(images).double()
    log_p = (dense / 2).log_softmax(dim=1)
    log_q = [(mdc.slim(model, plan)(images).double() / 2).log_softmax(dim=1) for plan in (smallest, drawn)]
    distances = [4 * (log_p.exp() * (log_p - each)).sum(dim=1).mean() for each in log_q]
    shared = (distances[0] + distances[1]) / 2
    smoothed = 0.9 * F.one_hot(labels, CLASSES) + 0.1 / CLASSES
    task = -(smoothed * dense.log_softmax(dim=1)).sum(dim=1).mean()
    parts = module.loss_parts(images, labels)
    assert set(parts) == {"task", "shared", "loss"}
    assert min(distances) > 1e-3  # a masked model that is no other model would prove nothing
    for name, expected in (("task", task), ("shared", shared), ("loss", task + 0.7 * shared)):
        torch.testing.assert_close(parts[name].double(), expected, rtol=1e-4, atol=1e-6)


def test_labels_may_be_probabilities() -> None:
    module = sharing(make())
    images, labels = labelled()
    mixed = 0.3 * F.one_hot(labels, CLASSES) + 0.7 * F.one_hot(labels.flip(0), CLASSES)
    expected = 0.3 * F.cross_entropy(module(images), labels) + 0.7 * F.cross_entropy(module(images), labels.flip(0))
    torch.testing.assert_close(module.loss_parts(images, mixed)["task"], expected)


def test_masked_passes_train_what_the_slim_models_have() -> None:
    model = make()
    module = sharing(model)
    plans, (images, labels) = (module.smallest_plan, module.plan(0)), labelled()
    module.loss_parts(images, labels)["shared"].backward()
    with torch.no_grad():
        dense = model(images)
    expected = [(torch.zeros_like(b.mlp.fc1.weight), torch.zeros_like(b.mlp.fc2.weight.T)) for b in model.blocks]
    for plan in plans:
        slim = mdc.slim(model, plan)
        log_p, log_q = dense.log_softmax(1), slim(images).log_softmax(1)
        F.kl_div(log_q, log_p, log_target=True, reduction="batchmean").backward()
        for (first, second), narrow, kept in zip(expected, slim.blocks, plan.neurons, strict=True):
            assert narrow.mlp.fc1.weight.grad.abs().sum() > 0
            first[list(kept)] += narrow.mlp.fc1.weight.grad / 2
            second[list(kept)] += narrow.mlp.fc2.weight.grad.T / 2
    for block, (first, second), *kept in zip(model.blocks, expected, *(plan.neurons for plan in plans), strict=True):
        torch.testing.assert_close(block.mlp.fc1.weight.grad, first, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(block.mlp.fc2.weight.grad.T, second, rtol=1e-3, atol=1e-6)
        dropped = [unit for unit in range(block.mlp.fc1.out_features) if unit not in {*kept[0], *kept[1]}]
        assert not block.mlp.fc1.weight.grad[dropped].any()
    for block, *kept in zip(model.blocks, *(plan.heads for plan in plans), strict=True):
        by_head = block.attn.proj.weight.grad.T.reshape(block.attn.num_heads, -1).abs().sum(dim=1)
        assert set(by_head.nonzero()[:, 0].tolist()) == {*kept[0], *kept[1]}


def test_dense_model_is_left_as_an_ordinary_one(tmp_path: Path) -> None:
    model = make()
    keys, before = list(model.state_dict()), copy.deepcopy(model.state_dict())
    run = trainer(tmp_path)
    run.fit(sharing(model.train(), **CONSTANT_SGD), loader())
    assert list(model.state_dict()) == keys
    assert all(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not is_masked(model)
    assert {"train/task", "train/shared", "train/loss"} <= set(run.callback_metrics)
    mdc.save(model.eval(), tmp_path / "shared")
    torch.testing.assert_close(mdc.load(tmp_path / "shared")(pictures()), model(pictures()))


def test_masks_come_off_when_the_masked_pass_fails() -> None:
    model = make()
    module = sharing(model)
    passes: list[bool] = []

    def fails_when_masked(block: nn.Module, args: Any) -> None:
        passes.append(is_masked(model))
        if is_masked(model):
            raise RuntimeError("out of memory")

    model.blocks[-1].register_forward_pre_hook(fails_when_masked)
    with pytest.raises(RuntimeError, match="out of memory"):
        module.loss_parts(*labelled())
    assert passes == [False, True]
    assert not is_masked(model)


def test_sharing_makes_masked_models_better_where_dense_training_does_not() -> None:
    data = DigitsDataModule(augment=False, max_train_images=64).splits
    images, labels = data.train.images, torch.tensor(data.train.labels)
    torch.manual_seed(0)
    model = VisionTransformer(img_size=12, patch_size=4, in_chans=1, num_classes=10, embed_dim=32, depth=4, num_heads=4)
    fit(model, lambda step: F.cross_entropy(model(images), labels), steps=50)
    scores = mdc.score(model.eval(), [(images, labels)])
    alone = copy.deepcopy(model)
    module = WeightSharingModule(model, scores, 0.5)

    def masked_loss(model: nn.Module) -> float:
        plans = [module.plan(step) for step in range(1000, 1008)]  # none of them is trained
        with torch.no_grad():
            return float(np.mean([F.cross_entropy(mdc.slim(model, plan)(images), labels) for plan in plans]))

    def loss(step: int) -> Tensor:
        module._trainer = type("At", (), {"global_step": step})()  # all that loss_parts asks of a Trainer
        return module.loss_parts(images, labels)["loss"]

    before = masked_loss(model)
    fit(model, loss, steps=40)
    fit(alone, lambda step: F.cross_entropy(alone(images), labels), steps=40)
    assert masked_loss(model) < 0.5 * min(before, masked_loss(alone))
    smallest = [mdc.slim(each, module.smallest_plan) for each in (model, alone)]
    with torch.no_grad():
        shared, not_shared = (float(F.cross_entropy(slim(images), labels)) for slim in smallest)
    assert shared < 0.5 * not_shared


def fit(model: nn.Module, loss: Any, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()


# --- the policies -----------------------------------------------------------------------------------------------------


def test_a_step_trains_the_largest_the_smallest_and_a_random_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    module, on, seen = sharing(make(), 0.6, space=mdc.Space(min_heads=2), seed=3), [], []

    @contextmanager
    def noted(model: nn.Module, plan: mdc.Plan) -> Iterator[None]:
        with masked(model, plan):
            on.append(plan)
            yield
            on.clear()

    monkeypatch.setattr("lightning_mdc.distillation.weight_sharing.masked", noted)
    module.student.register_forward_pre_hook(lambda *_: seen.append(on[0] if on else None))
    for step in range(3):
        module._trainer = type("At", (), {"global_step": step})()  # all that loss_parts asks of a Trainer
        module.loss_parts(*labelled())
    assert seen[::3] == [None] * 3  # the dense model, on the labels
    smallest, drawn = seen[1], seen[2::3]
    assert seen[1::3] == [smallest] * 3
    assert drawn == [sharing(make(), 0.6, space=mdc.Space(min_heads=2), seed=3).plan(step) for step in range(3)]
    assert len(set(drawn)) == 3
    assert [len(kept) for kept in smallest.heads] == [2] * len(smallest.heads)
    for plan in drawn:  # no unit fewer than the smallest in any block
        assert all(set(few) <= set(kept) for few, kept in zip(smallest.heads, plan.heads, strict=True))
        assert all(set(few) <= set(kept) for few, kept in zip(smallest.neurons, plan.neurons, strict=True))
        assert mdc.plan_macs(module.student, smallest) < 0.8 * mdc.plan_macs(module.student, plan)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"space": mdc.Space(groups=2)},
        {"space": mdc.Space(token_ratio="stages")},
        {"dimensions": ["neurons"]},
        {"space": mdc.Space(round_to=8, min_heads=2)},
    ],
    ids=str,
)
def test_policies_meet_the_budget(options: dict[str, Any]) -> None:
    model = make()
    module = sharing(model, 0.6, **options)
    costs = [mdc.policy_macs(model, module.policy(step)) / mdc.macs(model) for step in range(50)]
    assert max(costs) <= 0.6
    assert np.median(costs) > 0.58
    plan = module.plan(7)
    assert mdc.plan_macs(model, plan) == mdc.policy_macs(model, module.policy(7))
    assert all(len(kept) >= module.space.space.min_heads for kept in plan.heads)
    assert all(len(kept) % (module.space.space.round_to or 1) == 0 for kept in plan.neurons)


def test_no_policy_could_keep_another_neuron() -> None:
    model = make()
    module = sharing(model, 0.6)
    for step in range(10):
        policy = module.policy(step)
        kept = [round(ratio * 192) for ratio in policy.neurons]
        for block in [block for block, count in enumerate(kept) if count < 192]:
            neurons = [(count + (number == block)) / 192 for number, count in enumerate(kept)]
            more = mdc.Policy(policy.heads, neurons, policy.tokens)
            assert mdc.policy_macs(model, more) > 0.6 * mdc.macs(model) >= mdc.policy_macs(model, policy)


def test_policies_depend_on_seed_and_step_alone() -> None:
    first, second = sharing(make(), seed=5), sharing(make(seed=1), seed=5)
    steps = [0, 1, 63, 5]
    drawn = {step: first.policy(step) for step in steps}
    assert [second.policy(step) for step in reversed(steps)] == [drawn[step] for step in reversed(steps)]
    assert len({policy.to_json() for policy in drawn.values()}) == len(steps)
    assert all(sharing(make(), seed=6).policy(step) != drawn[step] for step in steps)


def test_policies_are_spread_over_the_space() -> None:
    module = sharing(make(), 0.6)
    heads = np.array([module.policy(step).heads for step in range(200)])
    for block in heads.T:  # four heads each
        assert set(np.rint(4 * block)) == {1, 2, 3, 4}
    tokens = [module.policy(step).tokens[0] for step in range(200)]
    assert max(tokens) - min(tokens) > 0.3


def test_global_random_states_are_left_alone() -> None:
    module = sharing(make())
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    module.loss_parts(*labelled())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


# --- under a Trainer --------------------------------------------------------------------------------------------------


class Recording(WeightSharingModule):
    """Notes the plan of each pass."""

    def on_fit_start(self) -> None:
        self.seen: list[tuple[int, str]] = []

    def plan(self, step: int) -> mdc.Plan:
        plan = super().plan(step)
        if hasattr(self, "seen"):
            self.seen.append((step, plan.hash))
        return plan


def recording(seed: int = 0, **options: Any) -> Recording:
    model = make()
    return Recording(model.train(), random_scores(model), 0.5, seed=seed, **CONSTANT_SGD, **options)


def test_images_may_be_mixed(tmp_path: Path) -> None:
    module = recording(mixup={"mixup_alpha": 0.8, "cutmix_alpha": 1.0})
    run = trainer(tmp_path)
    run.fit(module, loader())
    assert run.callback_metrics["train/shared"].isfinite()
    assert [step for step, _ in module.seen] == list(range(6))


def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = recording()
    trainer(tmp_path, max_epochs=2).fit(whole, loader())
    start = recording()
    run = trainer(tmp_path, max_epochs=2, max_steps=6)
    run.fit(start, loader())
    run.save_checkpoint(tmp_path / "half.ckpt")
    rest = recording()
    trainer(tmp_path, max_epochs=2).fit(rest, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert start.seen + rest.seen == whole.seen
    assert [step for step, _ in whole.seen] == list(range(12))
    for key, value in whole.student.state_dict().items():
        assert torch.equal(rest.student.state_dict()[key], value)


def test_checkpoint_loads_with_model_and_scores_given_again(tmp_path: Path) -> None:
    model = make()
    options = {
        "space": mdc.Space(min_heads=2, token_ratio="stages", groups={"heads": 2}, bounds={"neurons": (0.25, 1.0)}),
        "tokens": mdc.TokenOptions(reduction="merge"),
        "shared_weight": 0.5,
        "temperature": 3.0,
        "label_smoothing": 0.1,
    }
    module = sharing(model, mdc.Budget(macs=0.5, params=0.9), seed=4, **options)
    run = trainer(tmp_path, fast_dev_run=True)
    run.fit(module, loader())
    path = tmp_path / "a.ckpt"
    run.save_checkpoint(path)
    held = torch.load(path, weights_only=True)["hyper_parameters"]
    assert {"model", "scores", "student", "teacher", "kd", "hidden_weight"}.isdisjoint(held)
    again = WeightSharingModule.load_from_checkpoint(path, model=make(seed=9), scores=random_scores(model))
    for name in ("seed", "shared_weight", "temperature", "label_smoothing"):
        assert getattr(again, name) == getattr(module, name)
    assert again.space.space == module.space.space
    assert again.plan(11) == module.plan(11)
    torch.testing.assert_close(again(pictures()), module(pictures()))


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_trainer_options(options: dict[str, Any], tmp_path: Path) -> None:
    module = recording()
    run = trainer(tmp_path, **options)
    run.fit(module, loader(), loader())
    assert run.callback_metrics["train/shared"].isfinite()
    updates = 6 // options.get("accumulate_grad_batches", 1)
    assert {step for step, _ in module.seen} == set(range(updates))
    assert len(set(module.seen)) == updates  # the batches of one update share its plan


def test_accumulated_batches_train_as_one_batch(tmp_path: Path) -> None:
    whole, parts = recording(), recording()
    trainer(tmp_path).fit(whole, loader(size=8))
    trainer(tmp_path, accumulate_grad_batches=2).fit(parts, loader(size=4))
    assert whole.global_step == parts.global_step == 3
    for key, value in whole.student.state_dict().items():
        torch.testing.assert_close(parts.student.state_dict()[key], value, rtol=1e-4, atol=1e-6)


def test_a_copy_draws_and_trains_by_itself() -> None:
    module = sharing(make())
    twin = copy.deepcopy(module)
    assert twin.plan(3) == module.plan(3)
    twin.loss_parts(*labelled())["loss"].backward()
    assert all(parameter.grad is None for parameter in module.parameters())


def test_two_processes_train_the_same_policies(tmp_path: Path) -> None:
    two_ranks(train_ddp, tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["seen"] == second["seen"]
    assert first["weights"] == second["weights"]
    assert first["images"] != second["images"]
    module = sharing(make(), seed=2)
    assert first["seen"] == [[step, module.plan(step).hash] for step in range(3)]


def train_ddp(rank: int, root: Path) -> None:
    """Three steps on two processes; each writes down what it saw and has."""
    module, images = recording(seed=2), []
    module.student.register_forward_pre_hook(lambda model, args: images.append(args[0].sum().item()))
    run = trainer(root, strategy="ddp", devices=2)
    run.fit(module, loader())
    weights = [value.double().sum().item() for value in module.student.state_dict().values()]
    found = {"seen": module.seen, "weights": weights, "images": images}
    (root / f"rank{rank}.json").write_text(json.dumps(found))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"kd_weight": 0.5}, DistillationError, "kd_weight: no such setting"),
        ({"teacher": make()}, DistillationError, "teacher: no such setting"),
        ({"kd": "soft", "hidden_weight": 1.0}, DistillationError, "hidden_weight, kd: no such setting"),
        ({"seed": -1}, DistillationError, "seed=-1"),
        ({"seed": 0.5}, DistillationError, "seed=0.5"),
        ({"shared_weight": -1.0}, DistillationError, "shared_weight=-1.0"),
        ({"shared_weight": float("nan")}, DistillationError, "shared_weight=nan"),
        ({"temperature": 0}, DistillationError, "temperature=0"),
        ({"budget": 0.01}, BudgetError, "budget=0.01"),
        ({"space": {"groups": 9}}, SearchError, "groups"),
        ({"space": {"token_ratio": "one"}}, PolicyError, "token_ratio='one'"),
        ({"tokens": {"score": "best"}}, PlanError, "score='best'"),
        ({"scores": "random"}, CalibrationError, "scores='random'"),
        ({"scores": mdc.Scores([], [], [])}, CalibrationError, "scores.heads does not fit"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(options: dict[str, Any], error: type[Exception], words: str) -> None:
    model = make()
    assert issubclass(error, MdcError)
    with pytest.raises(error, match=words):
        WeightSharingModule(model, **({"scores": random_scores(model), "budget": 0.5} | options))


def test_models_that_masks_cannot_train_are_refused(tmp_path: Path) -> None:
    compiled = make()
    compiled.compile(backend="aot_eager")
    with pytest.raises(DistillationError, match="is compiled"):
        sharing(compiled)
    checkpointing = make()
    checkpointing.set_grad_checkpointing()
    with pytest.raises(DistillationError, match="gradient checkpointing"):
        sharing(checkpointing)
    for option, words in (("compile", "is compiled"), ("grad_checkpointing", "gradient checkpointing")):
        with pytest.raises(DistillationError, match=words):
            sharing(make(), **{option: True})
    module = sharing(make())
    module._trainer = type("Sharded", (), {"strategy": FSDPStrategy()})()
    with pytest.raises(DistillationError, match="strategy=FSDPStrategy shards parameters"):
        module.setup("fit")
