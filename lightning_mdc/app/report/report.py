"""What there is to say of one run, finished or not; the templates make a page and Markdown of it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

import yaml

from lightning_mdc.app.report.record import RunRecord
from lightning_mdc.app.report.results import FINETUNED, REFERENCE, Results, mean_correct
from lightning_mdc.app.report.tables import Table, by_class, by_seed, comparison
from lightning_mdc.app.run_folder import RECORDS
from lightning_mdc.app.step_table import STEPS, Output
from lightning_mdc.app.terminal import again
from lightning_mdc.figures.charts import Chart
from lightning_mdc.figures.numbers import counted, percent, scaled, seconds

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
        plan = self.record.plan
        size = "" if plan is None or plan.input_size is None else " at {} x {} pixels".format(*plan.input_size)
        return (
            (percent(slim.macs / dense.macs), f"of the MACs{size}"),
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


# --- what the numbers mean, in words; each sentence only if they say so -----------------------------------------------


def verdict(results: Results) -> str:
    """The one sentence: what it costs, what accuracy is left, how much faster it is; more where finetuning did harm."""
    dense, slim, right = results.dense, results.slimmest, results.slim_correct
    after = " after finetuning" if results.of(FINETUNED) else ", not finetuned,"
    batch = results.batch_sizes[-1]
    sentence = (
        f"At {percent(slim.macs / dense.macs)} of the MACs and {percent(slim.params / dense.params)} of the parameters "
        f"the slim model{after} gets {counted(right)} of {dense.images} test "
        f"images right, {_difference(right - dense.correct)} dense ({percent(dense.top1)} → "
        f"{percent(right / dense.images)}), and is {results.speedup(batch):.2f}x as fast at batch {batch}."
    )
    return " ".join((sentence, *results.harm))


def findings(results: Results) -> list[str]:
    """The verdict, and what else a reader would have to work out from the table."""
    lines = [verdict(results)]
    finetuned, reference = results.of(FINETUNED), results.of(REFERENCE)
    if finetuned and reference:
        gap = results.slim_correct - mean_correct(reference)
        lines.append(
            "The fair comparison is with a dense model given the same extra epochs and the same teacher: slim gets "
            f"{_difference(gap)} that."
        )
    overhead = overhead_line(results)
    return lines if overhead is None else [*lines, overhead]


def overhead_line(results: Results) -> str | None:
    """Why a tiny model gains little at the smallest batch; None where it was not measured so.

    "Little" is less than half of what it gains at the largest batch: 1.05x against 1.4x, say.
    """
    small, large = results.batch_sizes[0], results.batch_sizes[-1]
    gain, full_gain = results.speedup(small) - 1, results.speedup(large) - 1
    if small == large or full_gain <= 0 or gain >= full_gain / 2:
        return None
    dense = results.dense
    return (
        f"At batch {small} the slim model is {1 + gain:.2f}x as fast as dense, at batch {large} {1 + full_gain:.2f}x: "
        f"{scaled(dense.macs)}MACs are so few that most of the {seconds(dense.latency[small])} of a single image goes "
        "into starting operations one by one. Pruning makes operations smaller, not fewer, and a token stage adds some."
    )


def _difference(images: float) -> str:
    if abs(images) < 0.05:
        return "as many test images right as"
    number = counted(abs(images))
    return f"{number} {'more' if images > 0 else 'fewer'} test image{'' if number == '1' else 's'} right than"
