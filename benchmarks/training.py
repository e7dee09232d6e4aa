"""What do masks cost a training step, and what does a slim student save?

    .venv/bin/python benchmarks/training.py

Trains one model in several ways, one step of each in turn, and compares each with its base in the same round: dense
with the masks that `MultiDimPruneCallback` decided on, without and with token stages, against the same without; and
slim against dense, alone and under the dense teacher. Weights and images are random, which no time depends on; images
are in memory.

Leaves ``benchmarks/results/training.json`` and ``.png``, and the table in ``docs/benchmarks.md``; ``--quick`` only
prints its table. For a finished run of ``train.py``, with precisions, memory and accuracies, see ``training_run.py``.
"""

from __future__ import annotations

import argparse
import copy
import logging
import random
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import timm
import torch
from matplotlib.figure import Figure
from pages import publish
from targets import Target, verdicts
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import lightning_mdc as mdc
from lightning_mdc.figures import style
from lightning_mdc.policy import DIMENSIONS

WARM_UP = 2  # rounds
MASKED = "dense, heads and neurons masked"
MASKED_WITH_TOKENS = "dense, heads and neurons masked, token stages on"


@dataclass(frozen=True)
class Way:
    """One way to train."""

    base: str  # the way it is compared with
    step: Callable[[Tensor, Tensor], None]  # of images and labels
    plan: mdc.Plan | None = None  # the masks it wears
    model: nn.Module | None = None  # on which


def trained(student: nn.Module, teacher: nn.Module | None = None, **options: Any) -> Callable[[Tensor, Tensor], None]:
    """The training step of a `DistillationModule`, with an optimizer of its own."""
    module = mdc.DistillationModule(student.train(), teacher, **options)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)

    def step(images: Tensor, labels: Tensor) -> None:
        module.loss_parts(images, labels)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def decided_plan(model: nn.Module, dimensions: tuple[str, ...], size: tuple[int, ...]) -> mdc.Plan:
    """What the callback decides on in a fit of one step."""
    callback = mdc.MultiDimPruneCallback(0.6, "uniform", "magnitude", dimensions=dimensions, compensate="none")
    module = mdc.DistillationModule(model.train(), optimizer={"lr": 0.0}, schedule={"sched": "none"})
    data = [(torch.zeros(size), 0)] * 2
    L.Trainer(barebones=True, max_steps=1, callbacks=[callback]).fit(module, DataLoader(data, batch_size=2))
    assert callback.plan is not None
    return callback.plan


def ways_to_train(name: str, device: torch.device) -> tuple[dict[str, Way], tuple[int, ...], dict[str, int]]:
    """Each way, the size of an image, and MACs of the models."""
    torch.manual_seed(0)
    dense = timm.create_model(name)
    size = dense.pretrained_cfg["input_size"]
    units, all_three = (decided_plan(dense, what, size) for what in (("heads", "neurons"), DIMENSIONS))
    dense = dense.to(device)
    slim, teacher = mdc.slim(dense, all_three), copy.deepcopy(dense)
    alone = trained(dense)
    ways = {
        "dense": Way("dense", alone),
        MASKED: Way("dense", alone, units, dense),
        MASKED_WITH_TOKENS: Way("dense", alone, all_three, dense),
        "slim": Way("dense", trained(slim)),
        "dense + teacher": Way("dense + teacher", trained(dense, teacher)),
        "slim + teacher": Way("dense + teacher", trained(slim, teacher)),
    }
    return ways, size, {"dense": mdc.macs(dense), "slim": mdc.macs(slim)}


