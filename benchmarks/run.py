"""All benchmarks, one after another, and at the end every target beside what was measured. `make bench` runs this.

    .venv/bin/python benchmarks/run.py                             # quick: about half an hour on two cores
    .venv/bin/python benchmarks/run.py --thorough --resume         # what pages show: hours, unattended
    .venv/bin/python benchmarks/run.py --only scoring search
    .venv/bin/python benchmarks/run.py --only search --give "search=--seeds 1"

Each has a process of its own, and never do two run at once: they time. One that fails does not keep the others from
running, and makes the exit status 1. Quick results go to ``benchmarks/results/quick/`` and are only printed; thorough
ones go to ``benchmarks/results/`` and into ``docs/benchmarks.md``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from targets import Target, verdicts

HERE = Path(__file__).resolve().parent
# In the order in which people ask: what can it do, what does it cost, how fast does it get, how good does it stay.
SCRIPTS = (
    "coverage",
    "scoring",
    "slim_speed",
    "training",
    "search",
    "search_models",
    "latency",
    "scale",
    "criteria",
    "accuracy",
    "pretrained",
    "finetuned",
    "callback",
    "recipes",
)
MINUTES = 15  # what all quick forms together may take on two cores
# Those that have to be told to go on; others know by themselves what is finished.
RESUMABLE = ("coverage", "slim_speed")
STOPPED = "was stopped"
# What benchmarks write themselves: no other code than before.
WRITTEN = ("README.md", "docs/benchmarks.md", "docs/guide.md", "docs/models.md", "benchmarks/results")


@dataclass(frozen=True)
class Outcome:
    """How one benchmark ended.

    Attributes:
        script: its name.
        seconds: wall clock.
        failure: what went wrong; empty if nothing did.
        revision: of the code it ran with; empty if that is unknown.
        arguments: that it was given.
        resumed: it had been run before, and was not run again.
    """

    script: str
    seconds: float
    failure: str = ""
    revision: str = ""
    arguments: tuple[str, ...] = ()
    resumed: bool = False


def revision() -> str:
    """The commit and what was changed since, but for what benchmarks write themselves; empty outside a clone."""
    commands = (
        ["git", "rev-parse", "HEAD"],
        ["git", "diff", "HEAD", "--", ".", *(f":(top,exclude){path}" for path in WRITTEN)],
    )
    try:
        commit, changes = (
            subprocess.run(command, cwd=HERE.parent, check=True, capture_output=True).stdout for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.decode().strip() + (f"+{hashlib.sha256(changes).hexdigest()[:12]}" if changes else "")


# --- one benchmark ----------------------------------------------------------------------------------------------------


def run(script: str, arguments: tuple[str, ...], results: Path, code: str, goes_on: bool = False) -> Outcome:
    """Run ``script.py`` to its end, or from where it was stopped; what it prints is seen as it is printed."""
    begun, wall = time.perf_counter(), time.time()
    path = HERE / f"{script}.py"
    if path.is_file():
        # A pipe would swallow what is printed until it is full.
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        command = [sys.executable, str(path), *(["--resume"] if goes_on else []), *arguments]
        status = subprocess.run(command, cwd=HERE.parent, env=environment).returncode
        failure = f"exit status {status}" if status else why_unread(results / f"{script}.json", wall)
    else:
        failure = f"{path} is missing"
    return Outcome(script, time.perf_counter() - begun, failure, code, arguments)


def why_unread(path: Path, since: float) -> str:
    """Why the results in `path` are not those of a run begun at `since` (seconds of the clock); empty if they are."""
    if not path.is_file() or path.stat().st_mtime < since - 2:  # some file systems keep whole seconds
        return f"wrote no {path}"
    try:
        targets_in(path)
    except (ValueError, KeyError, TypeError) as error:
        return f"{path} holds no targets that can be read: {type(error).__name__}: {error}"
    return ""


def targets_in(path: Path) -> list[Target]:
    return [Target.from_facts(facts) for facts in json.loads(path.read_text())["targets"]]


# --- all of them ------------------------------------------------------------------------------------------------------


def run_all(wanted: Iterable[tuple[str, tuple[str, ...]]], results: Path, resume: bool) -> list[Outcome]:
    """Run what is wanted (name and arguments), and note how each ended in ``run.json`` beside the results."""
    wanted, code, notes = list(wanted), revision(), results / "run.json"
    before = earlier(notes)

    def note(outcome: Outcome) -> None:
        before[outcome.script] = outcome
        results.mkdir(parents=True, exist_ok=True)
        notes.write_text(json.dumps({name: asdict(each) for name, each in before.items()}, indent=2) + "\n")

    outcomes = []
    for number, (script, arguments) in enumerate(wanted, 1):
        known = before.get(script)
        if resume and is_fresh(known, code, arguments, results):
            assert known is not None
            outcome = Outcome(**{**asdict(known), "resumed": True})
            print(f"[{number}/{len(wanted)}] {script}: done before, in {known.seconds:.0f} s", flush=True)
        else:
            print(f"[{number}/{len(wanted)}] {' '.join((script, *arguments))} ...", flush=True)
            goes_on = resume and script in RESUMABLE and was_stopped(known, code, arguments)
            note(Outcome(script, 0.0, STOPPED, code, arguments))
            outcome = run(script, arguments, results, code, goes_on)
            how = f"FAILED ({outcome.failure})" if outcome.failure else "done"
            print(f"[{number}/{len(wanted)}] {script}: {how} after {outcome.seconds:.0f} s\n", flush=True)
            note(outcome)
        outcomes.append(outcome)
    return outcomes


def earlier(notes: Path) -> dict[str, Outcome]:
    """What ``run.json`` tells of runs before this one; nothing if it cannot be read."""
    try:
        found = json.loads(notes.read_text())
        return {name: Outcome(**{**each, "arguments": tuple(each["arguments"])}) for name, each in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def is_fresh(known: Outcome | None, code: str, arguments: tuple[str, ...], results: Path) -> bool:
    """Whether it ended well, with this code and these arguments, and its results are still there."""
    return (
        known is not None
        and not known.failure
        and bool(code)
        and (known.revision, known.arguments) == (code, arguments)
        and (results / f"{known.script}.json").is_file()
    )


def was_stopped(known: Outcome | None, code: str, arguments: tuple[str, ...]) -> bool:
    """Whether it was begun with this code and these arguments, and did not end well: it can go on with what it left."""
    return known is not None and bool(known.failure and code) and (known.revision, known.arguments) == (code, arguments)


def summary(outcomes: Iterable[Outcome], results: Path, most_minutes: float | None = None) -> str:
    """One table of all targets, the time that all may take among them, then what failed."""
    outcomes = list(outcomes)
    seconds = math.fsum(outcome.seconds for outcome in outcomes)
    targets = [
        Target(f"{outcome.script}: {target.what}", target.measured, target.relation, target.wanted)
        for outcome in outcomes
        if not outcome.failure
        for target in targets_in(results / f"{outcome.script}.json")
    ]
    if most_minutes is not None:
        targets.append(Target("minutes for all", seconds / 60, "<=", most_minutes))
    missed = sum(not target.is_met for target in targets)
    lines = [verdicts(targets), ""] if targets else []
    lines += [f"{len(targets) - missed} targets passed, {missed} missed; {seconds / 60:.1f} min."]
    lines += [f"FAILED: {outcome.script}: {outcome.failure}" for outcome in outcomes if outcome.failure]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--quick", action="store_true", help="the default")
    form.add_argument("--thorough", action="store_true", help="as pages show it; hours")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", choices=SCRIPTS, metavar="NAME", help=f"of {', '.join(SCRIPTS)}")
    which.add_argument("--skip", nargs="+", choices=SCRIPTS, metavar="NAME", default=[], help="all but these")
    parser.add_argument(
        "--resume", action="store_true", help="leave out what ended well before, with this code and these arguments"
    )
    parser.add_argument(
        "--give",
        action="append",
        default=[],
        metavar="NAME=ARGUMENTS",
        help='further arguments of one of them, e.g. --give "scoring=--threads 1"; may be given several times',
    )
    arguments = parser.parse_args()
    given: dict[str, tuple[str, ...]] = {}
    for each in arguments.give:
        name, _, more = each.partition("=")
        if name not in SCRIPTS:
            parser.error(f"--give {each!r}: expected NAME=ARGUMENTS with a name of {', '.join(SCRIPTS)}")
        given[name] = (*given.get(name, ()), *shlex.split(more))
    chosen = arguments.only or [name for name in SCRIPTS if name not in arguments.skip]
    if not chosen:
        parser.error(f"--skip {' '.join(arguments.skip)}: leaves nothing to run")
    results = HERE / "results" if arguments.thorough else HERE / "results" / "quick"
    quick = () if arguments.thorough else ("--quick",)
    wanted = [(name, (*quick, *given.get(name, ()))) for name in SCRIPTS if name in chosen]
    try:
        outcomes = run_all(wanted, results, arguments.resume)
    except KeyboardInterrupt:
        print("\nstopped; with --resume the same command goes on from here", file=sys.stderr)
        return 130
    print(summary(outcomes, results, MINUTES if len(wanted) == len(SCRIPTS) and not arguments.thorough else None))
    return int(any(outcome.failure for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
