"""Measures a `LatencyTable`: slim copies of a model's blocks, timed on the device it is for.

Blocks are timed where they stand: behind each other, each on what the one before put out, and with clocks at the seams
of attention and MLP. A part that is run by itself again and again finds its weights and its input in the cache and is
faster than it will ever be in a model.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import platform
import time
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
from torch import Tensor, nn

from lightning_mdc.budget.costs import CostModel
from lightning_mdc.budget.latency import blank_images, settled_memory
from lightning_mdc.budget.latency_table import (
    ALIGNMENT,
    BlockTimes,
    LatencyTable,
    Surface,
    block_kinds,
    first_units,
    widths,
)
from lightning_mdc.errors import BudgetError, check_whole
from lightning_mdc.models import Sites, find_sites
from lightning_mdc.policy import Policy, TokenStage
from lightning_mdc.progress import bar
from lightning_mdc.randomness import isolated_rng
from lightning_mdc.surgery.cutting import cut_units
from lightning_mdc.surgery.masks import remove_masks
from lightning_mdc.surgery.slim import plain_copy, slim
from lightning_mdc.tokens.stage import TokenSelection

log = logging.getLogger(__name__)

# Rounds, each with one reading of everything; the median counts.
_FEWEST_ROUNDS, _MOST_ROUNDS = 5, 100
# What a token stage costs hardly depends on how many it keeps.
_STAGE_KEEP = 0.5
# Keep ratios, of all dimensions alike, of the whole models that sums of parts are corrected by.
_WHOLE = (1.0, 0.8, 0.6, 0.4)


@isolated_rng()  # a run that finds its table in the cache draws nothing either
def measured_table(
    model: nn.Module, batch_size: int, device: torch.device, *, seconds: float, about: dict[str, Any], progress: bool
) -> LatencyTable:
    """Time the parts of `model` on `device`, for about so many seconds."""
    benches: list[_Bench] = [_Bench(model, index, batch_size, device) for _, index in block_kinds(find_sites(model))[0]]
    outside = _Outside(model, batch_size, device)
    whole = _Whole(model, batch_size, device)
    timed: list[_Bench | _Outside | _Whole] = [*benches, outside, whole]
    works = [work for each in timed for work in each.works()]
    with torch.inference_mode(), settled_memory():
        begun = time.perf_counter()
        for work in works:  # caches, kernels and the allocator warm up
            work()
        clocked = time.perf_counter() - begun
        rounds = int(min(max(seconds / max(clocked, 1e-9), _FEWEST_ROUNDS), _MOST_ROUNDS))
        for each in timed:
            each.forget()
        rng = np.random.default_rng(0)
        with bar(f"Timing blocks at batch {batch_size}", rounds, shown=progress, in_background=False) as advance:
            for _ in range(rounds):
                for number in rng.permutation(len(works)):
                    works[number]()
                advance()
    table = LatencyTable(
        about=about,
        kinds=tuple(bench.times() for bench in benches),
        kind_of_block=tuple(block_kinds(find_sites(model))[1]),
        outside=outside.surface(),
    )
    return replace(table, whole=whole.against(table))


def cached_table(
    model: nn.Module,
    batch_size: int,
    device: str | torch.device | None,
    cache: str | Path | None,
    seconds: float,
    progress: bool,
) -> LatencyTable:
    """See `LatencyTable.of`. Of processes that ask for the same table one measures, the others wait for it."""
    check_whole("batch_size", batch_size, 1, BudgetError)
    if not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        raise BudgetError(f"seconds={seconds!r}: expected a positive number")
    sites = find_sites(model)
    place = _device_of(sites, device)
    about = _about(sites, batch_size, place)
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = (_cache_folder() if cache is None else Path(cache)) / f"{name}.json"
    measure = partial(measured_table, model, batch_size, place, seconds=seconds, about=about, progress=progress)
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
                if table.about == about:
                    return table
                log.warning("%s holds another latency table: measuring anew", path)
            except BudgetError as error:
                log.warning("%s is damaged (%s): measuring anew", path, error)
        log.info("  measuring block latencies on %s at batch %d, about %.0f s", about["device"], batch_size, seconds)
        table = measure()
        table.save(path)
        return table


def _device_of(sites: Sites, device: str | torch.device | None) -> torch.device:
    own = next(sites.model.parameters()).device
    try:
        place = own if device is None else torch.device(device)
        if place.type == "cuda" and not torch.cuda.is_available():
            raise BudgetError(f"device={str(device)!r}: there is none here; measure there and pass table=")
    except RuntimeError as error:
        raise BudgetError(f"device={device!r}: expected a device such as 'cpu' or 'cuda:0' ({error})") from error
    return torch.device("cpu") if place.type == "meta" else place


def _about(sites: Sites, batch_size: int, device: torch.device) -> dict[str, Any]:
    """What the times depend on, JSON-ready."""
    on_gpu = device.type == "cuda"
    outcome = {
        "model": widths(sites),
        "modules": sorted({type(module).__name__ for block in sites.blocks for module in block.module.modules()}),
        "batch_size": batch_size,
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": None if on_gpu else torch.get_num_threads(),
        "dtype": str(next(sites.model.parameters()).dtype).removeprefix("torch."),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    as_read: dict[str, Any] = json.loads(json.dumps(outcome))
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
    """Marks points of time, on the device's own clock where it runs on behind our back."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

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
    def before(self, *modules: nn.Module) -> Iterator[list[Any]]:
        """Gives the list that a mark is put in whenever one of `modules` is called."""
        marks: list[Any] = []
        with ExitStack() as hooks:
            for module in modules:
                hooks.callback(module.register_forward_pre_hook(lambda *_: marks.append(self.mark())).remove)
            yield marks

    @contextmanager
    def around(self, module: nn.Module) -> Iterator[list[Any]]:
        """As `before`, and with a mark when the call is over."""
        with self.before(module) as marks, ExitStack() as hooks:
            hooks.callback(module.register_forward_hook(lambda *_: marks.append(self.mark())).remove)
            yield marks

    def between(self, first: Any, second: Any) -> float:
        """Seconds from one mark to another, after `wait`."""
        return float(second - first if isinstance(first, float) else first.elapsed_time(second) / 1e3)


