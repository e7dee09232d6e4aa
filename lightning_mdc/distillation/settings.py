"""The settings of a `DistillationModule`, brought into one form and checked before anything is trained."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from omegaconf import OmegaConf
from torch import nn

from lightning_mdc.distillation.hidden_states import comparable
from lightning_mdc.errors import DistillationError, check_number, check_one_of

# Distances of the student's output from the teacher's: as class probabilities, or as features, whatever they are.
OF_CLASSES, OF_FEATURES = ("soft", "hard"), ("cosine", "squared")

_COMPILE_KEYS = set(inspect.signature(torch.compile).parameters) - {"model"}


def check_loss_settings(
    kd: str | None, kd_weight: float, temperature: float, label_smoothing: float, hidden_weight: float
) -> None:
    """Refuse what is out of range."""
    check_one_of("kd", kd, (None, *OF_CLASSES, *OF_FEATURES), DistillationError)
    check_number("kd_weight", kd_weight, "the teacher's share of the loss", DistillationError, least=0, most=1)
    divides = "what logits are divided by, usually 1 to 4"
    check_number("temperature", temperature, divides, DistillationError, above=0)
    check_number("label_smoothing", label_smoothing, "a share of each label", DistillationError, least=0, below=1)
    check_number("hidden_weight", hidden_weight, "a factor of the loss", DistillationError, least=0)


def plain(mapping: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    """A dict of plain values: what goes into a checkpoint must load without OmegaConf's classes."""
    if mapping is None:
        return {}
    if OmegaConf.is_config(mapping):
        mapping = cast(Mapping[str, Any], OmegaConf.to_container(cast(Any, mapping), resolve=True))
    if not isinstance(mapping, Mapping):
        raise DistillationError(f"{name}={mapping!r} is no mapping; give keyword arguments, such as {_EXAMPLES[name]}")
    return dict(mapping)


_EXAMPLES = {
    "optimizer": {"lr": 5e-4},
    "schedule": {"warmup_epochs": 5},
    "mixup": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    "compile": {"mode": "max-autotune"},
    "Teacher.args": {"img_size": 384},
    "Teacher.compile": {"mode": "max-autotune"},
}


def compile_options(compile: bool | Mapping[str, Any], name: str) -> Literal[False] | dict[str, Any]:
    """Keyword arguments of ``torch.compile``; False: nothing is compiled."""
    if isinstance(compile, bool):
        return {} if compile else False
    options = plain(compile, name)
    if unknown := sorted(set(options) - _COMPILE_KEYS):
        raise DistillationError(
            f"{name}={options!r} has unknown keys {unknown}; torch.compile takes {sorted(_COMPILE_KEYS)}"
        )
    return options


def check_student_can(
    student: nn.Module,
    teacher: nn.Module | None,
    distill_token: bool | None,
    hidden_weight: float,
    grad_checkpointing: bool,
) -> None:
    """Refuse what this student cannot do under this teacher; a run would find it out too late."""
    if not isinstance(student, nn.Module):
        raise DistillationError(f"student={student!r} is no network; give an nn.Module")
    check_one_of("distill_token", distill_token, (None, True, False), DistillationError)
    check_one_of("grad_checkpointing", grad_checkpointing, (True, False), DistillationError)
    kind = type(student).__name__
    for name, value in (("distill_token", distill_token), ("hidden_weight", hidden_weight)):
        if value and teacher is None:
            raise DistillationError(f"{name}={value!r} needs a teacher to learn from, but teacher=None; give one")
    if distill_token and not hasattr(student, "set_distilled_training"):
        raise DistillationError(
            f"distill_token=True, but student={kind} has no distillation head (no set_distilled_training method); pass"
            " distill_token=None, or a distilled model such as deit_small_distilled_patch16_224"
        )
    if grad_checkpointing and not hasattr(student, "set_grad_checkpointing"):
        raise DistillationError(
            f"grad_checkpointing=True, but student={kind} has no set_grad_checkpointing method; pass False"
        )
    if hidden_weight and teacher is not None:
        comparable(student, teacher)


def classes_of(network: Any) -> Any:
    """The number of classes as timm's models say it, or transformers'; None: the network does not say."""
    return getattr(network, "num_classes", getattr(network, "num_labels", None))


def count_classes(num_classes: int | None, student: nn.Module, teacher: nn.Module | None, kd: str | None) -> int:
    """The number of classes, as given or as a network says it; student and teacher have to have as many. 0: their
    outputs are features, as they are where neither says and `kd` is of features."""
    of_student, of_teacher = classes_of(student), classes_of(teacher)
    if num_classes is None:
        num_classes = of_student if of_student is not None else of_teacher
        num_classes = 0 if num_classes is None and kd in OF_FEATURES else num_classes
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0 or num_classes == 1:
        raise DistillationError(
            f"num_classes={num_classes!r} is no number of classes, and the student has no attribute that tells it;"
            " give an integer of at least 2, or 0 where the output is features, to learn from the teacher alone"
        )
    for name, network, count in (("student", student, of_student), ("teacher", teacher, of_teacher)):
        if isinstance(count, int) and count != num_classes:
            raise DistillationError(
                f"{name}={type(network).__name__} has {count} classes where {num_classes} are asked for;"
                " student, teacher and num_classes must count the same classes"
            )
    return num_classes


def complete_kd(kd: str | None, num_classes: int) -> str:
    """`kd`, or the one that is usual for such outputs.

    Raises:
        DistillationError: it compares classes, and there are none.
    """
    if kd is None:
        return "soft" if num_classes else "squared"
    if kd in OF_CLASSES and not num_classes:
        raise DistillationError(
            f"kd={kd!r} compares class probabilities, but the student has no classes; pass kd='squared' or 'cosine'"
        )
    return kd


def check_features(
    student: nn.Module, teacher: nn.Module | None, kd_weight: float, hidden_weight: float, of_labels: Mapping[str, Any]
) -> None:
    """Refuse what a student without classes cannot do; `of_labels` are the settings that only labels give a sense."""
    kind = type(student).__name__
    if teacher is None:
        raise DistillationError(
            f"student={kind} has no classes that labels could teach, and there is no teacher; give a student with a"
            " classifier, or DistillationModule a teacher"
        )
    for name, value in of_labels.items():
        if value:
            raise DistillationError(
                f"{name}={value!r} is about labels, but student={kind} has no classes; leave it out"
            )
    if not kd_weight and not hidden_weight:
        raise DistillationError(
            f"kd_weight=0 and hidden_weight=0 leave student={kind} nothing to learn; raise one of them"
        )
