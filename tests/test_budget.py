"""Costs against torch's own FLOP counter, and uniform policies against their budgets."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import lightning_mdc as mdc
from lightning_mdc.budget import Cost, costs, num_params, register
from lightning_mdc.budget.cost_model import CostModel, Kept, TokenDrop
from lightning_mdc.errors import BudgetError, PolicyError, UnsupportedModelError
from lightning_mdc.models import find_anatomy
from lightning_mdc.policy import Space, TokenOptions
from lightning_mdc.policy_search.policy_space import PolicySpace
from lightning_mdc.surgery import apply_masks
from tests.kinds import BASE, KINDS, counted_macs, daily, images, make, randomised


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deit_tiny_patch16_224", 1_253_683_200),
        ("deit_small_patch16_224", 4_598_882_304),
        ("deit_base_patch16_224", 17_563_828_224),
    ],
)
def test_published_models_cost_what_they_cost(name: str, expected: int) -> None:
    with torch.device("meta"):
        assert mdc.macs(timm.create_model(name)) == expected


@pytest.mark.parametrize("kind", daily(KINDS))
def test_random_plans_cost_what_the_counter_says(kind: str) -> None:
    model, rng = make(kind), random.Random(kind)
    scores = mdc.score(model, [images(4)], "activation", progress=False)
    assert mdc.macs(model) == counted_macs(model)
    for reduction in ("fuse", "drop", "merge"):
        policy = mdc.Policy(
            [rng.random() for _ in range(4)],
            [rng.random() for _ in range(4)],
            [rng.choice([1.0, rng.random()]) for _ in range(3)],
        )
        tokens = TokenOptions(reduction=reduction, restore=rng.choice([None, True, False]))
        plan = mdc.make_plan(model, scores, policy, tokens)
        slim = mdc.slim(model, plan)
        priced = mdc.policy_macs(model, policy, tokens)
        assert mdc.macs(slim) == counted_macs(slim) == priced == mdc.plan_macs(model, plan)
        costs = CostModel(find_anatomy(model))
        assert costs.params(costs.kept_by_plan(plan)) == num_params(slim)


@pytest.mark.parametrize("kind", ["vit", "average_pool"])
@pytest.mark.parametrize("reduction", ["fuse", "drop", "merge-proportional"])
@pytest.mark.parametrize("score", ["dependence", "attention*dependence"])
def test_token_options_are_priced(kind: str, reduction: str, score: str) -> None:
    model, tokens = make(kind), TokenOptions(score, reduction)
    scores = mdc.score(model, [images(8)], "activation", progress=False)
    policy = mdc.Policy([0.5, 0.5, 0, 0.5], 0.5, 0.6)
    plan = mdc.make_plan(model, scores, policy, tokens)
    slim = mdc.slim(model, plan)
    assert mdc.macs(slim) == counted_macs(slim) == mdc.plan_macs(model, plan) == mdc.policy_macs(model, policy, tokens)


def test_parts_of_a_block_that_cannot_be_cut_are_counted_as_they_are() -> None:
    model = make()
    model.blocks[1].mlp = nn.Sequential(nn.Linear(48, 60), nn.ReLU(), nn.Linear(60, 48))
    model.blocks[2].attn.norm = nn.Sequential(nn.LayerNorm(48))
    model.eval()
    assert find_anatomy(model).num_heads == (4, 4, 0, 4)
    assert find_anatomy(model).num_neurons == (192, 0, 192, 192)
    assert mdc.macs(model) == counted_macs(model)
    scores = mdc.score(model, [images(8)], "activation", progress=False)
    space = PolicySpace(model, 0.8)
    assert [axis.name for axis in space.axes] == [f"heads.{i}" for i in (0, 1, 3)] + [
        f"neurons.{i}" for i in (0, 2, 3)
    ] + ["tokens"]
    for policy in (space.uniform, mdc.Policy(0.5, 0.3, 0.6), space.policy(space.low)):
        slim = mdc.slim(model, mdc.make_plan(model, scores, policy))
        assert mdc.macs(slim) == counted_macs(slim) == mdc.policy_macs(model, policy)
    assert 0.795 < mdc.policy_macs(model, space.uniform) / mdc.macs(model) <= 0.8


def test_with_masks_on_a_model_counts_as_without() -> None:
    model = make()
    plan = mdc.make_plan(model, mdc.score(model, criterion="random"), mdc.Policy(0.5, 0.5, 0.6))
    dense, kept = mdc.macs(model), mdc.plan_macs(model, plan)
    params = num_params(mdc.slim(model, plan))
    apply_masks(model, plan)
    costs = CostModel(find_anatomy(model))
    assert (costs.of_model(), costs.of_plan(plan)) == (dense, kept)
    assert costs.params(costs.kept_by_plan(plan)) == params


def test_a_transformer_among_others_is_priced() -> None:
    both = nn.ModuleDict({"eye": make(), "ear": make("any_size")})
    assert mdc.macs(both, submodule="ear", input_size=64) == counted_macs(both["ear"], 64)
    policy = mdc.uniform_policy(both, 0.6, input_size=64, submodule="ear")
    share = mdc.policy_macs(both, policy, None, 64, "ear") / mdc.macs(both, 64, "ear")
    assert 0.59 < share <= 0.6
    assert policy == PolicySpace(both, 0.6, input_size=64, submodule="ear").uniform
    assert policy != mdc.uniform_policy(both["ear"], 0.6)


def test_other_input_sizes() -> None:
    model = make("any_size")
    assert mdc.macs(model, 64) == mdc.macs(model, (3, 64, 64)) == counted_macs(model, 64)
    plan = mdc.make_plan(model, mdc.score(model, criterion="random"), mdc.Policy(0.5, 0.5, 0.6))
    slim = mdc.slim(model, plan)
    assert mdc.macs(slim, (64, 64)) == counted_macs(slim, 64) == mdc.plan_macs(model, plan, 64)
    with pytest.raises(UnsupportedModelError, match=r"input_size=\(64, 64\).*dynamic_img_size"):
        mdc.macs(make(), 64)
    with pytest.raises(BudgetError, match="input_size"):
        mdc.macs(model, (1, 2, 3, 4))


def test_parts_without_a_formula_are_counted() -> None:
    model = make()
    model.head = nn.Sequential(nn.Linear(48, 20), nn.GELU(), nn.Linear(20, 7))
    assert mdc.macs(model) == counted_macs(model)


def test_every_token_is_classified_without_pooling() -> None:
    model = randomised(VisionTransformer(**(BASE | {"global_pool": ""})))
    assert mdc.macs(model) == counted_macs(model)
    plan = mdc.make_plan(model, mdc.score(model, criterion="random"), mdc.Policy(0.5, 0.5, 0.6))
    assert mdc.macs(mdc.slim(model, plan)) == counted_macs(mdc.slim(model, plan)) == mdc.plan_macs(model, plan)


def test_many_policies_are_priced_at_once() -> None:
    model = make()
    costs = CostModel(find_anatomy(model))
    rng = torch.Generator().manual_seed(0)
    heads = torch.randint(0, 5, (50, 4), generator=rng).numpy()
    neurons = torch.randint(0, 193, (50, 4), generator=rng).numpy()
    keeps = torch.rand(50, 3, generator=rng).double().numpy()
    units = {"heads": heads, "neurons": neurons}
    together = costs.macs(Kept(units, [TokenDrop(b, keeps[:, i]) for i, b in enumerate((1, 2, 3))]))
    for i in (0, 7, 49):
        policy = mdc.Policy(heads[i] / 4, neurons[i] / 192, keeps[i])
        assert together[i] == mdc.policy_macs(model, policy)


# --- uniform policies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_small_patch16_224", "vit_base_patch16_siglip_224"])
@pytest.mark.parametrize("budget", [0.25, 0.4, 0.5, 0.6, 0.77, 0.9])
def test_uniform_lands_just_under_the_budget(name: str, budget: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    policy = mdc.uniform_policy(model, budget)
    assert budget - 0.005 < mdc.policy_macs(model, policy) / mdc.macs(model) <= budget
    hidden = find_anatomy(model).num_neurons[0]
    counts = {round(ratio * hidden) for ratio in policy.neurons}
    assert max(counts) - min(counts) <= 8
    assert all(count % 8 == 0 for count in counts)
    assert len(set(policy.heads)) <= 2


@pytest.mark.parametrize("dimension", ["heads", "neurons", "tokens"])
def test_one_dimension_alone(dimension: str) -> None:
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    policy = mdc.uniform_policy(model, 0.8, (dimension,))
    assert 0.79 < mdc.policy_macs(model, policy) / mdc.macs(model) <= 0.8
    for other in {"heads", "neurons", "tokens"} - {dimension}:
        assert set(getattr(policy, other)) == {1.0}


def test_absolute_and_parameter_budgets() -> None:
    model = make()
    for budget in (mdc.Budget(macs=0.5 * mdc.macs(model)), mdc.Budget(macs=0.5)):
        assert mdc.policy_macs(model, mdc.uniform_policy(model, budget)) <= 0.5 * mdc.macs(model)
    policy = mdc.uniform_policy(model, mdc.Budget(params=0.5))
    slim = mdc.slim(model, mdc.make_plan(model, mdc.score(model, criterion="random"), policy))
    assert 0.49 < num_params(slim) / num_params(model) <= 0.5
    assert set(policy.tokens) == {1.0}  # dropping tokens saves no parameter
    both = mdc.uniform_policy(model, mdc.Budget(macs=0.7, params=0.6))
    assert mdc.policy_macs(model, both) <= 0.7 * mdc.macs(model)


@pytest.mark.parametrize(("hidden", "step"), [(504, 1), (512, 8)])
def test_wide_blocks_keep_neurons_in_eights(hidden: int, step: int) -> None:
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=2, mlp_ratio=hidden / 64)
    in_steps, anyhow = (mdc.uniform_policy(model, 0.62, ("neurons",), Space(round_to=n)) for n in (step, 1))
    assert mdc.uniform_policy(model, 0.62, ("neurons",)) == in_steps
    assert (in_steps == anyhow) == (step == 1)
    space, of_steps = (PolicySpace(model, 0.62, ("neurons",), Space(round_to=n)) for n in (None, step))
    assert np.array_equal(space.snap(space.high[None] * 0.777), of_steps.snap(of_steps.high[None] * 0.777))


def test_round_to_and_minima() -> None:
    model = make()
    policy = mdc.uniform_policy(model, 0.5, space=Space(round_to=16, min_heads=2))
    assert all(round(r * 192) % 16 == 0 for r in policy.neurons)
    assert min(policy.heads) >= 0.5
    assert mdc.policy_macs(model, policy) <= 0.5 * mdc.macs(model)


def test_everything_fits_into_a_full_budget() -> None:
    model = make()
    policy = mdc.uniform_policy(model, 1.0)
    assert mdc.policy_macs(model, policy) == mdc.macs(model)
    assert {*policy.heads, *policy.neurons, *policy.tokens} == {1.0}


def test_an_unreachable_budget_says_what_is_reachable() -> None:
    model = make()
    with pytest.raises(
        BudgetError, match=r"budget=0\.05 is below the smallest reachable cost 0\.\d+.*min_heads=0"
    ) as error:
        mdc.uniform_policy(model, 0.05)
    with pytest.raises(BudgetError, match=r"budget=0\.3 is below the smallest reachable cost 0\.7\d+ of") as heads_only:
        mdc.uniform_policy(model, mdc.Budget(macs=0.3), ("heads",))
    headless = mdc.Policy(heads=0.0)  # what the message says the remedy reaches
    assert f"reaches {mdc.policy_macs(model, headless) / mdc.macs(model):.4g}" in str(heads_only.value)
    assert "allow more dimensions" in str(heads_only.value)
    reachable = float(str(error.value).split("cost ")[1].split(" ")[0])
    policy = mdc.uniform_policy(model, reachable + 0.001)
    assert set(policy.heads) == {0.25}
    no_heads = mdc.uniform_policy(model, reachable - 0.02, space=Space(min_heads=0, min_neurons=0))
    assert min(no_heads.heads) == 0


def test_every_stage_and_prefix_combination_stays_under_budget() -> None:
    rng = random.Random(5)
    for _ in range(25):
        depth, prefix = rng.randint(1, 6), rng.randint(0, 3)
        model = VisionTransformer(**(BASE | {"depth": depth, "reg_tokens": prefix}))
        stages = sorted(rng.sample(range(depth), rng.randint(1, depth)))
        budget = rng.uniform(0.45, 1)
        policy = mdc.uniform_policy(model, budget, space=Space(stages=stages))
        assert mdc.policy_macs(model, policy) <= budget * mdc.macs(model)
        assert mdc.policy_macs(model, policy) > (budget - 0.01) * mdc.macs(model)


def test_a_uniform_policy_has_one_ratio_for_all() -> None:
    for options in ({"groups": 2}, {"bounds": {"heads": (0.5, 1)}}, {"token_ratio": "stages"}):
        with pytest.raises(PolicyError, match=f"space.{next(iter(options))}=.* is for a search"):
            mdc.uniform_policy(make(), 0.6, space=Space(**options))  # type: ignore[arg-type]


def test_without_a_classifier_tokens_stay_unless_they_are_restored() -> None:
    model = randomised(VisionTransformer(**(BASE | {"num_classes": 0})))
    assert set(mdc.uniform_policy(model, 0.6).tokens) == {1.0}
    restored = mdc.uniform_policy(model, 0.6, tokens=TokenOptions(restore=True))
    assert max(restored.tokens) < 1
    assert set(mdc.uniform_policy(model, 0.9, ("tokens",)).tokens) != {1.0}  # asked for


# --- a cost of one's own ----------------------------------------------------------------------------------------------


class WidestMlp(Cost):
    """Neurons of the widest block, as what limits a device's memory."""

    name = "widest_mlp"
    rewards_dropping_tokens = False

    def price(self, costs: CostModel, kept: Kept, options: object) -> np.ndarray:
        return np.asarray(kept.units["neurons"]).max(axis=-1)


