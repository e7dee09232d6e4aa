"""How do scoring, planning and slimming grow with the model and with the images? Seconds and peak memory of each step.

    .venv/bin/python benchmarks/scale.py
    .venv/bin/python benchmarks/scale.py --quick

Models (random weights: time does not depend on them) from DeiT-T to ViT-L are scored on random images, planned by the
uniform policy at 0.6 of the MACs, and slimmed; one of them is scored on more and more images, too. Each runs in a
process of its own, for its peak memory. A slope is that of a straight line through the logarithms: 1 is linear.
Leaves ``benchmarks/results/scale.json``, ``.png`` and the table in ``docs/benchmarks.md``; ``--quick`` only prints its
table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from pages import publish
from targets import Target, verdicts
from tqdm.auto import tqdm

import lightning_mdc as mdc
from lightning_mdc.budget import num_params
from lightning_mdc.figures.numbers import scaled
from lightning_mdc.figures.style import BLUE, GRAY, GREEN, ORANGE, new_figure, plain

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "vit_large_patch16_224")
STEPS = {"score": BLUE, "plan": GREEN, "slim": ORANGE}
STEEPEST = 1.1  # linear, up to noise
GIB = 2**30
REPEATS = 3  # of the short steps


def measured(
    name: str, criterion: str, images: int, batch: int, only_score: bool, threads: int | None
) -> dict[str, Any]:
    """Seconds of each step and peak memory in bytes; runs in a process of its own."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    size = model.pretrained_cfg["input_size"]
    batches = [torch.randn(batch, *size) for _ in range(images // batch)]
    with torch.no_grad():
        model(batches[0][:1])  # kernels are chosen at the first pass
    start = time.perf_counter()
    scores = mdc.score(model, batches, criterion, progress=False)
    seconds = {"score": time.perf_counter() - start}
    facts = {"macs": mdc.macs(model), "params": num_params(model)}
    if not only_score:
        taken: dict[str, list[float]] = {"plan": [], "slim": []}
        for _ in range(REPEATS):
            start = time.perf_counter()
            plan = mdc.make_plan(model, scores, mdc.uniform_policy(model, 0.6))
            planned = time.perf_counter()
            mdc.slim(model, plan)
            taken["plan"].append(planned - start)
            taken["slim"].append(time.perf_counter() - planned)
        seconds |= {step: statistics.median(values) for step, values in taken.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"model": name, "images": images, "seconds": seconds, "memory": peak, **facts}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    by_model = [(name, arguments.images[0], False) for name in arguments.models]
    by_images = [(arguments.model_of_images, images, True) for images in arguments.images]
    rows: dict[str, list[dict[str, Any]]] = {"models": [], "images": []}
    with tqdm(desc="Scale", total=len(by_model) + len(by_images), unit="process") as progress:
        for where, wanted in (("models", by_model), ("images", by_images)):
            for name, images, only_score in wanted:
                progress.set_postfix_str(f"{name}, {images} images")
                batch = min(arguments.batch, images)
                asked = (name, arguments.criterion, images, batch, only_score, arguments.threads)
                with context.Pool(1) as one:
                    rows[where].append(one.apply(measured, asked))
                progress.update()
    threads = arguments.threads or torch.get_num_threads()
    result = {"criterion": arguments.criterion, "threads": threads, "batch": arguments.batch, "rows": rows}
    result["slopes"] = slopes(rows)
    result["targets"] = [target.facts() for target in targets(result)]
    return result


def slopes(rows: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """By what is measured, against what: of the straight line through the logarithms."""

    def slope(x: list[float], y: list[float]) -> float:
        return float(np.polyfit(np.log(x), np.log(y), 1)[0])

    models, images = rows["models"], rows["images"]
    against = {"score": "macs", "plan": "params", "slim": "params"}
    found = {
        f"{step} against {size}": slope([row[size] for row in models], [row["seconds"][step] for row in models])
        for step, size in against.items()
    }
    found["peak memory against params"] = slope([row["params"] for row in models], [row["memory"] for row in models])
    if len(images) > 1:
        count = [row["images"] for row in images]
        found["score against images"] = slope(count, [row["seconds"]["score"] for row in images])
        found["peak memory against images"] = slope(count, [row["memory"] for row in images])
    return found


def targets(result: dict[str, Any]) -> list[Target]:
    found = [Target(f"slope of {what}", slope, "<=", STEEPEST) for what, slope in result["slopes"].items()]
    largest = max(result["rows"]["models"], key=lambda row: row["params"])
    what = f"GiB to score, plan and slim {largest['model']} ({largest['params'] / 1e6:.0f} M parameters)"
    return [*found, Target(what, largest["memory"] / GIB, "<=", 16)]


def text(result: dict[str, Any]) -> str:
    """The table, targets, and how it was measured."""
    lines = [
        "| model | parameters | MACs | images | score | plan | slim | peak memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in [*result["rows"]["models"], *result["rows"]["images"]]:
        cells = [f"{row['seconds'][step]:.2f} s" if step in row["seconds"] else "" for step in STEPS]
        lines.append(
            f"| {row['model']} | {row['params'] / 1e6:.1f} M | {scaled(row['macs'])} | {row['images']} | "
            f"{' | '.join(cells)} | {row['memory'] / GIB:.2f} GiB |"
        )
    return "\n".join(
        [
            *lines,
            "",
            verdicts(targets(result)),
            "",
            f"Scores of all three dimensions by `{result['criterion']}` in batches of {result['batch']} images, "
            f"uniform policy at 60 % of the MACs, {result['threads']} CPU thread(s), a process for each row, whose "
            "peak memory it is (images and the slim copy included). A slope is that of a straight line through the "
            "logarithms. Measured by `python benchmarks/scale.py`.",
        ]
    )


def figure(result: dict[str, Any]) -> Figure:
    """Log-log: seconds against MACs and against images, memory against parameters; a dashed line is linear."""
    models, images = result["rows"]["models"], result["rows"]["images"]
    picture, panels = new_figure(10.8, 3.2, columns=3)
    for step, colour in STEPS.items():
        panels[0].plot(
            [r["macs"] for r in models], [r["seconds"][step] for r in models], "o-", color=colour, label=step
        )
    panels[1].plot([r["images"] for r in images], [r["seconds"]["score"] for r in images], "o-", color=BLUE)
    panels[2].plot([r["params"] for r in models], [r["memory"] / GIB for r in models], "o-", color=BLUE)
    titles = (("seconds", "MACs of the model"), ("seconds to score", "images"), ("GiB at most", "parameters"))
    for panel, (title, axis) in zip(panels, titles, strict=True):
        panel.set_xscale("log")
        panel.set_yscale("log")
        x, y = panel.lines[0].get_xdata(), panel.lines[0].get_ydata()
        panel.plot(x, [y[0] * value / x[0] for value in x], "--", color=GRAY, label="linear")
        plain(panel, title)
        panel.set_xlabel(axis)
    panels[0].legend(frameon=False, fontsize=8)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="DeiT-T, DeiT-S and ViT-L on 8 images, and 8 to 32 images")
    parser.add_argument("--models", nargs="+", help=f"of timm (default: {' '.join(MODELS)})")
    parser.add_argument("--images", nargs="+", type=int, help="the first for every model (default: 64 128 256)")
    parser.add_argument("--model-of-images", default=MODELS[0], help="scored on all of them (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="images per batch (default: 64; quick: 8)")
    parser.add_argument(
        "--criterion", help="(default: conditional; quick: hsic, as conditional takes minutes for ViT-L)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--table-only", action="store_true", help="draw and write from the JSON that is there")
    arguments = parser.parse_args()
    thorough: dict[str, Any] = {"models": MODELS, "images": [64, 128, 256], "batch": 64, "criterion": "conditional"}
    quick = {"models": [*MODELS[:2], MODELS[3]], "images": [8, 16, 32], "batch": 8, "criterion": "hsic"}
    for name, value in (quick if arguments.quick else thorough).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if wrong := [images for images in arguments.images if images % min(arguments.batch, images)]:
        parser.error(f"--images {wrong}: give multiples of --batch {arguments.batch}")
    publish("scale", arguments, partial(measure, arguments), figure, text)


if __name__ == "__main__":
    main()
