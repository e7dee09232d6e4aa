"""The callback inside Trainers it knows nothing about."""

import csv
import gc
import itertools
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

import lightning_mdc as mdc
from lightning_mdc.errors import BudgetError, CalibrationError, CallbackError, PlanError, UnsupportedModelError
from lightning_mdc.importance import Calibration, Scorer
from lightning_mdc.surgery import is_masked
from tests.processes import two_ranks
from tests.strangers import Spots, Stranger, Twins, loader, network, train_ddp, trainer

ROOT = Path(mdc.__file__).parents[1]


def uniform(budget: float, **options: Any) -> mdc.MultiDimPruneCallback:
    """What is not about the search does without it."""
    return mdc.MultiDimPruneCallback(budget, "uniform", **options)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def fitted(root: Path, callback: lightning.Callback | None, data: Any, *more: Any, **options: Any) -> Stranger:
    torch.manual_seed(5)
    module, ckpt_path = Stranger(), options.pop("ckpt_path", None)
    fit = trainer(root, *([callback] if callback else []), *more, **options)
    fit.fit(module, data, loader(), ckpt_path=ckpt_path)
    return module


# --- what a stop costs ------------------------------------------------------------------------------------------------


def lost_work(root: Path, *checkpoints: lightning.Callback) -> list[str]:
    """Warnings of work that would be lost, of two fits with one callback."""
    callback = uniform(0.6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            trainer(root, callback, *checkpoints, epochs=1, enable_checkpointing=bool(checkpoints)).fit(
                Stranger(), loader()
            )
            callback.reset()
    return [str(each.message) for each in caught if "save_on_exception=True" in str(each.message)]


def test_a_fit_that_would_lose_work_at_a_stop_is_warned_about_once(tmp_path):
    (said,) = lost_work(tmp_path, ModelCheckpoint(tmp_path / "a"))
    assert said.startswith("no callback saves a checkpoint when the fit is told to end (SIGTERM")
    assert len(lost_work(tmp_path, ModelCheckpoint(tmp_path / "b", save_last=True, every_n_train_steps=1))) == 1


def test_a_fit_that_saves_at_a_stop_or_never_is_not(tmp_path):
    assert not lost_work(tmp_path, ModelCheckpoint(tmp_path / "a", save_on_exception=True))
    assert not lost_work(tmp_path, OnExceptionCheckpoint(tmp_path / "b"))
    assert not lost_work(tmp_path)  # without checkpoints at all


# --- it does no harm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": True},
        {"shuffle": True, "num_workers": 1},
        {"shuffle": True, "num_workers": 1, "persistent_workers": True},
        {"shuffle": True, "generator": 11},
    ],
    ids=str,
)
def test_keeping_everything_trains_to_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    def data() -> DataLoader[Any]:
        mine = dict(options)
        if "generator" in mine:
            mine["generator"] = torch.Generator().manual_seed(mine["generator"])
        return loader(**mine)

    callback = mdc.MultiDimPruneCallback(policy=mdc.Policy())
    assert same_weights(fitted(tmp_path, None, data()), fitted(tmp_path, callback, data()))
    assert callback.plan is not None
    assert {*callback.plan.policy.heads, *callback.plan.policy.neurons, *callback.plan.policy.tokens} == {1.0}
    assert callback.scores is not None
    assert callback.scores.images == 80  # all there are


def test_masks_are_on_while_the_trainer_runs_and_off_after(tmp_path: Path) -> None:
    callback, states = uniform(0.5), {}

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            states["train"] = is_masked(pl_module)

        def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            states["validation"] = is_masked(pl_module)

        def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            states["test"] = is_masked(pl_module)

    torch.manual_seed(5)
    module, fit = Stranger(), trainer(tmp_path, callback, Watch())
    fit.fit(module, loader(), loader())
    assert not is_masked(module)
    fit.test(module, loader(), verbose=False)
    assert states == {"train": True, "validation": True, "test": True}
    assert not is_masked(module)
    slim = callback.slim_model(module.eval())
    assert mdc.macs(slim) <= 0.5 * mdc.macs(module)
    (predicted,) = trainer(tmp_path, callback).predict(module, loader(batch_size=80))  # type: ignore[misc]
    with torch.no_grad():
        torch.testing.assert_close(slim(2 * Spots().images - 1), predicted, rtol=1e-4, atol=1e-5)


