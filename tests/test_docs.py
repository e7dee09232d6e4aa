"""What README and docs/ say is so: settings, commands and code."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from lightning.pytorch.strategies import FSDPStrategy
from omegaconf import OmegaConf
from torch.nn.utils.parametrizations import spectral_norm

import lightning_mdc as mdc
from lightning_mdc import compression
from lightning_mdc.__main__ import _parser
from lightning_mdc.belonging import complaint
from lightning_mdc.budget import measuring
from lightning_mdc.budget.costs import COSTS
from lightning_mdc.importance import criteria
from lightning_mdc.importance.calibration import put_together
from lightning_mdc.importance.training_data import pool_of
from lightning_mdc.models import find_anatomy
from lightning_mdc.schedule import Schedule
from lightning_mdc.tokens.reduction import REDUCTIONS
from lightning_mdc.weights import load_weights
from tests import strangers
from tests.kinds import POST_NORM, images, make
from tests.test_configs import settings
from tests.test_parts import LoRA
from tests.test_scoring import Views

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
PAGES = (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
WRITTEN = tuple(page for page in PAGES if page.name != "configuration.md")  # by hand


# --- the reference of settings ----------------------------------------------------------------------------------------


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs" / "make_configuration.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@cache
def sections() -> dict[str, dict[str, str]]:
    """Of the page: heading without backticks -> key -> default as the page has it."""
    found: dict[str, dict[str, str]] = {"": {}}
    section = found[""]
    for line in (ROOT / "docs" / "configuration.md").read_text().splitlines():
        if line.startswith("#"):
            section = found.setdefault(re.sub(r"^#+ |`| \(default\)", "", line), {})
        elif row := re.match(r"\| `([^`]+)` \| (?:`(.*?)`)? \| ", line):
            section[row[1]] = (row[2] or "").replace("\\|", "|")
    return found


def options() -> list[str]:
    return [
        f"{path.parent.relative_to(CONF).as_posix()}={path.stem}"
        for path in sorted(CONF.glob("*/**/*.yaml"))
        if not path.stem.startswith("_")
    ]


def composed(*overrides: str) -> dict[str, Any]:
    """What Hydra makes of all files together: dotted key -> value, interpolations as they are written."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", list(overrides), return_hydra_config=True)
    return dict(leaves(OmegaConf.to_container(cfg, resolve=False)))


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_the_reference_of_settings_is_current():
    assert (ROOT / "docs" / "configuration.md").read_text() == generator().page(), "run: make docs"


@pytest.mark.parametrize("option", [None, *options()])
def test_every_setting_hydra_knows_is_in_the_reference_with_its_default(option):
    """Asked of Hydra, which knows nothing of how the page is made."""
    page = sections()
    found = composed(option) if option else composed()
    # Hydra has hundreds of settings of its own; those of a group that we have an option of are ours.
    prefix = option.partition("=")[0].replace("/", ".") + "." if option else ""
    ours = {key for key in found if not key.startswith("hydra.") or (prefix and key.startswith(prefix))}
    known = {key for keys in page.values() for key in keys}
    assert ours <= known, f"not in the page: {sorted(ours - known)}"
    of_no_group = {key: value for name, keys in page.items() if "=" not in name for key, value in keys.items()}
    said = {key: default for key, default in (page[option] if option else of_no_group).items() if default}
    assert said or option
    # "???", to be given, does not take the place of another file's default.
    expected = {key: number(yaml.safe_load(default)) for key, default in said.items() if default != "???"}
    assert expected == {key: number(found[key]) for key in expected}


