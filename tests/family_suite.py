"""What every model family has to pass: one class, which a test module subclasses with a maker of its models.

A maker gives a small, randomised model in eval mode that takes images (n, 3, SIZE, SIZE) and has at least three blocks.
"""

from __future__ import annotations

import copy
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.models import find_anatomy, is_masked, prediction_in
from lightning_mdc.policy import UNIT_DIMENSIONS, TokenOptions, TokenStage
from tests.kinds import counted_macs, images

REDUCTIONS = ("fuse", "drop", "merge")


def random_plan(
    model: nn.Module, reduction: str = "fuse", *, keep: float = 0.5, restore: bool | None = None, prior: bool = True
) -> mdc.Plan:
    """A plan of random units; tokens leave in two blocks, where they may, with a prior at both."""
    anatomy = find_anatomy(model)
    rng = random.Random(0)
    kept = {
        dimension: tuple(tuple(sorted(rng.sample(range(size), round(size * keep)))) for size in sizes)
        for dimension, sizes in anatomy.sizes.items()
    }
    stages = []
    for block in (1, 2) if anatomy.no_tokens is None else ():
        values = tuple(rng.random() for _ in range(anatomy.grid[0] * anatomy.grid[1])) if prior else None
        score, grid = ("attention*dependence", anatomy.grid) if prior else ("attention", None)
        stages.append(TokenStage(block, 0.7, score, values, grid))
    return mdc.Plan(kept, anatomy.sizes, tuple(stages), reduction, anatomy.restores(restore))


def sliced_like_slim(model: nn.Module, plan: mdc.Plan, name: str, tensor: Tensor) -> Tensor:
    """Of a tensor shaped like the dense parameter `name`: the entries that the slim model keeps."""
    module, _, parameter = name.rpartition(".")
    owner = model.get_submodule(module)
    for units in find_anatomy(model).all_units:
        for part in units.slices:
            if part.module is owner and part.name == parameter:
                kept = plan.kept[units.dimension][units.block]
                tensor = tensor.index_select(part.dim, units.left(part, kept, tensor.shape[part.dim]))
    return tensor


def poisoned(
    model: nn.Module, plan: mdc.Plan, values: tuple[float, ...] = (float("inf"), float("-inf"), float("nan"))
) -> int:
    """Put values that are no numbers where removed units alone are: in biases if there are any. How many places."""
    places = 0
    with torch.no_grad():
        for number, units in enumerate(find_anatomy(model).all_units):
            kept = set(plan.kept[units.dimension][units.block])
            removed = [unit for unit in range(units.count) if unit not in kept]
            parts = [p for p in units.slices if p.tensor.ndim == 1] or [p for p in units.slices if p.dim == 0]
            for part in parts if removed else ():
                part.tensor.index_fill_(part.dim, units.entries(part, removed[:1]), values[number % len(values)])
                places += 1
    return places


def seeded(model: nn.Module, x: Tensor) -> Tensor:
    """What a model gives that may drop at random."""
    torch.manual_seed(0)
    output: Tensor = prediction_in(model(x))
    return output


def tokens_of(output: Any) -> Any:
    """In what a block gives, alone or with its attention's map."""
    return output[0] if isinstance(output, tuple) else output


