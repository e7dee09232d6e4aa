"""``mdc compress``: what it leaves is what the parts give by hand on the same images; killed, it goes on."""

import contextlib
import io
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from timm.models._hub import save_for_hf
from torch import Tensor

import lightning_mdc as mdc
from lightning_mdc.__main__ import main
from lightning_mdc.gp_ei.study import Study, read_study
from lightning_mdc.policy import Plan
from tests.kinds import CLASSES, SIZE, images, make, randomised

MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)
PER_CLASS, SCORED, JUDGED = 9, 40, 20
FEW = ["--images", str(SCORED), "--judging", str(JUDGED), "--batch-size", "16", "--workers", "0", "--device", "cpu"]
QUICK = [*FEW, "--policy", "uniform", "--compensate", "none"]


class Said(NamedTuple):
    code: int
    out: str
    err: str


def mdc_compress(*words: Any) -> Said:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["compress", *map(str, words)])
    return Said(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Handwritten digits, a folder for each of as many classes as the models have."""
    root, digits = tmp_path_factory.mktemp("photos"), load_digits()
    for label in range(CLASSES):
        (root / str(label)).mkdir()
        for number, pixels in enumerate(digits.images[digits.target == label][:PER_CLASS]):
            image = Image.fromarray((pixels * 15).astype(np.uint8)).convert("RGB").resize((SIZE, SIZE))
            image.save(root / str(label) / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model: Any = make()
    model.pretrained_cfg = {"mean": MEAN, "std": STD, "crop_pct": 1.0, "input_size": (3, SIZE, SIZE)}
    folder = tmp_path_factory.mktemp("models") / "dense"
    mdc.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def finished(photos: Path, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Said]:
    out = tmp_path_factory.mktemp("runs") / "new" / "out"
    said = mdc_compress("--model", dense, "--data", photos, "--trials", 4, "--out", out, *FEW)
    assert said.code == 0, said.err
    return out, said


@pytest.fixture
def nothing_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mdc.app.compress.save_figure", lambda figure, path: None)


def by_hand(photos: Path) -> tuple[Tensor, Tensor]:
    """The images in the order in which they are sampled, as the model sees them, and their labels."""
    files = sorted(photos.glob("*/*.png"))
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255 for file in files])
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    normalised = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return normalised[order], torch.tensor([int(file.parent.name) for file in files])[order]


def test_it_heals_as_many_epochs_as_it_is_told(photos, dense, tmp_path, nothing_drawn):
    said = mdc_compress("--model", dense, "--data", photos, "--heal", 2, "--out", tmp_path / "out", *QUICK)
    assert said.code == 0, said.err
    shown, few = by_hand(photos)[0][:SCORED], mdc.Calibration(SCORED, JUDGED, 16)
    expected = mdc.compress(mdc.load(dense), [shown], None, "uniform", compensate="none", calibration=few, heal=2)
    for name, value in mdc.load(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(value, expected.model.state_dict()[name], atol=1e-3, rtol=1e-2)
    assert "healed" in said.out
    refused = mdc_compress("--model", dense, "--data", photos, "--heal", -1, "--out", tmp_path / "no", *QUICK)
    assert refused.code
    assert "heal=-1" in refused.err


def test_it_leaves_what_the_parts_give(finished, photos, dense):
    out, said = finished
    model, (shown, labels) = mdc.load(dense), by_hand(photos)
    few = mdc.Calibration(SCORED, JUDGED, 16)
    expected = mdc.compress(model, [shown[:SCORED], shown[SCORED:]], n_trials=4, calibration=few)
    plan = Plan.from_json((out / "plan.json").read_text())
    assert plan == expected.plan
    assert mdc.Policy.load(out / "policy.json") == expected.policy
    slim = mdc.load(out)
    judged, answers = shown[SCORED : SCORED + JUDGED], labels[SCORED : SCORED + JUDGED]
    with torch.no_grad():
        before, after = model(judged).log_softmax(-1), slim(judged).log_softmax(-1)
        torch.testing.assert_close(after, expected.model.eval()(judged).log_softmax(-1), atol=1e-4, rtol=1e-3)
    assert mdc.macs(slim) <= 0.6 * mdc.macs(model)
    assert slim.pretrained_cfg["label_names"] == [str(label) for label in range(CLASSES)]
    assert slim.pretrained_cfg["mean"] == MEAN

    rows = {line.split("  ")[1].strip(): line for line in said.out.splitlines() if line.startswith("  ")}
    assert f"{mdc.macs(slim) / mdc.macs(model):.1%}" in rows["MACs"]
    distance = float((before.exp() * (before - after)).sum(1).mean())
    assert float(rows["KL from dense, nats"].split()[-1]) == pytest.approx(distance, rel=0.01, abs=1e-7)
    right = [f"{int((each.argmax(1) == answers).sum())}/{JUDGED}" for each in (before, after)]
    assert re.findall(r"\d+/\d+", rows["top-1"]) == right
    assert said.out.splitlines()[-2:] == [
        f"load it:   mdc.load('{out}')",
        f"export it: mdc export {out} slim.onnx",
    ]
    assert "4 of 4 trials" in said.out
    assert said.err == ""
    for picture in ("plan.png", "search.png"):
        assert Image.open(out / picture).width > 500


def killed_after(trials: int, monkeypatch: pytest.MonkeyPatch, *words: Any) -> None:
    """Ctrl-C in the middle of the next trial."""
    finish = Study.finish

    def interrupted(self: Study, *args: Any, **options: Any) -> Any:
        if len(self.finished) == trials:
            raise KeyboardInterrupt
        return finish(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Study, "finish", interrupted)
        said = mdc_compress(*words)
    assert (said.code, said.err) == (130, "interrupted; the same command goes on\n")


def test_killed_and_started_again_it_ends_as_if_it_had_not_been(
    finished, photos, dense, tmp_path, monkeypatch, nothing_drawn
):
    out = tmp_path / "out"
    words = ["--model", dense, "--data", photos, "--trials", 4, "--out", out, *FEW]
    killed_after(2, monkeypatch, *words)
    assert not (out / "config.json").exists()
    before = read_study(out / "search.jsonl").finished
    assert len(before) == 2

    other = mdc_compress(*words, "--budget", 0.5)
    assert other.code == 1
    assert "belongs to another search: about.budget.macs was 0.6, now 0.5" in other.err
    assert "another --out begins anew" in other.err

    said = mdc_compress(*words)
    assert said.code == 0, said.err
    assert f"going on from {out / 'search.jsonl'}" in said.out
    assert read_study(out / "search.jsonl").finished[:2] == before
    whole, _ = finished
    assert (out / "plan.json").read_text() == (whole / "plan.json").read_text()
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

    again = mdc_compress(*words)
    assert again.code == 1
    assert "holds a finished model" in again.err


# --- models and images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["another", "none"])
def test_a_name_gets_the_weights_of_a_file_and_its_head(head, photos, tmp_path, nothing_drawn):
    """Of a model of another size; where everything is kept, it is that model."""
    name, classes = "test_vit", CLASSES if head == "another" else 0
    own = randomised(timm.create_model(name, img_size=48, num_classes=CLASSES))
    state = {key: tensor for key, tensor in own.state_dict().items() if classes or not key.startswith("head.")}
    torch.save({"state_dict": {f"net.{key}": tensor for key, tensor in state.items()}}, tmp_path / "own.ckpt")
    said = mdc_compress(
        *("--model", name, "--img-size", 48, "--checkpoint", tmp_path / "own.ckpt", "--data", photos),
        *("--budget", 1, "--out", tmp_path / "out", *QUICK),
    )
    assert said.code == 0, said.err
    kept = "a head for 7 classes" if classes else "no head, so features are what is kept close"
    assert f"--checkpoint='{tmp_path / 'own.ckpt'}' has {kept}" in said.out
    assert ("top-1" in said.out, "squared error" in said.out) == (bool(classes), not classes)
    own.reset_classifier(0) if not classes else None
    shown = images(size=48)
    with torch.no_grad():
        torch.testing.assert_close(mdc.load(tmp_path / "out")(shown), own(shown))


def test_a_head_that_is_new_is_said_to_answer_at_random(photos, tmp_path, nothing_drawn):
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "own.safetensors")
    words = ["--model", "test_vit", "--checkpoint", tmp_path / "own.safetensors", "--num-classes", 3, "--data", photos]
    said = mdc_compress(*words, "--out", tmp_path / "out", *QUICK)
    assert said.code == 0, said.err
    assert "--num-classes=3: the head is new and answers at random" in said.out
    assert "the 7 folders of images are not the 3 classes of the model: no top-1" in said.out


@pytest.mark.parametrize("kind", ["plain", "tar"])
def test_a_folder_of_the_hub_and_images_without_classes_or_in_a_tar(kind, photos, tmp_path, nothing_drawn):
    own = randomised(timm.create_model("test_vit", img_size=SIZE, num_classes=CLASSES))
    save_for_hf(own, tmp_path / "hub", safe_serialization=True)
    data = tmp_path / ("images" if kind == "plain" else "images.tar")
    if kind == "plain":
        data.mkdir()
        for file in photos.glob("*/*.png"):
            shutil.copy(file, data / f"{file.parent.name}-{file.name}")
    else:
        with tarfile.open(data, "w") as tar:
            tar.add(photos, ".")
    said = mdc_compress("--model", tmp_path / "hub", "--data", data, "--budget", 1, "--out", tmp_path / "out", *QUICK)
    assert said.code == 0, said.err
    assert ("top-1" in said.out) == (kind == "tar")
    slim: Any = mdc.load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(slim(images()), own(images()))
    assert slim.pretrained_cfg.get("label_names") == (list("0123456") if kind == "tar" else None)


# --- what is refused, before anything is read -------------------------------------------------------------------------

NAME = ["--model", "test_vit"]
DENSE = ["--model", "DENSE"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (NAME, "'test_vit' is a name, which has no weights; give --checkpoint FILE, .* or --random-weights"),
        (["--model", "vit_tny", "--random-weights"], "--model='vit_tny' is no model of timm; did you mean .*vit_tiny"),
        (["--model", "resnet10t", "--random-weights"], "UnsupportedModelError"),
        ([*NAME, "--checkpoint", "nowhere.pth"], "--checkpoint='nowhere.pth' is no file"),
        (["--model", "PHOTOS"], "PHOTOS has no config.json"),
        ([*DENSE, "--pretrained"], "--pretrained beside --model='DENSE': a folder has its own weights"),
        ([*DENSE, "--num-classes", "3"], "--num-classes beside --model='DENSE'.*leave --num-classes out"),
        ([*DENSE, "--data", "nowhere"], "--data: root='nowhere' does not exist"),
        ([*DENSE, "--budget", "0"], "BudgetError: macs=0"),
        ([*DENSE, "--budget", "0.001"], "below the smallest reachable cost"),
        ([*DENSE, "--latency", "soon"], "latency='soon'"),
        ([*DENSE, "--policy", "nowhere.json"], "nowhere.json"),
        ([*DENSE, "--policy", "uniform", "--trials", "3"], "n_trials=3 is not looked at"),
        ([*DENSE, "--dimensions", "heads,layers"], "layers"),
        ([*DENSE, "--trials", "0"], "n_trials=0"),
        ([*DENSE, "--images", "0"], "images=0"),
        ([*DENSE, "--batch-size", "0"], "--batch-size=0: expected a whole number of at least 1"),
        ([*DENSE, "--out", "PHOTOS"], "--out='PHOTOS' holds something else"),
        ([*DENSE, "--out", "PHOTOS/0/0.png/out"], "cannot be made: PHOTOS/0/0.png is a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_it_is_refused_in_a_line_before_images_are_read(words, said, photos, dense, tmp_path, monkeypatch):
    def read(*_: Any) -> None:
        raise AssertionError("images are read")

    monkeypatch.setattr("lightning_mdc.app.data.image_view.ImageView.__getitem__", read)
    words = [word.replace("PHOTOS", str(photos)).replace("DENSE", str(dense)) for word in words]
    done = mdc_compress("--data", photos, "--out", tmp_path / "out", "--workers", 0, *words)
    said = said.replace("PHOTOS", re.escape(str(photos))).replace("DENSE", re.escape(str(dense)))
    assert done.code == 1
    assert re.search(said, done.err)
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_hub_without_weights_is_refused(photos, tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "test_vit"}')
    said = mdc_compress("--model", tmp_path, "--data", photos, "--out", tmp_path / "out")
    assert said.code == 1
    assert f"--model='{tmp_path}' is refused by timm" in said.err


def test_it_helps_and_names_what_it_needs(capsys):
    for words, code in (["--help"], 0), ([], 2), ([*NAME, "--pretrained", "--random-weights"], 2):
        with pytest.raises(SystemExit) as ended:
            main(["compress", *words])
        assert ended.value.code == code
    said = capsys.readouterr()
    assert "mdc compress --model" in said.out
    assert "required: --model, --data, --out" in said.err
    assert "not allowed with argument" in said.err
