"""What removed units did is given back: maths against numpy, moments against direct ones, all kinds of models."""

from __future__ import annotations

import copy
import dataclasses
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.errors import CalibrationError, CompensationError, UnsupportedModelError
from lightning_mdc.importance import Moments
from lightning_mdc.importance import moments as gathering
from lightning_mdc.importance.moments import LayerMoments
from lightning_mdc.importance.ridge import RIDGE
from lightning_mdc.models import find_anatomy
from lightning_mdc.surgery.compensation import refitted
from tests.kinds import DEPTH, KINDS, daily, images, make

# Their norm over the units makes what is kept of them depend on what is not.
NORMED = {
    "beit3_scale_norms": ("heads", "neurons"),
    "rms_norms": ("heads", "neurons"),
    "swiglu_packed_normed": ("neurons",),
    "swiglu_normed": ("neurons",),
}


def plan_for(model: nn.Module, heads: float = 1.0, neurons: float = 1.0, tokens: float = 1.0) -> mdc.Plan:
    scores = mdc.score(model, [images(4)], "random")
    return mdc.make_plan(model, scores, mdc.Policy(heads=heads, neurons=neurons, tokens=tokens))


def moments_on(model: nn.Module, batches: list[object]) -> Moments:
    """As any criterion gathers them."""
    found = mdc.score(model, batches, "magnitude", dimensions=("heads", "neurons"), moments=True, progress=False)
    assert found.moments is not None
    return found.moments


def reads(model: nn.Module, site: str, batch: Tensor) -> np.ndarray:
    """What the consumer of ``heads.1`` or ``neurons.2`` is given for `batch`: (images * tokens, channels), float64."""
    dimension, index = site.split(".")
    seen = []
    hook = consumers(model, dimension)[int(index)].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(batch)
    hook.remove()
    return seen[0].flatten(0, 1).double().numpy()


def consumers(model: nn.Module, dimension: str) -> list[nn.Linear]:
    return [units.reader for units in find_anatomy(model).units(dimension)]


def channels_of(plan: mdc.Plan, dimension: str, block: int, width: int) -> list[int]:
    units = getattr(plan, dimension)[block]
    return [unit * width + offset for unit in units for offset in range(width)]


# --- the maths --------------------------------------------------------------------------------------------------------


@pytest.fixture
def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Channels that depend on each other (rows, 10), weight (4, 10), bias (4,), the kept ones."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 10)) + 0.3 * rng.normal(size=(300, 10)) + rng.normal(size=10)
    return z, rng.normal(size=(4, 10)), rng.normal(size=4), [0, 2, 3, 7]


def moments_of(z: np.ndarray) -> LayerMoments:
    mean = z.mean(axis=0)
    return LayerMoments(torch.tensor(len(z)), torch.tensor(mean), torch.tensor((z - mean).T @ (z - mean)))


def solved(
    problem, with_bias: bool = True, ridge: float = RIDGE, kind: str = "mean"
) -> tuple[np.ndarray, np.ndarray | None]:
    z, weight, bias, kept = problem
    new = refitted(
        torch.tensor(weight),
        torch.tensor(bias) if with_bias else None,
        moments_of(z),
        torch.tensor(kept, dtype=torch.long),
        ridge,
        kind,
    )
    return new[0].numpy(), None if new[1] is None else new[1].numpy()


def test_lstsq_is_numpys_least_squares(problem):
    z, weight, bias, kept = problem
    wanted = z @ weight.T + bias
    with_one = np.column_stack([z[:, kept], np.ones(len(z))])
    best = np.linalg.lstsq(with_one, wanted, rcond=None)[0]
    new_weight, new_bias = solved(problem, ridge=1e-12)
    np.testing.assert_allclose(new_weight, best[:-1].T, atol=1e-8)
    np.testing.assert_allclose(new_bias, best[-1], atol=1e-8)


@pytest.mark.parametrize("ridge", [RIDGE, 0.1, 10.0])
def test_the_ridge_pulls_to_the_old_weights(problem, ridge):
    """As least squares with rows added: sqrt(r) (U - 0) beside what is to be rebuilt, all centred."""
    z, weight, _, kept = problem
    centred = z - z.mean(axis=0)
    removed = [channel for channel in range(10) if channel not in kept]
    strength = ridge * centred.var(axis=0).mean() * len(z)
    rows = np.vstack([centred[:, kept], np.sqrt(strength) * np.eye(len(kept))])
    wanted = np.vstack([centred[:, removed] @ weight[:, removed].T, np.zeros((len(kept), 4))])
    update = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    np.testing.assert_allclose(solved(problem, ridge=ridge)[0], weight[:, kept] + update, atol=1e-8)


