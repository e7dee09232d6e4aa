"""The terminal: bars that show how far something is, and lines that do not get in their way.

Bars and lines share rich's own console, which is also Lightning's. Where there is no terminal there are no bars, and
lines are plain text: nothing that a file or a pipe would have to be cleaned of.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich
from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_mdc.distributed import is_first

Advance = Callable[..., None]

# Columns of a table that goes to a file or a pipe, which has no width of its own.
_WIDE = 160


def on_terminal() -> bool:
    """Whether bars can be seen, and are wanted (see `is_quiet`)."""
    # Both: a bar on a terminal would take along what is written to a file by way of the other stream.
    return sys.stdout.isatty() and sys.stderr.isatty() and not rich.get_console().is_dumb_terminal and not is_quiet()


def is_quiet() -> bool:
    """Whether warnings and errors are all that is wanted on the screen (``-q``)."""
    screens = [handler for handler in logging.getLogger().handlers if isinstance(handler, Screen)]
    return any(screen.level > logging.INFO for screen in screens)


def console() -> Console:
    """What to print tables on; under ``-q`` it prints nothing."""
    if is_quiet():
        return Console(quiet=True)
    shared = rich.get_console()
    return shared if shared.is_terminal else Console(width=_WIDE)


@contextmanager
def bar(
    what: str, total: int, *, completed: int = 0, shown: bool = True, in_background: bool = True
) -> Iterator[Advance]:
    """A progress bar on a terminal, on the first rank; gone when it is done.

    Gives ``advance(note="")``, to be called after each step; the note stands beside the bar.

    Args:
        what: is being done, e.g. ``"Scoring"``.
        total: steps; 0 if nobody knows.
        completed: of these, how many were done before.
        shown: False for no bar at all.
        in_background: clock and bar also move between steps; False where a step is timed and must not be disturbed.
    """
    if not (shown and is_first() and on_terminal()):
        yield lambda note="": None
        return
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=rich.get_console(),
        transient=True,
        auto_refresh=in_background,
    )
    task = progress.add_task(what, total=total or None, completed=completed, note="")

    def advance(note: str = "") -> None:
        progress.update(task, advance=1, note=note, refresh=not in_background)

    try:
        progress.start()
    except LiveError:  # somebody else's bar is there, and older rich draws one at a time
        yield lambda note="": None
        return
    try:
        yield advance
    finally:
        progress.stop()


class Screen(logging.Handler):
    """Lines of the log as they are, on standard output, above a bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            if sys.stdout.isatty():
                rich.get_console().print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                print(line, flush=True)
        except Exception:  # as every handler of the standard library does
            self.handleError(record)
