"""Two real processes: no image is evaluated twice, none waits for ever, and training goes on alone where both were."""

import json
from contextlib import nullcontext
from pathlib import Path

import lightning
import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from tests.processes import two_ranks
from tests.test_data_loading import Numbered, Recorder, every_step, fit, steps_done

# 9 held-out images in parts of 2: three batches on one rank, two on the other.
HELD_OUT, TRAINING = 9, {"images": 25, "batch_size": 4}
OPTIONS = {"max_epochs": 2, "limit_val_batches": 1.0, "val_check_interval": 3}


class Judged(Recorder):
    """With a buffer, which DDP passes on before a forward pass, and a metric over all ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 3))
        self.accuracy = MulticlassAccuracy(3, average="micro")

    def validation_step(self, batch, batch_idx) -> None:
        super().validation_step(batch, batch_idx)
        images, labels = batch
        self.accuracy(self.layer(images.flatten(1) / 10), labels)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)


def as_rank(rank: int, root: Path) -> None:
    def trainer() -> lightning.Trainer:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        return lightning.Trainer(
            strategy="ddp", devices=2, accelerator="cpu", default_root_dir=root, enable_checkpointing=False, **quiet
        )

    found = {}
    for held_out in (HELD_OUT, 1):
        module, judge = Judged(), trainer()
        counted_twice = (
            pytest.warns(UserWarning, match="1 images on 2 processes") if held_out == 1 > rank else nullcontext()
        )
        with counted_twice:
            judge.validate(module, datamodule=Numbered(**TRAINING, held_out=held_out), verbose=False)
        found[f"accuracy {held_out}"] = judge.callback_metrics["accuracy"].item()
        found[f"validated {held_out}"] = module.validated
    data = Numbered(**TRAINING, held_out=HELD_OUT, num_workers=1)
    saver = every_step(root, every_n_train_steps=1)
    found["trained"] = fit(data, root, saver, module=Judged(), strategy="ddp", devices=2, **OPTIONS).seen
    (root / f"rank{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What each rank wrote down, and the folder with checkpoints of every step."""
    root = tmp_path_factory.mktemp("ddp")
    two_ranks(as_rank, root)
    return root, [json.loads((root / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_accuracy_over_an_odd_number_of_images_is_exact(run):
    _, (first, second) = run
    assert sorted(first[f"validated {HELD_OUT}"] + second[f"validated {HELD_OUT}"]) == list(range(HELD_OUT))
    held_out = Numbered(**TRAINING, held_out=HELD_OUT).splits.val
    with torch.inference_mode():
        predicted = Judged().eval().layer(held_out.images.flatten(1) / 10).argmax(-1)
    expected = (predicted == torch.tensor(held_out.labels)).double().mean().item()
    assert 0 < expected < 1
    assert [rank[f"accuracy {HELD_OUT}"] for rank in (first, second)] == pytest.approx([expected] * 2)


def test_fewer_images_than_processes_hang_nobody(run):
    _, (first, second) = run
    assert first["validated 1"] == second["validated 1"] == [0]


def together(first, second) -> list[tuple[int, list[int]]]:
    """(epoch, sorted numbers of the images) of each step of all processes."""
    return [(epoch, sorted(a + b)) for (epoch, a), (_, b) in zip(first, second, strict=True)]


def test_two_processes_train_on_what_one_would(run, tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    _, (first, second) = run
    alone = fit(Numbered(**TRAINING, held_out=HELD_OUT), tmp_path, module=Judged(), **OPTIONS).seen
    assert len(alone) == 12
    assert together(first["trained"], second["trained"]) == [(epoch, sorted(images)) for epoch, images in alone]


def test_one_process_goes_on_where_two_were(run, tmp_path):
    root, (first, second) = run
    whole = together(first["trained"], second["trained"])
    checkpoints = sorted(root.glob("*.ckpt"))
    assert len(checkpoints) == 12
    for path in checkpoints:
        rest = fit(Numbered(**TRAINING), tmp_path, module=Judged(), ckpt_path=path, **OPTIONS).seen
        assert [(epoch, sorted(images)) for epoch, images in rest] == whole[steps_done(path) :]
