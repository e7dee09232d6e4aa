"""Every config composes, names only what can be built, and explains each of its keys."""

import itertools
import re
from inspect import signature
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from PIL import Image

import lightning_mdc as mdc
from lightning_mdc.__main__ import _parser
from lightning_mdc.app import build, recipes
from lightning_mdc.app.fingerprints import relevant
from lightning_mdc.app.settings import plain
from lightning_mdc.app.step_table import STEPS
from lightning_mdc.app.trainer import check_training
from lightning_mdc.distillation.optimization import DEFAULT_OPTIMIZER, DEFAULT_SCHEDULE
from lightning_mdc.errors import CalibrationError, ConfigError, error_chain
from lightning_mdc.importance import Criterion, as_criterion
from tests import composing
from tests.kinds import make

CONF = Path(__file__).parent.parent / "conf"
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml") if path.parent.name != "experiment"
)
EXPERIMENTS = sorted(path.stem for path in CONF.glob("experiment/*.yaml"))


def settings(*overrides: str) -> dict:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plain(compose("train", ["name=test", *overrides]))


@pytest.mark.parametrize("override", [*OPTIONS, *(f"experiment={name}" for name in EXPERIMENTS)])
def test_composes_and_every_step_finds_its_settings(override):
    composed = settings(override)
    for name in STEPS:
        relevant(composed, name)
    assert isinstance(build.build_criterion(composed), Criterion)
    check_training({**composed, "sharing": {**composed["sharing"], "epochs": 1}}, make("vit"))


@pytest.mark.parametrize(
    "overrides",
    [(), ("importance=hsic", "budget=0.5", "+data.shuffle=true", "~logger"), ("budgett=0.5",), ("importance=hsik",)],
)
def test_what_the_tests_compose_is_what_hydra_does(overrides):
    """They have it read and merge each choice of files once, see `tests.composing`."""

    def found() -> str:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            try:
                return OmegaConf.to_yaml(compose("train", list(overrides), return_hydra_config=True))
            except HydraException as error:
                return str(error)

    found()
    remembered = found()
    composing.forget()
    try:
        assert found() == remembered
    finally:
        composing.remember()


def test_the_groups_are_those_of_the_package():
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert groups == {
        *("data", "distillation", "experiment", "hydra", "importance", "logger", "model", "recipes", "surgery"),
        "trainer",
    }


def test_every_criterion_has_its_config():
    from lightning_mdc.importance import criteria

    built = {build.build_criterion(settings(f"importance={path.stem}")).name for path in CONF.glob("importance/*")}
    assert built == set(criteria.CRITERIA)


def test_units_are_ranked_by_the_same_criterion_everywhere():
    by_name = [signature(of).parameters["criterion"].default for of in (mdc.compress, mdc.MultiDimPruneCallback)]
    by_name.append(_parser().parse_args(["compress", "--model", "x", "--data", "x", "--out", "x"]).criterion)
    told = {str(as_criterion(name)) for name in by_name} | {str(build.build_criterion(settings()))}
    assert len(told) == 1


