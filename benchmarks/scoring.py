"""What does scoring cost? Of all heads, neurons and tokens, by each criterion, against a forward pass and other ways.

    .venv/bin/python benchmarks/scoring.py
    .venv/bin/python benchmarks/scoring.py --quick

Scores a model (random weights: time does not depend on them) on batches of random images, 512 in all, and times, in
turns, the bare forward pass of the same batches, `mdc.score` by each of our criteria that needs images, and
Torch-Pruning's Taylor importance with its own forward and backward pass. `conditional`, which is `fisher` without a
backward pass, is also shown with moments of all of each image's patch tokens; its elimination costs the same however
many images there are. The textbook way, `mdc.hsic` called for one unit after the other, is timed on some neurons of
every block and on all heads and positions, and neurons are multiplied up: each costs the same. Memory is the peak of a
process of its own.

Leaves ``benchmarks/results/scoring.json``, ``.png`` and the table in ``docs/benchmarks.md``; ``--quick`` only prints
its table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pages import publish
from targets import Target, verdicts
from torch import Tensor, nn
from tqdm.auto import tqdm

import lightning_mdc as mdc
from lightning_mdc.figures.style import BLUE, GRAY, new_figure, plain
from lightning_mdc.models import find_anatomy
from lightning_mdc.policy import TOKENS, default_stages

FORWARD, LOOP, PEER = "forward pass", "hsic, a unit at a time", "Torch-Pruning: Taylor"
PLAIN, OURS = "ours: conditional", "ours: hsic"  # hsic is what the loop is about
ALL = "ours: conditional, all tokens"  # else moments are of some of each image's patch tokens
# Scoring by `conditional` / forward pass that is aimed at: of some tokens and of all.
AIMS = {"deit_small_patch16_224": (1.5, 1.9), "deit_base_patch16_224": (2.0, 2.3)}
OTHERS = ("fisher", "activation", "taylor")  # our other criteria that need images
SAMPLED = 8  # neurons per block of the loop


def model_and_batches(name: str, batch: int, batches: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    size = model.pretrained_cfg["input_size"]
    return model, [(torch.randn(batch, *size), torch.randint(model.num_classes, (batch,))) for _ in range(batches)]


# --- ways to look at the batches --------------------------------------------------------------------------------------


def forward(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for images, _ in batches:
            model(images)


def scored(criterion: str, **options: Any) -> Callable[[nn.Module, list[tuple[Tensor, Tensor]]], None]:
    def run(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
        mdc.score(model, batches, criterion, progress=False, **options)

    return run


def torch_pruning_taylor(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Gradients of the loss over all batches, and the importance of every neuron and head."""
    try:
        import torch_pruning as tp
    except ImportError as error:
        raise SystemExit("Torch-Pruning is missing: pip install -e '.[bench]', or leave it out by --no-peer") from error
    model.zero_grad()
    for images, labels in batches:
        F.cross_entropy(model(images), labels).backward()
    importance = tp.importance.GroupTaylorImportance()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the class token is no layer
        graph = tp.DependencyGraph().build_dependency(model, batches[0][0][:1])
    for block in model.blocks:
        for layer in (block.mlp.fc1, block.attn.qkv):
            units = list(range(layer.out_features))
            importance(graph.get_pruning_group(layer, tp.prune_linear_out_channels, units))
    model.zero_grad()


RUNS: dict[str, Callable[[nn.Module, list[tuple[Tensor, Tensor]]], None]] = {
    FORWARD: forward,
    PLAIN: scored("conditional"),
    ALL: scored("conditional", moment_tokens="all"),
    OURS: scored("hsic"),
    **{f"ours: {criterion}": scored(criterion) for criterion in OTHERS},
    PEER: torch_pruning_taylor,
}


