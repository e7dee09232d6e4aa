import getpass
import os
import sys
import tempfile
from collections.abc import Iterator

import pytest

# Nothing of torch and Hydra up here: the process that only hands tests out would import it, too, before they begin.

os.environ.setdefault("WANDB_MODE", "disabled")

# What takes longest comes first: two processes, each of which takes the next file when it has done one, then end at
# about the same time. What forks comes before what uses autograd in ways after which torch refuses it in forks.
LONGEST = ("sweeper", "search", "callback", "callback_search", "data_processes", "distillation_processes")
LONGEST += ("training_data", "conditional", "distributed", "weight_sharing", "terminal", "study", "data_loading")
LONGEST += ("tracking", "train", "docs", "export", "surgery", "families", "install", "gp_ei", "t2t_vit", "dashboards")
LONGEST += ("distributed_run", "distillation", "report", "artifact")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> None:
    from tests import composing

    composing.remember()


@pytest.fixture(autouse=True)
def seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """What one test has compiled is not in the way of the next: all models share the code of timm's classes, of which
    the compiler keeps so many versions and then gives up, after minutes."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]["total"]:
        dynamo.utils.counters.clear()
        dynamo.reset()


@pytest.fixture(scope="session", autouse=True)
def temporary_folder_of_processes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What processes that tests start leave in their temporary folder goes with the folders of the tests.

    timm imports wandb, and that makes two folders (``*wandb-media``, ``*wandb-artifacts``) in every process, which
    stay if it is killed.
    """
    folder = tmp_path_factory.mktemp("tmp")
    cache = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")  # where it is without us: warm
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
    os.environ["TMPDIR"] = str(folder)


# Reports without pictures, which take longer than all the rest of a run: for `monkeypatch.setattr`.
WITHOUT_CHARTS = ("lightning_mdc.app.report.write.charts", lambda record: ())


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*WITHOUT_CHARTS)
