"""Damaged images and half-written data sets; which files are opened for what; what timm's options and readers do."""

import gc
import json
import logging
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from torch.utils.data import DataLoader

from lightning_mdc.app.data import ImageFolderDataModule
from lightning_mdc.errors import DataError
from tests.test_data import CLASSES, PLAIN, write_images, write_tar

CONF = Path(__file__).parent.parent / "conf"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_images(tmp_path / "images")


# --- kinds of images --------------------------------------------------------------------------------------------------

RAMP = np.arange(144, dtype=np.uint8).reshape(12, 12)  # 144 grays


def seen(path: Path, picture: Image.Image, in_chans: int = 3, **options) -> np.ndarray:
    """(channels, 12, 12) from 0 to 255: a file as the model sees it, by the evaluation transforms."""
    ending = options.pop("ending", "png")
    for name in ("a", "b"):
        (path / name).mkdir(exist_ok=True, parents=True)
        picture.save(path / name / f"1.{ending}", **options)
    data = ImageFolderDataModule(path, data_config=PLAIN, in_chans=in_chans, val_fraction=0.0, test_fraction=0.5)
    return data.splits.test[0][0].numpy() * 255


def sixteen() -> np.ndarray:
    return RAMP.astype(np.uint16) * 257  # the same grays: 255 is 65535


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, ending, in_chans):
    """PIL makes white of all above 255, which is 143 of these 144 grays."""
    picture = Image.fromarray(sixteen())
    np.testing.assert_allclose(seen(tmp_path, picture, in_chans, ending=ending), np.stack([RAMP] * in_chans), atol=0.51)


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize(("kind", "words"), [(np.int32, "32-bit whole"), (np.float32, "floating-point")])
def test_numbers_without_a_range_are_refused_and_never_replaced(tmp_path, kind, words, in_chans):
    picture = Image.fromarray(RAMP.astype(kind) * 300)
    words = rf"^{tmp_path}/[ab]/1.tif holds {words} numbers .*; convert it to 8 or 16 bits"
    with pytest.raises(DataError, match=words):
        seen(tmp_path, picture, in_chans, ending="tif")
    with pytest.raises(DataError, match=words):
        read(module(tmp_path, in_chans=in_chans).train_dataloader())


def test_lab_colours_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds LAB colours"):
        seen(tmp_path, Image.new("LAB", (12, 12)), ending="tif")


def kinds() -> dict[str, tuple[Image.Image, np.ndarray]]:
    """Pictures of 144 grays in PIL's other modes, and what there is to see in them, in gray."""
    gray = Image.fromarray(RAMP)
    alpha = gray.copy()
    alpha.putalpha(255)
    palette = Image.fromarray(143 - RAMP, "P")  # an index is no gray
    palette.putpalette([gray for index in range(144) for gray in [143 - index] * 3])
    return {
        "LA": (alpha, RAMP),
        "RGBA": (alpha.convert("RGBA"), RAMP),
        "P": (palette, RAMP),
        "1": (gray.point(lambda value: value > 70, mode="1"), (RAMP > 70) * 255),
        "CMYK": (gray.convert("RGB").convert("CMYK"), RAMP),
    }


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("mode", kinds())
def test_other_modes_are_what_they_show(tmp_path, caplog, mode, in_chans):
    picture, expected = kinds()[mode]
    assert picture.mode == mode
    ending = "tif" if mode == "CMYK" else "png"
    pixels = seen(tmp_path, picture, in_chans, ending=ending)
    np.testing.assert_allclose(pixels, np.stack([expected] * in_chans), atol=1)
    assert not caplog.records


