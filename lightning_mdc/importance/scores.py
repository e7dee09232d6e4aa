"""How much every unit of one model matters: the result of scoring."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lightning_mdc.errors import CalibrationError
from lightning_mdc.files import replacing, tuples
from lightning_mdc.importance.moments import Moments, tensors_and_facts
from lightning_mdc.policy import DIMENSIONS, ByDimension

_FORMAT = "lightning_mdc.scores.1"


@dataclass(frozen=True, eq=False, init=False)
class Scores:
    """Importance per unit, higher = keep. fp32 on the CPU.

    Attributes:
        values: by dimension, those of `units`; `heads`, `neurons` and `tokens` are views of it.
        stages: the blocks of the token stages.
        criterion: name of what made them.
        images: how many images they rest on.
        moments: of what the layers that read units are given, if gathered on the way; not in a file of scores.
        grid: (height, width) in patches of the images whose token positions were scored; None: that of the model's own
            input, or of no tokens.
    """

    values: Mapping[str, list[Tensor]]
    stages: tuple[int, ...]
    criterion: str
    images: int
    moments: Moments | None
    grid: tuple[int, int] | None

    def __init__(
        self,
        heads: list[Tensor],
        neurons: list[Tensor],
        tokens: list[Tensor],
        stages: tuple[int, ...] = (),
        criterion: str = "",
        images: int = 0,
        moments: Moments | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        values = ByDimension(dict(zip(DIMENSIONS, (heads, neurons, tokens), strict=True)))
        rest = {"stages": stages, "criterion": criterion, "images": images, "moments": moments, "grid": grid}
        for name, value in {"values": values, **rest}.items():
            object.__setattr__(self, name, value)

    heads = property(lambda self: self.units("heads"), doc="Per block, (heads,).")
    neurons = property(lambda self: self.units("neurons"), doc="Per block, (neurons,).")
    tokens = property(lambda self: self.units("tokens"), doc="Per token stage, (patch positions,), row by row.")

    def units(self, dimension: str) -> list[Tensor]:
        """Per block (or token stage), (units,): empty tensors where a block has none, no tensors if not scored."""
        return self.values[dimension]

    def with_moments(self, moments: Moments | None) -> Scores:
        """The same scores with moments that were kept apart, or without any."""
        rest = {"stages": self.stages, "criterion": self.criterion, "images": self.images, "grid": self.grid}
        return Scores(**dict(self.values), **rest, moments=moments)  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, e.g. ``heads.3``."""
        return {f"{d}.{i}": t for d in DIMENSIONS for i, t in enumerate(self.units(d))}

    def facts(self) -> dict[str, str]:
        """What is not a tensor, as text."""
        return {
            "format": _FORMAT,
            "criterion": self.criterion,
            "images": str(self.images),
            "stages": json.dumps(list(self.stages)),
            "grid": json.dumps(self.grid),
        }

    @classmethod
    def from_parts(cls, tensors: dict[str, Tensor], facts: dict[str, str]) -> Scores:
        """The scores that gave these `tensors` and `facts`.

        Raises:
            CalibrationError: they are not of this format.
        """
        if facts.get("format") != _FORMAT:
            raise CalibrationError(
                f"scores have format {facts.get('format')!r}, expected {_FORMAT!r}: no scores of ours"
            )
        missing = {"criterion", "images", "stages"} - set(facts)
        if missing:
            raise CalibrationError(f"scores lack {sorted(missing)}: the file is damaged; score again")
        values: dict[str, Any] = {
            d: [tensors[f"{d}.{i}"] for i in range(sum(name.startswith(f"{d}.") for name in tensors))]
            for d in DIMENSIONS
        }
        return cls(
            **values,
            stages=tuple(json.loads(facts["stages"])),
            criterion=facts["criterion"],
            images=int(facts["images"]),
            grid=tuples(json.loads(facts.get("grid", "null"))),
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, so that it is there whole or not at all."""
        with replacing(Path(path)) as beside:
            save_file({name: t.contiguous() for name, t in self.tensors().items()}, beside, metadata=self.facts())

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            CalibrationError: the file is missing, damaged, or holds no scores.
        """
        try:
            tensors, facts = tensors_and_facts(path)
        except (SafetensorError, OSError) as error:
            raise CalibrationError(f"scores={str(path)!r} cannot be read: {error}; score again") from error
        return cls.from_parts(tensors, facts)


def min_max(values: Tensor) -> Tensor:
    """`values` shifted and scaled to [0, 1]; all equal becomes 0."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)
