"""What the steps of ``train.py`` do, from dense, score, search and slim to distill, test and report.

A step is a function of its name. It reads what earlier steps left in the run's folder, writes its own outputs there and
returns a line about them. What it needs and leaves is in `step_table`, whether it has to run decides `pipeline`. In a
distributed run most steps share their work out over all ranks, and the first one writes.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_mdc as mdc
from lightning_mdc import progress
from lightning_mdc.app import build, evaluation, recipes
from lightning_mdc.app.data import ImageDataModule
from lightning_mdc.app.fingerprints import fingerprint_of, relevant
from lightning_mdc.app.report import results as reporting
from lightning_mdc.app.report.outcomes import Outcomes
from lightning_mdc.app.report.write import write_report
from lightning_mdc.app.run_folder import CURRENT_STUDY, RunFolder
from lightning_mdc.app.settings import token_options
from lightning_mdc.app.step_table import STEPS
from lightning_mdc.app.tracking import Trackers
from lightning_mdc.app.trainer import (
    BestEpoch,
    build_module,
    build_trainer,
    module_options,
    shards_parameters,
    training_device,
)
from lightning_mdc.artifact import WEIGHTS
from lightning_mdc.budget import num_params
from lightning_mdc.budget.timing import latencies
from lightning_mdc.distillation import DistillationModule
from lightning_mdc.distillation.weight_sharing import WeightSharingModule
from lightning_mdc.distributed import on_first_rank, rank, world_size
from lightning_mdc.errors import DataError
from lightning_mdc.figures.numbers import percent, scaled
from lightning_mdc.figures.search_items import trial_numbers
from lightning_mdc.files import write_text
from lightning_mdc.importance import Moments, Scores
from lightning_mdc.models import find_anatomy
from lightning_mdc.policy import DIMENSIONS, Plan, Policy
from lightning_mdc.policy_search.driver import SearchOptions, SearchResult
from lightning_mdc.policy_search.sensitivity import measure_sensitivity
from lightning_mdc.surgery import compensation
from lightning_mdc.unpickling import read

log = logging.getLogger(__name__)


@dataclass
class Run:
    """What every step is given: the settings, the folder, and what is made from the two on demand.

    Attributes:
        settings: all of them.
        folder: of the run, or of what the trials of a sweep share.
        fingerprints: of every step under these settings.
        has_finetuned: whether there are finetuned models to test.
        trackers: what the run is watched with.
    """

    settings: build.Settings
    folder: RunFolder
    fingerprints: dict[str, str] = field(default_factory=dict)
    has_finetuned: bool = False
    trackers: Trackers = field(default_factory=Trackers)

    @cached_property
    def data(self) -> ImageDataModule:
        return build.build_data(self.settings)

    @cached_property
    def device(self) -> torch.device:
        return training_device(self.settings)

    def output(self, name: str) -> Path:
        """Where the step `name` leaves the output that it is known by."""
        return self.folder / STEPS[name].output

    def is_done(self, name: str) -> bool:
        """Whether the step was finished with these settings and its output is still there."""
        has_all = all((self.folder / output.path).exists() for output in STEPS[name].outputs if output.needed)
        return has_all and self.folder.is_done(name, self.fingerprints[name], self.output(name))

    def model(self, artifact: str) -> nn.Module:
        """A model that an earlier step saved in the run's folder, such as ``finetuned/seed0``; on the CPU."""
        return mdc.load(self.folder / artifact)

    def held_out(self, artifact: str) -> tuple[float | None, float | None]:
        """Fractions of the held-out images that were right before and at best after its training; None: not judged."""
        made, training = self.folder.record(artifact), self.folder.record(f"{artifact}/training")
        if made is None or training is None or made["fingerprint"] != training["fingerprint"]:
            return None, None  # of a training with other settings
        return training["before"], training["after"]

    @property
    def weights(self) -> str:
        """The artifact that is searched over and pruned: the dense model, or what weight sharing made of it."""
        return "dense" if STEPS["share"].is_off(self.settings) else "shared"

    @property
    def scores(self) -> Scores:
        return Scores.load(self.output("score"))

    @cached_property
    def moments(self) -> Moments:
        """Those of the weights that are pruned."""
        return Moments.load(self.folder / _moments_of(self.weights))

    @property
    def judging_fingerprints(self) -> dict[str, str]:
        """Fingerprints of what a policy is judged with: the weights, and the scores that say which units go first."""
        names = ("dense", "score") if self.weights == "dense" else ("dense", "score", "share")
        return {name: self.fingerprints[name] for name in names}