def loop_seconds(model: nn.Module, batch: tuple[Tensor, Tensor], sampled: int) -> float:
    """Seconds of the textbook way on one batch, the forward pass left out; neurons of a sample, multiplied up."""
    anatomy = find_anatomy(model)
    seen: dict[tuple[str, int], Tensor] = {}

    def keep(dimension: str, block: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor], output: Tensor | None = None) -> None:
            seen[dimension, block] = args[0] if output is None else output

        return hook

    hooks = [units.reader.register_forward_pre_hook(keep(units.dimension, units.block)) for units in anatomy.all_units]
    for block in default_stages(anatomy.depth):
        point = anatomy.blocks[block].point
        assert point
        hooks.append(point.values.module.register_forward_hook(keep(TOKENS, block)))
    with torch.no_grad():
        prediction = model(batch[0]).softmax(-1)
    for hook in hooks:
        hook.remove()
    seconds = 0.0
    for (dimension, number), x in seen.items():
        block = anatomy.blocks[number]
        times, start = 1.0, time.perf_counter()
        if dimension == TOKENS:
            assert block.point
            values = x[:, anatomy.num_prefix_tokens :, block.point.values.start : block.point.values.stop]
            for position in range(values.shape[1]):
                mdc.hsic(values[:, position], prediction)
        else:
            units = block.units[dimension]
            means = x.unflatten(-1, (units.count, units.width)).mean(-1)
            few = units.count if units.width > 1 else sampled
            times = units.count / few
            for unit in range(few):
                mdc.hsic(means[..., unit], prediction)
        seconds += times * (time.perf_counter() - start)
    return seconds


def peak_memory(name: str, what: str, batch: int, threads: int | None) -> float:
    """Peak bytes of a process that does this and nothing else, on one batch."""
    if threads is not None:
        torch.set_num_threads(threads)
    model, batches = model_and_batches(name, batch, 1)
    RUNS[what](model, batches)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    always = (FORWARD, PLAIN, ALL, OURS)
    runs = [what for what in RUNS if what in always or (arguments.peer if what == PEER else not arguments.quick)]
    readings: dict[str, list[float]] = {what: [] for what in (*runs, LOOP)}
    memory: dict[str, float] = {}
    context = multiprocessing.get_context("spawn")
    with tqdm(desc="Scoring", total=len(runs) * (arguments.rounds + 2) + 1, unit="run") as progress:
        # First: a new process starts with the peak of the one that it comes from, which is small as yet.
        for what in runs:
            with context.Pool(1) as one:
                memory[what] = one.apply(peak_memory, (arguments.model, what, arguments.batch, arguments.threads))
            progress.update()
        model, batches = model_and_batches(arguments.model, arguments.batch, arguments.batches)
        for what in runs:
            RUNS[what](model, [(images[:4], labels[:4]) for images, labels in batches])
            progress.update()
        for _ in range(arguments.rounds):
            for what in runs:
                start = time.perf_counter()
                RUNS[what](model, batches)
                readings[what].append(time.perf_counter() - start)
                progress.update()
        # Once: it takes longest, and is far from its target.
        readings[LOOP].append(loop_seconds(model, batches[0], arguments.sampled) * len(batches))
        progress.update()
    # Each reading against the forward pass just before it: a machine that becomes busier does so for both.
    ratios = {
        what: statistics.median(mine / base for mine, base in zip(readings[what], readings[FORWARD], strict=True))
        for what in runs
    }
    seconds = {what: statistics.median(taken) for what, taken in readings.items()}
    # What the loop needs on top of the forward pass, against what ours needs on top of it.
    extra = max((ratios[OURS] - 1) * seconds[FORWARD], 1e-9)
    result = {
        "model": arguments.model,
        "batch": arguments.batch,
        "batches": arguments.batches,
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "sampled_neurons": arguments.sampled,
        "readings": readings,
        "seconds": seconds,
        "ratios": ratios,
        "memory": memory,
        "loop_against_ours": {
            "with the forward pass": (seconds[FORWARD] + seconds[LOOP]) / (ratios[OURS] * seconds[FORWARD]),
            "without": seconds[LOOP] / extra,
        },
    }
    result["targets"] = [target.facts() for target in targets(result)]
    return result


