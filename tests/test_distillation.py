"""DistillationModule: losses against numpy, the teacher stays out of everything, a resumed run keeps its schedule."""

import copy
import warnings
from functools import cache

import lightning as L
import numpy as np
import pytest
import timm.data
import timm.optim
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from omegaconf import OmegaConf
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_mdc as mdc
from lightning_mdc.distillation import DistillationModule
from lightning_mdc.distillation.losses import hard_distillation_loss, soft_distillation_loss
from lightning_mdc.distillation.mixing import Mixing
from lightning_mdc.distillation.optimization import create_optimizer, named_groups
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


def slimmed(kind=VisionTransformer, depth: int = 4) -> nn.Module:
    """Half the heads and neurons, and fewer tokens from block to block."""
    torch.manual_seed(0)
    dense = kind(**{**TINY, "patch_size": 2, "depth": depth}, num_classes=3)
    plan = mdc.make_plan(dense, mdc.score(dense, [batch(8)]), mdc.Policy(heads=0.5, neurons=0.5, tokens=0.6))
    return mdc.slim(dense, plan).train()


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
    module = DistillationModule(tiny(), optimizer={"lr": 1e-2, "layer_decay": None}, schedule=SCHEDULE)
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
    optimizer = {"lr": 1e-2, "layer_decay": None}
    module = DistillationModule(tiny(), optimizer=optimizer, schedule={"warmup_epochs": 0, "min_lr": 1e-4})
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
    optimizer = {"lr": 3e-3, "layer_decay": None}
    module = DistillationModule(tiny(), optimizer=optimizer, schedule={"sched": "none", "warmup_epochs": 0})
    trainer(tmp_path, max_epochs=2, callbacks=[rates]).fit(module, loader())
    assert set(rates.seen) == {3e-3}


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0.8), (10, 4)])
def test_without_a_word_the_rate_rises_for_an_epoch_and_at_most_a_fifth_of_the_run(tmp_path, epochs, warmup):
    rates = Rates()
    trainer(tmp_path, max_epochs=epochs, callbacks=[rates]).fit(DistillationModule(tiny()), loader())
    start, peak, updates = 1e-6, 5e-5 * 0.75**2, np.arange(4 * epochs)  # the first group is the embedding's
    rising = start * 0.75**2 + (peak - start * 0.75**2) * updates / warmup
    np.testing.assert_allclose(rates.seen[: int(warmup)], rising[: int(warmup)], rtol=1e-6)
    assert max(rates.seen) <= peak
    assert np.argmax(rates.seen) == np.ceil(warmup)


