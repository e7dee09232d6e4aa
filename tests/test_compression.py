"""`mdc.compress`: the whole method in one line, held to its parts."""

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.errors import BudgetError, CalibrationError, CompensationError, CompressionError, MdcError
from tests.kinds import images, make

FEW: dict[str, Any] = {"n_trials": 4, "calibration": mdc.Calibration(images=16, judging=12)}


def batches() -> list[Tensor]:
    return list(images(40).split(10))


def test_it_is_the_sum_of_its_parts():
    model = make()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    found = mdc.compress(model, (batch for batch in batches()), budget=0.6, seed=3, **FEW)
    shown = images(40)
    scores = mdc.score(model, [shown[:10], shown[10:16]], "fisher")
    judge = mdc.HeldOut([shown[16:28]], dense=model)
    by_hand = mdc.search(model, scores, judge, 0.6, n_trials=4, seed=3, compensate="lstsq")
    assert [trial.policy for trial in found.search.history] == [trial.policy for trial in by_hand.history]
    assert found.search.value == pytest.approx(by_hand.value, rel=1e-4)
    assert found.policy.ratios == by_hand.policy.ratios
    assert found.plan == mdc.make_plan(model, scores, by_hand.policy)
    seen = [shown[:10], shown[10:16], shown[16:20], shown[20:28]]  # those that judged as well
    slim = mdc.slim(model, found.plan, "sequential", batches=seen)
    with torch.no_grad():
        torch.testing.assert_close(found.model.eval()(shown), slim.eval()(shown))
    assert mdc.macs(found.model) <= 0.6 * mdc.macs(model)
    assert found.scores.images == 16
    assert all(torch.equal(dense[name], value) for name, value in model.state_dict().items())


def test_images_of_another_size_are_priced_as_such(caplog):
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, num_classes=4, embed_dim=32, depth=3, num_heads=4, dynamic_img_size=True)
    large = torch.randn(24, 3, 48, 64)
    with caplog.at_level("INFO"):
        found = mdc.compress(model, large.split(8), n_trials=2)
    assert "images are of 48 x 64 pixels" in caplog.text
    assert found.policy.input_size == found.plan.input_size == found.search.policy.input_size == (48, 64)
    assert all(
        trial.macs == mdc.policy_macs(model, trial.policy, input_size=(48, 64)) <= 0.6 * mdc.macs(model, (48, 64))
        for trial in found.search.history
    )


def test_the_size_is_seen_where_only_a_part_of_the_transformer_is_called(caplog):
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = VisionTransformer(
                32, 8, num_classes=0, embed_dim=32, depth=3, num_heads=4, dynamic_img_size=True
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.net.forward_features(x)

    module = Features()
    with caplog.at_level("INFO"):
        found = mdc.compress(module, torch.randn(24, 3, 48, 64).split(8), n_trials=1)
    assert "images are of 48 x 64 pixels" in caplog.text
    assert mdc.macs(found.model, (48, 64)) <= 0.6 * mdc.macs(module.net, (48, 64))


def test_of_few_images_two_thirds_score(caplog):
    with caplog.at_level("INFO"):
        found = mdc.compress(make(), batches(), n_trials=1)
    assert found.scores.images == 27
    assert "of 40 images 27 are scored on and 13 judged on" in caplog.text


def test_a_killed_search_goes_on_from_its_journal(tmp_path):
    model, journal = make(), mdc.SearchOptions(journal=tmp_path / "trials.jsonl")
    first = mdc.compress(model, batches(), **FEW | {"n_trials": 2}, options=journal)
    whole = mdc.compress(model, batches(), **FEW, options=journal)
    assert whole.search.history[:2] == first.search.history
    assert len(whole.search.history) == 4


def test_the_transformer_in_a_module_is_judged_by_what_the_module_says():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": 2 * self.net(x)}

    module = Twice()
    found = mdc.compress(module, batches(), submodule="net", prediction=lambda o: o["logits"].softmax(-1), **FEW)
    assert found.search.value < 0
    assert isinstance(found.model, type(module.net))
    mine = mdc.compress(module.net, batches(), evaluate=lambda slim: -float(mdc.macs(slim)), **FEW)
    assert mine.search.best.macs == min(trial.macs for trial in mine.search.history)


@pytest.mark.parametrize("policy", ["uniform", mdc.Policy(heads=0.5, neurons=0.5)], ids=["uniform", "given"])
def test_without_a_search(policy):
    model = make()
    found = mdc.compress(model, batches(), policy=policy, compensate="none")
    assert found.search is None
    assert found.scores.images == 40
    expected = mdc.uniform_policy(model) if policy == "uniform" else policy
    assert found.plan == mdc.make_plan(model, found.scores, expected)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batches": []}, CalibrationError, "needs images"),
        ({"batches": 3}, CompressionError, "batches=3: expected a DataLoader"),
        ({"budget": 0.001}, BudgetError, "below the smallest reachable cost"),
        ({"policy": "uniform", "n_trials": 3}, CompressionError, "n_trials=3 is not looked at"),
        ({"policy": mdc.Policy(0.5), "budget": 0.3}, CompressionError, "budget=0.3 is not looked at"),
        ({"criterion": "magnitude", "policy": "uniform", "compensate": "none", "prediction": torch.sigmoid},
         CompressionError, "prediction=.* is not looked at"),
        ({"options": 3}, CompressionError, "options=3"),
        ({"calibration": 3}, CompressionError, "calibration=3"),
    ],
)  # fmt: skip
def test_wrong_arguments(options, error, words):
    with pytest.raises(error, match=words) as caught:
        mdc.compress(make(), **{"batches": batches(), **options})
    assert isinstance(caught.value, MdcError)


def test_a_refit_in_sequence_where_tokens_leave_already_is_refused_before_the_search():
    model = make()
    scores = mdc.score(model, [images(8)], progress=False)
    slim = mdc.slim(model, mdc.make_plan(model, scores, mdc.Policy(tokens=0.6)))

    def unread():
        raise AssertionError("no image is looked at")
        yield

    with pytest.raises(CompensationError, match=r"tokens leave .* already"):
        mdc.compress(slim, unread(), compensate="sequential", **FEW)
