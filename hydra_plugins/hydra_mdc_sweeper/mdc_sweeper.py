"""What Hydra imports at every start of every app: the settings and a sweeper that loads the rest when it is chosen.

Choose it with ``python app.py -m hydra/sweeper=mdc_gp_ei 'x=interval(0, 1)'``. The app returns the number that counts.
"""

from __future__ import annotations

from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from ._conf import MdcGpEiConf

# conf/hydra/sweeper/mdc_gp_ei.yaml begins with it, and so may an app's own file of that name.
ConfigStore.instance().store(group="hydra/sweeper", name="mdc_gp_ei_defaults", node=MdcGpEiConf, provider="mdc_sweeper")


class MdcSweeperSearchPath(SearchPathPlugin):
    """Puts this package's ``conf`` last on Hydra's search path: an app's own file comes first."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """See Hydra."""
        search_path.append(provider="mdc_sweeper", path="pkg://hydra_plugins.hydra_mdc_sweeper.conf")


class MdcGpEiSweeper(Sweeper):
    """Asks a Gaussian process which trials to run next, has Hydra's launcher run them, and tells it the results.

    Args:
        settings: see `MdcGpEiConf`.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self._sweep: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Find the folder and the study, and make the launcher."""
        from ._sweep import Sweep

        self._sweep = Sweep(self.settings, config, hydra_context, task_function)

    def sweep(self, arguments: list[str]) -> Any:
        """Run all trials, and return what ``optimization_results.yaml`` says."""
        return self._sweep.run(arguments)
