import os
import sys
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("WANDB_MODE", "disabled")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def without_staged_media() -> Iterator[None]:
    """A worker of pytest-xdist ends by ``os._exit``, which leaves the folder that ``import wandb`` makes for media."""
    yield
    if (staging := sys.modules.get("wandb.sdk.data_types._private")) is not None:
        staging.MEDIA_TMP.cleanup()
