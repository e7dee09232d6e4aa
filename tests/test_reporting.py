"""Reports: every number in them is one of the results, and sentences are said only where they are true."""

import pytest
import torch
from matplotlib import image as mpl_image
from timm.models.vision_transformer import VisionTransformer

import lightning_mdc as mdc
from lightning_mdc.app.report.report import findings, overhead_line
from lightning_mdc.app.report.results import DENSE, FINETUNED, REFERENCE, SLIM, Result, Results
from lightning_mdc.app.report.tables import by_seed, comparison, count
from lightning_mdc.app.run_folder import RunFolder, newest_run
from lightning_mdc.budget.timing import latencies
from lightning_mdc.errors import BudgetError, ConfigError
from lightning_mdc.figures.numbers import percent, scaled, seconds
from lightning_mdc.figures.plan import kept_by_block, kept_figure
from lightning_mdc.figures.style import save_figure


def result(model: str, seed: int | None, correct: int, **changes) -> Result:
    cost = (22_418_816, 305_034, 1_225_000) if model in (DENSE, REFERENCE) else (13_400_000, 246_700, 991_000)
    times = {1: 2.5e-3, 64: 2.0e-4} if model in (DENSE, REFERENCE) else {1: 2.4e-3, 64: 1.25e-4}
    fields = {
        "agreeing": correct - 3,
        "images": 360,
        "macs": cost[0],
        "params": cost[1],
        "size": cost[2],
        "latency": times,
    }
    return Result(model, seed, correct, **{**fields, **changes})


def results(*rows: Result) -> Results:
    everything = (
        result(DENSE, None, 351, agreeing=360),
        result(SLIM, None, 300),
        result(FINETUNED, 0, 350),
        result(FINETUNED, 1, 352),
        result(FINETUNED, 2, 353),
        result(REFERENCE, 0, 354),
    )
    return Results(rows or everything, "digits", "CPU, 2 threads")


# --- tables -----------------------------------------------------------------------------------------------------------


def test_the_comparison_holds_the_results():
    table = comparison(results())
    cells = {row[0]: row[1:] for row in table.rows}
    assert table.header[1:] == ("dense", "slim", "slim finetuned (mean of 3 seeds)", "dense, same extra training")
    assert cells["top-1"] == ("351/360 (97.50 %)", "300/360 (83.33 %)", "351.7/360 (97.69 %)", "354/360 (98.33 %)")
    assert cells["agreement with dense"][0] == "360/360 (100.00 %)"
    assert cells["MACs"][:2] == ("22.42 M (100.0%)", "13.40 M (59.8%)")
    assert cells["weights file"][1] == "991.00 kB (80.9%)"
    assert cells["time per image, batch 64"][:2] == ("200.0 µs", "125.0 µs (1.60x as fast)")
    assert cells["time per image, batch 1"][:2] == ("2.50 ms", "2.40 ms (1.04x as fast)")


def test_printed_and_written_tables_are_one():
    table = comparison(results())
    markdown, printed = table.markdown(), table.rich("title")
    assert [list(column.cells) for column in printed.columns] == [
        list(cells) for cells in zip(*table.rows, strict=True)
    ]
    for row in table.rows:
        assert "| " + " | ".join(row) + " |" in markdown


def test_every_seed_has_its_row():
    rows = by_seed(results()).rows
    assert [(row[0], row[1], row[2]) for row in rows] == [
        (FINETUNED, "0", "350/360 (97.22 %)"),
        (FINETUNED, "1", "352/360 (97.78 %)"),
        (FINETUNED, "2", "353/360 (98.06 %)"),
        (REFERENCE, "0", "354/360 (98.33 %)"),
    ]


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (count(351, 360), "351/360 (97.50 %)"),
        (count(351.5, 360), "351.5/360 (97.64 %)"),
        (percent(0.5985), "59.9 %"),
        (scaled(999), "999 "),
        (scaled(17_563_828_224), "17.56 G"),
        (seconds(0.0025), "2.50 ms"),
        (seconds(2e-6), "2.0 µs"),
    ],
)
def test_numbers_are_written_with_their_unit(got, expected):
    assert got == expected


# --- sentences --------------------------------------------------------------------------------------------------------


def test_findings_follow_from_the_numbers():
    said = " ".join(findings(results()))
    assert (
        "At 59.8 % of the MACs and 80.9 % of the parameters the slim model after finetuning gets 351.7 of 360" in said
    )
    assert "0.7 more test images right than dense (97.5 % → 97.7 %), and is 1.60x as fast at batch 64" in said
    assert "2.3 fewer test images right than that" in said


