"""A file of JSON lines that are only ever appended, by one process at a time.

A process killed at any moment leaves at most one torn line: lines are written in one go, and synced.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_mdc.errors import SearchError
from lightning_mdc.files import locked, replacing

# Device and inode of the files that journals of this process have open.
_OPEN: set[tuple[int, int]] = set()


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
            _OPEN.discard(self._identity)

    def _open(self) -> None:
        # Unbuffered: one write, one line; nothing is left to be written at exit.
        self._file = self.path.open("a+b", buffering=0)
        stat = os.fstat(self._file.fileno())
        self._identity = (stat.st_dev, stat.st_ino)
        # Locks do not hold within a process.
        if self._identity in _OPEN or not locked(self._file):
            self._file.close()
            raise SearchError(
                f"study file {self.path} is in use by another search; wait for it, stop it, or give another path"
            )
        _OPEN.add(self._identity)


def line_of(record: Mapping[str, Any]) -> bytes:
    """A record as it is written: JSON, keys sorted."""
    return json.dumps(record, sort_keys=True, allow_nan=False).encode() + b"\n"