def test_checkpoint_loads_with_the_networks_given_again(tmp_path):
    given = OmegaConf.create({"optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]}, "schedule": {"warmup_epochs": 2}})
    more = OmegaConf.create(
        {
            "mixup": {"mixup_alpha": 0.8, "cutmix_minmax": [0.2, 0.5]},
            "compile": {"backend": "eager"},
        }
    )
    student = tiny(0)
    student.pretrained_cfg = {"mean": (0.1,), "std": (0.2,)}
    teacher = mdc.Teacher(tiny(1), precision=32, normalization=OmegaConf.create({"mean": 0.5, "std": 0.5}))
    module = DistillationModule(student, teacher, kd="hard", kd_weight=0.25, **given, **more)
    run = trainer(tmp_path)
    run.fit(module, loader())
    path = tmp_path / "a.ckpt"
    run.save_checkpoint(path)
    loaded = DistillationModule.load_from_checkpoint(path, student=student, teacher=teacher)
    assert loaded.kd == "hard"
    assert loaded.kd_weight == 0.25
    hparams = torch.load(path, weights_only=True)["hyper_parameters"]
    assert hparams["mixup"] == {"mixup_alpha": 0.8, "cutmix_minmax": [0.2, 0.5]}
    assert hparams["compile"] == {"backend": "eager"}
    assert not {"student", "teacher"} & set(hparams)
    default = {"opt": "adamw", "weight_decay": 0.05, "layer_decay": 0.75}
    assert loaded.optimizer_kwargs == {**default, "lr": 1e-3, "betas": [0.9, 0.95]}
    images, _ = batch()
    torch.testing.assert_close(loaded(images), module(images))
    torch.testing.assert_close(loaded.teacher(images), teacher.source((images * 0.2 + 0.1 - 0.5) / 0.5).detach())
    another = DistillationModule.load_from_checkpoint(path, student=student, teacher=tiny(1))
    assert another.teacher.precision is None


@pytest.mark.slow
def test_two_processes_train_one_student(tmp_path):
    teacher = tiny(1)
    module = DistillationModule(tiny(0), teacher)
    run = trainer(tmp_path, strategy="ddp_spawn", devices=2)
    run.fit(module, loader())
    assert run.callback_metrics["train/kd"].isfinite()


# --- mixing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("n", [6, 7, 1])
def test_mixed_labels_say_how_much_of_which_image_there_is(mode, n):
    # Image i is all i + 1: a mixed image then tells its own shares, image for image with its partner n - 1 - i.
    images = torch.arange(1.0, n + 1)[:, None, None, None].expand(n, 1, 8, 8).contiguous()
    before, labels = images.clone(), torch.arange(n)
    np.random.seed(0)
    mixed, targets = Mixing({"mixup_alpha": 1.0, "mode": mode}, num_classes=n)(images, labels)
    assert torch.equal(images, before)
    even = n // 2 * 2
    for i in range(n):
        shares = torch.zeros(n)
        if i == even:
            shares[i] = 1
        else:
            j = even - 1 - i
            share = ((mixed[i].mean() - (j + 1)) / (i - j)).item()
            shares[i], shares[j] = share, 1 - share
            torch.testing.assert_close(mixed[i], torch.full_like(mixed[i], mixed[i, 0, 0, 0].item()))
        torch.testing.assert_close(targets[i], shares, rtol=1e-4, atol=1e-5)
    assert n == 1 or not torch.equal(mixed[:even], before[:even])


def test_cutmix_pastes_and_counts_pixels():
    images = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    np.random.seed(1)
    options = {"mixup_alpha": 0.0, "cutmix_alpha": 1.0, "cutmix_minmax": [0.3, 0.7]}
    mixed, targets = Mixing(options, num_classes=2)(images, torch.tensor([0, 1]))
    pasted = mixed[0].mean().item()
    assert 0 < pasted < 1
    torch.testing.assert_close(targets, torch.tensor([[1 - pasted, pasted], [pasted, 1 - pasted]]))


def test_student_and_teacher_see_the_same_mixed_images_and_smoothing_is_applied_once():
    seen = {}
    student, teacher = tiny(0), tiny(1)
    for name, network in (("student", student), ("teacher", teacher)):
        network.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].clone()}))
    module = DistillationModule(student, teacher, kd_weight=0.0, label_smoothing=0.2, mixup={"mixup_alpha": 0.8})
    module.log = lambda *args, **kwargs: None
    images, labels = batch(7)
    np.random.seed(3)
    loss = module.training_step((images, labels), 0)
    assert torch.equal(seen["student"], seen["teacher"])
    assert not torch.equal(seen["student"], images)
    assert torch.equal(seen["student"][6], images[6])
    # timm's own mixing of smoothed labels, and the sum by hand.
    np.random.seed(3)
    timms = timm.data.Mixup(mixup_alpha=0.8, label_smoothing=0.2, num_classes=3)
    mixed, targets = timms(images[:6].clone(), labels[:6])
    last = torch.full((1, 3), 0.2 / 3)
    last[0, labels[6]] += 0.8
    logits = student(torch.cat([mixed, images[6:]])).detach().double().numpy()
    expected = -np.mean((torch.cat([targets, last]).double().numpy() * np.log(softmax(logits))).sum(axis=1))
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)


@pytest.mark.parametrize("mixup", [None, {"mixup_alpha": 0, "cutmix_alpha": 0.0, "cutmix_minmax": None, "prob": 1.0}])
def test_nothing_to_mix(mixup):
    assert DistillationModule(tiny(), mixup=mixup).mixing is None


def test_mixing_in_low_precision(tmp_path):
    module = DistillationModule(tiny(0), tiny(1), mixup={"mixup_alpha": 0.8, "mode": "elem"}, label_smoothing=0.1)
    run = trainer(tmp_path, precision="bf16-true")
    run.fit(module, loader(n=23, size=5))
    assert run.callback_metrics["train/loss"].isfinite()


