"""Which image is read when: the same images per step on any number of processes, and after any interruption."""

import multiprocessing
import warnings
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.trainer.connectors.data_connector import _DataConnector
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.data import IterableDataset, SequentialSampler

from lightning_mdc.app.data import DigitsDataModule, ImageDataModule, Splits
from lightning_mdc.app.data.digits import TensorImages
from lightning_mdc.app.data.module import _say_without_workers
from lightning_mdc.errors import DataError


class Numbered(ImageDataModule):
    """Images of one pixel that say their number; val is odd in number on purpose."""

    def __init__(
        self, images: int = 23, batch_size: int = 4, num_workers: int = 0, held_out: int = 7, **loading
    ) -> None:
        super().__init__(1, 1, batch_size, num_workers, **loading)
        self.images, self.held_out = images, held_out

    def make_splits(self) -> Splits:
        def numbered(count: int) -> TensorImages:
            return TensorImages(torch.arange(float(count)).view(-1, 1, 1, 1), [i % 3 for i in range(count)])

        train, held_out = numbered(self.images), numbered(self.held_out)
        return Splits(train, held_out, held_out, train, ("a", "b", "c"))


class Recorder(lightning.LightningModule):
    """Writes down (epoch, numbers of the images) of every training step, and of every validation run."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 3)
        self.seen: list[tuple[int, list[int]]] = []
        self.validated: list[int] = []

    def training_step(self, batch, batch_idx) -> Tensor:
        images, labels = batch
        self.seen.append((self.current_epoch, images.flatten().int().tolist()))
        return nn.functional.cross_entropy(self.layer(images.flatten(1) / 100), labels)

    def validation_step(self, batch, batch_idx) -> None:
        self.validated += batch[0].flatten().int().tolist()

    def configure_optimizers(self):
        _ = self.trainer.estimated_stepping_batches  # as a schedule does: it makes the training loader early
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Dies(lightning.Callback):
    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.after:
            raise InterruptedError


def fit(data, root: Path, *callbacks, ckpt_path=None, module=None, **options) -> Recorder:
    module = module or Recorder()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    if "max_steps" not in options:
        options.setdefault("max_epochs", 3)
    saves = any(isinstance(c, Checkpoint) for c in callbacks)
    options.setdefault("limit_val_batches", 0)
    trainer = lightning.Trainer(
        default_root_dir=root, callbacks=list(callbacks), enable_checkpointing=saves, **quiet, **options
    )
    try:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    except InterruptedError:
        trainer.strategy.teardown()
    return module


def every_step(root: Path, **options) -> ModelCheckpoint:
    return ModelCheckpoint(root, filename="{step}", auto_insert_metric_name=False, save_top_k=-1, **options)


# --- processes that load images ---------------------------------------------------------------------------------------


def _read_with_workers(_: int) -> tuple[int, int]:
    data = DigitsDataModule(num_workers=2, batch_size=64, max_train_images=100)
    return data.num_workers, sum(len(labels) for _, labels in data.train_dataloader())


def test_a_worker_of_a_pool_reads_images_itself():
    """It is a daemon, which may start no process."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(_read_with_workers, [0]) == [(0, 64)]
    assert DigitsDataModule(num_workers=2).num_workers == 2


@pytest.mark.slow
def test_a_job_of_joblibs_launcher_reads_images_itself():
    """What starts its processes is no start method that torch knows."""
    joblib = pytest.importorskip("joblib")
    assert joblib.Parallel(n_jobs=2)(joblib.delayed(_read_with_workers)(i) for i in range(2)) == [(0, 64)] * 2


def test_it_is_said_once_that_there_are_no_workers(monkeypatch, caplog):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "loky")
    _say_without_workers.cache_clear()
    assert [DigitsDataModule(num_workers=3).num_workers for _ in range(2)] == [0, 0]
    assert DigitsDataModule(num_workers=0).num_workers == 0
    _say_without_workers.cache_clear()
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["num_workers=3"]


# --- going on in mid-epoch ------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_seed(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


def steps_done(path: Path) -> int:
    """What Lightning says, in training batches over all epochs."""
    loop = torch.load(path, weights_only=True)["loops"]["fit_loop"]
    return loop["epoch_loop.batch_progress"]["total"]["processed"]


