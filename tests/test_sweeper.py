"""The Hydra sweeper on a toy app: syntax, budgets, launchers, failures of every kind, and going on after a kill."""

import contextlib
import csv
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

from hydra_plugins.hydra_mdc_sweeper import _recorded, _results
from hydra_plugins.hydra_mdc_sweeper._params import read_params, text
from lightning_mdc.errors import SearchError, as_number
from lightning_mdc.files import read_json
from lightning_mdc.gp_ei.process import GpEi
from lightning_mdc.gp_ei.space import Axis, Space
from lightning_mdc.gp_ei.study import Study, read_metadata
from tests.kinds import everyday
from tests.sweep_app import app

APP = Path(app.__file__)
ROOT = APP.parents[2]
HERE = "tests.sweep_app.app."
XY = ("x=interval(0,1)", "y=interval(0,1)")
BUDGET = (f"hydra.sweeper.constraint.callable={HERE}cost", "hydra.sweeper.constraint.target=1")
JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
BATCHES = (*XY, *BUDGET, "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_initial_points=3")
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# Of a trial's row what has to be the same when a search is done again.
SAME = ("number", "x", "y", "cost", "value", "status")


@pytest.fixture(autouse=True)
def restored_logging():
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    yield
    root.level, root.handlers[:] = before


@pytest.fixture
def sweep(monkeypatch, tmp_path, capsys):
    """Runs a sweep in this process, in ``tmp_path / "out"``; returns its exit code and all that was printed."""

    def run(*overrides: str, n_trials: int = 4, pictures: bool = False, flags: tuple[str, ...] = ()) -> tuple[int, str]:
        script, *given = command(tmp_path / "out", *overrides, n_trials=n_trials)
        code = swept(monkeypatch, [script, *flags, *given], pictures)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    monkeypatch.chdir(tmp_path)
    return run


def swept(monkeypatch, arguments: list[str], pictures: bool = False) -> int:
    """The exit code of a sweep in this process."""
    if not pictures:  # they take longer than all the rest
        monkeypatch.setattr(_results, "draw", lambda *_: None)
    monkeypatch.setattr(sys, "argv", arguments)
    GlobalHydra.instance().clear()
    try:
        app.main()
    except app.SIGTERMException:
        raise
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def command(folder: Path, *overrides: str, n_trials: int) -> list[str]:
    given = ["-m", "hydra/sweeper=mdc_gp_ei", f"hydra.sweeper.n_trials={n_trials}", f"hydra.sweep.dir={folder}"]
    return [str(APP), *given, *overrides]


def start(folder: Path, *overrides: str, n_trials: int) -> subprocess.Popen:
    """The same as a process of its own, the leader of a group; without pictures, which take longer than the rest."""
    (folder.parent / "without").mkdir(exist_ok=True)
    (folder.parent / "without" / "matplotlib.py").write_text("raise ImportError('not here')")
    return subprocess.Popen(
        [sys.executable, *command(folder, *overrides, n_trials=n_trials)],
        env=ENV | {"PYTHONPATH": f"{folder.parent / 'without'}{os.pathsep}{ROOT}"},
        cwd=folder.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen) -> str:
    """What it printed, once it is over."""
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    return printed


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def history(folder: Path) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in SAME if name in row) for row in rows(folder)]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "study.jsonl").read_text().splitlines()]


def job(folder: Path, number: int) -> dict:
    return OmegaConf.to_container(OmegaConf.load(folder / str(number) / ".hydra" / "config.yaml"))


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory) -> Path:
    """A sweep whose history every launcher has to come to, and every sweep that was killed."""
    folder = tmp_path_factory.mktemp("reference") / "out"
    with pytest.MonkeyPatch.context() as patch:
        assert swept(patch, command(folder, *BATCHES, n_trials=6)) == 0
    assert len(history(folder)) == 6
    return folder


# --- syntax -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "axes", "override"),
    [
        ("x=interval(0.1,1)", [Axis("x", 0.1, 1.0)], "x=0.1"),
        ("x=tag(log,interval(1e-5,1e-2))", [Axis("x", 1e-5, 1e-2, log=True)], "x=1e-05"),
        ("x=int(interval(1,8))", [Axis("x", 1, 8, step=1, integer=True)], "x=1"),
        ("x=tag(log,int(interval(1,8)))", [Axis("x", 1, 8, step=1, log=True, integer=True)], "x=1"),
        ("x=range(1,10)", [Axis("x", 1, 9, step=1, integer=True)], "x=1"),
        ("x=range(1,10,2)", [Axis("x", 1, 9, step=2, integer=True)], "x=1"),
        ("x=range(1,9,2)", [Axis("x", 1, 7, step=2, integer=True)], "x=1"),
        ("x=range(9,0,-4)", [Axis("x", 1, 9, step=4, integer=True)], "x=1"),
        ("x=shuffle(range(3))", [Axis("x", 0, 2, step=1, integer=True)], "x=0"),
        ("x=choice(a,b,c)", [Axis("x", choices=("a", "b", "c"))], "x=a"),
        ("x=a,b,c", [Axis("x", choices=("a", "b", "c"))], "x=a"),
        ("x=shuffle(a,b,c)", [Axis("x", choices=("a", "b", "c"))], "x=a"),
        ("x=null,1,1.0,true,'1'", [Axis("x", choices=(None, 1, 1.0, True, "1"))], "x=null"),
        ("x=choice('1',2)", [Axis("x", choices=("1", 2))], "x='1'"),
        ("x=choice([1,a],[])", [Axis("x", choices=([1, "a"], []))], "x=[1,a]"),
        ("+x=a,b", [Axis("x", choices=("a", "b"))], "+x=a"),
        ("db@src=a,b", [Axis("db@src", choices=("a", "b"))], "db@src=a"),
        ("x=tag(x2,interval(0,1))", [Axis("x.0", 0, 1), Axis("x.1", 0, 1)], "x=[0.0,0.0]"),
        ("++x=tag(x1,choice(a,b))", [Axis("x.0", choices=("a", "b"))], "++x=[a]"),
        ("x=tag(log,x2,interval(1,2))", [Axis(f"x.{i}", 1, 2, log=True) for i in (0, 1)], "x=[1.0,1.0]"),
    ],
)
def test_sweep_syntax_becomes_axes_and_overrides(line, axes, override):
    params = read_params({}, [line])
    assert list(params.axes) == axes
    assert params.overrides({axis.name: axis.value(axis.low) for axis in params.axes}) == [override]


