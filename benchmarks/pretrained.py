"""What is left of a model that was trained to the end, straight after pruning? No labels, no finetune.

    .venv/bin/python benchmarks/pretrained.py --data FOLDER --work FOLDER    # a row at a time; goes on where it stopped
    .venv/bin/python benchmarks/pretrained.py --data FOLDER --work FOLDER --method "with swaps" --at "50 %"
    .venv/bin/python benchmarks/pretrained.py --quick                        # on digits: trains the dense model first

The folder holds CIFAR-10 as ``cifar10-train.tar`` and ``cifar10-test.tar``, which timm reads, and the ViT-S/14 of timm
that was finetuned on it at 98 px, `WEIGHTS`. Every row cuts the dense model
to a share of its MACs, or by pairs of ratios that others have published: each criterion with each compensation, options
of ours, each dimension alone, in pairs and all three, uniform and searched, and Torch-Pruning. A seed draws the
calibration images and is that of the search, which judges on training images that the dense model has not seen. All
rows are tested on the same images, so that differences are paired.

Every finished row is kept in ``--work``. Leaves ``benchmarks/results/pretrained.json`` and ``.png`` and the tables in
``docs/benchmarks.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import peers
import timm
import torch
import torch.nn.functional as F
from accuracy import digits_run, spread
from matplotlib.figure import Figure
from pages import folder_of, write_pages
from safetensors.torch import load_file
from targets import Target, verdicts
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from weight_sharing import Images, labelled

import lightning_mdc as mdc
from lightning_mdc.app import build
from lightning_mdc.app.data import ImageFolderDataModule
from lightning_mdc.app.fingerprints import fingerprint_of
from lightning_mdc.budget import num_params
from lightning_mdc.errors import BudgetError
from lightning_mdc.figures.style import BLUE, GRAY, GREEN, ORANGE, PURPLE, RED, new_figure, plain, save_figure
from lightning_mdc.files import write_json
from lightning_mdc.gp_ei.study import read_study
from lightning_mdc.importance import ConditionalDependence, Criterion
from lightning_mdc.importance.criteria import Random
from lightning_mdc.policy_search.held_out import HeldOut

WEIGHTS, MODEL, SIZE = "vit_small_patch14_cifar10_98px.safetensors", "vit_small_patch14_dinov2", 98
BATCH = 64
NEIGHBOURS = 20
UNITS, ALL = ("heads", "neurons"), ("heads", "neurons", "tokens")
BUDGETS = {"50 %": 0.5, "40 %": 0.4, "60 %": 0.6}
# Shares of neurons and heads that are removed: the ladder on which SnapViT's authors show foundation models that were
# pruned and not finetuned.
PAIRS = {
    f"{100 * neurons:.0f} % / {100 * heads:.0f} %": mdc.Policy(heads=1 - heads, neurons=1 - neurons)
    for neurons, heads in ((0.25, 0.1), (0.35, 0.2), (0.45, 0.3), (0.55, 0.4), (0.65, 0.5))
}
MOST_LOST = {"60 %": 0.6, "50 %": 1.6, "40 %": 5.6}  # points, below dense
MINUTES = 20  # that score, search and compensation may take


@dataclass(frozen=True)
class Method:
    """One way to a slim model.

    Attributes:
        criterion: of `CRITERIA`, or of Torch-Pruning with `peer`.
        compensate, ridge: see `lightning_mdc.slim`.
        dimensions: what is cut.
        searched: whether the policy is; else it is uniform.
        at_random: whether the search tries random policies after its starting points, as many trials in all.
        heal: epochs of `lightning_mdc.heal`, on the images that the slim model was refitted on.
        swaps: see `lightning_mdc.make_plan`.
        tokens: what happens at a token stage.
        stages: at how many blocks tokens leave; where they do by default if not given.
        peer: Torch-Pruning chooses the units.
    """

    criterion: str = "`conditional`"
    compensate: str = "sequential"
    dimensions: tuple[str, ...] = UNITS
    searched: bool = False
    at_random: bool = False
    heal: int = 0
    swaps: int = 0
    ridge: str | None = None
    tokens: mdc.TokenOptions | None = None
    stages: int | None = None
    peer: bool = False


OURS, PLAIN, HSIC_METRIC = "`fisher`", "`conditional`", "`conditional`, metric=hsic"
WEAKER = ("`taylor`", "`hsic`", "`activation`", "`magnitude`", "`random`")  # that the default has to be ahead of
COMPENSATIONS = ("sequential", "lstsq", "none")
DEFAULT, HEALED = "searched, all three", "searched, all three; healed"
MERGED, PLAINLY = f"{DEFAULT}, attention*dependence, merged", f"{DEFAULT}, {PLAIN}"
SEARCHED = {
    DEFAULT: Method(OURS, dimensions=ALL, searched=True),
    HEALED: Method(OURS, dimensions=ALL, searched=True, heal=6),
    MERGED: Method(OURS, dimensions=ALL, searched=True, tokens=mdc.TokenOptions(None, "merge")),
    PLAINLY: Method(dimensions=ALL, searched=True),
    f"{PLAINLY}; healed": Method(dimensions=ALL, searched=True, heal=6),
    "searched, heads and neurons": Method(searched=True),
    "searched, neurons and tokens": Method(dimensions=ALL[1:], searched=True),
    "searched, neurons alone": Method(dimensions=ALL[1:2], searched=True),
}
RANDOM = "random, all three"
BY_CRITERION = {
    f"{criterion}, {compensate}": Method(criterion, compensate)
    for compensate in COMPENSATIONS
    for criterion in (OURS, PLAIN, HSIC_METRIC, *WEAKER)
}
VARIANTS = {
    "with swaps": Method(swaps=300),
    **{f"ridge={kind}": Method(ridge=kind) for kind in ("clipped", "channel", "largest")},
}
SINGLE = {f"{name} alone": Method(dimensions=(name,)) for name in ALL}
SEVERAL = {
    "neurons and tokens": Method(dimensions=ALL[1:]),
    "heads and tokens": Method(dimensions=("heads", "tokens")),
    "all three": Method(dimensions=ALL),
}
OF_TOKENS = {
    "neurons and tokens, attention*dependence": mdc.TokenOptions("attention*dependence"),
    "neurons and tokens, dependence": mdc.TokenOptions("dependence"),
    "neurons and tokens, attention*dependence, merged": mdc.TokenOptions("attention*dependence", "merge"),
    "neurons and tokens, merged": mdc.TokenOptions(reduction="merge"),
    "neurons and tokens, dropped": mdc.TokenOptions(reduction="drop"),
}
SCHEDULES = {
    f"tokens alone, {word}, at {blocks}": Method(
        dimensions=("tokens",), tokens=mdc.TokenOptions(reduction=reduction), stages=count
    )
    for word, reduction in (("fused", "fuse"), ("dropped", "drop"), ("merged", "merge"))
    for blocks, count in (("1 block", 1), ("2 blocks", 2), ("4 blocks", 4), ("every block", 10**6))
}
JOINTLY = {
    f"all three, {word}": Method(dimensions=ALL, tokens=mdc.TokenOptions(reduction=reduction))
    for word, reduction in (("dropped", "drop"), ("merged", "merge"))
}
PEERS = {f"Torch-Pruning, {name}": Method(name.lower(), "none", peer=True) for name in ("Taylor", "magnitude")}
METHODS: dict[str, Method] = {
    **BY_CRITERION,
    **VARIANTS,
    **SINGLE,
    **SEVERAL,
    **SEARCHED,
    RANDOM: Method(OURS, dimensions=ALL, searched=True, at_random=True),
    **{name: Method(dimensions=ALL[1:], tokens=tokens) for name, tokens in OF_TOKENS.items()},
    **SCHEDULES,
    **JOINTLY,
    **PEERS,
}
# What each changes beside another one.
OTHERWISE = {
    "neurons and tokens, attention*dependence": "neurons and tokens",
    "neurons and tokens, merged": "neurons and tokens",
    "neurons and tokens, attention*dependence, merged": "neurons and tokens, attention*dependence",
    MERGED: DEFAULT,
    DEFAULT: PLAINLY,
}
# On the ladder, too.
ON_PAIRS = (f"{PLAIN}, sequential", f"{PLAIN}, lstsq", "`taylor`, sequential", f"{PLAIN}, none")


def criterion_of(name: str, seed: int) -> str | Criterion:
    if name == HSIC_METRIC:
        return ConditionalDependence("hsic")
    return Random(seed) if name == "`random`" else name.strip("`")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, test_images=2000)
    parser.add_argument("--method", action="append", choices=METHODS, metavar="NAME", help="these alone; repeatable")
    parser.add_argument("--at", action="append", choices=[*BUDGETS, *PAIRS], metavar="WHERE", help="these alone")
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    results = folder_of(asked.quick)
    path = results / "pretrained.json"
    if asked.quick:
        path.unlink(missing_ok=True)
        asked.at, asked.seeds, asked.trials, asked.calibration = asked.at or ["50 %", *[*PAIRS][:1]], 1, 4, 192
        asked.work = asked.work or results / "pretrained-work"
        shutil.rmtree(asked.work, ignore_errors=True)  # rows of older code
    check_folders(parser, asked)
    if not asked.table_only:
        for found in Benchmark(asked).measured():
            write_json(path, found | {"targets": [target.facts() for target in judged(found)]})
    found = json.loads(path.read_text())
    print(text(found))
    save_figure(figure(found), results / "pretrained.png")
    if not asked.quick:
        write_pages("pretrained", found)


def add_options(parser: argparse.ArgumentParser, test_images: int) -> None:
    """What says of which slim models rows are, and where they are kept."""
    parser.add_argument("--data", type=Path, help="folder with the model and the images; --quick needs none")
    parser.add_argument("--work", type=Path, help="folder for what is finished; --quick has one")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=40, help="of each search")
    parser.add_argument("--calibration", type=int, default=512, help="images (default: %(default)s)")
    parser.add_argument("--judging", type=int, default=1000, help="images of a search (default: %(default)s)")
    parser.add_argument("--test-images", type=int, default=test_images, help="at most (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch; one per core if not given")
    parser.add_argument("--quick", action="store_true", help="digits, one budget, one seed")
    parser.add_argument("--table-only", action="store_true", help="draw and write from the JSON that is there")


def check_folders(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> None:
    if not (asked.quick or asked.table_only) and (asked.data is None or asked.work is None):
        parser.error("--data, --work: give the folder with the model and the images, and one for what is finished")


# --- measuring --------------------------------------------------------------------------------------------------------


class Benchmark:
    """The dense model, its images, and what is asked of them."""

    def __init__(self, asked: argparse.Namespace, further: Mapping[str, Any] | None = None) -> None:
        """`further`: options beside those of a slim model, of which other rows come."""
        self.asked = asked
        self.dense, self.data, self.name = from_digits() if asked.quick else from_folder(asked.data)
        self.held_out = self.data.val_dataloader().dataset if asked.quick else unseen(self.data)
        searched = {key: getattr(asked, key) for key in ("calibration", "judging", "trials")}
        self.options = {**searched, "test_images": asked.test_images, **(further or {})}
        self.work, self.searches = (
            asked.work / f"{self.name}{what}-{fingerprint_of(options, {'model': self.name})[:12]}"
            for what, options in (("", self.options), ("-searches", searched))
        )
        for folder in (self.work, self.searches):
            folder.mkdir(parents=True, exist_ok=True)
        self.test = sample(self.data.test_dataloader().dataset, asked.test_images, 0)
        _, self.said = self.looked_at(self.dense)
        self._seed, self._scores = -1, dict[str, tuple[mdc.Scores, float]]()

    @cached_property
    def judging(self) -> Images:
        return sample(self.held_out, self.asked.judging, 0)

    def looked_at(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """(features, log-probabilities) of the test images."""
        return looked_at(model, self.test[0])

    def measured(self) -> Iterator[dict[str, Any]]:
        """All numbers so far, after every row."""
        path = self.work / "rows.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        done = {place(row) for row in rows}
        wanted = list(self.wanted())
        left = [each for each in wanted if each not in done]
        about = {
            **self.options,
            "name": self.name,
            "model": f"{type(self.dense).__name__}, {len(mdc.models.find_anatomy(self.dense).blocks)} blocks",
            "macs": mdc.macs(self.dense),
            "params": num_params(self.dense),
            "threads": torch.get_num_threads(),
            "tested": len(self.test[1]),
            "dense": self.judged(self.said),
            "rows": rows,
            "searches": self.so_far(),
        }
        yield about
        for number, each in enumerate(left, 1):
            rows.append(self.row(*each))
            with path.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(f"[{len(wanted) - len(left) + number}/{len(wanted)}] {said(rows[-1])}; ", end="")
            print(f"{hours(rows, left[number:]):.1f} h left", flush=True)
            yield about | {"searches": self.so_far()}

    def so_far(self) -> dict[str, dict[str, Any]]:
        """What each search tried: KL(dense ‖ slim) on the images that judge, and seconds, trial by trial."""
        found = {}
        for path in sorted(self.searches.glob("*.jsonl")):
            done = [trial for trial in read_study(path).trials if trial.value is not None]
            found[path.stem] = {"kl": [-trial.value for trial in done], "seconds": [trial.seconds for trial in done]}
        return found

    def wanted(self) -> Iterator[tuple[str, str, int]]:
        """(method, where, seed), the most telling first."""
        places = self.asked.at or [*BUDGETS, *PAIRS]
        for seed in range(self.asked.seeds):
            for at in places:
                names = METHODS if at in BUDGETS else ON_PAIRS
                yield from ((name, at, seed) for name in self.asked.method or names if name in names)

    def row(self, name: str, at: str, seed: int) -> dict[str, Any]:
        row: dict[str, Any] = {"method": name, "at": at, "seed": seed}
        spent: dict[str, float] = {}
        begun = time.perf_counter()
        try:
            slim = self.slim(name, at, seed, spent)
        except BudgetError as error:
            return row | {"failure": str(error), "seconds": {"all": time.perf_counter() - begun}}
        row |= {"macs": mdc.macs(slim), "params": num_params(slim)}
        features, said = self.looked_at(slim)
        row |= self.judged(said)
        if at in PAIRS:
            row["knn"] = self.nearest(slim, features, seed)
        spent["all"] = time.perf_counter() - begun
        return row | {"seconds": {key: round(value, 1) for key, value in spent.items()}}

    def slim(self, name: str, at: str, seed: int, spent: dict[str, float]) -> nn.Module:
        """The model that a method makes; what it took, part by part, goes into `spent`."""
        method, batches = METHODS[name], self.calibration(seed)
        policy = PAIRS[at] if at in PAIRS else self.uniform(method, BUDGETS[at])
        if method.peer:
            return peers.torch_pruning(self.dense, policy, method.criterion, batches).eval()
        scores, spent["score"] = self.scores(method.criterion, seed, batches)
        if method.searched:
            searched = name.removesuffix("; healed")  # one search, for both
            journal = self.searches / f"{searched} at {at}, seed {seed}.jsonl"
            options = mdc.SearchOptions(journal=journal, progress=False)
            if method.at_random:
                options = replace(options, initial_points=self.asked.trials)
            result = mdc.search(
                self.dense,
                scores,
                HeldOut([self.judging], "kl", dense=self.dense),
                BUDGETS[at],
                self.asked.trials,
                seed,
                method.dimensions,
                tokens=method.tokens,
                compensate="lstsq",
                options=options,
            )
            policy, batches = result.policy, [*batches, *in_batches(self.judging)]  # as `compress` refits what it finds
            spent["search"] = sum(trial.seconds or 0 for trial in result.trials)  # also of those tried before
        begun = time.perf_counter()
        plan = mdc.make_plan(self.dense, scores, policy, method.tokens, swaps=method.swaps)
        given = {"lstsq": {"moments": scores.moments}, "sequential": {"batches": batches}}.get(method.compensate, {})
        slim = mdc.slim(self.dense, plan, method.compensate, ridge=method.ridge, **given)  # type: ignore[arg-type]
        spent["compensate"] = time.perf_counter() - begun
        if method.heal:
            begun = time.perf_counter()
            mdc.heal(slim, self.dense, batches, method.heal, seed=seed, progress=False)
            spent["heal"] = time.perf_counter() - begun
        return slim.eval()

    def uniform(self, method: Method, budget: float) -> mdc.Policy:
        depth = len(mdc.models.find_anatomy(self.dense).blocks)
        space = None if method.stages is None else mdc.Space(stages=evenly(depth, method.stages))
        return mdc.uniform_policy(self.dense, budget, method.dimensions, space, method.tokens)

    def scores(self, criterion: str, seed: int, batches: list[Images]) -> tuple[mdc.Scores, float]:
        """By criterion, and the seconds they took; all of a seed share the moments of the first."""
        if seed != self._seed:
            self._seed, self._scores = seed, {}
        if criterion not in self._scores:
            begun = time.perf_counter()
            first = next((scores for scores, _ in self._scores.values()), None)
            found = mdc.score(
                self.dense,
                batches,
                criterion_of(criterion, seed),
                moments=True if first is None else None,
                progress=False,
            )
            found = found if first is None else found.with_moments(first.moments)
            self._scores[criterion] = found, time.perf_counter() - begun
        return self._scores[criterion]

    def calibration(self, seed: int) -> list[Images]:
        return in_batches(sample(self.data.splits.calibration, self.asked.calibration, seed + 1))

    def judged(self, said: Tensor) -> dict[str, Any]:
        """Top-1 of what a model says, log-probabilities (images, classes), its KL to dense, and which test images are
        right, as bits in hex."""
        right = (said.argmax(dim=-1) == self.test[1]).numpy()
        kl = F.kl_div(said, self.said, log_target=True, reduction="batchmean").item()
        return {"top1": float(right.mean()), "kl": kl, "right": np.packbits(right).tobytes().hex()}

    def nearest(self, model: nn.Module, features: Tensor, seed: int) -> float:
        """Top-1 of the nearest neighbours of the test images' features, (images, dim), among the calibration images."""
        batches = self.calibration(seed)
        labels = torch.cat([each for _, each in batches])
        known, _ = looked_at(model, torch.cat([images for images, _ in batches]))
        alike = F.normalize(features, dim=-1) @ F.normalize(known, dim=-1).T
        near = alike.topk(min(NEIGHBOURS, len(labels)), dim=-1)
        votes = torch.zeros(len(features), self.said.shape[1])
        votes.scatter_add_(1, labels[near.indices], (near.values / 0.07).exp())
        return (votes.argmax(dim=-1) == self.test[1]).double().mean().item()


