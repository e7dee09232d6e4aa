"""Callback and modules are built from a config file by what reads type hints: jsonargparse, so LightningCLI."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from torch import nn

import lightning_mdc as mdc
from lightning_mdc.distillation.teacher import FrozenTeacher
from tests import strangers
from tests.test_docs import ROOT, blocks

jsonargparse = pytest.importorskip("jsonargparse", reason="LightningCLI asks for it")


class MyData(lightning.LightningDataModule):
    def train_dataloader(self) -> Any:
        return strangers.loader()

    val_dataloader = train_dataloader


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_page(tmp_path, monkeypatch) -> Callable[[int], Any]:
    """Runs the page's n-th call of LightningCLI with the config below it, shortly, on the CPU."""
    from lightning.pytorch import cli

    page = blocks(ROOT / "docs" / "your-trainer.md")
    made: list[Any] = []

    class TinyCLI(cli.LightningCLI):
        def __init__(self, *args: Any) -> None:
            made.append(self)
            super().__init__(*args)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "LightningCLI", TinyCLI)

    def run(number: int) -> Any:
        code = [block for block in page if "LightningCLI(" in block.text][number]
        config = [block for block in page if block.language == "yaml"][number]
        Path("page.yaml").write_text(config.text.replace("judging: 512", "judging: 16"))
        tiny = {"max_epochs": 1, "limit_train_batches": 2, "accelerator": "cpu", "default_root_dir": f"run-{number}"}
        quiet = {"logger": "false", "enable_progress_bar": "false", "enable_model_summary": "false"}
        overrides = [f"--trainer.{name}={value}" for name, value in (tiny | quiet).items()]
        monkeypatch.setattr(sys, "argv", ["main.py", "fit", "--config", "page.yaml", *overrides])
        names = {"MyModule": strangers.Stranger, "MyData": MyData, "mdc": mdc, "LightningCLI": TinyCLI}
        exec(code.compiled, names)
        return made[-1]

    return run


def test_the_page_prunes_and_finetunes_from_config_files(run_page, monkeypatch):
    monkeypatch.setattr("lightning_mdc.compression.N_TRIALS", 2)
    prune = next(each for each in run_page(0).trainer.callbacks if isinstance(each, mdc.MultiDimPruneCallback))
    assert prune.method.prediction is torch.sigmoid
    assert prune.plan is not None
    assert prune.method.tokens.reduction == "merge"
    assert min(map(len, prune.plan.heads)) >= 2

    mdc.save(strangers.network(), "dense")
    module = run_page(1).model
    assert module.student.training
    assert isinstance(module.teacher, FrozenTeacher)
    assert module.optimizer_kwargs["lr"] == 1e-4
    (checkpoint,) = Path("run-1").rglob("*.ckpt")
    again = mdc.DistillationModule.load_from_checkpoint(checkpoint, student=mdc.load("slim"), teacher="dense")
    assert again.optimizer_kwargs == module.optimizer_kwargs
    for name, value in module.student.state_dict().items():
        assert torch.equal(value, again.student.state_dict()[name])


# --- what a config file may say ---------------------------------------------------------------------------------------


def built(cls: type, **init_args: Any) -> Any:
    """What a config file makes of it, read, written as LightningCLI does beside a run, and read again."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--it", type=cls.__mro__[1])  # by a base class, as in a Trainer's list
    text = yaml.safe_dump({"it": {"class_path": f"lightning_mdc.{cls.__name__}", "init_args": init_args}})
    return parser.instantiate(parser.parse_string(parser.dump(parser.parse_string(text)))).it


def class_of(name: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": init_args}


@pytest.mark.parametrize(
    ("argument", "given", "expected"),
    [
        ("prediction", "torch.sigmoid", torch.sigmoid),  # a builtin says nothing of what it takes and gives
        ("prediction", "torch.special.expit", torch.special.expit),
        ("prediction", "torch.nn.functional.sigmoid", nn.functional.sigmoid),  # nor does this one of what it gives
        ("prediction", class_of("torch.nn.Softmax", dim=-1), nn.Softmax),
        ("evaluate", "lightning_mdc.macs", mdc.macs),
        ("policy", {"heads": 0.5, "neurons": [0.5, 1.0], "tokens": 0.7}, mdc.Policy(0.5, [0.5, 1.0], 0.7)),
        ("policy", class_of("lightning_mdc.Policy", tokens=0.5), mdc.Policy(tokens=0.5)),
        ("policy", "uniform", "uniform"),
        ("policy", "policy.json", mdc.Policy(0.5)),
        ("budget", 0.5, mdc.Budget(macs=0.5)),
        ("budget", {"latency": "1.8ms", "device": "cpu"}, mdc.Budget(latency="1.8ms", device="cpu")),
        ("criterion", "hsic", mdc.HSIC),
        ("criterion", class_of("lightning_mdc.Taylor", loss="torch.nn.CrossEntropyLoss"), mdc.Taylor),
        ("dimensions", ["tokens", "heads"], ("heads", "tokens")),
        ("space", {"groups": {"heads": 3}, "stages": [1, 2]}, mdc.Space(groups={"heads": 3}, stages=(1, 2))),
        ("tokens", {"reduction": "drop", "restore": True}, mdc.TokenOptions(reduction="drop", restore=True)),
        ("calibration", {"images": 32}, mdc.Calibration(images=32)),
    ],
)
def test_what_the_callback_takes_can_be_said_in_a_config_file(argument, given, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("policy.json").write_text(mdc.Policy(0.5).to_json())
    found = getattr(built(mdc.MultiDimPruneCallback, **{argument: given}).method, argument)
    if isinstance(expected, type):
        assert isinstance(found, expected)
    else:
        assert found is expected or str(found) == str(expected)


@pytest.mark.parametrize(
    ("argument", "given", "expected"),
    [
        ("teacher", "dense", "None"),
        ("teacher", {"source": "dense", "precision": 32}, "32"),
        ("teacher", class_of("lightning_mdc.Teacher", source="dense", precision="bf16"), "bf16"),
        ("teacher", class_of("lightning_mdc.load", directory="dense"), "None"),
        ("teacher", {"source": class_of("lightning_mdc.load", directory="dense")}, "None"),
    ],
)
def test_a_teacher_can_be_said_in_a_config_file(argument, given, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mdc.save(strangers.network(), "dense")
    student = class_of("lightning_mdc.load", directory="dense")
    module = built(mdc.DistillationModule, student=student, **{argument: given}, mixup={"mixup_alpha": 0.8})
    assert str(module.teacher.precision) == expected
    assert module.mixing is not None
