"""Points, the way onto a budget, and the search over them: against grids, brute force and formulas written out here."""

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from lightning_mdc.errors import BudgetError, SearchError
from lightning_mdc.gp_ei.process import GpEi, Observation, Trend
from lightning_mdc.gp_ei.projection import Constraint, Projection
from lightning_mdc.gp_ei.space import Axis, Space

MIXED = Space(
    [
        Axis("width", 0.1, 0.9, step=0.1),
        Axis("layers", 1, 8, step=1, integer=True),
        Axis("lr", 1e-5, 1e-1, log=True),
        Axis("batch", 1, 8, step=1, log=True, integer=True),
        Axis("dropout", 0.0, 0.5),
        Axis("norm", choices=("layer", "rms", None, 3, True)),
        Axis("fixed", 2.0, 2.0),
    ]
)


def drawn(space: Space, count: int, seed: int = 0) -> np.ndarray:
    return space.snap(space.from_unit(np.random.default_rng(seed).random((count, len(space)))))


# --- points -----------------------------------------------------------------------------------------------------------


def test_snapped_numbers_are_the_next_lower_on_the_grid() -> None:
    space = Space([Axis("x", 0.1, 0.95, step=0.1)])
    grid = [0.1 + 0.1 * k for k in range(9)]  # 0.95 is not on it
    for x in [*np.linspace(0.1, 0.95, 57), 0.3, 0.7, 0.1 + 0.1 + 0.1]:
        assert space.snap(np.array([[x]]))[0, 0] == pytest.approx(max(g for g in grid if g <= x + 1e-9))
    assert space.snap(np.array([[-3.0], [7.0]])).ravel() == pytest.approx([0.1, 0.9])


def test_the_unit_cube_reaches_every_value_by_its_share() -> None:
    points = drawn(MIXED, 20_000)
    for name, values in (("width", 9), ("layers", 8), ("norm", 5)):
        column = points[:, [axis.name for axis in MIXED.axes].index(name)]
        found, counts = np.unique(np.round(column, 9), return_counts=True)
        assert len(found) == values
        assert (abs(counts / 20_000 - 1 / values) < 0.05).all()
    batches, counts = np.unique(points[:, 3], return_counts=True)
    # On a log scale 8 is to 9 as ln(9/8) to ln 9.
    assert counts / 20_000 == pytest.approx(np.log((batches + 1) / batches) / np.log(9), abs=0.02)
    decades = np.histogram(np.log10(points[:, 2]), bins=[-5, -4, -3, -2, -1])[0] / 20_000
    assert decades == pytest.approx(0.25, abs=0.02)


def test_points_survive_the_unit_cube_and_their_names() -> None:
    points = drawn(MIXED, 300)
    there_and_back = MIXED.snap(MIXED.from_unit(MIXED.to_unit(points)))
    assert there_and_back == pytest.approx(points, rel=1e-9)
    assert (MIXED.snap(points) == points).all()
    for point in points[:50]:
        params = MIXED.params(point)
        assert isinstance(params["layers"], int)
        assert isinstance(params["batch"], int)
        assert params["norm"] in ("layer", "rms", None, 3, True)
        assert (MIXED.point(params) == point).all()
    assert MIXED.params(np.array([0.1, 1, 1e-3, 1, 0, 4, 2]))["norm"] is True
    assert MIXED.params(np.array([0.1, 1, 1e-3, 1, 0, 3, 2]))["norm"] == 3


def test_what_the_process_sees() -> None:
    point = MIXED.point(
        {"width": 0.1, "layers": 8, "lr": 1e-3, "batch": 8, "dropout": 0.125, "norm": None, "fixed": 2.0}
    )
    encoded = MIXED.encode(point[None])[0]
    assert encoded == pytest.approx([0, 1, 0.5, 1, 0.25, 0, 0, 1, 0, 0, 0])