def test_a_range_of_floats_has_the_numbers_that_hydra_would_hand_out():
    (axis,) = read_params({}, ["x=range(-0.3,0.5,0.1)"]).axes
    numbers = [axis.value(axis.low + k * axis.step) for k in range(8)]
    assert numbers == [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4]
    assert axis.high == pytest.approx(0.4)
    assert read_params({}, ["x=range(0.1,0.4,0.1)"]).axes[0].high == pytest.approx(0.3)


def test_the_command_line_adds_to_params_and_replaces():
    params = read_params(
        {"x": "interval(0,1)", "y": 3, "kind": "a,b", "lr": 1e-5, "keep": [1, "a b"], "z": "interval(0,1)"},
        ["kind=c", "y=int(interval(1,8))", "name=it is me", "~optimizer", "++new=null", "+z=5"],
    )
    assert [axis.name for axis in params.axes] == ["x", "y"]
    assert params.overrides({"x": 0.25, "y": 2}) == [
        "x=0.25",
        "y=2",
        "kind=c",
        "lr=1e-05",
        "keep=[1,'a b']",
        "+z=5",
        "name=it is me",
        "~optimizer",
        "++new=null",
    ]
    assert params.fixed == {"kind": "c", "lr": 1e-5, "keep": [1, "a b"], "z": 5, "name": "it is me", "new": None}


ODD = [
    "",
    " ",
    "a b",
    "1",
    "1.5",
    "1e5",
    "true",
    "NULL",
    "nan",
    "it's",
    '"',
    "'\"",
    "\\",
    "\\\\'",
    "a\\",
    "a=b,c",
    "[1]",
]
ODD += [
    "{a:1}",
    "interval(0,1)",
    "tab\there",
    "line\nbreak",
    "é漢",
    "a:b",
    "/x/y-z.txt",
    "$x",
    "~",
    "+",
    "@",
    "#!",
    "-1",
    "a_1",
]


@pytest.mark.parametrize("seed", range(3))
def test_values_come_back_unchanged_through_hydras_grammar(seed):
    rng = random.Random(seed)
    words = ["".join(rng.choices("ab1.-\\'\"=,:()[]{} \t", k=rng.randint(1, 8))) for _ in range(150)]
    numbers = [np.float64(rng.uniform(-1, 1) * 10 ** rng.randint(-300, 300)).item() for _ in range(100)]
    others = [True, False, None, 0, -7, 1e16, 5e-324, [1, "a b", None, [0.1]], {"k": "v w", "l": [True]}]
    parser = OverridesParser.create()
    for value in [*ODD, *words, *numbers, *others, [*ODD, *words]]:
        read = parser.parse_overrides([f"x={text(value)}"])[0].value()
        assert read == value
        assert type(read) is type(value)


def test_choices_of_odd_text_come_back_through_the_sweep(sweep, tmp_path):
    names = ["it's, [1]", "a=b", "true", "\\"]
    assert sweep("kind=choice(" + ",".join(map(text, names)) + ")", n_trials=9)[0] == 0
    found = [job(tmp_path / "out", number)["kind"] for number in range(4)]
    assert sorted(found) == sorted(names)
    assert sorted(row["kind"] for row in rows(tmp_path / "out")) == sorted(names)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("x=1", "nothing to search"),
        ("x=interval(1,0)", r"x: the range \[1.0, 0.0\] is empty"),
        ("x=range(5,5)", r"range\(5,5\): the range is empty; mind that its end"),
        ("x=range(0,1e9)", "more than 100000 values; give int"),
        ("x=tag(log,interval(0,1))", "a log scale needs numbers above 0"),
        ("x=tag(log,choice(1,2))", "a choice has no scale"),
        ("x=tag(fast,interval(0,1))", r"tags \['fast'\]: expected log"),
        ("x=tag(x0,interval(0,1))", r"tags \['x0'\]"),
        ("x=tag(x2,x3,interval(0,1))", r"tags \['x2', 'x3'\]"),
        ("x=tag(log,tag(x2,interval(1,2)))", "tag once, outermost"),
        ("x=int(tag(log,range(1,9)))", "tag once, outermost"),
        ("x=glob(*)", r"glob\(\.\.\.\) depends on what files there are"),
        ("x=choice(a,a)", "names a value twice"),
        ("x=choice(1,nan)", "nan is no value to choose"),
    ],
)
def test_what_cannot_be_searched_is_refused(line, says):
    with pytest.raises(SearchError, match=says):
        read_params({}, [line])


@pytest.mark.parametrize(
    ("value", "instead"),
    [
        ("choice(null,1)", "x=null,1"),
        ("choice(1, 2, null)", "x=1,2,null"),
        ("shuffle(choice(null,a))", "x=null,1"),
        ("sort(null,1)", "x=null,1"),
    ],
)
@pytest.mark.parametrize("place", ["conf", "command line"])
def test_a_null_in_a_function_of_hydras_has_a_remedy(value, instead, place):
    given = ({"x": value}, []) if place == "conf" else ({}, [f"x={value}"])
    with pytest.raises(SearchError, match=re.escape(f"x={value}: Hydra's functions take no null; list")) as caught:
        read_params(*given)
    assert str(caught.value).endswith(f": {instead}")
    assert None in read_params({}, [instead]).axes[0].choices


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("hydra.sweeper.sampler.seed=3", "hydra.sweeper.sampler={'seed': 3} is a key of Optuna's sweeper"),
        (
            "+hydra.sweeper.sampler._target_=optuna.samplers.TPESampler",
            "n_initial_points and xi are hydra.sweeper.seed",
        ),
        ("hydra.sweeper.storage=sqlite:///a.db", "leave it out; the file of trials is hydra.sweeper.study"),
        ("hydra.sweeper.study_name=mine", "leave it out; the file of trials is hydra.sweeper.study"),
        ("hydra.sweeper.search_space=x", "what is searched is hydra.sweeper.params"),
    ],
)
def test_keys_of_optunas_sweeper_are_refused_with_ours(sweep, tmp_path, given, says):
    code, printed = sweep(*XY, given)
    assert code == 1
    assert says in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "out" / "study.jsonl").exists()


