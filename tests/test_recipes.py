"""Every ``experiment=`` runs all its steps, on small local data and weights in place of the large ones."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

import lightning_mdc as mdc
from lightning_mdc.app import evaluation, pipeline, steps
from lightning_mdc.app.settings import plain
from lightning_mdc.app.step_table import STEPS
from lightning_mdc.policy_search.held_out import HeldOut
from tests.test_configs import CONF, EXPERIMENTS

T2T = "t2t_vit_14_imagenet_40"
IMAGENET = [name for name in EXPERIMENTS if name not in ("digits", "cifar10")]
SMALL = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3}
# Where the tokens-to-token module, which nothing can be pruned of, is not nearly all there is.
DEEPER = {**SMALL, "embed_dim": 192, "depth": 8, "num_heads": 6}
NUM_CLASSES = 3


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """The layout of ImageNet. Training images are noise; those of val are white, to be known wherever they turn up."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for label in range(NUM_CLASSES):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (72, 72, 3), dtype=np.uint8) if split == "train" else 255
                Image.fromarray(np.broadcast_to(pixels, (72, 72, 3)).astype(np.uint8)).save(folder / f"{number}.png")
    return root


def settings(name: str, tmp_path: Path, images: Path) -> dict:
    overrides = [
        f"experiment={name}",
        f"runs={tmp_path}",
        "trainer=cpu",
        "trainer.fast_dev_run=true",
        "logger=none",
        "data.batch_size=2",
        "data.num_workers=0",
        "calibration.images=8",
        "calibration.batch_size=4",
        "search.n_trials=2",
        "search.n_initial_points=1",
        "search.images=6",
        "latency.rounds=1",
        "latency.batch_sizes=[1]",
    ]
    if name == "cifar10":
        overrides += [f"data.root={images}", "data.test_fraction=0.1", "model.args.depth=4", "model.args.embed_dim=48"]
    if name in IMAGENET:
        size = DEEPER if name.startswith("t2t") else SMALL
        overrides += [
            f"data.root={images}",
            "data.val_fraction=0.2",
            *(f"model.args.{k}={v}" for k, v in size.items()),
        ]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            model = compose("train", [*overrides, "model.checkpoint=x"]).model.name
        network = timm.create_model(model, num_classes=NUM_CLASSES, **size)
        weights = tmp_path / "weights.pth"
        state = network.state_dict()
        if name.startswith("t2t"):  # as the authors' file names them
            state = {key.replace("patch_embed.", "tokens_to_token."): value for key, value in state.items()}
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, weights)
        overrides += ["model.pretrained=false", f"model.checkpoint={weights}"]
    if name == "deit_small_distilled_40":
        teacher = timm.create_model("vit_tiny_patch16_224", num_classes=NUM_CLASSES, **SMALL)
        mdc.save(teacher, tmp_path / "teacher")
        overrides.append(f"distillation.teacher={tmp_path / 'teacher'}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plain(compose("train", overrides))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.usefixtures("no_charts")
def test_every_step_runs(name, tmp_path, images):
    composed = settings(name, tmp_path, images)
    folder = pipeline.run(composed).path
    for name in pipeline.select(composed):
        assert (folder / STEPS[name].output).exists(), name
    budget = composed["budget"]
    dense, slim = mdc.load(folder / "dense"), mdc.load(folder / "finetuned" / "seed0")
    assert mdc.macs(slim) <= budget * mdc.macs(dense)


@pytest.mark.slow
@pytest.mark.usefixtures("no_charts")
def test_no_val_image_reaches_what_decides(tmp_path, images, monkeypatch):
    """Scores, search and training see noise; the white images of val are only tested on."""
    seen: dict[str, list[torch.Tensor]] = {"score": [], "search": [], "train": [], "test": []}

    def spied(name, batches):
        for batch in batches:
            seen[name].append(batch[0])
            yield batch

    def judged(self, batches, *args, **kwargs):
        initialise(self, list(spied("search", batches)), *args, **kwargs)

    def trained(self, batch, index):
        seen["train"].append(batch[0])
        return step(self, batch, index)

    def tested(models, loader, *args):
        seen["test"].extend(batch[0] for batch in loader)
        return outcomes(models, loader, *args)

    initialise, step, outcomes = HeldOut.__init__, mdc.DistillationModule.training_step, evaluation.outcomes
    monkeypatch.setattr(HeldOut, "__init__", judged)
    monkeypatch.setattr(mdc.DistillationModule, "training_step", trained)
    monkeypatch.setattr(evaluation, "outcomes", tested)
    sample = steps.calibration_batches
    spy = lambda *options, **named: spied("score", sample(*options, **named))  # noqa: E731
    monkeypatch.setattr(steps, "calibration_batches", spy)
    pipeline.run(settings("deit_small_imagenet_40", tmp_path, images))

    def white(name):
        return [bool(image.max() - image.min() < 1.5) for batch in seen[name] for image in batch]  # by channel's mean

    for name in ("score", "search", "train"):
        assert len(white(name)) > 0
        assert not any(white(name)), name
    assert all(white("test"))
