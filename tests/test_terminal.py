"""What is seen: bars on a terminal and nowhere else, plain lines, a log in the run, and words at an early end."""

import errno
import logging
import os
import pty
import re
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.errors import LiveError

import lightning_mdc as mdc
from lightning_mdc import progress
from lightning_mdc.app import main, pipeline, terminal
from lightning_mdc.app.main import conf_folder
from lightning_mdc.errors import SearchError
from lightning_mdc.policy_search.held_out import HeldOut
from tests.kinds import everyday, images, make
from tests.processes import program
from tests.processes import script as train
from tests.test_train import ROOT, TINY, script, settings

pytestmark = pytest.mark.slow  # CI runs them

# Anything but printable characters and line ends.
CONTROL = re.compile(r"[^\x20-\x7e\n\u00a0-\uffff]")


def newest(runs: Path) -> Path:
    return max((runs / "tiny").iterdir(), key=lambda path: path.name)


def on_a_terminal(
    work: Callable[..., object],
    *arguments: str,
    folder: Path,
    interrupt_at: str = "",
    by: signal.Signals = signal.SIGINT,
) -> tuple[str, int]:
    """(what is written to a terminal by `work` in a process of its own, the exit code).

    As soon as `interrupt_at` is there, Ctrl-C is typed, or the program gets another signal.
    """
    ours, theirs = pty.openpty()
    process = program(work, *arguments, output=theirs, folder=folder, TERM="xterm", COLUMNS="120")
    os.close(theirs)
    written, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            more = os.read(ours, 65536)
        except OSError:  # how a terminal says that nobody is there any more
            break
        if not more:
            break
        written += more
        if interrupt_at and interrupt_at.encode() in written:
            if by == signal.SIGINT:
                os.write(ours, b"\x03")
            else:
                os.kill(process.pid, by)
            interrupt_at = ""
    os.close(ours)
    process.join(30)
    return written.decode(), process.exitcode


def through_a_pipe(work: Callable[..., object], *arguments: str, folder: Path) -> str:
    """What is written to a pipe by `work` in a process of its own, which ends well."""
    ours, theirs = os.pipe()
    process = program(work, *arguments, output=theirs, folder=folder, FORCE_COLOR="1")
    os.close(theirs)
    with open(ours) as pipe:
        written = pipe.read()
    process.join(30)
    assert process.exitcode == 0, written
    return written


# --- bars -------------------------------------------------------------------------------------------------------------


def counts() -> None:
    logging.getLogger().setLevel("INFO")
    logging.getLogger().addHandler(progress.Screen())
    for shown in (True, False):
        with progress.bar("Counting", 3, shown=shown) as advance:
            for number in range(3):
                logging.info("line %d [of 3]", number)
                advance(f"note {number}")
        print("end", flush=True)


def test_a_bar_and_lines_on_a_terminal(tmp_path):
    written, code = on_a_terminal(counts, folder=tmp_path)
    assert code == 0
    shown, end, hidden = written.partition("end\r\n")
    assert end
    assert "Counting" in shown
    assert "3/3" in shown
    assert "note 2" in shown
    for number in range(3):  # whole, on a line of its own: after erasing the bar
        assert re.search(rf"\x1b\[2Kline {number} \[of 3\] *\r\n", shown)
    assert hidden.split() == ["line", "0", "[of", "3]", "line", "1", "[of", "3]", "line", "2", "[of", "3]", "end"]


def test_no_bar_and_no_control_character_without_a_terminal(tmp_path):
    assert through_a_pipe(counts, folder=tmp_path) == 2 * "line 0 [of 3]\nline 1 [of 3]\nline 2 [of 3]\nend\n"


