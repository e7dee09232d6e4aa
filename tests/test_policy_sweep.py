"""The policy search as a sweep of train.py: trials, what they cost, the cache they share, and what comes after."""

import itertools
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import lightning_mdc as mdc
from lightning_mdc.app import build, pipeline, steps, sweep
from lightning_mdc.errors import ConfigError, PolicyError, SearchError
from lightning_mdc.importance import Moments
from tests.test_train import ROOT, TINY, script, settings

pytestmark = pytest.mark.slow  # CI runs them

KEEP = ("policy.keep.heads=[0.5,1]", "policy.keep.neurons=[0.5,0.25]", "policy.keep.tokens=0.7")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder of runs in which one trial has left its cache."""
    folder = tmp_path_factory.mktemp("runs")
    sweep.trial(settings(folder, "stage=trial", *KEEP), folder / "0")
    return folder


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(steps, "train", lambda *_, **__: pytest.fail("trained again"))


def test_trials_are_judged_with_compensation_by_moments_they_share(tmp_path):
    options = settings(tmp_path, "stage=trial", *KEEP, "surgery.compensate=lstsq")
    value = sweep.trial(options, tmp_path / "0")
    run = sweep.prepared(options)
    dense, moments = run.model("dense"), Moments.load(run.folder / "moments.safetensors")
    assert moments.images == 32
    plan = mdc.make_plan(dense, mdc.Scores.load(run.folder / "scores.safetensors"), build.given_policy(options, dense))
    held_out = sweep.build_held_out(run, dense)
    assert value == held_out(mdc.slim(dense, plan, compensate="lstsq", moments=moments))
    assert value != held_out(mdc.slim(dense, plan))


# --- policies that are given ------------------------------------------------------------------------------------------


def given(tmp_path, *overrides):
    composed = settings(tmp_path, *overrides)
    data = build.build_data(composed)
    return build.given_policy(composed, build.build_model(composed, data))


def test_keep_ratios_are_spread_over_the_blocks(tmp_path):
    policy = given(tmp_path, *KEEP)
    assert policy.heads == (0.5, 0.5, 1.0, 1.0)
    assert policy.neurons == (0.5, 0.5, 0.25, 0.25)
    assert policy.tokens[0] == pytest.approx(0.7, abs=1 / 17)
    assert given(tmp_path, "policy.keep.heads=[1,0.5,1,1]").heads == (1.0, 0.5, 1.0, 1.0)
    assert given(tmp_path, "policy.keep.neurons=0.5").neurons == (0.5,) * 4
    assert given(tmp_path, "policy.keep.neurons=0.5").heads == (1.0,) * 4
    assert len(set(given(tmp_path, "policy.keep.tokens=[0.9,0.8,0.5]").tokens)) == 3


def test_without_one_it_is_searched_for_unless_uniform(tmp_path):
    assert given(tmp_path) is None
    composed = settings(tmp_path, "policy.kind=uniform")
    model = build.build_model(composed, build.build_data(composed))
    assert given(tmp_path, "policy.kind=uniform") == mdc.uniform_policy(model, 0.6)


@pytest.mark.parametrize(
    ("override", "kind", "words"),
    [
        ("policy.keep.heads=[1,1,1,1,1]", SearchError, "4 blocks"),
        ("policy.keep.heads=1.5", PolicyError, r"heads\[0\]=1\.5"),
        ("policy.keep.tokens=[1,1]", SearchError, "tokens"),
        ("+policy.keep.wings=0.5", ConfigError, r"no setting 'policy\.keep\.wings'; there are policy\.keep\.heads"),
        ("policy.kind=best", ConfigError, "policy.kind='best'"),
    ],
)
def test_wrong_policies_are_refused_before_anything_is_trained(override, kind, words, tmp_path, no_training):
    with pytest.raises(kind, match=words):
        pipeline.run(settings(tmp_path, override))
    assert not list(tmp_path.glob("tiny/*"))


def test_two_policies_at_once_are_refused(tmp_path):
    (tmp_path / "p.json").write_text(mdc.Policy().to_json())
    ways = {
        "policy.file": f"policy.file={tmp_path / 'p.json'}",
        "policy.keep": "policy.keep.heads=0.5",
        "policy.kind=uniform": "policy.kind=uniform",
    }
    for (one, first), (other, second) in itertools.combinations(ways.items(), 2):
        with pytest.raises(ConfigError, match=f"{one} and {other} both give a policy; give one of them"):
            pipeline.run(settings(tmp_path, first, second))


# --- one trial --------------------------------------------------------------------------------------------------------


def test_a_trial_is_worth_what_its_slim_model_gets_right(runs, tmp_path, no_training):
    composed = settings(runs, "stage=trial", *KEEP)
    value = sweep.trial(composed, tmp_path)
    run = sweep.prepared(composed)
    policy = mdc.Policy.load(tmp_path / "policy.json")
    scores = mdc.Scores.load(run.folder / "scores.safetensors")
    moments = Moments.load(run.folder / "moments.safetensors")
    plan = mdc.make_plan(run.model("dense"), scores, policy)
    slim = mdc.slim(run.model("dense"), plan, compensate="lstsq", moments=moments)
    images, labels = map(torch.cat, zip(*run.data.val_dataloader(), strict=True))
    right = (slim(images).argmax(dim=1) == labels).sum().item()
    assert int(value * len(labels)) == right
    assert policy.heads == (0.5, 0.5, 1.0, 1.0)


def test_few_images_are_judged_by_more_than_top1(runs):
    run = sweep.prepared(settings(runs, "search.metric=auto"))
    model, images, labels = run.model("dense"), torch.rand(1000, 1, 8, 8), torch.zeros(1000)
    for count, metric in ((999, "kl"), (1000, "accuracy")):
        held_out = build.build_held_out(run.settings["search"], [(images[:count], labels[:count])], model, run.device)
        assert held_out.metric == metric
        assert held_out.num_images == count


def test_other_settings_have_a_cache_of_their_own(runs, tmp_path):
    caches = set((runs / ".cache").iterdir())
    sweep.trial(settings(runs, "stage=trial", "importance=magnitude", *KEEP), tmp_path)
    assert len(set((runs / ".cache").iterdir()) - caches) == 1


def test_a_run_takes_dense_model_and_scores_from_the_cache(runs, no_training):
    composed = settings(runs, "stage=[dense,score]")
    folder, cached = pipeline.run(composed), sweep.prepared(composed).folder
    for name in ("dense/model.safetensors", "dense/config.json", "scores.safetensors"):
        assert (folder / name).read_bytes() == (cached / name).read_bytes()


def test_a_trial_without_a_policy_says_what_to_give(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"policy\.keep\.heads"):
        sweep.trial(settings(runs, "stage=trial"), tmp_path)


# --- what trials cost -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cost(runs):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return sweep.PolicyCost(compose("train", [*TINY, f"runs={runs}", "budget=0.5"]))


def columns(rng, n: int) -> dict[str, np.ndarray]:
    return {
        "policy.keep.heads": rng.uniform(0.1, 1, (n, 2)),
        "policy.keep.neurons": rng.uniform(0.1, 1, (n, 4)),
        "policy.keep.tokens": rng.uniform(0.3, 1, n),
        "stage": "trial",
    }


def test_the_price_of_a_trial_is_that_of_the_model_it_makes(cost, tmp_path):
    params = columns(np.random.default_rng(0), 8)
    prices = cost(params)
    dense = mdc.macs(cost.model)
    for i in range(8):
        keep = {k.removeprefix("policy.keep."): v[i].tolist() for k, v in params.items() if k != "stage"}
        overrides = [f"policy.keep.{k}={v}" for k, v in keep.items()]
        policy = given(tmp_path, *overrides)
        assert prices[i] == pytest.approx(mdc.policy_macs(cost.model, policy) / (0.5 * dense), rel=1e-12)


def test_snapped_trials_cost_and_keep_the_same(cost):
    params = columns(np.random.default_rng(1), 50)
    snapped = cost.snap(params)
    assert np.array_equal(cost(snapped), cost(params))
    assert {key: np.shape(value) for key, value in snapped.items()} == {k: np.shape(v) for k, v in params.items()}
    again = cost.snap(snapped)
    assert all(np.array_equal(again[key], snapped[key]) for key in params if key != "stage")


def test_a_sweep_begins_where_a_search_does(cost):
    params = columns(np.random.default_rng(0), 1) | {"lr": np.array([0.5])}
    first = cost.first(params)
    costs = cost(first)
    assert 0.95 < costs[0] <= 1  # nearly uniform
    kept = [
        {name: first[f"policy.keep.{name}"][i].tolist() for name in ("heads", "neurons", "tokens")}
        for i in range(len(costs))
    ]
    whole = [tuple(name for name, ratios in keep.items() if np.min(ratios) == 1) for keep in kept]
    assert whole[0] == ()
    assert ("heads", "tokens") in whole  # neurons alone
    assert all(whole[1:])
    assert len(set(whole)) == len(whole)
    assert first["lr"].tolist() == [0.5] * len(costs)
    assert first["stage"] == "trial"


# --- a whole sweep ----------------------------------------------------------------------------------------------------


def test_a_sweep_and_the_command_it_ends_with(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    sweep = ["hydra/sweeper=mdc_gp_ei", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_initial_points=2"]
    assert script(monkeypatch, "-m", *sweep, *TINY, f"runs={runs}", "budget=0.5") == 0
    (folder,) = (runs / "sweeps").iterdir()
    results = OmegaConf.load(folder / "optimization_results.yaml")
    assert {"name", "best_params", "best_value", "best_trial", "best_dir"} <= set(results)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["0", "1", "2"]
    dense = mdc.load(next((runs / ".cache").glob("*/dense")))
    for number in range(3):
        policy = mdc.Policy.load(folder / str(number) / "policy.json")
        assert mdc.policy_macs(dense, policy) <= 0.5 * mdc.macs(dense)
    best = mdc.Policy.load(folder / "best_policy.json")
    assert best == mdc.Policy.load(folder / str(results.best_trial) / "policy.json")
    assert (folder / "policy.png").stat().st_size > 10_000
    _, *command = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
    assert script(monkeypatch, *command[1:], "skip=[distill,test,report]") == 0
    assert "picked up from the cache" in capsys.readouterr().out
    newest = max((runs / "tiny").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert json.loads((newest / "policy.json").read_text()) == json.loads(best.to_json())
    assert mdc.macs(mdc.load(newest / "slim")) == mdc.policy_macs(dense, best)
