"""timm's transformers that lose neurons at least: what torch counts is what is priced, and timm's names build them."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import PyramidVisionTransformerV2
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.budget import measure_latency_table
from lightning_mdc.errors import ArtifactError, UnsupportedModelError
from lightning_mdc.models import find_anatomy
from tests.family_suite import FamilySuite, random_plan
from tests.kinds import MLP_KINDS, SIZE, counted_macs, everyday, images, make

KEPT = "deepseek" in MLP_KINDS  # newer timm keeps what create_model was given
NAMED = [kind for kind in MLP_KINDS if KEPT and kind not in ("volo", "mvitv2", "nest")]  # these it did not create
DAILY = ("tnt",)  # two MLPs in a block, one of them on windows
LEGGED = [kind for kind in ("crossvit", "qwen3", "deepseek") if kind in MLP_KINDS]  # whose heads leave, too


@pytest.mark.parametrize("kind", [k if k in DAILY else pytest.param(k, marks=pytest.mark.slow) for k in MLP_KINDS])
class TestMlps(FamilySuite):
    @pytest.fixture
    def dense(self, kind: str, request: pytest.FixtureRequest) -> nn.Module:
        model = make(kind)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and "masked_equals_slim" in request.node.name:
                module.momentum = 0.0  # in stems: it is asked again after it was trained
        model(images(1))  # ConViT makes its tables of places
        return model

    @pytest.fixture(autouse=True)
    def _unnamed(self, kind: str) -> None:
        self.is_named = kind in NAMED

    def saved_and_loaded(self, slim: nn.Module, dense: nn.Module, folder: Path) -> nn.Module:
        if self.is_named:
            return super().saved_and_loaded(slim, dense, folder)
        mdc.save(slim, folder, constructor=False)
        return mdc.load(folder, model=dense)

    @pytest.mark.slow
    @pytest.mark.parametrize("reduction", ["fuse"])
    def test_exported_to_onnx(self, dense: nn.Module, kind: str, reduction: str, tmp_path: Path) -> None:
        if kind in ("twins", "nest"):  # torch has no ONNX of fused attention in windows
            for module in dense.modules():
                vars(module).update({"fused_attn": False} if hasattr(module, "fused_attn") else {})
        if kind == "gemma4":  # nor of timm's dense model: what torch writes, ONNX Runtime calls invalid
            with pytest.raises(ArtifactError, match="Invalid model"):
                super().test_exported_to_onnx(dense, reduction, tmp_path)
            return
        super().test_exported_to_onnx(dense, reduction, tmp_path)


def readers_of(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The last layer of each MLP in the order in which they run, by hooks."""
    last = {"Mlp": "fc2", "GluMlp": "fc2", "MlpWithDepthwiseConv": "fc2", "Gemma4GatedMlp": "down_proj.linear"}
    ran: list[tuple[str, nn.Linear]] = []
    handles = []
    for name, module in model.named_modules():
        if type(module).__name__ in last:
            reader: Any = module.get_submodule(last[type(module).__name__])
            handles.append(reader.register_forward_hook(lambda reader, *_, name=name: ran.append((name, reader))))
    model(images(1))
    for handle in handles:
        handle.remove()
    return ran


@pytest.mark.parametrize("kind", everyday("mvitv2", *(kind for kind in MLP_KINDS if kind != "mvitv2")))
@torch.no_grad()
def test_a_masked_unit_is_one_whose_outputs_are_zeroed_by_hand(kind: str) -> None:
    model, x = make(kind), images()
    plan, zeroed = random_plan(model), copy.deepcopy(model)
    readers = readers_of(zeroed)
    assert [name for name, _ in readers] == [units.name for units in find_anatomy(model).units("neurons") if units]
    for (_, reader), neurons in zip(readers, plan.neurons, strict=True):
        reader.weight[:, [neuron for neuron in range(reader.in_features) if neuron not in neurons]] = 0
    for (name, _), heads in zip(readers, plan.heads, strict=bool(plan.heads)):
        attn: Any = zeroed.get_submodule(f"{name.removesuffix('.mlp')}.attn")
        of_heads = attn.proj.weight.view(len(attn.proj.weight), attn.num_heads, -1)
        of_heads[:, [head for head in range(attn.num_heads) if head not in heads]] = 0
    slim = mdc.slim(model, plan)
    with mdc.masked(model, plan):
        torch.testing.assert_close(model(x), zeroed(x), rtol=0, atol=1e-5 * float(zeroed(x).abs().max().clamp(min=1)))
    torch.testing.assert_close(slim(x), zeroed(x), rtol=0, atol=1e-5 * float(zeroed(x).abs().max().clamp(min=1)))
    assert mdc.plan_macs(model, plan) == mdc.macs(slim) == counted_macs(slim) < counted_macs(model)
    assert bool(plan.heads) == (kind in LEGGED)


