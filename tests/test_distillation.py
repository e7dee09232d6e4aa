"""DistillationModule: losses against numpy, the teacher stays out of everything, a resumed run keeps its schedule."""

import copy

import lightning as L
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mdc.distillation import DistillationModule, hard_distillation_loss, soft_distillation_loss
from lightning_mdc.errors import DistillationError, MdcError

TINY = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}


def tiny(seed: int = 0, num_classes: int = 3, kind=VisionTransformer) -> nn.Module:
    torch.manual_seed(seed)
    network = kind(**TINY, num_classes=num_classes)
    for parameter in network.parameters():  # at initialisation the head's logits are nearly 0 and hide mistakes
        nn.init.normal_(parameter, std=0.2)
    return network


def batch(n: int = 6, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def loader(n: int = 24, size: int = 6) -> DataLoader:
    return DataLoader(TensorDataset(*batch(n)), batch_size=size)


def trainer(tmp_path, **kwargs) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "max_epochs": 1,
    }
    return L.Trainer(**{**defaults, **kwargs})


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


# --- losses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_loss_is_the_formula(temperature):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(5, 7)), rng.normal(size=(5, 7)) * 3
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    expected = temperature**2 * np.mean([sum(p[i, c] * np.log(p[i, c] / q[i, c]) for c in range(7)) for i in range(5)])
    got = soft_distillation_loss(torch.tensor(student), torch.tensor(teacher), temperature)
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    assert soft_distillation_loss(torch.tensor(teacher), torch.tensor(teacher), temperature).abs() < 1e-12


def test_hard_loss_is_the_formula():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(5, 7)), rng.normal(size=(5, 7))
    expected = -np.mean(np.log(softmax(student)[np.arange(5), teacher.argmax(axis=1)]))
    np.testing.assert_allclose(
        hard_distillation_loss(torch.tensor(student), torch.tensor(teacher)), expected, rtol=1e-10
    )


def test_bf16_logits_are_compared_in_float32():
    student, teacher = torch.randn(4, 1000).bfloat16(), torch.randn(4, 1000).bfloat16()
    got = soft_distillation_loss(student, teacher)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, soft_distillation_loss(student.float(), teacher.float()), rtol=0, atol=0)


@pytest.mark.parametrize("kd", ["soft", "hard"])
def test_loss_is_the_weighted_sum_of_task_and_kd(kd):
    student, teacher = tiny(0), tiny(1).eval()
    images, labels = batch()
    module = DistillationModule(student, teacher, kd=kd, kd_weight=0.3, temperature=3.0, label_smoothing=0.1)
    parts = module.loss_parts(images, labels)

    logits, answers = student(images).detach().double().numpy(), teacher(images).detach().double().numpy()
    targets = np.full((6, 3), 0.1 / 3)
    targets[np.arange(6), labels] += 0.9
    task = -np.mean((targets * np.log(softmax(logits))).sum(axis=1))
    p, q = softmax(answers / 3), softmax(logits / 3)
    by_kind = {
        "soft": 9 * np.mean((p * np.log(p / q)).sum(axis=1)),
        "hard": -np.mean(np.log(softmax(logits)[np.arange(6), answers.argmax(axis=1)])),
    }
    np.testing.assert_allclose(parts["task"].item(), task, rtol=1e-5)
    np.testing.assert_allclose(parts["kd"].item(), by_kind[kd], rtol=1e-5)
    np.testing.assert_allclose(parts["loss"].item(), 0.7 * task + 0.3 * by_kind[kd], rtol=1e-5)


def test_without_a_teacher_the_loss_is_the_task():
    module = DistillationModule(tiny())
    images, labels = batch()
    parts = module.loss_parts(images, labels)
    assert set(parts) == {"task", "loss"}
    torch.testing.assert_close(parts["loss"], nn.functional.cross_entropy(module.student(images), labels))


def test_class_probabilities_are_labels_too():
    module = DistillationModule(tiny())
    images, labels = batch()
    one_hot = nn.functional.one_hot(labels, 3).float()
    torch.testing.assert_close(module.loss_parts(images, one_hot)["loss"], module.loss_parts(images, labels)["loss"])


def test_a_distilled_student_learns_labels_and_teacher_on_its_two_heads():
    student, teacher = tiny(0, kind=VisionTransformerDistilled), tiny(1).eval()
    student.set_distilled_training(True)
    student.train()
    images, labels = batch()
    parts = DistillationModule(student, teacher, kd="hard").loss_parts(images, labels)
    class_logits, distilled_logits = student(images)
    torch.testing.assert_close(parts["task"], nn.functional.cross_entropy(class_logits, labels))
    torch.testing.assert_close(parts["kd"], nn.functional.cross_entropy(distilled_logits, teacher(images).argmax(1)))

    alone = DistillationModule(student)
    mean = (class_logits + distilled_logits) / 2
    torch.testing.assert_close(alone(images), mean)
    torch.testing.assert_close(alone.loss_parts(images, labels)["loss"], nn.functional.cross_entropy(mean, labels))


