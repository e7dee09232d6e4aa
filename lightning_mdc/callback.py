"""`MultiDimPruneCallback`: when to observe, decide and apply, inside anybody's ``Trainer.fit``."""

from __future__ import annotations

import math
import os
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_mdc.artifact import check_savable, save
from lightning_mdc.budget import Budget, CostModel, as_budget, macs, policy_macs
from lightning_mdc.budget.uniform import uniform_policy
from lightning_mdc.errors import (
    CalibrationError,
    CallbackError,
    MdcError,
    PlanError,
    PolicyError,
    check_one_of,
    check_whole,
)
from lightning_mdc.importance import Criterion, Scorer, Scores, as_criterion, as_prediction
from lightning_mdc.importance.calibration import CalibrationBatches, is_map_style, num_images
from lightning_mdc.models import Sites, evaluating, find_model, find_sites, unwrap
from lightning_mdc.policy import DIMENSIONS, TOKEN_SCORES, Plan, Policy, check_dimensions
from lightning_mdc.progress import bar
from lightning_mdc.randomness import isolated_rng, rng_state, seed_all, set_rng_state
from lightning_mdc.surgery import apply_masks, is_masked, plan_of, remove_masks, slim
from lightning_mdc.surgery.plan import make_plan

_STATE_FORMAT = 1