# --- what is timed ----------------------------------------------------------------------------------------------------


def _copy_on(model: nn.Module, device: torch.device) -> nn.Module:
    """A plain copy without masks, in eval mode, with weights even where the model has none (on the meta device)."""
    copied = plain_copy(find_sites(model).model)
    remove_masks(copied)
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
    block = sites.blocks[index].module
    if sites.blocks[index].stage is not None:
        block = sites.family.token_stage_block(sites, index, TokenStage(index, 1.0), sites.fuse)
    sites.container._modules.clear()
    for number in range(count):
        sites.container.add_module(str(number), copy.deepcopy(block))
    return find_sites(model)


def _can_drop(sites: Sites) -> bool:
    """Whether tokens may leave, or do already."""
    return "tokens" not in sites.reasons or bool(sites.stages)


def _random_tokens(sites: Sites, batch_size: int, num_tokens: int) -> Tensor:
    parameter = next(sites.model.parameters())
    return torch.randn(batch_size, num_tokens, sites.dim, device=parameter.device, dtype=parameter.dtype)


class _Bench:
    """Blocks of one kind, cut to all widths of interest, with clocks at their seams."""

    def __init__(self, model: nn.Module, index: int, batch_size: int, device: torch.device) -> None:
        site = find_sites(model).blocks[index]
        can_drop = _can_drop(find_sites(model))
        costs = CostModel(find_sites(model))
        self.heads = head_knots(site.heads.num_units) if site.heads else [0]
        self.aligned, self.odd = neuron_knots(site.neurons.num_units) if site.neurons else ([0], [0])
        self.tokens = token_knots(costs.num_tokens, costs.num_prefix + 1) if can_drop else [costs.num_tokens]
        widths = [*self.aligned, *self.odd]
        self.watch = _Stopwatch(device)
        count = max(len(widths), len(self.heads))
        self.chain = _with_blocks(_copy_on(model, device), index, count)
        # Which width each block of the chain has; of heads and neurons each knot comes up at least once.
        self.cuts = [(self.heads[i % len(self.heads)], widths[i % len(widths)]) for i in range(count)]
        _cut(self.chain, self.cuts)
        self.stages: Sites | None = None
        if can_drop:
            self.stages = _with_blocks(_copy_on(model, device), index, len(self.heads))
            _cut(self.stages, [(heads, None) for heads in self.heads])
            for number in range(len(self.heads)):
                new = self.stages.family.token_stage_block(
                    self.stages, number, TokenStage(number, _STAGE_KEEP), self.stages.fuse
                )
                self.stages.container._modules[str(number)] = new
        self.inputs = {n: _random_tokens(self.chain, batch_size, n) for n in self.tokens}
        self.batch_size = batch_size
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.attention: dict[tuple[int, int], list[float]] = {}
        self.mlp: dict[tuple[int, int], list[float]] = {}
        self.selection: dict[tuple[int, int], list[float]] = {}

    def works(self) -> list[Callable[[], None]]:
        """What to run once in each round."""
        stages = [partial(self._time_stages, n) for n in self.tokens] if self.stages is not None else []
        return [*(partial(self._time_chain, n) for n in self.tokens), *stages]

    def _time_chain(self, num_tokens: int) -> None:
        x = self.inputs[num_tokens]
        with self.watch.before(*filter(None, map(_seam, self.chain.blocks))) as seams:
            self.watch.wait()
            marks = [self.watch.mark()]
            for block in self.chain.blocks:
                x = block.module(x)
                marks.append(self.watch.mark())
            self.watch.wait()
        seams = seams or marks[1:]  # no MLP that anything is known of: all of a block counts as its attention
        for (heads, neurons), start, seam, end in zip(self.cuts, marks, seams, marks[1:], strict=False):
            self.attention.setdefault((heads, num_tokens), []).append(self.watch.between(start, seam))
            self.mlp.setdefault((neurons, num_tokens), []).append(self.watch.between(seam, end))

    def _time_stages(self, num_tokens: int) -> None:
        assert self.stages is not None
        for heads, block in zip(self.heads, self.stages.container.children(), strict=True):
            select = next(module for module in block.modules() if isinstance(module, TokenSelection))
            with self.watch.around(select) as marks:
                block(self.inputs[num_tokens])
                self.watch.wait()
            self.selection.setdefault((heads, num_tokens), []).append(self.watch.between(*marks))

    def times(self) -> BlockTimes:
        """The medians."""
        surface = partial(_surface, tokens=self.tokens, batch_size=self.batch_size)
        return BlockTimes(
            attention=surface(self.attention, self.heads),
            mlp=surface(self.mlp, self.aligned),
            unaligned_mlp=surface(self.mlp, self.odd),
            stage=surface(self.selection, self.heads) if self.stages is not None else None,
        )


