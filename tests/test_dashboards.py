"""What somebody's own run shows of pruning, read back from Lightning's loggers of wandb, TensorBoard, MLflow, any."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from PIL import Image
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_mdc as mdc
from lightning_mdc.budget import CostModel
from lightning_mdc.figures import dashboard as dashboards
from lightning_mdc.figures.dashboard import Dashboard
from lightning_mdc.figures.decision import Decision
from lightning_mdc.models import find_anatomy
from tests.wandb_file import OfflineRun, read_finished

pytestmark = pytest.mark.slow  # CI runs them

PICTURES = {
    f"charts/{key}"
    for key in (
        *("kept", "macs", "policy", "search/value", "search/improvement", "search/cost", "search/dependence"),
        *("importance/heads", "importance/neurons", "importance/tokens", "importance/histograms", "tokens"),
    )
}
STEPS, TRIALS = 8, 12


class Reader(lightning.LightningModule):
    """Somebody's module: digits, with a scale of its own inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vit = VisionTransformer(
            img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=4, num_heads=4
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x / 8 - 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def digits() -> DataLoader[Any]:
    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None]
    return DataLoader(TensorDataset(images[:512], torch.from_numpy(found.target)[:512]), batch_size=64)


class Plain(DummyLogger):
    """Any logger: numbers and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[dict[str, float], int | None]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((dict(metrics), step))

    def curve(self, key: str) -> dict[int | None, float]:
        return {step: metrics[key] for metrics, step in self.lines if key in metrics}


class Full(DummyLogger):
    """A logger that has no room for more than the user's own curves."""

    def __init__(self) -> None:
        super().__init__()
        self.refused = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "loss" not in metrics:
            self.refused += 1
            raise OSError(28, "No space left on device")


def fitted(root: Path, *loggers: Logger, **options: Any) -> tuple[Reader, mdc.MultiDimPruneCallback]:
    """README's five lines."""
    module, prune = Reader(), mdc.MultiDimPruneCallback(budget=0.6, **({"n_trials": 2} | options))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    chosen = {"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 1, "default_root_dir": root, **quiet}
    trainer = lightning.Trainer(callbacks=[prune], logger=list(loggers), **chosen)
    trainer.fit(module, digits())
    return module, prune


def decision(module: Reader, scores: mdc.Scores, found: mdc.SearchResult | None = None) -> Decision:
    plan = mdc.make_plan(module.vit, scores, mdc.uniform_policy(module.vit, 0.6) if found is None else found.policy)
    look = partial(module, next(iter(digits()))[0])
    return Decision(CostModel(find_anatomy(module)), plan, scores, mdc.Budget(macs=0.6), found, look)


def searched(dashboard: Dashboard, module: Reader, scores: mdc.Scores, n_trials: int = TRIALS, **options: Any) -> Any:
    """A search for the dense model's own output, whose trials are shown as they come."""
    images = next(iter(digits()))[0] / 8 - 1
    dense = module.vit(images).detach()

    def closeness(slim: nn.Module) -> float:
        return -nn.functional.mse_loss(slim(images), dense).item()

    chosen = mdc.SearchOptions(initial_points=4, progress=False, on_trial=dashboard.trial, **options)
    return mdc.search(module.vit, scores, closeness, budget=0.6, n_trials=n_trials, options=chosen)


@pytest.fixture(scope="module")
def scored() -> tuple[Reader, mdc.Scores]:
    module = Reader().eval()
    return module, mdc.score(module, digits(), progress=False)


@dataclass
class Watched:
    """One user's run, on all loggers."""

    folder: Path
    module: Reader
    prune: mdc.MultiDimPruneCallback
    tensorboard: TensorBoardLogger
    mlflow: MLFlowLogger
    csv: CSVLogger
    plain: Plain

    @property
    def found(self) -> mdc.SearchResult:
        assert self.prune.search is not None
        return self.prune.search

    @property
    def plan(self) -> mdc.Plan:
        assert self.prune.plan is not None
        return self.prune.plan

    @property
    def slim(self) -> nn.Module:
        return self.prune.slim_model(self.module)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    patch = pytest.MonkeyPatch()
    patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    wandb = WandbLogger(save_dir=str(folder), mode="offline", log_model=True)
    tensorboard, csv_files, plain = TensorBoardLogger(folder), CSVLogger(folder), Plain()
    mlflow = MLFlowLogger(
        tracking_uri=f"sqlite:///{folder}/mlflow.db", artifact_location=(folder / "artifacts").as_uri(), log_model=True
    )
    loggers = (wandb, tensorboard, mlflow, csv_files, plain)

    def fewest_tokens(module: Any) -> float:
        return -sum(stage.keep for stage in module.vit.mdc_plan.tokens)

    module, prune = fitted(folder, *loggers, n_trials=TRIALS, evaluate=fewest_tokens)
    csv_files.save()
    wandb.experiment.finish()
    yield Watched(folder, module, prune, tensorboard, mlflow, csv_files, plain)
    patch.undo()


def trials_of(found: mdc.SearchResult) -> dict[int, float | None]:
    return {trial.number: trial.value for trial in found.history}


def heads_kept(plan: mdc.Plan) -> list[float]:
    return [len(kept) / heads for kept, heads in zip(plan.heads, plan.num_heads, strict=True)]


def tokens_seen(slim: nn.Module) -> list[int]:
    """How many tokens reach each block's MLP, found by looking."""
    seen: list[int] = []
    handles = [b.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1])) for b in slim.blocks]
    with torch.no_grad():
        slim(torch.rand(1, 1, 8, 8))
    for handle in handles:
        handle.remove()
    return seen


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def assert_is_picture(png: bytes) -> None:
    image = Image.open(io.BytesIO(png)).convert("RGB")
    assert min(image.size) > 60
    assert len(image.getcolors(image.width * image.height)) > 20


