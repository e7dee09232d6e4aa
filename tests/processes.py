"""Two ranks, forked from the process of the tests: what these have imported, six seconds of torch and Lightning, is
there. How Lightning starts a second process itself is for the tests of ``train.py``."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable

import torch

from lightning_mdc.distributed import leave_process_group


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