def number(value: Any) -> Any:
    """YAML 1.1 takes 4e-3 for a word, Hydra for a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def test_a_key_without_an_entry_or_with_another_default_is_noticed(tmp_path):
    conf = tmp_path / "conf"
    (conf / "extra").mkdir(parents=True)
    (conf / "train.yaml").write_text(
        "defaults:\n  - extra: one  # what it is\n\n# Why it is so; <none> is `*`.\nkey: 3\n"
    )
    (conf / "extra" / "one.yaml").write_text("# An option.\n\n# Of two neighbours.\na: 1\nb: [x|y]\n\nc: null\n")
    (conf / "extra" / "two.yaml").write_text("# @package _global_\n# Another.\ndefaults:\n  - one\n\n# Far.\nfar: {}\n")
    page = generator().page(conf)
    assert "| `key` | `3` | Why it is so; &lt;none> is `\\*`. |" in page
    assert "| `extra.a` | `1` | Of two neighbours. |\n| `extra.b` | `[x\\|y]` | Of two neighbours. |" in page
    assert "| `extra.c` | `null` |  |" in page
    assert "### `extra=one` (default)\n\nAn option.\n" in page
    assert "### `extra=two`\n\nAnother.\n\nAll that `extra=one` has; of it changed:\n" in page
    assert "| `far` | `{}` | Far. |" in page
    assert "| [`extra`](#extra) | **`one`**, `two` | what it is |" in page


# --- code -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `mark` is the comment right above the fence, such as ``run with: transformers``."""

    page: Path
    line: int
    language: str
    text: str
    mark: str

    @property
    def compiled(self) -> Any:
        # Line numbers in a traceback are those of the page.
        return compile("\n" * self.line + self.text, str(self.page), "exec")


def blocks(page: Path) -> list[Block]:
    found, lines = [], page.read_text().splitlines()
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    for begin, end in zip(fences[::2], fences[1::2], strict=True):
        mark = re.fullmatch(r"<!-- (.*) -->", lines[begin - 1])
        text = "\n".join(lines[begin + 1 : end])
        found.append(Block(page, begin + 1, lines[begin].removeprefix("```"), text, mark[1] if mark else ""))
    return found


PYTHON = [block for page in WRITTEN for block in blocks(page) if block.language == "python"]


class TinyTrainer(lightning.Trainer):
    """Any Trainer of the pages as a short run on the CPU."""

    def __init__(self, **options: Any) -> None:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        small = {"max_epochs": 1, "limit_train_batches": 2, "accelerator": "cpu", "devices": 1, "strategy": "auto"}
        super().__init__(**(options | quiet | small))


