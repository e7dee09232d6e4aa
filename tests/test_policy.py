"""Policy and plan as values: rounding, JSON, validation."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch

import lightning_mdc as mdc
from lightning_mdc.errors import PlanError, PolicyError
from lightning_mdc.policy import default_stages, keep_count
from lightning_mdc.tokens.flow import tokens_after, tokens_kept
from tests.kinds import images, make


def test_realised_ratios_are_stable() -> None:
    for n in (1, 3, 12, 197, 3072, 65537):
        for k in {0, 1, n // 3, n - 1, n}:
            assert keep_count(n, k / n) == k
    assert keep_count(12, 0.99) == 11
    kept = [tokens_kept(197, r, 1) for r in (0, 0.7, 1)]
    assert kept == [2, 137, 197]
    assert [tokens_after(197, k, "fuse") for k in kept] == [3, 138, 197]
    assert [tokens_after(197, k, "merge") for k in kept] == [2, 137, 197]


def test_default_stages_are_quarters() -> None:
    assert default_stages(12) == (3, 6, 9)
    assert default_stages(14) == (3, 7, 10)
    assert default_stages(2) == (0, 1)


def test_policy_is_frozen_and_survives_json() -> None:
    policy = mdc.Policy(heads=[0.5, 1], neurons=np.float32(0.25), tokens=torch.tensor(0.75), stages=[1, 3])
    assert mdc.Policy.from_json(policy.to_json()) == policy
    assert policy.heads == (0.5, 1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.stages = (1,)  # type: ignore[misc]


@pytest.mark.parametrize("ratio", [1.5, -0.1, float("nan"), True, "0.5", None])
def test_a_ratio_outside_0_to_1_is_refused(ratio: object) -> None:
    with pytest.raises(PolicyError, match="neurons"):
        mdc.Policy(neurons=[0.5, ratio])  # type: ignore[list-item]


def test_plan_survives_json_and_its_hash_tells_plans_apart() -> None:
    model = make()
    scores = mdc.score(model, [images(8)], progress=False)
    plan = mdc.make_plan(model, scores, mdc.uniform_policy(model, 0.6), tokens=mdc.TokenOptions("attention*dependence"))
    again = mdc.Plan.from_json(plan.to_json())
    assert again == plan
    assert again.hash == plan.hash
    assert "prior" in plan.to_json()
    other = mdc.make_plan(model, scores, mdc.uniform_policy(model, 0.6))
    assert other.hash != plan.hash


def test_policy_to_plan_to_policy_is_stable() -> None:
    model, rng = make(), random.Random(3)
    scores = mdc.score(model, [images(8)], progress=False)
    for _ in range(20):
        wanted = mdc.Policy(
            [rng.random() for _ in range(4)], [rng.random() for _ in range(4)], [rng.uniform(0.2, 1) for _ in range(3)]
        )
        realised = mdc.make_plan(model, scores, wanted).policy
        assert mdc.make_plan(model, scores, realised).policy == realised
        assert mdc.policy_macs(model, realised) == mdc.policy_macs(model, wanted)


def test_the_best_units_are_kept() -> None:
    model = make()
    scores = mdc.score(model, criterion="random")
    scores.heads[1][:] = torch.tensor([0.1, 0.9, 0.9, 0.2])
    plan = mdc.make_plan(model, scores, mdc.Policy(heads=0.5, neurons=0.5, tokens=1.0))
    assert plan.heads[1] == (1, 2)
    best = torch.topk(scores.neurons[2], 96).indices.sort().values
    assert plan.neurons[2] == tuple(best.tolist())


def fields() -> dict[str, object]:
    model = make()
    plan = mdc.make_plan(model, mdc.score(model, criterion="random"), mdc.Policy(0.5, 0.5, 0.5))
    return json.loads(plan.to_json())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(format=2), "format"),
        (lambda f: f.pop("heads"), "fields"),
        (lambda f: f.update(extra=1), "fields"),
        (lambda f: f["heads"].pop(), "heads covers 3 blocks"),
        (lambda f: f["heads"].__setitem__(0, [0, 4]), "index 4, but the block has 4 heads"),
        (lambda f: f["neurons"].__setitem__(2, [5, 5]), "must increase"),
        (lambda f: f["neurons"].__setitem__(2, [-1]), "no index"),
        (lambda f: f["neurons"].__setitem__(2, "abc"), "no index"),
        (lambda f: f["tokens"][0].update(block=9), "stages at blocks"),
        (lambda f: f["tokens"][0].update(keep=1.5), "keep=1.5"),
        (lambda f: f["tokens"][0].update(score="luck"), "luck"),
        (lambda f: f["tokens"][0].update(score="dependence"), "needs a prior"),
        (lambda f: f["tokens"][0].update(prior=[0.5] * 15, grid=[4, 4]), "4x4"),
        (lambda f: f["tokens"][0].pop("keep"), "a token stage has fields"),
        (lambda f: f["tokens"][0].update(keep=10**400), "keep=1000"),
        (lambda f: f["tokens"][0].update(prior=[0.5], grid=[]), "grid"),
        (lambda f: f.update(reduction=1), "reduction=1"),
        (lambda f: f.update(restore="false"), "restore='false'"),
    ],
)
def test_a_damaged_plan_is_refused_with_the_field(change: object, message: str) -> None:
    damaged = fields()
    change(damaged)  # type: ignore[operator]
    with pytest.raises(PlanError, match=message):
        mdc.Plan.from_json(json.dumps(damaged))


@pytest.mark.parametrize("text", ["", "[]", "{", '"plan"', "null"])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="plan JSON"):
        mdc.Plan.from_json(text)
    with pytest.raises(PolicyError, match="policy JSON"):
        mdc.Policy.from_json(text)