def test_equal_points_have_equal_keys() -> None:
    space = Space([Axis("x", -1, 1), Axis("decay", 1e-14, 1e-4, log=True)])
    here, also_here, elsewhere, tiny = space.keys(
        np.array([[0.0, 1e-6], [-1e-13, 1e-6 * (1 + 1e-13)], [0.01, 1e-6], [0.0, 1e-13]])
    )
    assert here == also_here
    assert len({here, elsewhere, tiny}) == 3  # 1e-13 and 1e-6 are far apart, on their scale


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Axis("x", choices=()), r"x: choice\(\) is empty"),
        (lambda: Axis("x", choices=("a", "a")), "names a value twice"),
        (lambda: Axis("x", 2, 1), r"x: the range \[2, 1\] is empty"),
        (lambda: Axis("x", 0, math.inf), "empty|finite"),
        (lambda: Axis("x", 0, 1, log=True), "above 0.*starts at 0"),
        (lambda: Axis("x", 0, 1, step=-0.1), "step=-0.1"),
        (lambda: Space([]), "at least one parameter"),
        (lambda: Space([Axis("x"), Axis("x")]), r"each once.*\['x', 'x'\]"),
        (lambda: MIXED.point({"width": 0.5}), r"\['width'\] are not those"),
        (lambda: MIXED.axes[0].number(1.5), r"width=1.5 is no number in \[0.1, 0.9\]"),
        (lambda: MIXED.axes[0].number(math.nan), "width=nan"),
        (lambda: MIXED.axes[0].number("0.5"), "width='0.5'"),
        (lambda: MIXED.axes[5].number("group"), "norm='group' is none of"),
        (lambda: MIXED.axes[5].number(1), "norm=1 is none of"),
    ],
)
def test_what_is_no_space_or_point_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        make()


# --- on the budget ----------------------------------------------------------------------------------------------------

COSTLY = Space(
    [
        Axis("heads", 1, 6, step=1, integer=True),
        Axis("neurons", 8, 64, step=1, integer=True),
        Axis("stride", 1, 4, step=1, integer=True),  # the longer, the cheaper
        Axis("lr", 1e-4, 1e-1, log=True),  # costs nothing
        Axis("act", choices=("gelu", "relu")),  # costs nothing
    ]
)


def cost(points: np.ndarray) -> list[float]:
    """One at a time, in plain Python: a user's own function need not know numpy."""
    return [(40 * heads + neurons + 0.5 * heads * neurons) / stride for heads, neurons, stride, *_ in points.tolist()]


def test_every_point_is_on_the_budget_and_no_unit_more_fits() -> None:
    rng = np.random.default_rng(0)
    for target in (30.0, 85.3, 160.0, 400.0):
        project = Projection(COSTLY, Constraint(cost, target))
        assert project.slope.tolist() == [1, 1, -1, 0, 0]
        unit = rng.random((200, 5))
        points = project(unit)
        filled = project.fill(points, rng)
        assert max(cost(points)) <= target
        assert max(cost(filled)) <= target
        free = COSTLY.snap(COSTLY.from_unit(unit))[:, 3:]
        assert (points[:, 3:] == free).all()  # neither way touches what costs nothing
        assert (filled[:, 3:] == free).all()
        assert (COSTLY.snap(filled) == filled).all()
        for point, axis in itertools.product(filled, range(3)):
            more = point.copy()
            more[axis] += project.slope[axis]
            inside = COSTLY.low[axis] <= more[axis] <= COSTLY.high[axis]
            assert not inside or cost(more[None])[0] > target, (point, axis)


def test_a_budget_for_everything_or_for_next_to_nothing() -> None:
    unit = np.random.default_rng(0).random((50, 5))
    everything = Projection(COSTLY, Constraint(cost, 1e9))
    assert (everything.fill(everything(unit), np.random.default_rng(0))[:, :3] == [6, 64, 1]).all()
    least = min(cost(np.array([[1, 8, 4, 1e-3, 0]])))
    nothing = Projection(COSTLY, Constraint(cost, least))
    assert (nothing(unit)[:, :3] == [1, 8, 4]).all()


