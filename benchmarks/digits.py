"""What the demo finds: runs ``train.py experiment=digits`` and writes it into ``docs/benchmarks.md`` and the guide.

    .venv/bin/python benchmarks/digits.py                      # a fresh run, several minutes on two cores
    .venv/bin/python benchmarks/digits.py --run runs/digits/…  # take a finished run

Leaves ``benchmarks/results/digits.json`` (every number) and ``digits.png`` (what each block kept).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from pages import RESULTS, write_pages

from lightning_mdc.app.report.report import findings
from lightning_mdc.app.report.results import Result, Results
from lightning_mdc.app.report.tables import comparison
from lightning_mdc.app.run_folder import newest_run

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run of train.py; without it one is made")
    run = parser.parse_args().run
    if run is None:
        subprocess.run([sys.executable, "train.py", "experiment=digits"], cwd=ROOT, check=True)
        run = newest_run(ROOT / "runs" / "digits")
    if run is None or not (run / "results.json").is_file():
        parser.error(f"--run {run}: holds no results.json; give the folder of a finished run")
    stored = RESULTS / "digits.json"
    shutil.copy(run / "results.json", stored)
    shutil.copy(run / "pictures" / "kept.png", RESULTS / "digits.png")
    result = json.loads(stored.read_text())
    print(text(result))
    write_pages("digits", result)


def results_in(result: dict[str, Any]) -> Results:
    """What a run's ``results.json`` tells, of its fields."""
    rows = ({**row, "latency": {int(size): value for size, value in row["latency"].items()}} for row in result["rows"])
    return Results(tuple(Result(**row) for row in rows), result["name"], result["device"])


def text(result: dict[str, Any]) -> str:
    """Dense and slim side by side, and how they were measured."""
    results = results_in(result)
    return (
        f"{comparison(results).markdown()}\n{guide(result)}\n\nMeasured on {results.device} by "
        "`python benchmarks/digits.py`. Latency: median of interleaved readings."
    )


def guide(result: dict[str, Any]) -> str:
    """The verdict of the report, as a list."""
    return "\n".join(f"- {line}" for line in findings(results_in(result)))


if __name__ == "__main__":
    main()
