"""The report of one run, finished or not: the same content as a page and as Markdown, made from the run's folder."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from lightning_mdc.app.report.charts import Chart, charts
from lightning_mdc.app.report.findings import findings, verdict
from lightning_mdc.app.report.record import RunRecord
from lightning_mdc.app.report.tables import Table, by_class, by_seed, comparison
from lightning_mdc.app.run_folder import RECORDS
from lightning_mdc.app.step_table import STEPS, Output
from lightning_mdc.app.terminal import again
from lightning_mdc.figures.numbers import percent

PICTURES = "pictures"

# What the report itself is, which is about to be written when it says what there is.
_WRITTEN = {output.path: output.holds for output in STEPS["report"].outputs}
# What is there from the start, whatever step is done.
_OF_THE_RUN = {
    "logs/": "training curves",
    "log.txt": "what the run said, with times",
    "settings.json": "all settings of the run",
    f"{RECORDS}/": "which steps are done, with what settings and in what time",
}


@dataclass(frozen=True)
class Reproduction:
    """What it takes to get the same again.

    Attributes:
        commands: of every start, the first first.
        facts: seed, plan hash, versions, machine: (what, value).
        config: all settings, as YAML.
    """

    commands: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    config: str


@dataclass(frozen=True)
class Report:
    """What there is to say of one run.

    Attributes:
        title: of the run.
        folder: of the run.
        verdict: how it went, in a sentence.
        headline: a few numbers to see at once: (number, what it is).
        findings: further sentences.
        steps: of every step that is done: (name, seconds; None if it was picked up).
        comparison, seeds, classes: tables, where there are results.
        charts: pictures.
        outputs: what lies in the run's folder.
        commands: what to type next: (what it does, command).
        reproduction: how to get the same again.
    """

    title: str
    folder: Path
    verdict: str
    headline: tuple[tuple[str, str], ...]
    findings: tuple[str, ...]
    steps: tuple[tuple[str, float | None], ...]
    comparison: Table | None
    seeds: Table | None
    classes: Table | None
    charts: tuple[Chart, ...]
    outputs: tuple[Output, ...]
    commands: tuple[tuple[str, str], ...]
    reproduction: Reproduction


def report_of(record: RunRecord) -> Report:
    """The report of a run as far as it has come."""
    results = record.results
    changes = record.class_changes
    return Report(
        title=f"{record.name}: {'dense and slim side by side' if results is not None else 'not finished'}",
        folder=record.folder,
        verdict=_unfinished(record) if results is None else verdict(results),
        headline=_headline(record),
        findings=() if results is None else (*_warnings(record), *findings(results)[1:]),
        steps=tuple((name, known.get("seconds")) for name, known in record.steps.items()),
        comparison=None if results is None else comparison(results),
        seeds=by_seed(results) if results is not None and by_seed(results).rows else None,
        classes=by_class(changes) if changes else None,
        charts=tuple(charts(record)),
        outputs=outputs(record),
        commands=commands(record),
        reproduction=_reproduction(record),
    )


def markdown(report: Report, pictures: Mapping[str, Path]) -> str:
    """The report as Markdown.

    Args:
        pictures: path of each chart's picture by its key, relative to the report.
    """
    parts = [f"# {report.title}", f"**{report.verdict}**"]
    if report.comparison is not None:
        parts.append(report.comparison.markdown())
    if report.findings:
        parts.append("\n".join(f"- {line}" for line in report.findings))
    section = None
    for chart in report.charts:
        if chart.section != section:
            section = chart.section
            parts.append(f"## {section}")
        parts.append(f"![{chart.title}]({pictures[chart.key]})\n\n*{chart.title} {chart.caption}*")
    for title, table in (("Every class", report.classes), ("Every finetuning seed", report.seeds)):
        if table is not None:
            parts += [f"## {title}", table.markdown()]
    made = report.reproduction
    parts += [
        "## Where everything lies",
        "\n".join(f"- `{output.path}`: {output.holds}" for output in report.outputs),
        "## What to type next",
        "\n\n".join(f"{what}:\n\n```\n{command}\n```" for what, command in report.commands),
        "## To get the same again",
        "```\n" + "\n".join(made.commands) + "\n```",
        "\n".join(f"- {what}: {value}" for what, value in made.facts),
        "All settings are in `settings.json`.",
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def outputs(record: RunRecord) -> tuple[Output, ...]:
    """What lies in a run's folder, the report included that is about to be written; nothing of older settings."""
    made = {
        output.path: output.holds
        for name, step in STEPS.items()
        for output in step.outputs
        if output.grows or name in record.steps
    }
    there = {path: holds for path, holds in (made | _OF_THE_RUN).items() if (record.folder / path).exists()}
    return tuple(Output(path, holds) for path, holds in (_WRITTEN | there).items())


