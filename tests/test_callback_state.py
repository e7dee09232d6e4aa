"""Whose plan is it? Checkpoints with and without one, of other moments and other models, and callbacks that meet."""

import copy
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor

import lightning_mdc as mdc
from lightning_mdc.errors import CallbackError
from lightning_mdc.gp_ei.study import read_study
from lightning_mdc.surgery import is_masked
from tests.strangers import Stranger, Twins, loader, network, trainer

QUICK: dict[str, Any] = {"limit_train_batches": 1, "limit_test_batches": 1}


def quick(policy: Any = None, **options: Any) -> mdc.MultiDimPruneCallback:
    """What is not about scores and the search does without them."""
    policy = mdc.Policy(neurons=0.5) if policy is None else policy
    return mdc.MultiDimPruneCallback(policy=policy, **({"criterion": "magnitude", "compensate": "none"} | options))


class Subclass(mdc.MultiDimPruneCallback):
    pass


class Seen(lightning.Callback):
    """How many neurons the last test saw."""

    neurons: int

    def on_test_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
        self.neurons = sum(block.mlp.fc1.weight.shape[0] for block in pl_module.encoder.blocks)


def every_epoch(root: Path, **options: Any) -> ModelCheckpoint:
    names = {"filename": "{epoch}", "save_top_k": -1, "enable_version_counter": False, "save_on_exception": True}
    return ModelCheckpoint(root, **(names | options))


def neurons_tested(root: Path, callback: lightning.Callback, ckpt_path: Path | None, module: Any = None) -> int:
    """Neurons that a Trainer tests: 512 of the dense model."""
    seen = Seen()
    trainer(root, callback, seen, **QUICK).test(module or Stranger(), loader(), ckpt_path=ckpt_path, verbose=False)
    return seen.neurons


class Fit(NamedTuple):
    folder: Path  # of checkpoints: epoch=0, before pruning; 1, half way; 2, at its end; and copies of it
    callback: mdc.MultiDimPruneCallback
    module: Stranger


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    folder, callback = tmp_path_factory.mktemp("fit"), quick(schedule="cubic", start=0, end=2)
    torch.manual_seed(5)
    module = Stranger()
    trainer(folder, callback, every_epoch(folder), epochs=3, **QUICK).fit(module, loader())
    last = torch.load(folder / "epoch=2.ckpt", weights_only=True)
    torch.save({name: value for name, value in last.items() if name != "callbacks"}, folder / "weights.ckpt")
    torch.save(last | {"callbacks": {"Other": {"a": 1}}}, folder / "others.ckpt")
    (state,) = [state for key, state in last["callbacks"].items() if key.startswith("MultiDim")]
    torch.save(last | {"callbacks": {"Subclass{'submodule': None}": state}}, folder / "subclass.ckpt")
    return Fit(folder, callback, module)


@pytest.fixture
def fit(made: Fit) -> Fit:
    return Fit(made.folder, copy.deepcopy(made.callback), copy.deepcopy(made.module))


@pytest.fixture
def said() -> Iterator[Callable[[], list[str]]]:
    """Our warnings so far."""
    ours = ("this callback", "no plan yet", "slim_model goes on", "asked for now", "in_place=True")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(each.message) for each in caught if any(words in str(each.message) for words in ours)]


# --- a checkpoint without a state of ours -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("weights", "test"),
        ("others", "predict"),
        pytest.param("weights", "validate", marks=pytest.mark.slow),
        pytest.param("others", "test", marks=pytest.mark.slow),
    ],
)
def test_looking_at_a_checkpoint_without_a_plan_says_that_the_model_is_dense(
    name: str, stage: str, fit: Fit, said: Callable[[], list[str]]
) -> None:
    run = getattr(
        trainer(fit.folder, callback := quick(), limit_val_batches=1, limit_predict_batches=1, **QUICK), stage
    )
    run(Stranger(), loader(), ckpt_path=fit.folder / f"{name}.ckpt")
    (words,) = said()
    assert f"{name}.ckpt' holds no state of this callback: it was written with save_weights_only=True" in words
    assert "the dense model is what is measured" in words
    assert callback.plan is None


def test_a_module_from_a_checkpoint_comes_without_its_plan(fit: Fit, said: Callable[[], list[str]]) -> None:
    module, callback = Stranger.load_from_checkpoint(fit.folder / "epoch=2.ckpt"), quick()
    for _ in range(2):
        assert neurons_tested(fit.folder, callback, None, module) == 512
    (words,) = said()  # once
    assert words.startswith("there is no plan yet; the dense model is what is measured")
    with pytest.raises(CallbackError, match=r"no plan yet.*mdc\.slim\(module, mdc\.plan_from_checkpoint\(path\)\)"):
        callback.slim_model(module)


