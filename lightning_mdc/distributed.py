"""The processes of one distributed run, which Lightning or a cluster has started: who is first, and what all agree on.

In a run of one process every function here does the plain thing and talks to nobody. What may fail on one rank is
handed to `gather`, `on_every_rank` or `on_first_rank`: it fails on all ranks then, so that none waits for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from lightning_mdc.errors import RankError, error_chain

T = TypeVar("T")

# In an error's attributes: what failed where, once all ranks know.
_FAILURES = "_lightning_mdc_failures"


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


def leave_process_group() -> None:
    """End this process's part in the distributed run, if there is one. To be called last, when all have done their
    work: an interpreter that ends while gloo's threads still run may abort.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


# --- work that fails on all ranks if it fails on one ------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """An error in words, as it travels between processes: not every exception can be pickled, or made anew from that.

    Attributes:
        rank: where it was raised.
        kinds: names of its class and of all classes that this derives from.
        text: its message.
    """

    rank: int
    kinds: tuple[str, ...]
    text: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """An error of this rank."""
        return cls(rank(), tuple(kind.__name__ for kind in type(error).__mro__), str(error))

    def is_a(self, kind: type[Exception]) -> bool:
        """Whether the error was of this kind."""
        return kind.__name__ in self.kinds

    def __str__(self) -> str:
        return f"{self.kinds[0]}: {self.text}"


def gather(work: Callable[[], T]) -> list[T]:
    """What `work` gives on every rank, in their order. Everybody's results can be pickled.

    Raises:
        Exception: what `work` raised on this rank.
        RankError: it failed on another one.
    """
    if not is_distributed():
        return [work()]
    error: Exception | None = None
    result: T | Failure
    try:
        result = work()
    except Exception as raised:
        if _FAILURES in raised.__dict__:  # all ranks know: it comes from a `gather` inside `work`, which all were in
            raise
        error, result = raised, Failure.of(raised)
    results: list[Any] = [None] * world_size()
    dist.all_gather_object(results, result)
    if failures := tuple(other for other in results if isinstance(other, Failure)):
        error = error or RankError(failures[0].rank, failures[0].kinds[0], failures[0].text)
        error.__dict__[_FAILURES] = failures
        try:
            raise error
        finally:
            del error  # else error and frame hold each other, and with them what `work` had in memory
    return results


def on_every_rank(work: Callable[[], T]) -> T:
    """What `work` gives on this rank, where it stays. Raises as `gather` does."""
    kept: list[T] = []
    gather(lambda: kept.append(work()))
    return kept[0]


def on_first_rank(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, on all ranks. Raises as `gather` does."""
    return gather(lambda: work() if is_first() else None)[0]  # type: ignore[return-value]


def failures_of(error: Exception) -> tuple[Failure, ...]:
    """What failed on which ranks, the same on all of them, if one of the functions above has raised the error.

    Empty if they do not know of one another's, because another process is gone for example.
    """
    if not is_distributed():
        return (Failure.of(error),)
    failures: tuple[Failure, ...] = error.__dict__.get(_FAILURES, ())
    return failures


# --- sums and lost processes ------------------------------------------------------------------------------------------


def summed(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all ranks, on its own device."""
    if not is_distributed():
        return tensor
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = tensor.to(device, copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def copy_from_first_rank(tensor: Tensor) -> None:
    """Give `tensor` the values that it has on rank 0, in place."""
    if is_distributed():
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        values = tensor.detach().to(device, copy=True)
        dist.broadcast(values, src=0)
        tensor.data.copy_(values)


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error` says that another process of the run is gone."""
    for cause in error_chain(error):
        if isinstance(cause, (dist.DistBackendError, dist.DistNetworkError)):
            return True
        # gloo has no class of its own for it.
        if isinstance(cause, RuntimeError) and ("gloo/" in str(cause) or "Connection closed by peer" in str(cause)):
            return True
    return False
