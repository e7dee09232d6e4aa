"""What a sweep leaves in its folder beside the folders of its trials."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lightning_mdc.files import csv_text, write_text
from lightning_mdc.gp_ei.study import Study

from ._folders import Folders
from ._params import Params

log = logging.getLogger(__name__)

RESULTS, TRIALS = "optimization_results.yaml", "trials.csv"


def results(study: Study, params: Params, folders: Folders) -> dict[str, Any]:
    """The best trial, as Hydra's other sweepers tell it; its folder as seen from the sweep's."""
    best = study.best
    return {
        "name": "mdc_gp_ei",
        "best_params": params.values(best.params) if best else None,
        "best_value": best.value if best else None,
        "best_trial": best.number if best else None,
        "best_dir": folders.inside(best) if best else None,
    }


def trials(study: Study, params: Params, folders: Folders) -> list[dict[str, Any]]:
    """All trials as plain dicts."""
    named = ("number", "cost", "value", "status", "seconds", "improvement", "note")
    return [
        {name: getattr(trial, name) for name in named}
        | {"params": params.values(trial.params), "folder": folders.inside(trial)}
        for trial in study.trials
    ]


def table(study: Study, folders: Folders) -> str:
    """All trials as CSV: a line each, a column for each number that was searched."""
    names = [axis.name for axis in study.search.space.axes]
    rows = []
    for trial in study.trials:
        values = (*(trial.params[name] for name in names), trial.cost, trial.value)
        seconds = "" if trial.seconds is None else f"{trial.seconds:.3f}"
        rows.append([trial.number, *values, trial.status, seconds, trial.note, folders.inside(trial)])
    return csv_text(["number", *names, "cost", "value", "status", "seconds", "note", "folder"], rows)


def save(study: Study, params: Params, folders: Folders) -> None:
    """Write both files."""
    best = OmegaConf.create(results(study, params, folders))
    write_text(folders.root / RESULTS, OmegaConf.to_yaml(best))
    write_text(folders.root / TRIALS, table(study, folders))


def draw(study: Study, directory: Path) -> None:
    """Draw what can be drawn; a picture that fails is not worth a sweep."""
    from lightning_mdc.figures import search as search_figures
    from lightning_mdc.figures.style import save_figure

    search, trials = study.search, study.trials
    pictures: Mapping[str, Callable[[], Any]] = {
        "progress": lambda: search_figures.progress_figure(trials, search.direction),
        "cost": lambda: (
            search.constraint and search_figures.cost_figure(trials, search.direction, search.constraint.target)
        ),
        "dependence": lambda: search_figures.dependence_figure(search),
    }
    for name, picture in pictures.items():
        try:
            if figure := picture():
                save_figure(figure, directory / f"{name}.png")
        except ImportError as error:  # matplotlib is not installed
            log.info("pictures are left out: %s", error)
            return
        except Exception:
            log.warning("%s.png could not be drawn", name, exc_info=True)