def test_mixed_labels_are_not_mixed_again():
    module = DistillationModule(tiny(), mixup={"mixup_alpha": 0.8})
    with pytest.raises(DistillationError, match=r"labels of shape \(6, 3\)"):
        module.training_step((batch()[0], torch.full((6, 3), 1 / 3)), 0)


# --- a student's two heads -----------------------------------------------------------------------------------------


class InFit(L.Callback):
    """What the student is like in mid-fit."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        student = pl_module.student
        self.distilled = getattr(student, "distilled_training", None)
        self.checkpointing = student.grad_checkpointing
        self.compiled = student._compiled_call_impl is not None


class Failing(DistillationModule):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        raise ZeroDivisionError


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("given", "with_teacher", "expected"),
    [(None, True, True), (True, True, True), (False, True, False), (None, False, None)],
)
def test_the_token_is_distilled_during_fit_and_the_students_own_mode_is_back_after(
    tmp_path, own, given, with_teacher, expected
):
    student = tiny(0, kind=VisionTransformerDistilled)
    student.set_distilled_training(own)
    module = DistillationModule(student, tiny(1) if with_teacher else None, distill_token=given)
    look = InFit()
    trainer(tmp_path, callbacks=[look]).fit(module, loader(), loader())
    assert look.distilled is (own if expected is None else expected)
    assert student.distilled_training is own
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path).fit(Failing(student, tiny(1), distill_token=given), loader())
    assert student.distilled_training is own


def test_labels_teach_the_class_head_and_the_teacher_the_other():
    student, teacher = slimmed(VisionTransformerDistilled), tiny(1).eval()
    images, labels = batch()
    module = DistillationModule(student, teacher, kd="hard")
    with module.training_form():
        parts = module.loss_parts(images, labels)
    tokens = student.forward_features(images)
    class_logits, distilled_logits = student.head(tokens[:, 0]), student.head_dist(tokens[:, 1])
    torch.testing.assert_close(parts["task"], nn.functional.cross_entropy(class_logits, labels))
    answers = teacher(images).argmax(1)
    torch.testing.assert_close(parts["kd"], nn.functional.cross_entropy(distilled_logits, answers))
    with module.training_form():
        torch.testing.assert_close(module.eval()(images), (class_logits + distilled_logits) / 2)


# --- the student while it is trained -------------------------------------------------------------------------------


def weights_after(tmp_path, student: nn.Module, **arguments) -> tuple[dict[str, torch.Tensor], InFit]:
    look, run = InFit(), trainer(tmp_path / "run", max_epochs=2)
    run.callbacks.append(look)
    torch.manual_seed(0)
    run.fit(DistillationModule(student, tiny(1), optimizer={"lr": 1e-2}, **arguments), loader(), loader())
    run.save_checkpoint(tmp_path / "run.ckpt")
    keys = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert set(keys) == {f"student.{name}" for name in student.state_dict()}
    return student.state_dict(), look


@pytest.mark.slow
def test_compiled_and_checkpointed_training_gives_the_same_weights_and_is_undone(tmp_path):
    start = slimmed(depth=3)
    plain, look = weights_after(tmp_path, copy.deepcopy(start))
    assert not look.compiled
    assert not look.checkpointing
    ways = {
        "compiled": {"compile": {"backend": "aot_eager"}},
        "checkpointing": {"grad_checkpointing": True},
    }
    for name, arguments in ways.items():
        student = copy.deepcopy(start)
        got, look = weights_after(tmp_path, student, **arguments)
        assert getattr(look, name)
        for key, value in plain.items():
            torch.testing.assert_close(got[key], value, msg=f"{name}: {key}")
        assert student._compiled_call_impl is None
        assert student.grad_checkpointing is False


def test_the_students_own_form_is_kept(tmp_path):
    student = slimmed()
    student.set_grad_checkpointing(True)
    student.compile(backend="aot_eager")
    own = student._compiled_call_impl
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path).fit(Failing(student, compile={"backend": "eager"}, grad_checkpointing=True), loader())
    assert student._compiled_call_impl is own
    assert student.grad_checkpointing is True


@pytest.mark.slow
def test_the_average_of_the_weights_is_validated_saved_and_left(tmp_path):
    decay, steps = 0.9, []
    student, teacher = slimmed(), tiny(1)

    class Steps(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            steps.append({name: value.detach().clone() for name, value in student.named_parameters()})

        def on_validation_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "ema.ckpt")

    validated = []

    class Module(DistillationModule):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            validated.append({name: value.detach().clone() for name, value in self.student.named_parameters()})

    average = EMAWeightAveraging(decay=decay)
    module = Module(
        student,
        teacher,
        optimizer={"lr": 1e-2},
        schedule={"warmup_epochs": 0},
        compile={"backend": "eager"},
        mixup={"mixup_alpha": 0.5},
    )
    trainer(tmp_path, callbacks=[Steps(), average], num_sanity_val_steps=0).fit(module, loader(), loader(6))
    assert average._average_model.module.teacher is module.teacher
    expected = steps[0]  # the average starts with the weights after the first step
    for step in steps[1:]:
        expected = {name: decay * expected[name] + (1 - decay) * value for name, value in step.items()}
    checkpoint = torch.load(tmp_path / "ema.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"student.{name}" for name in student.state_dict()}
    for name, value in student.named_parameters():
        torch.testing.assert_close(value, expected[name], msg=name)
        torch.testing.assert_close(validated[0][name], expected[name], msg=name)
        torch.testing.assert_close(checkpoint["state_dict"][f"student.{name}"], expected[name], msg=name)
        torch.testing.assert_close(checkpoint["current_model_state"][f"student.{name}"], steps[-1][name], msg=name)


# --- parameter groups ----------------------------------------------------------------------------------------------

OPTIMIZERS = [
    {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05},
    {"opt": "muon", "lr": 4e-3, "weight_decay": 0.05},
    {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "layer_decay": 0.75},
    {"opt": "muon", "lr": 1e-3, "weight_decay": 0.05, "fallback_list": ["head.*"], "fallback_no_weight_decay": True},
    {"opt": "sgd", "lr": 0.1, "weight_decay": 0.0, "momentum": 0.8},
    {"opt": "lookahead_adamw", "lr": 1e-3, "weight_decay": 0.05},
]


@pytest.mark.parametrize("kwargs", OPTIMIZERS)
def test_groups_are_those_timm_makes(kwargs):
    student = slimmed(VisionTransformerDistilled)
    student.blocks[0].requires_grad_(False)
    timms = timm.optim.create_optimizer_v2(student, **kwargs)
    ours = create_optimizer(student, kwargs, named_groups(student, kwargs))
    assert type(ours) is type(timms)
    assert len(ours.param_groups) == len(timms.param_groups)
    for mine, theirs in zip(ours.param_groups, timms.param_groups, strict=True):
        assert [id(p) for p in mine["params"]] == [id(p) for p in theirs["params"]]
        assert {k: v for k, v in mine.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
    grouped = {id(p) for group in ours.param_groups for p in group["params"]}
    assert grouped == {id(p) for p in student.parameters() if p.requires_grad}


class Wrapped(nn.Module):
    """As FSDP: parameters are flat, and have other names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module
        for child in list(module.modules()):
            for name, parameter in list(child._parameters.items()):
                if parameter is not None:
                    child._parameters[name] = nn.Parameter(parameter.detach().flatten())


