"""Where a benchmark's results go: numbers (JSON), a picture, and what pages show of them.

    .venv/bin/python benchmarks/pages.py             # all pages anew from the stored numbers; measures nothing
    .venv/bin/python benchmarks/pages.py --pictures  # the pictures, too

A page has the place ``<!-- NAME:begin -->`` ... ``<!-- NAME:end -->`` for what a script shows there. Nobody edits what
stands between: a test makes all of it again. A script ``benchmarks/NAME.py`` may have these functions of the numbers in
``results/NAME.json``:

- ``text``: Markdown for ``docs/benchmarks.md``;
- ``headline``: for README.md; ``guide``: for ``docs/guide.md``; ``models``: for ``docs/models.md``;
- ``rows``: header and rows of a table that is too long for a page, for ``results/NAME.csv``;
- ``figure``: the picture, ``results/NAME.png``.

Numbers may have a ``caveat``: what of their settings is not what a run has today. It is shown above the table, and goes
when they are measured anew, because a script writes none.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from matplotlib.figure import Figure

from lightning_mdc.figures.style import save_figure
from lightning_mdc.files import csv_text, write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
# The page that each of a script's functions writes to.
PAGES = {
    "text": ROOT / "docs" / "benchmarks.md",
    "headline": ROOT / "README.md",
    "guide": ROOT / "docs" / "guide.md",
    "models": ROOT / "docs" / "models.md",
}
NAMES = (
    *("pretrained", "finetuned", "accuracy", "criteria", "scoring", "slim_speed", "training", "training_run", "search"),
    *("search_models", "latency", "scale", "digits", "callback", "recipes", "weight_sharing", "coverage"),
)


# --- a benchmark that is run ------------------------------------------------------------------------------------------


def publish(
    name: str,
    arguments: argparse.Namespace,
    measure: Callable[[], dict[str, Any]],
    figure: Callable[[dict[str, Any]], Figure],
    text: Callable[[dict[str, Any]], str],
) -> None:
    """Measure, keep the numbers, draw them, and write what pages show of them.

    With ``arguments.table_only`` the numbers are those kept before. With ``arguments.quick`` all goes to
    ``benchmarks/results/quick/``, and the text is only printed.
    """
    folder = folder_of(arguments.quick)
    stored = folder / f"{name}.json"
    if not arguments.table_only:
        write_json(stored, measure())
    result = json.loads(stored.read_text())
    save_figure(figure(result), folder / f"{name}.png")
    print(text(result))
    if not arguments.quick:
        write_pages(name, result)


def folder_of(quick: bool) -> Path:
    """Where results go."""
    return RESULTS / "quick" if quick else RESULTS


# --- pages ------------------------------------------------------------------------------------------------------------


def write_pages(name: str, result: dict[str, Any]) -> None:
    """Write all that pages, and a CSV file, show of one benchmark's numbers."""
    script = importlib.import_module(name)
    for page, block in blocks(script, result).items():
        write_text(page, with_block(page, name, block))
    if hasattr(script, "rows"):
        write_text(RESULTS / f"{name}.csv", as_csv(script.rows(result)))


def blocks(script: ModuleType, result: dict[str, Any]) -> dict[Path, str]:
    """What a script shows of these numbers, by page."""
    found = {page: getattr(script, of)(result).strip() for of, page in PAGES.items() if hasattr(script, of)}
    if caveat := result.get("caveat"):
        found = {page: f"*{caveat}*\n\n{block}" for page, block in found.items()}
    return found


def with_block(page: Path, name: str, block: str) -> str:
    """The text of `page` with `block` at the place called `name`.

    Raises:
        ValueError: the page has not just one such place.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = page.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page} has {text.count(begin)} x {begin} and {text.count(end)} x {end}; write one of each")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{block}\n{end}{rest.split(end)[1]}"


def as_csv(rows: Sequence[Sequence[str]]) -> str:
    """Header and rows as the text of a CSV file."""
    return csv_text(rows[0], rows[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", action="store_true", help="draw the pictures anew as well")
    pictures = parser.parse_args().pictures
    for name in NAMES:
        result = json.loads((RESULTS / f"{name}.json").read_text())
        write_pages(name, result)
        script = importlib.import_module(name)
        if pictures and hasattr(script, "figure"):
            save_figure(script.figure(result), RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
