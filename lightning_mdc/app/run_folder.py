"""Where a run of ``train.py`` writes, and how it knows what it has already done.

A finished step leaves ``steps/<name>.json`` with the settings it was made with and their fingerprint, which covers the
fingerprints of the steps it was built on. A step is done if the fingerprint of today's settings is the one there.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_mdc.app.terminal import started
from lightning_mdc.errors import ConfigError
from lightning_mdc.files import read_json, write_json

# The folder of what `RunFolder.finish` writes, by which a run is known.
RECORDS = "steps"
# Names the file in search/ that the search of the present settings writes.
CURRENT_STUDY = "search/current"

_INVOCATIONS = "invocations.json"
_PACKAGES = ("lightning-mdc", "torch", "lightning", "timm", "torchmetrics", "hydra-core", "scikit-optimize", "numpy")


class RunFolder:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __str__(self) -> str:
        return str(self.path)

    def create(self) -> None:
        """Make the folder, and the one for records by which `newest_run` knows it.

        Raises:
            ConfigError: it cannot be written.
        """
        try:
            (self.path / RECORDS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"runs={str(self.path.parent)!r} cannot be written: {error}; give another folder"
            ) from error

    def record(self, name: str) -> dict[str, Any] | None:
        """What `finish` wrote for `name`; None if it has not been finished."""
        try:
            record = json.loads((self.path / RECORDS / f"{name}.json").read_text())
        except (OSError, ValueError):  # unreadable counts as not done: the step runs again
            return None
        return record if isinstance(record, dict) and "fingerprint" in record else None

    def is_done(self, name: str, fingerprint: str, output: Path) -> bool:
        """Whether `name` was finished with this fingerprint and its output is still there."""
        record = self.record(name)
        return record is not None and record["fingerprint"] == fingerprint and output.exists()

    def start(self, name: str) -> None:
        """From now on `name` is unfinished, whatever was there before."""
        (self.path / RECORDS / f"{name}.json").unlink(missing_ok=True)

    def finish(self, name: str, fingerprint: str, **facts: Any) -> None:
        """Record that `name` is finished."""
        write_json(self.path / RECORDS / f"{name}.json", {"fingerprint": fingerprint, **facts})


def open_run(runs: str, name: str, resume: bool | str) -> tuple[RunFolder, bool]:
    """(folder, whether it is an earlier one) for a run called `name`.

    ``resume=False`` gives a folder that does not exist yet, ``True`` the newest run of that name, or a fresh one if
    there is none; a path gives the run there.

    Raises:
        ConfigError: the path to resume from holds no run.
    """
    if not isinstance(name, str) or not name or name != Path(name).name:
        raise ConfigError(f"name={name!r} is no folder name; give one without slashes, such as 'digits'")
    home = Path(runs) / name
    if isinstance(resume, str):
        path = Path(resume)
        if not (path / RECORDS).is_dir():
            raise ConfigError(
                f"resume={resume!r} holds no run (no folder {RECORDS}/ in it); give the folder of an earlier run, or "
                f"resume=true for the newest under {home}"
            )
        return RunFolder(path), True
    newest = newest_run(home) if resume else None
    return (RunFolder(newest), True) if newest is not None else (RunFolder(_fresh(home)), False)


def newest_run(home: Path) -> Path | None:
    """The run under `home` that was started last; None if there is none."""
    runs = [path.parent for path in home.glob(f"*/{RECORDS}")]
    return max(runs, key=lambda path: _age_key(path.name), default=None)


def _age_key(name: str) -> tuple[str, int]:
    """Sorts ``2026-01-31_12-00-00`` before its later twin ``2026-01-31_12-00-00_2``, and that before ``..._10``."""
    start, number = name[:19], name[20:]
    return start, int(number) if number.isdigit() else 1


def _fresh(home: Path) -> Path:
    """A folder named after the time; numbered from the second run within one second on.

    Claimed at once, so that two runs started together (a sweep's jobs) never share one.
    """
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while True:
        path = home / (stamp if number == 1 else f"{stamp}_{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise ConfigError(f"runs={str(home.parent)!r} cannot be written: {error}; give another folder") from error
        else:
            return path


# --- with what command and what versions it was made ------------------------------------------------------------------


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
    write_json(folder / _INVOCATIONS, [asdict(each) for each in (*invocations(folder.path), this)])


def invocations(folder: Path) -> tuple[Invocation, ...]:
    """All that worked on the run in `folder`, the first first; none if the file is missing or damaged."""
    try:
        return tuple(Invocation(**each) for each in read_json(folder / _INVOCATIONS) or ())
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
