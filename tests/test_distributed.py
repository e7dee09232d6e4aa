"""What fails on one rank fails on all, soon, and with its own words."""

import json
import pickle

import pytest

from lightning_mdc.distributed import failures_of, gather, on_every_rank, on_first_rank
from lightning_mdc.errors import RankError, SearchError
from tests import distributed_program
from tests.distributed_program import ERRORS
from tests.processes import two_ranks


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> tuple[dict, dict]:
    """By scenario, on rank 0 and on rank 1."""
    folder = tmp_path_factory.mktemp("ranks")
    two_ranks(distributed_program.main, folder)
    first, second = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1))
    return first, second


WORDS = {"OutOfMemoryError": "no room", "TwoWordsError": "gone wrong", "UnpicklableError": "locked up"}


def test_results_are_where_they_belong(outcomes):
    first, second = outcomes
    assert first["gather"] == second["gather"] == ["fine", ["of 0", "of 1"]]
    assert (first["on_every_rank"], second["on_every_rank"]) == (["fine", "of 0"], ["fine", "of 1"])
    assert first["on_first_rank"] == second["on_first_rank"] == ["fine", "of 0"]


@pytest.mark.parametrize("kind", ERRORS)
def test_the_error_of_the_first_rank_is_its_own_there_and_in_words_elsewhere(outcomes, kind):
    first, second = (outcome[f"first {kind}"] for outcome in outcomes)
    assert first == [kind, WORDS[kind]]
    assert second == ["RankError", f"rank 0 failed: {kind}: {WORDS[kind]}", 0, kind, WORDS[kind]]


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("where", ["second", "before", "inside", "loss", "metric", "dense"])
def test_an_error_of_another_rank_likewise(outcomes, where, kind):
    first, second = (outcome[f"{where} {kind}"] for outcome in outcomes)
    assert second == [kind, WORDS[kind]]
    assert first == ["RankError", f"rank 1 failed: {kind}: {WORDS[kind]}", 1, kind, WORDS[kind]]


def test_where_both_fail_each_has_its_own_error(outcomes):
    assert [outcome["both"] for outcome in outcomes] == [
        ["TwoWordsError", "gone wrong"],
        ["UnpicklableError", "locked up"],
    ]


def test_after_all_these_errors_ranks_still_understand_one_another(outcomes):
    first, second = outcomes
    assert first["metric"] == second["metric"] == ["fine", pytest.approx(0.6)]
    assert first["loss"] == second["loss"]


def test_one_process_asks_nobody():
    assert gather(lambda: 3) == [3]
    assert on_every_rank(lambda: 3) == on_first_rank(lambda: 3) == 3
    with pytest.raises(SearchError, match="as it is") as raised:
        on_every_rank(lambda: on_first_rank(lambda: (_ for _ in ()).throw(SearchError("as it is"))))
    (failure,) = failures_of(raised.value)
    assert (str(failure), failure.rank) == ("SearchError: as it is", 0)
    assert failure.is_a(ValueError)
    assert not failure.is_a(RuntimeError)


def test_the_error_of_another_rank_goes_between_processes():
    """As that of a trial in a worker process of a sweep."""
    error = pickle.loads(pickle.dumps(RankError(1, "OutOfMemoryError", "no memory")))
    assert (error.rank, error.kind, error.text) == (1, "OutOfMemoryError", "no memory")
    assert str(error) == "rank 1 failed: OutOfMemoryError: no memory"
