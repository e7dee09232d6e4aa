"""Measures a `LatencyTable`: slim copies of a model's blocks are timed on the device it is for.

Blocks are timed where they stand: behind each other, each on what the one before put out, and with clocks at the seams
of attention and MLP. A part that is run by itself again and again finds its weights and its input in the cache and is
faster than it will ever be in a model.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from filelock import FileLock
from torch import nn

from lightning_mdc.budget.cost_model import CostModel
from lightning_mdc.budget.latency import ALIGNMENT, BlockTimes, LatencyTable, Surface, architecture, block_kinds
from lightning_mdc.budget.timing import blank_images, settled_memory
from lightning_mdc.distributed import on_first_rank
from lightning_mdc.errors import BudgetError, check_number, check_whole
from lightning_mdc.models import BlockSite, Sites, find_sites
from lightning_mdc.policy import Plan, Policy, TokenStage
from lightning_mdc.progress import bar
from lightning_mdc.randomness import isolated_rng
from lightning_mdc.surgery.cutting import cut_units
from lightning_mdc.surgery.slim import plain_copy, slim
from lightning_mdc.tokens.selection import TokenSelection

log = logging.getLogger(__name__)

# Rounds, each with one reading of everything; the median counts.
_FEWEST_ROUNDS, _MOST_ROUNDS = 5, 100
# What a token stage costs hardly depends on how many it keeps.
_STAGE_KEEP = 0.5
# Keep ratios, of all dimensions alike, of the whole models that sums of parts are corrected by.
_WHOLE_MODELS = (1.0, 0.8, 0.6, 0.4)


def measure_latency_table(
    model: nn.Module,
    batch_size: int = 1,
    *,
    device: str | torch.device | None = None,
    cache: str | Path | None = None,
    seconds: float = 30.0,
    progress: bool = True,
) -> LatencyTable:
    """The latency table of `model`, measured now or read from the cache.

    In a distributed run all ranks have to ask: the first one measures for all. Of processes that ask for the same table
    one measures, the others wait for it.

    Args:
        model: the dense model (or a module that holds it); unchanged, and it need have no weights (meta device).
        batch_size: images per forward pass.
        device: where to measure; None: where the model is.
        cache: folder of tables; None: ``lightning_mdc/latency`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
        seconds: how long to measure, about.
        progress: show a progress bar where there is a terminal.

    Raises:
        BudgetError: `batch_size` or `seconds` is no positive number, or `device` none that is here.
    """

    def read_or_measured() -> LatencyTable:
        check_whole("batch_size", batch_size, 1, BudgetError)
        check_number("seconds", seconds, "how long to measure", BudgetError, above=0)
        sites = find_sites(model)
        on = _device_of(sites, device)
        conditions = _conditions(sites, batch_size, on)
        name = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:16]
        path = (_cache_folder() if cache is None else Path(cache)) / f"{name}.json"
        measure = partial(_measured_table, model, on, conditions, seconds, progress)
        with ExitStack() as stack:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(path.with_suffix(".lock")))
            except OSError as error:
                log.warning("latency tables cannot be kept in %s (%s): measuring anew every time", path.parent, error)
                return measure()
            if path.exists():
                try:
                    table = LatencyTable.load(path)
                    if table.conditions == conditions:
                        return table
                    log.warning("%s holds another latency table: measuring anew", path)
                except BudgetError as error:
                    log.warning("%s is damaged (%s): measuring anew", path, error)
            where = conditions["device"]
            log.info("  measuring block latencies on %s at batch %d, about %.0f s", where, batch_size, seconds)
            table = measure()
            table.save(path)
            return table

    return on_first_rank(read_or_measured)


@isolated_rng()  # a run that finds its table in the cache draws nothing either
def _measured_table(
    model: nn.Module, device: torch.device, conditions: dict[str, Any], seconds: float, progress: bool
) -> LatencyTable:
    """Time the parts of `model` on `device`, for about so many seconds."""
    batch_size = conditions["batch_size"]
    watch = _Stopwatch(device, batch_size)
    kinds, kind_of_block = block_kinds(find_sites(model))
    blocks = [_Blocks(model, index, watch) for _, index in kinds]
    outside, whole = _OutsideBlocks(model, watch), _WholeModels(model, watch)
    passes: list[Callable[[], None]] = [
        *(run for kind in blocks for run in kind.passes),
        *outside.passes,
        *whole.passes,
    ]
    with torch.inference_mode(), settled_memory():
        begun = time.perf_counter()
        for run in passes:  # caches, kernels and the allocator warm up
            run()
        clocked = time.perf_counter() - begun
        rounds = int(min(max(seconds / max(clocked, 1e-9), _FEWEST_ROUNDS), _MOST_ROUNDS))
        watch.readings.clear()
        rng = np.random.default_rng(0)
        with bar(f"Timing blocks at batch {batch_size}", rounds, shown=progress, in_background=False) as advance:
            for _ in range(rounds):
                for number in rng.permutation(len(passes)):
                    passes[number]()
                advance()
    parts = LatencyTable(conditions, tuple(kind.times() for kind in blocks), tuple(kind_of_block), outside.surface())
    return replace(parts, whole=whole.against(parts))


def _device_of(sites: Sites, device: str | torch.device | None) -> torch.device:
    own = next(sites.model.parameters()).device
    try:
        wanted = own if device is None else torch.device(device)
        if wanted.type == "cuda" and not torch.cuda.is_available():
            raise BudgetError(f"device={str(device)!r}: there is none here; measure there and pass table=")
    except RuntimeError as error:
        raise BudgetError(f"device={device!r}: expected a device such as 'cpu' or 'cuda:0' ({error})") from error
    return torch.device("cpu") if wanted.type == "meta" else wanted


def _conditions(sites: Sites, batch_size: int, device: torch.device) -> dict[str, Any]:
    """What the times depend on, JSON-ready."""
    on_gpu = device.type == "cuda"
    conditions = {
        "model": architecture(sites),
        "modules": sorted({type(module).__name__ for block in sites.blocks for module in block.module.modules()}),
        "batch_size": batch_size,
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": None if on_gpu else torch.get_num_threads(),
        "dtype": str(next(sites.model.parameters()).dtype).removeprefix("torch."),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    as_read: dict[str, Any] = json.loads(json.dumps(conditions))
    return as_read


def _processor() -> str:
    """The processor's name; Python knows it on some systems only."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "lightning_mdc" / "latency"


# --- knots ------------------------------------------------------------------------------------------------------------


def head_knots(num_heads: int) -> list[int]:
    """All numbers of a few heads, quarters of many; without heads and with all of them at the ends."""
    if num_heads <= 4:
        return list(range(num_heads + 1))
    return sorted({0, 1, *(num_heads * i // 4 for i in (1, 2, 3)), num_heads})


def neuron_knots(num_neurons: int) -> tuple[list[int], list[int]]:
    """Numbers of neurons that are multiples of `ALIGNMENT` (and the whole width), and numbers that are none."""
    quarters = [num_neurons * i // 4 // ALIGNMENT * ALIGNMENT for i in (1, 2, 3)]
    aligned = sorted({0, num_neurons // 8 // ALIGNMENT * ALIGNMENT, *quarters, num_neurons})
    odd = sorted({min(1, num_neurons), *(q + 3 for q in quarters if q + 3 < num_neurons - 1), max(num_neurons - 1, 0)})
    return aligned, odd


def token_knots(num_tokens: int, fewest: int) -> list[int]:
    """Eighths of all tokens; attention grows with the square of them."""
    return sorted({fewest, *(n for i in range(1, 8) if (n := num_tokens * i // 8) > fewest), num_tokens})


# --- clocks -----------------------------------------------------------------------------------------------------------


class _Stopwatch:
    """Marks points of time, on the device's own clock where it runs on behind our back, and keeps what is in between.

    Attributes:
        readings: seconds per image of each part, by a name such as ``("mlp", 0, 96, 17)``: in the kind of block that
            block 0 is of, 96 neurons and 17 tokens.
    """

    def __init__(self, device: torch.device, batch_size: int) -> None:
        self.device, self.batch_size = device, batch_size
        self.readings: dict[tuple[str | int, ...], list[float]] = defaultdict(list)

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def at_calls(self, *modules: nn.Module, ends: bool = False) -> Iterator[list[Any]]:
        """Gives the list that a mark is put in whenever one of `modules` is called, and when the call `ends`."""
        marks: list[Any] = []
        with ExitStack() as hooks:
            for module in modules:
                hooks.callback(module.register_forward_pre_hook(lambda *_: marks.append(self.mark())).remove)
                if ends:
                    hooks.callback(module.register_forward_hook(lambda *_: marks.append(self.mark())).remove)
            yield marks

    def between(self, first: Any, second: Any) -> float:
        """Seconds per image from one mark to another, after `wait`."""
        seconds = second - first if isinstance(first, float) else first.elapsed_time(second) / 1e3
        return float(seconds) / self.batch_size

    def median(self, *part: str | int) -> float:
        """Seconds per image of `part`."""
        return float(np.median(self.readings[part]))

    def surface(self, part: tuple[str | int, ...], units: Sequence[int], tokens: Sequence[int]) -> Surface:
        """Seconds per image of `part` by units and tokens, which are the last two in its readings' names."""
        medians = [[self.median(*part, kept, seen) for seen in tokens] for kept in units]
        return Surface.fitted(units, tokens, np.asarray(medians))


# --- what is timed ----------------------------------------------------------------------------------------------------


def first_units(sites: Sites, policy: Policy) -> Plan:
    """A plan of `policy` for timing, which does not depend on which units stay: the first ones."""
    counts = sites.counts(policy)
    return Plan(
        heads=tuple(tuple(range(int(count))) for count in counts.heads),
        neurons=tuple(tuple(range(int(count))) for count in counts.neurons),
        tokens=tuple(TokenStage(b, float(keep)) for b, keep in zip(counts.stages, counts.tokens, strict=True)),
        num_heads=sites.num_heads,
        num_neurons=sites.num_neurons,
    )


def _copy_on(model: nn.Module, device: torch.device) -> nn.Module:
    """A plain copy, in eval mode, with weights even where the model has none (on the meta device)."""
    copied = plain_copy(find_sites(model).model)
    copied = copied.eval().requires_grad_(False)
    if next(copied.parameters()).device.type != "meta":
        return copied.to(device)
    copied = copied.to_empty(device=device)
    for tensor in (*copied.parameters(), *copied.buffers()):
        if tensor.is_floating_point():  # what memory holds may be slow to compute with, or no number
            tensor.data.normal_(0.0, 0.02)
        else:
            tensor.data.zero_()
    return copied


def _with_blocks(model: nn.Module, index: int, count: int) -> Sites:
    """Sites of `model` with `count` copies of block `index` for blocks, none with a token stage built in."""
    sites = find_sites(model)
    if sites.blocks[index].stage is not None:
        _put_stage(sites, index, 1.0, sites.fuse)
    block = sites.container.get_submodule(str(index))
    sites.container._modules.clear()
    for number in range(count):
        sites.container.add_module(str(number), copy.deepcopy(block))
    return find_sites(model)


def _can_drop(sites: Sites) -> bool:
    """Whether tokens may leave, or do already."""
    return "tokens" not in sites.reasons or bool(sites.stages)


class _Blocks:
    """Blocks of one kind, that of block `index`, cut to all widths of interest, with clocks at their seams."""

    def __init__(self, model: nn.Module, index: int, watch: _Stopwatch) -> None:
        sites = find_sites(model)
        site, costs = sites.blocks[index], CostModel(sites)
        can_drop = _can_drop(sites)
        self.index, self.watch = index, watch
        self.heads = head_knots(site.heads.num_units) if site.heads else [0]
        self.aligned, self.odd = neuron_knots(site.neurons.num_units) if site.neurons else ([0], [0])
        self.tokens = token_knots(costs.num_tokens, costs.num_prefix + 1) if can_drop else [costs.num_tokens]
        neurons = [*self.aligned, *self.odd]
        count = max(len(neurons), len(self.heads))
        self.chain = _with_blocks(_copy_on(model, watch.device), index, count)
        # Which width each block of the chain has; of heads and neurons each knot comes up at least once.
        self.cuts = [(self.heads[i % len(self.heads)], neurons[i % len(neurons)]) for i in range(count)]
        _cut(self.chain, self.cuts)
        self.stages: Sites | None = None
        if can_drop:
            self.stages = _with_blocks(_copy_on(model, watch.device), index, len(self.heads))
            _cut(self.stages, [(heads, None) for heads in self.heads])
            for number in range(len(self.heads)):
                _put_stage(self.stages, number, _STAGE_KEEP, self.stages.fuse)
        parameter = next(self.chain.model.parameters())
        self.inputs = {
            n: torch.randn(watch.batch_size, n, sites.dim, device=parameter.device, dtype=parameter.dtype)
            for n in self.tokens
        }

    @property
    def passes(self) -> list[Callable[[], None]]:
        """What to run once in each round. Not kept: it would hold the copies until the next collection of garbage."""
        timed = (self._time_chain,) if self.stages is None else (self._time_chain, self._time_stages)
        return [partial(time, n) for time in timed for n in self.tokens]

    def _time_chain(self, num_tokens: int) -> None:
        x, watch = self.inputs[num_tokens], self.watch
        with watch.at_calls(*filter(None, map(_start_of_mlp, self.chain.blocks))) as seams:
            watch.wait()
            marks = [watch.mark()]
            for block in self.chain.blocks:
                x = block.module(x)
                marks.append(watch.mark())
            watch.wait()
        seams = seams or marks[1:]  # no MLP that anything is known of: all of a block counts as its attention
        for (heads, neurons), start, seam, end in zip(self.cuts, marks, seams, marks[1:], strict=False):
            watch.readings["attention", self.index, heads, num_tokens].append(watch.between(start, seam))
            watch.readings["mlp", self.index, neurons, num_tokens].append(watch.between(seam, end))

    def _time_stages(self, num_tokens: int) -> None:
        assert self.stages is not None
        for heads, block in zip(self.heads, self.stages.container.children(), strict=True):
            select = next(module for module in block.modules() if isinstance(module, TokenSelection))
            with self.watch.at_calls(select, ends=True) as marks:
                block(self.inputs[num_tokens])
                self.watch.wait()
            self.watch.readings["stage", self.index, heads, num_tokens].append(self.watch.between(*marks))

    def times(self) -> BlockTimes:
        """What this kind of block takes: medians of the readings."""
        surface = partial(self.watch.surface, tokens=self.tokens)
        return BlockTimes(
            attention=surface(("attention", self.index), self.heads),
            mlp=surface(("mlp", self.index), self.aligned),
            unaligned_mlp=surface(("mlp", self.index), self.odd),
            stage=surface(("stage", self.index), self.heads) if self.stages is not None else None,
        )


def _cut(sites: Sites, widths: Sequence[tuple[int, int | None]]) -> None:
    """Leave each block so many heads and neurons; None: all of them."""
    for block, (heads, neurons) in zip(sites.blocks, widths, strict=True):
        for site, kept in ((block.heads, heads), (block.neurons, neurons)):
            if site is not None and kept is not None:
                cut_units(site, tuple(range(kept)))


def _put_stage(sites: Sites, block: int, keep: float, fuse: bool) -> None:
    """Make `block` a token stage that lets the share `keep` of its tokens go on."""
    new = sites.family.token_stage_block(sites, block, TokenStage(block, keep), fuse)
    sites.container._modules[str(block)] = new


def _start_of_mlp(block: BlockSite) -> nn.Module | None:
    """The module whose call ends a block's attention half and begins its MLP half."""
    if block.tokens is not None:
        return block.tokens.residual_norm
    return None if block.neurons is None else block.neurons.owner


class _OutsideBlocks:
    """The model with one block only: what comes before it and after it, by how many tokens it leaves."""

    def __init__(self, model: nn.Module, watch: _Stopwatch) -> None:
        self.watch = watch
        sites = find_sites(model)
        costs = CostModel(sites)
        self.models = {costs.num_tokens: _with_blocks(_copy_on(model, watch.device), 0, 1)}
        left = int(costs.tokens_left(costs.num_tokens, 0.25))
        if _can_drop(sites) and left < costs.num_tokens:
            self.models[left + 1] = _with_blocks(_copy_on(model, watch.device), 0, 1)
            _put_stage(self.models[left + 1], 0, 0.25, True)
        self.images = blank_images(self.models[costs.num_tokens].model, watch.batch_size, sites.input_size)

    @property
    def passes(self) -> list[Callable[[], None]]:
        """What to run once in each round."""
        return [partial(self._time, left) for left in self.models]

    def _time(self, left: int) -> None:
        sites, watch = self.models[left], self.watch
        (block,) = sites.container.children()
        with watch.at_calls(block, ends=True) as marks:
            watch.wait()
            start = watch.mark()
            sites.model(self.images)
            end = watch.mark()
            watch.wait()
        watch.readings["outside", 0, left].append(watch.between(start, marks[0]) + watch.between(marks[1], end))

    def surface(self) -> Surface:
        """What is outside the blocks takes: medians of the readings."""
        return self.watch.surface(("outside",), [0], sorted(self.models))


class _WholeModels:
    """The model in one piece: as it is, and slim."""

    def __init__(self, model: nn.Module, watch: _Stopwatch) -> None:
        self.watch = watch
        self.dense = _copy_on(model, watch.device)
        sites = find_sites(self.dense)
        self.policies = [Policy(**dict.fromkeys(sites.dimensions, keep)) for keep in _WHOLE_MODELS]  # type: ignore[arg-type]
        self.models = [slim(self.dense, first_units(sites, policy)) for policy in self.policies]
        self.images = blank_images(self.dense, watch.batch_size, sites.input_size)

    @property
    def passes(self) -> list[Callable[[], None]]:
        """What to run once in each round."""
        return [partial(self._time, number) for number in range(len(self.models))]

    def _time(self, number: int) -> None:
        model = self.models[number]
        model(self.images)  # what ran before has taken the caches, which in use it has to itself
        self.watch.wait()
        start = self.watch.mark()
        model(self.images)
        end = self.watch.mark()
        self.watch.wait()
        self.watch.readings["whole", number].append(self.watch.between(start, end))

    def against(self, table: LatencyTable) -> tuple[tuple[float, float], ...]:
        """(sum of parts, the median of what was timed) of each model, in seconds per image, dense first."""
        costs = CostModel(find_sites(self.dense))
        sums = [float(table.sum_of_parts(costs, costs.kept_by(policy))) for policy in self.policies]
        pairs = tuple((parts, self.watch.median("whole", number)) for number, parts in enumerate(sums))
        log.info(
            "  latency table: dense takes %.4g ms per image; of whole models, dense first, sums of parts are off by %s",
            pairs[0][1] * 1e3,
            ", ".join(f"{parts / timed - 1:+.1%}" for parts, timed in pairs),
        )
        return pairs
