"""The LightningModule that trains a student: under a teacher, or on labels alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import lightning
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_mdc.distillation.hidden_states import HiddenStates, hidden_states
from lightning_mdc.distillation.losses import (
    at_least_float32,
    feature_loss,
    features_in,
    hard_distillation_loss,
    soft_distillation_loss,
)
from lightning_mdc.distillation.mixing import Mixing, check_mixup
from lightning_mdc.distillation.optimization import (
    Groups,
    complete_optimizer,
    complete_schedule,
    create_optimizer,
    create_schedule,
    named_groups,
)
from lightning_mdc.distillation.rising_loss import RisingLossWarning
from lightning_mdc.distillation.settings import (
    check_features,
    check_loss_settings,
    check_student_can,
    classes_of,
    compile_options,
    complete_kd,
    count_classes,
    plain,
)
from lightning_mdc.distillation.teacher import FrozenTeacher, Teacher
from lightning_mdc.errors import DistillationError
from lightning_mdc.models import prediction_in

Batch = tuple[Tensor, Tensor]


class DistillationModule(LightningModule):
    """Trains ``student`` on ``(1 − kd_weight) · task + kd_weight · kd + hidden_weight · hidden``.

    *task* is cross entropy to the labels, *kd* the distance to the teacher's prediction, *hidden* the distance of the
    blocks' outputs (`hidden_state_loss`). Without a teacher the loss is *task*: plain supervised training, by the same
    recipe, which is how ``train.py`` trains the dense model.

    The parts are logged as ``train/task``, ``train/kd``, ``train/hidden`` and ``train/loss``, means over the epoch, and
    as ``train/task_step`` etc. every ``log_every_n_steps``. ``val/top1`` and ``test/top1`` are fractions of images;
    with a teacher, ``test/agreement`` is the fraction on which both predict the same class.

    A student without classes (``num_classes=0``, or one that does not say and a `kd` of features) learns from the
    teacher alone, on ``kd_weight · kd + hidden_weight · hidden``: pooled features, tokens, maps, any nest of tensors
    whose shapes are the teacher's. Batches may then be images without labels, and ``val/kd`` and ``test/kd`` take the
    place of accuracies.

    A distilled timm student returns two logits while it is trained: the labels teach the first and the teacher the
    second, as in DeiT (Touvron et al., arXiv 2012.12877). Without a teacher their mean is trained.

    The teacher stays in eval mode, gets no gradient, and is in no checkpoint, nor are its settings:
    ``DistillationModule.load_from_checkpoint(path, student=..., teacher=...)`` takes both again.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: str | nn.Module | Teacher | Path | None = None,
        kd: Literal["soft", "hard", "cosine", "squared"] | None = None,
        kd_weight: float = 0.5,
        temperature: float = 2.0,
        label_smoothing: float = 0.0,
        optimizer: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        num_classes: int | None = None,
        *,
        distill_token: bool | None = None,
        hidden_weight: float = 0.0,
        mixup: Mapping[str, Any] | None = None,
        compile: bool | Mapping[str, Any] = False,
        grad_checkpointing: bool = False,
    ) -> None:
        """
        Args:
            student: images (n, in_chans, H, W) -> logits (n, classes), or features. Trained in the mode it is in:
                what ``mdc.load`` gives is in eval mode, ``.train()`` it.
            teacher: with settings of its own, or else the `source` of a `Teacher`: a module, a timm model name or a
                folder that ``mdc.save`` wrote; ``None`` for plain supervised training.
            kd: ``soft`` compares distributions, ``hard`` uses the teacher's class as a label; ``squared`` and
                ``cosine`` compare outputs as they are (`feature_loss`). ``None``: ``soft``, of features ``squared``.
            kd_weight: share of *kd* in the loss, in [0, 1].
            temperature: of the soft kind; has no effect on the hard one.
            label_smoothing: of the task loss, in [0, 1).
            optimizer: keyword arguments of ``timm.optim.create_optimizer_v2``, over ``DEFAULT_OPTIMIZER``: AdamW for
                weights that are trained already, 5e-5 at the head and 0.75 times that from block to block towards the
                image. ``layer_decay=None``: the same rate for all, as for weights drawn at random, which also want a
                higher one. Norms, biases and what ``student.no_weight_decay()`` names get no weight decay. Gradients
                are the Trainer's to clip; ``gradient_clip_val=1.0`` is what ``train.py`` gives it.
            schedule: keyword arguments of ``timm.scheduler.create_scheduler_v2``, over ``DEFAULT_SCHEDULE``; in epochs,
                stepped after every update. Its length is the Trainer's; ``warmup_epochs=None``: one, and at most a
                fifth of that. ``{"sched": "none"}`` keeps the rate constant.
            num_classes: asked of the student when not given; 0: it has none.
            distill_token: whether the distillation head of a distilled student learns from the teacher, and the other
                from the labels alone; ``None``: if it has one and there is a teacher.
            hidden_weight: factor of *hidden* in the loss, at least 0; needs a teacher of the same depth and width.
            mixup: keyword arguments of ``timm.data.Mixup``; all alphas 0, or ``None``: images are not mixed.
            compile: whether to compile the student while it is trained, or keyword arguments of ``torch.compile``.
            grad_checkpointing: whether blocks are computed again in the backward pass, which saves memory.

        Raises:
            DistillationError: a setting is out of range or unknown, the teacher cannot be had, or student and teacher
                do not fit together.
        """
        super().__init__()
        check_loss_settings(kd, kd_weight, temperature, label_smoothing, hidden_weight)
        optimizer = complete_optimizer(plain(optimizer, "optimizer"))
        schedule = complete_schedule(plain(schedule, "schedule"))
        mixup = None if mixup is None else check_mixup(plain(mixup, "mixup"))
        compile = compile_options(compile, "compile")
        self.teacher = None
        if teacher is not None:
            teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
            classes = num_classes or classes_of(student)
            self.teacher = FrozenTeacher(teacher, student, classes, answers=kd_weight > 0)
        network = None if self.teacher is None else self.teacher.network
        check_student_can(student, network, distill_token, hidden_weight, grad_checkpointing)
        num_classes = count_classes(num_classes, student, network, kd)
        kd = cast(Any, complete_kd(kd, num_classes))
        if not num_classes:
            of_labels = {"label_smoothing": label_smoothing, "mixup": mixup, "distill_token": distill_token}
            check_features(student, network, kd_weight, hidden_weight, of_labels)
        # After the defaults are filled in: the checkpoint then says what was in force.
        self.save_hyperparameters(ignore=["student", "teacher"])

        self.student = student
        self.has_classes = num_classes > 0
        self.kd = kd
        self.kd_weight = kd_weight
        self.temperature = temperature
        self.label_smoothing = label_smoothing
        self.hidden_weight = hidden_weight
        self.distill_token = distill_token
        self.compile_options = compile
        self.grad_checkpointing = grad_checkpointing
        self.optimizer_kwargs = optimizer
        self.schedule_kwargs = schedule
        self.mixing = None if mixup is None else Mixing(mixup, num_classes)
        self._groups: Groups | None = None
        self._hidden_states: HiddenStates | None = None
        if self.has_classes:
            self.val_top1 = MulticlassAccuracy(num_classes, average="micro")
            self.test_top1 = MulticlassAccuracy(num_classes, average="micro")
            self.test_agreement = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Any:
        """Student logits, (n, classes), or its output as it is where there are no classes."""
        for_labels, for_teacher = self._student_logits(images)
        return for_labels if for_labels is for_teacher else (for_labels + for_teacher) / 2

    def loss_parts(self, images: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """The scalars ``task`` (of classes), ``loss`` and, with a teacher, ``kd`` and (``hidden_weight > 0``)
        ``hidden``.

        Args:
            images: (n, in_chans, H, W).
            labels: classes (n,), or class probabilities (n, classes) as Mixup makes them; without effect on a student
                without classes.

        Raises:
            DistillationError: the teacher's output has another shape than the student's, or it takes no such images.
        """
        if self.teacher is None:
            task = self._task_loss(self(images), labels)
            return {"task": task, "loss": task}
        with self._watching():
            for_labels, for_teacher = self._student_logits(images)
            kd = self._distance(for_teacher, self._teacher_logits(images, for_teacher))
            parts, loss = {"kd": kd}, self.kd_weight * kd
            if self.has_classes:
                parts = {"task": self._task_loss(for_labels, labels), **parts}
                loss = (1 - self.kd_weight) * parts["task"] + loss
            if self._hidden_states is not None:
                parts["hidden"] = self._hidden_states.loss()
                loss = loss + self.hidden_weight * parts["hidden"]
            return {**parts, "loss": loss}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = self._parts_of(batch)
        if self.mixing is not None and labels is not None:
            images, labels = self.mixing(images, labels)
        parts = self.loss_parts(images, labels)
        for name, value in parts.items():
            self._log(f"train/{name}", value.detach(), len(images), prog_bar=name == "loss")
            # Rank 0's own: averaging over ranks would make them wait for one another in every step.
            self.log(f"train/{name}_step", value.detach(), on_step=True, on_epoch=False)
        return parts["loss"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self._evaluate(batch, "test")
        if self.teacher is not None and self.has_classes:
            images, _ = batch
            self.test_agreement(logits, self._teacher_logits(images, logits).argmax(dim=-1))
            self._log("test/agreement", self.test_agreement, len(images))

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """See `forward`."""
        return cast(Tensor, self(batch if isinstance(batch, Tensor) else batch[0]))

    def configure_callbacks(self) -> list[lightning.Callback]:
        """One that keeps the student in its `training_form` during fit, as only callbacks hear of exceptions, and one
        that warns where the loss rises far above its start."""
        return [_TrainingForm(), RisingLossWarning()]

    @contextmanager
    def training_form(self) -> Iterator[None]:
        """The student as it is trained: two logits, hooks, checkpointing, compiled; as it was before, after.

        ``fit`` is all inside.
        """
        student: Any = self.student  # a strategy may wrap it meanwhile
        # Of features there is one, the mean of both, as in evaluation.
        teaches = self.distill_token if self.teacher is None or self.distill_token is not None else self.has_classes
        with ExitStack() as stack:
            if teaches is not None and hasattr(student, "set_distilled_training"):
                stack.callback(student.set_distilled_training, student.distilled_training)
                student.set_distilled_training(teaches)
            if self.grad_checkpointing:
                before = bool(getattr(student, "grad_checkpointing", False))
                try:
                    student.set_grad_checkpointing(True)
                except AssertionError as error:  # timm's way of saying that this model can't
                    raise DistillationError(
                        f"grad_checkpointing=True, but student={type(student).__name__} refuses it ({error}); pass"
                        " False"
                    ) from error
                stack.callback(student.set_grad_checkpointing, before)
            if self.hidden_weight and self.teacher is not None:
                self._hidden_states = stack.enter_context(hidden_states(student, self.teacher.network))
                stack.callback(setattr, self, "_hidden_states", None)
            if self.compile_options is not False:
                # In place: the keys of the state dict are the same, and copies and checkpoints know nothing of it.
                stack.callback(setattr, student, "_compiled_call_impl", student._compiled_call_impl)
                student.compile(**self.compile_options)
            yield

    def setup(self, stage: str) -> None:
        if stage == "fit":  # the strategy has not wrapped the student yet
            self._groups = named_groups(self.student, self.optimizer_kwargs)

    def configure_optimizers(self) -> Any:
        optimizer = create_optimizer(self.student, self.optimizer_kwargs, self._groups)
        total = self.trainer.estimated_stepping_batches  # optimizer updates, over all ranks' epochs
        if total == float("inf"):
            raise DistillationError(
                "max_epochs=-1 gives the schedule no end; give the Trainer max_epochs or max_steps,"
                ' or pass schedule={"sched": "none"}'
            )
        per_epoch = self._updates_per_epoch(int(total))
        scheduler = create_schedule(optimizer, self.schedule_kwargs, int(total), per_epoch)
        if scheduler is None:
            for group in optimizer.param_groups:  # else timm's schedule applies it
                group["lr"] *= group.get("lr_scale", 1.0)
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        # timm's rate is a function of the update count, which a resumed Trainer knows.
        scheduler.step_update(num_updates=self.trainer.global_step)

    def teardown(self, stage: str) -> None:
        # Lightning takes the student off the device; a teacher left behind would hold its memory.
        if self.teacher is not None:
            self.teacher.network.to("cpu")

    def _watching(self) -> AbstractContextManager[None]:
        if self._hidden_states is not None:
            return self._hidden_states.watching()
        if self.hidden_weight:
            raise DistillationError(
                f"hidden_weight={self.hidden_weight} needs hooks on both networks, which are there during fit; outside"
                " it, call this inside `with module.training_form():`"
            )
        return nullcontext()

    def _student_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits for the labels to teach and logits for the teacher to teach; the same tensor if there is one head.
        Without classes, both are the output."""
        output = prediction_in(self.student(images))
        if isinstance(output, Tensor) or not self.has_classes:
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
        if not self.has_classes:
            return logits
        if not isinstance(logits, Tensor) or logits.shape != student_logits.shape:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise DistillationError(
                f"teacher={type(self.teacher.network).__name__} returned {got} where the student's logits are"
                f" {tuple(student_logits.shape)}; both need one logit per class, over the same classes"
            )
        return logits

    def _distance(self, of_student: Any, of_teacher: Any) -> Tensor:
        """*kd* of two outputs.

        Raises:
            DistillationError: features that cannot be compared.
        """
        if self.kd == "soft":
            return soft_distillation_loss(of_student, of_teacher, self.temperature)
        if self.kd == "hard":
            return hard_distillation_loss(of_student, of_teacher)
        both = features_in(of_student), features_in(of_teacher)
        shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in both]
        if not shapes[0] or shapes[0] != shapes[1]:
            raise DistillationError(
                f"student={type(self.student).__name__} puts out {shapes[0] or type(of_student).__name__} and its"
                f" teacher {shapes[1] or type(of_teacher).__name__}, which cannot be compared; where tokens have left"
                " the student, slim it with TokenOptions(restore=True), or give both a pooled output (global_pool)"
            )
        return feature_loss(*both, self.kd)

    def _parts_of(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """(images, labels); of features nobody needs the labels."""
        if self.has_classes:
            images, labels = batch
            return images, labels
        return (batch if isinstance(batch, Tensor) else batch[0]), None

    def _task_loss(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None  # where there are classes
        logits = at_least_float32(logits)
        if labels.is_floating_point():
            labels = labels.to(logits.dtype)
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def _evaluate(self, batch: Batch, split: str) -> Tensor:
        images, labels = self._parts_of(batch)
        logits = cast(Tensor, self(images))
        if labels is None:
            self._log(f"{split}/kd", self._distance(logits, self._teacher_logits(images, logits)), len(images), True)
            return logits
        top1: Metric = getattr(self, f"{split}_top1")
        top1(logits, labels)
        self._log(f"{split}/top1", top1, len(images), prog_bar=True)
        # Without smoothing, so that runs with different smoothing can be compared.
        self._log(f"{split}/task", F.cross_entropy(at_least_float32(logits), labels), len(images))
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


class _TrainingForm(lightning.Callback):
    """Enters the `training_form` when fit begins, and leaves it however fit ends."""

    def __init__(self) -> None:
        self.stack = ExitStack()

    def setup(self, trainer: lightning.Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.stack.enter_context(cast(DistillationModule, pl_module).training_form())

    def teardown(self, trainer: lightning.Trainer, pl_module: LightningModule, stage: str) -> None:
        self.stack.close()

    def on_exception(self, trainer: lightning.Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.stack.close()
