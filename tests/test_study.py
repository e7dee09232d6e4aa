"""A search on disk: killed, damaged, locked, out of room, and each time held to what the undisturbed one found."""

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_mdc.errors import SearchError
from lightning_mdc.gp_ei.process import GpEi, Observation
from lightning_mdc.gp_ei.projection import Constraint
from lightning_mdc.gp_ei.space import Axis, Space
from lightning_mdc.gp_ei.study import Study, Trial, observations, read_study

SPACE = Space(
    [Axis("a", 0, 1, step=0.05), Axis("n", 1, 6, step=1, integer=True), Axis("kind", choices=("x", "y", None))]
)
CONSTRAINT = Constraint(lambda points: points[:, 0] * points[:, 1], 2.0)
ABOUT = {"budget": 0.6, "metric": "top-1", "images": [1, 2]}


def search(**kwargs: Any) -> GpEi:
    """Random points on the budget: fast, and as much a function of the history as any."""
    return GpEi(SPACE, CONSTRAINT, **({"n_initial_points": 99, "n_candidates": 30} | kwargs))


def run(study: Study, count: int) -> tuple[Trial, ...]:
    """Trials with values made from their parameters; the third fails."""
    while len(study.finished) < count:
        (trial,) = study.next()
        value = trial.params["a"] * 10 + trial.params["n"] if trial.number != 2 else None
        study.finish(trial.number, value, seconds=1.5, note="out of memory" if value is None else "")
    return study.trials


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is looked at, not how safely."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_the_lines_of_the_file(tmp_path: Path) -> None:
    with Study(search(seed=3), tmp_path / "deep" / "study.jsonl", ABOUT) as study:
        trials = run(study, 4)
        study.next(2)
        lines = [json.loads(line) for line in (tmp_path / "deep" / "study.jsonl").read_text().splitlines()]
    header, *after = lines
    assert header["about"] == ABOUT
    assert [axis["name"] for axis in header["space"]] == ["a", "n", "kind"]
    assert (header["direction"], header["seed"], header["n_initial_points"]) == ("maximize", 3, 99)
    assert [line.get("asked", line.get("told")) for line in after] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5]
    for trial, asked, told in zip(trials, after[0:8:2], after[1:8:2], strict=True):
        assert asked["params"] == trial.params
        assert asked["cost"] == trial.cost == pytest.approx(trial.params["a"] * trial.params["n"])
        assert trial.cost <= 2
        assert (told["status"], told["value"], told["seconds"]) == (trial.status, trial.value, 1.5)
    assert [trial.status for trial in study.trials] == ["done", "done", "failed", "done", "running", "running"]
    assert study.trials[2].note == after[5]["note"] == "out of memory"


