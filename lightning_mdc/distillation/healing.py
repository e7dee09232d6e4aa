"""Healing: block after block of a slim model learns what the dense model's block puts out, without labels.

``compensate="sequential"`` refits the layers that read units, in closed form. Healing goes on from there, and trains
all that a block has: from the first block to the last, a block is given what it is given *in the slim model*, whose
earlier blocks are healed already, and is to put out what the dense model has there,

    ``min ‖ f(x) − x' ‖²``,   f the slim block, x the slim model's stream before it, x' the dense one's behind it.

Blocks are reconstructed one at a time as in BRECQ (Li et al., arXiv 2102.05426), for quantised networks. Every token of
every image is a target of as many numbers as there are channels, which a few images are enough for; and other than a
prediction, it does not get uninformative where the dense model has learnt its images by heart. All blocks at once,
which would spare the order, learn from inputs that change under them.

Both models go through all images side by side, once; in between, the blocks are trained by Muon.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_mdc.distillation.hidden_states import different
from lightning_mdc.distillation.losses import at_least_float32
from lightning_mdc.distillation.optimization import create_optimizer, create_schedule
from lightning_mdc.errors import DistillationError, check_number, check_whole
from lightning_mdc.importance.scoring import on_device_of, run_on, split_batch
from lightning_mdc.models import (
    Anatomy,
    Block,
    called_instead,
    evaluating,
    find_anatomy,
    probing,
    runnable,
    standing_in,
)
from lightning_mdc.models.swapping import check_unmasked, plain_copy
from lightning_mdc.progress import bar
from lightning_mdc.randomness import isolated_rng
from lightning_mdc.surgery.lockstep import halt, together, walked, walking
from lightning_mdc.surgery.sequential import of_tokens
from lightning_mdc.tokens.selection import Carried, TokenSelection

log = logging.getLogger(__name__)

_IMAGES_PER_STEP = 32
_SCHEDULE = {"sched": "cosine", "warmup_epochs": None, "warmup_lr": 0.0, "min_lr": 0.0}


@dataclass(frozen=True)
class _Shown:
    """What a block is given in the slim model in one batch, and what it is to put out.

    Attributes:
        args, kwargs: of the block's call.
        carried: what travels beside the tokens before it; None: every position still is a token of its own.
        wanted: the dense block's output, (images, tokens, channels) or (images, height, width, channels).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    carried: Carried | None
    wanted: Tensor


