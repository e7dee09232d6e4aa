"""Every kind of model passes what families have to pass."""

import pytest
from torch import nn

from tests.family_suite import FamilySuite
from tests.kinds import BOUND_KINDS, KINDS, POST_NORM, daily, randomised

ALL_KINDS = KINDS | {"post_norm": POST_NORM} | BOUND_KINDS


@pytest.mark.parametrize("kind", daily(ALL_KINDS))
class TestTimm(FamilySuite):
    @pytest.fixture
    def dense(self, kind: str) -> nn.Module:
        return randomised(ALL_KINDS[kind]())
