"""How much faster is a slim model really? Against the dense one, against what its MACs promise, and against a peer's.

    .venv/bin/python benchmarks/slim_speed.py
    .venv/bin/python benchmarks/slim_speed.py --resume      # goes on where it was stopped
    .venv/bin/python benchmarks/slim_speed.py --quick

Dense models (random weights: time does not depend on them) against their slim forms at 0.6 and 0.4 of the MACs by the
uniform policy: with heads, neurons and tokens, without tokens, the same with neurons in any number instead of multiples
of 8, and against Torch-Pruning's model with as many heads and neurons. In PyTorch as written and compiled (where there
is a C++ compiler), as an exported program, and in ONNX Runtime. Readings are taken in turns. The ideal speed-up is
dense MACs / slim MACs. Leaves ``benchmarks/results/slim_speed.json``, ``.png`` and the table in README.md; ``--quick``
only prints its table.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peers
import timm
import torch
from matplotlib.figure import Figure
from readme import folder_of, publish
from targets import Target, verdicts
from torch import Tensor, nn
from tqdm.auto import tqdm

import lightning_mdc as mdc
from lightning_mdc.budget.timing import latencies
from lightning_mdc.export import INPUT, OUTPUT, export_model
from lightning_mdc.figures.style import BLUE, GRAY, GREEN, ORANGE, PURPLE, new_figure, plain

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "t2t_vit_14")
BUDGETS = (0.6, 0.4)
DENSE, ALL, UNITS, PEER = "dense", "heads, neurons, tokens", "heads, neurons", "Torch-Pruning"
ODD = "heads, neurons, odd widths"
COLOURS = {ALL: BLUE, UNITS: ORANGE, ODD: PURPLE, PEER: GRAY}
# Measured in PyTorch as written only.
ONCE = (ODD, PEER)
# Of the ideal speed-up at the largest batch, in PyTorch as written.
WANTED = {UNITS: 0.95, ALL: 0.9}


# --- models -----------------------------------------------------------------------------------------------------------


def variants(name: str, peer: bool) -> dict[str, nn.Module]:
    """The dense model and its slim forms, by ``kind`` or ``kind at budget``."""
    torch.manual_seed(0)
    dense = timm.create_model(name).eval()
    scores = mdc.score(dense, criterion="random")
    found = {DENSE: dense}
    units = ("heads", "neurons")
    for budget in BUDGETS:
        for kind, dimensions, round_to in ((ALL, None, None), (ODD, units, 1), (UNITS, units, None)):
            policy = mdc.uniform_policy(dense, budget, dimensions=dimensions, round_to=round_to)
            found[f"{kind} at {budget}"] = mdc.slim(dense, mdc.make_plan(dense, scores, policy))
        if peer:
            found[f"{PEER} at {budget}"] = peers.torch_pruning(dense, policy, "magnitude")  # that of heads and neurons
    return found


# --- ways to run them -------------------------------------------------------------------------------------------------


class Program(nn.Module):
    """Anything that maps images to logits, as a module without layers of its own."""

    def __init__(self, run: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.run = (run,)  # in a tuple, so that an exported module is not switched to eval mode, which it refuses
        self.where = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> Any:
        return self.run[0](images)


def eager(model: nn.Module, folder: Path) -> nn.Module:
    return model


def compiled(model: nn.Module, folder: Path) -> nn.Module:
    # They share their code, and beyond this many kinds and batch sizes of it PyTorch would go on uncompiled.
    torch._dynamo.config.recompile_limit = 64
    return Program(torch.compile(copy.deepcopy(model).eval(), dynamic=False))


def exported(model: nn.Module, folder: Path) -> nn.Module:
    path = folder / "model.pt2"
    export_model(model, path, progress=False)
    return Program(torch.export.load(path).module())


def onnx_runtime(model: nn.Module, folder: Path) -> nn.Module:
    import onnxruntime

    path = folder / "model.onnx"
    export_model(model, path, progress=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as many as PyTorch has
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Program(lambda images: session.run([OUTPUT], {INPUT: images.numpy()}))


RUNTIMES: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "eager": eager,
    "compiled": compiled,
    "exported": exported,
    "onnx": onnx_runtime,
}


def missing(runtime: str) -> str | None:
    """Why this machine cannot run it."""
    if runtime == "compiled" and not any(
        shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")
    ):
        return "no C++ compiler"
    if runtime == "onnx":
        absent = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} not installed" if absent else None
    return None


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    left_out = {runtime: why for runtime in arguments.runtimes if (why := missing(runtime))}
    runtimes = [runtime for runtime in arguments.runtimes if runtime not in left_out]
    kept = folder_of(arguments.quick) / "slim_speed.rows.jsonl"  # what a run that is stopped leaves
    kept.parent.mkdir(parents=True, exist_ok=True)
    if not arguments.resume:
        kept.unlink(missing_ok=True)
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(row["model"], row["runtime"], row["batch"]) for row in rows}
    shown = tqdm(desc="Slim speed", total=len(arguments.models) * len(runtimes) * len(arguments.batches), unit="round")
    with shown as progress, tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            models = variants(name, arguments.peer)
            macs = {kind: mdc.macs(model) for kind, model in models.items() if not kind.startswith(PEER)}
            for budget in BUDGETS if arguments.peer else ():
                macs[f"{PEER} at {budget}"] = macs[f"{UNITS} at {budget}"]
            size = models[DENSE].pretrained_cfg["input_size"]
            for runtime in runtimes:
                left = [batch for batch in arguments.batches if (name, runtime, batch) not in done]
                progress.update(len(arguments.batches) - len(left))
                if not left:
                    continue
                wanted = {k: m for k, m in models.items() if runtime == "eager" or not k.startswith(ONCE)}
                programs = {kind: RUNTIMES[runtime](model, Path(folder)) for kind, model in wanted.items()}
                for batch in left:
                    seconds = latencies(programs, batch, size, rounds=arguments.rounds)
                    found = [
                        {
                            "model": name,
                            "runtime": runtime,
                            "batch": batch,
                            "rounds": arguments.rounds,
                            "kind": kind.split(" at ")[0],
                            "budget": float(kind.split(" at ")[1]) if " at " in kind else 1.0,
                            "macs": macs[kind],
                            "seconds_per_image": seconds[kind],
                            "speed_up": seconds[DENSE] / seconds[kind],
                            "ideal": macs[DENSE] / macs[kind],
                        }
                        for kind in programs
                    ]
                    with kept.open("a") as file:
                        file.write("".join(json.dumps(row) + "\n" for row in found))
                    rows += found
                    progress.update()
                del programs
                torch.compiler.reset()
    # In the order in which they would be if nothing had been stopped.
    cells = [(name, runtime, batch) for name in arguments.models for runtime in runtimes for batch in arguments.batches]
    rows = [row for cell in cells for row in rows if (row["model"], row["runtime"], row["batch"]) == cell]
    result = {
        "threads": torch.get_num_threads(),
        "left_out": left_out,
        "rows": rows,
    }
    result["targets"] = [target.facts() for target in targets(result)]
    return result


def targets(result: dict[str, Any]) -> list[Target]:
    rows = [row for row in result["rows"] if row["runtime"] == "eager"]
    largest = max(row["batch"] for row in rows)
    found = []
    for kind, wanted in WANTED.items():
        for model in dict.fromkeys(row["model"] for row in rows):
            mine = [r for r in rows if r["batch"] == largest and r["kind"] == kind and r["model"] == model]
            found += [
                Target(
                    f"speed-up / ideal, {model}, {kind}, {row['budget']:.0%} of the MACs, batch {largest}",
                    row["speed_up"] / row["ideal"],
                    ">=",
                    wanted,
                )
                for row in mine
            ]
    ones = [row for row in rows if row["batch"] == 1 and row["kind"] in WANTED]
    if ones:
        slowest = min(ones, key=lambda row: row["speed_up"])
        what = f"least speed-up at batch 1 ({slowest['model']}, {slowest['kind']}, {slowest['budget']:.0%})"
        found.append(Target(what, slowest["speed_up"], ">=", 1))
    return found


def table(result: dict[str, Any]) -> str:
    """The README's table, targets, and how it was measured."""
    batches = sorted({row["batch"] for row in result["rows"]})
    lines = [
        "| model | runtime | kept | MACs | ideal | " + " | ".join(f"batch {batch}" for batch in batches) + " |",
        "| --- | --- | --- | ---: | ---: |" + " ---: |" * len(batches),
    ]
    grouped: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in result["rows"]:
        key = tuple(row[name] for name in ("model", "runtime", "kind", "budget"))
        grouped.setdefault(key, {})[row["batch"]] = row
    for (model, runtime, kind, _), by_batch in grouped.items():
        first = next(iter(by_batch.values()))
        if kind == DENSE:
            shown = {batch: f"{1000 * row['seconds_per_image']:.2f} ms" for batch, row in by_batch.items()}
        else:
            shown = {batch: f"{row['speed_up']:.2f}x" for batch, row in by_batch.items()}
        cells = [shown.get(batch, "") for batch in batches]
        share = "100 %" if kind == DENSE else f"{1 / first['ideal']:.0%}".replace("%", " %")
        ideal = "" if kind == DENSE else f"{first['ideal']:.2f}x"
        lines.append(f"| {model} | {runtime} | {kind} | {share} | {ideal} | {' | '.join(cells)} |")
    rounds = [row["rounds"] for row in result["rows"]]
    readings = " to ".join(str(count) for count in dict.fromkeys((min(rounds), max(rounds))))
    left_out = "".join(f" Left out: {runtime} ({why})." for runtime, why in result["left_out"].items())
    return "\n".join(
        [
            *lines,
            "",
            verdicts(targets(result)),
            "",
            f"Dense: milliseconds an image; others: speed-up against dense. {result['threads']} CPU thread(s), fp32, "
            f"medians of {readings} readings taken in turns; uniform policies, random weights. Torch-Pruning's "
            f"models have as many heads and neurons as ours in each block.{left_out} Measured by "
            "`python benchmarks/slim_speed.py`.",
        ]
    )


