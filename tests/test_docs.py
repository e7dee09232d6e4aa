"""What README and docs/ say is so: settings, commands and code."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import lightning_mdc as mdc
from tests import strangers

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
PAGES = (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
WRITTEN = tuple(page for page in PAGES if page.name != "configuration.md")  # by hand


# --- the reference of settings ----------------------------------------------------------------------------------------


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs" / "make_configuration.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def sections() -> dict[str, dict[str, str]]:
    """Of the page: heading without backticks -> key -> default as the page has it."""
    found: dict[str, dict[str, str]] = {"": {}}
    section = found[""]
    for line in (ROOT / "docs" / "configuration.md").read_text().splitlines():
        if line.startswith("#"):
            section = found.setdefault(re.sub(r"^#+ |`| \(default\)", "", line), {})
        elif row := re.match(r"\| `([^`]+)` \| (?:`(.*?)`)? \| ", line):
            section[row[1]] = (row[2] or "").replace("\\|", "|")
    return found


def options() -> list[str]:
    return [
        f"{path.parent.relative_to(CONF).as_posix()}={path.stem}"
        for path in sorted(CONF.glob("*/**/*.yaml"))
        if not path.stem.startswith("_")
    ]


def composed(*overrides: str) -> dict[str, Any]:
    """What Hydra makes of all files together: dotted key -> value, interpolations as they are written."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", list(overrides), return_hydra_config=True)
    return dict(leaves(OmegaConf.to_container(cfg, resolve=False)))


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_the_reference_of_settings_is_current():
    assert (ROOT / "docs" / "configuration.md").read_text() == generator().page(), "run: make docs"


@pytest.mark.parametrize("option", [None, *options()])
def test_every_setting_hydra_knows_is_in_the_reference_with_its_default(option):
    """Asked of Hydra, which knows nothing of how the page is made."""
    page = sections()
    found = composed(option) if option else composed()
    # Hydra has hundreds of settings of its own; those of a group that we have an option of are ours.
    prefix = option.partition("=")[0].replace("/", ".") + "." if option else ""
    ours = {key for key in found if not key.startswith("hydra.") or (prefix and key.startswith(prefix))}
    known = {key for keys in page.values() for key in keys}
    assert ours <= known, f"not in the page: {sorted(ours - known)}"
    of_no_group = {key: value for name, keys in page.items() if "=" not in name for key, value in keys.items()}
    said = {key: default for key, default in (page[option] if option else of_no_group).items() if default}
    assert said or option
    # "???", to be given, does not take the place of another file's default.
    expected = {key: number(yaml.safe_load(default)) for key, default in said.items() if default != "???"}
    assert expected == {key: number(found[key]) for key in expected}


def number(value: Any) -> Any:
    """YAML 1.1 takes 4e-3 for a word, Hydra for a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def test_a_key_without_an_entry_or_with_another_default_is_noticed(tmp_path):
    conf = tmp_path / "conf"
    (conf / "extra").mkdir(parents=True)
    (conf / "train.yaml").write_text("defaults:\n  - extra: one  # what it is\n\n# Why it is so; <none> is `*`.\nkey: 3\n")
    (conf / "extra" / "one.yaml").write_text("# An option.\n\n# Of two neighbours.\na: 1\nb: [x|y]\n\nc: null\n")
    (conf / "extra" / "two.yaml").write_text("# @package _global_\n# Another.\ndefaults:\n  - one\n\n# Far.\nfar: {}\n")
    page = generator().page(conf)
    assert "| `key` | `3` | Why it is so; &lt;none> is `\\*`. |" in page
    assert "| `extra.a` | `1` | Of two neighbours. |\n| `extra.b` | `[x\\|y]` | Of two neighbours. |" in page
    assert "| `extra.c` | `null` |  |" in page
    assert "### `extra=one` (default)\n\nAn option.\n" in page
    assert "### `extra=two`\n\nAnother.\n\nAll that `extra=one` has; of it changed:\n" in page
    assert "| `far` | `{}` | Far. |" in page
    assert "| [`extra`](#extra) | **`one`**, `two` | what it is |" in page
