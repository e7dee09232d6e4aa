"""Which of timm's vision transformers can lose what, and do their MACs equal torch's own count?

    .venv/bin/python benchmarks/coverage.py
    .venv/bin/python benchmarks/coverage.py --resume     # goes on where it was stopped
    .venv/bin/python benchmarks/coverage.py --quick      # all names, but MACs of one name per file of timm's only

Every name that timm has of a vision transformer (``MODULES``) is built on the meta device and asked what it can lose.
Where that is anything, the MACs of the dense model, and of a slim one with half of everything that it can lose, are
held against ``FlopCounterMode``. Leaves ``benchmarks/results/coverage.json``, ``.csv`` (every name with its cause) and
tables in README, ``docs/models.md`` and ``docs/benchmarks.md``.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from pages import folder_of, write_pages
from targets import Target, verdicts
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

import lightning_mdc as mdc
from lightning_mdc.budget.measuring import first_units
from lightning_mdc.errors import UnsupportedModelError
from lightning_mdc.files import write_json
from lightning_mdc.models import find_anatomy
from lightning_mdc.policy import DIMENSIONS

# Files of timm (and ours, t2t_vit) that hold transformers for images, hybrids with convolutions among them. By file, as
# names tell less: mambaout and resnest are no transformers, fastvit is one in part. Left out are attention hybrids in
# files of convolutional networks: iformer, lowformer, cpubone, csatv2, byoanet's botnets, mobilenetv4_hybrid.
MODULES = (
    *("vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam"),
    *("deit", "t2t_vit", "vitamin", "eva", "beit", "naflexvit", "pit", "qwen3_vit", "deepseek_vit", "gemma4_vit"),
    *("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "hiera", "hieradet_sam2", "mvitv2"),
    *("cait", "volo", "xcit", "crossvit", "convit", "tnt", "davit", "pvt_v2", "nest", "twins"),
    *("maxxvit", "levit", "fastvit", "efficientvit_mit", "efficientvit_msra", "mobilevit", "repvit", "coat"),
    *("efficientformer", "efficientformer_v2", "edgenext", "tiny_vit", "gcvit", "swiftformer", "shvit", "nextvit"),
    "visformer",
)
ALONE = ("caformer*",)  # of metaformer.py, whose other models have no attention
OUTCOMES = {
    ("heads", "neurons", "tokens"): "heads, neurons and tokens",
    ("heads", "neurons"): "heads and neurons",
    ("heads", "tokens"): "heads and tokens",
    ("neurons", "tokens"): "neurons and tokens",
    ("heads",): "heads only",
    ("neurons",): "neurons only",
    ("tokens",): "tokens only",
    (): "refused",
}


def names() -> list[tuple[str, str]]:
    """Each name with the file it is of."""
    found = [(name, module) for module in MODULES for name in timm.list_models(module=module)]
    return found + [(name, "metaformer") for pattern in ALONE for name in timm.list_models(pattern)]


# --- one name ---------------------------------------------------------------------------------------------------------


def asked(name: str, module: str, counts: bool) -> dict[str, Any]:
    """What the model of that name can lose, why not all, and whether our MACs are torch's, if it `counts`."""
    begun = time.perf_counter()
    with torch.device("meta"):
        model = timm.create_model(name).eval().requires_grad_(False)
    row: dict[str, Any] = {"name": name, "module": module, "dimensions": [], "cause": "", "exact": None}
    try:
        anatomy = find_anatomy(model)
    except UnsupportedModelError as refusal:
        row["cause"] = cause(str(refusal))
    else:
        row["dimensions"] = list(anatomy.dimensions)
        row["cause"] = "; ".join(dict.fromkeys(map(cause, anatomy.reasons.values())))
        if counts:
            plan = first_units(anatomy, mdc.Policy(**dict.fromkeys(anatomy.dimensions, 0.5)))
            both = (model, mdc.slim(model, plan))
            row["exact"] = [mdc.macs(each) == counted(each, anatomy.input_size) for each in both]
    return {**row, "seconds": time.perf_counter() - begun}


def cause(refusal: str) -> str:
    """A refusal's own words, without what it advises and where timm keeps a class."""
    said = refusal.split(". Dimensions that do work")[0]
    said = re.sub(r"^\w+( holds no supported vision transformer)?: ", "", said)
    return re.sub(r"\btimm\.(models|layers)\.", "", said)


