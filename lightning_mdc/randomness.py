"""Random states of torch, numpy and Python, global ones and those that objects hold: kept, put back, set."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

# What draws from a state of its own.
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# Containers above hold data; so many things are looked at in all.
_MANY, _LIMIT = 1000, 100_000


@contextmanager
def isolated_rng(generators: Iterable[Any] = ()) -> Iterator[None]:
    """What is drawn inside does not show outside, also after an exception (where Lightning's `isolate_rng` lets go):
    neither in global states nor in `generators`."""
    state = rng_state()
    states = [(generator, _state_of(generator)) for generator in generators]
    try:
        yield
    finally:
        set_rng_state(state)
        for generator, before in states:
            _set_state(generator, before)


def generators_in(*things: Any) -> list[Any]:
    """What `things`, a data set with its transforms say, draw from besides the global states."""
    found: list[Any] = []
    seen: dict[int, Any] = {}
    stack = list(things)
    while stack and len(seen) < _LIMIT:
        thing = stack.pop()
        if id(thing) in seen or isinstance(thing, (str, bytes, int, float, torch.Tensor, np.ndarray, ModuleType)):
            continue
        seen[id(thing)] = thing  # alive: an id is given again
        if isinstance(thing, _GENERATORS):
            if not isinstance(thing, random.SystemRandom):
                found.append(thing)
        elif isinstance(thing, type):
            of_class = (value for kind in thing.__mro__ for value in vars(kind).values())
            stack.extend(value for value in of_class if isinstance(value, _GENERATORS))
        elif isinstance(thing, (list, tuple, set, dict)):
            if len(thing) <= _MANY:
                stack.extend(thing.values() if isinstance(thing, dict) else thing)
        elif isinstance(thing, partial):
            stack += [thing.func, thing.args, thing.keywords]
        elif isinstance(thing, MethodType):
            stack.append(thing.__self__)
        elif not isinstance(thing, FunctionType):
            stack += [type(thing), getattr(thing, "__dict__", {})]
    return found


def _state_of(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def rng_state() -> dict[str, Any]:
    """Global random states as tensors, numbers and text only, so that no checkpoint loader has to unpickle classes."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, [int(k) for k in keys], *rest],
        "python": [version, list(words), gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` gave."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def seed_all(seed: int, generators: Iterable[Any] = ()) -> None:
    """Seed torch, numpy and Python, without Lightning's environment variable, and `generators`."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    for generator in generators:
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = type(generator.bit_generator)(seed % 2**32).state
        else:
            generator.seed(seed % 2**32)
