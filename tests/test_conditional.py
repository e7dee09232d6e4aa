"""Conditional dependence: the units' order and losses against numpy, subset by subset."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.errors import CalibrationError
from lightning_mdc.importance import ConditionalDependence, Scorer, conditional, scoring
from lightning_mdc.importance.conditional import lost_by_elimination, metric_root
from lightning_mdc.importance.ridge import RIDGE
from lightning_mdc.importance.scoring import surprise
from lightning_mdc.models import find_anatomy
from tests.distributed_program import join
from tests.kinds import BASE, DIM, images, make
from tests.processes import two_ranks

Array = NDArray[np.float64]


def unexplained(covariance: Array, weight: Array, kept: list[int]) -> float:
    """Variance of ``weight @ z`` that the best linear estimate from the kept channels leaves."""
    some = covariance[:, kept] @ np.linalg.solve(covariance[np.ix_(kept, kept)], covariance[kept]) if kept else 0
    return float(np.trace(weight @ (covariance - some) @ weight.T))


def eliminated(covariance: Array, weight: Array, units: int) -> Array:
    """Every candidate tried at every step; what is lost by then, of all."""
    covariance = covariance + RIDGE * covariance.diagonal().mean() * np.eye(len(covariance))
    width = len(covariance) // units
    left, lost = list(range(units)), np.zeros(units)

    def channels(some: list[int]) -> list[int]:
        return [unit * width + i for unit in some for i in range(width)]

    while left:
        costs = [unexplained(covariance, weight, channels([u for u in left if u != unit])) for unit in left]
        lost[left.pop(int(np.argmin(costs)))] = min(costs)
    return lost / unexplained(covariance, weight, [])


def problem(channels: int, out: int, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((400, channels)) @ rng.standard_normal((channels, channels))
    return np.cov(z.T), rng.standard_normal((out, channels))


# The last two have more units than leave at once; with few outputs, what leaves makes others worth less.
@pytest.mark.parametrize(
    ("channels", "units", "out"), [(14, 14, 6), (15, 5, 6), (24, 6, 30), (8, 1, 6), (90, 90, 60), (100, 100, 8)]
)
def test_units_leave_in_the_order_and_at_the_cost_that_trying_all_finds(channels: int, units: int, out: int) -> None:
    covariance, weight = problem(channels, out)
    found = lost_by_elimination(torch.from_numpy(covariance), torch.from_numpy(weight), units)
    np.testing.assert_allclose(found.numpy(), eliminated(covariance, weight, units), rtol=1e-8)


@pytest.mark.parametrize("out", [4, 40])
def test_hundreds_of_units_leave_in_the_order_of_the_plain_loop(out: int) -> None:
    """As units, one after another, and as channels, many at once."""
    covariance, weight = map(torch.from_numpy, problem(300, out, seed=2))
    precision = torch.linalg.inv(covariance + RIDGE * covariance.diagonal().mean() * torch.eye(300))
    one_by_one, at_once = (way(precision.clone(), weight, 300) for way in (conditional._units, conditional._channels))
    assert torch.equal(one_by_one[0], at_once[0])
    torch.testing.assert_close(one_by_one[1], at_once[1], rtol=1e-7, atol=1e-9)


def test_of_equal_units_the_first_leaves_first() -> None:
    order = conditional._channels(torch.eye(100).double(), torch.eye(100).double(), 100)[0]
    assert order.tolist() == list(range(100))
    order = conditional._units(torch.eye(12).double(), torch.eye(12).double(), 4)[0]
    assert order.tolist() == list(range(4))


def test_a_copy_is_worth_nothing_and_what_only_one_says_is_kept() -> None:
    rng = np.random.default_rng(1)
    z = rng.standard_normal((500, 3))
    z = np.column_stack([z[:, 0], z[:, 0], 0.3 * z[:, 1]])  # loud, its copy, quiet
    covariance, weight = torch.from_numpy(np.cov(z.T)), torch.eye(3, dtype=torch.float64)
    found = lost_by_elimination(covariance, weight, 3)
    assert sorted(found[:2].tolist())[0] < 1e-3  # one of the two leaves first, at no cost
    assert found[2] > 0.02


def test_nothing_varies() -> None:
    assert (lost_by_elimination(torch.zeros(4, 4).double(), torch.ones(2, 4).double(), 4) == 0).all()


def test_scores_of_a_model_are_of_what_its_layers_read() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(**BASE, mlp_ratio=0.5).eval()  # few neurons, and numpy tries them all
    batches = [images(12, seed=1), images(12, seed=2)]
    scores = mdc.score(model, batches, ConditionalDependence())
    assert scores.criterion == "conditional"
    units = find_anatomy(model).blocks[1].units["neurons"]
    z = reads(model, 1, batches)
    expected = eliminated(np.cov(z.T, bias=True), units.reader.weight.detach().double().numpy(), units.count)
    np.testing.assert_allclose(scores.neurons[1].numpy(), expected, rtol=1e-3)
    raw = mdc.score(model, batches, mdc.HSIC(hsic_weight=1, activation_weight=0))
    for mine, theirs in zip(scores.tokens, raw.tokens, strict=True):
        torch.testing.assert_close(mine, theirs)


def reads(model: nn.Module, block: int, batches: list[torch.Tensor]) -> Array:
    """What the layer that reads a block's neurons is given, (rows, neurons) in float64."""
    seen: list[torch.Tensor] = []
    reader = find_anatomy(model).blocks[block].units["neurons"].reader
    handle = reader.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(seen).double().flatten(0, 1).numpy()


