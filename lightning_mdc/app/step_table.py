"""The steps of ``train.py`` in their order: what each one leaves in the run's folder, needs, and depends on.

Everything that names steps reads this table: the pipeline, the fingerprints, the report, the dashboards. What a step
does is the function of the same name in `lightning_mdc.app.steps`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Output:
    """A file or folder of the run.

    Attributes:
        path: relative to the run's folder; a folder ends in ``/``.
        holds: what the report says of it.
        grows: whether it is worth a look before its step is done, as the trials of a search are.
        needed: whether later steps read it, beside the first.
    """

    path: str
    holds: str
    grows: bool = False
    needed: bool = False


@dataclass(frozen=True)
class Switch:
    """The setting that takes a step out of the run.

    Attributes:
        key: dotted.
        off: the value that does.
        remedy: what to do to have the step.
    """

    key: str
    off: int | str
    remedy: str


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: on the command line, ``stage=NAME``.
        outputs: what it leaves. The step is done only while the first of them, and all that are needed, are there.
        needs: steps whose outputs it reads.
        looks_at: steps whose outputs it also shows where they are done.
        settings: keys of what its result depends on, dotted, of single settings or whole groups.
        ignores: keys within these groups that its result does not depend on.
        trains: group of settings whose ``epochs`` say for how long it trains; None: it trains nothing.
        uses_data: whether it reads images.
        on_all_ranks: whether the processes of a distributed run share its work.
        in_all: whether ``stage=all`` runs it.
        shared_by_trials: whether all trials of a sweep use one result of it.
        switch: the setting that takes it out of the run; None: there is none.
    """

    name: str
    outputs: tuple[Output, ...]
    needs: tuple[str, ...] = ()
    looks_at: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    ignores: tuple[str, ...] = ()
    trains: str | None = None
    uses_data: bool = True
    on_all_ranks: bool = True
    in_all: bool = True
    shared_by_trials: bool = False
    switch: Switch | None = None

    @property
    def output(self) -> str:
        """Path of the output that the finished step is known by."""
        return self.outputs[0].path.rstrip("/")

    def is_off(self, settings: Mapping[str, Any]) -> bool:
        """Whether there is no such step under these settings."""
        return self.switch is not None and setting(settings, self.switch.key) == self.switch.off


def setting(settings: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key."""
    value: Any = settings
    for part in key.split("."):
        value = value[part]
    return value


# What models are tested on; nothing else depends on it.
_TEST_DATA = ("data.test_root", "data.test_split", "data.max_test_images")
# How images are read, which changes none of them.
_READING = tuple(
    f"data.{key}"
    for key in ("num_workers", "pin_memory", "prefetch_factor", "persistent_workers", "max_corrupt_images")
)
# How tokens leave. Compensation is no part of it: it changes neither masks nor what each cut alone shows.
_TOKENS = tuple(f"surgery.{key}" for key in ("token_score", "reduction", "restore", "stages"))
# Which policies there are.
_SPACE = (
    *("seed", "budget", *_TOKENS),
    *(f"policy.{key}" for key in ("dimensions", "min_heads", "min_neurons", "round_to")),
    *(f"search.{key}" for key in ("bounds", "groups", "token_ratio")),
)

_STEPS = (
    Step(
        "dense",
        (Output("dense/", "the dense model, for `lightning_mdc.load`"),),
        settings=("seed", "data", "model", "dense"),
        ignores=(*_TEST_DATA, *_READING, "dense.recipe"),  # of a recipe, what it comes to counts
        trains="dense",
        shared_by_trials=True,
    ),
    Step(
        "score",
        (
            Output("scores.safetensors", "importance of every head, neuron and token position"),
            Output("moments.safetensors", "how units go together, for `surgery.compensate`", needed=True),
        ),
        needs=("dense",),
        settings=("seed", "importance", "calibration", "surgery.stages"),
        shared_by_trials=True,
    ),
    Step(
        "share",
        (
            Output("shared/", "the dense model after weight sharing"),
            Output("shared-moments.safetensors", "how its units go together, for `surgery.compensate`", needed=True),
        ),
        needs=("dense", "score"),
        settings=("sharing", *_SPACE),
        ignores=("sharing.recipe",),
        trains="sharing",
        shared_by_trials=True,
        switch=Switch("sharing.epochs", 0, "give some, e.g. sharing.epochs=5"),
    ),
    Step(
        "sensitivity",
        (Output("sensitivity.csv", "accuracy and KL as each dimension of each block alone is cut"),),
        needs=("dense", "score", "share"),
        settings=("sensitivity", *_TOKENS),
        in_all=False,
    ),
    Step(
        "search",
        (
            Output("policy.json", "how much each block keeps"),
            Output("search/", "every policy that was tried", grows=True),
        ),
        needs=("dense", "score", "share"),
        settings=("seed", "budget", "policy", "search", "surgery"),
    ),
    Step(
        "slim",
        (Output("slim/", "the slim model before finetuning"), Output("plan.json", "which units each block keeps")),
        needs=("dense", "score", "share", "search"),
        settings=("seed", "calibration", "surgery", "healing"),
        on_all_ranks=False,
    ),
    Step(
        "distill",
        (
            Output("finetuned/", "the slim model finetuned, one folder per seed"),
            Output("reference/", "the dense model given the same extra training"),
        ),
        needs=("slim",),
        settings=("distillation",),
        ignores=("distillation.recipe",),
        trains="distillation",
    ),
    Step(
        "test",
        (
            Output("results.json", "every number of this report"),
            Output("predictions.safetensors", "what every model says of every test image"),
            Output("examples.safetensors", "the example images, and which patches stayed"),
        ),
        needs=("slim",),
        looks_at=("distill",),
        settings=("latency", *_TEST_DATA),
    ),
    Step(
        "report",
        (
            Output("report.html", "this report as one page, for any browser"),
            Output("report.md", "this report as text"),
            Output("pictures/", "its pictures"),
        ),
        needs=("test",),
        looks_at=("sensitivity",),
        uses_data=False,
        on_all_ranks=False,
    ),
)

STEPS: Mapping[str, Step] = {step.name: step for step in _STEPS}


def needed(settings: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Names of the steps that the step `name` is built on under these settings."""
    return tuple(need for need in STEPS[name].needs if not STEPS[need].is_off(settings))
