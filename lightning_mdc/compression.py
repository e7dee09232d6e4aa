"""The whole method on one model: score, search, compensate, make smaller. `compress` does it in one line, and
`MultiDimPruneCallback` inside a fit."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_mdc.budget import Budget, InputSize, as_budget, image_size
from lightning_mdc.budget.uniform import check_uniform, uniform_policy
from lightning_mdc.distillation import healing
from lightning_mdc.distributed import on_first_rank
from lightning_mdc.errors import (
    CalibrationError,
    CompressionError,
    MdcError,
    PolicyError,
    check_kind,
    check_one_of,
    check_prediction,
    check_whole,
)
from lightning_mdc.importance import Calibration, Criterion, Needs, Scorer, Scores, as_criterion
from lightning_mdc.importance.scoring import on_device_of, run_on, scored_by, split_batch
from lightning_mdc.models import Prediction, Units, find_anatomy, runnable
from lightning_mdc.policy import Plan, Policy, Space, TokenOptions, check_dimensions
from lightning_mdc.policy_search.driver import SearchOptions, SearchResult, search
from lightning_mdc.policy_search.held_out import InPlace, running_as_written
from lightning_mdc.policy_search.policy_space import PolicySpace
from lightning_mdc.surgery import make_plan, slim
from lightning_mdc.surgery.compensation import (
    COMPENSATIONS,
    check_all_tokens,
    check_compensable,
    compensation_of_trials,
)
from lightning_mdc.tokens.surviving_patches import watched_patches

log = logging.getLogger(__name__)

# Policies that are tried where nobody says another number.
N_TRIALS = 40

Evaluate = Callable[[nn.Module], float]


class Method:
    """How a model is to be made smaller: what `compress` and `MultiDimPruneCallback` are told, checked and filled in.

    Args:
        policy: ``"searched"``, ``"uniform"``, a `Policy`, or the path of a policy's JSON file.
        compensate: ``"sequential"``, ``"lstsq"``, ``"none"``, or None: ``"sequential"``.
        error: to raise where settings contradict each other.
        others: see `compress`.

    Raises:
        MdcError: a setting that is none, or that another one makes meaningless.
    """

    def __init__(
        self,
        budget: float | Budget | None,
        policy: Policy | str | Path,
        criterion: str | Criterion,
        *,
        dimensions: Iterable[str] | None,
        space: Space | None,
        tokens: TokenOptions | None,
        calibration: Calibration | None,
        compensate: str | None,
        n_trials: int | None,
        evaluate: Evaluate | None,
        prediction: Prediction | None,
        seed: int,
        error: type[MdcError] = CompressionError,
    ) -> None:
        check_kind("space", space, Space, error)
        check_kind("tokens", tokens, TokenOptions, error)
        check_kind("calibration", calibration, Calibration, error)
        check_whole("seed", seed, 0, error)
        check_whole("n_trials", n_trials, 1, error, or_none=str(N_TRIALS))
        check_prediction(prediction, error)
        if evaluate is not None and not callable(evaluate):
            raise error(f"evaluate={evaluate!r:.80}: expected a function of a slim model that returns a number")
        check_one_of("compensate", compensate, (None, *COMPENSATIONS), error)
        self.policy = _policy(policy)
        self.criterion = as_criterion(criterion)
        if isinstance(self.policy, Policy):
            reason = "a given policy says what is kept"
            _check_unused(error, reason, budget=budget, dimensions=dimensions, space=space)
        if self.policy != "searched":
            _check_unused(error, "no policy is searched for", n_trials=n_trials, evaluate=evaluate)
        is_judged = self.policy == "searched" and evaluate is None
        looks = Needs.all_of(map(self.criterion.needs, self.criterion.dimensions)).images
        if not looks and compensate == "none" and not is_judged:
            reason = f"criterion={self.criterion.name!r} looks at no images, and nothing else does"
            _check_unused(error, reason, calibration=calibration, prediction=prediction)
        self.budget = as_budget(0.6 if budget is None else budget)
        self.dimensions = None if dimensions is None else check_dimensions(dimensions)
        self.space, self.tokens = space or Space(), tokens
        if self.policy == "uniform":
            check_uniform(self.space)
        self.calibration = calibration or Calibration()
        self.compensate, self.evaluate, self.prediction = compensate, evaluate, prediction
        self.n_trials, self.seed = N_TRIALS if n_trials is None else n_trials, seed

    def __str__(self) -> str:
        """What makes another plan of the same model, in words: the budget, and what is not as it is by default."""
        if isinstance(self.policy, Policy):
            return f"a given policy, {hashlib.sha256(self.policy.to_json().encode()).hexdigest()[:8]}"
        others = {
            "policy": (self.policy, "searched"),
            "criterion": (str(self.criterion), "fisher"),
            "dimensions": (self.dimensions, None),
            "space": (self.space, Space()),
            "tokens": (self.tokens or TokenOptions(), TokenOptions()),
        }
        unusual = [f"{name}={value}" for name, (value, usual) in others.items() if value != usual]
        return ", ".join([str(self.budget), *unusual])


def _check_unused(error: type[MdcError], reason: str, **settings: Any) -> None:
    """Refuse what would not be looked at."""
    for name, value in settings.items():
        if value is not None:
            raise error(f"{name}={value!r:.80} is not looked at: {reason}; leave {name} out")


def _policy(policy: Any) -> Policy | Literal["searched", "uniform"]:
    if isinstance(policy, Policy) or policy in ("searched", "uniform"):
        return policy
    if isinstance(policy, (str, Path)) and Path(policy).exists():
        return Policy.load(policy)
    raise PolicyError(
        f"policy={policy!r:.80}: expected 'searched', 'uniform', a Policy, or the path of a policy's JSON "
        "file that is there"
    )


class Compression:
    """A `Method` on one model. What the method cannot do with the model is refused here, before anything is looked at.

    Args:
        method: how.
        module: the dense model, or a module that holds it.
        submodule, input_size: see `compress`.
        say: what tells what was chosen by itself, in a line.

    Attributes:
        anatomy: of the model.
        policy: the policy, where it is known without a search.
        compensate: how the layers that read units are refitted.
        compensate_trials: how they are where policies are tried: what rests on moments alone, as one pass serves all.

    Raises:
        BudgetError, CompensationError, PolicyError, SearchError, UnsupportedModelError: what is in the way.
    """

    def __init__(
        self,
        method: Method,
        module: nn.Module,
        submodule: str | None = None,
        input_size: InputSize | None = None,
        say: Callable[[str], None] = log.info,
    ) -> None:
        self.method, self.module, self.submodule, self._say = method, module, submodule, say
        self.anatomy = find_anatomy(module, submodule)
        self.input_size = size = image_size(input_size)
        self.policy: Policy | None = None
        self._space: PolicySpace | None = None
        options = (method.budget, method.dimensions, method.space, method.tokens)
        if isinstance(method.policy, Policy):
            self.policy = method.policy
            self.anatomy.check_options(method.tokens)
        elif method.policy == "uniform":
            self.policy = uniform_policy(self.anatomy.model, *options, input_size=size)
        else:
            self._space = PolicySpace(self.anatomy.model, *options, input_size=size)
            if method.space.bounds is None and not _pruned(self._space.uniform):
                self.policy = self._space.uniform  # the budget pays for everything
        if self.policy is None:
            assert self._space is not None
            self._dimensions, self._stages = self._space.dimensions, self._space.grid.stages
        else:
            self._dimensions, self._stages = _pruned(self.policy), self.anatomy.counts(self.policy).stages
        self.compensate, self.compensate_trials = self._compensation()

    def for_images(self, run: Callable[[], Any] | None) -> Compression:
        """The same, priced for images of the size that the model is given when `run` runs, unless one was asked for.

        In a distributed run all ranks have to ask, and rank 0's images count.
        """
        size = None if self.input_size is not None else on_first_rank(lambda: self._size_seen(run))
        if size is None or self.anatomy.grid_of(size) == self.anatomy.grid:
            return self
        self._say(f"images are of {size[0]} x {size[1]} pixels, and priced as such")
        return Compression(self.method, self.module, self.submodule, size, self._say)

    def _size_seen(self, run: Callable[[], Any] | None) -> tuple[int, int] | None:
        if run is None:
            return None
        try:
            with running_as_written(self.module):
                _, images, _ = watched_patches(self.anatomy.model, run)
        except CalibrationError:  # it is called on none, or the batch is refused, which scoring will say
            return None
        return images.shape[-2], images.shape[-1]

    @property
    def is_given(self) -> bool:
        """Whether the user has given the policy."""
        return isinstance(self.method.policy, Policy)

    @property
    def needs_judging(self) -> bool:
        """Whether policies are judged on images of ours."""
        return self.policy is None and self.method.evaluate is None

    def scorer(self) -> Scorer:
        """What scores the model, and gathers what compensation has to know."""
        moments = True if self.compensate_trials == "lstsq" else None
        wanted = self._dimensions or None
        return Scorer(
            self.anatomy, self.method.criterion, wanted, self._stages, self.method.prediction, moments=moments
        )

    def decide(
        self, scores: Scores, evaluate: Evaluate | None, options: SearchOptions, n_trials: int | None = None
    ) -> tuple[Plan, SearchResult | None]:
        """What is kept, and the search that found it, if there was one; see `search`."""
        policy, result, method = self.policy, None, self.method
        if policy is None:
            assert self._space is not None and evaluate is not None
            result = search(
                self.anatomy.model,
                scores,
                evaluate,
                self._space.budget,  # with what was measured for it
                method.n_trials if n_trials is None else n_trials,
                method.seed,
                method.dimensions,
                method.space,
                method.tokens,
                self.compensate_trials,
                options,
                input_size=self.input_size,
            )
            policy = result.policy
        size = self.input_size or self.anatomy.input_size[1:]  # a given policy may be of another model's size
        return make_plan(self.anatomy.model, scores, policy, method.tokens, input_size=size), result

    def _compensation(self) -> tuple[str, str]:
        """How the layers are refitted in the end, and in trials."""
        pruned = [units for units in self.anatomy.all_units if units.dimension in self._dimensions]
        compensate = self.method.compensate or self._best_compensation(pruned)
        if compensate != "sequential":
            for units in pruned:
                check_compensable(units, compensate)
            return compensate, compensate
        check_all_tokens(self.anatomy)
        return compensate, "none" if self.policy is not None else compensation_of_trials(compensate, pruned)

    def _best_compensation(self, pruned: Sequence[Units]) -> str:
        if not self.anatomy.stages:
            return "sequential"
        found = compensation_of_trials("sequential", pruned)  # by moments: a slim model's tokens are others' already
        if found == "none":
            self._say("no compensation: a norm is taken over units, so those that stay change when others leave")
        return found


def _pruned(policy: Policy) -> tuple[str, ...]:
    return tuple(name for name, ratios in policy.ratios.items() if any(ratio < 1 for ratio in ratios))


@dataclass(frozen=True, eq=False)
class Compressed:
    """What `compress` gives.

    Attributes:
        model: the slim vision transformer, a plain module.
        plan: which units are kept.
        policy: its keep ratios, and at which size of images they are priced.
        scores: of the units.
        search: how the policy was found; None where it was not searched for.
    """

    model: nn.Module
    plan: Plan
    policy: Policy
    scores: Scores
    search: SearchResult | None

    def __repr__(self) -> str:
        return f"Compressed({type(self.model).__name__}, {self.policy})"  # scores and plan are long


@torch.inference_mode(False)  # as `score` and `slim`
def compress(
    model: nn.Module,
    batches: Iterable[Any],
    budget: float | Budget | None = None,
    policy: Policy | str | Path = "searched",
    criterion: str | Criterion = "fisher",
    *,
    evaluate: Evaluate | None = None,
    n_trials: int | None = None,
    compensate: str | None = None,
    dimensions: Iterable[str] | None = None,
    space: Space | None = None,
    tokens: TokenOptions | None = None,
    calibration: Calibration | None = None,
    prediction: Prediction | None = None,
    submodule: str | None = None,
    input_size: InputSize | None = None,
    seed: int = 0,
    heal: int = 0,
    options: SearchOptions | None = None,
) -> Compressed:
    """The vision transformer in `model`, physically smaller under a budget, in one line.

    Scores heads, neurons and tokens on images, searches how much each block gives up, judging each policy by how close
    the slim model's output stays to the dense one's, and lets what stays make up for what leaves. No labels are needed.

    Args:
        model: the dense model, or a module that holds it; called as ``model(images)``; unchanged.
        batches: what a DataLoader of *training* images yields, ``(images, labels)`` or ``images``; a generator will
            do. The first images score, the next ones judge, and all of them refit what is found; they are read once,
            and kept. Where the model has learnt them all by heart, give an `evaluate` that has others to judge on.
        budget: fraction of the dense MACs to keep, or a `Budget`; None: 0.6. A given policy has a budget of its own.
        policy: ``"searched"``, ``"uniform"``, a `Policy`, or the path of a policy's JSON file.
        criterion: see `score`.
        evaluate: what a slim model (the transformer itself) is worth, instead of its closeness; see `search`. `HeldOut`
            is one, ``HeldOut(unseen, "kl", dense=model)`` say.
        n_trials: how many policies are tried; None: 40.
        compensate: see `slim`; None: ``"sequential"``. Policies are tried with ``"lstsq"`` then, which one look at the
            images serves, where no norm over units stands in its way.
        dimensions, space, tokens, input_size: see `uniform_policy` and `PolicySpace`.
        calibration: how many images score and judge; None: ``Calibration()``.
        prediction: makes of the model's output what criterion and judging look at; None: the softmax of its logits, or
            the output itself.
        submodule: of the vision transformer in `model`, as an attribute path; None finds it if there is just one.
        seed: of the search, and of the order of images while healing.
        heal: epochs in which each block of the slim model learns, on the same images, what the dense model's puts out,
            beyond what refitting gives back; see `heal`. It takes as long as training for as many epochs, so it is not
            done by itself. 0: none.
        options: how the search is run: its journal, say, with which a killed one goes on; None: ``SearchOptions()``.

    Raises:
        MdcError: settings that contradict each other, a model that is not supported, a budget out of reach, images that
            cannot be used; one of its subclasses.
    """
    method = Method(
        budget,
        policy,
        criterion,
        dimensions=dimensions,
        space=space,
        tokens=tokens,
        calibration=calibration,
        compensate=compensate,
        n_trials=n_trials,
        evaluate=evaluate,
        prediction=prediction,
        seed=seed,
    )
    check_kind("options", options, SearchOptions, CompressionError)
    check_whole("heal", heal, 0, CompressionError)
    options = SearchOptions() if options is None else options
    if (able := runnable(model, submodule)) is not model:
        model, submodule = able, None
    task = Compression(method, model, submodule, input_size)
    scoring, judging = _shared_out(batches, method.calibration, judged=task.needs_judging)

    def run(module: nn.Module, batch: Any) -> Any:
        return run_on(module, on_device_of(task.anatomy, batch[0]))

    task = task.for_images(partial(run, model, scoring[0]) if scoring else None)
    scores = scored_by(task.scorer(), model, scoring, progress=options.progress)
    if task.needs_judging:
        judge = InPlace(model, judging, run, prediction, submodule)
        log.info("%s", duration_in_words(judge, method.n_trials))
        evaluate = judge
    plan, found = task.decide(scores, evaluate, options)
    needed: dict[str, Any] = {"lstsq": {"moments": scores.moments}, "sequential": {"batches": [*scoring, *judging]}}
    small = slim(model, plan, task.compensate, **needed.get(task.compensate, {}), submodule=submodule)
    if heal:
        healing.heal(
            small, model, [*scoring, *judging], heal, submodule=submodule, seed=seed, progress=options.progress
        )
    return Compressed(small, plan, plan.policy, scores, found)


def duration_in_words(judge: InPlace, n_trials: int) -> str:
    """How long a search will take, before it starts."""
    seconds = n_trials * judge.seconds
    total = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return (
        f"searching: {n_trials} policies, each judged on {judge.images} images, which take the dense model "
        f"{judge.seconds:.1f} s; about {total} in all, and the search's own time"
    )


Pair = tuple[Tensor, Tensor | None]


def _shared_out(batches: Iterable[Any], calibration: Calibration, *, judged: bool) -> tuple[list[Pair], list[Pair]]:
    """(images, labels) batches to score on and to judge on: as many images as are wanted, read once."""
    if not isinstance(batches, Iterable):
        raise CompressionError(f"batches={batches!r:.80}: expected a DataLoader or a list of batches")
    wanted = calibration.images + (calibration.judging if judged else 0)
    pairs: list[Pair] = []
    total = 0
    for batch in batches:
        pairs.append(split_batch(batch))
        total += len(pairs[-1][0])
        if total >= wanted:
            break
    scored, others = calibration.shares(total, judged=judged)
    if judged and total < wanted:
        log.info("%s", calibration.in_words(total))
    size = calibration.batch_size
    return list(_between(pairs, 0, scored, size)), list(_between(pairs, scored, scored + others, size))


def _between(pairs: list[Pair], start: int, stop: int, size: int | None) -> Iterator[Pair]:
    """The images from `start` to `stop`, in the batches they came in, or in smaller ones of `size`."""
    first = 0
    for images, labels in pairs:
        part = slice(max(start - first, 0), max(stop - first, 0))
        first += len(images)
        some, theirs = images[part], None if labels is None else labels[part]
        step = size or len(some) or 1
        for begin in range(0, len(some), step):
            yield some[begin : begin + step], None if theirs is None else theirs[begin : begin + step]
