"""The search in one process: what a trial is, going on after anything, judging on held-out images, two processes."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

import lightning_mdc as mdc
from lightning_mdc.errors import (
    BudgetError,
    CalibrationError,
    CompensationError,
    PlanError,
    PolicyError,
    SearchError,
)
from lightning_mdc.gp_ei.study import read_study
from lightning_mdc.models import find_anatomy
from lightning_mdc.policy import Space, TokenOptions
from lightning_mdc.policy_search.held_out import HeldOut
from lightning_mdc.surgery import plan_of
from tests import search_program
from tests.kinds import CLASSES, images, make
from tests.processes import two_ranks
from tests.search_program import TRIALS, history, pictures
from tests.test_distributed import WORDS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make()


@pytest.fixture(scope="module")
def scores(model) -> mdc.Scores:
    return mdc.score(model, [images(16)], "magnitude")


def worth(slim: nn.Module) -> float:
    """Something that depends on what is kept, quick."""
    plan = plan_of(slim)
    kept = [len(k) * (i + 1) for i, k in enumerate(plan.heads)] + [len(k) / (i + 9) for i, k in enumerate(plan.neurons)]
    return float(np.sqrt(kept).sum())


RUN = [field.name for field in fields(mdc.SearchOptions)]
SPACE = [field.name for field in fields(Space)]


def quick(model, scores, evaluate=worth, **options):
    """A short search; options of the space and of how it is run by their names."""
    options = {"n_trials": 5, "initial_points": 3, "progress": False} | options
    values = {"options": (mdc.SearchOptions, RUN), "space": (Space, SPACE)}
    for argument, (kind, names) in values.items():
        options[argument] = kind(**{name: options.pop(name) for name in names if name in options})
    return mdc.search(model, scores, evaluate, **options)


# --- trials -----------------------------------------------------------------------------------------------------------


def test_the_promised_signature_and_result(model, scores):
    result = mdc.search(model, scores, worth, budget=0.6, n_trials=4, seed=0)
    assert [trial.number for trial in result.history] == [0, 1, 2, 3]
    assert result.value == max(trial.value for trial in result.history)
    assert result.policy == result.best.policy
    assert all(trial.status == "done" and trial.seconds > 0 for trial in result.history)
    assert result.history[0].policy == mdc.uniform_policy(model, 0.6)


def test_every_trial_is_a_slim_model_on_the_budget(model, scores):
    seen = []

    def evaluate(slim):
        assert not any(module.training for module in slim.modules())
        assert not torch.is_grad_enabled()
        seen.append((mdc.macs(slim), plan_of(slim)))
        return worth(slim)

    model.train()
    result = quick(model, scores, evaluate, budget=0.55)
    assert model.training
    model.eval()
    for trial, (macs, plan) in zip(result.history, seen, strict=True):
        assert trial.macs == macs == mdc.policy_macs(model, trial.policy) <= 0.55 * mdc.macs(model)
        assert trial.cost == pytest.approx(macs / (0.55 * mdc.macs(model)))
        assert plan == mdc.make_plan(model, scores, trial.policy)
    assert len({json.dumps(plan.to_json()) for _, plan in seen}) == len(seen)


def test_tokens_that_are_dropped_are_priced_as_dropped(model, scores):
    """As many of them go on as the plan says; with none in their place a trial may be dearer by a token or two."""
    seen, tokens = [], TokenOptions("dependence", "drop")
    result = quick(model, scores, lambda slim: seen.append(mdc.macs(slim)) or worth(slim), budget=0.5, tokens=tokens)
    for trial, macs in zip(result.history, seen, strict=True):
        assert trial.macs == macs == mdc.policy_macs(model, trial.policy, tokens) <= 0.5 * mdc.macs(model)
        assert trial.cost == pytest.approx(macs / (0.5 * mdc.macs(model)))
    assert max(result.history[0].policy.tokens) < 1


def test_images_of_another_size_are_priced_as_they_are():
    model = make("any_size")
    scores, seen = mdc.score(model, criterion="random"), []
    both = torch.nn.ModuleDict({"eye": model, "ear": make()})
    result = quick(both, scores, lambda slim: seen.append(slim) or worth(slim), input_size=64, submodule="eye")
    for trial, slim in zip(result.history, seen, strict=True):
        assert trial.macs == mdc.macs(slim, 64) == mdc.plan_macs(model, plan_of(slim), 64) <= 0.6 * mdc.macs(model, 64)
    assert len({trial.policy.tokens for trial in result.history}) > 1


def test_it_leaves_model_random_states_and_disk_alone(model, scores, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    quick(model, scores, lambda slim: worth(slim) + torch.rand(1).item())
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not list(tmp_path.iterdir())


def test_options_reach_the_trials(model, scores):
    options = {"dimensions": ["neurons"], "round_to": 16, "groups": 2, "budget": 0.8}
    for trial in quick(model, scores, **options).history:
        kept = [round(r * 192) for r in trial.policy.neurons]
        assert all(k % 16 == 0 for k in kept)
        assert kept[0] == kept[1]
        assert kept[2] == kept[3]
        assert set(trial.policy.heads) == {1.0} == set(trial.policy.tokens)


def test_it_begins_with_the_uniform_policies_of_all_and_of_fewer_dimensions(model, scores):
    """So that what is found is never worse than what any one dimension gives."""
    result = quick(model, scores, budget=0.8, n_trials=8, initial_points=7)
    begun = [trial.policy for trial in result.history]
    some = [("heads", "neurons", "tokens"), ("heads", "neurons"), ("heads", "tokens"), ("neurons", "tokens")]
    wanted = [mdc.uniform_policy(model, 0.8, names) for names in (*some, ("heads",), ("neurons",), ("tokens",))]
    assert [policy.neurons for policy in begun[:7]] == [policy.neurons for policy in wanted]
    assert [policy.heads for policy in begun[:7]] == [policy.heads for policy in wanted]
    assert begun[5].tokens == (1.0, 1.0, 1.0)
    assert begun[6].tokens[0] == wanted[6].tokens[0]  # the stages share a ratio, and later ones have fewer to drop
    far = quick(model, scores, budget=0.3, n_trials=1)  # out of reach of neurons alone: passed over
    assert len(far.space.uniform_of_fewer) < 6


def test_it_finds_better_than_it_started_with(model, scores):
    options = {"dimensions": ("heads", "neurons"), "budget": 0.7}  # `worth` does not see tokens
    result = quick(model, scores, n_trials=25, initial_points=8, **options)
    initial = [trial.value for trial in result.history[:8]]
    assert result.value > max(initial)


def test_a_small_space_is_tried_out_and_then_it_ends(model, scores, caplog):
    caplog.set_level("INFO")
    bounds = {"heads": [(1, 1), (1, 1), (1, 1), (0.25, 1)]}
    result = quick(model, scores, dimensions=["heads"], bounds=bounds, budget=0.97, n_trials=50)
    assert 1 <= len(result.history) <= 4
    assert "have been tried" in caplog.text


# --- when things go wrong ---------------------------------------------------------------------------------------------


def fails_at(numbers, how, evaluate=worth):
    calls = iter(range(1000))

    def failing(slim):
        return how() if next(calls) in numbers else evaluate(slim)

    return failing


def raises():
    raise RuntimeError("out of memory")


def test_nan_and_errors_are_failed_trials_and_the_search_goes_on(model, scores):
    for how, note in ((lambda: math.nan, "nan"), (raises, "RuntimeError: out of memory")):
        result = quick(model, scores, fails_at({1, 3}, how), n_trials=7)
        assert [trial.status for trial in result.history] == ["done", "failed", "done", "failed", *["done"] * 3]
        assert note in result.history[1].note
        assert result.history[1].value is None
        assert result.best.status == "done"


def test_a_mistake_in_evaluate_is_shown_as_it_is(model, scores, tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"):
        quick(model, scores, fails_at({0}, raises), journal=tmp_path / "trials.jsonl")
    assert [t.status for t in quick(model, scores, journal=tmp_path / "trials.jsonl").history] == ["done"] * 5


def test_no_number_is_refused_and_nothing_is_lost(model, scores, tmp_path):
    state = tmp_path / "trials.jsonl"
    for answer in ("0.9", None, True, torch.zeros(2), [0.5]):
        failing = fails_at({0 if state.exists() else 2}, lambda answer=answer: answer)
        with pytest.raises(SearchError, match="for trial 2; it has to return a number"):
            quick(model, scores, failing, journal=state)
    assert history(quick(model, scores, journal=state)) == history(quick(model, scores))


def test_numbers_of_other_libraries_are_numbers(model, scores):
    for kind in (torch.tensor, np.float32, lambda value: torch.tensor([value])):
        assert quick(model, scores, lambda slim, kind=kind: kind(worth(slim)), n_trials=1).history[0].status == "done"


def test_if_no_trial_works_it_says_so(model, scores):
    with pytest.raises(SearchError, match=r"none of the 5 trials gave a value \(its value is nan\)"):
        quick(model, scores, lambda slim: math.nan)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"n_trials": 0}, SearchError, "n_trials=0"),
        ({"evaluate": 0.9}, SearchError, "evaluate=0.9"),
        ({"seed": -1}, SearchError, "seed=-1"),
        ({"xi": math.nan}, SearchError, "xi=nan"),
        ({"budget": 0.01}, BudgetError, "smallest reachable"),
        ({"budget": 0.3, "bounds": {"neurons": (0.9, 1)}}, BudgetError, "inside the bounds"),
        ({"bounds": {"neurons": (0.9, 0.1)}}, SearchError, "the smaller first"),
        ({"bounds": {"wings": (0, 1)}}, SearchError, "wings"),
        ({"groups": 9}, SearchError, "4 blocks"),
        ({"token_ratio": "all"}, PolicyError, "token_ratio='all'"),
        ({"dimensions": ["wings"]}, PolicyError, "wings"),
        ({"warm_start": "nowhere"}, SearchError, "nowhere"),
        ({"tokens": TokenOptions("dependence"), "scores": None}, SearchError, "scores=None"),
        (
            {"tokens": TokenOptions(reduction="shrink")},
            PlanError,
            "reduction='shrink' is unknown; known are drop, fuse",
        ),
        ({"compensate": "hope"}, CompensationError, "compensate='hope'"),
    ],
)
def test_wrong_arguments(options, kind, words, model, scores):
    options = {"evaluate": worth, "scores": scores} | options
    with pytest.raises(kind, match=words):
        quick(model, **options)


def test_scores_of_another_model_are_refused(model, scores):
    with pytest.raises(CalibrationError, match="does not fit"):
        quick(make("vit"), mdc.Scores(heads=[], neurons=[], tokens=[]))


# --- going on ---------------------------------------------------------------------------------------------------------


def noisy(slim):
    return worth(slim) + 0.1 * torch.rand(1).item()


@pytest.fixture(scope="module")
def uninterrupted(model, scores) -> list[object]:
    return history(quick(model, scores, noisy, n_trials=8))


@pytest.mark.parametrize("stopped_at", [0, 1, 4, 7])
def test_interrupted_and_resumed_is_as_if_it_had_not_been(stopped_at, uninterrupted, model, scores, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    options = {"n_trials": 8, "journal": tmp_path / "trials.jsonl"}
    with pytest.raises(KeyboardInterrupt):
        quick(model, scores, fails_at({stopped_at}, interrupt, noisy), **options)
    asked = []
    resumed = quick(model, scores, lambda slim: asked.append(slim) or noisy(slim), **options)
    assert len(asked) == 8 - stopped_at
    assert history(resumed) == uninterrupted


def test_a_finished_search_goes_on_with_more_trials(model, scores, tmp_path):
    state = tmp_path / "trials.jsonl"
    quick(model, scores, n_trials=4, journal=state)
    assert history(quick(model, scores, n_trials=8, journal=state)) == history(quick(model, scores, n_trials=8))
    again = quick(model, scores, lambda slim: pytest.fail("tried again"), n_trials=8, journal=state)
    assert len(again.history) == 8


def test_a_search_of_another_budget_is_not_gone_on_with_but_can_be_learnt_from(model, scores, tmp_path):
    state = tmp_path / "trials.jsonl"
    earlier = quick(model, scores, n_trials=10, journal=state)
    with pytest.raises(SearchError, match=r"another search: about.budget.macs was 0.6, now 0.5"):
        quick(model, scores, budget=0.5, journal=state)
    warm = quick(model, scores, budget=0.5, n_trials=8, warm_start=state)
    assert all(trial.macs <= 0.5 * mdc.macs(model) for trial in warm.history)
    assert len(warm.history) == 8
    assert len(warm.search.prior) == len(earlier.history)
    assert history(warm) != history(quick(model, scores, budget=0.5, n_trials=8))


def killed_again_and_again(folder: Path, kills: int, seed: int) -> None:
    """The search, killed at `kills` random moments, then left to finish."""
    moments = random.Random(seed)
    command = [sys.executable, "-m", "tests.search_program", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    state = folder / "trials.jsonl"
    for _ in range(kills):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
        lines = state.read_bytes().count(b"\n") if state.exists() else 0
        wanted = lines + moments.randrange(1, 8)
        while process.poll() is None and (not state.exists() or state.read_bytes().count(b"\n") < wanted):
            time.sleep(0.005)
        time.sleep(0.06 * moments.random())
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(kills, tmp_path):
    killed_again_and_again(tmp_path, kills, seed=kills)
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    asked, told = ([line[key] for line in lines if key in line] for key in ("asked", "told"))
    assert asked == told == list(range(TRIALS))  # none lost, none doubled, in order
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        uninterrupted = history(search_program.run(None))
        resumed = history(search_program.run(tmp_path / "trials.jsonl"))
    finally:
        torch.set_num_threads(threads)
    assert resumed == uninterrupted


# --- two processes ----------------------------------------------------------------------------------------------------


def test_two_processes_share_the_work_and_agree(tmp_path):
    two_ranks(search_program.of_two, tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert len(first) == 8
    alone = history(search_program.run(None, trials=8))
    # The mean over two shares is rounded otherwise than that over all images: the last digits may differ.
    assert [trial[0] for trial in alone] == [trial[0] for trial in first]
    assert alone[:4] == [pytest.approx(trial) if isinstance(trial, float) else trial for trial in alone[:4]]
    for mine, theirs in zip(alone[:4], first[:4], strict=True):  # the random ones: not yet chosen by values
        assert mine[1] == theirs[1]
        assert mine[2] == pytest.approx(theirs[2], rel=1e-5)


def test_what_fails_on_one_rank_fails_on_both_with_its_words(tmp_path):
    later = [("forward", 2, "OutOfMemoryError"), ("evaluate", 2, "TwoWordsError"), ("slim", 2, "UnpicklableError")]
    scenarios = [*later, ("forward", 0, "TwoWordsError")]
    two_ranks(search_program.of_two, tmp_path, scenarios)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    # After a trial that worked, it is a failed trial.
    for one, other, note in zip(first[:3], second[:3], map(": ".join, WORDS.items()), strict=True):
        assert one == other == ["fine", [["done", ""], ["done", ""], ["failed", note], ["done", ""]]]
    # Before, a mistake for its author to see.
    assert second[3] == ["TwoWordsError", "gone wrong"]
    assert first[3][:2] == ["RankError", "rank 1 failed: TwoWordsError: gone wrong"]


# --- held-out images --------------------------------------------------------------------------------------------------


def test_metrics_are_what_they_say(model):
    x, y = pictures(50)
    small = mdc.slim(model, mdc.make_plan(model, mdc.score(model, [x[:16]], "magnitude"), mdc.Policy(neurons=0.3)))
    with torch.no_grad():
        logits, dense = small(x), model(x)
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    right = (logits.argmax(1) == y).sum().item()
    judge = HeldOut(batches, "accuracy", batch_size=7)
    assert judge.judge(small).facts["accuracy"] == right / 50
    assert 0 < judge(small) - right / 50 < 1 / 50  # what breaks ties is less than one image
    assert HeldOut(batches, "loss", batch_size=7)(small) == pytest.approx(-F.cross_entropy(logits, y).item(), rel=1e-5)
    p, q = dense.softmax(1).double(), logits.softmax(1).double()
    expected = -(p * (p.log() - q.log())).sum(1).mean().item()
    assert HeldOut(batches, "kl", dense=model)(small) == pytest.approx(expected, rel=1e-4)
    assert HeldOut([x], "kl", dense=model)(model) == pytest.approx(0, abs=1e-6)  # without labels
    metric = MulticlassAccuracy(CLASSES, average="micro")
    assert HeldOut(batches, metric)(small) == pytest.approx(right / 50)
    error = HeldOut(batches, MulticlassCalibrationError(CLASSES))(small)
    assert error == pytest.approx(-MulticlassCalibrationError(CLASSES)(logits.softmax(1), y).item(), rel=1e-4)


@pytest.mark.parametrize("metric", ["accuracy", "loss", "kl", MulticlassAccuracy(CLASSES, average="micro")])
def test_one_pass_tells_top1_and_kl_whatever_the_metric(model, metric):
    x, y = pictures(50)
    small = mdc.slim(model, mdc.make_plan(model, mdc.score(model, [x[:16]], "magnitude"), mdc.Policy(neurons=0.3)))
    with torch.no_grad():
        log_q, p = small(x).double().log_softmax(1), model(x).double().softmax(1)
    judge = HeldOut([(x, y)], metric, dense=model, batch_size=7)
    calls = []
    small.register_forward_hook(lambda *_: calls.append(1))
    facts = judge.judge(small).facts
    assert len(calls) == 8  # 50 images, 7 at a time, once
    assert facts["accuracy"] == (log_q.argmax(1) == y).double().mean().item()
    assert facts["kl"] == pytest.approx((p * (p.log() - log_q)).sum(1).mean().item(), rel=1e-4)
    assert list(HeldOut([x], "kl", dense=model).judge(small).facts) == ["kl"]  # no labels, no top-1


def test_the_top1_of_every_trial_is_kept_with_the_metrics_name(model, scores, tmp_path):
    x, y = pictures(50)
    state = tmp_path / "trials.jsonl"
    judge = HeldOut([(x, y)], "kl", dense=model)
    result = quick(model, scores, judge, n_trials=4, journal=state)
    for trial in result.history:
        with torch.no_grad():
            logits = mdc.slim(model, mdc.make_plan(model, scores, trial.policy))(x)
        assert trial.accuracy == (logits.argmax(1) == y).double().mean().item()
    study = read_study(state)
    with torch.no_grad():
        right = (model(x).argmax(1) == y).double().mean().item()
    assert study.metadata == {"metric": "kl", "dense": {"value": 0.0, "accuracy": right, "kl": 0.0}}
    assert [trial.facts["accuracy"] for trial in study.trials] == [trial.accuracy for trial in result.history]
    again = quick(model, scores, judge, n_trials=5, journal=state).history
    assert [trial.accuracy for trial in again[:4]] == [trial.accuracy for trial in result.history]
    assert state.read_text().count('"metadata"') == 1
    assert quick(model, scores, judge.__call__, n_trials=1).history[0].accuracy is None  # any function


def test_trials_of_another_metric_are_not_gone_on_with(model, scores, tmp_path):
    journal, batches = tmp_path / "trials.jsonl", [pictures(20)]
    quick(model, scores, HeldOut(batches, "accuracy"), n_trials=2, journal=journal)
    by_kl = HeldOut(batches, "kl", dense=model)
    with pytest.raises(SearchError, match="judged by metric='accuracy', these are by 'kl'"):
        quick(model, scores, by_kl, n_trials=3, journal=journal)
    with pytest.raises(SearchError, match=r"warm_start=.* was judged by metric='accuracy', this search is by 'kl'"):
        quick(model, scores, by_kl, n_trials=3, warm_start=journal)
    assert len(quick(model, scores, HeldOut(batches, "accuracy"), n_trials=3, journal=journal).history) == 3


def test_a_judge_of_ones_own_is_asked_itself(model, scores):
    class Stern(HeldOut):
        def __call__(self, model: nn.Module) -> float:
            return -7.0

    assert quick(model, scores, Stern([pictures(20)]), n_trials=1).value == -7.0


def test_ties_in_accuracy_go_to_the_more_certain():
    class Certain(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def forward(self, x):
            return self.by * F.one_hot(torch.zeros(len(x), dtype=torch.long), 3).float()

    judge = HeldOut([(torch.zeros(10, 1), torch.tensor([0] * 6 + [1] * 4))])
    assert judge(Certain(2.0)) > judge(Certain(0.5)) + 1e-4
    assert [judge.judge(Certain(by)).facts["accuracy"] for by in (2.0, 0.5)] == [0.6, 0.6]


def test_a_dense_model_with_masks_on_is_none():
    model = make()
    plan = mdc.make_plan(model, mdc.score(model, criterion="random"), mdc.Policy(0.5))
    with mdc.masked(model, plan), pytest.raises(SearchError, match=r"has masks on.*remove_masks"):
        HeldOut([pictures(12)], dense=model)


def test_it_leaves_the_mode_of_the_model_alone(model):
    model.train()
    HeldOut([pictures(12)])(model)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([],), "no held-out images"),
        (([torch.zeros(4, 3, 32, 32)],), "needs labels"),
        (([torch.zeros(4, 1), (torch.zeros(4, 1), torch.zeros(4))], "kl"), "pass dense="),
        (([(torch.zeros(4, 1), torch.zeros(4))], "f1"), "metric='f1'"),
    ],
)
def test_wrong_held_out_images(arguments, words):
    with pytest.raises(SearchError, match=words):
        HeldOut(*arguments)
    with pytest.raises(SearchError, match="batch_size=0"):
        HeldOut([(torch.zeros(4, 1), torch.zeros(4))], batch_size=0)


def test_deit_small_is_priced_by_the_thousands():
    """All of 10 000 policies in one call, equal to one at a time (how fast is benchmarks/search.py's to say)."""
    from lightning_mdc.policy_search.policy_space import PolicySpace

    space = PolicySpace(make(), 0.6)
    points = space.snap(space.from_unit(np.random.default_rng(0).random((10_000, len(space)))))
    at_once = space.macs(points)
    for i in range(0, 10_000, 999):
        assert at_once[i] == mdc.policy_macs(find_anatomy(space.anatomy.model).model, space.policy(points[i]))
