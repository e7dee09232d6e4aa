"""``mdc``, which is also ``python -m lightning_mdc``: a run and its report, a model made smaller in one go, an export.

What a command needs is imported when it is given, so that the help is there at once.
"""

from __future__ import annotations

import argparse
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        given.do(given)
    except (MdcError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
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
    report.set_defaults(do=_report)
    _add_compress(commands)
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
    export.set_defaults(do=_export)
    return parser


def _add_compress(commands: Any) -> None:
    parser = commands.add_parser(
        "compress",
        help="make a model smaller that is trained already",
        description=_COMPRESS,
        epilog=_COMPRESS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("the model")
    add, of_weights = group.add_argument, group.add_mutually_exclusive_group().add_argument
    what = (
        "a name of timm's, or a folder that mdc.save or mdc train wrote, or one in the layout of the Hugging Face hub"
    )
    add("--model", required=True, metavar="NAME|DIR", help=what)
    what = "weights for a NAME: .safetensors, .pth, .ckpt; the head is that of the file"
    of_weights("--checkpoint", metavar="FILE", help=what)
    of_weights("--pretrained", action="store_true", help="timm's own weights for a NAME, which it downloads")
    of_weights("--random-weights", action="store_true", help="none, to try things out: the result is good for nothing")
    add("--num-classes", type=int, metavar="N", help="of the head (default: the weights'); 0: no head, features")
    add("--img-size", type=int, metavar="PIXELS", help="side of the images (default: the model's)")

    add = parser.add_argument_group("the images").add_argument
    what = "folder of training images, or of class folders, or an uncompressed .tar of one; labels are not needed"
    add("--data", required=True, metavar="PATH", help=what)
    add("--images", type=int, metavar="N", help="to score units on (default: 512)")
    add("--judging", type=int, metavar="N", help="others, to judge policies on (default: 512)")
    add("--batch-size", type=int, default=64, metavar="N", help="images at a time (default: %(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="processes that read images (default: %(default)s)")

    add = parser.add_argument_group("how small, and how").add_argument
    what = "of the dense MACs to keep, a fraction, or an absolute number above 1 (default: 0.6)"
    add("--budget", type=float, metavar="X", help=what)
    add("--params", type=float, metavar="X", help="the same of the parameters; all limits hold together")
    what = "the same of the time for an image on this device, which is measured: 0.6, 1.8ms, 250us"
    add("--latency", type=_limit, metavar="X", help=what)
    what = "searched; uniform, the same share everywhere, there at once; or a policy.json (default: %(default)s)"
    add("--policy", default="searched", metavar="WHICH", help=what)
    add("--criterion", default="fisher", metavar="NAME", help="what ranks units (default: %(default)s)")
    add("--trials", type=int, metavar="N", help="policies to try (default: 40)")
    what = "how what stays is refitted by least squares (default: sequential)"
    add("--compensate", choices=("sequential", "lstsq", "none"), help=what)
    what = "epochs in which each block learns from the dense one's on the same images (default: 0)"
    add("--heal", type=int, default=0, metavar="N", help=what)
    what = "what may leave, of heads,neurons,tokens (default: all; heads,neurons for features)"
    add("--dimensions", metavar="LIST", help=what)
    add("--restore", action="store_true", help="give every image position a token again at the end, for dense outputs")

    add = parser.add_argument_group("where").add_argument
    add("--out", required=True, metavar="DIR", help="new or empty, or where this command was killed")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: a GPU if there is one)")
    add("--seed", type=int, default=0, metavar="N", help="of the sample and the search (default: %(default)s)")
    parser.set_defaults(do=_compress)


_COMPRESS = """\
Make a trained vision transformer physically smaller, under a budget.

It scores heads, neurons and tokens on images, searches how much each block gives up, judging each policy by how close
the output stays to the dense model's, and refits what stays. No labels; no training, but for --heal. The same command
goes on after it was killed. --out is left with the slim model (for mdc.load), plan.json, policy.json, search.jsonl and
pictures."""
_COMPRESS_EXAMPLES = """\
examples:
  mdc compress --model vit_small_patch16_224 --checkpoint mine.ckpt --data photos --out smaller
  mdc compress --model deit_small_patch16_224 --pretrained --data imagenet/train --budget 0.5 --out half
  mdc compress --model runs/digits/2026-01-31_12-00-00/dense --data photos.tar --latency 1.8ms --out fast"""


def _limit(text: str) -> float | str:
    """A number, or a time with its unit."""
    try:
        return float(text)
    except ValueError:
        return text


def _compress(given: argparse.Namespace) -> None:
    from lightning_mdc.app.compress import run

    run(given)


def _report(given: argparse.Namespace) -> None:
    """Write the page, and say where it is."""
    if len(given.runs) > 1:
        from lightning_mdc.app.report.write import write_comparison

        path = given.output or Path("comparison.html")
        print(f"{write_comparison(given.runs, path).title}")
    elif given.output is not None:
        raise MdcError(f"--output={given.output}: a single run's report goes into its folder; leave it out")
    else:
        from lightning_mdc.app.report.write import write_report

        path = given.runs[0] / "report.html"
        print(write_report(given.runs[0]).verdict)
    print(path)
    if given.open:
        webbrowser.open(path.absolute().as_uri())


def _export(given: argparse.Namespace) -> None:
    """Write the program, and say where it is."""
    from lightning_mdc.artifact import load
    from lightning_mdc.export import export_model

    made = export_model(load(given.model), given.output)
    print(f"{made.format}, {made.size / 1e6:.2f} MB, logits within {made.difference:.1g} of the model's")
    print(made.path)


if __name__ == "__main__":
    sys.exit(main())