@pytest.mark.parametrize("has_plan", [False, True])
def test_resuming_without_a_plan_says_which_one_is_used(
    has_plan: bool, fit: Fit, said: Callable[[], list[str]]
) -> None:
    callback = fit.callback if has_plan else quick()
    plan = callback.plan
    trainer(fit.folder, callback, epochs=4, **QUICK).fit(Stranger(), loader(), ckpt_path=fit.folder / "others.ckpt")
    (words,) = said()
    if has_plan:
        assert "the plan of the fit before is kept" in words
        assert "callback.reset()" in words
        assert callback.plan is plan
    else:
        assert "a new plan is made" in words
        assert callback.plan is not None


def test_weights_alone_are_tested_with_the_masks_of_the_fit_and_a_word(fit: Fit, said: Callable[[], list[str]]) -> None:
    assert neurons_tested(fit.folder, fit.callback, fit.folder / "weights.ckpt", fit.module) == 256
    (words,) = said()
    assert "the plan of the fit before is kept" in words


# --- a checkpoint of another moment, or by another name ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "neurons", "words"),
    [(0, 512, "from before anything was pruned"), (1, 288, "from 88% of the way"), (2, 256, None)],
)
def test_what_a_fit_has_found_outlives_a_look_at_its_checkpoints(
    epoch: int, neurons: int, words: str | None, fit: Fit, said: Callable[[], list[str]]
) -> None:
    kept, during = fit.callback.plan, []

    class Ask(lightning.Callback):
        def on_test_end(self, trainer: Any, pl_module: Any) -> None:
            during.append(mdc.macs(fit.callback.slim_model(pl_module)))

    seen, path = Seen(), fit.folder / f"epoch={epoch}.ckpt"
    trainer(fit.folder, fit.callback, seen, Ask(), **QUICK).test(fit.module, loader(), ckpt_path=path, verbose=False)
    assert seen.neurons == neurons  # as it was trained
    assert fit.callback.plan is kept
    assert fit.callback.scores is not None
    assert during == [mdc.macs(fit.callback.slim_model(fit.module))]
    assert len(said()) == (words is not None)
    assert all(words in each and "slim_model goes on giving the plan of the fit" in each for each in said() if words)


@pytest.mark.filterwarnings(
    "ignore:the checkpoint is from before:UserWarning", "ignore:the weights of this module:UserWarning"
)
def test_a_test_that_fails_wipes_nothing_either(fit: Fit) -> None:
    class Failing(lightning.Callback):
        def on_test_batch_start(self, *_: Any, **__: Any) -> None:
            raise ZeroDivisionError

    kept = fit.callback.plan
    for callbacks in ((fit.callback, Failing()), (fit.callback,)):
        run = trainer(fit.folder, *callbacks, **QUICK)
        try:
            run.test(fit.module, loader(), ckpt_path=fit.folder / "epoch=0.ckpt", verbose=False)
        except ZeroDivisionError:
            assert callbacks[1:]
        assert fit.callback.plan is kept
        assert neurons_tested(fit.folder, fit.callback, None, fit.module) == 256


def test_another_runs_checkpoint_is_tested_with_its_own_plan(
    tmp_path: Path, fit: Fit, said: Callable[[], list[str]]
) -> None:
    other = quick(mdc.Policy(neurons=0.25))
    trainer(tmp_path, other, epochs=1, **QUICK).fit(Stranger(), loader())
    kept = other.plan
    assert neurons_tested(tmp_path, other, fit.folder / "epoch=2.ckpt") == 256
    assert other.plan is kept
    (words,) = said()
    assert "the checkpoint has another plan" in words


def test_whoever_has_fitted_nothing_gives_what_was_looked_at_last(fit: Fit, said: Callable[[], list[str]]) -> None:
    callback, slims = quick(), []
    for epoch in (0, 2, 1):
        module = Stranger()
        neurons_tested(fit.folder, callback, fit.folder / f"epoch={epoch}.ckpt", module)
        slims.append(callback.plan)
    assert slims[0] == slims[1] == slims[2] == fit.callback.plan
    assert not said()


