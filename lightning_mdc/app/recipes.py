"""Which recipe trains what: optimizer and schedule of a step, by the weights that it begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_mdc.errors import ConfigError, check_one_of

Settings = Mapping[str, Any]

# The steps that train, by their groups of settings.
TRAININGS = ("dense", "sharing", "distillation")
# Chooses by the weights: the first recipe for those that are drawn at random, the second for those that are given.
AUTO, SCRATCH, FINETUNE = "auto", "scratch", "finetune"


def completed(settings: Settings) -> dict[str, Any]:
    """`settings` with each training's optimizer and schedule over those of its recipe; what neither says stays None.

    Raises:
        ConfigError: there is no recipe of that name.
    """
    return {**settings, **{training: _completed(settings, training) for training in TRAININGS}}


def _completed(settings: Settings, training: str) -> dict[str, Any]:
    own, recipe = settings[training], settings["recipes"][recipe_of(settings, training)[0]][training]
    said = {part: {k: v for k, v in own[part].items() if v is not None} for part in recipe}
    return {**own, **{part: own[part] | recipe[part] | said[part] for part in recipe}}


def recipe_of(settings: Settings, training: str) -> tuple[str, str]:
    """(name, why) of the recipe that is in force.

    Raises:
        ConfigError: there is no recipe of that name.
    """
    asked, known = settings[training]["recipe"], settings["recipes"]
    check_one_of(f"{training}.recipe", asked, (AUTO, *known), ConfigError)
    if asked != AUTO:
        return asked, f"as {training}.recipe says"
    given = given_weights(settings)
    return (FINETUNE, f"as {given} gives the weights") if given else (SCRATCH, "as no weights were given")


def given_weights(settings: Settings) -> str | None:
    """The setting that gives the dense model its first weights; None: they are drawn at random."""
    model = settings["model"]
    if model["checkpoint"] is not None:
        return "model.checkpoint"
    return "model.pretrained" if model["pretrained"] else None


def described(settings: Settings, training: str) -> str:
    """One line: the recipe in force, why, and what it comes to: ``recipe finetune, as model.checkpoint gives ...``."""
    name, why = recipe_of(settings, training)
    optimizer = settings[training]["optimizer"]
    values = (f"{key} {value}" for key in ("lr", "layer_decay") if (value := optimizer.get(key)) is not None)
    return f"recipe {name}, {why}: {', '.join((str(optimizer['opt']), *values))}"


def remedy(settings: Settings, training: str) -> str:
    """What to change where a training does harm."""
    lower = f"lower {training}.optimizer.lr={settings[training]['optimizer']['lr']}"
    return lower if recipe_of(settings, training)[0] == FINETUNE else f"give {training}.recipe={FINETUNE}, or {lower}"