@pytest.mark.parametrize("mode", ["LA", "P, one colour", "P, each colour", "RGB, one colour"])
def test_transparency_is_left_out_and_that_is_said_once(tmp_path, caplog, mode):
    """As PIL, timm and torchvision do; what the model was trained on looked like that."""
    picture, options = Image.fromarray(RAMP), {}
    if mode == "LA":
        picture.putalpha(Image.fromarray(RAMP))
    elif mode.startswith("P"):
        picture = kinds()["P"][0]
        options = {"transparency": 5 if "one" in mode else bytes(range(144))}
    else:
        picture, options = picture.convert("RGB"), {"transparency": (3, 3, 3)}
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(seen(tmp_path, picture, **options), np.stack([RAMP] * 3), atol=0.51)
        data = ImageFolderDataModule(tmp_path, data_config=PLAIN, val_fraction=0.0, test_fraction=0.0)
        first = len(caplog.records)
        for _ in range(2):
            assert [data.splits.calibration[i][1] for i in range(2)] == [0, 1]
    assert [first, len(caplog.records)] == [1, 2]
    assert "1.png is transparent in part, which is left out" in caplog.text


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(tmp_path, ending, orientation):
    """Whatever way up the camera was: what it noted is applied. The reference turns by numpy, not by PIL."""
    upright = np.zeros((12, 12, 3), dtype=np.uint8)
    upright[:6, :6], upright[:6, 6:] = 255, 100
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = seen(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), ending=ending, exif=exif, quality=100)
    assert np.abs(picture[0] - upright[..., 0]).mean() < 12


# --- damaged images -------------------------------------------------------------------------------------------------


