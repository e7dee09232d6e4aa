"""A policy and scores give a plan: each block keeps its best-scored units, as many as the policy says."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from lightning_mdc.errors import CalibrationError, PlanError, check_one_of
from lightning_mdc.importance.scores import Scores, min_max
from lightning_mdc.models import Counts, Sites, find_sites
from lightning_mdc.policy import TOKEN_SCORES, Plan, Policy, TokenStage, kept_tokens


def make_plan(
    model: nn.Module,
    scores: Scores,
    policy: Policy,
    *,
    token_score: str = "attention",
    fuse_tokens: bool = True,
) -> Plan:
    """The plan that keeps each block's best-scored units; ties go to the lower index.

    Args:
        model: the dense model (or a module that holds it) that was scored.
        scores: from `score`; a dimension that `policy` does not prune may be missing.
        policy: keep ratios.
        token_score: what ranks tokens at run time: ``"attention"``, ``"dependence"`` or ``"attention*dependence"``.
            Dependence is a prior over positions, so it acts at the first stage that drops tokens; later stages no
            longer know positions and use attention.
        fuse_tokens: average dropped tokens into one that stays.

    Raises:
        PolicyError: the policy does not fit the model.
        CalibrationError: scores are missing or of another model.
        PlanError: an unknown `token_score`.
    """
    check_one_of("token_score", token_score, TOKEN_SCORES, PlanError)
    if not isinstance(scores, Scores):
        raise CalibrationError(f"scores={scores!r:.80}: expected Scores, e.g. from score(model, batches)")
    sites = find_sites(model)
    counts = sites.counts(policy)
    return Plan(
        heads=_best(sites.num_heads, counts.heads, scores.heads, "heads"),
        neurons=_best(sites.num_neurons, counts.neurons, scores.neurons, "neurons"),
        tokens=_token_stages(sites, counts, scores, token_score),
        num_heads=sites.num_heads,
        num_neurons=sites.num_neurons,
        fuse=fuse_tokens,
    )


def _best(
    sizes: tuple[int, ...], counts: np.ndarray, scores: list[Tensor], dimension: str
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


def _token_stages(sites: Sites, counts: Counts, scores: Scores, token_score: str) -> tuple[TokenStage, ...]:
    stages = []
    tokens = sites.grid[0] * sites.grid[1] + sites.num_prefix_tokens
    positions_known = True
    for block, ratio in zip(counts.stages, counts.tokens, strict=True):
        kept = kept_tokens(tokens, float(ratio), sites.num_prefix_tokens)
        if kept == tokens:
            stages.append(TokenStage(block, 1.0))
            continue
        headless = counts.heads.size > 0 and counts.heads[block] == 0
        prior = None
        if positions_known and (token_score != "attention" or headless):
            prior = _prior(sites, scores, block, required=token_score != "attention")
        stages.append(
            TokenStage(
                block,
                keep=kept / tokens,
                score="attention" if prior is None else token_score,
                prior=prior,
                grid=None if prior is None else sites.grid,
            )
        )
        tokens, positions_known = kept + 1, False
    return tuple(stages)


def _prior(sites: Sites, scores: Scores, block: int, *, required: bool) -> tuple[float, ...] | None:
    positions = sites.grid[0] * sites.grid[1]
    if sites.drops_patches_at_random and required:
        raise PlanError(
            f"token_score: {sites.name} drops patches at random in training, so a position is not where it was; use "
            "token_score='attention', or patch_drop_rate=0"
        )
    prior = scores.tokens[scores.stages.index(block)] if block in scores.stages else None
    if prior is None or prior.shape != (positions,) or sites.drops_patches_at_random:
        if required:
            raise CalibrationError(
                f"token_score needs scores.tokens for the stage at block {block} with {positions} positions; score "
                "this model with the policy's stages"
            )
        return None
    return tuple(min_max(prior.double()).tolist())