def check_resumed(root: Path, whole, make=Numbered, **options) -> None:
    checkpoints = sorted(root.glob("*.ckpt"))
    assert len(checkpoints) > 1
    for path in checkpoints:
        rest = fit(make(), root, ckpt_path=path, **options).seen
        assert rest == whole[steps_done(path) :], path.name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"limit_val_batches": 1.0},
        {"limit_val_batches": 1.0, "val_check_interval": 2},
        {"accumulate_grad_batches": 2},
        {"max_steps": 13},
        {"limit_train_batches": 3},
    ],
    ids=str,
)
def test_a_fit_resumed_at_any_step_reads_what_the_uninterrupted_one_reads(tmp_path, options):
    whole = fit(Numbered(), tmp_path, every_step(tmp_path, every_n_train_steps=1), **options).seen
    check_resumed(tmp_path, whole, **options)


@pytest.mark.parametrize("when", [{"save_on_train_epoch_end": True}, {"save_on_train_epoch_end": False}], ids=str)
@pytest.mark.parametrize("interval", [1.0, 2])
def test_checkpoints_of_epoch_ends_and_of_validation_skip_nothing_unseen(tmp_path, when, interval):
    options = {"limit_val_batches": 1.0, "val_check_interval": interval}
    whole = fit(Numbered(), tmp_path, every_step(tmp_path, **when), **options).seen
    check_resumed(tmp_path, whole, **options)


@pytest.mark.parametrize("persistent", [True, False])
def test_workers_that_read_ahead_do_not_lose_images(tmp_path, persistent):
    def make():
        return Numbered(num_workers=2, persistent_workers=persistent)

    whole = fit(Numbered(), tmp_path, every_step(tmp_path, every_n_train_steps=4), max_epochs=2).seen
    assert {epoch for epoch, _ in whole} == {0, 1}
    check_resumed(tmp_path, whole, make, max_epochs=2)


@pytest.mark.parametrize("failing", [0, 4, 5, 7, 14])
def test_a_step_that_failed_is_taken_again(tmp_path, failing):
    """Also the first and the last of an epoch of five."""

    class Fails(Recorder):
        def training_step(self, batch, batch_idx):
            if len(self.seen) == failing:
                raise InterruptedError
            return super().training_step(batch, batch_idx)

    whole = fit(Numbered(), tmp_path).seen
    on_exception = OnExceptionCheckpoint(tmp_path, filename="failed")
    module = fit(Numbered(), tmp_path, on_exception, module=Fails())
    assert module.seen == whole[:failing]
    assert fit(Numbered(), tmp_path, ckpt_path=tmp_path / "failed.ckpt").seen == whole[failing:]


def test_one_data_module_serves_fits_one_after_another(tmp_path):
    """Resumed, anew, killed and resumed again, in one process: nothing is left over from the fit before."""
    data, saver = Numbered(), every_step(tmp_path, every_n_train_steps=1)
    whole = fit(data, tmp_path, saver).seen
    assert fit(data, tmp_path, ckpt_path=tmp_path / "7.ckpt").seen == whole[7:]
    assert fit(data, tmp_path, ckpt_path=tmp_path / "7.ckpt").seen == whole[7:]
    assert fit(data, tmp_path).seen == whole
    assert fit(data, tmp_path, Dies(after=8)).seen == whole[:8]
    assert fit(data, tmp_path, ckpt_path=tmp_path / "8.ckpt").seen == whole[8:]
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.validate(Recorder(), datamodule=data, ckpt_path=tmp_path / "7.ckpt", verbose=False)
    data.trainer = None
    assert [i.flatten().int().tolist() for i, _ in data.train_dataloader()] == [images for _, images in whole[:5]]


def test_a_resumed_fit_keeps_the_order_of_the_seed_it_began_with(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    whole = fit(Numbered(), tmp_path, every_step(tmp_path, every_n_train_steps=1)).seen
    monkeypatch.setenv("PL_GLOBAL_SEED", "6")
    assert fit(Numbered(), tmp_path).seen != whole
    assert fit(Numbered(), tmp_path, ckpt_path=tmp_path / "7.ckpt").seen == whole[7:]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"batch_size": 2}, "batch_size=2 was 4"),
        ({"repeated_augmentation": 2}, "repeated_augmentation=2 was 1"),
        ({"images": 24}, "number of training images=24 was 23"),
    ],
)
def test_another_order_is_refused_in_mid_epoch_only(tmp_path, changed, words):
    fit(Numbered(), tmp_path, every_step(tmp_path, every_n_train_steps=1), max_epochs=2)
    with pytest.raises(DataError, match=words):
        fit(Numbered(**changed), tmp_path, ckpt_path=tmp_path / "7.ckpt")
    assert {epoch for epoch, _ in fit(Numbered(**changed), tmp_path, ckpt_path=tmp_path / "5.ckpt").seen} == {1, 2}


