"""What removed units did, given to those that stay: the layer that reads them is refitted, at no cost at run time.

A block's `proj` or `fc2` computes ``W z + b`` from its units' channels z. Without the removed ones (D) it is left with
``W_K z_K + b``. ``compensate="lstsq"`` gives it new weights ``W_K + U`` and a new bias, with the least squared error to
what the dense layer puts out: ``U = W_D S_DK (S_KK + r I)^-1``, where S is the covariance of z and the ridge r is a
small share of its mean diagonal. The ridge pulls to W_K, not to 0: if nothing is removed nothing changes, and the error
is never larger than without compensation.

Of z it needs only the first and second moments, so one pass of the calibration images serves all plans. These are
moments in the dense model: that z changes when earlier blocks lose units is not accounted for. A layer without bias
gets none; its weights alone are refitted (S uncentred).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_mdc.distributed import on_every_rank, summed
from lightning_mdc.errors import CompensationError, UnsupportedModelError, check_one_of
from lightning_mdc.files import replacing
from lightning_mdc.importance.ridge import RIDGE, ridge_cholesky
from lightning_mdc.importance.scoring import full_precision, on_device_of, split_batch
from lightning_mdc.models import Sites, UnitSite, check_unmasked, evaluating, find_sites, probing, unit_channels
from lightning_mdc.progress import bar
from lightning_mdc.randomness import isolated_rng

COMPENSATIONS = ("none", "lstsq")

_DIMENSIONS = ("heads", "neurons")
_PARTS = ("rows", "mean", "scatter")
_FORMAT = "lightning_mdc.statistics.1"
# Rows that are added up at once. It bounds the centred copy: 50 MB for 3072 neurons.
_ROWS_AT_ONCE = 2**12


# --- the maths --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments over rows z (a token of an image each) of the channels that one layer reads.

    Attributes:
        rows: how many; int64 (), on the CPU.
        mean: of z; (channels,), fp32 or wider.
        scatter: sum of ``(z - mean)(z - mean)ᵀ``, the centred Gram matrix; (channels, channels), fp32 or wider. Summed
            about 0 instead, channels with a mean far from it would lose their variance to rounding.
    """

    rows: Tensor
    mean: Tensor
    scatter: Tensor

    def second(self, some: Tensor, others: Tensor, *, centred: bool) -> Tensor:
        """Covariance (or, not centred, mean product) of channels with channels: (n, m) float64."""
        covariance = self.scatter.index_select(0, some).index_select(1, others).double() / int(self.rows)
        return covariance if centred else covariance + torch.outer(self.mean[some].double(), self.mean[others].double())

    def to(self, device: torch.device | str) -> Moments:
        """The same on a device."""
        return Moments(self.rows, self.mean.to(device), self.scatter.to(device))

    def scale(self, *, centred: bool) -> Tensor:
        """Mean variance (or, not centred, mean square) of a channel: () float64."""
        variance = self.scatter.diagonal().double() / int(self.rows)
        return (variance if centred else variance + self.mean.double().square()).mean()


def refitted(
    weight: Tensor, bias: Tensor | None, moments: Moments, kept: Tensor, ridge: float = RIDGE
) -> tuple[Tensor, Tensor | None]:
    """Weight (out, kept) and bias (out,) of a layer that reads the `kept` channels only, float64.

    Args:
        weight: of the dense layer, (out, channels).
        bias: (out,), or None: there is none then either.
        moments: of what the dense layer reads, on the device of `weight`.
        kept: sorted channel numbers, (kept,) int64.
        ridge: as a share of the channels' mean variance, above 0.
    """
    is_removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    is_removed[kept] = False
    removed = is_removed.nonzero()[:, 0]
    weight = weight.detach().double()
    new_weight, lost = weight[:, kept], weight[:, removed]
    new_bias = None if bias is None else bias.detach().double() + lost @ moments.mean[removed].double()
    centred = bias is not None
    scale = moments.scale(centred=centred)
    if not len(kept) or scale <= 0:  # nobody left to take over, or nothing that varies
        return new_weight, new_bias
    shared = moments.second(kept, removed, centred=centred) @ lost.T  # (kept, out)
    factor = ridge_cholesky(moments.second(kept, kept, centred=centred), float(ridge * scale))
    update = torch.cholesky_solve(shared, factor).T
    if new_bias is not None:
        new_bias = new_bias - update @ moments.mean[kept].double()
    return new_weight + update, new_bias


