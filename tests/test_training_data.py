"""How training data are looked at: the images that the loader gives, made as it makes them, and it stays as it was."""

import itertools
import json
import multiprocessing
import random
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

import lightning_mdc as mdc
from lightning_mdc.distributed import rank
from lightning_mdc.errors import CalibrationError
from lightning_mdc.importance.calibration import Calibration, joined, num_images, put_together
from lightning_mdc.importance.training_data import CalibrationBatches, calibration_batches, is_map_style, pool_of
from tests.processes import two_ranks
from tests.strangers import Spots, Stranger, loader, trainer


class Numbers(Dataset[Tensor]):
    """Item k is the number k, whatever else the key says."""

    def __init__(self, count: int = 40) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: Any) -> Tensor:
        return torch.tensor([float(key)])


class Endless(Sampler[int]):
    """Some keys over and over, in an order that goes on where it was."""

    def __init__(self, keys: list[int]) -> None:
        self.keys, self.generator, self.given = keys, torch.Generator().manual_seed(2), 0

    def __iter__(self) -> Iterator[int]:
        while True:
            for i in torch.randperm(len(self.keys), generator=self.generator).tolist():
                self.given += 1
                yield self.keys[i]


class Listed:
    """A batch sampler that is no `BatchSampler`, with batches of its own."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.epoch = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        return iter(random.sample(self.batches, len(self.batches)))

    def __len__(self) -> int:
        return len(self.batches)


def looked_at(data: DataLoader[Any], images: int = 8, judging: int = 4, **options: Any) -> tuple[list[Any], list[Any]]:
    scoring, judged = calibration_batches(data, Calibration(images, judging), 0, judged=True, **options)
    return list(scoring), list(judged)


def numbers(batches: list[Tensor]) -> list[int]:
    return [int(number) for batch in batches for number in batch.flatten()]


# --- which images -----------------------------------------------------------------------------------------------------

KEPT = [3, 5, 8, 13, 21, 34, 35, 36, 37, 38, 39, 2]
WEIGHTS = [float(k in KEPT) for k in range(40)]


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": SubsetRandomSampler(KEPT)},
        {"sampler": WeightedRandomSampler(WEIGHTS, 400)},
        {"sampler": WeightedRandomSampler(WEIGHTS, 5)},  # an epoch has fewer than are wanted
        {"sampler": KEPT},
        {"sampler": torch.tensor(KEPT)},
        {"sampler": Endless(KEPT)},
        {"batch_sampler": BatchSampler(SubsetRandomSampler(KEPT), 4, False)},
        {"batch_sampler": Listed([KEPT[:6], KEPT[6:]])},
        {"batch_sampler": Listed([tuple(KEPT[i::4]) for i in range(4)])},
        {"sampler": DistributedSamplerWrapper(SubsetRandomSampler(KEPT), num_replicas=2, rank=1)},
        {"sampler": DistributedSamplerWrapper(WeightedRandomSampler(WEIGHTS, 400), num_replicas=2, rank=0)},
    ],
    ids=lambda options: type(next(iter(options.values()))).__name__,
)
def test_only_what_is_trained_on_is_looked_at(options: dict[str, Any]) -> None:
    data = DataLoader(Numbers(), **({} if "batch_sampler" in options else {"batch_size": 4}), **options)
    scoring, judging = map(numbers, looked_at(data))
    assert {*scoring, *judging} <= set(KEPT)
    assert len({*scoring}) >= 6
    assert judging
    assert not {*scoring} & {*judging}


@pytest.mark.parametrize("sampler", [RandomSampler, SequentialSampler, DistributedSampler])
def test_samplers_that_come_to_all_images_in_time_are_not_iterated_over(sampler: Any) -> None:
    options = {"num_replicas": 2, "rank": 1} if sampler is DistributedSampler else {}
    options |= {"num_samples": 4} if sampler is RandomSampler else {}
    assert pool_of(DataLoader(Numbers(), sampler=sampler(Numbers(), **options)), 8, 0) == range(40)


class Crops(Dataset[Any]):
    """Keys are names, or places in an image and a size; there is no number of them."""

    def __getitem__(self, key: Any) -> tuple[Tensor, int]:
        if isinstance(key, str):
            return Spots()[int(key.removeprefix("image ").removesuffix(".png"))]
        index, size = key
        side = size if isinstance(size, int) else size[2]
        return Spots()[index][0][:, :side, :side], index


@pytest.mark.parametrize(
    ("options", "sides"),
    [
        ({"sampler": [f"image {i}.png" for i in range(9)], "batch_size": 3}, {16}),
        ({"sampler": [(i, (0, 0, 12)) for i in range(9)], "batch_size": 3}, {12}),
        (
            {"batch_sampler": [[(i, 8 + 4 * (i // 3)) for i in range(start, start + 3)] for start in (0, 3, 6)]},
            {8, 12, 16},
        ),
    ],
    ids=["names", "boxes", "a size for each batch"],
)
def test_keys_of_any_kind(options: dict[str, Any], sides: set[int]) -> None:
    scoring, judging = looked_at(DataLoader(Crops(), **options), images=6, judging=3)
    assert [len(batch[0]) for batch in scoring] == [3, 3]
    assert [len(batch[0]) for batch in judging] == [3]
    assert {batch[0].shape[-1] for batch in scoring + judging} == sides


def test_batches_are_those_that_the_users_batch_sampler_makes() -> None:
    own = [[0, 20], [1, 21, 31], [2, 22], [3, 23, 33]]
    scoring, judging = looked_at(DataLoader(Numbers(), batch_sampler=Listed(own)), images=5, judging=9)
    assert all(numbers([batch]) in own for batch in scoring + judging)
    # An epoch may end with a small one; those of the usual size come first.
    own = [[0, 20, 30], [1, 21, 31], [2, 22, 32], [3, 23], [4]]
    scoring, _ = looked_at(DataLoader(Numbers(), batch_sampler=Listed(own)), images=11, judging=1, least=2)
    assert [len(batch) for batch in scoring[:2]] == [3, 3]
    assert all(numbers([batch]) in own[:4] for batch in scoring)
    # One batch of all there is: two thirds and one third of it.
    scoring, judging = looked_at(DataLoader(Numbers(6), batch_sampler=Listed([[*range(6)]])))
    assert [len(numbers(scoring)), len(numbers(judging))] == [4, 2]


class Holding(Sampler[int]):
    def __init__(self) -> None:
        self.going = (k for k in range(40))

    def __iter__(self) -> Iterator[int]:
        return self.going


def test_what_cannot_be_looked_at_without_moving_it_on_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"its Holding cannot be copied \(.*a generator\).*order of training"):
        looked_at(DataLoader(Numbers(), sampler=Holding()))
    with pytest.raises(CalibrationError, match=r"WeightedRandomSampler gives no keys|Listed gives no keys"):
        looked_at(DataLoader(Numbers(), batch_sampler=Listed([])))
    with pytest.raises(CalibrationError, match="the data set is empty"):
        looked_at(DataLoader(Numbers(0), sampler=SequentialSampler(Numbers(0))))


class OfEachRank(Sampler[int]):
    """Splits the data among ranks itself."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(rank(), 24, 2))

    def __len__(self) -> int:
        return 12