def test_masks_come_off_when_fit_fails(tmp_path: Path) -> None:
    class Failing(Stranger):
        def on_train_batch_end(self, *_: Any) -> None:
            assert is_masked(self)
            raise ZeroDivisionError

    module = Failing()
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, uniform(0.5)).fit(module, loader())
    assert not is_masked(module)


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [{}, {"schedule": "cubic", "end": 3}, {"schedule": "cubic", "start": 2, "end": 12, "unit": "step"}],
    ids=["one-shot", "cubic epochs", "cubic steps"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    schedule: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checkpoints() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)

    whole = uniform(0.5, restore_rng=True, **schedule)
    expected = fitted(tmp_path, whole, loader(shuffle=True), checkpoints(), epochs=4)
    monkeypatch.setattr(Scorer, "update", None)  # scoring again would fail
    for path in (tmp_path / "epoch=0.ckpt", tmp_path / "epoch=1.ckpt"):
        Stranger().load_state_dict(torch.load(path, weights_only=True)["state_dict"])  # strictly, without the callback
        assert mdc.plan_from_checkpoint(path) == whole.plan
        resumed = uniform(0.5, restore_rng=True, **schedule)
        module = fitted(tmp_path, resumed, loader(shuffle=True), epochs=4, ckpt_path=path)
        assert resumed.plan == whole.plan
        assert same_weights(module, expected)


def test_resuming_works_where_the_optimizer_asks_for_the_length(tmp_path: Path) -> None:
    class Scheduled(Stranger):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            # Asking makes Lightning start the training loader, which draws random numbers.
            steps = self.trainer.estimated_stepping_batches
            return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=int(steps))]

    def fit(ckpt_path: Path | None) -> nn.Module:
        torch.manual_seed(5)
        module, callback = Scheduled(), uniform(0.5, restore_rng=True)
        checkpoints = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        trainer(tmp_path, callback, checkpoints, epochs=3).fit(module, loader(shuffle=True), ckpt_path=ckpt_path)
        return module

    whole = fit(None)
    assert same_weights(fit(tmp_path / "epoch=0.ckpt"), whole)


