"""``mdc compress``: a model, images and a budget in; a folder with the slim model, its plan and pictures of it out."""

from __future__ import annotations

import logging
import os
import shlex
from argparse import Namespace
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader

import lightning_mdc as mdc
from lightning_mdc import progress
from lightning_mdc.app.build import check_name
from lightning_mdc.app.data import ImageFolderDataModule
from lightning_mdc.app.data.image_view import ImageView
from lightning_mdc.app.report.tables import Table, count
from lightning_mdc.app.terminal import on_screen
from lightning_mdc.app.trainer import REFUSALS
from lightning_mdc.artifact import CONFIG, WEIGHTS, check_savable
from lightning_mdc.budget import CostModel, num_params
from lightning_mdc.errors import CompressionError, ConfigError, DataError, SearchError, check_whole
from lightning_mdc.figures.numbers import scaled
from lightning_mdc.figures.plan import kept_by_block, kept_figure
from lightning_mdc.figures.search import progress_figure
from lightning_mdc.figures.style import save_figure
from lightning_mdc.files import read_json, write_text
from lightning_mdc.gp_ei.study import read_study
from lightning_mdc.models import find_anatomy
from lightning_mdc.policy_search.driver import SearchOptions
from lightning_mdc.randomness import isolated_rng, seed_all
from lightning_mdc.weights import classes_in, load_weights

log = logging.getLogger(__name__)

# In the folder that it leaves.
JOURNAL, PLAN, POLICY = "search.jsonl", "plan.json", "policy.json"
_UNFINISHED = ".slim"
_PICTURES = PLAN_PICTURE, SEARCH_PICTURE = "plan.png", "search.png"


def run(given: Namespace) -> None:
    """Do what the command line says; see ``mdc compress --help``.

    Raises:
        MdcError: what is in the way; one of its subclasses.
    """
    out = Path(given.out)
    _check_free(out)
    device = _device(given.device)
    with on_screen(), isolated_rng():
        seed_all(given.seed)  # what no weights are given for is the same when the command is started again
        network = build_network(given).eval()
        check_savable(network, out / _UNFINISHED)
        log.info(
            "%s: %sMACs, %s parameters, on %s",
            *(type(network).__name__, scaled(mdc.macs(network)), f"{num_params(network):,}", device),
        )
        sample = Sample(given, network)
        found = _compressed(given, network.to(device), sample, out / JOURNAL)
        _leave(found, network, out, sample.class_names)
        title = "before finetuning, by the images to judge on"
        progress.console().print(_comparison(network, found.model, sample).rich(title))
    where = str(out)
    print(f"{where}\nload it:   mdc.load({where!r})\nexport it: mdc export {shlex.quote(where)} slim.onnx")


# --- the folder -------------------------------------------------------------------------------------------------------


def _check_free(out: Path) -> None:
    """Refuse a folder that cannot be written to, or in which something would be lost."""
    what = f"--out={str(out)!r}"
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "may not be written to" if there.is_dir() else "is a file"
        raise ConfigError(f"{what} cannot be made: {there} {reason}; give another folder")
    if (out / CONFIG).exists():
        raise ConfigError(
            f"{what} holds a finished model; give another folder, or remove its {CONFIG} to go on from what was "
            "searched"
        )
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    others = [
        name for name in sorted(names - {PLAN, POLICY, WEIGHTS, *_PICTURES}) if not name.startswith((".", JOURNAL))
    ]
    if others:
        raise ConfigError(f"{what} holds something else ({', '.join(others[:3])}); give an empty or new folder")


def _leave(found: mdc.Compressed, dense: nn.Module, out: Path, class_names: tuple[str, ...]) -> None:
    """Write it all; last the file of the slim model by which the folder is known to be finished."""
    write_text(out / PLAN, found.plan.to_json())
    write_text(out / POLICY, found.policy.to_json())
    costs = CostModel(find_anatomy(dense))
    save_figure(kept_figure(kept_by_block(found.plan, costs.num_tokens, costs.num_prefix)), out / PLAN_PICTURE)
    if found.search is not None:
        study = read_study(out / JOURNAL)
        save_figure(progress_figure(study.trials, study.header["direction"], "closeness"), out / SEARCH_PICTURE)
    mdc.save(found.model, out / _UNFINISHED, class_names=list(class_names) or None)
    for name in (WEIGHTS, CONFIG):
        (out / _UNFINISHED / name).replace(out / name)
    (out / _UNFINISHED).rmdir()


