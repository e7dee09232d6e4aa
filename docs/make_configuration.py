"""Writes ``configuration.md``, the reference of every setting, from ``conf/`` and its comments: ``make docs``.

What the page says about a key is the comment above it in the YAML file, so there is one place to keep right.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
CONF, PAGE = ROOT / "conf", ROOT / "docs" / "configuration.md"

INTRO = """\
# Every setting of `train.py`

Change a value with `key=value` and a group with `group=option`, as many as you like:
`python train.py data=image_folder data.root=photos budget=0.5`. `python train.py --cfg job` prints what a command would
run with and runs nothing. `+key=value` adds a key that is not listed; a misspelt key is an error. `null` is "none",
lists are `[a,b]`; quote what your shell would read otherwise: `'policy.keep.heads=[0.5,0.75,1]'`. A list element has a
key of its own, `policy.keep.heads.1=0.5`.

Written by `make docs` from the files in `conf/` and the comments there; a test keeps it current.
"""
SWEEPER = ("hydra/sweeper", "mdc_gp_ei")
# What a key of that name is in every file.
_ABOUT_NAMES = {"_target_": "What is made with these settings."}


@dataclass(frozen=True)
class Key:
    """A setting as a file has it: dotted name, default as written (None where it only opens a mapping), comment."""

    name: str
    default: str | None
    comment: str


@dataclass(frozen=True)
class Option:
    """One file of a group.

    Attributes:
        group: its folder, ``""`` for ``train.yaml``.
        name: its name.
        about: the comment that the file begins with.
        brings: its defaults list, as (group, option, comment); the group is ``""`` for another option of the same
            group.
        keys: its settings, in order.
    """

    group: str
    name: str
    about: str
    brings: tuple[tuple[str, str, str], ...]
    keys: tuple[Key, ...]


def read(path: Path, conf: Path = CONF) -> Option:
    """The option in the YAML file at `path`."""
    text = path.read_text()
    lines = text.splitlines()
    group = path.parent.relative_to(conf).as_posix().removeprefix(".")
    root = yaml.compose(text)
    entries = root.value if root is not None else []
    about = _comment_at_top(lines)
    package = re.search(r"^# @package (\S+)$", text, re.MULTILINE)
    prefix = package[1] if package else group.replace("/", ".")
    prefix = {"_global_": "", "_group_": group.replace("/", ".")}.get(prefix, prefix)
    body = [(key, value) for key, value in entries if key.value != "defaults"]
    defaults = next((value for key, value in entries if key.value == "defaults"), None)
    return Option(
        group,
        path.stem,
        " ".join(about),
        tuple(_brought(defaults, text, lines)) if defaults is not None else (),
        tuple(_keys(body, prefix, text, lines, len(about) + (package is not None))),
    )


def _comment_at_top(lines: list[str]) -> list[str]:
    about = []
    for line in lines:
        if line.startswith("# @package"):
            continue
        if not line.startswith("#"):
            break
        about.append(line.removeprefix("#").strip())
    return about


def _brought(defaults: yaml.Node, text: str, lines: list[str]) -> Iterator[tuple[str, str, str]]:
    for entry in defaults.value:
        comment = lines[entry.start_mark.line].partition("  # ")[2].strip()
        if isinstance(entry, yaml.ScalarNode):
            if entry.value != "_self_":
                yield "", entry.value, comment
            continue
        for key, value in entry.value:
            group = key.value.removeprefix("override ").removeprefix("optional ").strip().lstrip("/")
            yield group, _source(value, text), comment


def _keys(entries: list, prefix: str, text: str, lines: list[str], top: int) -> Iterator[Key]:
    """The settings in a mapping and those inside, a comment for several neighbours given to each."""
    shared, last = "", None
    for key, value in entries:
        line = key.start_mark.line
        # The comment that the file begins with is not that of its first key.
        comment = "" if line <= top else " ".join(_comment_above(lines, line))
        name = f"{prefix}.{key.value}" if prefix else key.value
        if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
            yield Key(name, None, comment)
            yield from _keys(value.value, name, text, lines, top)
            shared, last = "", None
            continue
        if comment or last != line - 1:
            shared = comment
        yield Key(name, _source(value, text), shared or _ABOUT_NAMES.get(key.value, ""))
        last = line


def _comment_above(lines: list[str], line: int) -> list[str]:
    comment: list[str] = []
    while line > 0 and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        comment.insert(0, lines[line].lstrip().removeprefix("#").strip())
    return comment


def _source(node: yaml.Node, text: str) -> str:
    return " ".join(text[node.start_mark.index : node.end_mark.index].split("\n")[0].split()) or "null"


def options(conf: Path = CONF) -> list[Option]:
    """All files of all groups, by group and name."""
    return [read(path, conf) for path in sorted(conf.glob("*/**/*.yaml"))]


def sweeper_keys() -> tuple[Key, ...]:
    """The settings that the sweeper has in any app, from its dataclasses."""
    sys.path.insert(0, str(ROOT))
    from hydra_plugins.hydra_mdc_sweeper._conf import ConstraintConf, MdcGpEiConf

    return (*_fields(MdcGpEiConf, "hydra.sweeper"), *_fields(ConstraintConf, "hydra.sweeper.constraint"))


def _fields(settings: type, prefix: str) -> Iterator[Key]:
    lines = inspect.getsource(settings).splitlines()
    values = settings()
    for field in dataclasses.fields(settings):
        value = getattr(values, field.name)
        line = next(number for number, text in enumerate(lines) if text.strip().startswith(f"{field.name}:"))
        comment = " ".join(_comment_above(lines, line)) or _ABOUT_NAMES.get(field.name, "")
        leaves = {field.name: value}
        if isinstance(value, dict) and value:
            leaves = {f"{field.name}.{key}": inner for key, inner in value.items()}
        for name, inner in leaves.items():
            default = None if dataclasses.is_dataclass(inner) else yaml.safe_dump(inner, default_flow_style=True)
            text = None if default is None else default.removesuffix("\n").removesuffix("\n...")
            yield Key(f"{prefix}.{name}", text, comment)


# --- the page ---------------------------------------------------------------------------------------------------------


def page(conf: Path = CONF) -> str:
    """The whole of ``configuration.md``."""
    main = read(conf / "train.yaml", conf)
    found = options(conf)
    chosen = {group: option for group, option, _ in main.brings}
    groups = list(dict.fromkeys(option.group for option in found))
    # In the order of train.yaml; Hydra's own groups come last.
    order = [group for group in chosen if group in groups]
    groups = [*order, *(group for group in groups if group not in order)]
    parts = [INTRO, "\n".join(_group_table(groups, found, main))]
    parts += _main_sections(main)
    for group in groups:
        parts.append(f"## `{group}`")
        for option in (option for option in found if option.group == group):
            parts += _option_section(option, chosen.get(group))
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _group_table(groups: list[str], found: list[Option], main: Option) -> Iterator[str]:
    chosen = {group: option for group, option, _ in main.brings}
    purpose = {group: comment.partition(";")[0] for group, _, comment in main.brings}
    yield "| group | options (**default**) | what it is |\n| --- | --- | --- |"
    for group in groups:
        names = (
            f"**`{option.name}`**" if option.name == chosen.get(group) else f"`{option.name}`"
            for option in found
            if option.group == group
        )
        anchor = group.replace("/", "")  # as GitHub makes it of the heading
        yield f"| [`{group}`](#{anchor}) | {', '.join(names)} | {_prose(purpose.get(group, ''))} |"


def _main_sections(main: Option) -> Iterator[str]:
    yield "## Settings that belong to no group"
    keys = [key for key in main.keys if key.name.partition(".")[0] != "hydra"]
    opened = {key.name: key for key in keys if key.default is None and "." not in key.name}
    yield _table([key for key in keys if "." not in key.name and key.name not in opened])
    for name, key in opened.items():
        yield f"### `{name}`"
        if key.comment:
            yield _prose(key.comment)
        yield _table([key for key in keys if key.name.startswith(f"{name}.")])


def _option_section(option: Option, chosen: str | None) -> Iterator[str]:
    default = " (default)" if option.name == chosen else ""
    yield f"### `{option.group}={option.name}`{default}"
    if option.about:
        yield _prose(option.about)
    starts = [f"`{option.group}={name}`" for group, name, _ in option.brings if not group and name]
    brings = [f"`{group}={name}`" for group, name, _ in option.brings if group]
    if (option.group, option.name) == SWEEPER:
        keys, own = option.keys, {key.name for key in option.keys}
        yield _table([*keys, *(key for key in sweeper_keys() if key.name not in own)])
        return
    if starts:
        yield f"All that {' and '.join(starts)} has{'; of it changed:' if option.keys else '.'}"
    if brings:
        yield f"Chooses {', '.join(brings)}."
    if option.keys:
        yield _table(list(option.keys), "value" if option.group == "experiment" else "default")


def _table(keys: list[Key], column: str = "default") -> str:
    rows = [f"| key | {column} | |", "| --- | --- | --- |"]
    rows += [
        f"| `{key.name}` | {'' if key.default is None else f'`{_cell(key.default)}`'} | {_cell(_prose(key.comment))} |"
        for key in keys
        if key.default is not None or key.comment
    ]
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _prose(comment: str) -> str:
    """A comment as Markdown that says just that: ``<runs>`` would be a tag, and two asterisks emphasis."""
    return comment.replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    PAGE.write_text(page())
