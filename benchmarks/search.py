"""What does the search find, and what does it cost? The best of 25 keep ratios on a budget, found by us and by others.

    .venv/bin/python benchmarks/search.py                                     # everything, about an hour on one core
    .venv/bin/python benchmarks/search.py --quick                             # fewer runs, and shorter ones
    .venv/bin/python benchmarks/search.py --methods ours random --seeds 3
    .venv/bin/python benchmarks/search.py --best-known                        # how much there is to be found: minutes
    .venv/bin/python benchmarks/search.py --speed                             # what an ask and a trial cost

Every run is in ``benchmarks/results/search.json`` as soon as it is over; started again, this goes on from there, and
does those again that another version of the search made. ``search.png`` shows how fast each search gets how far.
``--quick`` begins anew and only prints its tables.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from pages import folder_of, write_pages
from search_models import trial_cost
from synthetic import Problem
from targets import Target, verdicts
from threadpoolctl import threadpool_info, threadpool_limits
from tqdm import tqdm

import lightning_mdc as mdc
from lightning_mdc.app.report.tables import Table
from lightning_mdc.figures.style import new_figure, save_figure
from lightning_mdc.files import write_json
from lightning_mdc.gp_ei.process import GpEi
from lightning_mdc.gp_ei.projection import Projection
from lightning_mdc.gp_ei.space import Space
from lightning_mdc.policy_search.policy_space import PolicySpace

BATCH = 4
# Of the box, 0.7 % costs this little less than the budget or nothing: what rejection sampling can live on. With 400
# candidates it found no more (one seed tried).
LEAST_COST, SKOPT_CANDIDATES = 0.98, 20


class Evaluations:
    """What one run has evaluated: calling it with points (n, 25) gives values (n,), None for one above the budget."""

    def __init__(self, problem: Problem, count: int, bar: tqdm) -> None:
        self.problem, self.count, self.bar = problem, count, bar
        self.values: list[float | None] = []

    @property
    def left(self) -> int:
        return self.count - len(self.values)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        points = self.problem.space.snap(points)
        values = self.problem.value(points)
        for value, cost in zip(values, self.problem.space.utilisation(points), strict=True):
            self.values.append(float(value) if cost <= 1 else None)
        self.bar.update(len(points))
        return values


# --- the searches -----------------------------------------------------------------------------------------------------


def ours(evaluate: Evaluations, seed: int, batch: int = 1) -> None:
    problem = evaluate.problem
    search = GpEi(problem.space, problem.space.constraint, seed=seed, first=problem.uniform)
    while evaluate.left:
        points = search.ask(min(batch, evaluate.left))[0]
        search.tell(points, evaluate(points))


def ours_in_batches(evaluate: Evaluations, seed: int) -> None:
    ours(evaluate, seed, BATCH)


def at_random(evaluate: Evaluations, seed: int) -> None:
    rng = np.random.default_rng(seed)
    on_budget = projection(evaluate.problem, seed)
    evaluate(evaluate.problem.uniform)
    while evaluate.left:
        evaluate(on_budget(rng.random((1, len(evaluate.problem.space)))))


def skopt_rejecting(evaluate: Evaluations, seed: int) -> None:
    from skopt import Optimizer

    space, utilisation = evaluate.problem.space, evaluate.problem.utilisation

    def costs_enough(point: list[float]) -> bool:
        return LEAST_COST <= utilisation(point) <= 1

    optimizer = Optimizer(
        list(zip(space.low, space.high, strict=True)),
        "GP",
        acq_func="EI",
        acq_optimizer="sampling",
        acq_optimizer_kwargs={"n_points": SKOPT_CANDIDATES},
        space_constraint=costs_enough,
        random_state=seed,
    )
    point = evaluate.problem.uniform[0].tolist()
    while evaluate.left:
        optimizer.tell(point, -evaluate(np.array([point]))[0])
        point = optimizer.ask()


def the_peer() -> Any:
    """Optuna, which is imported only where it is needed."""
    try:
        import optuna
    except ImportError as error:
        raise SystemExit("Optuna is missing: pip install -e '.[bench]', or leave it out by --methods") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def optuna_projected(evaluate: Evaluations, seed: int, sampler: Any) -> None:
    """Optuna suggests in the unit cube; what is evaluated is that point on the budget."""
    optuna = the_peer()
    problem, on_budget = evaluate.problem, projection(evaluate.problem, seed)
    names = [axis.name for axis in problem.space.axes]
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial(dict(zip(names, problem.space.to_unit(problem.uniform)[0].tolist(), strict=True)))
    while evaluate.left:
        trial = study.ask()
        unit = np.array([[trial.suggest_float(name, 0.0, 1.0) for name in names]])
        study.tell(trial, evaluate(on_budget(unit) if trial.number else problem.uniform)[0])


def tpe_projected(evaluate: Evaluations, seed: int) -> None:
    optuna_projected(evaluate, seed, the_peer().samplers.TPESampler(seed=seed))


def gp_projected(evaluate: Evaluations, seed: int) -> None:
    optuna_projected(evaluate, seed, the_peer().samplers.GPSampler(seed=seed))


def tpe_with_constraints(evaluate: Evaluations, seed: int) -> None:
    """Optuna's own way: it suggests ratios and is told by how much they are above the budget."""
    optuna, space = the_peer(), evaluate.problem.space

    def above(trial: Any) -> tuple[float]:
        return (float(space.utilisation(np.array([[trial.params[axis.name] for axis in space.axes]]))[0]) - 1,)

    sampler = optuna.samplers.TPESampler(seed=seed, constraints_func=above)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial(space.params(evaluate.problem.uniform[0]))
    while evaluate.left:
        trial = study.ask()
        point = [trial.suggest_float(axis.name, axis.low, axis.high) for axis in space.axes]
        study.tell(trial, evaluate(np.array([point]))[0])