class DictImages(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": index % 5}


def wrapped_by_hugging_face() -> Any:
    transformers = pytest.importorskip("transformers")
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4}
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=5, model_args=size)
    return transformers.TimmWrapperForImageClassification(config)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a dense and a slim model."""
    folder, dense = tmp_path_factory.mktemp("models"), strangers.network().eval()
    plan = mdc.make_plan(dense, mdc.score(dense, strangers.loader()), mdc.uniform_policy(dense, 0.6))
    mdc.save(dense, folder / "dense")
    mdc.save(mdc.slim(dense, plan), folder / "slim")
    return folder


@pytest.fixture
def registries() -> Iterator[None]:
    """What a page registers is known to that page alone."""
    known = (criteria.CRITERIA, REDUCTIONS, COSTS)
    before = [dict(each) for each in known]
    yield
    for each, was in zip(known, before, strict=True):
        each.clear()
        each.update(was)


@pytest.fixture
def prepared(models, tmp_path, monkeypatch, registries) -> dict[str, Any]:
    """What the pages take for granted, tiny; everything long is cut short."""
    import timm

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lightning, "Trainer", TinyTrainer)
    create = timm.create_model
    tiny = strangers.network
    monkeypatch.setattr(timm, "create_model", lambda *a, **o: tiny() if o.get("pretrained") else create(*a, **o))
    search = mdc.search
    monkeypatch.setattr(mdc, "search", lambda *args, **options: search(*args, **(options | {"n_trials": 3})))
    # Of a tiny model's time hardly any can be saved.
    budget = mdc.Budget
    generous = {"latency": 0.99}
    monkeypatch.setattr(mdc, "Budget", lambda **limits: budget(**limits | (generous if "latency" in limits else {})))
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    return {
        "__name__": "docs",
        "lightning": lightning,
        "mdc": mdc,
        "torch": torch,
        "my_module": strangers.Stranger(),
        "my_data": strangers.loader(),
        "model": strangers.network().eval(),
        "loader": strangers.loader(),
        "train_loader": strangers.loader(),
        "val_loader": strangers.loader(),
        "dict_loader": torch.utils.data.DataLoader(DictImages(), 16),
        "evaluate": lambda model: model(next(iter(strangers.loader()))[0]),
        "images": next(iter(strangers.loader()))[0],
    }


SLOW_PAGES = ("faq.md", "your-trainer.md")


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page.name in SLOW_PAGES), id=page.name) for page in WRITTEN],
)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, prepared, monkeypatch):
    monkeypatch.setattr(compression, "N_TRIALS", 3)  # where a page leaves it at the default
    monkeypatch.setattr(measuring, "_MOST_ROUNDS", 3)  # 30 s otherwise
    for block in (block for block in PYTHON if block.page == page):
        needs = re.fullmatch(r"run with: (\w+)", block.mark)
        if block.mark.startswith("not run: ") or (needs and importlib.util.find_spec(needs[1]) is None):
            continue
        assert not block.mark or needs, f"{page.name}:{block.line}: unknown mark {block.mark!r}"
        if needs and needs[1] == "transformers" and not hasattr(prepared["model"], "timm_model"):
            prepared["model"] = wrapped_by_hugging_face()
        exec(block.compiled, prepared)


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.page.name}:{block.line}")
def test_code_names_what_there_is(block):
    """Also that which is not run: it compiles, what it takes from `mdc` exists and has these arguments."""
    assert block.compiled
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("mdc."):
            assert named(node) is not None
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("mdc."):
            parameters = inspect.signature(named(node.func)).parameters
            given = {keyword.arg for keyword in node.keywords if keyword.arg}
            if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
                assert given <= set(parameters), ast.unparse(node)


def named(node: ast.expr) -> Any:
    """What ``mdc.a.b`` is; calls in between are not followed."""
    steps = ast.unparse(node).split(".")[1:]
    value: Any = mdc
    for step in steps:
        if not step.isidentifier():
            return object
        value = getattr(value, step)
    return value


def two_models() -> torch.nn.Module:
    return torch.nn.ModuleList([make("vit"), make("vit")])


def with_a_head_of_its_own() -> torch.nn.Module:
    model = make("vit")
    model.head = torch.nn.Sequential(torch.nn.Linear(48, 7), torch.nn.GELU())
    return model


def slim(restore: bool | None = None) -> torch.nn.Module:
    model, tokens = make("vit"), mdc.TokenOptions(restore=restore)
    scores = mdc.score(model, [images()], "activation")
    return mdc.slim(model, mdc.make_plan(model, scores, mdc.Policy(0.5, 0.5, 0.5), tokens))


def foreign_pickle() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": make()}, f"{folder}/a.ckpt")
        load_weights(make(), f"{folder}/a.ckpt")


def twins() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"student": make().state_dict(), "teacher": make().state_dict()}, f"{folder}/a.pth")
        load_weights(make(), f"{folder}/a.pth")


def under_fsdp() -> None:
    trainer: Any = SimpleNamespace(strategy=FSDPStrategy())
    mdc.MultiDimPruneCallback().setup(trainer, strangers.Stranger(), "fit")


def unfinished_sampler() -> None:
    sampler = torch.utils.data.BatchSampler((k for k in range(9)), 3, False)
    pool_of(torch.utils.data.DataLoader(strangers.Spots(), sampler=sampler), 9, 0)


def of_a_callback(ckpt_path: str | None = None) -> None:
    raise RuntimeError(complaint(ckpt_path, has_plan=True, is_other=True, fits=True))


def two_callbacks() -> None:
    both = [mdc.MultiDimPruneCallback(), mdc.MultiDimPruneCallback(0.5)]
    trainer: Any = SimpleNamespace(strategy=None, callbacks=both)
    both[0].setup(trainer, strangers.Stranger(), "fit")


def endless() -> None:
    Schedule("cubic").in_training(lightning.Trainer(max_epochs=-1, logger=False, enable_checkpointing=False))


# What leads to the errors of the table in docs/faq.md.
def crops() -> None:
    """A module that sees two crops of every image in one call."""
    model = Views(make(), "crops")
    mdc.score(model, [images(8)], "hsic", prediction=lambda output: output.softmax(-1))


def altered(alter: Callable[[torch.nn.Module], torch.nn.Module], dimension: str) -> None:
    """A model in whose way something is, in every block."""
    model = make()
    for block in model.blocks:
        block.attn.qkv = alter(block.attn.qkv)
    find_anatomy(model).require([dimension])


def shared() -> None:
    model = make()
    model.blocks = torch.nn.Sequential(*[model.blocks[0]] * 3)
    mdc.score(model, [images()])


def replaced() -> None:
    model = make()
    model.forward = partial(type(model).forward, model)  # type: ignore[method-assign]
    find_anatomy(model).require(["tokens"])


def prompted() -> None:
    model = make()
    model.patch_drop.register_forward_hook(lambda module, args, output: output[:, ::2])
    mdc.score(model, [images()])


def of_another_depth() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mdc.save(slim(), folder)
        mdc.load(folder, model=make("parallel"))


ERRORS: dict[str, Callable[[], Any]] = {
    "budget=... is below the smallest reachable cost": lambda: mdc.uniform_policy(make("vit"), 0.01),
    "holds no supported vision transformer": lambda: mdc.macs(torch.nn.Linear(2, 2)),
    "holds 2 vision transformers": lambda: mdc.macs(two_models()),
    "is no float tensor (images, ...)": lambda: mdc.score(make(), [images()], "hsic", prediction=lambda y: [y]),
    "a batch is dict": lambda: mdc.score(make("vit"), [{"pixel_values": images()}]),
    "labels -1 to 6, but the model has 7 classes": lambda: mdc.score(
        make(), [(images(8), torch.arange(8) - 1)], "taylor"
    ),
    "images in a call, of which ... predictions were made": crops,
    "but no usable batch was given": lambda: mdc.score(make("vit"), [images(2)]),
    "are too small to score on, and cannot be put together": lambda: put_together([images(2), images(2, 16)], 4),
    "cannot be copied": unfinished_sampler,
    "cannot lose tokens": lambda: mdc.uniform_policy(POST_NORM(), 0.9, ["tokens"]),
    "is a ..., an adapter around a Linear layer": lambda: altered(LoRA, "heads"),
    "has a parametrization": lambda: altered(spectral_norm, "heads"),
    "... is of blocks.0... and of blocks.1...": shared,
    "was replaced on the instance": replaced,
    "is given ... tokens, but": prompted,
    "was saved of a model with ...": of_another_depth,
    "shards parameters": under_fsdp,
    "cannot be expressed by constructor arguments": lambda: mdc.save(with_a_head_of_its_own(), "x"),
    "there is no full feature map to return": lambda: slim(restore=False).forward_intermediates(images()),
    "holds more than weights": foreign_pickle,
    "holds no state of this callback": lambda: of_a_callback(ckpt_path="a.ckpt"),
    "the weights of this module are not those that the plan": of_a_callback,
    "two callbacks prune one model": two_callbacks,
    "schedule='cubic' with an endless Trainer": endless,
    "holds several networks that fit": twins,
    "size mismatch for blocks.0.attn.qkv.weight": lambda: make().load_state_dict(slim().state_dict()),
    "has to be given, e.g.": lambda: settings("budget=???"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_are_worded_as_the_faq_has_them(message):
    with pytest.raises((mdc.errors.MdcError, RuntimeError), match=re.escape(message).replace(r"\.\.\.", ".*")):
        ERRORS[message]()


def test_all_errors_of_the_faq_are_tried():
    table = (ROOT / "docs" / "faq.md").read_text().partition("| it says | do |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `([^`]+)`", table, re.MULTILINE) == list(ERRORS)


# --- commands, keys, links --------------------------------------------------------------------------------------------


def in_code(page: Path) -> list[str]:
    """The pieces of a page between single backticks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