@pytest.mark.parametrize(
    ("name", "callback"),
    [
        ("subclass", quick),
        ("epoch=2", lambda: Subclass(policy=mdc.Policy(neurons=0.5))),
        ("epoch=2", lambda: quick(submodule="encoder")),
    ],
    ids=["of a subclass", "for a subclass", "by its path"],
)
def test_the_state_of_one_model_is_found_whoever_wrote_it(
    name: str, callback: Callable[[], Any], fit: Fit, said: Callable[[], list[str]]
) -> None:
    assert neurons_tested(fit.folder, callback(), fit.folder / f"{name}.ckpt") == 256
    assert not said()


@pytest.mark.filterwarnings("ignore:the checkpoint is from before:UserWarning")
def test_a_checkpoint_of_averaged_weights_leaves_the_plan_alone(tmp_path: Path) -> None:
    callback, averages, seen = quick(start=1), EMAWeightAveraging(decay=0.5), Seen()
    module, run = Stranger(), trainer(tmp_path, callback, averages, seen, every_epoch(tmp_path), **QUICK)
    run.fit(module, loader())
    kept = callback.plan
    assert kept is not None
    for name, neurons in (("epoch=0", 512), ("epoch=1", 256)):
        run.test(module, loader(), ckpt_path=tmp_path / f"{name}.ckpt", verbose=False)
        assert (seen.neurons, callback.plan) == (neurons, kept)


def test_a_running_mean_of_the_weights_is_refitted_with_them(tmp_path: Path) -> None:
    means = StochasticWeightAveraging(0.05, swa_epoch_start=1)
    found: list[dict[str, Tensor]] = []

    class Look(lightning.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                mean = means._average_model.state_dict()  # type: ignore[union-attr]
                found.append({name: value.clone() for name, value in mean.items()})

    callback = quick(start=2, compensate="lstsq", criterion="activation")
    trainer(tmp_path, means, Look(), callback, Look(), epochs=3, **QUICK).fit(Stranger(), loader())
    before, after = found
    changed = {name.split(".", 3)[-1] for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"mlp.fc2.weight", "mlp.fc2.bias"}


@pytest.mark.parametrize(
    "options",
    [{"policy": mdc.Policy(neurons=0.25)}, {"policy": "uniform", "dimensions": ("heads",)}],
    ids=["policy", "dimensions"],
)
def test_what_a_resumed_fit_asks_for_and_does_not_get_is_said(
    options: dict[str, Any], fit: Fit, said: Callable[[], list[str]]
) -> None:
    run = trainer(fit.folder, callback := quick(**options), epochs=4, **QUICK)
    run.fit(Stranger(), loader(), ckpt_path=fit.folder / "epoch=2.ckpt")
    assert callback.plan == fit.callback.plan
    (words,) = said()
    assert "is not looked at: the plan from the checkpoint or the fit before, made for a given policy" in words


# --- one callback, another model --------------------------------------------------------------------------------------


def again(fit: Fit, module: Any, callback: Any = None) -> None:
    trainer(fit.folder, callback or fit.callback, epochs=1, **QUICK).fit(module, loader())


def from_the_start(fit: Fit) -> Stranger:
    fit.module.load_state_dict(Stranger().state_dict())
    return fit.module


OTHERS: dict[str, Callable[[Fit], Any]] = {
    "the next fold's module": lambda fit: again(fit, Stranger()),
    "the same module, begun anew": lambda fit: again(fit, from_the_start(fit)),
    "a copied callback": lambda fit: again(fit, Stranger(), copy.deepcopy(fit.callback)),
    "looked at before it is trained": lambda fit: neurons_tested(fit.folder, fit.callback, None, Stranger()),
}


@pytest.mark.parametrize("how", OTHERS)
def test_a_plan_that_goes_with_other_weights_is_warned_about(how: str, fit: Fit, said: Callable[[], list[str]]) -> None:
    OTHERS[how](fit)
    (words,) = said()
    assert "the weights of this module are not those that the plan of this callback goes with" in words
    assert "call callback.reset() before" in words


def test_going_on_with_the_same_model_is_not(fit: Fit, said: Callable[[], list[str]]) -> None:
    again(fit, fit.module)
    neurons_tested(fit.folder, fit.callback, None, fit.module)
    neurons_tested(fit.folder, fit.callback, None, fit.module.double().float())
    trainer(fit.folder, fit.callback, precision="bf16-true", **QUICK).test(fit.module, loader(), verbose=False)
    neurons_tested(fit.folder, fit.callback, fit.folder / "epoch=2.ckpt", other := Stranger())
    again(fit, other)  # with the weights that were loaded by the Trainer, of the same plan
    fit.callback.reset()
    again(fit, Stranger())
    assert not said()


# --- two callbacks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "two",
    [
        lambda: (quick(), quick(mdc.Policy(heads=0.5))),
        lambda: (quick(), Subclass(0.8)),
        lambda: (quick(), quick(submodule="encoder")),
        lambda: (quick(),) * 2,
    ],
    ids=["alike", "of a subclass", "by its path", "twice the same"],
)
def test_two_callbacks_on_one_model_are_refused_in_our_words(two: Callable[[], Any], tmp_path: Path) -> None:
    module = Stranger()
    with pytest.raises(CallbackError, match=r"two callbacks prune one model.*give the Trainer one.*submodule="):
        trainer(tmp_path, *two(), **QUICK).fit(module, loader())
    assert not is_masked(module)


