"""A search in a process of its own, run by the tests of `mdc.search`: killed, resumed, or in two processes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import lightning_mdc as mdc
from lightning_mdc.policy_search.held_out import HeldOut
from tests.kinds import CLASSES, images, make

TRIALS = 16


def pictures(count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    return images(count, seed=5), torch.arange(count) % CLASSES


def run(state: Path | None, pause: float = 0.0) -> mdc.SearchResult:
    model = make()
    held_out = HeldOut([pictures()], "loss", batch_size=16)

    def evaluate(slim: nn.Module) -> float:
        time.sleep(pause)
        return held_out(slim)

    scores = mdc.score(model, [images(16)], "magnitude")
    return mdc.search(model, scores, evaluate, 0.6, TRIALS, 3, n_initial_points=4, state=state, progress=False)


def history(result: mdc.SearchResult) -> list[object]:
    return [[trial.number, json.loads(trial.policy.to_json()), trial.value, trial.status] for trial in result.history]


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    if what == "slow":
        run(folder / "trials.jsonl", pause=0.05)
    else:  # one of two ranks
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=int(what), world_size=2)
        found = history(run(folder / "shared.jsonl"))
        (folder / f"rank{what}.json").write_text(json.dumps(found))
        dist.destroy_process_group()
