"""First and second moments of what layers read from units: what `fisher`, `conditional` and least squares rest on.

One pass over the images serves both, and all plans. Everything is summed about its mean: about 0, channels with a mean
far from it would lose their variance to rounding (in fp32 40 % of it, at a mean of 1000 and a standard deviation of
0.5).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_mdc.distributed import summed
from lightning_mdc.errors import CalibrationError, CompensationError
from lightning_mdc.files import replacing
from lightning_mdc.models import Anatomy, Units
from lightning_mdc.policy import UNIT_DIMENSIONS, ByDimension

_PARTS = ("rows", "mean", "scatter")
_FORMAT = "lightning_mdc.moments.1"
# Patch tokens of an image that moments are of where nobody says another number. On 512 images it is 8 rows for each of
# the 3072 channels of DeiT-B.
MOMENT_TOKENS = 49
# Rows that are added up at once. It bounds the centred copy: 50 MB for 3072 channels.
_ROWS_AT_ONCE = 2**12
# Columns of a panel. Of a symmetric matrix only panels from the diagonal on are computed: 58 % of 1536 channels.
_PANEL = 256


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """First and second moments over rows z (a token of an image each) of the channels that one layer reads.

    Attributes:
        rows: how many; int64 (), on the CPU.
        mean: of z; (channels,), fp32 or wider.
        scatter: sum of ``(z - mean)(z - mean)ᵀ``, the centred Gram matrix; (channels, channels), fp32 or wider.
    """

    rows: Tensor
    mean: Tensor
    scatter: Tensor

    def covariance(self) -> Tensor:
        """(channels, channels) float64."""
        return self.scatter.double() / int(self.rows)

    def second(self, some: Tensor, others: Tensor, *, centred: bool) -> Tensor:
        """Covariance (or, not centred, mean product) of channels with channels: (n, m) float64."""
        covariance = self.scatter.index_select(0, some).index_select(1, others).double() / int(self.rows)
        return covariance if centred else covariance + torch.outer(self.mean[some].double(), self.mean[others].double())

    def variances(self, *, centred: bool) -> Tensor:
        """Variance (or, not centred, mean square) of each channel: (channels,) float64."""
        variances = self.scatter.diagonal().double() / int(self.rows)
        return variances if centred else variances + self.mean.double().square()

    def to(self, device: torch.device | str) -> LayerMoments:
        """The same on a device."""
        return LayerMoments(self.rows, self.mean.to(device), self.scatter.to(device))


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of one model, on the CPU.

    Memory and file take 4 bytes x channels² per layer, however many images there are: for DeiT-B 453 MB for the
    neurons of all blocks and 28 MB for the heads, for DeiT-S a quarter.

    Attributes:
        layers: by dimension, those of each block's `reader`; None where a block has no such units, empty if they were
            not looked at.
        images: how many images they rest on.
    """

    layers: Mapping[str, tuple[LayerMoments | None, ...]]
    images: int

    def of(self, units: Units) -> LayerMoments | None:
        """Those of what reads these units; None if they were not looked at."""
        layers = self.layers[units.dimension]
        return layers[units.block] if units.block < len(layers) else None

    def check_fit(self, anatomy: Anatomy) -> None:
        """Refuse, with a `CompensationError`, a model of other sizes."""
        for dimension, layers in self.layers.items():
            expected = [None if units is None else units.count * units.width for units in anatomy.units(dimension)]
            given = [None if layer is None else len(layer.mean) for layer in layers]
            if given and given != expected:
                raise CompensationError(
                    f"moments are of another model: its layers read {given} channels of {dimension}, those of "
                    f"{anatomy.name} {expected}; gather them from this model"
                )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, e.g. ``neurons.3.scatter``."""
        return {
            f"{dimension}.{block}.{part}": getattr(layer, part)
            for dimension, layers in self.layers.items()
            for block, layer in enumerate(layers)
            if layer is not None
            for part in _PARTS
        }

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, so that it is there whole or not at all."""
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        blocks = {dimension: len(layers) for dimension, layers in self.layers.items()}
        facts = {"format": _FORMAT, "images": str(self.images), "blocks": json.dumps(blocks)}
        with replacing(Path(path)) as beside:
            save_file(tensors, beside, metadata=facts)

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Read what `save` wrote.

        Raises:
            CompensationError: the file is missing, damaged, or holds no moments.
        """
        try:
            tensors, facts = tensors_and_facts(path)
            if facts.get("format") == _FORMAT:
                layers = {
                    dimension: tuple(_layer(tensors, f"{dimension}.{block}") for block in range(count))
                    for dimension, count in json.loads(facts["blocks"]).items()
                }
                return cls(ByDimension({name: layers[name] for name in UNIT_DIMENSIONS}), int(facts["images"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CompensationError(f"moments={str(path)!r} cannot be read: {error}; gather them again") from error
        raise CompensationError(
            f"moments={str(path)!r} have format {facts.get('format')!r}, expected {_FORMAT!r}: no moments of ours; "
            "gather them again"
        )


def tensors_and_facts(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What is in a safetensors file.

    Raises:
        SafetensorError, OSError: it is none, or cannot be read.
    """
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no mapping)


