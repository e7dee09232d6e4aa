"""Finding the vision transformer, and saying clearly what cannot be pruned."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention
from timm.layers.attention import Attention as TimmAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

import lightning_mdc as mdc
from lightning_mdc.budget import measure_latency_table
from lightning_mdc.errors import MdcError, UnsupportedModelError
from lightning_mdc.models import find_anatomy, find_model
from lightning_mdc.models.swapping import unmask
from lightning_mdc.policy_search.sensitivity import measure_sensitivity
from tests.kinds import BASE, KINDS, POST_NORM, counted_macs, daily, images, make, randomised


@pytest.mark.parametrize("kind", daily(KINDS))
def test_every_kind_can_lose_all_three_dimensions(kind: str) -> None:
    anatomy = find_anatomy(make(kind))
    assert anatomy.dimensions == ("heads", "neurons", "tokens")
    assert anatomy.num_heads == (4,) * 4
    assert len(set(anatomy.num_neurons)) == 1
    assert anatomy.grid == (4, 4)


def test_prefix_tokens_and_class_rows() -> None:
    found = {
        kind: find_anatomy(make(kind)) for kind in ("vit", "deit_distilled", "registers", "registers_without_class")
    }
    assert {kind: (s.num_prefix_tokens, s.class_rows) for kind, s in found.items()} == {
        "vit": (1, (0,)),
        "deit_distilled": (2, (0, 1)),
        "registers": (5, (0,)),
        "registers_without_class": (2, ()),
    }


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("vit_dpwee_patch16_reg1_gap_256", "blocks.0.out_proj"),  # one layer reads heads and neurons
        ("resnet18", "ResNet"),
    ],
)
def test_unsupported_models_are_named(name: str, module: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedModelError) as error:
        mdc.uniform_policy(model, 0.6)
    message = str(error.value)
    assert module in message
    assert "Dimensions that do work: none" in message
    assert "timm VisionTransformer" in message.partition("Supported: ")[2]


def test_a_refusal_says_what_is_true_of_the_module() -> None:
    class Own(VisionTransformer):
        def forward_features(self, x: torch.Tensor, **kwargs: object) -> torch.Tensor:
            return super().forward_features(x.flip(-1))

    with torch.device("meta"):
        models = [timm.create_model(name) for name in ("levit_128", "mobilevit_s")]
    for model in (*models, Own(**BASE)):
        with pytest.raises(UnsupportedModelError) as error:
            mdc.macs(model)
        why = str(error.value).partition("Supported: ")[0]
        assert "rotary" not in why  # it has no such thing
        assert "windows" not in why
    assert "Own: its class overrides forward_features of timm's VisionTransformer" in str(error.value)


def test_post_norm_loses_heads_and_neurons_only() -> None:
    model = randomised(POST_NORM())
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0 is a post-norm block.*heads, neurons"):
        mdc.uniform_policy(model, 0.8, ("tokens",))
    policy = mdc.uniform_policy(model, 0.6)
    assert policy == mdc.uniform_policy(model, 0.6, ("heads", "neurons"))
    scores = mdc.score(model, [images()], progress=False)
    assert scores.tokens == []
    slim = mdc.slim(model, mdc.make_plan(model, scores, policy))
    assert mdc.macs(slim) == mdc.policy_macs(model, policy) <= 0.6 * mdc.macs(model)


class _ScaledAttention(TimmAttention):
    def forward(self, x: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return 2 * super().forward(x, **kwargs)


class _OwnBlock(Block):
    def forward(self, x: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return super().forward(x, **kwargs)


class _OtherMlp(nn.Module):
    def __init__(self, in_features: int, hidden_features: int, **kwargs: object) -> None:
        super().__init__()
        self.fc = nn.Linear(in_features, in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def test_an_attention_of_ones_own_leaves_the_neurons() -> None:
    model = randomised(VisionTransformer(**BASE, attn_layer=_ScaledAttention))
    assert find_anatomy(model).dimensions == ("neurons",)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.attn is a .*_ScaledAttention"):
        mdc.uniform_policy(model, 0.8, ("heads",))
    policy = mdc.uniform_policy(model, 0.8, ("neurons",))
    plan = mdc.make_plan(model, mdc.score(model, [images()], progress=False), policy)
    assert mdc.macs(mdc.slim(model, plan)) == mdc.policy_macs(model, policy)


def test_an_mlp_of_ones_own_leaves_the_heads_and_the_tokens() -> None:
    model = randomised(VisionTransformer(**BASE, mlp_layer=_OtherMlp))
    assert find_anatomy(model).dimensions == ("heads", "tokens")


def test_an_odd_block_costs_only_that_block() -> None:
    model = make()
    model.blocks[1].mlp = randomised(_OtherMlp(48, 192))
    model.blocks[2] = randomised(_OwnBlock(48, 4))
    anatomy = find_anatomy(model)
    assert anatomy.sizes == {"heads": (4, 4, 0, 4), "neurons": (192, 0, 0, 192)}
    assert anatomy.no_tokens is not None
    assert "blocks.2 is a" in anatomy.no_tokens
    policy = mdc.uniform_policy(model, 0.8, ("heads", "neurons"))
    scores = mdc.score(model, [images()], progress=False)
    plan = mdc.make_plan(model, scores, policy)
    slim = mdc.slim(model, plan, compensate="lstsq", moments=scores.moments)
    assert counted_macs(slim) == mdc.macs(slim) == mdc.policy_macs(model, policy) <= 0.8 * mdc.macs(model)
    with mdc.masked(model, mdc.make_plan(model, scores, policy)):
        assert torch.equal(model(images()), mdc.slim(model, plan)(images()))


def test_a_linear_that_computes_something_else_is_not_sliced() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = make()
    model.blocks[2].attn.proj = Doubled(48, 48)
    assert find_anatomy(model).sizes["heads"] == (4, 4, 0, 4)


def test_a_subclass_with_a_forward_of_its_own_is_refused() -> None:
    class Own(VisionTransformer):
        def forward_features(self, x: torch.Tensor, **kwargs: object) -> torch.Tensor:
            return super().forward_features(x.flip(-1))

    with pytest.raises(UnsupportedModelError, match="Own"):
        find_anatomy(Own(**BASE))


def test_the_only_candidate_is_found_anywhere() -> None:
    owner = nn.Module()
    owner.encoder = nn.Module()
    owner.encoder.vit = make()
    owner.alias = owner.encoder.vit  # the same model under two names is one candidate
    path, model = find_model(owner)
    assert (path, model) == ("encoder.vit", owner.encoder.vit)


def test_several_candidates_are_listed() -> None:
    owner = nn.ModuleDict({"student": make(), "teacher": make("glu")})
    with pytest.raises(UnsupportedModelError, match=r"student .*teacher .*submodule='student'"):
        find_model(owner)
    assert find_model(owner, "teacher")[1] is owner["teacher"]
    with pytest.raises(UnsupportedModelError, match=r"no submodule 'pupil'.*student, teacher"):
        find_model(owner, "pupil")
    with pytest.raises(UnsupportedModelError, match="Supported"):
        find_model(owner, "student.head")


def test_compiled_models_are_seen_through() -> None:
    owner = nn.Module()
    owner.net = torch.compile(make(), backend="aot_eager")
    path, model = find_model(owner)
    assert path == "net"
    assert type(model) is VisionTransformer
    in_place = make()
    in_place.compile(backend="aot_eager")
    assert find_anatomy(in_place).model is in_place
    by_block = make()
    by_block.blocks[1] = torch.compile(by_block.blocks[1], backend="aot_eager")
    assert find_anatomy(by_block).dimensions == ("heads", "neurons", "tokens")
    assert isinstance(by_block.blocks[0].attn, Attention)


def test_the_part_that_is_meant_can_be_said_everywhere(tmp_path: Path) -> None:
    owner = nn.ModuleDict({"student": make(), "teacher": make("glu")})
    student, which = owner["student"], {"submodule": "student"}
    scores = mdc.score(student, [images()], "activation", progress=False)
    policy = mdc.uniform_policy(owner, 0.6, **which)
    plan = mdc.make_plan(owner, scores, policy, **which)
    assert plan == mdc.make_plan(student, scores, policy)
    assert mdc.plan_macs(owner, plan, **which) == mdc.policy_macs(owner, policy, **which) < mdc.macs(owner, **which)
    slim = mdc.slim(owner, plan, **which)
    with mdc.masked(owner, plan, **which):
        assert torch.equal(student(images()), slim(images()))
    quietly = mdc.SearchOptions(progress=False)
    assert mdc.search(owner, scores, lambda slim: 1.0, 0.6, 1, options=quietly, **which).policy == policy
    mdc.save(owner, tmp_path / "student", **which)
    assert torch.equal(mdc.load(tmp_path / "student")(images()), student(images()))
    assert torch.equal(mdc.load(tmp_path / "student", model=owner, **which)["student"](images()), student(images()))


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = make(), make("glu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.student(images) + self.teacher(images)


def test_what_an_error_advises_is_taken_by_every_function_that_finds_a_transformer(tmp_path: Path) -> None:
    """Of two: `find_model` says submodule='student', and each goes on from there."""
    owner = Both()
    student, few = owner.student, [images(8), images(8, seed=2)]
    scores = mdc.score(student, few, "activation", progress=False)
    policy = mdc.uniform_policy(student, 0.6)
    plan = mdc.make_plan(student, scores, policy)
    mdc.save(student, tmp_path / "m")
    quietly = {"progress": False}
    one_trial = {"n_trials": 1, "options": mdc.SearchOptions(**quietly)}
    judged = one_trial | {"evaluate": lambda slim: 1.0, "calibration": mdc.Calibration(8, 8)}
    held_out = mdc.HeldOut([(images(8), torch.zeros(8, dtype=torch.long))], "kl", dense=student)
    calls: dict[str, Callable[..., Any]] = {
        "score": lambda **which: mdc.score(owner, few, "activation", **quietly, **which),
        "uniform_policy": lambda **which: mdc.uniform_policy(owner, 0.6, **which),
        "make_plan": lambda **which: mdc.make_plan(owner, scores, policy, **which),
        "masked": lambda **which: mdc.masked(owner, plan, **which).__enter__(),
        "slim": lambda **which: mdc.slim(owner, plan, **which),
        "macs": lambda **which: mdc.macs(owner, **which),
        "policy_macs": lambda **which: mdc.policy_macs(owner, policy, **which),
        "plan_macs": lambda **which: mdc.plan_macs(owner, plan, **which),
        "search": lambda **which: mdc.search(owner, scores, lambda slim: 1.0, 0.6, **one_trial, **which),
        "compress": lambda **which: mdc.compress(owner, few, 0.6, **judged, **which),
        "sensitivity": lambda **which: measure_sensitivity(
            owner, scores, held_out, levels={"heads": [0.5], "neurons": [], "tokens": []}, **quietly, **which
        ),
        "latency": lambda **which: measure_latency_table(owner, **quietly, **which),
        "save": lambda **which: mdc.save(owner, tmp_path / "both", **which),
        "load": lambda **which: mdc.load(tmp_path / "m", model=owner, **which),
        "export_model": lambda **which: mdc.export_model(owner, tmp_path / "m.pt2", **quietly, **which),
        "WeightSharingModule": lambda **which: mdc.WeightSharingModule(
            owner, scores, 0.6, num_classes=7, **which
        ).loss_parts(images(), torch.zeros(6, dtype=torch.long)),
    }
    for name, call in calls.items():
        with pytest.raises(MdcError, match=r"(?s)student .*teacher .*say which, e\.g\. submodule='student'") as told:
            call()
        advised = re.search(r"submodule='([\w.]+)'", str(told.value).split("say which")[1])
        assert advised is not None
        if name not in ("latency", "export_model"):  # which take seconds; tests of their own give them submodule
            call(submodule=advised[1])
        if name == "masked":
            unmask(owner)


@pytest.mark.slow
def test_the_tables_of_models_are_what_models_answer() -> None:
    script = Path(__file__).parent.parent / "docs" / "make_families.py"
    spec = importlib.util.spec_from_file_location("make_families", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for page in module.PAGES:
        text = page.read_text()
        assert module.with_table(text) == text, "run: make docs"
        assert module.with_table(text.replace("| yes |", "| no |")) == text, "it is not found"
