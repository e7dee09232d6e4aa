"""Finetuning makes nothing worse in silence: the start is judged as every epoch is, and the best of them is kept."""

import json
import logging
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader

import lightning_mdc as mdc
from lightning_mdc.app import pipeline, steps
from lightning_mdc.app.report.record import RunRecord
from lightning_mdc.app.report.report import Report
from lightning_mdc.app.report.results import Results
from lightning_mdc.app.run_folder import RunFolder
from lightning_mdc.app.trainer import BestEpoch
from lightning_mdc.distillation import DistillationModule
from tests.test_train import settings

pytestmark = pytest.mark.slow  # CI runs them

# A recipe that wrecks any network.
WRECKS = ("distillation.recipe=scratch", "distillation.optimizer.opt=sgd", "distillation.optimizer.lr=1000")
DATA = ("data.val_fraction=0.1", "data.augment=false")
CUT = (*DATA, "policy.kind=uniform", "budget=0.8", "dense.epochs=0", "latency.batch_sizes=[1]")
FINETUNED = ("distillation.seeds=[0]", "distillation.epochs=2", "trainer.check_val_every_n_epoch=1")


@pytest.fixture(autouse=True)
def heard(caplog, monkeypatch):
    caplog.set_level("INFO", "lightning_mdc")
    monkeypatch.setattr(logging.getLogger("lightning_mdc"), "propagate", True)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """Weights that get most digits right."""
    runs = tmp_path_factory.mktemp("given")
    return (
        pipeline.run(settings(runs, *DATA, "data.max_train_images=null", "stage=dense", "dense.epochs=4")).path
        / "dense"
    )


@pytest.fixture(scope="module")
def cut(given, tmp_path_factory) -> Path:
    """A run with a slim model of these weights."""
    chosen = (*CUT, f"model.checkpoint={given}", "stage=[dense,score,search,slim]")
    return pipeline.run(settings(tmp_path_factory.mktemp("cut"), *chosen)).path


@pytest.fixture
def finetune(given, cut, tmp_path):
    """Goes on with that run in a copy of its own, to the test or as `overrides` say."""
    folder = shutil.copytree(cut, tmp_path / "tiny" / cut.name)

    def run(*overrides: str) -> Path:
        chosen = (*CUT, *FINETUNED, f"model.checkpoint={given}", "skip=[report]", f"resume={folder}")
        return pipeline.run(settings(tmp_path, *chosen, *overrides)).path

    return run


def held_out_top1(folder: Path, artifact: str) -> float:
    data = steps.Run(json.loads((folder / "settings.json").read_text()), RunFolder(folder)).data
    images, labels = map(torch.cat, zip(*data.val_dataloader(), strict=True))
    with torch.inference_mode():
        return float((mdc.load(folder / artifact)(images).argmax(dim=1) == labels).float().mean())


def weights(folder: Path, artifact: str) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in mdc.load(folder / artifact).state_dict().values()])


@pytest.mark.parametrize("average", [(), pytest.param(("distillation.ema_decay=0.9",), marks=pytest.mark.slow)])
def test_what_is_kept_is_what_was_judged(finetune, average, caplog):
    folder = finetune(*average, "surgery.compensate=none")  # which leaves finetuning something to gain
    for artifact, start in (("finetuned/seed0", "slim"), ("reference/seed0", "dense")):
        noted = json.loads((folder / "steps" / artifact / "training.json").read_text())
        assert noted["before"] == pytest.approx(held_out_top1(folder, start))
        assert max(noted["before"], noted["after"]) == pytest.approx(held_out_top1(folder, artifact))
        is_start = torch.equal(weights(folder, artifact), weights(folder, start))
        assert is_start == (noted["before"] > noted["after"])
    results = Results.load(folder / "results.json")
    assert [row.before is not None for row in results.rows] == [False, False, True, True]
    assert "recipe finetune, as model.checkpoint gives the weights: adamw, lr 5e-05, layer_decay 0.75" in caplog.text