def halve(path: Path) -> None:
    # Noise, so that half of the file is well within the pixels.
    pixels = np.random.default_rng(0).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="JPEG" if path.suffix == ".jpg" else "PNG")
    os.truncate(path, path.stat().st_size // 2)


def spoil(path: Path) -> None:
    """A PNG with a wrong check sum: PIL raises SyntaxError at some, OSError at others."""
    content = bytearray(path.read_bytes())
    content[16:24] = b"\xff" * 8
    path.write_bytes(content)


DAMAGES = {
    "empty": lambda path: os.truncate(path, 0),
    "halved": halve,
    "spoilt": spoil,
    "text": lambda p: p.write_text("x"),
}


def module(root: Path, **options) -> ImageFolderDataModule:
    """All 30 images are for training, unchanged, in steps of 1."""
    options = {"batch_size": 1, "num_workers": 0, "augmentation": {"no_aug": True}, **options}
    return ImageFolderDataModule(root, data_config=PLAIN, val_fraction=0.0, test_fraction=0.0, **options)


def read(loader) -> list[tuple[int, int, int]]:
    """(class that the pixels say, number that the pixels say, label) of every image."""
    return [
        (round(image[0, 0, 0].item() * 255) // 40, round(image[1, 0, 0].item() * 255), int(label))
        for images, labels in loader
        for image, label in zip(images, labels, strict=True)
    ]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_training_image_is_replaced_with_its_own_label_and_named(folder, tmp_path, caplog, damage, packed):
    """The last cat of all: what follows it is a dog, and must be called one."""
    DAMAGES[damage](folder / "cat" / "009.png")
    root = write_tar(tmp_path / "images.tar", folder) if packed else folder
    data = module(root)
    with caplog.at_level(logging.WARNING):
        seen = read(data.train_dataloader())
    assert len(seen) == 30
    assert all(pixels == label for pixels, _, label in seen)
    expected = {(label, number) for label in range(3) for number in range(10)} - {(0, 9)}
    assert {(label, number) for _, number, label in seen} == expected
    assert sorted(seen).count((1, 0, 1)) == 2
    (record,) = caplog.records
    name = f"{root}: cat/009.png" if packed else str(folder / "cat" / "009.png")
    assert record.getMessage().startswith(f"{name} can't be decoded")
    assert "1 of at most 10" in record.getMessage()


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_counted_over_all_workers_and_per_epoch(folder, workers):
    for number in (1, 2, 6):
        os.truncate(folder / "dog" / f"00{number}.png", 0)
    loader = module(folder, num_workers=workers, max_corrupt_images=3).train_dataloader()
    for epoch in range(3):  # 9 in all
        loader.sampler.set_epoch(epoch)
        assert len(read(loader)) == 30
        assert loader.dataset.corrupt.sum() == 3
    strict = module(folder, num_workers=workers, max_corrupt_images=2).train_dataloader()
    with pytest.raises(DataError) as caught:
        read(strict)
    message = str(caught.value)
    del caught
    gc.collect()  # ends the workers at once; left to a later test, that waits ten seconds for them
    assert message.startswith(f"max_corrupt_images=2 is exceeded by {folder / 'dog'}")
    assert "raise max_corrupt_images" in message
    assert len(message.splitlines()) == 1  # no traceback of a worker


def test_no_damaged_image_is_tolerated_where_it_counts(folder):
    """Reported numbers, the search and scores are of the images they say, or there are none."""
    for path in (folder / "dog").iterdir():
        os.truncate(path, 0)
    for options, ask in (
        ({"test_fraction": 0.9}, lambda data: data.test_dataloader()),
        ({"val_fraction": 0.9}, lambda data: data.val_dataloader()),
        ({}, lambda data: DataLoader(data.calibration_dataset())),
        ({"max_corrupt_images": 0}, lambda data: data.train_dataloader()),
    ):
        arguments = {"val_fraction": 0.0, "test_fraction": 0.0, "batch_size": 1, "num_workers": 0, **options}
        data = ImageFolderDataModule(folder, data_config=PLAIN, **arguments)
        with pytest.raises(DataError, match=rf"^{folder}/dog/00\d.png can't be decoded .*; replace it"):
            read(ask(data))


def test_images_that_are_all_damaged_end_in_an_error(folder):
    for path in folder.rglob("*.png"):
        os.truncate(path, 0)
    with pytest.raises(DataError, match="none of the 30 training images"):
        read(module(folder, max_corrupt_images=100).train_dataloader())


# --- half-written data sets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["train", "val"])
def test_a_class_folder_without_images_is_named(tmp_path, where):
    for name in ("train", "val"):
        write_images(tmp_path / name)
    (tmp_path / where / "owl").mkdir()
    (tmp_path / where / ".cache").mkdir()
    with pytest.raises(DataError, match=rf"root='{tmp_path}/{where}/?' has folders without any image: \['owl'\]"):
        ImageFolderDataModule(tmp_path).setup()


def test_val_with_other_classes_than_train_is_named(tmp_path):
    write_images(tmp_path / "train")
    write_images(tmp_path / "val", classes=("cat", "wolf"))
    with pytest.raises(DataError, match=r"classes that the training images lack: \['wolf'\]"):
        ImageFolderDataModule(tmp_path).setup()


def test_train_with_one_class_is_named(tmp_path):
    write_images(tmp_path / "train", classes=("cat",))
    write_images(tmp_path / "val")
    with pytest.raises(DataError, match=r"holds 1 class \(\['cat'\]\)"):
        ImageFolderDataModule(tmp_path).setup()


def test_an_empty_train_folder_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    write_images(tmp_path / "val")
    with pytest.raises(DataError, match="Found 0 images"):
        ImageFolderDataModule(tmp_path).setup()


def test_a_tar_cut_anywhere_is_named(folder, tmp_path):
    """Also between two images, where tarfile takes what is left for the whole."""
    path = write_tar(tmp_path / "images.tar", folder)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        boundaries = [member.offset for member in tar.getmembers()]
    for size in (*boundaries[2::9], boundaries[9] + 512 + 40, boundaries[-1] + 300, boundaries[-1] + 512 + 20):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"images.tar' can't be read as a tar"):
            ImageFolderDataModule(path).setup()
    path.write_bytes(whole)
    ImageFolderDataModule(path).setup()


# --- which files are opened -------------------------------------------------------------------------------------------

_opened: list[str] | None = None


def _hear(event: str, arguments: tuple) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str):
        _opened.append(arguments[0])


sys.addaudithook(_hear)  # the interpreter's own word on every file that is opened; it can't be taken off


def files_of(*datasets) -> set[str]:
    global _opened
    _opened = []
    try:
        for dataset in datasets:
            for index in range(len(dataset)):
                dataset[index]
        return {path for path in _opened if path.endswith(".png")}
    finally:
        _opened = None


