"""Any data set that ``timm.data.create_dataset`` reads, under timm's own transforms."""

import inspect
import logging
import math
import os
import tarfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from timm.data import create_dataset, create_transform, resolve_data_config
from torch.utils.data import IterableDataset
from torchvision.transforms import Compose

from lightning_mdc.app.data import class_folders
from lightning_mdc.app.data.image_view import ImageView
from lightning_mdc.app.data.module import ImageDataModule, Splits
from lightning_mdc.app.data.pixels import as_mode, opened
from lightning_mdc.app.data.splits import cap_indices, check_fraction, split_indices
from lightning_mdc.errors import DataError, check_number, check_whole

log = logging.getLogger(__name__)

# Sub-folders that hold images to report on, in the order they are looked for beside `train`.
_TEST_FOLDERS = ("test", "val", "valid", "validation", "eval")
# What data_config and the arguments beside it settle; the rest of create_transform's keywords are augmentation.
_GEOMETRY = {"input_size", "is_training", "mean", "std", "crop_pct", "crop_mode", "separate", "use_prefetcher"}
_AUGMENTATION_KEYS = set(inspect.signature(create_transform).parameters) - _GEOMETRY


class ImageFolderDataModule(ImageDataModule):
    """Images in class folders, in a tar of class folders, or in a data set that timm knows by name.

    The search-validation images are held out of the training split. The test images are, in this order: ``test_root``,
    ``test_split``, a folder ``test`` or ``val`` beside ``train`` in ``root``, or else ``test_fraction`` of the images.
    """

    def __init__(
        self,
        root: str | Path | None,
        name: str = "",
        split: str = "train",
        val_split: str | None = None,
        test_root: str | Path | None = None,
        test_split: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        img_size: int | None = None,
        in_chans: int | None = None,
        data_config: Mapping[str, Any] | None = None,
        augmentation: Mapping[str, Any] | None = None,
        batch_size: int = 64,
        num_workers: int = 2,
        max_train_images: int | None = None,
        max_val_images: int | None = None,
        max_test_images: int | None = None,
        class_names: Sequence[str] | None = None,
        dataset_options: Mapping[str, Any] | None = None,
        split_seed: int = 0,
        max_corrupt_images: int = 10,
        **loading: Any,
    ) -> None:
        """
        Args:
            root: folder of class folders (also with ``train`` and ``val`` or ``test`` inside), a ``.tar`` of class
                folders, or where a named data set lies. May be ``None`` for a named data set that needs none.
            name: data set name with timm's prefix (``torch/``, ``hfds/``, ``hfids/``, ``tfds/``, ``wds/``); empty for
                folders and tars.
            split: what to train on, in the data set's own words.
            val_split: a split of the data set's own for the search; by default ``val_fraction`` of ``split``. A
                streamed data set can't be cut, so it needs this and ``test_split``.
            test_root: another folder or tar to report on, with the same class names.
            test_split: the split to report on, in the data set's own words.
            val_fraction: share of the training split's images held out for the search.
            test_fraction: share of the images held out for reporting when there is no test split.
            img_size: side in pixels; by default that of ``data_config``, else 224.
            in_chans: 1 (grayscale) or 3 (RGB); by default that of ``data_config``, else 3.
            data_config: a model's ``pretrained_cfg`` or ``resolve_model_data_config(model)``: ``input_size``, ``mean``,
                ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``; other keys are ignored.
            augmentation: keyword arguments of ``timm.data.create_transform`` for training images: ``auto_augment``
                (such as ``rand-m9-mstd0.5-inc1``), ``re_prob``, ``color_jitter``, ``scale``, ``ratio``, ``hflip``,
                ``no_aug``, ...; ``None`` as a value: timm's default.
            max_train_images: use fewer, chosen with ``split_seed``, each class in proportion; likewise the other two.
            class_names: needed only where the data set doesn't tell its classes.
            dataset_options: further keyword arguments of ``timm.data.create_dataset``, such as ``download``.
            split_seed: of the held-out splits and the caps; independent of the seed of the run.
            max_corrupt_images: training images that may turn out undecodable in an epoch (of each process); the next
                one that can be decoded is trained on instead. Anywhere else the first one is an error. Streams do as
                timm's reader does.
            loading: further keyword arguments of `ImageDataModule`: ``pin_memory``, ``repeated_augmentation``, ...

        Raises:
            DataError: an argument is out of range or unknown, or ``root`` is missing or not readable as images.
                What needs the images to be listed is raised when they are first asked for.
        """
        config = _resolve_config(data_config, img_size, in_chans)
        chans, height, width = config["input_size"]
        super().__init__(chans, max(height, width), batch_size, num_workers, **loading)
        check_whole("max_corrupt_images", max_corrupt_images, 0, DataError)
        check_fraction("val_fraction", val_fraction)
        check_fraction("test_fraction", test_fraction)
        for argument, path in (("root", root), ("test_root", test_root)):
            _check_path(argument, path, named=bool(name))
        self.root = root if name or root is None else class_folders.data_folder(Path(root), split)
        self.name = name
        self.split = split
        self.val_split = val_split
        self.test_root = test_root
        self.test_split = test_split if test_split is not None else _find_test_folder(self.root, name, split, test_root)
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.max_train_images = max_train_images
        self.max_val_images = max_val_images
        self.max_test_images = max_test_images
        self.given_class_names = None if class_names is None else tuple(class_names)
        self.dataset_options = _plain(dataset_options)
        self.split_seed = split_seed
        self.max_corrupt_images = max_corrupt_images
        self.data_config = config
        self.train_transform = _train_transform(config, augmentation)
        self.eval_transform = create_transform(**config, is_training=False)
        self.mode = "L" if self.in_chans == 1 else "RGB"  # by PIL's names

    def make_splits(self) -> Splits:
        source = self._open("root", self.root, self.split, is_training=True)
        if isinstance(source, IterableDataset):
            return self._streamed_splits(source)
        names = self._class_names(source, "root", self.root)
        labels = _labels(source)
        held_apart = self.test_root is not None or self.test_split is not None
        # What has images of its own takes none of these.
        val_fraction = 0.0 if self.val_split is not None else self.val_fraction
        test_fraction = 0.0 if held_apart else self.test_fraction
        split = split_indices(labels, val_fraction, test_fraction, self.split_seed)

        val_source, val_labels, val = source, labels, split.val
        if self.val_split is not None:
            val_source = self._open("val_split", self.root, self.val_split, known=names)
            val_labels = self._aligned_labels(val_source, names, "val_split", self.val_split)
            val = np.arange(len(val_labels))
        test_source, test_labels, test = source, labels, split.test
        if held_apart:
            argument, where = ("test_root", self.test_root) if self.test_root is not None else ("root", self.root)
            test_source = self._open(argument, where, self.test_split or "validation", known=names)
            test_labels = self._aligned_labels(test_source, names, argument, where)
            test = np.arange(len(test_labels))

        train = self._cap("max_train_images", split.train, labels)
        val = self._cap("max_val_images", val, val_labels)
        test = self._cap("max_test_images", test, test_labels)
        mode = self.mode
        return Splits(
            train=ImageView(source, train, labels, self.train_transform, mode, self.max_corrupt_images),
            val=ImageView(val_source, val, val_labels, self.eval_transform, mode),
            test=ImageView(test_source, test, test_labels, self.eval_transform, mode),
            calibration=ImageView(source, train, labels, self.eval_transform, mode),
            class_names=names,
        )

    def every_image(self) -> tuple[ImageView, tuple[str, ...]]:
        """All images of ``split`` under the evaluation transforms, wherever they lie, and the classes that their labels
        mean: none where there are not two or more class folders, and no image outside them."""
        source = self._open("root", self.root, self.split, is_training=True)
        labels, names = _labels(source), self.given_class_names or _names_of(source) or ()
        view = ImageView(source, np.arange(len(labels)), labels, self.eval_transform, self.mode)
        return view, names if len(names) > 1 and "" not in names else ()

    def _cap(self, name: str, indices: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return cap_indices(indices, labels, getattr(self, name), self.split_seed, name)

    def _open(
        self,
        argument: str,
        root: str | Path | None,
        split: str,
        is_training: bool = False,
        known: Sequence[str] = (),
    ) -> Any:
        """timm's data set of PIL images, with `class_folders`' word on what is a class.

        Args:
            known: the classes of the training images.

        Raises:
            DataError: timm can't read it.
        """
        options = {"input_img_mode": self.mode, **self.dataset_options}
        class_map = options.pop("class_map", None)
        name = str(self.name).lower()
        if name.startswith(("wds/", "hfids/")):
            options["input_img_mode"] = ""  # timm leaves to us what its readers would clip
        if name in ("torch/image_folder", "torch/folder"):
            options |= {"is_valid_file": class_folders.is_image, "allow_empty": True}
        if root is not None and Path(root).suffix == ".tar":
            # A tar kept open is shared by forked workers, which then move one another's file position.
            options["cache_tarfiles"] = False
        path = cast(str, None if root is None else str(root))  # timm takes None where a name needs no root
        _, processes = self.rank_and_processes()
        images = max(1, self.batch_size // processes)  # of a batch, by which readers of streams round
        try:
            with class_folders.all_formats():
                dataset = create_dataset(
                    self.name, root=path, split=split, is_training=is_training, batch_size=images, **options
                )
            layout = class_folders.set_classes(dataset, class_map, known)
        except (RuntimeError, ValueError, AssertionError, TypeError, KeyError, OSError, ImportError) as error:
            raise DataError(
                f"{argument}={path!r} (name={self.name!r}, split={split!r}) can't be read as images:"
                f" {error or type(error).__name__}; it needs one folder of images per class, or a name that"
                " timm.data.create_dataset knows"
            ) from error
        except tarfile.TarError as error:
            raise DataError(
                f"{argument}={path!r} can't be read as a tar: {error}; it is damaged or compressed - pack the class"
                " folders again, uncompressed (tar -cf)"
            ) from error
        if hasattr(dataset, "loader"):  # torchvision's would convert, and clip
            dataset.loader = opened
        if layout is not None:
            self._say(argument, dataset, layout)
            if not class_map:  # which may leave out folders on purpose
                _check_class_folders(argument, dataset, layout)
        return dataset

    def _say(self, argument: str, dataset: Any, layout: class_folders.Layout) -> None:
        """What of the folder is left out, and what its folders are taken for where that is not the plain case."""
        root = getattr(dataset, "reader", dataset).root
        if self.rank_and_processes()[0]:
            return
        if skipped := class_folders.left_out(root):
            log.warning("%s='%s': left out %s", argument, root, skipped)
        if layout.above:
            log.info("%s='%s': the classes are the folders in %s", argument, root, "/".join(layout.above))
        if layout.within:
            log.warning(
                "%s='%s': the classes are %s, the first folders, whatever the folders in them are (%s); give a folder "
                "in which each class is a folder if that is not meant",
                argument,
                root,
                _some(sorted(set(layout.class_of.values()))),
                _some(layout.within),
            )

    def _class_names(self, dataset: Any, argument: str, root: str | Path | None) -> tuple[str, ...]:
        names = self.given_class_names or _names_of(dataset)
        if names is None:
            raise DataError(
                f"{argument}={root!r} (name={self.name!r}) doesn't tell its classes; pass class_names=[...] in"
                " label order"
            )
        if len(names) < 2:
            raise DataError(
                f"{argument}={str(root)!r} holds {len(names)} class{'' if len(names) == 1 else 'es'} ({list(names)});"
                " a classifier needs at least 2, as one folder of images each"
            )
        if "" in names:
            raise DataError(
                f"{argument}={str(root)!r} holds images outside any class folder; move each into a folder named as its"
                " class"
            )
        return names

    def _aligned_labels(self, dataset: Any, names: tuple[str, ...], argument: str, where: Any) -> np.ndarray:
        """Labels of another split in terms of the training classes: its own count from 0 over the classes it has."""
        own_names = _names_of(dataset) or names
        unknown = sorted(set(own_names) - set(names))
        if unknown:
            raise DataError(
                f"{argument}={str(where)!r} has classes that the training images lack: {unknown[:5]}; known are"
                f" {list(names[:5])}{', ...' if len(names) > 5 else ''} - name the class folders alike"
            )
        return np.array([names.index(name) for name in own_names])[_labels(dataset)]

    def _streamed_splits(self, source: Any) -> Splits:
        if self.val_split is None or self.test_split is None:
            raise DataError(
                f"name={self.name!r} is read as a stream, which can't be cut into splits; name two more of its splits"
                " as val_split=... (for the search, never reported) and test_split=... (for reporting)"
            )
        if self.repeated_augmentation > 1:
            raise DataError(
                f"repeated_augmentation={self.repeated_augmentation}: name={self.name!r} is read as a stream, whose"
                " images come once; give repeated_augmentation=1"
            )
        for name in ("max_train_images", "max_val_images", "max_test_images"):
            if getattr(self, name) is not None:
                raise DataError(
                    f"{name}={getattr(self, name)} can't be chosen from a stream; use the Trainer's"
                    " limit_train_batches, limit_val_batches, limit_test_batches"
                )
        names = self._class_names(source, "root", self.root)
        source.transform = self._of_stream(self.train_transform)
        others = (("val_split", self.val_split), ("test_split", self.test_split), ("root", self.split))
        val, test, calibration = (self._open(argument, self.root, split) for argument, split in others)
        for stream in (val, test, calibration):
            stream.transform = self._of_stream(self.eval_transform)
        return Splits(source, val, test, calibration, names)

    def _of_stream(self, transform: Any) -> Any:
        return Compose([partial(as_mode, mode=self.mode), transform])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _names_of(dataset: Any) -> tuple[str, ...] | None:
    """Class names in label order, or ``None`` where the data set keeps them to itself."""
    reader = getattr(dataset, "reader", dataset)
    for attribute in ("class_to_idx", "class_name_to_idx"):
        mapping = getattr(reader, attribute, None)
        if mapping:
            return tuple(str(name) for name, _ in sorted(mapping.items(), key=lambda item: item[1]))
    classes = getattr(dataset, "classes", None)
    return tuple(str(name) for name in classes) if classes else None


def _labels(dataset: Any) -> np.ndarray:
    """Class of each image, (n,), without decoding one where the data set allows it."""
    reader = getattr(dataset, "reader", dataset)
    if getattr(reader, "targets", None) is not None:
        return np.asarray(reader.targets, dtype=np.int64)
    samples = getattr(reader, "samples", None)
    if samples is not None:
        return np.array([target for _, target in samples], dtype=np.int64)
    table, column = getattr(reader, "dataset", None), getattr(reader, "label_key", None)
    if table is not None and column is not None and not getattr(reader, "remap_class", False):
        return np.asarray(table[column], dtype=np.int64)
    return np.array([dataset[i][1] for i in range(len(dataset))], dtype=np.int64)


def _check_path(argument: str, given: str | Path | None, named: bool) -> None:
    if given is None:
        if argument == "root" and not named:
            raise DataError("root=None names no images; give a folder of class folders or a .tar of them")
        return
    path = Path(given)
    if not path.exists():
        if named and argument == "root":  # where a named data set will be downloaded to
            return
        raise DataError(f"{argument}={str(given)!r} does not exist; give a folder of class folders or a .tar of them")
    if path.is_file() and (path.suffix != ".tar" or not _is_plain_tar(path)):
        raise DataError(
            f"{argument}={str(given)!r} is a file but no uncompressed .tar; give a folder of class folders or pack them"
            " with tar -cf NAME.tar"
        )
    if path.is_file() and not _is_whole_tar(path):
        raise DataError(
            f"{argument}={str(given)!r} can't be read as a tar: it ends without the mark of a tar's end, so it was cut"
            " off (an interrupted copy?); copy it again, or pack the class folders again (tar -cf)"
        )


def _is_plain_tar(path: Path) -> bool:
    try:
        tarfile.open(path, mode="r:").close()
    except (tarfile.TarError, OSError):
        return False
    return True


def _is_whole_tar(path: Path) -> bool:
    """Whether it ends in the empty blocks that every tar ends in; one cut between two images would read as complete."""
    with path.open("rb") as file:
        file.seek(-min(tarfile.BLOCKSIZE * 2, path.stat().st_size), os.SEEK_END)
        return not any(file.read())


def _check_class_folders(argument: str, dataset: Any, layout: class_folders.Layout) -> None:
    """Raises: DataError: a class folder holds no image."""
    empty = class_folders.empty_folders(dataset, layout.above)
    if empty:
        root = getattr(dataset, "reader", dataset).root
        raise DataError(
            f"{argument}={root!r} has folders without any image: {empty[:5]}; fill them (an interrupted copy?), or "
            "remove them"
        )


def _find_test_folder(root: str | Path | None, name: str, split: str, test_root: str | Path | None) -> str | None:
    """The usual layout, ``root/train`` beside ``root/val``: timm trains on the first, so the second is to report on."""
    if name or root is None or test_root is not None or not (Path(root) / split).is_dir():
        return None
    return next((folder for folder in _TEST_FOLDERS if (Path(root) / folder).is_dir()), None)


def _plain(mapping: Mapping[str, Any] | None) -> dict[str, Any]:
    """A dict whose sequences are tuples; timm tells ``(a, b)`` from a list that Hydra made."""
    return {
        key: tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for key, value in (mapping or {}).items()
    }


def _resolve_config(
    data_config: Mapping[str, Any] | None, img_size: int | None, in_chans: int | None
) -> dict[str, Any]:
    """Input size, normalisation, interpolation and crop, as ``create_transform`` names them."""
    check_whole("img_size", img_size, 1, DataError, or_none="the model's")
    given = {key: value for key, value in _plain(data_config).items() if value is not None}
    config = cast(dict[str, Any], resolve_data_config(args={"img_size": None}, pretrained_cfg=given))
    chans, height, width = config["input_size"]
    config["input_size"] = (in_chans or chans, img_size or height, img_size or width)
    for statistic in ("mean", "std"):
        values = tuple(float(value) for value in config[statistic])
        if len(values) != config["input_size"][0]:
            # Pretrained on colour, read in gray, or the other way: the mean over the channels fits every channel.
            values = (sum(values) / len(values),) * config["input_size"][0]
        config[statistic] = values
    return config


def _train_transform(config: Mapping[str, Any], augmentation: Mapping[str, Any] | None) -> Any:
    options = {key: value for key, value in _plain(augmentation).items() if value is not None}
    unknown = sorted(set(options) - _AUGMENTATION_KEYS)
    if unknown:
        raise DataError(
            f"augmentation={options!r} has unknown keys {unknown}; known are {sorted(_AUGMENTATION_KEYS)}"
            " (size, mean, std and crop belong into data_config)"
        )
    _check_augmentation(options)
    try:
        return create_transform(**{**config, **options}, is_training=True)
    except (TypeError, ValueError, AssertionError, KeyError, IndexError) as error:
        raise DataError(
            f"augmentation={options!r} is refused by timm: {error or type(error).__name__}; correct that value"
        ) from error


def _check_augmentation(options: Mapping[str, Any]) -> None:
    """Raises: DataError: what timm would take without a word, or fail at with the first image."""
    for name in ("hflip", "vflip", "re_prob", "color_jitter_prob", "grayscale_prob", "gaussian_blur_prob"):
        check_number(f"augmentation.{name}", options.get(name, 0), "a probability", DataError, least=0, most=1)
    check_whole("augmentation.re_count", options.get("re_count", 1), 1, DataError)
    jitter = options.get("color_jitter", 0)
    what = "a fraction, such as 0.4, or one for each of brightness, contrast and saturation"
    for fraction in jitter if isinstance(jitter, tuple) else (jitter,):
        check_number("augmentation.color_jitter", fraction, what, DataError, least=0)
    for name, most, what in (
        ("scale", 1, "part of the image, such as [0.08, 1]"),
        ("ratio", math.inf, "ratio of width to height, such as [0.75, 1.33]"),
    ):
        pair = options.get(name, (1, 1))
        numbers = isinstance(pair, tuple) and len(pair) == 2 and all(type(bound) in (int, float) for bound in pair)
        if not (numbers and 0 < pair[0] <= pair[1] <= most):
            raise DataError(f"augmentation.{name}={pair!r}: expected [smallest, largest] {what}")