# --- a model's statistics ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ActivationStatistics:
    """What compensation has to know of a model: moments of the channels its `proj` and `fc2` layers read. On the CPU.

    One pass over the images serves all plans. Memory and file take 4 bytes x channels² per layer, however many images
    there are: for DeiT-B 453 MB for the 12 `fc2` (3072 neurons) and 28 MB for the 12 `proj`, for DeiT-S a quarter.

    Attributes:
        heads: per block; None where a norm over the units makes them useless, empty if heads cannot be cut.
        neurons: the same.
        images: how many images they rest on.
    """

    heads: tuple[Moments | None, ...]
    neurons: tuple[Moments | None, ...]
    images: int

    @classmethod
    def of(
        cls, model: nn.Module, batches: Iterable[Any], *, progress: bool = True, over_ranks: bool = False
    ) -> ActivationStatistics:
        """Gather them over the batches, ``(images, labels)`` or ``images``; labels are not looked at.

        Args:
            model: a supported model or a module that holds one; called as ``model(images)`` in eval mode and left
                exactly as it was, on whatever device it is. The model that is to be cut, with its present weights.
            batches: of any size; training images, as for scoring. Read once.
            progress: show a bar (on a terminal).
            over_ranks: in a distributed run, every rank gives its own share of the batches, or none; the statistics
                are of all of them and the same on all ranks, which all have to call this.

        Raises:
            CompensationError: no batches, activations that are no numbers, or a model with masks on.
            CalibrationError: a batch is something else.
            UnsupportedModelError: there is no supported vision transformer in `model`, or there are several.
        """
        sites = find_sites(model)
        check_unmasked(sites.model, CompensationError, "its removed units are 0 already", "gather before masking")
        places = {(name, index): site for name in _DIMENSIONS for index, site in enumerate(sites.units(name))}
        sums = {place: _zeros(site) for place, site in places.items() if site.norm is None}
        probes = [(places[place].consumer.register_forward_pre_hook, partial(_add, own)) for place, own in sums.items()]
        count = torch.zeros((), dtype=torch.int64)

        def observe() -> None:
            shown = bar("Gathering", length_hint(batches), shown=progress)
            with isolated_rng(), evaluating(model), torch.no_grad(), probing(probes), shown as advance:
                for images, _ in map(split_batch, batches):
                    model(on_device_of(sites, images))
                    count.add_(len(images))
                    advance()

        on_every_rank(observe) if over_ranks else observe()  # before ranks exchange sums, all know who failed
        if over_ranks:
            sums = {key: _over_ranks(moments) for key, moments in sums.items()}
            count = summed(count)
        if not count:
            raise CompensationError("batches are empty: compensation rests on calibration images; give some")
        for (dimension, index), moments in sums.items():
            if not (moments.mean.isfinite().all() and moments.scatter.isfinite().all()):
                raise CompensationError(
                    f"activations of the {dimension} of block {index} are not finite on the calibration images; check "
                    "the weights and the images' range"
                )
        lists: dict[str, list[Moments | None]] = {name: [] for name in _DIMENSIONS}
        for place in places:
            lists[place[0]].append(sums[place].to("cpu") if place in sums else None)
        return cls(tuple(lists["heads"]), tuple(lists["neurons"]), int(count))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, e.g. ``neurons.3.scatter``."""
        return {
            f"{name}.{index}.{part}": getattr(moments, part)
            for name in _DIMENSIONS
            for index, moments in enumerate(getattr(self, name))
            if moments is not None
            for part in _PARTS
        }

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, so that it is there whole or not at all."""
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        blocks = {name: len(getattr(self, name)) for name in _DIMENSIONS}
        facts = {"format": _FORMAT, "images": str(self.images), "blocks": json.dumps(blocks)}
        with replacing(Path(path)) as beside:
            save_file(tensors, beside, metadata=facts)

    @classmethod
    def load(cls, path: str | Path) -> ActivationStatistics:
        """Read what `save` wrote.

        Raises:
            CompensationError: the file is missing, damaged, or holds no statistics.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            if facts.get("format") == _FORMAT:
                lists = {
                    name: tuple(
                        Moments(*(tensors[f"{name}.{index}.{part}"] for part in _PARTS))
                        if f"{name}.{index}.rows" in tensors
                        else None
                        for index in range(count)
                    )
                    for name, count in json.loads(facts["blocks"]).items()
                }
                return cls(**lists, images=int(facts["images"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CompensationError(f"statistics={str(path)!r} cannot be read: {error}; gather them again") from error
        raise CompensationError(
            f"statistics={str(path)!r} have format {facts.get('format')!r}, expected {_FORMAT!r}: no statistics of "
            "ours; gather them again"
        )


def _zeros(site: UnitSite) -> Moments:
    weight, width = site.consumer.weight, site.consumer.in_features
    kind: dict[str, Any] = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
    rows = torch.zeros((), dtype=torch.int64, device="cpu")
    return Moments(rows, torch.zeros(width, **kind), torch.zeros((width, width), **kind))


def _add(sums: Moments, module: nn.Module, args: tuple[Tensor]) -> None:
    z = args[0].flatten(0, -2)  # (images * tokens, channels)
    with torch.autocast(z.device.type, enabled=False), full_precision():
        for part in z.split(_ROWS_AT_ONCE):
            part = part.to(sums.scatter.dtype)
            mean = part.mean(dim=0)
            part = part - mean
            sums.scatter.addmm_(part.T, part)
            # Two groups of rows, each about its own mean, are one about the mean of all (Chan et al. 1979).
            before, share = int(sums.rows), len(part) / (int(sums.rows) + len(part))
            apart = mean - sums.mean
            sums.scatter.addr_(apart, apart, alpha=before * share)
            sums.mean.add_(apart, alpha=share)
            sums.rows.add_(len(part))


def _over_ranks(own: Moments) -> Moments:
    """The moments of the rows of all ranks; one that saw none adds nothing."""
    rows = summed(own.rows)
    mean = summed(own.mean * int(own.rows)) / max(int(rows), 1)
    apart = own.mean - mean
    return Moments(rows, mean, summed(torch.addr(own.scatter, apart, apart, alpha=int(own.rows))))


# --- in a model -------------------------------------------------------------------------------------------------------


def check_compensation(sites: Sites, compensate: str, statistics: ActivationStatistics | None) -> None:
    """Refuse, with a `CompensationError`, an unknown way, and statistics that are missing or of another model."""
    check_one_of("compensate", compensate, COMPENSATIONS, CompensationError)
    if compensate == "none":
        if statistics is not None:
            raise CompensationError(
                "statistics are given, but compensate='none' does not use them; pass compensate='lstsq', or leave "
                "them out"
            )
        return
    if not isinstance(statistics, ActivationStatistics):
        raise CompensationError(
            f"statistics={statistics!r:.80}: compensate={compensate!r} needs those of the dense model; pass "
            "statistics=ActivationStatistics.of(model, batches)"
        )
    for name in _DIMENSIONS:
        expected = [None if site.norm is not None else site.consumer.in_features for site in sites.units(name)]
        given = [None if moments is None else len(moments.mean) for moments in getattr(statistics, name)]
        if given != expected:
            raise CompensationError(
                f"statistics are of another model: its layers read {given} channels of {name}, those of {sites.name} "
                f"{expected}; gather them from this model"
            )


def check_compensable(site: UnitSite, compensate: str) -> None:
    """Refuse, with an `UnsupportedModelError`, to give back what units did where a norm is taken over them."""
    if compensate != "none" and site.norm is not None:
        raise UnsupportedModelError(
            f"compensate={compensate!r}: {site.name}.norm ({type(site.norm).__name__}) is taken over the units, so "
            "those that stay change when others leave, and statistics of the dense model do not hold; use "
            "compensate='none', or do not prune these units"
        )


def refit_consumer(site: UnitSite, kept: tuple[int, ...], moments: Moments | None) -> None:
    """Refit the layer that reads one block's heads or neurons, in place, for the removal of all but the `kept` ones."""
    if len(kept) == site.num_units:
        return
    check_compensable(site, "lstsq")
    assert moments is not None  # check_compensation has seen that a site without a norm has them
    weight, bias = site.consumer.weight, site.consumer.bias
    # Where float64 is to be had.
    device = weight.device if weight.device.type in ("cpu", "cuda") else torch.device("cpu")
    channels = unit_channels(torch.tensor(kept, dtype=torch.long, device=device), site.unit_width)
    old_bias = None if bias is None else bias.to(device)
    new_weight, new_bias = refitted(weight.to(device), old_bias, moments.to(device), channels)
    with torch.no_grad():
        weight[:, channels.to(weight.device)] = new_weight.to(weight.device, weight.dtype)
        if new_bias is not None:
            bias.copy_(new_bias)