@pytest.fixture
def widest_mlp() -> Iterator[None]:
    register(WidestMlp())
    yield
    del costs.COSTS["widest_mlp"]


@pytest.mark.usefixtures("widest_mlp")
def test_a_cost_of_ones_own_limits_uniform_policies_and_the_search() -> None:
    model = make()
    policy = mdc.uniform_policy(model, mdc.Budget(widest_mlp=0.5))
    assert policy.neurons == (0.5,) * 4
    assert policy.heads == (0.5,) * 4
    assert set(policy.tokens) == {1.0}
    budget = mdc.Budget(macs=0.7, widest_mlp=100)
    assert 95 < max(mdc.uniform_policy(model, budget).neurons) * 192 <= 100
    scores = mdc.score(model, criterion="random")
    result = mdc.search(model, scores, lambda slim: 1.0, budget, 6, options=mdc.SearchOptions(progress=False))
    for trial in result.history:
        assert max(trial.policy.neurons) * 192 <= 100
        assert trial.macs <= 0.7 * mdc.macs(model)
    with pytest.raises(BudgetError, match=r"smallest reachable cost 0\.0052.* of this model"):
        mdc.uniform_policy(model, mdc.Budget(widest_mlp=0.001))
    with pytest.raises(BudgetError, match=r"widest_mlp=-1: expected a fraction"):
        mdc.Budget(widest_mlp=-1)


def test_a_cost_that_nobody_knows_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"Budget\(widest_mlp=...\): known limits are latency, macs, params"):
        mdc.Budget(widest_mlp=0.5)
