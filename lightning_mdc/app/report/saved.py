"""What the step test leaves is read here: numpy arrays with facts in one file, and a remedy where a file is damaged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lightning_mdc.errors import ConfigError
from lightning_mdc.files import replacing


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Write arrays and JSON-ready facts as a safetensors file, so that it is there whole or not at all."""
    # safetensors writes memory as it lies, and stacking keeps the order of channels that come first in it.
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with replacing(path) as unfinished:
        save_file(contiguous, unfinished, metadata={"facts": json.dumps(facts)})


def load_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, facts) that `save_arrays` wrote."""
    with safe_open(str(path), framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return arrays, json.loads((file.metadata() or {})["facts"])


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Inside, a file that holds something else than `what` raises a ConfigError that says what to do."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} holds no {what} ({error}); run the step test again (stage=test)") from error
