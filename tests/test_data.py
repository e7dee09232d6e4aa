"""Data modules: splits are disjoint, seeded and stratified; folders and tars read alike; bad input is explained."""

import logging
import os
import pickle
import tarfile
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import IterableImageDataset
from timm.data.readers import get_img_extensions
from torch.utils.data import DistributedSampler, SequentialSampler

from lightning_mdc.app.data import DigitsDataModule, ImageFolderDataModule, split_indices
from lightning_mdc.app.data.class_folders import _order
from lightning_mdc.errors import DataError

CLASSES = ("cat", "dog", "fox")


def write_images(root: Path, per_class: int = 10, classes=CLASSES, size: int = 12) -> Path:
    """PNGs whose red channel tells the class (40·label) and whose green channel tells the image (index)."""
    for label, name in enumerate(classes):
        folder = root / name
        folder.mkdir(parents=True)
        for index in range(per_class):
            pixels = np.zeros((size, size, 3), dtype=np.uint8)
            pixels[..., 0] = 40 * label
            pixels[..., 1] = index
            Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    return root


def write_tar(path: Path, folder: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for child in sorted(folder.iterdir()):
            tar.add(child, arcname=child.name)
    return path


PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "input_size": (3, 12, 12), "crop_pct": 1.0}


def identities(dataset) -> set[tuple[int, int]]:
    """(class, image) read back from the pixels of the evaluation transform under PLAIN."""
    return {
        (round(image[0, 0, 0].item() * 255) // 40, round(image[1, 0, 0].item() * 255))
        for image, _ in (dataset[i] for i in range(len(dataset)))
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_images(tmp_path / "images")


# --- splits --------------------------------------------------------------------------------------------------------


def test_split_is_a_partition_with_every_class_in_proportion():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    split = split_indices(labels, val_fraction=0.1, test_fraction=0.2, seed=3)
    assert sorted(np.concatenate([split.train, split.val, split.test])) == list(range(100))
    assert np.bincount(labels[split.test]).tolist() == [10, 6, 4]
    assert np.bincount(labels[split.val]).tolist() == [5, 3, 2]


def test_split_depends_on_its_seed_and_on_nothing_else():
    labels = np.arange(200) % 4
    np.random.seed(0)
    first = split_indices(labels, 0.1, 0.1, seed=1)
    np.random.seed(1)
    again = split_indices(labels, 0.1, 0.1, seed=1)
    other = split_indices(labels, 0.1, 0.1, seed=2)
    np.testing.assert_array_equal(first.test, again.test)
    np.testing.assert_array_equal(first.val, again.val)
    assert not np.array_equal(first.test, other.test)


def test_a_fraction_above_zero_is_never_an_empty_split():
    split = split_indices([0, 1, 0, 1, 0], val_fraction=0.01, test_fraction=0.2, seed=0)
    assert (len(split.val), len(split.test), len(split.train)) == (1, 1, 3)


def test_classes_of_one_image_and_fewer_images_than_classes_are_split_as_well():
    labels = np.array([0] * 20 + [1] * 10 + [2, 3])  # two classes of a single image
    seen = set()
    for seed in range(20):
        split = split_indices(labels, val_fraction=0.1, test_fraction=0.25, seed=seed)
        assert sorted(np.concatenate([split.train, split.val, split.test])) == list(range(32))
        assert (len(split.val), len(split.test)) == (4, 8)
        assert np.bincount(labels[split.test])[1] in (2, 3)  # a quarter of ten, whatever becomes of the two
        seen |= set(labels[split.train])
    assert seen == {0, 1, 2, 3}
    apart = split_indices(range(10), val_fraction=0.1, test_fraction=0.2, seed=0)  # no two of a class
    assert sorted(np.concatenate([apart.train, apart.val, apart.test])) == list(range(10))
    few = split_indices(np.arange(100) % 10, val_fraction=0.03, test_fraction=0.02, seed=0)
    assert (len(few.val), len(few.test), len(few.train)) == (3, 2, 95)
    data = DigitsDataModule(max_train_images=3)
    assert len(set(data.splits.train.labels)) <= len(data.splits.train) == 3


# --- digits --------------------------------------------------------------------------------------------------------


def test_digits_are_all_there_once():
    data = DigitsDataModule(img_size=8, augment=False)  # as they come
    splits = data.splits
    assert (len(splits.train), len(splits.val), len(splits.test)) == (1197, 240, 360)
    assert data.num_classes == 10
    assert data.class_names == tuple("0123456789")
    ours = torch.cat([splits.train.images, splits.val.images, splits.test.images])
    assert ours.mean().abs() < 1e-3
    assert abs(ours.std() - 1) < 1e-3
    # Undo the normalisation: the same multiset of images and labels as scikit-learn's, whichever split they are in.
    pixels = (ours * 0.3760 + 0.3053).mul(16).round().int().flatten(1).tolist()
    labels = splits.train.labels + splits.val.labels + splits.test.labels
    digits = load_digits()
    expected = sorted((*row, label) for row, label in zip(digits.data.astype(int).tolist(), digits.target, strict=True))
    assert sorted((*row, label) for row, label in zip(pixels, labels, strict=True)) == expected


@pytest.mark.parametrize(("img_size", "in_chans"), [(8, 1), (16, 3)])
def test_digits_batches_have_the_shape_the_module_says(img_size, in_chans):
    data = DigitsDataModule(batch_size=5, img_size=img_size, in_chans=in_chans)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (5, data.in_chans, data.img_size, data.img_size)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64


def test_only_training_images_are_augmented():
    data = DigitsDataModule()
    train, calibration = data.splits.train, data.calibration_dataset()
    assert train.labels == calibration.labels
    assert not torch.equal(train[0][0], train[0][0])
    for dataset in (calibration, data.splits.val, data.splits.test):
        assert torch.equal(dataset[0][0], dataset[0][0])
    torch.testing.assert_close(calibration[0][0], DigitsDataModule(augment=False).splits.train[0][0])


def test_loaders_shuffle_training_only_and_keep_every_image_to_report_on():
    data = DigitsDataModule(batch_size=64)
    shuffled = data.train_dataloader().sampler
    assert isinstance(shuffled, DistributedSampler)  # which Lightning leaves in place
    assert list(shuffled) != sorted(shuffled)
    assert sorted(shuffled) == list(range(1197))
    assert len(data.train_dataloader()) == 1197 // 64
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert isinstance(loader.sampler, SequentialSampler)
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 360


def test_a_data_set_smaller_than_a_batch_still_trains():
    data = DigitsDataModule(batch_size=64, max_train_images=20)
    assert [len(labels) for _, labels in data.train_dataloader()] == [20]
    assert np.bincount(data.splits.train.labels).tolist() == [2] * 10


# --- folders and tars ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_folder_and_tar_hold_the_same_images_in_disjoint_splits(folder, tmp_path, packed):
    root = write_tar(tmp_path / "images.tar", folder) if packed else folder
    data = ImageFolderDataModule(root, val_fraction=0.2, test_fraction=0.3, data_config=PLAIN, num_workers=0)
    data.setup("fit")
    assert data.class_names == CLASSES
    parts = [identities(part) for part in (data.calibration_dataset(), data.splits.val, data.splits.test)]
    assert [len(part) for part in parts] == [15, 6, 9]
    assert set.union(*parts) == {(label, index) for label in range(3) for index in range(10)}
    for images, labels in data.test_dataloader():
        assert images.shape[1:] == (3, 12, 12)
        torch.testing.assert_close(images[:, 0, 0, 0], labels * 40 / 255)


def test_a_tar_read_before_workers_start_is_read_right_by_them(folder, tmp_path):
    root = write_tar(tmp_path / "images.tar", folder)
    data = ImageFolderDataModule(root, data_config=PLAIN, batch_size=1, num_workers=2, test_fraction=0.5)
    _ = data.calibration_dataset()[0], data.splits.test[0]
    green = [round(images[0, 1, 0, 0].item() * 255) for images, _ in data.test_dataloader()]
    expected = [round(data.splits.test[i][0][1, 0, 0].item() * 255) for i in range(15)]
    assert green == expected
    assert len(pickle.loads(pickle.dumps(data.splits.test))) == 15  # as spawned workers get it


# --- what is a class, and what is an image -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "@eaDir", "__MACOSX", "$RECYCLE.BIN", "cat/.ipynb_checkpoints"])
@pytest.mark.parametrize("reader", ["folder", "tar", "torch/image_folder"])
def test_hidden_folders_are_no_classes_and_are_counted(folder, tmp_path, caplog, name, reader):
    write_images(folder / name, per_class=2, classes=("dog",))
    Image.new("RGB", (12, 12)).save(folder / name / "0.png")
    root = write_tar(tmp_path / "images.tar", folder) if reader == "tar" else folder
    with caplog.at_level(logging.WARNING):
        data = ImageFolderDataModule(
            root, name=reader if "/" in reader else "", data_config=PLAIN, val_fraction=0.0, test_fraction=0.0
        )
        assert data.class_names == CLASSES
    assert len(data.calibration_dataset()) == 30
    assert identities(data.calibration_dataset()) == {(label, index) for label in range(3) for index in range(10)}
    assert [record.getMessage() for record in caplog.records] == [
        f"root='{root}': left out 3 hidden files ({name.removeprefix('cat/')}: 3)"
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_no_image_is_counted_by_its_ending(folder, tmp_path, caplog, packed):
    for name in ("Thumbs.db", "cat/scan.dcm", "cat/next.DCM", "cat/._000.png", "dog/.DS_Store", "fox/notes"):
        (folder / name).write_bytes(b"no image")
    root = write_tar(tmp_path / "images.tar", folder) if packed else folder
    with caplog.at_level(logging.WARNING):
        data = ImageFolderDataModule(root, data_config=PLAIN)
        assert len(data.splits.train) + len(data.splits.val) + len(data.splits.test) == 30
    (record,) = caplog.records
    for words in ("left out 2 hidden files", "._*: 1", ".DS_Store: 1", ".dcm: 2", ".db: 1", "without an ending: 1"):
        assert words in record.getMessage()
    assert "4 files that are no images" in record.getMessage()


@pytest.mark.parametrize("reader", ["folder", "tar", "torch/image_folder"])
@pytest.mark.parametrize("ending", ["webp", "TIF", "bmp", "gif", "jfif"])
def test_every_format_that_pil_reads_is_used(folder, tmp_path, caplog, ending, reader):
    for path in sorted((folder / "dog").iterdir())[:5]:
        options = {"lossless": True} if ending == "webp" else {}
        Image.open(path).save(path.with_suffix(f".{ending}"), **options)
        path.unlink()
    root = write_tar(tmp_path / "images.tar", folder) if reader == "tar" else folder
    data = ImageFolderDataModule(
        root, name=reader if "/" in reader else "", data_config=PLAIN, val_fraction=0.0, test_fraction=0.0
    )
    assert np.bincount(data.splits.train.labels).tolist() == [10] * 3
    dogs = [image for image, label in map(data.calibration_dataset().__getitem__, range(30)) if label == 1]
    assert all(abs(dog[0, 0, 0].item() * 255 - 40) < 4 for dog in dogs)
    assert not [record for record in caplog.records if record.name.startswith("lightning_mdc")]  # timm tells of tars
    assert get_img_extensions() == (".png", ".jpg", ".jpeg")  # timm's own list is as it was


@pytest.mark.parametrize("reader", ["folder", "tar", "torch/image_folder"])
def test_the_first_folder_is_the_label_and_deeper_ones_are_said(tmp_path, caplog, reader):
    """As torchvision has it. timm takes the last, in which both classes are 2020 and 2021."""
    for label, name in enumerate(("benign", "malignant")):
        for year in ("2020", "2021/spring"):
            folder = tmp_path / "scans" / name / year
            folder.mkdir(parents=True)
            Image.new("RGB", (12, 12), (40 * label, len(year), 0)).save(folder / "x.png")
    root = write_tar(tmp_path / "scans.tar", tmp_path / "scans") if reader == "tar" else tmp_path / "scans"
    with caplog.at_level(logging.WARNING):
        data = ImageFolderDataModule(
            root, name=reader if "/" in reader else "", data_config=PLAIN, val_fraction=0.0, test_fraction=0.0
        )
        assert data.class_names == ("benign", "malignant")
    assert identities(data.calibration_dataset()) == {(0, 4), (1, 4), (0, 11), (1, 11)}
    calibration = [data.calibration_dataset()[i] for i in range(4)]
    assert all(round(image[0, 0, 0].item() * 255) == 40 * label for image, label in calibration)
    (record,) = caplog.records
    assert "the classes are benign, malignant, the first folders" in record.getMessage()
    assert "(2020, 2021)" in record.getMessage()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("deep", ["pets", "archive/pets"])
def test_a_single_folder_of_folders_is_gone_into(tmp_path, caplog, packed, deep):
    write_images(tmp_path / "root" / deep)
    (tmp_path / "root" / "__MACOSX" / "pets").mkdir(parents=True)
    (tmp_path / "root" / "README.md").write_text("pets")
    root = write_tar(tmp_path / "root.tar", tmp_path / "root") if packed else tmp_path / "root"
    data = ImageFolderDataModule(root, data_config=PLAIN)
    assert data.class_names == CLASSES
    with caplog.at_level(logging.INFO):
        write_images(tmp_path / "train", classes=("cat",))
        only = ImageFolderDataModule(tmp_path / "train")
        with pytest.raises(DataError, match=r"holds 1 class \(\['cat'\]\)"):
            only.setup()


def test_a_single_folder_may_hold_train_and_val(tmp_path):
    for split, number in (("train", 10), ("val", 2)):
        write_images(tmp_path / "root" / "pets" / split, per_class=number)
    data = ImageFolderDataModule(tmp_path / "root", data_config=PLAIN, val_fraction=0.0)
    assert (len(data.splits.train), len(data.splits.test)) == (30, 6)


def test_a_test_folder_of_one_class_with_folders_is_of_that_class(tmp_path):
    for name in ("benign", "malignant"):
        write_images(tmp_path / "train" / name, per_class=2, classes=("2020", "2021"))
    write_images(tmp_path / "test" / "malignant", per_class=2, classes=("2020", "2021"))
    data = ImageFolderDataModule(tmp_path, data_config=PLAIN)
    assert data.class_names == ("benign", "malignant")
    assert data.splits.test.labels == [1] * 4


def test_labels_do_not_depend_on_the_order_of_a_set():
    """timm's order does not tell Cat from cat, and that of a set differs from process to process."""
    for names in permutations(["cat", "Cat", "10", "9"]):
        assert sorted(names, key=_order) == ["9", "10", "Cat", "cat"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_class_map_says_which_first_folders_count(folder, tmp_path, packed):
    write_images(folder / "dog", classes=("puppies",), per_class=3)
    root = write_tar(tmp_path / "images.tar", folder) if packed else folder
    options = {"dataset_options": {"class_map": {"dog": 0, "cat": 1}}, "val_fraction": 0.0, "test_fraction": 0.0}
    data = ImageFolderDataModule(root, data_config=PLAIN, **options)
    assert data.class_names == ("dog", "cat")
    assert np.bincount(data.splits.train.labels).tolist() == [13, 10]


def test_a_tar_of_tars_has_a_class_per_tar(folder, tmp_path):
    with tarfile.open(tmp_path / "all.tar", "w") as outer:
        for name in CLASSES:
            inner = tmp_path / f"{name}.tar"
            with tarfile.open(inner, "w") as tar:
                for path in sorted((folder / name).iterdir()):
                    tar.add(path, path.name)
            outer.add(inner, inner.name)
    data = ImageFolderDataModule(tmp_path / "all.tar", data_config=PLAIN, val_fraction=0.0, test_fraction=0.0)
    assert data.class_names == CLASSES
    assert identities(data.calibration_dataset()) == {(label, index) for label in range(3) for index in range(10)}


@pytest.mark.parametrize("test_name", ["val", "test"])
def test_a_folder_beside_train_is_what_is_reported(tmp_path, test_name):
    write_images(tmp_path / "train", per_class=10)
    write_images(tmp_path / test_name, per_class=4)
    data = ImageFolderDataModule(tmp_path, data_config=PLAIN, val_fraction=0.1)
    assert (len(data.splits.train), len(data.splits.val), len(data.splits.test)) == (27, 3, 12)


def test_a_test_root_with_fewer_classes_keeps_the_training_labels(folder, tmp_path):
    other = tmp_path / "other"
    (other / "fox").mkdir(parents=True)
    Image.new("RGB", (12, 12), (7, 7, 7)).save(other / "fox" / "a.png")
    data = ImageFolderDataModule(folder, test_root=other, data_config=PLAIN)
    assert [label for _, label in (data.splits.test[i] for i in range(1))] == [CLASSES.index("fox")]
    assert len(data.splits.train) + len(data.splits.val) == 30


def test_an_own_validation_split_leaves_all_training_images(tmp_path):
    write_images(tmp_path / "train", per_class=10)
    write_images(tmp_path / "search", per_class=2)
    write_images(tmp_path / "test", per_class=3)
    data = ImageFolderDataModule(tmp_path, data_config=PLAIN, val_split="search")
    assert (len(data.splits.train), len(data.splits.val), len(data.splits.test)) == (30, 6, 9)


def test_caps_are_seeded_and_stratified(folder):
    def data(seed):
        return ImageFolderDataModule(
            folder,
            data_config=PLAIN,
            max_train_images=6,
            max_val_images=3,
            max_test_images=3,
            val_fraction=0.2,
            test_fraction=0.2,
            split_seed=seed,
        )

    first = data(0)
    assert np.bincount(first.splits.train.labels).tolist() == [2, 2, 2]
    assert (len(first.splits.val), len(first.splits.test)) == (3, 3)
    assert identities(first.calibration_dataset()) == identities(data(0).calibration_dataset())
    assert identities(first.calibration_dataset()) != identities(data(1).calibration_dataset())


def test_data_config_of_a_model_decides_the_transform(folder):
    config = {
        "input_size": (3, 20, 20),
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25] * 3,
        "crop_pct": 1.0,
        "num_classes": 1000,
    }
    data = ImageFolderDataModule(folder, data_config=config, test_fraction=0.5)
    image, label = data.splits.test[0]
    assert (data.in_chans, data.img_size) == (3, 20)
    assert image.shape == (3, 20, 20)
    torch.testing.assert_close(image[2], torch.full((20, 20), -2.0))  # blue is 0: (0 − 0.5) / 0.25
    torch.testing.assert_close(image[0], torch.full((20, 20), (40 * label / 255 - 0.5) / 0.25))
    assert ImageFolderDataModule(folder, data_config=config, img_size=8).splits.test[0][0].shape == (3, 8, 8)


def test_gray_images_for_a_one_channel_model(folder):
    data = ImageFolderDataModule(folder, in_chans=1, img_size=8, batch_size=4, num_workers=0)
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (4, 1, 8, 8)


def test_augmentation_is_for_training_only(folder):
    data = ImageFolderDataModule(
        folder, data_config=PLAIN, augmentation={"auto_augment": "rand-m9-mstd0.5", "re_prob": 1.0, "re_mode": "pixel"}
    )
    assert not torch.equal(data.splits.train[0][0], data.splits.train[0][0])
    assert torch.equal(data.calibration_dataset()[0][0], data.calibration_dataset()[0][0])
    plain = ImageFolderDataModule(folder, data_config=PLAIN, augmentation={"no_aug": True})
    assert torch.equal(plain.splits.train[0][0], plain.splits.train[0][0])


class Stream:
    """A reader of a streamed data set, as timm's webdataset reader looks from outside."""

    class_to_idx = {"cat": 0, "dog": 1}  # noqa: RUF012

    def __init__(self, split: str) -> None:
        self.level = {"train": 10, "dev": 20, "test": 30}[split]

    def __iter__(self):
        yield from ((Image.new("RGB", (12, 12), (self.level,) * 3), label) for label in (0, 1))

    def __len__(self) -> int:
        return 2


@pytest.fixture
def streams(monkeypatch):
    def create(name, root, split, **kwargs):
        return IterableImageDataset(root, reader=Stream(split))

    monkeypatch.setattr("lightning_mdc.app.data.image_folder.create_dataset", create)


@pytest.mark.usefixtures("streams")
def test_streams_are_read_by_their_own_splits():
    data = ImageFolderDataModule(
        None, name="wds/pets", val_split="dev", test_split="test", data_config=PLAIN, num_workers=0
    )
    for loader, level in ((data.train_dataloader(), 10), (data.val_dataloader(), 20), (data.test_dataloader(), 30)):
        images, labels = next(iter(loader))
        assert labels.tolist() == [0, 1]
        if level != 10:  # the training transform jitters colours
            torch.testing.assert_close(images, torch.full((2, 3, 12, 12), level / 255))


@pytest.mark.usefixtures("streams")
def test_streamed_images_are_scaled_as_those_of_files(monkeypatch):
    """timm's readers of streams would clip; they are asked to leave it to us."""
    asked = []

    def create(name, root, split, input_img_mode, **kwargs):
        asked.append(input_img_mode)
        reader = Stream(split)
        pixels = np.full((12, 12), reader.level * 257, dtype=np.uint16)
        return IterableImageDataset(root, reader=Reader([(Image.fromarray(pixels), 0), (Image.fromarray(pixels), 1)]))

    class Reader(list):
        class_to_idx = Stream.class_to_idx

    monkeypatch.setattr("lightning_mdc.app.data.image_folder.create_dataset", create)
    data = ImageFolderDataModule(
        None, name="wds/scans", val_split="dev", test_split="test", data_config=PLAIN, num_workers=0
    )
    images, _ = next(iter(data.test_dataloader()))
    torch.testing.assert_close(images, torch.full((2, 3, 12, 12), 30 / 255))
    assert set(asked) == {""}


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "name='wds/pets' is read as a stream"),
        ({"val_split": "dev", "test_split": "test", "max_test_images": 5}, "max_test_images=5 can't be chosen"),
    ],
)
def test_streams_that_would_have_to_be_cut_are_refused(arguments, words):
    with pytest.raises(DataError, match=words):
        ImageFolderDataModule(None, name="wds/pets", **arguments).setup()


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"test_fraction": -0.1}, "test_fraction=-0.1"),
        ({"val_fraction": 0.6, "test_fraction": 0.6}, "leave none to train on"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"in_chans": 2}, "in_chans=2"),
        ({"img_size": 0}, "img_size=0"),
        ({"max_train_images": 0}, "max_train_images=0"),
    ],
)
@pytest.mark.parametrize("kind", ["digits", "folder"])
def test_wrong_numbers_name_the_argument(kind, arguments, words, request):
    def make():
        if kind == "digits":
            return DigitsDataModule(**arguments)
        return ImageFolderDataModule(request.getfixturevalue("folder"), **arguments)

    with pytest.raises(DataError, match=words):
        make().setup()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p / "nowhere", "does not exist"),
        (lambda p: None, "root=None names no images"),
        (lambda p: p / "empty", "can't be read as images: Found 0 images"),
        (lambda p: write_images(p / "one", classes=("cat",)), r"holds 1 class \(\['cat'\]\)"),
        (lambda p: p / "flat", "outside any class folder"),
        (lambda p: p / "text.tar", "no uncompressed .tar"),
        (lambda p: p / "text.txt", "no uncompressed .tar"),
        (lambda p: write_tar(p / "packed.tar", write_images(p / "source"), "w:gz"), "no uncompressed .tar"),
        (lambda p: write_tar(p / "hollow.tar", p / "empty"), "can't be read"),
        (lambda p: truncated(write_tar(p / "cut.tar", write_images(p / "source"))), "can't be read as a tar"),
    ],
)
def test_a_root_that_holds_no_data_set_is_explained(tmp_path, make, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat" / "cat").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "flat" / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "flat" / "cat" / "a.png")
    for name in ("text.tar", "text.txt"):
        (tmp_path / name).write_text("no tar")
    with pytest.raises(DataError, match=words):
        ImageFolderDataModule(make(tmp_path)).setup()


def truncated(path: Path) -> Path:
    os.truncate(path, path.stat().st_size // 2 - 100)
    return path


def test_unknown_classes_in_the_test_root_are_named(folder, tmp_path):
    other = write_images(tmp_path / "other", classes=("cat", "wolf"))
    with pytest.raises(DataError, match=r"lack: \['wolf'\]"):
        ImageFolderDataModule(folder, test_root=other).setup()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "torch/no_such_set"}, "name='torch/no_such_set'"),
        ({"augmentation": {"random_erasing": 0.5}}, r"unknown keys \['random_erasing'\]"),
        ({"augmentation": {"auto_augment": "nonsense"}}, "augmentation="),
        ({"test_root": "nowhere"}, "test_root='nowhere' does not exist"),
        ({"dataset_options": {"no_such_option": 1}}, "can't be read as images"),
    ],
)
def test_settings_that_timm_does_not_know_are_explained(folder, arguments, words):
    with pytest.raises(DataError, match=words):
        ImageFolderDataModule(folder, **arguments).setup()


def test_reading_data_prints_nothing(folder, caplog):
    with caplog.at_level(logging.WARNING):
        ImageFolderDataModule(folder, data_config=PLAIN).setup()
    assert not caplog.records
