"""The pipeline end to end on a tiny ViT: steps, resuming, wrong settings, and the script around it."""

import atexit
import json
import logging
import os
import re
import shutil
import signal
import sys
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch.utilities.exceptions import SIGTERMException

import lightning_mdc as mdc
from lightning_mdc.app import fingerprints, pipeline, steps, sweep, trainer
from lightning_mdc.app.main import main
from lightning_mdc.app.run_folder import RunFolder
from lightning_mdc.app.settings import plain
from lightning_mdc.app.step_table import STEPS
from lightning_mdc.app.trainer import fsdp, num_processes
from lightning_mdc.distillation import DistillationModule
from lightning_mdc.errors import (
    BudgetError,
    ConfigError,
    DataError,
    DistillationError,
    MdcError,
    PolicyError,
    SearchError,
)
from lightning_mdc.importance import Moments
from lightning_mdc.policy_search.held_out import HeldOut
from tests.conftest import WITHOUT_CHARTS
from tests.kinds import randomised

ROOT = Path(__file__).parent.parent
TINY = (
    "name=tiny",
    "logger=none",
    "trainer=cpu",
    "trainer.log_every_n_steps=1",
    "data.img_size=8",
    "model.args.patch_size=2",
    "model.args.embed_dim=16",
    "model.args.depth=4",
    "model.args.num_heads=2",
    "data.max_train_images=64",
    "data.batch_size=32",
    "data.test_fraction=0.05",
    "data.val_fraction=0.02",
    "dense.epochs=1",
    "distillation.epochs=1",
    "distillation.seeds=[0,1]",
    "search.metric=accuracy",
    "search.n_trials=3",
    "search.n_initial_points=2",
    "calibration.images=32",
    "calibration.batch_size=16",
    "latency.rounds=1",
    "latency.batch_sizes=[1,4]",
)


# All but pictures and pages, which take three times as long as all the rest.
NO_REPORT = "skip=[report]"
# Steps that the settings switch off, and those that `stage=all` does not run.
NOT_ASKED_FOR = ("share", "sensitivity")


def settings(tmp_path, *overrides: str) -> dict:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return plain(compose("train", [*TINY, f"runs={tmp_path}", *overrides]))


