"""Saved models where people look for them: `timm.create_model`, timm's hub (a folder stands in for it), validate's way,
transformers' `TimmWrapper`."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from torch import nn

import lightning_mdc as mdc
from lightning_mdc.artifact import CONFIG
from lightning_mdc.errors import ArtifactError
from lightning_mdc.models import FAMILIES, find_anatomy
from lightning_mdc.models.timm_hub import ENTRYPOINT
from tests.kinds import BASE, BOUND_KINDS, CLASSES, EVA_KINDS, KINDS, everyday, images, randomised
from tests.test_artifact import OF_RECIPES, remade
from tests.test_own_family import Toy, ToyFamily

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def pruned(model: nn.Module) -> nn.Module:
    """Slim in all it can lose, with a prior over positions, which no file of weights holds."""
    scores = mdc.score(randomised(model), [images(8)], progress=False)
    dimensions = find_anatomy(model).dimensions
    tokens = mdc.TokenOptions(score="attention*dependence") if "tokens" in dimensions else None
    return mdc.slim(model, mdc.make_plan(model, scores, mdc.Policy(**dict.fromkeys(dimensions, 0.5)), tokens))


def of_timm(**options: Any) -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", **(BASE | {"depth": 2} | options))
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": MEAN, "std": STD, "crop_pct": 1.0}
    return model


@pytest.fixture(scope="module")
def slim() -> nn.Module:
    return pruned(of_timm())


@pytest.fixture(scope="module")
def folder(slim: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "slim"
    mdc.save(slim, folder, class_names=list("abcdefg"))
    return folder


def created(folder: Path | str, **options: Any) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}" if isinstance(folder, Path) else folder, **options).eval()


# --- by timm's create_model -------------------------------------------------------------------------------------------

EVERY_WAY: dict[str, Callable[[], nn.Module]] = {
    "vit": of_timm,
    "distilled": KINDS["deit_distilled"],
    "pooled": KINDS["attention_pool"],
    "gated": KINDS.get("gated", KINDS["glu"]),
    "t2t": lambda: timm.create_model("t2t_vit_7", **(BASE | {"depth": 2, "patch_size": 16})),
    "dinov3": EVA_KINDS["dinov3"],
    "rope_mixed": EVA_KINDS["rope_mixed"],
    **BOUND_KINDS,
}


@pytest.mark.slow
@pytest.mark.parametrize("names", [("vit", "t2t", "dinov3", "swin"), tuple(EVERY_WAY)], ids=len)
@torch.no_grad()
def test_a_fresh_process_creates_what_was_saved(names: tuple[str, ...], tmp_path: Path) -> None:
    x, logits = images(), {}
    models = {name: pruned(EVERY_WAY[name]()) for name in names} | {"dense": randomised(of_timm())}
    for name, model in models.items():
        mdc.save(model, tmp_path / name)
        logits[name] = model(x)
    torch.save(x, tmp_path / "images.pt")
    program = (
        "import sys, pathlib, torch, timm, lightning_mdc.models\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "x = torch.load(here / 'images.pt')\n"
        "folders = [path for path in here.iterdir() if path.is_dir()]\n"
        "models = {path.name: timm.create_model(f'local-dir:{path}', pretrained=True) for path in folders}\n"
        "with torch.no_grad(): torch.save({n: m.eval()(x) for n, m in models.items()}, here / 'logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=Path(mdc.__file__).parents[1])
    found = torch.load(tmp_path / "logits.pt")
    assert found.keys() == logits.keys()
    assert [name for name in logits if not torch.equal(found[name], logits[name])] == []


@pytest.mark.parametrize("name", ["vit", "distilled", "dinov3"])
def test_another_head_is_new_and_all_else_as_saved(name: str, tmp_path: Path) -> None:
    model = pruned(EVERY_WAY[name]())
    mdc.save(model, tmp_path / "m")
    saved, other = model.state_dict(), created(tmp_path / "m", pretrained=True, num_classes=3).state_dict()
    assert saved.keys() == other.keys()
    heads = {key for key in saved if key.startswith("head")}
    assert all(torch.equal(saved[key], other[key]) for key in saved.keys() - heads)
    assert {len(other[key]) for key in heads} == {3}
    assert created(tmp_path / "m", pretrained=True, num_classes=0)(images(2)).shape == (2, BASE["embed_dim"])


def test_without_pretrained_weights_are_fresh_and_of_the_slim_shape(slim: nn.Module, folder: Path) -> None:
    torch.manual_seed(0)
    first, second = (created(folder) for _ in range(2))
    assert mdc.macs(first) == mdc.macs(slim)
    for name, saved in slim.state_dict().items():
        assert first.state_dict()[name].shape == saved.shape
        assert not torch.equal(first.state_dict()[name], saved)
    # As timm begins a ViT, not as torch begins a Linear.
    weights = first.state_dict()["blocks.0.mlp.fc1.weight"]
    torch.testing.assert_close(weights.std(), torch.tensor(0.02), rtol=0.1, atol=0)
    assert not torch.equal(weights, second.state_dict()["blocks.0.mlp.fc1.weight"])


def test_arguments_may_be_others_than_the_saved_ones(folder: Path) -> None:
    model = created(folder, pretrained=True, img_size=64, in_chans=1, drop_path_rate=0.2, global_pool="avg")
    assert model(torch.zeros(2, 1, 64, 64)).shape == (2, CLASSES)
    assert (model.global_pool, model.blocks[-1].drop_path1.drop_prob) == ("avg", pytest.approx(0.2))
    assert created(folder, pretrained=True, dtype=torch.float64).head.weight.dtype == torch.float64
    with pytest.raises(ArtifactError, match=r"window_size=7: this timm_vit is saved without such an argument; it has"):
        created(folder, window_size=7)


@torch.no_grad()
def test_features_are_the_slim_models(slim: nn.Module, folder: Path) -> None:
    features = created(folder, pretrained=True, features_only=True, out_indices=[0, 1])(images(2))
    expected = slim.forward_intermediates(images(2), intermediates_only=True)
    assert [tuple(found.shape) for found in features] == [(2, 48, 4, 4)] * 2
    assert all(map(torch.equal, features, expected))


def test_the_name_alone_makes_nothing() -> None:
    with pytest.raises(ArtifactError, match=r"mdc_model builds .* timm\.create_model\('local-dir:FOLDER'"):
        timm.create_model(ENTRYPOINT)


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("name", OF_RECIPES)
def test_a_hostile_recipe_is_refused_as_by_load(name: str, pretrained: bool, folder: Path, tmp_path: Path) -> None:
    damage, message = OF_RECIPES[name]
    shutil.copytree(folder, tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(ArtifactError, match=message):
        created(tmp_path / "m", pretrained=pretrained)


# --- what the folder says ---------------------------------------------------------------------------------------------


def test_the_config_is_of_timms_layout_with_ours_beside(slim: nn.Module, folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    timms = {
        "architecture",
        "num_classes",
        "num_features",
        "global_pool",
        "label_names",
        "model_args",
        "pretrained_cfg",
    }
    assert set(config) == timms | {"format", "cost", "versions", "sha256"}
    assert (config["architecture"], config["num_classes"], config["num_features"]) == (ENTRYPOINT, CLASSES, 48)
    assert config["label_names"] == list("abcdefg")
    assert set(config["model_args"]) == {"family", "constructor", "plan"}
    assert mdc.Plan.from_json(json.dumps(config["model_args"]["plan"])) == slim.mdc_plan
    cfg = config["pretrained_cfg"]
    assert (cfg["mean"], cfg["input_size"], cfg["classifier"]) == (list(MEAN), [3, 32, 32], "head")
    assert created(folder).pretrained_cfg["label_names"] == list("abcdefg")


def test_a_model_that_is_not_timms_keeps_our_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mdc.models.FAMILIES", list(FAMILIES))
    mdc.models.register(ToyFamily())
    mdc.save(Toy(), tmp_path / "m")
    config = json.loads((tmp_path / "m" / CONFIG).read_text())
    ours = {"format", "family", "constructor", "plan", "pretrained_cfg", "cost", "versions", "sha256"}
    assert set(config) == ours


def test_a_folder_without_constructor_is_none_for_timm(slim: nn.Module, tmp_path: Path) -> None:
    mdc.save(slim, tmp_path / "m", constructor=False)
    assert "architecture" not in json.loads((tmp_path / "m" / CONFIG).read_text())
    with pytest.raises(KeyError, match="architecture"):
        created(tmp_path / "m")


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands in for the repositories of the hub."""
    root = tmp_path / "hub"

    class Api:
        def __init__(self, **_: Any) -> None: ...

        def create_repo(self, repo_id: str, **_: Any) -> SimpleNamespace:
            (root / repo_id).mkdir(parents=True)
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, repo_id: str, filename: str, **_: Any) -> bool:
            return (root / repo_id / filename).is_file()

        def upload_folder(self, repo_id: str, folder_path: str, **_: Any) -> None:
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)

    def download(repo_id: str, filename: str, **_: Any) -> str:
        return str(root / repo_id / filename)

    monkeypatch.setattr("timm.models._hub.HfApi", Api)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    return root