def pruned(run: Run, model: nn.Module, policy: Policy, compensate: str) -> tuple[Plan, nn.Module]:
    """(plan, slim model) that a policy comes to, with the scores of the run."""
    size = find_anatomy(model).input_size[1:]  # a file's policy may be of another
    plan = mdc.make_plan(model, run.scores, policy, token_options(run.settings), input_size=size)
    moments = run.moments if compensate == "lstsq" else None
    # Twice as many as are scored, as elsewhere, where the images that judged policies serve the refit, too: here they
    # are to judge its finetuning.
    twice = 2 * run.settings["calibration"]["images"]
    batches = calibration_batches(run, share=False, images=twice) if compensate == "sequential" else None
    return plan, mdc.slim(model, plan, compensate, moments=moments, batches=batches)


def compensation_of_trials(run: Run, model: nn.Module) -> str:
    """How the slim model is compensated for where policies are tried."""
    return compensation.compensation_of_trials(run.settings["surgery"]["compensate"], find_anatomy(model).all_units)


def _moments_of(weights: str) -> str:
    """Name of the file of moments beside an artifact that can be pruned."""
    return "moments.safetensors" if weights == "dense" else f"{weights}-moments.safetensors"


# --- the steps --------------------------------------------------------------------------------------------------------


def dense(run: Run) -> str:
    """Train the dense model, or take its weights as they are; leaves ``dense/``."""
    options = run.settings["dense"]
    model = build.build_model(run.settings, run.data)
    if options["epochs"]:
        log.info("  %s", recipes.described(run.settings, "dense"))
        judged = recipes.given_weights(run.settings) is not None
        train(run, "dense", build_module(options, model, None), "dense", run.fingerprints["dense"], judged=judged)
    else:
        on_first_rank(partial(_save, run, model, "dense"))
    return f"{type(model).__name__} of {scaled(mdc.macs(model))}MACs, {num_params(model):,} parameters"


def score(run: Run) -> str:
    """Score heads, neurons and token positions; leaves ``scores.safetensors`` and ``moments.safetensors``."""
    model = run.model("dense").to(run.device)
    criterion, stages = build.build_criterion(run.settings), run.settings["surgery"]["stages"]
    scores = mdc.score(model, calibration_batches(run), criterion, stages=stages, moments=True, over_ranks=True)
    assert scores.moments is not None  # asked for
    on_first_rank(partial(scores.moments.save, run.folder / _moments_of("dense")))
    on_first_rank(partial(scores.save, run.output("score")))
    return f"{scores.criterion} over {scores.images} images"


def share(run: Run) -> str:
    """Train the dense weights under many policies at once, which the search then tells apart; leaves ``shared/``."""
    options = run.settings["sharing"]
    module = WeightSharingModule(
        run.model("dense"),
        run.scores,
        build.build_budget(run.settings),
        **build.search_space(run.settings),
        **module_options(options),
        seed=run.settings["seed"],
    )
    trained = "shared/weights", run.fingerprints["share"]  # of which a kill in what follows takes nothing away
    if not on_first_rank(partial(run.folder.is_done, *trained, run.folder / "shared")):
        on_first_rank(partial(run.folder.start, trained[0]))
        log.info("  %s", recipes.described(run.settings, "sharing"))
        # What is held out tells how good the dense model is, which is not what these weights are for.
        train(run, "sharing", module, "shared", run.fingerprints["share"], judged=False)
        on_first_rank(partial(run.folder.finish, *trained))
    # Policies were trained by the dense model's scores, but what makes up for units has to know the new weights.
    model = run.model("shared").to(run.device)
    moments = mdc.score(model, calibration_batches(run), "magnitude", moments=True, over_ranks=True).moments
    assert moments is not None  # asked for
    on_first_rank(partial(moments.save, run.folder / _moments_of("shared")))
    return f"{options['epochs']} epochs of weight sharing"


