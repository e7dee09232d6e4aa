"""Which stages of ``train.py`` run, and which are picked up: see `lightning_mdc.app.steps` for what they do."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import seed_everything

from lightning_mdc.app import build, terminal, tracking
from lightning_mdc.app.report.invocations import note_invocation
from lightning_mdc.app.run_folder import CURRENT_STUDY, RunFolder, fingerprint, open_run
from lightning_mdc.app.steps import STAGES, Run, switched_off
from lightning_mdc.app.trainer import check_training, processes, shards_parameters
from lightning_mdc.distributed import on_first_rank
from lightning_mdc.errors import ConfigError
from lightning_mdc.files import write_text
from lightning_mdc.policy import Policy

log = logging.getLogger(__name__)

# Keys of `data` that do not change what is trained on.
_TEST_DATA = ("test_root", "test_split", "max_test_images")
_HOW_DATA_IS_READ = ("num_workers", "pin_memory", "prefetch_factor", "persistent_workers", "max_corrupt_images")


def run(settings: build.Settings) -> RunFolder:
    """Run the stages that `settings` select, in order; returns the run's folder.

    With ``resume`` a selected stage that is done is picked up. One that is not selected has to be done already, with
    the same settings, if another is built on it.

    Raises:
        MdcError: a setting is wrong, or an earlier stage is missing. Nothing that was there is lost.
    """
    selected = select(settings)
    check(settings, selected)  # by one process, before there are more of them to say it
    with processes(settings):
        return _run(settings, selected)


def _run(settings: build.Settings, selected: tuple[str, ...]) -> RunFolder:
    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])
    with ExitStack() as stack:  # of the first rank; the others have nothing to close
        this = on_first_rank(partial(_opened, settings, selected, stack))
        about = tracking.about_run(this.folder.path, settings)
        trackers = stack.enter_context(tracking.opened(build.build_trackers(settings), about))
        _run_stages(replace(this, trackers=trackers), selected)
        return this.folder


def _run_stages(this: Run, selected: tuple[str, ...]) -> None:
    settings, folder = this.settings, this.folder.path
    fresh: set[str] = set()
    for name in selected:
        # A stage is picked up only if all it is built on was: its fingerprint holds theirs.
        if not fresh.intersection(_upstream(settings, name)) and on_first_rank(partial(is_done, this, name)):
            log.info("%-8s picked up from %s", f"{name}:", this.folder / STAGES[name].output)
            tracking.show_stage(this.trackers, folder, name, this.marks[name])
            continue
        fresh.add(name)
        if name in cached(settings) and on_first_rank(partial(_take_from_cache, this, name)):
            log.info("%-8s picked up from the cache of an earlier sweep", f"{name}:")
            tracking.show_stage(this.trackers, folder, name, this.marks[name])
            continue
        try:
            run_stage(this, name)
        except BaseException as error:
            terminal.note_where(error, folder, name)
            tracking.show_stage(this.trackers, folder, name, None)  # as far as it came
            raise
        tracking.show_stage(this.trackers, folder, name, this.marks[name])
    if "report" not in fresh:  # which says it at more length
        on_first_rank(partial(_say_what_next, this))


def _say_what_next(this: Run) -> None:
    done = [name for name in STAGES if is_done(this, name)]
    log.info("all of it is in %s: %s", this.folder, ", ".join(Path(STAGES[name].output).name for name in done))
    left = [name for name in select({**this.settings, "stage": "all", "skip": []}) if name not in done]
    if left:
        log.info("go on with %s:", ", ".join(left))
        log.info("  %s", terminal.again(terminal.started(), this.folder.path, without=("stage", "skip")))
    else:
        log.info("look at it, as a page and as pictures:")
        log.info("  %s", shlex.join(["python", "-m", "lightning_mdc", "report", str(this.folder)]))


def _opened(settings: build.Settings, selected: tuple[str, ...], stack: ExitStack) -> Run:
    """The run in its folder, with what the selected stages are built on; its log is written until `stack` is closed."""
    folder, earlier = open_run(settings["runs"], settings["name"], settings["resume"])
    this = Run(settings, folder)
    this.marks = fingerprints(settings, frozenset())
    # Finetuned models are tested if this run makes them, or made them with these settings; the same holds for others.
    optional = {name for stage in STAGES.values() for name in stage.looks_at}
    there = frozenset(name for name in optional if name in selected or is_done(this, name))
    this.with_finetuned = "distill" in there
    this.marks = fingerprints(settings, there)
    try:
        for name in selected:
            _require(this, name, selected)
    except ConfigError:
        if not earlier:
            folder.path.rmdir()
        raise
    folder.create()
    stack.enter_context(terminal.log_file(folder / terminal.LOG_FILE))
    write_text(folder / "settings.json", json.dumps(settings, indent=2, default=str) + "\n")
    note_invocation(folder)
    log.info("%s %s", "resuming" if earlier else "run folder", folder)
    if settings["resume"] is True and not earlier:
        log.info("  (resume=true, but there was no earlier run of the name %r)", settings["name"])
    return this


def cached(settings: build.Settings) -> tuple[str, ...]:
    """Stages whose results the trials of a sweep share, see `cache_folder`."""
    off = switched_off(settings)
    return tuple(name for name in ("dense", "score", "share", "statistics") if name not in off)


def cache_folder(settings: build.Settings, marks: Mapping[str, str]) -> Path:
    """Where sweeps keep the dense model and the scores of these settings, and what else their trials share.

    Named by the last of them, which is built on all others.
    """
    return Path(settings["runs"]) / ".cache" / marks[cached(settings)[-1]][:16]


def _take_from_cache(run: Run, name: str) -> bool:
    cache = Run(run.settings, RunFolder(cache_folder(run.settings, run.marks)), run.marks)
    if not is_done(cache, name):
        return False
    source, target = (each.folder / STAGES[name].output for each in (cache, run))
    _begin(run, name)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)
    run.folder.finish(name, run.marks[name], settings=relevant(run.settings, name), cached=True)
    return True


def run_stage(run: Run, name: str) -> None:
    """Run one stage, whatever was there before; on all ranks, if it has a use for them."""
    stage = STAGES[name]
    log.info("%-8s running", f"{name}:")
    on_first_rank(partial(_begin, run, name))
    seed_everything(run.settings["seed"], workers=True, verbose=False)
    start = time.perf_counter()
    said = stage.work(run) if stage.on_all_ranks else on_first_rank(partial(stage.work, run))
    elapsed = time.perf_counter() - start
    facts = {"settings": relevant(run.settings, name), "seconds": round(elapsed, 2)}
    on_first_rank(partial(run.folder.finish, name, run.marks[name], **facts))
    log.info("%-8s done in %s: %s", f"{name}:", _duration(elapsed), said)


def _duration(seconds: float) -> str:
    """``3.2 s``, ``2 min 11 s`` or ``5 h 07 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _begin(run: Run, name: str) -> None:
    """From now on the stage is unfinished, and so is all that is built on it: nobody takes old results for new."""
    begun = {name}
    for other in STAGES:
        if other == name or begun.intersection(_upstream(run.settings, other)):
            begun.add(other)
            run.folder.start(other)
    if "search" in begun:
        (run.folder / CURRENT_STUDY).unlink(missing_ok=True)