@pytest.mark.parametrize("got", ["slim", "loaded", "created"])
@torch.no_grad()
def test_what_is_pushed_is_created_again(got: str, slim: nn.Module, folder: Path, hub: Path) -> None:
    model = {"slim": slim, "loaded": mdc.load(folder), "created": created(folder, pretrained=True)}[got]
    timm.models.push_to_hf_hub(model, "me/slim")
    assert json.loads((hub / "me" / "slim" / CONFIG).read_text())["architecture"] == ENTRYPOINT
    for name in ("hf-hub:me/slim", hub / "me" / "slim"):
        again = created(name, pretrained=True)
        assert torch.equal(again(images()), slim(images()))
        assert tuple(again.pretrained_cfg["mean"]) == MEAN
        assert again.mdc_plan == slim.mdc_plan
    remade(lambda recipe: recipe["constructor"].update(attn="os.system"))(hub / "me" / "slim")
    with pytest.raises(ArtifactError, match=r"me/slim.*is not one of"):
        created("hf-hub:me/slim")


@torch.no_grad()
def test_a_new_head_is_pushed_with_it(slim: nn.Module, folder: Path, hub: Path) -> None:
    model = mdc.load(folder)
    model.reset_classifier(3)
    timm.models.push_to_hf_hub(model, "me/other")
    assert torch.equal(created("hf-hub:me/other", pretrained=True)(images()), model(images()))


