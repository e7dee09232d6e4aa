"""Compensation in order: each layer makes up for all that has been lost up to it, not for its own units alone.

``compensate="lstsq"`` knows the dense model only: layers are refitted as if nothing before them had changed. Here, from
the first block to the last, a layer is refitted on what it is given *in the slim model*, whose earlier layers are
refitted already (as SparseGPT and SlimGPT do for language models: Frantar & Alistarh, arXiv 2301.00774; Ling et al.,
arXiv 2412.18110); and what it is to give is what puts the slim model's residual stream back on the dense one's:

    ``x + g (W z + b) = x'``,   x, z of the slim model, x' the stream behind this layer in the dense one,

g being what scales the layer's channels on their way into the stream (LayerScale; else 1), which is read off the dense
model. Where a layer's output does not go into the stream like this (a norm behind it, windows), it is held to the
dense layer's output. The ridge pulls to the weights that are there, as in `compensation`.

Both models go through all images side by side, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mdc.distributed import on_every_rank, on_first_rank
from lightning_mdc.errors import CompensationError
from lightning_mdc.importance.moments import MOMENT_TOKENS, LayerMoments, MomentSum, drawn_rows
from lightning_mdc.importance.ridge import ridge_of, ridge_weights
from lightning_mdc.importance.scoring import exactly
from lightning_mdc.models import Anatomy, Block, Units, probing
from lightning_mdc.models.swapping import calling_readers
from lightning_mdc.progress import bar
from lightning_mdc.surgery.lockstep import Walk, halt, walked, walking
from lightning_mdc.tokens.selection import Carried, TokenSelection

Probe = tuple[Callable[[Any], Any], Callable[..., Any]]
Pass = Callable[[], Any]

# Share of the variance of what a layer adds to the stream that need not be its output, scaled by channel: rounding.
_ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
# A channel of so small a scale, beside the largest, cannot put the stream right: it is held to the layer's output.
_FAINT = 1e-4


class Layer(NamedTuple):
    """A layer that reads units, in both models, and the blocks that it is in."""

    dense: Units
    small: Units
    dense_block: Block
    small_block: Block


class Given(NamedTuple):
    """What a layer of the slim model is given in one batch.

    Attributes:
        layer: its name.
        z: what it reads, (..., channels).
        before: the stream that its output is added to; None: not known.
        carried: what travels beside the tokens; None: every position still is a token of its own.
    """

    layer: str
    z: Tensor
    before: Tensor | None
    carried: Carried | None


class Wanted(NamedTuple):
    """What the dense layer makes of the same batch: its `output`, and the stream `before` and `after` that is added."""

    layer: str
    output: Tensor
    before: Tensor | None = None
    after: Tensor | None = None


def refit_in_sequence(
    dense: Anatomy,
    small: Anatomy,
    passes: Sequence[tuple[Pass, Pass]],
    *,
    standing_in: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ridge: str = "mean",
    over_ranks: bool = False,
    progress: bool = False,
) -> None:
    """Refit, in place, the layers of `small` that read heads or neurons, from the first on before which something left.

    Args:
        dense, small: a model and its slim one, both unmasked, as written (uncompiled) and in eval mode.
        passes: for each batch, what runs the dense model on it, and what runs the slim one.
        standing_in: what has to be around the slim model's passes whenever they go on.
        ridge: what it is a share of, see `ridge_of`.
        over_ranks: layers are refitted on the batches of all ranks, which all have to call this.
        progress: show a bar (on a terminal).

    Raises:
        CompensationError: there are no batches, or the two models do not go through the same layers.
    """
    layers = list(_layers(dense, small))
    dense_runs, small_runs = [run for run, _ in passes], [run for _, run in passes]
    draw = torch.Generator().manual_seed(0)
    with (
        torch.no_grad(),
        calling_readers(units for layer in layers for units in (layer.dense, layer.small)),
        probing(_probes(layers, small)),
        walking(dense_runs) as dense_walks,
        walking(small_runs) as small_walks,
        bar("Refitting", len(layers), shown=progress) as advance,
    ):
        for layer in layers:
            look = partial(_seen, layer, dense_walks, small_walks, standing_in)
            seen = on_every_rank(look) if over_ranks else look()
            with exactly(layer.small.reader.weight):
                _refit(layer, seen, small.num_prefix_tokens, draw, ridge, over_ranks)
            advance()


def _layers(dense: Anatomy, small: Anatomy) -> Iterator[Layer]:
    """In the order in which they are called, from the first loss on."""
    has_lost = False
    for dense_block, small_block in zip(dense.blocks, small.blocks, strict=True):
        for units in sorted(dense_block.units.values(), key=lambda units: units.after_point):
            left = small_block.units[units.dimension]
            has_lost |= left.count < units.count or (units.after_point and small_block.stage is not None)
            if has_lost:
                yield Layer(units, left, dense_block, small_block)


# --- what is seen on the way ------------------------------------------------------------------------------------------


def _probes(layers: Sequence[Layer], small: Anatomy) -> Iterator[Probe]:
    """The slim model halts before each layer, the dense one where its output has come into the stream."""
    for layer in layers:
        yield layer.dense.reader.register_forward_hook, partial(_behind_reader, layer.dense.name)
        yield layer.small.reader.register_forward_pre_hook, partial(_before_reader, layer.small.name)
    for block in {id(block): block for layer in layers for block in (layer.dense_block, layer.small_block)}.values():
        for half in (block.module, block.second_half):
            if half is not None:
                yield partial(half.register_forward_pre_hook, with_kwargs=True), _before_half
        yield block.module.register_forward_hook, _behind_block
    for module in small.model.modules():
        if isinstance(module, TokenSelection):
            yield module.register_forward_hook, _behind_selection


def _before_half(module: nn.Module, args: Any, kwargs: Any) -> None:
    stream = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    _has_come(stream)
    walked().notes["before"] = stream


def _behind_block(module: nn.Module, args: Any, output: Any) -> None:
    _has_come(output if isinstance(output, Tensor) else output[0])


def _behind_reader(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
    notes = walked().notes
    if "wanted" in notes:  # it did not come by: nobody knows where this block's second half begins
        halt(notes["wanted"])
    notes["wanted"] = Wanted(name, output, notes.get("before"))


def _has_come(stream: Tensor) -> None:
    wanted = walked().notes.pop("wanted", None)
    if wanted is not None:
        halt(wanted._replace(after=stream))


def _before_reader(name: str, module: nn.Module, args: tuple[Tensor]) -> None:
    notes = walked().notes
    halt(Given(name, args[0], notes.get("before"), notes.get("carried")))


def _behind_selection(module: nn.Module, args: Any, output: tuple[Tensor, Carried | None]) -> None:
    walked().notes["carried"] = output[1]


def _seen(
    layer: Layer, dense: Sequence[Walk], small: Sequence[Walk], standing_in: Callable[[], AbstractContextManager[Any]]
) -> list[tuple[Given, Wanted]]:
    """What the layer is given and what is wanted of it, batch by batch."""
    seen = []
    for dense_walk, small_walk in zip(dense, small, strict=True):
        wanted = dense_walk.to_next()
        with standing_in():
            given = small_walk.to_next()
        names = [None if halted is None else halted.layer for halted in (wanted, given)]
        if names != [layer.dense.name, layer.small.name]:
            raise CompensationError(
                f"compensate='sequential': {layer.dense.name} was to come next, but the dense model came to {names[0]} "
                f"and the slim one to {names[1]}; use compensate='lstsq'"
            )
        seen.append((given, wanted))
    return seen


# --- a layer ----------------------------------------------------------------------------------------------------------


def _refit(
    layer: Layer, seen: Sequence[tuple[Given, Wanted]], prefix: int, draw: torch.Generator, ridge: str, over_ranks: bool
) -> None:
    reader = layer.small.reader
    scale = _scale(seen[0][1]) if seen else None
    if over_ranks:  # one that is read off on one rank, so that all want the same
        scale = on_first_rank(lambda: None if scale is None else scale.cpu())
    channels, out = reader.in_features, reader.out_features
    sums = MomentSum(channels + out, reader.weight)
    for given, wanted in seen:
        missing = _missing(reader, given, wanted, scale, prefix)
        both = torch.cat([given.z.to(missing), missing], dim=-1)
        # (images, tokens, channels), in whatever windows and grids they are seen
        images = len(wanted.output if given.before is None else given.before)
        both = both.unflatten(0, (images, -1)).flatten(1, -2)
        sums.add(drawn_rows(both, prefix, MOMENT_TOKENS, draw))
    if over_ranks:
        sums.sum_over_ranks()
    if not int(sums.rows):
        raise CompensationError("compensate='sequential': no batches; give the images that units were scored on")
    moments = sums.moments()
    if not (moments.mean.isfinite().all() and moments.scatter.isfinite().all()):
        raise CompensationError(
            f"compensate='sequential': what {layer.small.name} is given, or is to give, is not finite on these images; "
            "check the model's weights, and the images"
        )
    if reader.weight.device.type not in ("cpu", "cuda"):  # where float64 is not to be had
        moments = moments.to("cpu")
    update, shift = made_up(moments, channels, centred=reader.bias is not None, ridge=ridge)
    reader.weight.add_(update.to(reader.weight))
    if reader.bias is not None:
        reader.bias.add_(shift.to(reader.bias))


def made_up(moments: LayerMoments, channels: int, *, centred: bool, ridge: str = "mean") -> tuple[Tensor, Tensor]:
    """What to add to a layer's weight (out, channels) and bias (out,), so that the least of what is missing is left.

    Args:
        moments: of rows of what the layer reads, `channels` of them, and what is missing of its output.
        centred: whether it has a bias.
        ridge: see `ridge_of`.

    Returns float64.
    """
    reads = torch.arange(channels, device=moments.mean.device)
    misses = torch.arange(channels, len(moments.mean), device=moments.mean.device)
    mean = moments.mean.double()
    of_reads = moments.second(reads, reads, centred=centred)
    added = ridge_of(of_reads.diagonal(), ridge)
    update = ridge_weights(of_reads, moments.second(reads, misses, centred=centred), added).T
    return update, mean[misses] - update @ mean[reads]


def _scale(wanted: Wanted) -> Tensor | None:
    """What the dense layer's output is scaled by in the stream, (out,); None: it is not added, channel by channel."""
    output, before, after = wanted.output, wanted.before, wanted.after
    if before is None or after is None or not output.numel() == before.numel() == after.numel():
        return None
    rounding = _ROUNDING[before.dtype]
    output, before, after = (x.reshape(-1, output.shape[-1]).double() for x in (output, before, after))
    added = after - before
    scale = (added * output).sum(dim=0) / output.square().sum(dim=0)
    scale = scale.nan_to_num()
    unexplained = (added - scale * output).square().sum()
    return scale if unexplained <= rounding * added.square().sum() and scale.any() else None