def targets(result: dict[str, Any]) -> list[Target]:
    model = result["model"]
    ratios = result["ratios"]
    aims = [pair for pair in zip((PLAIN, ALL), AIMS.get(model, ()), strict=False) if pair[0] in ratios]
    return [
        *(Target(f"{what[6:]} / forward pass, {model}", ratios[what], "<=", aim) for what, aim in aims),
        Target(f"hsic / forward pass, {model}", ratios[OURS], "<=", 1.15),
        Target("units at a time / ours, the forward pass left out", result["loop_against_ours"]["without"], ">=", 15),
        Target("peak memory / forward pass", result["memory"][OURS] / result["memory"][FORWARD], "<=", 1.5),
    ]


def text(result: dict[str, Any]) -> str:
    """The table, targets, and how it was measured."""
    lines = ["| scoring | seconds | against a forward pass | peak memory |", "| --- | ---: | ---: | ---: |"]
    forward_seconds = result["seconds"][FORWARD]
    for what in (what for what in (*RUNS, LOOP) if what in result["seconds"]):
        seconds = result["seconds"][what]
        if what == LOOP:
            total = seconds + forward_seconds
            lines.append(f"| {what} | {total:.1f} (estimated) | {total / forward_seconds:.2f}x | |")
        else:
            memory = result["memory"][what] / 2**20
            lines.append(f"| {what} | {seconds:.2f} | {result['ratios'][what]:.2f}x | {memory:.0f} MiB |")
    return "\n".join(
        [
            *lines,
            "",
            verdicts(targets(result)),
            "",
            f"{result['model']}, {result['batches']} x {result['batch']} images, {result['threads']} CPU thread(s); "
            f"medians of {result['rounds']} readings taken in turns, ratios reading by reading. A unit at a time: "
            f"`mdc.hsic` for all heads and positions and {result['sampled_neurons']} neurons of every block, "
            "multiplied up. Torch-Pruning scores the channels of heads and neurons, no tokens. Memory is of the whole "
            "process. Measured by `python benchmarks/scoring.py`.",
        ]
    )


def figure(result: dict[str, Any]) -> Figure:
    """Time and memory against the forward pass, a bar each."""
    picture, panels = new_figure(9.6, 2.8, columns=2)
    ratios = result["ratios"] | {LOOP: 1 + result["seconds"][LOOP] / result["seconds"][FORWARD]}
    memory = {what: value / result["memory"][FORWARD] for what, value in result["memory"].items()}
    for panel, values, title in zip(panels, (ratios, memory), ("time", "peak memory"), strict=True):
        names = [what for what in (*RUNS, LOOP) if what in values][::-1]
        colours = [BLUE if name in (PLAIN, ALL, OURS) else GRAY for name in names]
        panel.barh(names, [values[name] for name in names], color=colours)
        for row, name in enumerate(names):
            panel.annotate(f"{values[name]:.2f}", (values[name], row), (3, 0), textcoords="offset points", va="center")
        plain(panel, f"{title} / that of a forward pass")
        panel.margins(x=0.12)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="DeiT-T, 3 readings of the most important ways")
    parser.add_argument("--model", help="of timm (default: deit_small_patch16_224; quick: deit_tiny_patch16_224)")
    parser.add_argument("--batch", type=int, help="images per batch (default: 64; quick: 16)")
    parser.add_argument("--batches", type=int, help="batches per reading (default: 8; quick: 2)")
    parser.add_argument("--rounds", type=int, help="readings of each (default: 5; quick: 3)")
    parser.add_argument("--sampled", type=int, default=SAMPLED, help="neurons per block of the loop (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="without Torch-Pruning")
    parser.add_argument("--table-only", action="store_true", help="draw and write from the JSON that is there")
    arguments = parser.parse_args()
    arguments.model = arguments.model or f"deit_{'tiny' if arguments.quick else 'small'}_patch16_224"
    arguments.batch = arguments.batch or (16 if arguments.quick else 64)
    arguments.batches = arguments.batches or (2 if arguments.quick else 8)
    arguments.rounds = arguments.rounds or (3 if arguments.quick else 5)
    publish("scoring", arguments, partial(measure, arguments), figure, text)


if __name__ == "__main__":
    main()
