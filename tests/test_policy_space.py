"""Policies as points: every one held to whole units, counted by the same functions that price a plan."""

import math
import random
from typing import Any

import numpy as np
import pytest
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import lightning_mdc as mdc
from lightning_mdc.budget import CostModel, num_params
from lightning_mdc.errors import BudgetError, PolicyError, SearchError, UnsupportedModelError
from lightning_mdc.gp_ei.process import GpEi
from lightning_mdc.gp_ei.projection import Projection
from lightning_mdc.models import find_anatomy
from lightning_mdc.policy import Space, TokenOptions, keep_count
from lightning_mdc.policy_search.policy_space import PolicySpace
from lightning_mdc.tokens.flow import tokens_after, tokens_kept
from tests.kinds import BASE, KINDS, POST_NORM, daily, make, randomised

DEPTH, HEADS, NEURONS, TOKENS = 4, 4, 192, 17  # of the plain tiny ViT


def space_of(
    model: nn.Module,
    budget: float | mdc.Budget = 0.6,
    dimensions: tuple[str, ...] | None = None,
    tokens: TokenOptions | None = None,
    **space: Any,
) -> PolicySpace:
    return PolicySpace(model, budget, dimensions, Space(**space), tokens)


def on_budget(space: PolicySpace, count: int, seed: int = 0) -> np.ndarray:
    rng, project = np.random.default_rng(seed), Projection(space, space.constraint)
    return project.fill(project(rng.random((count, len(space)))), rng)


def anywhere(space: PolicySpace, count: int, seed: int = 0) -> np.ndarray:
    """Points that are not snapped."""
    return space.from_unit(np.random.default_rng(seed).random((count, len(space))))


def units(model: nn.Module, policy: mdc.Policy, reduction: str = "fuse") -> tuple[Any, ...]:
    """What a policy keeps, in whole units: equal for policies that make equal plans."""
    anatomy = find_anatomy(model)
    counts = anatomy.counts(policy)
    tokens, kept = CostModel(anatomy).num_tokens, []
    for ratio in counts.tokens:
        kept.append(int(tokens_kept(tokens, ratio, anatomy.num_prefix_tokens)))
        tokens = int(tokens_after(tokens, kept[-1], reduction))
    return (*counts.units["heads"].tolist(), *counts.units["neurons"].tolist(), *kept)


# --- the budget, on the integers --------------------------------------------------------------------------------------


def settings(rng: random.Random) -> dict[str, Any]:
    dimensions = rng.choice([None, None, ("heads", "neurons"), ("neurons",), ("heads", "tokens"), ("tokens",)])
    groups = [{name: n} for name, n in (("heads", 2), ("neurons", 1)) if dimensions is None or name in dimensions]
    return {
        "budget": rng.uniform(0.4, 1),
        "dimensions": dimensions,
        "groups": rng.choice([None, 1, 2, 3, *groups]),
        "tokens": TokenOptions(reduction=rng.choice(["fuse", "drop", "merge"])),
        "token_ratio": rng.choice(["shared", "stages"]),
        "min_heads": rng.choice([0, 1, 2]),
        "round_to": rng.choice([1, 1, 8, 50]),
        "stages": rng.choice([None, [1], [0, 3]]),
    }


@pytest.mark.parametrize("kind", daily(KINDS))
def test_every_point_is_within_the_budget_as_plans_are_priced(kind: str) -> None:
    model, rng, spaces = make(kind), random.Random(kind), 0
    while spaces < 2:
        kwargs = settings(rng)
        try:
            space = space_of(model, **kwargs)
        except BudgetError:  # of some the budget is out of reach; what that says is tested below
            continue
        spaces += 1
        dense, first = mdc.macs(model), space.nearest(space.uniform)
        search = GpEi(space, space.constraint, first=first[None], n_candidates=50)
        points = np.concatenate([first[None], on_budget(space, 8), search.ask(2)[0], anywhere(space, 8)])
        utilisations = space.utilisation(points)
        for point, macs, utilisation in zip(points, space.macs(points), utilisations, strict=True):
            policy = space.policy(point)
            assert mdc.policy_macs(model, policy, kwargs["tokens"]) == macs
            assert utilisation == pytest.approx(macs / (kwargs["budget"] * dense))
        affordable = space.macs(points[:-8])
        assert (affordable <= kwargs["budget"] * dense).all()


