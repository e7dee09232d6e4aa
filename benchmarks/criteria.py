"""Which criterion, which token score, which compensation? Straight after pruning, also of those that lost.

    .venv/bin/python benchmarks/criteria.py --run runs/cifar10/… --run runs/cifar10/…
    .venv/bin/python benchmarks/criteria.py --quick                          # on digits: trains the dense model first

Each criterion ranks the heads and neurons of a dense model of ``train.py`` on a sample of training images; then a
quarter of the neurons is kept, half of the heads, or a quarter of the neurons and three quarters of the heads, in every
block, without and with ``compensate="lstsq"``. What is shown is top-1 on held-out training images, no finetune. Names
of what is in the package are set as ``code``; most of the others lost. Another table compares token scores at half of
the tokens per stage, another one ways to compensate.

Leaves ``benchmarks/results/criteria.json`` and ``.png`` and the tables in ``docs/benchmarks.md``; ``--quick`` only
prints them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from accuracy import digits_run, spread
from matplotlib.figure import Figure
from pages import publish
from targets import Target, verdicts
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from weight_sharing import Images, labelled, values

import lightning_mdc as mdc
from lightning_mdc.app import build
from lightning_mdc.figures.style import BLUE, GRAY, new_figure, plain
from lightning_mdc.importance import hsic
from lightning_mdc.importance.criteria import Criterion, Random
from lightning_mdc.importance.ridge import RIDGE
from lightning_mdc.models import Units, find_anatomy

BATCH = 128
UNITS = ("heads", "neurons")
CUTS = {
    "1/4 of the neurons": mdc.Policy(neurons=0.25),
    "1/2 of the heads": mdc.Policy(heads=0.5),
    "both, 1/4 and 3/4": mdc.Policy(heads=0.75, neurons=0.25),
}
HOWS = ("none", "lstsq")
HALF_OF_THE_TOKENS = mdc.Policy(tokens=0.5)
OURS = "`conditional`"
# What it has to be ahead of.
RIVALS = ("`taylor`", "activation × outgoing weight", "`magnitude`", "`activation`", "`hsic`, as in the paper")
HSIC_ALONE: dict[str, Any] = {"hsic_weight": 1.0, "activation_weight": 0.0, "redundancy_weight": 0.0}


# --- what a criterion may look at -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """The heads or neurons of one block, and all they did on the calibration images.

    Attributes:
        site: where they are.
        z: activations of their channels, (images, tokens, channels).
        prediction: of the dense model, (images, classes).
        labels: one-hot, (images, classes).
    """

    site: Units
    z: Tensor
    prediction: Tensor
    labels: Tensor

    @property
    def units(self) -> int:
        return self.site.count

    @property
    def weight(self) -> Tensor:
        """Of the layer that reads them, (out, channels), float64."""
        return self.site.reader.weight.detach().double()

    @property
    def rows(self) -> Tensor:
        """What the channels are at every token of every image, (images * tokens, channels), float64."""
        return self.z.flatten(0, 1).double()

    def covariance(self) -> Tensor:
        return self.rows.T.cov(correction=0)

    def of_units(self, values: Tensor) -> Tensor:
        """Sums of what is given by channel, (channels,) -> (units,)."""
        return values.view(self.units, -1).sum(dim=1)

    def contributed_variance(self) -> Tensor:
        """Of each unit alone in the output, channels taken for uncorrelated: (units,)."""
        return self.of_units(self.covariance().diagonal() * self.weight.square().sum(dim=0))


def layers_of(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, list[Layer]]:
    """The layers of every block, by dimension."""
    seen: dict[tuple[str, int], list[Tensor]] = {}

    def look(place: tuple[str, int], module: nn.Module, args: tuple[Tensor]) -> None:
        seen.setdefault(place, []).append(args[0])

    blocks = find_anatomy(model).blocks
    places = {(name, index): block.units[name] for name in UNITS for index, block in enumerate(blocks)}
    hooks = [site.reader.register_forward_pre_hook(partial(look, place)) for place, site in places.items()]
    with torch.no_grad():
        prediction = torch.cat([model(part).softmax(dim=-1) for part in images.split(BATCH)])
    for hook in hooks:
        hook.remove()
    one_hot = F.one_hot(labels, prediction.shape[1]).float()
    found: dict[str, list[Layer]] = {name: [] for name in UNITS}
    for (name, index), site in places.items():
        found[name].append(Layer(site, torch.cat(seen[name, index]), prediction, one_hot))
    return found


# --- criteria that were tried -----------------------------------------------------------------------------------------


def activation_times_weight(layer: Layer) -> Tensor:
    """Mean magnitude times the norm of the outgoing weights."""
    return layer.of_units(layer.z.abs().mean(dim=(0, 1)).double() * layer.weight.norm(dim=0))


def features(layer: Layer, channels: Tensor) -> Tensor:
    """What each unit is for one image, (units, images, tokens * channels of a unit), of (images, tokens, channels)."""
    return channels.unflatten(-1, (layer.units, -1)).permute(2, 0, 1, 3).flatten(2)


def over_batches(
    layer: Layer, target: Tensor, measure: Callable[[Tensor, Tensor], Tensor], scale: Tensor | float = 1.0
) -> Tensor:
    """Sum of `measure` (of features and targets) over batches as large as those that are scored."""
    parts = zip(layer.z.split(BATCH), target.split(BATCH), strict=True)
    return torch.stack([measure(features(layer, z * scale), of) for z, of in parts]).sum(dim=0)


def paper_kernel(x: Tensor, y: Tensor) -> Tensor:
    """`lightning_mdc.hsic` of all units at once: (units, n, features), (n, classes) -> (units,)."""
    weights = centred(y @ y.T) / (len(y) - 1) ** 2
    return (hsic.gaussian_gram(x) * weights).sum(dim=(1, 2))


def centred(gram: Tensor) -> Tensor:
    """H K H of each Gram matrix (..., n, n)."""
    rows = gram - gram.mean(dim=-1, keepdim=True)
    return rows - rows.mean(dim=-2, keepdim=True)


def median_cka(x: Tensor, y: Tensor) -> Tensor:
    """Normalised HSIC with a Gaussian as wide as the median distance (Kornblith et al., ICML 2019)."""
    distances = torch.cdist(x, x).square()
    width = distances.flatten(1).median(dim=1).values.clamp_min(1e-12)
    gram, target = centred(torch.exp(-distances / width[:, None, None])), centred(y @ y.T)
    return (gram * target).sum(dim=(1, 2)) / (gram.flatten(1).norm(dim=1) * target.norm())


def hsic_with_labels(layer: Layer) -> Tensor:
    return over_batches(layer, layer.labels, paper_kernel)


def hsic_of_contribution(layer: Layer) -> Tensor:
    """Every channel times the norm of its outgoing weights."""
    return over_batches(layer, layer.prediction, paper_kernel, layer.weight.norm(dim=0).float())


def cka(layer: Layer) -> Tensor:
    return over_batches(layer, layer.prediction, median_cka)


def cka_times_contribution(layer: Layer) -> Tensor:
    return cka(layer) * layer.contributed_variance().float()


def forward_selection(layer: Layer) -> Tensor:
    """Units that explain most of the layer's output, given those chosen before."""
    return pivoted(layer, layer.weight @ layer.covariance())