def test_keys_of_optunas_sweeper_that_say_nothing_are_let_be(sweep):
    """As copied from a file of it."""
    code, _ = sweep(*XY, "hydra.sweeper.storage=null", "hydra.sweeper.study_name=null", n_trials=1)
    assert code == 0


def test_hydra_says_what_it_cannot_read():
    with pytest.raises(OverrideParseException, match="missing a required argument: 'end'"):
        read_params({"x": "interval(0)"}, [])


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3, 3.0), (0.5, 0.5), (np.float32(0.5), 0.5), (np.int64(2), 2.0), (torch.tensor(0.25), 0.25), (np.array(1.0), 1.0)]
    + [(value, None) for value in (None, True, np.True_, "1", b"1", {}, [1.0], (1.0,), np.ones(2), torch.ones(2), 1j)],
)
def test_what_counts_as_a_number(value, expected):
    assert as_number(value) == expected


# --- a sweep from start to end ----------------------------------------------------------------------------------------


def test_a_sweep_on_a_budget(sweep, tmp_path):
    code, printed = sweep(
        *XY, "n=int(interval(1,8))", *BUDGET, "hydra.sweeper.constraint.tolerance=0.01", n_trials=12, pictures=True
    )
    assert code == 0
    out = tmp_path / "out"
    trials = rows(out)
    assert [row["number"] for row in trials] == [row["folder"] for row in trials] == [str(i) for i in range(12)]
    for number, row in enumerate(trials):
        given = job(out, number)
        assert (given["x"], given["y"], given["n"]) == (float(row["x"]), float(row["y"]), int(row["n"]))
        assert 0.99 <= given["x"] + given["y"] + given["n"] / 10 <= 1
        assert float(row["value"]) == app.distance(OmegaConf.create(given))
        assert row["status"] == "done"
        assert float(row["cost"]) == pytest.approx(given["x"] + given["y"] + given["n"] / 10)
        assert float(row["seconds"]) < 10
    values = [float(row["value"]) for row in trials]
    # The best on this line is 0.1 at x + y = 0.6, n = 4; random points are worth 0.4 on average.
    assert min(values) < 0.2
    best = trials[values.index(min(values))]
    results = OmegaConf.to_container(OmegaConf.load(out / "optimization_results.yaml"))
    assert results == {
        "name": "mdc_gp_ei",
        "best_params": {"x": float(best["x"]), "y": float(best["y"]), "n": int(best["n"])},
        "best_value": min(values),
        "best_trial": int(best["number"]),
        "best_dir": best["folder"],
    }
    for name in ("progress", "cost", "dependence"):
        assert (out / f"{name}.png").stat().st_size > 10_000
    assert not list(out.glob(".*"))  # nothing half-written
    assert (out / "multirun.yaml").exists()
    pattern = r"trial 11: \S+, best \S+ \(trial \d+\), cost 0\.99\d+|1; 12 of 12"
    assert re.search(pattern, printed)
    assert re.search(r"trial 4: .* 5 of 12, about \d+ s left", printed)


def test_a_sweep_finds_the_best_also_when_more_is_better(sweep, tmp_path):
    assert (
        sweep(*XY, "hydra.sweeper.direction=maximize", "hydra.sweeper.n_initial_points=4", n_trials=10, pictures=True)[
            0
        ]
        == 0
    )
    values = [float(row["value"]) for row in rows(tmp_path / "out")]
    results = OmegaConf.load(tmp_path / "out" / "optimization_results.yaml")
    assert results.best_value == max(values) > 0.7  # 0.98 in the corner x = 1, y = 0
    assert not (tmp_path / "out" / "cost.png").exists()


def test_all_kinds_of_parameters_at_once(sweep, tmp_path):
    overrides = ["lr=tag(log,interval(1e-5,1e-1))", "n=range(1,8,3)", "kind=a,null,'1'", "flag=true,false"]
    overrides += ["optimizer=sgd,adam", "keep=tag(x3,interval(0.1,1))", "+new.thing=choice([1,2],x)", "y=0.7"]
    assert sweep(*overrides, n_trials=8)[0] == 0
    jobs = [job(tmp_path / "out", number) for number in range(8)]
    for given, row in zip(jobs, rows(tmp_path / "out"), strict=True):
        assert 1e-5 <= given["lr"] <= 1e-1
        assert given["n"] in (1, 4, 7)
        assert given["kind"] in ("a", None, "1")
        assert given["flag"] in (True, False)
        assert given["optimizer"]["name"] in ("sgd", "adam")
        assert [0.1 <= keep <= 1 for keep in given["keep"]] == [True] * 3
        assert given["keep"] == [float(row[f"keep.{i}"]) for i in range(3)]
        assert given["new"]["thing"] in ([1, 2], "x")
        assert given["y"] == 0.7
    assert {given["n"] for given in jobs} == {1, 4, 7}
    assert {given["flag"] for given in jobs} == {True, False}
    assert min(given["lr"] for given in jobs) < 1e-3 < max(given["lr"] for given in jobs)
    best = OmegaConf.to_container(OmegaConf.load(tmp_path / "out" / "optimization_results.yaml"))["best_params"]
    assert len(best["keep"]) == 3


