"""What each stage of ``train.py`` does, from dense, score, search and slim to distill, test and report.

Each stage is a function that reads what earlier stages left in the run's folder and writes its own output there. What a
stage's result depends on is listed in `STAGES`; `lightning_mdc.app.pipeline` decides from it which stages have to run.
In a distributed run most stages share their work out over all ranks, and the first one writes.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning import seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_mdc import progress
from lightning_mdc.app import build, evaluation
from lightning_mdc.app import report as reporting
from lightning_mdc.app.data import ImageDataModule
from lightning_mdc.app.report.outcomes import Outcomes
from lightning_mdc.app.report.report import write_report
from lightning_mdc.app.run_folder import CURRENT_STUDY, RunFolder, fingerprint
from lightning_mdc.app.tracking import Trackers
from lightning_mdc.app.tracking.contents import trial_numbers
from lightning_mdc.app.trainer import build_module, build_sharing, build_trainer, shards_parameters, training_device
from lightning_mdc.artifact import WEIGHTS, load, save
from lightning_mdc.budget import macs, num_params
from lightning_mdc.budget.latency import latencies
from lightning_mdc.distillation import DistillationModule
from lightning_mdc.distributed import on_first_rank, rank, world_size
from lightning_mdc.errors import DataError
from lightning_mdc.files import write_text
from lightning_mdc.importance import Scores, score
from lightning_mdc.policy import DIMENSIONS, Plan, Policy
from lightning_mdc.policy_search.driver import SearchResult
from lightning_mdc.policy_search.driver import search as search_policies
from lightning_mdc.policy_search.held_out import HeldOut, gathered
from lightning_mdc.policy_search.sensitivity import measure_sensitivity
from lightning_mdc.surgery import ActivationStatistics, slim
from lightning_mdc.surgery.plan import make_plan

log = logging.getLogger(__name__)


@dataclass
class Run:
    """What every stage is given: the settings, the folder, and what is made from the settings on demand."""

    settings: build.Settings
    folder: RunFolder
    marks: dict[str, str] = field(default_factory=dict)  # fingerprint of each stage under these settings
    with_finetuned: bool = False  # whether there are finetuned models to test
    trackers: Trackers = field(default_factory=Trackers)  # what the run is watched with

    @cached_property
    def data(self) -> ImageDataModule:
        return build.build_data(self.settings)

    @cached_property
    def device(self) -> torch.device:
        return training_device(self.settings)

    @property
    def weights(self) -> str:
        """The artifact whose weights are searched over and cut: the dense model, or what sharing made of it."""
        return "shared" if shares_weights(self.settings) else "dense"

    def model(self, name: str) -> nn.Module:
        """The artifact of an earlier stage."""
        return load(self.folder / name)

    @cached_property
    def compensation(self) -> dict[str, Any]:
        """What `slim` is told to do about removed units, as keyword arguments."""
        if not compensates(self.settings):
            return {}
        statistics = ActivationStatistics.load(self.folder / STAGES["statistics"].output)
        return {"compensate": self.settings["surgery"]["compensate"], "statistics": statistics}

    @property
    def plan(self) -> Plan:
        return Plan.from_json((self.folder / "plan.json").read_text())


def upstream_of_cuts(run: Run) -> dict[str, str]:
    """Fingerprints of what a policy is judged with: the weights, and the scores that say which units go first."""
    weights = ("share",) if shares_weights(run.settings) else ()
    return {name: run.marks[name] for name in ("dense", "score", *weights)}


def shares_weights(settings: build.Settings) -> bool:
    """Whether there is a stage of weight sharing."""
    return bool(settings["sharing"]["epochs"])


def compensates(settings: build.Settings) -> bool:
    """Whether what removed units did is given back, for which there is a stage of statistics."""
    return bool(settings["surgery"]["compensate"] != "none")


def switched_off(settings: build.Settings) -> dict[str, str]:
    """Stages that there are not under these settings, and why."""
    off = {}
    if not shares_weights(settings):
        off["share"] = "sharing.epochs=0; give some, e.g. sharing.epochs=5"
    if not compensates(settings):
        off["statistics"] = "surgery.compensate=none; choose surgery.compensate=lstsq or mean"
    return off


# --- the stages -------------------------------------------------------------------------------------------------------


def dense(run: Run) -> str:
    """Train the dense model, or load one; leaves ``dense/``."""
    options = run.settings["dense"]
    model = build.build_model(run.settings, run.data)
    if options["epochs"]:
        module = build_module(options, model, None)
        train(run, options, module, "dense", run.marks["dense"])
    else:
        on_first_rank(lambda: save(model.eval(), run.folder / "dense", class_names=list(run.data.class_names)))
    size = f"{reporting.scaled(macs(model))}MACs, {num_params(model):,} parameters"
    return f"{type(model).__name__} of {size}"


def score_units(run: Run) -> str:
    """Score heads, neurons and token positions; leaves ``scores.safetensors``."""
    model = run.model("dense").to(run.device)
    criterion, stages = build.build_criterion(run.settings), run.settings["surgery"]["stages"]
    scores = score(model, calibration_batches(run), criterion, stages=stages, over_ranks=True)
    on_first_rank(partial(scores.save, run.folder / "scores.safetensors"))
    return f"{criterion.name} over {scores.images} images"


def share(run: Run) -> str:
    """Train the dense weights under many policies at once, which the search then tells apart; leaves ``shared/``."""
    options = run.settings["sharing"]
    model = run.model("dense")
    scores = Scores.load(run.folder / "scores.safetensors")
    budget, space = build.build_budget(run.settings), build.space_options(run.settings)
    train(run, options, build_sharing(run.settings, model, scores, budget, space), "shared", run.marks["share"])
    return f"{options['epochs']} epochs of weight sharing"


def statistics(run: Run) -> str:
    """Gather what compensation has to know of the weights that are cut; leaves ``statistics.safetensors``."""
    model = run.model(run.weights).to(run.device)
    found = ActivationStatistics.of(model, calibration_batches(run), over_ranks=True)
    on_first_rank(partial(found.save, run.folder / "statistics.safetensors"))
    return f"activations of {found.images} images"


def sensitivity(run: Run) -> str:
    """Cut every dimension of every block alone, to see which bear it; leaves ``sensitivity.csv``."""
    options, surgery = run.settings["sensitivity"], run.settings["surgery"]
    # All but the levels makes a cut what it is: with other levels those that are there are not made again.
    same = {"images": options["images"], "surgery": {k: v for k, v in surgery.items() if k != "compensate"}}
    mark = fingerprint(same, upstream_of_cuts(run))
    state = run.folder / "sensitivity" / f"cuts-{mark[:12]}.csv"
    if on_first_rank(state.exists):
        log.info("  going on from %s", state)
    model = run.model(run.weights).to(run.device)
    images, labels = gathered(held_out_batches(run), options["images"])
    held_out = HeldOut([(images, labels)], "kl", dense=model, batch_size=options["batch_size"], device=run.device)
    found = measure_sensitivity(
        model,
        Scores.load(run.folder / "scores.safetensors"),
        held_out,
        levels={name: options[name] for name in DIMENSIONS},
        stages=surgery["stages"],
        token_score=surgery["token_score"],
        fuse_tokens=surgery["fuse_tokens"],
        state=state,
    )
    on_first_rank(partial(found.save, run.folder / "sensitivity.csv"))
    worst = max(found.cuts, key=lambda cut: cut.kl)
    return (
        f"{len(found.cuts)} cuts on {held_out.num_images} images; worst: {worst.dimension} of block {worst.block} to "
        f"{worst.keep:.0%} (KL {worst.kl:.3g}, top-1 {worst.accuracy:.1%})"
    )


def search(run: Run) -> str:
    """Decide how much each block keeps; leaves ``policy.json`` and, if it was searched for, ``search/``."""
    model = run.model(run.weights).to(run.device)
    policy = build.given_policy(run.settings, model)
    if policy is None:
        policy = search_for_policy(run, model).policy
    on_first_rank(partial(write_text, run.folder / "policy.json", policy.to_json()))
    ratios = (f"{name} {np.mean(getattr(policy, name)):.2f}" for name in ("heads", "neurons", "tokens"))
    return f"mean keep ratios: {', '.join(ratios)}"


def cut(run: Run) -> str:
    """Decide which units stay and make the slim model; leaves ``plan.json`` and ``slim/``."""
    model, surgery = run.model(run.weights), run.settings["surgery"]
    plan = make_plan(
        model,
        Scores.load(run.folder / "scores.safetensors"),
        Policy.load(run.folder / "policy.json"),
        token_score=surgery["token_score"],
        fuse_tokens=surgery["fuse_tokens"],
    )
    small = slim(model, plan, **run.compensation)
    write_text(run.folder / "plan.json", plan.to_json())
    save(small, run.folder / "slim")
    return f"{macs(small) / macs(model):.1%} of the MACs, {num_params(small) / num_params(model):.1%} of the parameters"


def distill(run: Run) -> str:
    """Finetune slim under the dense teacher, and dense as well, per seed; leaves ``finetuned/`` and ``reference/``."""
    options = run.settings["distillation"]
    for folder, start, seeds in (
        ("finetuned", "slim", options["seeds"]),
        ("reference", "dense", options["reference_seeds"]),
    ):
        for seed in seeds:
            finetune(run, f"{folder}/seed{seed}", start, seed)
    return (
        f"{len(options['seeds'])} slim and {len(options['reference_seeds'])} dense runs of {options['epochs']} epochs"
    )


def finetune(run: Run, name: str, start: str, seed: int) -> None:
    """One finetuning run from the artifact `start` to the artifact `name`; done once, however often it is asked for."""
    options = {k: v for k, v in run.settings["distillation"].items() if k not in ("seeds", "reference_seeds")}
    mark = fingerprint({"start": start, "seed": seed, "options": options}, {"slim": run.marks["slim"]})
    if on_first_rank(partial(run.folder.is_done, name, mark, run.folder / name)):
        log.info("  %s: picked up from %s", name, run.folder / name)
        return
    on_first_rank(partial(run.folder.start, name))
    seed_everything(seed, workers=True, verbose=False)
    student = run.model(start)
    if options["epochs"]:
        module = build_module(options, student, _teacher(run, options))
        train(run, options, module, name, mark)
    else:
        on_first_rank(lambda: save(student, run.folder / name))
    on_first_rank(partial(run.folder.finish, name, mark))


def test(run: Run) -> str:
    """Measure every model on the test images; leaves ``results.json``, what each model says of each image, and a few
    images to look at."""
    models = dict(_models_to_test(run))
    dense_model, slim_model = models[reporting.DENSE, None][1], models[reporting.SLIM, None][1]
    # All slim models have one architecture, and so has dense: two are timed, in turn, for all.
    times = on_first_rank(partial(_times, run, {"dense": dense_model, "slim": slim_model}))
    found = evaluation.outcomes(dict(models.values()), run.data.test_dataloader(), run.device, run.data.class_names)
    if not len(found.labels):
        raise DataError(
            "the test split is empty: nothing can be reported; raise data.test_fraction or give a test split"
        )
    rows = []
    for (kind, seed), (place, model) in models.items():
        which = "dense" if kind in (reporting.DENSE, reporting.REFERENCE) else "slim"
        rows.append(
            reporting.Result(
                model=kind,
                seed=seed,
                correct=int((found.predicted[place] == found.labels).sum()),
                agreeing=int((found.predicted[place] == found.predicted["dense"]).sum()),
                images=len(found.labels),
                macs=macs(model),
                params=num_params(model),
                size=(run.folder / place / WEIGHTS).stat().st_size,
                latency={batch: by_name[which] for batch, by_name in times.items()},
            )
        )
    results = reporting.Results(tuple(rows), run.settings["name"], _describe_device(run.device))
    on_first_rank(lambda: _keep_results(run, results, found, dict(models.values())))
    first, last = results.of(reporting.DENSE)[0], results.slimmest
    return f"dense {first.correct}/{first.images}, {last.model} {last.correct}/{last.images}"


def _keep_results(run: Run, results: reporting.Results, found: Outcomes, models: Mapping[str, nn.Module]) -> None:
    place = found.slim_places[0]
    shown = evaluation.examples(
        models["dense"],
        models[place],
        place,
        _all_test_images(run),
        run.device,
        run.data.class_names,
        run.data.to_pixels,
    )
    found.save(run.folder / "predictions.safetensors")
    shown.save(run.folder / "examples.safetensors")
    write_text(run.folder / "results.json", results.to_json())


def _all_test_images(run: Run) -> Iterable[Any]:
    """Not only this rank's share; of a stream that is all there is."""
    dataset = run.data.splits.test
    if isinstance(dataset, IterableDataset):
        return run.data.test_dataloader()
    return DataLoader(dataset, run.data.batch_size, num_workers=run.data.num_workers)


