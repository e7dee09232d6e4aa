"""Every kind of model passes what families have to pass."""

from collections.abc import Callable

import pytest
from torch import nn

from tests.family_suite import FamilySuite
from tests.kinds import KINDS, POST_NORM, randomised


@pytest.mark.parametrize("maker", [*KINDS.values(), POST_NORM], ids=[*KINDS, "post_norm"])
class TestTimm(FamilySuite):
    @pytest.fixture
    def dense(self, maker: Callable[[], nn.Module]) -> nn.Module:
        return randomised(maker())
