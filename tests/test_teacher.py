"""The teacher: found by name, folder and file; its own precision and normalisation; it stays as its owner left it."""

import copy

import huggingface_hub.constants
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import lightning_mdc as mdc
from lightning_mdc.app.trainer import build_module
from lightning_mdc.distillation import DistillationModule, Teacher
from lightning_mdc.distillation.teacher import FrozenTeacher, Renormalization
from lightning_mdc.errors import DistillationError
from tests.test_distillation import batch, loader, tiny, trainer

NAME, ARGS = "test_vit", {"in_chans": 1, "img_size": 8, "patch_size": 4}


def named(seed: int = 0, num_classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(NAME, num_classes=num_classes, **ARGS).eval()


def frozen(network: nn.Module, **settings) -> FrozenTeacher:
    return FrozenTeacher(Teacher(network, **settings), student=tiny(0))


def rgb_batch() -> torch.Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def plain(mean=None, std=None, in_chans: int = 3) -> nn.Module:
    """A network that says what its images are normalised by."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(in_chans * 64, 3))
    network.num_classes = 3
    if mean is not None:
        network.pretrained_cfg = {"mean": mean, "std": std}
    return network


# --- where it comes from ----------------------------------------------------------------------------------------------


def test_a_folder_is_loaded(tmp_path):
    teacher = tiny(1).eval()
    mdc.save(teacher, tmp_path / "dense")
    images, _ = batch()
    for place in (tmp_path / "dense", str(tmp_path / "dense")):
        module = DistillationModule(tiny(0), place)
        torch.testing.assert_close(module.teacher(images), teacher(images), rtol=0, atol=0)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_name_with_a_file_of_weights(tmp_path, suffix):
    teacher = named(7)
    path = tmp_path / f"teacher{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{name}": value for name, value in teacher.state_dict().items()}}, path)
    else:
        mdc.save(teacher, tmp_path / "folder")
        (tmp_path / "folder" / "model.safetensors").rename(path)
    images, _ = batch()
    module = DistillationModule(tiny(0), Teacher(NAME, path, ARGS))
    torch.testing.assert_close(module.teacher(images), teacher(images), rtol=0, atol=0)


def test_a_name_has_timms_pretrained_weights(tmp_path):
    path = tmp_path / "pretrained.pth"
    teacher = named(7)
    torch.save(teacher.state_dict(), path)
    overlay = {"file": str(path), "num_classes": 3, "hf_hub_id": None, "first_conv": None}
    args = {**ARGS, "pretrained_cfg_overlay": overlay}
    module = DistillationModule(tiny(0), Teacher(NAME, args=args))
    images, _ = batch()
    torch.testing.assert_close(module.teacher(images), teacher(images), rtol=0, atol=0)


def test_no_network_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        DistillationError, match=r"teacher='test_vit.r160_in1k': its pretrained weights can't be fetched"
    ):
        DistillationModule(tiny(0), "test_vit.r160_in1k")


class Malicious:
    """What a pickle could run."""

    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_wrong_teachers_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other.pth"
    torch.save(tiny(1).state_dict(), other)
    malicious = tmp_path / "malicious.pth"
    torch.save({"state_dict": Malicious()}, malicious)
    (tmp_path / "damaged.safetensors").write_bytes(b"no weights")
    hundred = tmp_path / "hundred.pth"
    torch.save(named(num_classes=100).state_dict(), hundred)
    hundred_args = {**ARGS, "num_classes": 100}
    cases = [
        ({"source": "deit_tiny_patch16_224.nope"}, "teacher='deit_tiny_patch16_224.nope'.*fb_in1k"),
        ({"source": tmp_path / "empty"}, "teacher='.*empty' is a folder, but no saved model"),
        ({"checkpoint": other}, r"other.pth' does not fit VisionTransformer: it lacks blocks\.1.*; build .* or give"),
        ({"checkpoint": malicious}, r"malicious.pth' holds more than weights, _pytest\.outcomes"),
        ({"checkpoint": tmp_path / "damaged.safetensors"}, "damaged.safetensors' cannot be read"),
        ({"checkpoint": hundred}, r"hundred.pth' does not fit .*other shapes of head.weight 100x64 for 3x64"),
        ({"checkpoint": hundred, "args": hundred_args}, "has 100 classes where 3"),
        ({"checkpoint": other, "args": {"no_such": 1}}, "Teacher.args=.*no_such"),
        ({"source": tiny(1), "normalization": {"mean": 0.5, "std": 1}}, "student=VisionTransformer does not say"),
    ]
    for settings, words in cases:
        teacher = Teacher(**({} if "source" in settings else {"source": NAME, "args": ARGS}) | settings)
        with pytest.raises(DistillationError, match=words):
            DistillationModule(tiny(0), teacher)


def test_wrong_settings_are_refused_when_they_are_said(tmp_path):
    (tmp_path / "empty").mkdir()
    network, file = tiny(1), tmp_path / "a.pth"
    file.touch()
    cases = [
        ({"source": "deit_smal_patch16_224"}, "teacher='deit_smal_patch16_224' .*did you mean deit_small_patch16_224"),
        ({"source": "runs/digits/dense"}, "teacher='runs/digits/dense' is neither a folder nor a model"),
        ({"source": 5}, "teacher=5 is no network"),
        ({"source": None}, "teacher=None is no network"),
        ({"source": tmp_path / "empty", "args": ARGS}, "Teacher.args=.*which teacher=.*empty is not"),
        ({"source": tmp_path / "empty", "checkpoint": file}, "Teacher.checkpoint=.*which teacher=.*empty is not"),
        ({"source": network, "checkpoint": file}, "Teacher.checkpoint=.*which teacher=VisionTransformer is not"),
        ({"source": network, "args": ARGS}, "Teacher.args=.*which teacher=VisionTransformer is not"),
        ({"source": None, "args": ARGS}, "Teacher.args=.*which teacher=None is not"),
        ({"source": NAME, "args": 5}, "Teacher.args=5 is no mapping"),
        ({"source": NAME, "checkpoint": tmp_path / "no.pth"}, "Teacher.checkpoint='.*no.pth' is no file"),
        ({"source": network, "precision": "bf8"}, "Teacher.precision='bf8'"),
        ({"source": network, "compile": {"backed": "inductor"}}, r"Teacher.compile=.*unknown keys \['backed'\]"),
        ({"source": network, "normalization": "imagenet"}, "Teacher.normalization='imagenet'"),
        ({"source": network, "normalization": {"mean": 0.5}}, "Teacher.normalization={'mean': 0.5}"),
        ({"source": network, "normalization": {"mean": 0.5, "std": 0}}, "Teacher.normalization std=0"),
    ]
    for settings, words in cases:
        with pytest.raises(DistillationError, match=words):
            Teacher(**settings)


def test_settings_of_a_run_become_a_teacher():
    network, student = plain(MEANS[1], STDS[1]), plain(MEANS[0], STDS[0])
    options = {"teacher": "dense", "epochs": 1, "schedule": {}, "kd": "hard", "teacher_checkpoint": None}
    options |= {"teacher_args": {}, "teacher_precision": 32, "teacher_compile": False, "teacher_normalization": None}
    module = build_module(options, student, network)
    assert (module.kd, module.teacher.network, module.teacher.precision) == ("hard", network, "32")
    assert module.teacher.normalization is None
    assert build_module(options, student, None).teacher is None
    with pytest.raises(DistillationError, match=r"Teacher\.args=.*which teacher=None is not"):
        build_module(options | {"teacher_args": ARGS}, student, None)


def test_a_teacher_for_another_image_size_is_refused_in_words():
    torch.manual_seed(0)
    teacher = VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, num_classes=3
    )
    with pytest.raises(
        DistillationError, match=r"teacher=VisionTransformer does not take images of \(1, 8, 8\): .*img_size"
    ):
        DistillationModule(tiny(0), teacher).loss_parts(*batch())


# --- how it answers ---------------------------------------------------------------------------------------------------


def test_own_precision_under_autocast():
    teacher = tiny(1).eval()
    images, _ = batch()
    expected = teacher(images).detach()
    with torch.autocast("cpu", torch.bfloat16):
        as_is, own = frozen(teacher)(images), frozen(teacher, precision="32")(images)
    assert as_is.dtype == torch.bfloat16
    torch.testing.assert_close(own, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_another_precision_works_with_a_copy(precision, dtype):
    teacher = tiny(1)
    before = copy.deepcopy(teacher.state_dict())
    images, labels = batch()
    module = DistillationModule(tiny(0), Teacher(teacher, precision=precision))
    expected = copy.deepcopy(teacher).to(dtype).eval()(images.to(dtype))
    torch.testing.assert_close(module.teacher(images), expected, rtol=0, atol=0)
    assert module.loss_parts(images, labels)["loss"].dtype == torch.float32
    for name, value in teacher.state_dict().items():
        assert value.dtype == torch.float32, name
        assert torch.equal(value, before[name]), name
    assert frozen(teacher, precision="32").network is teacher


def test_precision_of_a_run_is_not_the_teachers(tmp_path):
    module = DistillationModule(tiny(0), Teacher(tiny(1), precision="32"))
    seen = []
    module.teacher.network.register_forward_hook(lambda network, args, logits: seen.append(logits))
    trainer(tmp_path, precision="bf16-mixed").fit(module, loader())
    assert {logits.dtype for logits in seen} == {torch.float32}


def test_a_compiled_teacher_answers_the_same():
    teacher = tiny(1).eval()
    images, _ = batch()
    compiled = frozen(teacher, compile={"backend": "aot_eager"})
    torch.testing.assert_close(compiled(images), teacher(images).detach())
    assert teacher._compiled_call_impl is None


# --- what its images look like ----------------------------------------------------------------------------------------

MEANS = (0.1, 0.2, 0.3), (0.5, 0.4, 0.6)
STDS = (0.25, 0.5, 0.75), (0.3, 0.2, 0.1)


@pytest.mark.parametrize("setting", ["auto", {"mean": MEANS[1], "std": STDS[1]}])
def test_images_are_normalised_as_the_teacher_knows_them(setting):
    raw = rgb_batch()
    as_student, as_teacher = (
        (raw - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        for mean, std in zip(MEANS, STDS, strict=True)
    )
    teacher = plain(MEANS[1], STDS[1])
    module = DistillationModule(plain(MEANS[0], STDS[0]), Teacher(teacher, normalization=setting))
    torch.testing.assert_close(module.teacher(as_student), teacher(as_teacher).detach(), rtol=1e-5, atol=1e-6)
    raw_module = DistillationModule(plain(MEANS[0], STDS[0]), Teacher(teacher, normalization=None))
    torch.testing.assert_close(raw_module.teacher(as_student), teacher(as_student).detach(), rtol=0, atol=0)


def test_auto_does_nothing_where_there_is_nothing_to_do():
    with_cfg, same, without = plain(MEANS[0], STDS[0]), plain(list(MEANS[0]), list(STDS[0])), plain()
    for student, teacher in ((with_cfg, same), (with_cfg, without), (without, with_cfg)):
        assert DistillationModule(student, teacher).teacher.normalization is None


def test_a_slim_student_still_says_what_its_images_are():
    dense = named()
    dense.pretrained_cfg = {**dense.pretrained_cfg, "mean": (0.2,), "std": (0.4,)}
    scores = mdc.score(dense, [batch(8)])
    student = mdc.slim(dense, mdc.make_plan(dense, scores, mdc.Policy(heads=0.5, neurons=0.5, tokens=1.0)))
    module = DistillationModule(student, plain((0.5,), (0.5,), in_chans=1))
    x = torch.zeros(1, 1, 8, 8)  # a grey of 0.2
    torch.testing.assert_close(module.teacher.normalization(x), torch.full_like(x, (0.2 - 0.5) / 0.5))


def test_one_number_does_for_all_channels():
    images = rgb_batch()
    got = Renormalization(((0.5,), (0.5,)), MEANS[:1] + STDS[:1])(images)
    for channel in range(3):
        expected = (images[:, channel] * 0.5 + 0.5 - MEANS[0][channel]) / STDS[0][channel]
        torch.testing.assert_close(got[:, channel], expected)
    assert Renormalization(((0.5,), (0.5,)), ((0.0,), (1.0,)))(images.bfloat16()).dtype == torch.bfloat16


def test_other_channels_are_refused():
    module = DistillationModule(plain(*([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])), plain(MEANS[1], STDS[1], in_chans=1))
    with pytest.raises(DistillationError, match=r"Teacher\.normalization is of 3 channels, the images have 1"):
        module.teacher(torch.zeros(2, 1, 8, 8))
    with pytest.raises(DistillationError, match="of 2 and 3 channels"):
        DistillationModule(plain((0.0, 0.0), (1.0, 1.0)), plain(MEANS[1], STDS[1]))