def _times(run: Run, models: Mapping[str, nn.Module]) -> dict[int, Any]:
    timing, size = run.settings["latency"], (run.data.in_chans, run.data.img_size, run.data.img_size)
    each = partial(latencies, models, input_size=size, rounds=timing["rounds"], progress=True)
    return {batch: each(batch) for batch in timing["batch_sizes"]}


def report(run: Run) -> str:
    """Say how it went, on screen, as the page ``report.html`` and as ``report.md`` with ``pictures/``."""
    made = write_report(run.folder.path)
    console = progress.console()
    if made.comparison is not None:
        console.print()
        console.print(made.comparison.rich(made.title))
    for line in (made.verdict, *made.findings):
        log.info("- %s", line)
    for what, command in made.commands:
        log.info("%s:\n  %s", what, command)
    return f"{run.folder / 'report.html'}"


@dataclass(frozen=True)
class Stage:
    """One stage: what it does, what it is built on, what its result depends on, what it leaves."""

    work: Callable[[Run], str]
    output: str
    needs: tuple[str, ...] = ()
    looks_at: tuple[str, ...] = ()  # of stages that may be left out, what it shows if they are done
    settings: tuple[str, ...] = ()  # dotted keys
    uses_data: bool = True
    on_all_ranks: bool = True
    in_all: bool = True  # whether stage=all runs it