def test_channels_far_from_0_keep_their_variance() -> None:
    """Mean 1000, standard deviation about 0.5: fp32 has seven digits, and their squares need more."""
    torch.manual_seed(0)
    model = VisionTransformer(**BASE, mlp_ratio=0.5).eval()
    mlp = model.blocks[1].mlp
    with torch.no_grad():
        mlp.fc1.weight *= 0.5 / mlp.fc1.weight.norm(dim=1, keepdim=True)
        mlp.fc1.bias.fill_(1000)
    batches = [images(12, seed=1), images(12, seed=2)]
    scores = mdc.score(model, batches, dimensions=("neurons",), progress=False)
    z, weight = reads(model, 1, batches), mlp.fc2.weight.detach().double().numpy()
    covariance = np.cov(z.T, bias=True)
    assert 0.3 < np.sqrt(covariance.diagonal()).mean() < 0.7
    np.testing.assert_allclose(scores.neurons[1].numpy(), eliminated(covariance, weight, len(covariance)), rtol=1e-2)
    plan = mdc.make_plan(model, scores, mdc.Policy(neurons=0.5))
    kept = list(plan.neurons[1])
    slim = mdc.slim(model, plan, "lstsq", moments=scores.moments)
    ridge = RIDGE * covariance.diagonal().mean() * np.eye(len(kept))
    lost = np.setdiff1d(np.arange(len(covariance)), kept)
    update = np.linalg.solve(covariance[np.ix_(kept, kept)] + ridge, covariance[np.ix_(kept, lost)] @ weight[:, lost].T)
    found = slim.blocks[1].mlp.fc2.weight.detach().numpy()
    np.testing.assert_allclose(found, weight[:, kept] + update.T, atol=1e-2 * np.abs(update).max())


def test_kept_units_rebuild_the_layer_better_than_those_of_other_criteria() -> None:
    """What the scores promise is what least squares delivers."""
    model, batches = make(), [images(32, seed=3), images(32, seed=4)]
    policy = mdc.Policy(neurons=0.25)

    def error(criterion: str) -> float:
        scores = mdc.score(model, batches, criterion, moments=True, progress=False)
        slim = mdc.slim(model, mdc.make_plan(model, scores, policy), "lstsq", moments=scores.moments)
        outputs: list[torch.Tensor] = []
        handles = [
            find_anatomy(m).blocks[0].module.register_forward_hook(lambda module, args, output: outputs.append(output))
            for m in (model, slim)
        ]
        with torch.no_grad():
            model(batches[0]), slim(batches[0])
        for handle in handles:
            handle.remove()
        return float((outputs[0] - outputs[1]).square().mean())

    assert error("conditional") < min(error("random"), error("magnitude"), error("activation"))


# --- a metric on the layer's output -----------------------------------------------------------------------------------

PREDICTS = ("fisher", "hsic")


@pytest.mark.parametrize(("channels", "units"), [(14, 14), (15, 5)])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_units_leave_by_what_a_metric_says_of_the_output(channels: int, units: int, share: float) -> None:
    covariance, weight = problem(channels, 6)
    directions = np.random.default_rng(4).standard_normal((6, 3))
    metric = directions @ directions.T
    mixed = share * metric / metric.diagonal().mean() + (1 - share) * np.eye(6)
    root = metric_root(torch.from_numpy(metric), share)
    np.testing.assert_allclose((root.T @ root).numpy(), mixed, atol=1e-12)
    found = lost_by_elimination(torch.from_numpy(covariance), root @ torch.from_numpy(weight), units)
    # The trace of what is lost times M is that of what the outputs scaled by its root lose.
    scaled = np.linalg.cholesky(mixed + 1e-14 * np.eye(6)).T @ weight
    np.testing.assert_allclose(found.numpy(), eliminated(covariance, scaled, units), rtol=1e-6)