# --- the teacher ---------------------------------------------------------------------------------------------------


def test_teacher_is_frozen_and_in_nothing_of_the_module(tmp_path):
    student, teacher = tiny(0), tiny(1).train()
    before = copy.deepcopy(teacher.state_dict())
    module = DistillationModule(student, teacher, optimizer={"lr": 1e-2})
    run = trainer(tmp_path)
    run.fit(module, loader())
    path = tmp_path / "last.ckpt"
    run.save_checkpoint(path)

    assert not teacher.training
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not module.teacher(batch()[0]).requires_grad
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in student.parameters())
    keys = torch.load(path, weights_only=True)["state_dict"]
    assert set(keys) == {f"student.{name}" for name in student.state_dict()}


def test_teacher_answers_in_eval_mode_whatever_its_owner_does():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Dropout(0.9))
    module = DistillationModule(tiny(), teacher)
    images, labels = batch()
    teacher.train()
    torch.manual_seed(1)
    first = module.loss_parts(images, labels)["kd"]
    teacher.train()
    torch.testing.assert_close(module.loss_parts(images, labels)["kd"], first)


def test_copies_of_the_module_share_the_teacher():
    module = DistillationModule(tiny(0), tiny(1))
    assert copy.deepcopy(module).teacher is module.teacher


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_training_with_a_float32_teacher(tmp_path, precision):
    teacher = tiny(1)
    module = DistillationModule(tiny(0), teacher)
    run = trainer(tmp_path, precision=precision)
    run.fit(module, loader())
    assert run.callback_metrics["train/kd"].isfinite()
    assert next(teacher.parameters()).dtype == torch.float32


# --- training ------------------------------------------------------------------------------------------------------


def test_training_pulls_the_student_to_the_teacher(tmp_path):
    module = DistillationModule(tiny(0), tiny(1), kd_weight=1.0, optimizer={"lr": 1e-2, "weight_decay": 0.0})
    images, labels = batch(24)
    before = module.loss_parts(images, labels)["kd"].item()
    trainer(tmp_path, max_epochs=25).fit(module, loader())
    assert module.loss_parts(images, labels)["kd"].item() < before / 4


def test_logged_names_and_values(tmp_path):
    student, teacher = tiny(0), tiny(1)
    module = DistillationModule(student, teacher)
    run = trainer(tmp_path)
    run.fit(module, loader(), loader(10, 4))
    assert {"train/task", "train/kd", "train/loss", "val/top1", "val/task"} <= set(run.callback_metrics)
    result = run.test(module, loader(10, 4), verbose=False)[0]
    images, labels = batch(10)
    with torch.no_grad():
        predicted, answered = student(images).argmax(1), teacher(images).argmax(1)
    assert result["test/top1"] == pytest.approx((predicted == labels).float().mean().item())
    assert result["test/agreement"] == pytest.approx((predicted == answered).float().mean().item())
    torch.testing.assert_close(torch.cat(run.predict(module, loader(10, 4))), student(images))


