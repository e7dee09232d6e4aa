"""What a model says, where its output is an object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

# Makes a tensor of what a model returns. Its type says no more than that it is called: `torch.sigmoid` says nothing of
# itself, and whoever builds from type hints (jsonargparse, so LightningCLI) would refuse it.
Prediction: TypeAlias = Callable[[Any], Any]

# Of transformers' outputs, the first that is there.
_NAMES = ("logits", "pooler_output", "image_embeds", "last_hidden_state")


def prediction_in(output: Any) -> Any:
    """The prediction in an output by names: its logits, else what is pooled of the tokens, else the tokens; any other
    output as it is."""
    if isinstance(output, Mapping):
        found = (output.get(name) for name in _NAMES)
        return next((value for value in found if isinstance(value, Tensor)), output)
    return output