def pivoted(layer: Layer, explains: Tensor) -> Tensor:
    """Block-pivoted Cholesky. explains: covariances of what is to be explained with the channels, (any, channels)."""
    residual = layer.covariance()
    width = len(residual) // layer.units
    noise = RIDGE * residual.diagonal().mean() * torch.eye(width, dtype=residual.dtype)
    scores = residual.new_zeros(layer.units)
    for place in range(layer.units):
        own = residual.view(layer.units, width, layer.units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1) + noise
        of_unit = explains.view(-1, layer.units, width).permute(1, 2, 0)
        gain = torch.linalg.solve_triangular(torch.linalg.cholesky(own), of_unit, upper=False).square().sum(dim=(1, 2))
        best = int(gain.masked_fill(scores > 0, -1).argmax())
        scores[best] = layer.units - place
        channels = slice(best * width, (best + 1) * width)
        step = torch.linalg.solve(own[best], residual[channels])
        explains, residual = explains - explains[:, channels] @ step, residual - residual[:, channels] @ step
    return scores


def forward_selection_for_prediction(layer: Layer) -> Tensor:
    """Not of the layer's output but of the model's prediction, by the class token and the mean patch."""
    prediction = (layer.prediction - layer.prediction.mean(dim=0)).double()
    means = (layer.z[:, 0].double(), layer.z[:, 1:].double().mean(dim=1))
    return pivoted(layer, torch.cat([prediction.T @ (part - part.mean(dim=0)) / len(part) for part in means]))


