"""How far off is the latency table? What it says of random policies, against their slim models timed in one piece.

    .venv/bin/python benchmarks/latency.py

Per model and batch size a table is measured anew, then the slim models of 20 random policies (heads, neurons and tokens
of every block drawn by themselves, none of which the table was made from) are timed in turn. Leaves
``benchmarks/results/latency.json`` and ``.png`` and the table in ``docs/benchmarks.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from pages import publish
from targets import Target, verdicts
from torch import Tensor, nn
from tqdm.auto import tqdm

import lightning_mdc as mdc
from lightning_mdc.budget import CostModel, measure_latency_table
from lightning_mdc.budget.measuring import first_units
from lightning_mdc.budget.timing import settled_memory
from lightning_mdc.figures.style import BLUE, COLOURS, GRAY, new_figure, plain
from lightning_mdc.models import find_anatomy

THOROUGH = [(name, batch) for name in ("deit_tiny_patch16_224", "deit_small_patch16_224") for batch in (16, 1)]
QUICK = THOROUGH[:1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="DeiT-T at batch 16 only; pages stay as they are")
    parser.add_argument("--policies", type=int, default=20, help="random policies (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30.0, help="to measure a table (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="readings of each slim model, 2 at least (default: 15, quick: 7)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="cpu", help="where (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the policies")
    parser.add_argument("--table-only", action="store_true", help="draw and write from the JSON that is there")
    arguments = parser.parse_args()
    if arguments.rounds is not None and arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds}: at least 2, whose difference says how well timings repeat")
    arguments.rounds = arguments.rounds or (7 if arguments.quick else 15)
    publish("latency", arguments, partial(measure, arguments), figure, text)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    wanted = QUICK if arguments.quick else THOROUGH
    cases = [measured(name, batch, arguments) for name, batch in tqdm(wanted, desc="Latency", unit="table")]
    return {
        "threads": torch.get_num_threads(),
        "device": cases[0]["about"]["device"],
        "cases": cases,
        "targets": [target.facts() for target in targets(cases)],
    }


def targets(cases: list[dict[str, Any]]) -> list[Target]:
    return [
        Target(
            f"largest relative error over {len(case['policies'])} random policies, {short(case)}",
            case["largest_error"],
            "<=",
            0.10,
        )
        for case in cases
    ]


def measured(name: str, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    model = timm.create_model(name).eval().to(arguments.device)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        found = measure_latency_table(model, batch, cache=cache, seconds=arguments.seconds)
    seconds = time.perf_counter() - begun
    policies = random_policies(arguments.policies, model, arguments.seed)
    anatomy = find_anatomy(model)
    models = {str(number): mdc.slim(model, first_units(anatomy, policy)) for number, policy in enumerate(policies)}
    images = torch.zeros(batch, *anatomy.input_size, device=arguments.device)
    readings = in_turn({"dense": model, **models}, images, arguments.rounds)
    timed = {of: statistics.median(each) for of, each in readings.items()}
    dense = found.of_dense(CostModel(anatomy))
    rows = []
    for number, policy in enumerate(policies):
        rows.append(
            {
                "policy": json.loads(policy.to_json()),
                "predicted": found.of_policy(model, policy),
                "measured": timed[str(number)],
                "macs": mdc.policy_macs(model, policy) / mdc.macs(model),
            }
        )
    errors = [row["predicted"] / row["measured"] - 1 for row in rows]
    shares = [(row["predicted"] / dense) / (row["measured"] / timed["dense"]) - 1 for row in rows]
    # What of an error may be the clock's; that the machine changes between table and timings comes on top.
    repeats = [statistics.median(each[::2]) / statistics.median(each[1::2]) - 1 for each in readings.values()]
    # What a budget of MACs takes for granted.
    by_macs = [row["macs"] / (row["measured"] / timed["dense"]) - 1 for row in rows]
    return {
        "model": name,
        "batch": batch,
        "seconds_to_measure": seconds,
        "dense": {"predicted": dense, "measured": timed["dense"]},
        "sums_against_whole_models": [parts / whole - 1 for parts, whole in found.whole],
        "policies": rows,
        "largest_error": largest(errors),
        "mean_error": statistics.mean(map(abs, errors)),
        "largest_error_of_share": largest(shares),
        "mean_error_of_share": statistics.mean(map(abs, shares)),
        "largest_error_of_macs": largest(by_macs),
        "largest_difference_of_repeats": largest(repeats),
        "about": {key: value for key, value in found.conditions.items() if key != "model"},
    }


def in_turn(models: dict[str, nn.Module], images: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds per image of each round. Readings are of the second of two passes: the others have taken the caches."""
    readings: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode(), settled_memory():
        for _ in tqdm(range(rounds), desc=f"Slim models at batch {len(images)}", unit="round", leave=False):
            for name, model in models.items():
                model(images)
                wait(images)
                start = time.perf_counter()
                model(images)
                wait(images)
                readings[name].append(time.perf_counter() - start)
    return {name: [each / len(images) for each in seconds] for name, seconds in readings.items()}


