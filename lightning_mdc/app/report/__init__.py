"""How did it go? Numbers measured (`results`), as tables, pictures, and a report in words, Markdown and HTML.

What is imported here works without torch, for sweeps of other apps; a report of a run's folder is made by
`lightning_mdc.app.report.report`.
"""

from lightning_mdc.app.report.findings import findings, overhead_line
from lightning_mdc.app.report.results import DENSE, FINETUNED, REFERENCE, SLIM, Result, Results
from lightning_mdc.app.report.tables import by_seed, comparison, scaled
from lightning_mdc.figures.plan import kept_by_block, kept_figure, policy_figure
from lightning_mdc.figures.style import save_figure

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