@pytest.mark.parametrize("reduction", ["fuse", "drop", "merge", "merge-proportional"])
def test_what_slims_is_what_was_priced(reduction: str) -> None:
    model, tokens = make(), TokenOptions(reduction=reduction)
    scores = mdc.score(model, criterion="random")
    space = space_of(model, 0.55, tokens=tokens, token_ratio="stages")
    for point in np.concatenate([on_budget(space, 50), space.nearest(space.uniform)[None]]):
        plan = mdc.make_plan(model, scores, space.policy(point), tokens)
        macs = space.macs(point[None])[0]
        assert macs == mdc.plan_macs(model, plan) == mdc.macs(mdc.slim(model, plan)) <= 0.55 * mdc.macs(model)


def test_without_a_fused_token_every_patch_that_leaves_saves() -> None:
    """One that a fused token takes the place of saves nothing; dropped or merged it does."""
    model = make()
    for reduction, kept in (("fuse", {17.0, 15.0, 14.0}), ("drop", {17.0, 16.0, 15.0}), ("merge", {17.0, 16.0, 15.0})):
        space = space_of(model, 1.0, ("tokens",), TokenOptions(reduction=reduction), stages=[1])
        policies = [space.policy(np.array([count / 17])) for count in (17, 16, 15, 14)]
        assert set(sorted((policy.tokens[0] * 17 for policy in policies), reverse=True)[:3]) <= kept | {14.0}
        assert (17 - 1) / 17 in {policy.tokens[0] for policy in policies} or reduction == "fuse"


def test_no_head_and_no_neuron_more_would_fit() -> None:
    model = make()
    space = space_of(model, 0.55)
    for point in on_budget(space, 5):
        policy = space.policy(point)
        for dimension, size, block in [
            (d, n, b) for d, n in (("heads", HEADS), ("neurons", NEURONS)) for b in range(4)
        ]:
            ratios = list(getattr(policy, dimension))
            if ratios[block] < 1:
                ratios[block] += 1 / size
                more = mdc.Policy(**{**policy.as_dict(), dimension: ratios})
                assert mdc.policy_macs(model, more) > 0.55 * mdc.macs(model)


def test_parameter_budgets() -> None:
    model = make()
    scores = mdc.score(model, criterion="random")
    space = space_of(model, mdc.Budget(params=0.5))
    assert space.dimensions == ("heads", "neurons")  # dropping tokens saves no parameter
    both = space_of(model, mdc.Budget(macs=0.7, params=0.6))
    for one, share in ((space, 0.5), (both, 0.6)):
        for point in on_budget(one, 4):
            policy = one.policy(point)
            slim = mdc.slim(model, mdc.make_plan(model, scores, policy))
            assert num_params(slim) <= share * num_params(model)
            utilisation = max(
                num_params(slim) / num_params(model) / share, (mdc.macs(slim) / mdc.macs(model) / 0.7) * (one is both)
            )
            assert one.utilisation(point[None])[0] == pytest.approx(utilisation)
            assert utilisation > 0.99
    absolute = space_of(model, mdc.Budget(macs=0.5 * mdc.macs(model)))
    assert absolute.macs(on_budget(absolute, 20)).max() <= 0.5 * mdc.macs(model)


