"""How long does an image take? Measured, in the mode a deployed model runs in, on the device the model is on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_mdc.errors import BudgetError, check_whole
from lightning_mdc.models import evaluating
from lightning_mdc.progress import bar

# One reading lasts at least this long; below it the clock and the scheduler are what is measured.
_SHORTEST_READING = 0.02


def latencies(
    models: Mapping[str, nn.Module],
    batch_size: int,
    input_size: Sequence[int],
    *,
    rounds: int = 15,
    progress: bool = False,
) -> dict[str, float]:
    """Seconds per image of models in eval mode, comparable with each other.

    Every round takes one reading of each model in turn, so that a machine that becomes slower or busier in between
    does so for all of them.

    Args:
        models: by name; left in the mode, and on the device, they are.
        batch_size: images per forward pass.
        input_size: (channels, height, width) in pixels.
        rounds: readings per model; the median counts.
        progress: show a progress bar where there is a terminal.

    Raises:
        BudgetError: `batch_size` or `rounds` is no positive number, or `input_size` no (channels, height, width).
    """
    for name, value in (("batch_size", batch_size), ("rounds", rounds)):
        check_whole(name, value, 1, BudgetError)
    if len(input_size) != 3:
        raise BudgetError(f"input_size={tuple(input_size)!r}: expected (channels, height, width) in pixels")
    readings: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode(), evaluating(*models.values()), settled_memory():
        images = {name: blank_images(model, batch_size, input_size) for name, model in models.items()}
        passes = {name: _passes_per_reading(model, images[name]) for name, model in models.items()}
        # Drawn between readings only: a clock that ticks would be in them.
        with bar(f"Timing batches of {batch_size}", rounds, shown=progress, in_background=False) as advance:
            for _ in range(rounds):
                for name, model in models.items():
                    readings[name].append(_seconds(model, images[name], passes[name]) / passes[name])
                advance()
    return {name: statistics.median(seconds) / batch_size for name, seconds in readings.items()}


# glibc gives larger pieces back to the system one by one, whatever else it does.
_LARGEST_KEPT = 31 * 2**20


@contextmanager
def settled_memory() -> Iterator[None]:
    """Memory that tensors free stays with the process inside, as in a server that has run for a while.

    Else glibc returns the top of its heap to the system and fetches it again, page by page, several times per forward
    pass: 0 to 50 000 page faults and up to a fifth of DeiT-T's time at batch 16, depending on what ran before and not
    on the model. So a hole is made in the heap that what is timed finds room in, below a piece that stays. Nothing of
    it is written to, so that it takes address space only; other allocators do no worse.
    """
    torch.empty(_LARGEST_KEPT, dtype=torch.uint8)  # once freed, pieces of this size are kept
    pieces = [torch.empty(_LARGEST_KEPT, dtype=torch.uint8) for _ in range(16)]
    del pieces[:-1]
    yield


def blank_images(model: nn.Module, batch_size: int, input_size: Sequence[int]) -> Tensor:
    """(batch_size, *input_size) of zeros where the model is, in its precision: what is in them takes no time."""
    parameter = next(model.parameters())
    return torch.zeros(batch_size, *input_size, device=parameter.device, dtype=parameter.dtype)


def _passes_per_reading(model: nn.Module, images: Tensor) -> int:
    """Enough forward passes for one reading; what they cost warms up caches and kernels."""
    for number in range(4):
        once = _seconds(model, images, 1)
        if number and once > 1:  # the first may have compiled
            break
    return max(1, int(_SHORTEST_READING / max(once, 1e-9)) + 1)


def _seconds(model: nn.Module, images: Tensor, passes: int) -> float:
    _wait(images)
    start = time.perf_counter()
    for _ in range(passes):
        model(images)
    _wait(images)
    return time.perf_counter() - start


def _wait(images: Tensor) -> None:
    if images.device.type != "cpu":
        torch.get_device_module(images.device).synchronize()
