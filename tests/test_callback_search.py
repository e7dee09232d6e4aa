"""The whole method inside a fit: what is searched for, what makes up for what leaves, and what a kill costs."""

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_mdc as mdc
from lightning_mdc.errors import CallbackError, CompensationError, MdcError, UnsupportedModelError
from lightning_mdc.gp_ei.study import read_study
from lightning_mdc.importance import Scorer
from lightning_mdc.models import find_anatomy
from lightning_mdc.policy_search.held_out import InPlace
from lightning_mdc.surgery import is_masked
from tests.processes import program, two_ranks
from tests.strangers import SIDE, Spots, Stranger, UnevenBatches, loader, trainer

TRIALS = 4


def searched(budget: float = 0.5, **options: Any) -> mdc.MultiDimPruneCallback:
    return mdc.MultiDimPruneCallback(budget, **({"n_trials": TRIALS} | options))


class Moment(lightning.Callback):
    """The weights, and what the module says, when training begins: after the decision, before the first step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
            was_training = pl_module.training
            with torch.no_grad():
                self.output = pl_module.eval()(Spots().images)
            pl_module.train(was_training)


def fitted(root: Path, *callbacks: lightning.Callback, data: Any = None, **options: Any) -> Stranger:
    torch.manual_seed(5)
    module, ckpt_path = Stranger(), options.pop("ckpt_path", None)
    fit = trainer(root, *callbacks, **({"epochs": 1} | options))
    fit.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return module


# --- what it does -----------------------------------------------------------------------------------------------------


def test_the_five_lines_score_search_compensate_and_mask(tmp_path: Path) -> None:
    """All of it, held to the same done by hand with the functions."""
    callback, moment = searched(), Moment()
    fitted(tmp_path, callback, moment)
    assert callback.search is not None
    assert [trial.status for trial in callback.search.history] == ["done"] * TRIALS
    assert callback.policy is not None
    assert callback.policy.ratios == callback.search.policy.ratios
    assert callback.search.value == max(trial.value for trial in callback.search.history if trial.value is not None)
    dense, images = Stranger(), Spots().images
    dense.load_state_dict(fresh := _dense_weights())
    assert callback.plan is not None
    # 80 images: two thirds score and one third judges, drawn as the callback says, by its seed.
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    scoring, judging = order[:48], order[54:]
    scores = _scores(scoring)
    plan = mdc.make_plan(dense.encoder, scores, callback.search.policy)
    assert plan == callback.plan
    shown = [2 * images[part] - 1 for part in (*scoring.split(16), *judging.split(16))]
    by_hand = mdc.slim(dense.encoder, plan, "sequential", batches=shown).eval()
    with torch.no_grad():
        torch.testing.assert_close(by_hand(2 * images - 1), moment.output, rtol=1e-4, atol=1e-5)
        p = dense.eval()(images[judging]).softmax(-1)
        tried = mdc.slim(dense.encoder, plan, "lstsq", moments=scores.moments).eval()
        q = tried(2 * images[judging] - 1).log_softmax(-1)
    closeness = -(p * (p.log() - q)).sum(-1).mean().item()
    assert callback.search.value == pytest.approx(closeness, rel=0.1)  # so small that fp32 rounds it
    changed = {name for name, value in fresh.items() if not torch.equal(value, moment.weights[name])}
    assert changed  # only what reads units
    assert all("attn.proj" in name or "mlp.fc2" in name for name in changed)


def _dense_weights() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return Stranger().state_dict()


def _scores(chosen: Tensor) -> mdc.Scores:
    dense = Stranger()
    dense.load_state_dict(_dense_weights())
    batches = [2 * Spots().images[part] - 1 for part in chosen.split(16)]
    return mdc.score(dense.encoder, batches, "fisher", progress=False)


def test_a_module_of_any_output_is_judged_without_labels(tmp_path: Path) -> None:
    """A feature backbone under a decoder; batches are images alone."""

    class Reconstructs(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.backbone = VisionTransformer(
                img_size=SIDE, patch_size=4, in_chans=1, num_classes=0, embed_dim=32, depth=3, num_heads=4
            )
            self.decoder = nn.Linear(32, 16)

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            features = self.backbone.forward_features(images)
            return {"patches": self.decoder(features[:, 1:]), "features": features}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch)["patches"].square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data: DataLoader[Any] = DataLoader(Spots().images, batch_size=16)  # type: ignore[arg-type]
    callback = searched(0.6)
    module = Reconstructs()
    trainer(tmp_path, callback, epochs=1).fit(module, data)
    assert callback.search is not None
    assert all(trial.value is not None and trial.value < 0 for trial in callback.search.history)
    assert callback.plan is not None
    assert callback.plan.tokens == () or all(stage.keep == 1 for stage in callback.plan.tokens)  # the decoder needs all
    assert mdc.macs(callback.slim_model(module)) <= 0.6 * mdc.macs(module.backbone)


def test_the_users_own_number_decides(tmp_path: Path) -> None:
    asked: list[nn.Module] = []

    def fewest_heads(pl_module: lightning.LightningModule) -> float:
        assert not pl_module.training
        asked.append(pl_module)
        anatomy = find_anatomy(pl_module.encoder)  # type: ignore[arg-type]
        return -float(sum(units.count for units in anatomy.units("heads") if units is not None))

    callback = searched(evaluate=fewest_heads, n_trials=6)
    module = fitted(tmp_path, callback)
    assert asked == [module] * 6
    assert callback.search is not None
    heads = [sum(round(4 * ratio) for ratio in trial.policy.heads) for trial in callback.search.history]
    assert [trial.value for trial in callback.search.history] == [-count for count in heads]
    assert callback.scores is not None
    assert callback.scores.images == 80  # nobody else has to judge on any


def test_a_budget_for_everything_changes_no_bit(tmp_path: Path) -> None:
    callback = mdc.MultiDimPruneCallback(1.0)
    with_it = fitted(tmp_path / "a", callback, epochs=2, data=loader(shuffle=True)).state_dict()
    without = fitted(tmp_path / "b", epochs=2, data=loader(shuffle=True)).state_dict()
    assert all(torch.equal(value, without[name]) for name, value in with_it.items())
    assert callback.search is None
    assert callback.plan is not None
    assert not (tmp_path / "a" / "mdc").exists()


@pytest.mark.parametrize("options", [{"policy": "uniform"}, {"n_trials": 2}], ids=["uniform", "searched"])
def test_nothing_drawn_for_the_search_shows_in_training(options: dict[str, Any], tmp_path: Path) -> None:
    """The order of the training images, and dropout, are those of a fit without the callback."""
    orders: list[list[float]] = []

    class Order(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            orders[-1].append(batch[0].sum().item() + torch.rand((), generator=None).item())

    for callbacks in ([], [mdc.MultiDimPruneCallback(0.5, **options)]):
        orders.append([])
        fitted(tmp_path, *callbacks, Order(), data=loader(shuffle=True))
    assert orders[0] == orders[1]


def test_streams_are_kept_while_they_go_by_and_serve_both(tmp_path: Path) -> None:
    stream: DataLoader[Any] = DataLoader(UnevenBatches(), batch_size=None)  # six batches of 8
    callback = searched(calibration=mdc.Calibration(images=16, judging=16))
    fitted(tmp_path, callback, data=stream)
    assert callback.scores is not None
    assert callback.scores.images == 16
    assert callback.search is not None
    short = searched(calibration=mdc.Calibration(images=400, judging=200))
    fitted(tmp_path, short, data=stream, epochs=2)  # 48 images an epoch, no more
    assert short.scores is not None
    assert short.scores.images == 32
    assert short.plan is not None


# --- compensation -----------------------------------------------------------------------------------------------------


def test_undoing_gives_dense_values_back_until_the_first_step(tmp_path: Path) -> None:
    callback, undone = searched(), {}

    class Undo(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                before = pl_module.state_dict()
                assert any(not torch.equal(before[name], value) for name, value in _dense_weights().items())
                with pytest.raises(CallbackError, match="another module"):
                    callback.undo_compensation(Stranger())
                callback.undo_compensation(pl_module)
                undone.update({name: value.clone() for name, value in pl_module.state_dict().items()})
                assert is_masked(pl_module)

    module = fitted(tmp_path, callback, Undo())
    assert all(torch.equal(undone[name], value) for name, value in _dense_weights().items())
    other = searched()
    module = fitted(tmp_path, other)
    with pytest.raises(CallbackError, match="an optimizer step has been taken"):
        other.undo_compensation(module)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    other.reset()
    assert all(torch.equal(weights[name], value) for name, value in module.state_dict().items())


def test_the_average_of_the_weights_is_refitted_at_the_same_moment(tmp_path: Path) -> None:
    averages, moment = EMAWeightAveraging(decay=0.9), Moment()
    found: dict[str, Tensor] = {}

    class Look(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                found.update({n: v.clone() for n, v in averages._average_model.module.state_dict().items()})

    fitted(tmp_path, averages, searched(), Look(), moment)
    dense = _dense_weights()
    assert any(not torch.equal(found[name], value) for name, value in dense.items())
    assert all(torch.equal(found[name], value) for name, value in moment.weights.items())


def test_with_the_cubic_schedule_weights_are_left_alone(tmp_path: Path) -> None:
    moment = Moment()
    fitted(tmp_path, searched(schedule="cubic", end=2), moment, epochs=3)
    assert all(torch.equal(moment.weights[name], value) for name, value in _dense_weights().items())
    with pytest.raises(CallbackError, match="weights are refitted once"):
        searched(schedule="cubic", compensate="sequential")


def test_a_norm_over_units_is_no_reason_to_refuse_unless_compensation_was_asked_for(tmp_path: Path) -> None:
    class Normed(Stranger):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = VisionTransformer(
                img_size=SIDE, patch_size=4, in_chans=1, num_classes=5, embed_dim=32, depth=2, num_heads=4,
                scale_mlp_norm=True,
            )  # fmt: skip

    callback = searched(0.7)
    trainer(tmp_path, callback, epochs=1).fit(Normed(), loader())
    assert callback.plan is not None
    with pytest.raises((UnsupportedModelError, CompensationError), match="norm"):
        trainer(tmp_path, searched(0.7, compensate="lstsq"), epochs=1).fit(Normed(), loader())


# --- it survives ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_after_the_decision_goes_on_without_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checkpoints() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)

    whole = searched(restore_rng=True)
    expected = fitted(tmp_path, whole, checkpoints(), data=loader(shuffle=True), epochs=2).state_dict()
    monkeypatch.setattr(Scorer, "update", None)
    monkeypatch.setattr(InPlace, "judge", None)
    resumed = searched(restore_rng=True)
    module = fitted(
        tmp_path, resumed, data=loader(shuffle=True), epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt"
    )  # fmt: skip
    assert resumed.plan == whole.plan
    assert resumed.search is not None
    assert whole.search is not None
    assert resumed.search.history == whole.search.history
    assert all(torch.equal(expected[name], value) for name, value in module.state_dict().items())


def run(folder: str, trials_before: str, how: str) -> None:
    """A fit whose search ends after so many trials: as by a power cut, or as a cluster ends it."""
    judged = itertools.count()  # first, what the dense model is worth
    once = InPlace.judge

    def counting(self: InPlace, model: nn.Module) -> Any:
        if next(judged) > int(trials_before):
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGTERM)
        return once(self, model)

    InPlace.judge = counting  # type: ignore[method-assign]
    callback = searched(n_trials=6)
    fitted(Path(folder), callback)
    assert callback.plan is not None
    (Path(folder) / "plan.json").write_text(callback.plan.to_json())


@pytest.mark.parametrize("how", ["killed", pytest.param("told", marks=pytest.mark.slow)])
def test_a_search_that_is_stopped_goes_on_when_the_fit_is_started_again(how: str, tmp_path: Path) -> None:
    def fit(folder: Path, trials: int) -> int | None:
        folder.mkdir(exist_ok=True)
        with (folder / "output.txt").open("w") as output:
            process = program(run, str(folder), str(trials), how, output=output.fileno(), folder=folder)
            process.join(120)
        return process.exitcode

    assert fit(tmp_path / "whole", 99) == 0
    code = fit(tmp_path / "cut", 3)
    assert code == (-signal.SIGKILL if how == "killed" else 0)  # Lightning calls it a good end to be told to stop
    assert not (tmp_path / "cut" / "plan.json").exists()
    (journal,) = (tmp_path / "cut").rglob("trials-*.jsonl")
    safe = journal.read_text()
    done = len(read_study(journal).finished)
    assert done == (3 if how == "killed" else 4)  # told to stop in the fourth, it is brought to its end
    assert fit(tmp_path / "cut", 99) == 0
    assert journal.read_text().startswith(safe)  # what was tried is not tried again
    assert len(read_study(journal).finished) == 6
    assert (tmp_path / "cut" / "plan.json").read_text() == (tmp_path / "whole" / "plan.json").read_text()
    assert not list(tmp_path.rglob("moments.safetensors"))


def test_another_model_other_options_or_other_images_are_another_search(tmp_path: Path) -> None:
    def folders() -> set[str]:
        return {path.name for path in (tmp_path / "mdc").iterdir()}

    fitted(tmp_path, searched())
    first = folders()
    fitted(tmp_path, searched())
    assert folders() == first
    for options in (
        {"budget": 0.6},
        {"criterion": "magnitude"},
        {"calibration": mdc.Calibration(images=32, judging=16)},
    ):
        before = folders()
        fitted(tmp_path, searched(**options))
        assert len(folders() - before) == 1
    before = folders()
    other = Stranger()
    with torch.no_grad():
        other.encoder.head.bias[0] += 1  # type: ignore[index,union-attr]
    trainer(tmp_path, searched(), epochs=1).fit(other, loader())
    assert len(folders() - before) == 1
    before = folders()
    brighter = [(images + 0.01, labels) for images, labels in loader()]
    data: DataLoader[Any] = DataLoader(brighter, batch_size=None)  # type: ignore[arg-type]
    fitted(tmp_path, searched(), data=data)
    assert len(folders() - before) == 1


def ranks(rank: int, root: Path, data: str) -> None:
    seen: list[int] = []

    class Watching(mdc.MultiDimPruneCallback):
        def calibration_step(self, pl_module: Any, batch: Any) -> Any:
            seen.append(len(batch[0]))
            return super().calibration_step(pl_module, batch)

    torch.manual_seed(5)
    callback = Watching(0.5, n_trials=2, calibration=mdc.Calibration(images=32, judging=32))
    stream: DataLoader[Any] = DataLoader(UnevenBatches(), batch_size=None)
    fit = trainer(root, callback, epochs=1, strategy="ddp", devices=2)
    module = Stranger()
    fit.fit(module, loader(shuffle=True) if data == "map" else stream)
    assert callback.plan is not None
    assert callback.search is not None
    weights = [value.double().sum().item() for value in module.state_dict().values()]
    facts = {"plan": callback.plan.to_json(), "value": callback.search.value, "seen": seen, "weights": weights}
    (root / f"{rank}.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("data", ["map", pytest.param("stream", marks=pytest.mark.slow)])
def test_two_ranks_share_the_work_and_end_with_one_plan(data: str, tmp_path: Path) -> None:
    two_ranks(ranks, tmp_path, data)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for name in ("plan", "value", "weights"):
        assert first[name] == second[name]
    if data == "map":
        # One to score on, there and back; one to judge on: is it logits, the dense model, two trials; both to refit on,
        # dense and slim. Rank 0 also sees of what size images are.
        assert second["seen"] == [16] * 10
        assert first["seen"] == [16, *second["seen"]]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "uniform", "n_trials": 5}, "n_trials=5 is not looked at: no policy is searched for"),
        ({"policy": "uniform", "evaluate": len}, "evaluate=.* is not looked at"),
        ({"policy": mdc.Policy(heads=0.5), "n_trials": 5}, "n_trials=5 is not looked at"),
        ({"policy": mdc.Policy(heads=0.5), "budget": 0.5}, "budget=0.5 is not looked at: a given policy"),
        ({"n_trials": 0}, "n_trials=0: expected a whole number of at least 1, or None for 40"),
        ({"evaluate": 3}, "evaluate=3: expected a function"),
        ({"compensate": "mean"}, "compensate='mean'"),
        ({"prediction": 3}, "prediction=3"),
        ({"policy": "best"}, "policy='best': expected"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MdcError, match=message):
        mdc.MultiDimPruneCallback(**options)