# --- points and plans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "registers", "average_pool", "swiglu_normed"])
@pytest.mark.parametrize("token_ratio", ["shared", "stages"])
def test_equal_plans_are_equal_points(kind: str, token_ratio: str) -> None:
    model = make(kind)
    bounds = dict.fromkeys(("heads", "neurons", "tokens"), (0, 1))
    space = space_of(model, 0.9, bounds=bounds, token_ratio=token_ratio, round_to=16)
    rng = np.random.default_rng(0)
    points = anywhere(space, 40)
    # Neighbours, most of which round to the same units; and ends, where a ratio says more than can be kept.
    points = np.concatenate([points, points + rng.normal(0, 0.004, points.shape), points * 0.05, 1 - points * 0.01])
    points = np.clip(points, space.low, space.high)
    snapped = space.snap(points)
    assert (space.snap(snapped) == snapped).all()
    assert (snapped <= points + 1e-9).sum() > snapped.size / 2
    plans = [units(model, space.policy(point)) for point in points]
    assert plans == [units(model, space.policy(point)) for point in snapped]
    by_plan: dict[Any, set[bytes]] = {}
    for plan, key in zip(plans, space.keys(snapped), strict=True):
        by_plan.setdefault(plan, set()).add(key)
    assert 40 < len(by_plan) < 150
    assert {len(keys) for keys in by_plan.values()} == {1}
    assert len(set().union(*by_plan.values())) == len(by_plan)


@pytest.mark.parametrize("kind", ["vit", "deit_distilled", "attention_pool", "glu"])
@pytest.mark.parametrize("token_ratio", ["shared", "stages"])
def test_a_policy_and_its_point_are_the_same(kind: str, token_ratio: str) -> None:
    model = make(kind)
    space = space_of(model, 0.6, token_ratio=token_ratio)
    for point in on_budget(space, 20):
        policy = space.policy(point)
        assert (space.nearest(policy) == point).all()
        assert space.policy(space.nearest(policy)) == policy
        assert mdc.Policy.from_json(policy.to_json()) == policy


@pytest.mark.parametrize("kind", daily(KINDS))
def test_the_first_point_is_the_uniform_policy(kind: str) -> None:
    model = make(kind)
    for budget, token_ratio in ((0.45, "stages"), (0.85, "shared"), (1.0, "stages")):
        space = space_of(model, budget, token_ratio=token_ratio)
        uniform = mdc.uniform_policy(model, budget)
        policy = space.policy(GpEi(space, space.constraint, first=space.nearest(uniform)[None]).ask()[0])
        assert units(model, policy) == units(model, uniform)
        assert space.uniform == uniform


def test_points_are_keep_ratios_by_block() -> None:
    model = make()
    space = space_of(model, 0.9, token_ratio="stages")
    names = [axis.name for axis in space.axes]
    assert names == [f"{d}.{i}" for d in ("heads", "neurons") for i in range(4)] + [f"tokens.{i}" for i in range(3)]
    for point in anywhere(space, 20):
        params = space.params(point)
        policy = space.policy(point)
        assert policy.heads == tuple(keep_count(HEADS, params[f"heads.{i}"]) / HEADS for i in range(DEPTH))
        assert policy.neurons == tuple(keep_count(NEURONS, params[f"neurons.{i}"]) / NEURONS for i in range(DEPTH))
        tokens = TOKENS
        for stage, ratio in enumerate(policy.tokens):
            kept = int(tokens_kept(tokens, params[f"tokens.{stage}"], 1))
            kept = tokens if kept == tokens - 1 else kept  # one token less and the fused one more saves nothing
            assert ratio == kept / tokens
            tokens = kept + 1 if kept < tokens else tokens
    assert [axis.name for axis in space_of(model, 0.9).axes][-1] == "tokens"


def test_whole_units_stay_whole() -> None:
    assert 49 * (1 / 49) < 1
    model = randomised(VisionTransformer(**(BASE | {"mlp_ratio": 49.5 / 48})))
    space = space_of(model, 0.9, ("neurons",), bounds={"neurons": (0, 1)})
    for count in range(1, 50):
        point = np.full((1, 4), count / 49)
        assert units(model, space.policy(point[0]))[4:8] == (count,) * 4
        assert (space.snap(point) == point).all()


# --- what may be moved, and how far -----------------------------------------------------------------------------------