def test_the_overhead_line_is_said_only_where_it_was_measured():
    line = overhead_line(results())
    assert line is not None
    assert "1.04x" in line
    assert "1.60x" in line
    dense = result(DENSE, None, 351)
    gains_at_both = result(SLIM, None, 350, latency={1: 1.7e-3, 64: 1.25e-4})
    gains_at_none = result(SLIM, None, 350, latency={1: 2.5e-3, 64: 2.1e-4})
    assert overhead_line(results(dense, gains_at_both)) is None
    assert overhead_line(results(dense, gains_at_none)) is None


def test_a_verdict_without_finetuning_says_so():
    said = " ".join(findings(results(result(DENSE, None, 351), result(SLIM, None, 300))))
    assert "the slim model, not finetuned, gets 300 of 360 test images right, 51 fewer" in said
    assert "after finetuning" not in said


def test_results_go_through_json(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(results().to_json())
    assert Results.load(path) == results()
    path.write_text(results().to_json().replace('"correct"', '"korrekt"'))
    with pytest.raises(ConfigError, match="runs the step test again"):
        Results.load(path)


# --- the picture ------------------------------------------------------------------------------------------------------


def tiny_plan() -> tuple[torch.nn.Module, mdc.Plan]:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=4, num_heads=4, num_classes=5)
    scores = mdc.score(model, criterion="random")
    return model, mdc.make_plan(model, scores, mdc.uniform_policy(model, 0.5))


def test_kept_counts_are_those_of_the_slim_model():
    model, plan = tiny_plan()
    slim = mdc.slim(model, plan).eval()
    heads, neurons, tokens = kept_by_block(plan, 17, 1)
    assert heads.kept == tuple(block.attn.num_heads for block in slim.blocks)
    assert neurons.kept == tuple(block.mlp.fc1.out_features for block in slim.blocks)
    seen: list[int] = []
    for block in slim.blocks:
        block.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    slim(torch.zeros(1, 3, 16, 16))
    assert tokens.kept == tuple(seen)
    assert tokens.dense == (17,) * 4


def test_the_picture_shows_every_count(tmp_path):
    _, plan = tiny_plan()
    kept = kept_by_block(plan, 17, 1)
    figure = kept_figure(kept)
    for axes, units in zip(figure.axes, kept, strict=True):
        assert axes.get_ylabel() == units.dimension
        dense, bars = (tuple(int(bar.get_height()) for bar in group) for group in axes.containers)
        assert (dense, bars) == (units.dense, units.kept)
        assert tuple(int(text.get_text()) for text in axes.texts) == units.kept
    assert figure.axes[-1].get_xlabel() == "block"
    save_figure(figure, tmp_path / "kept.png")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.png"]
    assert mpl_image.imread(tmp_path / "kept.png").ndim == 3


# --- what reports rest on ---------------------------------------------------------------------------------------------


class Sleeper(torch.nn.Linear):
    """Takes a known time."""

    def __init__(self, duration: float) -> None:
        super().__init__(1, 1)
        self.duration = duration
        self.modes: set[bool] = set()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        import time

        self.modes.add(self.training)
        time.sleep(self.duration)
        return images


def test_latency_is_per_image_and_leaves_the_mode():
    slow, fast = Sleeper(0.006), Sleeper(0.002)
    found = latencies({"slow": slow, "fast": fast}, 4, (1, 2, 2), rounds=3)
    assert found["slow"] == pytest.approx(0.006 / 4, rel=0.5)
    assert found["fast"] == pytest.approx(0.002 / 4, rel=0.5)
    assert slow.modes == {False}
    assert slow.training
    assert latencies({"fast": fast}, 1, (1, 2, 2), rounds=1)["fast"] >= 0.002


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"batch_size": 0}, "batch_size=0"), ({"rounds": 0}, "rounds=0"), ({"input_size": (8, 8)}, "channels")],
)
def test_wrong_timing_arguments(changes, words):
    with pytest.raises(BudgetError, match=words):
        latencies({"model": Sleeper(0.0)}, **{"batch_size": 1, "input_size": (1, 8, 8), **changes})


def test_the_newest_run_is_the_last_one_started(tmp_path):
    names = ["2026-01-31_12-00-00", "2026-01-31_12-00-00_2", "2026-01-31_12-00-00_10", "2026-01-30_23-59-59"]
    for name in names:
        RunFolder(tmp_path / name).create()
    (tmp_path / "2027-01-01_00-00-00").mkdir()  # failed before its first stage
    assert newest_run(tmp_path) == tmp_path / "2026-01-31_12-00-00_10"
