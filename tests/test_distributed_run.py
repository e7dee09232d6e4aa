"""``train.py`` in two real processes: the same run as in one, and what happens when a process dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lightning_mdc as mdc
from lightning_mdc.app import pipeline
from lightning_mdc.importance import Scores
from lightning_mdc.policy_search.sensitivity import Sensitivity
from tests.test_train import ROOT, TINY, picked_up, settings

pytestmark = pytest.mark.slow

# HSIC: an elimination by conditional covariance takes another turn where weights differ in the fourth digit.
SAME = ("data.augment=false", "threads=1", "importance=hsic")
SAME += ("distillation.seeds=[0]", "sensitivity.neurons=[0.5,0]", "sensitivity.tokens=[0.5,0]")
TWO, ONE = (("trainer=ddp_cpu", *SAME), ("trainer=cpu", *SAME))
EVERYTHING = ("stage=[all,sensitivity]", "skip=[report]")


def command(runs: Path, *overrides: str) -> list[str]:
    tiny = [override for override in TINY if override != "trainer=cpu"]
    return [sys.executable, str(ROOT / "train.py"), *tiny, f"runs={runs}", *overrides]


def run(runs: Path, *overrides: str) -> tuple[Path, str]:
    """(the run's folder, what was printed)."""
    done = subprocess.run(
        command(runs, *overrides),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=runs,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return max((runs / "tiny").iterdir()), done.stdout + done.stderr


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    return pipeline.run(settings(tmp_path_factory.mktemp("one"), *ONE, *EVERYTHING)).path


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, str]:
    return run(tmp_path_factory.mktemp("two"), *TWO, *EVERYTHING)


def test_every_line_is_said_once(two):
    _, printed = two
    for stage in ("dense", "score", "search", "slim", "distill", "test"):
        assert printed.count(f"{stage}:".ljust(8) + " done in") == 1


def test_training_is_that_of_one_process(one, two):
    """The images of each step are the same, and so are the weights they lead to, but for the order of sums: the
    optimizer takes steps of one length, also where a gradient is mostly rounding."""
    alone, together = (mdc.load(folder / "dense").state_dict() for folder in (one, two[0]))
    for name, tensor in alone.items():
        assert torch.allclose(tensor, together[name], atol=1e-3), name


def test_scores_are_those_of_one_process(one, two):
    ours, theirs = (Scores.load(folder / "scores.safetensors") for folder in (one, two[0]))
    assert ours.images == theirs.images == 32
    for dimension in ("heads", "neurons", "tokens"):
        for mine, other in zip(getattr(ours, dimension), getattr(theirs, dimension), strict=True):
            assert torch.allclose(mine, other, rtol=1e-3, atol=1e-4), dimension


def test_sensitivities_are_those_of_one_process(one, two):
    ours, theirs = (Sensitivity.load(folder / "sensitivity.csv").cuts for folder in (one, two[0]))
    assert [cut.key for cut in ours] == [cut.key for cut in theirs]
    assert [cut.cost for cut in ours] == [cut.cost for cut in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.kl == pytest.approx(other.kl, rel=0.05, abs=1e-5), mine
        assert abs(mine.accuracy - other.accuracy) <= 1 / 36 + 1e-9  # one image of 36 that is nearly a tie


def test_every_test_image_counts_once(one, two):
    first, second = (json.loads((folder / "results.json").read_text())["rows"] for folder in (one, two[0]))
    assert {row["images"] for row in (*first, *second)} == {90}
    for row in second:  # what one process sees in the model that two have made
        if row["model"] == "dense":
            assert row["agreeing"] == 90


def test_what_two_processes_left_goes_on_in_one(two, caplog):
    caplog.set_level("INFO", "lightning_mdc")
    folder, _ = two
    pipeline.run(settings(folder.parent.parent, *ONE, f"resume={folder}", *EVERYTHING))
    assert picked_up(caplog) == ["dense", "score", "sensitivity", "search", "slim", "distill", "test"]


def test_a_killed_process_ends_the_run_with_a_message_and_one_goes_on(tmp_path):
    long = ("stage=dense", "dense.epochs=40", "data.max_train_images=256")
    process = subprocess.Popen(
        command(tmp_path, *TWO, *long),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("tiny/*/checkpoints/*/last.ckpt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(child_of(process.pid), signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "DistributedError: another of the 2 processes of this run is gone" in printed
    assert "Traceback" not in printed
    _, printed = run(tmp_path, *ONE, *long, "resume=true")
    assert "going on from" in printed
    assert "dense:   done" in printed


def child_of(pid: int) -> int:
    listed = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True, check=True
    )
    return next(int(line.split()[0]) for line in listed.stdout.splitlines() if "train_ddp_process_1" in line)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("stage=dense", "data.batch_size=33"), "batch_size=33 counts the images of a step on all 2 processes"),
        (("stage=trial", "policy.keep.heads=0.5"), "stage=trial is the work of one process"),
        (("seed=1,2", "-m"), "-m with 2 processes: each would start the whole sweep again"),
    ],
)
def test_what_two_processes_cannot_do_is_refused(overrides, words, tmp_path):
    done = subprocess.run(
        command(tmp_path, *TWO, *overrides), capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
    )
    assert done.returncode != 0
    assert words in done.stdout + done.stderr
