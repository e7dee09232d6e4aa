"""What a model's output says: the one place that reads it, for criteria, for judging and for closeness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_mdc.errors import CalibrationError, MdcError
from lightning_mdc.models import Prediction, prediction_in

# Rows of probabilities sum to 1 up to this, in half precision too.
_ROUNDING = 1e-2


def plain(tensor: Tensor) -> Tensor:
    """Without a subclass, such as that of images that carry metadata, which would go on into all that is computed."""
    return tensor if type(tensor) in (Tensor, nn.Parameter) else tensor.as_subclass(Tensor)


def read(output: Any, prediction: Prediction | None = None) -> Any:
    """What `prediction` makes of an output, taken as it is; None: the prediction that is in it."""
    found = prediction_in(output) if prediction is None else prediction(output)
    return plain(found) if isinstance(found, Tensor) else found


def float_leaves(output: Any) -> list[Tensor]:
    """The float tensors in any nest of them, but for single numbers."""
    leaves: list[Any] = tree_leaves(output)
    found = (leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim)
    return [plain(tensor) for tensor in found]


def as_prediction(
    output: Any, prediction: Prediction | None = None, of_logits: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """What units are to matter for, of a model's output: (images, numbers), in fp32 or wider.

    Args:
        prediction: see `read`.
        of_logits: is applied without a `prediction`, to an output that is known to be logits.

    Raises:
        CalibrationError: there is no such tensor in it.
    """
    found = read(output, prediction)
    if isinstance(found, Tensor) and found.ndim == 1:  # one number of each
        found = found[:, None]
    elif isinstance(found, Tensor) and found.ndim > 2 and prediction is None:  # a map, say
        found = found.flatten(1)
    if not isinstance(found, Tensor) or found.ndim != 2 or not found.is_floating_point():
        raise CalibrationError(
            f"the model's output ({_form(found)}) is no float tensor (images, ...); pass prediction=, a function that "
            "makes one of it, e.g. prediction=lambda out: out.logits.softmax(-1)"
        )
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    return of_logits(found) if prediction is None and of_logits is not None else found


def log_probabilities(output: Any, prediction: Prediction | None = None, *, error: type[MdcError], who: str) -> Tensor:
    """Of classes, (images, classes) in fp32: the logarithm of what `prediction` makes of the output, where one number
    of an image says how probable the second of two classes is; or of the output, where a softmax is built in; else the
    output's log softmax.

    Args:
        error, who: what is raised where there are none, and who needs them.
    """
    found = read(output, prediction)
    is_float = isinstance(found, Tensor) and found.is_floating_point()
    if prediction is not None and is_float and found.shape[1:] in ((), (1,)):
        found = torch.cat([1 - found.reshape(-1, 1), found.reshape(-1, 1)], dim=1)
    if not is_float or found.ndim != 2 or found.shape[1] < 2:
        raise error(
            f"{who} needs a float tensor (images, classes), but the {'output' if prediction is None else 'prediction'} "
            f"is {_form(found)}; pass prediction=, a function that makes probabilities of the model's output (of one "
            "logit for yes: prediction=lambda out: out.sigmoid()), or a torchmetrics Metric, such as BinaryAccuracy"
        )
    found = found.float()
    if prediction is None and not are_probabilities(found):
        return F.log_softmax(found, dim=-1)
    if prediction is not None and not bool(((found >= -_ROUNDING) & (found <= 1 + _ROUNDING) | found.isnan()).all()):
        raise error(
            f"{who} needs probabilities, but prediction= makes numbers from {found.min().item():.3g} to "
            f"{found.max().item():.3g} of the model's output; let it end in softmax(-1), or in sigmoid()"
        )
    return found.clamp_min(1e-12).log()


def are_probabilities(found: Tensor) -> bool:
    """Whether each row of (images, 2 classes or more) is a distribution: of a model that ends in a softmax, say."""
    if found.ndim != 2 or found.shape[1] < 2 or not len(found):
        return False
    sums = found.float().sum(dim=1)
    return bool((found >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=_ROUNDING)


def inverse_link(labels: Any = None) -> Callable[[Tensor], Tensor]:
    """What makes of a classifier's logits what they say of images with such labels (the term is of linear models).

    `softmax` where an image is of one class, or nobody says otherwise; ``torch.sigmoid`` where labels are yes or no
    for each class, of several or none; `as_they_are` where they are other numbers, one for each output.
    """
    if not isinstance(labels, Tensor) or labels.ndim != 2 or are_probabilities(labels) or labels.shape[1] < 2:
        return softmax
    return torch.sigmoid if bool(((labels == 0) | (labels == 1)).all()) else as_they_are


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1)


def as_they_are(outputs: Tensor) -> Tensor:
    return outputs


def labels_in(batch: Any) -> Tensor | None:
    """The labels of a batch that is (images, labels, ...), if they are a tensor with a row for each image, or should
    be."""
    labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    return plain(labels) if isinstance(labels, Tensor) and labels.ndim else None


def class_numbers(labels: Tensor, images: int, *, error: type[MdcError], who: str, otherwise: str) -> Tensor:
    """`labels` as (images,) int64, if they are class numbers of the images.

    Args:
        error, who, otherwise: what is raised if not, who needs them, and what could be done instead.
    """
    is_whole = not labels.is_floating_point() or bool((labels == labels.round()).all())
    if labels.shape != (images,) or not is_whole:
        raise error(
            f"labels {tuple(labels.shape)} of {labels.dtype}: {who} needs one class number for each of the {images} "
            f"images (no one-hot, no mixup); {otherwise}"
        )
    return labels.long()


def check_classes(lowest: int, highest: int, classes: int, *, error: type[MdcError], who: str, otherwise: str) -> None:
    """Refuse labels that a model of so many classes has none for, such as -1 and 255."""
    if lowest < 0 or highest >= classes:
        raise error(
            f"labels {lowest} to {highest}, but the model has {classes} classes, and {who} needs one of them for each "
            f"image; leave out images without one, or {otherwise}"
        )


def _form(found: Any) -> str:
    return str(tuple(found.shape)) if isinstance(found, Tensor) else type(found).__name__