# --- read back --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wandb_run(watched: Watched) -> OfflineRun:
    return read_finished(watched.folder)


def test_wandb_has_every_trial_and_what_each_block_keeps(watched, wandb_run):
    assert dict(zip(wandb_run.values("search/trial"), wandb_run.values("search/value"), strict=True)) == trials_of(
        watched.found
    )
    assert wandb_run.values("search/cost") == [trial.cost for trial in watched.found.history]
    assert wandb_run.metrics["search/value"] == ("search/trial", {"max", "last"})
    assert wandb_run.values("keep_ratio/heads")[-4:] == heads_kept(watched.plan)
    assert wandb_run.values("keep_ratio/tokens")[-4:] == [count / 17 for count in tokens_seen(watched.slim)]
    assert wandb_run.metrics["keep_ratio/heads"][0] == "keep_ratio/block"
    rows = wandb_run.table("kept/neurons_by_block")
    assert [row["kept"] for row in rows] == [len(kept) for kept in watched.plan.neurons]
    assert len(wandb_run.table("search/trials")) == TRIALS


def test_wandb_has_pictures(wandb_run):
    shown = wandb_run.of_type("image-file")
    assert shown.keys() == PICTURES
    for picture in shown.values():
        assert picture["caption"]
        assert_is_picture((wandb_run.folder / "files" / picture["path"]).read_bytes())


def test_wandbs_table_of_runs_can_be_sorted_by_cost(watched, wandb_run):
    summary = wandb_run.summary
    dense, slim = watched.module.vit, watched.slim
    assert (summary["mdc/macs_dense"], summary["mdc/macs_slim"]) == (mdc.macs(dense), mdc.macs(slim))
    assert (summary["mdc/params_dense"], summary["mdc/params_slim"]) == (params(dense), params(slim))
    assert summary["mdc/macs_ratio"] == pytest.approx(mdc.macs(slim) / mdc.macs(dense))
    assert summary["mdc/utilisation"] == pytest.approx(mdc.macs(slim) / mdc.macs(dense) / 0.6)
    assert summary["search/best"] == watched.found.value


def test_wandb_keeps_the_plan_where_it_keeps_models(watched, wandb_run):
    artifact = wandb_run.artifacts[f"plan-{wandb_run.about.run_id}"]
    (entry,) = artifact.manifest.contents
    assert (artifact.type, entry.path) == ("plan", "plan.json")
    assert Path(entry.local_path).read_text() == watched.plan.to_json()


def test_the_users_curve_on_wandb_is_left_alone(wandb_run):
    lines = [line for line in wandb_run.history if "loss" in line]
    assert [line["trainer/global_step"] for line in lines] == list(range(STEPS))
    ours = [line for line in wandb_run.history if "search/value" in line or "keep_ratio/heads" in line]
    assert ours
    assert not any("trainer/global_step" in line or "loss" in line for line in ours)