@pytest.mark.parametrize("layout", ["beside", "test_root", "fraction"])
def test_nothing_that_decides_opens_a_test_image(tmp_path, layout):
    if layout == "fraction":
        root, options = write_images(tmp_path), {"test_fraction": 0.3}
    else:
        root = tmp_path if layout == "beside" else tmp_path / "train"
        options = {} if layout == "beside" else {"test_root": tmp_path / "val"}
        write_images(tmp_path / "train")
        write_images(tmp_path / "val", per_class=4)
    splits = ImageFolderDataModule(root, data_config=PLAIN, val_fraction=0.2, **options).splits
    val, tested = files_of(splits.val), files_of(splits.test)
    train, calibration = files_of(splits.train), files_of(splits.calibration)
    assert len(val) == 6
    assert train == calibration
    assert not train & val
    assert not (train | val) & tested
    everything = {str(path) for path in tmp_path.rglob("*.png")}
    assert train | val | tested == everything
    if layout != "fraction":
        assert tested == {path for path in everything if path.startswith(str(tmp_path / "val"))}


def test_a_tar_of_test_images_is_opened_for_testing_only(tmp_path, monkeypatch):
    train = write_tar(tmp_path / "train.tar", write_images(tmp_path / "a"))
    held_back = write_tar(tmp_path / "held_back.tar", write_images(tmp_path / "b", per_class=4))
    splits = ImageFolderDataModule(train, test_root=held_back, data_config=PLAIN, val_fraction=0.2).splits
    opened = []
    open_tar = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda name, *more, **options: opened.append(name) or open_tar(name, *more))
    for datasets, expected in (
        ((splits.train, splits.val, splits.calibration), {str(train)}),
        ((splits.test,), {str(held_back)}),
    ):
        opened.clear()
        for dataset in datasets:
            for index in range(len(dataset)):
                dataset[index]
        assert set(opened) == expected


# --- transforms -------------------------------------------------------------------------------------------------------