class Pairs(BatchSampler):
    """Lightning gives it a share of the samples."""


def pools(number: int, root: Path) -> None:
    fit = trainer(root, strategy="ddp", devices=2, epochs=1)
    found = {}

    class Look(lightning.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            found.update({name: list(pool_of(each, 8, 0)) for name, each in trainer.train_dataloader.items()})

    class Two(Stranger):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["own"], batch_idx)

    fit.callbacks.append(Look())
    data = {
        "own": DataLoader(Spots(24), batch_size=4, sampler=OfEachRank()),
        "pairs": DataLoader(Spots(24), batch_sampler=Pairs(SequentialSampler(Spots(24)), 2, False)),
        "weighted": DataLoader(Spots(24), batch_size=4, sampler=WeightedRandomSampler([1.0, 0.0] * 12, 200)),
    }
    fit.fit(Two(), data)
    (root / f"{number}.json").write_text(json.dumps(found))


def test_all_ranks_find_the_same_images(tmp_path: Path) -> None:
    two_ranks(pools, tmp_path)
    first, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in (0, 1))
    assert first == second
    assert set(first["weighted"]) == {*range(0, 24, 2)}
    assert {key for pair in first["pairs"] for key in pair} == {*range(24)}
    assert set(first["own"]) == {*range(24)}