class FamilySuite:
    """Subclass it and give the fixture `dense`."""

    @pytest.fixture
    def dense(self) -> nn.Module:
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _one_reduction_of_nothing(self, request: pytest.FixtureRequest, dense: nn.Module) -> None:
        named = getattr(request.node, "callspec", None)
        if named is not None and named.params.get("reduction", "fuse") != "fuse" and find_anatomy(dense).no_tokens:
            pytest.skip("no tokens leave")

    # --- anatomy and scores ---------------------------------------------------------------------------------------

    def test_slices_are_of_whole_units(self, dense: nn.Module) -> None:
        anatomy = find_anatomy(dense)
        assert anatomy.dimensions
        for units in anatomy.all_units:
            assert units.slices
            assert units.reader.weight.shape[1] == units.count * units.width
            for part in units.slices:
                entries = units.left(part, range(units.count), part.tensor.shape[part.dim])
                assert entries.tolist() == list(range(part.tensor.shape[part.dim])), (units.name, part.name)

    def test_every_unit_gets_a_score(self, dense: nn.Module) -> None:
        anatomy = find_anatomy(dense)
        scores = mdc.score(dense, [images(8)], dimensions=anatomy.dimensions, progress=False)
        for dimension in UNIT_DIMENSIONS:
            assert tuple(map(len, scores.units(dimension))) == anatomy.sizes[dimension]
        if anatomy.no_tokens is None:
            assert all(len(values) == anatomy.grid[0] * anatomy.grid[1] for values in scores.tokens)
        policy = mdc.uniform_policy(dense, 0.8, anatomy.dimensions)
        plan = mdc.make_plan(dense, scores, policy, TokenOptions(score="attention*dependence"))
        assert 0.79 * mdc.macs(dense) < mdc.plan_macs(dense, plan) <= 0.8 * mdc.macs(dense)

    # --- masked and slim ------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_masked_equals_slim(self, dense: nn.Module, reduction: str) -> None:
        x, before = images(), prediction_in(dense(images())).detach()
        plan = random_plan(dense, reduction)
        slim = mdc.slim(dense, plan)
        for mode in (True, False):
            with mdc.masked(dense.train(mode), plan):
                masked = seeded(dense, x)
            torch.testing.assert_close(masked, seeded(slim.train(mode), x), rtol=0, atol=1e-5)
        assert not torch.allclose(masked, before, atol=1e-3)
        assert torch.equal(prediction_in(dense(x)), before)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_what_is_masked_takes_no_part(self, dense: nn.Module, reduction: str) -> None:
        plan = random_plan(dense, reduction)
        assert poisoned(dense, plan)
        slim = mdc.slim(dense, plan)

        def gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
            x = images().requires_grad_()
            prediction_in(model(x)).square().sum().backward()
            assert x.grad is not None
            return x.grad, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

        with mdc.masked(dense, plan):
            of_images, of_dense = gradients(dense)
        slims_images, of_slim = gradients(slim)
        torch.testing.assert_close(of_images, slims_images, rtol=1e-5, atol=1e-6)
        assert of_dense.keys() == of_slim.keys()
        for name, gradient in of_slim.items():
            kept = sliced_like_slim(dense, plan, name, of_dense[name])
            torch.testing.assert_close(kept, gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-7)
            assert of_dense[name].count_nonzero() == kept.count_nonzero(), name  # and nothing for what is removed

    def test_masks_cannot_be_seen(self, dense: nn.Module, tmp_path: Path) -> None:
        plan, x = random_plan(dense), images()
        state, seen = dense.state_dict(), []
        tensors = [id(tensor) for tensor in (*dense.parameters(), *dense.buffers())]
        names = [name for name, _ in dense.named_modules()]
        blocks = [block.module for block in find_anatomy(dense).blocks]
        handles = [blocks[1].register_forward_hook(lambda module, args, output: seen.append(tokens_of(output)))]
        with mdc.masked(dense, plan):
            handles.append(blocks[2].register_forward_hook(lambda module, args, output: seen.append(tokens_of(output))))
            expected = prediction_in(dense(x))
            assert all(isinstance(output, Tensor) for output in seen)
            assert [id(tensor) for tensor in (*dense.parameters(), *dense.buffers())] == tensors
            assert [name for name, _ in dense.named_modules()] == names
            assert all(torch.equal(state[name], value) for name, value in dense.state_dict().items())
            assert find_anatomy(dense).sizes == plan.sizes
            copied, pickled = copy.deepcopy(dense), pickle.loads(pickle.dumps(_without_hooks(dense)))
        slim = mdc.slim(dense, plan)
        of_slim: list[Tensor] = []
        for block in find_anatomy(slim).blocks[1:3]:
            block.module._forward_hooks.clear()
            block.module.register_forward_hook(lambda module, args, output: of_slim.append(tokens_of(output)))
        slim(x)
        for one, other in zip(seen[:2], of_slim, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        for handle in handles:
            handle.remove()
        for other in (copied, pickled):
            assert is_masked(other)
            torch.testing.assert_close(prediction_in(other(x)), expected, rtol=0, atol=1e-5)
        with mdc.masked(dense, plan):
            pass
        assert not any("_mdc" in key for module in dense.modules() for key in vars(module))

    # --- costs ----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_macs_are_those_that_torch_counts(self, dense: nn.Module, reduction: str) -> None:
        if reduction == "fuse":
            assert mdc.macs(dense) == counted_macs(dense)
        for restore in (None, True) if reduction == "fuse" else (True,):
            plan = random_plan(dense, reduction, restore=restore)
            slim = mdc.slim(dense, plan)
            assert mdc.plan_macs(dense, plan) == mdc.macs(slim) == counted_macs(slim)

    def test_params_are_those_that_torch_has(self, dense: nn.Module) -> None:
        plan = random_plan(dense)
        expected = sum(parameter.numel() for parameter in mdc.slim(dense, plan).parameters())
        costs = mdc.budget.CostModel(find_anatomy(dense))
        assert int(costs.params(costs.kept_by_plan(plan))) == expected

    # --- tokens ---------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @torch.no_grad()
    def test_an_images_output_is_its_own(self, dense: nn.Module, reduction: str) -> None:
        slim, x = mdc.slim(dense, random_plan(dense, reduction)), images(16)
        order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
        whole = prediction_in(slim(x))
        torch.testing.assert_close(prediction_in(slim(x[order])), whole[order], rtol=0, atol=1e-5)
        alone = torch.cat([prediction_in(slim(x[i : i + 1])) for i in range(4)])
        torch.testing.assert_close(alone, whole[:4], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @torch.no_grad()
    def test_restored_features_have_their_dense_shape(self, dense: nn.Module, reduction: str) -> None:
        if find_anatomy(dense).no_tokens is not None:
            with pytest.raises(mdc.errors.UnsupportedModelError, match="cannot lose tokens"):
                mdc.uniform_policy(dense, 0.8, ("tokens",))
            return
        x = images(2)
        slim = mdc.slim(dense, random_plan(dense, reduction, restore=True))
        fewer = mdc.slim(dense, random_plan(dense, reduction, restore=False))
        features, dropped = self.features(slim, x), self.features(fewer, x)
        assert features.shape == self.features(dense, x).shape
        assert dropped.shape[1] < features.shape[1]
        prefix = find_anatomy(dense).num_prefix_tokens
        torch.testing.assert_close(features[:, :prefix], dropped[:, :prefix], rtol=0, atol=1e-5)

    def features(self, model: nn.Module, x: Tensor) -> Tensor:
        """Tokens behind the last block, (n, tokens, dim)."""
        features: Tensor = model.forward_features(x)
        return features

    # --- artifacts ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def test_saved_and_loaded(self, dense: nn.Module, tmp_path: Path) -> None:
        plan, x = random_plan(dense), images()
        assert mdc.Plan.from_json(plan.to_json()) == plan
        assert json.loads(plan.to_json())["reduction"] == "fuse"
        slim = mdc.slim(dense, plan)
        loaded = self.saved_and_loaded(slim, dense, tmp_path / "slim")
        # Bit by bit the same weights; where they lie in memory, a CPU may add up in another order.
        torch.testing.assert_close(loaded.state_dict(), slim.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(prediction_in(loaded(x)), prediction_in(slim(x)), rtol=1e-5, atol=1e-6)
        assert list(loaded.state_dict()) == list(dense.state_dict())

    def saved_and_loaded(self, slim: nn.Module, dense: nn.Module, folder: Path) -> nn.Module:
        """`slim`, made of `dense`, after it was in `folder`."""
        mdc.save(slim, folder)
        return mdc.load(folder)

    @pytest.mark.slow
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_exported(self, dense: nn.Module, reduction: str, tmp_path: Path) -> None:
        slim = mdc.slim(dense, random_plan(dense, reduction))
        assert_exported(slim, tmp_path / "slim.pt2")

    @pytest.mark.slow
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_exported_to_onnx(self, dense: nn.Module, reduction: str, tmp_path: Path) -> None:
        slim = mdc.slim(dense, random_plan(dense, reduction))
        assert_exported(slim, tmp_path / "slim.onnx")


def _without_hooks(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)  # a lambda cannot be pickled
    for module in copied.modules():
        module._forward_hooks.clear()
    return copied


def assert_exported(slim: nn.Module, path: Path) -> None:
    """What is exported computes the same, also of constant images, whose tokens are all alike."""
    mdc.export_model(slim, path, progress=False)
    program: Callable[[Tensor], Tensor]
    if path.suffix == ".pt2":
        program = torch.export.load(path).module()
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def program(x: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])

    for x in (images(5), torch.zeros(3, 3, *images(1).shape[2:]), torch.ones(1, 3, *images(1).shape[2:])):
        with torch.no_grad():
            torch.testing.assert_close(program(x), prediction_in(slim(x)), rtol=0, atol=1e-4)