@pytest.mark.parametrize("metric", [7 * torch.eye(6).double(), torch.zeros(6, 6).double()])
def test_a_metric_without_preferences_is_the_identity(metric: torch.Tensor) -> None:
    torch.testing.assert_close(metric_root(metric, 1.0), torch.eye(6).double())


@pytest.mark.parametrize("metric", PREDICTS)
def test_without_a_share_of_the_metric_nothing_changes(metric: str) -> None:
    model, batches = make(), [images(12, seed=1)]
    plain, weighed, whole = (
        mdc.score(model, batches, criterion, dimensions=("heads", "tokens"), progress=False)
        for criterion in (ConditionalDependence(), ConditionalDependence(metric, 0.0), ConditionalDependence(metric))
    )
    for mine, theirs in zip([*weighed.heads, *weighed.tokens], [*plain.heads, *plain.tokens], strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not torch.equal(whole.heads[1], plain.heads[1])
    assert torch.equal(whole.tokens[0], plain.tokens[0])


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_labels_are_drawn_from_the_prediction_itself(shift: float) -> None:
    """Of probabilities a class, at whose logits the gradient is p - 1; of numbers a step in any direction."""
    logits = torch.randn(400, 3, generator=torch.Generator().manual_seed(1)) * 2
    logits.requires_grad_()
    p = logits.softmax(dim=-1)
    (gradient,) = torch.autograd.grad(
        surprise(p + shift, torch.Generator().manual_seed(0)), [logits if not shift else p]
    )
    if shift:
        torch.testing.assert_close(gradient.T.cov(), torch.eye(3), atol=0.2, rtol=0)
        return
    drawn = p - gradient
    torch.testing.assert_close(drawn, drawn.round(), atol=1e-5, rtol=0)
    assert (drawn.sum(dim=-1).round() == 1).all()
    torch.testing.assert_close(drawn.mean(dim=0), p.mean(dim=0), atol=0.08, rtol=0)


def metric_sums(model: nn.Module, metric: str, batches: list[torch.Tensor]) -> tuple[Scorer, list[torch.Tensor]]:
    scorer = Scorer(find_anatomy(model), ConditionalDependence(metric), ("heads", "neurons"))
    with scorer.watching():
        said = [scorer.update(partial(model, batch), len(batch)) for batch in batches]
    return scorer, said


def test_the_fisher_metric_is_of_gradients_at_the_layers_output() -> None:
    """One image at a time: gradients of the layer's bias are those at its output, summed over tokens; with one token
    each they are the same."""
    torch.manual_seed(0)
    model = make().double()
    batches = [images(3, seed=1).double(), images(2, seed=2).double()]
    scorer, said = metric_sums(model, "fisher", batches)
    draw = torch.Generator().manual_seed(0)
    expected: dict[str, Array] = {}
    for batch, output in zip(batches, said, strict=True):
        labels = output.softmax(-1).detach().float().multinomial(1, generator=draw)[:, 0].tolist()
        for image, label in zip(batch, labels, strict=True):
            readers = {f"neurons.{i}": block.mlp.fc2 for i, block in enumerate(model.blocks)}
            readers |= {f"heads.{i}": block.attn.proj for i, block in enumerate(model.blocks)}
            put_out: dict[str, torch.Tensor] = {}

            def look(name, module, args, output, put_out=put_out):
                put_out[name] = output

            handles = [m.register_forward_hook(partial(look, name)) for name, m in readers.items()]
            surprise = -model(image[None]).log_softmax(-1)[0, label]
            for handle in handles:
                handle.remove()
            for name, g in zip(put_out, torch.autograd.grad(surprise, list(put_out.values())), strict=True):
                expected[name] = expected.get(name, 0) + (g[0].T @ g[0]).numpy()
    for name, value in expected.items():
        np.testing.assert_allclose(scorer.sums[f"{name}.gg"].numpy(), value, rtol=1e-5, atol=1e-12 * value.max())


def test_the_hsic_metric_is_what_the_prediction_explains_of_the_output() -> None:
    """By least squares in numpy, from the mean token of each image; some means are far from 0."""
    torch.manual_seed(0)
    model, batches = make(), [images(12, seed=1), images(8, seed=2)]
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias.fill_(1000)
    scorer, said = metric_sums(model, "hsic", batches)
    group = scorer.groups["neurons.1"]
    weight = group.units.reader.weight.detach().double()  # type: ignore[union-attr]
    sums = {key[len("neurons.1.") :]: value for key, value in scorer.sums.items() if key.startswith("neurons.1.")}
    found = ConditionalDependence("hsic")._of_output(sums | {"images": scorer.sums["images"]}, weight)
    tokens = reads(model, 1, batches).reshape(20, 17, -1)
    y = tokens.mean(axis=1) @ weight.numpy().T
    p = torch.cat(said).softmax(-1).detach().double().numpy()
    y, p = y - y.mean(axis=0), p - p.mean(axis=0)
    pp = p.T @ p / 20
    ridge = RIDGE * pp.diagonal().mean() * np.eye(len(pp))
    expected = (y.T @ p / 20) @ np.linalg.solve(pp + ridge, p.T @ y / 20)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-5 * expected.diagonal().max())