def of_channels(variances: np.ndarray, kind: str) -> np.ndarray:
    """What a ridge is a share of, written out."""
    clipped = np.minimum(variances, 3 * np.sort(variances)[(len(variances) - 1) // 2]).mean()
    if kind == "channel":
        return np.maximum(variances, 1e-3 * clipped)
    return np.full(len(variances), {"mean": variances.mean(), "clipped": clipped, "largest": variances.max()}[kind])


@pytest.mark.parametrize("kind", ["mean", "clipped", "channel", "largest"])
def test_a_ridge_may_be_told_of_outlier_channels(problem, kind):
    """As least squares with a row added for each channel; one channel varies 100 times as much as the others."""
    z, weight, _, kept = problem
    z = z.copy()
    z[:, 2] *= 100
    centred = z - z.mean(axis=0)
    removed = [channel for channel in range(10) if channel not in kept]
    strength = 0.1 * of_channels(centred.var(axis=0), kind)[kept] * len(z)
    rows = np.vstack([centred[:, kept], np.diag(np.sqrt(strength))])
    wanted = np.vstack([centred[:, removed] @ weight[:, removed].T, np.zeros((len(kept), 4))])
    update = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    found = solved((z, *problem[1:]), ridge=0.1, kind=kind)[0]
    np.testing.assert_allclose(found, weight[:, kept] + update, atol=1e-8)


@pytest.mark.parametrize("kind", ["clipped", "channel"])
def test_an_outlier_does_not_keep_the_others_from_being_refitted(problem, kind):
    z, weight, bias, kept = problem
    z = z.copy()
    z[:, 2] *= 1000
    changed = (z, weight, bias, kept)
    plain, robust = (error_of(changed, *solved(changed, kind=each)) for each in ("mean", kind))
    assert robust < 0.9 * plain


@pytest.mark.parametrize("silent", [6, 10])
@pytest.mark.parametrize("kind", ["mean", "clipped", "channel", "largest"])
def test_every_ridge_bears_channels_that_are_silent(problem, kind, silent):
    z, weight, bias, kept = problem
    z = z.copy()
    z[:, :silent] = 1.0
    new_weight, new_bias = solved((z, weight, bias, kept), kind=kind)
    assert np.isfinite(new_weight).all()
    assert np.isfinite(new_bias).all()


@pytest.mark.parametrize("way", ["lstsq", "sequential"])
def test_slim_models_are_refitted_with_the_ridge_that_is_asked_for(way):
    model, batches = make(), [images(8)]
    scores = mdc.score(model, batches, progress=False)
    plan = mdc.make_plan(model, scores, mdc.Policy(neurons=0.2))
    given = {"moments": scores.moments} if way == "lstsq" else {"batches": batches}
    weights = {
        ridge: mdc.slim(model, plan, way, ridge=ridge, **given).blocks[1].mlp.fc2.weight
        for ridge in (None, "mean", "clipped", "channel", "largest")
    }
    assert torch.equal(weights[None], weights["mean"])
    assert len({tuple(weight.flatten().tolist()) for weight in weights.values()}) == 4
    with pytest.raises(CompensationError, match=r"ridge='median'.*'mean' or 'clipped' or 'channel'"):
        mdc.slim(model, plan, way, ridge="median", **given)
    with pytest.raises(CompensationError, match="ridge='mean' is not looked at: compensate='none'"):
        mdc.slim(model, plan, ridge="mean")


def test_without_a_bias_the_weights_alone_are_refitted(problem):
    z, weight, _, kept = problem
    best = np.linalg.lstsq(z[:, kept], z @ weight.T, rcond=None)[0]
    new_weight, new_bias = solved(problem, with_bias=False, ridge=1e-12)
    np.testing.assert_allclose(new_weight, best.T, atol=1e-8)
    assert new_bias is None


def error_of(problem, weight: np.ndarray, bias: np.ndarray) -> float:
    z, dense_weight, dense_bias, kept = problem
    return float(np.square(z @ dense_weight.T + dense_bias - z[:, kept] @ weight.T - bias).sum())


def folded(problem) -> tuple[np.ndarray, np.ndarray]:
    """The weights that are left, and the mean contribution of the removed ones in the bias."""
    z, weight, bias, kept = problem
    return weight[:, kept], bias + np.delete(weight, kept, axis=1) @ np.delete(z.mean(axis=0), kept)


@pytest.mark.parametrize("ridge", [RIDGE, 1.0, 1e3])
@pytest.mark.parametrize("kept", [[], [5], [0, 2, 3, 7], list(range(9))])
def test_it_is_never_worse_than_mean_folding_and_that_never_than_nothing(problem, kept, ridge):
    problem = (*problem[:3], kept)
    nothing = error_of(problem, problem[1][:, kept], problem[2])
    mean = error_of(problem, *folded(problem))
    lstsq = error_of(problem, *solved(problem, ridge=ridge))
    assert mean < nothing
    assert lstsq < mean if kept else lstsq == pytest.approx(mean)


def test_the_mean_output_stays(problem):
    z, weight, bias, kept = problem
    wanted = (z @ weight.T + bias).mean(axis=0)
    new_weight, new_bias = solved(problem)
    np.testing.assert_allclose((z[:, kept] @ new_weight.T + new_bias).mean(axis=0), wanted, atol=1e-10)


def test_channels_that_say_nothing_do_no_harm(problem):
    """Dead or doubled channels make the system singular; the ridge holds."""
    z, weight, bias, kept = problem
    z = z.copy()
    z[:, 2], z[:, 3] = 0.0, z[:, 0]
    new_weight, new_bias = solved((z, weight, bias, kept))
    assert np.isfinite(new_weight).all()
    np.testing.assert_allclose(new_weight[:, 1], weight[:, 2])  # of the dead one
    still = np.ones_like(z)
    new_weight, new_bias = solved((still, weight, bias, kept))  # nothing varies: the mean is all there is
    np.testing.assert_allclose(new_weight, weight[:, kept])
    np.testing.assert_allclose(new_bias, bias + np.delete(weight, kept, axis=1).sum(axis=1))


def test_rounding_that_outweighs_the_ridge_is_borne(problem):
    """A scatter in fp32 may have negative eigenvalues, for which there is no Cholesky factor."""
    z, weight, bias, kept = problem
    z = z.copy()
    z[:, 3] = z[:, 2]
    moments = moments_of(z)
    moments.scatter[2, 3] = moments.scatter[3, 2] = 1.01 * moments.scatter[2, 2]
    assert (
        torch.linalg.eigvalsh(moments.scatter[kept][:, kept]).min() / len(z)
        < -RIDGE * moments.variances(centred=True).mean()
    )
    new = refitted(torch.tensor(weight), torch.tensor(bias), moments, torch.tensor(kept))
    changed = (z, weight, bias, kept)
    assert error_of(changed, *(each.numpy() for each in new)) < error_of(changed, *folded(changed))


# --- moments ----------------------------------------------------------------------------------------------------------


def test_one_pass_gives_the_moments_of_all_batches():
    model = make("glu").train()
    before = copy.deepcopy(model.state_dict())
    batches = [(images(5, seed=1), torch.zeros(5)), images(3, seed=2)]
    found = moments_on(model, batches)
    assert model.training
    assert not [
        hooks for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks) if hooks
    ]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert found.images == 8
    model.eval()
    for site in ("heads.0", "heads.3", "neurons.2"):
        dimension, index = site.split(".")
        moments = found.layers[dimension][int(index)]
        z = np.concatenate([reads(model, site, images(5, seed=1)), reads(model, site, images(3, seed=2))])
        assert int(moments.rows) == len(z) == 8 * 17
        np.testing.assert_allclose(moments.mean, z.mean(axis=0), rtol=1e-5, atol=1e-6)
        covariance = np.cov(z.T, bias=True)
        np.testing.assert_allclose(moments.scatter / len(z), covariance, rtol=0, atol=1e-6 * covariance.max())


def test_a_batch_of_more_rows_than_are_added_up_at_once_is_counted_whole():
    model, batch = make(), images(256)
    moments = moments_on(model, [batch]).layers["neurons"][1]
    z = reads(model, "neurons.1", batch)
    assert int(moments.rows) == len(z) == 256 * 17
    np.testing.assert_allclose(moments.mean, z.mean(axis=0), rtol=1e-5, atol=1e-6)
    covariance = np.cov(z.T, bias=True)
    np.testing.assert_allclose(moments.scatter / len(z), covariance, rtol=0, atol=1e-6 * covariance.max())


def test_ranks_agree_on_the_moments_of_all_rows(problem, monkeypatch):
    z = problem[0]
    shares = [z[:50], z[:0], z[50:] + 3]
    meeting, given = threading.Barrier(len(shares), timeout=30), [None] * len(shares)

    def summed(tensor: Tensor) -> Tensor:
        given[int(threading.current_thread().name)] = tensor
        meeting.wait()
        total = sum(given)
        meeting.wait()
        return total

    monkeypatch.setattr(gathering, "summed", summed)
    found = {}

    def work(rank: int) -> None:
        own = gathering.MomentSum(10, torch.zeros((), dtype=torch.float64))
        if len(shares[rank]):
            own.add(torch.from_numpy(shares[rank]))
        own.sum_over_ranks()
        found[rank] = own.moments()

    threads = [threading.Thread(target=work, args=[rank], name=str(rank)) for rank in range(len(shares))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    wanted = moments_of(np.concatenate(shares))
    for moments in found.values():
        assert int(moments.rows) == len(z)
        torch.testing.assert_close(moments.mean, wanted.mean)
        torch.testing.assert_close(moments.scatter, wanted.scatter)


def test_half_precision_models_are_summed_in_fp32():
    model = make().to(torch.bfloat16)
    found = moments_on(model, [images()])
    assert {tensor.dtype for tensor in found.tensors().values()} == {torch.float32, torch.int64}
    plan = plan_for(model, neurons=0.5)
    slim = mdc.slim(model, plan, compensate="lstsq", moments=found)
    assert {parameter.dtype for parameter in slim.parameters()} == {torch.bfloat16}
    assert slim(images().bfloat16()).isfinite().all()


def test_a_file_keeps_them(tmp_path):
    found = moments_on(make("swiglu_normed"), [images()])
    found.save(tmp_path / "moments.safetensors")
    again = Moments.load(tmp_path / "moments.safetensors")
    assert again.images == found.images == 6
    assert [len(layers) for layers in again.layers.values()] == [DEPTH, DEPTH]
    assert again.tensors().keys() == found.tensors().keys()
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in found.tensors().items())


def test_a_file_that_holds_none_is_refused(tmp_path):
    path = tmp_path / "moments.safetensors"
    with pytest.raises(CompensationError, match=r"cannot be read.*gather them again"):
        Moments.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CompensationError, match="no moments of ours"):
        Moments.load(path)
    moments_on(make(), [images()]).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CompensationError, match="cannot be read"):
        Moments.load(path)


