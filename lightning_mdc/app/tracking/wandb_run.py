"""Weights & Biases: one wandb run per run of ``train.py``, per trial of a sweep, and one for the sweep itself."""

from __future__ import annotations

import io
import json
import logging
import secrets
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_mdc.app.tracking.tracker import About, Tracker
from lightning_mdc.errors import ConfigError
from lightning_mdc.figures.items import Histogram, Item, Model, Numbers, Panel, Picture, Summary, Table
from lightning_mdc.files import write_json

log = logging.getLogger(__name__)

_MODES = ("online", "offline", "disabled")
# Steps; a run that is killed has noted all but the last so many.
_NOTED_EVERY = 50

# What a list of runs shows of a curve, where the last value is not what counts.
_BEST_OF = {"search/value": "max,last", "search/incumbent": "max", "search/improvement": "min,last"}


class WandbTracker(Tracker):
    """One wandb run.

    Args:
        project: that the run belongs to.
        entity: user or team; None: the one that is logged in.
        mode: ``online``, ``offline`` (recorded in the run's folder, for ``wandb sync``) or ``disabled``.
        init_timeout: seconds to wait for the server; after that the run is recorded offline.
        finish_timeout: seconds that a run waits at its end for what has not been uploaded yet.
        models: whether dense, slim and finetuned models are uploaded as artifacts.

    Raises:
        ConfigError: wandb is not installed, or a setting is none.
    """

    remedy = "what had been logged is safe; look at logs/wandb/*/logs/debug*.log, or choose another logger"

    def __init__(
        self,
        project: str = "lightning-mdc",
        entity: str | None = None,
        mode: str = "online",
        init_timeout: float = 30,
        finish_timeout: float = 120,
        models: bool = True,
    ) -> None:
        if find_spec("wandb") is None:
            raise ConfigError("logger=wandb needs the package wandb, which is not installed; run pip install wandb")
        if mode not in _MODES:
            raise ConfigError(f"logger.wandb.mode={mode!r}: expected one of {', '.join(_MODES)}")
        for key, seconds in (("init_timeout", init_timeout), ("finish_timeout", finish_timeout)):
            if type(seconds) not in (int, float) or not seconds > 0:
                raise ConfigError(f"logger.wandb.{key}={seconds!r}: expected a number of seconds above 0")
        self.project, self.entity, self.mode, self.models = project, entity, mode, models
        self.init_timeout, self.finish_timeout = float(init_timeout), float(finish_timeout)
        self._run: Any = None
        self._about: About | None = None
        self._artifacts: dict[str, Any] = {}
        self._first_step: int | None = None

    def start(self, about: About) -> None:
        self._about = about
        home = about.folder / "logs"
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):  # wandb would silently write elsewhere
            pass
        known = _read(home / "wandb.json")
        run_id = known.get("id") or secrets.token_hex(4)
        write_json(home / "wandb.json", {**known, "id": run_id})
        self._run = self._opened(self.mode, home, run_id, about)
        if known.get("steps") and self._run.settings.mode == "offline":
            # A server would know how far the run is. Steps have to grow, else what comes now is dropped by wandb sync.
            self._first_step = int(known["steps"]) + _NOTED_EVERY
        for key, best in _BEST_OF.items():
            self._run.define_metric(key, step_metric="search/trial", summary=best)
        self._run.define_metric("search/cost", step_metric="search/trial")
        if self._run.settings.mode == "online":
            log.info("wandb:   %s", self._run.url)

    def _opened(self, mode: str, home: Path, run_id: str, about: About) -> Any:
        import wandb

        settings = wandb.Settings(
            silent=True,
            quiet=True,
            console="off",
            init_timeout=self.init_timeout,
            login_timeout=self.init_timeout,
            finish_timeout=self.finish_timeout,
            symlink=False,
            reinit="create_new",
        )
        wandb.setup(settings)  # what is said before there is a run, too

        def opened(mode: str) -> Any:
            return wandb.init(
                project=self.project,
                entity=self.entity,
                mode=mode,  # type: ignore[arg-type]
                id=run_id,
                resume="allow",
                dir=str(home),
                name=about.name,
                group=about.group,
                job_type=about.kind,
                config=dict(about.settings),
                settings=settings,
            )

        if mode != "online":
            return opened(mode)
        try:
            if not wandb.login(prompt=False, verify=False):  # else a terminal would be asked for a key, and wait
                raise wandb.errors.UsageError("no API key; run `wandb login` once, or set WANDB_API_KEY")
            return opened("online")
        except Exception as error:  # the network, the server, the key: there is more than one class for each
            reason = " ".join(str(error).split())[:200]
        # The service still holds the id of the run that could not be started.
        wandb.teardown()
        wandb.setup(settings)
        try:
            run = opened("offline")
        except Exception as error:
            raise RuntimeError(f"not online: {reason}; nor offline: {error}") from error
        log.warning(
            "logger.wandb cannot reach its server (%s); this run is recorded offline, upload it later with "
            "`wandb sync %s`",
            reason,
            run.settings.sync_dir,
        )
        return run

    def curves(self, training: str) -> Logger:
        # An axis of its own: steps of several trainings, and of the search, are not one time.
        self._run.define_metric(f"{training}/step")
        self._run.define_metric(f"{training}/*", step_metric=f"{training}/step")
        return _Curves(self, training)

    def show(self, item: Item) -> None:
        import wandb
        from PIL import Image

        match item:
            case Numbers():
                self.log({**item.values, item.axis: item.at})
            case Histogram():
                self.log({item.key: wandb.Histogram(item.values.tolist())})
            case Picture():
                image = Image.open(io.BytesIO(item.png)).convert("RGB")
                self.log({item.key: wandb.Image(image, caption=item.caption)})
            case Table():
                panels = {panel.key: _drawn(item, panel) for panel in item.panels}
                self.log({item.key: _table(item.columns, item.rows), **panels})
            case Summary():
                self._run.summary.update(dict(item.values))
                self._note_steps()
            case Model():
                self._upload(item)

    def log(self, values: Mapping[str, Any]) -> None:
        """Add one line to the run's history."""
        self._run.log(dict(values), step=self._first_step)
        self._first_step = None
        if self._run.step % _NOTED_EVERY == 0:
            self._note_steps()

    def _upload(self, model: Model) -> None:
        import wandb

        if not self.models or self._run.settings.mode == "disabled":
            return
        assert self._about is not None
        title = f"{self._about.settings.get('name', 'model')}-{model.name.replace('/', '-')}"
        parent = self._artifacts.get(model.parent or "")
        # Offline there is no lineage to write to (use_artifact refuses), so the parent is said here as well.
        said = {**model.metadata, "parent": model.parent, "run": self._run.id}
        artifact = wandb.Artifact(title, type="model", metadata=json.loads(json.dumps(said, default=str)))
        for path in sorted(model.folder.iterdir()):
            if path.is_file():
                artifact.add_file(str(path), name=path.name)
        if parent is not None and self._run.settings.mode == "online":
            parent.wait(timeout=int(self.init_timeout))
            self._run.use_artifact(parent)
        self._artifacts[model.name] = self._run.log_artifact(artifact, aliases=["latest", self._run.id])

    def finish(self, failed: bool) -> None:
        if self._run is None:
            return
        self._note_steps()
        self._run.finish(exit_code=int(failed))

    def _note_steps(self) -> None:
        assert self._about is not None
        write_json(self._about.folder / "logs" / "wandb.json", {"id": self._run.id, "steps": self._run.step})

    @property
    def place(self) -> str | None:
        if self._run is None or self._run.settings.mode == "disabled":
            return None
        if self._run.settings.mode == "online":
            return str(self._run.url)
        folder = self._run.settings.sync_dir
        return f"recorded offline; to upload it: wandb sync {folder}"