def test_lightning_does_not_say_that_the_loader_cannot_resume(tmp_path):
    fit(Numbered(), tmp_path, every_step(tmp_path, every_n_train_steps=1), max_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Numbered(), tmp_path, ckpt_path=tmp_path / "7.ckpt", max_epochs=2)
    assert not [w for w in caught if "not resumable" in str(w.message)]


class Passes(IterableDataset):
    """A stream whose images say which pass they belong to, as timm's readers shuffle by it."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        yield from ((torch.full((1, 1, 1), 100.0 * self.epoch + i), 0) for i in range(12))


class Streamed(Numbered):
    def make_splits(self) -> Splits:
        return Splits(Passes(), Passes(), Passes(), Passes(), ("a", "b", "c"))


def test_a_stream_starts_over_and_says_so(tmp_path):
    whole = fit(Streamed(), tmp_path, every_step(tmp_path, every_n_train_steps=1)).seen
    assert whole[3] == (1, [100, 101, 102, 103])  # each epoch is another pass
    with pytest.warns(UserWarning, match="a streamed data set can only start over"):
        rest = fit(Streamed(), tmp_path, ckpt_path=tmp_path / "4.ckpt").seen
    assert rest[0] == (1, [100, 101, 102, 103])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Streamed().load_state_dict(torch.load(tmp_path / "3.ckpt", weights_only=True)["Streamed"])  # an epoch's end


def test_a_stream_opened_before_the_other_processes_were_there_is_opened_again(monkeypatch):
    """Its reader would give every rank all shards."""
    for module, again in ((Streamed(), True), (Numbered(), False)):
        module.setup()
        before = module.splits
        with monkeypatch.context() as patch:
            patch.setattr("lightning_mdc.distributed.world_size", lambda: 2)
            module.setup("fit")
            assert (module.splits is not before) == again
            after = module.splits
            module.setup("fit")
            assert module.splits is after


# --- the same images per step on any number of processes --------------------------------------------------------------


def on(processes: int, rank: int, data: ImageDataModule) -> ImageDataModule:
    """The module as rank `rank` of that many processes has it."""
    state = SimpleNamespace(fn=TrainerFn.FITTING)
    data.trainer = SimpleNamespace(world_size=processes, global_rank=rank, state=state)
    return data


def steps(processes: int, epoch: int, resume=None, **options) -> list[list[list[int]]]:
    """Image numbers per step and process."""
    by_rank = []
    for rank in range(processes):
        data = on(processes, rank, Numbered(**options))
        if resume is not None:
            data.load_state_dict(resume)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        by_rank.append([images.flatten().int().tolist() for images, _ in loader])
        assert len(loader) == len(by_rank[-1]) + (0 if resume is None else resume["batches"])
    return [list(step) for step in zip(*by_rank, strict=True)]


def together(steps) -> list[list[int]]:
    return [sorted(chain(*step)) for step in steps]


@pytest.mark.parametrize("images", [48, 49, 53, 95])
@pytest.mark.parametrize("repeats", [1, 3])
def test_each_step_holds_the_same_images_on_any_number_of_processes(images, repeats):
    options = {"images": images, "batch_size": 12, "repeated_augmentation": repeats}
    for epoch in (0, 3):
        alone = steps(1, epoch, **options)
        assert len(alone) == images // 12
        for processes in (2, 3, 4, 6):
            shared = steps(processes, epoch, **options)
            assert {len(part) for step in shared for part in step} == {12 // processes}
            assert together(shared) == together(alone)
    assert together(steps(1, 0, **options)) != together(steps(1, 1, **options))


def test_resumed_on_fewer_processes_an_epoch_still_holds_every_image_once():
    options = {"images": 48, "batch_size": 12}
    state = {
        "epoch": 2, "batches": 1, "seed": 11,
        "batch_size": 12, "repeated_augmentation": 1, "number of training images": 48,
    }  # fmt: skip
    first = steps(4, 2, state | {"batches": 0}, **options)
    for processes in (1, 2, 4):
        rest = steps(processes, 2, state, **options)
        assert together(rest) == together(first)[1:]
    assert sorted(chain(*together(first))) == list(range(48))
    assert len(steps(1, 3, state | {"batches": 0}, **options)) == 4


def test_repeated_augmentation_shows_each_image_that_often():
    """Also of fewer than 256 images, to which timm's sampler rounds down."""
    for processes in (1, 3):
        epoch = together(steps(processes, 0, images=60, batch_size=12, repeated_augmentation=3))
        assert len(epoch) == 5
        for step in epoch:
            assert sorted(Counter(step).values()) == [3] * 4  # 12 = 4 images three times
        assert len(set(chain(*epoch))) == 20
    spread = steps(3, 0, images=60, batch_size=12, repeated_augmentation=3)[0]
    assert sorted(spread[0]) == sorted(spread[1]) == sorted(spread[2])  # a version for each process


