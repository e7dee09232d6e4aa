"""Teacher logits looked up by an image's content: nothing of a run changes but how often the teacher is asked."""

import copy
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_mdc.distillation import DistillationModule, FrozenTeacher, TeacherCache
from lightning_mdc.distillation.teacher_cache import DEFAULT_NUM_IMAGES, _factors, digests
from lightning_mdc.errors import DistillationError
from tests.test_distillation import batch, loader, tiny, trainer


class Asked(FrozenTeacher):
    """Counts the images it is asked about."""

    images = 0

    def __call__(self, images):
        self.images += len(images)
        return super().__call__(images)


def same(got, expected) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


# --- what tells images apart ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
def test_digests_are_the_two_sums(dtype):
    images = (100 * torch.rand(3, 1, 2, 4, generator=torch.Generator().manual_seed(0))).to(dtype)
    word = {torch.uint8: "u1", torch.float16: "i2"}.get(dtype, "i4")
    for image, digest in zip(images, digests(images), strict=True):
        words = image.numpy().reshape(-1).view(word).tolist()
        sums = [
            sum(w * f for w, f in zip(words, row, strict=True)) % 2**64
            for row in _factors(len(words), images.device).tolist()
        ]
        assert digest[:16] == b"".join(each.to_bytes(8, "little") for each in sums)


def test_digests_know_content_and_shape_and_nothing_else():
    images = torch.randn(2, 3, 4, 6)
    first, second = digests(images)
    assert first != second
    assert digests(images.flip(0)) == [second, first]
    assert digests(images.to(memory_format=torch.channels_last)) == [first, second]
    changed = images.clone()
    changed[0, 2, 3, 5] = changed[0, 2, 3, 5].nextafter(torch.tensor(9.0))
    assert digests(changed)[0] != first
    assert digests(changed)[1] == second
    assert digests(images.reshape(2, 3, 6, 4))[0] != first


