"""Processes forked from that of the tests: what these have imported, six seconds of torch and Lightning, is there.

How a program is started from nothing is for a few tests of ``train.py`` and ``mdc``, and how Lightning starts a second
process itself for those of ``train.py``.
"""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import termios
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import rich
import torch
from hydra.core.global_hydra import GlobalHydra

from lightning_mdc.distributed import leave_process_group


def program(work: Callable[..., object], *arguments: str, output: int, folder: Path, **environment: str) -> BaseProcess:
    """A process that does ``work(*arguments)``, begun.

    Args:
        output: file descriptor of its standard streams; of all three if that is a terminal, which becomes its own.
        folder: in which it works.
        environment: variables to be added.
    """
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=_program, args=(work, arguments, output, folder, environment))
    process.start()
    return process


def script(*words: str) -> None:
    """``python train.py ...`` in a process that `program` has begun."""
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")


def _program(work: Callable[..., object], arguments: tuple, output: int, folder: Path, environment: dict) -> None:
    _as_if_started_anew()
    os.environ |= environment
    os.chdir(folder)
    if os.isatty(output):
        os.setsid()
        fcntl.ioctl(output, termios.TIOCSCTTY, 0)
        os.dup2(output, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    work(*arguments)


def _as_if_started_anew() -> None:
    """Away with what the tests and pytest have left in this process."""
    torch.set_num_threads(1)
    os.environ.pop("PL_GLOBAL_SEED", None)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    GlobalHydra.instance().clear()
    logging.getLogger().handlers.clear()
    rich._console = None  # made for another terminal, or none


def two_ranks(work: Callable[..., None], *arguments: object, seconds: float = 120) -> None:
    """``work(rank, *arguments)`` in two processes, whose environment is what torchrun would make it; both end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(number, port, work, *arguments)) for number in (0, 1)]
    for process in ranks:
        process.start()
    end = time.monotonic() + seconds
    try:
        # Where one has failed the other may wait for it.
        while any(process.is_alive() for process in ranks) and not any(process.exitcode for process in ranks):
            assert time.monotonic() < end, f"not over after {seconds} s"
            ranks[0].join(0.05) if ranks[0].is_alive() else ranks[1].join(0.05)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert [process.exitcode for process in ranks] == [0, 0]


def _rank(number: int, port: int, work: Callable[..., None], *arguments: object) -> None:
    torch.set_num_threads(1)
    os.environ.pop("PL_GLOBAL_SEED", None)  # which a test before may have left
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
    work(number, *arguments)
    leave_process_group()
