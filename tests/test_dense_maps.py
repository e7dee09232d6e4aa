"""A backbone whose tokens a decoder reads as a grid: nothing said, heads and neurons leave; by name, tokens too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import lightning_mdc as mdc
from tests.kinds import BASE, CLASSES, EVA_KINDS, SIZE, images, make, randomised


def dinov2() -> nn.Module:
    return VisionTransformer(**(BASE | {"num_classes": 0}), reg_tokens=2, no_embed_class=True, init_values=0.1)


def dinov3() -> nn.Module:
    model = EVA_KINDS["dinov3"]()
    model.reset_classifier(0)  # type: ignore[operator]
    return model


class Dense(lightning.LightningModule):
    """Says something of each pixel; takes the grid's side for the root of the number of its tokens."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = randomised(backbone)
        self.decoder = nn.Conv2d(self.backbone.num_features, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoded(self.backbone.forward_features(x), x)

    def decoded(self, features: Tensor, x: Tensor) -> Tensor:
        tokens = features[:, self.backbone.num_prefix_tokens :]
        side = int(tokens.shape[1] ** 0.5)
        maps = self.decoder(tokens.transpose(1, 2)[:, :, : side * side].unflatten(2, (side, side)))
        return nn.functional.interpolate(maps, x.shape[-2:])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self(batch).mean(dim=1) - batch.mean(dim=1)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-4)


BY_NAME = {
    "space": mdc.Space(bounds={"tokens": (0.3, 0.7)}),
    "dimensions": ("heads", "neurons", "tokens"),
    "tokens": mdc.TokenOptions(restore=True),
}


@pytest.mark.parametrize("backbone", [dinov2, dinov3])
@pytest.mark.parametrize("options", [{}, BY_NAME], ids=["nothing said", "tokens by name"])
def test_a_map_keeps_its_size(backbone: Any, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Dense(backbone())
    few = mdc.Calibration(images=32, judging=16)
    prune = mdc.MultiDimPruneCallback(n_trials=2, calibration=few, **options)
    seen: list[Tensor] = []

    class Look(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if not seen:
                with torch.no_grad():
                    seen.append(pl_module.eval()(images(2)))
                    slim = prune.slim_model(pl_module).eval()
                    seen.append(pl_module.decoded(slim.forward_features(images(2)), images(2)))
                    pl_module.train()

    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path, callbacks=[prune, Look()],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(list(images(48)), 16))
    assert prune.plan is not None
    assert prune.search is not None
    assert bool(prune.plan.leaving) == bool(options)
    masked, of_slim = seen
    assert masked.shape == (2, 2, SIZE, SIZE)
    torch.testing.assert_close(masked, of_slim, rtol=0, atol=1e-5)
    prune.slim_model(module, in_place=True)
    assert module(images(2)).shape == masked.shape


def pooled() -> nn.Module:
    return VisionTransformer(**(BASE | {"num_classes": 0, "class_token": False, "global_pool": "avg"}))


@pytest.mark.parametrize("backbone", [dinov2, dinov3, pooled])
def test_tokens_of_a_backbone_leave_by_name_only_and_are_put_back_where_they_were(backbone: Any) -> None:
    model, batch, every = randomised(backbone()), images(16), ("heads", "neurons", "tokens")
    assert mdc.score(model, (), "random").tokens == []
    assert set(mdc.uniform_policy(model, 0.6).tokens) == {1.0}
    assert max(mdc.uniform_policy(model, 0.6, every).tokens) < 1
    assert max(mdc.uniform_policy(model, 0.6, tokens=mdc.TokenOptions(restore=True)).tokens) < 1
    scores = mdc.score(model, (), "random", dimensions=every)
    plan = mdc.make_plan(model, scores, mdc.Policy(tokens=0.5, stages=[3]))
    assert plan.restore
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        dense, slim = model.forward_features(batch), mdc.slim(model, plan)
        features = slim.forward_features(batch)  # type: ignore[operator]
        assert features.shape == dense.shape
        # Tokens leave after the last attention: those that stayed are where they are in the dense model.
        same = ((features - dense).abs().amax(dim=-1) < 1e-4)[:, prefix:].sum(dim=1)
        assert (same >= 0.5 * dense.shape[1] - prefix - 1).all()
        assert (same < 16).all()
        maps = slim.forward_intermediates(batch, indices=2, intermediates_only=True)  # type: ignore[operator]
        assert [grid.shape for grid in maps] == [(16, 48, 4, 4)] * 2
    bare = mdc.slim(model, mdc.make_plan(model, scores, mdc.Policy(tokens=0.5), mdc.TokenOptions(restore=False)))
    with pytest.raises(mdc.errors.UnsupportedModelError, match="restore=True"):
        bare.forward_intermediates(batch)  # type: ignore[operator]


def test_what_becomes_of_tokens_is_not_asked_where_none_leave() -> None:
    backbone, windows = randomised(pooled()), make("swin")
    options = mdc.TokenOptions(reduction="merge")
    scores, given = mdc.score(backbone, (), "random"), mdc.Policy(0.5)
    by_default = "no classifier of VisionTransformer is known, so it loses heads and neurons only; pass dimensions="
    refused: list[tuple[str, Any]] = [
        (by_default, lambda: mdc.uniform_policy(backbone, 0.7, tokens=options)),
        (by_default, lambda: mdc.search(backbone, scores, id, 0.7, 1, tokens=mdc.TokenOptions(restore=False))),
        (by_default, lambda: mdc.compress(backbone, [images(8)], tokens=options)),
        ("cannot lose tokens: .*; leave tokens= out", lambda: mdc.uniform_policy(windows, 0.7, tokens=options)),
        ("cannot lose tokens", lambda: mdc.compress(windows, [images(8)], policy=given, tokens=options)),
    ]
    for message, call in refused:
        with pytest.raises(mdc.errors.PlanError, match=message):
            call()
    mdc.uniform_policy(backbone, 0.7, ("heads", "tokens"), tokens=options)


@torch.no_grad()
def test_positions_are_those_of_the_grid_that_was_scored(tmp_path: Path) -> None:
    """2 x 8 patches are as many as 4 x 4."""
    model, policy = make("any_size"), mdc.Policy(tokens=0.5)
    options, wide = mdc.TokenOptions("dependence"), images(8, 64)[:, :, :16]
    scores = mdc.score(model, [wide], progress=False)
    scores.save(tmp_path / "scores")
    assert scores.with_moments(None).grid == mdc.Scores.load(tmp_path / "scores").grid == (2, 8)
    slim = mdc.slim(model, mdc.make_plan(model, scores, policy, options))
    assert slim(wide).shape == (8, CLASSES)
    with pytest.raises(mdc.errors.PlanError, match="4x4 patches, but the token prior is for a grid like 2x8"):
        slim(images(2))
    larger = mdc.score(model, [images(8, 48)], progress=False)  # and 6 x 6 are more than the model's own
    slim = mdc.slim(model, mdc.make_plan(model, larger, policy, options))
    assert slim(images(2)).shape == slim(images(2, 48)).shape == (2, CLASSES)
    with pytest.raises(mdc.errors.CalibrationError, match=r"images of \(3, 48, 48\) after others: positions"):
        mdc.score(model, [images(8), images(8, 48)], "activation", progress=False)
    mdc.score(model, [images(8), images(8, 48)], "activation", dimensions=("heads",), progress=False)


@pytest.mark.parametrize("size", [(64, 64), (48, 32)])
def test_a_budget_says_at_which_size_it_was_priced(size: tuple[int, int]) -> None:
    model = make("any_size")
    policy = mdc.uniform_policy(model, 0.6, input_size=size)
    assert policy.input_size == mdc.Policy.from_json(policy.to_json()).input_size == size
    assert mdc.uniform_policy(model, 0.6).input_size == (SIZE, SIZE)
    assert mdc.Policy(0.5).input_size is None
    assert mdc.Policy(0.5) == mdc.Policy(0.5, input_size=size)
    plan = mdc.make_plan(model, mdc.score(model, (), "random"), policy)
    assert plan == mdc.Plan.from_json(plan.to_json())
    assert plan.input_size == plan.policy.input_size == size
    assert 0.595 < mdc.plan_macs(model, plan, size) / mdc.macs(model, size) <= 0.6  # tokens are whole there
    for wrong in (64, (64,), (64, 0), "64"):
        with pytest.raises(mdc.errors.PolicyError, match=r"input_size=.*expected \(height, width\) in pixels"):
            mdc.Policy(0.5, input_size=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(48, 48), (64, 32)])
