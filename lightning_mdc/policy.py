"""The values that travel: how much is kept (`Policy`), what is kept (`Plan`), and the options of both. All frozen.

This module knows no model; `lightning_mdc.models.Anatomy` checks a policy or plan against one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from lightning_mdc.errors import PlanError, PolicyError, as_number, check_one_of, check_whole
from lightning_mdc.files import json_object, tuples

UNIT_DIMENSIONS = ("heads", "neurons")  # of every block
TOKENS = "tokens"  # of every token stage
DIMENSIONS = (*UNIT_DIMENSIONS, TOKENS)
TOKEN_SCORES = ("attention", "dependence", "attention*dependence")

Ratios: TypeAlias = float | Sequence[float]
T = TypeVar("T")


class ByDimension(Mapping[str, T]):
    """An immutable mapping from dimension to values; hashable if they are."""

    def __init__(self, values: Mapping[str, T]) -> None:
        self._values = dict(values)

    def __getitem__(self, dimension: str) -> T:
        return self._values[dimension]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __repr__(self) -> str:
        return repr(self._values)


def keep_count(num_units: int, keep_ratio: float) -> int:
    """How many of `num_units` units stay at `keep_ratio`; the one rounding rule for heads, neurons and tokens.

    The 1e-6 makes a realised ratio stable: ``keep_count(n, k / n) == k``, e.g. ``keep_count(197, 137 / 197) == 137``.
    """
    return math.floor(num_units * keep_ratio + 1e-6)


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
class Space:
    """Where a policy may lie.

    Args:
        min_heads, min_neurons: the fewest a block keeps.
        round_to: neurons are kept in multiples of it, because odd widths are slower than their MACs say; None: of 8
            if all blocks have at least 512 neurons, else of 1.
        stages: blocks (0-based) at which tokens leave; None means quarters of the depth.
        groups: ties neighbouring blocks together: so many groups instead of one axis per block, for heads and neurons
            alike or as ``{"heads": 3}``.
        bounds: per dimension the smallest and largest keep ratio, ``{"heads": (0.3, 1)}``, or one such pair per block
            (per stage for tokens).
        token_ratio: ``"shared"``: all stages keep the same ratio; ``"stages"``: one axis per stage.

    Raises:
        PolicyError: one that is out of range.
    """

    min_heads: int = 1
    min_neurons: int = 1
    round_to: int | None = None
    stages: tuple[int, ...] | None = None
    groups: Any = None
    bounds: Any = None
    token_ratio: str = "shared"

    def __post_init__(self) -> None:
        for dimension in UNIT_DIMENSIONS:
            check_whole(f"min_{dimension}", getattr(self, f"min_{dimension}"), 0, PolicyError)
        check_whole("round_to", self.round_to, 1, PolicyError, or_none="the default")
        check_one_of("token_ratio", self.token_ratio, ("shared", "stages"), PolicyError)
        object.__setattr__(self, "stages", None if self.stages is None else _stages(self.stages))

    def least(self, dimension: str) -> int:
        """The fewest units of a dimension that a block keeps."""
        return int(getattr(self, f"min_{dimension}"))


@dataclass(frozen=True)
class TokenOptions:
    """What happens at a token stage.

    Args:
        score: what ranks tokens at run time: ``"attention"``, ``"dependence"`` (a prior over positions) or
            ``"attention*dependence"``. None: the latter where scores say how much each position matters, else
            attention.
        reduction: what becomes of the tokens that leave: ``"fuse"`` averages them into one that stays, ``"drop"``
            drops them, ``"merge"`` averages each into the kept one most like it, ``"merge-proportional"`` also weighs
            a merged token by its size in later attentions; or the name of a registered one of your own.
        restore: whether at the end every input position has a token again, for dense outputs. None: where that costs
            nothing, as what follows the blocks reads prefix tokens only; and where no classifier is known, as who reads
            the tokens may count on a grid.

    Raises:
        PlanError: an unknown score, or a `restore` that is neither a bool nor None.
    """

    score: str | None = "attention"
    reduction: str = "fuse"
    restore: bool | None = None

    def __post_init__(self) -> None:
        check_one_of("score", self.score, (None, *TOKEN_SCORES), PlanError)
        if not isinstance(self.reduction, str):
            raise PlanError(f"reduction={self.reduction!r:.80}: expected the name of a reduction, such as 'fuse'")
        if not (self.restore is None or isinstance(self.restore, bool)):
            raise PlanError(f"restore={self.restore!r:.80}: expected True, False or None")


@dataclass(frozen=True, init=False)
class Policy:
    """Keep ratios in [0, 1]: one per block for heads and for neurons, one per token stage for tokens.

    A single number stands for all blocks (or stages). `stages` are the blocks (0-based) whose attention is followed
    by a token drop; None means `default_stages` of the model's depth. A block that cannot lose a dimension has a ratio
    too, which is not looked at.

    Attributes:
        ratios: by dimension; `heads`, `neurons` and `tokens` are views of it.
        input_size: (height, width) in pixels of the images that a budget was priced for, as 60 % of the MACs at 64
            pixels are another share at 512; None: it is of no budget. Policies of the same ratios are equal.

    Raises:
        PolicyError: a ratio that is no number in [0, 1], stages that are not increasing block numbers, or a size that
            is no (height, width).
    """

    ratios: Mapping[str, tuple[float, ...]]
    stages: tuple[int, ...] | None
    input_size: tuple[int, int] | None = field(compare=False)

    def __init__(
        self,
        heads: Ratios = 1.0,
        neurons: Ratios = 1.0,
        tokens: Ratios = 1.0,
        stages: Sequence[int] | None = None,
        input_size: Sequence[int] | None = None,
    ) -> None:
        given = dict(zip(DIMENSIONS, (heads, neurons, tokens), strict=True))
        object.__setattr__(self, "ratios", ByDimension({name: _ratios(name, r) for name, r in given.items()}))
        object.__setattr__(self, "stages", None if stages is None else _stages(stages))
        if input_size is not None and not _is_size(input_size):
            raise PolicyError(f"input_size={input_size!r:.80}: expected (height, width) in pixels")
        object.__setattr__(self, "input_size", None if input_size is None else tuple(map(int, input_size)))

    heads = property(lambda self: self.ratios["heads"], doc="Keep ratios of heads.")
    neurons = property(lambda self: self.ratios["neurons"], doc="Keep ratios of neurons.")
    tokens = property(lambda self: self.ratios["tokens"], doc="Keep ratios of token stages.")

    def __repr__(self) -> str:
        return f"Policy({', '.join(f'{name}={value!r}' for name, value in self.as_dict().items())})"

    def as_dict(self) -> dict[str, Any]:
        """Ratios by dimension, and the stages; the input size, if it was priced at one."""
        size = {} if self.input_size is None else {"input_size": self.input_size}
        return {**self.ratios, "stages": self.stages, **size}

    def to_json(self) -> str:
        """Sorted JSON, equal for equal policies of one size."""
        return json.dumps(self.as_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """The policy written by `to_json`.

        Raises:
            PolicyError: the text is no JSON object with these fields.
        """
        ratios = json_object(text, "policy", PolicyError)
        known = [*DIMENSIONS, "stages", "input_size"]
        if unknown := sorted(set(ratios) - set(known)):
            raise PolicyError(f"policy JSON has unknown fields {unknown}; expected {known}")
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
        if self.grid is None or not _is_size(self.grid):
            raise PlanError(f"token stage grid={self.grid!r}: a prior needs its height and width in patches")
        if len(self.prior) != math.prod(self.grid) or not all(_is_finite(value) for value in self.prior):
            raise PlanError(
                f"token stage prior: expected {self.grid[0]}x{self.grid[1]} finite numbers, got {len(self.prior)}"
            )


@dataclass(frozen=True)
class Plan:
    """What is kept of one particular model: everything surgery, pricing, saving and drawing need to know.

    Attributes:
        kept: by dimension the kept unit indices per block, increasing; no blocks if the model cannot lose the
            dimension. `heads` and `neurons` are views of it.
        sizes: by dimension the units of each dense block, 0 where a block cannot lose any. `num_heads` and
            `num_neurons` are views of it.
        tokens: the policy's token stages, by block; one with ``keep=1`` drops nothing.
        reduction: what becomes of tokens that leave; see `TokenOptions`.
        restore: whether every input position has a token again at the end.
        input_size: (height, width) in pixels of the images for which its budget was priced, and its tokens are kept in
            whole numbers; None: not known.

    Raises:
        PlanError: indices out of range, unsorted or doubled; stages out of order or out of depth; a size that is none.
    """

    kept: Mapping[str, tuple[tuple[int, ...], ...]]
    sizes: Mapping[str, tuple[int, ...]]
    tokens: tuple[TokenStage, ...] = ()
    reduction: str = "fuse"
    restore: bool = False
    input_size: tuple[int, int] | None = None

    heads = property(lambda self: self.kept["heads"], doc="Kept head indices per block.")
    neurons = property(lambda self: self.kept["neurons"], doc="Kept MLP neuron indices per block.")
    num_heads = property(lambda self: self.sizes["heads"], doc="Heads of each dense block.")
    num_neurons = property(lambda self: self.sizes["neurons"], doc="Neurons of each dense block.")

    def __post_init__(self) -> None:
        TokenOptions(reduction=self.reduction)  # refuses what is none
        if not isinstance(self.restore, bool):
            raise PlanError(f"plan.restore={self.restore!r:.80}: expected true or false")
        if self.input_size is not None and not _is_size(self.input_size):
            raise PlanError(f"plan.input_size={self.input_size!r:.80}: expected (height, width) in pixels")
        for field_name in ("kept", "sizes"):
            given = getattr(self, field_name)
            if set(given) != set(UNIT_DIMENSIONS):
                raise PlanError(f"plan.{field_name} is of {sorted(given)}, expected {list(UNIT_DIMENSIONS)}")
            object.__setattr__(self, field_name, ByDimension({name: given[name] for name in UNIT_DIMENSIONS}))
        for name, sizes in self.sizes.items():
            kept = self.kept[name]
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
        beyond = self.depth and any(block >= self.depth for block in blocks)  # without units it says no depth
        if blocks != sorted(set(blocks)) or beyond:
            raise PlanError(f"plan.tokens stages at blocks {blocks}: expected increasing numbers below {self.depth}")

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return max(map(len, self.sizes.values()))

    @property
    def hash(self) -> str:
        """SHA-256 of the JSON form: equal plans, equal hashes, on every rank and machine."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def policy(self) -> Policy:
        """The realised keep ratios k/n."""
        ratios: dict[str, Ratios] = {
            name: [len(kept) / n if n else 1.0 for kept, n in zip(self.kept[name], sizes, strict=True)] or 1.0
            for name, sizes in self.sizes.items()
        }
        return Policy(
            **ratios,
            tokens=[stage.keep for stage in self.tokens],
            stages=[stage.block for stage in self.tokens],
            input_size=self.input_size,
        )

    @property
    def leaving(self) -> tuple[TokenStage, ...]:
        """The token stages at which any token leaves."""
        return tuple(stage for stage in self.tokens if stage.keep < 1)

    def to_json(self) -> str:
        """Sorted JSON without timestamps: equal plans give equal text."""
        rest = {"tokens": [asdict(stage) for stage in self.tokens], **{n: getattr(self, n) for n in _OF_TOKENS}}
        rest |= {} if self.input_size is None else {"input_size": self.input_size}
        sizes = {f"num_{name}": sizes for name, sizes in self.sizes.items()}
        return json.dumps({"format": 1, **self.kept, **sizes, **rest}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan written by `to_json`.

        Raises:
            PlanError: the text is no such plan; says which field is wrong.
        """
        plan = tuples(json_object(text, "plan", PlanError))
        if plan.pop("format", None) != 1:
            raise PlanError("plan JSON: field 'format' must be 1; the file is no plan or of a newer version")
        names = {*UNIT_DIMENSIONS, *(f"num_{name}" for name in UNIT_DIMENSIONS), "tokens", *_OF_TOKENS}
        _check_fields({"input_size": None} | plan, {*names, "input_size"})  # a plan of no known size may say none
        try:
            for stage in plan["tokens"]:
                _check_fields(stage, {field.name for field in fields(TokenStage)}, ": a token stage")
            return cls(
                kept={name: tuple(plan[name]) for name in UNIT_DIMENSIONS},
                sizes={name: tuple(plan[f"num_{name}"]) for name in UNIT_DIMENSIONS},
                tokens=tuple(TokenStage(**stage) for stage in plan["tokens"]),
                **{name: plan[name] for name in _OF_TOKENS},
                input_size=plan.get("input_size"),
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise PlanError(f"plan JSON is malformed: {error}") from error


_OF_TOKENS = ("reduction", "restore")


def _check_fields(values: Any, expected: set[str], what: str = "") -> None:
    if set(values) != expected:
        raise PlanError(f"plan JSON{what} has fields {sorted(values)}, expected {sorted(expected)}")


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


def _is_size(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(_is_index(side) and side > 0 for side in value)


def _is_ratio(value: Any) -> bool:
    return (number := as_number(value)) is not None and 0.0 <= number <= 1.0


def _is_finite(value: Any) -> bool:
    """Whether JSON has a number for it: a tensor is none."""
    return isinstance(value, numbers.Real) and (number := as_number(value)) is not None and math.isfinite(number)


def _is_index(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 0
