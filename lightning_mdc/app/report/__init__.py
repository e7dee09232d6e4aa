"""How did it go? Numbers measured (`results`), as tables, pictures, and a report in words, Markdown and HTML.

The report of a run's folder is made by `lightning_mdc.app.report.write`.
"""

from lightning_mdc.app.report.findings import findings, overhead_line
from lightning_mdc.app.report.results import DENSE, FINETUNED, REFERENCE, SLIM, Result, Results
from lightning_mdc.app.report.tables import by_seed, comparison

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
    "overhead_line",
]