def select(settings: build.Settings) -> tuple[str, ...]:
    """The stages to run, in order.

    Raises:
        ConfigError: a name that is no stage, one that is switched off, or none left.
    """
    stage, skip = settings["stage"], settings["skip"]
    off = switched_off(settings)
    every = [name for name, known in STAGES.items() if known.in_all and name not in off]
    asked = [stage] if isinstance(stage, str) else list(stage or ())
    chosen = [name for word in asked for name in (every if word == "all" else [word])]
    skipped = [skip] if isinstance(skip, str) else list(skip or ())
    for key, names in (("stage", chosen), ("skip", skipped)):
        unknown = [name for name in names if name not in STAGES]
        if unknown:
            raise ConfigError(f"{key}={unknown[0]!r} is no stage; stages are {', '.join(STAGES)}, and all")
    if "search" in chosen and "statistics" not in off:
        chosen.append("statistics")  # nothing to look at, so nobody names it; but trials need it
    for name in off:
        if name in chosen:
            raise ConfigError(f"stage={name!r} has nothing to do with {off[name]}")
    selected = tuple(name for name in STAGES if name in chosen and name not in skipped)
    if not selected:
        raise ConfigError(f"stage={stage!r} with skip={skip!r} leaves nothing to run; name at least one stage")
    return selected


