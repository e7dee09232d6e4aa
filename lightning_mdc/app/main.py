"""``mdc train``, which is also ``python train.py``: from the command line to a run, or to a trial of a sweep."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from lightning_mdc.app import pipeline, sweep, terminal
from lightning_mdc.app.settings import plain

log = logging.getLogger("lightning_mdc")

# For the help in conf/train.yaml.
OmegaConf.register_new_resolver("program", lambda: shlex.join(terminal.program()), replace=True)
OmegaConf.register_new_resolver("conf_folder", lambda: str(conf_folder()), replace=True)


def conf_folder() -> Path:
    """Where the configuration lies: beside this file if a wheel brought it, else at the repository's top level."""
    packaged = Path(__file__).absolute().parent / "conf"
    return packaged if packaged.is_dir() else packaged.parents[2] / "conf"


def main(subcommand: str = "") -> None:
    """Do what the command line says, by Hydra.

    Args:
        subcommand: the first word of the command line if it is not for Hydra: ``train`` of ``mdc train budget=0.5``.
    """
    program, *words = sys.argv
    arguments = terminal.overrides(words[1:] if subcommand else words)
    whole = [program, *([subcommand] if subcommand else []), *arguments]

    @hydra.main(config_path=str(conf_folder()), config_name="train", version_base="1.3")
    def start(cfg: DictConfig) -> float | None:
        sys.argv = whole  # by which Lightning starts the other processes of a distributed run
        return app(cfg)

    sys.argv = [program, *arguments]
    try:
        start()
    except (KeyboardInterrupt, SIGTERMException) as stop:
        # Before the first step, or of a sweep, which notes how to go on.
        message, code = terminal.stopped_by(stop)
        print("\n".join([message, *getattr(stop, "__notes__", ())]), file=sys.stderr)
        sys.exit(code)
    except SystemExit as end:
        # Hydra says what it cannot compose in its own words; here is what to type.
        if end.code and not HydraConfig.initialized() and (hint := terminal.hint(arguments, conf_folder())) is not None:
            print(f"\n{hint}", file=sys.stderr)
        raise


def app(cfg: DictConfig) -> float | None:
    """One run, or one trial of a sweep, whose value is returned. What can be explained ends it without a traceback."""
    set_up_messages()
    try:
        settings = plain(cfg)
        if settings["stage"] == "trial":
            return sweep.trial(settings, Path(HydraConfig.get().runtime.output_dir))
        pipeline.run(settings)
    except BaseException as error:
        # A sweep has to learn of a failed job by its exception; and whoever looks for a fault wants the traceback.
        wants_traceback = cfg.debug is True or os.environ.get("HYDRA_FULL_ERROR") == "1"
        explained = terminal.explain(error)
        if explained is None or wants_traceback or terminal.in_sweep():
            raise
        message, code = explained
        rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
        # All processes of a run are stopped together; one says it.
        if code not in terminal.STOPPED or rank == 0:
            print(f"[rank {rank}] {message}" if rank else message, file=sys.stderr)
        sys.exit(code)
    return None


def set_up_messages() -> None:
    """What is left to say after ``conf/hydra/job_logging``: no warnings about what we chose."""
    if HydraConfig.get().verbose is True:  # of which Hydra itself tells only the root
        log.setLevel(logging.DEBUG)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*GPU available but not used.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated.*")
    warnings.filterwarnings("ignore", ".*number of training batches .* is smaller than the logging interval.*")
