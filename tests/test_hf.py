"""All that the product does, on a model of Hugging Face's: DINOv2, whose classifier reads the class token and the mean
of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.budget import CostModel
from lightning_mdc.figures.decision import Decision, numbers, pictures
from lightning_mdc.figures.items import Document
from lightning_mdc.figures.tokens import tokens_figure
from lightning_mdc.models import find_anatomy, prediction_in
from lightning_mdc.policy_search.sensitivity import measure_sensitivity
from lightning_mdc.tokens.surviving_patches import surviving_patches
from tests.family_suite import assert_exported, random_plan
from tests.kinds import randomised
from tests.strangers import SIDE, Spots, loader, trainer

transformers = pytest.importorskip("transformers", minversion="5")


def network(**options: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_ratio": 2}
    images = {"image_size": SIDE, "patch_size": 4, "num_channels": 1}
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**sizes, **images, num_labels=5, **options)
    return randomised(transformers.Dinov2ForImageClassification(config))


class Module(lightning.LightningModule):
    """Who returns what the model does: an object."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def forward(self, x: Tensor) -> Any:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(batch[0], labels=batch[1]).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.fixture(scope="module")
def dense() -> Any:
    return network()


@pytest.fixture(scope="module")
def scores(dense: nn.Module) -> mdc.Scores:
    return mdc.score(dense, loader(), moments=True, progress=False)


def test_a_resumed_fit_goes_on_with_the_plan_that_was_searched(tmp_path: Path) -> None:
    def fit(folder: Path, ckpt_path: Path | None = None) -> tuple[Any, mdc.MultiDimPruneCallback]:
        module, small = Module(), mdc.Calibration(images=32, judging=32)
        prune = mdc.MultiDimPruneCallback(0.6, n_trials=4, calibration=small, restore_rng=True)
        checkpoints = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        trainer(folder, prune, checkpoints).fit(module, loader(), ckpt_path=ckpt_path)
        return module, prune

    whole, prune = fit(tmp_path / "whole")
    assert prune.search is not None
    assert len(prune.search.history) == 4
    resumed, again = fit(tmp_path / "resumed", tmp_path / "epoch=0.ckpt")
    assert again.plan == prune.plan
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    x = Spots().images[:8]
    slim = prune.slim_model(whole.eval())
    assert mdc.macs(slim) <= 0.6 * mdc.macs(network())
    with mdc.masked(whole.model, prune.plan):
        torch.testing.assert_close(prediction_in(slim(x)), prediction_in(whole(x)), rtol=0, atol=1e-5)


def test_a_policy_is_searched_and_blocks_are_told_apart(dense: nn.Module, scores: mdc.Scores) -> None:
    judge = mdc.HeldOut(loader(), dense=dense, metric="kl")
    assert judge(dense) == pytest.approx(0, abs=1e-6)
    found = mdc.search(dense, scores, judge, budget=0.6, n_trials=4)
    plan = mdc.make_plan(dense, scores, found.policy)
    assert mdc.plan_macs(dense, plan) == mdc.macs(mdc.slim(dense, plan)) <= 0.6 * mdc.macs(dense)
    told = measure_sensitivity(dense, scores, judge, levels={d: [0.5] for d in ("heads", "neurons", "tokens")})
    assert told.blocks("heads") == told.blocks("neurons") == (0, 1, 2, 3)
    assert told.blocks("tokens") == (1, 2, 3)
    assert all(cut.kl > 0 for cut in told.cuts if cut.keep < 1)


def test_compensation_brings_it_closer(dense: nn.Module, scores: mdc.Scores) -> None:
    plan = mdc.make_plan(dense, scores, mdc.Policy(heads=0.5, neurons=0.5))
    judge = mdc.HeldOut(loader(), dense=dense, metric="kl")
    values = [
        judge(mdc.slim(dense, plan)),
        judge(mdc.slim(dense, plan, "lstsq", moments=scores.moments)),
        judge(mdc.slim(dense, plan, "sequential", batches=loader())),
    ]
    assert values == sorted(values)


