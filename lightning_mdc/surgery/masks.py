"""Reversible pruning by hooks: parameters, buffers, state_dict keys and classes stay as they are.

A dropped head or neuron acts as if absent: a pre-hook zeros its channels at the input of ``proj`` or ``fc2`` (while
gradients are recorded, it zeros the weight's columns for them instead), and a norm over the units is taken over the
kept ones. Token stages run as in the slim model: a pre-hook on the MLP's norm, whose input is the residual stream,
reduces the tokens, a hook on the MLP's end adds the reduced stream, and a hook on the block returns the sum.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mdc.errors import PlanError
from lightning_mdc.models import (
    BlockSite,
    MaskHook,
    Sites,
    UnitSite,
    find_sites,
    hide_hooks,
    is_compiled,
    is_masked,
    show_hooks,
    unit_channels,
)
from lightning_mdc.policy import Plan, TokenStage
from lightning_mdc.surgery.cutting import narrow_norm
from lightning_mdc.surgery.intermediates import guard_intermediates, unguard_intermediates
from lightning_mdc.tokens.selection import TokenSelection


@contextmanager
def masked(model: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    """``with masked(model, plan):`` the model computes what ``slim(model, plan)`` would; after it, it is as before.

    Yields `model`. If `model` or a part of it is compiled, torch forgets all it has compiled so far, and compiles again
    where that is needed. A function compiled around the model, or a wrapper from ``torch.compile(model)`` that is not
    given here, cannot be seen: where it has run before, it runs on without masks. Give the wrapper, or call
    ``torch.compiler.reset()`` inside.

    Raises:
        PlanError: the plan is for another model, or the model is masked already.
    """
    apply_masks(model, plan)
    try:
        yield model
    finally:
        remove_masks(model)


def apply_masks(model: nn.Module, plan: Plan, path: str | None = None) -> None:
    """Put the masks of `plan` on, until `remove_masks`; compiled code sees them as `masked` says.

    Args:
        path: of the vision transformer in `model`, as an attribute; None finds it if there is just one.

    Raises:
        PlanError: see `masked`.
    """
    sites = find_sites(model, path)
    sites.check(plan)
    if is_masked(sites.model):
        raise PlanError(f"{sites.name} is masked already; leave the first `masked` block, or call remove_masks(model)")
    for dimension in ("heads", "neurons"):
        for site, kept in zip(sites.units(dimension), getattr(plan, dimension), strict=True):
            _mask_units(site, kept)
    for stage in plan.tokens:
        if stage.keep < 1:
            kept_heads = plan.heads[stage.block] if plan.heads else None
            _mask_tokens(sites, sites.blocks[stage.block], stage, kept_heads, plan.fuse)
    if plan.drops_tokens:
        guard_intermediates(sites.model)
    if is_masked(sites.model):  # not by a plan that keeps everything
        show_hooks(sites.model, compiled=is_compiled(model))


def remove_masks(model: nn.Module) -> None:
    """Take our masks off `model` (or the model inside); other people's hooks stay."""
    if not is_masked(model):
        return
    dropped_tokens = False
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, MaskHook)]:
                hook = hooks.pop(key)
                dropped_tokens |= isinstance(hook, _StageHook)
                if isinstance(hook, _OwnWeight):
                    hook(module)  # the last forward pass may have failed in between
    hide_hooks(model)
    if dropped_tokens:  # else the guard, if there is one, is a slim model's own
        for module in model.modules():
            unguard_intermediates(module)


# --- heads and neurons ------------------------------------------------------------------------------------------------


def _mask_units(site: UnitSite, kept: tuple[int, ...]) -> None:
    if len(kept) == site.num_units:
        return
    device = site.consumer.weight.device
    channels = unit_channels(torch.tensor(kept, dtype=torch.long, device=device), site.unit_width)
    dropped = torch.ones(site.num_units * site.unit_width, dtype=torch.bool, device=device)
    dropped[channels] = False
    site.consumer.register_forward_pre_hook(_ZeroChannels(dropped))
    site.consumer.register_forward_hook(_OwnWeight())
    if site.norm is not None:
        site.norm.register_forward_hook(_NormOfKept(site.norm, channels))