def commands() -> list[str]:
    found = []
    for block in (block for page in WRITTEN for block in blocks(page) if block.language in ("", "sh")):
        for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
            found += [line] if re.match(r"(python|make|mdc|srun|torchrun) ", line) else []
    # README has a table of them.
    return found + [piece for page in WRITTEN for piece in in_code(page) if piece.startswith("mdc ")]


@cache
def understood(*overrides: str) -> set[str]:
    """The keys at the top of what Hydra makes of them; it raises where it cannot."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return set(compose("train", list(overrides)))


@pytest.mark.parametrize("command", dict.fromkeys(commands()))
def test_commands_are_understood(command):
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif "train.py" in words or words[:2] == ["mdc", "train"]:
        start = words.index("train.py") if "train.py" in words else 1
        overrides = [word for word in words[start + 1 :] if not word.startswith("-")]
        understood(*(word for word in overrides if "(" not in word))  # a sweep is not composed
    elif (words[0] == "mdc" and not words[2:]) or words[2:] == ["--help"]:
        assert words[1] in ("report", "compress", "export")
    elif words[0] == "mdc":
        _parser().parse_args(words[1:])


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_settings_that_are_spoken_of_exist(page):
    known = {key for keys in sections().values() for key in keys}
    words = [word for piece in in_code(page) for word in piece.split()]
    spoken = {found[1] for word in words if (found := re.match(r"'?\+?((?:[a-z_]+\.)+[a-z_]+)=", word))}
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    ours = {key for key in spoken if key.partition(".")[0] in groups | {key.partition(".")[0] for key in known}}
    assert {key for key in ours if not key.startswith("hydra.")} <= known


def settings_in_sentences() -> list[tuple[str, ...]]:
    """Pieces of code that are nothing but settings of ours, such as ``policy.round_to=8``."""
    pieces = {piece for page in WRITTEN for piece in in_code(page) if piece.count("'") % 2 == 0 and '"' not in piece}
    roots = understood() | {"experiment"}
    return [
        tuple(words)
        for words in map(shlex.split, sorted(pieces))
        if words and all(re.match(r"[a-z_.]+=[^=(]+$", word) and re.split("[.=]", word)[0] in roots for word in words)
    ]


def test_settings_in_the_middle_of_a_sentence_are_understood():
    found = settings_in_sentences()
    assert len(found) > 25  # else the pages, or the pattern, are no longer what they were
    for words in found:
        understood(*words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        if anchor:
            assert anchor in anchors(other), target


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub addresses them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


# --- README -----------------------------------------------------------------------------------------------------------


def test_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 10_000


# Names with a number in them, what it takes to install, and a batch of one.
NAMES_WITH_NUMBERS = (
    r"arXiv \d{4}\.\d{5}|Python \d\.\d+|Apache-2\.0|CIFAR-10|T2T-ViT|EVA-02|Sapiens2|"
    r"DINOv\d|DeiT-III|Qwen3-VL|MViTv2|PVTv2|Gemma 4|several GB|batch 1\b"
)


def test_numbers_in_readme_are_measured():
    """Whatever is measured stands in a block that a benchmark writes; settings stand in code."""
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]+`|\]\([^)]+\)", "", text)
    assert re.findall(r".{0,30}\d.{0,30}", re.sub(NAMES_WITH_NUMBERS, "", text)) == []
