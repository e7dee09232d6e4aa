"""The policy search in one process: each trial makes the slim model of a policy and asks what it is worth."""

from __future__ import annotations

import hashlib
import logging
import math
import numbers
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_mdc.budget import Budget, LatencyTable
from lightning_mdc.distributed import first_error, is_first, on_first_rank
from lightning_mdc.errors import SearchError, check_whole
from lightning_mdc.gp_ei.process import GpEi, Observation
from lightning_mdc.gp_ei.projection import Projection
from lightning_mdc.gp_ei.study import Row, Study, has_begun, observations
from lightning_mdc.importance import Scores
from lightning_mdc.policy import Policy
from lightning_mdc.policy_search.held_out import METRICS, HeldOut, Judgement
from lightning_mdc.policy_search.policy_space import Bounds, Groups, PolicySpace
from lightning_mdc.progress import bar
from lightning_mdc.randomness import isolated_rng, seed_all
from lightning_mdc.surgery import ActivationStatistics, slim
from lightning_mdc.surgery.compensation import check_compensable, check_compensation
from lightning_mdc.surgery.plan import make_plan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """One policy that was tried.

    Attributes:
        number: from 0; trial 0 is the uniform policy, or where bounds or ties exclude it one near it.
        policy: its realised keep ratios.
        macs: multiply-accumulates of its slim model for one image.
        value: what `evaluate` gave; None if it failed.
        status: ``"done"``, ``"failed"`` (raised, or no finite number), or ``"stopped"`` (given up early; its value is
            an estimate).
        seconds: making the slim model and evaluating it.
        cost: as a fraction of the budget, at most 1.
        note: why it failed.
        accuracy: its top-1 on the images it was judged on, as a fraction, whatever the metric; None if it failed, or
            was judged by anything but a `HeldOut` with labels.
    """

    number: int
    policy: Policy
    macs: int
    value: float | None
    status: str
    seconds: float
    cost: float = 1.0
    note: str = ""
    accuracy: float | None = None


@dataclass(frozen=True)
class SearchResult:
    """How a search ended.

    Attributes:
        policy: the best policy.
        value: what `evaluate` gave for it.
        history: all trials, in order.
        space: what was searched.
        search: the Gaussian process and what it was told, for pictures.
    """

    policy: Policy
    value: float
    history: list[Trial]
    space: PolicySpace
    search: GpEi

    @property
    def best(self) -> Trial:
        """The trial that won."""
        return next(trial for trial in self.history if trial.status == "done" and trial.value == self.value)


