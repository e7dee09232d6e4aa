"""The settings of ``hydra/sweeper=mdc_gp_ei``, as Hydra checks them."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ConstraintConf:
    """What a trial may cost: at most `target`, and at least `target` - `tolerance` if there is a tolerance."""

    # Dotted path of a function ``params -> cost``: the parameters by name, fixed ones too, as a dict. Or of a class
    # that is made once, from the app's config, and whose instance is such a function. The instance may have methods
    # that take and return such a dict: ``snap`` makes parameters equal that mean the same, ``first`` says which are to
    # be tried first (vectorised, any number of them, n_initial_points at most). null: no constraint.
    callable: str | None = None
    # The most a trial may cost.
    target: float | None = None
    # How far below the target a trial may stay; null: as far as whole steps leave it.
    tolerance: float | None = None
    # true: the callable prices many trials at once. A parameter is an array (n,), (n, m) for a list of m; returns (n,).
    vectorized: bool = False


@dataclass
class MdcGpEiConf:
    """The settings of ``hydra/sweeper=mdc_gp_ei``."""

    _target_: str = "hydra_plugins.hydra_mdc_sweeper.mdc_sweeper.MdcGpEiSweeper"
    # Nothing below is made by Hydra: a sampler of Optuna's would be, before it could be refused.
    _recursive_: bool = False
    # What to search, in Hydra's sweep syntax; overrides on the command line add to it and replace.
    #   interval(0.1, 1)           a number            tag(log, interval(1e-5, 1e-2))   where ratios count
    #   int(interval(1, 8))        1, 2, ..., 8        range(1, 10, 2)                  1, 3, 5, 7, 9
    #   choice(a, b, c)  or  a,b,c one of these        tag(x12, interval(0.1, 1))       a list of twelve such numbers
    # Anything else is a fixed override of every trial.
    params: dict[str, Any] = field(default_factory=dict)
    # minimize or maximize what the app returns.
    direction: str = "minimize"
    # How many trials, those of a study that goes on counted.
    n_trials: int = 20
    # How many of them at the same time: the launcher gets so many at once. With 1 each knows the results of all before.
    n_jobs: int = 1
    # How many before the Gaussian process is believed.
    n_initial_points: int = 10
    # The share of all trials so far that may fail, looked at after every batch; above it the sweep ends.
    max_failure_rate: float = 0.0
    # Same seed, same results, same n_jobs: same trials.
    seed: int = 0
    # File that remembers the trials; a sweep that was stopped goes on from it, in its old folder.
    # null: study.jsonl in the folder of the sweep.
    study: str | None = None
    # File of an earlier study of the same parameters, of another target for example, to learn from.
    warm_start: str | None = None
    # By how much a point has to be better to count, in units of what the app returns.
    xi: float = 0.0
    # How many points are compared for each trial; null: 2000, or 200 if each has to be priced on its own.
    n_candidates: int | None = None
    # What a trial may cost.
    constraint: ConstraintConf | None = field(default_factory=ConstraintConf)
    # Dotted path of a function ``f(results, sweep_dir, config)`` to call after the last trial.
    on_end: str | None = None
    # Of Optuna's sweeper: refused with what to write instead.
    sampler: Any = field(default_factory=lambda: {"seed": None, "n_startup_trials": None})
    # Likewise.
    storage: Any = None
    # Likewise.
    study_name: Any = None
    # Likewise.
    search_space: Any = None
    # Likewise.
    custom_search_space: Any = None