def counted(model: nn.Module, size: tuple[int, int, int]) -> int:
    """MACs of one image by torch's counter, which cannot see into every fused attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *size, device="meta"))
    return int(counter.get_total_flops() // 2)


# --- all of them ------------------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace, kept: Path) -> dict[str, Any]:
    kept.parent.mkdir(parents=True, exist_ok=True)
    if not arguments.resume:
        kept.unlink(missing_ok=True)
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done, counted_of = {row["name"] for row in rows}, {row["module"] for row in rows if row["exact"]}
    bar = tqdm(names(), desc="Coverage", unit="name")
    for name, module in bar:
        bar.set_postfix_str(name)
        if name in done:
            continue
        row = asked(name, module, counts=not arguments.quick or module not in counted_of)
        counted_of |= {module} if row["exact"] else set()
        with kept.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
    return {
        "timm": timm.__version__,
        "torch": torch.__version__,
        "seconds": sum(row["seconds"] for row in rows),
        "rows": rows,
        "targets": [target.facts() for target in targets(rows)],
    }


def losing(rows: Iterable[dict[str, Any]], *dimensions: str) -> int:
    return sum(set(dimensions) <= set(row["dimensions"]) for row in rows)


def targets(rows: Sequence[dict[str, Any]]) -> list[Target]:
    exact = [same for row in rows for same in row["exact"] or ()]
    return [
        Target("names that lose something", sum(bool(row["dimensions"]) for row in rows), ">=", 420),
        Target("names that lose heads and neurons", losing(rows, "heads", "neurons"), ">=", 340),
        Target("names that lose tokens", losing(rows, "tokens"), ">=", 265),
        Target("models, dense and slim, whose MACs are not torch's", len(exact) - sum(exact), "<=", 0),
    ]


# --- what pages show --------------------------------------------------------------------------------------------------


def outcomes(result: dict[str, Any]) -> list[tuple[str, int]]:
    counts = Counter(tuple(row["dimensions"]) for row in result["rows"])
    return [(words, counts[dimensions]) for dimensions, words in OUTCOMES.items() if counts[dimensions]]


def text(result: dict[str, Any]) -> str:
    lines = ["| can lose | names |", "|---|---:|"]
    lines += [f"| {words} | {count} |" for words, count in outcomes(result)]
    lines += [f"| all | {len(result['rows'])} |"]
    counted_of = sum(bool(row["exact"]) for row in result["rows"])
    about = (
        f"Names of timm {result['timm']} (torch {result['torch']}), built on the meta device. MACs of {counted_of} "
        "dense models and as many slim ones were counted. [By file and cause](models.md). It took "
        f"{result['seconds'] / 60:.0f} min. Measured by `python benchmarks/coverage.py`."
    )
    return "\n".join([*lines, "", about, "", verdicts(targets(result["rows"]))])


def headline(result: dict[str, Any]) -> str:
    shares = "; ".join(f"{count} {words}" for words, count in outcomes(result))
    return (
        f"Of {len(result['rows'])} names of vision transformers in timm {result['timm']}: {shares}. "
        "[All by file and cause](docs/models.md)."
    )


def models(result: dict[str, Any]) -> str:
    """By file of timm's: how many names can lose each dimension, and why not, in the words of the refusal."""
    header = f"| file of timm's | names | {' | '.join(DIMENSIONS)} | what stands in the way |"
    lines = [header, "|---|" + "---:|" * (1 + len(DIMENSIONS)) + "---|"]
    for module in dict.fromkeys(row["module"] for row in result["rows"]):
        of = [row for row in result["rows"] if row["module"] == module]
        numbers = " | ".join(str(losing(of, dimension)) for dimension in DIMENSIONS)
        causes = Counter(row["cause"] for row in of if row["cause"])
        words = "; ".join(f"{said} ({count})" if len(of) > 1 else said for said, count in causes.most_common())
        lines.append(f"| {module} | {len(of)} | {numbers} | {words} |")
    return "\n".join(lines)


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    header = ("name", "file", *DIMENSIONS, "MACs as counted", "cause")
    found = [header]
    for row in result["rows"]:
        can = ["yes" if dimension in row["dimensions"] else "no" for dimension in DIMENSIONS]
        exact = "" if row["exact"] is None else "yes" if all(row["exact"]) else "no"
        found.append((row["name"], row["module"], *can, exact, row["cause"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="MACs of one name per file; pages stay as they are")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped; same arguments")
    parser.add_argument("--table-only", action="store_true", help="write from the JSON that is there")
    arguments = parser.parse_args()
    folder = folder_of(arguments.quick)
    kept = folder / "coverage.rows.jsonl"
    if not arguments.table_only:
        write_json(folder / "coverage.json", measure(arguments, kept))
        kept.unlink()
    result = json.loads((folder / "coverage.json").read_text())
    print(text(result), models(result), sep="\n\n")
    if not arguments.quick:
        write_pages("coverage", result)


if __name__ == "__main__":
    main()