def from_folder(folder: Path) -> tuple[nn.Module, Any, str]:
    """(model, data, name) of `--data`."""
    dense = timm.create_model(MODEL, img_size=SIZE, num_classes=10)
    dense.load_state_dict({name: value.float() for name, value in load_file(folder / WEIGHTS).items()})
    data = ImageFolderDataModule(
        folder / "cifar10-train.tar",
        test_root=folder / "cifar10-test.tar",
        img_size=SIZE,
        data_config={**dense.pretrained_cfg, "crop_pct": 1.0},
        batch_size=BATCH,
        num_workers=0,
    )
    return dense.eval(), data, Path(WEIGHTS).stem


def unseen(data: ImageFolderDataModule) -> Subset[Any]:
    """Training images that the model of the folder was not trained on. Commit 499dd4f did that, which drew a tenth of
    each class by permutations of its own; today's split is another."""
    view, _ = data.every_image()
    labels, rng = np.array(view.labels), np.random.default_rng(0)
    drawn = [[rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)] for _ in ("test", "val")][1]
    return Subset(view, np.sort(np.concatenate([images[: len(images) // 10] for images in drawn])).tolist())


def from_digits() -> tuple[nn.Module, Any, str]:
    run = digits_run()
    settings = json.loads((run / "settings.json").read_text())
    return mdc.load(run / "dense").eval(), build.build_data(settings), settings["name"]


def sample(dataset: Any, most: int | None, seed: int) -> Images:
    """So many images, or all, drawn by `seed`."""
    order = np.random.default_rng(seed).permutation(len(dataset))[:most]
    return labelled(DataLoader(Subset(dataset, order.tolist()), BATCH), None)


def in_batches(shown: Images) -> list[Images]:
    images, labels = shown
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


@torch.inference_mode()
def looked_at(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """(features, log-probabilities) of images (n, ...): (n, dim), (n, classes)."""
    net: Any = model
    parts = [net.forward_head(net.forward_features(part), pre_logits=True) for part in images.split(2 * BATCH)]
    features = torch.cat(parts)
    return features, net.get_classifier()(features).log_softmax(dim=-1)


def evenly(depth: int, count: int) -> tuple[int, ...]:
    """So many blocks, as far from each other as from both ends; all of them if there are no more."""
    return tuple(range(depth)) if count >= depth else tuple(depth * (k + 1) // (count + 1) for k in range(count))


def place(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["method"], row["at"], row["seed"]


def said(row: dict[str, Any]) -> str:
    """A finished row in words."""
    what = row.get("failure") or f"{100 * row['top1']:.1f} %, KL {row['kl']:.3f}"
    return f"{row['method']} at {row['at']}, seed {row['seed']}: {what} in {row['seconds']['all']:.0f} s"


def hours(rows: list[dict[str, Any]], left: Iterable[tuple[str, str, int]]) -> float:
    """What the rows that are left will take, by those that are done of their kind, or by all."""
    spent: dict[Any, list[float]] = {}
    for row in rows:
        for kind in (kind_of(row["method"]), None):
            spent.setdefault(kind, []).append(row["seconds"]["all"])
    kinds = (kind_of(name) for name, _, _ in left)
    return sum(statistics.mean(spent.get(kind, spent[None])) for kind in kinds) / 3600


def kind_of(name: str) -> tuple[bool, str] | str:
    """Rows of a kind take about as long."""
    method = METHODS.get(name)
    return name if method is None else (method.searched, method.compensate)


# --- what it says -----------------------------------------------------------------------------------------------------


def of(found: dict[str, Any], method: str, at: str, key: str) -> np.ndarray:
    """By seed, (seeds,); empty where the budget is out of reach, or nothing was run."""
    return np.array([row[key] for row in found["rows"] if place(row)[:2] == (method, at) and key in row])


def top1(found: dict[str, Any], method: str, at: str) -> float:
    values = of(found, method, at, "top1")
    return 100 * float(values.mean()) if values.size else math.nan


def best(found: dict[str, Any], methods: Iterable[str], at: str) -> float:
    values = [value for name in methods if not math.isnan(value := top1(found, name, at))]
    return max(values, default=math.nan)


def apart(found: dict[str, Any], one: tuple[str, str], other: tuple[str, str]) -> tuple[float, float]:
    """How many points of top-1 one (method, where) is ahead of another one, and the standard error: over the same test
    images, of the seeds that both have."""
    rights = [
        {row["seed"]: right(row, found["tested"]) for row in found["rows"] if place(row)[:2] == each}
        for each in (one, other)
    ]
    seeds = [seed for seed in rights[0] if seed in rights[1]]
    if not seeds:
        return math.nan, math.nan
    by_image = np.mean([rights[0][seed] - rights[1][seed] for seed in seeds], axis=0)
    return 100 * float(by_image.mean()), 100 * float(by_image.std() / math.sqrt(len(by_image)))


def ahead(found: dict[str, Any], name: str, others: Iterable[str], at: str) -> float:
    """How many points of top-1 a method is ahead of the best of others, each over the seeds that both have; NaN if none
    has any."""
    points = [apart(found, (name, at), (other, at))[0] for other in others]
    return min((each for each in points if not math.isnan(each)), default=math.nan)


def right(row: dict[str, Any], tested: int) -> np.ndarray:
    """Which test images are, 1 or 0: (images,); all NaN where there is no model."""
    if "right" not in row:
        return np.full(tested, math.nan)
    bits = np.frombuffer(bytes.fromhex(row["right"]), np.uint8)
    return np.unpackbits(bits)[:tested].astype(float)


def judged(found: dict[str, Any]) -> Iterator[Target]:
    """What was to be reached, where something was run, in points of top-1."""
    for at in sorted({row["at"] for row in found["rows"]} & {*BUDGETS}, reverse=True):
        ours = best(found, SEARCHED, at)
        lost = 100 * found["dense"]["top1"] - ours
        yield Target(f"{at}: dense − searched (points)", lost, "<=", MOST_LOST[at])
        yield Target(f"{at}: searched − best of Torch-Pruning (points)", ours - best(found, PEERS, at), ">=", 0)
        joint = ahead(found, DEFAULT, SINGLE, at)
        yield Target(f"{at}: all three − best single dimension (points)", joint, ">=", 0)
        for compensate in COMPENSATIONS:
            names = [name for name, method in BY_CRITERION.items() if method.compensate == compensate]
            if best(found, names, at) > 50:
                behind = 0.0 - ahead(found, f"{OURS}, {compensate}", names, at)
                yield Target(f"{at}, {compensate}: best criterion − the default (points)", behind, "<=", 0.3)
        if at != "60 %":
            weaker = [f"{name}, sequential" for name in WEAKER]
            points = ahead(found, f"{OURS}, sequential", weaker, at)
            yield Target(f"{at}: default − best of the other criteria (points)", points, ">=", 1)
    seconds = [row["seconds"] for row in found["rows"] if row["method"] == DEFAULT and "search" in row["seconds"]]
    took = [sum(each[part] for part in ("score", "search", "compensate")) / 60 for each in seconds]
    yield Target("minutes to compress, at most", max(took, default=math.nan), "<=", MINUTES)


def text(found: dict[str, Any]) -> str:
    """Tables of top-1 and KL by method, and of top-1 and nearest neighbours on the ladder; targets; how."""
    dense = found["dense"]
    tables = [*table(found, "share of the MACs", sorted(BUDGETS, reverse=True), "kl", "{:.3f}", 1)]
    if any(row["at"] in PAIRS for row in found["rows"]):
        tables += ["", *table(found, "share of neurons / heads removed", [*PAIRS], "knn", "{:.1f}", 100)]
    seeds = len({row["seed"] for row in found["rows"]})
    over = "One seed"
    if seeds > 1:
        over = f"±: over seeds of calibration and search, up to {seeds}; differences are of those that both rows have"
    error = 100 * math.sqrt(dense["top1"] * (1 - dense["top1"]) / found["tested"])
    return "\n".join(
        [
            *tables,
            "",
            "Test top-1 in %, and beside it KL(dense ‖ slim), or top-1 by the features' nearest neighbours among the "
            f"calibration images; nothing finetuned, no labels. {over}. {found['name']}: {found['model']}, "
            f"{found['macs'] / 1e6:.0f} MMACs, {found['params'] / 1e6:.1f} M parameters, dense "
            f"{100 * dense['top1']:.1f} %. {found['tested']} test images (one standard error of a single model: "
            f"{error:.1f} points), {found['calibration']} calibration images, searches of {found['trials']} trials on "
            f"{found['judging']} images that the dense model was not trained on. Rows that name no criterion: {PLAIN}, "
            f"but {OURS}, the default, where they are *searched* or *random*; no compensation: `sequential`; no "
            "dimensions: heads and neurons; no token score: attention, and fused; neither *searched* nor *random*: "
            "uniform. *Searched* is refitted on the images that judged it, too, as `mdc.compress` does, and *healed* "
            f"in {SEARCHED[HEALED].heal} epochs of them all, as it does with `heal={SEARCHED[HEALED].heal}`; *random* "
            "has as many trials and the same starting points, then random policies. s: seconds to score, search, "
            "compensate and heal, on "
            f"{found['threads']} thread(s). An empty cell was not run. Measured by `python benchmarks/pretrained.py "
            "--data FOLDER --work FOLDER`; a row alone by `--method NAME`.",
            "",
            *paired(found),
            *searched(found),
            verdicts(judged(found)),
        ]
    )


def table(found: dict[str, Any], head: str, places: list[str], beside: str, form: str, scale: float) -> list[str]:
    """A row per method: top-1 and what stands `beside` it; and how long it took."""
    places = [at for at in places if any(row["at"] == at for row in found["rows"])]
    lines = [f"| {head} | {' | '.join(places)} | s |", f"|---|{'---:|' * (len(places) + 1)}"]
    for name in METHODS:
        rows = [row for row in found["rows"] if row["method"] == name and row["at"] in places]
        if not rows:
            continue
        cells = []
        for at in places:
            values, others = of(found, name, at, "top1"), of(found, name, at, beside)
            nothing = "out of reach" if any(row["at"] == at for row in rows) else ""
            cells.append(f"{spread(100 * values)} / {form.format(scale * others.mean())}" if values.size else nothing)
        parts = [sum(value for part, value in row["seconds"].items() if part != "all") for row in rows]
        lines.append(f"| {name} | {' | '.join(cells)} | {statistics.mean(parts):.0f} |")
    return lines


def searched(found: dict[str, Any]) -> list[str]:
    """How far each search of the default, and each random one, had come after so many trials (uniform, three forecasts,
    ...), and what a trial took: lines of a list."""
    lines = []
    for name, each in found["searches"].items():
        values = each["kl"]
        if not name.startswith((DEFAULT, RANDOM)) or not values:
            continue
        best_of = {count: min(values[:count]) for count in (1, 4, 10, 20, 30, 40) if count <= len(values)}
        steps = ", ".join(f"{value:.4f} after {count}" for count, value in best_of.items())
        seconds = statistics.median(each["seconds"])
        lines.append(f"- {name}: best KL on the judging images {steps} trials; {seconds:.1f} s a trial")
    return [*lines, ""] if lines else []


def paired(found: dict[str, Any]) -> list[str]:
    """What options change at the same policy or in a search, over the same images: lines of a list."""
    plainly = f"{PLAIN}, sequential"
    lines = []
    options = (f"{OURS}, sequential", f"{HSIC_METRIC}, sequential", f"{PLAIN}, lstsq", *VARIANTS)
    for name, other in {**dict.fromkeys(options, plainly), **OTHERWISE}.items():
        changes = []
        for at in sorted(BUDGETS, reverse=True):
            points, error = apart(found, (name, at), (other, at))
            if not math.isnan(points):
                changes.append(f"{points:+.1f} ± {error:.1f} at {at}")
        if changes:
            lines.append(f"- {name} − {other} (points, paired; ± one standard error): {', '.join(changes)}")
    return [*lines, ""] if lines else []


def figure(found: dict[str, Any]) -> Figure:
    """Top-1 by share of the MACs."""
    shown = {
        DEFAULT: RED,
        f"{OURS}, sequential": BLUE,
        f"{PLAIN}, lstsq": ORANGE,
        "`taylor`, lstsq": GREEN,
        "`hsic`, lstsq": PURPLE,
        f"{PLAIN}, none": GRAY,
    }
    reference = ("dense", 100 * found["dense"]["top1"])
    return curves(found, shown, reference, "test top-1 straight after pruning, %")


def curves(found: dict[str, Any], shown: dict[str, str], reference: tuple[str, float], what: str) -> Figure:
    """Top-1 of each method shown, in its colour, by share of the MACs; a line for a reference, if that was run."""
    picture, (panel,) = new_figure(6.4, 3.6)
    for name, colour in shown.items():
        points = [(BUDGETS[at], value) for at in sorted(BUDGETS) if not math.isnan(value := top1(found, name, at))]
        if points:
            panel.plot(*zip(*points, strict=True), "o-", color=colour, label=name.replace("`", ""))
    name, value = reference
    if not math.isnan(value):
        panel.axhline(value, color=GRAY, lw=0.8, ls="--", label=name)
    panel.invert_xaxis()
    panel.set_xlabel("MACs, share of dense")
    plain(panel, what)
    panel.legend(frameon=False, fontsize=8)
    return picture


if __name__ == "__main__":
    main()