def test_what_cannot_be_gathered_is_said():
    model = make()
    with pytest.raises(CalibrationError, match="needs images"):
        moments_on(model, [])
    with pytest.raises(CalibrationError, match="expected images"):
        moments_on(model, [torch.zeros(3)])
    with mdc.masked(model, plan_for(model, neurons=0.5)), pytest.raises(CalibrationError, match="masks on"):
        moments_on(model, [images()])
    with pytest.raises(CalibrationError, match="heads of block 0 are not finite"):
        moments_on(model, [images() * float("nan")])
    with pytest.raises(CalibrationError, match=r"moments=False, but criterion='conditional' is made of them"):
        mdc.score(model, [images()], moments=False)
    with pytest.raises(CalibrationError, match=r"moment_tokens=0.*None for 49, or 'all'"):
        mdc.score(model, [images()], moment_tokens=0)


def test_moments_are_there_where_they_are_needed_or_asked_for():
    model, batch = make(), images(8)
    asked = mdc.score(model, [batch], "hsic", moments=True, progress=False)
    plain = mdc.score(model, [batch], "hsic", progress=False)
    assert plain.moments is None
    assert all(torch.equal(a, b) for a, b in zip(asked.neurons, plain.neurons, strict=True))
    needed = mdc.score(model, [batch], progress=False).moments
    assert needed.tensors().keys() == asked.moments.tensors().keys()
    assert all(torch.equal(needed.tensors()[name], tensor) for name, tensor in asked.moments.tensors().items())
    some = mdc.score(model, [batch], dimensions=("neurons",), progress=False).moments
    assert some.layers["heads"] == ()
    with pytest.raises(CompensationError, match="moments are not of the heads"):
        mdc.slim(model, plan_for(model, heads=0.5), "lstsq", moments=some)
    mdc.slim(model, plan_for(model, neurons=0.5), "lstsq", moments=some)