def test_scoring_and_searching_draw_only_where_asked(monkeypatch):
    drawn = []
    monkeypatch.setattr(progress, "on_terminal", lambda: True)
    monkeypatch.setattr(progress.Progress, "start", lambda self: drawn.append(self.tasks[0].description))
    model = make()
    scores = mdc.score(model, [images(8)], "activation", progress=False)
    held_out = HeldOut([(images(20), torch.zeros(20))])
    mdc.search(model, scores, held_out, n_trials=1, options=mdc.SearchOptions(progress=False))
    assert not drawn
    mdc.score(model, [images(8)], "activation")
    mdc.search(model, scores, held_out, n_trials=1)
    assert drawn == ["Scoring", "Searching"]
    monkeypatch.setattr(progress, "is_first", lambda: False)
    mdc.score(model, [images(8)], "activation")
    assert len(drawn) == 2


def test_a_bar_within_somebody_elses_is_not_drawn_where_rich_draws_one(monkeypatch):
    drawn = []

    def start(bar):
        if drawn:
            raise LiveError("Only one live display may be active at once")
        drawn.append(bar)

    monkeypatch.setattr(progress, "on_terminal", lambda: True)
    monkeypatch.setattr(progress.Progress, "start", start)
    with progress.bar("Outer", 1) as outer, progress.bar("Inner", None) as inner:
        inner("of the inner one")
        outer("of the outer one")
        (task,) = drawn[0].tasks
        assert (task.description, task.completed, task.fields["note"]) == ("Outer", 1, "of the outer one")


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_through_a_pipe_is_plain_and_its_log_has_every_line(tmp_path):
    """As a newcomer starts it, from another folder; it leaves nothing but its run."""
    written = through_a_pipe(train, str(ROOT / "train.py"), *TINY, "stage=[dense,score,search]", folder=tmp_path)
    assert not CONTROL.search(written)
    lines = written.splitlines()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    folder = newest(tmp_path / "runs").relative_to(tmp_path)
    logged = (tmp_path / folder / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO    ", line) for line in logged)
    assert [line[28:] for line in logged] == lines
    for stage in ("dense", "score", "search"):
        assert len([line for line in lines if re.match(rf"{stage}: +done in [\d.]+ s: \w", line)]) == 1
    assert lines[-3] == f"all of it is in {folder}: dense, scores.safetensors, policy.json"
    assert lines[-2] == "go on with slim, distill, test, report:"
    typed = shlex.split(lines[-1])
    assert typed == ["python", str(ROOT / "train.py"), *TINY, f"resume={folder}"]


def test_the_command_that_is_said_goes_on(tmp_path, monkeypatch, capsys):
    assert script(monkeypatch, *TINY, f'runs="{tmp_path}/a b=c"', "stage=[dense]") == 0
    folder = newest(tmp_path / "a b=c")
    _, *arguments = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert script(monkeypatch, *arguments[1:], "stage=[dense,score]") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"resuming {folder}")
    assert "dense:   picked up" in said
    log = (folder / "log.txt").read_text()
    assert log.count("dense:   running") == 1
    assert log.index("run folder") < log.index("resuming")  # appended


def test_quiet_is_quiet_and_verbose_says_more(tmp_path, monkeypatch, capsys):
    chosen = (*TINY, f"runs={tmp_path}", "stage=[dense,score,search]")
    assert script(monkeypatch, *chosen, "-q", "policy.kind=uniform") == 0
    said = capsys.readouterr()
    assert said.out + said.err == ""
    assert "search:  done" in (newest(tmp_path) / "log.txt").read_text()
    assert script(monkeypatch, *chosen, "-v", f"resume={newest(tmp_path)}") == 0
    assert "  trial 0: value " in capsys.readouterr().out


def test_flags_are_for_every_process_of_a_run():
    assert terminal.overrides(["budget=0.5", "-q"]) == ["budget=0.5", "hydra/job_logging=quiet"]
    assert terminal.overrides(["--verbose", "-m"]) == ["hydra.verbose=[lightning_mdc]", "-m"]
    record = logging.LogRecord("a", logging.INFO, "", 0, "", (), None)
    speaks = terminal.FirstRank().filter
    assert speaks(record)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terminal.rank_zero_only, "rank", 1)
        assert not speaks(record)
        record.levelno = logging.WARNING
        assert speaks(record)


