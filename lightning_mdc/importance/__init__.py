"""How much does each unit matter? `criteria` are the choices, `moments` what some rest on, `scoring` runs them."""

from lightning_mdc.importance.calibration import Calibration
from lightning_mdc.importance.conditional import ConditionalDependence
from lightning_mdc.importance.criteria import HSIC, Criterion, Needs, Taylor, UnitGroup, as_criterion, register
from lightning_mdc.importance.moments import Moments
from lightning_mdc.importance.scores import Scores
from lightning_mdc.importance.scoring import Scorer, score

__all__ = [
    "HSIC",
    "Calibration",
    "ConditionalDependence",
    "Criterion",
    "Moments",
    "Needs",
    "Scorer",
    "Scores",
    "Taylor",
    "UnitGroup",
    "as_criterion",
    "register",
    "score",
]