def test_what_no_constructor_makes_is_pushed_as_such(hub: Path) -> None:
    model = of_timm()
    for block in model.blocks:
        block.mlp.act = nn.Softplus()
    plan = mdc.make_plan(model, mdc.score(model, criterion="random"), mdc.Policy(heads=0.5))
    timm.models.push_to_hf_hub(mdc.slim(model, plan), "me/odd")
    with pytest.raises(ArtifactError, match="saved with a constructor, and here is none"):
        created("hf-hub:me/odd", pretrained=True)


# --- what others do with it -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_steps_of_timms_validate(slim: nn.Module, folder: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        (tmp_path / "images" / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "images" / f"class{number % 2}" / f"{number}.png")
    model = created(folder, pretrained=True, num_classes=None, in_chans=3, global_pool=None, scriptable=False)
    config = resolve_data_config({"model": "local-dir", "img_size": None, "input_size": None}, model=model)
    loader = create_loader(
        create_dataset("", root=str(tmp_path / "images")),
        **{key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")},
        batch_size=4,
        use_prefetcher=False,
        num_workers=0,
    )
    ((batch, labels),) = loader
    by_class = torch.from_numpy(pixels[[0, 2, 1, 3]]).permute(0, 3, 1, 2) / 255
    expected = slim((by_class - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
    assert labels.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(model(batch), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", everyday(*EVERY_WAY))
@torch.no_grad()
def test_transformers_timm_wrapper(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, x = pruned(EVERY_WAY[name]()), images()
    mdc.save(model, tmp_path / "m", class_names=list("abcdefg"))
    wrapper = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "m").eval()
    assert isinstance(wrapper, transformers.TimmWrapperForImageClassification)
    assert torch.equal(wrapper(pixel_values=x).logits, model(x))
    assert wrapper.config.id2label == dict(enumerate("abcdefg"))
    features = transformers.TimmWrapperModel.from_pretrained(tmp_path / "m").eval()
    assert torch.equal(features(pixel_values=x).last_hidden_state, model.forward_features(x))
    wrapper.save_pretrained(tmp_path / "again")
    assert torch.equal(created(tmp_path / "again", pretrained=True)(x), model(x))
