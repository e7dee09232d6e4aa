"""The folder of one search, so that a run that is killed meanwhile goes on: what it rests on, and its trials."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path, PurePath
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_mdc.errors import MdcError
from lightning_mdc.importance import Moments, Scores
from lightning_mdc.policy_search.driver import digest_of

log = logging.getLogger(__name__)


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


def _in_words(value: Any) -> Any:
    """Settings in JSON's types: the same for equal ones in another process. Of a function, what it does and holds."""
    if isinstance(value, (str, int, float, type(None))):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_in_words(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _in_words(item) for key, item in sorted(value.items())}
    if isinstance(value, partial):
        return ["partial", _in_words(value.func), _held(value.args), _held(value.keywords)]
    if isinstance(value, MethodType):
        return [_in_words(value.__func__), _held(value.__self__)]
    if isinstance(value, FunctionType):
        cells = inspect.getclosurevars(value).nonlocals
        return [_held(value), _held(value.__defaults__), _held(value.__kwdefaults__), _held(cells)]
    kind = value if isinstance(value, type) else type(value)
    return [f"{kind.__module__}.{kind.__qualname__}", _in_words(dict(getattr(value, "__dict__", {})))]


def _held(value: Any) -> Any:
    """What a function holds. It may be anything, a data set or itself, so of an object only what is plain counts."""
    if isinstance(value, (str, int, float, type(None), np.generic, PurePath)):
        return _in_words(value)
    if isinstance(value, (list, tuple)):
        return [_held(item) for item in value]
    if isinstance(value, dict):
        return {name: _held(item) for name, item in sorted((str(key), item) for key, item in value.items())}
    if isinstance(value, FunctionType):
        return [f"{value.__module__}.{value.__qualname__}", _of_code(value.__code__)]
    kind = value if isinstance(value, type) else type(value)
    # What a module counts as it goes is nobody's setting.
    own = {} if isinstance(value, (type, nn.Module)) else getattr(value, "__dict__", {})
    plain = {name: each for name, each in sorted(own.items()) if isinstance(each, (str, int, float))}
    return [f"{kind.__module__}.{kind.__qualname__}", plain]


def _of_code(code: CodeType) -> list[Any]:
    """The same in every process that has this version of Python."""
    constants: list[Any] = []
    for each in code.co_consts:
        if isinstance(each, CodeType):
            constants.append(_of_code(each))
        else:
            constants.append(sorted(map(repr, each)) if isinstance(each, frozenset) else repr(each))
    return [code.co_code.hex(), list(code.co_names), constants]
