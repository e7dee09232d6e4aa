"""`MultiDimPruneCallback`: when to observe, decide and apply, inside anybody's ``Trainer.fit``."""

from __future__ import annotations

import math
import os
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
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
from lightning_mdc.budget.uniform import check_uniform, uniform_policy
from lightning_mdc.errors import (
    CalibrationError,
    CallbackError,
    MdcError,
    PlanError,
    PolicyError,
    check_kind,
    check_one_of,
    check_whole,
)
from lightning_mdc.figures.dashboard import Dashboard
from lightning_mdc.figures.decision import Decision
from lightning_mdc.importance import Criterion, Needs, Scorer, Scores, as_criterion
from lightning_mdc.importance.calibration import Calibration, CalibrationBatches, is_map_style, num_images
from lightning_mdc.models import Anatomy, evaluating, find_anatomy, find_model, unwrap
from lightning_mdc.policy import DIMENSIONS, Plan, Policy, Space, TokenOptions, check_dimensions
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
        budget: fraction of the dense MACs to keep, or a `Budget`; None: 0.6. A given policy has a budget of its own.
        policy: ``"uniform"``, a `Policy`, or the path of a policy's JSON file.
        criterion: name of a criterion or an instance; see `lightning_mdc.score`.
        dimensions, space, tokens: see `uniform_policy` and `make_plan`; a given policy says itself what it prunes.
        calibration: how many images units are scored on, over all ranks together; None: ``Calibration()``. In batches
            of the training loader's size, unless it says another.
        schedule: ``"one-shot"`` masks all at `start`; ``"cubic"`` goes there gradually until `end`, fast first
            (Zhu & Gupta 2017), always from the same scores, never compounding.
        start, end: when, in `unit`; `end` defaults to two thirds of the training.
        unit: ``"epoch"`` or ``"step"`` (optimizer steps).
        submodule: attribute path of the vision transformer in the LightningModule; None finds it if there is just one.
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
        budget: float | Budget | None = None,
        policy: str | Path | Policy = "uniform",
        criterion: str | Criterion = "conditional",
        *,
        dimensions: Iterable[str] | None = None,
        space: Space | None = None,
        tokens: TokenOptions | None = None,
        calibration: Calibration | None = None,
        schedule: Literal["one-shot", "cubic"] = "one-shot",
        start: int = 0,
        end: int | None = None,
        unit: Literal["epoch", "step"] = "epoch",
        submodule: str | None = None,
        prediction: Callable[[Any], Tensor] | None = None,
        seed: int = 0,
        restore_rng: bool = False,
        save_to: str | Path | None = None,
    ) -> None:
        super().__init__()
        check_kind("space", space, Space, CallbackError)
        check_kind("tokens", tokens, TokenOptions, CallbackError)
        check_kind("calibration", calibration, Calibration, CallbackError)
        _check_types(restore_rng=restore_rng, submodule=submodule, save_to=save_to)
        _check_schedule(schedule, start, end, unit)
        check_whole("seed", seed, 0, CallbackError)
        if prediction is not None and not callable(prediction):
            raise CallbackError(f"prediction={prediction!r:.80}: expected a function of what the model returns")
        self.criterion = as_criterion(criterion)
        self.wanted_policy = _policy(policy)
        if isinstance(self.wanted_policy, Policy):
            _check_unused("a given policy says what is kept", budget=budget, dimensions=dimensions, space=space)
        if not Needs.all_of(self.criterion.needs(dimension) for dimension in DIMENSIONS).images:
            reason = f"criterion={self.criterion.name!r} looks at no images"
            _check_unused(reason, calibration=calibration, prediction=prediction)
        self.budget = as_budget(0.6 if budget is None else budget)
        self.dimensions = None if dimensions is None else check_dimensions(dimensions)
        self.space, self.tokens = space or Space(), tokens or TokenOptions()
        check_uniform(self.space)
        self.calibration = calibration or Calibration()
        self.schedule, self.start, self.end, self.unit = schedule, start, end, unit
        self.submodule, self.prediction, self.seed = submodule, prediction, seed
        self.restore_rng, self.save_to = restore_rng, None if save_to is None else Path(save_to)
        # Spawned workers cannot give attributes back; rank 0 leaves the outcome in this file.
        self._handover = Path(tempfile.gettempdir()) / f"lightning_mdc-{uuid.uuid4().hex}.pt"
        weakref.finalize(self, _remove, self._handover, os.getpid())
        self._restores_rng_now = False
        self._is_tried = False
        self._dashboard = Dashboard(())
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
        path, model = find_model(pl_module, self.submodule)
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
        self._dashboard = Dashboard(trainer.loggers)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What could be refused after hours of training is refused now.
        self._asked = None  # budget and model may be others than in the last fit
        self._is_tried = False
        if self._plan is None or isinstance(self.wanted_policy, Policy):
            self._asked_policy(pl_module)
        if self.save_to is not None and trainer.is_global_zero:
            check_savable(find_model(pl_module, self.submodule)[1], self.save_to)
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
        elif self._plan is None and not self._is_tried:  # of an iterable data set, before `start`
            self._try_out(trainer, pl_module, batch)
        if self.unit == "step":
            self._advance(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mask(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._plan is None and not getattr(trainer, "fast_dev_run", False):
            rank_zero_warn(
                f"fit ended before anything was pruned: start={self.start} ({self.unit}s) was not reached, or an "
                f"iterable data set ended before {self.calibration.images} images had gone by"
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
        self._dashboard = Dashboard(())  # loggers hold open files: a callback can be copied

    # --- state ----------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """One key per model, so that several callbacks can prune several models."""
        return self._generate_state_key(submodule=self.submodule)

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
        if now < self.start:
            loader = trainer.train_dataloader
            if self._plan is None and not self._is_tried and is_map_style(loader):
                with isolated_rng():
                    batch = CalibrationBatches(loader, self.calibration, self.seed)[0]
                self._try_out(trainer, pl_module, _to_device(trainer, pl_module, batch))
            return
        if self._scorer is not None:
            return
        if self._plan is None:
            loader = trainer.train_dataloader
            if not is_map_style(loader):
                if self.calibration.batch_size is not None:
                    raise CallbackError(
                        f"calibration.batch_size={self.calibration.batch_size}: the batches of an iterable data set "
                        "are watched as they come; leave it out"
                    )
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
            model = find_model(pl_module, self.submodule)[1]
            if isinstance(self.wanted_policy, Policy):
                find_anatomy(model).counts(self.wanted_policy)
                self._asked = self.wanted_policy
            else:
                self._asked = uniform_policy(model, self.budget, self.dimensions, self.space, self.tokens)
        return self._asked

    def _warn_of_another_budget(self, pl_module: LightningModule) -> None:
        """The plan of a checkpoint or of an earlier fit stays, whatever budget is asked for now."""
        _, model = find_model(pl_module, self.submodule)
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
        anatomy = find_anatomy(pl_module, self.submodule)
        stages = anatomy.counts(self._asked_policy(pl_module)).stages
        return Scorer(anatomy, self.criterion, anatomy.dimensions, stages, self.prediction)

    def _score(self, trainer: Trainer, pl_module: LightningModule, loaders: Any) -> Scorer:
        """Score on an own loader over the training data; rank r takes batches r, r + world, ... of one seeded list."""
        scorer = self._new_scorer(pl_module)
        if not scorer.needs.images:
            return scorer
        batches = CalibrationBatches(loaders, self.calibration, self.seed)
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
            steps = math.ceil(self.calibration.images / max(int(scorer.sums["images"]), 1))
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
        if not scorer.needs.equal_batches or images is None or scorer.sums["batches"] == 0:
            return False
        return images != int(scorer.sums["images"] / scorer.sums["batches"])

    def _observe(self, trainer: Trainer, pl_module: LightningModule, scorer: Scorer, batch: Any) -> None:
        def run() -> Any:
            with trainer.precision_plugin.forward_context():
                return self.calibration_step(pl_module, batch)

        labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
        scorer.update(run, num_images(batch) or 0, labels if isinstance(labels, Tensor) else None)

    def _try_out(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Score a batch for nothing: what scoring would refuse, epochs from now, is refused at once."""
        self._is_tried = True
        scorer = self._new_scorer(pl_module)
        if scorer.needs.images:
            with isolated_rng(), evaluating(pl_module), scorer.watching():
                self._observe(trainer, pl_module, scorer, batch)

    def _decide(self, trainer: Trainer, pl_module: LightningModule, scorer: Scorer) -> None:
        """Average over ranks, decide on rank 0, tell the others, make sure they heard."""
        scorer.sum_over_ranks()
        scores = scorer.scores()
        _, model = find_model(pl_module, self.submodule)
        plan = make_plan(model, scores, self._asked_policy(pl_module), self.tokens)
        told, digest = trainer.strategy.broadcast((plan.to_json(), plan.hash), src=0)
        plan = Plan.from_json(told)
        if plan.hash != digest:
            raise PlanError(
                f"rank {trainer.global_rank} received another plan ({plan.hash}) than rank 0 sent ({digest})"
            )
        self._scores, self._plan = scores, plan
        budget = None if isinstance(self.wanted_policy, Policy) else self.budget
        look = partial(self._look, trainer, pl_module) if is_map_style(trainer.train_dataloader) else None
        self._dashboard.decided(Decision(CostModel(find_anatomy(model)), plan, scores, budget, look=look))

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the module on some of the images that units were scored on."""
        batch = CalibrationBatches(trainer.train_dataloader, self.calibration, self.seed)[0]
        with evaluating(pl_module), trainer.precision_plugin.forward_context():
            self.calibration_step(pl_module, _to_device(trainer, pl_module, batch))

    def _mask(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Masks on as far as the schedule has got, if a plan is known and they are not on already."""
        if self._plan is None or self._progress == 0:
            return
        _, model = find_model(pl_module, self.submodule)
        if is_masked(model) or self._is_delivered(model):
            return
        try:
            plan = self._plan_now(model)
            apply_masks(pl_module, plan, self.submodule)
        except (PlanError, PolicyError) as error:
            raise PlanError(f"{error}. To prune another model with this callback, call callback.reset()") from error
        self._report(trainer, find_anatomy(model), plan)

    def _plan_now(self, model: nn.Module) -> Plan:
        assert self._plan is not None
        if self._progress >= 1 or self._scores is None:
            return self._plan
        final = self._plan.policy
        ratios = {d: [1 - self._progress * (1 - ratio) for ratio in of] for d, of in final.ratios.items()}
        tokens = replace(self.tokens, reduction=self._plan.reduction, restore=self._plan.restore)
        return make_plan(model, self._scores, Policy(**ratios, stages=final.stages), tokens)

    def _unmask(self, pl_module: LightningModule) -> None:
        try:
            _, model = find_model(pl_module, self.submodule)
        except MdcError:
            return  # there never was a model of ours; whoever needs one has raised
        remove_masks(model)

    def _is_delivered(self, model: nn.Module) -> bool:
        """Whether `model` is already the slim network of this plan (`slim_model(in_place=True)`)."""
        made_with = plan_of(model)
        return made_with is not None and made_with == self._plan

    def _report(self, trainer: Trainer, anatomy: Anatomy, plan: Plan) -> None:
        costs = CostModel(anatomy)
        kept = {d: sum(map(len, plan.kept[d])) / max(sum(sizes), 1) for d, sizes in plan.sizes.items()}
        metrics = {
            "mdc/macs": float(costs.of_plan(plan)),
            "mdc/params": float(costs.params(costs.kept_by_plan(plan))),
            **{f"mdc/keep_{dimension}": ratio for dimension, ratio in kept.items()},
            "mdc/keep_tokens": math.prod(stage.keep for stage in plan.tokens),
        }
        self._dashboard.in_force(metrics, trainer.global_step)
        if trainer.training:
            rank_zero_info(
                f"Pruning {anatomy.name} to {metrics['mdc/macs'] / costs.of_model():.1%} of its MACs: "
                f"{', '.join(f'{ratio:.0%} of {d}' for d, ratio in kept.items())}, "
                f"{metrics['mdc/keep_tokens']:.0%} of tokens at the end"
            )


def plan_from_checkpoint(path: str | Path, submodule: str | None = None) -> Plan:
    """The plan a `MultiDimPruneCallback` left in a Lightning checkpoint, for `slim` in another process.

    `submodule` is the callback's argument of that name, if there were several callbacks.

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
    if submodule is not None:
        plans = {key: plan for key, plan in plans.items() if repr(submodule) in key}
    if len(plans) != 1 or None in plans.values():
        raise CallbackError(
            f"checkpoint={str(path)!r} holds {len(plans)} MultiDimPruneCallback states"
            f"{'' if plans else ': no plan; it was not written by a Trainer with that callback'}"
            f"{' (the plan is not decided yet)' if None in plans.values() else ''}"
            f"{'; say which with submodule=' if len(plans) > 1 else ''}"
        )
    return Plan.from_json(next(iter(plans.values())))


def _to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """What Lightning does to a training batch before ``training_step``."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)  # the module's hook or the data module's
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


# --- settings, and what is left behind --------------------------------------------------------------------------------


def _check_types(**settings: Any) -> None:
    kinds: dict[str, Any] = {
        "restore_rng": bool,
        "submodule": (str, type(None)),
        "save_to": (str, Path, type(None)),
    }
    for name, value in settings.items():
        if not isinstance(value, kinds[name]):
            raise CallbackError(f"{name}={value!r:.80} has the wrong type ({type(value).__name__})")


def _check_unused(reason: str, **settings: Any) -> None:
    """Refuse what would not be looked at."""
    for name, value in settings.items():
        if value is not None:
            raise CallbackError(f"{name}={value!r:.80} is not looked at: {reason}; leave {name} out")


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
