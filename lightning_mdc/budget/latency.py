"""What the parts of one model take on one device, and what whole policies take by it: their sum.

A block is split into its attention and its MLP. Each was timed at some widths and numbers of tokens (the knots); in
between, seconds are linear. Token stages and what is outside the blocks come on top. `measure_latency_table` makes a
table.
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

from lightning_mdc.budget.cost_model import CostModel, Kept
from lightning_mdc.budget.params import num_params
from lightning_mdc.errors import BudgetError
from lightning_mdc.files import json_object, write_text
from lightning_mdc.models import Sites, find_sites
from lightning_mdc.policy import Policy

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
class BlockTimes:
    """What the parts of one kind of block take.

    Attributes:
        attention: by heads and tokens.
        mlp: by neurons and tokens, for multiples of `ALIGNMENT` and for the whole width.
        unaligned_mlp: for other numbers of neurons.
        stage: what choosing and gathering tokens adds, by heads and the tokens that reach it; None: tokens
            cannot leave.
    """

    attention: Surface
    mlp: Surface
    unaligned_mlp: Surface
    stage: Surface | None

    def mlp_seconds(self, neurons: Any, tokens: Any) -> Any:
        """Seconds per image; arrays are broadcast against each other."""
        aligned = (np.mod(neurons, ALIGNMENT) == 0) | (np.asarray(neurons) == self.mlp.units[-1])
        return np.where(aligned, self.mlp(neurons, tokens), self.unaligned_mlp(neurons, tokens))


@dataclass(frozen=True)
class LatencyTable:
    """Measured seconds per image of the parts of one model on one device.

    Attributes:
        conditions: what it was measured of and on: device, threads, versions, dtype, batch size, input size, widths.
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

    def check(self, sites: Sites) -> None:
        """Refuse a model that this table is not of.

        Raises:
            BudgetError: its blocks are others than those of `sites`.
        """
        if self.conditions.get("model") != architecture(sites):
            raise BudgetError(
                f"the latency table is of another model than this {sites.name} (other widths, blocks or input size); "
                "measure one of this model: measure_latency_table(model)"
            )

    def seconds(self, costs: CostModel, kept: Kept) -> Any:
        """Seconds per image of what is kept, (...)."""
        return self.correction * self.sum_of_parts(costs, kept)

    @property
    def correction(self) -> float:
        """What a sum of parts is multiplied by."""
        return statistics.median([timed / parts for parts, timed in self.whole]) if self.whole else 1.0

    def sum_of_parts(self, costs: CostModel, kept: Kept) -> Any:
        """``outside + attention + MLP + token stages``, as they were timed; see `whole`."""
        heads, neurons = np.asarray(kept.heads), np.asarray(kept.neurons)
        flow = costs.flow(kept)
        shape = np.broadcast_shapes(heads.shape[:-1], neurons.shape[:-1], np.shape(flow[-1].mlp))
        total = np.zeros(shape) + self.outside(0, flow[-1].mlp)
        for number, kind in enumerate(self.kinds):
            blocks = [block for block, of in enumerate(self.kind_of_block) if of == number]
            # All blocks of a kind at once, whatever number of tokens each sees.
            before = np.stack([np.broadcast_to(flow[b].attention, shape) for b in blocks], axis=-1)
            after = np.stack([np.broadcast_to(flow[b].mlp, shape) for b in blocks], axis=-1)
            total = total + kind.attention(heads[..., blocks], before).sum(axis=-1)
            total = total + kind.mlp_seconds(neurons[..., blocks], after).sum(axis=-1)
            for block in blocks:
                if kind.stage is not None and flow[block].dropped is not False:
                    stage = kind.stage(heads[..., block], flow[block].attention)
                    total = total + np.where(flow[block].dropped, stage, 0.0)
        return total

    def of_dense(self, costs: CostModel) -> float:
        """Seconds per image of the model as it is."""
        return float(self.seconds(costs, costs.everything))

    def of_policy(self, model: nn.Module, policy: Policy) -> float:
        """Seconds per image of the slim model that `policy` makes of the dense `model`, by this table."""
        sites = find_sites(model)
        self.check(sites)
        costs = CostModel(sites)
        return float(self.seconds(costs, costs.kept_by(policy)))

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


def _block_times(stage: Mapping[str, Any] | None, **surfaces: Mapping[str, Any]) -> BlockTimes:
    made = {name: Surface(**fields) for name, fields in surfaces.items()}
    return BlockTimes(**made, stage=None if stage is None else Surface(**stage))


def architecture(sites: Sites) -> dict[str, Any]:
    """What has to be the same for two models to take the same time, JSON-ready."""
    kinds, kind_of_block = block_kinds(sites)
    inside = sum(p.numel() for block in sites.blocks for p in block.module.parameters())
    return {
        "class": type(sites.model).__name__,
        "input_size": list(sites.input_size),
        "grid": list(sites.grid),
        "prefix_tokens": sites.num_prefix_tokens,
        "class_rows": len(sites.class_rows),
        "params_outside": num_params(sites.model) - inside,
        "kinds": [kind for kind, _ in kinds],
        "kind_of_block": kind_of_block,
    }


def block_kinds(sites: Sites) -> tuple[list[tuple[dict[str, Any], int]], list[int]]:
    """The different blocks, each as its widths and the index of the first such block; and the kind of every block."""
    kinds: list[tuple[dict[str, Any], int]] = []
    kind_of_block = []
    for index, block in enumerate(sites.blocks):
        units = {name: getattr(block, name) for name in ("heads", "neurons")}
        kind: dict[str, Any] = {
            name: None if site is None else [site.num_units, site.unit_width] for name, site in units.items()
        }
        kind["weights"] = {name: list(p.shape) for name, p in block.module.named_parameters()}
        known = [other for other, _ in kinds]
        if kind not in known:
            kinds.append((kind, index))
            known.append(kind)
        kind_of_block.append(known.index(kind))
    return kinds, kind_of_block
