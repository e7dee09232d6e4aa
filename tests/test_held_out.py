"""What policies are judged by: `HeldOut` takes what a model says, its labels and its metric as they are given."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchmetrics.classification as of_classes
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, Metric

import lightning_mdc as mdc
from lightning_mdc.errors import CalibrationError, SearchError
from lightning_mdc.policy_search.held_out import HeldOut, InPlace
from tests.kinds import CLASSES, images, make

X, LABELS = images(40), torch.arange(40) % CLASSES


class Ending(nn.Module):
    """A network that ends in something of its own."""

    def __init__(self, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.what = make(), what

    def forward(self, x: Tensor) -> Tensor:
        return self.what(self.net(x))


def batches(labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(16), labels.split(16), strict=True))


@pytest.mark.parametrize("what", [lambda x: x.softmax(-1), lambda x: x.log_softmax(-1)], ids=["softmax", "log"])
def test_a_softmax_built_in_is_not_taken_twice(what: Callable[[Tensor], Tensor]) -> None:
    model = Ending(what)
    with torch.no_grad():
        expected = F.cross_entropy(model.net(X), LABELS)
    assert HeldOut(batches(LABELS), "loss")(model) == pytest.approx(-float(expected), abs=1e-5)


def test_models_that_end_in_a_softmax_are_compared_as_distributions() -> None:
    model = Ending(lambda x: x.softmax(-1))
    plan = mdc.make_plan(model.net, mdc.score(model.net, [X], progress=False), mdc.Policy(heads=0.5))
    slim = Ending(model.what)
    slim.net = mdc.slim(model.net, plan)
    with torch.no_grad():
        logs = [net(X).log_softmax(-1) for net in (slim.net, model.net)]
        kl = F.kl_div(*logs, log_target=True, reduction="batchmean")
    assert HeldOut(batches(LABELS), "kl", dense=model)(slim) == pytest.approx(-float(kl), rel=1e-3)


def test_a_sigmoid_built_in_has_no_cross_entropy() -> None:
    model = Ending(torch.sigmoid)
    with pytest.raises(SearchError, match=r"a sigmoid.*prediction="):
        HeldOut(batches(LABELS), "loss")(model)
    HeldOut(batches(LABELS), "accuracy")(model)  # the order is that of the logits


def test_logits_of_a_few_images_may_lie_between_0_and_1() -> None:
    model = Ending(lambda x: x if x.shape[0] > 1 else x.sigmoid())  # the last batch, of one image
    assert math.isfinite(HeldOut(batches(LABELS), "loss", batch_size=len(X) - 1)(model))
    with pytest.raises(SearchError, match="a sigmoid"):
        HeldOut(batches(LABELS), "loss", batch_size=1)(model)


@pytest.mark.parametrize(
    ("metric", "labels", "what", "prediction", "direct"),
    [
        (MeanSquaredError, torch.randn(40, 2), lambda x: x[:, :2], None, lambda x: x[:, :2]),
        (MeanSquaredError, torch.randn(40), lambda x: x[:, 0], None, lambda x: x[:, 0]),
        (
            lambda: of_classes.MultilabelAveragePrecision(CLASSES),
            torch.rand(40, CLASSES).round().long(),
            torch.sigmoid,
            None,
            torch.sigmoid,
        ),
        (
            of_classes.BinaryAccuracy,
            LABELS % 2,
            lambda x: x[:, :1],
            lambda x: x[:, 0].sigmoid(),
            lambda x: x[:, 0].sigmoid(),
        ),
        (
            lambda: of_classes.MulticlassAccuracy(CLASSES, ignore_index=255),
            LABELS.where(LABELS > 1, 255),
            lambda x: x,
            None,
            lambda x: x,
        ),
        (
            lambda: of_classes.MulticlassCalibrationError(CLASSES),
            LABELS,
            lambda x: x.softmax(-1),
            None,
            lambda x: x.softmax(-1),
        ),
    ],
    ids=["regression", "one number", "multi-label", "one logit", "ignored labels", "softmax built in"],
)
def test_a_metric_is_given_what_it_reads(
    metric: Callable[[], Metric],
    labels: Tensor,
    what: Callable[[Tensor], Tensor],
    prediction: Callable[[Tensor], Tensor] | None,
    direct: Callable[[Tensor], Tensor],
) -> None:
    model, by_hand = Ending(what), metric()
    with torch.no_grad():
        by_hand.update(direct(model.net(X)).contiguous(), labels)
    value = HeldOut(batches(labels), metric(), prediction=prediction)(model)
    sign = -1 if by_hand.higher_is_better is False else 1
    assert value == pytest.approx(sign * float(by_hand.compute()), abs=1e-6)


@pytest.mark.parametrize(
    ("labels", "metric", "reason"),
    [
        (LABELS - 1, "accuracy", "labels -1 to 5, .*leave out"),
        (LABELS.where(LABELS > 0, 255), "loss", "labels 1 to 255"),
        (torch.rand(40, CLASSES).round(), "loss", r"labels \(40, 7\).*one class number"),
        (torch.rand(40), "accuracy", "torch.float32: metric='accuracy' needs one class number"),
        (LABELS.where(LABELS > 0, 255), of_classes.MulticlassAccuracy(CLASSES), "cannot be computed of labels"),
        (torch.rand(40, 3), MeanSquaredError(), "cannot be computed of labels"),
    ],
    ids=["-1", "255", "several", "numbers", "metric", "shapes"],
)
def test_labels_that_do_not_fit_are_said(labels: Tensor, metric: str | Metric, reason: str) -> None:
    with pytest.raises(SearchError, match=reason):
        HeldOut(batches(labels), metric)(make())


def test_one_logit_is_pointed_to_a_metric_of_one() -> None:
    with pytest.raises(SearchError, match="BinaryAccuracy"):
        HeldOut(batches(LABELS % 2), "accuracy")(Ending(lambda x: x[:, :1]))


def test_labels_do_not_matter_where_outputs_are_compared() -> None:
    dense = make()
    for labels in (LABELS - 1, LABELS.where(LABELS > 0, 255)):
        judgement = HeldOut(batches(labels), dense=dense).judge(dense)
        assert judgement.value == pytest.approx(0, abs=1e-9)
        assert "accuracy" not in judgement.facts


def test_images_are_of_one_size() -> None:
    with pytest.raises(SearchError, match=r"images of \(3, 48, 48\) after \(3, 32, 32\)"):
        HeldOut([(X, LABELS), (torch.randn(4, 3, 48, 48), LABELS[:4])])


@pytest.mark.parametrize("of", [lambda p: p, lambda p: p[:, 0]], ids=["column", "row"])
def test_one_number_says_how_probable_the_second_class_is(of: Callable[[Tensor], Tensor]) -> None:
    model, labels = Ending(lambda x: x[:, :1]), LABELS % 2
    with torch.no_grad():
        p = model(X)[:, 0].sigmoid()
    loss = HeldOut(batches(labels), "loss", prediction=lambda out: of(out.sigmoid()))(model)
    assert loss == pytest.approx(-float(F.binary_cross_entropy(p, labels.float())), abs=1e-6)
    judged = HeldOut(batches(labels), "accuracy", prediction=lambda out: of(out.sigmoid())).judge(model)
    assert judged.facts["accuracy"] == ((p > 0.5) == labels).double().mean().item()


def test_yes_or_no_for_each_class_is_compared_as_such() -> None:
    dense, small = make(), make()
    with torch.no_grad():
        small.head.weight.mul_(0.5)
    several = (torch.arange(40)[:, None] >> torch.arange(CLASSES)) % 2
    ours = HeldOut(batches(several), "kl", dense=dense)(small)
    assert ours == pytest.approx(HeldOut([X], "kl", dense=dense, prediction=torch.sigmoid)(small), rel=1e-5)
    judge = InPlace(dense, [(X, several)], lambda module, batch: module(batch[0]))
    assert judge(small) == pytest.approx(ours, rel=1e-5)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ((X, LABELS[:10]), r"labels of shape \(10,\) for 40 images"),
        ((X[:1], LABELS[0]), r"labels of shape \(\) for 1 images"),
        ((X, ["cat"] * 40), "needs labels"),
        ((X, {"boxes": LABELS}), "needs labels"),
        ({"image": X, "label": LABELS}, r"batches of dict.*batch\['image'\]"),
        ((), "batches of tuple"),
        ((X.where(torch.arange(40)[:, None, None, None] > 0, torch.nan), LABELS), "hold NaN"),
    ],
    ids=["bags", "a scalar", "names", "boxes", "dict", "nothing", "NaN"],
)
def test_batches_that_cannot_be_judged_on_are_said(batch: object, reason: str) -> None:
    with pytest.raises(SearchError, match=reason):
        HeldOut([batch])


def test_names_are_no_labels_but_no_obstacle() -> None:
    dense = make()
    assert HeldOut([(X, ["cat"] * 40)], dense=dense)(dense) == pytest.approx(0, abs=1e-9)


def test_predictions_are_one_of_each_image_and_probabilities() -> None:
    bags = Ending(lambda x: x.view(-1, 4, CLASSES).mean(dim=1))
    with pytest.raises(SearchError, match="10 predictions of 40"):
        HeldOut([(X, LABELS)], "accuracy")(bags)
    with pytest.raises(SearchError, match="prediction= makes numbers from -"):
        HeldOut([(X, LABELS)], "loss", prediction=lambda logits: logits)(make())


def test_images_that_are_all_alike_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="all 8 held-out images are alike"):
        HeldOut([(torch.zeros(8, 3, 32, 32), LABELS[:8])])


def test_bytes_are_no_images() -> None:
    with pytest.raises(CalibrationError, match=r"cannot be run on a batch .* of torch.uint8"):
        HeldOut([(X.to(torch.uint8), LABELS)])(make())


def test_a_module_around_the_transformer_is_not_compared_with_the_transformer_alone() -> None:
    model = Ending(torch.sigmoid)
    judge = HeldOut(batches(LABELS), "kl", dense=model)
    assert judge(model) == pytest.approx(0, abs=1e-6)
    with pytest.raises(SearchError, match=r"holds the vision transformer.*the transformer itself as dense="):
        judge(model.net)


def test_labels_of_several_classes_that_are_floats_are_told_what_to_become() -> None:
    metric = of_classes.MultilabelAveragePrecision(CLASSES)
    with pytest.raises(SearchError, match=r"make labels integers, labels\.long\(\)"):
        HeldOut(batches(torch.rand(40, CLASSES).round()), metric)(Ending(torch.sigmoid))
