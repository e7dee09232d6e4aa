"""``mdc``, which is also ``python -m lightning_mdc``: a run, its report, and the export of a model it left.

What a command needs is imported when it is given, so that the help is there at once.
"""

from __future__ import annotations

import argparse
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from lightning_mdc.errors import MdcError


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["train"]:
        from lightning_mdc.app.main import main as train

        sys.argv[1:] = words
        train("train")  # by Hydra, which has a help of its own
        return 0
    given = _parser().parse_args(words)
    try:
        path = _report(given.runs, given.output) if given.command == "report" else _export(given.model, given.output)
    except (MdcError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(path)
    if given.command == "report" and given.open:
        webbrowser.open(path.absolute().as_uri())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mdc", description="Makes vision transformers smaller and faster.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="train a model, make it smaller, and report; mdc train --help", add_help=False)
    report = commands.add_parser(
        "report",
        help="make the report of a run again, or compare several runs",
        description=(
            "Make report.html, report.md and the pictures of a run again, from what lies in its folder; of a run that "
            "was interrupted they show how far it came. Several folders: one page that compares them."
        ),
        epilog="example: mdc report runs/digits/2026-01-31_12-00-00",
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folder that mdc train made")
    report.add_argument(
        "-o", "--output", type=Path, help="the page that compares several runs (default: comparison.html, here)"
    )
    report.add_argument("--open", action="store_true", help="show the page in the browser")
    export = commands.add_parser(
        "export",
        help="write a saved model as one file that runs without this package",
        description=(
            "Write a model that mdc train or mdc.save left, dense or slim, as an ONNX file or as a program of "
            "torch.export, for any batch size. It is run and compared with the model before it is kept."
        ),
        epilog="example: mdc export runs/digits/2026-01-31_12-00-00/slim slim.onnx",
    )
    export.add_argument("model", type=Path, metavar="DIR", help="folder with model.safetensors and config.json")
    export.add_argument("output", type=Path, metavar="OUT", help="the file: NAME.onnx, or NAME.pt2 for torch.export")
    return parser


def _report(runs: Sequence[Path], output: Path | None) -> Path:
    """Write the page; returns where it is."""
    if len(runs) > 1:
        from lightning_mdc.app.report.write import write_comparison

        path = output or Path("comparison.html")
        print(f"{write_comparison(runs, path).title}")
        return path
    if output is not None:
        raise MdcError(f"--output={output}: a single run's report goes into its folder; leave it out")
    from lightning_mdc.app.report.write import write_report

    print(write_report(runs[0]).verdict)
    return runs[0] / "report.html"


def _export(folder: Path, output: Path) -> Path:
    """Write the program; returns where it is."""
    from lightning_mdc.artifact import load
    from lightning_mdc.export import export_model

    made = export_model(load(folder), output)
    print(f"{made.format}, {made.size / 1e6:.2f} MB, logits within {made.difference:.1g} of the model's")
    return made.path


if __name__ == "__main__":
    sys.exit(main())
