"""Which steps of ``train.py`` run, and which are picked up: see `lightning_mdc.app.steps` for what they do."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from lightning import seed_everything

from lightning_mdc.app import build, terminal, tracking
from lightning_mdc.app.fingerprints import changed, fingerprints, relevant
from lightning_mdc.app.run_folder import CURRENT_STUDY, RunFolder, note_invocation, open_run
from lightning_mdc.app.step_table import STEPS, needed
from lightning_mdc.app.steps import ACTIONS, Run
from lightning_mdc.app.trainer import check_training, ignores_clipping, processes, shards_parameters
from lightning_mdc.distributed import on_first_rank
from lightning_mdc.errors import ConfigError
from lightning_mdc.files import write_text
from lightning_mdc.importance import Needs
from lightning_mdc.tokens.reduction import reduction_class

log = logging.getLogger(__name__)


def run(settings: build.Settings) -> RunFolder:
    """Run the steps that `settings` select, in order; returns the run's folder.

    With ``resume`` a selected step that is done is picked up. One that is not selected has to be done already, with the
    same settings, if another is built on it.

    Raises:
        MdcError: a setting is wrong, or an earlier step is missing. Nothing that was there is lost.
    """
    selected = select(settings)
    check(settings, selected)  # by one process, before there are more of them to say it
    with processes(settings):
        return _run(settings, selected)


def _run(settings: build.Settings, selected: tuple[str, ...]) -> RunFolder:
    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])
    with ExitStack() as stack:  # of the first rank; the others have nothing to close
        run = on_first_rank(partial(_opened, settings, selected, stack))
        about = tracking.run_info(run.folder.path, settings)
        trackers = stack.enter_context(tracking.opened(build.build_trackers(settings), about))
        _run_steps(replace(run, trackers=trackers), selected)
        return run.folder


def _run_steps(run: Run, selected: tuple[str, ...]) -> None:
    folder = run.folder.path
    fresh: set[str] = set()
    for name in selected:
        # A step is picked up only if all it is built on was: its fingerprint holds theirs.
        if not fresh.intersection(_upstream(run.settings, name)) and on_first_rank(partial(run.is_done, name)):
            log.info("%-8s picked up from %s", f"{name}:", run.output(name))
        elif on_first_rank(partial(_take_from_cache, run, name)):
            fresh.add(name)
            log.info("%-8s picked up from the cache of an earlier sweep", f"{name}:")
        else:
            fresh.add(name)
            try:
                run_step(run, name)
            except BaseException as error:
                terminal.note_where(error, folder, name)
                tracking.show_step(run.trackers, folder, name, None)  # as far as it came
                raise
        tracking.show_step(run.trackers, folder, name, run.fingerprints[name])
    if "report" not in fresh:  # which says it at more length
        on_first_rank(partial(_say_what_next, run))


def _say_what_next(run: Run) -> None:
    done = [name for name in STEPS if run.is_done(name)]
    log.info("all of it is in %s: %s", run.folder, ", ".join(run.output(name).name for name in done))
    skip = ["test", "report"] if build.is_backbone(run.settings) else []
    left = [name for name in select({**run.settings, "stage": "all", "skip": skip}) if name not in done]
    if left:
        log.info("go on with %s:", ", ".join(left))
        log.info("  %s", terminal.again(terminal.started(), run.folder.path, without=("stage", "skip")))
    else:
        log.info("look at it, as a page and as pictures:")
        log.info("  %s", shlex.join(["mdc", "report", str(run.folder)]))


def _opened(settings: build.Settings, selected: tuple[str, ...], stack: ExitStack) -> Run:
    """The run in its folder, with what the selected steps are built on; its log is written until `stack` is closed."""
    folder, is_earlier = open_run(settings["runs"], settings["name"], settings["resume"])
    run = Run(settings, folder, fingerprints(settings, frozenset()))
    # Finetuned models are tested if this run makes them, or made them with these settings; the same holds for others.
    looked_at = {name for step in STEPS.values() for name in step.looks_at}
    finished = frozenset(name for name in looked_at if name in selected or run.is_done(name))
    run.has_finetuned = "distill" in finished
    run.fingerprints = fingerprints(settings, finished)
    try:
        for name in selected:
            _require(run, name, selected)
    except ConfigError:
        if not is_earlier:
            folder.path.rmdir()
        raise
    folder.create()
    stack.enter_context(terminal.log_file(folder / terminal.LOG_FILE))
    write_text(folder / "settings.json", json.dumps(settings, indent=2, default=str) + "\n")
    note_invocation(folder)
    log.info("%s %s", "resuming" if is_earlier else "run folder", folder)
    if settings["resume"] is True and not is_earlier:
        log.info("  (resume=true, but there was no earlier run of the name %r)", settings["name"])
    clip = settings["trainer"]["gradient_clip_val"]
    if clip is not None and ignores_clipping(settings):
        log.info("  trainer.gradient_clip_val=%s is left out: Lightning cannot take the norm over shards", clip)
    return run


def shared_by_trials(settings: build.Settings) -> tuple[str, ...]:
    """Steps whose results the trials of a sweep share, see `cache_folder`."""
    return tuple(name for name, step in STEPS.items() if step.shared_by_trials and not step.is_off(settings))


def cache_folder(settings: build.Settings, fingerprints: Mapping[str, str]) -> Path:
    """Where sweeps keep the dense model and the scores of these settings, and what else their trials share.

    Named by the last of them, which is built on all others.
    """
    return Path(settings["runs"]) / ".cache" / fingerprints[shared_by_trials(settings)[-1]][:16]


def _take_from_cache(run: Run, name: str) -> bool:
    if name not in shared_by_trials(run.settings):
        return False
    cache = Run(run.settings, RunFolder(cache_folder(run.settings, run.fingerprints)), run.fingerprints)
    if not cache.is_done(name):
        return False
    _begin(run, name)
    for output in STEPS[name].outputs:
        source, target = cache.folder / output.path, run.folder / output.path
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, target)
    run.folder.finish(name, run.fingerprints[name], settings=relevant(run.settings, name), cached=True)
    return True


def run_step(run: Run, name: str) -> None:
    """Run one step, whatever was there before; on all ranks, if it has a use for them."""
    log.info("%-8s running", f"{name}:")
    on_first_rank(partial(_begin, run, name))
    seed_everything(run.settings["seed"], workers=True, verbose=False)
    start = time.perf_counter()
    action = partial(ACTIONS[name], run)
    outcome = action() if STEPS[name].on_all_ranks else on_first_rank(action)
    elapsed = time.perf_counter() - start
    facts = {"settings": relevant(run.settings, name), "seconds": round(elapsed, 2)}
    on_first_rank(partial(run.folder.finish, name, run.fingerprints[name], **facts))
    log.info("%-8s done in %s: %s", f"{name}:", _duration(elapsed), outcome)


def _duration(seconds: float) -> str:
    """``3.2 s``, ``2 min 11 s`` or ``5 h 07 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _begin(run: Run, name: str) -> None:
    """From now on the step is unfinished, and so is all that is built on it: nobody takes old results for new."""
    begun = {name}
    for other in STEPS:
        if other == name or begun.intersection(_upstream(run.settings, other)):
            begun.add(other)
            run.folder.start(other)
    if "search" in begun:
        (run.folder / CURRENT_STUDY).unlink(missing_ok=True)