# Of the Trainer's settings, those that change what is learnt; another device or logging interval does not.
_TRAINING = tuple(
    f"trainer.{key}"
    for key in ("precision", "gradient_clip_val", "accumulate_grad_batches", "limit_train_batches", "fast_dev_run")
)
# What says how tokens leave. Compensation is none of it: it changes neither masks nor what each cut alone shows.
_TOKENS = ("surgery.token_score", "surgery.fuse_tokens", "surgery.stages")
# What says which policies there are.
_SPACE = (
    *("seed", "budget", *_TOKENS),
    *(f"policy.{key}" for key in ("dimensions", "min_heads", "min_neurons", "round_to")),
    *(f"search.{key}" for key in ("bounds", "groups", "token_ratio")),
)

STAGES: Mapping[str, Stage] = {
    "dense": Stage(dense, "dense", settings=("seed", "data", "model", "dense", *_TRAINING)),
    "score": Stage(
        score_units, "scores.safetensors", ("dense",), settings=("seed", "importance", "calibration", "surgery.stages")
    ),
    "share": Stage(share, "shared", ("dense", "score"), settings=("sharing", *_SPACE, *_TRAINING)),
    # Not of scores, but with the same ones: a sweep keeps all that its trials share in one place, see `cache_folder`.
    "statistics": Stage(
        statistics, "statistics.safetensors", ("dense", "score", "share"), settings=("seed", "calibration")
    ),
    "sensitivity": Stage(
        sensitivity, "sensitivity.csv", ("dense", "score", "share"), settings=("sensitivity", *_TOKENS), in_all=False
    ),
    "search": Stage(
        search,
        "policy.json",
        ("dense", "score", "share", "statistics"),
        settings=("seed", "budget", "policy", "policy_file", "search", "surgery"),
    ),
    "slim": Stage(
        cut,
        "slim",
        ("dense", "score", "share", "statistics", "search"),
        settings=("surgery",),
        uses_data=False,
        on_all_ranks=False,
    ),
    "distill": Stage(distill, "finetuned", ("slim",), settings=("distillation", *_TRAINING)),
    "test": Stage(test, "results.json", ("slim",), ("distill",), settings=("latency", "test_data")),
    "report": Stage(report, "report.html", ("test",), ("sensitivity",), uses_data=False, on_all_ranks=False),
}