# --- the model --------------------------------------------------------------------------------------------------------


def build_network(given: Namespace) -> nn.Module:
    """The dense model, with weights of a folder, a file, or timm's own.

    Raises:
        ConfigError: there is no such model, it has no weights, or they do not fit.
        ArtifactError: the folder holds no model.
    """
    folder = Path(given.model)
    if folder.is_dir():
        _refuse(given, "a folder has its own weights", "checkpoint", "pretrained", "random_weights")
        config = read_json(folder / CONFIG)
        if isinstance(config, dict) and "architecture" in config and "format" not in config:  # timm's, not ours
            return _created(given, f"local-dir:{folder}", pretrained=True)
        _refuse(given, "mdc.save has kept the sizes of the model", "num_classes", "img_size")
        return mdc.load(folder)
    check_name("--model", given.model)
    if not (given.checkpoint or given.pretrained or given.random_weights):
        raise ConfigError(
            f"--model={given.model!r} is a name, which has no weights; give --checkpoint FILE, --pretrained for those "
            "that timm downloads, or --random-weights to see how this command works"
        )
    network = _created(given, given.model, given.pretrained)
    return network if given.checkpoint is None else _with_checkpoint(given, network)


def _refuse(given: Namespace, reason: str, *names: str) -> None:
    for name in names:
        if getattr(given, name) not in (None, False):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} beside --model={given.model!r}: {reason}; leave {option} out")


def _created(given: Namespace, name: str, pretrained: bool) -> nn.Module:
    try:  # None is what timm leaves out
        network = timm.create_model(name, pretrained, num_classes=given.num_classes, img_size=given.img_size)
    except REFUSALS as error:
        remedy = "; give its weights by --checkpoint FILE" if given.pretrained else ""
        raise ConfigError(
            f"--model={given.model!r} is refused by timm: {error or type(error).__name__}{remedy}"
        ) from error
    if pretrained:
        _note_new_head(given, getattr(network, "pretrained_cfg", {}).get("num_classes"))
    return network


def _with_checkpoint(given: Namespace, network: Any) -> nn.Module:
    """`network` with the weights of the file, and with its head, unless there is to be another one."""
    classes = classes_in(given.checkpoint, network, "--checkpoint", ConfigError)
    if given.num_classes is None and classes not in (None, network.num_classes):
        kept = f"a head for {classes} classes" if classes else "no head, so features are what is kept close"
        log.info("  --checkpoint=%r has %s", given.checkpoint, kept)
        network.reset_classifier(classes)
    load_weights(network, given.checkpoint, "--checkpoint", ConfigError)
    _note_new_head(given, classes)
    return network


def _note_new_head(given: Namespace, classes: int | None) -> None:
    """`classes` is what the weights have a head for."""
    if given.num_classes and given.num_classes != classes:
        log.warning(
            "  --num-classes=%d: the head is new and answers at random, so being close to it says little; give weights "
            "that were trained on these classes, or leave it out",
            given.num_classes,
        )


def _device(name: str) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError("--device='cuda': torch finds no GPU here; give --device cpu")
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


# --- the images -------------------------------------------------------------------------------------------------------


