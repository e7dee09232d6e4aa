"""What the blocks of student and teacher put out, caught by hooks while both run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mdc.distillation.losses import hidden_state_loss
from lightning_mdc.errors import DistillationError, UnsupportedModelError
from lightning_mdc.models import Anatomy, find_anatomy
from lightning_mdc.models.swapping import seen_by_compilers
from lightning_mdc.policy import UNIT_DIMENSIONS


class HiddenStates:
    """The hidden states of the blocks that are compared, kept while somebody is `watching`.

    Attributes:
        student, teacher: by the block's index, (n, tokens, dim) each.
    """

    def __init__(self, num_prefix_tokens: int) -> None:
        self.num_prefix_tokens = num_prefix_tokens
        self.student: dict[int, Tensor] = {}
        self.teacher: dict[int, Tensor] = {}
        self.wanted = False

    def keep(self, states: dict[int, Tensor], index: int, block: nn.Module, args: object, output: Any) -> None:
        """A forward hook, with where to put the block's output: its tokens, of one that tells its attention, too."""
        if self.wanted:
            states[index] = output[0] if isinstance(output, tuple) else output

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, what forward passes put out is kept. Outside, and in a backward pass that computes blocks again,
        hooks let it go: nothing outlives the step."""
        self.wanted = True
        try:
            yield
        finally:
            self.wanted = False
            self.student.clear()
            self.teacher.clear()

    def loss(self) -> Tensor:
        """The `hidden_state_loss` of the last forward passes; a `DistillationError` if no gradient comes from it."""
        blocks = sorted(self.student)
        if torch.is_grad_enabled() and not any(hidden.requires_grad for hidden in self.student.values()):
            raise DistillationError(
                "hidden_weight > 0 trains nothing: the student's blocks are frozen; pass hidden_weight=0"
            )
        student, teacher = [self.student[i] for i in blocks], [self.teacher[i] for i in blocks]
        return hidden_state_loss(student, teacher, self.num_prefix_tokens)


@contextmanager
def hidden_states(student: nn.Module, teacher: nn.Module) -> Iterator[HiddenStates]:
    """Both networks have hooks inside, which compiled code sees, and none after.

    Compared are the blocks in which the student still has units; see `comparable`.
    """
    of_student, of_teacher = comparable(student, teacher)
    caught = HiddenStates(of_student.num_prefix_tokens)
    watched = [
        (anatomy.blocks[index].module, partial(caught.keep, states, index))
        for anatomy, states in ((of_student, caught.student), (of_teacher, caught.teacher))
        for index in kept_blocks(of_student)
    ]
    with seen_by_compilers([block for block, _ in watched]), ExitStack() as stack:
        for block, hook in watched:
            stack.callback(block.register_forward_hook(hook).remove)
        yield caught


def kept_blocks(anatomy: Anatomy) -> list[int]:
    """Blocks that still have units, or never had any that could leave."""
    return [
        index
        for index, block in enumerate(anatomy.blocks)
        if len(block.units) < len(UNIT_DIMENSIONS) or any(units.count for units in block.units.values())
    ]


def different(one: Anatomy, other: Anatomy) -> Iterator[tuple[str, int, int]]:
    """What keeps the blocks of two models from being compared: (what there is more of, its number in each)."""
    for what, attribute in {"blocks": "depth", "channels": "dim", "prefix tokens": "num_prefix_tokens"}.items():
        counts = getattr(one, attribute), getattr(other, attribute)
        if counts[0] != counts[1]:
            yield what, *counts


def comparable(student: nn.Module, teacher: nn.Module) -> tuple[Anatomy, Anatomy]:
    """The anatomy of student and teacher, if their hidden states can be compared block by block; else a
    `DistillationError` says why not."""
    both = []
    for name, network in (("student", student), ("teacher", teacher)):
        try:
            both.append(find_anatomy(network))
        except UnsupportedModelError as error:
            reason = str(error).partition("; say which")[0]  # which is no argument here
            raise DistillationError(
                "hidden_weight > 0 compares the blocks of one vision transformer with those of another, but"
                f" {name}={type(network).__name__} does not have just one: {reason} Pass hidden_weight=0"
            ) from error
    of_student, of_teacher = both
    for what, count, expected in different(of_student, of_teacher):
        raise DistillationError(
            f"hidden_weight > 0 compares blocks, but teacher={of_teacher.name} has {expected} {what} and student="
            f"{of_student.name} has {count}; pass hidden_weight=0, or the dense model the student was cut from"
        )
    if not kept_blocks(of_student):
        raise DistillationError(f"hidden_weight > 0 compares blocks, but student={of_student.name} has kept none")
    return of_student, of_teacher