@pytest.mark.slow
def test_a_strangers_run_survives_a_kill(tmp_path: Path) -> None:
    def run(root: Path, killed_at: str, how: str) -> int:
        root.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "tests.strangers", str(root), killed_at, how]
        return subprocess.run(command, cwd=ROOT, check=False, capture_output=True).returncode

    assert run(tmp_path / "whole", "-", "afresh") == 0
    assert run(tmp_path / "cut", "2", "afresh") == -signal.SIGKILL
    assert run(tmp_path / "cut", "-", "resume") == 0
    whole, cut = (torch.load(tmp_path / name / "final.pt") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    # Here, in a process that never saw that run's module:
    slim = mdc.load(tmp_path / "cut" / "slim")
    dense = network()
    dense.load_state_dict({name.removeprefix("encoder."): tensor for name, tensor in cut.items()})
    plan = mdc.plan_from_checkpoint(tmp_path / "cut" / "last.ckpt")
    x = 2 * Spots().images - 1
    with torch.no_grad(), mdc.masked(dense.eval(), plan):
        torch.testing.assert_close(slim(x), dense(x), rtol=1e-4, atol=1e-5)
    with next((tmp_path / "cut").rglob("metrics.csv")).open() as file:
        assert "mdc/macs" in next(csv.reader(file))


def test_testing_a_checkpoint_in_a_fresh_trainer_sees_the_masks(tmp_path: Path) -> None:
    callback = uniform(0.5)
    torch.manual_seed(5)
    module, checkpoint = Stranger(), ModelCheckpoint(tmp_path, filename="last")
    fit = trainer(tmp_path, callback, checkpoint)
    fit.fit(module, loader(), loader())
    in_fit = fit.callback_metrics["surprise"].item()
    fresh = trainer(tmp_path, uniform(0.5))
    (result,) = fresh.test(Stranger(), loader(), ckpt_path=checkpoint.best_model_path, verbose=False)
    assert result["surprise"] == pytest.approx(in_fit, rel=1e-5)
    (without,) = trainer(tmp_path).test(Stranger(), loader(), ckpt_path=checkpoint.best_model_path, verbose=False)
    assert without["surprise"] != pytest.approx(in_fit, rel=1e-5)


def test_a_second_fit_keeps_the_plan_until_reset(tmp_path: Path) -> None:
    callback = uniform(0.5)
    module = fitted(tmp_path, callback, loader())
    plan = callback.plan
    trainer(tmp_path, callback, epochs=1).fit(module, loader())
    assert callback.plan is plan
    callback.reset()
    assert callback.plan is None
    trainer(tmp_path, callback, epochs=1).fit(module, loader())
    assert callback.plan is not None
    assert callback.plan is not plan


def test_the_budgets_policy_is_found_once_a_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A latency budget may have to measure for it: minutes."""
    calls: list[float] = []

    def counted(*args: Any, **options: Any) -> mdc.Policy:
        calls.append(1)
        return mdc.uniform_policy(*args, **options)

    monkeypatch.setattr("lightning_mdc.compression.uniform_policy", counted)
    callback = uniform(0.5)
    module = fitted(tmp_path, callback, loader(), epochs=1)
    assert len(calls) == 1
    trainer(tmp_path, callback, epochs=1).fit(module, loader())  # has a plan
    assert len(calls) == 1


def test_a_plan_made_for_another_budget_is_kept_with_a_word(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="half")
    fitted(tmp_path, uniform(0.5), loader(), checkpoint, epochs=1)
    callback = uniform(0.8)
    with pytest.warns(UserWarning, match=r"macs=0\.8.* is not looked at.*kept \(\d\d\.\d% of the MACs\)"):
        fitted(tmp_path, callback, loader(), epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert mdc.plan_macs(network(), callback.plan) <= 0.5 * mdc.macs(network())  # type: ignore[arg-type]


def test_the_cubic_schedule_takes_more_and_more_of_the_same(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    callback = uniform(0.4, schedule="cubic", start=1, end=5)
    fitted(tmp_path, callback, loader(), epochs=7, logger=logger)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        macs = [float(row["mdc/macs"]) for row in csv.DictReader(file) if row["mdc/macs"]]
    assert len(macs) == 4  # at epochs 2, 3, 4 and 5; at epoch 1 the way begins
    assert macs == sorted(macs, reverse=True)
    assert macs[-1] == mdc.plan_macs(network(), callback.plan)  # type: ignore[arg-type]
    drops = [a - b for a, b in itertools.pairwise(macs)]
    assert drops[0] > drops[-1]


def test_a_fit_that_prunes_nothing_says_so(tmp_path: Path) -> None:
    callback = uniform(0.5, start=9)
    with pytest.warns(UserWarning, match="fit ended before anything was pruned: start=9"):
        fitted(tmp_path, callback, loader(), epochs=1)
    assert callback.plan is None


def test_only_what_the_sampler_trains_on_is_scored(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Watching(mdc.MultiDimPruneCallback):
        def calibration_step(self, pl_module: lightning.LightningModule, batch: Any) -> Any:
            seen.append(batch[0])
            return super().calibration_step(pl_module, batch)

    fitted(tmp_path, Watching(0.5, "uniform"), loader(sampler=SubsetRandomSampler(range(32))), epochs=1)
    training = {image.sum().item() for image in Spots().images[:32]}
    # The first batch to see its size; two to score on, forward and, once more, to go back; to refit on by both models.
    assert len(seen) == 9
    assert {image.sum().item() for image in torch.cat(seen)} == training


def test_a_data_modules_transfer_hooks_count(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Half(lightning.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [0.5 * batch[0], batch[1]]

    class Watching(mdc.MultiDimPruneCallback):
        def calibration_step(self, pl_module: lightning.LightningModule, batch: Any) -> Any:
            seen.append(batch[0])
            return super().calibration_step(pl_module, batch)

    trainer(tmp_path, Watching(0.5, "uniform"), epochs=1).fit(Stranger(), datamodule=Half())
    assert torch.cat(seen).max() < 0.55  # the images go up to 1


def test_a_fit_that_ends_too_early_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="fit ended before the pruning schedule did"):
        fitted(tmp_path, uniform(0.5, schedule="cubic", end=20), loader())


# --- company ----------------------------------------------------------------------------------------------------------


def test_two_processes_hold_the_plan_of_one(tmp_path: Path) -> None:
    train_ddp(0, tmp_path, 1, "map")
    two_ranks(train_ddp, tmp_path, 2, "map")
    single, first, second = (
        mdc.Plan.from_json((tmp_path / f"plan-{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
    )
    assert first.hash == second.hash == single.hash
    assert {(tmp_path / f"images-{name}").read_text() for name in ("1-0", "2-0", "2-1")} == {"64"}


def test_two_processes_with_uneven_streams_decide_at_the_same_step(tmp_path: Path) -> None:
    two_ranks(train_ddp, tmp_path, 2, "stream")
    first, second = ((tmp_path / f"plan-2-{rank}.json").read_text() for rank in (0, 1))
    assert first == second


@pytest.mark.slow
def test_spawned_processes_give_the_plan_back_and_leave_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    callback = mdc.MultiDimPruneCallback(0.5, n_trials=2)
    module = fitted(tmp_path, callback, loader(), epochs=1, strategy="ddp_spawn", devices=2)
    (outcome,) = tmp_path.glob("lightning_mdc-*")
    written = outcome.read_bytes()
    assert callback.plan is not None
    assert callback.search is not None
    assert [trial.number for trial in callback.search.history] == [0, 1]
    assert not outcome.exists()
    assert mdc.macs(callback.slim_model(module)) <= 0.5 * mdc.macs(module)
    outcome.write_bytes(written)  # as if nobody had asked
    del callback, module
    gc.collect()
    assert not outcome.exists()


@pytest.mark.parametrize(
    "options",
    [{"fast_dev_run": True}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}],
    ids=str,
)
def test_trainer_options(options: dict[str, Any], tmp_path: Path) -> None:
    callback = uniform(0.5)
    module = fitted(tmp_path, callback, loader(), **options)
    assert mdc.macs(callback.slim_model(module)) <= 0.5 * mdc.macs(module)


def test_barebones_and_ema(tmp_path: Path) -> None:
    callback = uniform(0.5)
    lightning.Trainer(barebones=True, max_epochs=1, accelerator="cpu", callbacks=[callback]).fit(Stranger(), loader())
    assert callback.plan is not None
    callback = uniform(0.5)
    module = fitted(tmp_path, callback, loader(), EMAWeightAveraging(decay=0.5))
    assert callback.plan is not None
    assert not is_masked(module)


def test_iterable_data_is_watched_going_by(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([Spots()[i] for i in range(80)])

    callback = uniform(0.5, calibration=Calibration(images=16))
    fitted(tmp_path, callback, DataLoader(Stream(), batch_size=16), epochs=1)
    # The first batch, as the network saw it before its first step.
    expected = mdc.score(network(), [2 * Spots().images[:16] - 1], "fisher", progress=False)
    assert callback.scores is not None
    for mine, theirs in zip(callback.scores.neurons, expected.neurons, strict=True):
        torch.testing.assert_close(mine, theirs)
    longer = uniform(0.5, calibration=Calibration(images=40))
    fitted(tmp_path, longer, DataLoader(Stream(), batch_size=16), epochs=1)
    assert longer.scores is not None
    assert longer.scores.images == 48


def test_dict_batches_need_one_method(tmp_path: Path) -> None:
    class Dicts(Spots):
        def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
            image, label = super().__getitem__(index)
            return {"pixels": image, "label": label}

    class DictStranger(Stranger):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch["pixels"]), batch["label"])

    class ForDicts(mdc.MultiDimPruneCallback):
        def calibration_step(self, pl_module: lightning.LightningModule, batch: Any) -> Any:
            return pl_module(batch["pixels"])

    data = DataLoader(Dicts(), batch_size=16)
    with pytest.raises(CalibrationError, match=r"a training batch is a dict.*override calibration_step"):
        trainer(tmp_path, uniform(0.5)).fit(DictStranger(), data)
    callback = ForDicts(0.5, n_trials=2)
    trainer(tmp_path, callback, epochs=1).fit(DictStranger(), data)
    assert callback.scores is not None


def test_several_loaders_and_taylor(tmp_path: Path) -> None:
    class Two(Stranger):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)

    class First(mdc.MultiDimPruneCallback):
        def calibration_step(self, pl_module: lightning.LightningModule, batch: Any) -> Any:
            return pl_module(batch["a"][0])

    callback = First(0.5, n_trials=2)
    trainer(tmp_path, callback, epochs=1).fit(Two(), {"a": loader(), "b": loader(batch_size=8)})
    assert callback.plan is not None
    taylor = uniform(0.5, criterion="taylor", calibration=Calibration(images=40))
    module = fitted(tmp_path, taylor, loader(), epochs=1)
    assert taylor.scores is not None
    assert taylor.scores.images == 32  # whole batches of 16
    assert mdc.macs(taylor.slim_model(module)) <= 0.5 * mdc.macs(module)


def test_two_models_in_one_module(tmp_path: Path) -> None:
    module = Twins()
    with pytest.raises(UnsupportedModelError, match=r"encoder .*other"):
        trainer(tmp_path, uniform(0.5)).fit(module, loader())
    budgets = (("encoder", 0.5), ("other", 0.8))
    first, second = (mdc.MultiDimPruneCallback(budget, n_trials=2, submodule=path) for path, budget in budgets)
    checkpoint = ModelCheckpoint(tmp_path, filename="twins")
    trainer(tmp_path, first, second, checkpoint, epochs=1).fit(module, loader())
    slims = first.slim_model(module), second.slim_model(module)
    assert mdc.macs(slims[0]) < 0.5 * mdc.macs(module.encoder) < mdc.macs(slims[1]) < 0.8 * mdc.macs(module.other)
    path = tmp_path / "twins.ckpt"
    assert mdc.plan_from_checkpoint(path, submodule="other") == second.plan
    with pytest.raises(CallbackError, match="say which with submodule="):
        mdc.plan_from_checkpoint(path)


def test_in_place_hands_the_slim_model_to_its_owner(tmp_path: Path) -> None:
    callback = uniform(0.5, save_to=tmp_path / "slim")
    module = fitted(tmp_path, callback, loader())
    dense_macs = mdc.macs(module)
    slim = callback.slim_model(module, in_place=True)
    assert module.encoder is slim
    assert callback.slim_model(module) is slim
    trainer(tmp_path, callback, epochs=1).fit(module, loader())  # goes on with the slim one
    assert mdc.macs(module) <= 0.5 * dense_macs
    assert mdc.macs(mdc.load(tmp_path / "slim")) == mdc.macs(slim)


def test_in_place_reaches_every_name_and_a_reset_callback_prunes_further(tmp_path: Path) -> None:
    callback = uniform(0.5)
    module = fitted(tmp_path, callback, loader(), epochs=1)
    module.alias = module.encoder
    slim = callback.slim_model(module, in_place=True)
    assert module.alias is slim
    assert module.encoder is slim
    again = uniform(0.8, dimensions=("heads", "neurons"))
    trainer(tmp_path, again, epochs=1).fit(module, loader())
    assert mdc.macs(again.slim_model(module)) <= 0.8 * mdc.macs(slim)


def test_a_model_that_cannot_be_saved_is_refused_before_training(tmp_path: Path) -> None:
    module = Stranger()
    module.encoder.head = nn.Sequential(nn.Linear(32, 5))
    with pytest.raises(mdc.errors.ArtifactError, match=r"head is .*Sequential"):
        trainer(tmp_path, uniform(0.5, save_to=tmp_path / "slim")).fit(module, loader())


@pytest.mark.slow
@pytest.mark.parametrize("what", ["network", "module"])
def test_a_compiled_network_is_pruned(what: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    module: Any = Stranger()
    if what == "network":
        module.encoder = torch.compile(module.encoder, backend="aot_eager")
        with torch.no_grad():
            module.eval()(Spots().images[:16])  # compiled before the callback comes
    callback = uniform(0.5, start=1)
    fit = trainer(tmp_path, callback, epochs=2)  # the first epoch, without masks, runs compiled as well
    given = torch.compile(module, backend="aot_eager") if what == "module" else module
    fit.fit(given.train(), loader(), loader())
    (result,) = fit.validate(given, loader(), verbose=False)
    slim = callback.slim_model(module, in_place=True)
    assert module.encoder is slim
    (expected,) = trainer(tmp_path).validate(module, loader(), verbose=False)
    assert result["surprise"] == pytest.approx(expected["surprise"], rel=1e-4)


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 0}, BudgetError, r"budget=0: .*fraction"),
        ({"budget": 1.2}, BudgetError, r"Budget\(macs="),
        ({"policy": "uniformly"}, mdc.errors.PolicyError, "policy='uniformly'"),
        ({"criterion": "hsics"}, CalibrationError, "known are activation, conditional, fisher, hsic"),
        ({"schedule": "linear"}, CallbackError, r"schedule='linear': expected 'one-shot' or 'cubic'"),
        ({"schedule": "cubic", "start": 3, "end": 3}, CallbackError, "end=3: expected a whole number of at least 4"),
        ({"end": 3}, CallbackError, "end=3 means nothing to schedule='one-shot'"),
        ({"start": None}, CallbackError, "start=None"),
        ({"policy": 0.6}, mdc.errors.PolicyError, "policy=0.6: expected 'searched', 'uniform'"),
        ({"submodule": 5}, CallbackError, "submodule=5 has the wrong type"),
        ({"tokens": "fuse"}, CallbackError, "tokens='fuse'"),
        ({"prediction": 5}, CallbackError, "prediction=5: expected a function"),
        ({"calibration": 64}, CallbackError, "calibration=64"),
        ({"dimensions": ("heads", "layers")}, mdc.errors.PolicyError, "layers"),
        ({"policy": mdc.Policy(), "budget": 0.3}, CallbackError, "budget=0.3 is not looked at: a given policy"),
        ({"policy": mdc.Policy(), "dimensions": ["tokens"]}, CallbackError, "dimensions=.*leave dimensions out"),
        ({"policy": mdc.Policy(), "space": mdc.Space(min_heads=7)}, CallbackError, "space=Space"),
        (
            {"policy": "uniform", "criterion": "random", "compensate": "none", "calibration": Calibration()},
            CallbackError,
            "criterion='random' looks at no images",
        ),
    ],
)
def test_wrong_settings_are_refused_at_once(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mdc.MultiDimPruneCallback(**options)


@pytest.mark.parametrize("streams", [False, True])
def test_a_missing_prediction_is_said_when_fit_begins(tmp_path: Path, streams: bool) -> None:
    class Objects(Stranger):
        steps = 0

        def forward(self, x: Tensor) -> Any:
            return {"classes": super().forward(x)}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.steps += 1
            return nn.functional.cross_entropy(self(batch[0])["classes"], batch[1])

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([Spots()[i] for i in range(32)])

    module, data = Objects(), DataLoader(Stream(), batch_size=16) if streams else loader()
    with pytest.raises(CalibrationError, match=r"the model's output \(dict\).*prediction="):
        trainer(tmp_path, uniform(0.5, criterion="hsic", start=2), epochs=4).fit(module, data)
    assert module.steps == 0


def test_an_unreachable_budget_is_said_before_training(tmp_path: Path) -> None:
    module = Stranger()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(BudgetError, match="smallest reachable cost"):
        trainer(tmp_path, uniform(0.01, start=1)).fit(module, loader())
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_sharding_strategies_are_refused(tmp_path: Path) -> None:
    fit = trainer(tmp_path)
    fit.strategy.__class__, kept = FSDPStrategy, fit.strategy.__class__
    try:
        with pytest.raises(CallbackError, match=r"FSDPStrategy shards parameters.*slim_model"):
            mdc.MultiDimPruneCallback().setup(fit, Stranger(), "fit")
    finally:
        fit.strategy.__class__ = kept


def test_asking_too_early_and_for_the_wrong_model(tmp_path: Path) -> None:
    callback = uniform(0.5)
    assert callback.plan is None
    with pytest.raises(CallbackError, match="no plan yet"):
        callback.slim_model(Stranger())
    fitted(tmp_path, callback, loader(), epochs=1)
    other = Stranger()
    other.encoder.blocks = other.encoder.blocks[:2]
    with pytest.raises(PlanError, match=r"another model.*callback\.reset\(\)"):
        trainer(tmp_path, callback).fit(other, loader())
    with pytest.raises(CallbackError, match="cannot be read"):
        mdc.plan_from_checkpoint(tmp_path / "nothing.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    with pytest.raises(CallbackError, match="no plan"):
        mdc.plan_from_checkpoint(tmp_path / "plain.ckpt")