# --- what stages do ---------------------------------------------------------------------------------------------------


def train(run: Run, options: build.Settings, module: DistillationModule, name: str, mark: str) -> None:
    """Train the student in `module` and save it as the artifact `name`; what was killed goes on from its checkpoint."""
    # Named by what they were made with: weights of other settings are never gone on from.
    title = name.replace("/", "-")
    checkpoints = run.folder / "checkpoints" / f"{title}-{mark[:12]}"
    last = checkpoints / "last.ckpt"
    begun = on_first_rank(last.exists)
    if begun:
        log.info("  %s: going on from %s", name, last)
    trainer = build_trainer(run.settings, options, checkpoints, run.trackers.curves(name), name)
    module.student.train()  # an artifact comes in eval mode
    whole = copy.deepcopy(module.student) if shards_parameters(run.settings) else None
    trainer.fit(module, datamodule=run.data, ckpt_path=last if begun else None)
    if whole is not None:  # in the checkpoint the parts of all ranks are together again
        weights = torch.load(last, map_location="cpu", weights_only=True)["state_dict"]
        whole.load_state_dict({key.removeprefix("student."): value for key, value in weights.items()})
    on_first_rank(partial(_keep, run, module.student if whole is None else whole, name))
    # Not before the result is safe.
    on_first_rank(partial(shutil.rmtree, checkpoints, ignore_errors=True))


def _keep(run: Run, model: nn.Module, name: str) -> None:
    save(model.cpu().eval(), run.folder / name, class_names=list(run.data.class_names) if name == "dense" else None)