def test_continuous_axes_meet_a_tolerance() -> None:
    space = Space([Axis("x"), Axis("y", 0, 2), Axis("free", -5, 5)])
    constraint = Constraint(lambda points: points[:, 0] + points[:, 1] ** 2, 1.3, tolerance=0.001)
    points = Projection(space, constraint)(np.random.default_rng(0).random((300, 3)))
    assert constraint.holds(constraint.cost(points)).all()
    assert np.ptp(points[:, 0]) > 0.8
    assert np.ptp(points[:, 2]) > 9


def test_choices_that_cost_are_met_by_the_others_or_dropped() -> None:
    space = Space([Axis("size", choices=("small", "large")), Axis("x"), Axis("y")])
    constraint = Constraint(lambda points: (1 + 3 * points[:, 0]) * (0.3 + points[:, 1] + points[:, 2]), 1.1)
    points = Projection(space, constraint)(np.random.default_rng(0).random((200, 3)))
    holds = constraint.holds(constraint.cost(points))
    assert (holds == (points[:, 0] == 0)).all()  # the large ones start at 1.2
    search = GpEi(space, constraint, n_initial_points=3, n_candidates=100)
    for _ in range(6):
        point = search.ask()[0]
        assert constraint.holds(constraint.cost(point)).all()
        search.tell(point, [float(point.sum())])


def test_an_unreachable_target_says_what_is_reachable() -> None:
    with pytest.raises(BudgetError, match=r"target=12 is below the smallest cost inside the bounds, 13;"):
        Projection(COSTLY, Constraint(cost, 12.0))
    with pytest.raises(BudgetError, match=r"target=1000 with tolerance=10 is above the largest .*, 496;"):
        Projection(COSTLY, Constraint(cost, 1000.0, tolerance=10.0))


# --- the search -------------------------------------------------------------------------------------------------------

SUM_SPACE = Space([Axis(name, 0, 1, step=0.05) for name in ("a", "b", "c")])
SUM = Constraint(lambda points: points.sum(axis=1), 1.5)


def hill(points: np.ndarray) -> np.ndarray:
    """Best at (0.8, 0.5, 0.2), where the budget of 1.5 is just met."""
    return 10 - 30 * ((np.atleast_2d(points) - [0.8, 0.5, 0.2]) ** 2).sum(axis=1)


def searched(search: GpEi, trials: int, value: Any = hill, batch: int = 1) -> list[list[float]]:
    while len(search.history) < trials:
        points = search.ask(batch)[0]
        search.tell(points, value(points))
    return [[*o.point.tolist(), o.value] for o in search.history]  # type: ignore[list-item]


def small(seed: int = 0, **kwargs: Any) -> GpEi:
    return GpEi(SUM_SPACE, SUM, **({"seed": seed, "n_initial_points": 4, "n_candidates": 120} | kwargs))


def test_the_seed_decides() -> None:
    assert searched(small(0), 9) == searched(small(0), 9)
    assert searched(small(0), 9) != searched(small(1), 9)


@pytest.mark.slow
def test_told_again_it_goes_on_the_same_way() -> None:
    """63 and more: the kernel is then fitted to the first 60 only, whenever that happens."""
    space = Space([Axis(name, 0, 1, step=0.01) for name in ("a", "b", "c")])
    search, asked = GpEi(space, SUM, n_candidates=60), []
    for number in range(64):
        asked.append(search.ask()[0])
        search.tell(asked[-1], [None] if number == 7 else hill(asked[-1]))
    for known in (0, 12, 63):
        again = GpEi(space, SUM, n_candidates=60)
        for observation in search.history[:known]:
            again.tell(observation.point, [observation.value])
        assert (again.ask()[0] == asked[known]).all()
    again = GpEi(space, SUM)
    again.tell(np.array([o.point for o in search.history]), [o.value for o in search.history])
    points = drawn(space, 20)
    assert (again.model().predict(points) == search.model().predict(points)).all()


