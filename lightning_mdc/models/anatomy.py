"""What a vision transformer is made of, as data. A family says it once, everybody else reads it.

Units (heads, neurons) are slices of parameters: surgery cuts them, masks choose them at run time, prices and pictures
count them, and none of these knows what the module around them is called.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_mdc.errors import ArtifactError, PlanError, PolicyError, UnsupportedModelError
from lightning_mdc.policy import (
    DIMENSIONS,
    TOKENS,
    UNIT_DIMENSIONS,
    ByDimension,
    Plan,
    Policy,
    TokenOptions,
    TokenStage,
    check_dimensions,
    default_stages,
    keep_count,
)

# (units kept, tokens) -> MACs of one image. Numbers or arrays that broadcast against each other: thousands of policies
# are priced at once.
Macs = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Slice:
    """Where units live in one parameter or buffer: along `dim`, in `groups` runs one after another, each of all units.

    The rows of a packed ``qkv`` have 3 groups (q, k, v), those of a packed GLU's ``fc1`` 2, columns of ``proj`` 1.

    Attributes:
        module: that owns the tensor.
        name: of the tensor in it.
        width: entries of one unit in a run, if that is not what it is in the units' activation: 1 for a table with a
            column per head.
        start: of the first run, in a tensor that heads and neurons share: what is before and behind the runs stays.
            Heads are the first to be cut or masked, so theirs have to be behind the neurons'. None: the tensor is
            theirs alone.
    """

    module: nn.Module
    name: str
    dim: int = 0
    groups: int = 1
    width: int | None = None
    start: int | None = None

    @property
    def tensor(self) -> Tensor:
        """The parameter or buffer."""
        found: Tensor = getattr(self.module, self.name)
        return found


@dataclass(frozen=True)
class Size:
    """An attribute that follows from how many units there are, such as ``num_heads`` or ``normalized_shape``."""

    module: nn.Module
    name: str
    of: Callable[[int], Any]


@dataclass(frozen=True)
class Behaviour:
    """What a module does where it has fewer units than the library's forward counts on.

    Attributes:
        mixin: put before the module's class.
        attributes: indices of the kept units -> attributes of the module that the mixin reads, by name.
        calls_reader: whether the units' `reader` is called by the mixin only, while the library's forward takes its
            weights without calling it. The mixin then reads no such attributes: it is on, too, while units are watched.
    """

    module: nn.Module
    mixin: type
    attributes: Callable[[tuple[int, ...]], Mapping[str, Any]] = lambda kept: {}
    calls_reader: bool = False


@dataclass(frozen=True)
class Units:
    """One block's heads or neurons: everything that has to be masked, priced and cut together.

    Attributes:
        dimension: what they are, of `policy.UNIT_DIMENSIONS`.
        block: index of the block.
        name: the owner's path in the model, e.g. ``blocks.3.attn``.
        count: how many there are now.
        width: channels of one unit in what `reader` reads (``head_dim`` for heads, 1 for neurons); unit u owns
            ``[u * width, (u + 1) * width)``.
        slices: of all tensors that belong to units, biases and tables included.
        sizes: attributes to set when there are fewer.
        reader: the Linear layer that reads the units: its input is (..., count * width), all tokens of an image one
            after another. It is watched to score them, and refitted to make up for those that leave.
        macs: (units kept, tokens that their half of the block sees) -> MACs.
        after_point: whether they see the tokens that are left behind the token point, as the second half does.
        norm: a normalisation over the units' channels, by name and class, for messages; None if there is none.
        behaviours: of modules that cannot do with fewer units by themselves.
    """

    dimension: str
    block: int
    name: str
    count: int
    width: int
    slices: tuple[Slice, ...]
    sizes: tuple[Size, ...]
    reader: nn.Linear
    macs: Macs
    after_point: bool = False
    norm: str | None = None
    behaviours: tuple[Behaviour, ...] = ()

    @property
    def params(self) -> int:
        """Parameters that leave with one unit."""
        if not self.count:
            return 0
        found = ((part, part.module._parameters.get(part.name)) for part in self.slices)  # whole, even under a mask
        entries = ((part.groups * self._in_run(part), part.dim, p) for part, p in found if p is not None)
        return sum(p.numel() // p.shape[dim] * count for count, dim, p in entries)

    def _in_run(self, part: Slice) -> int:
        return self.width if part.width is None else part.width

    def entries(self, part: Slice, kept: Iterable[int]) -> Tensor:
        """Which entries along ``part.dim`` the `kept` units own: int64, on the CPU."""
        width = self._in_run(part)
        run = unit_channels(torch.tensor(list(kept), dtype=torch.long, device="cpu"), width) + (part.start or 0)
        return torch.cat([run + group * self.count * width for group in range(part.groups)])

    def left(self, part: Slice, kept: Iterable[int], size: int) -> Tensor:
        """Which of `size` entries along ``part.dim`` are left: those of the `kept` units, and what is no unit's."""
        own = self.entries(part, kept)
        if part.start is None:
            return own
        behind = part.start + part.groups * self.count * self._in_run(part)
        before, after = (torch.arange(*ends, device="cpu") for ends in ((0, part.start), (behind, size)))
        return torch.cat([before, own, after])


