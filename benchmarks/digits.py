"""The README's digits table, measured: runs ``train.py experiment=digits`` and writes what it found into README.md.

    .venv/bin/python benchmarks/digits.py                      # a fresh run, several minutes on two cores
    .venv/bin/python benchmarks/digits.py --run runs/digits/…  # take a finished run

Leaves ``benchmarks/results/digits.json`` (every number) and ``digits.png`` (what each block kept).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from readme import RESULTS, put

from lightning_mdc.app import report as reporting
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
    results = reporting.Results.load(run / "results.json")
    RESULTS.mkdir(exist_ok=True)
    shutil.copy(run / "results.json", RESULTS / "digits.json")
    shutil.copy(run / "pictures" / "kept.png", RESULTS / "digits.png")
    lines = "\n".join(f"- {line}" for line in reporting.findings(results))
    table = reporting.comparison(results).markdown()
    measured = (
        f"Measured on {results.device} by `python benchmarks/digits.py`. Latency: median of interleaved readings."
    )
    put("digits", f"{table}\n{lines}\n\n{measured}")


if __name__ == "__main__":
    main()