@torch.inference_mode(False)
def heal(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    epochs: int = 3,
    lr: float = 1e-3,
    *,
    submodule: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Bring the hidden states of a slim model closer to the dense one's, block by block, in place.

    No labels are needed, and the output layer stays as it is. All that a block has is trained, frozen or not; a block
    that would end further away than it began keeps its weights. Inside ``torch.autocast`` blocks are trained in its
    precision, and hidden states are computed in the models' own.

    Args:
        model: what `slim` or `compress` made of `dense`: the vision transformer itself.
        dense: the model that it was made of, or a module that holds it; unchanged.
        batches: what a DataLoader of training images yields, ``(images, labels)`` or ``images``; read once, and kept,
            with two hidden states per image. 1 000 images are enough to gain; 4 000 gain more.
        epochs: how often each block sees all images.
        lr: the highest rate of Muon, which rises for an epoch, at most a fifth of the way, and falls to 0.
        submodule: of the vision transformer in `dense`, as an attribute path; None finds it if there is just one.
        seed: of the order of the batches.
        progress: show a bar (on a terminal).

    Returns:
        Per block, what is left of the squared difference of its output, given the same input: in [0, 1]. Blocks before
        the first that lost something are not trained, and have 1.

    Raises:
        DistillationError: `epochs`, `lr` or `seed` is none, the two models do not go through the same blocks, tokens
            leave the dense one already, there are no images, or what blocks put out is not finite.
        CalibrationError: images that the models cannot be run on.
        UnsupportedModelError: there is no supported vision transformer in a model, or there are several.
    """
    check_whole("epochs", epochs, 1, DistillationError)
    check_number("lr", lr, "a learning rate such as 1e-3", DistillationError, least=0)
    check_whole("seed", seed, 0, DistillationError)
    of_dense, small = find_anatomy(dense, submodule), find_anatomy(model)
    _check_alike(of_dense, small)
    given = together(split_batch(batch)[0] for batch in batches)
    images = [on_device_of(of_dense, part) for batch in given for part in batch.split(_IMAGES_PER_STEP)]
    if not images:
        raise DistillationError("batches hold no images to heal on; give training images, no labels are needed")
    holder = runnable(dense, submodule)
    whole = called_instead(holder, of_dense.model, small.model)
    runs = [[partial(run_on, each, batch) for batch in images] for each in (holder, whole)]
    first = _first_lost(of_dense, small)
    left = [1.0] * first
    with (
        evaluating(holder, small.model),
        isolated_rng(),
        probing(_probes(of_dense, small, first)),
        walking(runs[0]) as dense_walks,
        walking(runs[1]) as small_walks,
        bar("Healing", (len(small.blocks) - first) * epochs, shown=progress) as advance,
    ):
        draw = torch.Generator().manual_seed(seed)
        for walk in small_walks:
            walk.notes["is_small"] = True
        for block in small.blocks[first:]:
            wanted = [walk.to_next() for walk in dense_walks]
            with standing_in(holder, of_dense.model, small.model):
                reached = [walk.to_next() for walk in small_walks]
            if any(seen is None for seen in (*wanted, *reached)):
                raise DistillationError(
                    f"{block.name} is not called when dense={type(dense).__name__} is run on images, so nothing tells "
                    "what it is to put out; give the vision transformer itself"
                )
            shown = [call(x) for call, x in zip(reached, wanted, strict=True)]
            left.append(_train(block, shown, small.num_prefix_tokens, epochs, lr, draw, advance))
    if first < len(left) and min(left) == 1:
        log.warning(
            "healing brought no block closer: lr=%g is too high for what is left to gain, try a tenth of it", lr
        )
    shares = ", ".join(f"{share:.0%}" for share in left[first:])
    of = f"{len(left) - first} blocks on {sum(map(len, images))} images"
    log.info("healed %s: of what their outputs were off by (squared), %s is left", of, shares)
    return left


def _check_alike(dense: Anatomy, small: Anatomy) -> None:
    if dense.stages:
        raise DistillationError(
            f"dense={dense.name}: tokens leave it already (block {dense.stages[0].block}), and not always those that "
            "leave the slim model; give the model that has them all"
        )
    for what, count, expected in different(small, dense):
        raise DistillationError(
            f"model={small.name} has {count} {what} where dense={dense.name} has {expected}; give the dense model that "
            "the slim one was made of"
        )
    for before, after in zip(dense.blocks, small.blocks, strict=True):
        for name, units in before.units.items():
            if after.units[name].count > units.count:
                raise DistillationError(
                    f"model={small.name} has {after.units[name].count} {name} in {after.name} where dense={dense.name} "
                    f"has {units.count}; give the slim model first, then the dense one that it was made of"
                )
    for anatomy in (dense, small):
        consequence = "its blocks would not be what they are without"
        check_unmasked(anatomy.model, DistillationError, consequence, "leave the masked block first")


def _first_lost(dense: Anatomy, small: Anatomy) -> int:
    """Index of the first block from which something is gone; the number of blocks if nothing is."""
    for index, (before, after) in enumerate(zip(dense.blocks, small.blocks, strict=True)):
        fewer = any(after.units[name].count < units.count for name, units in before.units.items())
        if fewer or after.stage is not None:
            return index
    return len(dense.blocks)


# --- what is seen on the way ------------------------------------------------------------------------------------------


def _probes(dense: Anatomy, small: Anatomy, first: int) -> Iterable[tuple[Callable[[Any], Any], Callable[..., Any]]]:
    """The slim model halts before each block, the dense one behind it."""
    for before, after in zip(dense.blocks[first:], small.blocks[first:], strict=True):
        yield before.module.register_forward_hook, _behind_dense
        yield partial(after.module.register_forward_pre_hook, with_kwargs=True), _before_small
    for module in small.model.modules():
        if isinstance(module, TokenSelection):
            yield module.register_forward_hook, _behind_selection


def _behind_dense(module: nn.Module, args: Any, output: Any) -> None:
    if "is_small" not in walked().notes:  # a module may hold both
        halt(_trainable(_stream(output)))


def _before_small(module: nn.Module, args: Any, kwargs: Any) -> None:
    notes = walked().notes
    if "is_small" in notes:
        # What counts the way through the model is not to count what is called beside it.
        kwargs = {name: value.alone() if hasattr(value, "alone") else value for name, value in kwargs.items()}
        args, kwargs = tree_map(_trainable, (args, kwargs))
        halt(partial(_Shown, args, kwargs, notes.get("carried")))


def _behind_selection(module: nn.Module, args: Any, output: tuple[Tensor, Carried | None]) -> None:
    walked().notes["carried"] = output[1]


def _trainable(value: Any) -> Any:
    """A tensor of an inference_mode inside the model as one that gradients may need."""
    if not (isinstance(value, Tensor) and value.is_inference()):
        return value
    with torch.inference_mode(False):
        return value.clone()


def _stream(output: Any) -> Tensor:
    """The tokens that a block puts out, also one that tells its attention, too."""
    tokens: Tensor = output if isinstance(output, Tensor) else output[0]
    return tokens


# --- a block ----------------------------------------------------------------------------------------------------------


def _train(
    block: Block,
    shown: Sequence[_Shown],
    prefix: int,
    epochs: int,
    lr: float,
    draw: torch.Generator,
    advance: Callable[..., None],
) -> float:
    """Train a block in place, while the walks wait; what is left of its squared error."""
    trained = plain_copy(block.module).requires_grad_(True)
    trained._forward_pre_hooks.clear()  # what they change is changed in what is shown
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in trained.parameters()):
        trained.float()  # else small steps would be rounded away
        shown = [replace(each, args=_widened(each.args), kwargs=_widened(each.kwargs)) for each in shown]
    error = partial(_error, trained, _said_by_stages(trained), prefix)
    at_first = _over(shown, error)
    if not math.isfinite(at_first):
        raise DistillationError(
            f"what {block.name} is given, or is to put out, is not finite on these images; check the models' weights, "
            "and the images"
        )
    if not at_first:
        return 1.0
    optimizer = create_optimizer(trained, {"opt": "muon", "lr": lr, "weight_decay": 0.0}, None)
    schedule = create_schedule(optimizer, _SCHEDULE, epochs * len(shown), len(shown))
    step = 0
    for _ in range(epochs):
        for index in torch.randperm(len(shown), generator=draw).tolist():
            schedule.step_update(num_updates=step)
            with torch.enable_grad():
                (error(shown[index]) / at_first).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        advance()
    with torch.no_grad():  # what is judged is what is kept
        for parameter, found in zip(block.module.parameters(), trained.parameters(), strict=True):
            found.copy_(found.to(parameter.dtype))
    left = _over(shown, error) / at_first
    if not left < 1:  # nor a number, after a rate that was too high
        return 1.0
    with torch.no_grad():
        for parameter, found in zip(block.module.parameters(), trained.parameters(), strict=True):
            parameter.copy_(found)
    return left


def _said_by_stages(trained: nn.Module) -> list[Carried | None]:
    """What the block's own token stage, if it has one, says of every call, is added here."""
    said: list[Carried | None] = []
    for module in trained.modules():
        if isinstance(module, TokenSelection):
            module._forward_hooks.clear()  # those of walks
            module.register_forward_hook(lambda _, args, output: said.append(output[1]))
    return said


def _error(trained: nn.Module, said: list[Carried | None], prefix: int, shown: _Shown) -> Tensor:
    """Mean squared difference of what the block puts out and is to, token by token; of what its tokens stand for."""
    with _uncached_autocast(shown.wanted.device.type):
        output = _stream(trained(*shown.args, **shown.kwargs))
    carried = said.pop() if said else shown.carried
    return F.mse_loss(at_least_float32(output), of_tokens(at_least_float32(shown.wanted), carried, prefix))


def _uncached_autocast(device: str) -> AbstractContextManager[Any]:
    """The autocast that is in force, without what it keeps until it is left: weights as they were when first cast."""
    is_on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype, is_on, cache_enabled=False)


def _over(shown: Sequence[_Shown], error: Callable[[_Shown], Tensor]) -> float:
    """Mean over all images."""
    counts = [len(each.wanted) for each in shown]
    with torch.no_grad():
        errors = torch.stack([error(each) for each in shown])
    return float((errors * errors.new_tensor(counts)).sum() / sum(counts))


def _widened(call: Any) -> Any:
    """The arguments of a call, with what is of half precision in fp32."""
    return tree_map(lambda value: at_least_float32(value) if isinstance(value, Tensor) else value, call)