def test_facts_are_kept_and_files_without_them_are_read(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    with Study(search(), path) as study:
        study.next(2)
        study.add_metadata(metric="kl")
        study.finish(0, 1.0, facts={"accuracy": 0.5, "kl": float("inf")})  # of which JSON knows nothing
        study.finish(1, 2.0)
    assert [dict(trial.facts) for trial in read_study(path).trials] == [{"accuracy": 0.5}, {}]
    assert read_study(path).metadata == {"metric": "kl"}
    with Study(search(), path) as study:
        assert [dict(trial.facts) for trial in study.trials] == [{"accuracy": 0.5}, {}]
    assert '"facts"' not in path.read_text().splitlines()[-1]


def test_the_best_is_the_first_best_that_is_done() -> None:
    for direction, expected in (("maximize", 1), ("minimize", 0)):
        study = Study(search(direction=direction))
        study.next(6)
        for number, value in enumerate([1.0, 5.0, 5.0, float("nan"), None]):
            study.finish(number, value)
        assert study.best is not None
        assert study.best.number == expected
        assert [trial.status for trial in study.trials[3:]] == ["failed", "failed", "running"]
        assert study.trials[3].note == "its value is nan"
        assert [o.value for o in study.search.history] == [1, 5, 5, None, None]


def test_only_running_trials_can_be_finished() -> None:
    study = Study(search())
    with pytest.raises(SearchError, match="trial 0 is not running"):
        study.finish(0, 1.0)
    study.next()
    study.finish(0, 1.0)
    with pytest.raises(SearchError, match=r"trial 0 is not running.*over"):
        study.finish(0, 2.0)


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Study(search(), None, ABOUT) as study:
        run(study, 5)
    assert not [*tmp_path.iterdir()]


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("quick_disk")
def test_killed_at_any_byte_it_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    path, space = tmp_path / "study.jsonl", Space([Axis("a", 0, 1, step=0.05), SPACE.axes[1]])
    prior = [Observation(np.array([3.0, 2]), 7.0), Observation(np.zeros(2), 1.0)]

    def fresh() -> GpEi:
        return GpEi(space, n_initial_points=99, n_candidates=5, prior=prior)

    with Study(fresh(), path, {"budget": 0.6}) as study:
        expected = run(study, 4)
    data = path.read_bytes()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        with Study(fresh(), path, {"budget": 0.6}) as study:
            assert run(study, 4) == expected, end
            known = [(o.point.tolist(), o.value) for o in study.search.prior]
        assert known == [([3.0, 2.0], 7.0), ([0.0, 0.0], 1.0)]
        assert path.read_bytes() == data, end


@pytest.mark.usefixtures("quick_disk")
def test_killed_at_any_line_the_process_goes_on_the_same_way(tmp_path: Path) -> None:
    path, few = tmp_path / "study.jsonl", {"n_initial_points": 2}
    with Study(search(**few), path) as study:
        expected = run(study, 7)
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for end in ends[::3]:
        path.write_bytes(data[: end - end % 2])
        with Study(search(**few), path) as study:
            assert run(study, 7) == expected, end


@pytest.mark.usefixtures("quick_disk")
def test_a_batch_cut_short_is_asked_for_again(tmp_path: Path) -> None:
    path, few = tmp_path / "study.jsonl", {"n_initial_points": 2}
    with Study(search(**few), path) as study:
        run(study, 3)
        before = len(path.read_bytes())
        batch = study.next(3)
    data = path.read_bytes()
    for end in range(before, len(data) + 1, 23):
        path.write_bytes(data[:end])
        with Study(search(**few), path) as study:
            assert study.next(3) == batch
            assert study.next(3) == batch


@pytest.mark.usefixtures("quick_disk")
def test_trials_that_end_out_of_order(tmp_path: Path) -> None:
    path, few = tmp_path / "study.jsonl", {"n_initial_points": 2}
    with Study(search(**few), path) as study:
        study.next(4)
        for number, value in ((2, 1.0), (0, 7.0), (3, None), (1, 5.0)):
            study.finish(number, value)
        history = study.search.history
        expected = study.next(2)
    with Study(search(**few), path) as study:
        told = study.search.history
        assert [(o.point.tolist(), o.value) for o in told] == [(o.point.tolist(), o.value) for o in history]
        assert [trial.number for trial in study.trials] == [0, 1, 2, 3, 4, 5]
        assert study.next(2) == expected


@pytest.mark.usefixtures("quick_disk")
def test_a_finished_search_goes_on_with_more_trials(tmp_path: Path) -> None:
    with Study(search(), tmp_path / "long.jsonl") as study:
        expected = run(study, 8)
    for count in (5, 5, 8):
        with Study(search(), tmp_path / "short.jsonl") as study:
            trials = run(study, count)
    assert trials == expected
    assert (tmp_path / "long.jsonl").read_bytes() == (tmp_path / "short.jsonl").read_bytes()


def test_a_small_space_comes_to_an_end() -> None:
    study = Study(GpEi(Space([Axis("kind", choices=("a", "b", "c"))]), n_candidates=50))
    assert len(study.next(5)) == 3
    for trial in study.trials:
        study.finish(trial.number, 1.0)
    assert study.next() == ()


# --- what can be wrong with it ----------------------------------------------------------------------------------------


def study_file(path: Path, **kwargs: Any) -> bytes:
    with Study(search(**kwargs), path, ABOUT) as study:
        run(study, 4)
    return path.read_bytes()


@pytest.mark.parametrize("damage", ["garbage", "zeros", "joined", "not utf-8", "no such trial", "no params", "twice"])
def test_a_damaged_line_costs_no_more_than_its_trial(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "study.jsonl"
    lines = study_file(path).splitlines(keepends=True)
    bad = {
        "garbage": lines[3][:20] + b"?" + lines[3][21:],
        "zeros": b"\0" * len(lines[3]) + b"\n",
        "joined": lines[3][:-1],
        "not utf-8": lines[3][:20] + b"\xff" + lines[3][20:],
        "no such trial": b'{"seconds": 1, "status": "done", "told": 77, "value": 1.0}\n',
        "no params": b'{"asked": 1, "cost": 1.0}\n',
        "twice": lines[1],
    }[damage]
    damaged = b"".join([*lines[:3], bad, *lines[4:]])  # lines[3] asked for trial 1, lines[4] told of it
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING), Study(search(), path, ABOUT) as study:
        assert [(trial.number, trial.status) for trial in study.trials] == [(0, "done"), (2, "failed"), (3, "done")]
        assert len(study.search.history) == 3
        run(study, 5)
    assert "is damaged: line 4 (" in caplog.text
    assert "3 trials could be read and are kept" in caplog.text
    assert (tmp_path / "study.jsonl.damaged1").read_bytes() == damaged
    caplog.clear()
    with Study(search(), path, ABOUT) as study:  # mended
        assert [trial.number for trial in study.trials] == [0, 2, 3, 4, 5][: len(study.trials)]
        assert len(study.finished) == 5
    assert not caplog.text


def test_a_damaged_header_is_written_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "study.jsonl"
    lines = study_file(path).splitlines(keepends=True)
    path.write_bytes(b"".join([b"#" + lines[0], *lines[1:]]))
    with Study(search(), path, ABOUT) as study:
        assert len(study.finished) == 4
    assert "line 1 (" in caplog.text
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize("text", ["hello", "hello\n", '{"a": 1}', '{"a": 1}\n', "[]\nnull\n", "\0" * 99])
def test_what_is_no_study_file_is_left_alone(text: str, tmp_path: Path) -> None:
    path = tmp_path / "precious.txt"
    path.write_text(text)
    with pytest.raises(SearchError, match=r"precious\.txt is no study file.*another path"):
        Study(search(), path)
    assert path.read_text() == text
    assert [*tmp_path.iterdir()] == [path]
    with pytest.raises(SearchError, match=r"cannot be written: .*; give another path"):
        Study(search(), tmp_path)


@pytest.mark.parametrize(
    ("other", "about", "message"),
    [
        (lambda: search(seed=1), ABOUT, "seed was 0, now 1"),
        (lambda: search(direction="minimize"), ABOUT, "direction was 'maximize', now 'minimize'"),
        (lambda: search(n_initial_points=3), ABOUT, "n_initial_points was 99, now 3"),
        (lambda: search(), {**ABOUT, "budget": 0.5}, r"about\.budget was 0\.6, now 0\.5"),
        (lambda: search(), {"budget": 0.6}, r"about\.images was \[1, 2\], now None; about\.metric"),
        (lambda: GpEi(Space(SPACE.axes[:2]), n_initial_points=99), ABOUT, "its parameter 'kind' is not in this search"),
        (
            lambda: GpEi(Space([*SPACE.axes, Axis("lr")]), n_initial_points=99),
            ABOUT,
            "parameter 'lr' is not in it",
        ),
        (
            lambda: GpEi(Space([Axis("a", 0, 0.5, step=0.05), *SPACE.axes[1:]]), n_initial_points=99),
            ABOUT,
            r"parameter.*was .*1.*now .*0\.5",
        ),
    ],
)
def test_another_search_is_refused_by_what_differs(
    other: Callable[[], GpEi], about: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "study.jsonl"
    data = study_file(path)
    with pytest.raises(SearchError, match=f"belongs to another search: {message}.*old settings.*another path"):
        Study(other(), path, about)
    assert path.read_bytes() == data


def reordered(*kinds: Any) -> GpEi:
    axes = [Axis("kind", choices=kinds), SPACE.axes[1], SPACE.axes[0]]
    return GpEi(Space(axes), n_initial_points=99)


def test_order_means_nothing_and_choices_may_be_added(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    with Study(search(), path, ABOUT) as study:
        before = run(study, 4)
    for kinds in ((None, "y", "x"), ("new", "x", None, "y"), ("y", "x", "new", None, 1)):
        with Study(reordered(*kinds), path, ABOUT) as study:
            assert study.trials[:4] == before
            assert [o.value for o in study.search.history[:4]] == [trial.value for trial in before]
            points = [study.search.space.params(o.point) for o in study.search.history[:4]]
            assert points == [dict(trial.params) for trial in before]
            run(study, len(study.finished) + 3)
    with pytest.raises(SearchError, match=r"another search: parameter.kind could be 1, which is no choice now"):
        Study(reordered("y", "x", "new", None, True), path, ABOUT)  # True is not 1
    assert read_study(path).header["space"][0]["choices"] == ["y", "x", "new", None, 1]


def test_a_search_learns_from_one_of_another_order(tmp_path: Path) -> None:
    study_file(tmp_path / "study.jsonl")
    here, there = (
        observations(tmp_path / "study.jsonl", s, "maximize") for s in (SPACE, reordered("y", None, "x").space)
    )
    assert [o.value for o in here] == [o.value for o in there]
    names = [SPACE.params(o.point) for o in here]
    assert names == [reordered("y", None, "x").space.params(o.point) for o in there]


@contextlib.contextmanager
def room_for(count: int, path: Path) -> Iterator[None]:
    """No file of this process may become larger than that at `path` and `count` bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 1, 40])
def test_a_full_disk_loses_nothing(room: int, tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    with Study(search(), tmp_path / "undisturbed.jsonl", ABOUT) as study:
        expected = run(study, 6)
    data = study_file(path)
    with Study(search(), path, ABOUT) as study:
        says = pytest.raises(SearchError, match=r"cannot be written.*4 trials in it are safe: make room")
        with room_for(room, path), says:
            study.next()
        assert path.read_bytes() == data
        assert len(study.trials) == 4
        (trial,) = study.next()
        data = path.read_bytes()
        with room_for(room, path), pytest.raises(SearchError, match="cannot be written"):
            study.finish(trial.number, 3.0)
        assert path.read_bytes() == data
        assert study.trials[-1].status == "running"
        assert len(study.search.history) == 4
        assert run(study, 6) == expected


def _hold(path: Path, ready: Any) -> None:
    with Study(search(), path, ABOUT):
        ready.set()
        multiprocessing.Event().wait()


def test_a_file_in_use_is_refused_until_its_user_is_gone(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    path, fork = tmp_path / "study.jsonl", multiprocessing.get_context("fork")
    data, ready = study_file(path), fork.Event()
    process = fork.Process(target=_hold, args=(path, ready), daemon=True)
    process.start()
    assert ready.wait(30)
    with pytest.raises(SearchError, match=r"in use by another search; wait for it, stop it"):
        Study(search(), path, ABOUT)
    process.kill()
    process.join()
    with Study(search(), path, ABOUT) as study:
        assert len(study.finished) == 4
        with pytest.raises(SearchError, match="in use by another search"):  # of this process
            Study(search(), path, ABOUT)
    assert path.read_bytes() == data


def test_looking_into_ones_own_file_keeps_others_out(tmp_path: Path) -> None:
    """A lock ends when the process closes any handle of the file."""
    pytest.importorskip("fcntl")
    path, fork = tmp_path / "study.jsonl", multiprocessing.get_context("fork")
    study_file(path)

    def is_refused(results: Any) -> None:
        try:
            Study(search(), path, ABOUT).close()
        except SearchError:
            results.put(True)
        else:
            results.put(False)

    with Study(search(), path, ABOUT) as study:
        assert read_study(path).trials == study.trials
        with pytest.raises(SearchError, match="in use by another search"):
            Study(search(), path, ABOUT)
        results = fork.Queue()
        fork.Process(target=is_refused, args=(results,), daemon=True).start()
        assert results.get(timeout=30)


# --- what another search found ----------------------------------------------------------------------------------------


def test_warm_start(tmp_path: Path) -> None:
    study_file(tmp_path / "wide.jsonl")
    narrow = Space([Axis("a", 0, 0.2, step=0.05), *SPACE.axes[1:]])
    found = observations(tmp_path / "wide.jsonl", narrow, "maximize")
    with Study(search(), tmp_path / "wide.jsonl", ABOUT) as wide:
        done = [trial for trial in wide.trials if trial.value is not None]
        expected = [(SPACE.point(trial.params).tolist(), trial.value) for trial in done]
    assert [(o.point.tolist(), o.value) for o in found] == expected
    assert max(o.point[0] for o in found) > 0.2  # where the narrow search cannot go

    def narrowed(prior: tuple[Observation, ...]) -> GpEi:
        return GpEi(narrow, n_initial_points=4, n_candidates=30, prior=prior)

    with Study(narrowed(found), tmp_path / "narrow.jsonl") as study:
        assert study.trials == ()
        assert study.best is None
        trials = run(study, 3)
    (tmp_path / "wide.jsonl").unlink()  # needed once: the new file has what it says
    with Study(narrowed(()), tmp_path / "narrow.jsonl") as study:
        assert run(study, 5)[:3] == trials
        resumed = study.trials
    with Study(narrowed(found), tmp_path / "undisturbed.jsonl") as study:
        assert run(study, 5) == resumed


def test_warm_start_from_what_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    study_file(path)
    with pytest.raises(SearchError, match=r"warm_start='.*study.jsonl' searched 3 parameters \(a, n, kind, ...\)"):
        observations(path, Space(SPACE.axes[:2]), "maximize")
    with pytest.raises(SearchError, match=r"warm_start=.*cannot be read"):
        observations(tmp_path / "none.jsonl", SPACE, "maximize")
    with pytest.raises(SearchError, match="was to maximize, this search is to minimize"):
        observations(path, SPACE, "minimize")
    (tmp_path / "other.txt").write_text("hello\n")
    with pytest.raises(SearchError, match="is no study file"):
        observations(tmp_path / "other.txt", SPACE, "maximize")
    logged = Space([dataclasses.replace(SPACE.axes[0], low=0.1, log=True), *SPACE.axes[1:]])
    with pytest.raises(SearchError, match=r"a=0\.0: a log scale needs numbers above 0"):
        logged.point({"a": 0.0, "n": 2, "kind": "x"}, anywhere=True)
