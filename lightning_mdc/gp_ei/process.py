"""Bayesian optimisation on a budget: a Gaussian process, expected improvement, and candidates that all cost the same.

numpy and scikit-optimize only. The Gaussian process (Matern 5/2, one length scale per axis, fitted noise) and expected
improvement are scikit-optimize's. Its `Optimizer` is not used: it would look for its next point over the whole box,
where hardly any point is on the budget, and refit the process for every point of a batch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm

from lightning_mdc.errors import SearchError, check_number, check_one_of, check_whole
from lightning_mdc.gp_ei.projection import Constraint, Projection
from lightning_mdc.gp_ei.space import Space

DIRECTIONS = ("maximize", "minimize")
# Up to this many observations the kernel is fitted to all of them, then to the last whole ten.
_FIT_ALWAYS, _FIT_EVERY = 50, 10
# Candidates that are filled up and compared again, and the best points that local candidates start from.
_FINALISTS, _PARENTS = 16, 5
_SMALLEST_MOVE, _LARGEST_MOVE = 0.005, 0.3
_FEWEST_OWN = 3  # losses that tell which ones are good


@dataclass(frozen=True)
class Observation:
    """A point (axes,) and what it was worth; None if its trial failed."""

    point: np.ndarray
    value: float | None


class GpEi:
    """Ask where to look next, tell what was found there.

    What it asks is a pure function of seed and history: told the same again, it goes on the same way.

    Args:
        space: what may be moved.
        constraint: what a point may cost; None: anything.
        direction: ``"maximize"`` or ``"minimize"``.
        seed: of the candidates and of the kernel's fit.
        n_initial_points: how many points to try before the Gaussian process is believed.
        first: points (n, axes) to try before any other, where the constraint holds; no more than `n_initial_points`.
        prior: observations from elsewhere, another budget's search say; they inform the process, but are no trials.
        trend: what is known of points (n, axes) beforehand, (n, features). The Gaussian process then learns what a
            linear trend in these leaves unexplained (regression kriging); how bad the worse half of the points is
            counts by its logarithm, so that the trend is that of the better ones. See `Trend`.
        n_candidates: how many points expected improvement is compared at.
        xi: by how much a point has to be better to count, in units of the value.

    Raises:
        SearchError: an argument is out of range.
        BudgetError: see `Projection`.
    """

    def __init__(
        self,
        space: Space,
        constraint: Constraint | None = None,
        *,
        direction: str = "maximize",
        seed: int = 0,
        n_initial_points: int = 10,
        first: np.ndarray | None = None,
        prior: Sequence[Observation] = (),
        trend: Callable[[np.ndarray], np.ndarray] | None = None,
        n_candidates: int = 2000,
        xi: float = 0.0,
    ) -> None:
        check_one_of("direction", direction, DIRECTIONS, SearchError)
        for name, count, least in (
            ("seed", seed, 0),
            ("n_initial_points", n_initial_points, 1),
            ("n_candidates", n_candidates, 2),
        ):
            check_whole(name, count.item() if isinstance(count, np.integer) else count, least, SearchError)
        if seed >= 2**32:  # scikit-learn takes no other
            raise SearchError(f"seed={seed}: expected a whole number below 2^32")
        check_number("xi", xi, "a margin in units of the value", SearchError, least=0)
        self.space, self.constraint, self.direction = space, constraint, direction
        self.seed, self.n_initial_points, self.n_candidates = int(seed), int(n_initial_points), int(n_candidates)
        self.xi, self._features = float(xi), trend
        self._project = None if constraint is None else Projection(space, constraint, seed)
        known = np.empty((0, len(space))) if first is None else space.snap(np.asarray(first, dtype=np.float64))
        self._first = known[: self.n_initial_points]
        self.prior = tuple(prior)  # not scaled down to this space's bounds
        self._history: list[Observation] = []
        self._kernels: dict[str, tuple[int, Any, float]] = {}  # by target, fitted to so many points: kernel and noise

    # --- what is known --------------------------------------------------------------------------------------------

    @property
    def history(self) -> tuple[Observation, ...]:
        """Everything told, in order."""
        return tuple(self._history)

    @property
    def best(self) -> Observation | None:
        """The best point told, the first of equals; None as long as no trial has succeeded."""
        return min(_worked(self._history), key=self._loss, default=None)

    def tell(self, points: np.ndarray, values: Sequence[float | None]) -> None:
        """Report points (n, axes) and their values. None, NaN or infinity: the trial failed.

        A failed trial has no value for the process to learn from; its neighbourhood is avoided.
        """
        points = self.space.snap(np.atleast_2d(np.asarray(points, dtype=np.float64)))
        if points.shape != (len(values), len(self.space)):
            raise SearchError(
                f"tell: {len(values)} values for points of shape {points.shape}; expected ({len(values)}, "
                f"{len(self.space)})"
            )
        for point, value in zip(points, values, strict=True):
            worked = value is not None and math.isfinite(value)
            self._history.append(Observation(point, float(value) if worked else None))  # type: ignore[arg-type]

    def _known(self) -> list[Observation]:
        """What the process learns from."""
        return _worked((*self.prior, *self._history))

    def _loss(self, observation: Observation) -> float:
        assert observation.value is not None
        return observation.value if self.direction == "minimize" else -observation.value

    # --- where to look next ---------------------------------------------------------------------------------------

    def ask(self, n: int = 1, pending: np.ndarray | None = None) -> tuple[np.ndarray, tuple[float | None, ...]]:
        """The next points (n, axes) to try, none of them tried, pending or asked twice, and the expected improvement
        of each, in units of the value; None of one that was drawn.

        Fewer than `n`, perhaps none, when no other point can be found: a small space has all been tried.

        Args:
            n: how many, to be tried at the same time.
            pending: points (m, axes) that are being tried.
        """
        waiting = [] if pending is None else [*self.space.snap(np.atleast_2d(pending))]
        asked: list[np.ndarray] = []
        improvements: list[float | None] = []
        while len(asked) < n and (chosen := self._next([*waiting, *asked])) is not None:
            asked.append(chosen[0])
            improvements.append(chosen[1])
        return np.array(asked).reshape(-1, len(self.space)), tuple(improvements)

    def _next(self, waiting: Sequence[np.ndarray]) -> tuple[np.ndarray, float | None] | None:
        """One more point while others are under way, and its expected improvement; None if none is left that is new."""
        seen = {*self.space.keys(np.array([*(o.point for o in self._history), *waiting]).reshape(-1, len(self.space)))}
        if len(first := self._unseen(self._first, seen)):
            return first[0], None
        rng = np.random.default_rng([self.seed, len(self._history), len(waiting)])
        process, losses = None, np.empty(0)
        if len(self._known()) >= 2 and len(self._history) + len(waiting) >= self.n_initial_points - len(self.prior):
            process, losses = self._believing(waiting)
        pool = rng.random((self.n_candidates, len(self.space))) if process is None else self._candidates(rng)
        pool = self.space.snap(self.space.from_unit(pool)) if self._project is None else self._project(pool)
        pool = self._best_first(process, self._unseen(pool, seen), losses)[:_FINALISTS]
        filled = self._project.fill(pool, rng) if self._project is not None and len(pool) else pool
        for finalists in (filled, pool):  # filled up, unless those have all been tried
            if len(finalists := self._best_first(process, self._unseen(finalists, seen), losses)):
                best = finalists[:1]
                return best[0], None if process is None else float(self._improvement(process, best, losses)[0])
        return None

    def _best_first(self, process: Any, points: np.ndarray, losses: np.ndarray) -> np.ndarray:
        """Points (n, axes) by expected improvement; as they come without a process."""
        if process is None or not len(points):
            return points
        return points[np.argsort(-self._improvement(process, points, losses), kind="stable")]

    def _unseen(self, points: np.ndarray, seen: set[bytes]) -> np.ndarray:
        """Points on the budget that are new, each once, in order."""
        if self.constraint is not None and len(points):
            points = points[self.constraint.holds(np.asarray(self.constraint.cost(points)))]
        new = {key: i for i, key in reversed([*enumerate(self.space.keys(points))]) if key not in seen}
        return points[sorted(new.values())]

    def _candidates(self, rng: np.random.Generator) -> np.ndarray:
        """Half anywhere, half near the best points so far: big and small moves, of few or many coordinates."""
        half, axes = self.n_candidates // 2, len(self.space)
        anywhere = rng.random((self.n_candidates - half, axes))
        # A prior's points, of another budget, only where there is nothing else to go by.
        ranked = sorted(_worked(self._history) or _worked(self.prior), key=self._loss)[:_PARENTS]
        parents = self.space.to_unit(np.array([o.point for o in ranked]))
        near = parents[rng.integers(len(parents), size=half)]
        scale = np.exp(rng.uniform(np.log(_SMALLEST_MOVE), np.log(_LARGEST_MOVE), size=(half, 1)))
        share = np.exp(rng.uniform(np.log(1 / axes), 0.0, size=(half, 1)))
        moved = rng.random((half, axes)) < share
        moved[np.arange(half), rng.integers(axes, size=half)] = True
        # A choice has no neighbours: any other value is as near.
        to = np.where(self.space.numeric, near + scale * rng.standard_normal((half, axes)), rng.random((half, axes)))
        near = np.where(moved, np.clip(to, 0.0, 1.0), near)
        return np.concatenate([anywhere, near])

    def _believing(self, waiting: Sequence[np.ndarray]) -> tuple[Any, np.ndarray]:
        """The process and the losses it knows, (n,).

        What is under way is believed to turn out as expected (kriging believer, Ginsbourger et al. 2010).
        """
        known = self._known()
        points, losses = np.array([o.point for o in known]), np.array([self._loss(o) for o in known])
        process = self._process("loss", points, losses, len(known))
        for point in waiting:
            believed = process.expected(point[None])
            points, losses = np.concatenate([points, point[None]]), np.concatenate([losses, believed])
            process = self._process("loss", points, losses, len(known))
        return process, losses

    def _improvement(self, process: Any, points: np.ndarray, losses: np.ndarray) -> np.ndarray:
        """Expected improvement times the chance that the trial succeeds, (n,)."""
        from skopt.acquisition import gaussian_ei

        # To be improved on is what this search found, not what another one did on a larger budget.
        own = losses[len(_worked(self.prior)) :]
        with _quiet():
            best = process.trend.bent(own.min()) if len(own) else process.predict(points).min()
            improvement = gaussian_ei(points, process, best, self.xi)
        if all(o.value is not None for o in self._history):
            return improvement
        # Another process has learnt where trials fail: from 1 (worked) and 0.
        worked = np.array([float(o.value is not None) for o in self._history])
        success = self._process("success", np.array([o.point for o in self._history]), worked, len(worked))
        with _quiet():
            mean, std = success.predict(points, return_std=True)
        return improvement * norm.cdf((mean - 0.5) / np.maximum(std, 1e-9))

    # --- Gaussian processes ---------------------------------------------------------------------------------------

    def _process(self, about: str, points: np.ndarray, targets: np.ndarray, told: int) -> Belief:
        """The process given these targets (n,) of points (n, axes), the first `told` of which are no beliefs."""
        from skopt.learning import GaussianProcessRegressor

        beyond = max(0, told - _FIT_ALWAYS)
        kernel, noise = self._fitted_kernel(about, points[: told - beyond % _FIT_EVERY], targets)
        trend = self._trend(about, points[:told], targets[:told])
        process = GaussianProcessRegressor(
            kernel=kernel, alpha=max(noise, 1e-10), optimizer=None, normalize_y=True, random_state=self.seed
        )
        with _quiet():
            return Belief(process.fit(self.space.encode(points), trend.rest(points, targets)), self.space, trend)

    def _trend(self, about: str, points: np.ndarray, targets: np.ndarray) -> Trend:
        """Of the losses; whether a trial works has none."""
        prior = len(_worked(self.prior))
        return Trend(points, targets, self._features if about == "loss" else None, prior)

    def _fitted_kernel(self, about: str, points: np.ndarray, targets: np.ndarray) -> tuple[Any, float]:
        """Kernel and noise, fitted to these points: which depend on how many have been told, and on no fit before."""
        from skopt.utils import cook_estimator

        count, kernel, noise = self._kernels.get(about, (0, None, 0.0))
        if count != len(points):
            encoded, targets = self.space.encode(points), targets[: len(points)]
            box = [(0.0, 1.0)] * encoded.shape[1]
            process = cook_estimator("GP", space=box, random_state=self.seed, noise="gaussian")
            process.set_params(n_restarts_optimizer=0)  # two more starts cost three times as much and find no more
            with _quiet():
                process.fit(encoded, self._trend(about, points, targets).rest(points, targets))
            # Without its last summand, the noise, which goes into alpha, where it does not blur predictions.
            kernel, noise = process.kernel_.k1, float(process.noise_)
            self._kernels[about] = (len(points), kernel, noise)
        return kernel, noise

    def model(self) -> Belief | None:
        """What is expected by all that is known; None before there are two observations."""
        return self._believing([])[0] if len(self._known()) >= 2 else None


class Trend:
    """A linear trend of losses (n,) in features of points (n, axes), by least squares; without features there is none.

    With features, losses above their median are bent: ``m + s log(1 + (l - m) / s)``, m the median and s what the best
    is below it; those of the first `prior` points, of another budget perhaps, do not count there.
    """

    def __init__(
        self,
        points: np.ndarray,
        losses: np.ndarray,
        features: Callable[[np.ndarray], np.ndarray] | None,
        prior: int = 0,
    ) -> None:
        own = losses[prior:] if len(losses) - prior >= _FEWEST_OWN else losses
        self._median, self._scale = float(np.median(own)), float(np.median(own) - own.min())
        self._features = features if self._scale > 0 else None
        self._slopes = np.zeros(0)
        if self._features is None:
            return
        self._worst = self.bent(losses.max())
        known = self._features(points)
        self._mean, spread = known.mean(axis=0), known.std(axis=0)
        self._slopes = np.zeros(known.shape[1])
        telling = np.flatnonzero(spread > 1e-9 * np.abs(known).max(axis=0))
        if len(losses) > len(telling) + 1:  # else it would explain everything
            design = (known - self._mean)[:, telling]
            self._slopes[telling] = np.linalg.lstsq(design, self.bent(losses), rcond=None)[0]

    def bent(self, losses: Any) -> Any:
        """Losses as the process learns them."""
        if self._features is None:
            return losses
        above = np.maximum(losses - self._median, 0.0)
        return np.minimum(losses, self._median) + self._scale * np.log1p(above / self._scale)

    def unbent(self, losses: np.ndarray) -> np.ndarray:
        """The losses that these were, none of them above the worst known: nothing tells how far above."""
        if self._features is None:
            return losses
        losses = np.minimum(losses, self._worst)
        above = np.maximum(losses - self._median, 0.0)
        return np.minimum(losses, self._median) + self._scale * np.expm1(above / self._scale)

    def at(self, points: np.ndarray) -> np.ndarray:
        """(n,)."""
        return np.zeros(len(points)) if self._features is None else (self._features(points) - self._mean) @ self._slopes

    def rest(self, points: np.ndarray, losses: np.ndarray) -> np.ndarray:
        """What it leaves to the process, (n,)."""
        return self.bent(losses) - self.at(points)


@dataclass(frozen=True)
class Belief:
    """What is expected of points (n, axes): a trend, and a Gaussian process on encoded points for the rest."""

    process: Any
    space: Space
    trend: Trend

    def predict(self, points: np.ndarray, return_std: bool = False) -> Any:
        """Mean (n,), and standard deviation (n,), of the losses as the process learns them."""
        found = self.process.predict(self.space.encode(points), return_std=return_std)
        mean, std = found if return_std else (found, None)
        mean = mean + self.trend.at(points)
        return (mean, std) if return_std else mean

    def expected(self, points: np.ndarray) -> np.ndarray:
        """The losses, (n,)."""
        return self.trend.unbent(self.predict(points))


def _worked(observations: Iterable[Observation]) -> list[Observation]:
    return [observation for observation in observations if observation.value is not None]


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings of scikit-optimize and scikit-learn (bounds met, variances rounded to 0) say nothing a user can use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
