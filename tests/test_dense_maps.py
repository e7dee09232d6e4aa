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
from tests.kinds import BASE, EVA_KINDS, SIZE, images, randomised


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


def test_tokens_of_a_backbone_leave_by_name_only_and_are_put_back_where_they_were() -> None:
    model, batch = randomised(dinov2()), images(16)
    assert set(mdc.uniform_policy(model, 0.6).tokens) == {1.0}
    scores = mdc.score(model, [batch], "activation", dimensions=("heads", "neurons", "tokens"))
    plan = mdc.make_plan(model, scores, mdc.Policy(tokens=0.5), mdc.TokenOptions(restore=True))
    slim = mdc.slim(model, plan)
    with torch.no_grad():
        assert slim.forward_features(batch).shape == model.forward_features(batch).shape  # type: ignore[operator]
        grids = slim.get_intermediate_layers(batch, n=2, reshape=True)  # type: ignore[operator]
        assert [grid.shape for grid in grids] == [(16, 48, 4, 4)] * 2
    bare = mdc.slim(model, mdc.make_plan(model, scores, mdc.Policy(tokens=0.5), mdc.TokenOptions(restore=False)))
    with pytest.raises(mdc.errors.UnsupportedModelError, match="restore=True"):
        bare.get_intermediate_layers(batch, n=2, reshape=True)  # type: ignore[operator]


def test_features_have_no_argmax() -> None:
    model, labels = randomised(dinov2()), torch.arange(16) % 5
    with pytest.raises(mdc.errors.SearchError, match=r"metric='accuracy' needs classes.*metric='kl'"):
        mdc.HeldOut([(images(16), labels)])(model)
    assert mdc.HeldOut([(images(16), labels)], "kl", dense=model)(model) == pytest.approx(0, abs=1e-6)
