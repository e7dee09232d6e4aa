"""Which of timm's names (and our T2T ones) can be pruned in what, and their MACs by torch's counter: `timm_names.csv`.

`python -m tests.timm_names` writes it anew, on the meta device, in minutes. A name or a dimension that goes needs a
reason.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from lightning_mdc.errors import UnsupportedModelError
from lightning_mdc.models import find_anatomy
from tests.kinds import counted_macs

FILE = Path(__file__).with_suffix(".csv")


def create(name: str, **kwargs: Any) -> nn.Module:
    """timm's model on the meta device."""
    with torch.device("meta"):
        return timm.create_model(name, **kwargs).eval()


def read() -> dict[str, dict[str, str]]:
    """By name: dimensions, separated by spaces, and MACs."""
    with FILE.open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def main() -> None:
    rows = []
    for name in timm.list_models(exclude_filters="mdc_model"):  # what that makes is in the folder it is given
        model = create(name)
        try:
            anatomy = find_anatomy(model)
        except UnsupportedModelError:
            continue
        rows.append((name, " ".join(anatomy.dimensions), counted_macs(model, *anatomy.input_size[1:])))
    with FILE.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("name", "dimensions", "macs"), *rows])


if __name__ == "__main__":
    main()
