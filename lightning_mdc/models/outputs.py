"""What a model says, where its output is an object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Of transformers' outputs, the first that is there.
_NAMES = ("logits", "pooler_output", "image_embeds", "last_hidden_state")


def prediction_in(output: Any) -> Any:
    """The prediction in an output by names: its logits, else what is pooled of the tokens, else the tokens; any other
    output as it is."""
    if isinstance(output, Mapping):
        found = (output.get(name) for name in _NAMES)
        return next((value for value in found if isinstance(value, Tensor)), output)
    return output
