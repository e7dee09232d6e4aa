"""transformers' own ViT, DeiT, DINOv2, DINOv3, CLIP and SigLIP, as models, classifiers and backbones."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.distillation.hidden_states import hidden_states
from lightning_mdc.models import find_anatomy, prediction_in
from lightning_mdc.policy import TokenStage
from lightning_mdc.tokens.selection import TokenSelection
from tests.family_suite import REDUCTIONS, FamilySuite, random_plan
from tests.kinds import CLASSES, DEPTH, DIM, HEADS, SIZE, counted_macs, everyday, images, randomised

transformers = pytest.importorskip("transformers", minversion="5")

SIZES: dict[str, Any] = {
    "image_size": SIZE,
    "patch_size": 8,
    "hidden_size": DIM,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
}
WITH_MLP = SIZES | {"intermediate_size": 100}
# The rotary base is small, so that neighbours turn differently and a wrong table shows.
DINOV3 = WITH_MLP | {"num_register_tokens": 2, "rope_theta": 4.0, "pos_embed_rescale": None}  # drawn in training
STAGES = {"out_features": ["stage1", "stage2", "stage4"]}
TEXT = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": 9, "num_hidden_layers": 1}


def maker(model: str, config: str, classes: bool = False, **options: Any) -> Callable[..., Any]:
    def make(**more: Any) -> Any:
        labels = {"num_labels": CLASSES} if classes else {}
        return getattr(transformers, model)(getattr(transformers, config)(**(options | labels | more)))

    return make


def two_towers(of_vision: dict[str, Any]) -> dict[str, Any]:
    return {"vision_config": of_vision, "text_config": TEXT}


MODELS: dict[str, Callable[..., Any]] = {
    "vit": maker("ViTForImageClassification", "ViTConfig", classes=True, **WITH_MLP),
    "dinov3": maker("DINOv3ViTModel", "DINOv3ViTConfig", **DINOV3),
    "dinov2": maker("Dinov2Model", "Dinov2Config", **SIZES, mlp_ratio=2),
    "siglip": maker("SiglipVisionModel", "SiglipVisionConfig", **WITH_MLP),
    "clip_projection": maker("CLIPVisionModelWithProjection", "CLIPVisionConfig", **WITH_MLP, projection_dim=9),
    "vit_eager": maker("ViTForImageClassification", "ViTConfig", classes=True, **WITH_MLP, attn_implementation="eager"),
    "vit_model": maker("ViTModel", "ViTConfig", **WITH_MLP, qkv_bias=False),
    "deit": maker("DeiTForImageClassification", "DeiTConfig", classes=True, **WITH_MLP),
    "deit_model": maker("DeiTModel", "DeiTConfig", **WITH_MLP),
    "deit_distilled": maker("DeiTForImageClassificationWithTeacher", "DeiTConfig", classes=True, **WITH_MLP),
    "dinov2_classes": maker(
        "Dinov2ForImageClassification", "Dinov2Config", classes=True, **SIZES, mlp_ratio=2, use_swiglu_ffn=True
    ),
    "registers": maker("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **SIZES, mlp_ratio=2),
    "registers_classes": maker(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", classes=True, **SIZES, mlp_ratio=2
    ),
    "dinov3_gated": maker("DINOv3ViTModel", "DINOv3ViTConfig", **DINOV3, use_gated_mlp=True),
    "dinov3_eager": maker("DINOv3ViTModel", "DINOv3ViTConfig", **DINOV3, attn_implementation="eager"),
    "clip": maker("CLIPVisionModel", "CLIPVisionConfig", **WITH_MLP),
    "clip_classes": maker("CLIPForImageClassification", "CLIPConfig", classes=True, **two_towers(WITH_MLP)),
    "siglip_headless": maker("SiglipVisionModel", "SiglipVisionConfig", **WITH_MLP, vision_use_head=False),
    "siglip_classes": maker("SiglipForImageClassification", "SiglipConfig", classes=True, **two_towers(WITH_MLP)),
}
BEIT = WITH_MLP | {"drop_path_rate": 0.0, "layer_scale_init_value": 0.5}
SWIN: dict[str, Any] = {
    **{"image_size": SIZE, "patch_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    "drop_path_rate": 0.0,
}
BOUND: dict[str, Callable[..., Any]] = {
    "swin": maker("SwinForImageClassification", "SwinConfig", classes=True, **SWIN),
    "beit": maker("BeitForImageClassification", "BeitConfig", classes=True, **BEIT, use_relative_position_bias=True),
    "beit_shared": maker("BeitModel", "BeitConfig", **BEIT, use_shared_relative_position_bias=True),
    "swin_model": maker("SwinModel", "SwinConfig", **SWIN | {"window_size": 3}, attn_implementation="eager"),
}
MODELS |= BOUND
BACKBONES: dict[str, Callable[..., Any]] = {
    "dinov3": maker("DINOv3ViTBackbone", "DINOv3ViTConfig", **DINOV3, **STAGES),
    "dinov2": maker("Dinov2Backbone", "Dinov2Config", **SIZES, **STAGES, mlp_ratio=2),
    "registers": maker("Dinov2WithRegistersBackbone", "Dinov2WithRegistersConfig", **SIZES, **STAGES, mlp_ratio=2),
}
DAILY = ("vit", "dinov3", "swin", "beit")


def make(kind: str, **more: Any) -> Any:
    return randomised(MODELS[kind](**more))


def tower_of(model: Any) -> Any:
    """Which takes images and gives tokens."""
    return next(m for m in model.modules() if hasattr(m, "embeddings"))


@pytest.mark.parametrize("kind", [k if k in DAILY else pytest.param(k, marks=pytest.mark.slow) for k in MODELS])
class TestHuggingFace(FamilySuite):
    @pytest.fixture
    def dense(self, kind: str) -> nn.Module:
        return make(kind)

    def features(self, model: nn.Module, x: Tensor) -> Tensor:
        features: Tensor = tower_of(model)(x).last_hidden_state
        return features


# --- heads and neurons ------------------------------------------------------------------------------------------------


READERS = ("o_proj", "out_proj", "fc2", "down_proj")


@pytest.mark.parametrize("kind", everyday("vit", "dinov3", "swin", "beit", "clip", "siglip_classes", "dinov2_classes"))
@torch.no_grad()
def test_units_leave_as_if_their_part_of_what_reads_them_were_nothing(kind: str) -> None:
    """An oracle that knows nothing of ours: transformers' own model, in which removed units reach nobody."""
    model, x = make(kind), images()
    plan = random_plan(model)
    plan = mdc.Plan(plan.kept, plan.sizes)
    slim, expected = mdc.slim(model, plan), make(kind)
    blocks = [expected.get_submodule(block.name) for block in find_anatomy(model).blocks]
    for index, block in enumerate(blocks):
        heads, neurons = (m for n, m in block.named_modules() if n.rpartition(".")[2] in READERS)
        for dimension, reader in (("heads", heads), ("neurons", neurons)):
            count, kept = plan.sizes[dimension][index], plan.kept[dimension][index]
            gone = [unit for unit in range(count) if unit not in kept]
            reader.weight.unflatten(1, (count, -1))[:, gone] = 0
    torch.testing.assert_close(prediction_in(slim(x)), prediction_in(expected(x)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", everyday("vit", "beit", "swin", "dinov3", "clip", "vit_eager"))
@torch.no_grad()
def test_a_block_can_lose_all_of_its_heads_and_neurons(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    plan = random_plan(model)
    none = {dimension: ((), *kept[1:]) for dimension, kept in plan.kept.items()}
    plan = mdc.Plan(none, plan.sizes, plan.tokens, plan.reduction, plan.restore)
    with mdc.masked(model, plan):
        masked = prediction_in(model(images()))
    slim = mdc.slim(model, plan)
    torch.testing.assert_close(prediction_in(slim(images())), masked, rtol=0, atol=1e-5)
    assert mdc.macs(slim) == counted_macs(slim)
    mdc.save(slim, tmp_path / "slim")
    assert torch.equal(prediction_in(mdc.load(tmp_path / "slim")(images())), prediction_in(slim(images())))


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["drop", "fuse"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_tokens_that_stay_turn_as_if_all_were_there(reduction: str, implementation: str) -> None:
    """DINOv3's own modules over the whole sequence: tokens that have left are masked as keys, and a fused one, which
    does not turn, is put at its end."""
    model, x = make("dinov3", attn_implementation=implementation), images()
    kept = {d: tuple(tuple(range(n)) for n in counts) for d, counts in find_anatomy(model).sizes.items()}
    plan = mdc.Plan(kept, find_anatomy(model).sizes, (TokenStage(1, 0.5), TokenStage(2, 0.6)), reduction, False)
    slim, splits = mdc.slim(model, plan), []
    for stage in (module for module in slim.modules() if isinstance(module, TokenSelection)):
        stage.register_forward_pre_hook(lambda stage, args: splits.append(stage.split(*args)))
    found = slim(x).last_hidden_state

    def by_masking(shift: int = 0) -> Tensor:
        tokens, prefix = model.embeddings(x), 3
        cos, sin = (table.roll(shift, dims=0) for table in model.rope_embeddings(x))
        ids = torch.arange(tokens.shape[1] - prefix).expand(len(x), -1)
        there = torch.ones(tokens.shape[:2], dtype=torch.bool)
        for index, block in enumerate(model.model.layer):
            extra = tokens.shape[1] - prefix - len(cos)
            turns = (torch.cat([cos, torch.ones(extra, 12)]), torch.cat([sin, torch.zeros(extra, 12)]))
            mask = torch.zeros(there.shape).masked_fill(~there, float("-inf"))[:, None, None]
            y = block.attention(block.norm1(tokens), attention_mask=mask, position_embeddings=turns)[0]
            tokens = tokens + block.layer_scale1(y)
            if index in (1, 2):
                stay, leave = (ids.gather(1, indices) for indices in splits[index - 1])
                there, ids = there.scatter(1, leave + prefix, False), stay
                if reduction == "fuse":
                    gone = tokens.gather(1, (leave + prefix)[:, :, None].expand(-1, -1, DIM)).mean(1, keepdim=True)
                    ids = torch.cat([stay, torch.full_like(stay[:, :1], tokens.shape[1] - prefix)], dim=1)
                    tokens, there = torch.cat([tokens, gone], dim=1), torch.cat([there, there[:, :1]], dim=1)
            tokens = tokens + block.layer_scale2(block.mlp(block.norm2(tokens)))
        left = torch.cat([torch.arange(prefix).expand(len(x), -1), ids + prefix], dim=1)
        return model.norm(tokens.gather(1, left[:, :, None].expand(-1, -1, DIM)))

    torch.testing.assert_close(found, by_masking(), rtol=0, atol=1e-5)
    assert (found - by_masking(shift=1)).abs().max() > 1e-3  # a wrong table shows


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("reduction", everyday(*REDUCTIONS))
@torch.no_grad()
def test_feature_maps_have_their_dense_shape(kind: str, reduction: str, tmp_path: Path) -> None:
    model, x = randomised(BACKBONES[kind]()), images()
    plan = random_plan(model, reduction)
    slim = mdc.slim(model, plan)
    with mdc.masked(model, plan):
        masked = model(x).feature_maps
    mdc.save(slim, tmp_path / "slim")
    loaded = mdc.load(tmp_path / "slim")(x).feature_maps
    for one, other, dense, again in zip(masked, slim(x).feature_maps, model(x).feature_maps, loaded, strict=True):
        assert one.shape == dense.shape == (6, DIM, 4, 4)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        assert torch.equal(other, again)
    assert mdc.macs(slim) == counted_macs(slim)
    with pytest.raises(mdc.errors.UnsupportedModelError, match="feature maps: tokens leave"):
        mdc.slim(model, random_plan(model, reduction, restore=False))(x)


@pytest.mark.parametrize("kind", everyday("vit", "dinov2", "clip", "siglip"))
@torch.no_grad()
def test_hidden_states_have_all_positions_or_are_refused(kind: str) -> None:
    model, x = make(kind), images()
    dense = model(x, output_hidden_states=True).hidden_states
    slim = mdc.slim(model, random_plan(model, restore=True))
    states = slim(x, output_hidden_states=True).hidden_states
    assert [state.shape for state in states] == [state.shape for state in dense]
    torch.testing.assert_close(states[0], dense[0])
    tower = tower_of(slim)
    norm = next(m for n, m in tower.named_children() if n in ("layernorm", "post_layernorm"))
    if kind != "clip":  # whose tokens are not normalised
        torch.testing.assert_close(norm(states[-1]), tower(x).last_hidden_state, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        prediction_in(slim(x, output_hidden_states=True)), prediction_in(slim(x)), rtol=0, atol=0
    )
    fewer = mdc.slim(model, random_plan(model, restore=False))
    with pytest.raises(mdc.errors.UnsupportedModelError, match="output_hidden_states=True: tokens leave"):
        fewer(x, output_hidden_states=True)
    with pytest.raises(mdc.errors.UnsupportedModelError, match="output_attentions=True: tokens leave"):
        slim(x, output_attentions=True)


@torch.no_grad()
def test_what_a_model_may_be_given_is_right_or_refused() -> None:
    model, x = make("vit_model", attn_implementation="eager"), images()
    slim = mdc.slim(model, random_plan(model, prior=False))
    with pytest.raises(mdc.errors.UnsupportedModelError, match="attn_mask"):
        slim(x, attention_mask=torch.ones(6, 17))
    with pytest.raises(mdc.errors.UnsupportedModelError, match="attn_mask"):
        slim(x, None, None, torch.ones(6, 17))
    larger = images(size=48)
    with mdc.masked(model, random_plan(model, prior=False)):
        masked = prediction_in(model(larger, interpolate_pos_encoding=True))
    torch.testing.assert_close(prediction_in(slim(larger, interpolate_pos_encoding=True)), masked, rtol=0, atol=1e-5)
    with_prior, wide = mdc.slim(model, random_plan(model)), torch.randn(2, 3, 16, 64)
    with pytest.raises(mdc.errors.PlanError, match="use images of that shape"):
        with_prior(wide, interpolate_pos_encoding=True)
    heads_alone = mdc.Plan(random_plan(model).kept, find_anatomy(model).sizes)
    maps = mdc.slim(model, heads_alone)(x, output_attentions=True).attentions
    assert [one.shape for one in maps] == [(6, 2, 17, 17)] * DEPTH


@pytest.mark.parametrize("kind", ["swin", "vit", "dinov3"])
@torch.no_grad()
def test_masked_patches_are_those_of_the_dense_model(kind: str) -> None:
    """As masked image modelling has them: a learned token is put in the place of a patch, before any block."""
    makers: dict[str, Callable[[], Any]] = {
        "swin": lambda: transformers.SwinModel(transformers.SwinConfig(**SWIN), use_mask_token=True),
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**WITH_MLP), use_mask_token=True),
        "dinov3": lambda: MODELS["dinov3"](),
    }
    model, x = randomised(makers[kind]()), images()
    patches = find_anatomy(model).grid[0] * find_anatomy(model).grid[1]
    hidden = {"bool_masked_pos": torch.rand(6, patches, generator=torch.Generator().manual_seed(0)) < 0.4}
    plan, zeroed = random_plan(model), copy.deepcopy(model)
    slim = mdc.slim(model, plan)
    with mdc.masked(model, plan):
        masked = prediction_in(model(x, **hidden))
    torch.testing.assert_close(prediction_in(slim(x, **hidden)), masked, rtol=0, atol=1e-5)
    assert (prediction_in(slim(x)) - masked).abs().max() > 1e-2
    embeddings: Any = zeroed.embeddings
    token = embeddings.mask_token.flatten()
    behind = getattr(embeddings, "norm", embeddings.patch_embeddings)
    behind.register_forward_hook(lambda _, args, out: by_hand(out, hidden, token))
    with mdc.masked(zeroed, plan):
        torch.testing.assert_close(prediction_in(zeroed(x)), masked, rtol=0, atol=1e-5)


def by_hand(patches: Any, hidden: dict[str, Tensor], token: Tensor) -> Any:
    """The learned token in the places of hidden patches."""
    found = patches[0] if isinstance(patches, tuple) else patches
    if found.ndim == 4:  # DINOv3's come as a map
        found.flatten(2).transpose(1, 2)[hidden["bool_masked_pos"]] = token
    else:
        found[hidden["bool_masked_pos"]] = token
    return patches


@pytest.mark.parametrize("kind", ["swin", "swin_model", "beit", "clip"])
def test_hidden_states_are_compared(kind: str) -> None:
    """A block of Swin's gives its attention beside its tokens."""
    model, x = make(kind), images()
    slim = mdc.slim(model, random_plan(model, restore=False))
    with hidden_states(slim, model) as caught, caught.watching():
        slim(x), model(x)
        assert [state.ndim for state in caught.student.values()] == [3] * len(find_anatomy(model).blocks)
        loss = caught.loss()
        loss.backward()
    assert loss > 0
    assert all(p.grad.isfinite().all() for p in slim.parameters() if p.grad is not None)
    with hidden_states(model, copy.deepcopy(model)) as caught, caught.watching():
        model(x)
        caught.teacher.update(caught.student)
        assert caught.loss() == 0


def test_gradients_are_the_same_where_blocks_are_computed_again() -> None:
    model = make("vit")
    slim, x = mdc.slim(model, random_plan(model, "drop", restore=True)).train(), images()
    grads = []
    for again in (False, True):
        if again:
            slim.gradient_checkpointing_enable()
        slim.zero_grad()
        slim(x, labels=torch.arange(6)).loss.backward()
        grads.append([p.grad.clone() for p in slim.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# --- which models -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_vision_tower_of_two_is_found_inside() -> None:
    tower = SIZES | {"intermediate_size": 100, "projection_dim": 9}
    config = transformers.CLIPConfig(vision_config=tower, text_config=TEXT | {"hidden_size": 16}, projection_dim=9)
    model = randomised(transformers.CLIPModel(config))
    inputs = {"input_ids": torch.tensor([[0, 3, 1]]), "pixel_values": images()}
    before = model(**inputs).logits_per_image
    assert find_anatomy(model).model is model.vision_model
    plan = random_plan(model.vision_model)
    with mdc.masked(model, plan, submodule="vision_model"):
        masked = model(**inputs).logits_per_image
    model.vision_model = mdc.slim(model, plan, submodule="vision_model")
    torch.testing.assert_close(model(**inputs).logits_per_image, masked, rtol=0, atol=1e-5)
    assert not torch.allclose(before, masked, atol=1e-3)


@pytest.mark.parametrize("kind", ["Siglip2VisionModel", "Siglip2ForImageClassification", "Siglip2Model"])
def test_a_tower_that_takes_patches_is_refused(kind: str) -> None:
    tower = {name: value for name, value in WITH_MLP.items() if name != "image_size"} | {"num_patches": 16}
    both = transformers.Siglip2Config(**two_towers(tower))
    model = getattr(transformers, kind)(both.vision_config if kind == "Siglip2VisionModel" else both)
    with pytest.raises(mdc.errors.UnsupportedModelError, match=r"as patches with a mask and their shapes \(NaFlex\)"):
        mdc.macs(model, submodule="vision_model" if kind == "Siglip2Model" else None)
    with pytest.raises(mdc.errors.UnsupportedModelError, match=r"Siglip2.*NaFlex"):
        mdc.score(model, [images(8)])


def test_a_class_of_ones_own_is_taken_if_it_computes_the_same() -> None:
    class Same(transformers.ViTForImageClassification):
        pass

    class Other(transformers.ViTForImageClassification):
        def forward(self, pixel_values: Tensor, **options: Any) -> Any:
            return super().forward(2 * pixel_values, **options)

    config = make("vit").config
    assert mdc.macs(Same(config)) == mdc.macs(make("vit"))
    with pytest.raises(mdc.errors.ArtifactError, match="constructor=False"):
        mdc.save(Same(config), "nowhere")
    assert find_anatomy(Other(config)).model.__class__.__name__ == "ViTModel"  # the tower inside is transformers' own
    model = make("vit")
    model.vit.layers[1].mlp.fc1 = nn.Sequential(nn.Linear(DIM, 100))
    assert find_anatomy(model).sizes["neurons"] == (100, 0, 100, 100)
    assert "vit.layers.1.mlp.fc1 is a torch" in find_anatomy(model).blocks[1].reasons["neurons"]


@pytest.mark.slow
def test_transformers_is_imported_by_who_has_it() -> None:
    program = "import sys, lightning_mdc.models; print('transformers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_folder_is_ours_alone(tmp_path: Path) -> None:
    model = make("vit")
    mdc.save(mdc.slim(model, random_plan(model)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "model_type" not in config
    assert config["constructor"]["transformers_config"]["model_type"] == "vit"
    for kind in (transformers.ViTForImageClassification, transformers.AutoModelForImageClassification):
        with pytest.raises((OSError, ValueError, RuntimeError, TypeError)):
            kind.from_pretrained(tmp_path)


@pytest.mark.slow
@torch.no_grad()
def test_each_kind_is_loaded_by_a_fresh_process(tmp_path: Path) -> None:
    """Slim, with tokens leaving where they may; an output that is an object is compared by all of its tensors."""
    makers, expected = {**MODELS, **{f"{kind}_backbone": maker for kind, maker in BACKBONES.items()}}, {}
    for kind, maker in makers.items():
        model = randomised(maker())
        slim = mdc.slim(model, random_plan(model))
        mdc.save(slim, tmp_path / kind)
        expected |= tensors_of(kind, slim(images()))
    save_file({"images": images()}, tmp_path / "images")
    program = (
        "import pathlib, sys, torch, lightning_mdc as mdc\n"
        "from safetensors.torch import load_file, save_file\n"
        "from tests.test_hf_vit import tensors_of\n"
        "here, found = pathlib.Path(sys.argv[1]), {}\n"
        "x = load_file(here / 'images')['images']\n"
        "with torch.no_grad():\n"
        "    for folder in (path for path in here.iterdir() if path.is_dir()):\n"
        "        found |= tensors_of(folder.name, mdc.load(folder)(x))\n"
        "save_file(found, here / 'found')\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=Path(mdc.__file__).parents[1])
    found = load_file(tmp_path / "found")
    assert found.keys() == expected.keys()
    assert {name.partition(".")[0] for name in found} == makers.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def tensors_of(kind: str, output: Any) -> dict[str, Tensor]:
    """Of a transformers' output, by name."""
    parts = ((name, value if isinstance(value, tuple) else (value,)) for name, value in output.items())
    return {f"{kind}.{name}.{i}": value.contiguous() for name, values in parts for i, value in enumerate(values)}


@pytest.mark.parametrize("kind", ["dinov3", "clip", "swin"])
@torch.no_grad()
def test_what_no_file_holds_is_computed(kind: str, tmp_path: Path) -> None:
    model = make(kind).to(torch.bfloat16)
    mdc.save(model, tmp_path / "dense")
    x = images().to(torch.bfloat16)
    assert torch.equal(prediction_in(mdc.load(tmp_path / "dense")(x)), prediction_in(model(x)))


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec.update({"class": "os.system"}),
        lambda spec: spec["transformers_config"].update(num_hidden_layers=3),
        lambda spec: spec["transformers_config"].update(hidden_size=2**40),
        lambda spec: spec["transformers_config"].update(auto_map={"AutoModel": "me--evil.Model"}),
        lambda spec: spec["transformers_config"].update(_attn_implementation="kernels-community/evil"),
        lambda spec: spec.update(attention="kernels-community/evil"),
        lambda spec: spec.update(options={"add_pooling_layer": "yes"}),
    ],
)
def test_a_file_that_says_something_else_is_refused(change: Callable[[dict[str, Any]], Any]) -> None:
    model = make("vit")
    anatomy = find_anatomy(model)
    spec = json.loads(json.dumps(anatomy.family.describe(model, anatomy.sizes)))
    anatomy.family.check_spec(spec, model.state_dict())
    change(spec)
    with pytest.raises(mdc.errors.ArtifactError):
        anatomy.family.check_spec(spec, model.state_dict())