def test_a_data_set_smaller_than_a_step_trains_on_every_process():
    assert steps(1, 0, images=5, batch_size=8)[0][0] != []
    (step,) = steps(2, 0, images=5, batch_size=8)
    assert [len(part) for part in step] == [3, 3]  # one image twice, so that both have as many
    assert set(chain(*step)) == set(range(5))


def test_finetuning_seeds_see_different_orders(monkeypatch):
    """And none is another one's order an epoch later."""
    orders = set()
    for seed in ("0", "1", "2"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        orders |= {str(steps(1, epoch)) for epoch in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize(
    ("batch_size", "processes", "remedy"), [(10, 4, "give 8 or 12"), (3, 4, "give 4"), (7, 2, "give 6 or 8")]
)
def test_a_batch_that_cannot_be_shared_out_evenly_names_those_that_can(batch_size, processes, remedy):
    data = on(processes, 0, Numbered(batch_size=batch_size))
    for ask in (data.train_dataloader, lambda: data.setup("fit")):
        with pytest.raises(DataError, match=rf"batch_size={batch_size} .* all {processes} processes .*{remedy}"):
            ask()


@pytest.mark.filterwarnings("ignore:1 images on")
@pytest.mark.parametrize("images", [1, 5, 7, 8, 0])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_no_image_is_evaluated_twice(images, processes):
    for which in ("val_dataloader", "test_dataloader", "predict_dataloader"):
        modules = [on(processes, rank, Numbered(held_out=images)) for rank in range(processes)]
        loaders = [getattr(data, which)() for data in modules]
        read = [i for loader in loaders for batch, _ in loader for i in batch.flatten().int().tolist()]
        assert sorted(set(read)) == list(range(images))
        if images >= processes:
            assert len(read) == images
        assert images == 0 or all(
            len(loader) for loader in loaders
        )  # a rank without a batch would leave others waiting


def test_lightning_leaves_our_samplers_in_place():
    for data in (on(2, 0, Numbered()), on(2, 0, Numbered(repeated_augmentation=2))):
        trainer = SimpleNamespace(
            _accelerator_connector=SimpleNamespace(use_distributed_sampler=True, is_distributed=True)
        )
        for loader in (data.train_dataloader(), data.val_dataloader()):
            assert not _DataConnector._requires_distributed_sampler(SimpleNamespace(trainer=trainer), loader)
    assert isinstance(data.val_dataloader().sampler, UnrepeatedDistributedSampler)
    assert isinstance(Numbered().val_dataloader().sampler, SequentialSampler)


# --- options of the loaders -------------------------------------------------------------------------------------------


def test_options_go_to_the_loaders():
    data = DigitsDataModule(num_workers=1, prefetch_factor=3, persistent_workers=False, pin_memory=False)
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    for loader in loaders:
        found = (loader.num_workers, loader.prefetch_factor, loader.persistent_workers, loader.pin_memory)
        assert found == (1, 3, False, False)
    alone = DigitsDataModule(prefetch_factor=3).val_dataloader()  # torch refuses both without workers
    assert (alone.num_workers, alone.persistent_workers, alone.prefetch_factor) == (0, False, None)
    assert alone.pin_memory == torch.cuda.is_available()
    assert DigitsDataModule(num_workers=1).val_dataloader().persistent_workers


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"repeated_augmentation": 0}, "repeated_augmentation=0"),
        ({"repeated_augmentation": 1.5}, "repeated_augmentation=1.5"),
        ({"prefetch_factor": 0}, "prefetch_factor=0"),
        ({"pin_memory": "yes"}, "pin_memory='yes'"),
        ({"persistent_workers": None}, "persistent_workers=None"),
        ({"num_workers": -2}, "num_workers=-2"),
    ],
)
def test_wrong_options_name_themselves(option, words):
    with pytest.raises(DataError, match=words):
        DigitsDataModule(**option)
