"""Weights & Biases: one wandb run per run of ``train.py``, per trial of a sweep, and one for the sweep itself."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_mdc.app.tracking.tracker import Model, RunInfo, Shown, Tracker
from lightning_mdc.errors import ConfigError, check_number, check_one_of
from lightning_mdc.figures import loggers
from lightning_mdc.files import read_json, write_json

log = logging.getLogger(__name__)

# More lines than one start of a run logs. ``wandb sync`` drops lines whose step is not above all it has seen, so the
# second start of an offline run begins at this step, the third at twice of it.
_STEPS_PER_START = 1_000_000


# What wandb's server, and its client, take for a name.
_LONGEST, _NOT_IN_PROJECT, _NOT_IN_ARTIFACT = 128, r"[/\\#?%:]", r"[^A-Za-z0-9_.-]"


@cache
def _accepted(what: str, name: str, unknown: str = "$^") -> str:
    """A name as wandb takes it, which is said once: 128 characters at most, a hash in place of the rest, so that
    different names stay different, and no characters that match `unknown`."""
    taken = re.sub(unknown, "-", name)
    if len(taken) > _LONGEST:
        taken = f"{taken[: _LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    if taken != name:
        log.info("wandb takes no %s named %r: it is %r there", what, name, taken)
    return taken


@dataclass(eq=False)
class WandbTracker(Tracker):
    """One wandb run. What the arguments mean is said in ``conf/logger/wandb.yaml``.

    Raises:
        ConfigError: wandb is not installed, or a setting is none.
    """

    remedy = "what had been logged is safe; look at logs/wandb/*/logs/debug*.log, or choose another logger"

    project: str = "lightning-mdc"
    entity: str | None = None
    mode: str = "online"
    init_timeout: float = 30
    finish_timeout: float = 120
    models: bool = True

    def __post_init__(self) -> None:
        if find_spec("wandb") is None:
            raise ConfigError("logger=wandb needs the package wandb, which is not installed; run pip install wandb")
        check_one_of("logger.wandb.mode", self.mode, ("online", "offline", "disabled"), ConfigError)
        for key in ("init_timeout", "finish_timeout"):
            check_number(f"logger.wandb.{key}", getattr(self, key), "seconds", ConfigError, above=0)
        self._run: Any = None
        self._artifacts: dict[str, Any] = {}

    def start(self, info: RunInfo) -> None:
        self._info = info
        folder = info.folder / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # wandb would silently write elsewhere
            pass
        known = read_json(folder / "wandb.json")
        known = known if isinstance(known, dict) else {}  # none yet, or damaged: another wandb run is begun
        run_id, starts = known.get("id") or secrets.token_hex(4), known.get("starts", 0)
        write_json(folder / "wandb.json", {"id": run_id, "starts": starts + 1})
        self._run = self._open(folder, run_id)
        if starts and self._run.settings.mode == "offline":  # a server would know how far the run is
            self._run.log({}, step=starts * _STEPS_PER_START)
        if self._run.settings.mode == "online":
            log.info("wandb:   %s", self._run.url)

    def _open(self, folder: Path, run_id: str) -> Any:
        """The wandb run, recorded offline where the server does not answer."""
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

        opened: Callable[..., Any] = partial(
            wandb.init,
            project=_accepted("project", self.project, _NOT_IN_PROJECT),
            entity=self.entity,
            id=run_id,
            resume="allow",
            dir=str(folder),
            name=_accepted("name", self._info.name),
            group=None if self._info.group is None else _accepted("group", self._info.group),
            job_type=self._info.kind,
            config=dict(self._info.settings),
            settings=settings,
        )
        if self.mode != "online":
            return opened(mode=self.mode)
        try:
            if not wandb.login(prompt=False, verify=False):  # else a terminal would be asked for a key, and wait
                raise wandb.errors.UsageError("no API key; run `wandb login` once, or set WANDB_API_KEY")
            return opened(mode="online")
        except Exception as error:  # the network, the server, the key: there is more than one class for each
            reason = " ".join(str(error).split())[:200]
        # The service still holds the id of the run that could not be started. It may be a parent process's, which goes
        # on: the next `setup` then begins one of our own.
        wandb.teardown()
        os.environ.pop("WANDB_SERVICE", None)
        wandb.setup(settings)
        try:
            run = opened(mode="offline")
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
        return _Curves(self._run, training)

    def show(self, item: Shown) -> None:
        if isinstance(item, Model):
            self._upload(item)
        else:
            loggers.show(WandbLogger(experiment=self._run), item)

    def _upload(self, model: Model) -> None:
        import wandb

        if not self.models or self._run.settings.mode == "disabled":
            return
        title = f"{self._info.settings.get('name', 'model')}-{model.name.replace('/', '-')}"
        title = _accepted("artifact", title, _NOT_IN_ARTIFACT)
        parent = self._artifacts.get(model.parent or "")
        # Offline there is no lineage to write to (use_artifact refuses), so the parent is said here as well.
        facts = {**model.metadata, "parent": model.parent, "run": self._run.id}
        artifact = wandb.Artifact(title, type="model", metadata=json.loads(json.dumps(facts, default=str)))
        for path in sorted(model.folder.iterdir()):
            if path.is_file():
                artifact.add_file(str(path), name=path.name)
        if parent is not None and self._run.settings.mode == "online":
            parent.wait(timeout=int(self.init_timeout))
            self._run.use_artifact(parent)
        self._artifacts[model.name] = self._run.log_artifact(artifact, aliases=["latest", self._run.id])

    def finish(self, failed: bool) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(failed))

    @property
    def location(self) -> str | None:
        if self._run is None or self._run.settings.mode == "disabled":
            return None
        if self._run.settings.mode == "online":
            return str(self._run.url)
        return f"recorded offline; to upload it: wandb sync {self._run.settings.sync_dir}"


class _Curves(WandbLogger):
    """Lightning's logger for one training of several in the same wandb run."""

    def __init__(self, run: Any, training: str) -> None:
        super().__init__(experiment=run, prefix=training)
        self._training = training

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {f"{self._training}/{key}": value for key, value in metrics.items()}
        self.experiment.log(values if step is None else {**values, f"{self._training}/step": step})

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """They are the run's config already, and those of several trainings would overwrite one another."""
