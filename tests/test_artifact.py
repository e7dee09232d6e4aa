"""Saved models: round trips, what cannot be expressed, damage and malice, kills."""

import json
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from timm.models.vitamin import GeGluMlp, MbConvStages, VitCfg
from torch import nn

import lightning_mdc as mdc
from lightning_mdc.artifact import CONFIG, WEIGHTS, check_savable
from lightning_mdc.errors import ArtifactError
from lightning_mdc.models import find_anatomy
from tests.kinds import BASE, DIM, EVA_KINDS, KINDS, POST_NORM, TORCHVISION_KINDS, daily, images, make, randomised


def slimmed(model: nn.Module, **options: Any) -> nn.Module:
    dimensions = options.pop("dimensions", None)
    policy, scores = mdc.uniform_policy(model, 0.6, dimensions), mdc.score(model, [images(8)], progress=False)
    return mdc.slim(model, mdc.make_plan(model, scores, policy, mdc.TokenOptions(**options)))


@pytest.mark.parametrize("kind", daily(KINDS))
@torch.no_grad()
def test_dense_and_slim_models_come_back_bit_by_bit(kind: str, tmp_path: Path) -> None:
    dense, x = make(kind), images()
    for name, model in (("dense", dense), ("slim", slimmed(dense, score="attention*dependence"))):
        mdc.save(model, tmp_path / name)
        loaded = mdc.load(tmp_path / name)
        assert torch.equal(loaded(x), model(x))
        assert mdc.macs(loaded) == mdc.macs(model)
        assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "slim"]  # no half-written folders beside them


@torch.no_grad()
def test_post_norm_and_odd_settings_come_back(tmp_path: Path) -> None:
    odd = VisionTransformer(
        **BASE, drop_path_rate=0.2, proj_drop_rate=0.1, drop_rate=0.3, act_layer="quick_gelu", fc_norm=True
    )
    for model in (slimmed(randomised(POST_NORM()), dimensions=("heads", "neurons")), slimmed(randomised(odd))):
        mdc.save(model, tmp_path / "m")
        loaded = mdc.load(tmp_path / "m")
        assert torch.equal(loaded(images()), model(images()))
        assert repr(loaded) == repr(model)


@torch.no_grad()
def test_a_timm_model_keeps_what_it_knows_of_its_images(tmp_path: Path) -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=3, embed_dim=48, num_classes=5).eval()
    model.pretrained_cfg = dict(model.pretrained_cfg, mean=(0.1, 0.2, 0.3))
    mdc.save(slimmed_at_224(model), tmp_path / "m", class_names=list("abcde"))
    loaded = mdc.load(tmp_path / "m")
    settings = timm.data.resolve_model_data_config(loaded)
    assert settings["mean"] == (0.1, 0.2, 0.3)
    assert settings["crop_pct"] == model.pretrained_cfg["crop_pct"]
    assert loaded.pretrained_cfg["label_names"] == list("abcde")
    config = json.loads((tmp_path / "m" / CONFIG).read_text())
    assert config["cost"]["dense_macs"] == mdc.macs(model)
    assert config["cost"]["macs"] == mdc.macs(loaded)


def hybrid(backbone: nn.Module, **kwargs: Any) -> nn.Module:
    stem = partial(HybridEmbed, backbone=backbone, proj=False)
    return VisionTransformer(**(BASE | {"patch_size": 1, "embed_layer": stem} | kwargs))


TINY = BASE | {"depth": 2, "patch_size": 2}
CONSTRUCTORS: dict[str, Callable[[], nn.Module]] = {
    "plain": KINDS["vit"],
    "distilled": KINDS["deit_distilled"],
    "resnet": lambda: timm.create_model("vit_tiny_r_s16_p8_224", **TINY),
    "mobileclip": lambda: hybrid(  # has batch norms
        ConvStem(channels=(12, 24, DIM), stride=(4, 2, 2), kernel_size=(4, 2, 2), padding=0, act_layer=nn.GELU)
    ),
    "vitamin": lambda: hybrid(
        MbConvStages(VitCfg(embed_dim=(16, 32, DIM), depths=(2, 1, 1), stem_width=8)),
        **{"mlp_layer": GeGluMlp, "class_token": False, "global_pool": "avg"},
    ),
    "differential": lambda: VisionTransformer(**BASE, attn_layer="diff", reg_tokens=1),
    "t2t": lambda: timm.create_model("t2t_vit_7", **TINY | {"patch_size": 16}),
    **{f"torchvision_{kind}": constructor for kind, constructor in TORCHVISION_KINDS.items()},
}