@pytest.mark.usefixtures("no_charts")
def test_after_the_last_stage_there_is_the_report_to_look_at(tmp_path, caplog):
    caplog.set_level("INFO", "lightning_mdc")
    few = ("distillation.seeds=[0]", "distillation.reference_seeds=[]", "policy.kind=uniform")
    folder = pipeline.run(settings(tmp_path, *few))
    assert "all of it is in" not in caplog.text  # the report says it
    caplog.clear()
    pipeline.run(settings(tmp_path, *few, f"resume={folder}"))
    assert f"mdc report {folder}" in caplog.text


# --- ending early -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", everyday(signal.SIGTERM, signal.SIGINT))
def test_a_stopped_training_says_how_to_go_on(tmp_path, by):
    """By Ctrl-C, or as a cluster stops it. Lightning shuts down by itself, in the second case with exit code 0."""
    code, word = (130, "interrupted") if by == signal.SIGINT else (143, "stopped")
    arguments = [*TINY, f"runs={tmp_path}", "stage=dense", "dense.epochs=2000", "-v"]
    written, ended = on_a_terminal(
        train, str(ROOT / "train.py"), *arguments, folder=tmp_path, interrupt_at="Epoch 3/", by=by
    )
    folder = newest(tmp_path)
    assert ended == code
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    *_, said, command = plain.strip().splitlines()
    assert said.strip() == f"{word} in step 'dense' of {folder}; go on from there with"
    given = shlex.split(command)
    assert given[-5:] == [f"runs={tmp_path}", "stage=dense", "dense.epochs=2000", "-v", f"resume={folder}"]
    assert "Traceback" not in written + (folder / "log.txt").read_text()
    assert "\x1b[?25h" in written[written.rindex("\x1b[?25l") :]  # the cursor is back


def test_an_interrupted_sweep_says_what_the_sweeper_noted(tmp_path, monkeypatch, capsys):
    stop = KeyboardInterrupt()
    stop.add_note("The sweep was interrupted: go on with ...")
    monkeypatch.setattr(main, "app", dies(stop))
    assert script(monkeypatch, "-m", f"runs={tmp_path}") == 130
    assert capsys.readouterr().err == "interrupted\nThe sweep was interrupted: go on with ...\n"


def dies(error: BaseException):
    def work(*_):
        raise error

    return work


def ends(tmp_path, monkeypatch, capsys, error: BaseException, *overrides: str) -> tuple[int, str]:
    """(exit code, what is on standard error) of a run whose first step ends by `error`."""
    monkeypatch.setitem(pipeline.ACTIONS, "dense", dies(error))
    code = script(monkeypatch, *TINY, f"runs={tmp_path}", "stage=[dense,score,search]", *overrides)
    said = capsys.readouterr().err
    assert f"resume={newest(tmp_path)}" in said
    return code, said


def test_ctrl_c_where_nothing_is_trained(tmp_path, monkeypatch, capsys):
    code, said = ends(tmp_path, monkeypatch, capsys, KeyboardInterrupt(), "seed=3")
    assert code == 130
    assert said.startswith("interrupted in step 'dense' of ")
    assert " seed=3 " in said
    assert said.count("\n") == 2


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "policy.json"),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # safetensors
    ],
)
def test_a_full_disk(error, tmp_path, monkeypatch, capsys):
    code, said = ends(tmp_path, monkeypatch, capsys, error)
    assert code == 1
    assert said.startswith("the disk is full: cannot write")
    assert "Make room\nin step 'dense' of" in said
    assert "Traceback" not in said
    assert "No space left" in (newest(tmp_path) / "log.txt").read_text()


def test_a_full_disk_below_an_error_of_ours(tmp_path, monkeypatch, capsys):
    error = SearchError("study file trials.jsonl cannot be written")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "trials.jsonl")
    _, said = ends(tmp_path, monkeypatch, capsys, error)
    assert said.startswith("the disk is full: cannot write trials.jsonl")


