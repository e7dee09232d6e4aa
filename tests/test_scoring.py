"""Scoring as a whole: what it leaves behind (nothing), how batches are cut, the baselines, files."""

import random
import warnings
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import tv_tensors

import lightning_mdc as mdc
from lightning_mdc.errors import CalibrationError, UnsupportedModelError
from lightning_mdc.importance import (
    Calibration,
    ConditionalDependence,
    Criterion,
    Scorer,
    UnitGroup,
    as_criterion,
    criteria,
    register,
)
from lightning_mdc.models import find_anatomy
from tests.kinds import CLASSES, images, make

RAW = mdc.HSIC(hsic_weight=1, activation_weight=0)


def traces(model: nn.Module) -> tuple[object, ...]:
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    rng = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    gradients = [p.grad is None for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    return modes, hooks, rng, gradients, torch.cat([w.flatten() for w in weights]).tolist()


@pytest.mark.parametrize("criterion", ["hsic", "conditional", "activation", "taylor", "magnitude", "random"])
def test_nothing_is_left_behind(criterion: str) -> None:
    model = make().train()
    model.blocks[1].eval()  # an odd mode has to come back as well
    labels = torch.arange(32) % CLASSES
    loader = DataLoader(TensorDataset(images(32), labels), batch_size=8, shuffle=True)  # draws from the global stream
    before = traces(model)
    scores = mdc.score(model, loader, criterion, progress=False)
    assert traces(model) == before
    assert [s.shape for s in scores.heads] == [(4,)] * 4
    assert [s.shape for s in scores.neurons] == [(192,)] * 4
    assert [s.shape for s in scores.tokens] == [(16,)] * 3


@pytest.mark.parametrize("criterion", ["hsic", "taylor"])
def test_nothing_is_left_behind_by_an_interruption(criterion: str) -> None:
    model = make().train()
    before = traces(model)

    def interrupted() -> Iterator[tuple[Tensor, Tensor]]:
        yield images(8), torch.zeros(8, dtype=torch.long)
        torch.rand(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mdc.score(model, interrupted(), criterion, progress=False)
    assert traces(model) == before


def test_other_peoples_hooks_stay() -> None:
    model, calls = make(), []
    model.blocks[0].mlp.fc2.register_forward_pre_hook(lambda *_: calls.append(1))
    mdc.score(model, [images(8)], progress=False)
    model(images(1))
    assert len(calls) == 2


def test_a_compiled_model_is_scored_like_the_original() -> None:
    model, batch = make(), images(8)
    expected = mdc.score(model, [batch], RAW, progress=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(batch)  # compiled code exists: probes put on now would not be seen by it
    scores = mdc.score(compiled, [batch], RAW, progress=False)
    for mine, theirs in zip(scores.neurons, expected.neurons, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("plan", [mdc.Policy(neurons=0.5), mdc.Policy(tokens=0.5)], ids=["neurons", "tokens"])
def test_a_masked_model_is_refused(plan: mdc.Policy) -> None:
    """What is masked would score 0, without a word."""
    model = make()
    plan = mdc.make_plan(model, mdc.score(model, criterion="random"), plan)
    for scored in (model, nn.ModuleDict({"backbone": model})):
        with (
            mdc.masked(model, plan),
            pytest.raises(CalibrationError, match=r"VisionTransformer has masks on.*score it"),
        ):
            mdc.score(scored, [images(8)], progress=False)
    assert mdc.score(model, [images(8)], progress=False).neurons[0].min() > 0


def test_batches_are_cut_to_one_size_and_a_small_rest_is_dropped() -> None:
    model, pool = make(), images(27)
    even = mdc.score(model, [pool[:8], pool[8:16], pool[16:24]], RAW, progress=False)
    ragged = mdc.score(model, [pool[:8], pool[8:19], pool[19:27]], RAW, progress=False)  # 3 of 8 are left over
    assert ragged.images == 24
    for mine, theirs in zip(even.neurons, ragged.neurons, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert mdc.score(model, [pool[:8], pool[8:12]], RAW, progress=False).images == 12  # half a batch still counts
    assert mdc.score(model, [pool[:8], pool[8:13]], "activation", progress=False).images == 13  # compares no batches


@pytest.mark.parametrize("criterion", ["hsic", "conditional"])
def test_memory_is_bounded_by_looking_twice(criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, calls = make(), [images(8, seed=s) for s in range(2)], []
    model.register_forward_hook(lambda *_: calls.append(1))

    def scored() -> mdc.Scores:
        calls.clear()
        scorer = Scorer(find_anatomy(model), as_criterion(criterion))
        with scorer.watching():
            for batch in batches:
                scorer.update(lambda batch=batch: model(batch), len(batch))
        return scorer.scores()

    at_once = scored()
    assert len(calls) == 2
    monkeypatch.setattr("lightning_mdc.importance.scoring._MEMORY_LIMIT", 10_000)
    twice = scored()
    assert len(calls) == 4  # two passes for each batch
    for d in ("heads", "neurons", "tokens"):
        for mine, theirs in zip(getattr(twice, d), getattr(at_once, d), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_taylor_is_the_first_order_change_of_the_loss() -> None:
    model, batch, labels = make().double(), images(5).double(), torch.tensor([0, 3, 1, 6, 2])
    scores = mdc.score(model, [(batch, labels)], "taylor", progress=False)

    def losses(neuron: int, scale: float) -> Tensor:
        def rescale(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            x = args[0].clone()
            x[..., neuron] *= scale
            return (x,)

        handle = model.blocks[2].mlp.fc2.register_forward_pre_hook(rescale)
        with torch.no_grad():
            result = torch.nn.functional.cross_entropy(model(batch), labels, reduction="none")
        handle.remove()
        return result

    for neuron in (0, 17, 100):
        slope = (losses(neuron, 1 + 1e-5) - losses(neuron, 1 - 1e-5)) / 2e-5
        assert scores.neurons[2][neuron].item() == pytest.approx(slope.abs().mean().item(), rel=1e-4)


def test_taylor_works_on_frozen_weights_and_needs_labels() -> None:
    model = make().requires_grad_(False)
    labels = torch.zeros(6, dtype=torch.long)
    assert mdc.score(model, [(images(), labels)], "taylor", progress=False).neurons[0].sum() > 0
    with pytest.raises(CalibrationError, match="'taylor' needs labels"):
        mdc.score(model, [images()], "taylor", progress=False)


def test_magnitude_is_the_norm_of_all_weights_of_a_unit() -> None:
    model = make("swiglu")
    scores = mdc.score(model, criterion="magnitude")
    mlp, attn = model.blocks[1].mlp, model.blocks[1].attn
    expected = (
        mlp.fc1_g.weight[5].square().sum() + mlp.fc1_x.weight[5].square().sum() + mlp.fc2.weight[:, 5].square().sum()
    ).sqrt()
    assert scores.neurons[1][5].item() == pytest.approx(expected.item(), rel=1e-5)
    q, k, v = (attn.qkv.weight[part * 48 + 24 : part * 48 + 36] for part in range(3))  # head 2 of width 12
    expected = sum(part.square().sum() for part in (q, k, v, attn.proj.weight[:, 24:36])) ** 0.5
    assert scores.heads[1][2].item() == pytest.approx(expected.item(), rel=1e-5)


def test_random_follows_its_seed() -> None:
    from lightning_mdc.importance.criteria import Random

    model = make()
    first, again, other = (mdc.score(model, criterion=Random(seed)).neurons[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_precision_of_the_trainer_fp32_sums() -> None:
    model, batch = make(), images(16)
    exact = mdc.score(model, [batch], RAW, progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        rough = mdc.score(model, [batch], RAW, progress=False)
    assert rough.neurons[1].dtype == torch.float32
    correlation = torch.corrcoef(torch.stack([exact.neurons[1], rough.neurons[1]]))[0, 1]
    assert 0.9 < correlation < 1  # bf16 activations, fp32 sums


def test_scores_survive_a_file(tmp_path: object) -> None:
    path = tmp_path / "scores.safetensors"  # type: ignore[operator]
    scores = mdc.score(make(), [images(8)], progress=False)
    scores.save(path)
    loaded = mdc.Scores.load(path)
    assert (loaded.stages, loaded.criterion, loaded.images) == ((1, 2, 3), "conditional", 8)
    for d in ("heads", "neurons", "tokens"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(scores, d), getattr(loaded, d), strict=True))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CalibrationError, match="cannot be read"):
        mdc.Scores.load(path)


def test_a_broken_model_is_not_scored_in_silence() -> None:
    model = make()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[3] = float("nan")
    with pytest.raises(CalibrationError, match="not finite"):
        mdc.score(model, [images(8)], progress=False)


# --- what a criterion needs, and what it does not ---------------------------------------------------------------------


class Features(nn.Module):
    """A model around the transformer that puts out no logits."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.backbone, self.output = make(), output

    def forward(self, x: Tensor) -> object:
        self.backbone(x)
        return self.output


@pytest.mark.parametrize("output", [None, {"boxes": torch.zeros(1)}, torch.zeros(3, 7)])
def test_no_output_is_looked_at_unless_it_is_needed(output: object) -> None:
    model, batch, units = Features(output), images(3), ("heads", "neurons")
    for criterion in ("conditional", "activation"):
        found = mdc.score(model, [batch], criterion, dimensions=units, progress=False)
        wanted = mdc.score(model.backbone, [batch], criterion, dimensions=units, progress=False)
        assert (found.images, found.tokens) == (3, [])
        assert all(torch.equal(*pair) for pair in zip(found.neurons, wanted.neurons, strict=True))
    mdc.score(model, [batch], "activation", progress=False)  # nor for tokens


def test_batches_of_one_image_do_unless_dependence_on_the_prediction_is_estimated() -> None:
    model, batch = make(), images(6)
    ones = list(batch.split(1))
    for criterion, dimensions in (("activation", None), ("conditional", ("heads", "neurons"))):
        alone = mdc.score(model, ones, criterion, dimensions=dimensions, progress=False)
        together = mdc.score(model, [batch], criterion, dimensions=dimensions, progress=False)
        assert alone.images == 6
        # Not neurons by `conditional`: there are more of them than rows, so that the order is one of many.
        for dimension in ("heads", "neurons") if criterion == "activation" else ("heads",):
            for mine, theirs in zip(alone.units(dimension), together.units(dimension), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    for criterion in ("hsic", "conditional"):
        with pytest.raises(CalibrationError, match=f"criterion='{criterion}' needs images.*batches of at least 4"):
            mdc.score(model, ones[:3], criterion, progress=False)


def test_batches_too_small_for_hsic_are_put_together() -> None:
    model, batch = make(), images(70)
    small = mdc.score(model, batch.split(2), "hsic", progress=False)
    large = mdc.score(model, [batch[:32], batch[32:64]], "hsic", progress=False)
    assert small.images == large.images == 64  # six are less than half of what belongs together
    for mine, theirs in zip([*small.heads, *small.neurons], [*large.heads, *large.neurons], strict=True):
        assert torch.equal(mine, theirs)
    assert mdc.score(model, batch[:6].split(2), "hsic", progress=False).images == 6


class Headed(nn.Module):
    """A module whose output is not what the transformer in it says."""

    def __init__(self, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder, self.what = make(), what

    def forward(self, x: Tensor) -> Tensor:
        return self.what(self.encoder(x))


@pytest.mark.parametrize(
    "what", [lambda x: 2 * x, lambda x: x.sigmoid(), lambda x: x[:, :1]], ids=["twice", "sigmoid", "one"]
)
def test_only_what_a_known_classifier_has_said_is_softmaxed(what: Callable[[Tensor], Tensor]) -> None:
    batch = images(16)
    own = mdc.score(Headed(what), [batch], "hsic", progress=False)
    given = mdc.score(Headed(what), [batch], "hsic", prediction=lambda output: output, progress=False)
    logits = mdc.score(Headed(lambda x: x), [batch], "hsic", progress=False)
    probabilities = mdc.score(make(), [batch], "hsic", prediction=lambda x: x.softmax(-1), progress=False)
    for mine, theirs, known, expected in zip(own.heads, given.heads, logits.heads, probabilities.heads, strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(known, expected)
        assert not torch.equal(mine, known)


def test_two_outputs_that_move_together_are_no_noise() -> None:
    """Of both a softmax is all but constant, and nothing would depend on it."""
    together = Headed(lambda x: x[:, :1].expand(-1, 2) + torch.tensor([0.0, 1e-6]))
    raw = mdc.HSIC(1, 0, 0)
    own = torch.cat(mdc.score(together, [images(32)], raw, progress=False).heads)
    softmax = mdc.score(together, [images(32)], raw, prediction=lambda x: x.softmax(-1), progress=False)
    assert own.max() > 1e4 * torch.cat(softmax.heads).abs().max()
    twice = mdc.score(Headed(lambda x: 2**0.5 * x[:, :1]), [images(32)], raw, progress=False)
    torch.testing.assert_close(own, torch.cat(twice.heads), rtol=1e-2, atol=1e-9)


def test_taylor_takes_a_loss_of_ones_own() -> None:
    model, batch = make(), images(16)
    labels = torch.arange(16) % 7
    pairs = [(batch[:8], labels[:8]), (batch[8:], labels[8:])]
    own = mdc.Taylor(loss=lambda output, given: F.cross_entropy(output, given[1], reduction="sum"))
    found, known = (mdc.score(model, pairs, each, progress=False) for each in (own, "taylor"))
    for mine, theirs in zip([*found.heads, *found.neurons], [*known.heads, *known.neurons], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    features = make()
    features.reset_classifier(0)  # type: ignore[operator]
    squares = mdc.Taylor(loss=lambda output, given: output.square().mean())
    scores = mdc.score(features, [batch], squares, dimensions=("heads", "neurons"), progress=False)
    assert all(values.min() >= 0 and values.max() > 0 for values in scores.heads)
    with pytest.raises(CalibrationError, match="loss gave int that no gradients lead from"):
        mdc.score(model, pairs, mdc.Taylor(loss=lambda output, given: 3), progress=False)
    with pytest.raises(CalibrationError, match="loss=3: expected a function of"):
        mdc.Taylor(loss=3)  # type: ignore[arg-type]


@pytest.fixture
def registered() -> Iterator[None]:
    before = dict(criteria.CRITERIA)
    yield
    criteria.CRITERIA.clear()
    criteria.CRITERIA.update(before)


@pytest.mark.usefixtures("registered")
def test_a_criterion_of_ones_own() -> None:
    @register
    class Variance(Criterion):
        """Variance of a neuron over images and tokens."""

        name = "variance"
        dimensions = ("neurons",)

        def observe(self, activations: Tensor, group: UnitGroup) -> dict[str, Tensor]:
            z = activations.flatten(0, 1)[..., 0].double()
            return {"sum": z.sum(dim=0), "squares": z.square().sum(dim=0), "rows": torch.tensor(float(len(z)))}

        def finish(self, sums: Mapping[str, Tensor], group: UnitGroup) -> Tensor:
            return sums["squares"] / sums["rows"] - (sums["sum"] / sums["rows"]).square()

    model, batches = make(), [images(5, seed=1), images(2, seed=2)]
    scores = mdc.score(model, batches, "variance", moments=True, progress=False)
    assert (scores.criterion, scores.heads, scores.tokens, scores.stages) == ("variance", [], [], ())
    for found, layer in zip(scores.neurons, scores.moments.layers["neurons"], strict=True):
        torch.testing.assert_close(found, layer.covariance().diagonal().float(), rtol=1e-4, atol=1e-6)
    assert mdc.make_plan(model, scores, mdc.Policy(neurons=0.5)).neurons[0]
    with pytest.raises(CalibrationError, match="criterion='variance' scores neurons only"):
        mdc.score(model, batches, "variance", dimensions=("heads", "neurons"))


def test_a_block_without_units_has_empty_scores() -> None:
    """A block with a foreign MLP keeps its place in the lists."""
    model = make()
    model.blocks[2].mlp = nn.Sequential(nn.Linear(48, 60), nn.GELU(), nn.Linear(60, 48))
    for criterion in ("conditional", "magnitude"):
        scores = mdc.score(model, [images(8)], criterion, progress=False)
        assert [len(each) for each in scores.neurons] == [192, 192, 0, 192]
        assert [len(each) for each in scores.heads] == [4] * 4
    plan = mdc.make_plan(model, mdc.score(model, [images(8)], progress=False), mdc.Policy(neurons=0.5))
    assert [len(each) for each in plan.neurons] == [96, 96, 0, 96]


def test_calibration_checks_its_numbers() -> None:
    assert Calibration() == Calibration(images=512, judging=512, batch_size=None)
    for wrong in ({"images": 0}, {"judging": 1.5}, {"batch_size": -1}):
        ((name, value),) = wrong.items()
        with pytest.raises(CalibrationError, match=f"{name}={value}: expected a whole number of at least 1"):
            Calibration(**wrong)


def test_features_are_taken_as_they_are_where_there_is_no_classifier() -> None:
    model, batch = make(), images(8)
    model.reset_classifier(0)
    seen = mdc.score(model, [batch], "hsic", dimensions=("neurons",), progress=False)
    given = mdc.score(model, [batch], "hsic", dimensions=("neurons",), prediction=lambda x: x, progress=False)
    assert torch.equal(seen.neurons[0], given.neurons[0])
    with pytest.raises(CalibrationError, match="is not known to be classes"):
        mdc.score(model, [(batch, torch.zeros(8).long())], "taylor", progress=False)


@pytest.mark.parametrize("criterion", ["hsic", "magnitude", "conditional", "activation"])
def test_a_slim_model_that_has_none_left_somewhere_is_scored(criterion: str) -> None:
    model = make()
    policy = mdc.Policy(heads=[0, 1, 1, 1], neurons=[1, 0, 1, 1])
    slim = mdc.slim(model, mdc.make_plan(model, mdc.score(model, (), "random"), policy))
    scores = mdc.score(slim, [images(8)], criterion, progress=False)
    assert [len(values) for values in scores.heads] == [0, 4, 4, 4]
    assert [len(values) for values in scores.neurons] == [192, 0, 192, 192]


def test_options_of_the_wrong_kind_are_told() -> None:
    model = make()
    with pytest.raises(CalibrationError, match="moment_tokens=4: no moments"):
        mdc.score(model, [images(8)], "hsic", moment_tokens=4, progress=False)
    with pytest.raises(mdc.errors.PolicyError, match=r"space=\{.*expected a Space"):
        mdc.uniform_policy(model, 0.6, space={"min_heads": 1})  # type: ignore[arg-type]
    with pytest.raises(mdc.errors.PlanError, match="tokens='fuse': expected a TokenOptions"):
        mdc.uniform_policy(model, 0.6, tokens="fuse")  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="is unknown"):
        mdc.score(model, [images(8)], ["hsic"])  # type: ignore[arg-type]


# --- rows and calls: whose prediction is whose ------------------------------------------------------------------------


class Views(nn.Module):
    """Makes images of one input in a way of its own, and one prediction of what is said of them."""

    def __init__(self, net: nn.Module, how: str) -> None:
        super().__init__()
        self.net, self.how = net, how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "two calls":
            return self.net(x) + self.net(x.flip(-1))
        seen = self.seen(x)
        return self.net(seen).view(-1, *((2, CLASSES) if self.how == "crops" else (4, CLASSES))).mean(dim=1)

    def seen(self, x: Tensor) -> Tensor:
        """All that the transformer sees of a batch."""
        return torch.cat([x, x.flip(-1)]) if self.how in ("crops", "two calls") else x.flatten(0, -4)


@pytest.mark.parametrize("criterion", ["conditional", "activation", RAW], ids=["conditional", "activation", "hsic"])
@pytest.mark.parametrize("how", ["crops", "bags", "clips"])
def test_more_images_than_predictions_count_for_what_is_said_of_each(how: str, criterion: object) -> None:
    net = make()
    module, x = Views(net, how), images(16).view(4, 4, 3, 32, 32) if how == "clips" else images(16)
    ours = mdc.score(module, [x], criterion, progress=False)
    plain = mdc.score(net, [module.seen(x)], criterion, progress=False)
    for one, other in zip((*ours.heads, *ours.neurons), (*plain.heads, *plain.neurons), strict=True):
        torch.testing.assert_close(one, other)


def test_each_of_several_calls_counts() -> None:
    net = make()
    module, x = Views(net, "two calls"), images(8)
    for criterion in ("conditional", "activation"):
        ours = mdc.score(module, [x], criterion, progress=False)
        both = mdc.score(net, [x, x.flip(-1)], criterion, progress=False)
        torch.testing.assert_close(torch.cat(ours.neurons), torch.cat(both.neurons))
    seen = {}  # HSIC of either call with the prediction that was made of both
    for name, images_of_call in (("first", x), ("second", x.flip(-1))):
        seen[name] = mdc.score(net, [images_of_call], RAW, prediction=lambda _: module(x), progress=False)
    ours = mdc.score(module, [x], RAW, progress=False)
    expected = [(one + other) / 2 for one, other in zip(seen["first"].neurons, seen["second"].neurons, strict=True)]
    torch.testing.assert_close(torch.cat(ours.neurons), torch.cat(expected))


def test_taylor_adds_up_what_a_unit_does_in_all_calls() -> None:
    module, x = Views(make(), "two calls"), images(6)
    labels = torch.arange(6) % CLASSES
    found = mdc.score(
        module,
        [(x, labels)],
        mdc.Taylor(loss=lambda out, batch: F.cross_entropy(out, batch[1], reduction="sum")),
        progress=False,
    ).neurons[2]
    gate = torch.ones(6, 1, found.numel(), requires_grad=True)
    handle = module.net.blocks[2].mlp.fc2.register_forward_pre_hook(lambda _, args: (args[0] * gate,))
    F.cross_entropy(module(x), labels, reduction="sum").backward()
    handle.remove()
    torch.testing.assert_close(found, gate.grad[:, 0].abs().mean(dim=0))


def test_rows_that_nobody_can_tell_apart_are_refused() -> None:
    net = make()
    with pytest.raises(CalibrationError, match=r"given 16 images in a call, of which 8 predictions.*leave prediction="):
        mdc.score(Views(net, "crops"), [images(8)], "hsic", prediction=lambda x: x.softmax(-1), progress=False)

    class Parts(Views):
        def forward(self, x: Tensor) -> Tensor:
            return self.net.forward_features(self.seen(x)).mean(dim=1).view(-1, 2, 48).mean(dim=1)

    with pytest.raises(CalibrationError, match="call the transformer itself"):
        mdc.score(Parts(net, "crops"), [images(8)], "hsic", progress=False)


class Parts(nn.Module):
    """Gives the transformer its images in parts, or an image to compare with, too."""

    def __init__(self, how: str, size: int = 6) -> None:
        super().__init__()
        self.net, self.how, self.size = make(), how, size

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "beside one":
            return self.net(x) - self.net(x[:1])
        if self.how == "by a method":
            return self.net(x) + self.net.forward_head(self.net.forward_features(x.flip(-1)))
        return torch.cat([self.net(part) for part in x.split(self.size)])


@pytest.mark.parametrize("prediction", [None, torch.tanh])
def test_parts_of_a_batch_are_tied_to_their_own_predictions(prediction: Callable[[Tensor], Tensor] | None) -> None:
    module, x = Parts("parts"), images(12)
    ours = mdc.score(module, [x], RAW, prediction=prediction, progress=False)
    parts = mdc.score(module.net, x.split(6), RAW, prediction=prediction, progress=False)
    torch.testing.assert_close(torch.cat(ours.neurons), torch.cat(parts.neurons))


def test_taylor_keeps_images_of_different_parts_apart() -> None:
    module, batch = Parts("parts"), (images(12), torch.arange(12) % CLASSES)
    loss = mdc.Taylor(loss=lambda out, batch: F.cross_entropy(out, batch[1], reduction="sum"))
    ours, whole = (mdc.score(each, [batch], loss, progress=False) for each in (module, module.net))
    torch.testing.assert_close(torch.cat(ours.neurons), torch.cat(whole.neurons))


def test_a_call_on_fewer_images_than_needed_is_passed_over() -> None:
    module, x = Parts("beside one"), images(8)
    ours = mdc.score(module, [x], RAW, progress=False)
    alone = mdc.score(module.net, [x], RAW, prediction=lambda _: module(x), progress=False)
    torch.testing.assert_close(torch.cat(ours.neurons), torch.cat(alone.neurons))
    with pytest.raises(CalibrationError, match=r"8 images VisionTransformer is given 2 at a time.*'activation'"):
        mdc.score(Parts("parts", size=2), [x], "hsic", progress=False)
    mdc.score(Parts("parts", size=2), [x], "activation", progress=False)


def test_a_call_of_a_method_beside_one_of_the_whole_counts() -> None:
    module, x = Parts("by a method"), images(8)
    ours = mdc.score(module, [x], RAW, progress=False)
    both = [
        mdc.score(module.net, [seen], RAW, prediction=lambda _: module(x), progress=False) for seen in (x, x.flip(-1))
    ]
    torch.testing.assert_close(ours.neurons[1], (both[0].neurons[1] + both[1].neurons[1]) / 2)


def test_positions_of_crops_of_several_sizes_are_refused() -> None:
    class Crops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make("any_size")

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.net(x[..., :16, :16])

    module, x = Crops(), images(8)
    with pytest.raises(CalibrationError, match=r"images of \(3, 16, 16\) after others"):
        mdc.score(module, [x], "activation", dimensions=("tokens",), progress=False)
    mdc.score(module, [x], "activation", dimensions=("heads", "neurons"), progress=False)


# --- what logits say --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "meant"),
    [
        (torch.arange(8)[:, None].bitwise_and(2 ** torch.arange(CLASSES)).bool().long(), torch.sigmoid),
        (torch.linspace(-1, 1, 8 * CLASSES).view(8, CLASSES), lambda outputs: outputs),
        (
            F.one_hot(torch.arange(8) % CLASSES, CLASSES).float() * 0.9 + 0.1 / CLASSES,
            lambda logits: logits.softmax(-1),
        ),
    ],
    ids=["yes or no", "numbers", "smoothed"],
)
def test_labels_tell_what_logits_are_of(labels: Tensor, meant: Callable[[Tensor], Tensor]) -> None:
    model, x = make(), images(8)
    ours = mdc.score(model, [(x, labels)], RAW, progress=False)
    said = mdc.score(model, [x], RAW, prediction=meant, progress=False)
    torch.testing.assert_close(torch.cat(ours.neurons), torch.cat(said.neurons))


def test_taylor_takes_a_softmax_that_is_built_in() -> None:
    class Built(Parts):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).softmax(dim=-1)

    module, batch = Built("softmax"), (images(8), torch.arange(8) % CLASSES)
    ours, plain = (mdc.score(each, [batch], "taylor", progress=False) for each in (module, module.net))
    torch.testing.assert_close(torch.cat(ours.neurons), torch.cat(plain.neurons), rtol=1e-4, atol=1e-7)
    with pytest.raises(CalibrationError, match=r"prediction= makes numbers from -.*softmax"):
        mdc.score(module.net, [batch], "taylor", prediction=lambda logits: logits, progress=False)


# --- images as they come ----------------------------------------------------------------------------------------------


class Carrying(Tensor):
    """A subclass that goes on into all that is computed from it, as those that carry metadata."""


def test_subclasses_of_tensors_end_where_they_are_looked_at() -> None:
    model, x, labels = make(), images(16), torch.arange(16) % CLASSES
    for criterion in ("conditional", "hsic", "taylor"):
        plain = mdc.score(model, [(x, labels)], criterion, progress=False)
        found = mdc.score(model, [(x.as_subclass(Carrying), labels.as_subclass(Carrying))], criterion, progress=False)
        for one, other in zip(found.neurons, plain.neurons, strict=True):
            assert type(one) is Tensor
            assert torch.equal(one, other)
    with_images = tv_tensors.Image(x)
    assert type(mdc.score(model, [with_images], "activation", progress=False).tokens[0]) is Tensor
    found = mdc.compress(model, [with_images], 0.7, n_trials=2, calibration=Calibration(8, 8))
    assert not any(isinstance(tensor, Carrying) for tensor in found.model.state_dict().values())


def test_several_sizes_are_scored_where_no_grid_is_in_the_way() -> None:
    model = make("any_size")
    batches = [images(8), torch.randn(8, 3, 48, 48)]
    units = mdc.score(model, batches, "activation", dimensions=("heads", "neurons"), progress=False)
    each = [mdc.score(model, [batch], "activation", dimensions=("neurons",), progress=False) for batch in batches]
    expected = (each[0].neurons[0] + each[1].neurons[0]) / 2
    torch.testing.assert_close(units.neurons[0], expected)
    mdc.score(model, batches, "conditional", dimensions=("heads", "neurons"), progress=False)
    for criterion in ("activation", "hsic", "conditional"):
        with pytest.raises(CalibrationError, match=r"images of \(3, 48, 48\) after.*one size"):
            mdc.score(model, batches, criterion, progress=False)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (images(8).to(torch.uint8), "torch.uint8"),
        (images(8)[:, :1], r"images are \(8, 1, 32, 32\)"),
        (torch.randn(8, 3, 40, 40), "40"),
        (torch.randn(8, 4, 3, 32, 32), "cannot be run on a batch"),
    ],
    ids=["bytes", "grey", "size", "clips"],
)
def test_what_the_model_cannot_take_is_said_with_its_shape(batch: Tensor, reason: str) -> None:
    with pytest.raises((CalibrationError, UnsupportedModelError), match=reason):
        mdc.score(make(), [batch], progress=False)


@pytest.mark.parametrize(
    ("batch", "how"),
    [
        (torch.zeros(8, 3, 32, 32), "alike"),
        (images(1).expand(8, -1, -1, -1), "alike"),
        (torch.arange(8.0)[:, None, None, None].expand(8, 3, 32, 32), "of one colour each"),
    ],
    ids=["black", "repeated", "flat"],
)
def test_images_that_show_nothing_are_warned_of_once(batch: Tensor, how: str) -> None:
    with pytest.warns(UserWarning, match=how) as caught:
        mdc.score(make(), [batch, batch], progress=False)
    assert len([warning for warning in caught if "calibration images" in str(warning.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mdc.score(make(), [batch, images(8)], progress=False)


def test_images_given_again_and_again_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="of 24 calibration images only 8 differ"):
        mdc.score(make(), [images(8)] * 3, "activation", progress=False)


@pytest.mark.parametrize("criterion", ["taylor", ConditionalDependence("fisher"), RAW])
def test_what_gradient_checkpointing_runs_again_is_not_seen_again(criterion: object) -> None:
    model, batch = make(), (images(8), torch.arange(8) % CLASSES)
    plain = mdc.score(model, [batch], criterion, moments=True, progress=False)  # type: ignore[arg-type]
    model.set_grad_checkpointing()
    again = mdc.score(model, [batch], criterion, moments=True, progress=False)  # type: ignore[arg-type]
    torch.testing.assert_close(again.tensors(), plain.tensors())
    moments = [each.moments for each in (plain, again) if each.moments is not None]
    torch.testing.assert_close(moments[1].tensors(), moments[0].tensors())


def test_gradient_checkpointing_of_frozen_models_and_several_calls() -> None:
    model, batch = make().requires_grad_(False), (images(8), torch.arange(8) % CLASSES)
    fisher = ConditionalDependence("fisher")
    expected = mdc.score(model, [batch], fisher, progress=False)
    model.set_grad_checkpointing()
    torch.testing.assert_close(mdc.score(model, [batch], fisher, progress=False).tensors(), expected.tensors())
    parts = Parts("parts", size=6)  # 6 and 2
    parts.net.set_grad_checkpointing()
    with pytest.raises(CalibrationError, match=r"checkpointing on and is called several times.*'taylor'"):
        mdc.score(parts, [batch], mdc.Taylor(loss=lambda out, batch: out.square().sum()), progress=False)


def test_gradients_are_had_in_inference_mode_too() -> None:
    model, labels = make(), torch.arange(8) % CLASSES
    expected = mdc.score(model, [(images(8), labels)], "taylor", progress=False)
    with torch.inference_mode():
        found = mdc.score(model, [(images(8), labels)], "taylor", progress=False)
    torch.testing.assert_close(torch.cat(found.neurons), torch.cat(expected.neurons))


def test_one_label_for_a_whole_batch_is_none() -> None:
    batch = images(8), torch.tensor(1)
    assert mdc.score(make(), [batch], "hsic", progress=False).images == 8
    with pytest.raises(CalibrationError, match=r"'taylor' needs labels: .* labels \(images,\)"):
        mdc.score(make(), [batch], "taylor", progress=False)


@pytest.mark.parametrize(
    ("criterion", "words"),
    [
        (mdc.HSIC(), "hsic"),
        (RAW, "hsic(hsic_weight=1, activation_weight=0)"),
        (ConditionalDependence(), "conditional"),
        (criteria.as_criterion("fisher"), "fisher"),
        (ConditionalDependence("fisher", 0.25), "fisher(metric_weight=0.25)"),
        (mdc.Taylor(loss=F.cross_entropy), "taylor"),
        (criteria.Random(3), "random(seed=3)"),
    ],
)
def test_criteria_tell_their_options(criterion: Criterion, words: str) -> None:
    assert str(criterion) == words