def select(settings: build.Settings) -> tuple[str, ...]:
    """The steps to run, in order.

    Raises:
        ConfigError: a name that is no step, one that is switched off, or none left.
    """
    stage, skip = settings["stage"], settings["skip"]
    off = [name for name, step in STEPS.items() if step.is_off(settings)]
    everything = [name for name, step in STEPS.items() if step.in_all and name not in off]
    words = [stage] if isinstance(stage, str) else list(stage or ())
    chosen = [name for word in words for name in (everything if word == "all" else [word])]
    skipped = [skip] if isinstance(skip, str) else list(skip or ())
    for key, names in (("stage", chosen), ("skip", skipped)):
        unknown = [name for name in names if name not in STEPS]
        if unknown:
            raise ConfigError(f"{key}={unknown[0]!r} is no step; the steps are {', '.join(STEPS)}, and all")
    for name in off:
        switch = STEPS[name].switch
        if name in chosen and switch is not None:
            raise ConfigError(f"stage={name!r} has nothing to do with {switch.key}={switch.off}; {switch.remedy}")
    selected = tuple(name for name in STEPS if name in chosen and name not in skipped)
    if not selected:
        raise ConfigError(f"stage={stage!r} with skip={skip!r} leaves nothing to run; name at least one step")
    return selected