def test_groups_survive_sharding():
    student = slimmed(VisionTransformerDistilled)
    kwargs = OPTIMIZERS[2]
    groups = named_groups(student, kwargs)
    decayed = {name for options, names in groups if options["weight_decay"] for name in names}
    spared = {name for name, p in student.named_parameters() if p.ndim == 1} | {"pos_embed", "cls_token", "dist_token"}
    assert decayed == {name for name, _ in student.named_parameters()} - spared
    student.blocks[1] = Wrapped(student.blocks[1])
    optimizer = create_optimizer(Wrapped(student), kwargs, groups)
    for group, (options, names) in zip(optimizer.param_groups, groups, strict=True):
        assert group["weight_decay"] == options["weight_decay"]
        assert group["lr_scale"] == options["lr_scale"]
        assert len(group["params"]) == len(names)
        assert all(parameter.ndim == 1 for parameter in group["params"])


def test_a_student_that_has_changed_is_grouped_anew():
    student = slimmed()
    kwargs = OPTIMIZERS[0]
    groups = named_groups(student, kwargs)
    student.blocks[0].requires_grad_(False)
    student.head = nn.Sequential(student.head)
    optimizer = create_optimizer(student, kwargs, groups)
    grouped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert grouped == {id(p) for p in student.parameters() if p.requires_grad}