def _missing(reader: nn.Linear, given: Given, wanted: Wanted, scale: Tensor | None, prefix: int) -> Tensor:
    """What the layer has to put out beside what it does, (..., tokens, out), in fp32 or wider."""
    dtype = torch.promote_types(given.z.dtype, torch.float32)
    weight, bias = reader.weight.to(dtype), None if reader.bias is None else reader.bias.to(dtype)
    says = F.linear(given.z.to(dtype), weight, bias)
    output = of_tokens(wanted.output.to(dtype), given.carried, prefix)
    if scale is None:
        return output - says
    assert given.before is not None and wanted.after is not None  # there is a scale
    scale = scale.to(output)
    apart = of_tokens(wanted.after.to(dtype).reshape(wanted.output.shape), given.carried, prefix)
    before = given.before.to(dtype)
    if before.numel() != apart.numel():  # a model that shows hidden states hands positions from block to block
        before = of_tokens(before, given.carried, prefix)
    apart = (apart - before.reshape(apart.shape)) / scale
    return torch.where(scale.abs() > _FAINT * scale.abs().max(), apart, output) - says


def of_tokens(x: Tensor, carried: Carried | None, prefix: int) -> Tensor:
    """What the tokens that are left stand for, of x (batch, prefix + positions, dim): the mean over its positions each.

    Returns (batch, prefix + tokens, dim).
    """
    if carried is None:
        return x
    tokens = carried.own.shape[1]
    index = (carried.places + 1)[:, :, None].expand(-1, -1, x.shape[-1])
    sums = x.new_zeros(len(x), tokens + 1, x.shape[-1]).scatter_add(1, index, x[:, prefix:])  # those dropped go first
    return torch.cat([x[:, :prefix], sums[:, 1:] / carried.sizes(tokens)[:, :, None]], dim=1)
