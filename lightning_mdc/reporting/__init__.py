"""How did it go? Numbers measured (`results`), as tables, pictures, and a report in words, Markdown and HTML.

What is imported here works without torch, for sweeps of other apps; a report of a run's folder is made by
`lightning_mdc.reporting.report`.
"""

from lightning_mdc.reporting.findings import findings, overhead_line
from lightning_mdc.reporting.plan_figures import kept_by_block, kept_figure, policy_figure
from lightning_mdc.reporting.results import DENSE, FINETUNED, REFERENCE, SLIM, Result, Results
from lightning_mdc.reporting.style import save_figure
from lightning_mdc.reporting.tables import by_seed, comparison, scaled

__all__ = [
    "DENSE",
    "FINETUNED",
    "REFERENCE",
    "SLIM",
    "Result",
    "Results",
    "by_seed",
    "comparison",
    "findings",
    "kept_by_block",
    "kept_figure",
    "overhead_line",
    "policy_figure",
    "save_figure",
    "scaled",
]