def wait(images: Tensor) -> None:
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)


def short(case: dict[str, Any]) -> str:
    return f"{case['model'].split('_patch')[0]}, batch {case['batch']}"


def largest(errors: list[float]) -> float:
    return max(map(abs, errors))


def random_policies(count: int, model: nn.Module, seed: int) -> list[mdc.Policy]:
    """Every block by itself: one head to all, a quarter of the neurons to all, half of a stage's tokens to all."""
    rng, anatomy = np.random.default_rng(seed), find_anatomy(model)
    policies = []
    for _ in range(count):
        heads = [int(rng.integers(1, heads + 1)) / heads for heads in anatomy.num_heads]
        neurons = rng.uniform(0.25, 1, anatomy.depth).tolist()
        policies.append(mdc.Policy(heads, neurons, rng.uniform(0.5, 1, 3).tolist()))
    return policies


def text(result: dict[str, Any]) -> str:
    lines = [
        "| latency by table | batch | largest error | mean error | largest, of dense | largest, by MACs | repeats |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case in result["cases"]:
        lines.append(
            f"| {case['model']} | {case['batch']} | {case['largest_error']:.1%} | {case['mean_error']:.1%} | "
            f"{case['largest_error_of_share']:.1%} | {case['largest_error_of_macs']:.1%} | "
            f"{case['largest_difference_of_repeats']:.1%} |"
        )
    took = ", ".join(f"{case['seconds_to_measure']:.0f} s" for case in result["cases"])
    threads = f"{result['threads']} thread{'' if result['threads'] == 1 else 's'}"
    return "\n".join(
        [
            *lines,
            "",
            f"Predicted against timed latency of {len(result['cases'][0]['policies'])} random slim models, on "
            f"{result['device']}, {threads}. *Of dense*: latency as a share of the dense model's. *By MACs*: that "
            f"share taken to be the one of the MACs. *Repeats*: the largest difference between the "
            f"medians of a model's odd and even readings. The tables took {took} to measure. Measured by "
            "`python benchmarks/latency.py`.",
            "",
            verdicts(targets(result["cases"])),
        ]
    )


def figure(result: dict[str, Any]) -> Figure:
    cases = result["cases"]
    drawn, panels = new_figure(3.6 * len(cases), 3.4, columns=len(cases))
    for panel, case in zip(panels, cases, strict=True):
        points = np.array([(row["measured"], row["predicted"]) for row in case["policies"]]) * 1e3
        dense = np.array([[case["dense"]["measured"], case["dense"]["predicted"]]]) * 1e3
        ends = np.array([0.0, 1.05 * max(points.max(), dense.max())])
        panel.fill_between(ends, 0.9 * ends, 1.1 * ends, color=GRAY, alpha=0.3, lw=0, label="± 10 %")
        panel.plot(ends, ends, color=GRAY, lw=1)
        panel.scatter(*points.T, s=16, color=BLUE, label="random policies")
        panel.scatter(*dense.T, s=30, color=COLOURS["neurons"], marker="D", label="dense")
        panel.set(xlabel="timed, ms per image", ylabel="by the table, ms per image", xlim=ends, ylim=ends)
        plain(panel, short(case))
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    return drawn


if __name__ == "__main__":
    main()