def sensitivity(run: Run) -> str:
    """Prune every dimension of every block alone, to see which bear it; leaves ``sensitivity.csv``."""
    options, surgery = run.settings["sensitivity"], run.settings["surgery"]
    # Cuts depend on all but the levels: with other levels those that are there are not made again.
    cut_settings = {
        "images": options["images"],
        "surgery": {key: value for key, value in surgery.items() if key != "compensate"},
    }
    state = run.folder / "sensitivity" / f"cuts-{fingerprint_of(cut_settings, run.judging_fingerprints)[:12]}.csv"
    if on_first_rank(state.exists):
        log.info("  going on from %s", state)
    model = run.model(run.weights).to(run.device)
    held_out = build.build_held_out({**options, "metric": "kl"}, held_out_batches(run), model, run.device)
    measured = measure_sensitivity(
        model,
        run.scores,
        held_out,
        levels={name: options[name] for name in DIMENSIONS},
        stages=surgery["stages"],
        tokens=token_options(run.settings),
        state=state,
    )
    on_first_rank(partial(measured.save, run.output("sensitivity")))
    worst = max(measured.cuts, key=lambda cut: cut.kl)
    return (
        f"{len(measured.cuts)} cuts on {held_out.num_images} images; worst: {worst.dimension} of block {worst.block} "
        f"to {worst.keep:.0%} (KL {worst.kl:.3g}, top-1 {worst.accuracy:.1%})"
    )


def search(run: Run) -> str:
    """Decide how much each block keeps; leaves ``policy.json`` and, if it was searched for, ``search/``."""
    model = run.model(run.weights).to(run.device)
    policy = build.given_policy(run.settings, model)
    if policy is None:
        policy = search_for_policy(run, model).policy
    on_first_rank(partial(write_text, run.output("search"), policy.to_json()))
    ratios = (f"{name} {np.mean(policy.ratios[name]):.2f}" for name in DIMENSIONS)
    return f"mean keep ratios: {', '.join(ratios)}"


def slim(run: Run) -> str:
    """Decide which units stay and make the slim model; leaves ``plan.json`` and ``slim/``."""
    model = run.model(run.weights).to(run.device)
    policy = Policy.load(run.output("search"))
    plan, slim_model = pruned(run, model, policy, run.settings["surgery"]["compensate"])
    healing = run.settings["healing"]
    if healing["epochs"]:
        batches = calibration_batches(run, share=False, images=healing["images"])
        mdc.heal(slim_model, model, batches, healing["epochs"], healing["lr"], seed=run.settings["seed"])
    write_text(run.folder / "plan.json", plan.to_json())
    mdc.save(slim_model.cpu(), run.output("slim"))
    return (
        f"{mdc.macs(slim_model) / mdc.macs(model):.1%} of the MACs, "
        f"{num_params(slim_model) / num_params(model):.1%} of the parameters"
    )


def distill(run: Run) -> str:
    """Finetune slim under the dense teacher, and dense as well, per seed; leaves ``finetuned/`` and ``reference/``."""
    options = run.settings["distillation"]
    if options["epochs"]:
        log.info("  %s", recipes.described(run.settings, "distillation"))
    for seed in options["seeds"]:
        finetune(run, f"finetuned/seed{seed}", "slim", seed)
    for seed in options["reference_seeds"]:
        finetune(run, f"reference/seed{seed}", "dense", seed)
    return (
        f"{len(options['seeds'])} slim and {len(options['reference_seeds'])} dense runs of {options['epochs']} epochs"
    )