# --- what is known beforehand -----------------------------------------------------------------------------------------


def test_a_trend_is_found_and_leaves_the_rest() -> None:
    points = np.random.default_rng(0).random((30, 4))
    losses = 3 + 2 * points[:, 0] - points[:, 1]
    trend = Trend(points, losses, lambda points: np.stack([points[:, 0], points[:, 1], np.ones(len(points))], axis=1))
    better = losses <= np.median(losses)
    assert (trend.bent(losses)[better] == losses[better]).all()
    assert (trend.bent(losses)[~better] < losses[~better]).all()
    assert (np.argsort(trend.bent(losses)) == np.argsort(losses)).all()
    np.testing.assert_allclose(trend.unbent(trend.bent(losses)), losses)
    # Of losses that are nearly straight, a straight line leaves hardly anything.
    assert np.ptp(trend.rest(points, losses)) < 0.15 * np.ptp(losses)
    far = trend.unbent(np.array([losses.max() + 1e6]))  # nothing tells how bad
    np.testing.assert_allclose(far, losses.max())
    none = Trend(points, losses, None)
    assert (none.rest(points, losses) == losses).all()
    assert not none.at(points).any()


def test_a_trend_needs_more_trials_than_features() -> None:
    points = np.random.default_rng(0).random((3, 4))
    trend = Trend(points, points[:, 0], lambda points: points)
    assert not trend.at(points).any()
    alike = Trend(points, points[:, 0], lambda points: np.full((len(points), 1), 0.3))
    assert not alike.at(points).any()
    assert Trend(points, np.ones(3), lambda points: points).bent(5.0) == 5.0  # all alike: nothing to bend about


def test_losses_of_another_budget_do_not_say_which_are_good() -> None:
    own, prior = np.linspace(0.9, 1.0, 12), np.linspace(0.0, 0.1, 24)  # a larger budget's
    losses = np.concatenate([prior, own])
    trend = Trend(losses[:, None], losses, lambda points: points, prior=24)
    better = own <= np.median(own)
    assert (trend.bent(own)[better] == own[better]).all()


def test_what_is_known_beforehand_is_worth_many_trials() -> None:
    """Twelve axes, a value that mostly follows what is known of them: few trials then come as far as many without."""
    space, weights = Space([Axis(f"x{n}", 0, 1) for n in range(12)]), np.linspace(0.2, 2, 12)

    def value(points: np.ndarray) -> list[float]:
        return list(-(weights * (points - 0.7) ** 2).sum(axis=1) - 0.05 * np.sin(9 * points).sum(axis=1))

    def known(points: np.ndarray) -> np.ndarray:
        return ((points - 0.7) ** 2 * weights).sum(axis=1, keepdims=True)

    found = []
    for trend in (None, known):
        search = GpEi(space, seed=1, n_initial_points=8, n_candidates=300, trend=trend)
        searched(search, 20, value)
        assert search.best is not None
        found.append(search.best.value)
    assert found[1] > found[0] / 2 + 0.1  # values are below 0


def test_told_again_a_search_with_a_trend_goes_on_the_same_way() -> None:
    def trended() -> GpEi:
        return small(trend=lambda points: points[:, :2])

    search = trended()
    searched(search, 9)
    again = trended()
    again.tell(np.array([o.point for o in search.history]), [o.value for o in search.history])
    assert (again.ask(2)[0] == search.ask(2)[0]).all()


def test_a_batch_is_what_asking_one_by_one_gives() -> None:
    for known in (2, 3, 6):  # before, across and after the end of the initial points
        search = small(first=np.array([[0.5, 0.5, 0.5]]))
        searched(search, known)
        batch = search.ask(4)[0]
        assert len({*SUM_SPACE.keys(batch)}) == 4
        for i in range(4):
            assert (search.ask(1, pending=batch[:i] if i else None)[0] == batch[i]).all()