def score_own_batch(rank: int, folder: Path) -> None:
    join(rank, folder)
    for metric in PREDICTS:
        scorer, _ = metric_sums(make(), metric, [images(8, seed=rank)])
        scorer.sum_over_ranks()
        scores = scorer.scores()
        torch.save((scorer.sums, list(scores.neurons)), folder / f"{metric}-{rank}.pt")


def test_two_ranks_have_the_metric_of_all_images(tmp_path: Path) -> None:
    two_ranks(score_own_batch, tmp_path)
    for metric in PREDICTS:
        own = [metric_sums(make(), metric, [images(8, seed=rank)])[0].sums for rank in (0, 1)]
        (sums, neurons), (_, others) = (torch.load(tmp_path / f"{metric}-{rank}.pt") for rank in (0, 1))
        assert sums.keys() == own[0].keys()
        for name in ("neurons.1.gg",) if metric == "fisher" else ("neurons.1.zp", "heads.0.pp", "heads.0.z"):
            torch.testing.assert_close(sums[name], own[0][name] + own[1][name])
        for mine, theirs in zip(neurons, others, strict=True):
            assert torch.equal(mine, theirs)


class Map(nn.Module):
    """What a transformer says of each token: (images, tokens, dim)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.forward_features(x)


@pytest.mark.parametrize("metric", PREDICTS)
@pytest.mark.parametrize("kind", ["features", "map", "bf16", "frozen", "swin_v2"])
def test_a_metric_is_for_models_of_any_output(metric: str, kind: str) -> None:
    model = make(kind) if kind == "swin_v2" else make()
    if kind == "features":
        model.reset_classifier(0)
    elif kind == "map":
        model = Map(model)
    elif kind == "bf16":
        model.bfloat16()
    elif kind == "frozen":
        model.requires_grad_(False)
    dimensions = ("heads",)
    batches = [images(12, seed=1)]
    scores = mdc.score(model, batches, ConditionalDependence(metric), dimensions=dimensions, progress=False)
    plain = mdc.score(model, batches, dimensions=dimensions, progress=False)
    assert any(not torch.equal(*pair) for pair in zip(scores.heads, plain.heads, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_what_matters_to_the_prediction_stays() -> None:
    """Half of the neurons write, loudly, where the head does not read."""
    torch.manual_seed(0)
    model = VisionTransformer(**BASE, mlp_ratio=1, class_token=False, global_pool="avg").eval()
    model.fc_norm = nn.Identity()
    last, half = model.blocks[-1].mlp, DIM // 2
    with torch.no_grad():
        last.fc2.weight.zero_()
        last.fc2.weight[:half, :half] = torch.eye(half)
        last.fc2.weight[half:, half:] = 10 * torch.eye(half)
        model.head.weight[:, half:] = 0
    batches = [images(32, seed=s) for s in range(3)]

    def kept(criterion: ConditionalDependence) -> list[int]:
        scores = mdc.score(model, batches, criterion, dimensions=("neurons",), progress=False)
        return sorted(scores.neurons[-1].topk(half).indices.tolist())

    assert kept(ConditionalDependence()) == list(range(half, DIM))
    assert kept(ConditionalDependence("fisher", 1.0)) == list(range(half))


def test_a_metric_that_cannot_be_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"metric='fischer'.*identity.*fisher.*hsic"):
        ConditionalDependence("fischer")
    with pytest.raises(CalibrationError, match=r"metric_weight=0.5 is not looked at: metric='identity'"):
        ConditionalDependence(metric_weight=0.5)
    for wrong in (1.5, -0.1, float("nan"), "half"):
        with pytest.raises(CalibrationError, match="metric_weight="):
            ConditionalDependence("hsic", wrong)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match=r"metric='hsic': the prediction has 5000 .*prediction="):
        mdc.score(
            make(),
            [images(4)],
            ConditionalDependence("hsic"),
            prediction=lambda out: out.repeat(1, 5000)[:, :5000],
            progress=False,
        )


class Unkind(nn.Module):
    """Gives no gradients, in one of many ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = make(), how

    def forward(self, x: Tensor) -> Any:
        if self.how == "no_grad":
            with torch.no_grad():
                return self.net(x)
        output = self.net(x)
        if self.how == "out of memory" and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("out of memory")
        assert not (self.how == "assertion" and torch.is_grad_enabled())
        return {"classes": output.argmax(-1), "infinite": output * torch.inf, "words": ["a cat"] * len(x)}.get(
            self.how, output
        )