def test_bounds_hold_for_whole_units() -> None:
    model = make()
    bounds = {
        "heads": [(0.3, 1), (0.25, 0.8), (0.5, 0.5), (0, 1)],
        "neurons": (0.31, 0.77),
        "tokens": (0.5, 0.9),
    }
    for kwargs in ({}, {"min_heads": 2}, {"round_to": 16}, {"min_neurons": 100}):
        space = space_of(model, 0.6, bounds=bounds, token_ratio="stages", **kwargs)  # type: ignore[arg-type]
        least = kwargs.get("min_heads", 1)
        for point in np.concatenate([on_budget(space, 20), space.low[None], space.high[None]]):
            policy = space.policy(point)
            for (low, high), ratio in zip(bounds["heads"], policy.heads, strict=True):  # type: ignore[arg-type]
                assert max(low, least / HEADS) <= ratio <= max(high, least / HEADS)
            for ratio in policy.neurons:
                assert max(0.31, kwargs.get("min_neurons", 0) / NEURONS) <= ratio <= 0.77
                assert round(ratio * NEURONS) % kwargs.get("round_to", 1) == 0
            tokens = TOKENS
            for ratio in policy.tokens:
                # All stay where one less and the fused one would be as many.
                assert math.floor(0.5 * tokens) <= round(ratio * tokens) <= 0.9 * tokens or 0.9 * tokens >= tokens - 1
                tokens = round(ratio * tokens) + (ratio < 1)
        assert space.policy(space.high).heads[2] == 0.5


def test_without_bounds_neurons_and_tokens_keep_a_share_of_uniform() -> None:
    model = make()
    space = space_of(model, 0.6)
    lowest, uniform = space.policy(space.low), space.uniform
    assert min(lowest.heads) == 1 / HEADS
    for low, ratio in zip(lowest.neurons, uniform.neurons, strict=True):
        assert 0.1 * ratio <= low < 0.1 * ratio + 2 / NEURONS
    assert (space.high == 1).all()


@pytest.mark.parametrize("groups", [1, 2, 3, {"heads": 2}, {"neurons": 1, "heads": None}])
def test_groups_tie_neighbours(groups: Any) -> None:
    model = make()
    space = space_of(model, 0.6, groups=groups)
    number = {d: groups.get(d) if isinstance(groups, dict) else groups for d in ("heads", "neurons")}
    assert len(space) == sum(n or DEPTH for n in number.values()) + 1
    for point in on_budget(space, 10):
        policy = space.policy(point)
        for dimension, count in number.items():
            ratios = getattr(policy, dimension)
            for members in np.array_split(np.arange(DEPTH), count or DEPTH):
                assert len({ratios[member] for member in members}) == 1
    # Uniform keeps a head more here than there; tied, the blocks keep the fewer.
    nearest = space.policy(space.nearest(space.uniform))
    assert all(a <= b for a, b in zip(nearest.heads, space.uniform.heads, strict=True))
    assert all(a <= b for a, b in zip(nearest.neurons, space.uniform.neurons, strict=True))


def test_round_to_and_no_heads_at_all() -> None:
    model = make()
    space = space_of(model, 0.5, round_to=16, min_heads=0)
    points = np.concatenate([on_budget(space, 60), space.low[None]])
    policies = [space.policy(point) for point in points]
    assert all(round(ratio * NEURONS) % 16 == 0 for policy in policies for ratio in policy.neurons)
    assert min(min(policy.heads) for policy in policies) == 0
    other = space_of(model, 0.5)
    assert min(min(policy.heads) for policy in map(other.policy, on_budget(other, 60))) == 1 / HEADS


def test_tokens_alone_by_stage() -> None:
    model = make()
    space = space_of(model, 0.75, ("tokens",), token_ratio="stages", stages=[0, 2])
    assert [axis.name for axis in space.axes] == ["tokens.0", "tokens.1"]
    policies = [space.policy(point) for point in on_budget(space, 20)]
    assert {policy.stages for policy in policies} == {(0, 2)}
    assert {*policies[0].heads, *policies[0].neurons} == {1.0}
    assert len({policy.tokens for policy in policies}) > 2


