"""timm's Eva: rotary positions travel with the tokens, heads with their tables, and what is not saved is computed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import LayerNorm
from timm.models.eva import Eva, EvaAttention
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.models import find_anatomy, timm_eva
from lightning_mdc.policy import TokenStage
from lightning_mdc.tokens.selection import TokenSelection
from tests.family_suite import FamilySuite, random_plan
from tests.kinds import BASE, EVA_KINDS, EVA_POST_NORM, everyday, images, randomised

MAKERS = EVA_KINDS | {"post_norm": EVA_POST_NORM}
GROUPED = [kind for kind in ("sapiens2",) if kind in EVA_KINDS]  # newer timm only
DAILY = ("eva02", "dinov3")  # two classes of attention, two of tables


def make(kind: str) -> Any:
    return randomised(MAKERS[kind]())


@pytest.mark.parametrize("kind", [k if k in DAILY else pytest.param(k, marks=pytest.mark.slow) for k in MAKERS])
class TestEva(FamilySuite):
    @pytest.fixture
    def dense(self, kind: str) -> nn.Module:
        return make(kind)


# --- tokens -----------------------------------------------------------------------------------------------------------


def token_plan(model: nn.Module, reduction: str) -> mdc.Plan:
    """All units stay; half of the tokens leave in block 1, and half of the rest in block 2."""
    sizes = find_anatomy(model).sizes
    kept = {name: tuple(tuple(range(count)) for count in of_blocks) for name, of_blocks in sizes.items()}
    return mdc.Plan(kept, sizes, (TokenStage(1, 0.5), TokenStage(2, 0.6)), reduction, restore=False)


def splits_of(slim: nn.Module, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Logits, and for each stage which of the tokens that reach it stay and which leave."""
    splits: list[tuple[Tensor, Tensor]] = []

    def look(stage: Any, args: Any) -> None:
        splits.append(stage.split(*args))

    stages = [module for module in slim.modules() if isinstance(module, TokenSelection)]
    hooks = [stage.register_forward_pre_hook(look) for stage in stages]
    logits = slim(x)
    for hook in hooks:
        hook.remove()
    return logits, splits