def test_evaluation_is_that_of_the_models_own_config(tmp_path):
    """DeiT: shorter side to floor(224 / 0.9) = 248 pixels, bicubic, centre 224, ImageNet statistics; by PIL alone."""
    pixels = np.random.default_rng(0).integers(0, 255, (260, 300, 3), dtype=np.uint8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "1.png")
    model = timm.create_model("deit_tiny_patch16_224")
    config = model.pretrained_cfg
    data = ImageFolderDataModule(tmp_path, data_config=config, val_fraction=0.0, test_fraction=0.5)
    image, _ = data.splits.test[0]
    resized = Image.fromarray(pixels).resize((int(248 * 300 / 260), 248), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 224) / 2), (248 - 224) // 2
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224))) / 255
    expected = (expected - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(image.permute(1, 2, 0), expected, atol=1e-5)
    # Given from train.py as a config of another size: the crop stays.
    smaller = ImageFolderDataModule(tmp_path, data_config=config, img_size=112, val_fraction=0.0, test_fraction=0.5)
    assert smaller.data_config["crop_pct"] == 0.9
    assert smaller.splits.test[0][0].shape == (3, 112, 112)


def test_a_model_is_tested_at_the_size_it_is_built_for(folder):
    """timm's test_input_size is for models that take any size; position embeddings are made for data.img_size."""
    config = {"input_size": (3, 16, 16), "test_input_size": (3, 24, 24), "crop_pct": 0.5, "test_crop_pct": 1.0}
    data = ImageFolderDataModule(folder, data_config=config)
    assert data.img_size == 16
    assert data.splits.test[0][0].shape == (3, 16, 16)
    assert data.data_config["crop_pct"] == 0.5


# --- settings ---------------------------------------------------------------------------------------------------------


def settings(*overrides: str) -> dict:
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("train", list(overrides))["data"]


def test_every_augmentation_of_the_conf_is_one_of_timm_and_null_changes_nothing(folder):
    spelt_out = dict(settings("data=image_folder")["augmentation"])
    assert set(spelt_out.values()) == {None}
    plain, ours = (ImageFolderDataModule(folder, augmentation=given) for given in (None, spelt_out))
    assert str(plain.train_transform) == str(ours.train_transform)


def test_the_cifar_experiment_still_says_what_it_said(folder):
    augmentation = settings("experiment=cifar10")["augmentation"]
    data = ImageFolderDataModule(folder, augmentation=augmentation)
    expected = {"scale": (0.6, 1.0), "auto_augment": "rand-m5-mstd0.5-inc1"}
    assert str(data.train_transform) == str(ImageFolderDataModule(folder, augmentation=expected).train_transform)
    assert "RandAugment" in str(data.train_transform)
    without = settings("experiment=cifar10", "data.augmentation.auto_augment=null")["augmentation"]
    assert "RandAugment" not in str(ImageFolderDataModule(folder, augmentation=without).train_transform)


@pytest.mark.parametrize(
    ("augmentation", "words"),
    [
        ({"re_prob": 1.5}, "augmentation.re_prob=1.5: expected a probability"),
        ({"hflip": True}, "augmentation.hflip=True"),
        ({"scale": [0.9, 0.1]}, r"augmentation.scale=\(0.9, 0.1\)"),
        ({"scale": [0.0, 1.0]}, "augmentation.scale="),
        ({"ratio": 2}, "augmentation.ratio=2"),
        ({"color_jitter": -1}, "augmentation.color_jitter=-1"),
        ({"re_count": 0}, "augmentation.re_count=0"),
        ({"re_prob": 0.5, "re_mode": "stripes"}, "refused by timm"),
        ({"interpolation": "octic"}, "refused by timm"),
    ],
)
def test_wrong_augmentation_is_named(folder, augmentation, words):
    with pytest.raises(DataError, match=words):
        ImageFolderDataModule(folder, augmentation=augmentation)


def test_wrong_number_of_corrupt_images_is_named(folder):
    with pytest.raises(DataError, match="max_corrupt_images=-1"):
        ImageFolderDataModule(folder, max_corrupt_images=-1)


# --- data sets that timm knows by name --------------------------------------------------------------------------------


def test_torchvisions_folder_by_name(tmp_path):
    write_images(tmp_path / "train")
    write_images(tmp_path / "val", per_class=4)
    data = ImageFolderDataModule(
        tmp_path, name="torch/image_folder", test_split="val", data_config=PLAIN, batch_size=5, num_workers=0
    )
    assert data.class_names == CLASSES
    assert len(data.splits.test) == 12
    assert all(pixels == label for pixels, _, label in read(data.test_dataloader()))


def test_a_hugging_face_data_set(tmp_path):
    pytest.importorskip("datasets", reason="reads hfds/ names")
    for split in ("train", "test"):
        write_images(tmp_path / "set" / split)
    data = ImageFolderDataModule(
        tmp_path / "cache", name=f"hfds/{tmp_path / 'set'}", test_split="test", data_config=PLAIN, num_workers=0
    )
    assert data.class_names == CLASSES
    assert (len(data.splits.train), len(data.splits.val), len(data.splits.test)) == (27, 3, 30)
    assert sorted(read(data.test_dataloader())) == [(c, i, c) for c in range(3) for i in range(10)]


def test_a_web_data_set(tmp_path, folder):
    pytest.importorskip("webdataset", reason="reads wds/ names")
    for split in ("train", "val", "test"):
        with tarfile.open(tmp_path / f"pets-{split}-0000.tar", "w") as shard:
            for label, name in enumerate(CLASSES):
                for number in range(4):
                    (folder / "label").write_text(str(label))
                    shard.add(folder / name / f"{number:03d}.png", f"{name}{number}.png")
                    shard.add(folder / "label", f"{name}{number}.cls")
    filename = {split: f"pets-{split}-0000.tar" for split in ("train", "val", "test")}
    info = {
        split: {"name": split, "num_samples": 12, "filenames": [name], "shard_lengths": [12]}
        for split, name in filename.items()
    }
    (tmp_path / "_info.json").write_text(json.dumps({"splits": info}))
    data = ImageFolderDataModule(
        tmp_path,
        name="wds/pets",
        val_split="val",
        test_split="test",
        class_names=CLASSES,
        data_config=PLAIN,
        augmentation={"no_aug": True},
        batch_size=4,
        num_workers=0,
    )
    tested = read(data.test_dataloader())
    assert sorted(tested) == [(c, i, c) for c in range(3) for i in range(4)]
    loader = data.train_dataloader()
    passes = [read(loader) for _ in range(2)]
    assert all(pixels == label for images in passes for pixels, _, label in images)
    assert passes[0] != passes[1]
    assert torch.is_tensor(next(iter(data.val_dataloader()))[0])