def test(run: Run) -> str:
    """Measure every model on the test images; leaves ``results.json``, what each model says of each image, and a few
    images to look at."""
    tested = _models_to_test(run)
    models = {artifact: run.model(artifact) for artifact in tested}
    # All slim models have one architecture, and so has dense: two are timed, in turn, for all.
    times = on_first_rank(partial(_times, run, {name: models[name].to(run.device) for name in ("dense", "slim")}))
    outcomes = evaluation.outcomes(models, run.data.test_dataloader(), run.device, run.data.class_names)
    if not len(outcomes.labels):
        raise DataError(
            "the test split is empty: nothing can be reported; raise data.test_fraction or give a test split"
        )
    rows = []
    for artifact, (kind, seed) in tested.items():
        model, predicted = models[artifact], outcomes.predicted[artifact]
        before, after = run.held_out(artifact)
        architecture = "dense" if kind in (reporting.DENSE, reporting.REFERENCE) else "slim"
        rows.append(
            reporting.Result(
                model=kind,
                seed=seed,
                correct=int((predicted == outcomes.labels).sum()),
                agreeing=int((predicted == outcomes.predicted["dense"]).sum()),
                images=len(outcomes.labels),
                macs=mdc.macs(model),
                params=num_params(model),
                size=(run.folder / artifact / WEIGHTS).stat().st_size,
                latency={batch_size: seconds[architecture] for batch_size, seconds in times.items()},
                before=before,
                after=after,
            )
        )
    harm = reporting.harm_by_model(rows, partial(recipes.remedy, run.settings))
    results = reporting.Results(tuple(rows), run.settings["name"], _describe_device(run.device), harm)
    on_first_rank(partial(_save_results, run, results, outcomes, models))
    first, last = results.of(reporting.DENSE)[0], results.slimmest
    return f"dense {first.correct}/{first.images}, {last.model} {last.correct}/{last.images}"


def report(run: Run) -> str:
    """Say how it went, on screen, as the page ``report.html`` and as ``report.md`` with ``pictures/``."""
    written = write_report(run.folder.path)
    console = progress.console()
    if written.comparison is not None:
        console.print()
        console.print(written.comparison.rich(written.title))
    for line in (written.verdict, *written.findings):
        log.info("- %s", line)
    for what, command in written.commands:
        log.info("%s:\n  %s", what, command)
    return f"{run.output('report')}"


# What runs a step, by its name.
ACTIONS: Mapping[str, Callable[[Run], str]] = {
    action.__name__: action for action in (dense, score, share, sensitivity, search, slim, distill, test, report)
}


# --- training ---------------------------------------------------------------------------------------------------------


def train(
    run: Run, training: str, module: DistillationModule, artifact: str, fingerprint: str, *, judged: bool
) -> None:
    """Train the student in `module` and save it as `artifact`; what was killed goes on from its checkpoint.

    Args:
        training: the group of its settings: ``epochs``, and ``ema_decay`` if it has one.
        fingerprint: of the result. Checkpoints are named by it: weights of other settings are never gone on from.
        judged: keep what gets the most held-out images right, of the start and the epochs that are validated; else, and
            where no images are held out, or the student has no classes, the last epoch is kept.
    """
    checkpoints = run.folder / "checkpoints" / f"{artifact.replace('/', '-')}-{fingerprint[:12]}"
    last, best = checkpoints / "last.ckpt", BestEpoch(checkpoints) if judged and module.has_classes else None
    begun = on_first_rank(last.exists)
    if begun:
        log.info("  %s: going on from %s", artifact, last)
    loggers = run.trackers.curves(artifact)
    trainer = build_trainer(run.settings, run.settings[training], checkpoints, loggers, artifact, best)
    start = copy.deepcopy(module.student)
    module.student.train()  # an artifact comes in eval mode
    trainer.fit(module, datamodule=run.data, ckpt_path=last if begun else None)
    # In a checkpoint the parts of all ranks are together.
    trained = last if shards_parameters(run.settings) else module.student
    if best is not None and best.before is not None and best.after is not None:
        trained = start if best.before > best.after else best.path
        _tell(run, training, artifact, best.before, best.after)
        facts = {"before": best.before, "after": best.after}
        on_first_rank(partial(run.folder.finish, f"{artifact}/training", fingerprint, **facts))
    on_first_rank(lambda: _save(run, _with_weights(start, trained), artifact))
    # Not before the result is safe.
    on_first_rank(partial(shutil.rmtree, checkpoints, ignore_errors=True))