@dataclass(frozen=True)
class Channels:
    """Some channels of what a module puts out, (batch, tokens, channels)."""

    module: nn.Module
    start: int
    stop: int


@dataclass(frozen=True)
class TokenPoint:
    """Between the halves of a block, where tokens can leave.

    Attributes:
        halves: class with the family's `attend` and `finish`; see `tokens.block.StagedBlock`.
        attention: the units whose attention ranks tokens. Where they cannot be cut, all of them do.
        values: where the value vectors of the tokens can be seen, or else what they are made of.
        key_width: channels of a key, if that is not what `attention` has per unit.
        calls: the attention, which `attend` calls by `tokens.block.attention_called`, so that hooks on it see
            what they always do; None: it is not called.
    """

    halves: type
    attention: Units
    values: Channels
    key_width: int | None = None
    calls: nn.Module | None = None


@dataclass(frozen=True)
class Block:
    """One transformer block.

    Attributes:
        name: its path in the model, e.g. ``blocks.3``.
        units: by dimension; a dimension that the block cannot lose is missing.
        reasons: for each dimension that it cannot lose, why.
        point: where its tokens can leave; None: nowhere.
        stage: the token stage that is built in (a slim model).
        rest: tokens -> MACs of what no units stand for, in the half before the token point and in the one after it.
        second_half: the module whose call begins that half, for clocks; None: not known.
        alone: calls the module outside its model, with tokens (batch, tokens, dim) and what else it is given there, but
            for what that is given by name.
    """

    name: str
    module: nn.Module
    units: Mapping[str, Units]
    reasons: Mapping[str, str] = field(default_factory=dict)
    point: TokenPoint | None = None
    stage: TokenStage | None = None
    rest: tuple[Callable[[Any], Any] | None, Callable[[Any], Any] | None] = (None, None)
    second_half: nn.Module | None = None
    alone: Callable[..., Tensor] = lambda block, x, *beside: block(x, *beside)