def test_two_callbacks_on_two_models_keep_their_plans_apart(tmp_path: Path) -> None:
    def both() -> tuple[mdc.MultiDimPruneCallback, ...]:
        return quick(submodule="encoder"), quick(mdc.Policy(heads=0.5), submodule="other")

    first = both()
    trainer(tmp_path, *first, every_epoch(tmp_path), epochs=1, **QUICK).fit(Twins(), loader())
    resumed = both()
    path = tmp_path / "epoch=0.ckpt"
    trainer(tmp_path, *resumed, epochs=2, **QUICK).fit(Twins(), loader(), ckpt_path=path)
    for before, after, name in zip(first, resumed, ("encoder", "other"), strict=True):
        assert before.plan == after.plan == mdc.plan_from_checkpoint(path, submodule=name)


# --- at the wrong moment ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, "on_test_end", "on_validation_end"])
def test_what_is_made_slim_where_no_gradients_are_can_be_trained(context: Any, fit: Fit) -> None:
    class Hook(lightning.Callback):
        pass

    if isinstance(context, str):
        setattr(Hook, context, lambda _, __, pl_module: fit.callback.slim_model(pl_module, in_place=True))
        run = trainer(fit.folder, fit.callback, Hook(), limit_val_batches=1, **QUICK)
        (run.test if "test" in context else run.validate)(fit.module, loader(), verbose=False)
    else:
        with context():
            fit.callback.slim_model(fit.module, in_place=True)
    before = [parameter.detach().clone() for parameter in fit.module.parameters()]
    again(fit, fit.module)
    assert sum(len(block.mlp.fc1.weight) for block in fit.module.encoder.blocks) == 256  # type: ignore[union-attr]
    changed = [not torch.equal(a, b) for a, b in zip(before, fit.module.parameters(), strict=True)]
    assert all(changed)


def test_what_is_loaded_or_compressed_in_inference_mode_can_be_trained(tmp_path: Path) -> None:
    images = [batch for batch, _ in loader()]
    with torch.inference_mode():
        with pytest.warns(UserWarning, match=r"criterion='fisher': Inference tensors cannot be saved for backward"):
            small = mdc.compress(network(), images, policy=mdc.Policy(neurons=0.5)).model
        mdc.save(small, tmp_path / "slim")
        loaded = mdc.load(tmp_path / "slim")
    for model in (small, loaded):
        model(images[0]).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_taking_its_place_while_it_is_trained_is_warned_about(fit: Fit, said: Callable[[], list[str]]) -> None:
    class Early(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            fit.callback.slim_model(pl_module, in_place=True)

    trainer(fit.folder, fit.callback, Early(), epochs=2, **QUICK).fit(fit.module, loader())
    assert "its optimizer holds the dense model's parameters" in said()[0]


def test_a_search_that_is_ended_by_hand_goes_on_later(tmp_path: Path) -> None:
    asked: list[float] = []

    def value(_: Any) -> float:
        asked.append(len(asked))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return -asked[-1]

    def searched() -> mdc.MultiDimPruneCallback:
        return mdc.MultiDimPruneCallback(0.6, n_trials=4, evaluate=value, compensate="none", criterion="magnitude")

    torch.manual_seed(5)
    module = Stranger()
    before, handler = copy.deepcopy(module.state_dict()), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):  # which Lightning makes of it
            trainer(tmp_path, searched(), **QUICK).fit(module, loader())
    finally:
        signal.signal(signal.SIGINT, handler)
    (journal,) = tmp_path.rglob("trials-*.jsonl")
    assert len(read_study(journal).finished) == 2
    assert not is_masked(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    trainer(tmp_path, searched(), epochs=1, **QUICK).fit(module, loader())
    assert len(asked) == 5  # two are known
