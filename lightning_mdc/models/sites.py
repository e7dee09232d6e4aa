"""Typed answers to "where are the heads, the neurons and the tokens?". Adapters give them, all others read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from lightning_mdc.errors import PlanError, PolicyError, UnsupportedModelError
from lightning_mdc.policy import DIMENSIONS, Plan, Policy, TokenStage, check_dimensions, default_stages, keep_count


@dataclass(frozen=True)
class Producer:
    """A Linear layer that computes units. Its output rows are `copies` groups one after another, each of all the units.

    ``qkv`` has 3 copies (q, k, v), a packed GLU's ``fc1`` has 2, a plain ``fc1`` has 1.
    """

    linear: nn.Linear
    copies: int = 1


@dataclass(frozen=True)
class UnitSite:
    """One block's heads or neurons: everything that has to be masked, priced and sliced together.

    Attributes:
        name: the owner's path in the model, e.g. ``blocks.3.attn``.
        num_units: how many units there are now.
        unit_width: channels of one unit (``head_dim`` for heads, 1 for neurons); unit u owns channels
            ``[u * unit_width, (u + 1) * unit_width)``.
        producers: layers whose output rows belong to units.
        norm: a normalisation over the units' channels, or None.
        consumer: the Linear whose input is the units (``proj`` or ``fc2``).
        owner: the module that stores sizes derived from the number of units.
        size_attributes: those sizes, as attribute name -> multiple of the number of units.
    """

    name: str
    num_units: int
    unit_width: int
    producers: tuple[Producer, ...]
    norm: nn.Module | None
    consumer: nn.Linear
    owner: nn.Module
    size_attributes: Mapping[str, int]


@dataclass(frozen=True)
class AttentionSite:
    """Where a block's queries, keys and values can be seen.

    `q_norm` and `k_norm` put out q and k as (batch, heads, tokens, head_dim); `qkv` puts out
    (batch, tokens, 3 * heads * head_dim).
    """

    qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    scale: float


@dataclass(frozen=True)
class TokenSite:
    """Where a block's tokens can leave: the input of `residual_norm` is the residual stream after attention, the
    output of `mlp_out` is what the block adds to it."""

    residual_norm: nn.Module
    mlp_out: nn.Module


@dataclass(frozen=True)
class BlockSite:
    """One transformer block. A part is None where the block cannot lose that kind of unit."""

    name: str
    module: nn.Module
    heads: UnitSite | None
    neurons: UnitSite | None
    attention: AttentionSite | None
    tokens: TokenSite | None
    stage: TokenStage | None  # the token stage already built into a slim block


class Family(Protocol):
    """An adapter: the only code that knows a library's attribute names."""

    name: str
    description: str

    def accepts(self, module: nn.Module) -> bool:
        """Whether `sites` can say something about this module."""

    def sites(self, model: nn.Module) -> Sites:
        """Where the units of `model` are."""

    def token_stage_block(self, sites: Sites, index: int, stage: TokenStage, fuse: bool) -> nn.Module:
        """Block `index` as a module that drops tokens and keeps the block's children under their names."""

    def describe(self, model: nn.Module, num_heads: tuple[int, ...], num_neurons: tuple[int, ...]) -> dict[str, Any]:
        """JSON-ready constructor arguments of the dense model (of those sizes) `model` comes from.

        Raises:
            ArtifactError: a part that no constructor argument expresses; names it.
        """

    def build(self, spec: Mapping[str, Any]) -> nn.Module:
        """The dense model that `describe` described, with fresh weights, on the default device; from closed tables.

        Raises:
            ArtifactError: a field is missing, unknown or of the wrong type.
        """


@dataclass(frozen=True)
class Counts:
    """How many units of one model a policy keeps.

    Attributes:
        heads: kept heads per block, int (blocks,); empty if heads cannot be cut.
        neurons: the same for neurons.
        tokens: keep ratios per token stage, float (stages,). How many tokens that is depends on the input size.
        stages: the blocks of the token stages.
    """

    heads: np.ndarray
    neurons: np.ndarray
    tokens: np.ndarray
    stages: tuple[int, ...]


