"""The table of steps, and those that speak of steps without reading it: the functions and the texts."""

import re

import pytest

from lightning_mdc.app.step_table import STEPS, needed, setting
from lightning_mdc.app.steps import ACTIONS
from tests.test_configs import CONF, OPTIONS, settings


def test_every_step_has_a_function_and_every_function_a_step():
    assert list(ACTIONS) == list(STEPS)


def test_steps_come_after_what_they_are_built_on():
    seen: set[str] = set()
    for name, step in STEPS.items():
        assert step.name == name
        assert seen.issuperset(step.needs + step.looks_at), name
        seen.add(name)


def test_every_output_belongs_to_one_step():
    paths = [output.path for step in STEPS.values() for output in step.outputs]
    assert len(set(paths)) == len(paths)
    assert [step.output for step in STEPS.values()][:2] == ["dense", "scores.safetensors"]


def test_every_setting_that_is_looked_at_exists():
    composed = [settings(option) for option in OPTIONS if option.startswith("data=")]
    for step in STEPS.values():
        for key in (*step.settings, *step.ignores):
            group, _, name = key.partition(".")
            assert any(group in each and (not name or name in each[group]) for each in composed), key
        if step.trains is not None:
            assert "epochs" in composed[0][step.trains]


def test_what_trials_share_is_built_on_what_they_share():
    """Else a trial would need what no trial makes."""
    shared = {name for name, step in STEPS.items() if step.shared_by_trials}
    assert all(shared.issuperset(STEPS[name].needs) for name in shared)


@pytest.mark.parametrize("name", [name for name, step in STEPS.items() if step.switch is not None])
def test_the_remedy_brings_a_step_that_is_switched_off(name):
    switch = STEPS[name].switch
    without = settings(f"{switch.key}={switch.off}")
    assert setting(without, switch.key) == switch.off
    assert STEPS[name].is_off(without)
    assert all(name not in needed(without, other) for other in STEPS)
    assert not STEPS[name].is_off(settings(switch.remedy.rpartition(" ")[2]))


def test_the_help_and_the_comment_of_stage_name_all_steps():
    text = (CONF / "train.yaml").read_text().replace("\n#", "").replace("\n     ", "")
    listed = re.search(r'"all", one of ([a-z, ]+), or a list', text)
    assert re.split(", ", listed.group(1)) == list(STEPS)
    in_all, on_request = re.search(r"Steps: (dense .*report), and (\w+) if asked for", text).groups()
    assert set(re.findall(r"\w+", in_all)) == {name for name, step in STEPS.items() if step.in_all}
    assert [on_request] == [name for name, step in STEPS.items() if not step.in_all]
    main = re.sub(r" \(.*?\)", "", in_all).split(" -> ")
    assert main == [name for name, step in STEPS.items() if step.in_all and step.switch is None]
