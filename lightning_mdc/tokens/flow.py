"""How many tokens go on at a token stage: the one rule, for policies, plans, costs, search and pictures."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_mdc.tokens.reduction import reduction_class


def tokens_kept(num_tokens: Any, keep_ratio: Any, num_prefix_tokens: int) -> Any:
    """How many of `num_tokens` (prefix included) stay at `keep_ratio`: all prefix tokens and at least one more.

    Numbers or arrays that broadcast; whole numbers as floats. The 1e-6 is that of `policy.keep_count`.
    """
    wanted = np.maximum(np.floor(np.multiply(num_tokens, keep_ratio) + 1e-6), num_prefix_tokens + 1)
    return np.minimum(num_tokens, wanted)


def tokens_after(num_tokens: Any, kept: Any, reduction: str) -> Any:
    """How many tokens go on where `kept` of `num_tokens` stay: those, and what the reduction makes of the others."""
    return np.where(np.less(kept, num_tokens), kept + reduction_class(reduction).extra, num_tokens)