class _Curves(WandbLogger):
    """Lightning's logger for one training of several in the same wandb run."""

    def __init__(self, tracker: WandbTracker, training: str) -> None:
        super().__init__(experiment=tracker._run, prefix=training)
        self._tracker, self._training = tracker, training

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {f"{self._training}/{key}": value for key, value in metrics.items()}
        self._tracker.log(values if step is None else {**values, f"{self._training}/step": step})

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """They are the run's config already, and those of several trainings would overwrite one another."""


def _table(columns: tuple[str, ...], rows: tuple[tuple[Any, ...], ...]) -> Any:
    import wandb

    return wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)


def _drawn(table: Table, panel: Panel) -> Any:
    """wandb's own chart of some columns; rows that lack one of them are left out."""
    import wandb

    columns = (panel.x, *panel.y)
    places = [table.columns.index(name) for name in columns]
    if panel.kind == "line":
        cells = {name: [row[place] for row in table.rows] for name, place in zip(columns, places, strict=True)}
        known = {
            name: [(x, y) for x, y in zip(cells[panel.x], cells[name], strict=True) if y is not None]
            for name in panel.y
        }
        return wandb.plot.line_series(
            xs=[[x for x, _ in known[name]] for name in panel.y],
            ys=[[y for _, y in known[name]] for name in panel.y],
            keys=list(panel.y),
            title=panel.title,
            xname=panel.x,
        )
    rows = tuple(tuple(row[place] for place in places) for row in table.rows)
    chosen = _table(columns, tuple(row for row in rows if None not in row))
    draw = wandb.plot.scatter if panel.kind == "scatter" else wandb.plot.bar
    return draw(chosen, panel.x, panel.y[0], title=panel.title)


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or damaged: another run is begun
        return {}
    return known if isinstance(known, dict) else {}
