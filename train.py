"""Train a vision transformer, make it smaller, and report: ``python train.py --help``."""

import logging
import os
import sys
import warnings
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig

from lightning_mdc.app import pipeline, sweep, terminal
from lightning_mdc.app.settings import plain

log = logging.getLogger("lightning_mdc")


def set_up_messages() -> None:
    """What is left to say after ``conf/hydra/job_logging``: no warnings about what we chose."""
    if HydraConfig.get().verbose is True:  # of which Hydra itself tells only the root
        log.setLevel(logging.DEBUG)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*GPU available but not used.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated.*")
    warnings.filterwarnings("ignore", ".*number of training batches .* is smaller than the logging interval.*")


# Absolute, so that it is found also when this file is imported.
CONF = Path(__file__).parent.absolute() / "conf"


@hydra.main(config_path=str(CONF), config_name="train", version_base="1.3")
def app(cfg: DictConfig) -> float | None:
    set_up_messages()
    try:
        settings = plain(cfg)
        if settings["stage"] == "trial":
            return sweep.trial(settings, Path(HydraConfig.get().runtime.output_dir))
        pipeline.run(settings)
    except BaseException as error:
        # A sweep has to learn of a failed job by its exception; and whoever looks for a fault wants the traceback.
        wants_traceback = cfg.debug is True or os.environ.get("HYDRA_FULL_ERROR") == "1"
        words = terminal.last_words(error)
        if words is None or wants_traceback or HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        said, code = words
        # All processes of a run are stopped together; one says it.
        if code not in terminal.STOPPED or rank_zero_only.rank == 0:
            whose = f"[rank {rank_zero_only.rank}] " if rank_zero_only.rank else ""
            print(f"{whose}{said}", file=sys.stderr)
        sys.exit(code)
    return None


def main() -> None:
    """The command line."""
    sys.argv[1:] = terminal.overrides(sys.argv[1:])
    try:
        app()
    except (KeyboardInterrupt, SIGTERMException) as stop:
        # Before the first stage, or of a sweep, which notes how to go on.
        said, code = terminal.stopped_by(stop)
        print("\n".join([said, *getattr(stop, "__notes__", ())]), file=sys.stderr)
        sys.exit(code)
    except SystemExit as end:
        # Hydra says what it cannot compose in its own words; here is what to type.
        if end.code and not HydraConfig.initialized() and (said := terminal.hint(sys.argv[1:], CONF)) is not None:
            print(f"\n{said}", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