class Family(ABC):
    """A family of models: the only code that knows a library's attribute names. To add one, `register` an instance.

    What it must say is `accepts` and `anatomy`; `describe`, `build` and `check_spec` let `save` and `load` rebuild its
    models. See ``docs/extending.md``.
    """

    name: str
    description: str

    @abstractmethod
    def accepts(self, module: nn.Module) -> bool:
        """Whether `anatomy` can say something about this module."""

    @abstractmethod
    def anatomy(self, model: Any) -> Anatomy:
        """What `model` is made of."""

    def refusal(self, module: nn.Module) -> str | None:
        """Why `module`, which looks like one of this family, is not accepted; None if it does not look like one."""
        return None

    def describe(self, model: Any, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """JSON-ready constructor arguments of the dense model (with units of those `sizes`) `model` comes from.

        Raises:
            ArtifactError: a part that no constructor argument expresses; names it.
        """
        raise ArtifactError(f"the family {self.name!r} does not say how its models are built")

    def build(self, spec: Mapping[str, Any]) -> nn.Module:
        """The dense model that `describe` described, with fresh weights, on the default device; from closed tables.

        Raises:
            ArtifactError: a field is missing, unknown or of the wrong type.
        """
        raise ArtifactError(f"the family {self.name!r} does not say how its models are built")

    def complete(self, model: Any, again: Callable[[], nn.Module]) -> None:
        """Put in place, on the CPU, what no file holds (tables of positions) of a model that was built on the meta
        device and has its weights by now. `again` makes another like it, with fresh weights, on the CPU."""
        missing = [name for name, buffer in model.named_buffers() if buffer.is_meta]
        if not missing:
            return
        buffers, dtype = dict(again().named_buffers()), next(model.parameters()).dtype
        for name in missing:
            owner, _, attribute = name.rpartition(".")
            buffer = buffers[name].to(dtype) if buffers[name].is_floating_point() else buffers[name]
            setattr(model.get_submodule(owner), attribute, buffer)

    def check_spec(self, spec: Mapping[str, Any], tensors: Collection[str]) -> None:
        """Refuse, before anything is built, a `spec` whose model would not have the `tensors` of these names.

        Building takes time per block even on the meta device; a depth the file has no weights for is not even tried.

        Raises:
            ArtifactError: it says how many blocks there are, and there are others.
        """
        return


@dataclass(frozen=True)
class Counts:
    """How many units of one model a policy keeps.

    Attributes:
        units: by dimension, kept units per block, int (blocks,), of all dimensions that the model can lose.
        tokens: keep ratios per token stage, float (stages,). How many tokens that is depends on the input size.
        stages: the blocks of the token stages.
    """

    units: Mapping[str, np.ndarray]
    tokens: np.ndarray
    stages: tuple[int, ...]


@dataclass(frozen=True)
class Anatomy:
    """What one model is made of.

    Attributes:
        model: the vision transformer itself (unwrapped).
        name: class name, for messages.
        family: that said so.
        blocks: in order of execution.
        dim: width of the residual stream; where stages differ, of the last.
        num_prefix_tokens: class, distillation and register tokens at the front; they never leave.
        class_rows: rows of the tokens the classifier reads; empty when it pools over all tokens.
        grid: (height, width) in patches at the model's own input size.
        input_size: (channels, height, width) of the model's own input.
        grid_of: input (height, width) in pixels -> grid in patches.
        fixed_macs: (input (height, width), tokens at the end) -> MACs outside the blocks.
        tokens_at: input (height, width) -> tokens that the halves of each block see, where not all see the same and
            none can leave: stages of another resolution, windows that are padded. None: what the first block sees.
        reader: mixin for the class of `passage` while tokens leave inside it, whose methods replace those that go
            through the blocks, by `tokens.block.through`; its ``plan`` is the one at work. None: tokens cannot leave.
        container: the part of the model that is called to go through the blocks; None: the model itself does.
        sequence: what holds the blocks and is called, which `reader` does by `tokens.block.called`; None: it is not.
        no_tokens: why tokens cannot leave, naming the module; None if they can.
        classifies: whether a classifier is known to read the tokens.
        drops_patches_at_random: whether the model drops patches at random in training, so that a token's place in the
            sequence does not tell its position.
    """

    model: nn.Module
    name: str
    family: Family
    blocks: tuple[Block, ...]
    dim: int
    num_prefix_tokens: int
    class_rows: tuple[int, ...]
    grid: tuple[int, int]
    input_size: tuple[int, int, int]
    grid_of: Callable[[tuple[int, int]], tuple[int, int]]
    fixed_macs: Callable[[tuple[int, int], Any], Any]
    tokens_at: Callable[[tuple[int, int]], Sequence[tuple[int, int]]] | None = None
    reader: type | None = None
    container: nn.Module | None = None
    sequence: nn.Module | None = None
    no_tokens: str | None = None
    classifies: bool = True
    drops_patches_at_random: bool = False

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def reasons(self) -> Mapping[str, str]:
        """For each dimension that the model cannot lose at all, why (naming the module)."""
        reasons, silence = {}, f"the family {self.family.name!r} does not say why"
        for dimension in UNIT_DIMENSIONS:
            if not any(dimension in block.units for block in self.blocks):
                said = (block.reasons[dimension] for block in self.blocks if dimension in block.reasons)
                reasons[dimension] = next(said, silence)
        return reasons | ({} if self.no_tokens is None else {TOKENS: self.no_tokens})

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The dimensions this model can lose units of, in some block at least."""
        reasons = self.reasons
        return tuple(dimension for dimension in DIMENSIONS if dimension not in reasons)

    def units(self, dimension: str) -> tuple[Units | None, ...]:
        """Every block's units; None where a block cannot lose any. Empty if none can."""
        units = tuple(block.units.get(dimension) for block in self.blocks)
        return units if any(units) else ()

    @property
    def all_units(self) -> Iterator[Units]:
        """All units of all dimensions and blocks."""
        return (units for dimension in UNIT_DIMENSIONS for units in self.units(dimension) if units is not None)

    def units_leaving(self, plan: Plan) -> Iterator[Units]:
        """The units of which some or all leave by `plan`."""
        return (units for units in self.all_units if len(plan.kept[units.dimension][units.block]) < units.count)

    @property
    def sizes(self) -> Mapping[str, tuple[int, ...]]:
        """By dimension, units per block now: 0 where a block cannot lose any, no blocks if none can."""
        return ByDimension(
            {d: tuple(0 if units is None else units.count for units in self.units(d)) for d in UNIT_DIMENSIONS}
        )

    @property
    def num_heads(self) -> tuple[int, ...]:
        """Heads per block now; see `sizes`."""
        return self.sizes["heads"]

    @property
    def num_neurons(self) -> tuple[int, ...]:
        """Neurons per block now; see `sizes`."""
        return self.sizes["neurons"]

    @property
    def stages(self) -> tuple[TokenStage, ...]:
        """Token stages already built in (a slim model)."""
        return tuple(block.stage for block in self.blocks if block.stage is not None)

    @property
    def built_in(self) -> Plan | None:
        """The plan that says what happens at `stages`; None if there are none."""
        return vars(self.passage)["plan"] if self.stages else None

    @property
    def passage(self) -> nn.Module:
        """What goes through the blocks."""
        return self.model if self.container is None else self.container

    def default_dimensions(self, restore: bool | None = None) -> tuple[str, ...]:
        """What may be pruned if nobody says: all the model can lose, but tokens only where nobody misses one: where a
        classifier is known, or `restore` puts a token in every position again."""
        safe = self.classifies or bool(restore)
        return tuple(d for d in self.dimensions if d != TOKENS or safe)

    def to_prune(self, dimensions: Iterable[str] | None, tokens: TokenOptions | None) -> tuple[str, ...]:
        """`dimensions`, or the default ones, where tokens that leave do as `tokens` say; see `TokenOptions`.

        Raises:
            UnsupportedModelError: the model cannot lose one of them.
            PlanError: `tokens` are given, and the model can lose none, or nobody has said that it may.
        """
        self.check_options(tokens)
        if dimensions is not None:
            return self.require(dimensions)
        found = self.default_dimensions(None if tokens is None else tokens.restore)
        if tokens is not None and TOKENS not in found:
            raise PlanError(
                f"tokens={tokens!r} is not looked at: no classifier of {self.name} is known, so it loses "
                f"{' and '.join(found)} only; pass dimensions={self.dimensions!r}, or TokenOptions(restore=True)"
            )
        return found

    def check_options(self, tokens: TokenOptions | None) -> None:
        """Refuse, with a `PlanError`, to be told what becomes of tokens where none can leave."""
        if tokens is not None and TOKENS in self.reasons:
            raise PlanError(
                f"tokens={tokens!r} is not looked at: {self.name} cannot lose tokens: {self.reasons[TOKENS]}; leave "
                "tokens= out"
            )

    def restores(self, asked: bool | None) -> bool:
        """Whether tokens come back at the end: as `asked`, or else where that costs nothing, as what follows the blocks
        reads prefix tokens only, and where no classifier is known, as who reads the tokens may count on a grid."""
        return bool(self.class_rows) or not self.classifies if asked is None else asked

    def require(self, dimensions: Iterable[str] | None) -> tuple[str, ...]:
        """`dimensions` (None means all three) if the model can lose them.

        Raises:
            UnsupportedModelError: names the module in the way and the dimensions that do work.
        """
        wanted = check_dimensions(DIMENSIONS if dimensions is None else dimensions)
        reasons = self.reasons
        for dimension in wanted:
            if dimension in reasons:
                raise UnsupportedModelError(
                    f"{self.name} cannot lose {dimension}: {reasons[dimension]}. Dimensions that do work: "
                    f"{', '.join(self.dimensions) or 'none'}"
                    + (f"; pass dimensions={self.dimensions!r}" if self.dimensions else "")
                )
        return wanted

    def counts(self, policy: Policy) -> Counts:
        """`policy` in whole units.

        Raises:
            PolicyError: ratios for another number of blocks or stages.
            UnsupportedModelError: the policy prunes a dimension the model cannot lose.
        """
        if not isinstance(policy, Policy):
            raise PolicyError(f"policy={policy!r:.80}: expected a Policy")
        if TOKENS in self.reasons and all(ratio == 1 for ratio in policy.tokens):
            stages: tuple[int, ...] = ()
        else:
            stages = self.check_stages(policy.stages)
        pruned = [d for d in DIMENSIONS if any(ratio < 1 for ratio in policy.ratios[d])]
        if pruned:
            self.require(pruned)
        kept = {}
        for name, sizes in self.sizes.items():
            ratios = self._broadcast(policy.ratios[name], len(sizes), name, "blocks")
            if sizes:
                kept[name] = np.array([keep_count(n, r) for n, r in zip(sizes, ratios, strict=True)], dtype=np.int64)
        tokens = self._broadcast(policy.tokens, len(stages), TOKENS, f"token stages (blocks {list(stages)})")
        return Counts(kept, tokens=np.array(tokens, dtype=np.float64), stages=stages)

    def check_stages(self, stages: tuple[int, ...] | None) -> tuple[int, ...]:
        """The blocks of the token stages; None means quarters of the depth.

        Raises:
            PolicyError: the model has fewer blocks.
        """
        stages = default_stages(self.depth) if stages is None else Policy(stages=stages).stages or ()
        if stages and stages[-1] >= self.depth:
            raise PolicyError(
                f"stages={list(stages)}: {self.name} has only {self.depth} blocks (0 to {self.depth - 1})"
            )
        return stages

    def _broadcast(self, ratios: tuple[float, ...], count: int, dimension: str, what: str) -> tuple[float, ...]:
        if len(ratios) == count:
            return ratios
        if len(ratios) == 1:
            return ratios * count
        if count == 0 and all(ratio == 1 for ratio in ratios):
            return ()
        raise PolicyError(
            f"{dimension} has {len(ratios)} keep ratios, but {self.name} has {count} {what}; "
            f"give one number for all or {count} of them"
        )

    def check(self, plan: Plan) -> None:
        """Whether `plan` was made for a model like this one.

        Raises:
            PlanError: it was not; says where it differs.
            UnsupportedModelError: the plan drops tokens and the model cannot.
        """
        if not isinstance(plan, Plan):
            raise PlanError(f"plan={plan!r:.80}: expected a Plan, e.g. from make_plan(model, scores, policy)")
        for name, sizes in self.sizes.items():
            planned = plan.sizes[name]
            if sizes != planned:
                remedy = "make a plan from this model's scores"
                if getattr(self.model, "mdc_plan", None) is not None:
                    remedy = f"this one is slim already: give the dense model, or {remedy}"
                raise PlanError(
                    f"plan is for another model: it knows {len(planned)} blocks with {brief(planned)} {name}, "
                    f"{self.name} has {len(sizes)} with {brief(sizes)}; {remedy}"
                )
        if plan.leaving:
            self.require((TOKENS,))
        if self.drops_patches_at_random and any(stage.prior for stage in plan.leaving):
            raise PlanError(
                f"plan has a prior over positions, but {self.name} drops patches at random in training, so a position "
                "is not where it was; use TokenOptions(score='attention'), or patch_drop_rate=0"
            )


def brief(sizes: tuple[int, ...]) -> str:
    """Units per block, in words: one number where all have as many."""
    return "no" if not sizes else str(sizes[0]) if len(set(sizes)) == 1 else str(list(sizes))


def unit_channels(indices: Tensor, width: int) -> Tensor:
    """Channels owned by units: (units,) -> (units * width,), e.g. unit 2 of width 3 owns 6, 7, 8."""
    offsets = torch.arange(width, device=indices.device)
    return (indices[:, None] * width + offsets).flatten()


# --- for families -----------------------------------------------------------------------------------------------------


def rows_of(linear: nn.Linear, groups: int = 1, width: int = 1) -> tuple[tuple[Slice, ...], tuple[Size, ...]]:
    """Slices and sizes of a Linear that puts out units of `width` channels, in `groups` runs of all of them."""
    names = ["weight", *(["bias"] if linear.bias is not None else [])]
    size = Size(linear, "out_features", lambda kept: kept * groups * width)
    return tuple(Slice(linear, name, 0, groups) for name in names), (size,)


def columns_of(linear: nn.Linear, width: int = 1) -> tuple[tuple[Slice, ...], tuple[Size, ...]]:
    """Slices and sizes of a Linear that reads units of `width` channels."""
    return (Slice(linear, "weight", 1),), (Size(linear, "in_features", lambda kept: kept * width),)


def affine_of(norm: nn.Module, width: int = 1) -> tuple[tuple[Slice, ...], tuple[Size, ...]]:
    """Slices and sizes of a normalisation over all channels of the units."""
    slices = tuple(Slice(norm, name) for name in ("weight", "bias") if getattr(norm, name, None) is not None)
    return slices, (Size(norm, "normalized_shape", lambda kept: (kept * width,)),)
