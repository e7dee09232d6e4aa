"""The teacher: a network that only answers, found by name, in a folder, or given."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from timm.models import load_checkpoint
from torch import Tensor, nn

from lightning_mdc.artifact import load
from lightning_mdc.errors import ArtifactError, DistillationError

Precision = Literal["32", "bf16", "fp16"]
PRECISIONS: Mapping[Precision, torch.dtype] = {"32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class FrozenTeacher:
    """A network that only answers. Not an ``nn.Module``, so that its owner neither saves, trains nor synchronises it.

    Copies share the network (EMA callbacks deepcopy the module that holds it). Its parameters are left as they are:
    it is asked under ``no_grad``, and stays its owner's. Asked to run in another precision, it works with a copy.
    """

    def __init__(
        self,
        network: nn.Module,
        precision: Precision | None = None,
        compile: Literal[False] | Mapping[str, Any] = False,
        normalization: Renormalization | None = None,
    ) -> None:
        """`network`: images (n, in_chans, H, W) -> logits (n, classes); the others as of `DistillationModule`."""
        dtype = None if precision is None else PRECISIONS[precision]
        if dtype is not None and any(p.is_floating_point() and p.dtype != dtype for p in network.parameters()):
            network = copy.deepcopy(network).to(dtype)
        self.network = network.eval()
        self.precision = precision
        self.normalization = normalization
        self._answer: Any = network if compile is False else torch.compile(network, **compile)

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
                return cast(Tensor, self._answer(images))
        except AssertionError as error:  # timm's way of saying that the size is fixed
            raise DistillationError(
                f"teacher={type(self.network).__name__} does not take images of {tuple(images.shape[1:])}: {error};"
                " give a teacher of this size, one by name with teacher_args={'dynamic_img_size': True} or {'img_size':"
                f" {images.shape[-1]}}}, or images of its size"
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        return self


# --- where it comes from ----------------------------------------------------------------------------------------------


def build_teacher(
    name: str | Path, checkpoint: str | Path | None, args: dict[str, Any], num_classes: int | None
) -> nn.Module:
    """The network of the folder that ``mdc.save`` wrote, or of the timm model, that `name` says.

    With `checkpoint` a timm model has the weights in that file, of which nothing is unpickled but tensors, and
    `num_classes` if `args`, of ``timm.create_model``, do not say.

    Raises:
        DistillationError: nothing is known by that name, or its weights cannot be had or do not fit.
    """
    check_teacher(name, checkpoint, args)
    if Path(name).is_dir():
        try:
            return load(name)
        except ArtifactError as error:
            raise DistillationError(f"teacher={str(name)!r} is a folder, but no saved model: {error}") from error
    name = str(name)
    if checkpoint is None:
        return _created(name, pretrained=True, args=args)
    classes = {} if num_classes is None else {"num_classes": num_classes}
    network = _created(name, pretrained=False, args=classes | args)
    try:
        load_checkpoint(network, str(checkpoint), weights_only=True)
    except Exception as error:  # a damaged file fails in as many ways as there are formats
        raise DistillationError(
            f"teacher_checkpoint={str(checkpoint)!r} does not fit teacher={name!r}: {_first_mismatch(error)}; give"
            " the architecture it was trained as (with teacher_args, arguments of timm.create_model), or other weights"
        ) from error
    return network


def check_teacher(name: str | Path, checkpoint: str | Path | None, args: Mapping[str, Any] | None) -> None:
    """Refuse arguments that `build_teacher` would refuse, as far as it shows without building; needs no network."""
    if Path(name).is_dir():
        if checkpoint is not None or args:
            given = f"teacher_checkpoint={str(checkpoint)!r}" if checkpoint is not None else f"teacher_args={args!r}"
            raise DistillationError(
                f"{given} has no effect on teacher={str(name)!r}, a folder with weights; leave it out, or give a timm"
                " model name as teacher"
            )
        return
    name = str(name)
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_pretrained() lists those with weights"
        raise DistillationError(f"teacher={name!r} is neither a folder nor a model of timm; {hint}")
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise DistillationError(f"teacher_checkpoint={str(checkpoint)!r} is no file; give a file of weights")


def _created(name: str, pretrained: bool, args: Mapping[str, Any]) -> nn.Module:
    try:
        return cast(nn.Module, timm.create_model(name, pretrained=pretrained, **args))
    except OSError as error:
        raise DistillationError(
            f"teacher={name!r}: its pretrained weights can't be fetched ({_first_line(error)}); go online once so that"
            " they are kept, or give a file of weights as teacher_checkpoint"
        ) from error
    except Exception as error:  # the hub's clients have errors of their own, as has each model's constructor
        known = timm.list_pretrained(f"{name.split('.')[0]}.*")
        hint = f"weights of this architecture: {', '.join(known)}" if pretrained and known else "correct teacher_args"
        raise DistillationError(
            f"teacher={name!r} with teacher_args={dict(args)!r} is refused by timm: {_first_line(error)}; {hint}"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _first_mismatch(error: Exception) -> str:
    """Of ``load_state_dict``'s message, which lists every key under a headline, the first thing that is wrong."""
    headline, *details = str(error).strip().splitlines() or [type(error).__name__]
    return details[0].strip()[:300].rstrip(". ") if details else headline[:300].rstrip(". ")


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
                f"teacher_normalization of {' and '.join(map(str, sorted(channels)))} channels: mean and std of student"
                " and teacher must count the same channels; give one number per channel, or one for all"
            )
        mean_s, std_s, mean_t, std_t = (torch.tensor(values, dtype=torch.float64) for values in (*student, *teacher))
        self.scale = (std_s / std_t).float()[:, None, None]  # (channels, 1, 1)
        self.shift = ((mean_s - mean_t) / std_t).float()[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        """(n, channels, H, W) -> the same shape."""
        if len(self.scale) not in (1, images.shape[1]):
            raise DistillationError(
                f"teacher_normalization is of {len(self.scale)} channels, the images have {images.shape[1]}; give"
                " mean and std per channel, or None where the teacher takes the student's images as they are"
            )
        self.scale, self.shift = self.scale.to(images), self.shift.to(images)
        return torch.addcmul(self.shift, images, self.scale)


def renormalization(
    student: nn.Module, teacher: nn.Module, setting: str | Mapping[str, Any] | None
) -> Renormalization | None:
    """What has to be done to the student's images for the teacher; ``None``: nothing.

    `setting` is `DistillationModule`'s ``teacher_normalization``. With ``"auto"`` nothing is done where the
    ``pretrained_cfg`` of one of them does not say what its images are normalised by.

    Raises:
        DistillationError: no such setting, or the student does not say what its images are.
    """
    if setting is None:
        return None
    if setting == "auto":
        of_student, of_teacher = _statistics(student), _statistics(teacher)
        if of_student is None or of_teacher is None or of_student == of_teacher:
            return None
        return Renormalization(of_student, of_teacher)
    if not isinstance(setting, Mapping) or set(setting) != {"mean", "std"}:
        raise DistillationError(
            f"teacher_normalization={setting!r} is no normalisation; give 'auto', None, or"
            " {'mean': [...], 'std': [...]} per channel, as the teacher was trained with"
        )
    of_teacher = (_per_channel(setting["mean"], "mean"), _per_channel(setting["std"], "std"))
    of_student = _statistics(student)
    if of_student is None:
        raise DistillationError(
            f"teacher_normalization={dict(setting)!r}, but student={type(student).__name__} does not say what its own"
            " images are normalised by; set student.pretrained_cfg = {'mean': ..., 'std': ...}"
        )
    return Renormalization(of_student, of_teacher)


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
            f"teacher_normalization {name}={values!r}: give a number per channel"
            + (" above 0" if name == "std" else "")
        )
    return numbers
