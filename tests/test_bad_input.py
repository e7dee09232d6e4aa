"""Wrong inputs give one clear message of ours: which argument, its value, why, and what to do."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import lightning_mdc as mdc
from lightning_mdc.errors import MdcError
from tests.kinds import BASE, images, make

MODEL = make()
SCORES = mdc.score(MODEL, [images(8)], progress=False)
PLAN = mdc.make_plan(MODEL, SCORES, mdc.Policy(0.5, 0.5, 0.5))
SMALLER = mdc.Scores(SCORES.heads[:2], SCORES.neurons, SCORES.tokens, SCORES.stages)


def logits_3d(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(x), 2, 2)


def one_class() -> nn.Module:
    return VisionTransformer(**(BASE | {"num_classes": 1}))


def weight_normed() -> nn.Module:
    model = make()
    for block in model.blocks:
        torch.nn.utils.parametrizations.weight_norm(block.mlp.fc1)
    return model


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "budget of zero": (lambda: mdc.uniform_policy(MODEL, 0), r"budget=0: .*\(0, 1\]"),
    "budget above one": (lambda: mdc.uniform_policy(MODEL, 60), r"budget=60: .*Budget\(macs=1\.84e9\)"),
    "budget as text": (lambda: mdc.uniform_policy(MODEL, "0.6"), "budget='0.6'"),
    "budget of nothing": (lambda: mdc.Budget(), "limits nothing"),
    "negative budget": (lambda: mdc.Budget(params=-3), "params=-3"),
    "latency without unit": (lambda: mdc.Budget(latency=1.8), r"latency=1\.8: a plain number .* latency='1\.8ms'"),
    "latency of nothing": (lambda: mdc.Budget(latency="0ms"), "latency='0ms': expected a time per image"),
    "latency in another unit": (lambda: mdc.Budget(latency="3 fps"), "latency='3 fps': expected a time per image"),
    "batch size of MACs": (lambda: mdc.Budget(macs=0.5, batch_size=4), "batch_size=4: is for a limit of latency"),
    "half a batch": (lambda: mdc.Budget(latency=0.5, batch_size=0.5), "batch_size=0.5: expected a whole number"),
    "table and device": (
        lambda: mdc.Budget(latency=0.5, table="table.json", device="cpu"),
        "device='cpu': a table says itself",
    ),
    "no latency table": (
        lambda: mdc.uniform_policy(MODEL, mdc.Budget(latency=0.5, table="no.json")),
        "'no.json' cannot",
    ),
    "unknown device": (
        lambda: mdc.budget.measure_latency_table(MODEL, device="abacus"),
        "device='abacus': expected a device",
    ),
    "latency batch of none": (
        lambda: mdc.budget.measure_latency_table(MODEL, 0),
        "batch_size=0: expected a whole number",
    ),
    "unreachable budget": (lambda: mdc.uniform_policy(MODEL, 0.02), "smallest reachable cost"),
    "unknown dimension": (lambda: mdc.uniform_policy(MODEL, 0.6, ("layers",)), r"dimensions=\('layers',\): expected"),
    "no dimension": (lambda: mdc.uniform_policy(MODEL, 0.6, ()), r"dimensions=\(\)"),
    "half a head": (lambda: mdc.Space(min_heads=0.5), "min_heads=0.5: expected a whole number"),
    "round_to of zero": (lambda: mdc.Space(round_to=0), "round_to=0"),
    "stage beyond the depth": (
        lambda: mdc.uniform_policy(MODEL, 0.6, space=mdc.Space(stages=(4,))),
        r"stages=\[4\].*only 4 blocks",
    ),
    "stages out of order": (lambda: mdc.Policy(tokens=0.5, stages=[3, 1]), r"stages=\[3, 1\]: expected increasing"),
    "ratio above one": (lambda: mdc.Policy(heads=[1.2]), r"heads\[0\]=1\.2"),
    "ratios as text": (lambda: mdc.Policy(heads="0.5"), "heads='0.5'"),
    "policy for another depth": (
        lambda: mdc.policy_macs(MODEL, mdc.Policy(heads=[0.5] * 3)),
        "heads has 3 keep ratios",
    ),
    "policy for other stages": (lambda: mdc.policy_macs(MODEL, mdc.Policy(tokens=[0.5] * 2)), "2 keep ratios.*3 token"),
    "scores of another depth": (lambda: mdc.make_plan(MODEL, SMALLER, mdc.Policy(0.5)), "scores.heads does not fit"),
    "unknown token score": (lambda: mdc.TokenOptions("x"), "score='x'"),
    "plan of another model": (lambda: mdc.slim(make("glu"), PLAN), "plan is for another model"),
    "no vision transformer": (lambda: mdc.macs(nn.Linear(3, 3)), "Linear holds no supported vision transformer"),
    "input size of no image": (lambda: mdc.macs(MODEL, (0, 32)), r"input_size=\(0, 32\)"),
    "no batches": (lambda: mdc.score(MODEL, []), "needs images, but no usable batch"),
    "batches too small": (lambda: mdc.score(MODEL, [images(3)]), "no usable batch.*batches of at least 4 images"),
    "batches of text": (lambda: mdc.score(MODEL, ["image.png"]), "a batch is str; expected images"),
    "batches of arrays": (lambda: mdc.score(MODEL, [np.zeros((4, 3, 32, 32))]), "a batch is ndarray"),
    "no labels for taylor": (lambda: mdc.score(MODEL, [images(4)], "taylor"), "'taylor' needs labels"),
    "unknown criterion": (lambda: mdc.score(MODEL, [images(4)], "hsci"), "criterion='hsci' is unknown; known are"),
    "weights of nothing": (lambda: mdc.HSIC(0, 0), "nothing is left to score with"),
    "negative weight": (lambda: mdc.HSIC(hsic_weight=-1), "hsic_weight=-1"),
    "no classes": (lambda: mdc.score(MODEL, [images(4)], prediction=logits_3d), r"\(4, 2, 2\).*prediction="),
    "one-hot labels": (lambda: mdc.score(MODEL, [(images(4), torch.zeros(4, 7))], "taylor"), "no one-hot"),
    "labels out of range": (lambda: mdc.score(MODEL, [(images(4), torch.full((4,), 9))], "taylor"), "7 classes"),
    "no loader": (lambda: mdc.score(MODEL, 5), "batches=5: expected a DataLoader"),  # type: ignore[arg-type]
    "no model": (lambda: mdc.macs("vit"), "model='vit': expected a torch.nn.Module"),  # type: ignore[arg-type]
    "no plan": (lambda: mdc.slim(MODEL, mdc.Policy()), "expected a Plan"),  # type: ignore[arg-type]
    "no scores": (lambda: mdc.make_plan(MODEL, None, mdc.Policy()), "scores=None: expected"),  # type: ignore[arg-type]
    "arrays for hsic": (lambda: mdc.hsic(np.ones((4, 2)), np.ones((4, 2))), "expected tensors"),  # type: ignore[arg-type]
    "enormous ratio": (lambda: mdc.Policy(heads=10**400), r"heads\[0\]=1000"),
    "enormous budget": (lambda: mdc.Budget(params=10**400), "params=1000"),
    "stage order": (lambda: mdc.score(MODEL, [images(4)], stages=[2, 1]), r"stages=\[2, 1\]"),
    "a weight-normed layer": (lambda: mdc.uniform_policy(weight_normed(), 0.6, ("neurons",)), "blocks.0.mlp"),
    "plan from nothing": (lambda: mdc.Plan.from_json("{}"), "format"),
    "policy from a list": (lambda: mdc.Policy.from_json("[0.5]"), "must be an object"),
    "policy of unknown fields": (lambda: mdc.Policy.from_json('{"layers": 0.5}'), "unknown fields"),
    "a class": (lambda: mdc.macs(VisionTransformer), "VisionTransformer is a class.*; make a model of it first"),
    "what makes a model": (lambda: mdc.macs(make), "model=<function make .*call it first"),
    "weights of a model": (
        lambda: mdc.score({"cls_token": torch.zeros(3)}, [images(4)]),  # type: ignore[arg-type]
        "model=dict of cls_token, ...: .*load_state_dict",
    ),
    "models": (lambda: mdc.uniform_policy([MODEL, MODEL], 0.6), "model=list of 2: .*one by one"),  # type: ignore[arg-type]
    "TorchScript": (lambda: mdc.macs(torch.jit.script(nn.GELU())), "TorchScript made .*prune the model it was made of"),
    "a part as its path": (lambda: mdc.macs(MODEL, submodule=MODEL), "expected an attribute path"),  # type: ignore[arg-type]
    "a class of family": (lambda: mdc.models.register(mdc.models.Family), "expected an instance of a Family"),
    "a slim model": (lambda: mdc.slim(mdc.slim(MODEL, PLAN), PLAN), "is slim already: give the dense model"),
    "no such policy": (lambda: mdc.compress(MODEL, [], policy="unifrom"), "'unifrom': expected 'searched', 'uniform'"),
    "budget of a model": (lambda: mdc.MultiDimPruneCallback(MODEL), r"budget=VisionTransformer\(: a plain"),  # type: ignore[arg-type]
    "held out model": (lambda: mdc.HeldOut(MODEL), "batches is a VisionTransformer: expected"),  # type: ignore[arg-type]
    "export the other way": (lambda: mdc.export_model("x.onnx", MODEL), "path is a VisionTransformer: expected"),  # type: ignore[arg-type]
    "a folder of none": (lambda: mdc.load(None), "directory is a NoneType: expected the path"),  # type: ignore[arg-type]
    "loading nothing": (lambda: mdc.load("nowhere/at/all"), "is no folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_gives_one_clear_message(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(MdcError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
