"""A model as a program that runs without this package, without timm, or without torch: `torch.export` and ONNX."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mdc.budget import InputSize, image_size, num_params
from lightning_mdc.errors import ArtifactError, MdcError
from lightning_mdc.files import replacing
from lightning_mdc.models import check_unmasked, find_whole, prediction_in
from lightning_mdc.models.swapping import plain_copy
from lightning_mdc.progress import bar

# By the suffix a file of each format has.
FORMATS = {".onnx": "onnx", ".pt2": "torch_export"}
INPUT, OUTPUT = "images", "logits"

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# What a protobuf file holds.
_MOST_ONNX_BYTES = 2**31
# Images of the two batches: one to trace with, another size to compare on. Not 1, which tracing takes for a constant.
_TRACED, _COMPARED = 2, 3
# Of the largest logit. Rounding is far below, even where it makes another of two equally good tokens stay.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Exported:
    """A program that was written.

    Attributes:
        path: the file.
        format: ``"onnx"`` or ``"torch_export"``.
        size: of the file, in bytes.
        difference: largest absolute difference of its logits from the model's on random images.
    """

    path: Path
    format: str
    size: int
    difference: float


def export_model(
    model: nn.Module,
    path: str | Path,
    format: str | None = None,
    *,
    input_size: InputSize | None = None,
    submodule: str | None = None,
    progress: bool = True,
) -> Exported:
    """Write `model` (dense or slim) as one file that runs without this package.

    Its input ``images`` is (batch, channels, height, width) in fp32 with any batch, its output, one tensor, ``logits``;
    it computes what the model does in eval mode, token stages included. Weights of another precision are written as
    fp32. Before the file is put in its place, it is run and compared with the model.

    Args:
        model: a supported model, or a module that holds one, which is exported whole; left as it is.
        path: where to; a file that is there is replaced.
        format: ``"onnx"``, for ONNX Runtime and others, needs the packages of the extra ``export``;
            ``"torch_export"``, for ``torch.export.load(path).module()``, where there is only torch. None: by the
            path's suffix, ``.onnx`` or ``.pt2``.
        input_size: a side, (height, width) or (channels, height, width) in pixels; None means the model's own.
        submodule: of the vision transformer in `model`, as an attribute path: it is exported alone.
        progress: show a bar (on a terminal).

    Raises:
        ArtifactError: an unknown format, packages that are missing, a model that cannot be expressed, or a place that
            cannot be written.
        UnsupportedModelError: there is no supported vision transformer in `model`, or there are several.
    """
    if not isinstance(path, (str, PathLike)):
        raise ArtifactError(f"path is a {type(path).__name__}: expected where to write the file, after the model")
    target = Path(path)
    format = _format(target, format)
    path_inside, whole, anatomy = find_whole(model, submodule)
    check_unmasked(anatomy.model, ArtifactError, "they are no part of a program", "export mdc.slim(model, plan)")
    size = image_size(input_size) or anatomy.input_size[1:]
    anatomy.grid_of(size)  # says if the model cannot take it
    if format == "onnx":
        _check_onnx(whole)
    network = _Answer(plain_copy(whole).to("cpu", torch.float32)).eval()
    network.requires_grad_(False)
    shape = (anatomy.input_size[0], *size)
    write, run = _FUNCTIONS[format]
    with bar("Exporting", 2, shown=progress) as advance:
        try:
            _check_output(network, shape)
            with replacing(target) as beside:
                write(network, torch.zeros(_TRACED, *shape), beside)
                advance("comparing")
                difference = _difference(network, run, beside, shape)
            advance()
        except OSError as error:
            raise ArtifactError(f"path={str(path)!r} cannot be written: {error}; give another place") from error
        except MdcError:
            raise
        except Exception as error:  # whatever exporters and runtimes raise
            alone = f"; submodule={path_inside!r} exports its vision transformer alone"
            raise ArtifactError(
                f"{type(whole).__name__} cannot be exported as format={format!r}: {type(error).__name__}: {error}"
                f"{'' if whole is anatomy.model else alone}"
            ) from error
    return Exported(target, format, target.stat().st_size, difference)


class _Answer(nn.Module):
    """A network of which only the prediction is asked."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        return prediction_in(self.network(images))


