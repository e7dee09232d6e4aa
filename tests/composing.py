"""Hydra reads and merges some twenty files whenever it composes. The tests have it do so a thousand times, from the
same few files: here that is done once for each choice of them.

What is said on the command line beside, values and whatever is wrong with them, goes through Hydra every time. Nobody
may change a file that was composed from before.
"""

import copy
import dataclasses
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig

_files: dict[str, ConfigResult | None] = {}
_chosen: dict[str, DefaultsList] = {}
_merged: dict[str, DictConfig] = {}
_read = ConfigRepository.load_config
_choose = config_loader_impl.create_defaults_list
_merge = ConfigLoaderImpl._compose_config_from_defaults_list


def remember() -> None:
    """From now on, in this process."""
    # What it copies of its sources for each composition it does not change.
    ConfigRepository.__deepcopy__ = lambda self, _: copy.copy(self)  # type: ignore[attr-defined]
    ConfigRepository.load_config = _file  # type: ignore[method-assign]
    config_loader_impl.create_defaults_list = _choice  # type: ignore[assignment]
    ConfigLoaderImpl._compose_config_from_defaults_list = _config  # type: ignore[method-assign]


def forget() -> None:
    """Hydra as it is."""
    del ConfigRepository.__deepcopy__  # type: ignore[attr-defined]
    ConfigRepository.load_config = _read  # type: ignore[method-assign]
    config_loader_impl.create_defaults_list = _choose
    ConfigLoaderImpl._compose_config_from_defaults_list = _merge  # type: ignore[method-assign]


def _folders(repo: Any) -> list[tuple[str, str]]:
    return [(source.provider, source.path) for source in repo.get_sources()]


def _file(self: ConfigRepository, config_path: str) -> ConfigResult | None:
    key = repr((_folders(self), config_path))
    if key not in _files:
        _files[key] = _read(self, config_path)
    return copy.deepcopy(_files[key])


def _choice(repo: Any, config_name: str | None, overrides_list: list[Any], **how: bool) -> DefaultsList:
    """Which files make up a config, by the overrides that name files."""
    said = Overrides(repo=repo, overrides_list=overrides_list)
    names = (said.override_choices, said.append_group_defaults, said.deletions)
    key = repr((_folders(repo), config_name, how, names))
    if key not in _chosen:
        _chosen[key] = _choose(repo, config_name, overrides_list, **how)
    return dataclasses.replace(_chosen[key], config_overrides=said.config_overrides)


def _config(self: ConfigLoaderImpl, defaults: list[Any], repo: Any) -> DictConfig:
    """What those files say together."""
    key = repr((_folders(repo), defaults))
    if key not in _merged:
        _merged[key] = _merge(self, defaults, repo)
    return _merged[key].copy()
