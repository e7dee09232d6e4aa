"""The report of one run: the comparison, what it means, where everything lies, what to type next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_mdc.reporting.results import DENSE, FINETUNED, REFERENCE, Results, mean_correct
from lightning_mdc.reporting.tables import by_seed, comparison, scaled, seconds


@dataclass(frozen=True)
class Place:
    """A file or folder of the run, relative to the run's folder, and what it holds."""

    path: str
    holds: str


def findings(results: Results) -> list[str]:
    """Sentences a reader would otherwise work out from the table; each only if the numbers say so."""
    dense, slim = results.of(DENSE)[0], results.slimmest
    lines = [
        f"The slim model costs {slim.macs / dense.macs:.1%} of the MACs and {slim.params / dense.params:.1%} of the "
        "parameters."
    ]
    finetuned, reference = results.of(FINETUNED), results.of(REFERENCE)
    if finetuned:
        lines.append(f"After finetuning it gets {_difference(mean_correct(finetuned) - dense.correct)} dense.")
    if finetuned and reference:
        gap = mean_correct(finetuned) - mean_correct(reference)
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
    dense = results.of(DENSE)[0]
    return (
        f"At batch {small} the slim model is {1 + gain:.2f}x as fast as dense, at batch {large} {1 + full_gain:.2f}x: "
        f"{scaled(dense.macs)}MACs are so few that most of the {seconds(dense.latency[small])} of a single image goes "
        "into starting operations one by one. Pruning makes operations smaller, not fewer, and a token stage adds some."
    )


def markdown(
    results: Results, places: list[Place], commands: list[tuple[str, str]], pictures: Mapping[str, str]
) -> str:
    """The whole of ``report.md``.

    Args:
        places: where things lie.
        commands: (what it does, what to type).
        pictures: path of each, relative to the report, and what it shows.
    """
    seeds = by_seed(results)
    parts = [
        f"# {results.name}: dense and slim side by side",
        comparison(results).markdown(),
        "\n".join(f"- {line}" for line in findings(results)),
        f"Measured on {results.device}. Latency: median of interleaved readings.",
        *(f"![{caption}]({path})\n\n*{caption}.*" for path, caption in pictures.items()),
    ]
    if seeds.rows:
        parts += ["## Every finetuning seed", seeds.markdown()]
    parts += [
        "## Where everything lies",
        "\n".join(f"- `{place.path}`: {place.holds}" for place in places),
        "## What to type next",
        "\n\n".join(f"{what}:\n\n```\n{command}\n```" for what, command in commands),
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _difference(images: float) -> str:
    if abs(images) < 0.05:
        return "as many test images right as"
    number = f"{abs(images):.0f}" if float(images).is_integer() else f"{abs(images):.1f}"
    return f"{number} {'more' if images > 0 else 'fewer'} test image{'' if number == '1' else 's'} right than"
