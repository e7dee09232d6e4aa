"""Every kind of model passes what families have to pass."""

from collections.abc import Callable

import pytest
from torch import nn

from tests.family_suite import FamilySuite
from tests.kinds import BOUND_KINDS, KINDS, POST_NORM, randomised

ALL_KINDS = KINDS | {"post_norm": POST_NORM} | BOUND_KINDS


@pytest.mark.parametrize("maker", ALL_KINDS.values(), ids=ALL_KINDS)
class TestTimm(FamilySuite):
    @pytest.fixture
    def dense(self, maker: Callable[[], nn.Module]) -> nn.Module:
        return randomised(maker())
