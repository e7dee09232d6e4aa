"""Which files of a folder or tar are images, and of which class: the one place that says it.

timm lists the files. Left alone it takes PNG and JPEG only, hidden folders for classes, and the innermost folder for
the label; torchvision, by name, takes hidden folders, too.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import get_img_extensions, set_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key
from torchvision.datasets import ImageFolder

# What PIL recognises and cannot decode by itself.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# What systems leave in folders beside what begins with a dot, or with the @ of network drives (@eaDir, @Recycle).
_LITTER = {"__macosx", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found"}


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is there for a system or a program, not for people."""
    return name.startswith((".", "@")) or name.lower() in _LITTER


def is_image(path: str) -> bool:
    """Whether the name is that of a file that PIL, with the plugins it has, or timm reads."""
    name = os.path.basename(path)
    return not is_hidden(name) and os.path.splitext(name)[1].lower() in _readable()


def _readable() -> set[str]:
    """Endings, lower-case, of files that can be read."""
    formats = Image.registered_extensions()  # plugins register theirs
    read = Image.OPEN.keys() - _NOT_DECODED
    return {ending for ending, name in formats.items() if name in read} | get_img_extensions(as_set=True)


@contextmanager
def all_formats() -> Iterator[None]:
    """timm lists every file that can be read inside; it has no argument for it that all its readers take."""
    before = get_img_extensions()
    set_img_extensions(sorted(_readable()))
    try:
        yield
    finally:
        set_img_extensions(before)


def data_folder(root: Path, split: str) -> Path:
    """`root`, or, while all there is in it is one folder of folders, that one."""
    while root.is_dir() and not (root / split).exists():
        folders = [path for path in root.iterdir() if path.is_dir() and not is_hidden(path.name)]
        if len(folders) != 1 or any(is_image(path.name) for path in root.iterdir() if path.is_file()):
            break
        if not any(path.is_dir() and not is_hidden(path.name) for path in folders[0].iterdir()):
            break
        root = folders[0]
    return root


# --- classes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What the folders of a data set mean.

    Attributes:
        above: folders that all classes lie in, one within the other.
        class_of: class by folder, relative to the root; "" is that of images beside the class folders. Hidden folders
            are left out.
        within: names of folders within those of classes.
    """

    above: tuple[str, ...]
    class_of: Mapping[str, str]
    within: tuple[str, ...]


def layout(folders: Sequence[str], known: Container[str] = ()) -> Layout:
    """The folder on the first level is the class, as torchvision has it; a single folder of folders is gone into.

    Args:
        folders: of the images, relative to the root, with slashes.
        known: what is a class for sure.
    """
    parts = {folder: tuple(name for name in folder.split("/") if name not in ("", ".")) for folder in set(folders)}
    parts = {folder: names for folder, names in parts.items() if not any(map(is_hidden, names))}
    level = 0
    while parts and all(len(names) > level + 1 for names in parts.values()):
        top = {names[level] for names in parts.values()}
        if len(top) > 1 or any(name in known for name in top):
            break
        level += 1
    above = next(iter(parts.values()))[:level] if level else ()
    class_of = {folder: "".join(names[level : level + 1]) for folder, names in parts.items()}
    within = {name for names in parts.values() for name in names[level + 1 : level + 2]}
    return Layout(above, class_of, tuple(sorted(within, key=_order)))


def _order(name: str) -> tuple[list[int | str], str]:
    """timm's order; and of names that differ in case alone always the same one, on which labels depend."""
    return natural_key(name), name