class MultiDimPruneCallback(Callback):
    """Prunes the vision transformer in a LightningModule while it trains, and hands it over physically smaller.

    At the start of fit it scores heads, neurons and token positions on a seeded sample of the training data, decides
    what stays under the budget, and puts reversible masks on; they are on in training, validation, test and predict,
    and off when the Trainer is done. `slim_model` then gives the small network. The plan lives in the checkpoint:
    a resumed run goes on with it, without scoring again. The module's own weights and keys never change shape.

    Args:
        budget: fraction of the dense MACs to keep, or a `Budget`. Not looked at when `policy` is a `Policy`.
        policy: ``"uniform"``, a `Policy`, or the path of a policy's JSON file.
        criterion: name of a criterion or an instance; see `lightning_mdc.score`.
        calibration_batches: how many batches (of the training loader's size) to score on, over all ranks together.
        calibration_images: how many images instead; whole batches of them.
        schedule: ``"one-shot"`` masks all at `start`; ``"cubic"`` goes there gradually until `end`, fast first
            (Zhu & Gupta 2017), always from the same scores, never compounding.
        start, end: when, in `unit`; `end` defaults to two thirds of the training.
        unit: ``"epoch"`` or ``"step"`` (optimizer steps).
        dimensions, min_heads, min_neurons, round_to, stages: see `uniform_policy`.
        token_score, fuse_tokens: see `make_plan`.
        model: attribute path of the vision transformer in the LightningModule; None finds it if there is just one.
        prediction: turns what the model returns into probabilities (images, classes); None means softmax.
        seed: of the calibration sample.
        restore_rng: also keep random states in the checkpoint, so that a run with ``shuffle=True`` resumed from the end
            of an epoch goes on exactly as the uninterrupted one (single process).
        save_to: folder to save the slim model to when fit ends.

    Override `calibration_step` if batches are not ``(images, ...)``, ``images``, or the module is not called on images.

    Raises:
        MdcError: settings that contradict each other; one of its subclasses.
    """

    def __init__(
        self,
        budget: float | Budget = 0.6,
        policy: str | Path | Policy = "uniform",
        criterion: str | Criterion = "conditional",
        *,
        calibration_batches: int = 4,
        calibration_images: int | None = None,
        schedule: Literal["one-shot", "cubic"] = "one-shot",
        start: int = 0,
        end: int | None = None,
        unit: Literal["epoch", "step"] = "epoch",
        dimensions: Iterable[str] | None = None,
        min_heads: int = 1,
        min_neurons: int = 1,
        round_to: int | None = None,
        stages: Sequence[int] | None = None,
        token_score: str = "attention",
        fuse_tokens: bool = True,
        model: str | None = None,
        prediction: Callable[[Any], Tensor] | None = None,
        seed: int = 0,
        restore_rng: bool = False,
        save_to: str | Path | None = None,
    ) -> None:
        super().__init__()
        _check_types(fuse_tokens=fuse_tokens, restore_rng=restore_rng, model=model, save_to=save_to)
        _check_schedule(schedule, start, end, unit)
        check_one_of("token_score", token_score, TOKEN_SCORES, CallbackError)
        check_whole("calibration_batches", calibration_batches, 1, CallbackError)
        check_whole("calibration_images", calibration_images, 1, CallbackError, or_none="whole batches")
        check_whole("seed", seed, 0, CallbackError)
        if prediction is not None and not callable(prediction):
            raise CallbackError(f"prediction={prediction!r:.80}: expected a function of what the model returns")
        self.budget = as_budget(budget)
        self.criterion = as_criterion(criterion)
        self.wanted_policy = _policy(policy)
        self.uniform_options: dict[str, Any] = {
            "dimensions": None if dimensions is None else check_dimensions(dimensions),
            "min_heads": min_heads,
            "min_neurons": min_neurons,
            "round_to": round_to,
            "stages": None if stages is None else tuple(stages),
        }
        self.calibration_batches, self.calibration_images = calibration_batches, calibration_images
        self.schedule, self.start, self.end, self.unit = schedule, start, end, unit
        self.token_score, self.fuse_tokens = token_score, fuse_tokens
        self.model_path, self.prediction, self.seed = model, prediction, seed
        self.restore_rng, self.save_to = restore_rng, None if save_to is None else Path(save_to)
        # Spawned workers cannot give attributes back; rank 0 leaves the outcome in this file.
        self._handover = Path(tempfile.gettempdir()) / f"lightning_mdc-{uuid.uuid4().hex}.pt"
        weakref.finalize(self, _remove, self._handover, os.getpid())
        self._restores_rng_now = False
        self.reset()

    def reset(self) -> None:
        """Forget scores, policy and plan: the next fit starts over."""
        self._scores: Scores | None = None
        self._plan: Plan | None = None
        self._asked: Policy | None = None  # see `_asked_policy`
        self._progress = 0.0
        self._scorer: Scorer | None = None  # while an iterable dataset is watched
        self._steps_to_watch: int | None = None
        self._handover.unlink(missing_ok=True)

    # --- what it found --------------------------------------------------------------------------------------------

    @property
    def scores(self) -> Scores | None:
        """The scores the plan rests on; None before fitting started."""
        self._collect_handover()
        return self._scores

    @property
    def policy(self) -> Policy | None:
        """The realised keep ratios of the final plan; None before fitting started."""
        return None if self.plan is None else self.plan.policy

    @property
    def plan(self) -> Plan | None:
        """What is kept when the schedule is through; None before fitting started."""
        self._collect_handover()
        return self._plan

    def slim_model(self, pl_module: LightningModule, in_place: bool = False) -> nn.Module:
        """The physically slim vision transformer of `pl_module`, a plain module.

        With ``in_place=True`` it also takes the dense one's place in `pl_module` (uncompiled), to go on training. There
        is no compensation here (see `slim`): what stays has been trained without what left.

        Raises:
            CallbackError: there is no plan yet, or nothing to replace.
        """
        if self.plan is None:
            raise CallbackError(
                "slim_model: there is no plan yet; call trainer.fit with this callback first (and let it reach start)"
            )
        path, model = find_model(pl_module, self.model_path)
        if self._is_delivered(model):
            return model
        result = slim(model, self.plan)
        if in_place:
            if not path:
                raise CallbackError(
                    "in_place=True: the LightningModule is itself the vision transformer, so there is no attribute to "
                    "replace; use the returned model"
                )
            for parent in list(pl_module.modules()):  # it may have several names
                for name, child in list(parent._modules.items()):
                    if child is not None and unwrap(child) is model:
                        setattr(parent, name, result)
        return result

    def calibration_step(self, pl_module: LightningModule, batch: Any) -> Any:
        """What the model says about a batch: by default ``pl_module(images)``, so that a module's own normalisation
        counts. Override for other batches, e.g. ``return pl_module(batch["pixel_values"])``.

        Raises:
            CalibrationError: the batch is neither ``images`` nor ``(images, ...)``.
        """
        images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(images, Tensor):
            raise CalibrationError(
                f"a training batch is a {type(batch).__name__}, not images or (images, ...); subclass "
                "MultiDimPruneCallback and override calibration_step(pl_module, batch)"
            )
        return pl_module(images)

    # --- hooks ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise CallbackError(
                f"strategy={type(trainer.strategy).__name__} shards parameters, which masks and scores need whole; "
                "prune first with strategy='ddp' or 'auto' (a short fit is enough), then train "
                "callback.slim_model(pl_module) with this strategy"
            )

        # A checkpoint's state comes after this. Its random states have to be back before optimizers are configured:
        # asking there how long training is makes Lightning start the loaders.
        self._restores_rng_now = self.restore_rng and stage == "fit" and trainer.world_size == 1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What could be refused after hours of training is refused now.
        self._asked = None  # budget and model may be others than in the last fit
        if self._plan is None or isinstance(self.wanted_policy, Policy):
            self._asked_policy(pl_module)
        if self.save_to is not None and trainer.is_global_zero:
            check_savable(find_model(pl_module, self.model_path)[1], self.save_to)
        if self.schedule == "cubic":
            self._schedule_end(trainer)
        self._mask(trainer, pl_module)
        self._warn_of_another_budget(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._advance(trainer, pl_module)

    on_train_epoch_start = on_train_start

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._scorer is not None:
            self._watch(trainer, pl_module, batch)
        if self.unit == "step":
            self._advance(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mask(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._plan is None and not getattr(trainer, "fast_dev_run", False):
            rank_zero_warn(
                f"fit ended before anything was pruned: start={self.start} ({self.unit}s) was not reached, or an "
                f"iterable data set ended before calibration_batches={self.calibration_batches} had gone by"
            )
        elif self._plan is not None and self._progress < 1:
            rank_zero_warn(
                f"fit ended before the pruning schedule did ({self._progress:.0%} of the way); slim_model gives the "
                "final plan, which the weights have not been trained with. Train longer or lower end."
            )
        if trainer.is_global_zero and self._plan is not None and self.save_to is not None:
            save(self.slim_model(pl_module), self.save_to)
        if trainer.is_global_zero and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            torch.save(self.state_dict(), self._handover)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unmask(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unmask(pl_module)

    # --- state ----------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """One key per model, so that several callbacks can prune several models."""
        return self._generate_state_key(model=self.model_path)

    def state_dict(self) -> dict[str, Any]:
        """Scores, plan and position as tensors and text (no class of ours, so that any loader can read it)."""
        return {
            "format": _STATE_FORMAT,
            "plan": None if self._plan is None else self._plan.to_json(),
            "progress": self._progress,
            "scores": {} if self._scores is None else self._scores.tensors(),
            "scores_facts": {} if self._scores is None else self._scores.facts(),
            "rng": rng_state() if self.restore_rng else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("format") != _STATE_FORMAT or not state_dict.keys() >= self.state_dict().keys():
            raise CallbackError(
                f"the checkpoint's MultiDimPruneCallback state has format {state_dict.get('format')!r}, expected "
                f"{_STATE_FORMAT}; it was written by another version"
            )
        self.reset()
        if state_dict["plan"] is not None:
            self._plan = Plan.from_json(state_dict["plan"])
        if state_dict["scores_facts"]:
            self._scores = Scores.from_parts(state_dict["scores"], state_dict["scores_facts"])
        self._progress = state_dict["progress"]
        if self._restores_rng_now and state_dict["rng"] is not None:
            set_rng_state(state_dict["rng"])

    def _collect_handover(self) -> None:
        if self._handover.is_file():
            self.load_state_dict(torch.load(self._handover, weights_only=True))

    # --- observe, decide, apply -----------------------------------------------------------------------------------

    def _advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        now = trainer.current_epoch if self.unit == "epoch" else trainer.global_step
        if now < self.start or self._scorer is not None:
            return
        if self._plan is None:
            loader = trainer.train_dataloader
            if not is_map_style(loader):
                self._scorer = self._new_scorer(pl_module)  # watch the first training batches go by, then decide
                return
            self._decide(trainer, pl_module, self._score(trainer, pl_module, loader))
        progress = 1.0
        if self.schedule == "cubic":
            end = self._schedule_end(trainer)
            progress = 1 - (1 - min(1.0, (now - self.start) / (end - self.start))) ** 3
        if progress > self._progress:
            self._progress = progress
            self._unmask(pl_module)
            self._mask(trainer, pl_module)

    def _schedule_end(self, trainer: Trainer) -> int:
        if self.end is not None:
            return self.end
        total = trainer.max_epochs if self.unit == "epoch" else trainer.estimated_stepping_batches
        if total is None or total < 0 or total == math.inf:
            raise CallbackError("schedule='cubic' with an endless Trainer: say when it is through, e.g. end=10")
        return max(self.start + 1, round(total * 2 / 3))

    def _asked_policy(self, pl_module: LightningModule) -> Policy:
        """The given policy, or the uniform one of the budget. Found once a fit: for a latency budget it may measure."""
        if self._asked is None:
            model = find_model(pl_module, self.model_path)[1]
            if isinstance(self.wanted_policy, Policy):
                find_sites(model).counts(self.wanted_policy)
                self._asked = self.wanted_policy
            else:
                self._asked = uniform_policy(model, self.budget, **self.uniform_options)
        return self._asked

    def _warn_of_another_budget(self, pl_module: LightningModule) -> None:
        """The plan of a checkpoint or of an earlier fit stays, whatever budget is asked for now."""
        _, model = find_model(pl_module, self.model_path)
        if self._plan is None or isinstance(self.wanted_policy, Policy) or self._is_delivered(model):
            return
        asked, kept = self._asked_policy(pl_module), self._plan.policy
        if policy_macs(model, asked) != policy_macs(model, kept):
            share = policy_macs(model, kept) / macs(model)
            rank_zero_warn(
                f"the budget asked for now ({self.budget}) is not looked at: the plan from the checkpoint or "
                f"the fit before is kept ({share:.1%} of the MACs). For a new plan call callback.reset(), or fit "
                "without ckpt_path"
            )

    def _new_scorer(self, pl_module: LightningModule) -> Scorer:
        sites = find_sites(pl_module, self.model_path)
        stages = sites.counts(self._asked_policy(pl_module)).stages
        return Scorer(sites, self.criterion, sites.dimensions, stages)

    def _score(self, trainer: Trainer, pl_module: LightningModule, loaders: Any) -> Scorer:
        """Score on an own loader over the training data; rank r takes batches r, r + world, ... of one seeded list."""
        scorer = self._new_scorer(pl_module)
        if not self.criterion.needs_images:
            return scorer
        batches = CalibrationBatches(loaders, self.calibration_batches, self.calibration_images, self.seed)
        own = range(trainer.global_rank, len(batches), trainer.world_size)
        shown = bar("Scoring", len(own), shown=trainer.is_global_zero and trainer.progress_bar_callback is not None)
        with isolated_rng(), evaluating(pl_module), scorer.watching(), shown as advance:
            for index in own:
                seed_all(self.seed + index)  # random augmentation is the same whichever rank draws it
                batch = batches[index]
                self._observe(trainer, pl_module, scorer, _to_device(trainer, pl_module, batch))
                advance()
        return scorer

    def _watch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        scorer = self._scorer
        assert scorer is not None
        if not self._is_short(scorer, batch):
            with isolated_rng(), evaluating(pl_module), scorer.watching():
                self._observe(trainer, pl_module, scorer, batch)
        if self._steps_to_watch is None:
            # Rank 0 says how many, so that all ranks decide at the same step whatever batches they get.
            steps = self.calibration_batches
            if self.calibration_images is not None:
                steps = math.ceil(self.calibration_images / int(scorer.sums["images"]))
            self._steps_to_watch = trainer.strategy.broadcast(math.ceil(steps / trainer.world_size), src=0)
        self._steps_to_watch -= 1
        if self._steps_to_watch == 0:
            self._steps_to_watch = None
            self._scorer = None
            self._decide(trainer, pl_module, scorer)
            self._advance(trainer, pl_module)

    def _is_short(self, scorer: Scorer, batch: Any) -> bool:
        """Whether this batch is smaller than those before, where they must be equal."""
        images = num_images(batch)
        if not self.criterion.needs_equal_batches or images is None or scorer.sums["batches"] == 0:
            return False
        return images != int(scorer.sums["images"] / scorer.sums["batches"])

    def _observe(self, trainer: Trainer, pl_module: LightningModule, scorer: Scorer, batch: Any) -> None:
        def predict() -> Tensor:
            with trainer.precision_plugin.forward_context():
                output = self.calibration_step(pl_module, batch)
            return as_prediction(output, self.prediction)

        labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
        scorer.update(predict, labels if isinstance(labels, Tensor) else None)

    def _decide(self, trainer: Trainer, pl_module: LightningModule, scorer: Scorer) -> None:
        """Average over ranks, decide on rank 0, tell the others, make sure they heard."""
        scorer.sum_over_ranks()
        scores = scorer.scores()
        _, model = find_model(pl_module, self.model_path)
        plan = self._make_plan(model, scores, self._asked_policy(pl_module))
        told, digest = trainer.strategy.broadcast((plan.to_json(), plan.hash), src=0)
        plan = Plan.from_json(told)
        if plan.hash != digest:
            raise PlanError(
                f"rank {trainer.global_rank} received another plan ({plan.hash}) than rank 0 sent ({digest})"
            )
        self._scores, self._plan = scores, plan

    def _mask(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Masks on as far as the schedule has got, if a plan is known and they are not on already."""
        if self._plan is None or self._progress == 0:
            return
        _, model = find_model(pl_module, self.model_path)
        if is_masked(model) or self._is_delivered(model):
            return
        try:
            plan = self._plan_now(model)
            apply_masks(pl_module, plan, self.model_path)
        except (PlanError, PolicyError) as error:
            raise PlanError(f"{error}. To prune another model with this callback, call callback.reset()") from error
        self._report(trainer, find_sites(model), plan)

    def _plan_now(self, model: nn.Module) -> Plan:
        assert self._plan is not None
        if self._progress >= 1 or self._scores is None:
            return self._plan
        final = self._plan.policy
        ratios = {d: [1 - self._progress * (1 - ratio) for ratio in getattr(final, d)] for d in DIMENSIONS}
        return self._make_plan(model, self._scores, Policy(**ratios, stages=final.stages))

    def _make_plan(self, model: nn.Module, scores: Scores, policy: Policy) -> Plan:
        return make_plan(model, scores, policy, token_score=self.token_score, fuse_tokens=self.fuse_tokens)

    def _unmask(self, pl_module: LightningModule) -> None:
        try:
            _, model = find_model(pl_module, self.model_path)
        except MdcError:
            return  # there never was a model of ours; whoever needs one has raised
        remove_masks(model)

    def _is_delivered(self, model: nn.Module) -> bool:
        """Whether `model` is already the slim network of this plan (`slim_model(in_place=True)`)."""
        made_with = plan_of(model)
        return made_with is not None and made_with == self._plan

    def _report(self, trainer: Trainer, sites: Sites, plan: Plan) -> None:
        costs = CostModel(sites)
        kept = {
            dimension: sum(map(len, getattr(plan, dimension))) / max(sum(getattr(plan, f"num_{dimension}")), 1)
            for dimension in ("heads", "neurons")
        }
        metrics = {
            "mdc/macs": float(costs.of_plan(plan)),
            "mdc/params": float(costs.params(costs.kept_by_plan(plan))),
            **{f"mdc/keep_{dimension}": ratio for dimension, ratio in kept.items()},
            "mdc/keep_tokens": math.prod(stage.keep for stage in plan.tokens),
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        if trainer.training:
            rank_zero_info(
                f"Pruning {sites.name} to {metrics['mdc/macs'] / costs.of_model():.1%} of its MACs: "
                f"{kept['heads']:.0%} of heads, {kept['neurons']:.0%} of neurons, "
                f"{metrics['mdc/keep_tokens']:.0%} of tokens at the end"
            )


def plan_from_checkpoint(path: str | Path, model: str | None = None) -> Plan:
    """The plan a `MultiDimPruneCallback` left in a Lightning checkpoint, for `slim` in another process.

    `model` is the callback's ``model=`` argument, if there were several callbacks.

    Raises:
        CallbackError: the file is unreadable, or holds no plan (or several).
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CallbackError(f"checkpoint={str(path)!r} cannot be read without unpickling classes: {error}") from error
    states = checkpoint.get("callbacks") if isinstance(checkpoint, dict) else None
    plans = {
        key: state["plan"]
        for key, state in (states if isinstance(states, dict) else {}).items()
        if isinstance(state, dict) and "plan" in state and state.get("format") == _STATE_FORMAT
    }
    if model is not None:
        plans = {key: plan for key, plan in plans.items() if repr(model) in key}
    if len(plans) != 1 or None in plans.values():
        raise CallbackError(
            f"checkpoint={str(path)!r} holds {len(plans)} MultiDimPruneCallback states"
            f"{'' if plans else ': no plan; it was not written by a Trainer with that callback'}"
            f"{' (the plan is not decided yet)' if None in plans.values() else ''}"
            f"{'; say which with model=' if len(plans) > 1 else ''}"
        )
    return Plan.from_json(next(iter(plans.values())))


def _to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """What Lightning does to a training batch before ``training_step``."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)  # the module's hook or the data module's
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


# --- settings, and what is left behind --------------------------------------------------------------------------------


def _check_types(**settings: Any) -> None:
    path = (str, Path, type(None))
    kinds: dict[str, Any] = {"fuse_tokens": bool, "restore_rng": bool, "model": (str, type(None)), "save_to": path}
    for name, value in settings.items():
        if not isinstance(value, kinds[name]):
            raise CallbackError(f"{name}={value!r:.80} has the wrong type ({type(value).__name__})")


def _check_schedule(schedule: Any, start: Any, end: Any, unit: Any) -> None:
    check_one_of("schedule", schedule, ("one-shot", "cubic"), CallbackError)
    check_one_of("unit", unit, ("epoch", "step"), CallbackError)
    check_whole("start", start, 0, CallbackError)
    check_whole("end", end, start + 1, CallbackError, or_none="the end of training")
    if end is not None and schedule == "one-shot":
        raise CallbackError(f"end={end} means nothing to schedule='one-shot'; pass schedule='cubic', or no end")


def _remove(handover: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a forked worker, which leaves the file behind for its parent
        handover.unlink(missing_ok=True)


def _policy(policy: Any) -> Policy | Literal["uniform"]:
    if isinstance(policy, Policy) or policy == "uniform":
        return policy
    if isinstance(policy, (str, Path)):
        return Policy.load(policy)
    raise PolicyError(f"policy={policy!r:.80}: expected 'uniform', a Policy, or the path of a policy's JSON file")
