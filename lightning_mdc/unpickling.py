"""How any file of torch's is read: tensors and plain values are, and nothing else is imported, called or made.

A checkpoint may hold anything beside weights: settings of a project's own classes, a path, an array. To unpickle those
needs that project, and could run whatever the file says. Here a placeholder takes their place.
"""

from __future__ import annotations

import codecs
import pickle
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


class _Inert(type):
    """What a pickle does to an object does nothing to these classes."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls

    def append(cls, *args: Any) -> None: ...

    __setstate__ = __setitem__ = extend = add = append


class Foreign(metaclass=_Inert):
    """Stands for whatever a file holds that is neither a tensor nor plain; calling it gives it again."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls


def read(path: str | Path) -> Any:
    """What lies in a file that `torch.save` or Lightning wrote, on the CPU, with `Foreign` for what is foreign.

    A tensor of a subclass, or with attributes, comes as a plain one.

    Raises:
        Exception: the file is missing, damaged, or none of torch's; of whatever kind torch raises.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise ValueError("a TorchScript archive, which is a program")
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_PICKLE)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get(f"{module.replace('__builtin__', 'builtins')}.{name}", Foreign)  # as Python 2 called them
        of_torch = getattr(torch, name, None) if module == "torch" else None
        return of_torch if isinstance(of_torch, torch.dtype) else known


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


_PICKLE: Any = SimpleNamespace(__name__=__name__, Unpickler=_Unpickler, load=_load)  # as torch asks for a module


def _plain_tensor(make: Any, kind: Any, args: Any, state: Any) -> Any:
    return make(*args)


def _plain_parameter(data: Any, requires_grad: bool, hooks: Any, state: Any = None) -> Any:
    return torch._utils._rebuild_parameter(data, requires_grad, OrderedDict())


# What tensors and plain values are made by. Storages of all kinds torch knows by itself.
_KNOWN: dict[str, Any] = {
    "_codecs.encode": codecs.encode,  # of bytes
    "builtins.bytearray": bytearray,
    "builtins.complex": complex,
    "builtins.frozenset": frozenset,
    "builtins.set": set,
    "collections.Counter": Counter,
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": lambda *args: defaultdict(None),
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch.storage.UntypedStorage": torch.UntypedStorage,
    "torch._tensor._rebuild_from_type_v2": _plain_tensor,
    "torch._utils._rebuild_parameter": _plain_parameter,
    "torch._utils._rebuild_parameter_with_state": _plain_parameter,
    **{
        f"torch._utils.{name}": getattr(torch._utils, name)
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")
    },
}
