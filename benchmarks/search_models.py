"""Is the searched policy better than the uniform one, and than the best of as many random ones? On trained models.

    .venv/bin/python benchmarks/search_models.py --run runs/digits/… --run runs/cifar10/…
    .venv/bin/python benchmarks/search_models.py            # trains the digits model of the demo and takes that
    .venv/bin/python benchmarks/search_models.py --quick    # trained for 10 epochs, and with one seed of the search

Takes runs of ``train.py`` that have a dense model and its scores (``stage=[dense,score]``). Per run and seed: 60 trials
of the search at budget 0.5, and the uniform policy with 60 random ones on the same budget, all without finetuning, on
the same held-out training images; then what each policy chosen so is worth in finer measures, and on the test images,
which nothing was chosen on. Also times a trial against an evaluation of the dense model.

Searches are kept in the run's folder and gone on with; ``--quick`` begins anew. Leaves
``benchmarks/results/search_models.json`` and ``.png``, and the table in ``docs/benchmarks.md``; ``--quick`` only prints
its table.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from pages import folder_of, write_pages
from targets import Target, verdicts
from torch import nn
from tqdm import tqdm

import lightning_mdc as mdc
from lightning_mdc.app import build
from lightning_mdc.app.run_folder import newest_run
from lightning_mdc.figures.style import new_figure, save_figure
from lightning_mdc.files import write_json
from lightning_mdc.policy_search.held_out import HeldOut

ROOT = Path(__file__).resolve().parents[1]
METHODS = {"uniform": "uniform", "random": "best of {} random", "searched": "searched, {} trials"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, a model trained for 10 epochs")
    parser.add_argument("--run", type=Path, action="append", help="of train.py, may be given twice; default: makes one")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", help="of the search (default: 0 1 2; quick: 0)")
    parser.add_argument("--images", type=int, default=2000, help="held-out images at most")
    parser.add_argument("--table-only", action="store_true", help="draw and write from the JSON that is there")
    arguments = parser.parse_args()
    arguments.seeds = arguments.seeds or ([0] if arguments.quick else [0, 1, 2])
    folder = folder_of(arguments.quick)
    path = folder / "search_models.json"
    goes_on = path.exists() and (arguments.table_only or not arguments.quick)
    result: dict[str, Any] = json.loads(path.read_text()) if goes_on else {"models": {}}
    for run in [] if arguments.table_only else arguments.run or [trained_digits(folder, arguments.quick)]:
        settings = json.loads((run / "settings.json").read_text())
        result = {"models": result["models"] | {settings["name"]: measured(run, settings, arguments)}}
    if not result["models"]:
        parser.error(f"--table-only: {path} holds no models")
    result["targets"] = [target.facts() for target in targets(result["models"])]
    write_json(path, result)
    save_figure(figure(result), folder / "search_models.png")
    print(text(result))
    if not arguments.quick:
        write_pages("search_models", result)


def trained_digits(folder: Path, quick: bool) -> Path:
    """The run of a dense digits model and its scores, below `folder`."""
    runs = folder / "runs"
    command = [sys.executable, "train.py", "stage=[dense,score]", f"runs={runs}", "name=digits", "logger=none"]
    command += ["dense.epochs=10"] if quick else []
    subprocess.run(command, cwd=ROOT, check=True)
    run = newest_run(runs / "digits")
    if run is None or not (run / "scores.safetensors").exists():  # it was stopped, which it does not call a failure
        raise SystemExit(f"{shlex.join(command)} left no dense model and scores in {run}")
    return run


def measured(run: Path, settings: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """All numbers of one model."""
    data = build.build_data(settings)
    dense = mdc.load(run / "dense")
    scores = mdc.Scores.load(run / "scores.safetensors")
    held_out = HeldOut(data.val_dataloader(), "accuracy", max_images=arguments.images)
    test = HeldOut(data.test_dataloader(), "accuracy")
    images = [(held_out.images, held_out.labels)]
    finer = {name: HeldOut(images, name, dense=dense) for name in ("loss", "kl")}

    def values_of(model: nn.Module) -> dict[str, Any]:
        return {
            "correct": round(held_out.judge(model).facts["accuracy"] * held_out.num_images),
            "test_correct": round(test.judge(model).facts["accuracy"] * test.num_images),
            "loss": -finer["loss"](model),
            "macs": mdc.macs(model),
        }

    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        for method in ("searched", "random"):
            for name, policy, tried in chosen(method, seed, dense, scores, held_out, run, arguments):
                model = slim_of(dense, scores, policy)
                row = {"method": name, "seed": seed, **values_of(model), "kl": -finer["kl"](model), "values": tried}
                rows.append(row)
    return {
        "model": f"{type(dense).__name__}, {len(dense.blocks)} blocks, {mdc.macs(dense) / 1e6:.1f} MMACs",
        "budget": arguments.budget,
        "images": held_out.num_images,
        "test_images": test.num_images,
        "dense": values_of(dense),
        "rows": rows,
        "trial_cost": trial_cost(dense, scores, held_out),
    }


def chosen(
    method: str,
    seed: int,
    dense: nn.Module,
    scores: mdc.Scores,
    held_out: HeldOut,
    run: Path,
    arguments: argparse.Namespace,
) -> list[tuple[str, mdc.Policy, list[float | None] | None]]:
    """The policies of one search, or of as many random trials and the uniform one: name, policy, values of all."""
    name = f"{method}-{arguments.budget}-{held_out.num_images}-seed{seed}.jsonl"
    result = mdc.search(
        dense,
        scores,
        held_out,
        arguments.budget,
        n_trials=arguments.trials + (method == "random"),
        seed=seed,
        options=mdc.SearchOptions(
            journal=None if arguments.quick else run / "benchmark" / name,
            initial_points=arguments.trials + 1 if method == "random" else 10,
        ),
    )
    values = [trial.value for trial in result.history]
    if method == "searched":
        return [("searched", result.policy, values)]
    # The random ones stand alone: the uniform policy, trial 0, is a row of its own.
    best = 1 + int(np.argmax(values[1:]))
    return [("uniform", result.history[0].policy, None), ("random", result.history[best].policy, values)]


def slim_of(dense: nn.Module, scores: mdc.Scores, policy: mdc.Policy, **options: Any) -> nn.Module:
    return mdc.slim(dense, mdc.make_plan(dense, scores, policy), **options).eval()


def trial_cost(
    dense: nn.Module,
    scores: mdc.Scores,
    held_out: HeldOut,
    moments: mdc.Moments | None = None,
    rounds: int = 5,
) -> dict[str, float]:
    """Seconds of a trial at budget 0.6, slicing included, and of evaluating the dense model; medians, in turn.

    With `moments` also of a trial that compensates by least squares. Ratios are taken round by round.
    """
    policy = mdc.uniform_policy(dense, 0.6)
    ways: dict[str, dict[str, Any]] = {"trial": {}}
    if moments is not None:
        ways["compensated"] = {"compensate": "lstsq", "moments": moments}
    rows: list[dict[str, float]] = []
    held_out(dense)
    for _ in tqdm(range(rounds), desc="cost of a trial"):
        start = time.perf_counter()
        held_out(dense)
        row = {"dense": time.perf_counter() - start}
        for way, options in ways.items():
            start = time.perf_counter()
            model = slim_of(dense, scores, policy, **options)
            slicing = time.perf_counter() - start
            held_out(model)
            row[way] = time.perf_counter() - start
            row["slicing" if way == "trial" else f"{way}_slicing"] = slicing
            row["ratio" if way == "trial" else f"{way}_ratio"] = row[way] / row["dense"]
        rows.append(row)
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]} | {
        "threads": torch.get_num_threads()
    }


def targets(found: dict[str, Any]) -> list[Target]:
    """What the issue of the search asks for: never behind on a seed, ahead on the mean of a finer value."""
    asked = []
    for name, result in found.items():
        rows = {method: [row for row in result["rows"] if row["method"] == method] for method in METHODS}
        for other in ("uniform", "random"):
            behind = min(
                mine["correct"] - next(row["correct"] for row in rows[other] if row["seed"] == mine["seed"])
                for mine in rows["searched"]
            )
            label = METHODS[other].format(len(rows["random"][0]["values"]) - 1)
            points = 100 * behind / result["images"]
            asked.append(Target(f"{name}: searched − {label}, points on the worst seed", points, ">=", 0))
        kl = {method: statistics.mean(row["kl"] for row in rows[method]) for method in ("searched", "random")}
        asked.append(Target(f"{name}: KL to dense, searched / best random", kl["searched"] / kl["random"], "<=", 1))
        if result["images"] >= 1000:  # fewer take no time, against slicing
            asked.append(Target(f"{name}: trial / evaluation of dense", result["trial_cost"]["ratio"], "<=", 0.75))
    return asked


def text(shown: dict[str, Any]) -> str:
    """The table, targets, and how each model was measured."""
    found = shown["models"]
    lines = [
        "| model | policy | held-out top-1 of each seed | cross-entropy | KL to dense | test top-1 |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    notes = []
    for name, result in found.items():
        dense, images, test = result["dense"], result["images"], result["test_images"]
        lines.append(
            f"| {name} | dense | {dense['correct'] / images:.2%} | {dense['loss']:.4f} | 0 | "
            f"{dense['test_correct'] / test:.2%} |"
        )
        trials = next(len(row["values"]) for row in result["rows"] if row["method"] == "searched")
        for method, label in METHODS.items():
            rows = [row for row in result["rows"] if row["method"] == method]
            shown = [f"{row['correct'] / images:.2%}" for row in rows]
            shown = shown[:1] if method == "uniform" else shown
            mean = {key: statistics.mean(row[key] for row in rows) for key in ("loss", "kl", "test_correct")}
            lines.append(
                f"| {name} | {label.format(trials)} | {', '.join(shown)} | {mean['loss']:.4f} | {mean['kl']:.4f} | "
                f"{mean['test_correct'] / test:.2%} |"
            )
        cost = result["trial_cost"]
        notes.append(
            f"{name}: {result['model']}, {images} held-out and {test} test images, {result['budget']:.0%} of the MACs; "
            f"a trial at 60 % of the MACs takes {cost['ratio']:.2f} of an evaluation of the dense model "
            f"({cost['trial']:.2f} s, of which slicing {cost['slicing']:.3f} s)."
        )
    lines += ["", verdicts(targets(found)), "", *(f"- {note}" for note in notes), ""]
    lines += [
        "Not finetuned, so far below dense. Cross-entropy (held-out), KL (held-out) and test top-1 are means over the "
        "seeds of the search. Measured by `python benchmarks/search_models.py`."
    ]
    return re.sub(r"(?<=\d)%", " %", "\n".join(lines))


def figure(shown: dict[str, Any]) -> Figure:
    """The best value so far by trial, mean and range over seeds, searched and random."""
    found = shown["models"]
    picture, panels = new_figure(4.6 * len(found) + 0.6, 3.4, 1, len(found))
    for panel, (name, result) in zip(panels, found.items(), strict=True):
        for method, colour in (("random", "#E69F00"), ("searched", "#0072B2")):
            values = [row["values"] for row in result["rows"] if row["method"] == method]
            best = 100 * np.maximum.accumulate(np.array(values, dtype=float), axis=1)
            trials = np.arange(best.shape[1])
            panel.fill_between(trials, best.min(axis=0), best.max(axis=0), color=colour, alpha=0.2, linewidth=0)
            panel.plot(trials, best.mean(axis=0), color=colour)
            panel.annotate(
                method,
                (trials[-1], best.mean(axis=0)[-1]),
                (4, 0),
                textcoords="offset points",
                color=colour,
                va="center",
            )
        panel.set_title(f"{name}, {result['budget']:.0%} of the MACs", loc="left", fontsize=10, color="#333333")
        panel.set_xlabel("trial")
        panel.set_ylabel("best held-out top-1 so far, %")
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.02)
    return picture


if __name__ == "__main__":
    main()
