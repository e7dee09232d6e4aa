"""The teacher: which network, found by name, in a folder, or given; and the network, which only answers."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from torch import Tensor, nn

from lightning_mdc.artifact import load
from lightning_mdc.distillation.settings import compile_options, plain
from lightning_mdc.errors import ArtifactError, DistillationError, check_one_of
from lightning_mdc.models import prediction_in
from lightning_mdc.weights import load_weights

Precision = Literal["32", 32, "bf16", "fp16"]  # in YAML, 32 is a number
PRECISIONS: Mapping[Precision, torch.dtype] = {"32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Teacher:
    """Whom a student learns from, and how it is asked. Weights are read when a `DistillationModule` is made of it.

    Attributes:
        source: a network, images (n, in_chans, H, W) -> logits (n, classes); or a timm model name, with its pretrained
            weights (``"regnety_160.deit_in1k"`` is DeiT's); or a folder that ``mdc.save`` wrote.
        checkpoint: file of weights for the timm architecture that `source` names, instead of timm's own.
        args: keyword arguments of ``timm.create_model`` for a teacher by name, e.g. ``{"img_size": 384}``.
        precision: of its parameters (of a copy of them, where they differ) and arithmetic, whatever the Trainer's;
            ``None`` leaves it as it is, under the Trainer's autocast.
        compile: whether to compile it, or keyword arguments of ``torch.compile``.
        normalization: ``auto`` normalises the images anew for it where the ``pretrained_cfg`` of student and teacher
            name different means or standard deviations; or its own, ``{"mean": ..., "std": ...}``, a number or one per
            channel; ``None``: it gets the student's images as they are.

    Raises:
        DistillationError: an option is unknown, out of range or without effect on this source, or no teacher, or no
            file, is known by that name.
    """

    source: str | nn.Module | Path
    checkpoint: str | Path | None = None
    args: Mapping[str, Any] | None = None
    precision: Precision | None = None
    compile: bool | Mapping[str, Any] = False
    normalization: str | Mapping[str, Any] | None = "auto"

    def __post_init__(self) -> None:
        precision = None if self.precision is None else str(self.precision)  # on a command line, 32 is a number
        check_one_of("Teacher.precision", precision, (None, *PRECISIONS), DistillationError)
        object.__setattr__(self, "precision", precision)
        object.__setattr__(self, "args", plain(self.args, "Teacher.args"))
        object.__setattr__(self, "compile", compile_options(self.compile, "Teacher.compile"))
        object.__setattr__(self, "normalization", _known_normalization(self.normalization))
        self._check_source()

    def _check_source(self) -> None:
        """Refuse what is known to be wrong without a network connection."""
        source = self.source
        by_name = isinstance(source, (str, Path)) and not Path(source).is_dir()
        for name, value in (("checkpoint", self.checkpoint), ("args", self.args or None)):
            if value is not None and not by_name:
                shown = type(source).__name__ if isinstance(source, nn.Module) else source
                raise DistillationError(
                    f"Teacher.{name}={value!r} is for a timm model name, which teacher={shown} is not; give such a"
                    f" name as teacher, or leave {name} out"
                )
        if not isinstance(source, (nn.Module, str, Path)):
            raise DistillationError(
                f"teacher={source!r} is no network; give an nn.Module, a timm model name or a folder"
            )
        if not by_name:
            return
        model = str(source)
        if not model.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(model):
            close = difflib.get_close_matches(model, timm.list_models(), n=3)
            hint = f"did you mean {', '.join(close)}?" if close else "timm.list_pretrained() lists those with weights"
            raise DistillationError(f"teacher={model!r} is neither a folder nor a model of timm; {hint}")
        if self.checkpoint is not None and not Path(self.checkpoint).is_file():
            raise DistillationError(f"Teacher.checkpoint={str(self.checkpoint)!r} is no file; give a file of weights")

    def network(self, num_classes: int | None = None, answers: bool = True) -> nn.Module:
        """The network as given, of the folder, or of the timm model, which has `num_classes` if its weights are from a
        file and `args` do not say. Of a file nothing is unpickled but tensors. `answers`: whether its logits are asked
        for, so that the file has to have its head.

        Raises:
            DistillationError: its weights cannot be had or do not fit.
        """
        if isinstance(self.source, nn.Module):
            return self.source
        name, args = str(self.source), self.args or {}
        if Path(name).is_dir():
            try:
                return load(name)
            except ArtifactError as error:
                raise DistillationError(f"teacher={name!r} is a folder, but no saved model: {error}") from error
        if self.checkpoint is None:
            return _created(name, pretrained=True, args=args)
        classes = {} if num_classes is None else {"num_classes": num_classes}
        network = _created(name, pretrained=False, args={**classes, **args})
        load_weights(network, self.checkpoint, "Teacher.checkpoint", DistillationError, new_head=not answers)
        return network


class FrozenTeacher:
    """A network that only answers. Not an ``nn.Module``, so that its owner neither saves, trains nor synchronises it.

    Copies share the network (EMA callbacks deepcopy the module that holds it). Its parameters are left as they are:
    it is asked under ``no_grad``, and stays its owner's. Asked to run in another precision, it works with a copy.
    """

    def __init__(
        self, teacher: Teacher, student: nn.Module, num_classes: int | None = None, answers: bool = True
    ) -> None:
        """`student`: whose images it gets; `num_classes`, `answers`: see `Teacher.network`."""
        network = teacher.network(num_classes, answers)
        if network is student:
            raise DistillationError(
                f"teacher={type(network).__name__} is the student itself, which would learn from its own changing"
                " answers; pass copy.deepcopy(student)"
            )
        self.normalization = renormalization(student, network, teacher.normalization)
        self.precision = teacher.precision
        dtype = None if self.precision is None else PRECISIONS[self.precision]
        if dtype is not None and any(p.is_floating_point() and p.dtype != dtype for p in network.parameters()):
            network = copy.deepcopy(network).to(dtype)
        self.network = network.eval()
        options = cast(Literal[False] | Mapping[str, Any], teacher.compile)
        self._answer: Any = network if options is False else torch.compile(network, **options)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (n, classes). Follows the images to their device; keeps its own dtype.

        Raises:
            DistillationError: it takes images of another size.
        """
        self.network.eval()
        if self.normalization is not None:
            images = self.normalization(images)
        parameter = next(self.network.parameters(), None)
        if parameter is not None:
            if parameter.device != images.device:
                self.network.to(images.device)
            images = images.to(parameter.dtype)
        own = nullcontext() if self.precision is None else torch.autocast(images.device.type, enabled=False)
        try:
            with own:
                return cast(Tensor, prediction_in(self._answer(images)))
        except AssertionError as error:  # timm's way of saying that the size is fixed
            raise DistillationError(
                f"teacher={type(self.network).__name__} does not take images of {tuple(images.shape[1:])}: {error};"
                " give a teacher of this size, one by name with Teacher(args={'dynamic_img_size': True}) or"
                f" args={{'img_size': {images.shape[-1]}}}, or images of its size"
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        return self


# --- where it comes from ----------------------------------------------------------------------------------------------


def _created(name: str, pretrained: bool, args: Mapping[str, Any]) -> nn.Module:
    try:
        return cast(nn.Module, timm.create_model(name, pretrained=pretrained, **args))
    except OSError as error:
        raise DistillationError(
            f"teacher={name!r}: its pretrained weights can't be fetched ({_first_line(error)}); go online once so that"
            " they are kept, or give a file of weights as Teacher(checkpoint=...)"
        ) from error
    except Exception as error:  # the hub's clients have errors of their own, as has each model's constructor
        known = timm.list_pretrained(f"{name.split('.')[0]}.*")
        hint = f"weights of this architecture: {', '.join(known)}" if pretrained and known else "correct args"
        raise DistillationError(
            f"teacher={name!r} with Teacher.args={dict(args)!r} is refused by timm: {_first_line(error)}; {hint}"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# --- what its images look like ----------------------------------------------------------------------------------------


class Renormalization:
    """Images as the student gets them -> as the teacher knows them: ``(x · σ_s + μ_s − μ_t) / σ_t``, per channel.

    Made of (mean, std) per channel, or one for all, that the student's and the teacher's images are normalised by.
    """

    def __init__(
        self, student: tuple[Sequence[float], Sequence[float]], teacher: tuple[Sequence[float], Sequence[float]]
    ) -> None:
        channels = {len(values) for values in (*student, *teacher)} - {1}
        if len(channels) > 1:
            raise DistillationError(
                f"Teacher.normalization of {' and '.join(map(str, sorted(channels)))} channels: mean and std of student"
                " and teacher must count the same channels; give one number per channel, or one for all"
            )
        mean_s, std_s, mean_t, std_t = (torch.tensor(values, dtype=torch.float64) for values in (*student, *teacher))
        self.scale = (std_s / std_t).float()[:, None, None]  # (channels, 1, 1)
        self.shift = ((mean_s - mean_t) / std_t).float()[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        """(n, channels, H, W) -> the same shape."""
        if len(self.scale) not in (1, images.shape[1]):
            raise DistillationError(
                f"Teacher.normalization is of {len(self.scale)} channels, the images have {images.shape[1]}; give"
                " mean and std per channel, or None where the teacher takes the student's images as they are"
            )
        self.scale, self.shift = self.scale.to(images), self.shift.to(images)
        return torch.addcmul(self.shift, images, self.scale)


def renormalization(
    student: nn.Module, teacher: nn.Module, setting: str | Mapping[str, Any] | None
) -> Renormalization | None:
    """What has to be done to the student's images for the teacher, by `Teacher.normalization`; ``None``: nothing, as
    with ``"auto"`` where the ``pretrained_cfg`` of one of them does not say what its images are normalised by."""
    if setting is None:
        return None
    of_student = _statistics(student)
    if isinstance(setting, Mapping):
        if of_student is None:
            raise DistillationError(
                f"Teacher.normalization={setting!r}, but student={type(student).__name__} does not say what its own"
                " images are normalised by; set student.pretrained_cfg = {'mean': ..., 'std': ...}"
            )
        return Renormalization(of_student, (setting["mean"], setting["std"]))
    of_teacher = _statistics(teacher)
    if of_student is None or of_teacher is None or of_student == of_teacher:
        return None
    return Renormalization(of_student, of_teacher)


def _known_normalization(setting: Any) -> str | dict[str, tuple[float, ...]] | None:
    if setting is None or setting == "auto":
        return cast(str | None, setting)
    if isinstance(setting, Mapping):
        setting = plain(setting, "Teacher.normalization")
        if set(setting) == {"mean", "std"}:
            return {name: _per_channel(values, name) for name, values in setting.items()}
    raise DistillationError(
        f"Teacher.normalization={setting!r} is no normalisation; give 'auto', None, or"
        " {'mean': [...], 'std': [...]} per channel, as the teacher was trained with"
    )


def _statistics(network: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    cfg = getattr(network, "pretrained_cfg", None)
    cfg = cfg if isinstance(cfg, Mapping) else vars(cfg) if cfg is not None else {}
    if cfg.get("mean") is None or cfg.get("std") is None:
        return None
    return _per_channel(cfg["mean"], "mean"), _per_channel(cfg["std"], "std")


def _per_channel(values: Any, name: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in (values if isinstance(values, Sequence) else [values]))
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or (name == "std" and min(numbers) <= 0):
        raise DistillationError(
            f"Teacher.normalization {name}={values!r}: give a number per channel"
            + (" above 0" if name == "std" else "")
        )
    return numbers