def test_some_patch_tokens_of_each_image_stand_for_all():
    """So many rows of each image, those of prefix tokens among them; the same ones whenever it is done again."""
    model, batch = make("registers"), images(8)  # 5 prefix tokens, 16 patches

    def found(tokens: int | str) -> LayerMoments:
        options = {"moment_tokens": tokens, "moments": True, "progress": False}
        return mdc.score(model, [batch[:5], batch[5:]], "magnitude", **options).moments.layers["neurons"][1]

    z = reads(model, "neurons.1", batch).reshape(8, 21, -1)
    some = found(6)
    assert int(some.rows) == 8 * (5 + 6)
    assert torch.equal(some.mean, found(6).mean)
    means = []
    for image in range(8):  # of one image alone, what is left of the prefix tokens is a mean of six patches
        alone = mdc.score(model, [batch[image : image + 1]], "magnitude", moments=True, moment_tokens=1, progress=False)
        layer = alone.moments.layers["neurons"][1]
        patch = 6 * layer.mean.numpy() - z[image, :5].sum(axis=0)
        apart = np.abs(z[image, 5:] - patch).max(axis=1)
        assert apart.min() < 1e-5 < np.sort(apart)[1]
        means.append(int(apart.argmin()))
    assert torch.equal(found(16).scatter, found("all").scatter)


