"""A policy and scores give a plan: each block keeps its best-scored units, as many as the policy says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_mdc.errors import CalibrationError, PlanError, check_kind, check_whole
from lightning_mdc.importance.exchange import exchanged
from lightning_mdc.importance.moments import Moments
from lightning_mdc.importance.scores import Scores, min_max
from lightning_mdc.models import Anatomy, Counts, find_anatomy
from lightning_mdc.policy import Plan, Policy, TokenOptions, TokenStage
from lightning_mdc.tokens.flow import tokens_after, tokens_kept
from lightning_mdc.tokens.reduction import reduction_class


def make_plan(
    model: nn.Module,
    scores: Scores,
    policy: Policy,
    tokens: TokenOptions | None = None,
    *,
    swaps: int = 0,
    input_size: tuple[int, int] | None = None,
    submodule: str | None = None,
) -> Plan:
    """The plan that keeps each block's best-scored units; ties go to the lower index.

    Args:
        model: the dense model (or a module that holds it) that was scored.
        scores: from `score`; a dimension that `policy` does not prune may be missing.
        policy: keep ratios.
        tokens: what happens at a token stage; None: ``TokenOptions()``.
        swaps: how many times at most, in each block, a kept and a removed unit change places while their layer loses
            less by it, refitted; see `importance.exchange`. Needs the `moments` of scores.
        input_size: (height, width) in pixels at which tokens are kept in whole numbers; None: the one that `policy`
            was priced at, else the model's own.
        submodule: of the vision transformer in `model`, as an attribute path; None finds it if there is just one.

    Raises:
        PolicyError: the policy does not fit the model.
        CalibrationError: scores are missing or of another model.
        CompensationError: swaps by moments of another model.
        PlanError: a reduction that is not known, priors where positions are not, or swaps that are no whole number.
    """
    if not isinstance(scores, Scores):
        raise CalibrationError(f"scores={scores!r:.80}: expected Scores, e.g. from score(model, batches)")
    anatomy = find_anatomy(model, submodule)
    counts = anatomy.counts(policy)
    check_kind("tokens", tokens, TokenOptions, PlanError)
    options = TokenOptions() if tokens is None else tokens
    reduction_class(options.reduction)  # refuses an unknown one, whether or not any token leaves
    check_whole("swaps", swaps, 0, PlanError)
    kept = {
        name: _best(name, sizes, counts.units.get(name, ()), scores.units(name))
        for name, sizes in anatomy.sizes.items()
    }
    size = input_size or policy.input_size or anatomy.input_size[1:]
    return Plan(
        kept=_exchanged(anatomy, kept, scores.moments, swaps) if swaps else kept,
        sizes=anatomy.sizes,
        tokens=_token_stages(anatomy, counts, scores, options, size),
        reduction=options.reduction,
        restore=anatomy.restores(options.restore),
        input_size=size,
    )


def _best(
    dimension: str, sizes: tuple[int, ...], counts: Iterable[int], scores: list[Tensor]
) -> tuple[tuple[int, ...], ...]:
    kept = []
    for block, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        if count == size:
            kept.append(tuple(range(size)))
            continue
        if len(scores) != len(sizes) or scores[block].shape != (size,):
            shapes = [tuple(s.shape) for s in scores]
            raise CalibrationError(
                f"scores.{dimension} does not fit: block {block} has {size} {dimension}, scores have shapes {shapes}; "
                "score this model, with this dimension"
            )
        order = torch.argsort(scores[block].double().cpu(), descending=True, stable=True)
        kept.append(tuple(sorted(order[: int(count)].tolist())))
    return tuple(kept)


def _exchanged(
    anatomy: Anatomy, kept: Mapping[str, Sequence[tuple[int, ...]]], moments: Moments | None, swaps: int
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """What is kept after swaps."""
    if moments is not None:
        moments.check_fit(anatomy)
    after = {name: list(of_blocks) for name, of_blocks in kept.items()}
    for units in anatomy.all_units:
        before = after[units.dimension][units.block]
        if len(before) == units.count:
            continue
        layer = None if moments is None else moments.of(units)
        if layer is None:
            raise CalibrationError(
                f"swaps={swaps}: scores have no moments of the {units.dimension}; score with this dimension and "
                "moments=True"
            )
        weight, covariance = units.reader.weight.detach().cpu().double(), layer.covariance().cpu()
        after[units.dimension][units.block] = exchanged(covariance, weight, before, units.count, swaps)
    return {name: tuple(of_blocks) for name, of_blocks in after.items()}


def _token_stages(
    anatomy: Anatomy, counts: Counts, scores: Scores, options: TokenOptions, input_size: tuple[int, int]
) -> tuple[TokenStage, ...]:
    stages = []
    height, width = anatomy.grid_of(input_size)
    tokens = height * width + anatomy.num_prefix_tokens
    for block, ratio in zip(counts.stages, counts.tokens, strict=True):
        kept = int(tokens_kept(tokens, float(ratio), anatomy.num_prefix_tokens))
        if kept == tokens:
            stages.append(TokenStage(block, 1.0))
            continue
        point = anatomy.blocks[block].point
        assert point is not None  # every block has one where tokens may leave
        scoring = counts.units.get(point.attention.dimension)
        prior = None
        if options.score != "attention" or (scoring is not None and scoring[block] == 0):
            prior = _prior(anatomy, scores, block, required=options.score is not None and options.score != "attention")
        stages.append(
            TokenStage(
                block,
                keep=kept / tokens,
                score="attention" if prior is None else options.score or "attention*dependence",
                prior=prior,
                grid=None if prior is None else scores.grid or anatomy.grid,
            )
        )
        tokens = int(tokens_after(tokens, kept, options.reduction))
    return tuple(stages)


def _prior(anatomy: Anatomy, scores: Scores, block: int, *, required: bool) -> tuple[float, ...] | None:
    height, width = scores.grid or anatomy.grid
    if anatomy.drops_patches_at_random and required:
        raise PlanError(
            f"token score: {anatomy.name} drops patches at random in training, so a position is not where it was; use "
            "TokenOptions(score='attention'), or patch_drop_rate=0"
        )
    prior = scores.tokens[scores.stages.index(block)] if block in scores.stages else None
    if prior is None or prior.shape != (height * width,) or anatomy.drops_patches_at_random:
        if required:
            raise CalibrationError(
                f"token score needs scores.tokens for the stage at block {block} with {height * width} positions; "
                "score this model's tokens too, with the policy's stages"
            )
        return None
    # So many digits that ranks which add up in another order come to the same plan.
    return tuple(round(value, 4) for value in min_max(prior.double()).tolist())
