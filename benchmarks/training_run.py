"""How fast does the slim model train, with and without its teacher? Images per second and peak memory.

    .venv/bin/python benchmarks/training_run.py --run runs/cifar10/…

Takes a finished run of ``train.py`` and trains its models for some steps in a real Trainer: dense, slim, and slim under
its dense teacher, in fp32 as written and in bf16 compiled. Images are in memory, so that no loader is timed. Every
measurement has a process of its own, for its peak memory. Leaves ``benchmarks/results/training_run.json`` and the table
in ``docs/benchmarks.md``, with the run's accuracies.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import resource
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from pages import RESULTS, write_pages
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import lightning_mdc as mdc
from lightning_mdc.app.report import results as reporting
from lightning_mdc.figures.numbers import scaled
from lightning_mdc.files import write_json

ROOT = Path(__file__).resolve().parents[1]
WHAT = ("dense", "slim", "slim + teacher")
HOW = {"fp32": ("32-true", False), "bf16, compiled": ("bf16-mixed", True)}
WARM_UP = 3  # steps; the first one compiles


class StepTimes(L.Callback):
    """Seconds of every training step, the accelerator waited for."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._begun = self._now(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seconds.append(self._now(trainer) - self._begun)

    def _now(self, trainer: L.Trainer) -> float:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def measured(run: str, what: str, how: str, batch: int, steps: int, threads: int | None) -> dict[str, float]:
    """Images per second (median over the steps) and peak memory in bytes; runs in a process of its own."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if threads is not None:
        torch.set_num_threads(threads)
    precision, compiled = HOW[how]
    dense, slim = (mdc.load(Path(run) / name) for name in ("dense", "slim"))
    module = mdc.DistillationModule(
        dense if what == "dense" else slim,
        mdc.Teacher(Path(run) / "dense", compile=compiled) if "teacher" in what else None,
        optimizer={"lr": 1e-5},
        schedule={"sched": "none"},
        compile=compiled,
    )
    size = dense.pretrained_cfg["input_size"]
    one = (torch.randn(batch, *size), torch.randint(0, dense.num_classes, (batch,)))
    times = StepTimes()
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        precision=precision,
        max_steps=WARM_UP + steps,
        barebones=True,
        callbacks=[times],
    )
    module.student.train()
    # A list would be taken for several loaders.
    trainer.fit(module, DataLoader([one] * (WARM_UP + steps), batch_size=None))
    if trainer.strategy.root_device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"images_per_second": batch / statistics.median(times.seconds[WARM_UP:]), "memory": memory}


def measure(run: Path, batch: int, steps: int, threads: int | None) -> dict[str, Any]:
    results = reporting.Results.load(run / "results.json")
    wanted = [(what, how) for how in HOW for what in WHAT]
    found: dict[str, dict[str, Any]] = {}
    context = multiprocessing.get_context("spawn")
    for what, how in tqdm(wanted, desc="Training", unit="model"):
        with context.Pool(1) as one:
            found.setdefault(how, {})[what] = one.apply(measured, (str(run), what, how, batch, steps, threads))
    rows = [results.of(kind) for kind in (reporting.DENSE, reporting.SLIM, reporting.FINETUNED, reporting.REFERENCE)]
    return {
        "name": results.name,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads or 'all'} threads",
        "batch": batch,
        "macs": {"dense": rows[0][0].macs, "slim": rows[1][0].macs},
        "top1": {row[0].model: statistics.mean(each.correct / each.images for each in row) for row in rows if row},
        "images": rows[0][0].images,
        "found": found,
    }


def text(result: dict[str, Any]) -> str:
    lines = [
        "| training step | precision | images/s | against dense | peak memory |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for how, models in result["found"].items():
        base = models["dense"]["images_per_second"]
        for what, numbers in models.items():
            speed = numbers["images_per_second"]
            lines.append(
                f"| {what} | {how} | {speed:.0f} | {speed / base:.2f}x | {numbers['memory'] / 2**20:.0f} MiB |"
            )
    share = result["macs"]["slim"] / result["macs"]["dense"]
    accuracies = ", ".join(f"{kind} {value:.2%}" for kind, value in result["top1"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"{result['name']}: slim has {share:.0%} of {scaled(result['macs']['dense'])}MACs; batches of "
            f"{result['batch']} images in memory, on {result['device']}; memory on a CPU is the whole process. "
            f"Top-1 on {result['images']} test images: {accuracies}. Measured by `python benchmarks/training_run.py`.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run of train.py")
    parser.add_argument("--batch", type=int, default=128, help="images per step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--table-only", action="store_true", help="write the table from the JSON that is there")
    arguments = parser.parse_args()
    stored = RESULTS / "training_run.json"
    if not arguments.table_only:
        if arguments.run is None or not (arguments.run / "results.json").exists():
            parser.error(f"--run {arguments.run}: give the folder of a finished run of train.py (with results.json)")
        write_json(stored, measure(arguments.run, arguments.batch, arguments.steps, arguments.threads))
    result = json.loads(stored.read_text())
    print(text(result))
    write_pages("training_run", result)


if __name__ == "__main__":
    main()
