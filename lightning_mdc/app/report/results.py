"""What was measured of each model: the rows behind every table and sentence of a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from safetensors import SafetensorError

from lightning_mdc.errors import ConfigError
from lightning_mdc.figures.numbers import percent

DENSE, SLIM, FINETUNED, REFERENCE = "dense", "slim", "slim finetuned", "dense, same extra training"
# Those that were trained: what they are in a sentence, and the group of settings of their training.
_TRAINED = {
    DENSE: ("the given model", "dense"),
    FINETUNED: ("the slim model", "distillation"),
    REFERENCE: ("the dense reference", "distillation"),
}


@dataclass(frozen=True)
class Result:
    """One model on the test images.

    Attributes:
        model: `DENSE`, `SLIM`, `FINETUNED` or `REFERENCE`.
        seed: of its finetuning; None for the first two.
        correct: images whose class it predicts.
        agreeing: images for which it predicts what the dense model predicts, right or wrong.
        images: test images.
        macs: multiply-accumulates per image.
        params: number of parameters.
        size: bytes of its weights file.
        latency: seconds per image by batch size.
        before, after: fractions of the held-out training images that were right before its training and in the best
            epoch of it; None: not judged. Where `before` is more, the weights of before are the ones that were tested.
    """

    model: str
    seed: int | None
    correct: int
    agreeing: int
    images: int
    macs: int
    params: int
    size: int
    latency: Mapping[int, float]
    before: float | None = None
    after: float | None = None

    @property
    def top1(self) -> float:
        """Fraction of the images."""
        return self.correct / self.images


@dataclass(frozen=True)
class Results:
    """All rows of one run, what they were measured on, and which training did harm and what to change, in sentences."""

    rows: tuple[Result, ...]
    name: str
    device: str
    harm: tuple[str, ...] = ()

    def of(self, model: str) -> tuple[Result, ...]:
        """The rows of one kind of model, one per seed."""
        return tuple(row for row in self.rows if row.model == model)

    @property
    def dense(self) -> Result:
        """The dense model."""
        return self.of(DENSE)[0]

    def speedup(self, batch_size: int) -> float:
        """How many times as fast as dense the slim model is, per image."""
        return self.dense.latency[batch_size] / self.slimmest.latency[batch_size]

    @property
    def slimmest(self) -> Result:
        """The slim model to speak of: finetuned if it was."""
        return (self.of(FINETUNED) or self.of(SLIM))[0]

    @property
    def slim_correct(self) -> float:
        """Images that the slim model to speak of gets right, on average over its seeds."""
        return mean_correct(self.of(FINETUNED) or self.of(SLIM))

    @property
    def slim_top1(self) -> float:
        """The same as a fraction of the images."""
        return self.slim_correct / self.slimmest.images

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return tuple(sorted(self.rows[0].latency))

    def to_json(self) -> str:
        """Indented JSON; see `from_json`."""
        return json.dumps({"format": 1, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def load(cls, path: Path) -> Results:
        """What `to_json` wrote to the file at `path`.

        Raises:
            ConfigError: it cannot be read or was edited.
        """
        with reading(path, "results"):
            fields = json.loads(path.read_text())
            rows = tuple(
                Result(**{**row, "latency": {int(size): value for size, value in row["latency"].items()}})
                for row in fields["rows"]
            )
            results = cls(rows=rows, name=fields["name"], device=fields["device"], harm=tuple(fields.get("harm", ())))
            if not (results.of(DENSE) and results.of(SLIM)) or any(not row.images or not row.latency for row in rows):
                raise ValueError("dense or slim is missing, or was not measured")
            return results


def mean_correct(rows: Sequence[Result]) -> float:
    """Images right, on average over seeds."""
    return mean(row.correct for row in rows)


def mean_top1(rows: Sequence[Result]) -> float:
    """Fraction of the images right, on average over seeds."""
    return mean_correct(rows) / rows[0].images


def harm(before: float, after: float, remedy: str) -> str:
    """What a training did that makes a model worse, and what to change."""
    return (
        f"of the held-out images {percent(before)} are right before it and at best {percent(after)} after it, so the "
        f"weights of before are kept; {remedy}"
    )


def harm_by_model(rows: Sequence[Result], remedy: Callable[[str], str]) -> tuple[str, ...]:
    """A sentence for each kind of model that its training made worse.

    Args:
        remedy: what to change, by the group of settings of the training.
    """
    found = []
    for kind, (name, training) in _TRAINED.items():
        runs = [row for row in rows if row.model == kind]
        judged = [(row.before, row.after) for row in runs if row.before is not None and row.after is not None]
        harmed = [(before, after) for before, after in judged if before > after]
        if harmed:
            before, after = (mean(each) for each in zip(*harmed, strict=True))
            share = f" in {len(harmed)} of {len(runs)} runs" if len(runs) > 1 else ""
            found.append(f"Finetuning did harm to {name}{share}: {harm(before, after, remedy(training))}.")
    return tuple(found)


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Inside, a file of the step test that holds something else than `what` is a ConfigError that says what to do."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} holds no {what} ({error}); delete {path.with_name('results.json')}, and resume={path.parent} "
            "runs the step test again"
        ) from error