def removal_without_refit(layer: Layer) -> Tensor:
    """Units leave one after another, each time the one that adds least to the output's error; no other is refitted."""
    second = layer.rows.T @ layer.rows / len(layer.rows)
    by_channel = (layer.weight.T @ layer.weight) * second
    error = by_channel.unflatten(0, (layer.units, -1)).unflatten(2, (layer.units, -1)).sum(dim=(1, 3))
    scores, cross = torch.full((layer.units,), torch.inf).double(), torch.zeros(layer.units).double()
    for place in range(layer.units):
        grows = (error.diagonal() + 2 * cross).masked_fill(scores.isfinite(), torch.inf)
        gone = int(grows.argmin())
        scores[gone] = place
        cross = cross + error[:, gone]
    return scores


Tried: TypeAlias = str | Criterion | Callable[[Layer], Tensor]


def criteria(seed: int) -> dict[str, Tried]:
    return {
        OURS: "conditional",
        "`fisher`": "fisher",
        "forward selection": forward_selection,
        "forward selection for the prediction": forward_selection_for_prediction,
        "removal without refit": removal_without_refit,
        "`taylor`": "taylor",
        "activation × outgoing weight": activation_times_weight,
        "`magnitude`": "magnitude",
        "`activation`": "activation",
        "`hsic`, as in the paper": "hsic",
        "`hsic`, half and half": mdc.HSIC(hsic_weight=0.5, activation_weight=0.5),
        "`hsic`, dependence alone": mdc.HSIC(**HSIC_ALONE),
        "dependence on labels": hsic_with_labels,
        "dependence of the contribution": hsic_of_contribution,
        "CKA, median bandwidth": cka,
        "CKA, median bandwidth, × contributed variance": cka_times_contribution,
        "`random`": Random(seed),
    }


# --- measuring --------------------------------------------------------------------------------------------------------


