"""Files of torch's with anything in them: tensors and plain values come out, nothing else is made, imported or run."""

import argparse
import collections
import datetime
import enum
import functools
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.distillation import Teacher
from lightning_mdc.errors import ArtifactError, CallbackError
from lightning_mdc.surgery import make_plan
from lightning_mdc.unpickling import Foreign, read
from lightning_mdc.weights import load_weights
from tests.strangers import network

KEY = "MultiDimPruneCallback{'submodule': None}"


class Kind(enum.Enum):
    A = 1


class Mine:
    class Inner:
        pass

    def __init__(self) -> None:
        self.parts = [Mine.Inner(), {Kind.A: 1}]


class Runs:
    """What a pickle could run."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("unpickled",)


class Listed(list[int]):
    pass


class Mapped(dict[str, int]):
    pass


class Subclass(Tensor):
    pass


Pair = collections.namedtuple("Pair", "a b")

FOREIGN: dict[str, Any] = {
    "OmegaConf": OmegaConf.create({"lr": 0.1, "widths": [1, 2]}),
    "path": Path("/data"),
    "namespace": argparse.Namespace(lr=0.1, inner=argparse.Namespace()),
    "numpy": [np.float64(3.0), np.arange(3), np.dtype("int8"), np.random.default_rng(0)],
    "classes": [Mine, Mine.Inner, nn.Linear, Kind, len],
    "objects": [Mine(), Kind.A, Listed([1]), Mapped(a=1), Pair(1, 2), nn.Linear(2, 2)],
    "of the standard library": [datetime.datetime.now(), functools.partial(print, 1), range(3), ..., slice(1, 2)],
    "containers": [{1}, frozenset([1]), collections.deque([1]), collections.defaultdict(list, a=[1]), 1j, b"bytes"],
    "keys": {Mine: 1, Kind.A: 2, Path("a"): 3},
    "something that runs": Runs(),
    "tensors": [torch.zeros(2).to_sparse(), torch.Generator(), torch.float16, torch.device("cpu"), torch.Size([1])],
}


def checkpoint(**more: Any) -> dict[str, Any]:
    """As Lightning writes them, with a callback's state."""
    model = network()
    plan = make_plan(model, mdc.score(model, [], "magnitude", progress=False), mdc.Policy(neurons=0.5))
    callback = mdc.MultiDimPruneCallback(policy=mdc.Policy(neurons=0.5))
    content: dict[str, Any] = {"state_dict": {f"net.{name}": value for name, value in model.state_dict().items()}}
    callback.on_save_checkpoint(None, None, content)  # type: ignore[arg-type]
    content["callbacks"][KEY]["plan"] = plan.to_json()
    return content | more


@pytest.mark.parametrize("kind", FOREIGN)
def test_our_state_and_the_weights_are_read_whatever_lies_beside_them(kind: str, tmp_path: Path) -> None:
    content, path = checkpoint(hyper_parameters={"value": FOREIGN[kind]}), tmp_path / "last.ckpt"
    content["callbacks"]["Theirs"] = {"state": FOREIGN[kind]}
    torch.save(content, path)
    assert mdc.plan_from_checkpoint(path).to_json() == content["callbacks"][KEY]["plan"]
    model = network(3)
    load_weights(model, path)
    assert all(torch.equal(value, network().state_dict()[name]) for name, value in model.state_dict().items())


def test_a_class_that_is_gone_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    gone = ModuleType("gone")
    exec("class Settings:\n    def __init__(self): self.lr = 1", vars(gone))
    monkeypatch.setitem(sys.modules, "gone", gone)
    torch.save(checkpoint(hyper_parameters=gone.Settings()), tmp_path / "last.ckpt")
    monkeypatch.delitem(sys.modules, "gone")
    assert mdc.plan_from_checkpoint(tmp_path / "last.ckpt").neurons
    assert "gone" not in sys.modules
    args = {
        "img_size": 16,
        "patch_size": 4,
        "in_chans": 1,
        "num_classes": 5,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 4,
    }
    teacher = Teacher("vit_tiny_patch16_224", checkpoint=tmp_path / "last.ckpt", args=args)
    images = torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        taught = mdc.DistillationModule(network(1), teacher).teacher(images)
        torch.testing.assert_close(taught, network().eval()(images))


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 5}], ids=str)
def test_plain_values_and_tensors_come_out_as_they_were(options: dict[str, Any], tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.decays = False  # type: ignore[attr-defined]
    plain = [1, 2.5, "a", None, True, {"b": (1,)}, {3}, frozenset({4}), 1j, b"c", bytearray(b"d"), torch.float16]
    plain += [collections.OrderedDict(a=1), collections.Counter("aab"), torch.Size([2]), torch.device("cpu")]
    kinds = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
    kinds += [] if "_use_new_zipfile_serialization" in options else [torch.float8_e4m3fn]
    tensors = [*(torch.ones(2, 3).to(kind) for kind in kinds), torch.ones(3, 2).T, torch.tensor(1.0), torch.zeros(0)]
    odd = [parameter, torch.ones(2).as_subclass(Subclass)]
    torch.save([plain, tensors, odd, Mine()], tmp_path / "a.pt", **options)
    read_plain, read_tensors, read_odd, foreign = read(tmp_path / "a.pt")
    assert read_plain == plain
    assert [type(value) for value in read_plain] == [type(value) for value in plain]
    for before, after in zip(tensors, read_tensors, strict=True):
        assert (after.dtype, after.stride()) == (before.dtype, before.stride())
        assert torch.equal(after.to(torch.complex64), before.to(torch.complex64))
    assert all(torch.equal(tensor, torch.ones(2)) for tensor in read_odd)
    assert [type(tensor) for tensor in read_odd] == [nn.Parameter, Tensor]
    assert foreign is Foreign


def test_weights_inside_of_what_is_foreign_are_named(tmp_path: Path) -> None:
    for content in (network(), {"model": network()}, {"state_dict": Runs()}):
        torch.save(content, tmp_path / "whole.pth")
        with pytest.raises(ArtifactError, match=r"holds more than weights, .*, in which they lie.*save its weights by"):
            load_weights(network(), tmp_path / "whole.pth")


def test_a_program_and_what_is_damaged_are_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "program.pt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save(checkpoint(), tmp_path / "cut.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "cut.ckpt").read_bytes()[:5000])
    for name in ("program.pt", "text.ckpt", "cut.ckpt", "nothing.ckpt"):
        with pytest.raises(CallbackError, match=rf"checkpoint='.*{name}' cannot be read: "):
            mdc.plan_from_checkpoint(tmp_path / name)