def test_factors_have_all_bits_and_leave_the_global_generator_alone():
    _factors.cache_clear()
    state = torch.get_rng_state()
    factors = _factors(4096, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    for bit in range(64):
        assert ((factors >> bit) & 1).float().mean().item() == pytest.approx(0.5, abs=0.05)


# --- the cache --------------------------------------------------------------------------------------------------------


def test_only_what_is_new_is_computed():
    teacher = Asked(tiny(1))
    cache = TeacherCache(teacher)
    images, _ = batch(8)
    expected = FrozenTeacher(tiny(1))(images)
    same(cache(images[:4]), expected[:4])
    for places, new in (([3, 1], 0), ([2, 6, 0, 7], 2), ([6, 7, 4], 1), ([0, 1, 2, 3, 4, 6, 7], 0)):
        before = teacher.images
        torch.testing.assert_close(cache(images[places]), expected[places])
        assert teacher.images - before == new
    assert (len(cache), cache.hits, cache.misses) == (7, 2 + 2 + 2 + 7, 4 + 2 + 1)
    cache.clear()
    cache(images)
    assert teacher.images == 7 + 8


def test_a_full_cache_computes_the_others():
    teacher = Asked(tiny(1))
    cache = TeacherCache(teacher, num_images=3)
    images, _ = batch(5)
    expected = FrozenTeacher(tiny(1))(images)
    for _ in range(2):
        torch.testing.assert_close(cache(images), expected)
    assert (len(cache), cache.is_full, teacher.images) == (3, True, 5 + 2)


def test_an_image_twice_in_a_batch():
    cache = TeacherCache(FrozenTeacher(tiny(1)))
    images = batch(2)[0][[0, 0, 1]]
    same(cache(images), cache(images))
    assert len(cache) == 2


def test_another_arithmetic_is_another_answer():
    images, _ = batch()
    for precision, dtypes in ((None, (torch.float32, torch.bfloat16)), ("32", (torch.float32, torch.float32))):
        teacher = FrozenTeacher(tiny(1), precision)
        cache = TeacherCache(teacher)
        for autocast, dtype in ((False, dtypes[0]), (True, dtypes[1]), (True, dtypes[1]), (False, dtypes[0])):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                got = cache(images)
                assert got.dtype == dtype
                same(got, teacher(images))


def test_copies_share_it():
    module = DistillationModule(tiny(0), tiny(1), teacher_cache=True)
    assert copy.deepcopy(module).teacher_cache is module.teacher_cache
    assert module.teacher_cache.num_images == DEFAULT_NUM_IMAGES


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kd", ["soft", "hard"])
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_a_run_is_the_same_to_the_last_bit(tmp_path, kd, precision):
    states, asked = [], []
    for teacher_cache in (False, True):
        module = DistillationModule(
            tiny(0), tiny(1), kd, teacher_precision=precision, teacher_cache=teacher_cache, optimizer={"lr": 1e-2}
        )
        counting = Asked(module.teacher.network, precision)
        module.teacher = counting
        if module.teacher_cache is not None:
            module.teacher_cache.teacher = counting
        run = trainer(tmp_path, max_epochs=3)
        run.fit(module, loader(), loader(6))
        states.append(({k: v.clone() for k, v in module.state_dict().items()}, run.callback_metrics["train/loss"]))
        asked.append(counting.images)
    same(states[1], states[0])
    assert asked == [3 * 24, 24]


def test_a_shuffled_run_hits_every_image(tmp_path):
    module = DistillationModule(tiny(0), tiny(1), teacher_cache=True)
    counts = []
    module.on_train_end = lambda: counts.extend([module.teacher_cache.hits, module.teacher_cache.misses])
    data = DataLoader(TensorDataset(*batch(24)), batch_size=6, shuffle=True)
    trainer(tmp_path, max_epochs=3).fit(module, data)
    assert counts == [2 * 24, 24]
    assert len(module.teacher_cache) == 0  # its memory is given back


def test_nothing_of_it_is_in_a_checkpoint(tmp_path):
    for teacher_cache in (False, 100):
        module = DistillationModule(tiny(0), tiny(1), teacher_cache=teacher_cache)
        run = trainer(tmp_path)
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / f"{teacher_cache}.ckpt")
    plain, cached = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("False", "100"))
    assert cached["state_dict"].keys() == plain["state_dict"].keys()
    assert cached["hyper_parameters"] == {**plain["hyper_parameters"], "teacher_cache": 100}
    again = DistillationModule.load_from_checkpoint(tmp_path / "100.ckpt", student=tiny(0), teacher=tiny(1))
    assert again.teacher_cache.num_images == 100


@pytest.mark.parametrize("augmented", [True, False])
def test_augmented_images_are_remarked_on(tmp_path, augmented):
    images, labels = batch(12)

    class Augmented(TensorDataset):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image + augmented * torch.rand(()), label

    module = DistillationModule(tiny(0), tiny(1), teacher_cache=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, max_epochs=2).fit(module, DataLoader(Augmented(images, labels), batch_size=6))
    said = [str(w.message) for w in caught if "teacher_cache" in str(w.message)]
    assert said == (
        [
            "teacher_cache has found none of the 24 images of this run again: they are augmented, or each is seen once."
            " Turn augmentation off, or pass teacher_cache=False"
        ]
        if augmented
        else []
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_cache": -1}, "teacher_cache=-1 is no number of images"),
        ({"teacher_cache": "auto"}, "teacher_cache='auto' is no number of images"),
        ({"teacher": None}, "teacher_cache needs a teacher"),
        ({"hidden_weight": 0.5}, "hidden_weight=0.5 also needs"),
        ({"mixup": {"mixup_alpha": 0.8}}, "makes new ones in every step; pass mixup=None or teacher_cache=False"),
    ],
)
def test_what_cannot_be_cached_is_refused(settings, message):
    with pytest.raises(DistillationError, match=message):
        DistillationModule(tiny(0), **{"teacher": tiny(1), "teacher_cache": True, **settings})


def test_off_is_off():
    for teacher_cache in (False, 0):
        assert DistillationModule(tiny(0), tiny(1), teacher_cache=teacher_cache).teacher_cache is None
    assert (
        DistillationModule(tiny(0), tiny(1), teacher_cache=True, mixup={"mixup_alpha": 0.0}).teacher_cache is not None
    )
