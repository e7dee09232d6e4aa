"""Dashboards: what offline runs of wandb hold when their process is over, TensorBoard, and trackers that fail."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger
from matplotlib.figure import Figure

import lightning_mdc as mdc
from lightning_mdc.app import build, pipeline, steps
from lightning_mdc.app.report import charts
from lightning_mdc.app.report.outcomes import Outcomes
from lightning_mdc.app.report.record import RunRecord
from lightning_mdc.app.report.results import Results
from lightning_mdc.app.run_folder import RunFolder
from lightning_mdc.app.tracking import RunInfo, Tracker, Trackers, contents
from lightning_mdc.app.tracking.contents import published
from lightning_mdc.app.tracking.tracker import Model, Shown
from lightning_mdc.app.tracking.wandb_tracker import _NOT_IN_ARTIFACT, WandbTracker, _accepted
from lightning_mdc.errors import ConfigError
from lightning_mdc.figures.charts import Chart
from lightning_mdc.figures.items import Histogram, Numbers, Picture, Summary, Table
from lightning_mdc.figures.search_items import search_table, trial_numbers
from lightning_mdc.gp_ei.study import Trial, read_study
from lightning_mdc.policy_search.sensitivity import Cut, Sensitivity
from tests.test_train import ROOT, TINY, script, settings
from tests.wandb_file import OfflineRun, read

pytestmark = pytest.mark.slow  # CI runs them

TRAININGS = ("dense", "finetuned/seed0", "finetuned/seed1", "reference/seed0")


def started(folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python train.py`` in a process of its own; it has to end well."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *TINY, f"runs={folder}", *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def offline_runs(folder: Path) -> list[OfflineRun]:
    """In the order they were begun; read in another process's stead: wandb's protocol needs no service."""
    files = sorted(folder.glob("logs/wandb/offline-run-*/run-*.wandb"), key=lambda path: path.parent.name)
    return [read(path) for path in files]


# --- wandb: one run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> tuple[Path, str]:
    """(the run's folder, what was printed) of a run that is watched with everything at once."""
    runs = tmp_path_factory.mktemp("watched")
    (runs / "temporary").mkdir()
    done = started(runs, "logger=[csv,wandb_offline,tensorboard]", "skip=[report]", TMPDIR=str(runs / "temporary"))
    (folder,) = (runs / "tiny").iterdir()
    return folder, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(told) -> Path:
    return told[0]


@pytest.fixture(scope="module")
def run(folder) -> OfflineRun:
    (found,) = offline_runs(folder)  # one, whatever is trained in it
    return found


def test_the_run_has_all_settings_and_ended_well(run, folder):
    assert run.exit_code == 0
    assert run.about.display_name == f"tiny {folder.name}"
    assert run.about.job_type == "pipeline"
    known = json.loads((folder / "settings.json").read_text())
    assert {key: run.config[key] for key in known} == known


def test_losses_and_rates_come_by_the_step_on_an_axis_of_their_training(run):
    for training in TRAININGS:
        assert run.metrics[f"{training}/*"][0] == f"{training}/step"
        losses = ["task", "loss"] if training == "dense" else ["task", "kd", "loss"]
        for loss in losses:
            lines = [line for line in run.history if f"{training}/train/{loss}_step" in line]
            assert [line[f"{training}/step"] for line in lines] == [0, 1]  # 64 images by 32
            means = run.values(f"{training}/train/{loss}")
            steps = [line[f"{training}/train/{loss}_step"] for line in lines]
            assert means == pytest.approx([np.mean(steps)], rel=1e-5)
        assert len(run.values(f"{training}/lr-Muon/pg1")) == 2


def test_every_trial_comes_live_and_in_the_table(run, folder):
    (file,) = folder.glob("search/trials-*.jsonl")
    rows = read_study(file).trials
    best = np.maximum.accumulate([row.value for row in rows]).tolist()
    assert run.values("search/trial") == [0, 1, 2]
    assert run.values("search/value") == [row.value for row in rows]
    assert run.values("search/incumbent") == best
    assert run.values("search/cost") == [row.cost for row in rows]
    assert run.values("search/improvement") == [row.improvement for row in rows if row.improvement is not None]
    assert run.metrics["search/value"] == ("search/trial", {"max", "last"})
    table = run.table("search/trials")
    names = [("trial", "number"), *((name, name) for name in ("value", "cost", "improvement", "status", "seconds"))]
    for line, row, incumbent in zip(table, rows, best, strict=True):
        assert {name: line[name] for name, _ in names} == {name: getattr(row, field) for name, field in names}
        assert {name: line[name] for name in row.params} == dict(row.params)
        assert line["incumbent"] == incumbent
    policy = mdc.Policy.load(folder / "policy.json")
    best_row = max(table, key=lambda line: (line["value"], -line["trial"]))
    assert best_row["macs"] == mdc.policy_macs(mdc.load(folder / "dense"), policy)


def test_scores_are_histograms_of_every_block_and_dimension(run, folder):
    scores = mdc.Scores.load(folder / "scores.safetensors")
    found = run.of_type("histogram")
    keys = {f"scores/{name}/block{block:02d}" for name in ("heads", "neurons") for block in range(4)}
    keys |= {f"scores/tokens/block{block:02d}" for block in scores.stages}
    assert set(found) == keys
    assert sum(found["scores/neurons/block02"]["values"]) == len(scores.neurons[2])
    assert found["scores/neurons/block02"]["bins"][0] == pytest.approx(float(scores.neurons[2].min()), rel=1e-4)


def test_kept_units_and_policy_are_tables(run, folder):
    plan = mdc.Plan.from_json((folder / "plan.json").read_text())
    assert [line["kept"] for line in run.table("kept/heads_by_block")] == [len(kept) for kept in plan.heads]
    assert [line["kept"] for line in run.table("kept/neurons_by_block")] == [len(kept) for kept in plan.neurons]
    assert run.table("kept/tokens_by_block")[0] == {"block": "block 00", "kept": 17, "dense": 17, "keep ratio": 1}
    ratios = [line["keep ratio"] for line in run.table("policy/ratios")]
    policy = mdc.Policy.load(folder / "policy.json")
    assert ratios == pytest.approx([*policy.heads, *policy.neurons, *policy.tokens])


def test_all_charts_are_pictures_with_a_caption(run, folder):
    drawn = {f"charts/{chart.key}": chart for chart in charts.charts(RunRecord(folder))}
    found = run.of_type("image-file")
    assert set(found) == set(drawn)
    for key, picture in found.items():
        assert drawn[key].caption in picture["caption"]
        assert (run.folder / "files" / picture["path"]).stat().st_size > 2000


def test_panels_that_wandb_can_define_are_defined(run):
    panels = run.config["_wandb"]["visualize"]
    names = ("search/progress", "search/tradeoff", "search/expected", "results/tradeoff", "kept/heads", "kept/neurons")
    for name in names:
        assert panels[name]["panel_type"] == "Vega2"
        assert f"{name}_table" in run.of_type("table-file")
    progress = run.table("search/progress_table")
    assert {line["lineKey"] for line in progress} == {"value", "incumbent"}
    assert len(progress) == 6


def test_the_columns_that_runs_are_sorted_by(run, folder):
    results = Results.load(folder / "results.json")
    dense, slim = results.of("dense")[0], results.of("slim")[0]
    assert run.summary["top1/dense"] == dense.correct / 90
    assert run.summary["top1/slim"] == slim.correct / 90
    assert run.summary["top1/finetuned"] == np.mean([row.top1 for row in results.of("slim finetuned")])
    assert run.summary["top1/reference"] == results.of("dense, same extra training")[0].top1
    assert run.summary["macs_ratio"] == slim.macs / dense.macs
    assert run.summary["params_ratio"] == slim.params / dense.params
    assert run.summary["latency_ratio/batch1"] == slim.latency[1] / dense.latency[1]
    assert run.summary["latency_ratio"] == run.summary["latency_ratio/batch4"] == slim.latency[4] / dense.latency[4]
    assert run.summary["budget"] == 0.6
    assert run.summary["search/best"] == max(run.values("search/value"))
    sides = {line["quantity"]: line for line in run.table("results/side-by-side")}
    assert sides["top-1"]["dense"].startswith(f"{dense.correct}/90")


def test_models_are_artifacts_with_config_and_parent(run, folder):
    models = {name: each for name, each in run.artifacts.items() if each.type == "model"}
    parents = {name.removeprefix("tiny-"): json.loads(each.metadata)["parent"] for name, each in models.items()}
    assert parents == {"dense": None, "slim": "dense", "finetuned-seed0": "slim", "finetuned-seed1": "slim"}
    artifact = models["tiny-slim"]
    assert json.loads(artifact.metadata).items() >= json.loads((folder / "slim" / "config.json").read_text()).items()
    sizes = {entry.path: entry.size for entry in artifact.manifest.contents}
    assert sizes == {path.name: path.stat().st_size for path in (folder / "slim").iterdir()}


def test_it_is_said_where_the_dashboards_are_and_nothing_else(told):
    folder, said = told
    (run,), logged = offline_runs(folder), (folder / "log.txt").read_text().splitlines()
    assert f"wandb sync {run.folder}" in said
    assert f"tensorboard --logdir {folder / 'logs' / 'tensorboard'}" in said
    assert said.count("wandb:") == 1
    # Nor do packages say anything when they are imported; and no control characters where there is no terminal.
    assert said.splitlines() == [line[len("2026-01-31 12:00:00 INFO    ") :] for line in logged]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", said)
    assert "failed" not in said


def test_no_temporary_file_is_left(folder):
    left = {path.name for path in (folder.parent.parent / "temporary").iterdir()}
    assert {name for name in left if not name.startswith("torchinductor")} == set()  # torch's cache, made by its import


def test_what_a_killed_process_leaves_goes_with_the_folders_of_the_tests(tmp_path_factory):
    """Each that imports wandb, as timm does, leaves ``tmp*wandb-media`` when it is killed."""
    program = "import os, signal, tempfile, wandb; print(tempfile.gettempdir(), flush=True); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=200)
    home = Path(done.stdout.strip())
    assert list(home.glob("*wandb-media"))
    assert home.is_relative_to(tmp_path_factory.getbasetemp())


def test_curves_are_csv_files_too(folder):
    header = (folder / "logs/finetuned-seed0/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"step", "train/task", "train/kd", "train/task_step", "train/kd_step", "lr-Muon/pg1"} <= set(header)


def test_a_resumed_run_goes_on_in_the_same_wandb_run(folder, run, tmp_path):
    """After the tests of the finished run: it adds to its folder."""
    import shutil

    copy = tmp_path / "tiny" / folder.name
    shutil.copytree(folder, copy)
    started(tmp_path, "logger=wandb_offline", f"resume={copy}", "stage=[dense,score,search]", "search.n_trials=4")
    before, again = offline_runs(copy)
    assert again.about.run_id == before.about.run_id == run.about.run_id
    assert again.values("search/trial") == [3]  # the fourth trial alone
    assert len(again.table("search/trials")) == 4
    assert not again.of_type("histogram")  # of a stage that was shown before
    assert min(again.values("_step")) > max(before.values("_step"))


# --- wandb: a sweep ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("sweep")
    sweeper = ("hydra/sweeper=mdc_gp_ei", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_initial_points=2")
    with pytest.MonkeyPatch.context() as patch:
        assert script(patch, "-m", *sweeper, *TINY, f"runs={runs}", "logger=wandb_offline", "budget=0.5") == 0
    (folder,) = (runs / "sweeps").iterdir()
    return folder


def test_every_trial_is_a_run_of_the_sweeps_group(sweep):
    study = {row.number: row for row in read_study(sweep / "study.jsonl").trials}
    assert len(study) == 3
    for number, row in study.items():
        (run,) = offline_runs(sweep / str(number))
        assert run.about.run_group == sweep.name
        assert run.about.display_name == f"trial {number}"
        assert run.about.job_type == "trial"
        assert run.exit_code == 0
        assert run.config["budget"] == 0.5
        assert run.config["policy"]["keep"]["tokens"] == row.params["policy.keep.tokens"]
        assert run.summary["value"] == pytest.approx(row.value)
        assert run.summary["cost"] == pytest.approx(row.cost)
        picture = run.of_type("image-file")["charts/policy"]
        assert (run.folder / "files" / picture["path"]).stat().st_size > 2000
        policy = mdc.Policy.load(sweep / str(number) / "policy.json")
        ratios = [line["keep ratio"] for line in run.table("policy/ratios")]
        assert ratios == pytest.approx([*policy.heads, *policy.neurons, *policy.tokens])
    (first,) = offline_runs(sweep / "0")
    assert len(first.values("dense/train/task_step")) == 2  # the trial that came first trained the dense model


def test_the_sweep_itself_is_one_more_run_of_the_group(sweep):
    (run,) = offline_runs(sweep)
    rows = read_study(sweep / "study.jsonl").trials
    assert run.about.run_group == sweep.name
    assert run.about.job_type == "sweep"
    assert run.values("search/trial") == [0, 1, 2]
    assert run.values("search/incumbent") == np.maximum.accumulate([row.value for row in rows]).tolist()
    table = run.table("search/trials")
    assert [line["value"] for line in table] == [row.value for row in rows]
    assert [line["improvement"] for line in table] == [row.improvement for row in rows]
    assert [line["policy.keep.heads.1"] for line in table] == [row.params["policy.keep.heads.1"] for row in rows]
    assert {"search/progress", "search/tradeoff"} <= set(run.config["_wandb"]["visualize"])
    drawn = {"charts/search/progress", "charts/search/cost", "charts/search/dependence", "charts/policy"}
    assert set(run.of_type("image-file")) == drawn
    assert run.summary["search/best"] == max(row.value for row in rows)


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_same(folder, run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    home = folder / "logs" / "tensorboard"
    curves = EventAccumulator(str(home / "finetuned" / "seed0")).Reload()
    assert [event.value for event in curves.Scalars("train/kd_step")] == pytest.approx(
        run.values("finetuned/seed0/train/kd_step")
    )
    rest = EventAccumulator(str(home / "run")).Reload()
    assert [event.value for event in rest.Scalars("search/value")] == pytest.approx(run.values("search/value"))
    assert set(rest.Tags()["histograms"]) == set(run.of_type("histogram"))
    assert set(rest.Tags()["images"]) == set(run.of_type("image-file"))
    assert {"results/side-by-side/text_summary", "search/trials/text_summary"} <= set(rest.Tags()["tensors"])
    assert [event.value for event in rest.Scalars("macs_ratio")] == pytest.approx([run.summary["macs_ratio"]])


# --- which part of a run is shown when --------------------------------------------------------------------------------


class Recorder(Tracker):
    """Keeps what it is given; breaks where it is told to."""

    calls: list[tuple[str, object]] = []  # noqa: RUF012 (a new list for each test)
    breaks = ""
    after = 0

    def _note(self, call: str, what: object = None) -> None:
        self.calls.append((call, what))
        if call == self.breaks and sum(name == call for name, _ in self.calls) > self.after:
            raise OSError("no space left on device")

    def start(self, info: RunInfo) -> None:
        self._note("start", info)

    def curves(self, training: str) -> Logger:
        self._note("curves", training)
        return _Curves(self)

    def show(self, item: Shown) -> None:
        self._note("show", item)

    def finish(self, failed: bool) -> None:
        self._note("finish", failed)


class _Curves(CSVLogger):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__(".")
        self.recorder = recorder

    def log_metrics(self, metrics, step=None) -> None:
        self.recorder._note("metrics", metrics)

    def log_hyperparams(self, params=None) -> None: ...

    def save(self) -> None: ...


@pytest.fixture
def recorder(monkeypatch, caplog) -> type[Recorder]:
    caplog.set_level("INFO", "lightning_mdc")
    monkeypatch.setattr(logging.getLogger("lightning_mdc"), "propagate", True)
    monkeypatch.setattr(Recorder, "calls", [])
    monkeypatch.setattr(Recorder, "breaks", "")
    monkeypatch.setattr(Recorder, "after", 0)
    return Recorder


@pytest.fixture
def one_chart(monkeypatch) -> None:
    """The same small one of every step: drawing the real ones takes long."""
    chart = Chart("kept", "Title", "What to read.", Figure(figsize=(1, 1)))
    monkeypatch.setattr(contents, "charts", lambda *_: [chart])


def watched(tmp_path, *overrides: str) -> dict:
    return settings(tmp_path, f"+logger.own._target_={__name__}.Recorder", *overrides)


def shown(recorder, kind: type) -> list:
    return [item for call, item in recorder.calls if call == "show" and isinstance(item, kind)]


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.usefixtures("one_chart")
def test_what_is_shown_once_is_not_shown_again_but_the_summary(tmp_path, recorder):
    pipeline.run(watched(tmp_path, "stage=[dense,score,search,slim]"))
    assert [item.name for item in shown(recorder, Model)] == ["dense", "slim"]
    assert len(shown(recorder, Numbers)) == 3
    assert len(shown(recorder, Picture)) == 4
    first = {key: value for item in shown(recorder, Summary) for key, value in item.values.items()}
    assert set(first) == {"budget", "search/best", "macs_ratio"}
    recorder.calls.clear()
    pipeline.run(watched(tmp_path, "stage=[dense,score,search,slim]", "resume=true"))
    assert {key: value for item in shown(recorder, Summary) for key, value in item.values.items()} == first
    assert len(shown(recorder, Summary)) == len([call for call, _ in recorder.calls if call == "show"])
    recorder.calls.clear()  # another budget: what depends on it is shown again
    pipeline.run(watched(tmp_path, "stage=[dense,score,search,slim]", "resume=true", "budget=0.5"))
    assert [item.name for item in shown(recorder, Model)] == ["slim"]
    assert not shown(recorder, Histogram)
    assert len(shown(recorder, Picture)) == 2


@pytest.mark.usefixtures("one_chart")
def test_a_run_that_is_interrupted_shows_what_it_has_and_that_it_failed(tmp_path, recorder, monkeypatch):
    def killed(row, incumbent):
        if row.number == 1:
            raise KeyboardInterrupt
        return trial_numbers(row, incumbent)

    monkeypatch.setattr(steps, "trial_numbers", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(watched(tmp_path))
    (table,) = (item for item in shown(recorder, Table) if item.key == "search/trials")
    assert [row[table.columns.index("status")] for row in table.rows] == ["done", "done", "running"]
    assert recorder.calls[-1] == ("finish", True)


@pytest.mark.usefixtures("one_chart")
def test_a_run_that_ends_well_says_so(tmp_path, recorder):
    pipeline.run(watched(tmp_path, "stage=dense"))
    assert [call for call, _ in recorder.calls[:2]] == ["start", "curves"]
    assert recorder.calls[-1] == ("finish", False)


def test_other_ranks_have_no_trackers(tmp_path, recorder, monkeypatch):
    monkeypatch.setattr("lightning_mdc.app.tracking.tracker.is_first", lambda: False)
    trackers = Trackers({"own": Recorder()}, RunInfo(tmp_path, "tiny"))
    trackers.show(lambda: pytest.fail("asked for what nobody sees"))
    assert trackers.curves("dense") == []
    trackers.finish(failed=False)
    assert recorder.calls == []


def test_curves_alone_ask_for_no_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "charts", lambda *_: pytest.fail("drawn for nobody"))
    pipeline.run(settings(tmp_path, "logger=csv", "stage=[dense,score]"))


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "after"), [("start", 0), ("curves", 0), ("metrics", 3), ("show", 0), ("show", 9), ("finish", 0)]
)
@pytest.mark.usefixtures("one_chart")
def test_a_tracker_that_fails_is_said_once_and_stops_nothing(call, after, tmp_path, recorder, monkeypatch, caplog):
    monkeypatch.setattr(recorder, "breaks", call)
    monkeypatch.setattr(recorder, "after", after)
    folder = pipeline.run(watched(tmp_path, "stage=[dense,score,search]", "policy.kind=uniform"))
    assert (folder / "policy.json").exists()
    (warning,) = warnings_of(caplog)
    assert warning.startswith("logger.own")
    assert "no space left on device" in warning
    assert sum(name == call for name, _ in recorder.calls) == after + 1  # never called again
    assert recorder.calls[-1] == ("finish", False)


def test_a_chart_that_cannot_be_drawn_stops_nothing(tmp_path, recorder, monkeypatch, caplog):
    monkeypatch.setattr(contents, "charts", lambda *_: 1 / 0)
    pipeline.run(watched(tmp_path, "stage=[dense,score]"))
    assert any("ZeroDivisionError" in warning for warning in warnings_of(caplog))
    assert len(shown(recorder, Histogram)) == 11


def test_a_folder_that_cannot_be_written(tmp_path, recorder, caplog):
    """Where logs/ should be there is a file: root may write anywhere else."""
    home = tmp_path / "tiny" / "2026-01-31_12-00-00"
    (home / "steps").mkdir(parents=True)
    (home / "logs").write_text("")
    chosen = (f"resume={home}", "stage=[dense,score]", "logger=[csv,wandb_offline,tensorboard]")
    folder = pipeline.run(settings(tmp_path, *chosen))
    assert (folder / "scores.safetensors").exists()
    warned = sorted(re.match(r"logger\.(\w+) failed", warning).group(1) for warning in warnings_of(caplog))
    assert warned == ["csv", "tensorboard", "wandb"]


def test_a_server_that_cannot_be_reached(tmp_path):
    """One warning, with the folder to upload later; and nothing asks for a key, though there is none to be had."""
    environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0123456789" * 4, "WANDB_MODE": "online"}
    done = started(tmp_path, "logger=wandb", "logger.wandb.init_timeout=2", "stage=dense", **environment)
    (folder,) = (tmp_path / "tiny").iterdir()
    assert (folder / "dense" / "config.json").exists()
    (run,) = offline_runs(folder)
    said = done.stdout + done.stderr
    (warning,) = (line for line in said.splitlines() if re.match(r"\W*logger\.wandb", line))
    assert "cannot reach its server" in warning
    assert f"wandb sync {run.folder}" in warning
    assert "Traceback" not in said
    assert len(run.values("dense/train/task_step")) == 2
    assert run.exit_code == 0


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ((), ["csv"]),
        (("logger=none",), []),
        (("logger=[]",), []),
        (("logger=[csv,none]",), ["csv"]),
        (("logger=wandb_offline",), ["wandb"]),
        (("logger=[csv,wandb_offline]",), ["csv", "wandb"]),
        (("logger=[tensorboard,wandb]", "logger.tensorboard=null"), ["wandb"]),
    ],
)
def test_one_or_several(overrides, keys, tmp_path):
    composed = settings(tmp_path, *(overrides or ("logger=csv",)))
    assert list(build.build_trackers(composed)) == keys


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["logger=wandb", "logger.wandb.mode=onlin"], "logger.wandb.mode='onlin'"),
        (["logger=wandb", "logger.wandb.init_timeout=0"], "logger.wandb.init_timeout=0"),
        (["logger=wandb", "+logger.wandb.projekt=x"], "projekt"),
        (["logger=csv", "logger.csv._target_=lightning.pytorch.loggers.CSVLogger"], r"logger\.csv"),
        (["+logger.own=5"], r"logger\.own=5"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_trained(overrides, words, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "train", lambda *_, **__: pytest.fail("trained before it was refused"))
    with pytest.raises(ConfigError, match=words):
        pipeline.run(settings(tmp_path, *overrides))


@pytest.mark.usefixtures("recorder")  # for its caplog
def test_names_that_wandb_would_refuse_are_cut_and_cleaned_and_that_is_said_once(tmp_path, monkeypatch, caplog):
    import wandb

    opened, run = [], SimpleNamespace(settings=SimpleNamespace(mode="disabled"))
    monkeypatch.setattr(wandb, "init", lambda **given: opened.append(given) or run)
    monkeypatch.setattr(wandb, "setup", lambda *_: None)
    for ending in "aab":
        tracker = WandbTracker(project="my: photos?", mode="offline")
        tracker.start(RunInfo(tmp_path, "x" * 200 + ending, "y" * 200 + ending, "trial", {"name": "my photos"}))
    assert all(len(given[key]) <= 128 for given in opened for key in ("name", "group", "project"))
    assert len({given["group"] for given in opened}) == len({given["name"] for given in opened}) == 2
    assert {given["project"] for given in opened} == {"my- photos-"}
    wandb.Settings(project=opened[0]["project"])  # which refuses characters by itself
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("wandb takes no")]
    assert len(said) == len(set(said)) == 5  # two groups, two names, a project