def test_tensorboard(watched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(watched.tensorboard.log_dir, size_guidance={"images": 0}).Reload()
    values = {event.step: event.value for event in events.Scalars("search/value")}
    assert values == pytest.approx(trials_of(watched.found))
    kept = {event.step: event.value for event in events.Scalars("keep_ratio/heads")}
    assert kept == pytest.approx(dict(enumerate(heads_kept(watched.plan))))
    assert events.Scalars("mdc/macs_slim")[-1].value == mdc.macs(watched.slim)
    assert set(events.Tags()["images"]) == PICTURES
    for key in PICTURES:
        assert_is_picture(events.Images(key)[-1].encoded_image_string)
    assert [event.step for event in events.Scalars("loss")] == list(range(STEPS))


def test_mlflow(watched):
    from mlflow import MlflowClient

    client, run = MlflowClient(f"sqlite:///{watched.folder}/mlflow.db"), watched.mlflow.run_id
    history = client.get_metric_history(run, "search/value")
    assert {point.step: point.value for point in history} == trials_of(watched.found)
    kept = {point.step: point.value for point in client.get_metric_history(run, "keep_ratio/heads")}
    assert kept == dict(enumerate(heads_kept(watched.plan)))
    assert client.get_run(run).data.metrics["mdc/macs_slim"] == mdc.macs(watched.slim)
    for key in PICTURES:
        assert_is_picture(Path(client.download_artifacts(run, f"{key}.png")).read_bytes())
    with Path(client.download_artifacts(run, "search/trials.csv")).open() as file:
        assert [float(row["value"]) for row in csv.DictReader(file)] == list(trials_of(watched.found).values())
    assert Path(client.download_artifacts(run, "plan.json")).read_text() == watched.plan.to_json()


def test_csv(watched):
    folder = Path(watched.csv.log_dir)
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {int(row["search/trial"]): float(row["search/value"]) for row in rows if row["search/value"]} == trials_of(
        watched.found
    )
    for key in PICTURES:
        assert_is_picture((folder / f"{key}.png").read_bytes())


def test_a_logger_without_pictures_gets_the_numbers(watched):
    assert watched.plain.curve("search/value") == trials_of(watched.found)
    assert watched.plain.curve("keep_ratio/heads") == dict(enumerate(heads_kept(watched.plan)))
    assert watched.plain.curve("mdc/macs_slim") == {0: mdc.macs(watched.slim)}
    assert watched.plain.curve("loss").keys() == set(range(STEPS))


def test_what_is_in_force_is_shown_when_it_is(watched):
    assert watched.plain.curve("mdc/macs") == {0: mdc.macs(watched.slim)}


# --- what fails, and what is not asked for ----------------------------------------------------------------------------


def test_a_logger_that_fails_is_said_once_and_stops_nothing(tmp_path):
    full, plain = Full(), Plain()
    with pytest.warns(UserWarning, match="Full failed .*No space left on device.*training goes on") as said:
        _, prune = fitted(tmp_path, full, plain)
    assert sum("Full" in str(warning.message) for warning in said) == full.refused == 1
    assert prune.plan is not None
    assert plain.curve("loss").keys() == set(range(STEPS))
    assert plain.curve("keep_ratio/heads")


def test_without_matplotlib_there_are_the_numbers(scored, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    logger = CSVLogger(tmp_path)
    with pytest.warns(UserWarning, match="lack what could not be drawn .*matplotlib.*training goes on") as said:
        Dashboard([logger]).decided(decision(*scored))
    assert len(said) == 1
    logger.save()
    assert "mdc/macs_slim" in (Path(logger.log_dir) / "metrics.csv").read_text()
    assert (Path(logger.log_dir) / "kept" / "heads_by_block.csv").exists()


def test_nothing_is_drawn_for_numbers_and_nothing_computed_for_nobody(scored, monkeypatch):
    made, plain = decision(*scored), Plain()
    monkeypatch.setattr("lightning_mdc.figures.style.new_figure", lambda *_: pytest.fail("drawn for nobody"))
    Dashboard([plain]).decided(made)
    assert plain.curve("keep_ratio/heads")
    monkeypatch.setattr(dashboards.decisions, "numbers", lambda _: pytest.fail("computed for nobody"))
    Dashboard([]).decided(made)
    monkeypatch.setattr(dashboards, "is_first", lambda: False)
    Dashboard([plain]).decided(made)


def test_trials_of_an_earlier_start_are_shown_once(scored, tmp_path):
    module, scores = scored
    searched(Dashboard([]), module, scores, n_trials=3, journal=tmp_path / "trials.jsonl")
    plain = Plain()
    dashboard = Dashboard([plain])
    found = searched(dashboard, module, scores, n_trials=5, journal=tmp_path / "trials.jsonl")
    assert plain.curve("search/value").keys() == {3, 4}
    dashboard.decided(decision(module, scores, found))
    assert plain.curve("search/value") == trials_of(found)
    assert sum("search/value" in metrics for metrics, _ in plain.lines) == 5


def test_random_states_are_left_alone(scored, tmp_path):
    module, scores = scored
    made = decision(module, scores)
    made = Decision(made.costs, made.plan, scores, look=lambda: module(torch.rand(4, 1, 8, 8)))
    before = torch.get_rng_state()
    Dashboard([CSVLogger(tmp_path)]).decided(made)
    assert torch.equal(torch.get_rng_state(), before)
    assert (tmp_path / "lightning_logs" / "version_0" / "charts" / "tokens.png").exists()
