"""Every kind of model passes what families have to pass."""

from collections.abc import Callable

import pytest
from torch import nn

from tests.family_suite import FamilySuite
from tests.kinds import BOUND_KINDS, KINDS, POST_NORM, randomised

ALL_KINDS = KINDS | {"post_norm": POST_NORM} | BOUND_KINDS
NOT_DAILY = ("sam_rope", "hiera_abs_win", "fused_without_bias")  # of families of which another kind is


def _marks(kind: str) -> tuple[pytest.MarkDecorator, ...]:
    return (pytest.mark.slow,) if kind in NOT_DAILY else ()


@pytest.mark.parametrize("maker", [pytest.param(maker, id=k, marks=_marks(k)) for k, maker in ALL_KINDS.items()])
class TestTimm(FamilySuite):
    @pytest.fixture
    def dense(self, maker: Callable[[], nn.Module]) -> nn.Module:
        return randomised(maker())