# --- made as the loader makes them ------------------------------------------------------------------------------------


class InFile(Numbers):
    """Reads what ``worker_init_fn`` has opened, with noise."""

    file: Any = None

    def __getitem__(self, key: Any) -> Tensor:
        self.file.seek(4 * key)
        return torch.frombuffer(bytearray(self.file.read(4)), dtype=torch.float32) + 0.5 * torch.rand(1)


def opened(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.file = open(info.dataset.path, "rb")  # noqa: SIM115


class Opener:
    """The other flavour: knows its data set, and gives it numbers that are there only in workers."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __call__(self, worker: int) -> None:
        self.dataset.file = open(self.dataset.path, "rb")  # noqa: SIM115


@pytest.mark.parametrize("how", ["get_worker_info", "itself", pytest.param("spawned", marks=pytest.mark.slow)])
def test_batches_are_made_in_a_worker_that_is_set_up_as_the_users(how: str, tmp_path: Path) -> None:
    data = InFile()
    data.path = tmp_path / "numbers"  # type: ignore[attr-defined]
    data.path.write_bytes(np.arange(40, dtype=np.float32).tobytes())  # type: ignore[attr-defined]
    options = {"worker_init_fn": Opener(data) if how == "itself" else opened}
    options |= {"multiprocessing_context": "spawn"} if how == "spawned" else {}
    own = DataLoader(data, batch_size=4, num_workers=2, **options)
    before = torch.get_rng_state()
    scoring, judging = calibration_batches(own, Calibration(12, 8), 0, judged=True)
    found = [*scoring, *judging]
    assert len(set(numbers(found))) == 20
    assert data.file is None  # not in this process
    # Whoever makes it draws the same for a batch.
    second = scoring.of_rank(1, 2)
    assert torch.equal(second[0], found[1])
    assert torch.equal(torch.get_rng_state(), before)
    del scoring, judging, second
    assert not multiprocessing.active_children()


def test_an_image_is_the_same_with_and_without_workers() -> None:
    class Noisy(Numbers):
        def __getitem__(self, key: Any) -> Tensor:
            return torch.tensor([key + torch.rand(()).item(), np.random.rand(), random.random()])

    here, there = (list(looked_at(DataLoader(Noisy(), batch_size=4, num_workers=n))[0]) for n in (0, 1))
    assert all(map(torch.equal, here, there))


class Broken(Numbers):
    def __getitem__(self, key: Any) -> Tensor:
        raise KeyError(f"no image {key}")


def test_what_fails_in_a_worker_is_one_error() -> None:
    with pytest.raises(CalibrationError, match=r"num_workers=1\): KeyError: 'no image \d+'$"):
        looked_at(DataLoader(Broken(), batch_size=4, num_workers=1))
    assert not multiprocessing.active_children()


def test_data_sets_that_yield_whole_batches() -> None:
    class Whole(Dataset[Tensor]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, key: int) -> Tensor:
            assert get_worker_info() is not None
            return torch.tensor([2.0 * key, 2.0 * key + 1])

    data = DataLoader(Whole(), batch_size=None, num_workers=1)
    scoring, judging = looked_at(data)
    assert [len(batch) for batch in scoring + judging] == [2] * 6
    scoring, _ = looked_at(data, least=4)
    assert [len(batch) for batch in scoring] == [8]
    assert len(set(numbers(scoring))) == 8


# --- the loader stays as it was ---------------------------------------------------------------------------------------


class Moving(Spots):
    """Draws from generators of its own, as transforms of MONAI and albumentations do."""

    def __init__(self) -> None:
        super().__init__()
        self.transforms = [np.random.RandomState(1), {"own": [np.random.default_rng(1), torch.Generator()]}]
        self.random = random.Random(1)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(index)
        noise = self.transforms[0].rand() + self.transforms[1]["own"][0].random() + self.random.random()  # type: ignore
        return image + 0.1 * noise + torch.rand((), generator=self.transforms[1]["own"][1]), label  # type: ignore


class Walking(Sampler[int]):
    """Begins where it was left."""

    def __init__(self) -> None:
        self.at, self.random = 0, np.random.default_rng(0)

    def __iter__(self) -> Iterator[int]:
        for _ in range(80):
            self.at = (self.at + int(self.random.integers(1, 4))) % 80
            yield self.at


ORDERS: dict[str, Any] = {
    "persistent workers": lambda: {
        "shuffle": True,
        "num_workers": 1,
        "persistent_workers": True,
        "worker_init_fn": print_nothing,
    },
    "stateful sampler": lambda: {"sampler": Walking()},
    "stateful batches": lambda: {"batch_sampler": Listed([[*range(i, i + 8)] for i in range(0, 80, 8)])},
    "generators in the data": lambda: {"dataset": Moving(), "shuffle": True},
}


def print_nothing(worker: int) -> None: ...


@pytest.mark.parametrize("order", ORDERS)
def test_training_sees_the_same_batches_as_without_us(order: str, tmp_path: Path) -> None:
    seen: list[list[Any]] = []

    class Order(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen[-1].append((batch[0].sum(dim=(1, 2, 3)).tolist(), torch.rand(()).item()))

    for callbacks in ([], [mdc.MultiDimPruneCallback(0.5, "uniform", calibration=Calibration(16))]):
        seen.append([])
        torch.manual_seed(5)
        random.seed(5)
        options = {"dataset": Spots(), **ORDERS[order]()}
        data: DataLoader[Any] = DataLoader(**options, **({} if "batch_sampler" in options else {"batch_size": 16}))
        trainer(tmp_path, *callbacks, Order()).fit(Stranger(), data)
    assert seen[0] == seen[1]


def test_a_loader_that_iterates_in_its_own_way_is_watched(tmp_path: Path) -> None:
    class Darker(DataLoader[Any]):
        def __iter__(self) -> Any:
            return iter([0.25 * images, labels] for images, labels in super().__iter__())

    brightest = []

    class Watching(mdc.MultiDimPruneCallback):
        def calibration_step(self, pl_module: lightning.LightningModule, batch: Any) -> Any:
            brightest.append(batch[0].max().item())
            return super().calibration_step(pl_module, batch)

    assert not is_map_style(Darker(Spots()))
    callback = Watching(0.5, "uniform", calibration=Calibration(16))
    trainer(tmp_path, callback, epochs=1).fit(Stranger(), Darker(Spots(), batch_size=16))
    assert callback.plan is not None
    assert max(brightest) < 0.3


# --- small batches ----------------------------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    def __init__(self, count: int = 80) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(Spots(80)), self.count)


class Sizes(mdc.MultiDimPruneCallback):
    """Writes down how many images the model is shown at once."""

    def calibration_step(self, pl_module: lightning.LightningModule, batch: Any) -> Any:
        self.__dict__.setdefault("sizes", []).append(len(batch[0]))
        return super().calibration_step(pl_module, batch)


@pytest.mark.parametrize(
    ("data", "size", "criterion"),
    [
        ("map", 1, "hsic"),
        ("map", 2, "conditional"),
        ("stream", 2, "hsic"),
        pytest.param("stream", 1, "conditional", marks=pytest.mark.slow),
    ],
)
def test_small_batches_are_put_together(data: str, size: int, criterion: str, tmp_path: Path) -> None:
    own: DataLoader[Any] = loader(batch_size=size) if data == "map" else DataLoader(Stream(), batch_size=size)
    callback = Sizes(0.5, "uniform", criterion, compensate="none", calibration=Calibration(64))
    steps = 1 if data == "map" else 64 // size + 1
    trainer(tmp_path, callback, epochs=1, limit_train_batches=steps).fit(Stranger(), own)
    assert callback.scores is not None
    assert callback.scores.images == 64
    assert callback.sizes[-2:] == [32, 32]


@pytest.mark.parametrize("streams", [False, True])
def test_they_are_tried_out_together_before_start(streams: bool, tmp_path: Path) -> None:
    callback = Sizes(0.5, "uniform", "hsic", start=2)
    data: DataLoader[Any] = DataLoader(Stream(), batch_size=2) if streams else loader(batch_size=2)
    with pytest.warns(UserWarning, match="fit ended before anything was pruned"):
        trainer(tmp_path, callback, epochs=1, limit_train_batches=3).fit(Stranger(), data)
    assert callback.sizes == ([4] if streams else [32])


class OfAnySize(Spots):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(index)
        return image[..., : 16 - 4 * (index % 2)], label


def test_what_cannot_be_put_together_is_said(tmp_path: Path) -> None:
    remedy = "give images one size, or choose a criterion that single images will do for"
    with pytest.raises(CalibrationError, match=f"32 images.* cannot be put into one batch as 1 can: .*{remedy}"):
        looked_at(DataLoader(OfAnySize(), batch_size=1), images=64, least=4)

    class Odd(Stream):
        def __iter__(self) -> Iterator[Any]:
            return iter(OfAnySize())

    class Resizing(Stranger):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.interpolate(x, (16, 16)))

    with pytest.raises(
        CalibrationError, match=r"training batches of 1 are too small .*: Sizes of tensors.*larger batch"
    ):
        trainer(tmp_path, Sizes(0.5, "uniform"), epochs=1).fit(Resizing(), DataLoader(Odd(), batch_size=1))
    with pytest.raises(CalibrationError, match=r"there are 3 training images to score on, .* at least 4 together"):
        trainer(tmp_path, Sizes(0.5, "uniform"), epochs=1).fit(Stranger(), DataLoader(Spots(3), batch_size=1))
    with pytest.raises(CalibrationError, match=r"there are 2 training images to score on, .* at least 4 together"):
        trainer(tmp_path, Sizes(0.5, "uniform"), epochs=1).fit(Stranger(), DataLoader(Stream(2), batch_size=1))
    with pytest.raises(CalibrationError, match=r"calibration.batch_size=2: the criterion needs at least 4 images"):
        calibration_batches(loader(), Calibration(batch_size=2), 0, least=4)


def test_joining_keeps_the_structure() -> None:
    def batch(start: int) -> Any:
        return {
            "pixels": torch.arange(start, start + 2.0)[:, None],
            "names": [f"{start}", f"{start + 1}"],
            "of all": (None, 3, torch.ones(5), UserDict(x=torch.full((2,), start))),
        }

    found = joined([batch(0), batch(2)])
    assert found["pixels"].flatten().tolist() == [0, 1, 2, 3]
    assert found["names"] == ["0", "1", "2", "3"]
    assert found["of all"][:2] == (None, 3)
    assert found["of all"][3]["x"].tolist() == [0, 0, 2, 2]
    assert num_images(UserDict(x=torch.zeros(3, 1))) == 3
    with pytest.raises(CalibrationError, match=r"a tensor \(3, 4\) beside 2 images"):  # boxes of all images together
        joined([[torch.zeros(2, 1), torch.rand(3, 4)] for _ in range(2)])
    with pytest.raises(CalibrationError, match="they are structured differently"):
        joined([[torch.zeros(2, 1)], {"x": torch.zeros(2, 1)}])


def test_what_is_left_over_goes_into_no_batch() -> None:
    assert [len(batch) for batch in put_together([torch.zeros(n) for n in (8, 8, 3)], 4)] == [8, 8]
    assert [len(batch) for batch in put_together([torch.zeros(3) for _ in range(12)], 4)] == [33]
    assert [len(batch) for batch in put_together([torch.zeros(2) for _ in range(3)], 4)] == [6]
    assert put_together([], 4) == []


def test_batches_are_a_sequence() -> None:
    batches, _ = calibration_batches(DataLoader(Numbers(), batch_size=4, num_workers=1), Calibration(12), 0)
    assert isinstance(batches, CalibrationBatches)
    assert torch.equal(batches[0], batches[0])
    assert torch.equal(batches[2], list(batches)[2])
    with pytest.raises(IndexError):
        batches[3]
