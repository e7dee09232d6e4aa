"""The policy search in one process: each trial makes the slim model of a policy and asks what it is worth."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lightning_mdc.budget import Budget, InputSize, LatencyTable
from lightning_mdc.distributed import failures_of, is_first, on_every_rank, on_first_rank
from lightning_mdc.errors import CompensationError, SearchError, as_number, check_kind, check_whole
from lightning_mdc.gp_ei.process import GpEi
from lightning_mdc.gp_ei.projection import Projection
from lightning_mdc.gp_ei.study import Study, observations
from lightning_mdc.gp_ei.study import Trial as StudyTrial
from lightning_mdc.importance import Scores
from lightning_mdc.policy import Policy, Space, TokenOptions
from lightning_mdc.policy_search.forecast import Forecast
from lightning_mdc.policy_search.held_out import Judge, Judgement
from lightning_mdc.policy_search.policy_space import PolicySpace
from lightning_mdc.progress import bar
from lightning_mdc.randomness import isolated_rng, seed_all
from lightning_mdc.surgery import slim
from lightning_mdc.surgery.compensation import check_compensable, check_compensation
from lightning_mdc.surgery.plan import make_plan

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Trial:
    """One policy that was tried: a trial of the study file, as a policy.

    Attributes:
        number: from 0; trial 0 is the uniform policy, or where bounds or ties exclude it one near it.
        policy: its realised keep ratios.
        macs: multiply-accumulates of its slim model for one image.
        value: what `evaluate` gave; None if it failed.
        status: ``"done"``, or ``"failed"`` (raised, or no finite number).
        seconds: making the slim model and evaluating it.
        cost: as a fraction of the budget, at most 1.
        note: why it failed.
        accuracy: its top-1 on the images it was judged on, as a fraction, whatever the metric; None if it failed, or
            was judged by anything but a `HeldOut` with labels of classes.
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
class SearchOptions:
    """How a search is run, which policies there are apart.

    Attributes:
        journal: file to keep the search in; if it is there, the search goes on from it.
        warm_start: the `journal` of an earlier search over the same axes, for another budget say.
        initial_points, xi: see `GpEi`.
        progress: show a progress bar where there is a terminal.
        on_trial: called with every trial that is over and the best value so far; on rank 0 alone.
        say: what tells how far the search is, now and then, in a line; None: this module's logger.
    """

    journal: str | Path | None = None
    warm_start: str | Path | None = None
    initial_points: int = 10
    xi: float = 0.0
    progress: bool = True
    on_trial: Callable[[StudyTrial, float | None], None] | None = None
    say: Callable[[str], None] | None = None