def figure(result: dict[str, Any]) -> Figure:
    """What each slim model reaches of its ideal speed-up, a panel per batch size; eager."""
    rows = [row for row in result["rows"] if row["runtime"] == "eager" and row["kind"] != DENSE]
    batches = sorted({row["batch"] for row in rows})
    groups = list(dict.fromkeys((row["model"], row["budget"]) for row in rows))
    kinds = [kind for kind in COLOURS if any(row["kind"] == kind for row in rows)]
    picture, panels = new_figure(9.6, 2.6 * len(batches), rows=len(batches))
    for panel, batch in zip(panels, batches, strict=True):
        reached = {
            (row["model"], row["budget"], row["kind"]): row["speed_up"] / row["ideal"]
            for row in rows
            if row["batch"] == batch
        }
        for number, kind in enumerate(kinds):
            places = [place + 0.8 * ((number + 0.5) / len(kinds) - 0.5) for place in range(len(groups))]
            heights = [reached.get((*group, kind), 0.0) for group in groups]
            panel.bar(places, heights, 0.72 / len(kinds), color=COLOURS[kind], label=kind)
        panel.axhline(1, color=GREEN, linewidth=1)
        panel.set_xlim(-0.6, len(groups) - 0.4)
        end: Any = ("axes fraction", "data")
        panel.annotate("ideal", (1, 1), (4, 0), xycoords=end, textcoords="offset points", color=GREEN, va="center")
        names = [f"{model.removesuffix('_patch16_224')}\n{budget:.0%} of MACs" for model, budget in groups]
        panel.set_xticks(range(len(groups)), names, fontsize=8)
        panel.set_ylabel("speed-up / ideal")
        plain(panel, f"batch {batch}")
    picture.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(kinds), frameon=False)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="DeiT-T, batches of 1 and 16, eager and ONNX")
    parser.add_argument("--models", nargs="+", help=f"of timm (default: {' '.join(MODELS)})")
    parser.add_argument("--batches", nargs="+", type=int, help="images per pass (default: 1 64; quick: 1 16)")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, help="default: all; quick: eager onnx")
    parser.add_argument("--rounds", type=int, help="readings of each (default: 15; quick: 7)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="without Torch-Pruning")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped; same arguments")
    parser.add_argument("--table-only", action="store_true", help="draw and write from the JSON that is there")
    arguments = parser.parse_args()
    thorough: dict[str, Any] = {"models": MODELS, "batches": [1, 64], "runtimes": list(RUNTIMES), "rounds": 15}
    quick = {"models": MODELS[:1], "batches": [1, 16], "runtimes": ["eager", "onnx"], "rounds": 7}
    for name, value in (quick if arguments.quick else thorough).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    publish("slim_speed", arguments, partial(measure, arguments), figure, table)


if __name__ == "__main__":
    main()
