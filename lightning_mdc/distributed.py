"""The processes of one distributed run, which Lightning or a cluster has started: who is first, and what all agree on.

In a run of one process every function here does the plain thing and talks to nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether several processes share the work."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if is_distributed() else 0


def is_first() -> bool:
    """Whether this is the process that decides, writes and speaks."""
    return rank() == 0


def disband() -> None:
    """End this process's part in the distributed run, if there is one. To be called last, when all have done their
    work: an interpreter that ends while gloo's threads still run may abort.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def on_first_rank(work: Callable[[], T], *, share: bool = True) -> T:
    """What `work` gives on rank 0, on all ranks; its error too, so that none waits for ever.

    With ``share=False`` all ranks work, the results stay where they are, and only rank 0's error is passed on.
    """
    if not is_distributed():
        return work()
    result: Any = None
    error: Exception | None = None
    if is_first() or not share:
        try:
            result = work()
        except Exception as raised:
            error = raised
    box = [(result if share else None, error)]
    dist.broadcast_object_list(box, src=0)
    shared, error = box[0]
    if error is not None:
        raise error
    return cast(T, shared if share else result)


def first_error(error: Exception | None) -> Exception | None:
    """The error of the first rank that has one, on all ranks: what fails on one fails on all of them."""
    if not is_distributed():
        return error
    others = everyones(error)
    return error if error is not None else next((other for other in others if other is not None), None)


def everyones(value: T) -> list[T]:
    """`value` of every rank, in their order."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def summed(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all ranks, on its own device."""
    if not is_distributed():
        return tensor
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = tensor.to(device, copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error` says that another process of the run is gone."""
    for cause in causes(error):
        if isinstance(cause, (dist.DistBackendError, dist.DistNetworkError)):
            return True
        # gloo has no class of its own for it.
        if isinstance(cause, RuntimeError) and ("gloo/" in str(cause) or "Connection closed by peer" in str(cause)):
            return True
    return False


def causes(error: BaseException | None) -> Iterable[BaseException]:
    """The error, what it was raised from or while handling, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
