"""What makes two searches of a fit the same: settings, and what functions among them do."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_mdc.policy_search.folder import SearchFolder


def folder_of(value: Any) -> Path:
    return SearchFolder(Path("root"), {"evaluate": value}).path


def within(limit: float) -> Callable[[nn.Module], float]:
    return lambda model: limit


class Judge:
    def __init__(self, share: float) -> None:
        self.share = share

    def of(self, model: nn.Module) -> float:
        return self.share


def wrapped(judge: Callable[[nn.Module], float]) -> Callable[[nn.Module], float]:
    @functools.wraps(judge)
    def outer(model: nn.Module) -> float:
        return judge(model)

    return outer


def reads(limit: float) -> FunctionType:
    """Of a module whose constant this is."""
    return FunctionType(compile("LIMIT", "module", "eval"), {"LIMIT": limit}, "reads")


def power(base: float, exponent: float = 2.0) -> float:
    return base**exponent


def cube(base: float, exponent: float = 3.0) -> float:
    return base**exponent


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda model: 1.0, lambda model: 2.0),
        (lambda model: model.eval(), lambda model: model.train()),
        (within(0.5), within(0.25)),
        (partial(power, 1), partial(power, 2)),
        (partial(power, exponent=1), partial(power, exponent=4)),
        (power, cube),
        (Judge(0.5).of, Judge(0.25).of),
        (Judge(0.5), Judge(0.25)),
        (Path("a"), Path("b")),
        (np.float32(0.5), np.float32(0.25)),
        (lambda model: model in {"a", "b"}, lambda model: model in {"a", "c"}),
        (torch.sigmoid, torch.softmax),
        (wrapped(within(0.5)), wrapped(within(0.25))),
        (partial(power, within(0.5)), partial(power, within(0.25))),  # type: ignore[arg-type]
        (Judge([0.5]).of, Judge([0.25]).of),  # type: ignore[arg-type]
        (Judge(torch.tensor(0.5)).of, Judge(torch.tensor(0.25)).of),  # type: ignore[arg-type]
        (reads(0.5), reads(0.25)),
    ],
)
def test_what_does_something_else_is_another_search(one: Any, other: Any) -> None:
    assert folder_of(one) != folder_of(other)


def test_equal_ones_are_the_same_search() -> None:
    assert folder_of(within(0.5)) == folder_of(within(0.5))
    assert folder_of(partial(power, 2)) == folder_of(partial(power, 2))
    assert folder_of(Judge(0.5).of) == folder_of(Judge(0.5).of)
    module = nn.Linear(2, 2)
    before = folder_of(module.forward)
    module.seen = 3  # type: ignore[assignment]  # what it counts is no setting
    assert folder_of(module.forward) == before
    assert folder_of(wrapped(within(0.5))) == folder_of(wrapped(within(0.5)))
    assert folder_of(torch.sigmoid) == folder_of(torch.sigmoid)


def test_what_a_function_counts_is_no_setting() -> None:
    seen: list[int] = []
    before = folder_of(lambda model: seen.append(1))
    folders = []
    for _ in range(2):
        folders.append(folder_of(count := lambda model: seen.append(2)))
        count(None)
    assert folders[0] == folders[1] != before


def test_what_refers_to_itself_ends() -> None:
    def again(count: int) -> int:
        return again(count - 1) if count else 0

    endless: list[object] = [again]
    endless.append(endless)
    assert folder_of(again)
    assert folder_of(lambda model: (endless, later))
    assert folder_of({1: endless, "1": again})
    judge = Judge(0.5)
    judge.own = judge  # type: ignore[attr-defined]
    assert folder_of(judge)
    later = 1


PROGRAM = """
from pathlib import Path
from lightning_mdc.policy_search.folder import SearchFolder
def evaluate(model, names=frozenset({"a", "b", "c"})):
    return model in {"x", "y", "z"}
print(SearchFolder(Path("root"), {"evaluate": evaluate}).path)
"""


def test_another_process_finds_it() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