@dataclass(frozen=True)
class SearchResult:
    """How a search ended.

    Attributes:
        policy: the best policy.
        value: what `evaluate` gave for it.
        history: all trials, in order.
        space: what was searched; None where only the trials are known any more, from a checkpoint.
        search: the Gaussian process and what it was told, for pictures; None likewise.
        trials: the same as `history`, as the journal has them, for pictures and tables; empty likewise.
    """

    policy: Policy
    value: float
    history: list[Trial]
    space: PolicySpace | None = None
    search: GpEi | None = None
    trials: tuple[StudyTrial, ...] = ()

    @property
    def best(self) -> Trial:
        """The trial that won."""
        return next(trial for trial in self.history if trial.status == "done" and trial.value == self.value)

    def to_json(self) -> str:
        """All but `space` and `search`."""
        trials = [{**asdict(trial), "policy": trial.policy.to_json()} for trial in self.history]
        return json.dumps({"policy": self.policy.to_json(), "value": self.value, "history": trials}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> SearchResult:
        """What `to_json` gave."""
        found = json.loads(text)
        history = [Trial(**{**trial, "policy": Policy.from_json(trial["policy"])}) for trial in found["history"]]
        return cls(Policy.from_json(found["policy"]), found["value"], history)


def search(
    model: nn.Module,
    scores: Scores,
    evaluate: Callable[[nn.Module], float],
    budget: float | Budget = 0.6,
    n_trials: int = 60,
    seed: int = 0,
    dimensions: Iterable[str] | None = None,
    space: Space | None = None,
    tokens: TokenOptions | None = None,
    compensate: str = "none",
    options: SearchOptions | None = None,
    *,
    input_size: InputSize | None = None,
    submodule: str | None = None,
) -> SearchResult:
    """Which keep ratios, jointly over heads, neurons and tokens, are worth most under the budget.

    Every trial meets the budget in whole units. The first one is the uniform policy; then come, where layers are
    refitted, policies under which they lose least by themselves (see `policy_search.forecast`), and the uniform
    policies of fewer dimensions that reach the budget, such as neurons alone, so that no single dimension is
    overlooked; up to `initial_points` the next ones are random, then a Gaussian process (of what a trend in those
    losses leaves unexplained) and expected improvement choose. In a distributed run rank 0 chooses, and all ranks
    follow.

    Args:
        model: the dense model (or a module that holds it); unchanged.
        scores: from `score`.
        evaluate: given a slim vision transformer (itself, not the module that holds it) in eval mode and without
            gradients, how good it is; higher is better. It has to do so on held-out *training* images: see `HeldOut`,
            which is one. In a distributed run all ranks call it; the value of rank 0 counts.
        budget: fraction of the dense MACs in (0, 1], or a `Budget`.
        n_trials: how many in all, those of an earlier run in the journal counted.
        seed: of the search; `evaluate` runs under a seed of its own per trial, so that a resumed search equals an
            uninterrupted one.
        dimensions, space, tokens, input_size, submodule: see `PolicySpace`.
        compensate: see `slim`; by ``scores.moments``. Trials are then judged with what they will be delivered with.
        options: how to run it; None: ``SearchOptions()``.

    Raises:
        SearchError: `evaluate` gives no number, every trial fails, or the journal belongs to another search. What had
            been found by then is in it.
        BudgetError: the budget cannot be reached.
        CompensationError, UnsupportedModelError: what may be pruned cannot be compensated for, see `slim`.
        RankError: another process of a distributed run failed; its own error is raised there.
    """
    check_whole("n_trials", n_trials, 1, SearchError)
    if not isinstance(scores, Scores):
        raise SearchError(f"scores={scores!r:.80}: expected Scores, e.g. from score(model, batches)")
    if not callable(evaluate):
        raise SearchError(f"evaluate={evaluate!r:.80}: expected a function of a slim model that returns a number")
    check_kind("options", options, SearchOptions, SearchError)
    options = SearchOptions() if options is None else options
    policies = PolicySpace(model, budget, dimensions, space, tokens, input_size=input_size, submodule=submodule)
    _check_compensation(policies, scores, compensate)
    forecast = Forecast.by_moments(policies, scores) if compensate == "lstsq" else None
    process = GpEi(
        policies,
        policies.constraint,
        seed=seed,
        n_initial_points=options.initial_points,
        first=starting_points(policies, forecast),
        trend=None if forecast is None else forecast.features,
        prior=on_first_rank(
            partial(observations, options.warm_start, policies, "maximize", options.journal, _metric_of(evaluate))
        ),
        xi=options.xi,
    )
    about = {**_about(policies, scores, compensate), "xi": float(options.xi)}
    moments = None if compensate == "none" else scores.moments

    def slim_of(policy: Policy) -> nn.Module:
        dense, size = policies.anatomy.model, policies.costs.size
        plan = make_plan(dense, scores, policy, policies.tokens, input_size=size)
        return slim(dense, plan, compensate, moments=moments).eval()

    study = _SharedStudy(process, options.journal, about)
    try:
        if (metric := _metric_of(evaluate)) is not None:
            assert isinstance(evaluate, Judge)
            _note_dense(study, evaluate, metric, policies.anatomy.model)
        trials = _run(study, partial(_judged, policies, slim_of, evaluate, seed), n_trials, options)
    finally:
        study.close()
    if not is_first():
        for trial in trials:
            process.tell(policies.point(trial.params)[None], [trial.value])
    return _result(policies, process, trials)


# --- before the first trial -------------------------------------------------------------------------------------------


def _check_compensation(space: PolicySpace, scores: Scores, compensate: str) -> None:
    if compensate == "sequential":
        raise CompensationError(
            "compensate='sequential' takes passes of its own for each policy; search with 'lstsq', which one look at "
            "the images serves, and refit what is found: slim(model, plan, 'sequential', batches=...)"
        )
    check_compensation(space.anatomy, compensate, None if compensate == "none" else scores.moments)
    for dimension in space.dimensions:
        for units in space.anatomy.units(dimension):
            if units is not None:
                check_compensable(units, compensate)


def _about(space: PolicySpace, scores: Scores, compensate: str) -> dict[str, Any]:
    """What makes two searches over the same axes the same."""
    about = {
        "budget": space.budget.as_dict(),
        "dense_macs": space.dense_macs,
        "stages": list(space.grid.stages),
        "tokens": asdict(space.tokens),
        "scores": digest_of(scores.tensors(), scores.criterion),
    }
    if isinstance(table := space.budget.options.get("table"), LatencyTable):
        about["latency_of"] = {
            name: table.conditions.get(name) for name in ("device", "threads", "dtype", "batch_size")
        }
    if compensate != "none" and scores.moments is not None:
        about |= {"compensate": compensate, "moments": digest_of(scores.moments.tensors())}
    return about


def digest_of(tensors: Mapping[str, Tensor], name: str = "") -> str:
    """Short hash: with other scores, or moments, the same policy gives another model."""
    sha = hashlib.sha256(name.encode())
    for key, tensor in sorted(tensors.items()):
        sha.update(key.encode() + tensor.float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def starting_points(space: PolicySpace, forecast: Forecast | None = None) -> np.ndarray:
    """The uniform policy, those under which layers lose least, if that is known, and uniform ones that leave dimensions
    whole, (n, axes); the process passes over what is beyond the budget where bounds stand in the way."""
    first, *fewer = (_as_point(space, policy) for policy in (space.uniform, *space.uniform_of_fewer))
    return np.concatenate([first, *([] if forecast is None else [forecast.best_points()]), *fewer])


def _as_point(space: PolicySpace, policy: Policy) -> np.ndarray:
    point = space.nearest(policy)[None]
    if space.policy(point[0]) == policy or not space.constraint.holds(space.utilisation(point))[0]:
        return point
    return Projection(space, space.constraint, seed=0).fill(point, np.random.default_rng(0))


# --- the trials -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Standing:
    """How far a search is: how many trials are over, the best value, and the trial to run now, if there is one."""

    finished: int
    best: float | None
    next: StudyTrial | None


class _SharedStudy:
    """A study that the first rank has. All ranks ask together and get its answer."""

    def __init__(self, process: GpEi, path: str | Path | None, about: Mapping[str, Any]) -> None:
        self._study = on_every_rank(lambda: Study(process, path, about) if is_first() else None)

    def ask(self, question: Callable[[Study], T]) -> T:
        """What the first rank answers about its study, or does to it."""

        def asked() -> T:
            assert self._study is not None  # this is the first rank
            return question(self._study)

        return on_first_rank(asked)

    def close(self) -> None:
        """Let go of the file."""
        if self._study is not None:
            self._study.close()


def _standing(study: Study, n_trials: int) -> _Standing:
    """With the next trial, as long as there are fewer than `n_trials` and other policies to try."""
    finished, best = len(study.finished), study.best
    trials = study.next() if finished < n_trials else ()
    return _Standing(finished, best.value if best else None, trials[0] if trials else None)


def _metric_of(evaluate: Callable[[nn.Module], float]) -> str | None:
    """What its values mean, if it says so."""
    if not (isinstance(evaluate, Judge) and _judges(evaluate)):
        return None
    return evaluate.metric if isinstance(evaluate.metric, str) else type(evaluate.metric).__name__


def _note_dense(study: _SharedStudy, evaluate: Judge, metric: str, dense: nn.Module) -> None:
    """Write what values mean, and what the dense model is worth, for whoever reads the file."""
    known = study.ask(lambda study: study.metadata.get("metric"))
    if known == metric:
        return
    if known is not None:
        raise SearchError(
            f"the journal belongs to another search: its trials were judged by metric={known!r}, these are by "
            f"{metric!r}, and cannot be compared; give another journal"
        )
    judgement = evaluate.judge(dense)
    facts = {"value": judgement.value, **judgement.facts}
    finite = {name: value for name, value in facts.items() if math.isfinite(value)}
    study.ask(lambda study: study.add_metadata(metric=metric, dense=finite))


def _run(
    study: _SharedStudy,
    judged: Callable[[StudyTrial, float | None], dict[str, Any]],
    n_trials: int,
    options: SearchOptions,
) -> tuple[StudyTrial, ...]:
    """Trials until there are `n_trials`, or no more policies; returns all."""
    standing = partial(_standing, n_trials=n_trials)
    now = study.ask(standing)
    before, begun = now.finished, time.perf_counter()
    with bar("Searching", n_trials, completed=before, shown=options.progress) as advance, isolated_rng():
        while (trial := now.next) is not None:
            started = time.perf_counter()
            outcome = judged(trial, now.best)
            seconds = time.perf_counter() - started
            trial = study.ask(partial(Study.finish, number=trial.number, seconds=round(seconds, 4), **outcome))
            now = study.ask(standing)
            if options.on_trial is not None:
                on_first_rank(partial(options.on_trial, trial, now.best))
            log.debug("  trial %d: value %s in %.2f s", trial.number, _shown(trial.value), seconds)
            advance(f"value {_shown(trial.value)}, best {_shown(now.best)}, cost {trial.cost:.2%} of budget")
            each = (time.perf_counter() - begun) / (now.finished - before)
            if is_first() and now.finished in (before + 1, n_trials, *range(0, n_trials, max(1, n_trials // 6))):
                say = log.info if options.say is None else options.say
                say(_progress_in_words(trial, now, n_trials, (n_trials - now.finished) * each))
    if now.finished < n_trials and is_first():
        log.info("  all %d policies there are have been tried", now.finished)
    return study.ask(lambda study: study.finished)


def _progress_in_words(trial: StudyTrial, now: _Standing, n_trials: int, seconds_left: float) -> str:
    return (
        f"  {now.finished} of {n_trials} trials: the last {_shown(trial.value)} at {trial.cost or 0:.2%} of the "
        f"budget, best {_shown(now.best)}, about {seconds_left:.0f} s left"
    )


def _judged(
    space: PolicySpace,
    slim_of: Callable[[Policy], nn.Module],
    evaluate: Callable[[nn.Module], float],
    seed: int,
    trial: StudyTrial,
    best: float | None,
) -> dict[str, Any]:
    """How the trial ended, as arguments of `Study.finish`."""
    seed_all(seed + trial.number)
    point = space.point(trial.params)
    policy = space.policy(point)
    try:
        # A rank without a model must not leave the others waiting in an `evaluate` in which ranks talk.
        small = on_every_rank(partial(slim_of, policy))
        judgement = on_every_rank(partial(_asked, evaluate, small, trial.number))
    except Exception as error:
        failures = failures_of(error)
        if not failures or any(failure.is_a(SearchError) for failure in failures):
            raise
        if best is None:  # nothing has worked yet: a mistake in `evaluate`, for its author to see whole
            raise
        log.warning("  trial %d failed: %s", trial.number, failures[0])
        return {"value": None, "note": str(failures[0])}
    priced = {name: float(cost[0]) for name, cost in space.prices(point[None]).items()}
    return {"value": judgement.value, "facts": {**judgement.facts, **priced}}


def _judges(evaluate: Judge) -> bool:
    """Whether it may be asked for its whole judgement: one that was given another __call__ is asked by that."""
    return type(evaluate).__call__ is Judge.__call__


def _asked(evaluate: Callable[[nn.Module], float], small: nn.Module, number: int) -> Judgement:
    with torch.no_grad():
        if isinstance(evaluate, Judge) and _judges(evaluate):
            return evaluate.judge(small)
        answer = evaluate(small)
    value = as_number(answer)
    if value is None:
        raise SearchError(
            f"evaluate returned {answer!r:.80} for trial {number}; it has to return a number, higher is better"
        )
    return Judgement(value)


def _shown(value: float | None) -> str:
    return "failed" if value is None else f"{value:.4g}"


# --- after the last one -----------------------------------------------------------------------------------------------


def _result(space: PolicySpace, process: GpEi, trials: tuple[StudyTrial, ...]) -> SearchResult:
    history = []
    for trial in trials:
        point = space.point(trial.params)
        policy, macs = space.policy(point), int(space.macs(point[None])[0])
        facts = (trial.seconds or 0.0, trial.cost or 0.0, trial.note, trial.facts.get("accuracy"))
        history.append(Trial(trial.number, policy, macs, trial.value, trial.status, *facts))
    done = [trial for trial in history if trial.value is not None]
    if not done:
        notes = {trial.note for trial in history}
        raise SearchError(
            f"none of the {len(history)} trials gave a value ({'; '.join(sorted(notes)[:3])}); mend evaluate"
        )
    best = max(done, key=lambda trial: (trial.value, -trial.number))
    assert best.value is not None
    return SearchResult(best.policy, best.value, history, space, process, trials)