def search_for_policy(run: Run, model: nn.Module) -> SearchResult:
    """Search, or go on with a search that was killed or had fewer trials; leaves its trials in ``search/``."""
    options, surgery = dict(run.settings["search"]), run.settings["surgery"]
    # All but the number of trials makes a search what it is: with more of them it goes on.
    same = {key: run.settings[key] for key in ("seed", "budget", "policy", "surgery")}
    upstream = upstream_of_cuts(run)
    if compensates(run.settings):
        upstream["statistics"] = run.marks["statistics"]
    mark = fingerprint({**same, **{k: v for k, v in options.items() if k != "n_trials"}}, upstream)
    state = run.folder / "search" / f"trials-{mark[:12]}.jsonl"
    # There may be others, of other budgets: whoever reads the folder has to know which one this is.
    on_first_rank(partial(write_text, run.folder / CURRENT_STUDY, state.name))
    if state.exists():
        log.info("  going on from %s", state)
    held_out = build.build_held_out(run.settings, held_out_batches(run), model, run.device)
    result = search_policies(
        model,
        Scores.load(run.folder / "scores.safetensors"),
        held_out,
        build.build_budget(run.settings),
        n_trials=options["n_trials"],
        seed=run.settings["seed"],
        token_score=surgery["token_score"],
        fuse_tokens=surgery["fuse_tokens"],
        n_initial_points=options["n_initial_points"],
        early_stop=options["early_stop"],
        warm_start=options["warm_start"],
        state=state,
        on_trial=lambda row, best: run.trackers.show(lambda: [trial_numbers(row, best)]),
        **build.space_options(run.settings),
        **run.compensation,
    )
    first, best = result.history[0], result.best
    if first.value is not None and first.policy == result.space.uniform:
        metric = held_out.metric if held_out.metric == "accuracy" else f"-{held_out.metric}"
        log.info("  %s: uniform %.4g, best %.4g (trial %d)", metric, first.value, best.value, best.number)
    return result


def held_out_batches(run: Run) -> DataLoader[Any]:
    """All search-validation images, on every rank the same: `HeldOut` shares them out.

    Raises:
        DataError: a stream shares itself out, but not as it should.
    """
    dataset = run.data.splits.val
    if isinstance(dataset, IterableDataset) and world_size() > 1:
        raise DataError(
            f"stage='search' on {world_size()} processes: every rank reads another part of this streamed data set; run "
            "it (and 'sensitivity') with trainer.devices=1 and resume=true, the other stages on all devices"
        )
    return DataLoader(dataset, run.data.batch_size, num_workers=run.data.num_workers)


def calibration_batches(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of a seeded sample of the training images under the evaluation transforms, with labels."""
    images, batch_size = run.settings["calibration"]["images"], run.settings["calibration"]["batch_size"]
    dataset = run.data.calibration_dataset()
    workers = run.data.num_workers
    if isinstance(dataset, IterableDataset):
        wanted = -(-images // (batch_size * world_size()))
        return islice(iter(DataLoader(dataset, batch_size, num_workers=workers)), wanted)
    total = len(dataset)  # type: ignore[arg-type]
    order = np.random.default_rng(run.settings["seed"]).permutation(total)[:images].tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if len(batches) > 1 and 2 * len(batches[-1]) < batch_size:
        batches.pop()  # as `score` would, if it saw them all
    return iter(DataLoader(dataset, batch_sampler=batches[rank() :: world_size()], num_workers=workers))


def _models_to_test(run: Run) -> Iterator[tuple[tuple[str, int | None], tuple[str, nn.Module]]]:
    """((kind, seed), (place, model)) of each model."""
    options = run.settings["distillation"]
    found: list[tuple[str, int | None, str]] = [(reporting.DENSE, None, "dense"), (reporting.SLIM, None, "slim")]
    if run.with_finetuned:
        found += [(reporting.FINETUNED, seed, f"finetuned/seed{seed}") for seed in options["seeds"]]
        found += [(reporting.REFERENCE, seed, f"reference/seed{seed}") for seed in options["reference_seeds"]]
    for kind, seed, place in found:
        yield (kind, seed), (place, run.model(place).to(run.device))


def _teacher(run: Run, options: build.Settings) -> nn.Module | str | None:
    """The run's own dense model, or the one that ``distillation.teacher`` names, or none."""
    return run.model("dense") if options["teacher"] == "dense" else options["teacher"]


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type.upper()}, {threads} thread{'' if threads == 1 else 's'}, fp32"