def search(
    model: nn.Module,
    scores: Scores,
    evaluate: Callable[[nn.Module], float],
    budget: float | Budget = 0.6,
    n_trials: int = 60,
    seed: int = 0,
    *,
    dimensions: Iterable[str] | None = None,
    bounds: Bounds | None = None,
    groups: Groups = None,
    token_ratio: str = "shared",
    min_heads: int = 1,
    min_neurons: int = 1,
    round_to: int | None = None,
    stages: Sequence[int] | None = None,
    token_score: str = "attention",
    fuse_tokens: bool = True,
    compensate: str = "none",
    statistics: ActivationStatistics | None = None,
    n_initial_points: int = 10,
    xi: float = 0.0,
    early_stop: float | None = None,
    state: str | Path | None = None,
    warm_start: str | Path | None = None,
    progress: bool = True,
    on_trial: Callable[[Row, float | None], None] | None = None,
) -> SearchResult:
    """Which keep ratios, jointly over heads, neurons and tokens, are worth most under the budget.

    Every trial meets the budget in whole units. The first one is the uniform policy; then come the uniform policies of
    fewer dimensions that reach the budget, such as neurons alone, so that no single dimension is overlooked; up to
    `n_initial_points` the next ones are random, then a Gaussian process and expected improvement choose. In a
    distributed run rank 0 chooses and all ranks follow.

    Args:
        model: the dense model (or a module that holds it); unchanged.
        scores: from `score`.
        evaluate: given a slim vision transformer (itself, not the module that holds it) in eval mode and without
            gradients, how good it is; higher is better. It has to do so on held-out *training* images: see `HeldOut`,
            which is one.
        budget: fraction of the dense MACs in (0, 1], or a `Budget`.
        n_trials: how many in all, those of an earlier run in `state` counted.
        seed: of the search; `evaluate` runs under a seed of its own per trial, so that a resumed search equals an
            uninterrupted one.
        dimensions, bounds, groups, token_ratio, min_heads, min_neurons, round_to, stages: see `PolicySpace`.
        token_score, fuse_tokens: see `make_plan`.
        compensate, statistics: see `slim`; trials are then judged with what they will be delivered with.
        n_initial_points, xi: see `GpEi`.
        early_stop: give up trials that will not come up to the best with this confidence, such as 0.99; `evaluate`
            has to be a `HeldOut` then. None: see every trial through.
        state: file to keep the search in; if it is there, the search goes on from it.
        warm_start: the `state` file of an earlier search over the same axes, for another budget say.
        progress: show a progress bar where there is a terminal.
        on_trial: called with every trial that is over and the best value so far; on rank 0 alone.

    Raises:
        SearchError: `evaluate` gives no number, every trial fails, or the state belongs to another search. What had
            been found by then is in `state`.
        BudgetError: the budget cannot be reached.
        CompensationError, UnsupportedModelError: what may be pruned cannot be compensated for, see `slim`.
    """
    check_whole("n_trials", n_trials, 1, SearchError)
    if not isinstance(scores, Scores):
        raise SearchError(f"scores={scores!r:.80}: expected Scores, e.g. from score(model, batches)")
    by_image = isinstance(evaluate, HeldOut) and not isinstance(evaluate.metric, Metric)
    if early_stop is not None and not (by_image and 0.5 <= early_stop < 1):
        raise SearchError(
            f"early_stop={early_stop!r}: expected a confidence in [0.5, 1), and evaluate=HeldOut(...) of a metric that "
            f"has a value per image, one of {METRICS}"
        )
    if not callable(evaluate):
        raise SearchError(f"evaluate={evaluate!r:.80}: expected a function of a slim model that returns a number")
    space = PolicySpace(
        model,
        budget,
        dimensions,
        bounds=bounds,
        groups=groups,
        token_ratio=token_ratio,
        min_heads=min_heads,
        min_neurons=min_neurons,
        round_to=round_to,
        stages=stages,
        fuse_tokens=fuse_tokens,
    )
    check_compensation(space.sites, compensate, statistics)
    for dimension in ("heads", "neurons"):
        for block in space.sites.blocks if dimension in space.dimensions else ():
            check_compensable(getattr(block, dimension), compensate)
    process = GpEi(
        space,
        space.constraint,
        seed=seed,
        n_initial_points=n_initial_points,
        first=starting_points(space),
        prior=_prior(warm_start, space, state),
        xi=xi,
    )
    about = {
        "budget": space.budget.as_dict(),
        "dense_macs": space.dense_macs,
        "stages": list(space.stage_blocks),
        "scores": _digest_of(scores.tensors(), scores.criterion),
        "xi": float(xi),
        "token_score": token_score,
        "fuse_tokens": fuse_tokens,
        "early_stop": early_stop,
    }
    if isinstance(table := space.budget.table, LatencyTable):
        about["latency_of"] = {
            name: table.conditions.get(name) for name in ("device", "threads", "dtype", "batch_size")
        }
    if statistics is not None:
        about |= {"compensate": compensate, "statistics": _digest_of(statistics.tensors())}

    # One that was given another __call__ is asked by that.
    judge = evaluate.judge if isinstance(evaluate, HeldOut) and type(evaluate).__call__ is HeldOut.__call__ else None

    def tried(policy: Policy, best: float | None) -> Any:
        plan = make_plan(model, scores, policy, token_score=token_score, fuse_tokens=fuse_tokens)
        small = slim(model, plan, compensate=compensate, statistics=statistics).eval()
        with torch.no_grad():
            if early_stop is not None and isinstance(evaluate, HeldOut):
                return evaluate.judge(small, best, early_stop)
            return evaluate(small) if judge is None else judge(small)

    # Only the first rank asks, tells and writes; on the others there is nothing to be asked.
    study = on_first_rank(lambda: None if not is_first() else Study(process, state, about), share=False)
    try:
        if judge is not None and isinstance(evaluate, HeldOut):
            _remember(study, evaluate, space.sites.model)
        rows = _run(space, study, tried, n_trials, seed, progress, on_trial)
    finally:
        if study is not None:
            study.close()
    if not is_first():
        for row in rows:
            process.tell(space.point(row.params)[None], [row.value])
    history = [_trial(space, row) for row in rows]
    done = [trial for trial in history if trial.status == "done" and trial.value is not None]
    if not done:
        notes = {trial.note for trial in history}
        raise SearchError(
            f"none of the {len(history)} trials gave a value ({'; '.join(sorted(notes)[:3])}); mend evaluate"
        )
    best = max(done, key=lambda trial: (trial.value, -trial.number))
    assert best.value is not None
    return SearchResult(best.policy, best.value, history, space, process)


def _remember(study: Study | None, evaluate: HeldOut, dense: nn.Module) -> None:
    """What values mean, and what the dense model is worth, for whoever reads the file."""
    metric = evaluate.metric if isinstance(evaluate.metric, str) else type(evaluate.metric).__name__
    if on_first_rank(lambda: study is not None and study.remembered.get("metric") == metric):
        return
    judgement = evaluate.judge(dense)
    known = {"value": judgement.value, **judgement.facts}
    worth = {name: value for name, value in known.items() if math.isfinite(value)}
    on_first_rank(lambda: None if study is None else study.remember(metric=metric, dense=worth))


