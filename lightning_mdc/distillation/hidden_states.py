"""What the blocks of student and teacher put out, caught by hooks while both run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lightning_mdc.distillation.losses import hidden_state_loss
from lightning_mdc.errors import DistillationError, UnsupportedModelError
from lightning_mdc.models import Sites, find_sites, hide_hooks, show_hooks


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

    def keep(self, states: dict[int, Tensor], index: int, block: nn.Module, args: object, output: Tensor) -> None:
        """A forward hook, with where to put the block's output."""
        if self.wanted:
            states[index] = output

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
    """Both networks have hooks inside, and none after. To be entered before the first compiled forward pass.

    Compared are the blocks in which the student still has heads or neurons; see `comparable`.
    """
    of_student, of_teacher = comparable(student, teacher)
    caught = HiddenStates(of_student.num_prefix_tokens)
    with ExitStack() as stack:
        stack.callback(hide_hooks, student)  # when the hooks are gone
        stack.callback(hide_hooks, teacher)
        for sites, states in ((of_student, caught.student), (of_teacher, caught.teacher)):
            for index in kept_blocks(of_student):
                hook = partial(caught.keep, states, index)
                stack.callback(sites.blocks[index].module.register_forward_hook(hook).remove)
        show_hooks(student, compiled=True)  # if not yet, then after this, or in a wrapper that is not given here
        show_hooks(teacher, compiled=False)  # whose code the same reset has thrown away
        yield caught


def kept_blocks(sites: Sites) -> list[int]:
    """Blocks that still have heads or neurons."""
    return [
        index
        for index, block in enumerate(sites.blocks)
        if any(site is None or site.num_units for site in (block.heads, block.neurons))
    ]


def comparable(student: nn.Module, teacher: nn.Module) -> tuple[Sites, Sites]:
    """The sites of student and teacher, if their hidden states can be compared block by block; else a
    `DistillationError` says why not."""
    both = []
    for name, network in (("student", student), ("teacher", teacher)):
        try:
            both.append(find_sites(network))
        except UnsupportedModelError as error:
            raise DistillationError(
                f"hidden_weight > 0 compares blocks, but {name}={type(network).__name__} has none that are known:"
                f" {error} Pass hidden_weight=0"
            ) from error
    of_student, of_teacher = both
    for what, attribute in {"blocks": "depth", "channels": "dim", "prefix tokens": "num_prefix_tokens"}.items():
        count, expected = getattr(of_student, attribute), getattr(of_teacher, attribute)
        if count != expected:
            raise DistillationError(
                f"hidden_weight > 0 compares blocks, but teacher={of_teacher.name} has {expected} {what} and student="
                f"{of_student.name} has {count}; pass hidden_weight=0, or the dense model the student was cut from"
            )
    if not kept_blocks(of_student):
        raise DistillationError(f"hidden_weight > 0 compares blocks, but student={of_student.name} has kept none")
    return of_student, of_teacher
