"""What one of two processes does in the tests of `lightning_mdc.distributed`: what each function gives or raises there.

The process group's time-out is short: a rank that waits in vain does not wait for long.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_mdc.distributed import gather, on_every_rank, on_first_rank, rank
from lightning_mdc.errors import RankError
from lightning_mdc.policy_search.held_out import HeldOut

SECONDS = 20  # until the process group gives up


class TwoWordsError(Exception):
    """Cannot be made anew from what `pickle` keeps of it."""

    def __init__(self, word: str, other: str) -> None:
        super().__init__(f"{word} {other}")


class UnpicklableError(Exception):
    """Holds what cannot go to another process."""

    def __init__(self) -> None:
        super().__init__("locked up")
        self.lock = threading.Lock()


ERRORS: dict[str, Callable[[], Exception]] = {
    "OutOfMemoryError": lambda: torch.OutOfMemoryError("no room"),
    "TwoWordsError": lambda: TwoWordsError("gone", "wrong"),
    "UnpicklableError": UnpicklableError,
}


def join(number: int, folder: Path) -> None:
    """Become rank `number` of two."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=number,
        world_size=2,
        timeout=timedelta(seconds=SECONDS),
    )


def fail(kind: str) -> Any:
    raise ERRORS[kind]()


def only(number: int, kind: str, otherwise: Callable[[], Any] = lambda: "fine") -> Any:
    """Fail on rank `number`."""
    return fail(kind) if rank() == number else otherwise()


class Fails(nn.Module):
    """Says class 0 of three, and cannot on rank 1."""

    def __init__(self, kind: str | None) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind is not None:
            only(1, self.kind)
        return torch.tensor([[2.0, 1.0, 0.0]]).expand(len(x), 3)


def scenarios() -> dict[str, Callable[[], Any]]:
    batches = [(torch.zeros(10, 1), torch.tensor([0] * 6 + [1] * 4))]
    judges = {
        "loss": HeldOut(batches, "loss", batch_size=2),
        "metric": HeldOut(batches, MulticlassAccuracy(3, average="micro"), batch_size=2),
    }
    known: dict[str, Callable[[], Any]] = {
        "gather": lambda: gather(lambda: f"of {rank()}"),
        "on_every_rank": lambda: on_every_rank(lambda: f"of {rank()}"),
        "on_first_rank": lambda: on_first_rank(lambda: f"of {rank()}"),
        "both": lambda: on_every_rank(lambda: fail(["TwoWordsError", "UnpicklableError"][rank()])),
    }
    for kind in ERRORS:
        known |= {
            f"first {kind}": partial(on_first_rank, partial(fail, kind)),
            f"second {kind}": partial(on_every_rank, partial(only, 1, kind)),
            # The other one is in an exchange of its own by then, inside the same work.
            f"before {kind}": partial(on_every_rank, partial(only, 1, kind, partial(on_every_rank, lambda: "inner"))),
            f"inside {kind}": partial(on_every_rank, partial(on_every_rank, partial(only, 1, kind))),
        }
        known |= {f"{name} {kind}": partial(judge.judge, Fails(kind)) for name, judge in judges.items()}
        known[f"dense {kind}"] = partial(HeldOut, batches, "kl", dense=Fails(kind))
    return known | {name: lambda judge=judge: judge(Fails(None)) for name, judge in judges.items()}  # type: ignore[misc]


def outcome(call: Callable[[], Any]) -> list[Any]:
    """["fine", what it gave], or [the error's class, its message, ...]."""
    try:
        return ["fine", call()]
    except RankError as error:
        return [type(error).__name__, str(error), error.rank, error.kind, error.text]
    except Exception as error:
        return [type(error).__name__, str(error)]


def main(number: int, folder: Path) -> None:
    """Of rank `number`; writes what came of each scenario."""
    join(number, folder)
    outcomes = {name: outcome(call) for name, call in scenarios().items()}
    (folder / f"rank{number}.json").write_text(json.dumps(outcomes))
