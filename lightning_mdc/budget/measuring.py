"""Measures a `LatencyTable`: slim copies of a model's blocks are timed on the device it is for.

Blocks are timed where they stand: behind each other, each on what the one before put out, and with clocks at the seams
of their halves. A part that is run by itself again and again finds its weights and its input in the cache and is
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
from torch import Tensor, nn

from lightning_mdc.budget.cost_model import CostModel
from lightning_mdc.budget.latency_table import (
    ALIGNMENT,
    BlockTimes,
    HalfTimes,
    LatencyTable,
    Surface,
    architecture,
    block_kinds,
    token_conditions,
)
from lightning_mdc.budget.timing import blank_images, settled_memory
from lightning_mdc.distributed import on_first_rank
from lightning_mdc.errors import BudgetError, check_number, check_whole
from lightning_mdc.models import Anatomy, Block, Units, find_anatomy, probing
from lightning_mdc.models.swapping import cut_units, not_copied, original_class, plain_copy
from lightning_mdc.policy import TOKENS, Plan, Policy, TokenOptions, TokenStage
from lightning_mdc.progress import bar
from lightning_mdc.randomness import isolated_rng
from lightning_mdc.surgery.slim import slim, stage_tokens
from lightning_mdc.tokens.block import StagedBlock
from lightning_mdc.tokens.flow import tokens_after, tokens_kept

log = logging.getLogger(__name__)

# Rounds, each with one reading of everything; the median counts.
_FEWEST_ROUNDS, _MOST_ROUNDS = 5, 100
# What a token stage costs hardly depends on how many it keeps.
_STAGE_KEEP = 0.5
# What is outside the blocks is timed with all tokens at the end, and with so few.
_FEW = 0.25
# Keep ratios, of all dimensions alike, of the whole models that sums of parts are corrected by.
_WHOLE_MODELS = (1.0, 0.8, 0.6, 0.4)


def measure_latency_table(
    model: nn.Module,
    batch_size: int = 1,
    *,
    tokens: TokenOptions | None = None,
    device: str | torch.device | None = None,
    cache: str | Path | None = None,
    seconds: float = 30.0,
    progress: bool = True,
    submodule: str | None = None,
) -> LatencyTable:
    """The latency table of `model`, measured now or read from the cache.

    In a distributed run all ranks have to ask: the first one measures for all. Of processes that ask for the same table
    one measures, the others wait for it.

    Args:
        model: the dense model (or a module that holds it); unchanged, and it need have no weights (meta device).
        batch_size: images per forward pass.
        tokens: what happens at token stages; None: ``TokenOptions()``.
        device: where to measure; None: where the model is.
        cache: folder of tables; None: ``lightning_mdc/latency`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
        seconds: how long to measure, about.
        progress: show a progress bar where there is a terminal.
        submodule: of the vision transformer in `model`; see `find_anatomy`.

    Raises:
        BudgetError: `batch_size` or `seconds` is no positive number, or `device` none that is here.
    """

    def read_or_measured() -> LatencyTable:
        check_whole("batch_size", batch_size, 1, BudgetError)
        check_number("seconds", seconds, "how long to measure", BudgetError, above=0)
        anatomy = find_anatomy(model, submodule)
        on = _device_of(anatomy, device)
        conditions = _conditions(anatomy, batch_size, on, tokens)
        name = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:16]
        path = (_cache_folder() if cache is None else Path(cache)) / f"{name}.json"
        measure = partial(_measured_table, anatomy.model, on, conditions, seconds, progress)
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
    batch_size, tokens = conditions["batch_size"], TokenOptions(**(conditions["tokens"] or {}))
    watch = _Stopwatch(device, batch_size)
    dense = _copy_on(model, device)
    _check_shapes(find_anatomy(dense))
    kinds, kind_of_block = block_kinds(find_anatomy(dense))
    blocks = [_Blocks(dense, index, tokens, watch) for _, index in kinds]
    outside, whole = _OutsideBlocks(dense, tokens, watch), _WholeModels(dense, tokens, watch)
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


def _device_of(anatomy: Anatomy, device: str | torch.device | None) -> torch.device:
    own = next(anatomy.model.parameters()).device
    try:
        wanted = own if device is None else torch.device(device)
    except RuntimeError as error:
        raise BudgetError(f"device={device!r}: expected a device such as 'cpu' or 'cuda:0' ({error})") from error
    if wanted.type not in ("cpu", "cuda", "meta"):
        raise BudgetError(f"device={str(wanted)!r}: latency is measured on 'cpu' and 'cuda' only; give one of these")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise BudgetError(f"device={str(wanted)!r}: there is none here; measure there and pass table=")
    return torch.device("cpu") if wanted.type == "meta" else wanted


def _conditions(anatomy: Anatomy, batch_size: int, device: torch.device, tokens: TokenOptions | None) -> dict[str, Any]:
    """What the times depend on, JSON-ready."""
    on_gpu = device.type == "cuda"
    conditions = {
        "model": architecture(anatomy),
        "tokens": token_conditions(anatomy, tokens),
        "modules": sorted({type(module).__name__ for block in anatomy.blocks for module in block.module.modules()}),
        "batch_size": batch_size,
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": None if on_gpu else torch.get_num_threads(),
        "dtype": str(next(anatomy.model.parameters()).dtype).removeprefix("torch."),
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


def unit_knots(units: Units | None) -> tuple[list[int], list[int]]:
    """Numbers of units to time. Of units that are channels, multiples of `ALIGNMENT` (and all), and others."""
    if units is None:
        return [0], []
    count = units.count
    if units.width > 1:  # all numbers of a few, quarters of many; without them and with all of them at the ends
        few = count <= 4
        return (list(range(count + 1)) if few else sorted({0, 1, *(count * i // 4 for i in (1, 2, 3)), count})), []
    quarters = [count * i // 4 // ALIGNMENT * ALIGNMENT for i in (1, 2, 3)]
    aligned = sorted({0, count // 8 // ALIGNMENT * ALIGNMENT, *quarters, count})
    odd = sorted({min(1, count), *(q + 3 for q in quarters if q + 3 < count - 1), max(count - 1, 0)})
    return aligned, odd


def token_knots(num_tokens: int, fewest: int) -> list[int]:
    """Eighths of all tokens; attention grows with the square of them."""
    return sorted({fewest, *(n for i in range(1, 8) if (n := num_tokens * i // 8) > fewest), num_tokens})


# --- clocks -----------------------------------------------------------------------------------------------------------


class _Stopwatch:
    """Marks points of time, on the device's own clock where it runs on behind our back, and keeps what is in between.

    Attributes:
        readings: seconds per image of each part, by a name such as ``("half", 1, 0, 96, 17)``: the second half of the
            kind of block that block 0 is of, 96 units and 17 tokens.
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


def first_units(anatomy: Anatomy, policy: Policy, tokens: TokenOptions | None = None) -> Plan:
    """A plan of `policy` for timing, which does not depend on which units stay: the first ones."""
    counts = anatomy.counts(policy)
    tokens = TokenOptions() if tokens is None else tokens
    return Plan(
        kept={name: tuple(tuple(range(int(n))) for n in counts.units.get(name, ())) for name in anatomy.sizes},
        sizes=anatomy.sizes,
        tokens=tuple(TokenStage(b, float(keep)) for b, keep in zip(counts.stages, counts.tokens, strict=True)),
        reduction=tokens.reduction,
        restore=anatomy.restores(tokens.restore),
    )


def _copy_on(model: nn.Module, device: torch.device) -> nn.Module:
    """A plain copy, in eval mode, with weights even where the model has none (on the meta device)."""
    copied = plain_copy(find_anatomy(model).model)
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


def _without_stage(block: Block) -> Block:
    """`block`, which is changed, as if no tokens left in it or before it."""
    block.module.__class__ = original_class(block.module)
    return replace(block, stage=None)


def _staged(anatomy: Anatomy, blocks: Sequence[Block], keep: float, tokens: TokenOptions) -> Anatomy:
    """A model's outside around `blocks`, which are changed: in each, the share `keep` of its tokens goes on."""
    staged = replace(anatomy, blocks=tuple(blocks), reader=None, no_tokens=None)
    policy = Policy(tokens=[keep] * len(blocks), stages=range(len(blocks)))
    stage_tokens(staged, first_units(staged, policy, tokens))
    return staged


def _check_shapes(anatomy: Anatomy) -> None:
    """Refuse, with a `BudgetError`, blocks that give tokens of another shape than they take: copies are timed one
    after another, and what is outside the blocks without most of them."""

    def compare(block: Block, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if block.stage is None and not (isinstance(output, Tensor) and output.shape == args[0].shape):
            raise BudgetError(
                f"latency of {anatomy.name}: {block.name} ({type(block.module).__name__}) gives tokens of another "
                "shape than it takes, so that it cannot be timed by itself; limit macs or params"
            )

    with torch.no_grad(), probing((b.module.register_forward_hook, partial(compare, b)) for b in anatomy.blocks):
        anatomy.model(blank_images(anatomy.model, 1, anatomy.input_size))


def _what_reaches(module: nn.Module, anatomy: Anatomy, batch_size: int) -> tuple[Any, ...]:
    """What a module is given while the model sees so many images."""
    seen: list[tuple[Any, ...]] = []
    with torch.no_grad(), probing([(module.register_forward_pre_hook, lambda _, args: seen.append(args))]):
        anatomy.model(blank_images(anatomy.model, batch_size, anatomy.input_size))
    return seen[0]


class _Blocks:
    """Blocks of one kind, that of block `index`, cut to all widths of interest, with clocks at their seams."""

    def __init__(self, model: nn.Module, index: int, tokens: TokenOptions, watch: _Stopwatch) -> None:
        anatomy = find_anatomy(model)
        costs = CostModel(anatomy)
        can_drop = TOKENS not in anatomy.reasons or bool(anatomy.stages)
        original = anatomy.blocks[index]
        self.index, self.watch = index, watch
        # The units of either half that are timed; of several dimensions in one half the first.
        self.units = [next((u for u in original.units.values() if u.after_point == half), None) for half in (0, 1)]
        self.knots = [unit_knots(units) for units in self.units]
        self.tokens = token_knots(costs.num_tokens, costs.num_prefix + 1) if can_drop else [costs.num_tokens]
        every = [[*aligned, *odd] for aligned, odd in self.knots]
        count = max(map(len, every))
        # Which width each half of each block of the chain has; each knot comes up at least once.
        self.widths = [[knots[i % len(knots)] for knots in every] for i in range(count)]
        self.chain = [self._cut(original, widths) for widths in self.widths]
        self.stages: Sequence[Block] = ()
        if can_drop:
            blocks = [self._cut(original, [kept]) for kept in every[0]]
            # Each as the first stage of a model: it asks for nothing that happened before.
            self.stages = [_staged(anatomy, [block], _STAGE_KEEP, tokens).blocks[0] for block in blocks]
        reaching, *beside = _what_reaches(original.module, anatomy, watch.batch_size)
        self.beside = () if can_drop else tuple(beside)
        shapes = {n: (watch.batch_size, n, anatomy.dim) if can_drop else reaching.shape for n in self.tokens}
        self.inputs = {n: reaching.new_empty(shape).normal_() for n, shape in shapes.items()}

    def _cut(self, original: Block, widths: Sequence[int]) -> Block:
        """A copy with so many units in the first half, and the second if that is said."""
        block = _without_stage(copy.deepcopy(original, not_copied(original.module)))
        for units, kept in zip(self.units, widths, strict=False):
            if units is not None:
                cut_units(block.units[units.dimension], tuple(range(kept)))
        return block

    @property
    def passes(self) -> list[Callable[[], None]]:
        """What to run once in each round. Not kept: it would hold the copies until the next collection of garbage."""
        timed = (self._time_chain, self._time_stages) if self.stages else (self._time_chain,)
        return [partial(time, n) for time in timed for n in self.tokens]

    def _time_chain(self, num_tokens: int) -> None:
        x, watch = self.inputs[num_tokens], self.watch
        with watch.at_calls(*(block.second_half for block in self.chain if block.second_half is not None)) as seams:
            watch.wait()
            marks = [watch.mark()]
            for block in self.chain:
                x = block.alone(block.module, x, *self.beside)
                marks.append(watch.mark())
            watch.wait()
        seams = seams or marks[1:]  # no seam that anything is known of: all of a block counts as its first half
        for widths, start, seam, end in zip(self.widths, marks, seams, marks[1:], strict=False):
            for half, seconds in enumerate((watch.between(start, seam), watch.between(seam, end))):
                watch.readings["half", half, self.index, widths[half], num_tokens].append(seconds)

    def _time_stages(self, num_tokens: int) -> None:
        for kept, block in zip([*self.knots[0][0], *self.knots[0][1]], self.stages, strict=True):
            assert isinstance(block.module, StagedBlock) and block.module.role.select is not None
            with self.watch.at_calls(block.module.role.select, ends=True) as marks:
                block.alone(block.module, self.inputs[num_tokens])
                self.watch.wait()
            self.watch.readings["stage", self.index, kept, num_tokens].append(self.watch.between(*marks))

    def times(self) -> BlockTimes:
        """What this kind of block takes: medians of the readings."""
        surface = partial(self.watch.surface, tokens=self.tokens)

        def half(number: int) -> HalfTimes:
            units, (aligned, odd) = self.units[number], self.knots[number]
            part = ("half", number, self.index)
            dimension = None if units is None else units.dimension
            return HalfTimes(dimension, surface(part, aligned), surface(part, odd) if odd else None)

        knots = sorted({*self.knots[0][0], *self.knots[0][1]})
        return BlockTimes((half(0), half(1)), surface(("stage", self.index), knots) if self.stages else None)


class _Skipped(nn.Module):
    """In place of a block."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x


class _OutsideBlocks:
    """The model with one block only: what comes before it and after it, by how many tokens it leaves."""

    def __init__(self, model: nn.Module, tokens: TokenOptions, watch: _Stopwatch) -> None:
        self.watch = watch
        anatomy, costs = find_anatomy(model), CostModel(find_anatomy(model))
        everything = costs.num_tokens
        self.models = {everything: self._alone(model)}
        if TOKENS not in anatomy.reasons or anatomy.stages:
            stay = tokens_kept(everything, _FEW, costs.num_prefix)
            left = int(tokens_after(everything, stay, tokens.reduction))
            if left < everything:
                self.models[left] = self._alone(model)
                _staged(self.models[left], self.models[left].blocks, _FEW, tokens)
        self.images = blank_images(model, watch.batch_size, anatomy.input_size)

    def _alone(self, model: nn.Module) -> Anatomy:
        """Of a copy of the model that runs its last block only, in which no tokens leave."""
        anatomy = find_anatomy(copy.deepcopy(model, not_copied(model)))
        for block in anatomy.blocks[:-1]:
            anatomy.model.set_submodule(block.name, _Skipped())
        return replace(anatomy, blocks=(_without_stage(anatomy.blocks[-1]),))

    @property
    def passes(self) -> list[Callable[[], None]]:
        """What to run once in each round."""
        return [partial(self._time, left) for left in self.models]

    def _time(self, left: int) -> None:
        anatomy, watch = self.models[left], self.watch
        block = anatomy.blocks[0].module
        with watch.at_calls(block, ends=True) as marks:
            watch.wait()
            start = watch.mark()
            anatomy.model(self.images)
            end = watch.mark()
            watch.wait()
        watch.readings["outside", 0, left].append(watch.between(start, marks[0]) + watch.between(marks[1], end))

    def surface(self) -> Surface:
        """What is outside the blocks takes: medians of the readings."""
        return self.watch.surface(("outside",), [0], sorted(self.models))


class _WholeModels:
    """The model in one piece: as it is, and slim."""

    def __init__(self, dense: nn.Module, tokens: TokenOptions, watch: _Stopwatch) -> None:
        self.watch, self.dense, self.tokens = watch, dense, tokens
        anatomy = find_anatomy(dense)
        self.policies = [Policy(**dict.fromkeys(anatomy.dimensions, keep)) for keep in _WHOLE_MODELS]  # type: ignore[arg-type]
        self.models = [slim(dense, first_units(anatomy, policy, tokens)) for policy in self.policies]
        self.images = blank_images(self.dense, watch.batch_size, anatomy.input_size)

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
        costs = CostModel(find_anatomy(self.dense))
        sums = [float(table.sum_of_parts(costs, costs.kept_by(policy, self.tokens))) for policy in self.policies]
        pairs = tuple((parts, self.watch.median("whole", number)) for number, parts in enumerate(sums))
        log.info(
            "  latency table: dense takes %.4g ms per image; of whole models, dense first, sums of parts are off by %s",
            pairs[0][1] * 1e3,
            ", ".join(f"{parts / timed - 1:+.1%}" for parts, timed in pairs),
        )
        return pairs
