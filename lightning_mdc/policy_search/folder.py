"""The folder of one search, so that a run that is killed meanwhile goes on: what it rests on, and its trials."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePath
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from lightning_mdc.errors import MdcError
from lightning_mdc.importance import Moments, Scores
from lightning_mdc.policy_search.driver import digest_of

log = logging.getLogger(__name__)

_HELD = 4  # how deep to look into what a function holds


class SearchFolder:
    """Scores, moments and trials of the search that `facts` tell, in a folder of `root`; others have other ones.

    Args:
        root: holds the folders of all searches.
        facts: what makes two searches the same: settings, and digests of weights and images.

    Attributes:
        path: of the folder; made when something is kept.
    """

    def __init__(self, root: Path, *facts: Any) -> None:
        self.path = root / hashlib.sha256(json.dumps(_in_words(facts)).encode()).hexdigest()[:16]
        self._scores, self._moments = self.path / "scores.safetensors", self.path / "moments.safetensors"

    def scores(self) -> Scores | None:
        """The scores that a killed search rests on, with their moments; None if they are not all there."""
        if not self._moments.exists():
            return None
        try:
            return Scores.load(self._scores).with_moments(Moments.load(self._moments))
        except MdcError as error:
            log.warning("%s; scoring again", error)
            return None

    def keep(self, scores: Scores) -> None:
        """For `scores`."""
        self.path.mkdir(parents=True, exist_ok=True)
        scores.save(self._scores)
        if scores.moments is not None:
            scores.moments.save(self._moments)

    def journal(self, scores: Scores) -> Path:
        """Of the trials that rest on these scores. A GPU may give others another time."""
        return self.path / f"trials-{digest_of(scores.tensors(), scores.criterion)}.jsonl"

    def clear(self) -> None:
        """Away with what is large, when all is decided. Trials stay, for whoever starts the same run again."""
        self._moments.unlink(missing_ok=True)


def digest_of_batches(batches: Iterable[Any]) -> str:
    """Hash of all tensors in batches of any kind."""
    sha = hashlib.sha256()
    for batch in batches:
        tensors = {str(number): leaf for number, leaf in enumerate(tree_leaves(batch)) if isinstance(leaf, Tensor)}
        sha.update(digest_of(tensors).encode())
    return sha.hexdigest()


def _in_words(value: Any, left: float = math.inf, inside: tuple[int, ...] = ()) -> Any:
    """Settings in JSON's types: the same for equal ones in another process. Of a function, what it does and holds.

    Args:
        left: how deep to look; what lies deeper is told by its class.
        inside: ids of what it is in.
    """
    if isinstance(value, (str, int, float, type(None))):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Tensor):
        return digest_of({"": value})
    kind = value if hasattr(value, "__qualname__") else type(value)  # of a function or class itself
    name = f"{kind.__module__}.{kind.__qualname__}"
    # What a module, or data, has seen by now is nobody's setting; its weights are told beside.
    if not left or id(value) in inside or isinstance(value, (type, nn.Module, Dataset, DataLoader)):
        return name
    words = partial(_in_words, left=left - 1, inside=(*inside, id(value)))
    # A function may hold anything, a trainer or itself.
    held = partial(_in_words, left=min(left - 1, _HELD), inside=(*inside, id(value)))
    if isinstance(value, (list, tuple)):
        return [words(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(words(item)) for item in value)
    if isinstance(value, Mapping):
        by_name = {str(key): item for key, item in value.items()}
        return {key: words(by_name[key]) for key in sorted(by_name)}
    if isinstance(value, partial):
        return ["partial", words(value.func), held(value.args), held(value.keywords)]
    if isinstance(value, MethodType):
        return [words(value.__func__), held(value.__self__)]
    if isinstance(value, FunctionType):
        code = value.__code__
        read = {key: value.__globals__.get(key) for key in code.co_names}
        read = {key: item for key, item in read.items() if isinstance(item, (str, int, float, tuple, FunctionType))}
        return [name, _of_code(code), *map(held, (value.__defaults__, value.__kwdefaults__, read, _cells(value)))]
    return [name, words(dict(getattr(value, "__dict__", {})))]


def _cells(function: FunctionType) -> list[Any]:
    """What a function has of those it was made in, but for lists and the like: it may keep count there."""
    found: list[Any] = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # nothing yet
            value = cell.cell_contents
            found.append(type(value) if isinstance(value, (list, dict, set)) else value)
    return found


def _of_code(code: CodeType) -> list[Any]:
    """The same in every process that has this version of Python."""
    constants: list[Any] = []
    for each in code.co_consts:
        if isinstance(each, CodeType):
            constants.append(_of_code(each))
        else:
            constants.append(sorted(map(repr, each)) if isinstance(each, frozenset) else repr(each))
    return [code.co_code.hex(), list(code.co_names), constants]
