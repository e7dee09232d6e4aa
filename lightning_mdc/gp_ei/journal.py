"""A file of JSON lines that are only ever appended, by one process at a time.

A process killed at any moment leaves at most one torn line: lines are written in one go, and synced.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

from lightning_mdc.errors import SearchError
from lightning_mdc.files import locked, replacing

# What journals of this process have open, by device and inode. A lock is a process's, not a handle's: it does not keep
# the process itself out, and it ends when any of its handles of the file is closed.
_OPEN: dict[tuple[int, int], IO[bytes]] = {}


class Journal:
    """Open and locked from the start until `close`.

    Args:
        path: made if it is not there, with its folder.

    Raises:
        SearchError: it cannot be written, or another search has it open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise SearchError(f"study file {path} cannot be written: {error}; give another path") from error

    def read(self) -> bytes:
        """All that is in it."""
        self._file.seek(0)
        return self._file.read()

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add a line for each record, all of them or none.

        Raises:
            OSError: they cannot be written.
        """
        data = b"".join(map(line_of, records))
        if not data:
            return
        size = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(data) != len(data):
                raise OSError("only a part could be written")
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(size)  # half a line would make the next one unreadable
            raise

    def clear(self) -> None:
        """Take all lines out."""
        self._file.truncate(0)

    def replace(self, lines: Iterable[bytes]) -> None:
        """Put these lines in place of all that is there."""
        with replacing(self.path) as beside:
            beside.write_bytes(b"".join(lines))
        self.close()
        self._open()

    def copy_aside(self) -> Path:
        """Keep the file as it is under another name beside it, ``NAME.damaged1`` or the next that is free."""
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.damaged{number}")).exists():
            number += 1
        aside.write_bytes(self.read())
        return aside

    def close(self) -> None:
        """Let go of the file."""
        if not self._file.closed:
            self._file.close()
            _OPEN.pop(self._identity, None)

    def _open(self) -> None:
        if _handle(self.path) is not None:
            self._refuse()
        # Unbuffered: one write, one line; nothing is left to be written at exit.
        self._file = self.path.open("a+b", buffering=0)
        if not locked(self._file):
            self._file.close()
            self._refuse()
        self._identity = _identity(os.fstat(self._file.fileno()))
        _OPEN[self._identity] = self._file

    def _refuse(self) -> NoReturn:
        raise SearchError(
            f"study file {self.path} is in use by another search; wait for it, stop it, or give another path"
        )


def bytes_of(path: Path) -> bytes:
    """All that is in a file, whether or not this process has it open as a journal.

    Raises:
        OSError: it cannot be read.
    """
    file = _handle(path)
    if file is None or not hasattr(os, "pread"):  # on Windows there are no locks either
        return path.read_bytes()
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)


def _handle(path: Path) -> IO[bytes] | None:
    """Of a journal of this process at this path, if there is one."""
    try:
        return _OPEN.get(_identity(path.stat()))
    except OSError:
        return None


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def line_of(record: Mapping[str, Any]) -> bytes:
    """A record as it is written: JSON, keys sorted."""
    return json.dumps(record, sort_keys=True, allow_nan=False).encode() + b"\n"
