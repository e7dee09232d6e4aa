"""What the result of a step depends on: of the Trainer only what trains it, of files their content."""

import hashlib
import shutil

import pytest

from lightning_mdc.app.fingerprints import fingerprints
from lightning_mdc.app.step_table import STEPS
from tests.test_train import settings


def same(tmp_path, first: tuple[str, ...], second: tuple[str, ...]) -> list[str]:
    """Steps whose results are the same under both."""
    one, two = (fingerprints(settings(tmp_path, *overrides), frozenset({"distill"})) for overrides in (first, second))
    return [name for name in STEPS if one[name] == two[name]]


def weights(folder, content: bytes = b"weights"):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text("{}")
    return folder


# --- the Trainer ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    ["precision=bf16-mixed", "gradient_clip_val=0.5", "accumulate_grad_batches=2", "limit_train_batches=1"],
)
def test_the_trainer_counts_where_something_is_trained(change, tmp_path):
    change = f"trainer.{change}"
    assert same(tmp_path, (), (change,)) == []
    loaded = ("dense.epochs=0",)
    before_distilling = [name for name in STEPS if name not in ("distill", "test", "report")]
    assert same(tmp_path, loaded, (*loaded, change)) == before_distilling
    nothing = (*loaded, "distillation.epochs=0")
    assert same(tmp_path, nothing, (*nothing, change)) == list(STEPS)
    shared = (*nothing, "sharing.epochs=1")
    assert same(tmp_path, shared, (*shared, change)) == ["dense", "score"]


def test_loaded_weights_are_the_same_on_a_cpu_and_on_a_gpu(tmp_path):
    loaded = ("dense.epochs=0", "distillation.epochs=0")
    assert same(tmp_path, (*loaded, "trainer=cpu"), (*loaded, "trainer=gpu")) == list(STEPS)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("trainer=ddp", "trainer=fsdp"),
        ("trainer=cpu", "trainer=ddp_cpu"),
        ("trainer.devices=1", "trainer.devices=4"),
    ],
)
def test_how_devices_share_the_work_does_not_count(first, second, tmp_path):
    """So that a run goes on with fewer of them, or under another strategy."""
    shared = ("sharing.epochs=1",)
    assert same(tmp_path, (first, *shared), (second, *shared)) == list(STEPS)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "step"),
    [
        ("model.checkpoint", "dense"),
        ("distillation.teacher", "distill"),
        ("distillation.teacher_checkpoint", "distill"),
    ],
)
def test_weights_count_by_content_and_not_by_path(setting, step, tmp_path):
    chosen, (group, key) = settings(tmp_path), setting.split(".")
    folder = weights(tmp_path / "a")
    moved = shutil.copytree(folder, tmp_path / "b")
    other = weights(tmp_path / "c", b"other weights")
    for name in ("", "model.safetensors"):  # a folder or a file
        given, unchanged, changed = (
            fingerprints({**chosen, group: {**chosen[group], key: str(path / name)}}, frozenset({"distill"}))
            for path in (folder, moved, other)
        )
        assert unchanged == given
        assert changed[step] != given[step]


def test_a_latency_table_counts_by_content_and_not_by_path(tmp_path):
    folders = weights(tmp_path / "a"), weights(tmp_path / "b"), weights(tmp_path / "c", b"measured anew")
    given, moved, anew = (
        ("~budget", f"+budget={{latency:0.6,table:{folder / 'model.safetensors'}}}") for folder in folders
    )
    assert same(tmp_path, given, moved) == list(STEPS)
    assert "search" not in same(tmp_path, given, anew)


def test_weights_that_were_written_anew_count_as_others(tmp_path):
    folder, elsewhere = weights(tmp_path / "a"), weights(tmp_path / "b")
    given, unchanged = ((f"model.checkpoint={path}",) for path in (folder, elsewhere))
    assert "dense" in same(tmp_path, given, unchanged)
    (folder / "model.safetensors").write_bytes(b"trained a little longer")
    assert "dense" not in same(tmp_path, given, unchanged)


def test_a_teacher_by_name_counts_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights(tmp_path / "dense")  # which is not what distillation.teacher=dense means
    before = same(tmp_path, ("distillation.teacher=dense",), ("distillation.teacher=deit_tiny_patch16_224",))
    assert "distill" not in before
    one = fingerprints(settings(tmp_path), frozenset())["distill"]
    shutil.rmtree(tmp_path / "dense")
    assert fingerprints(settings(tmp_path), frozenset())["distill"] == one


def test_a_file_is_read_once(tmp_path, monkeypatch):
    """A start asks several times, of gigabytes."""
    read, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: read.append(file.name) or digest(file, name))
    chosen = settings(tmp_path, f"model.checkpoint={weights(tmp_path / 'a')}")
    assert fingerprints(chosen, frozenset()) == fingerprints(chosen, frozenset({"distill"})) | {
        name: fingerprints(chosen, frozenset())[name] for name in ("test", "report")
    }
    assert len(read) == 2
