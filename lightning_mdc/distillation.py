"""Training a student under a frozen teacher; with no teacher, plain supervised training."""

import inspect
from collections.abc import Mapping
from typing import Any, Literal, cast

import timm.optim
import timm.scheduler
import torch
import torch.nn.functional as F
from lightning import LightningModule
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_mdc.errors import DistillationError

Batch = tuple[Tensor, Tensor]

DEFAULT_OPTIMIZER: Mapping[str, Any] = {"opt": "adamw", "lr": 5e-4, "weight_decay": 0.05}
DEFAULT_SCHEDULE: Mapping[str, Any] = {"sched": "cosine", "warmup_epochs": 5, "warmup_lr": 1e-6, "min_lr": 1e-5}

# The length of a run is the Trainer's to say.
_SCHEDULE_KEYS = set(inspect.signature(timm.scheduler.create_scheduler_v2).parameters) - {
    "optimizer",
    "num_epochs",
    "step_on_epochs",
    "updates_per_epoch",
    "plateau_mode",
}


def soft_distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``T² · KL(teacher ‖ student)`` of the softened predictions, batch mean. Hinton et al. 2015, section 2.

    DeiT's own soft loss divides by the number of classes as well, which at 1000 classes makes it 1000 times weaker.

    Args:
        student_logits: (n, classes).
        teacher_logits: (n, classes).
        temperature: T; the factor T² keeps the gradient's size the same for every T.

    Returns:
        Scalar, at least 0, in float32 at least.
    """
    student = F.log_softmax(_at_least_float32(student_logits) / temperature, dim=-1)
    teacher = F.log_softmax(_at_least_float32(teacher_logits) / temperature, dim=-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2


def hard_distillation_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross entropy to the teacher's most likely class, averaged over the batch. Touvron et al. 2021, equation 3.

    Args:
        student_logits: (n, classes).
        teacher_logits: (n, classes).
    """
    return F.cross_entropy(_at_least_float32(student_logits), teacher_logits.argmax(dim=-1))


class FrozenTeacher:
    """A network that only answers. Not an ``nn.Module``, so that its owner neither saves, trains nor synchronises it.

    Copies share the network (EMA callbacks deepcopy the module that holds it). Its parameters are left as they are:
    it is asked under ``no_grad``, and stays its owner's.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (n, classes). Follows the images to their device; keeps its own dtype."""
        self.network.eval()
        parameter = next(self.network.parameters(), None)
        if parameter is not None:
            if parameter.device != images.device:
                self.network.to(images.device)
            images = images.to(parameter.dtype)
        return cast(Tensor, self.network(images))

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenTeacher":
        return self

    def to(self, device: torch.device | str) -> None:
        self.network.to(device)