def script(monkeypatch, *overrides: str) -> int:
    """Exit code of ``python train.py ...``, run in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
    GlobalHydra.instance().clear()
    loggers = [logging.getLogger(name) for name in ("", "lightning_mdc")]  # set up for a process of its own
    before = [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.propagate, logger.handlers[:] = propagate, handlers
    return 0


def picked_up(caplog) -> list[str]:
    """Steps said to be picked up since last asked."""
    names = [record.args[0].rstrip(":") for record in caplog.records if record.msg.startswith("%-8s picked up")]
    caplog.clear()
    return names


@pytest.fixture(autouse=True)
def heard(caplog, monkeypatch):
    caplog.set_level("INFO", "lightning_mdc")
    monkeypatch.setattr(logging.getLogger("lightning_mdc"), "propagate", True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run, without pictures; tests that change one work on a copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*WITHOUT_CHARTS)
        return pipeline.run(settings(tmp_path_factory.mktemp("runs"))).path


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    target = tmp_path / "tiny" / finished.name
    shutil.copytree(finished, target)
    return target


# --- one run ----------------------------------------------------------------------------------------------------------


def test_every_step_leaves_its_output(finished):
    for name, step in STEPS.items():
        assert (finished / step.output).exists() == (name not in NOT_ASKED_FOR), name
    for name in ("dense", "slim", "finetuned/seed0", "finetuned/seed1", "reference/seed0"):
        assert mdc.load(finished / name)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert not list(finished.glob("checkpoints/*"))  # of finished trainings nothing is left over
    assert not list(finished.glob(".*"))


def test_the_slim_model_keeps_the_budget_and_what_the_plan_says(finished):
    dense, slim = mdc.load(finished / "dense"), mdc.load(finished / "slim")
    plan = mdc.Plan.from_json((finished / "plan.json").read_text())
    assert mdc.macs(slim) <= 0.6 * mdc.macs(dense)
    assert mdc.macs(slim) == mdc.plan_macs(dense, plan)
    policy = mdc.Policy.from_json((finished / "policy.json").read_text())
    assert mdc.policy_macs(dense, policy) == mdc.macs(slim)


def test_finetuning_trains_in_training_mode_from_the_slim_weights(finished):
    slim, tuned = mdc.load(finished / "slim"), mdc.load(finished / "finetuned/seed0")
    other = mdc.load(finished / "finetuned/seed1")
    for name, tensor in slim.state_dict().items():
        assert tensor.shape == tuned.state_dict()[name].shape
    start, *ends = (model.blocks[0].mlp.fc1.weight for model in (slim, tuned, other))
    for seed, end in enumerate(ends):  # what training does not make better is left as it was
        training = RunFolder(finished).record(f"finetuned/seed{seed}/training")
        moved = float((end - start).detach().abs().max())
        assert 0 < moved < 0.1 if training["after"] >= training["before"] else moved == 0
    assert not torch.equal(ends[0], ends[1]) or torch.equal(start, ends[0])


def test_results_are_those_of_the_saved_models(finished):
    from lightning_mdc.app.report import results as reporting

    run = steps.Run(settings(finished.parent), steps.RunFolder(finished))
    images, labels = map(torch.cat, zip(*run.data.test_dataloader(), strict=True))
    results = reporting.Results.load(finished / "results.json")
    assert [(row.model, row.seed) for row in results.rows] == [
        ("dense", None),
        ("slim", None),
        ("slim finetuned", 0),
        ("slim finetuned", 1),
        ("dense, same extra training", 0),
    ]
    dense = mdc.load(finished / "dense")(images).argmax(dim=1)
    places = ("dense", "slim", "finetuned/seed0", "finetuned/seed1", "reference/seed0")
    for row, place in zip(results.rows, places, strict=True):
        classes = mdc.load(finished / place)(images).argmax(dim=1)
        assert row.images == len(labels) == 90
        assert row.correct == (classes == labels).sum()
        assert row.agreeing == (classes == dense).sum()
        assert row.size == (finished / place / "model.safetensors").stat().st_size
    assert results.of("slim")[0].macs == mdc.macs(mdc.load(finished / "slim"))


def test_the_dense_artifact_tells_its_classes(finished):
    cfg = mdc.load(finished / "slim").pretrained_cfg
    assert cfg["label_names"] == [str(digit) for digit in range(10)]
    assert list(cfg["input_size"]) == [1, 8, 8]


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_resuming_picks_everything_up_and_says_so(copied, caplog):
    before = {path: path.stat().st_mtime_ns for path in copied.glob("*/model.safetensors")}
    again = pipeline.run(settings(copied.parent.parent, "resume=true"))
    assert again.path == copied
    assert picked_up(caplog) == [name for name in STEPS if name not in NOT_ASKED_FOR]
    assert before == {path: path.stat().st_mtime_ns for path in copied.glob("*/model.safetensors")}


def test_a_run_that_is_not_resumed_gets_a_folder_of_its_own(copied):
    chosen = settings(copied.parent.parent, "stage=dense")
    first, second = pipeline.run(chosen).path, pipeline.run(chosen).path
    assert len({first, second, copied}) == 3
    assert pipeline.run(settings(copied.parent.parent, "resume=true", "stage=dense")).path == second


def test_another_budget_runs_again_from_the_search_on(copied, caplog):
    """But for the dense reference: it has nothing to do with the budget, and at full size takes as long as all slim
    models."""
    before = (copied / "reference/seed0/model.safetensors").stat().st_mtime_ns
    chosen = ("budget=0.5", "distillation.seeds=[0]", NO_REPORT)
    pipeline.run(settings(copied.parent.parent, f"resume={copied}", *chosen))
    messages = [record.getMessage().strip() for record in caplog.records]
    assert picked_up(caplog) == ["dense", "score"]
    assert mdc.macs(mdc.load(copied / "slim")) <= 0.5 * mdc.macs(mdc.load(copied / "dense"))
    assert mdc.macs(mdc.load(copied / "finetuned/seed0")) == mdc.macs(mdc.load(copied / "slim"))
    assert (copied / "reference/seed0/model.safetensors").stat().st_mtime_ns == before
    assert f"reference/seed0: picked up from {copied / 'reference/seed0'}" in messages
    assert f"finetuned/seed0: picked up from {copied / 'finetuned/seed0'}" not in messages


def test_loaded_weights_go_on_in_another_precision(finished, tmp_path, caplog):
    """Of which only what is trained has to be trained again; weights that were moved are still the same."""
    weights = tmp_path / "weights"
    shutil.copytree(finished / "dense", weights)
    chosen = ("dense.epochs=0", "distillation.seeds=[0]", "distillation.reference_seeds=[]", "resume=true")
    chosen += ("skip=[test,report]",)
    folder = pipeline.run(settings(tmp_path, *chosen, f"model.checkpoint={weights}")).path
    weights = weights.rename(tmp_path / "moved")
    caplog.clear()
    in_fp32 = mdc.load(folder / "finetuned/seed0").state_dict()
    pipeline.run(settings(tmp_path, *chosen, f"model.checkpoint={weights}", "trainer.precision=bf16-mixed"))
    assert picked_up(caplog) == ["dense", "score", "search", "slim"]
    in_bf16 = mdc.load(folder / "finetuned/seed0").state_dict()
    assert any(not torch.equal(in_fp32[name], tensor) for name, tensor in in_bf16.items())


@cache
def unchanged(runs: str) -> dict[str, str]:
    return fingerprints.fingerprints(settings(runs), frozenset({"distill"}))


_BEFORE_DISTILLING = ["dense", "score", "share", "sensitivity", "search", "slim"]


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("importance=random", ["dense"]),
        ("distillation.kd_weight=0.1", _BEFORE_DISTILLING),
        ("latency.rounds=2", [*_BEFORE_DISTILLING, "distill"]),
        ("surgery.compensate=none", ["dense", "score", "share", "sensitivity"]),
        ("healing.epochs=1", [name for name in _BEFORE_DISTILLING if name != "slim"]),
        ("sensitivity.images=9", [name for name in STEPS if name != "sensitivity"]),
        ("data.num_workers=1", list(STEPS)),
        ("trainer.log_every_n_steps=7", list(STEPS)),
        ("data.max_train_images=60", []),
    ],
)
def test_a_change_reaches_the_steps_that_depend_on_it(tmp_path, override, kept):
    before = unchanged(str(tmp_path.parent))
    now = fingerprints.fingerprints(settings(tmp_path.parent, override), frozenset({"distill"}))
    assert [name for name in STEPS if now[name] == before[name]] == kept


@pytest.mark.usefixtures("no_charts")
def test_one_more_seed_keeps_the_models_of_the_others(copied, caplog):
    before = (copied / "finetuned/seed0/model.safetensors").stat().st_mtime_ns
    pipeline.run(settings(copied.parent.parent, "resume=true", "distillation.seeds=[0,1,5]"))
    assert picked_up(caplog) == ["dense", "score", "search", "slim"]
    assert (copied / "finetuned/seed0/model.safetensors").stat().st_mtime_ns == before
    assert "mean of 3 seeds" in (copied / "report.md").read_text()


def test_a_training_that_was_killed_goes_on_to_the_same_weights(tmp_path, monkeypatch, caplog):
    chosen = ("stage=dense", "dense.epochs=3")
    whole = pipeline.run(settings(tmp_path / "whole", *chosen))
    step = DistillationModule.training_step

    def dies_in_the_third_epoch(self, batch, batch_idx):
        if self.current_epoch == 2 and batch_idx == 1:
            raise RuntimeError("power cut")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DistillationModule, "training_step", dies_in_the_third_epoch)
    with pytest.raises(RuntimeError, match="power cut"):
        pipeline.run(settings(tmp_path / "killed", *chosen))
    monkeypatch.setattr(DistillationModule, "training_step", step)
    caplog.clear()
    resumed = pipeline.run(settings(tmp_path / "killed", *chosen, "resume=true"))
    assert any("going on from" in record.getMessage() for record in caplog.records)
    expected, found = (mdc.load(run / "dense").state_dict() for run in (whole, resumed))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


def trials(folder: Path) -> list[dict]:
    (state,) = folder.glob("search/trials-*.jsonl")
    return [line for line in map(json.loads, state.read_text().splitlines()) if "told" in line]


def test_the_search_leaves_its_trials(finished):
    assert [line["told"] for line in trials(finished)] == [0, 1, 2]


def test_a_search_that_was_killed_goes_on(tmp_path, finished, monkeypatch):
    chosen = ("stage=[dense,score,search]", "resume=true")
    judge, calls = HeldOut.judge, iter(range(100))

    def dies_in_the_third_trial(self, model):
        if next(calls) == 3:  # the dense model is judged first
            raise KeyboardInterrupt
        return judge(self, model)

    monkeypatch.setattr(HeldOut, "judge", dies_in_the_third_trial)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(settings(tmp_path, *chosen))
    monkeypatch.setattr(HeldOut, "judge", lambda self, model: (next(calls), judge(self, model))[1])
    folder = pipeline.run(settings(tmp_path, *chosen)).path
    assert next(calls) == 5  # one more trial, not three
    values = [[line["value"] for line in trials(run)] for run in (folder, finished)]
    assert values[0] == values[1]
    assert (folder / "policy.json").read_bytes() == (finished / "policy.json").read_bytes()


def test_more_trials_go_on_with_the_search_that_is_there(copied):
    before = trials(copied)
    pipeline.run(settings(copied.parent.parent, "resume=true", "stage=search", "search.n_trials=5"))
    assert trials(copied)[:3] == before
    assert len(trials(copied)) == 5


def test_the_uniform_policy_needs_no_search(copied):
    pipeline.run(settings(copied.parent.parent, "resume=true", "stage=search", "policy.kind=uniform"))
    policy = mdc.Policy.load(copied / "policy.json")
    assert policy == mdc.uniform_policy(mdc.load(copied / "dense"), 0.6)


def test_a_kill_between_seeds_keeps_the_finished_one(copied, monkeypatch):
    root = copied.parent.parent
    change = ("resume=true", "distillation.temperature=3.0", "skip=[test,report]")
    work = steps.finetune

    def dies(run, name, start, seed):
        if name == "finetuned/seed1":
            raise KeyboardInterrupt
        work(run, name, start, seed)

    monkeypatch.setattr(steps, "finetune", dies)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(settings(root, *change))
    assert not (copied / "steps" / "distill.json").exists()
    first = (copied / "finetuned/seed0/model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(steps, "finetune", work)
    pipeline.run(settings(root, *change))
    assert (copied / "finetuned/seed0/model.safetensors").stat().st_mtime_ns == first


# --- choosing steps ---------------------------------------------------------------------------------------------------


def test_weights_that_were_shared_are_searched_over_and_cut(copied, caplog):
    chosen = (f"resume={copied}", "skip=[distill,test,report]")
    shared = (*chosen, "sharing.epochs=1", "sharing.optimizer.lr=1e-2")
    folder = pipeline.run(settings(copied.parent.parent, *shared)).path
    assert picked_up(caplog) == ["dense", "score"]
    weights = [mdc.load(folder / name).patch_embed.proj.weight for name in ("dense", "shared", "slim")]
    assert torch.equal(weights[2], weights[1])
    assert not torch.equal(weights[1], weights[0])
    pipeline.run(settings(copied.parent.parent, *shared))
    assert picked_up(caplog) == ["dense", "score", "share", "search", "slim"]
    pipeline.run(settings(copied.parent.parent, *chosen))  # without: another search, over the dense weights
    assert torch.equal(mdc.load(folder / "slim").patch_embed.proj.weight, weights[0])


def test_what_removed_units_did_is_given_back_unless_told_not_to(copied, caplog, monkeypatch):
    """By the moments of the weights that are cut; trials and slim model alike, and afterwards as before."""
    before, searched = mdc.load(copied / "slim"), sorted(copied.glob("search/trials-*.jsonl"))
    heard = []
    search = mdc.search
    monkeypatch.setattr(mdc, "search", lambda *args, **more: heard.append(more) or search(*args, **more))
    short = ("distillation.seeds=[0]", "stage=all", "skip=[distill,test,report]")

    def cut(**how: object) -> dict:
        dense, plan = mdc.load(copied / "dense"), mdc.Plan.from_json((copied / "plan.json").read_text())
        return mdc.slim(dense, plan, **how).state_dict()

    pipeline.run(settings(copied.parent.parent, f"resume={copied}", "surgery.compensate=none", *short))
    assert picked_up(caplog) == ["dense", "score"]
    assert heard[0].get("compensate", "none") == "none"
    assert len(list(copied.glob("search/trials-*.jsonl"))) == len(searched) + 1
    found = mdc.load(copied / "slim").state_dict()
    assert all(torch.equal(found[key], value) for key, value in cut().items())
    pipeline.run(settings(copied.parent.parent, f"resume={copied}", *short))
    moments = Moments.load(copied / "moments.safetensors")
    assert moments.images == 32
    again = mdc.load(copied / "slim").state_dict()
    run = sweep.prepared(settings(copied.parent.parent, f"resume={copied}", *short))
    wanted = cut(compensate="sequential", batches=steps.calibration_batches(run, images=64))
    assert all(torch.equal(again[key], value) for key, value in wanted.items())
    assert all(torch.equal(again[key], value) for key, value in before.state_dict().items())
    dense = mdc.load(copied / "dense").state_dict()
    refitted = [name for name in dense if name.endswith(("proj.bias", "fc2.bias")) and "embed" not in name]
    assert any(not torch.equal(again[name], dense[name]) for name in refitted)
    pipeline.run(
        settings(
            copied.parent.parent, f"resume={copied}", "healing.epochs=4", "healing.lr=1e-5", "healing.images=48", *short
        )
    )
    by_hand = before.train()
    mdc.heal(by_hand, mdc.load(copied / "dense"), steps.calibration_batches(run, images=48), 4, 1e-5, seed=0)
    healed = mdc.load(copied / "slim").state_dict()
    assert all(torch.equal(healed[key], value) for key, value in by_hand.state_dict().items())
    assert any(not torch.equal(healed[key], value) for key, value in again.items())


@pytest.mark.slow
def test_the_average_of_the_weights_is_what_is_saved(copied):
    """With a decay of nearly 1 the average stays where the first step led."""
    steps = (
        "trainer.check_val_every_n_epoch=1",
        "distillation.epochs=3",
        "distillation.seeds=[0]",
        "skip=[test,report]",
    )
    weights = []
    for decay in ("null", "0.999999"):
        folder = pipeline.run(
            settings(copied.parent.parent, f"resume={copied}", *steps, f"distillation.ema_decay={decay}")
        )
        start, end = (mdc.load(folder / name).patch_embed.proj.weight for name in ("slim", "finetuned/seed0"))
        weights.append(float((end - start).norm()))
    assert 0 < weights[1] < weights[0] / 3


def test_a_checkpoint_in_mid_epoch_is_gone_on_from(tmp_path, monkeypatch, caplog):
    chosen = settings(tmp_path, "stage=dense", "dense.epochs=2", "checkpoint_minutes=1e-7", "data.batch_size=8")
    step, steps = DistillationModule.training_step, []

    def interrupted(self, batch, index):
        steps.append(batch[1])
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step(self, batch, index)

    monkeypatch.setattr(DistillationModule, "training_step", interrupted)
    with pytest.raises(SystemExit):
        pipeline.run(chosen)
    monkeypatch.setattr(DistillationModule, "training_step", step)
    done = torch.load(next(tmp_path.glob("tiny/*/checkpoints/*/last.ckpt")), weights_only=True)["global_step"]
    assert 0 < done < 8
    folder = pipeline.run({**chosen, "resume": True}).path
    assert any("going on from" in record.message for record in caplog.records)
    assert (folder / "dense").exists()


@pytest.mark.parametrize(("method", "call", "steps_done"), [("training_step", 2, 2), ("validation_step", 1, 8)])
def test_a_training_that_is_told_to_end_loses_no_step(tmp_path, monkeypatch, method, call, steps_done):
    """SIGTERM in the first epoch, as of a cluster that takes its machine back; no checkpoint every few minutes."""
    chosen = ("stage=dense", "dense.epochs=2", "data.batch_size=8", "data.augment=false")
    chosen = (*chosen, "trainer.check_val_every_n_epoch=1")
    whole = pipeline.run(settings(tmp_path / "whole", *chosen)).path
    step, calls = getattr(DistillationModule, method), []

    def stopped(self, batch, index):
        if not self.trainer.sanity_checking:
            calls.append(index)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, index)

    monkeypatch.setattr(DistillationModule, method, stopped)
    with pytest.raises(SIGTERMException):
        pipeline.run(settings(tmp_path, *chosen))
    monkeypatch.setattr(DistillationModule, method, step)
    (path,) = tmp_path.glob("tiny/*/checkpoints/*/last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (0, steps_done)
    folder = pipeline.run({**settings(tmp_path, *chosen), "resume": True}).path
    expected, resumed = (mdc.load(place / "dense").state_dict() for place in (whole, folder))
    for name, value in expected.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)


def test_a_training_that_fails_leaves_no_weights_to_go_on_from(tmp_path, monkeypatch):
    def failed(self, batch, index):
        if index == 2:
            raise RuntimeError("NaN")
        return step(self, batch, index)

    step = DistillationModule.training_step
    monkeypatch.setattr(DistillationModule, "training_step", failed)
    with pytest.raises(RuntimeError, match="NaN"):
        pipeline.run(settings(tmp_path, "stage=dense", "dense.epochs=2", "data.batch_size=8"))
    assert not [*tmp_path.glob("tiny/*/checkpoints/*/last.ckpt")]


def test_every_block_of_a_slim_model_is_a_shard(finished):
    """What can be seen of FSDP without a GPU."""
    strategy = fsdp()
    wrapped = strategy.kwargs["auto_wrap_policy"]._module_classes
    assert all(isinstance(block, tuple(wrapped)) for block in mdc.load(finished / "slim").blocks)
    assert strategy._state_dict_type == "full"


def test_asking_where_to_train_leaves_nothing_behind(tmp_path):
    composed = settings(tmp_path, "trainer=ddp_cpu")
    num_processes(composed)
    at_exit = atexit._ncallbacks()
    assert [num_processes(composed) for _ in range(3)] == [2, 2, 2]
    assert atexit._ncallbacks() == at_exit


def test_a_backbone_is_pruned_and_finetuned_without_its_labels(finished, tmp_path, caplog):
    given = randomised(mdc.load(finished / "dense"))
    with torch.no_grad():  # what it says depends on the image, and on all of its units
        for parameter in given.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    mdc.save(given, tmp_path / "given")
    options = (f"model.checkpoint={tmp_path}/given", "+model.args.num_classes=0", "search.metric=kl")
    with pytest.raises(ConfigError, match=r"dense\.epochs=1 trains on labels.*dense\.epochs=0"):
        pipeline.run(settings(tmp_path, *options, NO_REPORT))
    options = (*options, "dense.epochs=0", "distillation.seeds=[0]", "distillation.reference_seeds=[]")
    with pytest.raises(ConfigError, match=r"stage='test' counts classes.*skip=\[test,report\]"):
        pipeline.run(settings(tmp_path, *options, NO_REPORT))
    assert not list(tmp_path.glob("tiny/*"))
    options = (*options, "skip=[test,report]", "distillation.hidden_weight=0.5", "distillation.epochs=4")
    options = (*options, "distillation.optimizer.lr=1e-3", "surgery.compensate=none")
    folder = pipeline.run(settings(tmp_path, *options)).path  # as both advise
    (line,) = (text for text in caplog.messages if "epoch 4 of 4" in text)
    assert "train/kd" in line
    assert "val/kd" in line
    assert "top1" not in line
    assert not any("go on with" in text for text in caplog.messages)  # there is nothing else that such a run can do
    dense, slim, tuned = (mdc.load(folder / name) for name in ("dense", "slim", "finetuned/seed0"))
    images = next(iter(steps.Run(settings(tmp_path), steps.RunFolder(folder)).data.train_dataloader()))[0]
    with torch.no_grad():
        assert torch.equal(dense(images), given.forward_features(images)[:, 0])
        before, after = ((model(images) - dense(images)).square().mean() for model in (slim, tuned))
    assert after < before
    assert mdc.macs(slim) <= 0.6 * mdc.macs(dense)
    assert "label_names" not in dense.pretrained_cfg


def test_finetuning_can_be_left_out(copied):
    pipeline.run(settings(copied.parent.parent, "skip=[distill,report]"))
    newest = max(copied.parent.iterdir(), key=lambda path: path.name)
    assert newest != copied
    assert not (newest / "finetuned").exists()
    rows = json.loads((newest / "results.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["dense", "slim"]


def test_steps_one_at_a_time_make_the_same_run(finished, tmp_path):
    for number, name in enumerate(("dense", "score", "search", "slim")):
        folder = pipeline.run(settings(tmp_path, f"stage={name}", f"resume={str(number > 0).lower()}"))
    for name in ("policy.json", "plan.json", "slim/model.safetensors"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.parametrize("name", ["score", "slim", "test", "report"])
def test_a_missing_step_is_named_with_the_remedy(name, tmp_path):
    with pytest.raises(ConfigError, match=rf"stage='{name}' is built on '\w+', which is neither.*resume=true"):
        pipeline.run(settings(tmp_path, f"stage={name}"))
    assert not list(tmp_path.glob("tiny/*"))  # nothing that resume=true would take for a run


def test_the_remedy_for_a_missing_step_leads_to_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_run_steps", lambda run, selected: None)
    names = ["test"]
    for _ in STEPS:
        try:
            pipeline.run(settings(tmp_path, f"stage=[{','.join(names)}]"))
            break
        except ConfigError as error:
            names.append(re.search(r"run '(\w+)' too", str(error)).group(1))
    assert set(names) == {"dense", "score", "search", "slim", "test"}


def test_a_step_of_other_settings_is_not_built_on(copied):
    with pytest.raises(ConfigError, match=r"stage='slim' is built on 'search'.*budget=0\.6, now 0\.5"):
        pipeline.run(settings(copied.parent.parent, "resume=true", "budget=0.5", "stage=slim"))


def test_resume_without_an_earlier_run_starts_one(tmp_path):
    assert (pipeline.run(settings(tmp_path, "resume=true", "stage=dense")) / "dense").exists()


# --- FSDP, as far as a machine without a GPU can tell -----------------------------------------------------------------


def test_the_way_to_fsdp_with_weight_sharing_is_the_one_that_the_error_tells(tmp_path, caplog):
    """What is trained under DDP first, here by one process on the CPU, is what the run under FSDP is built on."""
    sharing = ("sharing.epochs=1", "trainer.log_every_n_steps=1")
    with pytest.raises(ConfigError, match="masks of weight sharing") as refused:
        pipeline.run(settings(tmp_path, "trainer=fsdp", *sharing))
    first, trainer, then = re.search(
        r"run (stage=\S+) with (\S+), then the rest with (.*)", str(refused.value)
    ).groups()
    here = ("trainer.accelerator=cpu", "trainer.devices=1", "trainer.strategy=auto")
    folder = pipeline.run(settings(tmp_path, *sharing, first, trainer, *here)).path
    caplog.clear()
    chosen = settings(tmp_path, *sharing, *then.split())
    selected = pipeline.select(chosen)
    with pytest.raises(ConfigError, match="accelerator"):  # and nothing before that
        pipeline.check(chosen, selected)
    with ExitStack() as stack:
        run = pipeline._opened(chosen, selected, stack)
    assert run.folder.path == folder
    assert all(run.is_done(name) for name in ("dense", "score", "share"))
    (said,) = (record.getMessage() for record in caplog.records if "gradient_clip_val" in record.getMessage())
    assert said.strip() == "trainer.gradient_clip_val=1.0 is left out: Lightning cannot take the norm over shards"


def test_fsdp_goes_on_with_what_was_trained_under_ddp(tmp_path):
    """The way that conf/trainer/fsdp.yaml is for: finetuning a slim model that does not fit on one GPU."""
    here = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.strategy=auto")
    folder = pipeline.run(settings(tmp_path, *here, "policy.kind=uniform", "stage=[dense,score,search,slim]")).path
    chosen = settings(tmp_path, "trainer=fsdp", "resume=true", "policy.kind=uniform")
    with ExitStack() as stack:
        run = pipeline._opened(chosen, pipeline.select({**chosen, "stage": "distill"}), stack)
    assert run.folder.path == folder
    assert run.is_done("slim")


def test_gradients_are_clipped_unless_their_norm_would_be_that_of_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.L, "Trainer", lambda **arguments: arguments["gradient_clip_val"])
    for overrides, expected in (
        (("trainer=ddp",), 1.0),
        (("trainer=fsdp",), None),
        (("trainer=gpu", "trainer.strategy=fsdp"), None),
        (("trainer=fsdp", "+trainer.gradient_clip_algorithm=value"), 1.0),
    ):
        chosen = settings(tmp_path, *overrides)
        assert chosen["trainer"]["gradient_clip_val"] == 1.0
        assert trainer.build_trainer(chosen, {"epochs": 1}, tmp_path, [], "") == expected, overrides


def test_averaged_weights_and_fsdp_are_refused_with_what_works(tmp_path):
    average = ("trainer=fsdp", "distillation.ema_decay=0.99")
    with pytest.raises(ConfigError, match=r"distillation\.ema_decay=0\.99 averages whole parameters") as refused:
        pipeline.run(settings(tmp_path, *average))
    remedies = re.findall(r"[\w.]+=\w+", str(refused.value).rpartition(";")[2])
    assert remedies == ["distillation.ema_decay=null", "trainer=ddp"]
    for remedy in remedies:  # for which only the GPU is missing here
        with pytest.raises(ConfigError, match="accelerator"):
            pipeline.run(settings(tmp_path, *average, remedy))
    with pytest.raises(ConfigError, match="accelerator"):
        pipeline.run(settings(tmp_path, *average, "stage=dense"))


# --- wrong settings ---------------------------------------------------------------------------------------------------

WRONG = [
    ("stage=slimm", ConfigError, "stage='slimm' is no step; the steps are dense, score"),
    ("skip=[foo]", ConfigError, "skip='foo' is no step"),
    ("skip=[dense,score,search,slim,distill,test,report]", ConfigError, "leaves nothing to run"),
    ("resume=nowhere", ConfigError, "resume='nowhere' holds no run"),
    ("name=a/b", ConfigError, "name='a/b' is no folder name"),
    ("budget=1.5", BudgetError, "budget=1.5"),
    ("budget=0.01", BudgetError, "smallest reachable"),
    ("budget={flops:1}", BudgetError, "known limits are latency, macs, params"),
    ("policy.file=nowhere.json", PolicyError, "nowhere.json"),
    (("policy.kind=uniform", "policy.file=x"), ConfigError, "both give a policy"),
    ("policy.dimensions=[wings]", PolicyError, "wings"),
    ("search.n_trials=0", ConfigError, "search.n_trials=0"),
    ("search.metric=f1", ConfigError, "search.metric='f1'"),
    ("search.groups=9", SearchError, "4 blocks"),
    ("search.bounds.heads=[0.9,0.1]", SearchError, "the smaller first"),
    ("search.token_ratio=all", PolicyError, "token_ratio='all'"),
    ("search.warm_start=nowhere", SearchError, "nowhere"),
    ("surgery.stages=[99]", MdcError, "99"),
    ("surgery.token_score=looks", MdcError, "score='looks'"),
    ("surgery.restore=maybe", ConfigError, "surgery.restore='maybe'"),
    (("stage=slim", "surgery.reduction=melt"), MdcError, "reduction='melt' is unknown; known are drop, fuse"),
    ("healing.epochs=-1", ConfigError, "healing.epochs=-1"),
    ("surgery.compensate=all", ConfigError, "surgery.compensate='all': expected one of none, lstsq, sequential"),
    (("surgery.compensate=lstsq", "+model.args.scale_mlp_norm=true"), MdcError, r"blocks\.0\.mlp\.norm"),
    ("dense.epochs=0", ConfigError, "leaves the model untrained"),
    ("dense.epochs=-1", ConfigError, "dense.epochs=-1"),
    ("dense.optimizer.opt=adamm", DistillationError, "opt='adamm'"),
    ("distillation.kd=warm", DistillationError, "kd='warm'"),
    ("distillation.seeds=[]", ConfigError, r"distillation.seeds=\[\]"),
    ("distillation.seeds=[1,1]", ConfigError, "different whole numbers"),
    ("calibration.images=0", ConfigError, "calibration.images=0"),
    ("calibration.batch_size=2", MdcError, "at least 4"),
    ("data.img_size=0", DataError, "img_size=0"),
    ("data._target_=lightning_mdc.app.data.Nothing", ConfigError, "names nothing that can be imported"),
    ("model.name=vit_tinny_patch16_224", ConfigError, "did you mean vit_tiny_patch16_224"),
    ("model.args.num_heads=3", ConfigError, "refused by timm"),
    ("model.pretrained=true", ConfigError, "model.name=null"),
    ("model.checkpoint=nowhere", ConfigError, "model.checkpoint='nowhere' does not exist"),
    (("importance=hsic", "importance.hsic_weight=-1"), MdcError, "hsic_weight=-1"),
    ("stage=share", ConfigError, "sharing.epochs=0"),
    ("sharing.epochs=-1", ConfigError, "sharing.epochs=-1"),
    ("checkpoint_minutes=0", ConfigError, "checkpoint_minutes=0"),
    ("distillation.ema_decay=2", ConfigError, "distillation.ema_decay=2"),
    ("trainer=fsdp", ConfigError, "accelerator"),
    ("trainer.strategy=dpp", ConfigError, "dpp"),
    ("trainer.precision=7", ConfigError, "refused by Lightning"),
    ("latency.batch_sizes=[0]", ConfigError, "latency.batch_sizes"),
]


@pytest.mark.parametrize(("override", "kind", "words"), WRONG, ids=[str(override) for override, *_ in WRONG])
def test_wrong_settings_are_refused_before_anything_is_trained(override, kind, words, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "train", lambda *_, **__: pytest.fail("trained before it was refused"))
    with pytest.raises(kind, match=words):
        pipeline.run(settings(tmp_path, *([override] if isinstance(override, str) else override)))
    assert not list(tmp_path.glob("tiny/*"))


def test_the_script_says_one_line_and_exits_nonzero(tmp_path, monkeypatch, capsys):
    assert script(monkeypatch, *TINY, f"runs={tmp_path}", "stage=slimm") == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert said.err.startswith("ConfigError: stage='slimm' is no step")
    assert "Traceback" not in said.out + said.err


def test_the_script_shows_the_traceback_when_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigError, match="slimm"):
        script(monkeypatch, *TINY, f"runs={tmp_path}", "stage=slimm", "debug=true")


def test_an_unknown_key_is_refused(tmp_path, monkeypatch, capsys):
    assert script(monkeypatch, *TINY, f"runs={tmp_path}", "budgett=0.5") == 1
    assert "budgett" in capsys.readouterr().err


def test_a_missing_value_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"budget=\?\?\? has to be given"):
        settings(tmp_path, "budget=???")


def test_help_says_what_to_type(monkeypatch, capsys):
    script(monkeypatch, "--help")
    said = capsys.readouterr().out
    assert said.count("  python train.py") >= 5
    for words in (
        "data=image_folder data.root=PATH",
        "resume=true",
        "importance: activation, conditional",
        "budget=0.6",
    ):
        assert words in said
    for words in ("stage=sensitivity", "-q, --quiet", "mdc report", "--cfg job", "logger=wandb"):
        assert words in said
    assert said.count("\n") < 100  # more than one screen, but to be read