@pytest.mark.parametrize("sched", ["cosine", "none"])
def test_early_layers_get_a_smaller_rate(tmp_path, sched):
    student = slimmed()
    module = DistillationModule(
        student, optimizer={"lr": 1e-2, "layer_decay": 0.5}, schedule={"sched": sched, "warmup_epochs": 0}
    )
    rates = {}

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if not rates:
                groups = trainer.optimizers[0].param_groups
                rates.update({id(p): group["lr"] for group in groups for p in group["params"]})

    trainer(tmp_path, callbacks=[Look()]).fit(module, loader())
    of = {name: rates[id(parameter)] for name, parameter in student.named_parameters()}
    # patch embedding, four blocks, head: 0.5 to the power of how far from the end.
    for name, power in {"patch_embed.proj.weight": 5, "blocks.0.mlp.fc1.weight": 4, "blocks.3.norm1.bias": 1}.items():
        assert of[name] == pytest.approx(1e-2 * 0.5**power), name
    assert of["head.weight"] == pytest.approx(1e-2)


# --- a training that unlearns ---------------------------------------------------------------------------------------


@cache
def _knowing() -> nn.Module:
    """A network that has learnt the classes of `batch(200)` by heart."""
    student, (images, labels) = tiny(), batch(200)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    for _ in range(200):
        loss = nn.functional.cross_entropy(student(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3
    return student


def knowing() -> nn.Module:
    return copy.deepcopy(_knowing())


def warned_of_unlearning(tmp_path, student: nn.Module, **recipe) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = DistillationModule(student, copy.deepcopy(student), **recipe)
        trainer(tmp_path, max_epochs=2).fit(module, loader(200, 10))
    return [str(each.message) for each in caught if "unlearns" in str(each.message)]


def test_a_rate_that_wrecks_what_was_learnt_is_told_once(tmp_path):
    (said,) = warned_of_unlearning(tmp_path, knowing(), optimizer={"opt": "muon", "lr": 1.0, "layer_decay": None})
    assert "lower optimizer lr=1.0" in said


@pytest.mark.parametrize("recipe", [{}, {"optimizer": {"lr": 1e-3, "layer_decay": None}}])
def test_nothing_is_told_of_a_recipe_that_fits(tmp_path, recipe):
    assert not warned_of_unlearning(tmp_path, knowing(), **recipe)


def test_nothing_is_told_of_training_from_scratch(tmp_path):
    torch.manual_seed(0)
    student = VisionTransformer(**TINY, num_classes=3)
    assert not warned_of_unlearning(tmp_path, student, optimizer={"opt": "muon", "lr": 1e-2, "layer_decay": None})


# --- bad input -----------------------------------------------------------------------------------------------------


class NoCheckpointing(nn.Linear):
    num_classes = 3

    def __init__(self) -> None:
        super().__init__(2, 3)


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
        ({"teacher": 5}, "teacher=5 is no network"),
        ({"teacher": "vit"}, "teacher='vit' is neither a folder nor a model of timm"),
        ({"distill_token": True}, "distill_token=True, but student=VisionTransformer has no distillation head"),
        ({"distill_token": "yes"}, "distill_token='yes'"),
        ({"distill_token": True, "teacher": None}, "distill_token=True needs a teacher"),
        ({"mixup": {"alpha": 1.0}}, r"mixup=.*unknown keys \['alpha'\]"),
        ({"mixup": {"mixup_alpha": -1.0}}, "mixup_alpha=-1.0"),
        ({"mixup": {"prob": 1.5}}, "prob=1.5"),
        ({"mixup": {"mode": "half"}}, "mode='half'"),
        ({"mixup": {"cutmix_minmax": [0.8, 0.2]}}, r"cutmix_minmax=\[0.8, 0.2\]"),
        ({"mixup": 0.8}, "mixup=0.8"),
        ({"compile": {"backed": "inductor"}}, r"compile=.*unknown keys \['backed'\]"),
        ({"compile": "inductor"}, "compile='inductor'"),
        ({"grad_checkpointing": 1}, "grad_checkpointing=1"),
        ({"student": NoCheckpointing(), "grad_checkpointing": True}, "student=NoCheckpointing has no set_grad_check"),
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
