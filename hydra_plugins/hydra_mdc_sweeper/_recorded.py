"""The worker's side: the app's function, which leaves in the folder of each trial how it ended.

From these files the sweep learns about trials whose results never came back, because a worker, the launcher or the
sweep itself died.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import traceback
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import TaskFunction

from lightning_mdc.errors import as_number
from lightning_mdc.files import locked, replacing

FILE = ".mdc_result.json"


class Recorded:
    """The app's function, recorded. Can be pickled if the function can.

    Args:
        task_function: of the app.
        study_id: of the study that the trials belong to.
    """

    def __init__(self, task_function: TaskFunction, study_id: str) -> None:
        self.task_function, self.study_id = task_function, study_id

    def __call__(self, config: Any) -> Any:
        hydra = HydraConfig.get()
        path = Path(hydra.runtime.output_dir) / FILE
        who = {"trial": hydra.job.num, "study": self.study_id, "host": socket.gethostname(), "pid": os.getpid()}
        begun = _write(path, who, lock=True)
        start = time.perf_counter()
        try:
            value = self._call(config)
        except Exception as error:
            seconds = time.perf_counter() - start
            _write(path, {**who, "seconds": seconds, "error": one_line(error), "traceback": traceback.format_exc()})
            raise
        else:
            _write(path, {**who, "seconds": time.perf_counter() - start, **_returned(value)})
        finally:
            if begun is not None:
                os.close(begun)
        return value

    def _call(self, config: Any) -> Any:
        try:
            return self.task_function(config)
        except SystemExit as error:  # would end the sweep, not the trial
            if type(error).__name__ == "SIGTERMException":  # Lightning's: it is the sweep that is to end
                raise
            raise RuntimeError(f"the app called sys.exit({error.code!r})") from error


def one_line(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def described(value: Any) -> str:
    """Something that is no number, for an error message."""
    return "None" if value is None else f"{' '.join(repr(value).split())[:100]} ({type(value).__name__})"


def is_over(record: dict[str, Any]) -> bool:
    """Whether the trial has ended, and not by the death of its process."""
    return "seconds" in record


def is_alive(path: Path) -> bool:
    """Whether a process, on any machine that shares this file system's locks, is running the trial of this record.

    Where there are no locks a trial that has begun and not ended counts as dead.
    """
    with contextlib.suppress(OSError), path.open("r+b") as file:
        return not locked(file)
    return False


def _returned(value: Any) -> dict[str, Any]:
    result = as_number(value)
    return {"returned": described(value)} if result is None else {"value": result}


def _write(path: Path, record: dict[str, Any], *, lock: bool = False) -> int | None:
    """Write the file so that it is there whole or not at all. With `lock`, return it open and locked.

    The lock says that this process lives: it is gone with the process, however that ends. It belongs to the file, not
    to the name, so that the next record does not have it.
    """
    handle: int | None = None
    try:
        with replacing(path) as beside:
            handle = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            if lock:
                locked(handle)
            os.write(handle, json.dumps(record).encode())
    except OSError:  # a full disk is no reason to lose the trial as well
        lock = False
    if handle is not None and not lock:
        os.close(handle)
        handle = None
    return handle