@pytest.mark.slow
@torch.no_grad()
def test_each_kind_of_constructor_is_loaded_by_a_fresh_process(tmp_path: Path) -> None:
    outputs, x = {}, images()
    for kind, constructor in CONSTRUCTORS.items():
        model = randomised(constructor()).train()
        model(x)  # a batch norm's statistics, too, are no longer the initial ones
        dimensions = find_anatomy(model.eval()).dimensions
        scores = mdc.score(model, criterion="random", dimensions=dimensions)
        plan = mdc.make_plan(model, scores, mdc.Policy(**dict.fromkeys(dimensions, 0.5)))
        for name, saved in ((kind, model), (f"{kind} slim", mdc.slim(model, plan))):
            mdc.save(saved, tmp_path / name)
            outputs[name] = saved(x)
    torch.save(x, tmp_path / "images.pt")
    program = (
        "import sys, pathlib, torch, lightning_mdc as mdc\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "x = torch.load(here / 'images.pt')\n"
        "models = {p.name: mdc.load(p) for p in here.iterdir() if p.is_dir()}\n"
        "with torch.no_grad(): torch.save({name: model(x) for name, model in models.items()}, here / 'outputs.pt')\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=Path(mdc.__file__).parents[1])
    loaded = torch.load(tmp_path / "outputs.pt")
    assert loaded.keys() == outputs.keys()
    # Where weights lie in memory decides how some CPUs round.
    assert [name for name, output in outputs.items() if not torch.allclose(loaded[name], output, 1e-5, 1e-6)] == []


def slimmed_at_224(model: nn.Module) -> nn.Module:
    return mdc.slim(model, mdc.make_plan(model, mdc.score(model, criterion="random"), mdc.uniform_policy(model, 0.6)))


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        mdc.save(make().train(), tmp_path / "m")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / "m" / name).stat().st_mode) for name in (WEIGHTS, CONFIG)] == [0o644, 0o644]
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o755
    assert not mdc.load(tmp_path / "m").training  # whatever it was saved in: it is loaded to be used