def _run(
    space: PolicySpace,
    study: Study | None,
    tried: Callable[[Policy, float | None], Any],
    n_trials: int,
    seed: int,
    progress: bool,
    on_trial: Callable[[Row, float | None], None] | None,
) -> tuple[Row, ...]:
    """Trials until there are `n_trials`, or no more policies; returns all."""

    def following() -> tuple[int, Row | None, float | None]:
        assert study is not None
        finished, best = len(study.finished), study.best
        rows = study.next() if finished < n_trials else ()
        return finished, rows[0] if rows else None, best.value if best else None

    def finish(row: Row, judgement: Judgement | None, seconds: float, note: str) -> Row:
        assert study is not None
        seconds = round(seconds, 4)
        if judgement is None:
            return study.finish(row.number, None, seconds=seconds, note=note)
        status = "stopped" if judgement.stopped else None
        point = space.point(row.params)[None]
        facts = {**judgement.facts, "macs": float(space.macs(point)[0])}
        if (latency := space.latency(point)) is not None:
            facts["latency"] = float(latency[0])
        return study.finish(
            row.number,
            judgement.value,
            status=status,
            seconds=seconds,
            note=note,
            facts=facts,
        )

    finished, row, best = on_first_rank(following)
    before, begun = finished, time.perf_counter()
    with bar("Searching", n_trials, completed=finished, shown=progress) as advance, isolated_rng():
        while row is not None:
            started = time.perf_counter()
            judgement, note = _judged(space, row, tried, best, seed)
            seconds = time.perf_counter() - started
            over = on_first_rank(partial(finish, row, judgement, seconds, note))
            finished, row, best = on_first_rank(following)
            if on_trial is not None and is_first():
                on_trial(over, best)
            log.debug("  trial %d: value %s in %.2f s", over.number, _shown(over.value), seconds)
            advance(f"value {_shown(over.value)}, best {_shown(best)}, cost {over.cost:.2%} of budget")
            if is_first() and (finished % max(1, n_trials // 6) == 0 or finished == n_trials):
                left = (n_trials - finished) * (time.perf_counter() - begun) / (finished - before)
                log.info(
                    "  %d of %d trials: the last %s at %.2f %% of the budget, best %s, about %.0f s left",
                    finished,
                    n_trials,
                    _shown(over.value),
                    100 * (over.cost or 0),
                    _shown(best),
                    left,
                )
    if finished < n_trials and is_first():
        log.info("  all %d policies there are have been tried", finished)
    return on_first_rank(lambda: study.finished)  # type: ignore[union-attr]


def _judged(
    space: PolicySpace,
    row: Row,
    tried: Callable[[Policy, float | None], Any],
    best: float | None,
    seed: int,
) -> tuple[Judgement | None, str]:
    """(what the trial is worth, why it failed)."""
    seed_all(seed + row.number)
    said, error = None, None
    try:
        said = tried(space.policy(space.point(row.params)), best)
    except Exception as raised:
        error = raised
    if (error := first_error(error)) is not None:
        # Nothing has worked yet: a mistake in `evaluate`, for its author to see whole.
        if best is None or isinstance(error, SearchError):
            raise error
        log.warning("  trial %d failed: %s: %s", row.number, type(error).__name__, error)
        return None, f"{type(error).__name__}: {error}"
    if isinstance(said, Judgement):
        return said, ""
    number = _number(said)
    if number is None:
        raise SearchError(
            f"evaluate returned {said!r:.80} for trial {row.number}; it has to return a number, higher is better"
        )
    return Judgement(number), ""


def _number(value: Any) -> float | None:
    if isinstance(value, bool | str | np.bool_) or getattr(value, "dtype", None) is torch.bool:
        return None
    if not (isinstance(value, numbers.Real) or hasattr(value, "__float__")):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # a tensor of several numbers
        return None


def _trial(space: PolicySpace, row: Row) -> Trial:
    point = space.point(row.params)
    macs = int(space.macs(point[None])[0])
    return Trial(
        row.number,
        space.policy(point),
        macs,
        row.value,
        row.status,
        row.seconds or 0.0,
        row.cost or 0.0,
        row.note,
        row.facts.get("accuracy"),
    )


def _shown(value: float | None) -> str:
    return "failed" if value is None else f"{value:.4g}"


def _digest_of(tensors: Mapping[str, Tensor], name: str = "") -> str:
    """Short hash: with other scores, or statistics, the same policy gives another model."""
    sha = hashlib.sha256(name.encode())
    for key, tensor in sorted(tensors.items()):
        sha.update(key.encode() + tensor.float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def _prior(warm_start: str | Path | None, space: PolicySpace, state: str | Path | None) -> tuple[Observation, ...]:
    if warm_start is None:
        return ()
    if state is not None and has_begun(state):  # it holds what it was begun with
        log.info("  warm_start is not read again: %s goes on with what it began with", state)
        return ()
    return observations(warm_start, space, "maximize")


def starting_points(space: PolicySpace) -> np.ndarray:
    """The uniform policy, and those that leave dimensions whole, (n, axes); the process passes over what is beyond the
    budget where bounds stand in the way."""
    return np.concatenate([_as_point(space, policy) for policy in (space.uniform, *space.uniform_of_fewer)])


def _as_point(space: PolicySpace, policy: Policy) -> np.ndarray:
    point = space.nearest(policy)[None]
    if space.policy(point[0]) == policy or not space.constraint.holds(space.load(point))[0]:
        return point
    return Projection(space, space.constraint, seed=0).fill(point, np.random.default_rng(0))
