"""Files that are there whole or not at all, written beside their place and moved there; locks; JSON and CSV text."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path beside `path`, to be written inside; it takes the place of `path` at the end, and is gone after an
    error. Its ending is that of `path`, for whoever goes by it; the folder is made if it is not there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A CSV file's header and rows; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()


def write_json(path: Path, value: Any) -> None:
    """Write sorted, indented JSON; see `write_text`."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def locked(file: IO[bytes] | int) -> bool:
    """Lock an open file for as long as this process has it open; False if another process has.

    True as well where there are no locks: on Windows, on some file systems. A forked child does not have it too.
    """
    if fcntl is None:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError | PermissionError)
    return True


def json_object(text: str, what: str, error: type[Exception]) -> dict[str, Any]:
    """The object in a JSON text.

    Raises:
        Exception: of the kind `error`, if there is none; says so of `what`.
    """
    try:
        fields = json.loads(text)
    except (ValueError, TypeError, RecursionError) as reason:
        raise error(f"{what} JSON cannot be parsed: {reason}") from reason
    if not isinstance(fields, dict):
        raise error(f"{what} JSON must be an object, got {type(fields).__name__}")
    return fields


def tuples(value: Any) -> Any:
    """What was read of JSON with tuples for lists, as frozen values have it."""
    if isinstance(value, dict):
        return {name: tuples(part) for name, part in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def read_json(path: Path) -> Any:
    """What a JSON file holds; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
