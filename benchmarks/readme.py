"""Where a benchmark's results go: JSON, a picture, and a table in README.md between two comments with its name."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lightning_mdc.figures.style import save_figure
from lightning_mdc.files import write_json, write_text

README = Path(__file__).resolve().parents[1] / "README.md"
RESULTS = Path(__file__).resolve().parent / "results"


def publish(
    name: str,
    arguments: Namespace,
    measure: Callable[[], dict[str, Any]],
    figure: Callable[[dict[str, Any]], Figure],
    table: Callable[[dict[str, Any]], str],
) -> None:
    """Measure, keep the numbers, draw them, and put their table into README.md.

    With ``arguments.table_only`` the numbers are those kept before. With ``arguments.quick`` all goes to
    ``benchmarks/results/quick/``, and the table is only printed.
    """
    folder = folder_of(arguments.quick)
    stored = folder / f"{name}.json"
    if not arguments.table_only:
        write_json(stored, measure())
    result = json.loads(stored.read_text())
    save_figure(figure(result), folder / f"{name}.png")
    if arguments.quick:
        print(table(result))
    else:
        put(name, table(result))


def folder_of(quick: bool) -> Path:
    """Where results go."""
    return RESULTS / "quick" if quick else RESULTS


def put(name: str, text: str) -> None:
    """Print `text`, and replace what README.md has between ``<!-- name:begin -->`` and ``<!-- name:end -->`` by it."""
    print(text)
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    readme = README.read_text()
    if begin not in readme or end not in readme:
        print(f"({README} has no place for it: {begin} and {end})")
        return
    head, rest = readme.split(begin)
    write_text(README, f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}")
