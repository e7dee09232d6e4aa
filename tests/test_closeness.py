"""How far a model's output is from the dense model's: held to numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.errors import SearchError
from lightning_mdc.policy_search import closeness, held_out
from lightning_mdc.policy_search.held_out import HeldOut, InPlace
from tests.kinds import images, make


class Says(nn.Module):
    """Whatever it is told to say about images, whose number stands in their first pixel."""

    def __init__(self, answers: dict[str, Tensor] | Tensor) -> None:
        super().__init__()
        self.answers = answers

    def forward(self, x: Tensor) -> Any:
        rows = x[:, 0, 0, 0].long()
        return {n: t[rows] for n, t in self.answers.items()} if isinstance(self.answers, dict) else self.answers[rows]


def numbered(count: int) -> Tensor:
    return torch.arange(count).float()[:, None, None, None].expand(-1, 1, 2, 2)


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def relative_error(dense: np.ndarray, found: np.ndarray) -> float:
    return float(((found - dense) ** 2).sum() / ((dense - dense.mean()) ** 2).sum())


@pytest.mark.parametrize("limit", [2**30, 200], ids=["remembered", "looked at again"])
def test_outputs_of_any_shape_are_compared_by_their_squared_error(draw, limit, monkeypatch):
    monkeypatch.setattr(closeness, "_MEMORY_LIMIT", limit)
    dense = {"boxes": 3 + torch.randn(20, 7, 4, generator=draw), "mask": torch.randn(20, 1, 5, 5, generator=draw)}
    slim = {name: value + 0.1 * torch.randn(value.shape, generator=draw) for name, value in dense.items()}
    judge = HeldOut([numbered(20)], dense=Says(dense), batch_size=7)
    expected = np.mean([relative_error(dense[name].numpy(), slim[name].numpy()) for name in dense])
    assert judge(Says(slim)) == pytest.approx(-expected, rel=1e-4)
    assert judge(Says(dense)) == 0
    assert judge.judge(Says(slim)).facts == {}  # no divergence, no top-1


def test_a_prediction_says_what_is_compared(draw):
    dense, slim = (torch.randn(20, 3, generator=draw) for _ in range(2))
    p, q = dense.sigmoid().double().numpy(), slim.sigmoid().double().numpy()
    several = HeldOut([numbered(20)], "kl", dense=Says(dense), prediction=torch.sigmoid)  # three yes or no
    assert several(Says(slim)) == pytest.approx(-relative_error(p, q), rel=1e-4)
    of_logits = HeldOut([numbered(20)], dense=Says({"logits": dense}), prediction=lambda o: o["logits"].softmax(-1))
    plain = HeldOut([numbered(20)], dense=Says(dense))
    assert of_logits(Says({"logits": slim})) == pytest.approx(plain(Says(slim)), rel=1e-4)
    labels = torch.arange(20) % 3
    right = HeldOut([(numbered(20), labels)], "accuracy", prediction=lambda o: o["logits"].softmax(-1))
    assert right.judge(Says({"logits": slim})).facts["accuracy"] == (slim.argmax(1) == labels).double().mean().item()


def test_features_are_no_logits():
    """A backbone without a classifier gives (images, channels), too."""
    backbone = make()
    backbone.reset_classifier(0)  # type: ignore[operator]
    batch = images(12)
    small = mdc.slim(backbone, mdc.make_plan(backbone, mdc.score(backbone, [batch], "magnitude"), mdc.Policy(0.5)))
    with torch.no_grad():
        dense, found = backbone(batch).numpy(), small(batch).numpy()
    assert HeldOut([batch], dense=backbone)(small) == pytest.approx(-relative_error(dense, found), rel=1e-3)


def test_auto_is_accuracy_where_there_are_images_enough(monkeypatch):
    pair, model = (numbered(20), torch.arange(20) % 3), Says(torch.zeros(20, 3))
    assert HeldOut([pair]).metric == "accuracy"
    assert HeldOut([pair], dense=model).metric == "kl"
    monkeypatch.setattr(held_out, "_ENOUGH_FOR_TOP1", 20)
    assert HeldOut([pair], dense=model).metric == "accuracy"
    assert HeldOut([pair[0]], dense=model).metric == "kl"


def test_a_slim_model_stands_in_for_the_dense_one_and_leaves_its_place():
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(make(), backend="eager")
            self.same = self.net
            self.head = nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.net(x)) + 0 * self.same(x)[:, :2]

    holder, batch = Holder().train(), images(12)
    model, names = holder.net._orig_mod, list(holder.state_dict())
    plan = mdc.make_plan(model, mdc.score(model, [batch], "magnitude"), mdc.Policy(0.5))
    small = mdc.slim(model, plan).eval()
    judge = InPlace(holder, [batch[:8], batch[8:]], lambda module, part: module(part), lambda out: out.softmax(-1))
    with torch.no_grad():
        p = holder.eval().head(model(batch)).double().softmax(-1)
        q = holder.head(small(batch)).double().log_softmax(-1)
    holder.train()
    assert judge(small) == pytest.approx(-(p * (p.log() - q)).sum(-1).mean().item(), rel=1e-3)
    assert judge.images == 12
    assert judge.seconds > 0
    assert list(holder.state_dict()) == names
    assert holder.net is holder.same
    assert holder.training
    assert judge(model) == 0


@pytest.mark.parametrize("limit", [2**30, 0], ids=["remembered", "looked at again"])
def test_a_dense_model_that_is_being_trained_is_looked_at_as_it_is_used(limit, monkeypatch):
    """Its dropout takes no part, however often it is asked."""
    monkeypatch.setattr(closeness, "_MEMORY_LIMIT", limit)
    model, batch = make(), images(12)
    small = mdc.slim(model, mdc.make_plan(model, mdc.score(model, [batch], "magnitude"), mdc.Policy(0.5))).eval()
    with torch.no_grad():
        p, q = model(batch).double().softmax(-1), small(batch).double().log_softmax(-1)
    model.head_drop.p = 0.9
    holder = nn.Sequential(model).train()
    expected = pytest.approx(-(p * (p.log() - q)).sum(-1).mean().item(), rel=1e-3)
    assert InPlace(holder, [batch], lambda module, part: module(part))(small) == expected
    assert HeldOut([batch], dense=model)(small) == expected
    assert model.training


@pytest.mark.parametrize(
    ("dense", "slim", "words"),
    [
        ({"n": torch.arange(20)}, None, r"holds no float tensor.*pass prediction="),
        (
            {"y": torch.zeros(20, 4)},
            {"y": torch.zeros(20, 3)},
            r"shapes \[\(20, 3\)\], the dense model's \[\(20, 4\)\]",
        ),
    ],
)
def test_what_cannot_be_compared_is_said(dense, slim, words):
    with pytest.raises(SearchError, match=words):
        HeldOut([numbered(20)], "kl", dense=Says(dense))(Says(slim))


def test_variance_of_numbers_far_from_0_is_kept(draw):
    numbers = torch.randn(24, 5, generator=draw)
    expected = relative_error(numbers.double().numpy(), numbers.double().numpy() + 0.25)
    dense, found = Says(numbers + 1e4), Says(numbers + 1e4 + 0.25)
    judge = HeldOut([numbered(24)], "kl", dense=dense, prediction=lambda out: out)
    assert -judge(found) == pytest.approx(expected, rel=0.01)


def test_classes_that_cannot_be_say_nothing(draw):
    numbers = torch.randn(24, 5, generator=draw)
    without = numbers.clone()
    without[:, 2] = -torch.inf
    judge = HeldOut([numbered(24)], "kl", dense=Says(without))
    assert judge(Says(without)) == 0
    kept = [0, 1, 3, 4]
    p, q = (x[:, kept].log_softmax(-1).double() for x in (numbers, numbers.flip(0)))
    other = numbers.flip(0)
    other[:, 2] = -torch.inf
    assert -judge(Says(other)) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
