"""Every kind of model passes what families have to pass."""

import pytest
from torch import nn

from tests.family_suite import FamilySuite
from tests.kinds import KINDS, make


@pytest.mark.parametrize("kind", KINDS)
class TestTimm(FamilySuite):
    @pytest.fixture
    def dense(self, kind: str) -> nn.Module:
        return make(kind)