def _surface(
    readings: dict[tuple[int, int], list[float]], units: Sequence[int], *, tokens: Sequence[int], batch_size: int
) -> Surface:
    medians = [[float(np.median(readings[u, n])) / batch_size for n in tokens] for u in units]
    return Surface.fitted(units, tokens, np.asarray(medians))


def _cut(sites: Sites, widths: Sequence[tuple[int, int | None]]) -> None:
    for block, (heads, neurons) in zip(sites.blocks, widths, strict=True):
        for site, kept in ((block.heads, heads), (block.neurons, neurons)):
            if site is not None and kept is not None:
                cut_units(site, tuple(range(kept)))


def _seam(block: Any) -> nn.Module | None:
    """The module whose call ends a block's attention half and begins its MLP half."""
    if block.tokens is not None:
        return block.tokens.residual_norm
    return None if block.neurons is None else block.neurons.owner


class _Outside:
    """The model with one block only: what comes before it and after it, by how many tokens it leaves."""

    def __init__(self, model: nn.Module, batch_size: int, device: torch.device) -> None:
        self.watch, self.batch_size = _Stopwatch(device), batch_size
        costs = CostModel(find_sites(model))
        can_drop = _can_drop(find_sites(model))
        self.models = {costs.num_tokens: _with_blocks(_copy_on(model, device), 0, 1)}
        if can_drop:
            sites = _with_blocks(_copy_on(model, device), 0, 1)
            left = int(costs.tokens_left(costs.num_tokens, 0.25))
            new = sites.family.token_stage_block(sites, 0, TokenStage(0, 0.25), True)
            sites.container._modules["0"] = new
            if left < costs.num_tokens:
                self.models[left + 1] = sites
        self.images = blank_images(self.models[costs.num_tokens].model, batch_size, find_sites(model).input_size)
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.readings: dict[tuple[int, int], list[float]] = {}

    def works(self) -> list[Callable[[], None]]:
        """What to run once in each round."""
        return [partial(self._time, left) for left in self.models]

    def _time(self, left: int) -> None:
        sites = self.models[left]
        (block,) = sites.container.children()
        with self.watch.around(block) as marks:
            self.watch.wait()
            start = self.watch.mark()
            sites.model(self.images)
            end = self.watch.mark()
            self.watch.wait()
        before, after = self.watch.between(start, marks[0]), self.watch.between(marks[1], end)
        self.readings.setdefault((0, left), []).append(before + after)

    def surface(self) -> Surface:
        """The medians."""
        return _surface(self.readings, [0], tokens=sorted(self.models), batch_size=self.batch_size)


