"""A run as it lies in its folder, finished or not: all that a report, a dashboard or a comparison is made from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from lightning_mdc.app.report.outcomes import ClassChange, Examples, Outcomes
from lightning_mdc.app.report.results import Results
from lightning_mdc.app.run_folder import CURRENT_STUDY, RECORDS, Invocation, RunFolder, invocations, newest_run
from lightning_mdc.app.step_table import STEPS
from lightning_mdc.artifact import load_skeleton
from lightning_mdc.budget import CostModel
from lightning_mdc.errors import ConfigError, MdcError
from lightning_mdc.files import read_json
from lightning_mdc.gp_ei.study import StudyFile, read_study
from lightning_mdc.importance import Scores
from lightning_mdc.models import find_anatomy
from lightning_mdc.policy import Plan, Policy
from lightning_mdc.policy_search.sensitivity import Sensitivity

# Of settings, those that are groups and are looked into.
_GROUPS = ("policy", "search", "sharing")

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """One run's folder, read on demand. What is not there (yet), or cannot be read, is None.

    Attributes:
        folder: of the run.
    """

    folder: Path

    def __post_init__(self) -> None:
        if not (self.folder / RECORDS).is_dir():
            newest = newest_run(self.folder) or "runs/digits/2026-01-31_12-00-00"
            raise ConfigError(
                f"{str(self.folder)!r} holds no run (no folder {RECORDS}/ in it); give a folder that train.py made, "
                f"such as {newest}"
            )

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """Of the last start; empty if there are none."""
        settings = read_json(self.folder / "settings.json")
        if not isinstance(settings, dict) or any(not isinstance(settings.get(k, {}), dict) for k in _GROUPS):
            return {}  # none, or edited by somebody
        return settings

    @cached_property
    def name(self) -> str:
        return str(self.settings.get("name", self.folder.resolve().parent.name))

    @property
    def weights(self) -> str:
        """The model whose weights were searched over and cut: ``dense``, or ``shared``, what sharing made of it."""
        return "shared" if self.settings.get("sharing", {}).get("epochs") else "dense"

    @cached_property
    def steps(self) -> Mapping[str, Mapping[str, Any]]:
        """What is known of every step that is done, in their order: ``seconds``, ``settings``, ``fingerprint``."""
        known = {name: RunFolder(self.folder).record(name) for name in STEPS}
        return {name: facts for name, facts in known.items() if facts is not None}

    @cached_property
    def invocations(self) -> tuple[Invocation, ...]:
        return invocations(self.folder)

    @cached_property
    def dense(self) -> CostModel | None:
        """The dense model's anatomy and what its parts cost."""
        return self._of("dense", "dense", lambda path: CostModel(find_anatomy(load_skeleton(path))))

    @cached_property
    def scores(self) -> Scores | None:
        return self._of("score", "scores.safetensors", Scores.load)

    @cached_property
    def study(self) -> StudyFile | None:
        """The search of the present settings with every trial so far; None if the policy was given."""
        try:
            name = (self.folder / CURRENT_STUDY).read_text().strip()
        except OSError:
            return None
        return self._read(f"search/{Path(name).name}", read_study)

    @cached_property
    def studies(self) -> tuple[StudyFile, ...]:
        """That search, and others in the folder that judged the same weights on the same images, for other budgets."""
        study = self.study
        if study is None:
            return ()
        paths = sorted((self.folder / "search").glob("trials-*.jsonl"))
        found = [self._read(str(path.relative_to(self.folder)), read_study) for path in paths]
        others = [other for other in found if other is not None and _is_comparable(other, study)]
        return (study, *(other for other in others if other != study))

    @cached_property
    def policy(self) -> Policy | None:
        return self._of("search", "policy.json", Policy.load)

    @cached_property
    def plan(self) -> Plan | None:
        return self._of("slim", "plan.json", lambda path: Plan.from_json(path.read_text()))

    @cached_property
    def results(self) -> Results | None:
        return self._of("test", "results.json", Results.load)

    @cached_property
    def outcomes(self) -> Outcomes | None:
        return self._of("test", "predictions.safetensors", Outcomes.load)

    @property
    def class_changes(self) -> tuple[ClassChange, ...]:
        """How each class fared, the worst first; empty without predictions."""
        return () if self.outcomes is None else self.outcomes.class_changes()

    @cached_property
    def examples(self) -> Examples | None:
        return self._of("test", "examples.safetensors", Examples.load)

    @cached_property
    def sensitivity(self) -> Sensitivity | None:
        """What was cut so far; of a step that is under way or was killed, the cuts that are done."""
        if "sensitivity" in self.steps or "score" not in self.steps:
            return self._of("sensitivity", "sensitivity.csv", Sensitivity.load)
        # Of an older dense model or older scores there may be some, too.
        since = (self.folder / RECORDS / "score.json").stat().st_mtime_ns
        begun = {path.stat().st_mtime_ns: path for path in self.folder.glob("sensitivity/cuts-*.csv")}
        newest = max((when for when in begun if when > since), default=None)
        return None if newest is None else self._read(str(begun[newest].relative_to(self.folder)), Sensitivity.load)

    def _of(self, step: str, name: str, read: Callable[[Path], T]) -> T | None:
        """What a step left; nothing unless it is done, for what lies there then belongs to older settings."""
        return self._read(name, read) if step in self.steps else None

    def _read(self, name: str, read: Callable[[Path], T]) -> T | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            return read(path)
        except (MdcError, OSError, ValueError) as error:  # the rest is still worth a report
            log.warning("%s is left out of the report: %s", path, error)
            return None


def _is_comparable(study: StudyFile, other: StudyFile) -> bool:
    """Whether values of the two mean the same; what the dense model is worth tells other images and other weights."""
    same_scores = study.header["about"].get("scores") == other.header["about"].get("scores")
    return same_scores and "dense" in study.metadata and study.metadata == other.metadata