def test_params_of_the_config_and_dotted_keys(sweep, tmp_path):
    (tmp_path / "conf" / "hydra" / "sweeper").mkdir(parents=True)
    (tmp_path / "conf" / "hydra" / "sweeper" / "mine.yaml").write_text(
        "defaults: [mdc_gp_ei]\nparams:\n  x: interval(0, 1)\n  optimizer.name: choice(a, b)\n  y: 0.25\n"
        "  lr: ${lr}\nn_trials: 3\nseed: 5\n"
    )
    assert sweep("hydra/sweeper=mine", f"hydra.searchpath=[file://{tmp_path / 'conf'}]", "kind=b", n_trials=2)[0] == 0
    jobs = [job(tmp_path / "out", number) for number in range(2)]
    assert [(given["y"], given["kind"], given["lr"]) for given in jobs] == [(0.25, "b", 0.001)] * 2
    assert {given["optimizer"]["name"] for given in jobs} <= {"a", "b"}


def test_a_group_without_a_default_can_be_searched(sweep, tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "undecided.yaml").write_text("defaults: [config, {optimizer@other: '???'}]\n")
    given = ("optimizer@other=sgd,adam", *XY, *BUDGET, "lr=0.1", "hydra.sweeper.constraint.target=2")
    config = ("--config-dir", str(tmp_path / "conf"), "--config-name", "undecided")
    assert sweep(*given, f"hydra.sweeper.on_end={HERE}finish", flags=config)[0] == 0
    assert {job(tmp_path / "out", number)["other"]["name"] for number in range(4)} == {"sgd", "adam"}
    assert (tmp_path / "out" / "finished.txt").read_text().endswith("0.1")


def test_the_callable_may_be_a_function_or_a_class_of_one_or_of_many(sweep, tmp_path):
    keep = ("keep=tag(x3,interval(0.1,1))", "hydra.sweeper.n_candidates=100", "hydra.sweeper.constraint.target=0.6")
    keep += (f"hydra.sweeper.constraint.callable={HERE}cost_of_keep",)
    found = []
    for name, vectorized in (("one", "false"), ("many", "true")):
        again = (f"hydra.sweeper.constraint.vectorized={vectorized}", f"hydra.sweep.dir={name}")
        assert sweep(*keep, *again, "hydra.sweeper.n_initial_points=2", n_trials=3)[0] == 0
        trials = rows(tmp_path / name)
        found.append([[float(row[f"keep.{i}"]) for i in range(3)] for row in trials])
        assert max(sum(keep) / 3 for keep in found[-1]) <= 0.6
    assert np.allclose(*found)


@pytest.mark.parametrize("vectorized", ["false", "true"])
def test_what_means_the_same_is_tried_once(sweep, tmp_path, vectorized):
    given = ("x=interval(0,0.95)", "y=range(0.1,0.4,0.1)", "n=1", f"hydra.sweeper.constraint.callable={HERE}Tenths")
    given += ("hydra.sweeper.constraint.target=0.65", f"hydra.sweeper.constraint.vectorized={vectorized}")
    code, printed = sweep(*given, n_trials=20)
    assert code == 0
    # All on the budget: x + y = 0.5, for the class was made from the config with n = 1.
    found = sorted((float(row["y"]), float(row["x"])) for row in rows(tmp_path / "out"))
    assert found == [(0.1, pytest.approx(0.4)), (0.2, pytest.approx(0.3)), (0.3, pytest.approx(0.2))]
    assert rows(tmp_path / "out")[0]["y"] == "0.3"  # what the class wants to be tried first
    assert float(rows(tmp_path / "out")[0]["x"]) == pytest.approx(0.2)
    assert "the search ends after 3 trials: there is no other point to try" in printed


def test_the_callable_may_name_several_trials_to_begin_with(sweep, tmp_path):
    given = ("x=interval(0,0.95)", "y=range(0.1,0.4,0.1)", "n=1", f"hydra.sweeper.constraint.callable={HERE}TwoStarts")
    given += ("hydra.sweeper.constraint.target=0.65", "hydra.sweeper.constraint.vectorized=true")
    assert sweep(*given, n_trials=2)[0] == 0
    found = [(float(row["x"]), float(row["y"])) for row in rows(tmp_path / "out")]
    assert found == [(pytest.approx(0.2), 0.3), (pytest.approx(0.4), 0.1)]


def test_fixed_parameters_are_priced_too(sweep, tmp_path):
    assert (
        sweep(*XY, "lr=0.1", f"hydra.sweeper.constraint.callable={HERE}cost", "hydra.sweeper.constraint.target=2")[0]
        == 0
    )
    assert all(float(row["x"]) + float(row["y"]) <= 1 for row in rows(tmp_path / "out"))


def test_after_the_last_trial_the_app_is_called(sweep, tmp_path):
    assert sweep("x=interval(0,1)", "lr=0.01", f"hydra.sweeper.on_end={HERE}finish", n_trials=3)[0] == 0
    best = OmegaConf.load(tmp_path / "out" / "optimization_results.yaml").best_trial
    assert (tmp_path / "out" / "finished.txt").read_text() == f"3 {best} 0.01"


def test_a_search_learns_from_an_earlier_one(sweep, tmp_path):
    assert sweep(*XY, *BUDGET, n_trials=8)[0] == 0
    earlier = [f"hydra.sweeper.warm_start={tmp_path / 'out' / 'study.jsonl'}", "hydra.sweeper.constraint.target=1.05"]
    code, printed = sweep(*XY, BUDGET[0], *earlier, "hydra.sweep.dir=warm", n_trials=3)
    assert code == 0
    assert "8 trials of" in printed
    values = [float(row["value"]) for row in rows(tmp_path / "warm")]
    assert min(values) < 0.01  # the best of all points, 0, costs 1: found at once
    # It is not read again when the search goes on, and need not be there any more.
    (tmp_path / "out" / "study.jsonl").unlink()
    assert sweep(*XY, BUDGET[0], *earlier, "hydra.sweep.dir=warm", n_trials=4)[0] == 0
    assert [float(row["value"]) for row in rows(tmp_path / "warm")][:3] == values