def _with_weights(model: nn.Module, weights: nn.Module | Path) -> nn.Module:
    """`weights` themselves, or `model` with those of its student that the checkpoint there holds."""
    if isinstance(weights, nn.Module):
        return weights
    state = read(weights)["state_dict"]
    model.load_state_dict({name.removeprefix("student."): value for name, value in state.items()})
    return model


def _tell(run: Run, training: str, artifact: str, before: float, after: float) -> None:
    if before > after:
        harm = reporting.harm(before, after, recipes.remedy(run.settings, training))
        log.warning("  %s: the training did harm: %s", artifact, harm)
    else:
        shown = artifact, percent(before), percent(after)
        log.info("  %s: %s of the held-out images are right before it, %s after it", *shown)


def finetune(run: Run, artifact: str, start: str, seed: int) -> None:
    """One finetuning run from the artifact `start`, dense or slim; done once, however often it is asked for."""
    options = run.settings["distillation"]
    depends_on = relevant(run.settings, "distill")
    for name in ("seeds", "reference_seeds"):  # one more seed changes nothing for the others
        del depends_on[f"distillation.{name}"]
    # The dense teacher is upstream of both; slim, and with it the budget, is not upstream of dense.
    fingerprint = fingerprint_of({"seed": seed, **depends_on}, {start: run.fingerprints[start]})
    if on_first_rank(partial(run.folder.is_done, artifact, fingerprint, run.folder / artifact)):
        log.info("  %s: picked up from %s", artifact, run.folder / artifact)
        return
    on_first_rank(partial(run.folder.start, artifact))
    seed_everything(seed, workers=True, verbose=False)
    student = run.model(start)
    if options["epochs"]:
        teacher = run.model("dense") if options["teacher"] == "dense" else options["teacher"]
        train(run, "distillation", build_module(options, student, teacher), artifact, fingerprint, judged=True)
    else:
        on_first_rank(partial(_save, run, student, artifact))
    on_first_rank(partial(run.folder.finish, artifact, fingerprint))


def _save(run: Run, model: nn.Module, artifact: str) -> None:
    class_names = list(run.data.class_names) if artifact == "dense" and model.num_classes else None
    mdc.save(model.cpu().eval(), run.folder / artifact, class_names=class_names)


# --- scoring and searching --------------------------------------------------------------------------------------------


def search_for_policy(run: Run, model: nn.Module) -> SearchResult:
    """Search, or go on with a search that was killed or had fewer trials; leaves its trials in ``search/``."""
    options = run.settings["search"]
    # Trials depend on all but their number: with more of them the search goes on.
    trial_settings = {k: v for k, v in relevant(run.settings, "search").items() if k != "search.n_trials"}
    trial_settings["search.warm_start"] = options["warm_start"]  # what was in it then is in the file of the trials
    upstream = run.judging_fingerprints
    state = run.folder / "search" / f"trials-{fingerprint_of(trial_settings, upstream)[:12]}.jsonl"
    # There may be others, of other budgets: whoever reads the folder has to know which one this is.
    on_first_rank(partial(write_text, run.folder / CURRENT_STUDY, state.name))
    if state.exists():
        log.info("  going on from %s", state)
    held_out = build.build_held_out(options, held_out_batches(run), model, run.device)
    compensate = compensation_of_trials(run, model)
    scores = run.scores if compensate == "none" else run.scores.with_moments(run.moments)
    result = mdc.search(
        model,
        scores,
        held_out,
        build.build_budget(run.settings),
        n_trials=options["n_trials"],
        seed=run.settings["seed"],
        **build.search_space(run.settings),
        compensate=compensate,
        options=SearchOptions(
            journal=state,
            warm_start=options["warm_start"],
            initial_points=options["n_initial_points"],
            on_trial=lambda trial, best: run.trackers.show(lambda: [trial_numbers(trial, best)]),
        ),
    )
    first, best = result.history[0], result.best
    if first.value is not None and result.space is not None and first.policy == result.space.uniform:
        metric = held_out.metric if held_out.metric == "accuracy" else f"-{held_out.metric}"
        log.info("  %s: uniform %.4g, best %.4g (trial %d)", metric, first.value, best.value, best.number)
    return result


