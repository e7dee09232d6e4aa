"""A student without classes under its teacher: distances against numpy, what is logged, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_mdc as mdc
from lightning_mdc.distillation import DistillationModule
from lightning_mdc.errors import DistillationError
from tests.test_distillation import TINY, batch, loader, trainer
from tests.test_hidden_states import network, slimmed


def backbone(seed: int = 0, kind: type = VisionTransformer, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = kind(**{**TINY, "patch_size": 2, "num_classes": 0, "class_token": True, **options})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


class Detector(nn.Module):
    """Says a map and, in a nest, tokens and what is no feature."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.backbone = backbone(seed)
        self.decoder = nn.Conv2d(16, 5, 1)

    def forward(self, images: Tensor) -> dict[str, Any]:
        tokens = self.backbone.forward_features(images)
        picture = self.decoder(tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))
        return {"map": picture, "more": (tokens, torch.zeros(len(images), dtype=torch.long), "a word")}


def distance(kind: str, s: np.ndarray, t: np.ndarray, channels: int = -1) -> float:
    if kind == "squared":
        return float(np.mean((s - t) ** 2))
    s, t = np.moveaxis(s, channels, -1), np.moveaxis(t, channels, -1)
    lengths = np.linalg.norm(s, axis=-1) * np.linalg.norm(t, axis=-1)
    return float(np.mean(1 - np.sum(s * t, axis=-1) / lengths))


def numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


@pytest.mark.parametrize("kind", ["cosine", "squared"])
@pytest.mark.parametrize("pool", ["token", "avg", ""])
def test_loss_is_the_distance_of_features(kind: str, pool: str) -> None:
    student, teacher = backbone(0, global_pool=pool), backbone(1, global_pool=pool).eval()
    images, labels = batch()
    parts = DistillationModule(student, teacher, kd=kind, kd_weight=0.3).loss_parts(images, labels)
    expected = distance(kind, numbers(student(images)), numbers(teacher(images)))
    assert set(parts) == {"kd", "loss"}
    np.testing.assert_allclose(parts["kd"].item(), expected, rtol=1e-4)
    np.testing.assert_allclose(parts["loss"].item(), 0.3 * expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["cosine", "squared"])
def test_any_output_of_equal_shapes_is_compared(kind: str) -> None:
    student, teacher = Detector(0), Detector(1).eval()
    images, _ = batch()
    parts = DistillationModule(student, teacher, kd=kind).loss_parts(images, None)
    s, t = student(images), teacher(images)
    of_map = distance(kind, numbers(s["map"]), numbers(t["map"]), channels=1)
    of_tokens = distance(kind, numbers(s["more"][0]), numbers(t["more"][0]))
    np.testing.assert_allclose(parts["kd"].item(), (of_map + of_tokens) / 2, rtol=1e-4)


def test_without_a_word_it_is_the_squared_distance_and_nothing_for_an_equal_teacher() -> None:
    student, images = backbone(), batch()[0]
    module = DistillationModule(student, backbone(1))
    assert module.hparams["kd"] == "squared"
    assert module.hparams["num_classes"] == 0
    for kind in ("cosine", "squared"):
        assert DistillationModule(student, backbone(0), kd=kind).loss_parts(images, None)["loss"].abs() < 1e-6


def test_logits_may_be_compared_as_they_are() -> None:
    student, teacher = network(0), network(1).eval()
    images, labels = batch()
    parts = DistillationModule(student, teacher, kd="squared", kd_weight=0.3).loss_parts(images, labels)
    kd, task = (student(images) - teacher(images)).square().mean(), nn.functional.cross_entropy(student(images), labels)
    torch.testing.assert_close(parts["loss"], 0.3 * kd + 0.7 * task)


def test_hidden_states_of_a_slim_backbone_are_matched() -> None:
    dense = network(0, num_classes=0)
    scores = mdc.score(dense, [batch(8)], dimensions=("heads", "neurons"))
    student = mdc.slim(dense, mdc.make_plan(dense, scores, mdc.Policy(heads=0.5, neurons=0.5)))
    images, _ = batch()
    weights = {"kd_weight": 0, "hidden_weight": 0.7}
    module = DistillationModule(student, dense, **weights)
    with module.training_form():
        parts = module.loss_parts(images, None)
    # The same blocks under heads of classes, whose hidden states tests/test_hidden_states.py holds to numpy.
    both = [network(0), slimmed(network(0))]
    for model, source in zip(both, (dense, student), strict=True):
        model.blocks, model.patch_embed = source.blocks, source.patch_embed
        model.cls_token, model.pos_embed = source.cls_token, source.pos_embed
    of_classes = DistillationModule(both[1], both[0], **weights)
    with of_classes.training_form():
        expected = of_classes.loss_parts(*batch())["hidden"]
    torch.testing.assert_close(parts["hidden"], expected)
    torch.testing.assert_close(parts["loss"], 0.7 * expected)