def test_a_batch_is_spread_out() -> None:
    """Each point is chosen as if those before it had turned out as expected; else they would lie together."""
    nearest = []
    for seed in range(4):
        search = GpEi(Space([Axis("a"), Axis("b")]), seed=seed, n_initial_points=5, n_candidates=300)
        searched(search, 8, lambda points: -10 * ((points - 0.5) ** 2).sum(axis=1))
        batch = search.ask(4)[0]
        nearest.append(min(np.linalg.norm(a - b) for a, b in itertools.combinations(batch, 2)))
    assert np.mean(nearest) > 0.1


def test_nothing_is_asked_twice_and_a_small_space_comes_to_an_end() -> None:
    space = Space([Axis("n", 1, 4, step=1, integer=True), Axis("kind", choices=("a", "b", "c"))])
    search = GpEi(space, n_initial_points=3, n_candidates=200)
    pending = space.point({"n": 2, "kind": "b"})[None]
    seen = {*space.keys(pending)}
    for count in (5, 5, 1, 0, 0):
        points = search.ask(5, pending)[0]
        assert len(points) == count
        assert points.shape == (count, 2)
        assert not seen & {*space.keys(points)}
        seen |= {*space.keys(points)}
        search.tell(points, [None if i == 1 else float(point[0]) for i, point in enumerate(points)])
    assert len(seen) == 12
    assert (search.ask(5)[0] == pending).all()  # it was never told


