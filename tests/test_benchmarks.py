"""What holds benchmarks together: pages show the stored numbers, and `make bench` tells what passed, missed and failed.

None is run here: what they measure takes minutes.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_mdc as mdc

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
PEERS = ("optuna", "torch_pruning")
STORED = sorted(path.stem for path in BENCHMARKS.glob("results/*.json") if path.stem != "run")
SCRIPTS = [path for path in sorted(BENCHMARKS.glob("*.py")) if "ArgumentParser(" in path.read_text()]


def stored(name: str) -> dict:
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())


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


# Fails until it is told to go on, and notes what it was told.
STOPS = """
import json, pathlib, sys
here = pathlib.Path(__file__)
with here.with_suffix(".log").open("a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
if "--resume" not in sys.argv:
    sys.exit(1)
here.with_suffix(".json").write_text(json.dumps({"targets": []}))
"""


def test_what_was_stopped_is_told_to_go_on(run, tmp_path, monkeypatch):
    """Not by leftovers of other code or other arguments, and only what takes ``--resume``."""
    for name in ("slim_speed", "scale"):
        (tmp_path / f"{name}.py").write_text(STOPS)

    def begun(*arguments: str, resume: bool = True) -> list[list[str]]:
        run.run_all([("slim_speed", arguments), ("scale", arguments)], tmp_path, resume)
        logs = [tmp_path / f"{name}.log" for name in ("slim_speed", "scale")]
        return [json.loads(log.read_text().splitlines()[-1]) for log in logs]

    assert begun("--rounds", "3") == [["--rounds", "3"]] * 2
    assert begun("--rounds", "3", resume=False) == [["--rounds", "3"]] * 2
    assert begun("--rounds", "3") == [["--resume", "--rounds", "3"], ["--rounds", "3"]]
    (tmp_path / "slim_speed.json").unlink()
    assert begun("--rounds", "4") == [["--rounds", "4"]] * 2, "other arguments"
    monkeypatch.setattr(run, "revision", lambda: "def")
    assert begun("--rounds", "4") == [["--rounds", "4"]] * 2, "other code"
    monkeypatch.setattr(run, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.run_all([("slim_speed", ("--rounds", "5"))], tmp_path, resume=True)
    assert run.was_stopped(run.earlier(tmp_path / "run.json")["slim_speed"], "def", ("--rounds", "5"))


def test_what_benchmarks_write_is_no_other_code(module, monkeypatch, tmp_path):
    run = module("run")
    monkeypatch.setattr(run, "HERE", tmp_path / "benchmarks")
    written = [
        tmp_path / "README.md",
        tmp_path / "docs" / "benchmarks.md",
        tmp_path / "benchmarks" / "results" / "a.json",
    ]
    code = tmp_path / "benchmarks" / "a.py"
    for path in (*written, code):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    who = ["-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    before = run.revision()
    assert len(before) == 40
    for path in written:
        path.write_text("2")
    assert run.revision() == before
    code.write_text("2")
    assert run.revision().startswith(f"{before}+")


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


# --- pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STORED)
def test_pages_show_the_stored_numbers(name, module):
    """Whoever edits a number by hand, or has a script say something else, is told to run `make docs`."""
    pages, script = module("pages"), module(name)
    result = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
    shown = pages.blocks(script, result)
    assert pages.PAGES["text"] in shown
    for page, block in shown.items():
        assert pages.with_block(page, name, block) == page.read_text()
    rows = BENCHMARKS / "results" / f"{name}.csv"
    assert rows.exists() == hasattr(script, "rows")
    if rows.exists():
        assert pages.as_csv(script.rows(result)) == rows.read_text()


def test_every_place_on_a_page_is_some_benchmarks(module):
    pages = module("pages")
    assert sorted(pages.NAMES) == STORED
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        places = re.findall(r"<!-- (\w+):begin -->", page.read_text())
        fills = [name for name in STORED if page in pages.blocks(module(name), stored(name))]
        assert sorted(places) == fills, page.name


def test_targets_are_judged_by_the_stored_numbers(module):
    """What the table of targets says is worked out from the rows, and agrees with what was stored beside them."""
    verdicts, targets = module("targets").verdicts, module("targets").Target.from_facts
    for name in STORED:
        if facts := stored(name).get("targets"):
            shown = module(name).text(stored(name)).splitlines()
            assert set(verdicts(map(targets, facts)).splitlines()) <= set(shown), name


def test_a_page_without_the_place_is_not_written(module, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n\n<!-- a:begin -->\nold\n<!-- a:end -->\nafter\n")
    pages = module("pages")
    assert pages.with_block(page, "a", "new") == "# A\n\n<!-- a:begin -->\nnew\n<!-- a:end -->\nafter\n"
    with pytest.raises(ValueError, match="0 x <!-- b:begin -->"):
        pages.with_block(page, "b", "new")


def test_a_caveat_stands_before_the_table(module):
    pages, scale = module("pages"), module("scale")
    result = stored("scale") | {"caveat": "Of old."}
    assert pages.blocks(scale, result)[pages.PAGES["text"]].startswith("*Of old.*\n\n| model |")
    del result["caveat"]
    assert pages.blocks(scale, result)[pages.PAGES["text"]].startswith("| model |")


def pretrained_row(method: str, rights: list[int], seed: int = 0, seconds: float = 1) -> dict[str, object]:
    bits = np.packbits(np.array(rights, bool)).tobytes().hex()
    return {"method": method, "at": "50 %", "seed": seed, "right": bits, "seconds": {"all": seconds}}


def test_methods_are_compared_image_by_image(module):
    """Seeds that both have; the error is of the differences, not of either."""
    pretrained = module("pretrained")
    ours, others = [1, 1, 1, 0, 1, 0, 1, 1, 1, 1], [1, 0, 1, 0, 1, 1, 1, 0, 1, 1]
    rows = [pretrained_row("a", ours), pretrained_row("b", others), pretrained_row("a", [0] * 10, seed=1)]
    points, error = pretrained.apart({"rows": rows, "tested": 10}, ("a", "50 %"), ("b", "50 %"))
    difference = np.array(ours) - others
    assert points == pytest.approx(100 * difference.mean())
    assert error == pytest.approx(100 * difference.std() / 10**0.5)
    assert math.isnan(pretrained.apart({"rows": rows, "tested": 10}, ("a", "50 %"), ("c", "50 %"))[0])


def test_what_is_left_takes_as_long_as_what_was_done_of_its_kind(module):
    pretrained = module("pretrained")
    kinds = {"searched, all three": 3600.0, "`taylor`, lstsq": 60.0}
    rows = [pretrained_row(name, [1], seconds=seconds) for name, seconds in kinds.items()]
    left = [("searched, neurons alone", "40 %", 0), ("`hsic`, lstsq", "40 %", 0)]
    assert pretrained.hours(rows, left) == pytest.approx(1 + 1 / 60)
    assert pretrained.hours(rows, [("`hsic`, none", "40 %", 0)]) == pytest.approx(1830 / 3600)
    assert pretrained.hours(rows, []) == 0


def test_the_pretrained_model_s_targets_are_of_what_was_run(module):
    pretrained = module("pretrained")
    tops = {
        "`fisher`, sequential": 0.9,
        "`taylor`, sequential": 0.88,
        "`conditional`, sequential": 0.905,
    }
    rows = [
        pretrained_row(name, [number < 200 * value for number in range(200)], seed) | {"top1": value}
        for name, value in tops.items()
        for seed in range(2 if name.startswith("`fisher") else 1)
    ]
    rows[0]["top1"] = 0.8  # not what counts: which images were right does
    targets = {
        target.what: target for target in pretrained.judged({"rows": rows, "tested": 200, "dense": {"top1": 0.95}})
    }
    assert targets["50 %, sequential: best criterion − the default (points)"].measured == pytest.approx(0.5)
    assert not targets["50 %, sequential: best criterion − the default (points)"].is_met
    assert targets["50 %: default − best of the other criteria (points)"].measured == pytest.approx(2)
    assert not any(what.startswith(("40 %", "60 %")) for what in targets)
    assert not targets["50 %: dense − searched (points)"].is_met, "not measured"


@pytest.mark.parametrize("method", ["ours", "ours-4", "random", "skopt"])
def test_every_search_that_needs_no_peer_stays_on_the_budget(method, module):
    search, synthetic = module("search"), module("synthetic")
    problem = synthetic.Problem()
    evaluate = search.Evaluations(problem, 3, search.tqdm(disable=True))
    search.METHODS[method][1](evaluate, 0)
    uniform = float(problem.value(problem.uniform)[0])
    assert evaluate.left == 0
    assert evaluate.values[0] == pytest.approx(uniform)
    assert None not in evaluate.values


def test_hsic_of_many_units_is_the_library_s(module):
    generator = torch.Generator().manual_seed(0)
    units, y = (torch.randn(size, generator=generator).double() for size in ((3, 16, 5), (16, 4)))
    expected = torch.stack([mdc.hsic(unit, y) for unit in units])
    torch.testing.assert_close(module("criteria").paper_kernel(units, y), expected)


def test_runs_of_another_version_of_the_search_are_told_apart(module, monkeypatch, tmp_path):
    search = module("search")
    before = search.made_by()
    assert search.made_by() == before
    changed = tmp_path / "process.py"
    changed.write_text("changed")
    getfile = search.inspect.getfile
    monkeypatch.setattr(search.inspect, "getfile", lambda part: changed if part is search.GpEi else getfile(part))
    assert search.made_by() != before


def test_every_picture_of_a_benchmark_is_shown():
    shown = re.findall(r"\]\(\.\./(benchmarks/results/[^)]+\.png)\)", (ROOT / "docs" / "benchmarks.md").read_text())
    assert sorted(shown) == sorted(f"benchmarks/results/{path.name}" for path in BENCHMARKS.glob("results/*.png"))


def test_after_the_finetune_dense_has_the_same_training(module):
    """A row of dense for all budgets; no loss is asked for at 60 % alone, beyond the noise against rivals below."""
    finetuned = module("finetuned")
    ours, dense, rival = [1] * 90 + [0] * 10, [1] * 80 + [0] * 20, [0] * 20 + [1] * 80
    rows = [
        pretrained_row(finetuned.DENSE, dense) | {"at": finetuned.WHOLE, "top1": 0.8},
        pretrained_row(finetuned.DEFAULT, ours) | {"at": "60 %", "top1": 0.9},
        pretrained_row(finetuned.DEFAULT, ours) | {"top1": 0.9},
        pretrained_row("neurons alone", rival) | {"top1": 0.8},
    ]
    found = {"rows": rows, "tested": 100}
    targets = {target.what: target for target in finetuned.judged(found)}
    at_60 = f"60 %: {finetuned.DEFAULT} − dense, same training (points)"
    assert targets[at_60].measured == pytest.approx(10)
    difference = np.array(ours) - dense
    lower = 10 - 196 * difference.std() / 100**0.5
    assert targets["60 %: lower end of its 95 % interval (points)"].measured == pytest.approx(lower)
    against = targets["50 %: searched − best single dimension (points)"]
    noise = 196 * (np.array(ours) - rival).std() / 100**0.5
    assert (against.measured, against.wanted) == (pytest.approx(10), pytest.approx(noise, abs=0.01))
    assert len(targets) == 3
    healed = pretrained_row(finetuned.HEALED, rival) | {"at": "60 %", "top1": 0.8}
    targets = {target.what: target for target in finetuned.judged(found | {"rows": [*rows, healed]})}
    assert at_60 not in targets
    assert targets[f"60 %: {finetuned.HEALED} − dense, same training (points)"].measured == pytest.approx(0)
    model = {"name": "vit", "model": "VisionTransformer", "macs": 1e9, "dense": {"top1": 0.8}, "recipe": "adamw"}
    found |= {**model, "epochs": 1, "images": 10, "precision": "32-true"}
    for row in rows:
        row |= {"before": {"top1": 0.5}}
    shown = finetuned.headline(found)
    assert f"| {finetuned.DEFAULT} | 50.0 → 90.0 | 50.0 → 90.0 |" in shown
    assert f"**Missed:** 50 %: searched − best single dimension (points) 10, wanted ≥ {against.wanted:g}." in shown
    rows[2]["right"] = pretrained_row("", [1] * 100)["right"]
    assert "**Missed:**" not in finetuned.headline(found)