class DistillationModule(LightningModule):
    """Trains ``student`` on ``(1 − kd_weight) · task + kd_weight · kd``.

    *task* is cross entropy to the labels, *kd* the distance to the teacher's prediction. Both are logged, as
    ``train/task``, ``train/kd`` and ``train/loss``; with no teacher the loss is *task*. ``val/top1`` and ``test/top1``
    are fractions of images; with a teacher, ``test/agreement`` is the fraction on which both predict the same class.

    A distilled timm student in ``set_distilled_training(True)`` mode returns two logits: the labels then teach the
    first and the teacher the second, as in DeiT. Without a teacher their mean is trained.

    The teacher stays in eval mode, gets no gradient, and is in no checkpoint:
    ``DistillationModule.load_from_checkpoint(path, student=..., teacher=...)`` takes both networks again.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        kd: Literal["soft", "hard"] = "soft",
        kd_weight: float = 0.5,
        temperature: float = 2.0,
        label_smoothing: float = 0.0,
        optimizer: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        num_classes: int | None = None,
    ) -> None:
        """
        Args:
            student: images (n, in_chans, H, W) -> logits (n, classes).
            teacher: the same; ``None`` for plain supervised training.
            kd: ``soft`` compares distributions, ``hard`` uses the teacher's class as a label.
            kd_weight: share of *kd* in the loss, in [0, 1].
            temperature: of the soft kind; has no effect on the hard one.
            label_smoothing: of the task loss, in [0, 1).
            optimizer: keyword arguments of ``timm.optim.create_optimizer_v2``, over ``DEFAULT_OPTIMIZER``.
            schedule: keyword arguments of ``timm.scheduler.create_scheduler_v2``, over ``DEFAULT_SCHEDULE``; in epochs,
                stepped after every update. Its length is the Trainer's. ``{"sched": "none"}`` keeps the rate constant.
            num_classes: asked of the student when not given.

        Raises:
            DistillationError: a setting is out of range or unknown, or student and teacher do not fit together.
        """
        super().__init__()
        _check_loss_settings(kd, kd_weight, temperature, label_smoothing)
        _check_networks(student, teacher)
        optimizer = {**DEFAULT_OPTIMIZER, **_plain(optimizer, "optimizer")}
        schedule = {**DEFAULT_SCHEDULE, **_plain(schedule, "schedule")}
        _check_optimizer(optimizer)
        _check_schedule(schedule)
        num_classes = _num_classes(num_classes, student, teacher)
        # After the defaults are filled in: the checkpoint then says what was in force.
        self.save_hyperparameters(ignore=["student", "teacher"])

        self.student = student
        self.teacher = None if teacher is None else FrozenTeacher(teacher)
        self.kd = kd
        self.kd_weight = kd_weight
        self.temperature = temperature
        self.label_smoothing = label_smoothing
        self.optimizer_kwargs = optimizer
        self.schedule_kwargs = schedule
        self.val_top1 = MulticlassAccuracy(num_classes, average="micro")
        self.test_top1 = MulticlassAccuracy(num_classes, average="micro")
        self.test_agreement = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Student logits, (n, classes)."""
        for_labels, for_teacher = self._student_logits(images)
        return for_labels if for_labels is for_teacher else (for_labels + for_teacher) / 2

    def loss_parts(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The scalars ``task``, ``loss`` and, with a teacher, ``kd``.

        Args:
            images: (n, in_chans, H, W).
            labels: classes (n,), or class probabilities (n, classes) as Mixup makes them.

        Raises:
            DistillationError: the teacher's logits have another shape than the student's.
        """
        for_labels, for_teacher = self._student_logits(images)
        if self.teacher is None:
            logits = for_labels if for_labels is for_teacher else (for_labels + for_teacher) / 2
            task = self._task_loss(logits, labels)
            return {"task": task, "loss": task}
        task = self._task_loss(for_labels, labels)
        teacher_logits = self._teacher_logits(images, for_teacher)
        if self.kd == "soft":
            kd = soft_distillation_loss(for_teacher, teacher_logits, self.temperature)
        else:
            kd = hard_distillation_loss(for_teacher, teacher_logits)
        return {"task": task, "kd": kd, "loss": (1 - self.kd_weight) * task + self.kd_weight * kd}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        parts = self.loss_parts(images, labels)
        for name, value in parts.items():
            self._log(f"train/{name}", value.detach(), len(images), prog_bar=name == "loss")
        return parts["loss"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_top1)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self._evaluate(batch, "test", self.test_top1)
        if self.teacher is not None:
            images, _ = batch
            self.test_agreement(logits, self._teacher_logits(images, logits).argmax(dim=-1))
            self._log("test/agreement", self.test_agreement, len(images))

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """Logits, (n, classes)."""
        return cast(Tensor, self(batch if isinstance(batch, Tensor) else batch[0]))

    def configure_optimizers(self) -> Any:
        optimizer = _create("optimizer", timm.optim.create_optimizer_v2, self.student, self.optimizer_kwargs)
        total = self.trainer.estimated_stepping_batches  # optimizer updates, over all ranks' epochs
        if total == float("inf"):
            raise DistillationError(
                "max_epochs=-1 gives the schedule no end; give the Trainer max_epochs or max_steps,"
                ' or pass schedule={"sched": "none"}'
            )
        per_epoch = self._updates_per_epoch(int(total))
        # num_epochs may be a fraction (max_steps ends the run in mid-epoch): the schedule is exactly `total` long.
        length = {"num_epochs": total / per_epoch, "updates_per_epoch": per_epoch, "step_on_epochs": False}
        scheduler, _ = _create(
            "schedule", timm.scheduler.create_scheduler_v2, optimizer, {**self.schedule_kwargs, **length}
        )
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        # timm's rate is a function of the update count, which a resumed Trainer knows.
        scheduler.step_update(num_updates=self.trainer.global_step)

    def teardown(self, stage: str) -> None:
        # Lightning takes the student off the device; a teacher left behind would hold its memory.
        if self.teacher is not None:
            self.teacher.to("cpu")

    def _student_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits for the labels to teach and logits for the teacher to teach; the same tensor if there is one head."""
        output = self.student(images)
        if isinstance(output, Tensor):
            return output, output
        if isinstance(output, (tuple, list)) and len(output) == 2 and all(isinstance(o, Tensor) for o in output):
            return output[0], output[1]
        raise DistillationError(
            f"student={type(self.student).__name__} returned {type(output).__name__}, not logits (n, classes) or the"
            " two logits of a distilled model; wrap it in a module that returns its logits"
        )

    def _teacher_logits(self, images: Tensor, student_logits: Tensor) -> Tensor:
        assert self.teacher is not None  # both callers ask first
        logits = self.teacher(images)
        if not isinstance(logits, Tensor) or logits.shape != student_logits.shape:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise DistillationError(
                f"teacher={type(self.teacher.network).__name__} returned {got} where the student's logits are"
                f" {tuple(student_logits.shape)}; both need one logit per class, over the same classes"
            )
        return logits

    def _task_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(_at_least_float32(logits), labels, label_smoothing=self.label_smoothing)

    def _evaluate(self, batch: Batch, split: str, top1: Metric) -> Tensor:
        images, labels = batch
        logits = cast(Tensor, self(images))
        top1(logits, labels)
        self._log(f"{split}/top1", top1, len(images), prog_bar=True)
        # Without smoothing, so that runs with different smoothing can be compared.
        self._log(f"{split}/task", F.cross_entropy(_at_least_float32(logits), labels), len(images))
        return logits

    def _log(self, name: str, value: Tensor | Metric, num_images: int, prog_bar: bool = False) -> None:
        # One number per epoch under exactly this name: with on_step as well Lightning appends "_step" and "_epoch".
        self.log(
            name,
            value,
            batch_size=num_images,
            on_step=False,
            on_epoch=True,
            prog_bar=prog_bar,
            sync_dist=not isinstance(value, Metric),  # a torchmetric reduces over ranks itself
        )

    def _updates_per_epoch(self, total: int) -> int:
        batches = self.trainer.num_training_batches
        if batches == float("inf"):  # a stream of unknown length: the whole run is one epoch
            return max(1, total)
        return max(1, -(-int(batches) // self.trainer.accumulate_grad_batches))


def _at_least_float32(logits: Tensor) -> Tensor:
    """bf16 has 8 bits of mantissa: too few for a sum over 1000 classes."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _plain(mapping: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    """A dict of plain values: what goes into a checkpoint must load without OmegaConf's classes."""
    if mapping is None:
        return {}
    if OmegaConf.is_config(mapping):
        mapping = cast(Mapping[str, Any], OmegaConf.to_container(cast(Any, mapping), resolve=True))
    if not isinstance(mapping, Mapping):
        raise DistillationError(f"{name}={mapping!r} is no mapping; give keyword arguments, such as {{'lr': 5e-4}}")
    return dict(mapping)


def _create(argument: str, factory: Any, subject: Any, kwargs: Mapping[str, Any]) -> Any:
    try:
        return factory(subject, **kwargs)
    except (TypeError, ValueError, AssertionError) as error:
        raise DistillationError(
            f"{argument}={dict(kwargs)!r} is refused by timm's {factory.__name__}: {error}; correct that keyword"
        ) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_loss_settings(kd: str, kd_weight: float, temperature: float, label_smoothing: float) -> None:
    if kd not in ("soft", "hard"):
        raise DistillationError(f"kd={kd!r} is no kind of distillation; give 'soft' or 'hard'")
    if not _is_number(kd_weight) or not 0 <= kd_weight <= 1:
        raise DistillationError(f"kd_weight={kd_weight!r} is no share of the loss; give a number in [0, 1]")
    if not _is_number(temperature) or not 0 < temperature < float("inf"):
        raise DistillationError(f"temperature={temperature!r} can't divide logits; give a number > 0, usually 1 to 4")
    if not _is_number(label_smoothing) or not 0 <= label_smoothing < 1:
        raise DistillationError(f"label_smoothing={label_smoothing!r} is no share of a label; give a number in [0, 1)")


def _check_networks(student: nn.Module, teacher: nn.Module | None) -> None:
    for name, network in (("student", student), ("teacher", teacher)):
        if not isinstance(network, nn.Module) and not (name == "teacher" and network is None):
            raise DistillationError(f"{name}={network!r} is no network; give an nn.Module")
    if student is teacher:
        raise DistillationError(
            f"teacher={type(teacher).__name__} is the student itself, which would learn from its own changing answers;"
            " pass copy.deepcopy(student)"
        )


def _num_classes(num_classes: int | None, student: nn.Module, teacher: nn.Module | None) -> int:
    of_student, of_teacher = getattr(student, "num_classes", None), getattr(teacher, "num_classes", None)
    if num_classes is None:
        num_classes = of_student if of_student is not None else of_teacher
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
        raise DistillationError(
            f"num_classes={num_classes!r} is no number of classes, and the student has no attribute that tells it;"
            " give an integer of at least 2"
        )
    for name, network, count in (("student", student, of_student), ("teacher", teacher, of_teacher)):
        if isinstance(count, int) and count != num_classes:
            raise DistillationError(
                f"{name}={type(network).__name__} has {count} classes where {num_classes} are asked for;"
                " student, teacher and num_classes must count the same classes"
            )
    return num_classes


def _check_optimizer(optimizer: Mapping[str, Any]) -> None:
    opt, lr = optimizer["opt"], optimizer["lr"]
    try:
        timm.optim.get_optimizer_class(opt, bind_defaults=False)
    except (ValueError, AttributeError) as error:
        raise DistillationError(
            f"optimizer opt={opt!r} is unknown to timm; give a name from timm.optim.list_optimizers(), such as 'adamw'"
        ) from error
    if lr is not None and (not _is_number(lr) or lr < 0):
        raise DistillationError(f"optimizer lr={lr!r} is no learning rate; give a number >= 0, such as 5e-4")


def _check_schedule(schedule: Mapping[str, Any]) -> None:
    unknown = sorted(set(schedule) - _SCHEDULE_KEYS)
    if unknown:
        raise DistillationError(
            f"schedule={dict(schedule)!r} has unknown keys {unknown}; known are {sorted(_SCHEDULE_KEYS)}"
            " (the length is the Trainer's max_epochs or max_steps)"
        )
    if schedule["sched"] == "plateau":
        raise DistillationError(
            "schedule sched='plateau' waits for a metric and can't be stepped per update; give 'cosine' or another"
        )
    # timm keeps no list of its schedules to look a name up in; only building one tells, and older releases just return
    # None. A misspelt name should not wait until the data are read. Long enough that no decay_epochs exceeds it.
    nothing = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    length = {"num_epochs": 10**6, "updates_per_epoch": 1, "step_on_epochs": False}
    scheduler, _ = _create("schedule", timm.scheduler.create_scheduler_v2, nothing, {**schedule, **length})
    if scheduler is None and schedule["sched"] != "none":
        raise DistillationError(f"schedule sched={schedule['sched']!r} is unknown to timm; give 'cosine' or another")
