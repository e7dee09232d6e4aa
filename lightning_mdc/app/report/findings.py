"""What the numbers of a run mean, in words; each sentence only if the numbers say so."""

from __future__ import annotations

from lightning_mdc.app.report.results import FINETUNED, REFERENCE, Results, mean_correct
from lightning_mdc.figures.numbers import counted, percent, scaled, seconds


def verdict(results: Results) -> str:
    """The one sentence: what it costs, what accuracy is left, how much faster it is."""
    dense, slim, right = results.dense, results.slimmest, results.slim_correct
    after = " after finetuning" if results.of(FINETUNED) else ", not finetuned,"
    batch = results.batch_sizes[-1]
    return (
        f"At {percent(slim.macs / dense.macs)} of the MACs and {percent(slim.params / dense.params)} of the parameters "
        f"the slim model{after} gets {counted(right)} of {dense.images} test "
        f"images right, {_difference(right - dense.correct)} dense ({percent(dense.top1)} → "
        f"{percent(right / dense.images)}), and is {results.speedup(batch):.2f}x as fast at batch {batch}."
    )


def findings(results: Results) -> list[str]:
    """The verdict, and what else a reader would have to work out from the table."""
    lines = [verdict(results)]
    finetuned, reference = results.of(FINETUNED), results.of(REFERENCE)
    if finetuned and reference:
        gap = results.slim_correct - mean_correct(reference)
        lines.append(
            "The fair comparison is with a dense model given the same extra epochs and the same teacher: slim gets "
            f"{_difference(gap)} that."
        )
    overhead = overhead_line(results)
    return lines if overhead is None else [*lines, overhead]


def overhead_line(results: Results) -> str | None:
    """Why a tiny model gains little at the smallest batch; None where it was not measured so.

    "Little" is less than half of what it gains at the largest batch: 1.05x against 1.4x, say.
    """
    small, large = results.batch_sizes[0], results.batch_sizes[-1]
    gain, full_gain = results.speedup(small) - 1, results.speedup(large) - 1
    if small == large or full_gain <= 0 or gain >= full_gain / 2:
        return None
    dense = results.dense
    return (
        f"At batch {small} the slim model is {1 + gain:.2f}x as fast as dense, at batch {large} {1 + full_gain:.2f}x: "
        f"{scaled(dense.macs)}MACs are so few that most of the {seconds(dense.latency[small])} of a single image goes "
        "into starting operations one by one. Pruning makes operations smaller, not fewer, and a token stage adds some."
    )


def _difference(images: float) -> str:
    if abs(images) < 0.05:
        return "as many test images right as"
    number = counted(abs(images))
    return f"{number} {'more' if images > 0 else 'fewer'} test image{'' if number == '1' else 's'} right than"