def test_without_matplotlib_there_are_no_pictures(sweep, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "lightning_mdc.figures.search", raising=False)
    monkeypatch.delitem(sys.modules, "lightning_mdc.app.report", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for name in [name for name in sys.modules if name.startswith("lightning_mdc.app.report.")]:
        monkeypatch.delitem(sys.modules, name)
    code, printed = sweep("x=interval(0,1)", n_trials=2, pictures=True)
    assert code == 0
    assert "pictures are left out" in printed
    assert not list((tmp_path / "out").glob("*.png"))


# --- what goes wrong, in the words a user sees ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["nosuch=interval(0,1)"], "Could not override 'nosuch'"),
        (["optimizer=sgd,nosuch"], "Could not find 'optimizer/nosuch'"),
        (["x=1", "y=2"], "there is nothing to search: none of the overrides is a sweep"),
        (["x=range(2,2)"], "x=range(2,2): the range is empty"),
        (["optimizer=glob(*)"], "optimizer=glob(*): glob(...) depends on what files there are"),
        (["x=tag(deep,interval(0,1))"], "tags ['deep']: expected log"),
        ([*XY, "hydra.sweeper.direction=max"], "direction='max': expected 'maximize' or 'minimize'"),
        ([*XY, "hydra.sweeper.n_trials=0"], "n_trials=0: expected a whole number of at least 1"),
        (
            [*XY, "hydra.sweeper.n_jobs=5"],
            "n_jobs=5: expected no more than n_trials, a number of at least 1 and at most 4",
        ),
        (
            [*XY, "hydra.sweeper.max_failure_rate=2"],
            "max_failure_rate=2.0: expected a share of the trials, a number of at least 0 and at most 1",
        ),
        ([*XY, "hydra.sweeper.n_trails=3"], "Key 'n_trails' not in 'MdcGpEiConf'"),
        ([*XY, BUDGET[0]], "needs constraint.target: the most it may return"),
        ([*XY, BUDGET[1]], "constraint.target is given, but no constraint.callable"),
        (
            [*XY, *BUDGET, "hydra.sweeper.constraint.target=-1"],
            "target=-1 is below the smallest cost inside the bounds, 0",
        ),
        (
            [*XY, BUDGET[0], "hydra.sweeper.constraint.target=3", "hydra.sweeper.constraint.tolerance=0.5"],
            "target=3 with tolerance=0.5 is above the largest cost inside the bounds, 2",
        ),
        (
            [*XY, "hydra.sweeper.constraint.callable=no.such.thing", BUDGET[1]],
            "hydra.sweeper.constraint.callable='no.such.thing' cannot be imported (ModuleNotFoundError",
        ),
        ([*XY, f"hydra.sweeper.constraint.callable={HERE}not_callable", BUDGET[1]], "is no function or class, but int"),
        ([*XY, f"hydra.sweeper.on_end={HERE}nosuch"], "on_end='tests.sweep_app.app.nosuch' cannot be imported"),
        (
            [*XY, f"hydra.sweeper.constraint.callable={HERE}broken", BUDGET[1]],
            "app.broken raised ZeroDivisionError: no price for {'x': ",
        ),
        (
            [*XY, f"hydra.sweeper.constraint.callable={HERE}wordy", BUDGET[1]],
            "app.wordy returned 'cheap', no number, for {'x': ",
        ),
        (
            [
                *XY,
                *BUDGET,
                "hydra.sweeper.constraint.vectorized=true",
                f"hydra.sweeper.constraint.callable={HERE}wordy",
            ],
            "trials at once and returned 'cheap'; expected",
        ),
        (
            [
                *XY,
                *BUDGET,
                "hydra.sweeper.constraint.vectorized=true",
                f"hydra.sweeper.constraint.callable={HERE}Uneven",
            ],
            "app.Uneven.first returned arrays of different lengths, [2, 1]",
        ),
        ([*XY, "hydra.sweeper.warm_start=nowhere.jsonl"], "warm_start='nowhere.jsonl' cannot be read"),
        ([*XY, "hydra.sweeper.study=."], "cannot be read: "),
    ],
)
def test_what_is_asked_for_in_vain_is_said_before_any_trial(sweep, tmp_path, overrides, says):
    code, printed = sweep(*overrides)
    assert code == 1
    assert says in printed
    assert "Traceback" not in printed
    assert len([line for line in printed.splitlines() if line]) < 12
    assert not (tmp_path / "out" / "0").exists()
    assert not (tmp_path / "out" / "study.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["hydra.sweeper.constraint.target=1.1"], "about.constraint.target was 1.0, now 1.1"),
        (["x=interval(0,2)"], "high was 1.0, now 2.0"),
        (["n=range(3)"], "parameter 'n' is not in it"),
        (["lr=0.5"], "about.fixed.lr was None, now '0.5'"),
        (["hydra.sweeper.seed=1"], "seed was 0, now 1"),
    ],
)
def test_a_study_of_another_search_is_left_alone(sweep, tmp_path, in_one_process, change, says):
    shutil.copytree(in_one_process, tmp_path / "out")
    before = (tmp_path / "out" / "study.jsonl").read_bytes()
    code, printed = sweep(*BATCHES, *change, n_trials=7)
    assert code == 1
    assert "belongs to another search" in printed
    assert says in printed
    assert "Traceback" not in printed
    assert (tmp_path / "out" / "study.jsonl").read_bytes() == before


def test_the_order_of_choices_and_parameters_means_nothing_and_a_choice_may_grow(sweep, tmp_path):
    assert sweep("x=interval(0,1)", "kind=choice(b,a)", n_trials=3)[0] == 0
    first = [(row["x"], row["kind"], row["value"]) for row in rows(tmp_path / "out")]
    code, printed = sweep("kind=choice(c,a,b)", "x=interval(0,1)", n_trials=6)
    assert code == 0, printed
    grown = rows(tmp_path / "out")
    assert [(row["x"], row["kind"], row["value"]) for row in grown[:3]] == first
    code, printed = sweep("x=interval(0,1)", "kind=choice(a,b,c)", n_trials=7)  # and again, whatever was tried of c
    assert code == 0, printed
    assert len(rows(tmp_path / "out")) == 7
    code, printed = sweep("x=interval(0,1)", "kind=choice(a,b)", n_trials=8)
    assert code == 1
    assert "belongs to another search: parameter.kind could be 'c', which is no choice now" in printed


