"""What holds benchmarks together: they can be asked for help, and `make bench` tells what passed, missed and failed.

None is run here: what they measure takes minutes.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
PEERS = ("optuna", "torch_pruning")
SCRIPTS = [path for path in sorted(BENCHMARKS.glob("*.py")) if "ArgumentParser(" in path.read_text()]


@pytest.fixture
def module(monkeypatch):
    """Imports a benchmark by name, as they import each other: from their own folder."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in set(sys.modules) - before:  # names such as "search" are for them alone
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measured", "relation", "wanted", "verdict"),
    [
        (1.15, "<=", 1.15, "pass"),
        (math.nextafter(1.15, 2), "<=", 1.15, "miss"),
        (15, ">=", 15, "pass"),
        (math.nextafter(15, 0), ">=", 15, "miss"),
        (math.nan, "<=", 1, "miss"),
        (math.nan, ">=", 1, "miss"),
    ],
)
def test_a_target_is_met_up_to_its_bound(module, measured, relation, wanted, verdict):
    targets = module("targets")
    target = targets.Target("speed", measured, relation, wanted)
    assert targets.verdicts([target]).splitlines()[-1].endswith(f"| {verdict} |")
    assert target.facts()["met"] == (verdict == "pass")
    again = targets.Target.from_facts(json.loads(json.dumps(target.facts())))
    assert targets.verdicts([again]) == targets.verdicts([target])


# --- all of them ------------------------------------------------------------------------------------------------------

# A benchmark that writes targets where it is told to.
MADE_UP = """
import json, pathlib, sys
targets = json.loads(sys.argv[-1])
if targets is None:
    sys.exit(3)
results = pathlib.Path(__file__).with_suffix(".json")
results.write_text(json.dumps({"targets": targets}))
"""


def made_up(folder: Path, name: str) -> None:
    (folder / f"{name}.py").write_text(MADE_UP)


def facts(measured: float) -> dict[str, object]:
    return {"what": "seconds", "measured": measured, "relation": "<=", "wanted": 2.0, "met": True}


@pytest.fixture
def run(module, monkeypatch, tmp_path):
    found = module("run")
    monkeypatch.setattr(found, "revision", lambda: "abc")
    monkeypatch.setattr(found, "HERE", tmp_path)
    return found


def test_the_summary_tells_what_passed_missed_and_failed(run, tmp_path):
    for name in ("good", "bad", "broken", "silent"):
        made_up(tmp_path, name)
    (tmp_path / "silent.json").write_text(json.dumps({"seconds": 1}))  # from before targets had a place
    (tmp_path / "silent.py").write_text("")
    (tmp_path / "broken.json").write_text(json.dumps({"targets": [facts(1)]}))  # from before, when it still worked
    wanted = [("good", ("[" + json.dumps(facts(1)) + "]",)), ("broken", ("null",)), ("absent", ()), ("silent", ())]
    outcomes = run.run_all([*wanted, ("bad", ("[" + json.dumps(facts(3)) + "]",))], tmp_path, resume=False)
    text = run.summary(outcomes, tmp_path, most_minutes=0)
    assert "| good: seconds | 1 | ≤ 2 | pass |" in text
    assert "| bad: seconds | 3 | ≤ 2 | miss |" in text  # whatever its file says
    assert "| minutes for all |" in text
    assert "broken: seconds" not in text, "results of an earlier run"
    assert "1 targets passed, 2 missed" in text
    assert f"FAILED: absent: {tmp_path / 'absent.py'} is missing" in text
    assert "FAILED: broken: exit status 3" in text
    assert "FAILED: silent: " in text


def test_what_ended_well_is_not_run_again(run, tmp_path, monkeypatch):
    made_up(tmp_path, "good")
    made_up(tmp_path, "broken")
    wanted = [("good", ("[]",)), ("broken", ("null",))]

    def resumed(wanted=wanted) -> list[bool]:
        return [outcome.resumed for outcome in run.run_all(wanted, tmp_path, resume=True)]

    assert resumed() == [False, False]
    assert resumed() == [True, False]
    assert resumed([("good", ("--other", "[]"))]) == [False], "other arguments"
    assert resumed() == [False, False]
    assert [each.resumed for each in run.run_all(wanted, tmp_path, resume=False)] == [False, False]
    monkeypatch.setattr(run, "revision", lambda: "def")
    assert resumed() == [False, False]
    (tmp_path / "good.json").unlink()
    assert resumed() == [False, False]
    (tmp_path / "run.json").write_text("{")
    assert resumed() == [False, False]


def test_arguments_reach_the_benchmark_they_are_for(run, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(run, "run_all", lambda wanted, to, resume: seen.append((wanted, to.name, resume)) or [])
    some = ["--only", "search", "scoring", "--give", "search=--seeds 1", "--give", "search=--methods 'a b'"]
    for line in (some, ["--thorough", "--resume"]):
        monkeypatch.setattr(sys, "argv", ["run.py", *line])
        assert run.main() == 0
    (wanted, folder, resume), thorough = seen
    assert wanted == [("scoring", ("--quick",)), ("search", ("--quick", "--seeds", "1", "--methods", "a b"))]
    assert (folder, resume) == ("quick", False)
    assert thorough == ([(name, ()) for name in run.SCRIPTS], "results", True)
    for wrong in (["--only", "nonsense"], ["--give", "nonsense=--quick"], ["--skip", *run.SCRIPTS]):
        monkeypatch.setattr(sys, "argv", ["run.py", *wrong])
        with pytest.raises(SystemExit):
            run.main()
        assert "scoring" in capsys.readouterr().err


# --- each of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_is_given_also_where_no_peer_is_installed(script, module, monkeypatch, capsys):
    for peer in PEERS:
        monkeypatch.setitem(sys.modules, peer, None)
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        module(script.stem).main()
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert said.startswith(f"usage: {script.name}")
    if script.stem in module("run").SCRIPTS:
        assert "--quick" in said


def test_every_picture_of_a_benchmark_is_shown_in_the_readme():
    shown = re.findall(r"\]\((benchmarks/results/[^)]+\.png)\)", (ROOT / "README.md").read_text())
    assert sorted(shown) == sorted(f"benchmarks/results/{path.name}" for path in BENCHMARKS.glob("results/*.png"))
