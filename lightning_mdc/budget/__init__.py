"""What does a policy cost? Closed-form MACs and parameters, measured latency, budgets, and the uniform policy."""

from lightning_mdc.budget.cost_model import CostModel, InputSize, image_size, macs, plan_macs, policy_macs
from lightning_mdc.budget.latency import LatencyTable
from lightning_mdc.budget.limits import Budget, as_budget
from lightning_mdc.budget.measuring import measure_latency_table
from lightning_mdc.budget.params import num_params

__all__ = [
    "Budget",
    "CostModel",
    "InputSize",
    "LatencyTable",
    "as_budget",
    "image_size",
    "macs",
    "measure_latency_table",
    "num_params",
    "plan_macs",
    "policy_macs",
]
