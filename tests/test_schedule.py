"""When a schedule is through: in time for whichever of a Trainer's limits comes first."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer
from torch.utils.data import DataLoader

import lightning_mdc as mdc
from lightning_mdc.errors import CallbackError
from lightning_mdc.schedule import Schedule, training_length
from tests.strangers import Stranger, UnevenBatches, loader, trainer


def limits(**given: Any) -> Any:
    """As a Trainer of five batches has them."""
    usual = {
        "max_epochs": -1,
        "max_steps": -1,
        "num_training_batches": 5,
        "accumulate_grad_batches": 1,
        "callbacks": [],
    }
    return SimpleNamespace(**(usual | given))


ACCUMULATED = [GradientAccumulationScheduler({0: 1, 2: 5})]  # 5, 5, 1, 1, ... steps


@pytest.mark.parametrize(
    ("given", "epochs", "steps"),
    [
        ({"max_epochs": 9}, 9, 45),
        ({"max_epochs": 1000, "max_steps": 30}, 6, 30),
        ({"max_steps": 31}, 7, 31),
        ({"max_epochs": None, "max_steps": 30}, 6, 30),
        ({"max_epochs": 2, "max_steps": 30}, 2, 10),
        ({"max_epochs": 100, "max_steps": 12, "accumulate_grad_batches": 2}, 4, 12),
        ({"max_epochs": 100, "max_steps": 12, "num_training_batches": 2}, 6, 12),  # by limit_train_batches
        ({"max_epochs": 100, "max_steps": 12, "callbacks": ACCUMULATED}, 4, 12),
        ({"max_epochs": 4, "callbacks": ACCUMULATED}, 4, 12),
        ({"max_epochs": 9, "num_training_batches": math.inf}, 9, None),
        ({"max_steps": 30, "num_training_batches": math.inf}, None, 30),
        ({"max_epochs": 9, "max_steps": 30, "num_training_batches": math.inf}, None, None),
        ({}, None, None),
    ],
)
def test_the_nearest_limit_counts(given: dict[str, Any], epochs: int | None, steps: int | None) -> None:
    assert training_length(limits(**given), "epoch") == epochs
    assert training_length(limits(**given), "step") == steps
    for unit, length in (("epoch", epochs), ("step", steps)):
        schedule = Schedule("cubic", unit=unit)  # type: ignore[arg-type]
        if length is not None:
            assert schedule.in_training(limits(**given)).end == round(length * 2 / 3)
        else:
            with pytest.raises(CallbackError, match=rf"endless Trainer, or one .*how many {unit}s.*e\.g\. end=10"):
                schedule.in_training(limits(**given))


@pytest.mark.parametrize(
    ("schedule", "given", "words"),
    [
        (Schedule("cubic"), {"max_epochs": 1}, "in a training of 1 epochs: .* or pass unit='step'"),
        (Schedule("cubic"), {"max_epochs": 90, "max_steps": 4}, "in a training of 1 epochs"),
        (Schedule("cubic", start=8), {"max_epochs": 8}, "start=8, in a training of 8 epochs"),
        (Schedule("cubic", start=9, unit="step"), {"max_steps": 10}, "in a training of 10 steps: .*train longer$"),
    ],
)
def test_a_training_that_is_over_before_is_refused(schedule: Schedule, given: dict[str, Any], words: str) -> None:
    with pytest.raises(CallbackError, match=words):
        schedule.in_training(limits(**given))


def test_a_limit_of_time_is_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"through at epoch 6, whatever max_time says.*e\.g\. end=12"):
        Schedule("cubic", start=2).in_training(limits(max_epochs=9, callbacks=[Timer("00:01:00:00")]))


@pytest.mark.parametrize(
    ("unit", "options"),
    [
        ("epoch", {"epochs": 1000, "max_steps": 15}),
        pytest.param("epoch", {"epochs": -1, "max_steps": 6, "limit_train_batches": 2}, marks=pytest.mark.slow),
        pytest.param("step", {"epochs": 1000, "max_steps": 4}, marks=pytest.mark.slow),
    ],
)
def test_a_fit_with_a_limit_of_steps_ends_with_all_masks_on(unit: Any, options: Any, tmp_path: Path) -> None:
    callback = mdc.MultiDimPruneCallback(0.5, "uniform", "magnitude", schedule="cubic", unit=unit)
    trainer(tmp_path, callback, **options).fit(Stranger(), loader())  # that it ended too early would be a warning
    assert callback.plan is not None


def test_a_stream_without_a_length_is_refused_before_anything_is_looked_at(tmp_path: Path) -> None:
    class Unseen(mdc.MultiDimPruneCallback):
        def calibration_step(self, pl_module: Any, batch: Any) -> Any:
            pytest.fail("looked at")

    data: DataLoader[Any] = DataLoader(UnevenBatches(), batch_size=None)
    module, callback = Stranger(), Unseen(0.5, "uniform", schedule="cubic", unit="step")
    with pytest.raises(CallbackError, match="a stream has no length"):
        trainer(tmp_path, callback, epochs=3).fit(module, data)
