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
from omegaconf import DictConfig

from lightning_mdc import pipeline, policy_sweep
from lightning_mdc.assembly import plain
from lightning_mdc.errors import MdcError

log = logging.getLogger("lightning_mdc")


def set_up_messages() -> None:
    """Our lines as they are, on the screen; of Lightning's only warnings, and of those none about what we chose."""
    if not log.handlers:
        log.addHandler(logging.StreamHandler(sys.stdout))
    # Of several processes the first one speaks; the others have warnings only.
    log.setLevel(logging.INFO if rank_zero_only.rank == 0 else logging.WARNING)
    log.propagate = False
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    # This one says which process of a distributed run died.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*GPU available but not used.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated.*")
    warnings.filterwarnings("ignore", ".*number of training batches .* is smaller than the logging interval.*")


# Absolute, so that it is found also when this file is imported.
@hydra.main(config_path=str(Path(__file__).parent / "conf"), config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    set_up_messages()
    try:
        settings = plain(cfg)
        if settings["stage"] == "trial":
            return policy_sweep.trial(settings, Path(HydraConfig.get().runtime.output_dir))
        pipeline.run(settings)
    except MdcError as error:
        # A sweep has to learn of a failed job by its exception; and whoever looks for a fault wants the traceback.
        wants_traceback = cfg.debug is True or os.environ.get("HYDRA_FULL_ERROR") == "1"
        if wants_traceback or HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        whose = f"[rank {rank_zero_only.rank}] " if rank_zero_only.rank else ""
        print(f"{whose}{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    return None


if __name__ == "__main__":
    main()