METHODS: dict[str, tuple[str, Callable[[Evaluations, int], None]]] = {
    "ours": ("ours, one at a time", ours),
    "ours-4": (f"ours, {BATCH} at a time", ours_in_batches),
    "random": ("random, projected", at_random),
    "skopt": ("scikit-optimize, rejection", skopt_rejecting),
    "tpe": ("Optuna TPE, projected", tpe_projected),
    "gp": ("Optuna GP, projected", gp_projected),
    "tpe-constraints": ("Optuna TPE, constraints", tpe_with_constraints),
}
# Okabe and Ito's colours, told apart by the colour-blind too.
COLOURS = dict(zip(METHODS, ("#D55E00", "#E69F00", "#999999", "#56B4E9", "#009E73", "#0072B2", "#CC79A7"), strict=True))


def projection(problem: Problem, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """(n, 25) in [0, 1] -> points on the budget, filled up: what others need to search where we do."""
    project, rng = Projection(problem.space, problem.space.constraint), np.random.default_rng(seed)
    return lambda unit: project.fill(project(unit), rng)


def made_by() -> str:
    """Marks the code that a run's values depend on; peers search where our projection puts them, so theirs too."""
    files = [Path(inspect.getfile(part)) for part in (GpEi, Projection, PolicySpace, Space, Problem)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def run(problem: Problem, methods: list[str], results: dict[str, Any], stored_at: Path) -> None:
    """Add the runs that `results` lacks or has from another version of the search."""
    code, seeds, evaluations = made_by(), results["seeds"], results["evaluations"]
    stored = {method: results.setdefault("runs", {}).setdefault(method, {}) for method in methods}
    # Seed by seed, so that a run broken off has something of every method.
    missing = [
        (method, seed)
        for seed in range(seeds)
        for method in methods
        if (known := stored[method].get(str(seed), {})).get("code") != code or len(known["values"]) < evaluations
    ]
    with tqdm(total=len(missing) * evaluations, unit="evaluation", mininterval=1) as bar:
        for method, seed in missing:
            bar.set_description(f"{method}, seed {seed}")
            evaluate, started = Evaluations(problem, evaluations, bar), time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other libraries, about experimental parts and bounds met
                METHODS[method][1](evaluate, seed)
            seconds = time.process_time() - started
            stored[method][str(seed)] = {"values": evaluate.values, "cpu_seconds": round(seconds, 2), "code": code}
            write_json(stored_at, results)


# --- what there is to be found ----------------------------------------------------------------------------------------


def best_known(
    problem: Problem, results: dict[str, Any], starts: int = 3, rounds: int = 400, moves: int = 256
) -> float:
    """The best value of long local searches: many small moves from the best points so far, again and again."""
    space, best = problem.space, -np.inf
    for start in range(starts):
        rng, on_budget = np.random.default_rng(start), projection(problem, start)
        points = on_budget(rng.random((moves, len(space))))
        for number in tqdm(range(rounds), desc=f"local search {start + 1} of {starts}"):
            points = points[np.argsort(-problem.value(points))[:16]]
            unit = space.to_unit(points)[rng.integers(len(points), size=moves)]
            moved = rng.random(unit.shape) < rng.choice([0.08, 0.2, 0.5], size=(moves, 1))
            scale = 0.2 * 0.985**number
            points = np.unique(
                np.concatenate([points, on_budget(unit + moved * scale * rng.standard_normal(unit.shape))]), axis=0
            )
        best = max(best, float(problem.value(points).max()))
    results["best_known"] = best
    return best


def measure_speed(problem: Problem, results: dict[str, Any], model: str, images: int, rounds: int) -> None:
    """What the search adds to its trials, and what a trial costs.

    Milliseconds to price 10 000 policies, CPU seconds of ask and tell where 190 points are known; seconds of a trial of
    a timm `model` (random weights: time does not depend on them) on so many random images, and of looking at them with
    the dense model.
    """
    space, on_budget = problem.space, projection(problem, 0)
    rng = np.random.default_rng(0)
    points = space.snap(space.from_unit(rng.random((10_000, len(space)))))
    known = on_budget(rng.random((190, len(space))))
    threads_by_default = max(pool["num_threads"] for pool in threadpool_info())
    speed: dict[str, Any] = {"threads_by_default": threads_by_default, "ask_and_tell_cpu_seconds": {}}
    started = time.perf_counter()
    for _ in range(20):
        space.utilisation(points)
    speed["pricing_10000_ms"] = round((time.perf_counter() - started) / 20 * 1e3, 2)
    for name, threads in (("one thread", 1), ("default threads", None)):
        search = GpEi(space, space.constraint)
        search.tell(known, problem.value(known).tolist())
        with threadpool_limits(threads):
            started = time.process_time()
            for _ in tqdm(range(10), desc=f"ask and tell, {name}"):
                asked = search.ask()[0]
                search.tell(asked, problem.value(asked).tolist())
            speed["ask_and_tell_cpu_seconds"][name] = round((time.process_time() - started) / 10, 3)
    torch.manual_seed(0)
    dense = timm.create_model(model).eval()
    size, batch = dense.pretrained_cfg["input_size"], min(images, 64)
    batches = [(torch.randn(batch, *size), torch.randint(10, (batch,))) for _ in range(images // batch)]
    scores = mdc.score(dense, batches[:1], "magnitude", moments=True, progress=False)
    speed["trial"] = {
        "model": model,
        "images": batch * len(batches),
        **trial_cost(
            dense,
            scores,
            mdc.HeldOut(batches, "accuracy", batch_size=batch),
            scores.moments,
            rounds,
        ),
    }
    results["speed"] = speed


def targets(results: dict[str, Any], evaluations: int, seeds: int) -> list[Target]:
    """What the issues of the search and of the benchmarks ask for, as far as it was measured."""
    ends = {method: best_so_far(results, method, evaluations, seeds)[:, -1] for method in METHODS}
    found = [
        Target(f"ours − {METHODS[peer][0]}, after {evaluations}", float(ends["ours"].mean() - end.mean()), ">=", 0)
        for peer, end in ends.items()
        if not peer.startswith("ours") and len(end) and len(ends["ours"])
    ]
    if speed := results.get("speed"):
        ask = speed["ask_and_tell_cpu_seconds"]["one thread"]
        found.append(Target("ask and tell, 190 to 200 points known, CPU seconds", ask, "<=", 0.6))
        found.append(Target("pricing 10 000 policies, ms", speed["pricing_10000_ms"], "<=", 50))
        if trial := speed.get("trial"):
            found.append(Target(f"trial at 60 % / evaluation of dense, {trial['model']}", trial["ratio"], "<=", 0.75))
    return found


# --- what is shown ----------------------------------------------------------------------------------------------------


def best_so_far(results: dict[str, Any], method: str, evaluations: int, seeds: int) -> np.ndarray:
    """(runs, evaluations): the best value by then, of each finished run."""
    runs = results["runs"].get(method, {})
    values = [runs[str(seed)]["values"][:evaluations] for seed in range(seeds) if str(seed) in runs]
    found = np.array([[-np.inf if v is None else v for v in run] for run in values if len(run) == evaluations])
    return np.maximum.accumulate(found, axis=1) if len(found) else np.empty((0, evaluations))


def text(results: dict[str, Any]) -> str:
    """Tables of what was found and of what an ask costs, targets, and how they were measured."""
    asked = results["evaluations"], results["seeds"]
    parts = [table(results, *asked).markdown()] if any(results["runs"].values()) else []
    parts += [note(results), costs(results["speed"]) if "speed" in results else "", verdicts(targets(results, *asked))]
    return "\n\n".join(part.strip() for part in parts if part)


def figure(results: dict[str, Any]) -> Figure:
    """See `picture`."""
    return picture(results, results["evaluations"], results["seeds"])


def table(results: dict[str, Any], evaluations: int, seeds: int) -> Table:
    """A row per search, the best first: mean ± standard deviation over runs of the best value by then."""
    marks = [mark for mark in (20, 50) if mark < evaluations] + [evaluations]
    curves = {method: best_so_far(results, method, evaluations, seeds) for method in METHODS}
    rows = []
    for method in sorted((m for m in METHODS if len(curves[m])), key=lambda m: -curves[m][:, -1].mean()):
        runs = results["runs"][method].values()
        cells = [f"{curves[method][:, m - 1].mean():.2f} ± {curves[method][:, m - 1].std():.2f}" for m in marks]
        asks = [run["cpu_seconds"] / len(run["values"]) for run in runs]
        rows.append((METHODS[method][0], *cells, str(len(curves[method])), f"{np.mean(asks) * 1e3:.0f} ms"))
    header = ("search", *(f"after {mark}" for mark in marks), "seeds", "CPU time per ask and tell")
    return Table(header=header, rows=tuple(rows))


def note(results: dict[str, Any]) -> str:
    """What a reader of the table has to know."""
    parts = [
        "Best value found after so many evaluations (mean ± standard deviation over seeds) of the synthetic problem "
        f"in `benchmarks/synthetic.py`: 25 keep ratios of DeiT-S at {Problem.budget:.0%} of its MACs. "
        f"The uniform policy, where every search begins, has {results['uniform']:.2f}"
    ]
    if "best_known" in results:
        parts.append(f", the best point known {results['best_known']:.2f}")
    parts.append(
        ". *Projected*: points in the unit cube, put on the budget by our projection. *Rejection*: `space_constraint`, "
        f"cost within {1 - LEAST_COST:.0%} of the budget, {SKOPT_CANDIDATES} candidates per step. "
        "*Constraints*: Optuna's `constraints_func`; points above the budget do not count as found. "
        "Measured by `python benchmarks/search.py`."
    )
    return "".join(parts)


def costs(speed: dict[str, Any]) -> str:
    """The table of what an ask and a trial cost."""
    seconds = speed["ask_and_tell_cpu_seconds"]
    rows = [
        ("pricing 10 000 policies", f"{speed['pricing_10000_ms']:.1f} ms", ""),
        ("ask and tell, 190 to 200 points known", f"{seconds['one thread']:.2f} s", "CPU time, one thread"),
        ("the same", f"{seconds['default threads']:.2f} s", f"CPU time, {speed['threads_by_default']} threads"),
    ]
    if trial := speed.get("trial"):
        each = f"{trial['model']}, {trial['images']} images, {trial['threads']} CPU thread(s)"
        rows += [
            ("evaluation of the dense model", f"{trial['dense']:.2f} s", each),
            ("trial at 60 % of the MACs", f"{trial['trial']:.2f} s", f"{trial['ratio']:.2f} of the dense model's"),
            (
                "trial with least squares",
                f"{trial['compensated']:.2f} s",
                f"{trial['compensated_ratio']:.2f} of the dense model's",
            ),
        ]
    return Table(header=("what", "takes", ""), rows=tuple(rows)).markdown()


def picture(results: dict[str, Any], evaluations: int, seeds: int) -> Figure:
    """Best so far against evaluations: means, with a band of one standard deviation."""
    figure, (axes,) = new_figure(8, 4.5)
    number = np.arange(1, evaluations + 1)
    ends = {}
    for method in METHODS:
        curves = best_so_far(results, method, evaluations, seeds)
        if not len(curves):
            continue
        mean, std = curves.mean(axis=0), curves.std(axis=0)
        axes.plot(number, mean, color=COLOURS[method], lw=2.2 if method.startswith("ours") else 1.4)
        axes.fill_between(number, mean - std, mean + std, color=COLOURS[method], alpha=0.12, lw=0)
        ends[method] = mean[-1]
    if "best_known" in results:
        axes.axhline(results["best_known"], color="#333333", lw=0.8, ls=":")
        axes.annotate("best known", (1, results["best_known"]), (2, 3), textcoords="offset points", color="#333333")
    low, high = results["uniform"], results.get("best_known", max(ends.values()))
    axes.set_ylim(low - 0.2, high + 0.07 * (high - low))
    at, gap = np.inf, 0.055 * (high - low)  # labels, best first, pushed down where they would touch
    for method, end in sorted(ends.items(), key=lambda item: -item[1]):
        at = min(end, at - gap)
        axes.annotate(
            METHODS[method][0],
            (evaluations, end),
            (evaluations * 1.02, at),
            color=COLOURS[method],
            va="center",
            annotation_clip=False,
        )
    axes.set_xlim(0, evaluations)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("evaluations")
    axes.set_ylabel("best value so far")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}; default: all; quick: all but ours-4",
    )
    parser.add_argument("--quick", action="store_true", help="short runs, and a small model for the trial's cost")
    parser.add_argument("--seeds", type=int, help="runs of each (default: 10; quick: 2)")
    parser.add_argument("--evaluations", type=int, help="in one run (default: 100; quick: 50)")
    parser.add_argument("--best-known", action="store_true", help="only search for the best value there is")
    parser.add_argument("--speed", action="store_true", help="only measure how long pricing, asking and a trial take")
    parser.add_argument("--table-only", action="store_true", help="draw and write from the JSON that is there")
    args = parser.parse_args()
    seeds = args.seeds if args.seeds is not None else 2 if args.quick else 10
    evaluations = args.evaluations if args.evaluations is not None else 50 if args.quick else 100
    methods = args.methods or [method for method in METHODS if not (args.quick and method == "ours-4")]
    if seeds < 1 or evaluations < 2:
        parser.error("give at least 1 seed and 2 evaluations")
    folder = folder_of(args.quick)
    stored = folder / "search.json"
    # Quick is of the code as it is now; what is kept would have to be checked for that, too.
    goes_on = stored.is_file() and (args.table_only or not args.quick)
    results: dict[str, Any] = json.loads(stored.read_text()) if goes_on else {"runs": {}}
    results |= {"evaluations": evaluations, "seeds": seeds}
    if not args.table_only:
        measure(args, methods, results, stored)
    results["targets"] = [target.facts() for target in targets(results, evaluations, seeds)]
    write_json(stored, results)
    if any(results["runs"].values()):
        save_figure(figure(results), folder / "search.png")
    print(text(results))
    if not args.quick:
        write_pages("search", results)


def measure(args: argparse.Namespace, methods: list[str], results: dict[str, Any], stored: Path) -> None:
    """Add to `results` what the arguments ask for; runs are in the file `stored` as soon as they are over."""
    problem = Problem()
    results["uniform"] = float(problem.value(problem.uniform)[0])
    only = args.best_known or args.speed
    if args.best_known:
        best_known(problem, results)
    if args.speed or not only:
        model, images, rounds = ("deit_tiny_patch16_224", 64, 3) if args.quick else ("deit_small_patch16_224", 256, 5)
        measure_speed(problem, results, model, images, rounds)
    if not only:
        results.pop("caveat", None)
        run(problem, methods, results, stored)


if __name__ == "__main__":
    main()