def test_a_slim_model_is_searched_again() -> None:
    model = make()
    scores = mdc.score(model, criterion="random")
    uneven = mdc.Policy(heads=[0.25, 1, 0.5, 0.75], neurons=[0.5, 0.3, 1, 0.7], tokens=[0.8, 1, 0.9])
    slim = mdc.slim(model, mdc.make_plan(model, scores, uneven))
    for groups in (None, 2):
        space = space_of(slim, 0.7, groups=groups)
        assert space.dimensions == ("heads", "neurons")
        for point in on_budget(space, 10):
            policy = space.policy(point)
            assert mdc.policy_macs(slim, policy) == space.macs(point[None])[0] <= 0.7 * mdc.macs(slim)
            assert (space.snap(point[None])[0] == point).all()
        if groups is None:
            assert units(slim, space.policy(space.nearest(space.uniform))) == units(slim, space.uniform)
    again = mdc.slim(slim, mdc.make_plan(slim, mdc.score(slim, criterion="random"), policy))
    assert mdc.macs(again) == space.macs(point[None])[0]


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_unreachable_budget_says_what_is_reachable() -> None:
    model = make()
    bounds = {"heads": (0.75, 1), "neurons": (0.9, 1), "tokens": (0.9, 1)}
    with pytest.raises(
        BudgetError, match=r"budget=0\.5 is below the smallest cost inside the bounds, 0\.\d+;"
    ) as error:
        space_of(model, 0.5, bounds=bounds)
    reachable = float(str(error.value).split("bounds, ")[1].split(";")[0])
    assert space_of(model, reachable + 1e-4, bounds=bounds)
    with pytest.raises(BudgetError, match="smallest cost inside the bounds"):
        space_of(model, reachable - 1e-4, bounds=bounds)
    with pytest.raises(BudgetError, match=r"inside the bounds, 1\.\d+ times the budget"):
        space_of(model, mdc.Budget(params=0.6), bounds=bounds)
    with pytest.raises(BudgetError, match="smallest reachable cost"):
        space_of(model, 0.05)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bounds": {"head": (0, 1)}}, r"bounds=\{'head'.*ratios by dimension"),
        ({"bounds": {"heads": (0.8, 0.2)}}, "bounds of heads=.*the smaller first"),
        ({"bounds": {"heads": (0, 1.5)}}, r"bounds of heads=.*in \[0, 1\]"),
        ({"bounds": {"heads": [(0, 1)] * 3}}, "bounds of heads=.*4 such pairs"),
        ({"bounds": {"neurons": "low"}}, "bounds of neurons='low'"),
        ({"bounds": {"heads": (0.3, 0.45)}}, r"bounds of heads\.0: no whole number of heads is between 0\.5 and 0\.45"),
        ({"groups": 5}, "groups=5 for heads: the model has 4 blocks"),
        ({"groups": {"neurons": 0}}, "groups=0 for neurons"),
        ({"groups": {"tokens": 2}}, "groups=.*token_ratio"),
        (
            {"dimensions": ("heads",), "bounds": {"heads": None, "neurons": (0, 1)}},
            "bounds=.*: neurons are not searched, only heads",
        ),
        ({"dimensions": ("heads",), "groups": {"neurons": 2}}, "groups=.*: neurons are not searched, only heads"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        space_of(make(), 0.9, **kwargs)
    with pytest.raises(PolicyError, match="token_ratio='each'"):
        space_of(make(), 0.9, token_ratio="each")


def test_a_dimension_the_model_cannot_lose() -> None:
    model = randomised(POST_NORM())
    assert space_of(model, 0.7).dimensions == ("heads", "neurons")
    with pytest.raises(UnsupportedModelError, match="tokens"):
        space_of(model, 0.7, ("tokens",))


def test_ten_thousand_policies_are_priced_at_once() -> None:
    space = space_of(randomised(VisionTransformer(**(BASE | {"depth": 12}))), 0.6)
    points = anywhere(space, 10_000)
    together = space.macs(points)
    for i in (0, 4_321, 9_999):
        assert space.macs(points[[i]])[0] == together[i]