class Sample:
    """A seeded sample of the images, as the network is to see them: the first score, the others judge. They are read
    when they are first asked for, once, and kept.

    Attributes:
        calibration: how many of each; None: as many as by default.
        class_names: of the labels, which then are in the batches; none where they are not the network's classes.
        num_scoring: batches to score on.

    Raises:
        DataError: there are no images, or too few.
    """

    def __init__(self, given: Namespace, network: nn.Module) -> None:
        check_whole("--batch-size", given.batch_size, 1, DataError)
        check_whole("--workers", given.workers, 0, DataError)
        counts = {name: number for name in ("images", "judging") if (number := getattr(given, name)) is not None}
        self.calibration = mdc.Calibration(**counts) if counts else None
        self._images, self.class_names = _opened(given.data, network)
        order = torch.randperm(len(self._images), generator=torch.Generator().manual_seed(given.seed)).tolist()
        scored, judged = (self.calibration or mdc.Calibration()).shares(len(order), judged=True)
        if not judged:
            raise DataError(f"--data={given.data!r} holds {len(order)} images, none of them to judge on; give hundreds")
        log.info("%d of the %d images in %s", scored + judged, len(order), given.data)
        size, self._workers = given.batch_size, given.workers
        self._batches = [
            order[begin : min(begin + size, stop)]
            for start, stop in ((0, scored), (scored, scored + judged))
            for begin in range(start, stop, size)
        ]
        self.num_scoring = -(-scored // size)

    def __iter__(self) -> Iterator[Any]:
        yield from self._read

    @property
    def judging(self) -> list[Any]:
        """Batches that policies are judged on."""
        return self._read[self.num_scoring :]

    @cached_property
    def _read(self) -> list[Any]:
        loader = DataLoader(self._images, batch_sampler=self._batches, num_workers=self._workers)
        read: list[Any] = []
        with progress.bar("Reading images", len(self._batches)) as advance:
            for images, labels in loader:
                images = images.clone()  # what workers hand over lies in shared memory, of which there may be little
                read.append((images, labels) if self.class_names else images)
                advance()
        return read


def _opened(path: str, network: nn.Module) -> tuple[ImageView, tuple[str, ...]]:
    """(images under the evaluation transforms of `network`, what their labels mean if that is its classes). How they
    are prepared is noted in `network`, for whoever loads it."""
    anatomy, known = find_anatomy(network), getattr(network, "pretrained_cfg", None) or {}
    if not known.get("mean"):
        log.info("  the model does not say how images are normalised: by ImageNet's mean and deviation")
    config = {**resolve_model_data_config(network), "input_size": anatomy.input_size}
    try:
        data = ImageFolderDataModule(path, data_config=config)
        images, names = data.every_image()
    except DataError as error:
        raise DataError(f"--data: {error}") from error
    classes = int(getattr(network, "num_classes", 0)) if anatomy.classifies else 0
    network.pretrained_cfg = {**known, **data.data_config, "num_classes": classes}  # type: ignore[assignment]
    if len(names) == classes and tuple(known.get("label_names") or names) == names:
        return images, names
    if names and classes:
        log.info("  the %d folders of images are not the %d classes of the model: no top-1", len(names), classes)
    return images, ()


# --- the method -------------------------------------------------------------------------------------------------------


def _compressed(given: Namespace, network: nn.Module, sample: Sample, journal: Path) -> mdc.Compressed:
    is_searched = given.policy == "searched"
    if is_searched and journal.exists():
        log.info("going on from %s", journal)
    try:
        return mdc.compress(
            network,
            sample if is_searched else islice(sample, sample.num_scoring),
            _budget(given),
            given.policy,
            given.criterion,
            n_trials=given.trials,
            compensate=given.compensate,
            dimensions=None if given.dimensions is None else given.dimensions.split(","),
            tokens=mdc.TokenOptions(restore=True) if given.restore else None,
            calibration=sample.calibration,
            seed=given.seed,
            heal=given.heal,
            options=SearchOptions(journal=journal),
        )
    except SearchError as error:
        if not journal.exists():
            raise
        raise SearchError(f"{error} ({journal} is of an earlier search; another --out begins anew)") from error
    except torch.OutOfMemoryError as error:
        raise CompressionError(f"--batch-size={given.batch_size}: {error}; give a smaller one") from error


def _budget(given: Namespace) -> mdc.Budget | None:
    """The limits that were given; None: the default one."""
    limits = {"macs": given.budget, "params": given.params, "latency": given.latency}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    return mdc.Budget(**limits) if limits else None


def _comparison(dense: nn.Module, slim: nn.Module, sample: Sample) -> Table:
    """Dense beside slim: what they cost, and what they say of the images that policies are judged on."""
    judge = mdc.HeldOut(sample.judging, "kl", dense=dense, batch_size=len(sample.judging[0]))
    models = (dense, slim)
    first, last = (judge.judge(model) for model in models)

    def of_dense(numbers: list[int], unit: str = "") -> tuple[str, ...]:
        return tuple(f"{scaled(number)}{unit} ({number / numbers[0]:.1%})" for number in numbers)

    distance = "KL from dense, nats" if "kl" in last.facts else "squared error, share of dense variance"
    rows = {
        "MACs": of_dense([mdc.macs(model) for model in models]),
        "parameters": of_dense([num_params(model) for model in models]),
        "weights": of_dense([sum(t.nbytes for t in model.state_dict().values()) for model in models], "B"),
        distance: (f"{-first.value:.3g}", f"{-last.value:.3g}"),
    }
    if "accuracy" in last.facts:
        total = judge.num_images
        rows["top-1"] = tuple(count(round(each.facts["accuracy"] * total), total) for each in (first, last))
    return Table(("", "dense", "slim"), tuple((name, *cells) for name, cells in rows.items()))