def set_classes(dataset: Any, class_map: Any = None, known: Container[str] = ()) -> Layout | None:
    """Have a data set of timm or torchvision list what its folders mean, and nothing hidden.

    Args:
        class_map: timm's: which class has which label, as a dict or a file; images of others are left out.
        known: see `layout`.

    Returns:
        None: it is no data set of folders.
    """
    paths = _paths(dataset)
    if paths is None:
        return None
    places = [path.rpartition("/") for path in paths]
    found = layout([folder for folder, _, _ in places], known)
    names = [None if is_hidden(file) else found.class_of.get(folder) for folder, _, file in places]
    if class_map:
        labels = load_class_map(class_map, _root(dataset))
    else:
        labels = {n: i for i, n in enumerate(sorted({name for name in names if name is not None}, key=_order))}
    kept = [position for position, name in enumerate(names) if name in labels]
    _relabel(dataset, kept, [labels[str(names[position])] for position in kept], labels)
    return found


def _root(dataset: Any) -> str:
    return str(getattr(dataset, "reader", dataset).root)


def _paths(dataset: Any) -> list[str] | None:
    """Of all images, relative to the root; None: they are not in folders."""
    reader = getattr(dataset, "reader", dataset)
    if type(reader) in (ReaderImageFolder, ImageFolder):
        start = len(os.path.join(reader.root, ""))
        return [path[start:].replace(os.sep, "/") for path, _ in reader.samples]
    if isinstance(reader, ReaderImageInTar):  # a tar within the tar is a folder
        return [
            info.name if inner is None else f"{os.path.splitext(inner.name)[0]}/{info.name}"
            for info, _, inner in reader.samples
        ]
    return None


def _relabel(dataset: Any, kept: list[int], targets: list[int], class_to_idx: dict[str, int]) -> None:
    reader = getattr(dataset, "reader", dataset)
    if isinstance(reader, ReaderImageInTar):
        reader.samples, reader.targets = reader.samples[kept], np.array(targets, dtype=np.int64)
        reader.class_name_to_idx, reader.class_idx_to_name = class_to_idx, {i: n for n, i in class_to_idx.items()}
        return
    samples = [(reader.samples[position][0], target) for position, target in zip(kept, targets, strict=True)]
    reader.samples, reader.class_to_idx = samples, class_to_idx
    if isinstance(reader, ImageFolder):
        reader.imgs, reader.targets, reader.classes = samples, targets, list(class_to_idx)


def empty_folders(dataset: Any, above: tuple[str, ...]) -> list[str]:
    """Names of class folders without images; to timm those are no classes, so that the labels of all after them would
    move up."""
    reader = getattr(dataset, "reader", dataset)
    if type(reader) not in (ReaderImageFolder, ImageFolder):
        return []
    root = os.path.join(reader.root, *above, "")
    folders = {entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("_")}
    filled = {path[len(root) :].partition(os.sep)[0] for path, _ in reader.samples}
    return sorted(name for name in folders - filled if not is_hidden(name))


# --- what is left out -------------------------------------------------------------------------------------------------


def left_out(root: str | Path) -> str:
    """Files of a folder or tar that are not read, counted by the hidden folder they are in or by their ending; "" if
    there are none."""
    hidden: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for folder, files in _files(Path(root)):
        inside = next((name for name in folder.split("/") if name != "." and is_hidden(name)), None)
        if inside is not None:
            hidden[inside] += len(files)
            continue
        for name in files:
            if is_hidden(name):
                hidden["._*" if name.startswith("._") else name] += 1
            elif (ending := os.path.splitext(name)[1].lower()) not in _readable():
                others[ending or "without an ending"] += 1
    parts = [
        f"{counts.total()} {what} ({', '.join(f'{name}: {count}' for name, count in counts.most_common(8))})"
        for counts, what in ((hidden, "hidden files"), (others, "files that are no images PIL reads"))
        if counts
    ]
    return " and ".join(parts)


def _files(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder relative to the root, names of the files in it)."""
    if root.is_dir():
        for folder, _, files in os.walk(root, followlinks=True):
            yield os.path.relpath(folder, root).replace(os.sep, "/"), files
        return
    with tarfile.open(root, "r:") as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            if member.isfile() and not name.endswith(".tar"):
                yield folder, [name]
