"""How much each dimension of each block matters alone: accuracy and KL as it goes from whole to nothing."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lightning_mdc.budget import CostModel
from lightning_mdc.distributed import on_every_rank, on_first_rank
from lightning_mdc.errors import SearchError
from lightning_mdc.files import csv_text, write_text
from lightning_mdc.importance import Scores
from lightning_mdc.models import Anatomy, find_anatomy
from lightning_mdc.policy import DIMENSIONS, TOKENS, Policy, TokenOptions, keep_count
from lightning_mdc.policy_search.held_out import HeldOut
from lightning_mdc.progress import bar
from lightning_mdc.surgery import slim
from lightning_mdc.surgery.plan import make_plan
from lightning_mdc.tokens.flow import tokens_kept

log = logging.getLogger(__name__)

# Keep ratios to try of units that are channels, and of tokens. Of wider units every number is, or so many where there
# are more.
_LEVELS = (0.75, 0.5, 0.25, 0.1, 0.0)
_TOKEN_LEVELS = (0.9, 0.7, 0.5, 0.3, 0.1, 0.0)
_MOST_COUNTS = 8

Key = tuple[str, int, float]


@dataclass(frozen=True)
class Cut:
    """One dimension of one block cut, all else whole.

    Attributes:
        dimension: of `policy.DIMENSIONS`.
        block: for tokens, the block of the token stage.
        keep: realised keep ratio; 1 is the dense model.
        accuracy: top-1 on the held-out images, a fraction.
        kl: mean KL(dense ‖ cut) of the predictions, in nats.
        cost: MACs as a fraction of dense.
    """

    dimension: str
    block: int
    keep: float
    accuracy: float
    kl: float
    cost: float

    @property
    def key(self) -> Key:
        """What was cut, and how far: dimension, block, keep ratio."""
        return self.dimension, self.block, self.keep


@dataclass(frozen=True)
class Sensitivity:
    """All cuts that were tried, in the order they were tried."""

    cuts: tuple[Cut, ...]

    def curve(self, dimension: str, block: int) -> tuple[Cut, ...]:
        """The cuts of one dimension of one block, from whole to nothing."""
        cuts = [cut for cut in self.cuts if (cut.dimension, cut.block) == (dimension, block)]
        return tuple(sorted(cuts, key=lambda cut: -cut.keep))

    def blocks(self, dimension: str) -> tuple[int, ...]:
        """The blocks in which the dimension was cut."""
        return tuple(sorted({cut.block for cut in self.cuts if cut.dimension == dimension}))

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Those that were cut."""
        return tuple(name for name in DIMENSIONS if self.blocks(name))

    def save(self, path: Path) -> None:
        """Write a CSV file with a header, a line per cut, so that it is there whole or not at all."""
        write_text(path, csv_text([field.name for field in fields(Cut)], map(astuple, self.cuts)))

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """What `save` wrote.

        Raises:
            SearchError: it cannot be read.
        """
        try:
            rows = csv.DictReader(path.read_text().splitlines())
            if rows.fieldnames != [field.name for field in fields(Cut)]:
                raise ValueError(f"its columns are {rows.fieldnames}")
            return cls(
                tuple(
                    Cut(
                        row["dimension"],
                        int(row["block"]),
                        *(float(row[name]) for name in ("keep", "accuracy", "kl", "cost")),
                    )
                    for row in rows
                )
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise SearchError(f"{path} holds no sensitivities ({error}); delete it and measure them again") from error


def measure_sensitivity(
    model: nn.Module,
    scores: Scores,
    held_out: HeldOut,
    *,
    levels: Mapping[str, Sequence[float] | None] | None = None,
    stages: Sequence[int] | None = None,
    tokens: TokenOptions | None = None,
    state: Path | None = None,
    progress: bool = True,
    submodule: str | None = None,
) -> Sensitivity:
    """Cut each dimension of each block (for tokens, each stage) alone, step by step, and judge what is left.

    Which units go first is what the scores say. In a distributed run all ranks judge, and the first one writes.

    Args:
        model: the dense model (or a module that holds it); unchanged.
        scores: from `score`.
        held_out: of labelled images, with ``dense=model``.
        levels: keep ratios to try per dimension; None, also of one: every number of heads, or eight steps where there
            are more, and some ratios of neurons and tokens.
        stages: blocks of the token stages; None means quarters of the depth.
        tokens: what happens at a token stage; None: ``TokenOptions()``.
        state: CSV file for the cuts made so far; those that are there already are not made again. It has to be of
            this model, these scores and these images.
        progress: show a progress bar where there is a terminal.
        submodule: of the vision transformer in `model`; see `find_anatomy`.

    Raises:
        SearchError: `held_out` does not tell both accuracy and KL.
        PlanError: `tokens` are given where none can leave, or none do by default.
    """
    anatomy = find_anatomy(model, submodule)
    costs = CostModel(anatomy)
    blocks = anatomy.check_stages(None if stages is None else tuple(stages))
    dimensions = anatomy.to_prune(None, tokens)
    wanted = list(_cuts(anatomy, dimensions, costs.num_tokens, {} if levels is None else levels, blocks))
    known = on_first_rank(partial(_known, state))
    done = sum(key in known for key, _ in wanted)
    # All curves begin at the same model, which is judged once.
    whole = next((cut for cut in known.values() if cut.keep == 1), None)

    def cut_model(policy: Policy) -> tuple[nn.Module, float]:
        plan = make_plan(anatomy.model, scores, policy, tokens)
        with torch.no_grad():
            return slim(anatomy.model, plan).eval(), costs.of_plan(plan) / costs.of_model()

    def judged(key: Key, policy: Policy) -> Cut:
        small, cost = on_every_rank(partial(cut_model, policy))
        facts = held_out.judge(small).facts
        if not {"accuracy", "kl"} <= set(facts):
            raise SearchError(
                f"held_out tells {sorted(facts)} of a model; sensitivity needs accuracy and kl: give batches of "
                "(images, labels) and dense=model"
            )
        return Cut(*key, facts["accuracy"], facts["kl"], cost)

    with bar("Cutting", len(wanted), completed=done, shown=progress) as advance:
        for key, policy in wanted:
            if key in known:
                continue
            is_whole = key[2] == 1
            cut = replace(whole, dimension=key[0], block=key[1]) if is_whole and whole else judged(key, policy)
            whole = cut if is_whole else whole
            known[key] = cut
            if state is not None:
                on_first_rank(partial(Sensitivity(tuple(known.values())).save, state))
            message = f"{cut.dimension} of block {cut.block} to {cut.keep:.0%}: top-1 {cut.accuracy:.1%}"
            log.debug("  %s, KL %.4f", message, cut.kl)
            advance(message)
    return Sensitivity(tuple(known[key] for key, _ in wanted))


def _known(state: Path | None) -> dict[Key, Cut]:
    if state is None or not state.exists():
        return {}
    try:
        return {cut.key: cut for cut in Sensitivity.load(state).cuts}
    except SearchError as error:
        aside = state.with_name(f"{state.name}.damaged")
        state.replace(aside)
        log.warning("%s; the file is now %s, and all cuts are made again", error, aside)
        return {}


def _cuts(
    anatomy: Anatomy,
    dimensions: Sequence[str],
    num_tokens: int,
    levels: Mapping[str, Sequence[float] | None],
    stages: Sequence[int],
) -> Iterator[tuple[Key, Policy]]:
    """((dimension, block, realised keep ratio), policy) of every cut, each curve from whole to nothing."""
    for dimension in dimensions:
        blocks = stages if dimension == TOKENS else range(anatomy.depth)
        for index, block in enumerate(blocks):
            units = anatomy.blocks[block].units.get(dimension)
            size = num_tokens if dimension == TOKENS else 0 if units is None else units.count
            if not size:  # there is nothing to cut
                continue
            ratios = levels.get(dimension)
            if ratios is None and units is not None and units.width > 1:
                ratios = np.linspace(1, 0, min(size, _MOST_COUNTS) + 1).tolist()
            if ratios is None:
                ratios = _TOKEN_LEVELS if dimension == TOKENS else _LEVELS
            if dimension == TOKENS:
                kept = {int(tokens_kept(size, ratio, anatomy.num_prefix_tokens)) for ratio in ratios}
            else:
                kept = {keep_count(size, ratio) for ratio in ratios}
            for count in sorted({size, *kept}, reverse=True):
                alone = [1.0] * len(blocks)
                alone[index] = count / size
                ratios_of: dict[str, list[float]] = {dimension: alone}
                policy = Policy(**ratios_of, stages=tuple(stages) if dimension == TOKENS else None)  # type: ignore[arg-type]
                yield (dimension, block, count / size), policy