def check(settings: build.Settings, selected: tuple[str, ...]) -> None:
    """Build, without weights, what the selected steps will build: a wrong setting is said now, not after an hour.

    Raises:
        MdcError: what would have been raised then.
    """
    criterion, batch_size = build.build_criterion(settings), settings["calibration"]["batch_size"]
    least = Needs.all_of(criterion.needs(dimension) for dimension in criterion.dimensions).images
    if batch_size < least:
        raise ConfigError(
            f"calibration.batch_size={batch_size}: importance={criterion.name} needs batches of at least {least} images"
        )
    build.build_budget(settings)
    build.build_trackers(settings)
    reduction_class(settings["surgery"]["reduction"])
    _check_sharding(settings, selected)
    run = Run(settings, RunFolder(Path()))
    _ = run.device
    if not any(STEPS[name].uses_data for name in selected):
        return
    has_weights = settings["model"]["pretrained"] or settings["model"]["checkpoint"] is not None
    if "dense" in selected and not settings["dense"]["epochs"] and not has_weights:
        raise ConfigError(
            "dense.epochs=0 leaves the model untrained; give dense.epochs, model.pretrained=true or model.checkpoint"
        )
    if build.is_backbone(settings):
        _check_backbone(settings, selected)
    run.data.setup()
    with torch.device("meta"):
        model = build.build_model(settings, run.data, weights=False)
    check_training(settings, model)
    policy = build.given_policy(settings, model)
    if policy is None:
        build.check_search(settings, model)
    build.check_compensation(settings, model, policy)


def _check_backbone(settings: build.Settings, selected: tuple[str, ...]) -> None:
    """Raises: ConfigError: something is asked of a model without classes that only labels could teach or tell."""
    if settings["dense"]["epochs"]:
        raise ConfigError(
            f"dense.epochs={settings['dense']['epochs']} trains on labels, but model.args.num_classes=0 leaves no "
            "classes; give dense.epochs=0 and the weights, model.pretrained=true or model.checkpoint"
        )
    if "test" in selected:
        raise ConfigError(
            "stage='test' counts classes that are right, but model.args.num_classes=0 leaves none; give "
            "skip=[test,report]"
        )


def _check_sharding(settings: build.Settings, selected: tuple[str, ...]) -> None:
    """Raises: ConfigError: a training needs its parameters whole, but FSDP gives each rank a part of them."""
    if not shards_parameters(settings):
        return
    if "share" in selected:
        raise ConfigError(
            "trainer=fsdp shards parameters, which the masks of weight sharing need whole; run "
            "stage=[dense,score,share] with trainer=ddp, then the rest with resume=true trainer=fsdp "
            "skip=[dense,score,share]"
        )
    decay = settings["distillation"]["ema_decay"]
    if "distill" in selected and decay is not None:
        raise ConfigError(
            f"distillation.ema_decay={decay} averages whole parameters, which trainer=fsdp shards; give "
            "distillation.ema_decay=null, or train with trainer=ddp"
        )


def _upstream(settings: build.Settings, name: str) -> tuple[str, ...]:
    """Steps that `name` is built on, and those that it looks at if they are there."""
    return needed(settings, name) + STEPS[name].looks_at


def _require(run: Run, name: str, selected: tuple[str, ...]) -> None:
    """Raises: ConfigError: a step that `name` is built on is neither selected nor done with these settings."""
    for need in needed(run.settings, name):
        if need in selected or run.is_done(need):
            continue
        record = run.folder.record(need)
        if record is None or not run.output(need).exists():
            raise ConfigError(
                f"stage={name!r} is built on {need!r}, which is neither to be run nor finished in {run.folder}; run "
                f"{need!r} too, or give resume=true (the newest run) or resume=FOLDER of a run that has it"
            )
        difference = changed(record.get("settings", {}), relevant(run.settings, need))
        raise ConfigError(
            f"stage={name!r} is built on {need!r}, but the one in {run.folder} was made with other settings "
            f"({difference or 'of a step before it'}); run {need!r} too, or give the old settings"
        )
