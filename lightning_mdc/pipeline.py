"""The stages of ``train.py``: dense, score, policy, slim, distill, test, report.

Each stage is a function that reads what earlier stages left in the run's folder and writes its own output there. What a
stage's result depends on is listed in `STAGES`; `run` decides from it which stages have to run and which are done.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import torch
from lightning import seed_everything
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from tqdm.auto import tqdm

from lightning_mdc import assembly, reporting
from lightning_mdc.artifact import WEIGHTS, load, save
from lightning_mdc.budget import CostModel, macs, num_params
from lightning_mdc.budget.latency import latencies
from lightning_mdc.data import ImageDataModule
from lightning_mdc.errors import ConfigError, DataError
from lightning_mdc.importance import Scores, make_plan, score
from lightning_mdc.models import find_sites
from lightning_mdc.policy import TOKEN_SCORES, Plan, Policy
from lightning_mdc.run_folder import RunFolder, fingerprint, open_run, write_text
from lightning_mdc.surgery import slim

log = logging.getLogger(__name__)


@dataclass
class Run:
    """What every stage is given: the settings, the folder, and what is made from the settings on demand."""

    settings: assembly.Settings
    folder: RunFolder
    marks: dict[str, str] = field(default_factory=dict)  # fingerprint of each stage under these settings
    with_finetuned: bool = False  # whether there are finetuned models to test

    @cached_property
    def data(self) -> ImageDataModule:
        return assembly.build_data(self.settings)

    @cached_property
    def device(self) -> torch.device:
        return assembly.device(self.settings)

    def model(self, name: str) -> nn.Module:
        """The artifact of an earlier stage."""
        return load(self.folder / name)

    @property
    def plan(self) -> Plan:
        return Plan.from_json((self.folder / "plan.json").read_text())


# --- the stages -------------------------------------------------------------------------------------------------------


def dense(run: Run) -> str:
    """Train the dense model, or load one; leaves ``dense/``."""
    options = run.settings["dense"]
    model = assembly.build_model(run.settings, run.data)
    if options["epochs"]:
        model = train(run, options, model, None, title="dense", mark=run.marks["dense"])
    save(model.eval(), run.folder / "dense", class_names=list(run.data.class_names))
    size = f"{reporting.scaled(macs(model))}MACs, {num_params(model):,} parameters"
    return f"{type(model).__name__} of {size}"


def score_units(run: Run) -> str:
    """Score heads, neurons and token positions; leaves ``scores.safetensors``."""
    model = run.model("dense").to(run.device)
    criterion, stages = assembly.build_criterion(run.settings), run.settings["surgery"]["stages"]
    scores = score(model, calibration_batches(run), criterion, stages=stages)
    beside = run.folder / f".scores.{os.getpid()}"
    scores.save(beside)
    os.replace(beside, run.folder / "scores.safetensors")
    return f"{criterion.name} over {scores.images} images"


def decide(run: Run) -> str:
    """Decide how much each block keeps; leaves ``policy.json``."""
    policy = assembly.build_policy(run.settings, run.model("dense"))
    write_text(run.folder / "policy.json", policy.to_json())
    ratios = (f"{name} {np.mean(getattr(policy, name)):.2f}" for name in ("heads", "neurons", "tokens"))
    return f"mean keep ratios: {', '.join(ratios)}"


def cut(run: Run) -> str:
    """Decide which units stay and make the slim model; leaves ``plan.json`` and ``slim/``."""
    model, surgery = run.model("dense"), run.settings["surgery"]
    plan = make_plan(
        model,
        Scores.load(run.folder / "scores.safetensors"),
        Policy.load(run.folder / "policy.json"),
        token_score=surgery["token_score"],
        fuse_tokens=surgery["fuse_tokens"],
    )
    small = slim(model, plan)
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
    if run.folder.is_done(name, mark, run.folder / name):
        log.info("  %s: picked up from %s", name, run.folder / name)
        return
    run.folder.start(name)
    seed_everything(seed, workers=True, verbose=False)
    student = run.model(start)
    if options["epochs"]:
        student = train(run, options, student, run.model("dense"), title=name, mark=mark)
    save(student.eval(), run.folder / name)
    run.folder.finish(name, mark)


def test(run: Run) -> str:
    """Measure every model on the test images; leaves ``results.json``."""
    models = dict(_models_to_test(run))
    timing = run.settings["latency"]
    dense_model, slim_model = models[reporting.DENSE, None][1], models[reporting.SLIM, None][1]
    # All slim models have one architecture, and so has dense: two are timed, in turn, for all.
    pair = {"dense": dense_model, "slim": slim_model}
    size = (run.data.in_chans, run.data.img_size, run.data.img_size)
    times = {batch: latencies(pair, batch, size, rounds=timing["rounds"]) for batch in timing["batch_sizes"]}
    labels, dense_classes = predictions(run, dense_model, "dense")
    rows = []
    for (kind, seed), (place, model) in models.items():
        _, classes = predictions(run, model, place)
        which = "dense" if kind in (reporting.DENSE, reporting.REFERENCE) else "slim"
        rows.append(
            reporting.Result(
                model=kind,
                seed=seed,
                correct=int((classes == labels).sum()),
                agreeing=int((classes == dense_classes).sum()),
                images=len(labels),
                macs=macs(model),
                params=num_params(model),
                size=(run.folder / place / WEIGHTS).stat().st_size,
                latency={batch: by_name[which] for batch, by_name in times.items()},
            )
        )
    results = reporting.Results(tuple(rows), run.settings["name"], _describe_device(run.device))
    write_text(run.folder / "results.json", results.to_json())
    first, last = results.of(reporting.DENSE)[0], results.slimmest
    return f"dense {first.correct}/{first.images}, {last.model} {last.correct}/{last.images}"


def report(run: Run) -> str:
    """Say how it went, on screen and in ``report.md`` with the picture ``kept.png``."""
    results = reporting.Results.load(run.folder / "results.json")
    sites = find_sites(run.model("dense"))
    kept = reporting.kept_by_block(run.plan, CostModel(sites).num_tokens, sites.num_prefix_tokens)
    figure = reporting.kept_figure(kept, f"{results.name}: what each block kept")
    reporting.save_figure(figure, run.folder / "kept.png")
    text = reporting.markdown(results, _places(run), _commands(run), "kept.png")
    write_text(run.folder / "report.md", text)
    console = rich.console.Console()
    console.print()
    console.print(reporting.comparison(results).rich(f"{results.name}: dense and slim side by side"))
    for line in reporting.findings(results):
        console.print(f"- {line}", highlight=False)
    console.print()
    for what, command in _commands(run):
        console.print(f"{what}:\n  {command}", highlight=False, markup=False, soft_wrap=True)
    console.print()
    return f"{run.folder / 'report.md'} and {run.folder / 'kept.png'}"


@dataclass(frozen=True)
class Stage:
    """One stage: what it does, what it is built on, what its result depends on, what it leaves."""

    work: Callable[[Run], str]
    output: str
    needs: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()  # dotted keys
    uses_data: bool = True


# Of the Trainer's settings, those that change what is learnt; another device or logging interval does not.
_TRAINING = tuple(
    f"trainer.{key}" for key in ("precision", "gradient_clip_val", "accumulate_grad_batches", "limit_train_batches")
)

STAGES: Mapping[str, Stage] = {
    "dense": Stage(dense, "dense", (), ("seed", "data", "model", "dense", *_TRAINING)),
    "score": Stage(
        score_units, "scores.safetensors", ("dense",), ("seed", "importance", "calibration", "surgery.stages")
    ),
    "policy": Stage(
        decide, "policy.json", ("dense",), ("budget", "policy", "policy_file", "surgery.stages"), uses_data=False
    ),
    "slim": Stage(cut, "slim", ("dense", "score", "policy"), ("surgery",), uses_data=False),
    "distill": Stage(distill, "finetuned", ("slim",), ("distillation", *_TRAINING)),
    "test": Stage(test, "results.json", ("slim",), ("latency", "test_data")),
    "report": Stage(report, "report.md", ("test",), (), uses_data=False),
}
# Keys of `data` that do not change what is trained on.
_TEST_DATA = ("test_root", "test_split", "max_test_images")
_HOW_DATA_IS_READ = ("num_workers",)


# --- which stages run -------------------------------------------------------------------------------------------------


def run(settings: assembly.Settings) -> RunFolder:
    """Run the stages that `settings` select, in order; returns the run's folder.

    With ``resume`` a selected stage that is done is picked up. One that is not selected has to be done already, with
    the same settings, if another is built on it.

    Raises:
        MdcError: a setting is wrong, or an earlier stage is missing. Nothing that was there is lost.
    """
    selected = select(settings["stage"], settings["skip"])
    check(settings, selected)
    folder, earlier = open_run(settings["runs"], settings["name"], settings["resume"])
    this = Run(settings, folder)
    this.marks = fingerprints(settings, frozenset())
    # Finetuned models are tested if this run makes them, or made them with these settings.
    this.with_finetuned = "distill" in selected or _is_done(this, "distill")
    this.marks = fingerprints(settings, frozenset({"distill"} if this.with_finetuned else ()))
    try:
        for name in selected:
            _require(this, name, selected)
    except ConfigError:
        if not earlier:
            folder.path.rmdir()
        raise
    folder.create()
    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])
    write_text(folder / "settings.json", json.dumps(settings, indent=2, default=str) + "\n")
    log.info("%s %s", "resuming" if earlier else "run folder", folder)
    if settings["resume"] is True and not earlier:
        log.info("  (resume=true, but there was no earlier run of the name %r)", settings["name"])
    fresh: set[str] = set()
    for name in selected:
        # A stage is picked up only if all it is built on was: its fingerprint holds theirs.
        if not fresh.intersection(_upstream(name)) and _is_done(this, name):
            log.info("%-8s picked up from %s", f"{name}:", folder / STAGES[name].output)
            continue
        fresh.add(name)
        _run_stage(this, name)
    return folder


def _run_stage(run: Run, name: str) -> None:
    stage = STAGES[name]
    log.info("%-8s running", f"{name}:")
    run.folder.start(name)
    seed_everything(run.settings["seed"], workers=True, verbose=False)
    start = time.perf_counter()
    said = stage.work(run)
    elapsed = time.perf_counter() - start
    run.folder.finish(name, run.marks[name], settings=relevant(run.settings, name), seconds=round(elapsed, 2))
    log.info("%-8s done in %.1f s: %s", f"{name}:", elapsed, said)


def select(stage: Any, skip: Any) -> tuple[str, ...]:
    """The stages to run, in order.

    Raises:
        ConfigError: a name that is no stage, or none left.
    """
    chosen = list(STAGES) if stage == "all" else [stage] if isinstance(stage, str) else list(stage or ())
    skipped = [skip] if isinstance(skip, str) else list(skip or ())
    for key, names in (("stage", chosen), ("skip", skipped)):
        unknown = [name for name in names if name not in STAGES]
        if unknown:
            raise ConfigError(f"{key}={unknown[0]!r} is no stage; stages are {', '.join(STAGES)}")
    selected = tuple(name for name in STAGES if name in chosen and name not in skipped)
    if not selected:
        raise ConfigError(f"stage={stage!r} with skip={skip!r} leaves nothing to run; name at least one stage")
    return selected


def check(settings: assembly.Settings, selected: tuple[str, ...]) -> None:
    """Build, without weights, what the selected stages will build: a wrong setting is said now, not after an hour.

    Raises:
        MdcError: what would have been raised then.
    """
    _check_values(settings)
    criterion = assembly.build_criterion(settings)
    batch_size, token_score = settings["calibration"]["batch_size"], settings["surgery"]["token_score"]
    if batch_size < criterion.min_batch:
        raise ConfigError(
            f"calibration.batch_size={batch_size}: importance={criterion.name} needs batches of at least "
            f"{criterion.min_batch} images"
        )
    if token_score not in TOKEN_SCORES:
        raise ConfigError(f"surgery.token_score={token_score!r}: expected one of {', '.join(TOKEN_SCORES)}")
    assembly.build_budget(settings)
    for group in ("dense", "distillation"):
        toy, teacher = nn.Linear(1, 1), nn.Linear(1, 1)
        assembly.build_module(settings[group], settings[group]["epochs"], toy, teacher, num_classes=2)
    run = Run(settings, RunFolder(Path()))
    _ = run.device
    if not any(STAGES[name].uses_data for name in selected):
        return
    if "dense" in selected and not settings["dense"]["epochs"] and not _has_weights(settings):
        raise ConfigError(
            "dense.epochs=0 leaves the model untrained; give dense.epochs, model.pretrained=true or model.checkpoint"
        )
    run.data.setup()
    with torch.device("meta"):
        model = assembly.build_model(settings, run.data, weights=False)
    policy = assembly.build_policy(settings, model)
    log.debug("policy: %s", policy)


def _check_values(settings: assembly.Settings) -> None:
    distillation, calibration = settings["distillation"], settings["calibration"]
    for key, value, least in (
        ("seed", settings["seed"], 0),
        ("dense.epochs", settings["dense"]["epochs"], 0),
        ("distillation.epochs", distillation["epochs"], 0),
        ("calibration.images", calibration["images"], 1),
        ("calibration.batch_size", calibration["batch_size"], 1),
        ("latency.rounds", settings["latency"]["rounds"], 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{key}={value!r}: expected a whole number of at least {least}")
    threads = settings["threads"]
    if threads is not None and (type(threads) is not int or threads < 1):
        raise ConfigError(f"threads={threads!r}: expected a whole number of at least 1, or null for one per core")
    for key, values, least, fewest in (
        ("distillation.seeds", distillation["seeds"], 0, 1),
        ("distillation.reference_seeds", distillation["reference_seeds"], 0, 0),
        ("latency.batch_sizes", settings["latency"]["batch_sizes"], 1, 1),
    ):
        whole = isinstance(values, list) and all(type(value) is int and value >= least for value in values)
        if not whole or len(set(values)) != len(values) or len(values) < fewest:
            raise ConfigError(
                f"{key}={values!r}: expected a list of different whole numbers of at least {least}, such as [1,2]"
            )


def _has_weights(settings: assembly.Settings) -> bool:
    return bool(settings["model"]["pretrained"]) or settings["model"]["checkpoint"] is not None


def fingerprints(settings: assembly.Settings, also_tested: frozenset[str]) -> dict[str, str]:
    """Fingerprint of every stage's result under `settings`.

    Args:
        also_tested: stages whose models are tested although testing does not need them.
    """
    marks: dict[str, str] = {}
    for name, stage in STAGES.items():
        needs = {*stage.needs, *(also_tested if name == "test" else ())}
        marks[name] = fingerprint(relevant(settings, name), {need: marks[need] for need in sorted(needs)})
    return marks


def relevant(settings: assembly.Settings, name: str) -> dict[str, Any]:
    """The settings that the result of stage `name` depends on, by dotted key, down to single values."""
    flat: dict[str, Any] = {}
    for key in STAGES[name].settings:
        flat.update(_flat(key, _value(settings, key)))
    return flat


def _value(settings: assembly.Settings, key: str) -> Any:
    data = settings["data"]
    if key == "data":
        return {name: value for name, value in data.items() if name not in _TEST_DATA + _HOW_DATA_IS_READ}
    if key == "test_data":
        return {name: data[name] for name in _TEST_DATA if name in data}
    if key == "policy_file":  # its content, so that an edited file counts as changed
        file = settings["policy"]["file"]
        return None if file is None else Policy.load(file).to_json()
    value: Any = settings
    for part in key.split("."):
        value = value[part]
    return value


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(f"{key}.{name}", inner)
    else:
        yield key, value


def _is_done(run: Run, name: str) -> bool:
    return run.folder.is_done(name, run.marks[name], run.folder / STAGES[name].output)


def _upstream(name: str) -> tuple[str, ...]:
    """The stages that `name` is built on; test and report look at what distilling left, too."""
    also = ("distill",) if name == "test" else ()
    return STAGES[name].needs + also


def _require(run: Run, name: str, selected: tuple[str, ...]) -> None:
    """Raises: ConfigError: a stage that `name` is built on is neither selected nor done with these settings."""
    for need in STAGES[name].needs:
        if need in selected or _is_done(run, need):
            continue
        record = run.folder.record(need)
        if record is None or not (run.folder / STAGES[need].output).exists():
            raise ConfigError(
                f"stage={name!r} is built on {need!r}, which is neither to be run nor finished in {run.folder}; run "
                f"{need!r} too, or give resume=true (the newest run) or resume=FOLDER of a run that has it"
            )
        changed = _changed(record.get("settings", {}), relevant(run.settings, need))
        raise ConfigError(
            f"stage={name!r} is built on {need!r}, but the one in {run.folder} was made with other settings "
            f"({changed or 'of a stage before it'}); run {need!r} too, or give the old settings"
        )


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = [key for key in now if before.get(key) != json.loads(json.dumps(now[key], default=str))]
    return ", ".join(f"{key}={before.get(key)!r}, now {now[key]!r}" for key in keys[:3])


# --- what stages do ---------------------------------------------------------------------------------------------------


def train(
    run: Run, options: assembly.Settings, student: nn.Module, teacher: nn.Module | None, *, title: str, mark: str
) -> nn.Module:
    """Train `student`; a run that was killed goes on from its last epoch. Returns the student as it is at the end."""
    epochs = options["epochs"]
    module = assembly.build_module(options, epochs, student, teacher)
    # Named by what they were made with: weights of other settings are never gone on from.
    checkpoints = run.folder / "checkpoints" / f"{title.replace('/', '-')}-{mark[:12]}"
    last = checkpoints / "last.ckpt"
    if last.exists():
        log.info("  %s: going on from %s", title, last)
    logger = assembly.build_logger(run.settings, run.folder / "logs", title.replace("/", "-"))
    trainer = assembly.build_trainer(run.settings, epochs, checkpoints, logger, title)
    student.train()  # an artifact comes in eval mode
    trainer.fit(module, datamodule=run.data, ckpt_path=last if last.exists() else None)
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()
    shutil.rmtree(checkpoints, ignore_errors=True)
    return module.student.cpu()


def calibration_batches(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """A seeded sample of the training images under the evaluation transforms, with labels."""
    images, batch_size = run.settings["calibration"]["images"], run.settings["calibration"]["batch_size"]
    dataset = run.data.calibration_dataset()
    workers = run.data.num_workers
    if isinstance(dataset, IterableDataset):
        return islice(iter(DataLoader(dataset, batch_size, num_workers=workers)), -(-images // batch_size))
    total = len(dataset)  # type: ignore[arg-type]
    order = np.random.default_rng(run.settings["seed"]).permutation(total)[:images]
    return iter(DataLoader(Subset(dataset, order.tolist()), batch_size, num_workers=workers))


def predictions(run: Run, model: nn.Module, title: str) -> tuple[Tensor, Tensor]:
    """(labels, predicted classes) of all test images, (n,) each.

    Raises:
        DataError: there are no test images.
    """
    loader = run.data.test_dataloader()
    labels, classes = [], []
    model = model.to(run.device).eval()
    with torch.inference_mode():
        for images, targets in tqdm(loader, desc=f"Testing {title}", unit="batch", disable=None, leave=False):
            classes.append(model(images.to(run.device)).argmax(dim=-1).cpu())
            labels.append(torch.as_tensor(targets))
    if not labels:
        raise DataError(
            "the test split is empty: nothing can be reported; raise data.test_fraction or give a test split"
        )
    return torch.cat(labels), torch.cat(classes)


def _models_to_test(run: Run) -> Iterator[tuple[tuple[str, int | None], tuple[str, nn.Module]]]:
    """((kind, seed), (place, model)) of each model."""
    options = run.settings["distillation"]
    found: list[tuple[str, int | None, str]] = [(reporting.DENSE, None, "dense"), (reporting.SLIM, None, "slim")]
    if run.with_finetuned:
        found += [(reporting.FINETUNED, seed, f"finetuned/seed{seed}") for seed in options["seeds"]]
        found += [(reporting.REFERENCE, seed, f"reference/seed{seed}") for seed in options["reference_seeds"]]
    for kind, seed, place in found:
        yield (kind, seed), (place, run.model(place).to(run.device))


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type.upper()}, {threads} thread{'' if threads == 1 else 's'}, fp32"


def _places(run: Run) -> list[reporting.Place]:
    known = {
        "dense/": "the dense model, for `lightning_mdc.load`",
        "scores.safetensors": "importance of every head, neuron and token position",
        "policy.json": "how much each block keeps",
        "plan.json": "which units each block keeps",
        "slim/": "the slim model before finetuning",
        "finetuned/": "the slim model finetuned, one folder per seed",
        "reference/": "the dense model given the same extra training",
        "results.json": "every number of this report",
        "logs/": "training curves",
        "settings.json": "all settings of the run",
        "stages/": "which stages are done, with what settings and in what time",
    }
    return [reporting.Place(path, holds) for path, holds in known.items() if (run.folder / path).exists()]


def _commands(run: Run) -> list[tuple[str, str]]:
    seeds = run.settings["distillation"]["seeds"]
    best = f"finetuned/seed{seeds[0]}" if run.with_finetuned else "slim"
    smaller = f"python train.py resume={run.folder} budget=0.5"
    return [
        ("Use the slim model", f"python -c \"import lightning_mdc as mdc; print(mdc.load('{run.folder / best}'))\""),
        ("Make it smaller still (the dense model and its scores are picked up)", smaller),
    ]