@pytest.mark.parametrize("kind", everyday("pvt_v2", *(kind for kind in MLP_KINDS if kind != "pvt_v2")))
@torch.no_grad()
def test_blocks_may_lose_all_units(kind: str) -> None:
    model, x = make(kind), images()
    anatomy = find_anatomy(model)
    kept = {
        dimension: tuple(tuple(range(size if block % 3 == 0 else 0)) for block, size in enumerate(sizes))
        for dimension, sizes in anatomy.sizes.items()
    }
    plan = mdc.Plan(kept, anatomy.sizes)
    slim = mdc.slim(model, plan)
    with mdc.masked(model, plan):
        torch.testing.assert_close(model(x), slim(x), rtol=0, atol=1e-5)
        assert mdc.macs(model) == mdc.macs(make(kind))  # masks neither cost nor save
    assert mdc.macs(slim) == counted_macs(slim) == mdc.plan_macs(model, plan)
    again = mdc.slim(slim, random_plan(slim))  # what is slim is cut again
    assert mdc.macs(again) == counted_macs(again) < mdc.macs(slim)


@pytest.mark.parametrize("kind", ["tnt", "volo"])
def test_a_criterion_sees_the_tokens_of_each_image(kind: str) -> None:
    model, x = make(kind), images(8)
    together, in_two = (mdc.score(model, batches, "activation", progress=False) for batches in ([x], x.split(4)))
    torch.testing.assert_close(together.neurons, in_two.neurons, rtol=1e-4, atol=1e-5)


def test_nobodys_hooks_see_what_is_counted() -> None:
    model, seen = make("pvt_v2"), []
    find_anatomy(model).blocks[0].module.register_forward_hook(lambda *_: seen.append(1))
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    assert mdc.macs(model) == counted_macs(make("pvt_v2"))
    assert not seen
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.slow
def test_half_precision_and_a_block_that_is_compiled_by_itself_are_counted() -> None:
    model: Any = make("pvt_v2")
    macs = mdc.macs(model)
    model.stages[0].blocks[0] = torch.compile(model.stages[0].blocks[0])
    assert mdc.macs(model.to(torch.bfloat16)) == macs


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in ("davit", "pvt_v2", "twins", "crossvit", "qwen3") if k in MLP_KINDS])
def test_a_model_of_any_size_is_priced_at_any_size(kind: str) -> None:
    model = make(kind)
    assert mdc.macs(model, input_size=(48, 40)) == counted_macs(model, 48, 40)


@pytest.mark.parametrize("kind", ["volo", "mvitv2", "nest", "tnt", "convit"])
def test_a_model_of_one_size_says_so(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"input_size=\(64, 64\): this .* takes \({SIZE}, {SIZE}\) images"):
        mdc.macs(make(kind), input_size=64)


@pytest.mark.skipif("gemma4" not in MLP_KINDS, reason="newer timm only")
def test_a_size_that_does_not_fit_is_refused_in_the_models_words() -> None:
    with pytest.raises(UnsupportedModelError, match=r"input_size=\(36, 36\): .* cannot take such images: .*divisible"):
        mdc.macs(make("gemma4"), input_size=36)


# --- what is refused --------------------------------------------------------------------------------------------------


class OwnMlp(MlpWithDepthwiseConv):
    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        return 2 * super().forward(x, feat_size)


class OwnForward(PyramidVisionTransformerV2):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_a_part_of_ones_own_is_named() -> None:
    model: Any = make("pvt_v2")
    model.stages[1].blocks[0].mlp.__class__ = OwnMlp
    anatomy = find_anatomy(model)
    assert anatomy.num_neurons == (64, 64, 0, 128)  # costs that block's neurons only
    assert "stages.1.blocks.0.mlp is a" in anatomy.blocks[2].reasons["neurons"]
    assert mdc.macs(model) == counted_macs(model)
    with pytest.raises(UnsupportedModelError, match="its class overrides forward of timm's PyramidVisionTransformerV2"):
        find_anatomy(OwnForward(depths=(1,), embed_dims=(8,), num_heads=(1,), sr_ratios=(1,), mlp_ratios=(2,)))


