"""One item on each of Lightning's loggers, as a callback shows it on ``trainer.loggers``: what is in the files then?"""

import csv
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_mdc.figures import loggers
from lightning_mdc.figures.items import Document, Histogram, Item, Numbers, Panel, Picture, Summary, Table
from lightning_mdc.figures.style import new_figure
from tests.wandb_file import read_finished

FIGURE = new_figure(1, 1)[0]
VALUES = np.array([0.0, 0.25, 0.5, 1.0])
ITEMS: tuple[Item, ...] = (
    Numbers({"search/value": 0.5, "search/cost": 1.0}, "search/trial", 0),
    Numbers({"search/value": 0.75, "search/cost": 0.9}, "search/trial", 1),
    Histogram("scores/heads/block00", VALUES),
    Picture.of("kept", "What to read.", FIGURE),
    Table(
        "kept/heads", ("block", "kept"), (("a", 3), ("b", None)), (Panel("bars", "Kept", "bar", "block", ("kept",)),)
    ),
    Summary({"macs_ratio": 0.6}),
)


def shown(logger) -> None:
    for item in ITEMS:
        loggers.show(logger, item)


def test_csv(tmp_path):
    logger = CSVLogger(tmp_path, name="run")
    shown(logger)
    logger.save()
    folder = Path(logger.log_dir)
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [(row["search/trial"], row["search/value"], row["search/cost"]) for row in rows[:2]] == [
        ("0", "0.5", "1.0"),
        ("1", "0.75", "0.9"),
    ]
    assert rows[2]["macs_ratio"] == "0.6"
    assert (folder / "scores/heads/block00.csv").read_text().split() == ["value", *map(str, VALUES)]
    assert (folder / "charts/kept.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "kept/heads.csv").read_text() == "block,kept\na,3\nb,\n"


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="run")
    shown(logger)
    events = EventAccumulator(logger.log_dir).Reload()
    assert [(event.step, event.value) for event in events.Scalars("search/value")] == [(0, 0.5), (1, 0.75)]
    assert events.Scalars("macs_ratio")[0].value == pytest.approx(0.6)
    assert events.Histograms("scores/heads/block00")[0].histogram_value.num == len(VALUES)
    assert events.Images("charts/kept")[0].encoded_image_string.startswith(b"\x89PNG")
    assert b"| a | 3 |" in events.Tensors("kept/heads/text_summary")[0].tensor_proto.string_val[0]


def test_wandb(tmp_path):
    logger = WandbLogger(save_dir=str(tmp_path), mode="offline")  # offline=True would set the environment for good
    shown(logger)
    logger.experiment.finish()
    run = read_finished(tmp_path)
    assert run.values("search/trial") == [0, 1]
    assert run.values("search/value") == [0.5, 0.75]
    assert run.metrics["search/value"] == ("search/trial", {"max", "last"})
    assert run.metrics["search/cost"][0] == "search/trial"
    assert sum(run.of_type("histogram")["scores/heads/block00"]["values"]) == len(VALUES)
    picture = run.of_type("image-file")["charts/kept"]
    assert picture["caption"] == "What to read."
    assert (run.folder / "files" / picture["path"]).exists()
    assert run.table("kept/heads") == [{"block": "a", "kept": 3}, {"block": "b", "kept": None}]
    assert run.table("bars_table") == [{"block": "a", "kept": 3}]
    assert run.summary["macs_ratio"] == 0.6


def test_another_logger_is_given_the_numbers():
    lines: list[tuple[dict[str, float], int]] = []

    class Own(DummyLogger):
        def log_metrics(self, metrics, step):
            lines.append((metrics, step))

    shown(Own())
    assert lines == [
        ({"search/value": 0.5, "search/cost": 1.0}, 0),
        ({"search/value": 0.75, "search/cost": 0.9}, 1),
        ({"macs_ratio": 0.6}, 0),
    ]


@pytest.mark.parametrize("log_model", [False, True])
def test_a_plan_goes_where_models_go(log_model, tmp_path):
    logger = WandbLogger(save_dir=str(tmp_path), mode="offline", log_model=log_model)
    loggers.show(logger, Document("plan", "plan.json", "{}", {"macs_ratio": 0.6}))
    logger.experiment.finish()
    assert [artifact.type for artifact in read_finished(tmp_path).artifacts.values()] == ["plan"] * log_model


def test_other_ranks_show_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "is_first", lambda: False)
    shown(CSVLogger(tmp_path, name="run"))
    assert not list(tmp_path.rglob("*.*"))