class _ZeroChannels(MaskHook):
    """Zeros the dropped input channels of a Linear; in training its weight's columns for them instead.

    Either way output and gradients are the same, and the weight is the smaller of the two: masking the activations of
    DeiT-T took 5 to 8 % of a training step on a CPU, masking its weights nothing that could be measured.
    """

    def __init__(self, dropped: Tensor) -> None:
        self.dropped = dropped

    def __call__(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        (x,) = args
        if self.dropped.device != x.device:  # the model moved since
            self.dropped = self.dropped.to(x.device)
        module.__dict__.pop("weight", None)  # of a forward pass that failed before `_OwnWeight`
        weight = module._parameters.get("weight")
        # Compiled code fuses the fill with what is before it. A weight that is none of the module's own parameters is
        # somebody's parametrization.
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or weight is None:
            return (x.masked_fill(self.dropped, 0),)  # filled, not multiplied: what is dropped may be infinite
        # An attribute of the object itself is found before the parameter of that name, which stays where it is.
        module.__dict__["weight"] = weight * ~self.dropped
        return None


class _OwnWeight(MaskHook):
    """Takes away what `_ZeroChannels` has put before the module's weight."""

    def __call__(self, module: nn.Module, *_: Any) -> None:
        module.__dict__.pop("weight", None)


class _NormOfKept(MaskHook):
    """Replaces a norm's output by the norm over the kept channels, put back in their places."""

    def __init__(self, norm: nn.Module, channels: Tensor) -> None:
        self.channels = channels
        # The norm in the kept width; its weights are only there to be stood in for by the model's own at every call.
        self.narrow = copy.deepcopy(norm)
        narrow_norm(self.narrow, channels)

    def __call__(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        (x,) = args
        if self.channels.device != x.device:
            self.channels = self.channels.to(x.device)
        weights = {name: parameter[self.channels] for name, parameter in module.named_parameters(recurse=False)}
        normed = torch.func.functional_call(self.narrow, weights, (x[..., self.channels],))
        return torch.zeros_like(output).index_copy(-1, self.channels, normed.to(output.dtype))


# --- tokens -----------------------------------------------------------------------------------------------------------


def _mask_tokens(
    sites: Sites, block: BlockSite, stage: TokenStage, kept_heads: tuple[int, ...] | None, fuse: bool
) -> None:
    attention, tokens = block.attention, block.tokens
    assert attention is not None and tokens is not None  # Sites.check has refused other blocks
    select = TokenSelection(stage, sites.num_prefix_tokens, sites.class_rows, fuse)
    masked_stage = _MaskedStage(select.to(attention.qkv.weight.device), attention.scale, kept_heads)
    attention.q_norm.register_forward_hook(_StageHook(masked_stage.see_q))
    attention.k_norm.register_forward_hook(_StageHook(masked_stage.see_k))
    tokens.residual_norm.register_forward_pre_hook(_StageHook(masked_stage.reduce))
    tokens.mlp_out.register_forward_hook(_StageHook(masked_stage.add_to_reduced))
    block.module.register_forward_hook(_StageHook(masked_stage.result_of_block))


class _StageHook(MaskHook):
    def __init__(self, step: Callable[..., Any]) -> None:
        self.step = step

    def __call__(self, *args: Any) -> Any:
        return self.step(*args)


class _MaskedStage:
    """A token stage in five hooks, which run in this order, and what they hand on within one forward pass."""

    q: Any = None
    k: Any = None
    reduced: Any = None
    result: Any = None

    def __init__(self, select: TokenSelection, scale: float, kept_heads: tuple[int, ...] | None) -> None:
        self.select, self.scale = select, scale
        self.kept_heads = slice(None) if kept_heads is None else list(kept_heads)

    def see_q(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.q = output[:, self.kept_heads]

    def see_k(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.k = output[:, self.kept_heads]

    def reduce(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = args
        q, k, self.q, self.k = self.q, self.k, None, None
        assert q is not None and k is not None
        self.reduced = self.select(x, q, k, self.scale)
        return (self.reduced,)

    def add_to_reduced(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.result, self.reduced = self.reduced + output, None
        # The block adds this to its full-length stream; the sum is thrown away by the hook on the block.
        return output.new_zeros(())

    def result_of_block(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        result, self.result = self.result, None
        assert result is not None  # else torch would take the block's own
        return result
