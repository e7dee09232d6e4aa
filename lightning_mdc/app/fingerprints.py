"""When is a step done already? When its fingerprint, of all that its result depends on, is that of the earlier run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightning_mdc.app.settings import flat
from lightning_mdc.app.step_table import STEPS, needed
from lightning_mdc.errors import ConfigError

# Settings that name a file or folder. What counts is what is in it, wherever it lies.
_FILES = (
    *("model.checkpoint", "distillation.teacher", "distillation.teacher_checkpoint"),
    *("policy.file", "budget.table", "search.warm_start"),
)
# Of the Trainer's settings, those that change what is learnt or which epoch is kept; another device or logging interval
# does not.
_TRAINER = (
    *("trainer.precision", "trainer.gradient_clip_val", "trainer.accumulate_grad_batches"),
    *("trainer.limit_train_batches", "trainer.check_val_every_n_epoch", "trainer.fast_dev_run"),
)


def fingerprint_of(settings: Mapping[str, Any], upstream: Mapping[str, str]) -> str:
    """SHA-256 of what a result depends on: settings, and the fingerprints of the results that it is made from."""
    text = json.dumps({"settings": settings, "upstream": upstream}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprints(settings: Mapping[str, Any], finished: frozenset[str]) -> dict[str, str]:
    """Fingerprint of every step's result under `settings`.

    Args:
        finished: of the steps that others only look at (`Step.looks_at`), those whose results are there.
    """
    prints: dict[str, str] = {}
    for name, step in STEPS.items():
        upstream = {*needed(settings, name), *finished.intersection(step.looks_at)}
        prints[name] = fingerprint_of(relevant(settings, name), {other: prints[other] for other in sorted(upstream)})
    return prints


def relevant(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings that the result of the step `name` depends on, by dotted key, down to single values.

    The Trainer's count only where there is something to train: with ``dense.epochs=0`` the dense model is the same on
    a CPU in fp32 and on a GPU in bf16. Files count by their content.

    Raises:
        ConfigError: a file cannot be read.
    """
    step = STEPS[name]
    trains = step.trains is not None and bool(settings[step.trains]["epochs"])
    groups = (*step.settings, *(_TRAINER if trains else ()))
    return {
        key: _content(key, value) if key in _FILES else value
        for key, value in flat(settings)
        if key not in step.ignores and any(key == group or key.startswith(f"{group}.") for group in groups)
    }


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two answers of `relevant`, of which the first comes from a file: up to three settings."""
    keys = [key for key in now if before.get(key) != json.loads(json.dumps(now[key], default=str))]
    return ", ".join(f"{key}={before.get(key)!r}, now {now[key]!r}" for key in keys[:3])


def _content(key: str, value: Any) -> Any:
    """The digest of the file or folder that a setting names. The value itself where it names none, but a model of timm
    or, as ``distillation.teacher=dense``, the run's own."""
    if not isinstance(value, str) or (key, value) == ("distillation.teacher", "dense"):
        return value
    path = Path(value.removeprefix("local-dir:"))
    try:
        return f"sha256:{_digest(path)[:16]}" if path.exists() else value
    except OSError as error:
        raise ConfigError(f"{key}={value!r} cannot be read: {error}; give a file or folder that can") from error


def _digest(path: Path) -> str:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        parts = [(file.relative_to(path).as_posix(), _digest(file)) for file in files]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    state = path.stat()
    return _digest_of_file(path.resolve(), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1024)
def _digest_of_file(path: Path, mtime_ns: int, size: int) -> str:
    """Read once per process, unless the file is written anew: a start asks several times, of gigabytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