def _format(path: Path, format: str | None) -> str:
    if path.is_dir():
        raise ArtifactError(f"path={str(path)!r} is a folder; give the name of a file, such as {path / 'model.onnx'}")
    if format is None:
        format = FORMATS.get(path.suffix)
        if format is None:
            raise ArtifactError(
                f"path={str(path)!r} does not end like one of the formats, {', '.join(FORMATS)}; name it so, or say "
                "format='onnx' or 'torch_export'"
            )
    if format not in FORMATS.values():
        raise ArtifactError(f"format={format!r}: expected one of {', '.join(map(repr, FORMATS.values()))}")
    return format


def _check_onnx(model: nn.Module) -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ArtifactError(
            f"format='onnx' needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            f"pip install {' '.join(missing)}, or use format='torch_export'"
        )
    size = 4 * num_params(model)
    if size >= _MOST_ONNX_BYTES:
        raise ArtifactError(
            f"format='onnx': weights of {size / 1e9:.1f} GB do not fit into one ONNX file (2.1 GB); use "
            "format='torch_export'"
        )


def _check_output(network: _Answer, shape: tuple[int, ...]) -> None:
    with torch.no_grad():
        output = network(torch.zeros(_TRACED, *shape))
    if not isinstance(output, Tensor):
        raise ArtifactError(
            f"{type(network.network).__name__} puts out a {type(output).__name__}, where a program has one tensor; "
            "wrap it in a module that returns the one you want"
        )


def _difference(network: nn.Module, run: Callable[[Path, Tensor], Tensor], path: Path, shape: tuple[int, ...]) -> float:
    """How far the program is from the network; an `ArtifactError` if it computes something else."""
    images = torch.randn(_COMPARED, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = network(images)
    exported = run(path, images)
    difference = float((exported - logits).abs().max()) if exported.shape == logits.shape else float("nan")
    if not difference <= _TOLERANCE * float(logits.abs().max()) + 1e-6:
        raise ArtifactError(
            f"the exported program puts out {tuple(exported.shape)} that differ from the model's {tuple(logits.shape)} "
            f"by {difference:.3g}, so it was not kept; use the other format, or another release of torch"
        )
    return difference


# --- torch.export -----------------------------------------------------------------------------------------------------


def _program(network: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


def _write_program(network: nn.Module, images: Tensor, path: Path) -> None:
    # By an open file: torch would look at the name's ending.
    with path.open("wb") as file:
        torch.export.save(_program(network, images), file)


def _run_program(path: Path, images: Tensor) -> Tensor:
    with path.open("rb") as file, torch.no_grad():
        return torch.export.load(file).module()(images)


# --- ONNX -------------------------------------------------------------------------------------------------------------


def _attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, scale: float | None = None) -> Any:
    """``aten.scaled_dot_product_attention`` in ONNX, of any number of dimensions; torch's translation knows only 4."""
    from onnx import TensorProto
    from onnxscript import opset18

    op: Any = opset18
    width, rank = query.shape[-1], len(query.shape)
    factor = scale or max(width, 1) ** -0.5
    turned = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    logits = op.MatMul(op.Mul(query, op.Constant(value_float=factor)), turned)
    if attn_mask is not None and attn_mask.dtype == TensorProto.BOOL:  # where to look
        logits = op.Where(attn_mask, logits, op.Constant(value_float=float("-inf")))
    elif attn_mask is not None:
        logits = op.Add(logits, attn_mask)
    return op.MatMul(op.Softmax(logits, axis=-1), value)


def _write_onnx(network: nn.Module, images: Tensor, path: Path) -> None:
    # What the exporter says of its progress, and of its own deprecations, is nothing that a user could act on.
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        written = torch.onnx.export(
            _program(network, images),
            input_names=[INPUT],
            output_names=[OUTPUT],
            custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: _attention},
            dynamo=True,
        )
    assert written is not None  # without a file name the program is handed out
    written.save(path, external_data=False)


def _run_onnx(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


_FUNCTIONS: dict[str, tuple[Callable[[nn.Module, Tensor, Path], None], Callable[[Path, Tensor], Tensor]]] = {
    "onnx": (_write_onnx, _run_onnx),
    "torch_export": (_write_program, _run_program),
}
