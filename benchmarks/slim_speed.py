"""How much faster is a slim model really? Against the dense one, against what its MACs promise, and against a peer's.

    .venv/bin/python benchmarks/slim_speed.py
    .venv/bin/python benchmarks/slim_speed.py --resume      # goes on where it was stopped
    .venv/bin/python benchmarks/slim_speed.py --quick

Dense models (random weights: time does not depend on them) against their slim forms at 0.6 and 0.4 of the MACs by the
uniform policy: with heads, neurons and tokens, without tokens, the same with neurons in any number instead of multiples
of 8, and against Torch-Pruning's model with as many heads and neurons. In PyTorch as written and compiled (where there
is a C++ compiler), as an exported program, and in ONNX Runtime. Readings are taken in turns. The ideal speed-up is
dense MACs / slim MACs. Leaves ``benchmarks/results/slim_speed.json``, ``.png``, every reading in ``.csv``, and the
headline in ``docs/benchmarks.md``; ``--quick`` only prints its headline.
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
from typing import Any, TypeAlias

import peers
import timm
import torch
from matplotlib.figure import Figure
from pages import folder_of, publish
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

Cell: TypeAlias = tuple[str, str, int]  # model, runtime, images per pass: what is measured in one go


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
            policy = mdc.uniform_policy(dense, budget, dimensions, mdc.Space(round_to=round_to))
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
    kept = rows_so_far(arguments.quick)
    kept.parent.mkdir(parents=True, exist_ok=True)
    if not arguments.resume:
        kept.unlink(missing_ok=True)
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {cell_of(row) for row in rows}
    cells = [(name, runtime, batch) for name in arguments.models for runtime in runtimes for batch in arguments.batches]
    left = [cell for cell in cells if cell not in done]
    bar = tqdm(desc="Slim speed", initial=len(cells) - len(left), total=len(cells), unit="round")
    with bar, tempfile.TemporaryDirectory() as folder:
        for name in dict.fromkeys(name for name, _, _ in left):
            models = variants(name, arguments.peer)
            for runtime in dict.fromkeys(runtime for of, runtime, _ in left if of == name):
                wanted = {k: m for k, m in models.items() if runtime == "eager" or not k.startswith(ONCE)}
                programs = {kind: RUNTIMES[runtime](model, Path(folder)) for kind, model in wanted.items()}
                for batch in [batch for *where, batch in left if where == [name, runtime]]:
                    found = measured(programs, models, (name, runtime, batch), arguments.rounds)
                    with kept.open("a") as file:
                        file.write("".join(json.dumps(row) + "\n" for row in found))
                    rows += found
                    bar.update()
                del programs
                torch.compiler.reset()
    # In the order in which they would be if nothing had been stopped.
    rows = [row for cell in cells for row in rows if cell_of(row) == cell]
    result = {"threads": torch.get_num_threads(), "left_out": left_out, "rows": rows}
    result["targets"] = [target.facts() for target in targets(result)]
    return result


def rows_so_far(quick: bool) -> Path:
    """What a run that is stopped leaves."""
    return folder_of(quick) / "slim_speed.rows.jsonl"


def cell_of(row: dict[str, Any]) -> Cell:
    return row["model"], row["runtime"], row["batch"]


def measured(
    programs: dict[str, nn.Module], models: dict[str, nn.Module], cell: Cell, rounds: int
) -> list[dict[str, Any]]:
    """The rows of one cell: of each of the programs that one runtime has made of one model's forms."""
    name, runtime, batch = cell
    # Torch-Pruning's forms are of layers that no family of ours need know; they have the MACs of ours, checked there.
    macs = {kind: mdc.macs(models[kind.replace(PEER, UNITS)]) for kind in programs}
    seconds = latencies(programs, batch, models[DENSE].pretrained_cfg["input_size"], rounds=rounds)
    return [
        {
            "model": name,
            "runtime": runtime,
            "batch": batch,
            "rounds": rounds,
            "kind": kind.split(" at ")[0],
            "budget": float(kind.split(" at ")[1]) if " at " in kind else 1.0,
            "macs": macs[kind],
            "seconds_per_image": seconds[kind],
            "speed_up": seconds[DENSE] / seconds[kind],
            "ideal": macs[DENSE] / macs[kind],
        }
        for kind in programs
    ]


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