def test_where_finetuning_does_harm_the_start_is_kept_and_all_say_so(finetune, caplog):
    folder = finetune(*WRECKS)
    for artifact, start in (("finetuned/seed0", "slim"), ("reference/seed0", "dense")):
        assert torch.equal(weights(folder, artifact), weights(folder, start))
    results = Results.load(folder / "results.json")
    slim, finetuned = results.of("slim")[0], results.of("slim finetuned")[0]
    assert finetuned.correct == slim.correct
    assert finetuned.before > finetuned.after
    remedy = "give distillation.recipe=finetune, or lower distillation.optimizer.lr=1000"
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for said in (*results.harm, *(line for line in warned if "did harm" in line)):
        assert remedy in said
    assert sum("did harm" in line for line in warned) == 2
    assert Report(RunRecord(folder)).verdict.count("Finetuning did harm to") == 2


def test_without_held_out_images_the_last_epoch_is_kept(given, tmp_path):
    chosen = (*CUT, *FINETUNED, f"model.checkpoint={given}", "data.val_fraction=0", "skip=[report]", *WRECKS)
    folder = pipeline.run(settings(tmp_path, *chosen)).path
    assert not torch.equal(weights(folder, "finetuned/seed0"), weights(folder, "slim"))
    assert Results.load(folder / "results.json").harm == ()


def test_a_killed_finetuning_remembers_its_start_and_its_best_epoch(finetune, monkeypatch):
    chosen = ("distillation.epochs=3", "distillation.reference_seeds=[]", "stage=distill")
    whole = finetune(*chosen)
    expected = weights(whole, "finetuned/seed0"), (whole / "steps/finetuned/seed0/training.json").read_text()
    step = DistillationModule.training_step

    def dies(self, batch, index):
        if self.current_epoch == 2 and index == 1:
            raise RuntimeError("power cut")
        return step(self, batch, index)

    for left in ("finetuned", "steps/finetuned"):
        shutil.rmtree(whole / left)
    monkeypatch.setattr(DistillationModule, "training_step", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        finetune(*chosen)
    monkeypatch.setattr(DistillationModule, "training_step", step)
    folder = finetune(*chosen)
    assert torch.equal(weights(folder, "finetuned/seed0"), expected[0])
    assert (folder / "steps/finetuned/seed0/training.json").read_text() == expected[1]


# --- which epoch ------------------------------------------------------------------------------------------------------


class Told(L.LightningModule):
    """Gets as many held-out images right as it is told; its weight counts its updates."""

    def __init__(self, top1: list[float], updates: int = 1) -> None:
        super().__init__()
        self.top1, self.weight = iter(top1), torch.nn.Parameter(torch.zeros(()))
        self.updates = updates

    def training_step(self, batch, index):
        return -self.weight

    def validation_step(self, batch, index):
        self.seen = float(self.weight)

    def on_validation_epoch_end(self):
        self.log("val/top1", next(self.top1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def told(folder: Path, top1: list[float], epochs: int, *more: L.Callback, begun: Path | None = None) -> BestEpoch:
    best = BestEpoch(folder)
    last = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        callbacks=[best, last, *more],
        num_sanity_val_steps=-1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(torch.zeros(1, 1))
    trainer.fit(Told(top1), data, data, ckpt_path=begun)
    return best


def kept(best: BestEpoch) -> float:
    return float(torch.load(best.path, weights_only=True)["state_dict"]["weight"])


def test_the_best_epoch_is_kept_and_of_equals_the_latest(tmp_path):
    best = told(tmp_path, [0.5, 0.6, 0.8, 0.7, 0.8, 0.1], epochs=5)
    assert (best.before, best.after, kept(best)) == pytest.approx((0.5, 0.8, 4))


def test_a_resumed_training_knows_start_and_best(tmp_path):
    told(tmp_path, [0.9, 0.8, 0.3], epochs=2)
    best = told(tmp_path, [0.3, 0.2, 0.1], epochs=4, begun=tmp_path / "last.ckpt")
    assert (best.before, best.after, kept(best)) == pytest.approx((0.9, 0.8, 1))


def test_averaged_weights_are_kept_where_they_are_judged(tmp_path):
    best = told(tmp_path, [0.1, 0.2, 0.3], 2, EMAWeightAveraging(decay=0.5))
    assert kept(best) == pytest.approx(1.5)  # of 1 and 2
