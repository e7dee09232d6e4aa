"""What each dimension of each block bears alone: against direct evaluation, through a kill, and as file and picture."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.text import Text

import lightning_mdc as mdc
from lightning_mdc.app import pipeline
from lightning_mdc.app.report.record import RunRecord
from lightning_mdc.errors import ConfigError, SearchError
from lightning_mdc.figures.sensitivity import sensitivity_figure, sensitivity_map
from lightning_mdc.policy import TokenOptions
from lightning_mdc.policy_search.held_out import HeldOut
from lightning_mdc.policy_search.sensitivity import Cut, Sensitivity, measure_sensitivity
from tests.kinds import CLASSES, DEPTH, HEADS, POST_NORM, images, make, randomised
from tests.test_train import settings

pytestmark = pytest.mark.slow  # CI runs them

LEVELS = {"heads": None, "neurons": (0.5, 0.0), "tokens": (0.5, 0.0)}


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def scores(model):
    return mdc.score(model, [images(16)], "magnitude")


@pytest.fixture(scope="module")
def labelled():
    return images(30, seed=5), torch.arange(30) % CLASSES


@pytest.fixture(scope="module")
def judge(model, labelled):
    return HeldOut([labelled], "kl", dense=model, batch_size=16)


@pytest.fixture(scope="module")
def whole(model, scores, judge):
    return measure_sensitivity(model, scores, judge, levels=LEVELS)


def test_cuts_are_those_of_a_policy_that_cuts_only_this_block(model, scores, labelled, whole):
    x, y = labelled
    heads = [cut.keep for cut in whole.curve("heads", 2)]
    assert heads == [count / HEADS for count in range(HEADS, -1, -1)]  # every number of them
    assert [cut.keep for cut in whole.curve("neurons", 0)] == [1, 0.5, 0]
    assert [cut.keep for cut in whole.curve("tokens", 1)] == [1, 8 / 17, 2 / 17]  # of 17: prefix and one more stay
    assert whole.blocks("heads") == whole.blocks("neurons") == tuple(range(DEPTH))
    assert whole.blocks("tokens") == (1, 2, 3)
    with torch.no_grad():
        p = model(x).double().softmax(1)
    for cut in (cut for cut in whole.cuts if cut.block in (1, 3)):
        alone = [cut.keep if block == cut.block else 1.0 for block in range(DEPTH)]
        ratios = alone[1:] if cut.dimension == "tokens" else alone  # stages after blocks 1, 2, 3
        small = mdc.slim(model, mdc.make_plan(model, scores, mdc.Policy(**{cut.dimension: ratios})))
        with torch.no_grad():
            log_q = small(x).double().log_softmax(1)
        assert cut.accuracy == (log_q.argmax(1) == y).double().mean().item()
        assert cut.kl == pytest.approx((p * (p.log() - log_q)).sum(1).mean().item(), rel=1e-3, abs=1e-6)
        assert cut.cost == mdc.macs(small) / mdc.macs(model)
    assert len({cut.kl for cut in whole.cuts}) > 20  # no two cuts are the same model


def test_token_options_and_levels_that_nobody_gives(model, scores, judge):
    tokens = TokenOptions(reduction="drop")
    found = measure_sensitivity(model, scores, judge, levels={"heads": (), "tokens": (0.5,)}, stages=[1], tokens=tokens)
    assert [cut.keep for cut in found.curve("heads", 2)] == [1]
    assert [round(cut.keep * 192) for cut in found.curve("neurons", 2)] == [192, 144, 96, 48, 19, 0]
    policy = mdc.Policy(tokens=8 / 17, stages=[1])
    plan = mdc.make_plan(model, scores, policy, tokens)
    assert found.blocks("tokens") == (1,)
    assert found.curve("tokens", 1)[1].cost == mdc.macs(mdc.slim(model, plan)) / mdc.macs(model)


def test_killed_and_resumed_it_is_what_it_would_have_been(model, scores, judge, whole, tmp_path, monkeypatch):
    state, calls, judged = tmp_path / "cuts.csv", [], HeldOut.judge

    def dies(self, small, *args):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return judged(self, small, *args)

    monkeypatch.setattr(HeldOut, "judge", dies)
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(model, scores, judge, levels=LEVELS, state=state)
    before = Sensitivity.load(state)
    assert before.cuts == whole.cuts[: len(before.cuts)]
    assert measure_sensitivity(model, scores, judge, levels=LEVELS, state=state) == whole
    distinct = len({cut.key for cut in whole.cuts if cut.keep < 1}) + 1  # dense is looked at once
    assert len(calls) == distinct + 1  # the one that was killed, again
    assert Sensitivity.load(state) == whole
    fewer = {**LEVELS, "neurons": (0.5,)}  # other levels take what is there, and leave it there
    measure_sensitivity(model, scores, judge, levels=fewer, state=state)
    assert len(calls) == distinct + 1
    assert Sensitivity.load(state) == whole


def test_a_csv_file_goes_there_and_back(whole, tmp_path):
    whole.save(tmp_path / "sensitivity.csv")
    assert Sensitivity.load(tmp_path / "sensitivity.csv") == whole
    assert (tmp_path / "sensitivity.csv").read_text().startswith("dimension,block,keep,accuracy,kl,cost\nheads,0,1.0,")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SearchError, match=r"other.csv holds no sensitivities"):
        Sensitivity.load(tmp_path / "other.csv")


def test_without_labels_there_is_no_accuracy(model, scores, labelled):
    with pytest.raises(SearchError, match=r"held_out tells \['kl'\]"):
        measure_sensitivity(model, scores, HeldOut([labelled[0]], "kl", dense=model), levels=LEVELS)


def test_what_a_model_cannot_lose_is_not_cut():
    model = randomised(POST_NORM())  # whose tokens have to stay
    scores = mdc.score(model, [images(8)], "magnitude")
    judge = HeldOut([(images(8), torch.zeros(8))], "kl", dense=model)
    found = measure_sensitivity(model, scores, judge, levels=dict.fromkeys(LEVELS, (0.5,)))
    assert found.dimensions == ("heads", "neurons")
    assert [cut.keep for cut in found.curve("heads", 2)] == [1, 0.5]


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["accuracy", "kl"])
def test_a_line_per_block_from_whole_to_nothing(whole, measure):
    figure = sensitivity_figure(whole, measure)
    figure.draw_without_rendering()
    panels = [panel for panel in figure.axes if panel.get_title(loc="left")]
    assert [len([line for line in panel.lines if line.get_label().startswith("block")]) for panel in panels] == [
        DEPTH,
        DEPTH,
        3,
    ]
    line = next(line for line in panels[1].lines if line.get_label() == "block 2")
    curve = whole.curve("neurons", 2)
    assert line.get_xdata().tolist() == [cut.keep for cut in curve] == [1, 0.5, 0]
    assert line.get_ydata().tolist() == [getattr(cut, measure) for cut in curve]
    low, high = panels[0].get_ylim()  # all of it is to be seen
    assert all(low <= getattr(cut, measure) <= high for cut in whole.cuts)
    assert panels[0].get_xlim()[0] > panels[0].get_xlim()[1]


def test_the_map_shows_what_is_lost_and_what_is_not_yet_known(whole):
    partial = Sensitivity(tuple(cut for cut in whole.cuts if cut.key != ("neurons", 1, 0.0)))
    figure = sensitivity_map(partial)
    figure.draw_without_rendering()
    neurons = next(panel for panel in figure.axes if panel.get_title(loc="left").startswith("MLP"))
    shown = neurons.images[0].get_array()
    dense = whole.cuts[0].accuracy
    assert shown[2].tolist() == pytest.approx([100 * (dense - cut.accuracy) for cut in whole.curve("neurons", 2)])
    assert shown.mask.tolist() == [[False, False, block == 1] for block in range(DEPTH)]


def test_pictures_of_nothing_say_so():
    for figure in (sensitivity_figure(Sensitivity(())), sensitivity_map(Sensitivity(()))):
        assert "no cut has been tried yet" in [text.get_text() for text in figure.findobj(Text)]


def test_pictures_of_blocks_that_differ():
    """Each has ratios of its own; a column of the map is for one of them, and a block that lacks it is pale there."""
    first = Cut("heads", 0, 1.0, 0.5, 0.0, 1.0)
    unlike = Sensitivity((first, replace(first, block=1, keep=1 / 3), replace(first, block=20, keep=0.5)))
    (panel, _) = sensitivity_map(unlike).axes
    assert [label.get_text() for label in panel.get_xticklabels()] == ["100 %", "50 %", "33 %"]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["0", "1", "20"]
    known = ~np.ma.getmaskarray(np.ma.masked_invalid(panel.images[0].get_array()))
    assert known.tolist() == [[True, False, False], [False, False, True], [False, True, False]]
    (panel, _) = sensitivity_figure(unlike).axes
    lines = {line.get_label(): line.get_xdata().tolist() for line in panel.lines if line.get_label()[0] != "_"}
    assert lines == {"block 0": [1.0], "block 1": [1 / 3], "block 20": [0.5]}


# --- the stage --------------------------------------------------------------------------------------------------------


def test_the_stage_is_asked_for_by_name_and_goes_on(tmp_path, monkeypatch):
    chosen = ("stage=[dense,score,sensitivity]", "sensitivity.tokens=[0.5]", "sensitivity.neurons=[0.5,0]")
    folder = pipeline.run(settings(tmp_path / "whole", *chosen)).path
    expected = (folder / "sensitivity.csv").read_bytes()
    assert b"\ntokens,2," in expected
    assert "sensitivity" not in pipeline.select(settings(tmp_path))
    assert pipeline.select(settings(tmp_path, "stage=[all,sensitivity]"))[2:4] == ("sensitivity", "search")

    judged, calls = HeldOut.judge, []

    def dies(self, model, *args):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return judged(self, model, *args)

    monkeypatch.setattr(HeldOut, "judge", dies)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(settings(tmp_path / "killed", *chosen))
    (killed,) = (tmp_path / "killed" / "tiny").iterdir()
    found = RunRecord(killed).sensitivity  # half of it is worth a report
    assert found is not None
    assert len(found.cuts) >= 6
    assert not (killed / "sensitivity.csv").exists()
    resumed = pipeline.run(settings(tmp_path / "killed", *chosen, f"resume={killed}")).path
    assert (resumed / "sensitivity.csv").read_bytes() == expected
    monkeypatch.setattr(HeldOut, "judge", lambda *_: pytest.fail("a cut that is done was made again"))
    chosen = ("stage=sensitivity", "sensitivity.tokens=[0.5]", "sensitivity.neurons=[0.5]")
    fewer = pipeline.run(settings(tmp_path / "killed", *chosen, f"resume={killed}")).path
    assert (fewer / "sensitivity.csv").read_bytes().count(b"\n") == expected.count(b"\n") - 4


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sensitivity.neurons=null", r"sensitivity.neurons=None: expected a list of keep ratios"),
        ("sensitivity.heads=[2]", r"sensitivity.heads=\[2\].*or null for every number"),
        ("sensitivity.images=0", "sensitivity.images=0"),
    ],
)
def test_wrong_settings_are_refused(override, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        pipeline.run(settings(tmp_path, "stage=[dense,score,sensitivity]", override))