def test_what_a_constructor_cannot_say_is_named_before_anything_is_written(tmp_path: Path) -> None:
    model = make()
    model.head = nn.Sequential(nn.Linear(48, 20), nn.GELU(), nn.Linear(20, 7))
    slim = slimmed(model)
    with pytest.raises(ArtifactError, match=r"head is .*Sequential.*load\(directory, model=my_dense_model\)"):
        mdc.save(slim, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    mdc.save(slim, tmp_path / "m", constructor=False)
    with pytest.raises(ArtifactError, match="saved without a constructor"):
        mdc.load(tmp_path / "m")
    with torch.no_grad():
        loaded = mdc.load(tmp_path / "m", model=model)
        assert torch.equal(loaded(images()), slim(images()))
    with pytest.raises(ArtifactError, match=r"4 blocks of 192 neurons.* has 4 blocks of 96 neurons: give a dense"):
        mdc.load(tmp_path / "m", model=randomised(KINDS["glu"]()))


@pytest.mark.parametrize("dimension", ["heads", "neurons", "tokens"])
def test_a_masked_model_is_refused(dimension: str, tmp_path: Path) -> None:
    """It would be saved as the dense one, which is neither what it costs nor what it computes."""
    model = make()
    plan = mdc.make_plan(model, mdc.score(model, [images(8)], progress=False), mdc.Policy(**{dimension: 0.5}))
    with mdc.masked(model, plan):
        for masked in (model, nn.ModuleDict({"backbone": model})):
            for refuses in (mdc.save, check_savable):
                with pytest.raises(ArtifactError, match=r"has masks on.*save mdc\.slim\(model, plan\)"):
                    refuses(masked, tmp_path / "m")
        assert list(tmp_path.iterdir()) == []
        mdc.save(mdc.slim(model, plan), tmp_path / "slim")
    mdc.save(model, tmp_path / "dense")
    assert mdc.macs(mdc.load(tmp_path / "slim")) < mdc.macs(mdc.load(tmp_path / "dense"))


# --- damage and malice ------------------------------------------------------------------------------------------------

Damage = Callable[[Path], object]


def edited(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        (folder / CONFIG).write_text(json.dumps(config))

    return damage


def remade(change: Callable[[dict[str, Any]], object]) -> Damage:
    return edited(lambda config: change(config["model_args"]))


def stem(name: str = "ResNetD", **sizes: list[Any]) -> dict[str, Any]:
    return {"class": name, "proj": True, "sizes": sizes}


def huge_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + b"{}")


def flipped_weight(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (folder / WEIGHTS).write_bytes(data)


# Of what the model is made of: mdc.load and timm's create_model have to refuse them.
OF_RECIPES: dict[str, tuple[Damage, str]] = {
    "unknown family": (remade(lambda r: r.update(family="os.system")), "family 'os.system' is unknown"),
    "class of one's own": (remade(lambda r: r["constructor"].update({"class": "subprocess.Popen"})), "is not one of"),
    "norm of one's own": (remade(lambda r: r["constructor"]["norm"].update({"class": "os.system"})), "is not one of"),
    "act of one's own": (remade(lambda r: r["constructor"]["act"].update({"class": "eval"})), "is not one of"),
    "attention of one's own": (remade(lambda r: r["constructor"].update(attn="os.system")), "is not one of"),
    "stem of one's own": (remade(lambda r: r["constructor"].update(stem=stem("os.system"))), "stem=.*expected"),
    "enormous stem": (remade(lambda r: r["constructor"].update(stem=stem(layers=[60000]))), "60000 layers do not fit"),
    "unknown size": (remade(lambda r: r["constructor"].update(stem=stem(pretrained=[1]))), "give no model"),
    "size of wrong type": (remade(lambda r: r["constructor"].update(stem=stem(layers=["2"]))), "lists of positive"),
    "unknown argument": (remade(lambda r: r["constructor"]["args"].update(weight_init="jax")), "fields"),
    "argument of wrong type": (remade(lambda r: r["constructor"]["args"].update(embed_dim="48")), "wrong type"),
    "enormous width": (remade(lambda r: r["constructor"]["args"].update(embed_dim=10**9)), "out of range"),
    "larger width": (remade(lambda r: r["constructor"]["args"].update(embed_dim=4800)), "loaded|shape|give no model"),
    "enormous depth": (remade(lambda r: r["constructor"]["args"].update(depth=60000)), "depth=60000"),
    "enormous image": (remade(lambda r: r["constructor"]["args"].update(img_size=[65536, 65536])), "pos_embed"),
    "damaged plan": (remade(lambda r: r["plan"]["heads"].pop()), "plan.heads covers"),
    "another plan": (remade(lambda r: r["plan"]["heads"][0].pop()), "has shape"),
    "rate out of range": (remade(lambda r: r["constructor"]["args"].update(drop_path_rate=5)), "no rate in"),
    "eps of nothing": (remade(lambda r: r["constructor"]["norm"].update(eps=float("nan"))), "eps=nan"),
    "odd activation": (remade(lambda r: r["constructor"]["act"].update(approximate="foo")), "approximate"),
    "enormous ratio": (remade(lambda r: r["plan"]["tokens"][0].update(keep=10**400)), "keep=1000"),
}
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "has no config.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no model.safetensors"),
    "truncated weights": (lambda f: os.truncate(f / WEIGHTS, 2000), "damaged"),
    "truncated config": (lambda f: os.truncate(f / CONFIG, 300), "cannot be parsed"),
    "empty weights": (lambda f: os.truncate(f / WEIGHTS, 0), "damaged"),
    "huge header": (huge_header, "damaged"),
    "a pickle": (lambda f: torch.save({}, f / WEIGHTS), "damaged"),
    "one bit of a weight": (flipped_weight, "changed after it was saved"),
    "foreign config": (lambda f: (f / CONFIG).write_text('{"architectures": ["ViT"]}'), "no model of ours"),
    "config is a list": (lambda f: (f / CONFIG).write_text("[]"), "no model of ours"),
    "deeply nested": (lambda f: (f / CONFIG).write_text("[" * 100_000), "cannot be parsed"),
    "newer format": (edited(lambda c: c.update(format="lightning_mdc.model.9")), "newer version"),
    "other mean": (edited(lambda c: c.update(pretrained_cfg={"mean": [0, 0, 0]})), "changed after it was saved"),
    "integer weights": (lambda f: save_file({"a": torch.ones(2, dtype=torch.int64)}, f / WEIGHTS), "I64 tensors"),
    "cost of text": (edited(lambda c: c.update(cost="cheap")), "cost has the wrong type"),
    "missing field": (edited(lambda c: c.pop("cost")), "cost"),
    **OF_RECIPES,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "m"
    mdc.save(slimmed(make()), folder)
    return folder


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_hostile_folder_gives_one_clear_error(name: str, good: Path, tmp_path: Path) -> None:
    import shutil

    damage, message = DAMAGES[name]
    folder = tmp_path / "m"
    shutil.copytree(good, folder)
    damage(folder)
    with pytest.raises(ArtifactError, match=message):
        mdc.load(folder)


def test_there_has_to_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is no folder"):
        mdc.load(tmp_path / "nothing")


def test_other_peoples_folders_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    with pytest.raises(ArtifactError, match="holds something else"):
        mdc.save(make(), tmp_path / "thesis")
    with pytest.raises(ArtifactError, match="is a file"):
        mdc.save(make(), tmp_path / "thesis" / "chapter1.tex")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / CONFIG).write_text('{"architectures": ["ViT"]}')
    (tmp_path / "other" / WEIGHTS).write_text("...")
    with pytest.raises(ArtifactError, match="holds something else"):
        mdc.save(make(), tmp_path / "other")
    mdc.save(make(), tmp_path / "ours")
    (tmp_path / "ours" / "report.md").write_text("...")
    with pytest.raises(ArtifactError, match=r"holds something else.*report\.md"):
        mdc.save(make(), tmp_path / "ours")


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        mdc.save(make(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert mdc.macs(mdc.load(tmp_path / "link")) == mdc.macs(make())


def test_a_full_disk_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(seed=1)
    mdc.save(first, tmp_path / "m")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_mdc.artifact.save_file", full)
    with pytest.raises(ArtifactError, match=r"No space left.*what was there is kept"):
        mdc.save(make(seed=2), tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    with torch.no_grad():
        assert torch.equal(mdc.load(tmp_path / "m")(images()), first(images()))


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_whole_model(tmp_path: Path) -> None:
    program = (
        "import lightning_mdc as mdc\n"
        "from tests.kinds import make\n"
        "models = [make(seed=s) for s in (1, 2)]\n"
        "print('ready', flush=True)\n"
        f"while True:\n    for model in models: mdc.save(model, {str(tmp_path / 'm')!r})\n"
    )
    x = images()
    with torch.no_grad():
        outputs = [make(seed=s)(x) for s in (1, 2)]
    mdc.save(make(seed=1), tmp_path / "m")
    for delay in (0.05, 0.11, 0.23):
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=Path(mdc.__file__).parents[1]
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with torch.no_grad():
            assert any(torch.equal(mdc.load(tmp_path / "m")(x), output) for output in outputs)


def test_a_kill_between_the_two_renames_is_healed(tmp_path: Path) -> None:
    model = make()
    mdc.save(model, tmp_path / "m")
    (tmp_path / "m").rename(tmp_path / ".m.previous")
    with torch.no_grad():
        assert torch.equal(mdc.load(tmp_path / "m")(images()), model(images()))


def test_a_model_of_ones_own_in_another_precision_takes_tables_as_they_were(tmp_path: Path) -> None:
    """What no file holds, such as rotary positions, is not rounded with the rest."""
    dense = randomised(EVA_KINDS["rope"]())
    slim = slimmed(dense)
    mdc.save(slim, tmp_path / "m")
    own = EVA_KINDS["rope"]().bfloat16()
    loaded = mdc.load(tmp_path / "m", model=own)
    with torch.no_grad():
        assert torch.equal(loaded(images()), slim(images()))
    assert own.rope.pos_embed.dtype == torch.bfloat16


def test_whoever_loads_meanwhile_does_not_stop_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its two renames there is no folder; a reader puts the old one back."""
    first, second = make(), make(seed=1)
    mdc.save(first, tmp_path / "m")
    rename, seen = Path.rename, []

    def renamed(path: Path, target: Path) -> Path:
        moved = rename(path, target)
        if target.name == ".m.previous" and not seen:
            seen.append(mdc.load(tmp_path / "m"))
        return moved

    monkeypatch.setattr(Path, "rename", renamed)
    mdc.save(second, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(seen[0](images()), first(images()))
        assert torch.equal(mdc.load(tmp_path / "m")(images()), second(images()))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