def text(result: dict[str, Any]) -> str:
    """Speed-ups as written at each batch size, of each runtime at the largest one; targets; how it was measured."""
    rows = result["rows"]
    batches = sorted({row["batch"] for row in rows})
    found = {(*cell_of(row), row["kind"], row["budget"]): row["speed_up"] for row in rows}
    kinds = [kind for kind in COLOURS if any(row["kind"] == kind for row in rows)]
    runtimes = list(dict.fromkeys(row["runtime"] for row in rows))
    as_written, by_runtime = [], []
    for name, budget, ideal in slim_forms(rows):
        head = f"| {name.removesuffix('_patch16_224')} | {budget:.0%} | {ideal:.2f}x |".replace("%", " %")

        def cell(runtime: str, batch: int, kind: str, name: str = name, budget: float = budget) -> str:
            speed = found.get((name, runtime, batch, kind, budget))
            return "" if speed is None else f"{speed:.2f}x"

        each = (" / ".join(cell("eager", batch, kind) for batch in batches) for kind in kinds)
        as_written.append(f"{head} {' | '.join(each)} |")
        by_runtime.append(f"{head} {' | '.join(cell(runtime, batches[-1], ALL) for runtime in runtimes)} |")
    rounds = [row["rounds"] for row in rows]
    readings = " to ".join(str(count) for count in dict.fromkeys((min(rounds), max(rounds))))
    left_out = "".join(f" Left out: {runtime} ({why})." for runtime, why in result["left_out"].items())
    start, rule = "| model | MACs | ideal |", "| --- | ---: | ---: |"
    return "\n".join(
        [
            f"As written, at batch {' / '.join(map(str, batches))}:",
            "",
            f"{start} {' | '.join(kinds)} |",
            rule + " ---: |" * len(kinds),
            *as_written,
            "",
            f"{ALL}, at batch {batches[-1]}:",
            "",
            f"{start} {' | '.join(runtimes)} |",
            rule + " ---: |" * len(runtimes),
            *by_runtime,
            "",
            f"Speed-up against the dense model. {result['threads']} CPU thread(s), fp32, medians of {readings} "
            "readings taken in turns; uniform policies, random weights. *Ideal* is what the MACs promise. "
            f"Torch-Pruning's models have as many heads and neurons as ours in each block.{left_out} "
            f"{odd_widths(rows)}Measured by `python benchmarks/slim_speed.py`.",
            "",
            verdicts(targets(result)),
        ]
    )


def slim_forms(rows: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Model, budget and ideal speed-up of all that was slimmed."""
    ideal = {(row["model"], row["budget"]): row["ideal"] for row in rows if row["kind"] != DENSE}
    return [(*which, value) for which, value in ideal.items()]


def odd_widths(rows: list[dict[str, Any]]) -> str:
    """A sentence: what widths in multiples of 8 are worth."""
    largest = max(row["batch"] for row in rows)
    speed = {
        (row["model"], row["budget"], row["kind"]): row["speed_up"]
        for row in rows
        if (row["runtime"], row["batch"]) == ("eager", largest)
    }
    gains = [speed[*which, UNITS] / speed[*which, ODD] - 1 for *which, kind in speed if kind == ODD]
    if not gains:
        return ""
    return (
        f"Neurons in multiples of 8, the default of blocks with 512 or more, make models {min(gains):.0%} to "
        f"{max(gains):.0%} faster at batch {largest} than odd widths do. "
    ).replace("%", " %")


def rows(result: dict[str, Any]) -> list[list[str]]:
    """Every reading, for a CSV file."""
    header = ["model", "runtime", "kind", "budget", "batch", "macs", "ms_per_image", "speed_up", "ideal", "rounds"]
    found = [header]
    for row in result["rows"]:
        numbers = f"{1000 * row['seconds_per_image']:.4f}", f"{row['speed_up']:.3f}", f"{row['ideal']:.3f}"
        names = (row["model"], row["runtime"], row["kind"], f"{row['budget']:g}", str(row["batch"]), str(row["macs"]))
        found.append([*names, *numbers, str(row["rounds"])])
    return found


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
    publish("slim_speed", arguments, partial(measure, arguments), figure, text)
    if not arguments.table_only:
        rows_so_far(arguments.quick).unlink()


if __name__ == "__main__":
    main()