def test_a_data_group_brings_its_model_unless_one_is_chosen():
    assert settings()["model"]["name"] is None
    assert settings("data=image_folder")["model"]["name"] == "deit_tiny_patch16_224"
    assert settings("data=image_folder", "model=vit_digits")["model"]["name"] is None
    by_name = settings("data=image_folder", "data.root=x", "model.name=deit_small_patch16_224")["model"]
    assert by_name["name"] == "deit_small_patch16_224"
    assert by_name["pretrained"] is False


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("search.n_trials=many", "search.n_trials='many': expected a whole number of at least 1"),
        ("search.n_trials=1.5", "search.n_trials=1.5: expected a whole number of at least 1"),
        ("search.n_trials=true", "search.n_trials=True: expected a whole number of at least 1"),
        ("search.images=null", "search.images=None: expected a whole number of at least 1"),
        ("search.images=${runs}", "search.images='runs': expected a whole number of at least 1"),
        ("threads=all", "threads='all': expected a whole number of at least 1, or null for one per core"),
        ("distillation.kd_weight=high", "distillation.kd_weight='high': expected float"),
        ("distillation.seeds=[0,x]", "distillation.seeds=[0, 'x']: expected a list of different whole numbers"),
        ("surgery.restore=maybe", "surgery.restore='maybe': expected bool"),
        ("surgery.stages=3", "surgery.stages=3: expected list[int] | null"),
        ("dense.optimizer=adamw", "dense.optimizer='adamw': expected dict[str, Any]"),
        ("dense.grad_checkpointing=later", "dense.grad_checkpointing='later': expected bool"),
        ("latency=fast", "latency='fast': expected a mapping {KEY: VALUE}"),
        ("+search.n_trails=3", "there is no setting 'search.n_trails'; there are search.n_trials, search.n_initial"),
        ("+bugdet=0.5", "there is no setting 'bugdet'; there are name, runs, stage"),
        ("dense.recipe=finetuned", "dense.recipe='finetuned': expected 'auto' or 'scratch' or 'finetune'"),
        ("recipes.finetune.dense.optimizer=adamw", "recipes.finetune.dense.optimizer='adamw': expected a mapping"),
        (
            "+recipes.finetune.dence={}",
            "there are recipes.finetune.dense, recipes.finetune.sharing, recipes.finetune.dis",
        ),
        ("seed=${seeds}", "seed cannot be worked out: Interpolation key 'seeds' not found"),
    ],
)
def test_a_wrong_type_or_key_is_refused_in_one_line(override, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        settings(override)
    assert "\n" not in str(error.value)


def test_words_for_switches_are_switches():
    """`no` is a word to Hydra, and a word is true to Python."""
    assert settings("dense.grad_checkpointing=no")["dense"]["grad_checkpointing"] is False
    assert settings("surgery.restore=off")["surgery"]["restore"] is False


def test_what_a_group_makes_is_built_by_hydra_or_refused_in_words():
    composed = settings("data.batch_size=7", "+data.shuffle=false")
    with pytest.raises(ConfigError, match=r"data=\{'batch_size': 7.* refused by .*'shuffle'; correct that key"):
        build.build_data(composed)
    composed = settings("data=image_folder", "data.root=x", "model.name=deit_tiny_patch16_224", "+data.shuffle=false")
    with pytest.raises(ConfigError, match="'shuffle'; correct that key") as error:
        build.build_data(composed)
    assert "'url'" not in str(error.value)  # of the model's preprocessing, which nobody has typed
    for target in ("lightning_mdc.app.data.Nothing", "nowhere.at.all"):
        with pytest.raises(ConfigError, match=f"importance._target_='{target}' names nothing that can be imported"):
            build.build_criterion(settings(f"importance._target_={target}"))
    with pytest.raises(ConfigError, match="is no Criterion"):
        build.build_criterion({"importance": {"_target_": "collections.Counter"}})
    with pytest.raises(CalibrationError, match="hsic_weight=-1") as error:  # its own words, and once
        build.build_criterion(settings("importance=hsic", "importance.hsic_weight=-1"))
    assert list(error_chain(error.value)) == [error.value]


@pytest.mark.parametrize("path", sorted(CONF.glob("**/*.yaml")), ids=lambda path: path.stem)
def test_every_key_has_a_comment(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ") or path.parent.name == "conf"
    body = lines[: lines.index("hydra:")] if "hydra:" in lines else lines
    leaf = re.compile(r"^\s*[A-Za-z_][A-Za-z_0-9]*: \S")  # a key with a value; one without opens a group
    uncommented = [
        line
        for before, line in itertools.pairwise(body)
        if leaf.match(line)
        and not before.lstrip().startswith("#")
        and not leaf.match(before)  # one comment for several keys of a kind
        and "_target_" not in line
    ]
    assert not uncommented


def test_defaults_of_the_conf_are_those_of_the_classes():
    """Else the same word would mean two things, on the command line and in Python."""
    from lightning_mdc import HSIC
    from lightning_mdc.app.data import DigitsDataModule

    criterion = build.build_criterion(settings("importance=hsic"))
    assert vars(criterion) == vars(HSIC())
    finetune = settings()["recipes"]["finetune"]
    assert finetune["dense"] == finetune["sharing"] == finetune["distillation"]
    assert finetune["distillation"]["optimizer"] == DEFAULT_OPTIMIZER
    warmup = {"warmup_epochs": 1}  # of which both take at most a fifth of the run
    assert finetune["distillation"]["schedule"] == {**DEFAULT_SCHEDULE, **warmup}
    ours, theirs = build.build_data(settings()), DigitsDataModule()
    for name in ("img_size", "in_chans", "batch_size", "val_fraction", "test_fraction", "split_seed"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_weights_that_were_given_are_finetuned_and_others_trained_from_scratch():
    finetune = {"opt": "adamw", "lr": 5e-5, "weight_decay": 0.05, "layer_decay": 0.75}
    muon = {"opt": "muon", "weight_decay": 0.05, "layer_decay": None}
    drawn = settings("experiment=cifar10", "data.root=x")
    assert drawn["dense"]["optimizer"] == {**muon, "lr": 1e-2}
    assert drawn["distillation"]["optimizer"] == {**muon, "lr": 4e-3}
    assert settings()["distillation"]["optimizer"] == {**muon, "lr": 1e-3}
    for given in ("model.checkpoint=x", "model.pretrained=true"):
        composed = settings("experiment=cifar10", "data.root=x", given)
        assert composed["dense"]["optimizer"] == composed["distillation"]["optimizer"] == finetune
        assert recipes.described(composed, "dense") == (
            f"recipe finetune, as {given.partition('=')[0]} gives the weights: adamw, lr 5e-05, layer_decay 0.75"
        )


def test_a_recipe_can_be_chosen_changed_and_added():
    chosen = settings("dense.recipe=finetune", "dense.optimizer.lr=1e-3", "+dense.optimizer.betas=[0.9,0.95]")
    changed = {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "layer_decay": 0.75, "betas": [0.9, 0.95]}
    assert chosen["dense"]["optimizer"] == changed
    assert chosen["distillation"]["optimizer"]["opt"] == "muon"
    assert "recipe finetune, as dense.recipe says" in recipes.described(chosen, "dense")
    rates = "{optimizer:{opt:sgd,lr:0.1},schedule:{sched:none}}"
    own = settings(f"+recipes.own={{dense:{rates},sharing:{rates},distillation:{rates}}}", "distillation.recipe=own")
    assert {k: v for k, v in own["distillation"]["optimizer"].items() if v is not None} == {"opt": "sgd", "lr": 0.1}
    assert own["distillation"]["schedule"]["sched"] == "none"


def test_deit_is_finetuned_as_deit_whatever_the_recipes_say():
    composed = settings(
        "experiment=deit_small_imagenet_40", "data.root=x", "recipes.finetune.distillation.optimizer={}"
    )
    expected = {"opt": "adamw", "lr": 1e-4, "weight_decay": 0.05, "layer_decay": 1.0}
    assert composed["distillation"]["optimizer"] == expected
    schedule = {"sched": "cosine", "warmup_epochs": 1, "warmup_lr": 1e-5, "min_lr": 1e-5}
    assert composed["distillation"]["schedule"] == schedule


def test_size_given_to_the_model_goes_to_the_data(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(6):
            pixels = torch.randint(0, 255, (40, 40, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / name / f"{number}.png")
    composed = settings(
        "data=image_folder",
        f"data.root={tmp_path}",
        "model.name=vit_tiny_patch16_224",
        "model.args={img_size:32,patch_size:8,embed_dim:24,depth:2,num_heads:2}",
        "data.num_workers=0",
    )
    data = build.build_data(composed)
    assert data.img_size == 32
    model = build.build_model(composed, data)
    assert model.patch_embed.img_size == (32, 32)
    assert model.num_classes == 2
    assert model(next(iter(data.test_dataloader()))[0]).shape[1] == 2
    assert OmegaConf.create(composed)  # plain values only
