"""What there is to say of one run, finished or not; the templates make a page and Markdown of it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

import yaml

from lightning_mdc.app.report.charts import Chart
from lightning_mdc.app.report.findings import findings, verdict
from lightning_mdc.app.report.record import RunRecord
from lightning_mdc.app.report.tables import Table, by_class, by_seed, comparison
from lightning_mdc.app.run_folder import RECORDS
from lightning_mdc.app.step_table import STEPS, Output
from lightning_mdc.app.terminal import again
from lightning_mdc.figures.numbers import percent

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
class Report:
    """The report of a run as far as it has come.

    Attributes:
        record: the run.
        charts: its pictures.
    """

    record: RunRecord
    charts: tuple[Chart, ...] = ()

    @property
    def title(self) -> str:
        what = "not finished" if self.record.results is None else "dense and slim side by side"
        return f"{self.record.name}: {what}"

    @property
    def verdict(self) -> str:
        """How it went, in a sentence."""
        return _unfinished(self.record) if self.record.results is None else verdict(self.record.results)

    @property
    def headline(self) -> tuple[tuple[str, str], ...]:
        """A few numbers to see at once: (number, what it is)."""
        results = self.record.results
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

    @property
    def findings(self) -> tuple[str, ...]:
        """Further sentences; first what makes all other numbers worth little."""
        results, outcomes = self.record.results, self.record.outcomes
        if results is None:
            return ()
        lines, top1 = findings(results)[1:], results.dense.top1
        if outcomes is not None and top1 <= 2 * (chance := 1 / len(outcomes.class_names)):
            warning = (
                f"The dense model gets {percent(top1)} right, and guessing among {len(outcomes.class_names)} classes "
                f"{percent(chance)}: nothing can be concluded from a comparison with it. Train it longer "
                "(dense.epochs)."
            )
            lines = [warning, *lines]
        return tuple(lines)

    @property
    def comparison(self) -> Table | None:
        return None if self.record.results is None else comparison(self.record.results)

    @property
    def seeds(self) -> Table | None:
        """A row per finetuned model."""
        table = None if self.record.results is None else by_seed(self.record.results)
        return table if table is not None and table.rows else None

    @property
    def classes(self) -> Table | None:
        """A row per class."""
        return by_class(self.record.class_changes) if self.record.class_changes else None

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What lies in a run's folder, the report included that is about to be written; nothing of older settings."""
        made = {
            output.path: output.holds
            for name, step in STEPS.items()
            for output in step.outputs
            if output.grows or name in self.record.steps
        }
        there = {path: holds for path, holds in (made | _OF_THE_RUN).items() if (self.record.folder / path).exists()}
        return tuple(Output(path, holds) for path, holds in (_WRITTEN | there).items())

    @property
    def commands(self) -> tuple[tuple[str, str], ...]:
        """What to type next: (what it does, command)."""
        folder, results = self.record.folder, self.record.results
        command = self.record.invocations[-1].command if self.record.invocations else "mdc train"
        once = ("stage", "skip")
        if results is None:
            return (("Go on where it stopped", again(command, folder, without=once)),)
        best = results.slimmest
        model = folder / ("slim" if best.seed is None else f"finetuned/seed{best.seed}")
        use = f"import lightning_mdc as mdc; print(mdc.load({str(model)!r}))"
        found = [("Use the slim model", shlex.join(["python", "-c", use]))]
        policy = self.record.settings.get("policy", {})
        is_given = policy.get("file") or any(ratios is not None for ratios in policy.get("keep", {}).values())
        if not is_given:
            smaller = 0.8 * best.macs / results.dense.macs
            what = (
                "Make it smaller still (dense model and scores are picked up, the slim models and this report replaced)"
            )
            found.append((what, again(command, folder, f"budget={smaller:.2g}", without=once)))
        if self.record.sensitivity is None:
            look = again(command, folder, "stage=[sensitivity,report]", without=once)
            found.append(("See what each block alone can spare", look))
        return tuple(found)

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """What it takes to get the same again, beside command and settings: (what, value)."""
        record, facts = self.record, []
        if "seed" in record.settings:
            facts.append(("seed", str(record.settings["seed"])))
        if record.plan is not None:
            facts.append(("plan", record.plan.hash))
        if record.invocations:
            last = record.invocations[-1]
            facts.append(("versions", ", ".join(f"{name} {number}" for name, number in last.versions.items())))
            facts += [("machine", last.machine), ("started", last.started)]
        return tuple(facts)

    @property
    def config(self) -> str:
        """All settings, as YAML."""
        settings = dict(self.record.settings)
        return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True) if settings else ""


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
