"""Latency as a budget: what a table says of a policy, that searches hold to it, and how a table is made and kept."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lightning_mdc as mdc
from lightning_mdc.budget import measure_latency_table, measuring
from lightning_mdc.budget.cost_model import CostModel, Kept, TokenDrop
from lightning_mdc.budget.latency_table import BlockTimes, HalfTimes, LatencyTable, Surface, architecture
from lightning_mdc.errors import BudgetError
from lightning_mdc.models import find_anatomy
from lightning_mdc.policy import Space, TokenOptions
from lightning_mdc.policy_search.policy_space import PolicySpace
from tests.kinds import DEPTH, HEADS, KINDS, POST_NORM, images, make

pytestmark = pytest.mark.slow  # CI runs them

NEURONS, TOKENS = 192, 17  # of the models in tests/kinds.py
ONCE = {"seconds": 1e-3, "progress": False}  # as few rounds as there may be


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make()


def made_up(model: nn.Module, whole: tuple[tuple[float, float], ...] = ()) -> LatencyTable:
    """Seconds that nobody measured: bilinear, so that they are known between the knots too."""
    tokens = (2, 9, TOKENS)

    def surface(units: tuple[int, ...], fixed: float, each: float) -> Surface:
        return Surface(units, tokens, tuple(tuple(fixed + each * n * kept for n in tokens) for kept in units))

    unaligned = surface((1, 95, NEURONS - 1), 2e-4, 2e-6)
    kind = BlockTimes(
        halves=(
            HalfTimes("heads", surface((0, 1, HEADS), 1e-4, 1e-5)),
            HalfTimes("neurons", surface((0, 96, NEURONS), 2e-4, 1e-6), unaligned),
        ),
        stage=surface((0, HEADS), 3e-4, 1e-6),
    )
    outside = Surface((0,), (2, TOKENS), ((5e-4, 5e-4 + 15e-6),))
    conditions = {"model": json.loads(json.dumps(architecture(find_anatomy(model)))), "batch_size": 1}
    conditions["tokens"] = {"reduction": "fuse", "restore": True}
    return LatencyTable(conditions, (kind,), (0,) * DEPTH, outside, whole)


def by_hand(heads: list[int], neurons: list[int], keep: float) -> float:
    """The sum, block by block; tokens leave after the attention of block 2 of 4."""
    total, tokens = 0.0, TOKENS
    for block in range(DEPTH):
        total += 1e-4 + 1e-5 * tokens * heads[block]
        if block == 2 and int(tokens * keep + 1e-6) < tokens:
            total += 3e-4 + 1e-6 * tokens * heads[block]
            tokens = int(tokens * keep + 1e-6) + 1
        aligned = neurons[block] % 8 == 0
        total += 2e-4 + (1e-6 if aligned else 2e-6) * tokens * neurons[block]
    return total + 5e-4 + 1e-6 * (tokens - 2)


def test_a_policy_costs_the_sum_of_its_parts_one_by_one_and_all_at_once(model):
    table, costs = made_up(model), CostModel(find_anatomy(model))
    rng = np.random.default_rng(0)
    heads = rng.integers(0, HEADS + 1, (50, DEPTH))
    neurons = rng.integers(1, NEURONS, (50, DEPTH))
    keep = rng.choice([1.0, 0.8, 0.4], 50)
    together = table.seconds(costs, Kept({"heads": heads, "neurons": neurons}, [TokenDrop(2, keep)]))
    expected = [by_hand(list(h), list(n), k) for h, n, k in zip(heads, neurons, keep, strict=True)]
    np.testing.assert_allclose(together, expected, rtol=1e-12)
    alone = [
        float(table.seconds(costs, Kept({"heads": h, "neurons": n}, [TokenDrop(2, k)])))
        for h, n, k in zip(heads, neurons, keep, strict=True)
    ]
    np.testing.assert_allclose(alone, together, rtol=1e-12)


def test_surfaces_pass_through_their_knots_and_never_fall():
    rng = np.random.default_rng(0)
    rising = np.add.outer(np.arange(4.0), np.arange(5.0) ** 2)
    exact = Surface.fitted([0, 1, 2, 5], [2, 4, 8, 16, 17], rising)
    np.testing.assert_allclose(exact.seconds, rising)  # nothing to smooth
    np.testing.assert_allclose(exact(np.array([[1], [5]]), np.array([4, 17])), rising[[1, 3]][:, [1, 4]])
    assert exact(3.5, 17) == pytest.approx((rising[2, 4] + rising[3, 4]) / 2)
    noisy = Surface.fitted([0, 1, 2, 5], [2, 4, 8, 16, 17], rng.random((4, 5)))
    values = noisy(np.linspace(0, 5, 41)[:, None], np.linspace(2, 17, 61))
    assert (np.diff(values, axis=0) > -1e-12).all()
    assert (np.diff(values, axis=1) > -1e-12).all()


def test_the_sum_is_corrected_by_whole_models(model):
    plain, costs, policy = made_up(model), CostModel(find_anatomy(model)), mdc.Policy(0.25, 0.25)
    table = replace(plain, whole=((1e-3, 1.1e-3), (2e-3, 2.4e-3), (4e-3, 4e-3)))
    assert table.of_dense(costs) == pytest.approx(1.1 * plain.of_dense(costs))
    assert table.of_policy(model, policy) == pytest.approx(1.1 * plain.of_policy(model, policy))


@pytest.mark.parametrize("round_to", [1, 8])
def test_uniform_policies_meet_a_latency(model, round_to):
    table, costs = made_up(model), CostModel(find_anatomy(model))
    dense = table.of_dense(costs)
    for fraction in (0.95, 0.8, 0.7):
        policy = mdc.uniform_policy(model, mdc.Budget(latency=fraction, table=table), space=Space(round_to=round_to))
        share = table.of_policy(model, policy) / dense
        assert fraction - 0.03 < share <= fraction
    absolute = mdc.Budget(latency=f"{0.8 * dense * 1e6:.6f} us", table=table)
    same = mdc.uniform_policy(model, mdc.Budget(latency=0.8, table=table))
    assert mdc.uniform_policy(model, absolute) == same
    both = mdc.uniform_policy(model, mdc.Budget(latency=0.8, macs=0.5, params=0.7, table=table))
    assert mdc.policy_macs(model, both) <= 0.5 * mdc.macs(model)
    assert table.of_policy(model, both) <= 0.8 * dense


def test_what_cannot_be_reached_is_said_in_the_budgets_own_terms(model):
    table = made_up(model)
    with pytest.raises(BudgetError, match=r"Budget\(latency=0\.1\) is below .* cost 0\.\d+ of.*larger batch_size"):
        mdc.uniform_policy(model, mdc.Budget(latency=0.1, table=table))
    with pytest.raises(BudgetError, match=r"latency='10us'\) is below .* cost \d\.\d+ms of"):
        mdc.uniform_policy(model, mdc.Budget(latency="10us", table=table))
    with pytest.raises(BudgetError, match="of another model"):
        mdc.uniform_policy(make("glu"), mdc.Budget(latency=0.5, table=table))
    with pytest.raises(
        BudgetError, match=r"measured with tokens={'reduction': 'fuse'.*asked for is {'reduction': 'merge'"
    ):
        mdc.uniform_policy(model, mdc.Budget(latency=0.5, table=table), tokens=TokenOptions(reduction="merge"))
    any_size = make("any_size")
    with pytest.raises(BudgetError, match=r"input_size=\(64, 64\): latency is measured at the model's own"):
        mdc.uniform_policy(any_size, mdc.Budget(latency=0.5, table=made_up(any_size)), input_size=64)


def test_a_search_holds_to_the_latency(model, tmp_path):
    table, scores = made_up(model), mdc.score(model, [images(8)], "magnitude", progress=False)
    space = PolicySpace(model, mdc.Budget(latency=0.75, table=table))
    points = space.snap(space.low + np.random.default_rng(0).random((100, len(space))) * (space.high - space.low))
    dense = table.of_dense(space.costs)
    np.testing.assert_allclose(space.prices(points)["latency"], space.utilisation(points) * 0.75 * dense)

    def worth(small: nn.Module) -> float:
        return float(sum(p.numel() for p in small.parameters()))

    how = mdc.SearchOptions(journal=tmp_path / "trials.jsonl", initial_points=4, progress=False)
    options = {"budget": mdc.Budget(latency=0.75, table=table), "options": how}
    found = mdc.search(model, scores, worth, n_trials=8, **options)
    costs = [table.of_policy(model, trial.policy) / dense for trial in found.history]
    assert max(costs) <= 0.75
    assert np.median(costs) > 0.7
    assert len(mdc.search(model, scores, worth, n_trials=9, **options).history) == 9  # it goes on


# --- measuring --------------------------------------------------------------------------------------------------------


def foreign_mlp() -> nn.Module:
    """All of whose blocks have an MLP that nothing can be cut of."""
    model = make()
    for block in model.blocks:
        block.mlp = nn.Sequential(nn.Linear(48, 192), nn.ReLU(), nn.Linear(192, 48))
    return model.eval()


MAKERS = {"post_norm": lambda: POST_NORM().eval(), "foreign_mlp": foreign_mlp}


@pytest.mark.parametrize("kind", ["vit", "swiglu_normed", "attention_pool", "post_norm", "foreign_mlp"])
def test_any_kind_of_block_is_measured(kind, tmp_path):
    model = MAKERS[kind]() if kind in MAKERS else make(kind)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    table = measure_latency_table(model, 2, cache=tmp_path, **ONCE)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    costs = CostModel(find_anatomy(model))
    assert len(table.kinds) == 1
    assert table.kind_of_block == (0,) * DEPTH
    assert (table.kinds[0].stage is None) == (kind == "post_norm")
    assert len(table.whole) == 4
    assert table.whole[0][0] == pytest.approx(float(table.sum_of_parts(costs, costs.everything)))
    # Less is less, and the parts are no small part of the whole: generous, others use this machine too.
    nothing = mdc.Policy(**{name: 0.0 for name in find_anatomy(model).dimensions if name != "tokens"})
    assert table.of_policy(model, nothing) < table.of_dense(costs)
    assert LatencyTable.from_json(table.to_json()) == table
    assert 0.2 < table.sum_of_parts(costs, costs.everything) / table.of_dense(costs) < 5


def test_blocks_of_one_width_share_their_times_and_a_slim_model_has_more(model, tmp_path):
    policy = mdc.Policy([1, 0.5, 0.5, 1], 1.0, [1, 0.5, 1])
    slim = mdc.slim(model, mdc.make_plan(model, mdc.score(model, criterion="random"), policy))
    table = measure_latency_table(slim, 2, cache=tmp_path, **ONCE)
    assert table.kind_of_block == (0, 1, 1, 0)
    assert [kind.halves[0].aligned.units[-1] for kind in table.kinds] == [4, 2]
    assert table.conditions["tokens"] == {"reduction": "fuse", "restore": True}
    assert table.of_policy(slim, mdc.Policy(0.5, 0.5)) < table.of_dense(CostModel(find_anatomy(slim)))


def test_a_table_is_kept_and_a_damaged_one_is_made_anew(model, tmp_path, monkeypatch, caplog):
    table, made = made_up(model), []

    def measured(model, device, conditions, *_):
        made.append(1)
        return replace(table, conditions=conditions)

    monkeypatch.setattr(measuring, "_measured_table", measured)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = measure_latency_table(model)
    assert measure_latency_table(model) == first
    assert len(made) == 1
    (path,) = (tmp_path / "lightning_mdc" / "latency").glob("*.json")
    path.write_text(path.read_text()[:-40])
    with caplog.at_level(logging.WARNING):
        assert measure_latency_table(model) == first
    assert "is damaged" in caplog.text
    assert len(made) == 2
    for device in ("mps", "xpu", "cuda:99"):  # never another device's times
        with pytest.raises(BudgetError, match=f"device='{device}'"):
            measure_latency_table(model, device=device)
    # Another batch size, dtype or width is another table.
    measure_latency_table(model, 2)
    measure_latency_table(make().double())
    measure_latency_table(make("glu"))
    measure_latency_table(model, tokens=TokenOptions(reduction="drop"))
    with torch.device("meta"):
        assert measure_latency_table(KINDS["vit"]()) == first
    assert len(made) == 6
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        assert measure_latency_table(model, cache=tmp_path / "file") == first
    assert "cannot be kept" in caplog.text


def test_tables_travel_as_files(model, tmp_path):
    table = made_up(model, ((1e-3, 1e-3), (2e-3, 3e-3)))
    table.save(tmp_path / "device.json")
    assert LatencyTable.load(tmp_path / "device.json") == table
    by_file = mdc.uniform_policy(model, mdc.Budget(latency=0.8, table=tmp_path / "device.json"))
    assert by_file == mdc.uniform_policy(model, mdc.Budget(latency=0.8, table=table))
    fields = json.loads(table.to_json())
    assert LatencyTable.from_fields(fields) == table
    for key, value in (("format", 2), ("kinds", []), ("outside", None), ("whole", [[1, 0]])):
        with pytest.raises(BudgetError, match="latency table"):
            LatencyTable.from_fields({**fields, key: value})
    for text in ("[1]", "{", "null", json.dumps({**fields, "kind_of_block": [7]})):
        Path(tmp_path / "device.json").write_text(text)
        with pytest.raises(BudgetError, match="latency table"):
            LatencyTable.load(tmp_path / "device.json")