def test_pictures_show_the_tokens_that_are_kept(dense: nn.Module, scores: mdc.Scores) -> None:
    x = Spots().images[:4]
    slim = mdc.slim(dense, mdc.make_plan(dense, scores, mdc.Policy(tokens=[0.7, 0.6, 0.8])))
    output, survivors = surviving_patches(slim, x)
    torch.testing.assert_close(prediction_in(output), prediction_in(slim(x)))
    kept = survivors.sum(dim=2)
    assert survivors.shape == (4, 3, 16)
    assert (kept[:, 0] >= kept[:, 1]).all()
    assert (kept[:, 2] > 0).all()
    pictures = [(255 * image).byte().numpy().transpose(1, 2, 0).repeat(3, axis=2) for image in x]
    blocks = [stage.block for stage in find_anatomy(slim).stages]
    figure = tokens_figure(pictures, list(survivors.numpy()), blocks, find_anatomy(slim).grid)
    assert f"block 1: {int(kept[0, 0])} of 16" in [text.get_text() for axes in figure.axes for text in axes.texts]


def test_a_decision_is_drawn_with_the_tokens_that_are_kept(dense: nn.Module, scores: mdc.Scores) -> None:
    plan, module = mdc.make_plan(dense, scores, mdc.Policy(0.5, 0.5, 0.7)), Module()
    module.model = dense
    shown = Decision(CostModel(find_anatomy(module)), plan, scores, look=lambda: module(Spots().images[:4]))
    assert any(isinstance(item, Document) and item.text == plan.to_json() for item in numbers(shown))
    drawn = [picture for draw in pictures(shown) for picture in draw()]
    assert {"kept", "importance/tokens", "tokens"} <= {picture.key.removeprefix("charts/") for picture in drawn}


@pytest.mark.parametrize("kd", ["soft", "hard"])
def test_a_student_learns_from_its_dense_teacher(dense: nn.Module, scores: mdc.Scores, tmp_path: Path, kd: str) -> None:
    slim = mdc.slim(dense, mdc.make_plan(dense, scores, mdc.uniform_policy(dense, 0.6))).train()
    module = mdc.DistillationModule(student=slim, teacher=dense, kd=kd, hidden_weight=0.1)
    before = [parameter.clone() for parameter in slim.parameters()]
    trainer(tmp_path, epochs=1).fit(module, loader())
    assert any(not torch.equal(one, other) for one, other in zip(before, slim.parameters(), strict=True))
    mdc.save(slim, tmp_path / "finetuned")
    x = Spots().images[:8]
    with torch.no_grad():
        assert torch.equal(prediction_in(mdc.load(tmp_path / "finetuned")(x)), prediction_in(slim.eval()(x)))


@torch.no_grad()
def test_a_decoder_behind_a_backbone_sees_the_dense_grid() -> None:
    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = network().config
            config.out_features = ["stage2", "stage4"]
            self.backbone = randomised(transformers.Dinov2Backbone(config))
            self.decoder = nn.Conv2d(64, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            map: Tensor = self.decoder(torch.cat(self.backbone(x).feature_maps, dim=1))
            return map

    model, x = Segmenter().eval(), Spots().images[:8]
    found = mdc.compress(model, loader(), budget=0.7, n_trials=3)
    assert find_anatomy(found.model).stages == ()  # no classifier: no tokens, unless they are asked for
    plan = random_plan(model, restore=True)
    with mdc.masked(model, plan):
        masked = model(x)
    assert masked.shape == model(x).shape == (8, 3, 4, 4)
    model.backbone = mdc.slim(model, plan)
    torch.testing.assert_close(model(x), masked, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_it_is_exported(suffix: str, tmp_path: Path) -> None:
    from tests.test_hf_vit import make

    model = make("dinov2_classes", num_hidden_layers=3)
    assert_exported(mdc.slim(model, random_plan(model)), tmp_path / f"slim.{suffix}")