def embedded(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What reaches the first block, and how it turns."""
    if isinstance(model, Eva):
        x, rope = model._pos_embed(model.patch_embed(x))
        return model.norm_pre(x), rope
    found = model._forward_embeds(x, None, None, None)
    return found["patches"], found["rope_embeds"]


def by_masking(model: Any, x: Tensor, splits: list[tuple[Tensor, Tensor]], fuse: bool, shift: int = 0) -> Tensor:
    """Logits by timm's own modules over the whole sequence: tokens that have left are masked as keys, and a fused one,
    which does not turn, is put at its end. `shift` turns every token as the one so many places after it."""
    (x, rope), prefix = embedded(model, x), model.num_prefix_tokens
    rope = rope.roll(shift, dims=-2)
    ids = torch.arange(x.shape[1] - prefix).expand(len(x), -1)
    there = torch.ones(x.shape[:2], dtype=torch.bool)
    for index, block in enumerate(model.blocks):
        table = rope[index] if rope.ndim == 4 else rope  # of each block, or of all
        extra = x.shape[1] - prefix - table.shape[-2]
        half = table.shape[-1] // 2
        still = torch.cat([torch.zeros(half), torch.ones(half)]).expand(*table.shape[:-2], extra, -1)
        y = block.attn(block.norm1(x), rope=torch.cat([table, still], dim=-2), attn_mask=there[:, None, None])
        x = x + (y if block.gamma_1 is None else block.gamma_1 * y)
        if index in (1, 2):
            stay, leave = (ids.gather(1, indices) for indices in splits[index - 1])
            there = there.scatter(1, leave + prefix, False)
            ids = stay
            if fuse:
                fused = x.gather(1, (leave + prefix)[:, :, None].expand(-1, -1, x.shape[2])).mean(1, keepdim=True)
                ids = torch.cat([stay, torch.full_like(stay[:, :1], x.shape[1] - prefix)], dim=1)
                x, there = torch.cat([x, fused], dim=1), torch.cat([there, torch.ones_like(there[:, :1])], dim=1)
        y = block.mlp(block.norm2(x))
        x = x + (y if block.gamma_2 is None else block.gamma_2 * y)
    kept = torch.cat([torch.arange(prefix).expand(len(x), -1), ids + prefix], dim=1)
    return model.forward_head(model.norm(x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))))


@pytest.mark.parametrize("kind", [kind for kind in EVA_KINDS if kind != "eva_giant"])
@pytest.mark.parametrize("reduction", ["drop", "fuse"])
@torch.no_grad()
def test_tokens_that_stay_turn_as_if_all_were_there(kind: str, reduction: str) -> None:
    model, x = make(kind), images()
    slim = mdc.slim(model, token_plan(model, reduction))
    logits, splits = splits_of(slim, x)
    torch.testing.assert_close(logits, by_masking(model, x, splits, reduction == "fuse"), rtol=0, atol=1e-5)
    wrong = by_masking(model, x, splits, reduction == "fuse", shift=1)
    assert (logits - wrong).abs().max() > 1e-3  # a wrong table shows


def test_a_table_of_any_shape_is_taken_by_position() -> None:
    own = torch.tensor([[2, 0, -1], [1, 3, -1]])
    plain, still = torch.randn(4, 6), torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    by_head, by_image = torch.randn(5, 4, 6), torch.randn(2, 5, 4, 6)
    for table, row in (
        (plain, lambda image, head, position: plain[position]),
        (by_head, lambda image, head, position: by_head[head, position]),
        (by_image, lambda image, head, position: by_image[image, head, position]),
    ):
        found = timm_eva.rope_of(table, own)
        assert found.shape == (2, 1 if table is plain else 5, 3, 6)
        for image in range(2):
            for head in range(found.shape[1]):
                for token, position in enumerate(own[image].tolist()):
                    expected = still if position < 0 else row(image, head, position)
                    assert torch.equal(found[image, head, token], expected)


@pytest.mark.parametrize("kind", ["dinov3", "rope_mixed"])
def test_what_is_read_between_the_blocks_is_what_runs(kind: str) -> None:
    model, x = make(kind), images(3)
    plan = random_plan(model, restore=True)
    slim = mdc.slim(model, plan)
    features, maps = slim.forward_intermediates(x, indices=[3], norm=True)
    torch.testing.assert_close(features, slim.forward_features(x), rtol=0, atol=1e-5)
    assert maps[0].shape == (3, 48, 4, 4)
    slim.set_grad_checkpointing()
    slim.train()
    slim(x).sum().backward()
    checkpointed = {name: p.grad.clone() for name, p in slim.named_parameters() if p.grad is not None}
    slim.zero_grad()
    slim.set_grad_checkpointing(False)
    slim(x).sum().backward()
    for name, parameter in slim.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(checkpointed[name], parameter.grad, rtol=1e-5, atol=1e-5)


def test_patches_dropped_in_training_take_their_turns_with_them() -> None:
    for mixed in (False, True):
        options = {"rope_type": "mixed", "attn_type": "rope"} if mixed else {}
        model = randomised(Eva(**BASE, use_rot_pos_emb=True, patch_drop_rate=0.5, **options)).train()
        plan = random_plan(model, prior=False)
        torch.manual_seed(1)
        with mdc.masked(model, plan):
            masked = model(images())
        torch.manual_seed(1)
        torch.testing.assert_close(mdc.slim(model, plan)(images()), masked, rtol=0, atol=1e-5)


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", everyday("rope_mixed", *GROUPED, "eva02", "eva02_clip", "rope", "post_norm"))
@torch.no_grad()
def test_heads_leave_as_if_their_part_of_proj_were_nothing(kind: str) -> None:
    """An oracle that knows nothing of ours: timm's own model, in which removed heads and neurons reach nobody."""
    model, x = without_norms_over_units(kind), images()
    plan = random_plan(model)
    plan = mdc.Plan(plan.kept, plan.sizes)
    slim = mdc.slim(model, plan)
    again = mdc.slim(slim, mdc.Plan.from_json(every_second(slim).to_json()))
    for small in (slim, again):
        expected = without_norms_over_units(kind)
        whole = small.mdc_plan
        for index, block in enumerate(expected.blocks):
            for dimension, reader in (("heads", block.attn.proj), ("neurons", block.mlp.fc2)):
                count, kept = whole.sizes[dimension][index], whole.kept[dimension][index]
                gone = [unit for unit in range(count) if unit not in kept]
                reader.weight.unflatten(1, (count, -1))[:, gone] = 0
        torch.testing.assert_close(small(x), expected(x), rtol=0, atol=1e-5)


def without_norms_over_units(kind: str) -> Any:
    """They would take removed units in."""
    model = make(kind)
    for block in model.blocks:
        block.attn.norm = block.mlp.norm = nn.Identity()
    return model


def every_second(model: nn.Module) -> mdc.Plan:
    sizes = find_anatomy(model).sizes
    return mdc.Plan({d: tuple(tuple(range(0, count, 2)) for count in counts) for d, counts in sizes.items()}, sizes)


@pytest.mark.parametrize("kind", ["eva02", "rope_mixed", *GROUPED])
@torch.no_grad()
def test_a_block_can_lose_all_of_its_heads(kind: str) -> None:
    model = make(kind)
    plan = random_plan(model)
    none = ((), *plan.kept["heads"][1:])
    plan = mdc.Plan({**plan.kept, "heads": none}, plan.sizes, plan.tokens, plan.reduction, plan.restore)
    with mdc.masked(model, plan):
        masked = model(images())
    torch.testing.assert_close(mdc.slim(model, plan)(images()), masked, rtol=0, atol=1e-5)


# --- what no file holds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["eva02", "dinov3", "rope_mixed"])
@torch.no_grad()
def test_tables_are_computed_in_the_precision_of_the_weights(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(kind).to(dtype)
    mdc.save(mdc.slim(model, random_plan(model)), tmp_path / "slim")
    drawn = torch.random.get_rng_state()
    loaded = mdc.load(tmp_path / "slim")
    assert torch.equal(torch.random.get_rng_state(), drawn)
    x = images().to(dtype)
    assert torch.equal(loaded(x), mdc.slim(model, random_plan(model))(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda args: args.update(img_size=[65536, 65536], patch_size=[1, 1]),
        lambda args: args.update(rope_type="os.system"),
        lambda args: args.update(ref_feat_shape=[0, 0]),
        lambda args: args.update(depth=3),
        lambda args: args.pop("qkv_fused"),
    ],
)
def test_a_file_that_says_something_else_is_refused(change: Callable[[dict[str, Any]], Any]) -> None:
    model = make("eva02")
    anatomy = find_anatomy(model)
    spec = anatomy.family.describe(model, anatomy.sizes)
    anatomy.family.check_spec(spec, model.state_dict())
    change(spec["args"])
    with pytest.raises(mdc.errors.ArtifactError):
        anatomy.family.check_spec(spec, model.state_dict())


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_refusal_names_the_module_and_the_cause() -> None:
    class Own(Eva):
        def forward_features(self, x: Tensor, **options: Any) -> Tensor:
            return super().forward_features(x.flip(-1), **options)

    class Scaled(EvaAttention):
        def forward(self, x: Tensor, **options: Any) -> Tensor:
            return 2 * super().forward(x, **options)

    class Rope(nn.Module):
        def get_embed(self, shape: Any = None) -> Tensor:
            return torch.zeros(16, 24)

    with pytest.raises(mdc.errors.UnsupportedModelError, match="overrides forward_features of timm's Eva"):
        mdc.macs(Own(**BASE))
    model = make("eva02")
    model.blocks[2].attn = Scaled(48, 4, norm_layer=LayerNorm)
    assert find_anatomy(model).sizes["heads"] == (4, 4, 0, 4)
    with pytest.raises(mdc.errors.UnsupportedModelError, match=r"blocks\.2\.attn is a .*Scaled, not timm's Eva"):
        mdc.uniform_policy(model, 0.8, ("tokens",))
    model = make("eva02")
    model.rope = Rope()
    assert find_anatomy(model).dimensions == ("heads", "neurons")
    with pytest.raises(mdc.errors.UnsupportedModelError, match=r"rope is a .*Rope; known are RotaryEmbeddingCat"):
        mdc.uniform_policy(model, 0.8, ("tokens",))
    with pytest.raises(mdc.errors.UnsupportedModelError, match=r"blocks\.0 is a post-norm block .*EvaBlockPostNorm"):
        mdc.uniform_policy(make("post_norm"), 0.8, ("tokens",))
