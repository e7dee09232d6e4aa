"""A toy app for the sweeper: how far are two floats and an int from where they should be? Needs Hydra only."""

import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

RETURNS = {"none": None, "text": "good", "true": True, "dict": {"a": 1.0}, "nan": math.nan, "inf": math.inf, "whole": 7}


class SIGTERMException(SystemExit):
    """What Lightning raises when a process is told to end."""


def distance(cfg: DictConfig) -> float:
    """0 at x = 0.3, y = 0.7, n = 5, lr = 0.001, kind a, and if half is kept of everything."""
    off = (cfg.x - 0.3) ** 2 + (cfg.y - 0.7) ** 2 + 0.02 * (cfg.n - 5) ** 2 + sum((k - 0.5) ** 2 for k in cfg.keep)
    return off + (math.log10(cfg.lr) + 3) ** 2 / 10 + {"a": 0.0, "b": 0.1}.get(cfg.kind, 0.2)


@hydra.main(config_path=str(Path(__file__).parent / "conf"), config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> Any:
    number = HydraConfig.get().job.num
    _note(cfg, f"begin {number}")
    time.sleep(cfg.sleep)
    kinds = [kind for kind, _, at in (entry.rpartition("-") for entry in cfg.trouble) if int(at) == number]
    if kinds and not (cfg.lab and (Path(cfg.lab) / "mended").exists()):
        return _go_wrong(kinds[0], number)
    _note(cfg, f"end {number}")
    return distance(cfg)


def _note(cfg: DictConfig, line: str) -> None:
    if cfg.lab is not None:
        with (Path(cfg.lab) / "runs.txt").open("a") as file:
            file.write(line + "\n")


def _go_wrong(kind: str, number: int) -> Any:
    if kind == "raise":
        raise ValueError(f"trial {number} went\nwrong")
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "terminate":
        raise SIGTERMException
    if kind == "quit":
        sys.exit(2)
    if kind in ("exit", "kill"):  # once the trial before is over, so that there is something to be recovered
        before = Path(HydraConfig.get().runtime.output_dir).parent / str(number - 1) / ".mdc_result.json"
        while not before.exists() or '"seconds"' not in before.read_text():
            time.sleep(0.01)
        os._exit(3) if kind == "exit" else os.kill(os.getpid(), signal.SIGKILL)
    return RETURNS[kind]


# --- what the sweeper is told to import -------------------------------------------------------------------------------


def cost(params: dict[str, Any]) -> float:
    """More x, y or n cost more; a fixed ``lr`` of 0.1 costs 1."""
    return params["x"] + params["y"] + params.get("n", 0) / 10 + (params.get("lr") == 0.1)


def cost_of_keep(params: dict[str, Any]) -> Any:
    """The mean of a list: of one trial, or of many at once."""
    return params["keep"].mean(axis=1) if hasattr(params["keep"], "mean") else sum(params["keep"]) / len(params["keep"])


class Tenths:
    """Prices one trial; only tenths of x matter, and the smallest x stands for them all. Every n costs a tenth."""

    def __init__(self, config: DictConfig) -> None:
        self.n = config.n

    def __call__(self, params: dict[str, Any]) -> Any:
        return self.snap(params)["x"] + params["y"] + self.n / 10

    def snap(self, params: dict[str, Any]) -> dict[str, Any]:
        """Works for one trial and for many."""
        return {**params, "x": (params["x"] * 10 + 1e-9) // 1 / 10}

    def first(self, params: dict[str, Any]) -> dict[str, Any]:
        """Likewise."""
        return {**params, "x": params["x"] * 0 + 0.27, "y": params["y"] * 0 + 0.3}


class TwoStarts(Tenths):
    """Wants two trials to be tried first, if it may say so."""

    def first(self, params: dict[str, Any]) -> dict[str, Any]:
        return {**params, "x": np.array([0.27, 0.47]), "y": np.array([0.3, 0.1])}


class Uneven(Tenths):
    """Names two values of one parameter, and one of the other."""

    def first(self, params: dict[str, Any]) -> dict[str, Any]:
        return {**params, "x": np.array([0.27, 0.47])}


def broken(params: dict[str, Any]) -> float:
    """Cannot price anything."""
    raise ZeroDivisionError("no price")


def wordy(params: dict[str, Any]) -> str:
    """Prices with a word."""
    return "cheap"


not_callable = 3


def finish(results: dict[str, Any], sweep_dir: Path, config: DictConfig) -> None:
    """For ``on_end``."""
    (sweep_dir / "finished.txt").write_text(f"{len(results['trials'])} {results['best_trial']} {config.lr}")


if __name__ == "__main__":
    main()