def test_a_file_that_is_no_study_is_left_alone(sweep, tmp_path):
    (tmp_path / "notes.txt").write_text("not a study\n")
    code, printed = sweep(*XY, "hydra.sweeper.study=notes.txt")
    assert code == 1
    assert "notes.txt is no study file" in printed
    assert (tmp_path / "notes.txt").read_text() == "not a study\n"


@pytest.mark.parametrize(
    ("kind", "returned"),
    [("none", "None"), ("text", "'good' (str)"), ("true", "True (bool)"), ("dict", "{'a': 1.0} (dict)")],
)
def test_an_app_that_returns_no_number_is_not_a_failed_trial(sweep, tmp_path, kind, returned):
    given = (*XY, f"trouble=[{kind}-1]", f"lab={tmp_path}")
    code, printed = sweep(*given, n_trials=2)
    assert code == 1
    assert f"trial 1 returned {returned}, not a number; return a float from the @hydra.main function" in printed
    assert "Traceback" not in printed
    told = [line for line in lines(tmp_path / "out") if "told" in line]
    assert [line["told"] for line in told] == [0]
    # Once the app is mended the search goes on with that very trial.
    (tmp_path / "mended").touch()
    assert sweep(*given, n_trials=2)[0] == 0
    assert [row["status"] for row in rows(tmp_path / "out")] == ["done"] * 2
    assert (tmp_path / "runs.txt").read_text().count("begin 1\n") == 2


@pytest.mark.parametrize(
    ("kind", "note"),
    [
        ("raise", "ValueError: trial 1 went wrong"),
        ("nan", "its value is nan"),
        ("inf", "its value is inf"),
        ("quit", "RuntimeError: the app called sys.exit(2)"),
    ],
)
def test_a_share_of_the_trials_may_fail(sweep, tmp_path, kind, note):
    given = (*XY, f"trouble=[{kind}-1]")
    # One of two failed when it is looked at after trial 1.
    assert sweep(*given, "hydra.sweeper.max_failure_rate=0.5")[0] == 0
    trials = rows(tmp_path / "out")
    assert [row["status"] for row in trials] == ["done", "failed", "done", "done"]
    assert [row["note"] for row in trials] == ["", note, "", ""]
    assert trials[1]["value"] == ""
    record = json.loads((tmp_path / "out" / "1" / ".mdc_result.json").read_text())
    assert (kind in ("raise", "quit")) == ("Traceback" in record.get("traceback", ""))


def test_too_many_failed_trials_end_the_sweep(sweep, tmp_path):
    given = (*XY, "trouble=[raise-1]", "hydra.sweeper.max_failure_rate=")
    code, printed = sweep(*given[:-1], given[-1] + "0.49")
    assert code == 1
    says = "1 of 2 trials failed, more than max_failure_rate=0.49 allows: trial 1: ValueError: trial 1 went wrong"
    assert says in printed
    assert "Traceback" not in printed
    assert [row["status"] for row in rows(tmp_path / "out")] == ["done", "failed"]  # what is known is kept
    # It goes on when more may fail, and not before.
    code, printed = sweep(*given[:-1], given[-1] + "0.4")
    assert code == 1
    assert not (tmp_path / "out" / "2").exists()
    assert sweep(*given[:-1], given[-1] + "0.6", n_trials=3)[0] == 0
    assert [row["status"] for row in rows(tmp_path / "out")] == ["done", "failed", "done"]


def test_no_trial_need_succeed(sweep, tmp_path):
    given = (*XY, "trouble=[raise-0,raise-1]", "hydra.sweeper.max_failure_rate=1")
    code, printed = sweep(*given, n_trials=2)
    assert code == 0
    assert "no trial succeeded" in printed
    assert OmegaConf.load(tmp_path / "out" / "optimization_results.yaml").best_params is None


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_search_goes_on_with_more_trials_where_it_was(sweep, tmp_path):
    assert sweep(*XY, *BUDGET, "hydra.sweep.dir=whole", n_trials=6)[0] == 0
    assert sweep(*XY, *BUDGET, n_trials=3)[0] == 0
    old = {path: path.stat().st_mtime_ns for i in range(3) for path in (tmp_path / "out" / str(i)).rglob("*")}
    study = f"hydra.sweeper.study={tmp_path / 'out' / 'study.jsonl'}"
    # With another folder, as it would be by default; the study knows better.
    code, printed = sweep(*XY, *BUDGET, study, "hydra.sweep.dir=elsewhere", n_trials=6)
    assert code == 0
    assert f"going on with {tmp_path / 'out' / 'study.jsonl'}: 3 trials" in printed
    assert history(tmp_path / "out") == history(tmp_path / "whole")
    assert old == {path: path.stat().st_mtime_ns for path in old}
    assert not (tmp_path / "elsewhere").exists()
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == set("012345")
    # And again, with nothing left to do.
    before = (tmp_path / "out" / "study.jsonl").read_bytes()
    assert sweep(*XY, *BUDGET, n_trials=6)[0] == 0
    assert (tmp_path / "out" / "study.jsonl").read_bytes() == before


def test_a_folder_that_was_moved_goes_on_where_it_is_now(sweep, tmp_path):
    assert sweep(*XY, n_trials=2)[0] == 0
    (tmp_path / "out").rename(tmp_path / "moved here")
    assert sweep(*XY, "hydra.sweeper.study='moved here/study.jsonl'", n_trials=3)[0] == 0
    assert len(rows(tmp_path / "moved here")) == 3
    assert (tmp_path / "moved here" / "2" / ".hydra" / "config.yaml").exists()
    assert not (tmp_path / "out").exists()