def test_an_error_of_ours_says_where_it_happened(tmp_path, monkeypatch, capsys):
    code, said = ends(tmp_path, monkeypatch, capsys, SearchError("nothing found"))
    assert code == 1
    assert said.startswith("SearchError: nothing found\nin step 'dense' of ")
    assert "Traceback" not in said


def test_a_killed_reader_of_images(tmp_path, monkeypatch, capsys):
    killed = RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. ")
    _, said = ends(tmp_path, monkeypatch, capsys, killed)
    assert "data.num_workers" in said
    assert "Traceback" not in said
    assert terminal.explain(RuntimeError("DataLoader worker (pid(s) 1, 2) exited unexpectedly")) is not None


def test_an_unexpected_error_keeps_its_traceback_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    code, said = ends(tmp_path, monkeypatch, capsys, ZeroDivisionError("surprise"))
    assert code == 1
    assert "ZeroDivisionError: surprise\nin step 'dense' of" in said
    assert "HYDRA_FULL_ERROR=1" in said
    log = (newest(tmp_path) / "log.txt").read_text()
    assert "Traceback" in log
    assert "surprise" in log
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ZeroDivisionError) as raised:
        script(monkeypatch, *TINY, f"runs={tmp_path}", "stage=[dense,score,search]")
    assert "resume=" in "".join(raised.value.__notes__)


def test_a_log_that_cannot_be_written_ends_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full, a disk that is always full")
    assert script(monkeypatch, *TINY, f"runs={tmp_path}", "stage=dense") == 0
    folder = newest(tmp_path)
    (folder / "log.txt").unlink()
    (folder / "log.txt").symlink_to("/dev/full")
    capsys.readouterr()
    assert script(monkeypatch, *TINY, f"runs={tmp_path}", "stage=[dense,score]", f"resume={folder}") == 0
    said = capsys.readouterr()
    assert said.err.count("cannot be written, so it ends here") == 1
    assert "score:   done in" in said.out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("bugdet=0.5", "there is no setting 'bugdet'; did you mean budget? "),
        (
            "epochs=3",
            "there is no setting 'epochs'; did you mean distillation.epochs or dense.epochs",
        ),
        ("logger=wanb", "logger='wanb' is none of csv, none, tensorboard, wandb, wandb_offline"),
        (
            "dense.epochs=choice(null,1)",
            "'dense.epochs=choice(null,1)': Hydra's functions take no null; list the values",
        ),
        ("hydra/sweeper/sampler=tpe", "'hydra/sweeper/sampler=tpe' is of Optuna's sweeper; leave it out"),
        ("budget", "'budget' gives no value; write budget=VALUE"),
        ("xyzzy=1", "there is no setting 'xyzzy'; mdc train --cfg job shows all of them"),
        ("~logger.csw=1", "there is no setting 'logger.csw'; did you mean logger.csv? mdc train"),
        ("+search.n_trails=3", "there is no setting 'search.n_trails'; did you mean search.n_trials? mdc train"),
        (
            "dense.optimizer.momentum=0.9",
            "there is no setting 'dense.optimizer.momentum'; did you mean dense.optimizer.opt? "
            "+dense.optimizer.momentum=0.9 hands it on as it is; ",
        ),
    ],
)
def test_a_misspelt_setting_is_named_with_the_one_that_is_meant(given, said):
    fine = ["-q", "budget=0.5", "logger=[csv,wandb]", "+dense.optimizer.momentum=0.9", "~search.bounds"]
    assert terminal.hint([*fine, given], conf_folder()).startswith(said)


def test_settings_that_exist_need_no_hint():
    fine = ["budget=0.5", "model=timm", "model.name=x", "+model.args.extra=1", "hydra.verbose=true", "-m", "~logger"]
    assert (
        terminal.hint([*fine, "+dense.optimizer.layer_decay=0.75", "+dense.optimizer.momentum=0.9"], conf_folder())
        is None
    )
