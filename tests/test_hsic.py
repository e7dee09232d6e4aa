"""HSIC against a double loop in numpy that shares no line with the implementation."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.errors import CalibrationError
from lightning_mdc.importance import hsic as maths
from tests.kinds import images, make

RAW = mdc.HSIC(hsic_weight=1, activation_weight=0)


def gaussian_kernel(x: np.ndarray) -> np.ndarray:
    n = len(x)
    kernel = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            distance = ((x[i].astype(np.float64) - x[j].astype(np.float64)) ** 2).sum()
            kernel[i, j] = np.mean([np.exp(-distance / (2 * sigma**2)) for sigma in (1, 2, 4, 8, 16)])
    return kernel


def linear_kernel(y: np.ndarray) -> np.ndarray:
    return y.astype(np.float64) @ y.astype(np.float64).T


def biased(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741 (the paper's letters)
    n = len(k)
    h = np.eye(n) - 1 / n
    return float(np.trace(h @ k @ h @ h @ l @ h) / (n - 1) ** 2)


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_hsic_equals_the_definition(scale: float) -> None:
    x, y = scale * torch.randn(17, 5) + 3, torch.randn(17, 4).softmax(-1)
    expected = biased(gaussian_kernel(x.numpy()), linear_kernel(y.numpy()))
    assert mdc.hsic(x, y).item() == pytest.approx(expected, rel=1e-4, abs=1e-12)
    double = mdc.hsic(x.double(), y.double())
    assert double.dtype == torch.float64
    assert double.item() == pytest.approx(expected, rel=1e-8, abs=1e-14)


def test_hsic_tells_dependent_from_independent() -> None:
    x, noise = torch.randn(64, 3), torch.randn(64, 3)
    assert mdc.hsic(x, x.softmax(-1)) > 5 * mdc.hsic(noise, x.softmax(-1)).abs()


def test_hsic_refuses_shapes_that_do_not_fit() -> None:
    for x, y in ((torch.randn(4), torch.randn(4, 2)), (torch.randn(4, 2), torch.randn(5, 2))):
        with pytest.raises(CalibrationError, match=r"expected \(n, p\) and \(n, c\)"):
            mdc.hsic(x, y)
    with pytest.raises(CalibrationError, match="1 samples; dependence needs at least 2"):
        mdc.hsic(torch.randn(1, 2), torch.randn(1, 2))


def observed(model: nn.Module, batch: Tensor) -> dict[str, np.ndarray]:
    """Activations of one forward pass, caught by plain hooks."""
    seen: dict[str, Tensor] = {}
    width = model.embed_dim
    hooks = [
        model.blocks[2].mlp.fc2.register_forward_pre_hook(lambda _, args: seen.update(neurons=args[0])),
        model.blocks[1].attn.proj.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0])),
        model.blocks[2].attn.qkv.register_forward_hook(lambda _, __, out: seen.update(values=out[..., 2 * width :])),
    ]
    with torch.no_grad():
        seen["prediction"] = model(batch).softmax(-1)
    for hook in hooks:
        hook.remove()
    return {name: tensor.numpy() for name, tensor in seen.items()}


@pytest.mark.parametrize("kind", ["vit", "deit_distilled", "glu", "average_pool"])
def test_scores_equal_the_definition_on_a_real_model(kind: str) -> None:
    model = make(kind)
    batches = [images(8, seed=s) for s in range(3)]
    scores = mdc.score(model, batches, RAW, progress=False)

    neurons, heads, tokens = [], [], []
    for batch in batches:
        seen = observed(model, batch)
        label_kernel = linear_kernel(seen["prediction"])
        prefix = model.num_prefix_tokens

        def against(k: np.ndarray, other: np.ndarray = label_kernel) -> float:
            return biased(k, other)

        neurons.append([against(gaussian_kernel(seen["neurons"][:, :, j])) for j in range(12)])
        by_head = seen["heads"].reshape(8, -1, 4, 12).mean(-1)
        kernels = [gaussian_kernel(by_head[:, :, h]) for h in range(4)]
        redundancy = [np.mean([against(kernels[h], kernels[g]) for g in range(4) if g != h]) for h in range(4)]
        heads.append([against(kernels[h]) - 0.1 * redundancy[h] for h in range(4)])
        tokens.append([against(gaussian_kernel(seen["values"][:, prefix + t])) for t in range(16)])

    assert scores.images == 24
    np.testing.assert_allclose(scores.neurons[2][:12], np.mean(neurons, 0), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(scores.heads[1], np.mean(heads, 0), rtol=1e-4, atol=1e-9)
    assert scores.stages == (1, 2, 3)
    np.testing.assert_allclose(scores.tokens[1], np.mean(tokens, 0), rtol=1e-4, atol=1e-9)


def test_hsic_blends_normalised_dependence_and_activation() -> None:
    model, batches = make(), [images(8, seed=s) for s in range(2)]
    raw = mdc.score(model, batches, RAW, progress=False)
    blended = mdc.score(model, batches, "hsic", progress=False)

    def normalised(x: np.ndarray) -> np.ndarray:
        return (x - x.min()) / (x.max() - x.min())

    activation = sum(np.abs(observed(model, batch)["neurons"]).sum((0, 1)) for batch in batches)
    expected = 0.1 * normalised(raw.neurons[2].numpy()) + 0.9 * normalised(activation)
    np.testing.assert_allclose(blended.neurons[2], expected, rtol=1e-4, atol=1e-6)
    per_batch = [mdc.score(model, [batch], RAW, progress=False).tokens[1].numpy() for batch in batches]
    np.testing.assert_allclose(blended.tokens[1], np.mean([normalised(t) for t in per_batch], 0), rtol=1e-4, atol=1e-6)


def test_one_exponential_serves_all_kernels() -> None:
    x = 3 * torch.randn(2, 9, 4, dtype=torch.float64)
    expected = np.stack([gaussian_kernel(unit) for unit in x.numpy()]) - 1
    np.testing.assert_allclose(maths.gaussian_gram(x), expected, rtol=1e-10, atol=1e-15)