def test_a_study_may_lie_elsewhere(sweep, tmp_path):
    assert sweep(*XY, "hydra.sweeper.study=kept/a.jsonl", n_trials=2)[0] == 0
    assert not (tmp_path / "out" / "study.jsonl").exists()
    assert sweep(*XY, "hydra.sweeper.study=kept/a.jsonl", "hydra.sweep.dir=other", n_trials=3)[0] == 0
    assert len(rows(tmp_path / "out")) == 3
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("kind", "error"), [("interrupt", KeyboardInterrupt), ("terminate", app.SIGTERMException)])
def test_an_interrupted_sweep_says_how_to_go_on(sweep, tmp_path, kind, error):
    given = (*XY, f"trouble=[{kind}-2]", f"lab={tmp_path}")
    with pytest.raises(error) as stop:
        sweep(*given, n_trials=5)
    study = tmp_path / "out" / "study.jsonl"
    says = f"interrupted: 2 trials, 1 not over; to go on, add hydra.sweeper.study={study} to the same command."
    assert says in stop.value.__notes__[-1]
    (tmp_path / "mended").touch()
    assert sweep(*given, n_trials=5)[0] == 0
    begun = [line for line in (tmp_path / "runs.txt").read_text().splitlines() if line.startswith("begin")]
    assert begun == [f"begin {i}" for i in (0, 1, 2, 2, 3, 4)]
    (tmp_path / "lab2").mkdir()
    (tmp_path / "lab2" / "mended").touch()
    whole = (*XY, f"trouble=[{kind}-2]", f"lab={tmp_path / 'lab2'}", "hydra.sweep.dir=whole")
    assert sweep(*whole, n_trials=5)[0] == 0
    assert history(tmp_path / "out") == history(tmp_path / "whole")


def interrupted(sweep, tmp_path: Path, *overrides: str, n_jobs: int) -> tuple[str, ...]:
    """A sweep that stopped in the middle of a batch, and its overrides; from now on nothing goes wrong."""
    given = (*XY, f"trouble=[interrupt-{n_jobs - 1}]", f"lab={tmp_path}", f"hydra.sweeper.n_jobs={n_jobs}", *overrides)
    with pytest.raises(KeyboardInterrupt):
        sweep(*given, n_trials=n_jobs + 1)
    (tmp_path / "mended").touch()
    (tmp_path / "runs.txt").unlink()
    return given


def begun(tmp_path: Path) -> list[int]:
    return [int(line.split()[1]) for line in (tmp_path / "runs.txt").read_text().splitlines() if "begin" in line]


def test_trials_that_had_ended_are_taken_from_their_folders(sweep, tmp_path):
    given = interrupted(sweep, tmp_path, n_jobs=4)
    (tmp_path / "out" / "1" / ".mdc_result.json").unlink()
    assert [line for line in lines(tmp_path / "out") if "told" in line] == []
    code, printed = sweep(*given, n_trials=5)
    assert code == 0
    assert begun(tmp_path) == [1, 3, 4]  # each in its old folder, though there is a gap between their numbers
    assert [row["folder"] for row in rows(tmp_path / "out")] == list("01234")
    assert [line["told"] for line in lines(tmp_path / "out") if "told" in line] == [0, 1, 2, 3, 4]
    for number, row in enumerate(rows(tmp_path / "out")):
        assert job(tmp_path / "out", number)["x"] == float(row["x"])
    assert "trial 0 ended while the sweep did not run" in printed


@pytest.mark.parametrize("change", [{"study": "of another"}, {"trial": 1}, {"seconds": None}])
def test_a_record_that_is_not_of_this_trial_does_not_count(sweep, tmp_path, change):
    given = interrupted(sweep, tmp_path, n_jobs=3)
    path = tmp_path / "out" / "0" / ".mdc_result.json"
    record = json.loads(path.read_text()) | change | {"value": -5.0}
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))
    assert sweep(*given, n_trials=4)[0] == 0
    assert begun(tmp_path) == [0, 2, 3]
    assert min(float(row["value"]) for row in rows(tmp_path / "out")) >= 0


def test_records_of_an_earlier_sweep_in_the_same_folder_do_not_count(sweep, tmp_path):
    assert sweep(*XY, n_trials=3)[0] == 0
    (tmp_path / "out" / "study.jsonl").unlink()
    given = interrupted(sweep, tmp_path, "hydra.sweeper.seed=3", n_jobs=3)
    assert sweep(*given, n_trials=4)[0] == 0
    assert begun(tmp_path) == [2, 3]
    for number, row in enumerate(rows(tmp_path / "out")):
        assert job(tmp_path / "out", number)["x"] == float(row["x"])
        assert float(row["value"]) == app.distance(OmegaConf.create(job(tmp_path / "out", number)))


def test_folders_of_the_users_own_making_are_found_again(sweep, tmp_path):
    own = "hydra.sweep.subdir=trial_${hydra.job.num}_${hydra:job.override_dirname}"
    exclude = "hydra.job.config.override_dirname.exclude_keys=[lab,y]"
    given = interrupted(sweep, tmp_path, own, exclude, "hydra.job.chdir=true", n_jobs=3)
    assert sweep(*given, n_trials=4)[0] == 0
    assert begun(tmp_path) == [2, 3]
    for row in rows(tmp_path / "out"):
        assert row["folder"].startswith(f"trial_{row['number']}_")
        assert f"x={row['x']}" in row["folder"]
        assert (tmp_path / "out" / row["folder"] / ".mdc_result.json").exists()


def test_folders_that_only_jobs_know_are_left_out(sweep, tmp_path):
    given = (*XY, "hydra.sweep.subdir=${now:%H}-${hydra.job.id}")
    assert sweep(*given, n_trials=2)[0] == 0
    assert [(row["status"], row["folder"]) for row in rows(tmp_path / "out")] == [("done", "")] * 2
    assert OmegaConf.load(tmp_path / "out" / "optimization_results.yaml").best_dir is None


