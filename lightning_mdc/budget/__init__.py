"""What does a policy cost? Closed-form MACs and parameters, measured latency, budgets, and the uniform policy."""

from lightning_mdc.budget.cost_model import CostModel, InputSize, Kept, image_size, num_params
from lightning_mdc.budget.costs import Cost, register
from lightning_mdc.budget.latency import Latency
from lightning_mdc.budget.latency_table import LatencyTable
from lightning_mdc.budget.limits import Budget, as_budget
from lightning_mdc.budget.macs import macs, plan_macs, policy_macs
from lightning_mdc.budget.measuring import measure_latency_table
from lightning_mdc.budget.params import Params

__all__ = [
    "Budget",
    "Cost",
    "CostModel",
    "InputSize",
    "Kept",
    "Latency",
    "LatencyTable",
    "Params",
    "as_budget",
    "image_size",
    "macs",
    "measure_latency_table",
    "num_params",
    "plan_macs",
    "policy_macs",
    "register",
]