@pytest.mark.parametrize("labelled", [True, False])
def test_training_pulls_features_to_the_teachers_and_the_best_epoch_is_kept(labelled: bool, tmp_path: Path) -> None:
    student, teacher = backbone(0), backbone(1)
    data = loader() if labelled else DataLoader(batch(24)[0], batch_size=6)
    best = ModelCheckpoint(tmp_path, "best", monitor="val/kd", mode="min")
    run = trainer(tmp_path, max_epochs=6, callbacks=[best], enable_checkpointing=True)
    module = DistillationModule(student, teacher, kd_weight=1, optimizer={"lr": 1e-2}, schedule={"sched": "none"})
    before = float(run.validate(module, data, verbose=False)[0]["val/kd"])
    with torch.no_grad():
        expected = distance("squared", numbers(student.eval()(batch(24)[0])), numbers(teacher(batch(24)[0])))
    np.testing.assert_allclose(before, expected, rtol=1e-4)
    run.fit(module, data, data)
    metrics = run.callback_metrics
    assert {"train/kd", "train/loss", "val/kd"} <= set(metrics)
    assert not {name for name in metrics if "top1" in name or "task" in name}
    assert float(metrics["val/kd"]) < 0.8 * before
    assert set(run.test(module, data, verbose=False)[0]) == {"test/kd"}
    again = DistillationModule.load_from_checkpoint(best.best_model_path, student=backbone(5), teacher=teacher)
    np.testing.assert_allclose(
        float(run.test(again, data, verbose=False)[0]["test/kd"]), best.best_model_score, rtol=1e-4
    )
    assert torch.cat(run.predict(again, data)).shape == (24, 16)


def test_of_two_transformers_hidden_states_are_not_compared_and_outputs_are() -> None:
    two, images = nn.Sequential(backbone(0), nn.Identity(), nn.ModuleList([backbone(2)])), batch()[0]
    two.forward = two[0].forward  # type: ignore[method-assign]
    with pytest.raises(DistillationError, match=r"holds 2 vision transformers: .* Pass hidden_weight=0") as told:
        DistillationModule(two, backbone(1), kd="squared", hidden_weight=1)
    assert "say which" not in str(told.value)
    module = DistillationModule(two, backbone(1), kd="squared", num_classes=0, hidden_weight=0)  # as it advises
    torch.testing.assert_close(
        module.loss_parts(images, None)["kd"], (two[0](images) - backbone(1)(images)).square().mean()
    )


def test_a_distilled_student_gives_the_mean_of_its_tokens_while_it_is_trained() -> None:
    student, teacher = backbone(0, VisionTransformerDistilled), backbone(1, VisionTransformerDistilled).eval()
    images, _ = batch()
    module = DistillationModule(student.train(), teacher)
    expected = distance("squared", numbers(student.eval()(images)), numbers(teacher(images)))
    with module.training_form():
        np.testing.assert_allclose(module.loss_parts(images, None)["kd"].item(), expected, rtol=1e-4)


def test_tokens_that_left_are_restored_or_told() -> None:
    dense = backbone(0, global_pool="", depth=2)
    every = ("heads", "neurons", "tokens")
    scores = mdc.score(dense, [batch(8)], dimensions=every, prediction=lambda output: output.flatten(1))
    plans = {
        restore: mdc.make_plan(dense, scores, mdc.Policy(0.5, 0.5, 0.5), mdc.TokenOptions(restore=restore))
        for restore in (False, True)
    }
    images, _ = batch()
    fewer = DistillationModule(mdc.slim(dense, plans[False]), dense)
    with pytest.raises(DistillationError, match=r"\(6, 17, 16\).*cannot be compared.*TokenOptions\(restore=True\)"):
        fewer.loss_parts(images, None)
    student = mdc.slim(dense, plans[True])  # as it advises
    parts = DistillationModule(student, dense).loss_parts(images, None)
    np.testing.assert_allclose(parts["kd"].item(), distance("squared", *map(numbers, (student(images), dense(images)))))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kd": "soft"}, r"kd='soft' compares class probabilities.*kd='squared'"),
        ({"kd": "hard"}, "kd='hard' compares class probabilities"),
        ({"teacher": None}, "student=VisionTransformer has no classes .* no teacher"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1 is about labels"),
        ({"mixup": {"mixup_alpha": 0.8}}, "mixup=.*is about labels"),
        ({"kd_weight": 0}, "kd_weight=0 and hidden_weight=0 leave"),
        ({"teacher": network(0)}, "teacher=VisionTransformer has 3 classes where 0"),
        ({"num_classes": 3}, "student=VisionTransformer has 0 classes where 3"),
        (
            {"student": nn.Linear(2, 3), "teacher": nn.Linear(2, 3)},
            "num_classes=None.* or 0 where the output is features",
        ),
    ],
)
def test_what_makes_no_sense_without_classes_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(DistillationError, match=words):
        DistillationModule(**{"student": backbone(0), "teacher": backbone(1), **arguments})
