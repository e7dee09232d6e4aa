"""How much does each unit matter? `hsic` is the maths, `criteria` the choices, `scoring` runs them over a model."""

from lightning_mdc.importance.conditional import ConditionalDependence
from lightning_mdc.importance.criteria import HSIC, Criterion, UnitGroup, as_criterion, register
from lightning_mdc.importance.scores import Scores
from lightning_mdc.importance.scoring import Scorer, as_prediction, score

__all__ = [
    "HSIC",
    "ConditionalDependence",
    "Criterion",
    "Scorer",
    "Scores",
    "UnitGroup",
    "as_criterion",
    "as_prediction",
    "register",
    "score",
]