@pytest.mark.parametrize("name", ["levit_128s", "coat_tiny", "mobilevit_xxs", "maxvit_tiny_rw_224"])
def test_what_is_half_a_cnn_says_so(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(
        UnsupportedModelError, match=r"it is one of timm\.models\.[a-z]+vit|coat, half a CNN.*work: none"
    ):
        find_anatomy(model)


@pytest.mark.parametrize("kind", MLP_KINDS)
def test_each_says_why_heads_or_tokens_stay(kind: str) -> None:
    model = make(kind)
    for dimension in ("tokens", *(["heads"] if kind not in LEGGED else [])):
        reason = find_anatomy(model).reasons[dimension]
        with pytest.raises(UnsupportedModelError, match=f"cannot lose {dimension}: .*pass dimensions="):
            mdc.uniform_policy(model, 0.8, (dimension,))
        named = [word.strip("(),") for word in reason.split() if word.strip("(),")[:1].isupper()]
        parts = {type(module).__name__ for module in model.modules()}
        assert all(word in parts for word in named), (kind, reason)  # what it names is there


# --- saved and loaded -------------------------------------------------------------------------------------------------


def test_what_timm_did_not_create_is_kept_without_its_constructor(tmp_path: Path) -> None:
    model = make("nest")
    with pytest.raises(ArtifactError, match=r"no name in timm's registry.*constructor=False.*load\(directory, model="):
        mdc.save(model, tmp_path / "m")
    slim = mdc.slim(model, random_plan(model))
    mdc.save(slim, tmp_path / "m", constructor=False)
    assert torch.equal(mdc.load(tmp_path / "m", model=make("nest", seed=3))(images()), slim(images()))


@pytest.mark.skipif(not KEPT, reason="older timm does not keep what it was given")
def test_what_is_no_json_is_named(tmp_path: Path) -> None:
    model = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1), norm_layer=nn.LayerNorm)
    with pytest.raises(ArtifactError, match=r"norm_layer=<class 'torch.nn.*, which is no JSON"):
        mdc.save(model, tmp_path / "m")


def test_a_head_that_was_changed_comes_back(tmp_path: Path) -> None:
    model: Any = timm.create_model("pvt_v2_b0")
    model.reset_classifier(3)
    mdc.save(model, tmp_path / "m")
    loaded = mdc.load(tmp_path / "m")
    assert loaded(images(1)).shape == (1, 3)
    assert find_anatomy(loaded).input_size == (3, 224, 224)


@pytest.mark.skipif(not KEPT, reason="older timm does not keep what it was given")
@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("name", "resnet50", "no model of timm's that this family knows"),
        ("name", "hf-hub:timm/pvt_v2_b0.in1k", "no model of timm's that this family knows"),
        ("input_size", [3, 0, 224], "expected channels, height and width"),
        ("args", {"checkpoint_path": "/etc/passwd"}, "'checkpoint_path' is unknown"),
        ("args", {"device": "cuda"}, "'device' is unknown"),
        ("args", {"depths": [10**5, 1]}, "out of range"),
        ("args", {"depths": [10**4, 1]}, "does not fit the .* tensors"),
        ("args", {"drop_path_rate": 2}, "no rate"),
        ("args", {"embed_dims": {"a": 1}}, "out of range"),
    ],
)
def test_a_file_cannot_ask_for_anything_else(field: str, value: Any, why: str, tmp_path: Path) -> None:
    mdc.save(make("pvt_v2"), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["model_args"]["constructor"][field] = value
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=why):
        mdc.load(tmp_path / "m")


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMED)
@torch.no_grad()
def test_a_fresh_process_loads_it(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    slim = mdc.slim(model, random_plan(model))
    mdc.save(slim, tmp_path / "m")
    torch.save(images(), tmp_path / "images")
    program = (
        f"import torch, lightning_mdc as mdc; model = mdc.load({str(tmp_path / 'm')!r}); "
        f"torch.save(model(torch.load({str(tmp_path / 'images')!r})), {str(tmp_path / 'logits')!r})"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert torch.equal(torch.load(tmp_path / "logits"), slim(images()))


# --- latency ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pvt_v2"])
def test_neurons_are_timed(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    table = measure_latency_table(model, seconds=0.2, cache=tmp_path, progress=False)
    assert len(table.kinds) == 2  # one of each stage
    assert all(times.halves[1].dimension == "neurons" for times in table.kinds)
    assert table.of_policy(model, mdc.Policy(neurons=0.5)) > 0