@pytest.mark.parametrize("failed", [None, math.nan, math.inf, -math.inf])
def test_failures_never_reach_the_process(failed: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from skopt.learning import GaussianProcessRegressor

    fitted, fit = [], GaussianProcessRegressor.fit

    def watched(self: Any, X: np.ndarray, y: np.ndarray) -> Any:
        fitted.append(y)
        assert np.isfinite(X).all()
        assert np.isfinite(y).all()
        return fit(self, X, y)

    monkeypatch.setattr(GaussianProcessRegressor, "fit", watched)
    search = small()
    searched(search, 12, lambda points: [failed if point[0] > 0.6 else hill(point)[0] for point in points])
    values = {o.value for o in search.history}
    assert None in values
    # One process learns values, another which trials worked.
    assert {"value" if {*-y} <= values else "worked" if {*y} <= {0.0, 1.0} else "?" for y in fitted} == {
        "value",
        "worked",
    }
    assert search.best is not None
    assert math.isfinite(search.best.value)  # type: ignore[arg-type]


@pytest.mark.slow
def test_where_trials_fail_is_avoided() -> None:
    """Half of the space fails; the best point of the other half is far from the edge."""
    early, late = [], []
    for seed in range(3):
        search = GpEi(Space([Axis(name) for name in "abc"]), seed=seed, n_initial_points=8, n_candidates=200)
        searched(search, 28, lambda points: [None if p[0] > 0.5 else -((p - 0.3) ** 2).sum() for p in points])
        failed = [o.value is None for o in search.history]
        early, late = early + failed[:8], late + failed[16:]
        assert search.best is not None
        assert search.best.point == pytest.approx([0.3, 0.3, 0.3], abs=0.1)
    assert np.mean(early) > 0.3
    assert np.mean(late) < 0.2


def test_a_best_point_at_the_edge_of_what_works_is_found() -> None:
    search = GpEi(Space([Axis("a"), Axis("b")]), n_initial_points=8, n_candidates=200)
    searched(search, 25, lambda points: [None if a > 0.5 else a + 0.1 * b for a, b in points])
    assert search.best is not None
    assert 0.55 < search.best.value < 0.6  # type: ignore[operator]


def test_nothing_but_failures_and_nothing_but_ties() -> None:
    search = small()
    searched(search, 8, lambda points: [None] * len(points))
    assert search.best is None
    assert search.model() is None
    informed = small(prior=[Observation(np.zeros(3), 1.0), Observation(np.ones(3), 2.0)], n_initial_points=1)
    assert len({tuple(row) for row in searched(informed, 5, lambda points: [None] * len(points))}) == 5
    ties = small()
    history = searched(ties, 12, lambda points: [3.0] * len(points))
    assert len({tuple(row) for row in history}) == 12
    assert (ties.best.point == ties.history[0].point).all()  # type: ignore[union-attr]


def test_minimising_is_maximising_the_negative() -> None:
    highest = searched(small(), 10)
    lowest = searched(small(direction="minimize"), 10, lambda points: -hill(points))
    assert [row[:3] for row in highest] == [row[:3] for row in lowest]


def test_it_beats_chance() -> None:
    def best(search: GpEi) -> float:
        return max(row[-1] for row in searched(search, 20))

    ours = [best(small(seed)) for seed in range(3)]
    chance = [best(small(seed, n_initial_points=99)) for seed in range(3)]
    assert np.mean(ours) > np.mean(chance) + 0.2
    assert min(ours) > 9.9


def test_first_points_come_first_if_they_are_on_the_budget() -> None:
    first = np.array([[0.5, 0.5, 0.5], [1.0, 1.0, 1.0], [0.2, 0.2, 0.2]])
    history = searched(small(first=first), 3)
    assert history[0][:3] == pytest.approx([0.5, 0.5, 0.5])
    assert history[1][:3] == pytest.approx([0.2, 0.2, 0.2])
    assert sum(history[2][:3]) == pytest.approx(1.5)


def test_what_is_known_from_elsewhere_helps_and_is_no_trial() -> None:
    elsewhere = np.random.default_rng(3).uniform(0, 1.2, (25, 3))  # of a larger budget, with wider bounds
    prior = [Observation(point, float(hill(point)[0])) for point in elsewhere]
    informed = [small(seed, prior=prior) for seed in range(3)]
    assert all(search.best is None and search.history == () for search in informed)
    assert max(o.value for o in prior) < 9  # type: ignore[type-var]
    for search in informed:
        assert all(row[-1] > 9 for row in searched(search, 3))  # from the first trial on
        assert search.best is not None
        assert search.best.value in [o.value for o in search.history]


def test_expected_improvement_is_the_textbook_formula() -> None:
    search = small(xi=0.1)
    searched(search, 9)
    losses = np.array([-o.value for o in search.history])  # type: ignore[operator]
    points = drawn(SUM_SPACE, 50)
    mean, std = search.model().predict(SUM_SPACE.encode(points), return_std=True)
    better = losses.min() - 0.1 - mean
    expected = np.where(
        std > 0,
        better * norm.cdf(better / np.maximum(std, 1e-300)) + std * norm.pdf(better / np.maximum(std, 1e-300)),
        0,
    )
    assert search._improvement(search.model(), points, losses) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    told = np.array([o.point for o in search.history])
    assert search.model().predict(SUM_SPACE.encode(told)) == pytest.approx(losses, abs=0.05)


def test_no_warning_reaches_the_user() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search = small()
        searched(search, 9, lambda points: [1.0 if point[0] < 0.5 else None for point in points])
        search.ask(3)
        search.model().predict(SUM_SPACE.encode(drawn(SUM_SPACE, 5)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"direction": "up"}, "direction='up'"),
        ({"seed": -1}, "seed=-1"),
        ({"n_initial_points": 0}, "n_initial_points=0"),
        ({"n_candidates": 1.5}, "n_candidates=1.5"),
        ({"xi": -0.1}, "xi=-0.1"),
    ],
)
def test_arguments_out_of_range(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        GpEi(SUM_SPACE, **kwargs)


def test_values_for_other_points_are_refused() -> None:
    with pytest.raises(SearchError, match=r"2 values for points of shape \(1, 3\)"):
        small().tell(np.zeros((1, 3)), [1.0, 2.0])