def held_out_batches(run: Run) -> DataLoader[Any]:
    """All held-out training images, on every rank the same: `HeldOut` shares them out.

    Raises:
        DataError: a stream shares itself out, but not as it should.
    """
    dataset = run.data.splits.val
    if isinstance(dataset, IterableDataset) and world_size() > 1:
        raise DataError(
            f"stage='search' on {world_size()} processes: every rank reads another part of this streamed data set; run "
            "it (and 'sensitivity') with trainer.devices=1 and resume=true, the other steps on all devices"
        )
    return DataLoader(dataset, run.data.batch_size, num_workers=run.data.num_workers)


def calibration_batches(run: Run, share: bool = True, images: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """A seeded sample of the training images under the evaluation transforms, with labels: all of it, or this rank's
    `share`; so many `images`, or as many as are scored."""
    first, step = (rank(), world_size()) if share else (0, 1)
    options = run.settings["calibration"]
    images, batch_size = options["images"] if images is None else images, options["batch_size"]
    dataset = run.data.splits.calibration
    workers = run.data.num_workers
    if isinstance(dataset, IterableDataset):
        wanted = -(-images // (batch_size * step))
        return islice(iter(DataLoader(dataset, batch_size, num_workers=workers)), wanted)
    total = len(dataset)  # type: ignore[arg-type]
    order = np.random.default_rng(run.settings["seed"]).permutation(total)[:images].tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if len(batches) > 1 and 2 * len(batches[-1]) < batch_size:
        batches.pop()  # as `score` would, if it saw them all
    return iter(DataLoader(dataset, batch_sampler=batches[first::step], num_workers=workers))


# --- testing ----------------------------------------------------------------------------------------------------------


def _models_to_test(run: Run) -> dict[str, tuple[str, int | None]]:
    """By where each lies: (what kind it is in the results, the seed it was finetuned with)."""
    options = run.settings["distillation"]
    tested: dict[str, tuple[str, int | None]] = {"dense": (reporting.DENSE, None), "slim": (reporting.SLIM, None)}
    if run.has_finetuned:
        tested |= {f"finetuned/seed{seed}": (reporting.FINETUNED, seed) for seed in options["seeds"]}
        tested |= {f"reference/seed{seed}": (reporting.REFERENCE, seed) for seed in options["reference_seeds"]}
    return tested


def _times(run: Run, models: Mapping[str, nn.Module]) -> dict[int, dict[str, float]]:
    """Seconds per image of each model, by batch size and name."""
    input_size, rounds = (run.data.in_chans, run.data.img_size, run.data.img_size), run.settings["latency"]["rounds"]
    return {
        batch_size: latencies(models, batch_size, input_size, rounds=rounds, progress=True)
        for batch_size in run.settings["latency"]["batch_sizes"]
    }


def _save_results(run: Run, results: reporting.Results, outcomes: Outcomes, models: Mapping[str, nn.Module]) -> None:
    artifact = outcomes.slim_models[0]
    examples = evaluation.examples(
        models["dense"].to(run.device),
        models[artifact].to(run.device),
        artifact,
        _all_test_images(run),
        run.device,
        run.data.class_names,
        run.data.to_pixels,
    )
    outcomes.save(run.folder / "predictions.safetensors")
    examples.save(run.folder / "examples.safetensors")
    write_text(run.output("test"), results.to_json())


def _all_test_images(run: Run) -> Iterable[Any]:
    """Not only this rank's share; of a stream that is all there is."""
    dataset = run.data.splits.test
    if isinstance(dataset, IterableDataset):
        return run.data.test_dataloader()
    return DataLoader(dataset, run.data.batch_size, num_workers=run.data.num_workers)


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type.upper()}, {threads} thread{'' if threads == 1 else 's'}, fp32"