@dataclass(frozen=True)
class Sites:
    """Where the units of one model are and can leave.

    Attributes:
        model: the vision transformer itself (unwrapped).
        name: class name and path, for messages.
        family: the adapter that found the sites.
        blocks: in order of execution.
        container: the module whose children ``"0", "1", ...`` are the blocks.
        dim: width of the residual stream.
        num_prefix_tokens: class, distillation and register tokens at the front; they never leave.
        class_rows: rows of the tokens the classifier reads; empty when it pools over all tokens.
        grid: (height, width) in patches at the model's own input size.
        input_size: (channels, height, width) of the model's own input.
        fuse: of a slim model, whether its token stages average the tokens they drop into one that stays.
        drops_patches_at_random: whether the model drops patches at random in training, so that a token's place in the
            sequence does not tell its position.
        reasons: for each dimension the model cannot lose, why (naming the module).
        grid_of: input (height, width) in pixels -> grid in patches.
        fixed_macs: (input (height, width), tokens at the end) -> MACs outside the blocks.
    """

    model: nn.Module
    name: str
    family: Family
    blocks: tuple[BlockSite, ...]
    container: nn.Module
    dim: int
    num_prefix_tokens: int
    class_rows: tuple[int, ...]
    grid: tuple[int, int]
    input_size: tuple[int, int, int]
    fuse: bool
    drops_patches_at_random: bool
    reasons: Mapping[str, str]
    grid_of: Callable[[tuple[int, int]], tuple[int, int]]
    fixed_macs: Callable[[tuple[int, int], Any], Any]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def units(self, dimension: str) -> tuple[UnitSite, ...]:
        """Every block's heads or neurons (`dimension`); empty if they cannot be cut."""
        return () if dimension in self.reasons else tuple(getattr(block, dimension) for block in self.blocks)

    @property
    def num_heads(self) -> tuple[int, ...]:
        """Heads per block now; empty if heads cannot be cut."""
        return tuple(site.num_units for site in self.units("heads"))

    @property
    def num_neurons(self) -> tuple[int, ...]:
        """Neurons per block now; empty if neurons cannot be cut."""
        return tuple(site.num_units for site in self.units("neurons"))

    @property
    def stages(self) -> tuple[TokenStage, ...]:
        """Token stages already built in (a slim model)."""
        return tuple(block.stage for block in self.blocks if block.stage is not None)

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The dimensions this model can lose units of."""
        return tuple(dimension for dimension in DIMENSIONS if dimension not in self.reasons)

    def require(self, dimensions: Iterable[str] | None) -> tuple[str, ...]:
        """`dimensions` (None means all three) if the model can lose them.

        Raises:
            UnsupportedModelError: names the module in the way and the dimensions that do work.
        """
        wanted = check_dimensions(DIMENSIONS if dimensions is None else dimensions)
        for dimension in wanted:
            if dimension in self.reasons:
                raise UnsupportedModelError(
                    f"{self.name} cannot lose {dimension}: {self.reasons[dimension]}. Dimensions that do work: "
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
        if "tokens" in self.reasons and all(ratio == 1 for ratio in policy.tokens):
            stages: tuple[int, ...] = ()
        else:
            stages = default_stages(self.depth) if policy.stages is None else policy.stages
        if stages and stages[-1] >= self.depth:
            raise PolicyError(
                f"stages={list(stages)}: {self.name} has only {self.depth} blocks (0 to {self.depth - 1})"
            )
        pruned = [d for d in DIMENSIONS if any(ratio < 1 for ratio in getattr(policy, d))]
        if pruned:
            self.require(pruned)
        kept = {}
        for name, sizes in (("heads", self.num_heads), ("neurons", self.num_neurons)):
            ratios = self._broadcast(getattr(policy, name), len(sizes), name, "blocks")
            kept[name] = np.array([keep_count(n, r) for n, r in zip(sizes, ratios, strict=True)], dtype=np.int64)
        tokens = self._broadcast(policy.tokens, len(stages), "tokens", f"token stages (blocks {list(stages)})")
        return Counts(**kept, tokens=np.array(tokens, dtype=np.float64), stages=stages)

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
        for name, sizes, planned in (
            ("heads", self.num_heads, plan.num_heads),
            ("neurons", self.num_neurons, plan.num_neurons),
        ):
            if sizes != planned:
                raise PlanError(
                    f"plan is for another model: it knows {len(planned)} blocks with {_brief(planned)} {name}, "
                    f"{self.name} has {len(sizes)} with {_brief(sizes)}; make a plan from this model's scores"
                )
        if plan.drops_tokens:
            self.require(("tokens",))


def _brief(sizes: tuple[int, ...]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else str(list(sizes))


def unit_channels(indices: Tensor, unit_width: int) -> Tensor:
    """Channels owned by units: (units,) -> (units * unit_width,), e.g. unit 2 of width 3 owns 6, 7, 8."""
    offsets = indices.new_tensor(range(unit_width))
    return (indices[:, None] * unit_width + offsets).flatten()