# --- slim models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", daily(KINDS))
def test_every_kind_gets_nearer_to_what_its_layers_put_out_or_is_refused(kind):
    model = make(kind)
    batch = images(12)
    plan = plan_for(model, heads=0.5, neurons=0.5)
    moments = moments_on(model, [batch[:5], batch[5:]])
    if kind in NORMED:
        with pytest.raises(
            UnsupportedModelError, match=r"compensate='lstsq'.*blocks\.0\.(attn|mlp).*is taken over the units"
        ):
            mdc.slim(model, plan, compensate="lstsq", moments=moments)
        return
    before = copy.deepcopy(model.state_dict())
    plain, better = mdc.slim(model, plan), mdc.slim(model, plan, compensate="lstsq", moments=moments)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())  # the dense one
    assert mdc.macs(better) == mdc.macs(plain)
    assert better.mdc_plan == plain.mdc_plan
    for dimension in ("heads", "neurons"):
        width = model.blocks[0].attn.head_dim if dimension == "heads" else 1
        for index in range(DEPTH):
            z = reads(model, f"{dimension}.{index}", batch)
            kept = z[:, channels_of(plan, dimension, index, width)]
            layers = [consumers(each, dimension)[index] for each in (model, plain, better)]
            put_out = [
                x @ layer.weight.detach().double().numpy().T
                + (0 if layer.bias is None else layer.bias.detach().double().numpy())
                for x, layer in zip((z, kept, kept), layers, strict=True)
            ]
            errors = [np.square(each - put_out[0]).sum() for each in put_out[1:]]
            assert errors[1] < errors[0], (dimension, index)
            if layers[0].bias is not None:
                np.testing.assert_allclose(put_out[2].mean(axis=0), put_out[0].mean(axis=0), atol=1e-4)


def test_of_a_normed_model_what_has_no_norm_is_compensated():
    model = make("swiglu_normed")
    moments = moments_on(model, [images()])
    slim = mdc.slim(model, plan_for(model, heads=0.5), compensate="lstsq", moments=moments)
    assert not torch.equal(consumers(slim, "heads")[0].bias, consumers(model, "heads")[0].bias)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.mlp\.norm \(LayerNorm\) is taken over the units"):
        mdc.slim(model, plan_for(model, neurons=0.5), compensate="lstsq", moments=moments)


