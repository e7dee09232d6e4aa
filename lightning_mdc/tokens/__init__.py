"""What happens at a token stage: which tokens stay, what becomes of the others, and how they come back at the end."""

from lightning_mdc.tokens import drop, fuse, merge  # noqa: F401 (they register)
from lightning_mdc.tokens.reduction import Evidence, Reduction, register

__all__ = ["Evidence", "Reduction", "register"]