def check(settings: build.Settings, selected: tuple[str, ...]) -> None:
    """Build, without weights, what the selected stages will build: a wrong setting is said now, not after an hour.

    Raises:
        MdcError: what would have been raised then.
    """
    criterion, batch_size = build.build_criterion(settings), settings["calibration"]["batch_size"]
    if batch_size < criterion.min_batch:
        raise ConfigError(
            f"calibration.batch_size={batch_size}: importance={criterion.name} needs batches of at least "
            f"{criterion.min_batch} images"
        )
    build.build_budget(settings)
    build.build_trackers(settings)
    if "share" in selected and shards_parameters(settings):
        raise ConfigError(
            "trainer=fsdp shards parameters, which the masks of weight sharing need whole; run "
            "stage=[dense,score,share] with trainer=ddp, then the rest with resume=true trainer=fsdp"
        )
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
        model = build.build_model(settings, run.data, weights=False)
    check_training(settings, model)
    policy = build.given_policy(settings, model)
    if policy is None:
        build.check_search(settings, model)
    build.check_compensation(settings, model, policy)


def _has_weights(settings: build.Settings) -> bool:
    return bool(settings["model"]["pretrained"]) or settings["model"]["checkpoint"] is not None


def fingerprints(settings: build.Settings, there: frozenset[str]) -> dict[str, str]:
    """Fingerprint of every stage's result under `settings`.

    Args:
        there: stages that others look at if they are there (see `Stage.looks_at`), and are.
    """
    marks: dict[str, str] = {}
    for name in STAGES:
        needs = {*_needs(settings, name), *there.intersection(STAGES[name].looks_at)}
        marks[name] = fingerprint(relevant(settings, name), {need: marks[need] for need in sorted(needs)})
    return marks


def relevant(settings: build.Settings, name: str) -> dict[str, Any]:
    """The settings that the result of stage `name` depends on, by dotted key, down to single values."""
    flat: dict[str, Any] = {}
    for key in STAGES[name].settings:
        flat.update(_flat(key, _value(settings, key)))
    return flat


def _value(settings: build.Settings, key: str) -> Any:
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


def is_done(run: Run, name: str) -> bool:
    """Whether the stage was finished with these settings and its output is still there."""
    return run.folder.is_done(name, run.marks[name], run.folder / STAGES[name].output)


def _needs(settings: build.Settings, name: str) -> tuple[str, ...]:
    """The stages that `name` is built on under these settings."""
    off = switched_off(settings)
    return tuple(need for need in STAGES[name].needs if need not in off)


def _upstream(settings: build.Settings, name: str) -> tuple[str, ...]:
    """The same, and what it looks at if it is there."""
    return _needs(settings, name) + STAGES[name].looks_at


def _require(run: Run, name: str, selected: tuple[str, ...]) -> None:
    """Raises: ConfigError: a stage that `name` is built on is neither selected nor done with these settings."""
    for need in _needs(run.settings, name):
        if need in selected or is_done(run, need):
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