def _layer(tensors: Mapping[str, Tensor], name: str) -> LayerMoments | None:
    if f"{name}.rows" not in tensors:
        return None
    return LayerMoments(*(tensors[f"{name}.{part}"] for part in _PARTS))


# --- gathering --------------------------------------------------------------------------------------------------------


class MomentSums:
    """Moments while they are gathered.

    Args:
        anatomy: of the model.
        dimensions: whose units are looked at.
        tokens: how many patch tokens of an image are looked at: so many of each, drawn by a fixed seed; None: all.
            Prefix tokens always are.
    """

    def __init__(self, anatomy: Anatomy, dimensions: tuple[str, ...], tokens: int | None = None) -> None:
        self.dimensions, self.tokens = dimensions, tokens
        self._prefix = anatomy.num_prefix_tokens
        self._blocks = {name: len(anatomy.units(name)) for name in UNIT_DIMENSIONS}
        self._sums = {
            (units.dimension, units.block): MomentSum(units.reader.weight.shape[1], units.reader.weight)
            for units in anatomy.all_units
            if units.dimension in dimensions
        }
        self._draw = torch.Generator().manual_seed(0)

    def add(self, units: Units, x: Tensor) -> None:
        """Count in what a reader is given: (..., tokens, channels)."""
        self._sums[units.dimension, units.block].add(drawn_rows(x, self._prefix, self.tokens, self._draw))

    def sum_over_ranks(self) -> None:
        """From here on they are of what all ranks have seen; one that saw nothing adds nothing."""
        for own in self._sums.values():
            own.sum_over_ranks()

    def of(self, units: Units) -> LayerMoments:
        """The moments so far, where the model is.

        Raises:
            CalibrationError: activations that are no numbers.
        """
        moments = self._sums[units.dimension, units.block].moments()
        if not (moments.mean.isfinite().all() and moments.scatter.isfinite().all()):
            raise CalibrationError(
                f"activations of the {units.dimension} of block {units.block} are not finite on the calibration "
                "images; check the model's weights and the images' range"
            )
        return moments

    def moments(self, images: int) -> Moments:
        """All of them, on the CPU."""
        layers = {
            name: tuple(
                self._sums[name, block].moments().to("cpu") if (name, block) in self._sums else None
                for block in range(self._blocks[name] if name in self.dimensions else 0)
            )
            for name in UNIT_DIMENSIONS
        }
        return Moments(ByDimension(layers), images)


def drawn_rows(x: Tensor, prefix: int, tokens: int | None, draw: torch.Generator) -> Tensor:
    """Rows of x (..., tokens, channels) that moments are of, (rows, channels): of each image the `prefix` tokens, and
    so many of the others; None: all."""
    rows, patches = x.flatten(0, -2), x.shape[-2] - prefix
    if tokens is None or patches <= tokens:
        return rows
    images = len(rows) // x.shape[-2]
    drawn = torch.rand(images, patches, generator=draw).topk(tokens).indices + prefix
    drawn = torch.cat([torch.arange(prefix).expand(images, -1), drawn], dim=1)
    starts = x.shape[-2] * torch.arange(images)[:, None]
    return rows.index_select(0, (starts + drawn).flatten().to(rows.device))


class MomentSum:
    """Moments of rows of so many channels, summed in the precision of `like` or fp32, where it is.

    Of `scatter` only the part from the panels on the diagonal to the right is kept up.
    """

    def __init__(self, channels: int, like: Tensor) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.rows = torch.zeros((), dtype=torch.int64)
        self.mean = torch.zeros(channels, dtype=dtype, device=like.device)
        self.scatter = torch.zeros(channels, channels, dtype=dtype, device=like.device)

    def add(self, z: Tensor) -> None:
        for part in z.split(_ROWS_AT_ONCE):
            part = part.to(self.mean)
            mean = part.mean(dim=0)
            part = part - mean
            for panel in range(0, len(mean), _PANEL):
                of_panel = part[:, panel : panel + _PANEL]
                self.scatter[panel : panel + _PANEL, panel:].addmm_(of_panel.T, part[:, panel:])
            # Two groups of rows, each about its own mean, are one about the mean of all (Chan et al. 1979).
            before, share = int(self.rows), len(part) / (int(self.rows) + len(part))
            apart = mean - self.mean
            self.scatter.addr_(apart, apart, alpha=before * share)
            self.mean.add_(apart, alpha=share)
            self.rows += len(part)

    def sum_over_ranks(self) -> None:
        own, rows = int(self.rows), summed(self.rows)
        mean = summed(self.mean * (own / max(int(rows), 1)))
        apart = self.mean - mean
        self.scatter = summed(self.scatter.addr_(apart, apart, alpha=own))
        self.rows, self.mean = rows, mean

    def moments(self) -> LayerMoments:
        self.scatter.triu_().add_(self.scatter.triu(1).T)
        return LayerMoments(self.rows, self.mean, self.scatter)
