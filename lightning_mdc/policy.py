"""The two values that travel: how much is kept (`Policy`) and what is kept (`Plan`). Both frozen, both JSON.

This module knows no model; `lightning_mdc.models.Sites` checks a policy or plan against one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

from lightning_mdc.errors import PlanError, PolicyError, as_number, check_one_of
from lightning_mdc.files import json_object, tuples

DIMENSIONS = ("heads", "neurons", "tokens")
TOKEN_SCORES = ("attention", "dependence", "attention*dependence")

Ratios: TypeAlias = float | Sequence[float]


def keep_count(num_units: int, keep_ratio: float) -> int:
    """How many of `num_units` units stay at `keep_ratio`; the one rounding rule for heads, neurons and tokens.

    The 1e-6 makes a realised ratio stable: ``keep_count(n, k / n) == k``, e.g. ``keep_count(197, 137 / 197) == 137``.
    """
    return math.floor(num_units * keep_ratio + 1e-6)


def kept_tokens(num_tokens: int, keep_ratio: float, num_prefix_tokens: int) -> int:
    """How many of `num_tokens` tokens (prefix included) stay: all prefix tokens and at least one more."""
    return min(num_tokens, max(keep_count(num_tokens, keep_ratio), num_prefix_tokens + 1))


def default_stages(depth: int) -> tuple[int, ...]:
    """Blocks (0-based) at which tokens leave: quarters of the depth, e.g. ``(3, 6, 9)`` of 12."""
    return tuple(sorted({depth * i // 4 for i in (1, 2, 3)}))


def check_dimensions(dimensions: Iterable[str]) -> tuple[str, ...]:
    """`dimensions` as a tuple in canonical order.

    Raises:
        PolicyError: a name that is no dimension, or none at all.
    """
    names = (dimensions,) if isinstance(dimensions, str) else tuple(dimensions)
    unknown = [name for name in names if name not in DIMENSIONS]
    if unknown or not names:
        raise PolicyError(f"dimensions={names!r}: expected one or more of {DIMENSIONS}")
    return tuple(name for name in DIMENSIONS if name in names)


@dataclass(frozen=True)
class Policy:
    """Keep ratios in [0, 1]: one per block for heads and for neurons, one per token stage for tokens.

    A single number stands for all blocks (or stages). `stages` are the blocks (0-based) whose attention is followed
    by a token drop; None means `default_stages` of the model's depth.

    Raises:
        PolicyError: a ratio that is no number in [0, 1], or stages that are not increasing block numbers.
    """

    heads: tuple[float, ...] = (1.0,)
    neurons: tuple[float, ...] = (1.0,)
    tokens: tuple[float, ...] = (1.0,)
    stages: tuple[int, ...] | None = None

    def __init__(
        self, heads: Ratios = 1.0, neurons: Ratios = 1.0, tokens: Ratios = 1.0, stages: Sequence[int] | None = None
    ) -> None:
        for name, ratios in (("heads", heads), ("neurons", neurons), ("tokens", tokens)):
            object.__setattr__(self, name, _ratios(name, ratios))
        object.__setattr__(self, "stages", None if stages is None else _stages(stages))

    def to_json(self) -> str:
        """Sorted JSON, equal for equal policies."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """The policy written by `to_json`.

        Raises:
            PolicyError: the text is no JSON object with these fields.
        """
        ratios = json_object(text, "policy", PolicyError)
        if unknown := sorted(set(ratios) - {*DIMENSIONS, "stages"}):
            raise PolicyError(f"policy JSON has unknown fields {unknown}; expected {[*DIMENSIONS, 'stages']}")
        return cls(**ratios)

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """The policy in the JSON file at `path`."""
        try:
            return cls.from_json(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyError(f"policy={str(path)!r} cannot be read: {error}") from error


@dataclass(frozen=True)
class TokenStage:
    """Where tokens leave, how many stay, and what decides which.

    Attributes:
        block: 0-based index of the block between whose attention and MLP tokens leave.
        keep: fraction of the stage's incoming tokens (prefix tokens counted) that stays.
        score: ``"attention"``, ``"dependence"`` (the prior alone) or ``"attention*dependence"``.
        prior: importance of each patch position in row-major order, or None.
        grid: height and width of the prior in patches.
    """

    block: int
    keep: float
    score: str = "attention"
    prior: tuple[float, ...] | None = None
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not _is_index(self.block):
            raise PlanError(f"token stage block={self.block!r} is no block number")
        if not _is_ratio(self.keep):
            raise PlanError(f"token stage keep={self.keep!r} is no keep ratio in [0, 1]")
        check_one_of("token stage score", self.score, TOKEN_SCORES, PlanError)
        if self.prior is None:
            if self.score != "attention":
                raise PlanError(f"token stage score={self.score!r} needs a prior, one number per patch position")
            return
        if self.grid is None or len(self.grid) != 2 or not all(_is_index(side) for side in self.grid):
            raise PlanError(f"token stage grid={self.grid!r}: a prior needs its height and width in patches")
        if len(self.prior) != math.prod(self.grid) or not all(_is_finite(value) for value in self.prior):
            raise PlanError(
                f"token stage prior: expected {self.grid[0]}x{self.grid[1]} finite numbers, got {len(self.prior)}"
            )


@dataclass(frozen=True)
class Plan:
    """What is kept of one particular model: everything surgery, pricing, saving and drawing need to know.

    Attributes:
        heads: kept head indices per block, increasing; empty if the model's heads cannot be cut.
        neurons: kept MLP neuron indices per block, increasing.
        tokens: the policy's token stages, by block; one with ``keep=1`` drops nothing.
        num_heads: heads of each dense block.
        num_neurons: neurons of each dense block.
        fuse: whether dropped tokens are averaged into one that stays.

    Raises:
        PlanError: indices out of range, unsorted or doubled; stages out of order or out of depth.
    """

    heads: tuple[tuple[int, ...], ...]
    neurons: tuple[tuple[int, ...], ...]
    tokens: tuple[TokenStage, ...]
    num_heads: tuple[int, ...]
    num_neurons: tuple[int, ...]
    fuse: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.fuse, bool):
            raise PlanError(f"plan.fuse={self.fuse!r}: expected true or false")
        for name, kept, sizes in (
            ("heads", self.heads, self.num_heads),
            ("neurons", self.neurons, self.num_neurons),
        ):
            if len(kept) != len(sizes):
                raise PlanError(f"plan.{name} covers {len(kept)} blocks, its dense sizes {len(sizes)}")
            for block, (indices, size) in enumerate(zip(kept, sizes, strict=True)):
                if not all(type(i) is int and i >= 0 for i in (*indices, size)):  # plain ints: JSON knows no others
                    raise PlanError(f"plan.{name}[{block}] holds something that is no index")
                if any(b <= a for a, b in itertools.pairwise(indices)):
                    raise PlanError(f"plan.{name}[{block}] must increase without repeats, got {list(indices)[:8]}...")
                if indices and indices[-1] >= size:
                    raise PlanError(f"plan.{name}[{block}] has index {indices[-1]}, but the block has {size} {name}")
        blocks = [stage.block for stage in self.tokens]
        if blocks != sorted(set(blocks)) or any(block >= self.depth for block in blocks):
            raise PlanError(f"plan.tokens stages at blocks {blocks}: expected increasing numbers below {self.depth}")

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return max(len(self.num_heads), len(self.num_neurons))

    @property
    def hash(self) -> str:
        """SHA-256 of the JSON form: equal plans, equal hashes, on every rank and machine."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def policy(self) -> Policy:
        """The realised keep ratios k/n."""

        def ratios(indices: tuple[tuple[int, ...], ...], sizes: tuple[int, ...]) -> Ratios:
            return [len(kept) / n if n else 1.0 for kept, n in zip(indices, sizes, strict=True)] or 1.0

        return Policy(
            heads=ratios(self.heads, self.num_heads),
            neurons=ratios(self.neurons, self.num_neurons),
            tokens=[stage.keep for stage in self.tokens],
            stages=[stage.block for stage in self.tokens],
        )

    @property
    def drops_tokens(self) -> bool:
        """Whether any token leaves."""
        return any(stage.keep < 1 for stage in self.tokens)

    def to_json(self) -> str:
        """Sorted JSON without timestamps: equal plans give equal text."""
        return json.dumps({"format": 1, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan written by `to_json`.

        Raises:
            PlanError: the text is no such plan; says which field is wrong.
        """
        plan = tuples(json_object(text, "plan", PlanError))
        if plan.pop("format", None) != 1:
            raise PlanError("plan JSON: field 'format' must be 1; the file is no plan or of a newer version")
        try:
            given: dict[str, Any] = {
                name: tuple(value) if name != "fuse" else value for name, value in _all_fields(cls, plan).items()
            }
            stages = [TokenStage(**_all_fields(TokenStage, stage, ": a token stage")) for stage in given["tokens"]]
            return cls(**{**given, "tokens": tuple(stages)})
        except (TypeError, KeyError, AttributeError) as error:
            raise PlanError(f"plan JSON is malformed: {error}") from error


def _all_fields(kind: type[Plan | TokenStage], values: dict[str, Any], what: str = "") -> dict[str, Any]:
    expected = {field.name for field in fields(kind)}
    if set(values) != expected:
        raise PlanError(f"plan JSON{what} has fields {sorted(values)}, expected {sorted(expected)}")
    return values


def _ratios(name: str, ratios: Any) -> tuple[float, ...]:
    if isinstance(ratios, numbers.Real) or getattr(ratios, "ndim", None) == 0:  # a 0-d tensor is a number too
        ratios = (ratios,)
    if isinstance(ratios, str) or not isinstance(ratios, Iterable):
        raise PolicyError(f"{name}={ratios!r}: expected a keep ratio or a list of them, each in [0, 1]")
    values = tuple(ratios)
    for position, value in enumerate(values):
        if not _is_ratio(value):
            raise PolicyError(f"{name}[{position}]={value!r:.80} is no keep ratio; expected a number in [0, 1]")
    return tuple(float(value) for value in values)


def _stages(stages: Any) -> tuple[int, ...]:
    if not isinstance(stages, Iterable) or isinstance(stages, str):
        raise PolicyError(f"stages={stages!r}: expected a list of block numbers")
    values = tuple(stages)
    if not all(_is_index(value) for value in values) or list(values) != sorted(set(values)):
        raise PolicyError(f"stages={list(values)!r}: expected increasing block numbers, counted from 0")
    return tuple(int(value) for value in values)


def _is_ratio(value: Any) -> bool:
    return (number := as_number(value)) is not None and 0.0 <= number <= 1.0


def _is_finite(value: Any) -> bool:
    """Whether JSON has a number for it: a tensor is none."""
    return isinstance(value, numbers.Real) and (number := as_number(value)) is not None and math.isfinite(number)


def _is_index(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 0