def measure(name: str, batch: int, rounds: int, precision: str) -> dict[str, Any]:
    """Seconds of every step, by way."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ways, size, macs = ways_to_train(name, device)
    images = torch.randn(batch, *size, device=device)
    labels = torch.arange(batch, device=device)
    seconds: dict[str, list[float]] = {what: [] for what in ways}
    order, shuffle = list(ways), random.Random(0).shuffle
    with tqdm(total=(WARM_UP + rounds) * len(ways), desc="Training", unit="step") as progress:
        for _ in range(WARM_UP + rounds):
            shuffle(order)  # so that no way always follows the same one
            for what in order:
                seconds[what].append(timed(ways[what], images, labels, precision))
                progress.update()
    result = {
        "model": name,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}",
        "precision": precision,
        "batch": batch,
        "rounds": rounds,
        "macs": macs,
        "compared": [(what, way.base) for what, way in ways.items()],
        "seconds": {what: each[WARM_UP:] for what, each in seconds.items()},
    }
    return {**result, "targets": [target.facts() for target in targets(result)]}


def timed(way: Way, images: Tensor, labels: Tensor, precision: str) -> float:
    """Seconds of one step; putting masks on and taking them off is not a part of it."""
    masks = nullcontext() if way.plan is None or way.model is None else mdc.masked(way.model, way.plan)
    with masks, torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        begun = now(images.device)
        way.step(images, labels)
        return now(images.device) - begun


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def against(result: dict[str, Any], what: str, base: str) -> tuple[float, float, float]:
    """Median and quartiles of a way's time over its base's in the same round."""
    both = zip(result["seconds"][what], result["seconds"][base], strict=True)
    ratios = [own / other for own, other in both]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def targets(result: dict[str, Any]) -> list[Target]:
    return [
        Target(f"training / {what}, {result['model']}", against(result, what, "dense")[0], "<=", 1.03)
        for what in (MASKED, MASKED_WITH_TOKENS)
    ]


def text(result: dict[str, Any]) -> str:
    lines = [
        "| training step | ms | against | time ratio (quartiles) | images/s |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    for what, base in result["compared"]:
        median = statistics.median(result["seconds"][what])
        middle, low, high = against(result, what, base)
        compared = "| |" if what == base else f"{base} | {middle:.3f} ({low:.3f} to {high:.3f}) |"
        lines.append(f"| {what} | {1000 * median:.0f} | {compared} {result['batch'] / median:.1f} |")
    share = result["macs"]["slim"] / result["macs"]["dense"]
    return "\n".join(
        [
            *lines,
            "",
            verdicts(targets(result)),
            "",
            f"{result['model']}, slim at {share:.0%} of the MACs, batches of {result['batch']}, {result['precision']}, "
            f"on {result['device']}; {result['rounds']} rounds of a step of each, ratios within a round. Measured by "
            "`python benchmarks/training.py`.",
        ]
    )


def figure(result: dict[str, Any]) -> Figure:
    """How long each step takes, as a share of the dense one's in the same round."""
    names = [what for what, _ in result["compared"]][::-1]
    shares = [against(result, what, "dense")[0] for what in names]
    picture, (panel,) = style.new_figure(style.WIDTH + 1.6, 0.3 * len(names) + 0.8)
    colours = [style.ORANGE if "teacher" in what else style.BLUE for what in names]
    panel.barh(names, shares, color=colours, height=0.6)
    panel.axvline(1, color=style.GRAY, linewidth=0.8)
    for place, share in enumerate(shares):
        panel.annotate(f"{share:.2f}", (share, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
    panel.margins(x=0.1)
    style.plain(panel, f"Training step of {result['model']}, dense = 1")
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="a timm model (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="images per step (default: 64; quick: 16)")
    parser.add_argument("--rounds", type=int, help="timed steps of each way (default: 30; quick: 8)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast")
    parser.add_argument("--quick", action="store_true", help="about two minutes on two cores; pages stay as they are")
    parser.add_argument("--table-only", action="store_true", help="draw and write from the JSON that is there")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    batch, rounds = (16, 8) if arguments.quick else (64, 30)
    batch, rounds = arguments.batch or batch, arguments.rounds or rounds
    measured = partial(measure, arguments.model, batch, rounds, arguments.precision)
    publish("training", arguments, measured, figure, text)


if __name__ == "__main__":
    main()
