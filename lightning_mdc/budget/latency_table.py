"""What the parts of one model take on one device, and what whole policies take by it: their sum.

A block is split at its token point, into its attention and its MLP. Each half was timed at some widths and numbers of
tokens (the knots); in between, seconds are linear. Token stages and what is outside the blocks come on top.
`measure_latency_table` makes a table.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lightning_mdc.budget.cost_model import CostModel, Kept, num_params
from lightning_mdc.errors import BudgetError
from lightning_mdc.files import json_object, write_text
from lightning_mdc.models import Anatomy, find_anatomy
from lightning_mdc.policy import TOKENS, Policy, TokenOptions

# Matrix kernels are slower where a row of neurons is no whole number of vector registers (or tensor core tiles): 457
# neurons take 7 to 15 % longer than 456 on a CPU. Widths of either kind have knots of their own.
ALIGNMENT = 8


@dataclass(frozen=True)
class Surface:
    """Seconds as a function of units kept and tokens: linear between knots, constant beyond them.

    Attributes:
        units, tokens: the knots, increasing.
        seconds: per image at each knot, (units, tokens); never less for more.
    """

    units: tuple[int, ...]
    tokens: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", tuple(map(int, self.units)))
        object.__setattr__(self, "tokens", tuple(map(int, self.tokens)))
        object.__setattr__(self, "seconds", tuple(tuple(map(float, row)) for row in self.seconds))
        for knots in (self.units, self.tokens):
            if not knots or list(knots) != sorted(set(knots)):
                raise BudgetError(f"latency table: knots {list(knots)} do not increase")
        shape = (len(self.units), len(self.tokens))
        values = np.asarray(self.seconds, dtype=np.float64)
        if values.shape != shape or not (np.isfinite(values).all() and (values >= 0).all()):
            raise BudgetError(f"latency table: expected {shape} finite, non-negative seconds, got {values.shape}")

    @classmethod
    def fitted(cls, units: Sequence[int], tokens: Sequence[int], readings: np.ndarray) -> Surface:
        """Through `readings` (units, tokens), noise of the clock smoothed out: more never takes less."""
        seconds = np.asarray(readings, dtype=np.float64)
        for axis in (0, 1):
            rising = np.maximum.accumulate(seconds, axis=axis)
            falling = np.flip(np.minimum.accumulate(np.flip(seconds, axis), axis=axis), axis)
            seconds = (rising + falling) / 2
        return cls(tuple(units), tuple(tokens), tuple(map(tuple, seconds)))

    def __call__(self, units: Any, tokens: Any) -> Any:
        """Seconds per image; arrays are broadcast against each other."""
        seconds = np.asarray(self.seconds)
        low_u, high_u, part_u = _between(self.units, units)
        low_t, high_t, part_t = _between(self.tokens, tokens)
        fewer = seconds[low_u, low_t] * (1 - part_t) + seconds[low_u, high_t] * part_t
        more = seconds[high_u, low_t] * (1 - part_t) + seconds[high_u, high_t] * part_t
        return fewer * (1 - part_u) + more * part_u


def _between(knots: tuple[int, ...], values: Any) -> tuple[Any, Any, Any]:
    """Indices of the knots on either side of values, and how far values are from the first to the second."""
    if len(knots) == 1:
        zero = np.zeros(np.shape(values), dtype=np.int64)
        return zero, zero, zero
    ends = np.asarray(knots, dtype=np.float64)
    low = np.clip(np.searchsorted(ends, values, side="right") - 1, 0, len(knots) - 2)
    part = (values - ends[low]) / (ends[low + 1] - ends[low])
    return low, low + 1, np.clip(part, 0.0, 1.0)


@dataclass(frozen=True)
class HalfTimes:
    """What half a block takes: that before its token point, or that after it.

    Attributes:
        dimension: of its units; None: it has none that can be cut, and its one number of units is 0.
        aligned: by units and tokens; of units that are channels, for multiples of `ALIGNMENT` and for all.
        unaligned: for other numbers of such units; None if units are wider.
    """

    dimension: str | None
    aligned: Surface
    unaligned: Surface | None = None

    def __call__(self, units: Any, tokens: Any) -> Any:
        """Seconds per image; arrays are broadcast against each other."""
        seconds = self.aligned(units, tokens)
        if self.unaligned is None:
            return seconds
        aligned = (np.mod(units, ALIGNMENT) == 0) | (np.asarray(units) == self.aligned.units[-1])
        return np.where(aligned, seconds, self.unaligned(units, tokens))


@dataclass(frozen=True)
class BlockTimes:
    """What the parts of one kind of block take.

    Attributes:
        halves: before the token point, and after it.
        stage: what choosing, reducing and gathering tokens adds, by the units of the first half and the tokens that
            reach it; None: tokens cannot leave.
    """

    halves: tuple[HalfTimes, HalfTimes]
    stage: Surface | None


@dataclass(frozen=True)
class LatencyTable:
    """Measured seconds per image of the parts of one model on one device.

    Attributes:
        conditions: what it was measured of and on: device, threads, versions, dtype, batch size, input size, widths,
            what happens at token stages.
        kinds: the different blocks.
        kind_of_block: index into `kinds` of each block.
        outside: everything outside the blocks, by the tokens at the end (its one number of units is 0).
        whole: (sum of parts, timed in one piece) of the dense model and a few slim ones. The sum is corrected by the
            median of their quotients: a clock at every seam takes its time too. Empty: nothing to correct.
    """

    conditions: Mapping[str, Any]
    kinds: tuple[BlockTimes, ...]
    kind_of_block: tuple[int, ...]
    outside: Surface
    whole: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if not self.kinds or not all(0 <= kind < len(self.kinds) for kind in self.kind_of_block):
            raise BudgetError(f"latency table: kind_of_block={self.kind_of_block!r} for {len(self.kinds)} kind(s)")
        if not all(0 < seconds < math.inf for pair in self.whole for seconds in pair):
            raise BudgetError(f"latency table: whole={self.whole!r}: expected pairs of times in seconds")

    def check(self, anatomy: Anatomy, tokens: TokenOptions | None = None) -> None:
        """Refuse a model that this table is not of, or other `tokens`.

        Raises:
            BudgetError: its blocks are others than those of `anatomy`, or tokens were reduced in another way.
        """
        if self.conditions.get("model") != architecture(anatomy):
            raise BudgetError(
                f"the latency table is of another model than this {anatomy.name} (other widths, blocks or input size); "
                "measure one of this model: measure_latency_table(model)"
            )
        wanted, found = token_conditions(anatomy, tokens), self.conditions.get("tokens")
        if wanted != found:
            raise BudgetError(
                f"the latency table was measured with tokens={found}, asked for is {wanted}; measure one with "
                "measure_latency_table(model, tokens=TokenOptions(...))"
            )

    def seconds(self, costs: CostModel, kept: Kept) -> Any:
        """Seconds per image of what is kept, (...)."""
        return self.correction * self.sum_of_parts(costs, kept)

    @property
    def correction(self) -> float:
        """What a sum of parts is multiplied by."""
        return statistics.median([timed / parts for parts, timed in self.whole]) if self.whole else 1.0

    def sum_of_parts(self, costs: CostModel, kept: Kept) -> Any:
        """Outside, halves of blocks and token stages, as they were timed; see `whole`."""
        counts = {name: np.asarray(kept.units.get(name, sizes)) for name, sizes in costs.sizes.items()}
        flow = costs.flow(kept)
        shape = np.broadcast_shapes(*(c.shape[:-1] for c in counts.values()), np.shape(flow[-1].after))
        total = np.zeros(shape) + self.outside(0, flow[-1].after)
        for number, kind in enumerate(self.kinds):
            blocks = [block for block, of in enumerate(self.kind_of_block) if of == number]
            units: list[Any] = [0 if h.dimension is None else counts[h.dimension][..., blocks] for h in kind.halves]
            for half, of_half, seen in zip(kind.halves, units, ("before", "after"), strict=True):
                # All blocks of a kind at once, whatever number of tokens each sees.
                tokens = np.stack([np.broadcast_to(getattr(flow[b], seen), shape) for b in blocks], axis=-1)
                total = total + half(of_half, tokens).sum(axis=-1)
            for place, block in enumerate(blocks):
                before, stay = flow[block].before, flow[block].stay
                if kind.stage is not None and stay is not None:
                    stage = kind.stage(units[0][..., place] if np.ndim(units[0]) else 0, before)
                    total = total + np.where(stay < before, stage, 0.0)
        return total

    def of_dense(self, costs: CostModel) -> float:
        """Seconds per image of the model as it is."""
        return float(self.seconds(costs, costs.everything))

    def of_policy(self, model: nn.Module, policy: Policy) -> float:
        """Seconds per image of the slim model that `policy` makes of the dense `model`, by this table."""
        costs = CostModel(find_anatomy(model))
        self.check(costs.anatomy, self.tokens)
        return float(self.seconds(costs, costs.kept_by(policy, self.tokens)))

    @property
    def tokens(self) -> TokenOptions:
        """What happened at token stages."""
        return TokenOptions(**(self.conditions.get("tokens") or {}))

    # --- as JSON ------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Sorted JSON."""
        return json.dumps({"format": 1, **asdict(self)}, sort_keys=True)

    def save(self, path: str | Path) -> None:
        """Write the JSON file at `path`, for `load` on another machine say."""
        write_text(Path(path), self.to_json() + "\n")

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """The table written by `to_json`.

        Raises:
            BudgetError: the text is no such table.
        """
        return cls.from_fields(json_object(text, "latency table", BudgetError))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> LatencyTable:
        """The table that `to_json` wrote, as JSON has been read.

        Raises:
            BudgetError: they are of no such table.
        """
        try:
            if fields["format"] != 1:
                raise BudgetError("latency table: its format is none this version knows")
            return cls(
                conditions=dict(fields["conditions"]),
                kinds=tuple(_block_times(**kind) for kind in fields["kinds"]),
                kind_of_block=tuple(map(int, fields["kind_of_block"])),
                outside=Surface(**fields["outside"]),
                whole=tuple((float(parts), float(timed)) for parts, timed in fields["whole"]),
            )
        except BudgetError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BudgetError(f"latency table JSON is malformed: {type(error).__name__}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """The table in the JSON file at `path`, measured here or on another machine.

        Raises:
            BudgetError: there is none.
        """
        try:
            return cls.from_json(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise BudgetError(f"table={str(path)!r} cannot be read: {error}") from error


def _block_times(halves: Any, stage: Any) -> BlockTimes:
    first, second = (
        HalfTimes(half["dimension"], Surface(**half["aligned"]), half["unaligned"] and Surface(**half["unaligned"]))
        for half in halves
    )
    return BlockTimes((first, second), stage and Surface(**stage))


def token_conditions(anatomy: Anatomy, tokens: TokenOptions | None) -> dict[str, Any] | None:
    """What happens at token stages, as `tokens` says or as is built in, JSON-ready; None where no tokens can leave."""
    if anatomy.stages:
        built_in = CostModel(anatomy).everything
        return {"reduction": built_in.reduction, "restore": built_in.restore}
    if TOKENS in anatomy.reasons:
        return None
    tokens = TokenOptions() if tokens is None else tokens
    return {"reduction": tokens.reduction, "restore": anatomy.restores(tokens.restore)}


def architecture(anatomy: Anatomy) -> dict[str, Any]:
    """What has to be the same for two models to take the same time, JSON-ready."""
    kinds, kind_of_block = block_kinds(anatomy)
    inside = sum(p.numel() for block in anatomy.blocks for p in block.module.parameters())
    return {
        "class": type(anatomy.model).__name__,
        "input_size": list(anatomy.input_size),
        "grid": list(anatomy.grid),
        "prefix_tokens": anatomy.num_prefix_tokens,
        "class_rows": len(anatomy.class_rows),
        "params_outside": num_params(anatomy.model) - inside,
        "kinds": [kind for kind, _ in kinds],
        "kind_of_block": kind_of_block,
    }


def block_kinds(anatomy: Anatomy) -> tuple[list[tuple[dict[str, Any], int]], list[int]]:
    """The different blocks, each as its widths and the index of the first such block; and the kind of every block."""
    kinds: list[tuple[dict[str, Any], int]] = []
    kind_of_block = []
    for index, block in enumerate(anatomy.blocks):
        kind: dict[str, Any] = {name: [units.count, units.width] for name, units in block.units.items()}
        kind["weights"] = {name: list(p.shape) for name, p in block.module.named_parameters()}
        known = [other for other, _ in kinds]
        if kind not in known:
            kinds.append((kind, index))
            known.append(kind)
        kind_of_block.append(known.index(kind))
    return kinds, kind_of_block