WITHOUT = {
    "no_grad": "no gradients lead from the prediction",
    "classes": "holds no float tensor",
    "words": "holds no float tensor",
    "infinite": "gradients of the prediction are not finite",
    "out of memory": "out of memory",
    "assertion": "assert",
}


@pytest.mark.parametrize("how", WITHOUT)
def test_a_model_without_gradients_is_scored_without_them_and_says_so(how: str) -> None:
    model, batches, units = Unkind(how), [images(12, seed=s) for s in (1, 2)], ("heads", "neurons")
    expected = mdc.score(model, batches, "conditional", dimensions=units, progress=False)
    words = (
        f"criterion='fisher': .*{WITHOUT[how]}.*VisionTransformer is scored by 'conditional', which needs no gradients"
    )
    with pytest.warns(UserWarning, match=words) as said:
        found = mdc.score(model, batches, "fisher", dimensions=units, progress=False)
    assert len(said) == 1
    torch.testing.assert_close(found.tensors(), expected.tensors(), rtol=0, atol=0)
    assert (found.criterion, found.images) == ("conditional", 24)


def score_where_one_has_no_gradients(rank: int, folder: Path) -> None:
    join(rank, folder)
    model = Unkind("no_grad" if rank else "")
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = mdc.score(
            model, [images(8, seed=rank)], "fisher", dimensions=["heads"], progress=False, over_ranks=True
        )
    words = [str(each.message) for each in said if "'fisher'" in str(each.message)]
    torch.save((found.criterion, list(found.heads), words), folder / f"{rank}.pt")


def test_where_one_rank_has_no_gradients_none_uses_them(tmp_path: Path) -> None:
    two_ranks(score_where_one_has_no_gradients, tmp_path)
    (name, mine, said), (other, theirs, silence) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert name == other == "conditional"
    assert len(said) == 1
    assert "failed on another rank" in said[0]
    assert not silence
    assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))


def test_a_backward_pass_is_of_a_few_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = make(), list[int]()
    criterion = ConditionalDependence("fisher", 1.0)
    whole = mdc.score(model, [images(12, seed=1)], criterion, progress=False)
    model.register_forward_pre_hook(
        lambda module, args: sizes.append(len(args[0])) if torch.is_grad_enabled() else None
    )
    monkeypatch.setattr(scoring, "_BACK_AT_ONCE", 5)
    parts = mdc.score(model, [images(12, seed=1)], criterion, progress=False)
    assert sizes == [4, 4, 4]
    torch.testing.assert_close(parts.tensors(), whole.tensors())


class Probed(nn.Module):
    """A head on features of a transformer that takes no part in training."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = make(), nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.net(x)
        return self.head(features)


def test_gradients_of_what_follows_the_transformer_alone_are_none() -> None:
    with pytest.warns(UserWarning, match="no gradients lead from the prediction to the layers"):
        found = mdc.score(Probed(), [images(8)], "fisher", dimensions=["heads"], progress=False)
    assert found.criterion == "conditional"


def test_a_model_that_keeps_what_it_put_out_keeps_no_graph() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make()

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.net(x)
            return self.last

    model = Keeps()
    mdc.score(model, [images(8)], "fisher", progress=False)
    assert model.last.grad_fn is None
    copy.deepcopy(model)


class Detects(nn.Module):
    """A map, and boxes of which there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"map": self.net.forward_features(x), "boxes": torch.zeros(0, 5)}


def test_gradients_are_of_all_that_a_model_says() -> None:
    found = mdc.score(Detects(), [images(8)], "fisher", dimensions=["heads"], progress=False)
    alone = mdc.score(Map(make()), [images(8)], "fisher", dimensions=["heads"], progress=False)
    assert found.criterion == "fisher"
    assert all(torch.equal(*pair) for pair in zip(found.heads, alone.heads, strict=True))