def commands(record: RunRecord) -> tuple[tuple[str, str], ...]:
    """What to type next: (what it does, command)."""
    folder = record.folder
    command = record.invocations[-1].command if record.invocations else "mdc train"
    once = ("stage", "skip")
    results = record.results
    if results is None:
        return (("Go on where it stopped", again(command, folder, without=once)),)
    best = results.slimmest
    model = folder / ("slim" if best.seed is None else f"finetuned/seed{best.seed}")
    use = f"import lightning_mdc as mdc; print(mdc.load({str(model)!r}))"
    found = [("Use the slim model", shlex.join(["python", "-c", use]))]
    policy = record.settings.get("policy", {})
    is_given = policy.get("file") or any(ratios is not None for ratios in policy.get("keep", {}).values())
    if not is_given:
        smaller = 0.8 * best.macs / results.dense.macs
        what = "Make it smaller still (dense model and scores are picked up, the slim models and this report replaced)"
        found.append((what, again(command, folder, f"budget={smaller:.2g}", without=once)))
    if record.sensitivity is None:
        look = again(command, folder, "stage=[sensitivity,report]", without=once)
        found.append(("See what each block alone can spare", look))
    return tuple(found)


def _warnings(record: RunRecord) -> tuple[str, ...]:
    """What makes all other numbers worth little."""
    results, outcomes = record.results, record.outcomes
    if results is None or outcomes is None:
        return ()
    chance, top1 = 1 / len(outcomes.class_names), results.dense.top1
    if top1 > 2 * chance:
        return ()
    return (
        f"The dense model gets {percent(top1)} right, and guessing among {len(outcomes.class_names)} classes "
        f"{percent(chance)}: nothing can be concluded from a comparison with it. Train it longer (dense.epochs).",
    )


def _headline(record: RunRecord) -> tuple[tuple[str, str], ...]:
    results = record.results
    if results is None:
        return ()
    dense, slim = results.dense, results.slimmest
    points = 100 * (results.slim_top1 - dense.top1)
    return (
        (percent(slim.macs / dense.macs), "of the MACs"),
        (percent(slim.params / dense.params), "of the parameters"),
        (percent(results.slim_top1), f"top-1 ({points:+.1f} points)"),
        *((f"{results.speedup(size):.2f}x", f"as fast at batch {size}") for size in results.batch_sizes),
    )


def _unfinished(record: RunRecord) -> str:
    done = [name for name in record.steps if name != "report"]
    words = [f"{', '.join(done)} {'is' if len(done) == 1 else 'are'} done" if done else "no step is done yet"]
    study = record.study
    if study is not None and "search" not in record.steps:
        over = [trial for trial in study.trials if trial.status != "running"]
        total = record.settings.get("search", {}).get("n_trials", "?")
        words.append(f"the search has {len(over)} of {total} trials")
        if study.best is not None:
            words[-1] += f", the best with {study.best.value:.4g}"
    return f"Not finished: {'; '.join(words)}."


def _reproduction(record: RunRecord) -> Reproduction:
    facts: list[tuple[str, str]] = []
    if "seed" in record.settings:
        facts.append(("seed", str(record.settings["seed"])))
    if record.plan is not None:
        facts.append(("plan", record.plan.hash))
    if record.invocations:
        last = record.invocations[-1]
        facts.append(("versions", ", ".join(f"{name} {number}" for name, number in last.versions.items())))
        facts.append(("machine", last.machine))
        facts.append(("started", last.started))
    config = yaml.safe_dump(dict(record.settings), sort_keys=False, allow_unicode=True) if record.settings else ""
    return Reproduction(tuple(each.command for each in record.invocations), tuple(facts), config)
