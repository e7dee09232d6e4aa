"""How did it go? Numbers measured (`results`), as tables, as a picture, and as a report in words."""

from lightning_mdc.reporting.figures import Kept, kept_by_block, kept_figure, policy_figure, save_figure
from lightning_mdc.reporting.report import Place, findings, markdown, overhead_line
from lightning_mdc.reporting.results import DENSE, FINETUNED, REFERENCE, SLIM, Result, Results
from lightning_mdc.reporting.search_figures import cost_figure, dependence_figure, progress_figure
from lightning_mdc.reporting.tables import Table, by_seed, comparison, scaled

__all__ = [
    "DENSE",
    "FINETUNED",
    "REFERENCE",
    "SLIM",
    "Kept",
    "Place",
    "Result",
    "Results",
    "Table",
    "by_seed",
    "comparison",
    "cost_figure",
    "dependence_figure",
    "findings",
    "kept_by_block",
    "kept_figure",
    "markdown",
    "overhead_line",
    "policy_figure",
    "progress_figure",
    "save_figure",
    "scaled",
]
