"""With what command and what versions a run was made."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lightning_mdc.app.run_folder import RunFolder
from lightning_mdc.app.terminal import started
from lightning_mdc.files import read_json, write_json

_FILE = "invocations.json"
_PACKAGES = ("lightning-mdc", "torch", "lightning", "timm", "torchmetrics", "hydra-core", "scikit-optimize", "numpy")


@dataclass(frozen=True)
class Invocation:
    """One start of ``train.py`` on a run's folder.

    Attributes:
        command: to be typed again.
        started: local time, ISO.
        versions: of Python and the packages that matter.
        machine: operating system and processor.
    """

    command: str
    started: str
    versions: dict[str, str]
    machine: str


def note_invocation(folder: RunFolder) -> None:
    """Add this process to the ones that the run's folder remembers."""
    this = Invocation(started(), datetime.now().isoformat(timespec="seconds"), _versions(), platform.platform())
    write_json(folder / _FILE, [asdict(each) for each in (*invocations(folder.path), this)])


def invocations(folder: Path) -> tuple[Invocation, ...]:
    """All that worked on the run in `folder`, the first first; none if the file is missing or damaged."""
    try:
        return tuple(Invocation(**each) for each in read_json(folder / _FILE) or ())
    except TypeError:  # edited by somebody
        return ()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree without an install
            continue
    return found
