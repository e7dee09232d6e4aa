"""A search for the tests of `mdc.search`: in a process of its own that is killed, or in two, one of which may fail."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lightning_mdc as mdc
from lightning_mdc.policy_search import driver
from lightning_mdc.policy_search.held_out import HeldOut
from tests.distributed_program import join, only, outcome
from tests.kinds import CLASSES, images, make

TRIALS = 16


def pictures(count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    return images(count, seed=5), torch.arange(count) % CLASSES


def run(state: Path | None, pause: float = 0.0, trials: int = TRIALS) -> mdc.SearchResult:
    model = make()
    held_out = HeldOut([pictures()], "loss", batch_size=16)

    def evaluate(slim: nn.Module) -> float:
        time.sleep(pause)
        return held_out(slim)

    scores = mdc.score(model, [images(16)], "magnitude")
    options = mdc.SearchOptions(journal=state, initial_points=4, progress=False)
    return mdc.search(model, scores, evaluate, 0.6, trials, 3, options=options)


def history(result: mdc.SearchResult) -> list[object]:
    return [[trial.number, json.loads(trial.policy.to_json()), trial.value, trial.status] for trial in result.history]


def failing(where: str, number: int, kind: str) -> list[Any]:
    """A search that fails on rank 1: while it makes the slim model of that trial, before it judges it, or within."""
    model, calls = make(), itertools.count()
    held_out = HeldOut([pictures()], "loss", batch_size=60)
    scores = mdc.score(model, [images(16)], "magnitude")

    def fail_once() -> None:
        if next(calls) == number:
            only(1, kind)

    def evaluate(small: nn.Module) -> float:
        if where == "evaluate":
            fail_once()
        if where == "forward":
            # Asked once per model and rank: all images of a rank are one batch.
            small.register_forward_pre_hook(lambda *_: fail_once())
        return held_out(small)

    def slim_or_fail(*arguments: Any, **options: Any) -> nn.Module:
        fail_once()
        return mdc.slim(*arguments, **options)

    driver.slim = slim_or_fail if where == "slim" else mdc.slim
    search = partial(mdc.search, model, scores, evaluate, 0.6, 4, 3, options=mdc.SearchOptions(progress=False))
    return outcome(lambda: [[trial.status, trial.note] for trial in search().history])


def of_two(number: int, folder: Path, failures: Sequence[tuple[str, int, str]] = ()) -> None:
    """As one of two ranks: writes the history of a search, or what came of each search that was made to fail."""
    join(number, folder)
    found = [failing(*each) for each in failures] if failures else history(run(folder / "shared.jsonl", trials=8))
    (folder / f"rank{number}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]) / "trials.jsonl", pause=0.05)
