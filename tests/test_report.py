"""The report of a run: in a browser, of a run that was killed, of several runs, on the command line."""

import json
import re
import shlex
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_mdc as mdc
from lightning_mdc.__main__ import main
from lightning_mdc.app import pipeline, steps
from lightning_mdc.app.report.charts import charts
from lightning_mdc.app.report.comparing import compare
from lightning_mdc.app.report.outcomes import Outcomes
from lightning_mdc.app.report.record import RunRecord
from lightning_mdc.app.report.report import Report
from lightning_mdc.app.report.result_figures import Point, front, front_figure
from lightning_mdc.app.run_folder import RunFolder
from lightning_mdc.app.terminal import again
from lightning_mdc.policy_search.held_out import HeldOut
from tests.browser import CHROMIUM, look_at
from tests.test_train import settings

pytestmark = pytest.mark.slow  # CI runs them

KEYS = [
    *("kept", "macs", "policy"),
    *("search/value", "search/improvement", "search/cost", "search/dependence", "search/front"),
    *("tokens/most-changed", "tokens/first", "tokens/least-changed"),
    *("latency", "classes"),
    *("sensitivity/accuracy", "sensitivity/kl", "sensitivity/map"),
    *("importance/heads", "importance/neurons", "importance/tokens", "importance/histograms"),
]
SMALL = {"importance/tokens"}  # a few plain squares
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run with everything a report can show; tests that change one work on a copy."""
    chosen = settings(
        tmp_path_factory.mktemp("runs"),
        "stage=[all,sensitivity]",
        "sensitivity.neurons=[0.5,0]",
        "sensitivity.tokens=[0.5,0]",
    )
    return pipeline.run(chosen).path


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "tiny" / finished.name))


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_every_chart_is_there_as_a_file_and_in_both_reports(finished):
    assert [chart.key for chart in charts(RunRecord(finished))] == KEYS
    text, page = (finished / "report.md").read_text(), (finished / "report.html").read_text()
    for key in KEYS:
        assert (finished / "pictures" / f"{key}.png").stat().st_size > (2000 if key in SMALL else 10_000)
        assert f"(pictures/{key}.png)" in text
        assert f'<figure id="{key.replace("/", "-")}">' in page
    assert len(re.findall("<svg ", page)) == len(KEYS)


def test_the_page_needs_nothing_else(finished):
    page = (finished / "report.html").read_text()
    assert "<script" not in page
    assert set(re.findall(r'(?:src|href)="([^"#]{1,5})', page)) == {"data:"}
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert not re.search(r"#333333|#000000", page, flags=re.IGNORECASE)  # ink is the theme's


def test_no_weights_are_read_to_say_what_the_dense_model_costs(finished):
    dense = RunRecord(finished).dense
    assert all(parameter.is_meta for parameter in dense.anatomy.model.parameters())
    assert dense.of_model() == mdc.macs(mdc.load(finished / "dense"))


def test_reports_say_how_to_get_the_same_again(finished):
    record = RunRecord(finished)
    facts = dict(Report(record).facts)
    assert facts["seed"] == "0"
    assert facts["plan"] == mdc.Plan.from_json((finished / "plan.json").read_text()).hash
    assert f"torch {version('torch')}" in facts["versions"]
    for text in ((finished / "report.md").read_text(), (finished / "report.html").read_text()):
        assert facts["plan"] in text
        assert facts["versions"] in text
    assert "n_trials: 3" in (finished / "report.html").read_text()


def test_predictions_are_those_of_the_saved_models(finished):
    run = steps.Run(settings(finished.parent), RunFolder(finished))
    images, labels = map(torch.cat, zip(*run.data.test_dataloader(), strict=True))
    outcomes = Outcomes.load(finished / "predictions.safetensors")
    assert np.array_equal(outcomes.labels, labels)
    places = ("dense", "slim", "finetuned/seed0", "finetuned/seed1", "reference/seed0")
    assert sorted(outcomes.predicted) == sorted(places)
    for place in places:
        with torch.no_grad():
            assert np.array_equal(outcomes.predicted[place], mdc.load(finished / place)(images).argmax(dim=1))
    changes = {each.name: each for each in outcomes.class_changes()}
    tuned = [outcomes.predicted[f"finetuned/seed{seed}"] for seed in (0, 1)]
    for digit in range(10):
        of_class, change = outcomes.labels == digit, changes[str(digit)]
        assert change.images == of_class.sum()
        assert change.dense == (outcomes.predicted["dense"][of_class] == digit).sum()
        assert change.slim == pytest.approx(np.mean([(classes[of_class] == digit).sum() for classes in tuned]))
    order = [each.change for each in outcomes.class_changes()]
    assert order == sorted(order)


def test_examples_are_the_images_that_changed_most_and_least(finished):
    run = steps.Run(settings(finished.parent), RunFolder(finished))
    images, labels = map(torch.cat, zip(*run.data.test_dataloader(), strict=True))
    with torch.no_grad():
        dense, slim = (mdc.load(finished / place)(images).softmax(-1) for place in ("dense", "finetuned/seed0"))
    changes = (dense * (dense / slim).log()).sum(dim=1)
    examples = RunRecord(finished).examples
    assert examples is not None
    shown = [example.change for example in examples.items]
    ordered = changes.sort().values
    assert shown[:4] == pytest.approx(ordered.flip(0)[:4].tolist(), rel=1e-3, abs=1e-6)
    assert shown[8:] == pytest.approx(ordered[:4].tolist(), rel=1e-2, abs=1e-6)
    for number, example in enumerate(examples.items[4:8]):
        assert example.label == labels[number]
        assert example.dense == (int(dense[number].argmax()), pytest.approx(float(dense[number].max()), rel=1e-4))
        pixels = images[number, 0] * 0.3760 + 0.3053
        assert example.image[..., 0] == pytest.approx((pixels * 255).numpy(), abs=0.51)
    plan = mdc.Plan.from_json((finished / "plan.json").read_text())
    dropping = [stage for stage in plan.tokens if stage.keep < 1]
    assert all(example.kept.shape == (len(dropping), 16) for example in examples.items)


# --- in a browser -----------------------------------------------------------------------------------------------------

# Pictures that are wider than they are shown scroll inside their card; the page itself never does.
_LOOK = """({
  width: innerWidth,
  overflow: document.documentElement.scrollWidth - innerWidth,
  pictures: [...document.querySelectorAll("figure svg")].map(each => {
    const box = each.getBoundingClientRect();
    return {width: box.width, height: box.height, marks: each.querySelectorAll("path, use, image").length};
  }),
  outside: [...document.querySelectorAll("main > *, figure, .tile, pre, table")].filter(each =>
    !each.closest(".wide") && each.getBoundingClientRect().right > innerWidth + 1).length,
  ground: getComputedStyle(document.body).backgroundColor,
})"""


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (390, True)])
def test_all_charts_show_without_complaint_or_request(finished, tmp_path, width, dark):
    seen = look_at(finished / "report.html", width, _LOOK, tmp_path / "profile", dark=dark)
    assert seen.complaints == []
    assert seen.requests == []
    assert (seen.value["width"], seen.value["overflow"], seen.value["outside"]) == (width, 0, 0)
    assert len(seen.value["pictures"]) == len(KEYS)
    for picture in seen.value["pictures"]:
        assert picture["width"] > 200
        assert picture["height"] > 60
        assert picture["marks"] > 5
    assert seen.value["ground"] == ("rgb(18, 20, 22)" if dark else "rgb(246, 247, 248)")
    assert len(seen.screenshot) > 20_000


@needs_chromium
def test_the_browser_would_notice(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('no'); throw Error('bad')</script>")
    seen = look_at(page, 390, "1 + 1", tmp_path / "profile")
    assert seen.value == 2
    assert seen.requests == ["http://127.0.0.1:9/x.png"]
    assert any("no" in each for each in seen.complaints)
    assert any("bad" in each for each in seen.complaints)


# --- of half a run ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_killed_in_its_search_shows_what_was_done(tmp_path, monkeypatch, capsys):
    def dies(self, model, *args):
        if len(calls) == 3:  # the dense model comes first
            raise KeyboardInterrupt
        calls.append(model)
        return judged(self, model, *args)

    calls: list[object] = []
    judged = HeldOut.judge
    monkeypatch.setattr(HeldOut, "judge", dies)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(settings(tmp_path, "search.n_trials=9"))
    (folder,) = (tmp_path / "tiny").iterdir()
    assert not (folder / "report.html").exists()
    assert main(["report", str(folder)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"Not finished: dense, score are done; the search has 2 of 9 trials, the best with 0\.\d+\.", said)
    page = (folder / "report.html").read_text()
    shown = re.findall(r'<figure id="([^"]+)"', page)
    for key in ("search-value", "search-cost", "search-dependence", "importance-heads", "importance-neurons"):
        assert key in shown
    assert "kept" not in shown
    assert f"resume={folder}" in page
    assert "(pictures/search/value.png)" in (folder / "report.md").read_text()


def test_results_of_older_settings_are_not_taken_for_new_ones(copied, monkeypatch):
    def dies(self, model, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(HeldOut, "judge", dies)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(settings(copied.parent.parent, f"resume={copied}", "budget=0.5"))
    assert (copied / "results.json").exists()
    record = RunRecord(copied)
    assert (record.results, record.plan, record.policy) == (None, None, None)
    assert record.scores is not None
    assert record.study is not None
    assert record.study.header["about"]["budget"]["macs"] == 0.5
    assert [row.status for row in record.study.trials] == []
    assert "Not finished: " in Report(record).verdict
    assert {output.path for output in Report(record).outputs}.isdisjoint({"slim/", "finetuned/", "results.json"})
    monkeypatch.undo()
    chosen = ("policy.kind=uniform", "skip=[distill,test,report]")
    pipeline.run(settings(copied.parent.parent, f"resume={copied}", *chosen))
    assert RunRecord(copied).study is None
    assert not {chart.key for chart in charts(RunRecord(copied))} & {"search/value", "search/front"}


def test_the_search_of_another_budget_adds_to_the_front_and_to_nothing_else(copied):
    for budget in (0.5, 0.6):
        pipeline.run(
            settings(copied.parent.parent, f"resume={copied}", f"budget={budget}", "skip=[distill,test,report]")
        )
    record = RunRecord(copied)
    assert record.study is not None
    assert record.study.header["about"]["budget"]["macs"] == 0.6
    assert len(record.studies) == 2
    (figure,) = [chart.figure for chart in charts(record) if chart.key == "search/front"]
    dense = mdc.macs(mdc.load(copied / "dense"))
    costs = {round(float(x), 6) for dots in figure.axes[0].collections for x, _ in np.asarray(dots.get_offsets())}
    for study in record.studies:
        for row in study.trials:
            assert round(row.facts["macs"] / dense, 6) in costs
    assert 1.0 in costs
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["chosen", "dense"]  # each once


def test_a_sensitivity_that_came_later_is_in_the_next_report(copied, monkeypatch):
    monkeypatch.setattr("lightning_mdc.app.report.write.charts", lambda record: charts(record, "sensitivity"))
    runs = copied.parent.parent
    shutil.rmtree(copied / "sensitivity")
    for path in (copied / "sensitivity.csv", copied / "steps" / "sensitivity.json"):
        path.unlink()
    pipeline.run(settings(runs, f"resume={copied}"))
    assert "What can be removed" not in (copied / "report.html").read_text()
    few = ("sensitivity.neurons=[0.5,0]", "sensitivity.tokens=[0.5,0]")
    pipeline.run(settings(runs, f"resume={copied}", "stage=[sensitivity,report]", *few))
    assert "What can be removed" in (copied / "report.html").read_text()


def test_what_to_type_next_fits_the_run(finished, tmp_path):
    said = dict(Report(RunRecord(finished)).commands)
    assert len(said) == 2
    assert shlex.split(said["Use the slim model"])[2].endswith(f"mdc.load('{finished}/finetuned/seed0'))")
    (smaller,) = [command for what, command in said.items() if "smaller" in what]
    assert smaller.endswith(f"resume={finished} budget=0.48")
    odd = tmp_path / "it's $HOME"
    shutil.copytree(finished, odd)
    command = dict(Report(RunRecord(odd)).commands)["Use the slim model"]
    assert shlex.split(command)[2] == f"import lightning_mdc as mdc; print(mdc.load({str(odd / 'finetuned/seed0')!r}))"


def test_a_damaged_file_costs_only_what_it_held(copied, caplog):
    held = {
        "predictions.safetensors": {"classes"},
        "examples.safetensors": {"tokens/most-changed", "tokens/first", "tokens/least-changed"},
        "results.json": {"latency"},
        "sensitivity.csv": {"sensitivity/accuracy", "sensitivity/kl", "sensitivity/map"},
    }
    for name in held:
        (copied / name).write_bytes(b"\x00torn")
    assert {*KEYS} - {chart.key for chart in charts(RunRecord(copied))} == set().union(*held.values())
    assert all(name in caplog.text for name in held)


# --- several runs, and the command line -------------------------------------------------------------------------------


def test_several_runs_are_compared(copied, finished, tmp_path, capsys, monkeypatch):
    settings_of_copy = json.loads((copied / "settings.json").read_text())
    settings_of_copy["distillation"]["temperature"] = 7.5
    (copied / "settings.json").write_text(json.dumps(settings_of_copy))
    comparison = compare([copied, finished])
    assert comparison.table.rows[0][2:] == comparison.table.rows[1][2:]
    assert [row[:2] for row in comparison.differences.rows] == [("distillation.temperature", "7.5")]
    assert [chart.key for chart in comparison.charts] == ["runs", "kept"]
    page = tmp_path / "both.html"
    assert main(["report", str(copied), str(finished), "-o", str(page)]) == 0
    assert capsys.readouterr().out.splitlines() == ["2 runs side by side", str(page)]
    assert "distillation.temperature" in page.read_text()
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(copied), str(finished)]) == 0
    assert (tmp_path / "comparison.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "'nowhere' holds no run"),
        (["RUN", "RUN"], "one is named twice"),
        (["RUN", "-o", "page.html"], "a single run's report goes into its folder"),
    ],
)
def test_wrong_arguments_are_said_with_the_remedy(finished, capsys, arguments, words):
    assert main(["report", *(str(finished) if each == "RUN" else each for each in arguments)]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_the_next_command_keeps_what_was_said():
    started = "python train.py data=image_folder 'data.root=/my images' -q budget=0.6 stage=search resume=true"
    assert again(started, Path("runs/x"), "budget=0.5", without=("stage",)) == (
        "python train.py data=image_folder 'data.root=/my images' -q resume=runs/x budget=0.5"
    )


# --- the front --------------------------------------------------------------------------------------------------------


def test_the_front_is_what_no_other_point_beats():
    rng = np.random.default_rng(0)
    points = [Point(float(c), float(v)) for c, v in rng.random((60, 2)).round(2)]
    expected = {
        (p.cost, p.value)
        for p in points
        if not any((q.cost <= p.cost and q.value > p.value) or (q.cost < p.cost and q.value >= p.value) for q in points)
    }
    assert {(p.cost, p.value) for p in front(points)} == expected
    figure = front_figure([*points, Point(0.6, 0.9, "chosen", chosen=True)], "cost", "accuracy", percent=True)
    assert [text.get_text() for text in figure.axes[0].texts] == ["chosen"]