def test_a_trial_whose_process_lives_is_told_from_one_whose_process_died(tmp_path):
    script = (
        "import sys, types; from pathlib import Path; from hydra_plugins.hydra_mdc_sweeper import _recorded as r\n"
        "path = Path(sys.argv[1]); handle = r._write(path, {'trial': 0}, lock=True); print('begun', flush=True)\n"
        "input()\n"
    )
    path = tmp_path / ".mdc_result.json"
    process = subprocess.Popen(
        [sys.executable, "-c", script, path], env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    assert _recorded.is_alive(path)
    assert not _recorded.is_over(read_json(path))
    process.kill()
    process.wait()
    assert not _recorded.is_alive(path)


def test_the_metadata_of_a_damaged_study_can_be_read(tmp_path):
    search = GpEi(Space([Axis("x")]))
    with Study(search, tmp_path / "study.jsonl") as study:
        study.add_metadata(folder="a", mark=1)
        (trial,) = study.next()
        study.finish(trial.number, 0.5)
        study.add_metadata(folder="b")
    with (tmp_path / "study.jsonl").open("a") as file:
        file.write('nonsense\n{"metadata": 3}\n{"metadata": {"fol')
    assert read_metadata(tmp_path / "study.jsonl") == {"folder": "b", "mark": 1}
    with Study(GpEi(Space([Axis("x")])), tmp_path / "study.jsonl") as study:
        assert study.metadata == {"folder": "b", "mark": 1}
        assert len(study.finished) == 1
    assert read_metadata(tmp_path / "study.jsonl") == {"folder": "b", "mark": 1}
    assert read_metadata(tmp_path / "nothing.jsonl") == {}


# --- launchers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", everyday(JOBLIB, ("hydra/launcher=submitit_local",)), ids=["joblib", "submitit"])
def test_all_launchers_come_to_the_same(tmp_path, in_one_process, launcher):
    finished(start(tmp_path / "out", *BATCHES, *launcher, n_trials=4))
    assert history(tmp_path / "out") == history(in_one_process)[:4]
    processes = {json.loads((tmp_path / "out" / str(i) / ".mdc_result.json").read_text())["pid"] for i in range(4)}
    assert len(processes) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exit", "kill"])
def test_when_a_worker_dies_the_rest_is_recovered(tmp_path, kind):
    given = (*XY, "hydra.sweeper.n_jobs=2", *JOBLIB, f"trouble=[{kind}-1]", f"lab={tmp_path}")
    printed = finished(start(tmp_path / "out", *given, "hydra.sweeper.max_failure_rate=0.5", n_trials=4))
    assert [row["status"] for row in rows(tmp_path / "out")] == ["done", "failed", "done", "done"]
    assert "its process died (TerminatedWorkerError" in rows(tmp_path / "out")[1]["note"]
    assert "launching trials 0, 1 ended with TerminatedWorkerError" in printed
    assert sorted(begun(tmp_path)) == [0, 1, 2, 3]


def test_a_launcher_that_cannot_start_is_not_a_failed_trial(sweep, tmp_path):
    code, printed = sweep(*XY, "hydra/launcher=submitit_local", "hydra.launcher.submitit_folder=/proc/nowhere")
    assert code == 1
    assert "the launcher failed before any of the trials 0 began: " in printed
    assert "Traceback" not in printed
    assert [line for line in lines(tmp_path / "out") if "told" in line] == []


@pytest.mark.slow
def test_trials_that_outlive_their_sweep_are_waited_for(tmp_path, in_one_process):
    given = (*BATCHES, "hydra/launcher=submitit_local", f"lab={tmp_path}", "sleep=6")
    process = start(tmp_path / "out", *given, n_trials=6)
    runs = tmp_path / "runs.txt"
    wait_for(lambda: runs.exists() and len(begun(tmp_path)) == 2)
    process.kill()  # only the sweep: its jobs are of other groups
    process.wait()
    printed = finished(start(tmp_path / "out", *given, n_trials=6))
    assert "is still being run by process" in printed
    assert history(tmp_path / "out") == history(in_one_process)
    assert sorted(begun(tmp_path)) == [0, 1, 2, 3, 4, 5]


# --- killed at any moment ---------------------------------------------------------------------------------------------


def wait_for(happened, seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def killed_and_resumed(tmp_path: Path, rng: random.Random, *overrides: str) -> None:
    """Kill a sweep, workers and all, after so many lines of its study and a moment more; once or twice; then finish."""
    study, given = tmp_path / "out" / "study.jsonl", (*BATCHES, *overrides, "sleep=0.05")
    for _ in range(rng.choice([1, 1, 2])):
        known = study.read_bytes().count(b"\n") if study.exists() else 0
        enough, moment = known + rng.randint(1, 8), rng.uniform(0, 0.3)
        process = start(tmp_path / "out", *given, n_trials=6)
        while process.poll() is None and not (study.exists() and study.read_bytes().count(b"\n") >= enough):
            time.sleep(0.01)
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):  # it was quicker
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finished(start(tmp_path / "out", *given, n_trials=6))


def test_a_batch_that_was_told_in_part_is_completed_before_the_next(sweep, tmp_path, in_one_process):
    shutil.copytree(in_one_process, tmp_path / "out")
    study = (tmp_path / "out" / "study.jsonl").read_text().splitlines(keepends=True)
    (cut,) = [i for i, line in enumerate(study) if json.loads(line).get("told") == 2]  # 2 and 3 ran together
    (tmp_path / "out" / "study.jsonl").write_text("".join(study[: cut + 1]) + '{"told": 3, "val')
    assert sweep(*BATCHES, n_trials=6)[0] == 0
    assert history(tmp_path / "out") == history(in_one_process)


def killed_at_moments_of(seed: int, tmp_path: Path, whole: Path) -> None:
    rng = random.Random(seed)
    killed_and_resumed(tmp_path, rng, *rng.choice([(), JOBLIB]))
    assert history(tmp_path / "out") == history(whole)
    asked = [line["asked"] for line in lines(tmp_path / "out") if "asked" in line]
    told = [line["told"] for line in lines(tmp_path / "out") if "told" in line]
    assert asked == told == [0, 1, 2, 3, 4, 5]
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == set("012345")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_been(tmp_path, in_one_process, seed):
    killed_at_moments_of(seed, tmp_path, in_one_process)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5, 23))
def test_killed_at_many_more_moments(tmp_path, in_one_process, seed):
    """Of which CI tries those of the test above."""
    killed_at_moments_of(seed, tmp_path, in_one_process)