def test_keeping_everything_leaves_weights_as_they_are():
    model = make()
    moments = moments_on(model, [images()])
    slim = mdc.slim(model, plan_for(model, tokens=0.5), compensate="lstsq", moments=moments)
    assert all(torch.equal(slim.state_dict()[key], value) for key, value in model.state_dict().items())
    # So does the closed form where all units are among the kept.
    layer, known = consumers(model, "neurons")[0], moments.layers["neurons"][0]
    weight, bias = refitted(layer.weight, layer.bias, known, torch.arange(layer.in_features))
    torch.testing.assert_close(weight.float(), layer.weight.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(bias.float(), layer.bias.detach(), rtol=0, atol=1e-6)


def test_a_part_that_loses_all_units_keeps_their_mean():
    model = make()
    moments = moments_on(model, [images()])
    slim = mdc.slim(model, plan_for(model, heads=0.0, neurons=0.0), compensate="lstsq", moments=moments)
    z = reads(model, "heads.1", images())
    layer = consumers(model, "heads")[1]
    mean = (z @ layer.weight.detach().double().numpy().T).mean(axis=0) + layer.bias.detach().double().numpy()
    np.testing.assert_allclose(consumers(slim, "heads")[1].bias.detach(), mean, atol=1e-4)
    assert slim(images()).isfinite().all()


def test_a_redundant_neuron_costs_nothing():
    """Two neurons that do the same: without the second, with least squares, the model computes what it did."""
    model = make()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight[1] = block.mlp.fc1.weight[0]
            block.mlp.fc1.bias[1] = block.mlp.fc1.bias[0]
    whole = plan_for(model)
    hidden = whole.num_neurons[0]
    kept = tuple(unit for unit in range(hidden) if unit != 1)
    plan = dataclasses.replace(whole, kept={**whole.kept, "neurons": (kept,) * DEPTH})
    # Rows have to outnumber the neurons, or least squares knows more than one answer.
    moments = moments_on(model, [images(64)])
    slim = mdc.slim(model, plan, compensate="lstsq", moments=moments)
    fresh = images(8, seed=5)
    with torch.no_grad():
        apart = (mdc.slim(model, plan)(fresh) - model(fresh)).abs().max()
        assert (slim(fresh) - model(fresh)).abs().max() < 0.05 * apart


def test_a_slim_model_is_compensated_once_more_and_saved(tmp_path):
    model = make()
    first = mdc.slim(model, plan_for(model, neurons=0.7, tokens=0.6))
    moments = moments_on(first, [images()])
    second = mdc.slim(first, plan_for(first, neurons=0.5), compensate="lstsq", moments=moments)
    mdc.save(second, tmp_path / "slim")
    assert torch.equal(mdc.load(tmp_path / "slim")(images()), second(images()))


def test_what_does_not_fit_is_said():
    model = make()
    moments = moments_on(model, [images()])
    plan = plan_for(model, neurons=0.5)
    with pytest.raises(CompensationError, match="compensate='most': expected 'none' or 'lstsq'"):
        mdc.slim(model, plan, compensate="most", moments=moments)
    with pytest.raises(CompensationError, match=r"moments=None.*pass moments=scores\.moments"):
        mdc.slim(model, plan, compensate="lstsq")
    with pytest.raises(CompensationError, match="compensate='none' does not use them"):
        mdc.slim(model, plan, moments=moments)
    narrow = mdc.slim(model, plan)
    with pytest.raises(CompensationError, match="moments are of another model"):
        mdc.slim(narrow, plan_for(narrow, heads=0.5), compensate="lstsq", moments=moments)


# --- searching --------------------------------------------------------------------------------------------------------


def test_trials_are_judged_with_what_will_be_delivered(tmp_path):
    model = make()
    scores = mdc.score(model, [images(16)], "magnitude", moments=True)
    moments, seen = scores.moments, []

    def judge(slim: nn.Module) -> float:
        seen.append(slim)
        return float(len(seen))

    options = mdc.SearchOptions(journal=tmp_path / "state.jsonl", initial_points=2, progress=False)
    result = mdc.search(model, scores, judge, 0.5, 3, compensate="lstsq", options=options)
    for slim, trial in zip(seen, result.history, strict=True):
        plan = mdc.make_plan(model, scores, trial.policy)
        delivered = mdc.slim(model, plan, compensate="lstsq", moments=moments)
        assert torch.equal(slim(images()), delivered(images()))
        assert not torch.equal(slim(images()), mdc.slim(model, plan)(images()))
        assert mdc.macs(slim) == trial.macs <= 0.5 * mdc.macs(model)
    # Values of other models: another search.
    with pytest.raises(mdc.errors.SearchError, match="compensate"):
        mdc.search(model, scores, judge, 0.5, 3, options=options)


def test_a_search_that_cannot_compensate_says_so_before_it_begins():
    model = make("beit3_scale_norms")
    scores = mdc.score(model, [images(16)], "magnitude", moments=True)
    options = {"compensate": "lstsq", "options": mdc.SearchOptions(progress=False)}
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.attn\.norm"):
        mdc.search(model, scores, lambda slim: pytest.fail("a trial was made"), 0.9, 2, **options)
    mdc.search(model, scores, lambda slim: 1.0, 0.9, 2, **options, dimensions=["tokens"])
