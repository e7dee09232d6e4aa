"""How far a student is from its teacher, as functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves


def soft_distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``T² · KL(teacher ‖ student)`` of the softened predictions, batch mean. Hinton et al. 2015, section 2.

    DeiT's own soft loss divides by the number of classes as well, which at 1000 classes makes it 1000 times weaker.

    Args:
        student_logits, teacher_logits: (n, classes).
        temperature: T; the factor T² keeps the gradient's size the same for every T.

    Returns:
        Scalar, at least 0, in float32 at least.
    """
    student = F.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    teacher = F.log_softmax(at_least_float32(teacher_logits) / temperature, dim=-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2


def hard_distillation_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross entropy to the teacher's most likely class, averaged over the batch, of logits (n, classes).

    Touvron et al. 2021, equation 3.
    """
    return F.cross_entropy(at_least_float32(student_logits), teacher_logits.argmax(dim=-1))


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], kind: str) -> Tensor:
    """Distance between outputs of equal shapes that are no classes, a mean over the tensors.

    ``squared`` is the mean squared difference. ``cosine`` is 1 − the cosine of the angle between the channels, a mean
    over everything else; it leaves out how large they are. Channels are the last dimension, (n, dim) or
    (n, tokens, dim), and of maps (n, channels, height, width) the second.

    Returns:
        Scalar, at least 0, in float32 at least.
    """
    losses = []
    for s, t in zip(map(at_least_float32, student), map(at_least_float32, teacher), strict=True):
        cosine = F.cosine_similarity(s, t, dim=1 if s.ndim == 4 else -1) if kind == "cosine" else None
        losses.append(F.mse_loss(s, t) if cosine is None else 1 - cosine.mean())
    return torch.stack(losses).mean()


def features_in(output: Any) -> list[Tensor]:
    """The float tensors in a network's output, which may be any nest of them; none if there are none."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point() and leaf.ndim > 1]


def hidden_state_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], num_prefix_tokens: int) -> Tensor:
    """Mean squared difference of normalised hidden states, averaged over blocks.

    Compared are the prefix tokens (class, distillation, register), each normalised to mean 0 and variance 1 over its
    channels; they never leave a slim model. With no prefix tokens it is the mean over all tokens, normalised. Hidden
    states as what to distil: TinyBERT (Jiao et al., arXiv 1909.10351), equation 8; normalised, because the residual
    stream of a slim block is smaller.

    Args:
        student: per block (n, tokens, dim), or (n, height, width, dim); blocks may have different numbers of tokens.
        teacher: per block (n, its tokens, dim).
        num_prefix_tokens: how many tokens at the front are prefix tokens, in both.

    Returns:
        Scalar in [0, 4], in float32 at least.
    """
    pairs = zip(student, teacher, strict=True)
    losses = [F.mse_loss(_normalised(s, num_prefix_tokens), _normalised(t, num_prefix_tokens)) for s, t in pairs]
    return torch.stack(losses).mean()


def _normalised(hidden: Tensor, num_prefix_tokens: int) -> Tensor:
    hidden = at_least_float32(hidden)
    compared = hidden[:, :num_prefix_tokens] if num_prefix_tokens else hidden.flatten(1, -2).mean(dim=1)
    return F.layer_norm(compared, compared.shape[-1:])


def at_least_float32(tensor: Tensor) -> Tensor:
    """bf16 has 8 bits of mantissa: too few for a sum over 1000 classes."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
