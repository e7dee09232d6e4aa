"""Forward passes that halt at the same places: what a layer is given by all batches can change it before any goes on.

Each pass is made once, however many halts there are. It runs in a thread of its own, so that a hook can wait in the
middle of anybody's ``forward``; but only one thread runs at a time, and only while its owner waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_mdc.importance.calibration import TOGETHER

_here = threading.local()


class _Ended(BaseException):
    """Ends a pass that nobody wants to see the rest of; no error, so that nobody handles it."""


class Walk:
    """One forward pass, made from halt to halt.

    Args:
        run: makes the pass, without gradients. Hooks inside call `halt`.

    Attributes:
        notes: what hooks of this pass keep for later ones.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self.notes: dict[str, Any] = {}
        self._run = run
        self._seen: Any = None
        self._error: BaseException | None = None
        self._goes, self._halts = threading.Semaphore(0), threading.Semaphore(0)
        self._is_ended = self._is_over = False
        self._dtype: torch.dtype | None = None  # the default one inside the pass
        self._thread = threading.Thread(target=self._walk, daemon=True)

    def to_next(self) -> Any:
        """What the next halt has seen; None if there is none any more.

        Raises:
            BaseException: what the pass raised on the way.
        """
        self._go_on()
        if self._error is not None:
            raise self._error
        return self._seen

    def end(self) -> None:
        """Leave the rest out."""
        self._is_ended = True
        if self._thread.ident is None:
            return
        if not self._is_over:  # else the thread waits for nobody, alive as it may be
            self._go_on()
        self._thread.join()

    def _go_on(self) -> None:
        # A setting that a pass may change around itself (Lightning's bf16-true does) is nobody's own: put aside.
        outside = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype or outside)
        try:
            if self._thread.ident is None:
                self._thread.start()
            else:
                self._goes.release()
            self._halts.acquire()
        finally:
            self._dtype = torch.get_default_dtype()
            torch.set_default_dtype(outside)

    def _walk(self) -> None:
        _here.walk = self
        try:
            with torch.no_grad():
                self._run()
        except _Ended:
            pass
        except BaseException as error:  # the owner's thread raises it
            self._error = error
        self._seen, self._is_over = None, True
        self._halts.release()

    def _halt(self, seen: Any) -> None:
        self._seen = seen
        self._halts.release()
        self._goes.acquire()
        if self._is_ended:
            raise _Ended


def halt(seen: Any) -> None:
    """In a hook of a pass that is walked: hand over what is seen, and wait."""
    walked()._halt(seen)


def walked() -> Walk:
    """The walk that a hook is called in."""
    walk: Walk = _here.walk
    return walk


@contextmanager
def walking(runs: Sequence[Callable[[], Any]]) -> Iterator[list[Walk]]:
    """Walks of these passes; what is left of them after the block is left out."""
    walks = [Walk(run) for run in runs]
    try:
        yield walks
    finally:
        for walk in walks:
            walk.end()


def together(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Small batches of images of one size joined: all passes wait for each other, each in a thread of its own."""
    waiting: list[Tensor] = []
    for batch in batches:
        if waiting and (batch.shape[1:] != waiting[0].shape[1:] or sum(map(len, waiting)) >= TOGETHER):
            yield torch.cat(waiting)
            waiting = []
        waiting.append(batch)
    if waiting:
        yield torch.cat(waiting)