class Case:
    """One dense model, a calibration sample, and the held-out images."""

    def __init__(self, run: Path, seed: int, arguments: argparse.Namespace) -> None:
        settings = json.loads((run / "settings.json").read_text())
        if "max_val_images" in settings["data"]:
            settings["data"]["max_val_images"] = arguments.held_out
        data = build.build_data(settings)
        self.seed, self.dense = seed, mdc.load(run / "dense").eval()
        self.held_out = labelled(data.val_dataloader(), arguments.held_out)
        order = np.random.default_rng(seed).permutation(len(data.splits.calibration))  # type: ignore[arg-type]
        sample = Subset(data.splits.calibration, order[: arguments.calibration].tolist())
        images, labels = labelled(DataLoader(sample, BATCH), None)
        self.batches: list[Images] = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
        self.layers = layers_of(self.dense, images, labels)
        self.moments = mdc.score(self.dense, self.batches, "magnitude", moments=True, progress=False).moments

    def top1(self, model: nn.Module) -> float:
        return 100 * values(model, self.held_out)["top1"]

    def score(self, tried: Tried) -> mdc.Scores:
        if isinstance(tried, str | Criterion):
            return mdc.score(self.dense, self.batches, tried, progress=False)
        return mdc.Scores(
            heads=[tried(layer) for layer in self.layers["heads"]],
            neurons=[tried(layer) for layer in self.layers["neurons"]],
            tokens=[],
            stages=(),
            criterion=tried.__name__,
            images=sum(len(labels) for _, labels in self.batches),
        )

    def slim(
        self,
        scores: mdc.Scores,
        policy: mdc.Policy,
        compensate: str = "none",
        moments: mdc.Moments | None = None,
        tokens: mdc.TokenOptions | None = None,
    ) -> float:
        """Top-1 of the slim model."""
        plan = mdc.make_plan(self.dense, scores, policy, tokens)
        return self.top1(mdc.slim(self.dense, plan, compensate, moments=moments))

    def by_criterion(self) -> dict[str, dict[str, dict[str, float]]]:
        """Top-1 by criterion, compensation and cut."""
        found = {}
        for name, tried in tqdm(criteria(self.seed).items(), "Criteria", leave=False):
            scores = self.score(tried)
            found[name] = {
                how: {cut: self.slim(scores, policy, how, of) for cut, policy in CUTS.items()}
                for how, of in zip(HOWS, (None, self.moments), strict=True)
            }
        return found

    def by_compensation(self) -> dict[str, dict[str, float]]:
        """Top-1 by compensation and cut; our criterion."""
        scores = self.score("conditional")
        ways = {"`none`": ("none", None), "`lstsq`": ("lstsq", self.moments)}
        return {
            name: {cut: self.slim(scores, policy, how, of) for cut, policy in CUTS.items()}
            for name, (how, of) in tqdm(ways.items(), "Compensation", leave=False)
        }

    def by_token_score(self) -> dict[str, float]:
        """Top-1 by what ranks tokens; dropped ones are fused but in the last row."""
        normalised, alone = (self.score(tried) for tried in ("hsic", mdc.HSIC(**HSIC_ALONE)))
        ways = {
            "`attention`": (alone, mdc.TokenOptions("attention")),
            "`dependence`, as in the paper": (normalised, mdc.TokenOptions("dependence")),
            "`dependence`, not normalised": (alone, mdc.TokenOptions("dependence")),
            "`attention*dependence`, as in the paper": (normalised, mdc.TokenOptions("attention*dependence")),
            "`attention*dependence`, not normalised": (alone, mdc.TokenOptions("attention*dependence")),
            "`attention`, dropped tokens not fused": (alone, mdc.TokenOptions(reduction="drop")),
        }
        return {
            name: self.slim(scores, HALF_OF_THE_TOKENS, tokens=tokens)
            for name, (scores, tokens) in tqdm(ways.items(), "Token scores", leave=False)
        }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    models = []
    with tqdm(total=len(arguments.run) * arguments.seeds, desc="Models and seeds", unit="case") as progress:
        for run in arguments.run:
            tables: dict[str, list[Any]] = {"criteria": [], "compensation": [], "tokens": []}
            for seed in range(arguments.seeds):
                case = Case(run, seed, arguments)
                tables["criteria"].append(case.by_criterion())
                tables["compensation"].append(case.by_compensation())
                tables["tokens"].append(case.by_token_score())
                progress.update()
            anatomy = find_anatomy(case.dense)
            name = f"{json.loads((run / 'settings.json').read_text())['name']}, {anatomy.depth} × {anatomy.dim}"
            facts = {"name": name, "dense": case.top1(case.dense), "images": len(case.held_out[1])}
            models.append({**facts, **tables})
    result = {"models": models, "calibration": arguments.calibration, "seeds": arguments.seeds}
    return {**result, "targets": [target.facts() for target in targets(result)]}


# --- what it says -----------------------------------------------------------------------------------------------------


def means(model: dict[str, Any], criterion: str, how: str) -> list[float]:
    """Top-1 over the three cuts, of each seed."""
    return [statistics.mean(found[criterion][how].values()) for found in model["criteria"]]


def targets(result: dict[str, Any]) -> list[Target]:
    found = []
    for model in result["models"]:
        for how in HOWS:
            best = max(statistics.mean(means(model, name, how)) for name in RIVALS)
            ahead = statistics.mean(means(model, OURS, how)) - best
            what = "conditional − best of Taylor, magnitudes and the paper's (points)"
            found.append(Target(f"{model['name']}, compensate={how}: {what}", ahead, ">=", 0))
    return found