class Rates(L.Callback):
    """The learning rate each update was made with."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


SCHEDULE = {"warmup_epochs": 1, "warmup_lr": 1e-5, "min_lr": 1e-4}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rate_is_warmup_then_cosine_per_update(tmp_path, accumulate):
    rates = Rates()
    module = DistillationModule(tiny(), optimizer={"lr": 1e-2}, schedule=SCHEDULE)
    run = trainer(tmp_path, max_epochs=4, accumulate_grad_batches=accumulate, callbacks=[rates])
    run.fit(module, loader())  # 4 batches an epoch
    an_epoch, total = 4 // accumulate, 16 // accumulate
    warmup = [1e-5 + (1e-2 - 1e-5) * t / an_epoch for t in range(an_epoch)]
    cosine = [1e-4 + 0.5 * (1e-2 - 1e-4) * (1 + np.cos(np.pi * t / total)) for t in range(an_epoch, total)]
    np.testing.assert_allclose(rates.seen[::accumulate], warmup + cosine, rtol=1e-9)


@pytest.mark.parametrize(
    ("length", "updates"),
    [({"max_epochs": 3, "accumulate_grad_batches": 3}, 6), ({"max_epochs": -1, "max_steps": 7}, 7)],
)
def test_schedule_is_as_long_as_the_run(tmp_path, length, updates):
    module = DistillationModule(tiny(), optimizer={"lr": 1e-2}, schedule={"warmup_epochs": 0, "min_lr": 1e-4})
    run = trainer(tmp_path, **length)
    run.fit(module, loader())
    assert run.global_step == updates
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    def module() -> DistillationModule:
        return DistillationModule(tiny(0), tiny(1), optimizer={"lr": 1e-2}, schedule=SCHEDULE)

    whole, rates = module(), Rates()
    trainer(tmp_path, max_epochs=4, callbacks=[rates]).fit(whole, loader())

    class Interrupt(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")
                trainer.should_stop = True

    first, second = Rates(), Rates()
    trainer(tmp_path, max_epochs=4, callbacks=[first, Interrupt()]).fit(module(), loader())
    resumed = module()
    trainer(tmp_path, max_epochs=4, callbacks=[second]).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert len(first.seen) == 8
    np.testing.assert_allclose(first.seen + second.seen, rates.seen, rtol=1e-12)
    for name, value in whole.student.state_dict().items():
        torch.testing.assert_close(resumed.student.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_schedule_none_keeps_the_rate(tmp_path):
    rates = Rates()
    module = DistillationModule(tiny(), optimizer={"lr": 3e-3}, schedule={"sched": "none", "warmup_epochs": 0})
    trainer(tmp_path, max_epochs=2, callbacks=[rates]).fit(module, loader())
    assert set(rates.seen) == {3e-3}


def test_checkpoint_loads_with_the_networks_given_again(tmp_path):
    given = OmegaConf.create({"optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]}, "schedule": {"warmup_epochs": 2}})
    module = DistillationModule(tiny(0), tiny(1), kd="hard", kd_weight=0.25, **given)
    run = trainer(tmp_path)
    run.fit(module, loader())
    path = tmp_path / "a.ckpt"
    run.save_checkpoint(path)
    loaded = DistillationModule.load_from_checkpoint(path, student=tiny(5), teacher=tiny(1))
    assert loaded.kd == "hard"
    assert loaded.kd_weight == 0.25
    assert loaded.optimizer_kwargs == {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "betas": [0.9, 0.95]}
    images, _ = batch()
    torch.testing.assert_close(loaded(images), module(images))


@pytest.mark.slow
def test_two_processes_train_one_student(tmp_path):
    teacher = tiny(1)
    module = DistillationModule(tiny(0), teacher)
    run = trainer(tmp_path, strategy="ddp_spawn", devices=2)
    run.fit(module, loader())
    assert run.callback_metrics["train/kd"].isfinite()


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kd": "medium"}, "kd='medium'"),
        ({"kd_weight": 1.5}, "kd_weight=1.5"),
        ({"kd_weight": "half"}, "kd_weight='half'"),
        ({"temperature": 0}, "temperature=0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"teacher": tiny(num_classes=4)}, "teacher=VisionTransformer has 4 classes where 3"),
        ({"num_classes": 4}, "student=VisionTransformer has 3 classes where 4"),
        ({"num_classes": 1}, "num_classes=1"),
        ({"student": nn.Linear(2, 3), "teacher": None}, "num_classes=None"),
        ({"student": "vit"}, "student='vit'"),
        ({"teacher": "vit"}, "teacher='vit'"),
        ({"optimizer": {"opt": "adamwx"}}, "opt='adamwx'"),
        ({"optimizer": {"lr": -1.0}}, "lr=-1.0"),
        ({"optimizer": 5}, "optimizer=5"),
        ({"schedule": {"warmup": 3}}, r"unknown keys \['warmup'\]"),
        ({"schedule": {"num_epochs": 3}}, r"unknown keys \['num_epochs'\]"),
        ({"schedule": {"sched": "plateau"}}, "sched='plateau'"),
        ({"schedule": {"sched": "cosin"}}, "'sched': 'cosin'"),
    ],
)
def test_wrong_settings_name_the_argument(arguments, words):
    with pytest.raises(DistillationError, match=words):
        DistillationModule(**{"student": tiny(0), "teacher": tiny(1), **arguments})


def test_student_as_its_own_teacher_is_refused():
    student = tiny()
    with pytest.raises(MdcError, match="is the student itself"):
        DistillationModule(student, student)


def test_teacher_with_other_logits_is_refused_at_the_first_batch():
    module = DistillationModule(tiny(), nn.Sequential(nn.Flatten(), nn.Linear(64, 5)))
    with pytest.raises(DistillationError, match=r"teacher=Sequential returned \(6, 5\) .* \(6, 3\)"):
        module.loss_parts(*batch())


def test_student_without_logits_is_refused():
    class Features(nn.Module):
        num_classes = 3

        def forward(self, images):
            return {"features": images}

    with pytest.raises(DistillationError, match="student=Features returned dict"):
        DistillationModule(Features())(batch()[0])


@pytest.mark.parametrize(
    ("arguments", "length", "words"),
    [
        ({"optimizer": {"no_such_option": 1}}, {}, "optimizer=.*no_such_option"),
        ({}, {"max_epochs": -1}, "max_epochs=-1 gives the schedule no end"),
    ],
)
def test_what_shows_only_in_a_run_is_explained(tmp_path, arguments, length, words):
    with pytest.raises(DistillationError, match=words):
        trainer(tmp_path, **length).fit(DistillationModule(tiny(), **arguments), loader())