@pytest.mark.parametrize("name", ["my photos", "Größe/2: ä", "n" * 300, "fine-name_1.0"])
def test_a_model_of_any_name_becomes_an_artifact(name):
    import wandb

    taken = _accepted("artifact", f"{name}-dense", _NOT_IN_ARTIFACT)
    assert wandb.Artifact(taken, type="model").name == taken
    assert (taken == f"{name}-dense") == (name == "fine-name_1.0")


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_said_with_the_remedy(name, tmp_path, monkeypatch):
    monkeypatch.setattr(f"lightning_mdc.app.tracking.{name}_tracker.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        pipeline.run(settings(tmp_path, f"logger={name}"))
    assert not list(tmp_path.glob("tiny/*"))


# --- what of a record is published ------------------------------------------------------------------------------------


def test_the_trial_that_failed_is_in_the_table_without_a_value():
    rows = (
        Trial(0, {"x": 0.5}, 1.0, 2.0, "done", 0.1, facts={"macs": 200.0}),
        Trial(1, {"x": 0.6}, 0.9, None, "failed", 0.1),
        Trial(2, {"x": 0.7}, 0.8, 9.0, "done", 0.1, facts={"macs": 160.0}),
        Trial(3, {"x": 0.8}, 0.8, 1.0, "done", 0.1, improvement=0.2, facts={"macs": 160.0}),
    )
    lowest = search_table(rows, "minimize")
    assert [row[:6] for row in lowest.rows] == [
        (0, 2.0, 2.0, 1.0, 200, None),
        (1, None, 2.0, 0.9, None, None),
        (2, 9.0, 2.0, 0.8, 160, None),
        (3, 1.0, 1.0, 0.8, 160, 0.2),
    ]
    assert [row[2] for row in search_table(rows, "maximize").rows] == [2.0, 2.0, 9.0, 9.0]
    assert [row[-1] for row in lowest.rows] == [0.5, 0.6, 0.7, 0.8]


@pytest.mark.usefixtures("one_chart")
def test_a_chart_becomes_a_picture_with_its_caption(tmp_path):
    (tmp_path / "steps").mkdir()
    (picture,) = published(RunRecord(tmp_path), "slim")
    assert picture.key == "charts/kept"
    assert picture.caption == "Title. What to read."
    assert picture.png.startswith(b"\x89PNG")


def test_classes_and_sensitivities_are_tables(tmp_path):
    for stage in ("test", "sensitivity"):
        RunFolder(tmp_path).finish(stage, "mark")
    labels = np.array([0, 0, 1, 1])
    predicted = {"dense": np.array([0, 0, 1, 0]), "slim": np.array([0, 1, 1, 0])}
    Outcomes(labels, predicted, ("cat", "dog", "fox")).save(tmp_path / "predictions.safetensors")
    Sensitivity((Cut("heads", 3, 0.5, 0.9, 0.1, 0.95),)).save(tmp_path / "sensitivity.csv")
    record = RunRecord(tmp_path)
    (classes,) = (item for item in published(record, "test") if isinstance(item, Table))
    assert classes.columns == ("class", "images", "top-1 dense", "top-1 slim")
    assert classes.rows == (("cat", 2, 1.0, 0.5), ("dog", 2, 0.5, 0.5), ("fox", 0, None, None))
    (cuts,) = (item for item in published(record, "sensitivity") if isinstance(item, Table))
    assert cuts.rows == (("heads", 3, 0.5, 0.9, 0.1, 0.95),)