class _Whole:
    """The model in one piece: as it is, and slim."""

    def __init__(self, model: nn.Module, batch_size: int, device: torch.device) -> None:
        self.watch, self.batch_size = _Stopwatch(device), batch_size
        self.dense = _copy_on(model, device)
        sites = find_sites(self.dense)
        policies = [Policy(**dict.fromkeys(sites.dimensions, keep)) for keep in _WHOLE]  # type: ignore[arg-type]
        self.models = [(policy, slim(self.dense, first_units(sites, policy))) for policy in policies]
        self.images = blank_images(self.dense, batch_size, sites.input_size)
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.readings: list[list[float]] = [[] for _ in self.models]

    def works(self) -> list[Callable[[], None]]:
        """What to run once in each round."""
        return [partial(self._time, number) for number in range(len(self.models))]

    def _time(self, number: int) -> None:
        model = self.models[number][1]
        model(self.images)  # what ran before has taken the caches, which in use it has to itself
        self.watch.wait()
        start = self.watch.mark()
        model(self.images)
        end = self.watch.mark()
        self.watch.wait()
        self.readings[number].append(self.watch.between(start, end))

    def against(self, table: LatencyTable) -> tuple[tuple[float, float], ...]:
        """(sum of parts, the median of what was timed) of each model, in seconds per image, dense first."""
        sites = find_sites(self.dense)
        costs = CostModel(sites)
        pairs = []
        for (policy, _), readings in zip(self.models, self.readings, strict=True):
            parts = float(table.sum_of_parts(costs, *costs.arguments_of(policy), fuse=sites.fuse))
            pairs.append((parts, float(np.median(readings)) / self.batch_size))
        log.info(
            "  latency table: dense takes %.4g ms per image; of whole models, dense first, sums of parts are off by %s",
            pairs[0][1] * 1e3,
            ", ".join(f"{parts / timed - 1:+.1%}" for parts, timed in pairs),
        )
        return tuple(pairs)