def test_a_callback_says_and_keeps_the_size_of_its_images(
    shape: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_mdc.callback.rank_zero_info", said.append)

    def fit(folder: Path, ckpt_path: Path | None = None, **options: Any) -> mdc.MultiDimPruneCallback:
        module = Dense(dinov3())
        prune = mdc.MultiDimPruneCallback(policy="uniform", calibration=mdc.Calibration(images=8), **options)
        trainer = lightning.Trainer(
            max_epochs=2 if ckpt_path else 1, accelerator="cpu", logger=False, enable_progress_bar=False,
            default_root_dir=folder, callbacks=[prune], enable_model_summary=False,
        )  # fmt: skip
        batches = torch.utils.data.DataLoader(list(torch.randn(8, 3, *shape)), 4)
        trainer.fit(module, batches, ckpt_path=ckpt_path)
        trainer.save_checkpoint(folder / "last.ckpt")
        return prune

    line = f"of its MACs for images of {shape[0]} x {shape[1]} pixels"
    first = fit(tmp_path / "first")
    assert sum(line in each for each in said) == 1
    again = fit(tmp_path / "again", tmp_path / "first" / "last.ckpt")
    assert sum(line in each for each in said) == 2
    assert first.policy is not None
    assert again.policy is not None
    assert first.policy.input_size == again.policy.input_size == shape
    assert again.plan == first.plan


def test_features_have_no_argmax() -> None:
    model, labels = randomised(dinov2()), torch.arange(16) % 5
    with pytest.raises(mdc.errors.SearchError, match=r"metric='accuracy' needs classes.*metric='kl'"):
        mdc.HeldOut([(images(16), labels)])(model)
    assert mdc.HeldOut([(images(16), labels)], "kl", dense=model)(model) == pytest.approx(0, abs=1e-6)