def ranked(result: dict[str, Any]) -> list[str]:
    """Criteria, the best first."""
    models = result["models"]

    def mean(name: str) -> float:
        return statistics.mean(value for model in models for how in HOWS for value in means(model, name, how))

    return sorted(models[0]["criteria"][0], key=mean, reverse=True)


def grid(head: str, columns: list[str], rows: dict[str, list[str]]) -> list[str]:
    """A markdown table."""
    lines = [f"| {head} | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    return [*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())]


def text(result: dict[str, Any]) -> str:
    """The tables, targets, and how it was measured."""
    models = result["models"]
    ways = [(model, how) for model in models for how in HOWS]
    cuts = [(model, cut) for model in models for cut in CUTS]
    by_criterion = {name: [spread(means(model, name, how)) for model, how in ways] for name in ranked(result)}
    by_compensation = {
        name: [spread([found[name][cut] for found in model["compensation"]]) for model, cut in cuts]
        for name in models[0]["compensation"][0]
    }
    by_token_score = {
        name: [spread([found[name] for found in model["tokens"]]) for model in models]
        for name in models[0]["tokens"][0]
    }
    dense = ", ".join(f"{model['name']}: {model['dense']:.1f} % on {model['images']} images" for model in models)
    return "\n".join(
        [
            *grid("criterion", [f"{model['name']}, {how}" for model, how in ways], by_criterion),
            "",
            *grid("compensation", [f"{model['name']}, {cut}" for model, cut in cuts], by_compensation),
            "",
            *grid("token score", [model["name"] for model in models], by_token_score),
            "",
            verdicts(targets(result)),
            "",
            "Top-1 in % on held-out training images, nothing finetuned: mean over "
            f"{result['seeds']} calibration samples of {result['calibration']} images ± standard deviation. Criteria: "
            f"mean over three cuts ({'; '.join(CUTS)}), without and with least squares. Compensation: of units that "
            "`conditional` ranks last. Token scores: half of the tokens per token stage. Names set as code are in the "
            f"package. Dense: {dense}. Measured by `python benchmarks/criteria.py --run RUN --run RUN`.",
        ]
    )


def figure(result: dict[str, Any]) -> Figure:
    """Top-1 by criterion, without and with least squares."""
    models = result["models"]
    names = ranked(result)[::-1]
    picture, panels = new_figure(2.6 + 2.6 * len(models), 0.24 * len(names) + 0.9, columns=len(models))
    for panel, model in zip(panels, models, strict=True):
        for how, colour in zip(HOWS, (GRAY, BLUE), strict=True):
            top1 = [statistics.mean(means(model, name, how)) for name in names]
            panel.plot(top1, [name.replace("`", "") for name in names], "o", color=colour, label=how)
        panel.axvline(model["dense"], color=GRAY, lw=0.8, ls="--")
        plain(panel, f"{model['name']}: held-out top-1, %")
        panel.tick_params(labelleft=panel is panels[0])
    panels[0].legend(frameon=False, fontsize=8, loc="upper left")
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, action="append", help="a run of train.py with a dense model; repeatable")
    parser.add_argument("--seeds", type=int, help="calibration samples (default: 3; quick: 1)")
    parser.add_argument("--calibration", type=int, default=512, help="images (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=1500, help="images to judge on at most (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch; one per core if not given")
    parser.add_argument("--quick", action="store_true", help="digits, one sample; pages stay as they are")
    parser.add_argument("--table-only", action="store_true", help="draw and write from the JSON that is there")
    arguments = parser.parse_args()
    arguments.seeds = arguments.seeds or (1 if arguments.quick else 3)
    if not arguments.run and not arguments.table_only:
        if not arguments.quick:
            parser.error("--run: give the folder of a run of train.py with a dense model (or --quick)")
        arguments.run = [digits_run()]
    publish("criteria", arguments, partial(measure, arguments), figure, text)


if __name__ == "__main__":
    main()
