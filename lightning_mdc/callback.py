"""`MultiDimPruneCallback`: when to observe, decide and apply, inside anybody's ``Trainer.fit``."""

from __future__ import annotations

import copy
import math
import os
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_mdc.artifact import check_savable, save
from lightning_mdc.belonging import Fingerprint, complaint, fingerprint, is_other
from lightning_mdc.budget import Budget, CostModel, macs, plan_macs
from lightning_mdc.checkpoint import Outcome, key_of, states_in
from lightning_mdc.compression import Compression, Method, duration_in_words
from lightning_mdc.distributed import copy_from_first_rank, gather, on_every_rank, on_first_rank
from lightning_mdc.errors import (
    CalibrationError,
    CallbackError,
    MdcError,
    PlanError,
    PolicyError,
)
from lightning_mdc.figures.dashboard import Dashboard
from lightning_mdc.figures.decision import Decision
from lightning_mdc.importance import Criterion, Moments, Scorer, Scores
from lightning_mdc.importance.calibration import Calibration, Remembered, images_in, joined, num_images, put_together
from lightning_mdc.importance.training_data import CalibrationBatches, calibration_batches, is_map_style
from lightning_mdc.models import Anatomy, Prediction, evaluating, find_anatomy, find_model, put_in_place, standing_in
from lightning_mdc.policy import Plan, Policy, Space, TokenOptions
from lightning_mdc.policy_search.closeness import float_tensors
from lightning_mdc.policy_search.driver import SearchOptions, SearchResult, digest_of
from lightning_mdc.policy_search.folder import SearchFolder, digest_of_batches
from lightning_mdc.policy_search.held_out import InPlace, Judgement, running_as_written
from lightning_mdc.prediction import labels_in, plain
from lightning_mdc.progress import bar
from lightning_mdc.randomness import isolated_rng, rng_state, seed_all, set_rng_state
from lightning_mdc.schedule import Schedule
from lightning_mdc.surgery import apply_masks, is_masked, plan_of, remove_masks, slim
from lightning_mdc.surgery.compensation import refit_readers, take_readers
from lightning_mdc.surgery.plan import make_plan
from lightning_mdc.surgery.sequential import refit_in_sequence
from lightning_mdc.unlogged import unlogged


class MultiDimPruneCallback(Callback):
    """Prunes the vision transformer in a LightningModule while it trains, and hands it over physically smaller.

    At the start of fit it scores heads, neurons and token positions on a seeded sample of the training data, searches
    how much each block gives up under the budget, puts reversible masks on, and refits the layers that read what
    leaves, so that what stays makes up for it. Masks are on in training, validation, test and predict, and off when the
    Trainer is done. `slim_model` then gives the small network. The plan lives in the checkpoint: a resumed run goes on
    with it, without scoring or searching again; test, validate and predict with a ``ckpt_path`` have that checkpoint's
    masks on and leave alone what a fit has found. While we look at images the module logs nothing. Its own weights and
    keys never change shape.

    Policies are judged, on training images that units are not scored on, by how close the module's own output stays to
    what it is with the dense model: no labels are needed. Trials lie in ``<trainer.default_root_dir>/mdc/``; a fit that
    was killed meanwhile, by SIGTERM too, goes on from there when it is started again.

    Args:
        budget: fraction of the dense MACs to keep, or a `Budget`; None: 0.6. A given policy has a budget of its own.
        policy: ``"searched"``; ``"uniform"``, which takes the same share everywhere and is there at once; a `Policy`,
            or the path of a policy's JSON file.
        criterion: name of a criterion or an instance; see `lightning_mdc.score`.
        dimensions, space, tokens: see `uniform_policy`, `PolicySpace` and `make_plan`; a given policy says itself what
            it prunes.
        calibration: how many images units are scored on and policies are judged on, over all ranks together; None:
            ``Calibration()``. In batches of the training loader's size, unless it says another or
            that is too small for the criterion.
        compensate: ``"sequential"`` and ``"lstsq"`` refit, once, by least squares, the weights that read units; see
            `slim`; in sequence on all images that scored and judged. ``"none"`` leaves them. None: ``"sequential"``,
            but ``"none"`` with ``schedule="cubic"``. An optimizer that has state by then keeps it.
        n_trials: how many policies are tried; None: 40.
        evaluate: what the module is worth with a slim model in place, higher is better, instead of closeness; called
            as ``evaluate(pl_module)``, in eval mode and without gradients, by all ranks.
        schedule: ``"one-shot"`` masks all at `start`; ``"cubic"`` goes there gradually until `end`, fast first
            (Zhu & Gupta 2017), always from the same scores, never compounding.
        start, end: when, in `unit`; `end` defaults to two thirds of the training, by the first of the Trainer's limits.
        unit: ``"epoch"`` or ``"step"`` (optimizer steps).
        submodule: attribute path of the vision transformer in the LightningModule; None finds it if there is just one.
        prediction: makes of what the module returns what criterion and judging look at, probabilities (images, classes)
            say; None: the softmax of logits, or the output itself.
        seed: of the sample and the search.
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
        policy: Policy | str | Path = "searched",
        criterion: str | Criterion = "fisher",
        *,
        dimensions: Iterable[str] | None = None,
        space: Space | None = None,
        tokens: TokenOptions | None = None,
        calibration: Calibration | None = None,
        compensate: Literal["sequential", "lstsq", "none"] | None = None,
        n_trials: int | None = None,
        evaluate: Callable[[LightningModule], float] | None = None,
        schedule: Literal["one-shot", "cubic"] = "one-shot",
        start: int = 0,
        end: int | None = None,
        unit: Literal["epoch", "step"] = "epoch",
        submodule: str | None = None,
        prediction: Prediction | None = None,
        seed: int = 0,
        restore_rng: bool = False,
        save_to: str | Path | None = None,
    ) -> None:
        super().__init__()
        _check_types(restore_rng=restore_rng, submodule=submodule, save_to=save_to)
        self.schedule = Schedule(schedule, start, end, unit)
        if schedule == "cubic" and compensate not in (None, "none"):
            raise CallbackError(
                f"compensate={compensate!r} with schedule='cubic': weights are refitted once, for what leaves at once; "
                "use schedule='one-shot', or leave compensate out"
            )
        self.method = Method(
            budget,
            policy,
            criterion,
            dimensions=dimensions,
            space=space,
            tokens=tokens,
            calibration=calibration,
            compensate="none" if schedule == "cubic" else compensate,
            n_trials=n_trials,
            evaluate=evaluate,  # type: ignore[arg-type]
            prediction=prediction,
            seed=seed,
            error=CallbackError,
        )
        self.submodule, self.restore_rng = submodule, restore_rng
        self.save_to = None if save_to is None else Path(save_to)
        self._handover = self._new_handover()
        self._restores_rng_now = self._is_restored = False
        self._is_tried = self._is_reported = False
        self._timing = self.schedule  # of this training
        self._warned: set[str] = set()  # of what is said once
        self._dashboard = Dashboard(())
        self.reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> MultiDimPruneCallback:
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        copied._handover = copied._new_handover()
        return copied

    def _new_handover(self) -> Path:
        """Spawned workers cannot give attributes back; rank 0 leaves the outcome in this file."""
        path = Path(tempfile.gettempdir()) / f"lightning_mdc-{uuid.uuid4().hex}.pt"
        weakref.finalize(self, _remove, path, os.getpid())
        return path

    def reset(self) -> None:
        """Forget scores, policy and plan: the next fit starts over. Weights stay as they are."""
        self._outcome = Outcome()
        self._shown: Outcome | None = None  # what a checkpoint that is only looked at holds
        self._is_of_fit = False  # else the outcome is what a checkpoint that was looked at holds
        self._left: Fingerprint | None = None  # the weights that go with the outcome
        self._task: Compression | None = None  # the method on this fit's model
        self._watched: list[Any] | None = None  # batches of an iterable data set, while they are collected
        self._watched_in = 0  # the epoch
        self._steps_to_watch: int | None = None
        self._to_try: list[Any] = []  # batches of an iterable data set, while they are too few images to try out
        self._folder: SearchFolder | None = None  # of the search of this fit
        self._before: list[tuple[Tensor, Tensor]] | None = None  # what compensation changed, with its dense values
        self._handover.unlink(missing_ok=True)

    # --- what it found --------------------------------------------------------------------------------------------

    @property
    def scores(self) -> Scores | None:
        """The scores the plan rests on; None before fitting started."""
        self._collect_handover()
        return self._outcome.scores

    @property
    def policy(self) -> Policy | None:
        """The realised keep ratios of the final plan, and at which size of images they are priced; None before fitting
        started."""
        return None if self.plan is None else self.plan.policy

    @property
    def plan(self) -> Plan | None:
        """What is kept when the schedule is through; None before fitting started."""
        self._collect_handover()
        return self._outcome.plan

    @property
    def search(self) -> SearchResult | None:
        """How the policy was searched for; None before, and where it was not."""
        self._collect_handover()
        return self._outcome.search

    def slim_model(self, pl_module: LightningModule, in_place: bool = False) -> nn.Module:
        """The physically slim vision transformer of `pl_module`, a plain module.

        With ``in_place=True`` it also takes the dense one's place in `pl_module` (uncompiled), to go on training. What
        makes up for what left is in the weights by now.

        Raises:
            CallbackError: there is no plan yet, or nothing to replace.
        """
        if self.plan is None:
            raise CallbackError(
                "slim_model: there is no plan yet; call trainer.fit with this callback first (and let it reach start), "
                "or, with a module from a checkpoint, mdc.slim(module, mdc.plan_from_checkpoint(path))"
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
            if pl_module._trainer is not None and _takes_steps(pl_module._trainer):
                rank_zero_warn(
                    "slim_model(in_place=True) while the Trainer trains: its optimizer holds the dense model's "
                    "parameters, so nothing trains the slim one in this fit; call it when fit is over"
                )
            put_in_place(pl_module, model, result)
        return result

    def undo_compensation(self, pl_module: LightningModule) -> None:
        """Give the weights that were refitted their dense values back; plan and masks stay.

        Raises:
            CallbackError: there is nothing to undo, or the weights have been trained since.
        """
        if self._before is None:
            raise CallbackError(
                "undo_compensation: there are no dense values to give back: nothing was compensated for in this "
                "process, or an optimizer step has been taken since, on which what came after it rests; for a fit "
                "without compensation pass compensate='none'"
            )
        own = {id(parameter) for parameter in pl_module.parameters()}
        if not any(id(tensor) in own for tensor, _ in self._before):
            raise CallbackError("undo_compensation: another module was compensated; give the one that was fitted")
        for tensor, before in self._before:
            tensor.data.copy_(before)
        self._before = None

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
        return pl_module(plain(images))

    # --- hooks ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise CallbackError(
                f"strategy={type(trainer.strategy).__name__} shards parameters, which masks and scores need whole; "
                "prune first with strategy='ddp' or 'auto' (a short fit is enough), then train "
                "callback.slim_model(pl_module) with this strategy"
            )

        self._check_alone(trainer, pl_module)
        self._is_restored = False

        # A checkpoint's state comes after this. Its random states have to be back before optimizers are configured:
        # asking there how long training is makes Lightning start the loaders.
        self._restores_rng_now = self.restore_rng and stage == "fit" and trainer.world_size == 1
        self._dashboard = Dashboard(trainer.loggers)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What could be refused after hours of training is refused now.
        self._task = None  # the model may be another than in the last fit
        self._is_tried, self._is_reported, self._to_try = False, False, []
        if self._outcome.plan is None or isinstance(self.method.policy, Policy):
            self._compression(pl_module)
        if self.save_to is not None and trainer.is_global_zero:
            check_savable(find_model(pl_module, self.submodule)[1], self.save_to)
        self._mask(pl_module)
        self._is_of_fit = True
        self._warn_of_another_origin(trainer, pl_module)
        self._warn_of_another_method(pl_module)
        self._warn_of_lost_work(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._timing = self.schedule.in_training(trainer)
        self._advance(trainer, pl_module)
        if not self._is_reported:  # masks of an earlier fit, or of the one that goes on: now the step is known
            self._report(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._advance(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._outcome.plan is None and not self._is_tried:  # of an iterable data set
            self._try_out_going_by(trainer, pl_module, batch)
        if self._watched is not None:
            self._watch(trainer, pl_module, batch)
        if self.schedule.unit == "step":
            self._advance(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._before = None  # see `undo_compensation`

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A finite stream begins anew: what was seen once must not be judged on, too.
        if self._watched and self._watched_in == trainer.current_epoch:
            self._decide_watched(trainer, pl_module)  # at the end of the last epoch, too: weights and masks go together

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mask(pl_module)
        if trainer.state.fn != TrainerFn.FITTING:
            self._warn_of_another_origin(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        plan, progress = self._outcome.plan, self._outcome.progress
        if plan is None and not getattr(trainer, "fast_dev_run", False):
            rank_zero_warn(
                f"fit ended before anything was pruned: start={self.schedule.start} ({self.schedule.unit}s) was not "
                "reached, or an iterable data set ended before enough images had gone by"
            )
        elif plan is not None and progress < 1:
            rank_zero_warn(
                f"fit ended before the pruning schedule did ({progress:.0%} of the way); slim_model gives the "
                "final plan, which the weights have not been trained with. Train longer or lower end."
            )
        if trainer.is_global_zero and plan is not None and self.save_to is not None:
            save(self.slim_model(pl_module), self.save_to)
        self._remember_weights(pl_module)
        if trainer.is_global_zero and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            torch.save((self._outcome.state(), self._left), self._handover)
        if trainer.is_global_zero and self._folder is not None:
            self._folder.clear()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end(trainer, pl_module)
        self._dashboard = Dashboard(())  # loggers hold open files: a callback can be copied
        self._task = None  # and the model with it

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unmask(pl_module)
        if trainer.state.fn == TrainerFn.FITTING or self._is_restored:
            self._remember_weights(pl_module)
        self._shown = None

    # --- state ----------------------------------------------------------------------------------------------------

    # Not `state_dict` and `load_state_dict`: Lightning would refuse two callbacks on one model in words of its own, and
    # say nothing to one whose state is missing.

    @property
    def state_key(self) -> str:
        """One key per model, so that several callbacks can prune several models."""
        return key_of(self.submodule)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        random = rng_state() if self.restore_rng else None
        checkpoint.setdefault("callbacks", {})[self.state_key] = {**self._outcome.state(), "rng": random}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = self._state_of(pl_module, states_in(checkpoint))
        if state is None:
            return  # to be told when it begins, as where only weights were saved: this is not called then
        outcome, self._is_restored = Outcome.from_state(state), True
        if trainer.state.fn != TrainerFn.FITTING and self._is_of_fit and self._outcome.plan is not None:
            self._look_at(outcome)
            return
        self.reset()
        self._outcome = outcome
        if self._restores_rng_now and state.get("rng") is not None:
            set_rng_state(state["rng"])

    def _state_of(self, pl_module: LightningModule, states: dict[str | None, dict[str, Any]]) -> dict[str, Any] | None:
        """The state of what prunes the same model, whatever it calls it."""
        if self.submodule in states:
            return states[self.submodule]
        mine = _model_at(pl_module, self.submodule)
        same = (state for name, state in states.items() if mine is not None and _model_at(pl_module, name) is mine)
        return next(same, None)

    def _look_at(self, outcome: Outcome) -> None:
        """Have the masks of a checkpoint on for this run of the Trainer, and keep the fit's outcome."""
        if (outcome.plan, outcome.progress) == (self._outcome.plan, self._outcome.progress):
            return
        self._shown = outcome
        if outcome.plan is None or outcome.progress == 0:
            what = "is from before anything was pruned"
        elif outcome.plan == self._outcome.plan:
            what = f"is from {outcome.progress:.0%} of the way of the pruning schedule"
        else:
            what = "has another plan"
        rank_zero_warn(
            f"the checkpoint {what}: so it is measured now, and its weights are in the module from now on. slim_model "
            "goes on giving the plan of the fit, which those weights were not trained with: give it the module with a "
            "checkpoint of the end of the fit, or use mdc.slim(module, mdc.plan_from_checkpoint(path))"
        )

    def _collect_handover(self) -> None:
        if self._handover.is_file():
            state, left = torch.load(self._handover, weights_only=True)
            self.reset()
            self._outcome, self._left, self._is_of_fit = Outcome.from_state(state), left, True

    def _remember_weights(self, pl_module: LightningModule) -> None:
        model = _model_at(pl_module, self.submodule)
        if model is not None and self._outcome.plan is not None and self._shown is None:
            self._left = fingerprint(model)

    # --- observe, decide, apply -----------------------------------------------------------------------------------

    def _compression(self, pl_module: LightningModule) -> Compression:
        """The method on this model. Made once a fit: for a latency budget it may measure."""
        if self._task is None:
            self._task = Compression(self.method, pl_module, self.submodule, say=rank_zero_info)
        return self._task

    def _advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader = trainer.train_dataloader
        if not self._timing.has_begun(trainer):
            if self._outcome.plan is None and not self._is_tried and is_map_style(loader):
                least = self._compression(pl_module).scorer().needs.images
                batches, _ = calibration_batches(loader, self.method.calibration, self.method.seed, least=least)
                self._try_out(trainer, pl_module, self._made(trainer, pl_module, batches, 0))
            return
        if self._watched is not None:
            return
        if self._outcome.plan is None:
            if not is_map_style(loader):
                if self.method.calibration.batch_size is not None:
                    raise CallbackError(
                        f"calibration.batch_size={self.method.calibration.batch_size}: the batches of an iterable data "
                        "set, or of a loader with an iteration of its own, are watched as they come; leave it out"
                    )
                # Keep the first training batches as they go by, then decide.
                self._watched, self._watched_in = [], trainer.current_epoch
                return
            with unlogged(trainer, pl_module):
                self._decide(trainer, pl_module, *self._drawn(trainer, pl_module))
        progress = self._timing.progress(trainer)
        if progress > self._outcome.progress:
            self._outcome = replace(self._outcome, progress=progress)
            self._unmask(pl_module)
            self._mask(pl_module)
            self._report(trainer, pl_module)

    # --- what it is warned about ----------------------------------------------------------------------------------

    def _check_alone(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Whether no other callback prunes the same model."""
        all_: list[Any] = [c for c in trainer.callbacks if isinstance(c, MultiDimPruneCallback)]  # type: ignore[attr-defined]
        mine = _model_at(pl_module, self.submodule)
        for other in all_:
            is_twin = other.submodule == self.submodule or (
                mine is not None and _model_at(pl_module, other.submodule) is mine
            )
            if is_twin and (other is not self or all_.count(self) > 1):
                raise CallbackError(
                    f"two callbacks prune one model (submodule={self.submodule!r} and {other.submodule!r}): give the "
                    "Trainer one of them, or say by submodule= which of several vision transformers each is for; to "
                    "prune further what is slim, call slim_model(module, in_place=True) and fit again"
                )

    def _warn_of_another_origin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Weights that the plan does not belong to, or a plan that is not there."""
        model, plan = find_model(pl_module, self.submodule)[1], self._outcome.plan
        if self._is_restored or self._is_delivered(model) or (plan is None and plan_of(model) is not None):
            return
        words = complaint(
            None if trainer.ckpt_path is None else str(trainer.ckpt_path),
            has_plan=plan is not None,
            is_other=is_other(model, self._left),
            fits=trainer.state.fn == TrainerFn.FITTING,
        )
        if words is not None:
            self._warn_once(words)

    def _warn_of_lost_work(self, trainer: Trainer) -> None:
        saving = trainer.checkpoint_callbacks  # none: that is meant
        if any(isinstance(c, OnExceptionCheckpoint) or getattr(c, "save_on_exception", False) for c in saving):
            return
        if saving:
            self._warn_once(
                "no callback saves a checkpoint when the fit is told to end (SIGTERM, as by a cluster): what was "
                "trained since the last one would be lost; give the Trainer ModelCheckpoint(save_on_exception=True)"
            )

    def _warn_of_another_method(self, pl_module: LightningModule) -> None:
        """The plan of a checkpoint or of an earlier fit stays, whatever is asked for now."""
        model, plan, before = find_model(pl_module, self.submodule)[1], self._outcome.plan, self._outcome.planned_for
        if plan is not None and not self._is_delivered(model) and before != str(self.method):
            share = plan_macs(model, plan, plan.input_size) / macs(model, plan.input_size)
            rank_zero_warn(
                f"what is asked for now ({self.method}) is not looked at: the plan from the checkpoint or the fit "
                f"before, made for {before}, is kept ({share:.1%} of the MACs). For a new plan call callback.reset(), "
                "or fit without ckpt_path"
            )

    def _warn_once(self, words: str) -> None:
        if words not in self._warned:
            self._warned.add(words)
            rank_zero_warn(words)

    # --- which images ---------------------------------------------------------------------------------------------

    def _drawn(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Sequence[Any], Sequence[Any]]:
        """This rank's batches to score on and to judge on, of an own loader over the training data: numbers r,
        r + world, ... of seeded lists."""
        task = self._compression(pl_module)
        loaders, calibration, seed = trainer.train_dataloader, self.method.calibration, self.method.seed
        drawn = calibration_batches(
            loaders,
            calibration,
            seed,
            judged=task.needs_judging,
            least=task.scorer().needs.images,
            say=rank_zero_info,
        )
        shares = [batches.of_rank(trainer.global_rank, trainer.world_size) for batches in drawn]
        scoring, judging = (Remembered(len(share), partial(self._made, trainer, pl_module, share)) for share in shares)
        return scoring, judging

    @staticmethod
    def _made(trainer: Trainer, pl_module: LightningModule, batches: CalibrationBatches, index: int) -> Any:
        """A batch as the module gets it."""
        batch = batches[index]
        with isolated_rng():
            seed_all(batches.seeds[index])  # what hooks draw is the same whichever rank does
            return _to_device(trainer, pl_module, batch)

    def _watch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Keep a training batch; decide when there are enough."""
        assert self._watched is not None
        self._watched.append(move_data_to_device(batch, torch.device("cpu")))
        if self._steps_to_watch is None:
            # Rank 0 says how many, so that all ranks decide at the same step whatever batches they get.
            judged, calibration = self._compression(pl_module).needs_judging, self.method.calibration
            wanted = calibration.images + calibration.judging * judged
            steps = math.ceil(wanted / max(num_images(batch) or 0, 1) / trainer.world_size)
            self._steps_to_watch = trainer.strategy.broadcast(max(steps, 1 + judged), src=0)
        if len(self._watched) == self._steps_to_watch:
            self._decide_watched(trainer, pl_module)

    def _decide_watched(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Of the batches kept so far the first ones are scored on, the last ones judged on."""
        assert self._watched is not None
        batches, self._watched, self._steps_to_watch = self._watched, None, None
        counts = [num_images(batch) or 0 for batch in batches]
        total = sum(counts) * trainer.world_size
        judged = self._compression(pl_module).needs_judging
        calibration = self.method.calibration
        if judged and total < calibration.images + calibration.judging:
            rank_zero_info(calibration.in_words(total))
        wanted = calibration.shares(total, judged=judged)[0] / trainer.world_size
        enough = next(number for number, seen in enumerate(accumulate(counts), start=1) if seen >= wanted)
        scored = min(enough, len(batches) - 1) if judged else enough
        least = self._compression(pl_module).scorer().needs.images
        scoring = on_every_rank(partial(put_together, batches[:scored], least))
        with unlogged(trainer, pl_module):
            self._decide(trainer, pl_module, scoring, batches[scored:])
        self._advance(trainer, pl_module)

    # --- scoring and judging them ---------------------------------------------------------------------------------

    def _run(self, trainer: Trainer, module: nn.Module, batch: Any) -> Any:
        """What the module says about a batch of ours."""
        device = next(module.parameters()).device
        with trainer.precision_plugin.forward_context():
            return self.calibration_step(module, move_data_to_device(batch, device))  # type: ignore[arg-type]

    def _score(self, trainer: Trainer, pl_module: LightningModule, scorer: Scorer, batches: Sequence[Any]) -> None:
        """Show the scorer this rank's batches."""
        if not scorer.needs.images:
            return
        shown = bar("Scoring", len(batches), shown=trainer.progress_bar_callback is not None)
        with evaluating(pl_module), scorer.watching(), shown as advance:
            for batch in batches:
                if not _is_short(scorer, batch):
                    self._observe(trainer, pl_module, scorer, batch)
                advance()

    def _observe(self, trainer: Trainer, pl_module: LightningModule, scorer: Scorer, batch: Any) -> Any:
        return scorer.update(partial(self._run, trainer, pl_module, batch), images_in(batch), labels_in(batch), batch)

    def _try_out_going_by(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Keep training batches until there are enough images to try out."""
        least = self._compression(pl_module).scorer().needs.images
        self._to_try.append(batch)
        if not least or sum(map(images_in, self._to_try)) >= least:
            batches, self._to_try = self._to_try, []
            self._try_out(trainer, pl_module, batch if len(batches) == 1 or not least else joined(batches))

    def _try_out(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Score a batch for nothing: what scoring or judging would refuse, epochs from now, is refused at once."""
        self._is_tried = True
        task = self._compression(pl_module)
        scorer = task.scorer()
        if scorer.needs.images:
            with isolated_rng(), unlogged(trainer, pl_module), evaluating(pl_module), scorer.watching():
                output = self._observe(trainer, pl_module, scorer, batch)
            scorer.warn_of_failure()
            if task.needs_judging:
                float_tensors(output if self.method.prediction is None else self.method.prediction(output))

    def _decide(
        self, trainer: Trainer, pl_module: LightningModule, scoring: Sequence[Any], judging: Sequence[Any]
    ) -> None:
        """Score, search, compensate: from now on there is a plan. All ranks work, rank 0 decides."""
        task, is_quick = self._compression(pl_module), bool(getattr(trainer, "fast_dev_run", False))
        with isolated_rng():
            first = partial(self._run, trainer, pl_module, scoring[0]) if len(scoring) else None
            task = self._task = task.for_images(first)
            searches = task.policy is None and not is_quick
            folder = self._folder = self._search_folder(trainer, pl_module, scoring, judging) if searches else None
            scores = None if folder is None else on_first_rank(folder.scores)
            if scores is None:
                scorer = task.scorer()
                on_every_rank(partial(self._score, trainer, pl_module, scorer, scoring))
                scorer.sum_over_ranks()
                scores = scorer.scores()
                if folder is not None:
                    on_first_rank(partial(folder.keep, scores))
            evaluate = None if task.policy is not None else self._evaluation(trainer, pl_module, judging)
            options = SearchOptions(
                journal=None if folder is None else folder.journal(scores),
                progress=trainer.progress_bar_callback is not None,
                on_trial=self._dashboard.trial,
                say=rank_zero_info,
            )
            plan, found = task.decide(scores, evaluate, options, 1 if is_quick else None)
        told, digest = trainer.strategy.broadcast((plan.to_json(), plan.hash), src=0)
        plan = Plan.from_json(told)
        if plan.hash != digest:
            raise PlanError(
                f"rank {trainer.global_rank} received another plan ({plan.hash}) than rank 0 sent ({digest})"
            )
        moments, scores = scores.moments, scores.with_moments(None)
        self._outcome = Outcome(plan, str(self.method), found, scores)
        if task.compensate != "none":
            # There is nothing left to be judged, so the images that did it serve the refit, too.
            batches = chain(scoring, judging)
            self._compensate(trainer, pl_module, batches, moments if task.compensate == "lstsq" else None)
        costs, budget = CostModel(task.anatomy, task.input_size), None if task.is_given else self.method.budget
        with evaluating(pl_module):
            self._dashboard.decided(Decision(costs, plan, scores, budget, found, first))

    def _evaluation(
        self, trainer: Trainer, pl_module: LightningModule, judging: Sequence[Any]
    ) -> Callable[[nn.Module], float]:
        """What a slim model is worth in the place of the dense one."""
        if self.method.evaluate is not None:
            return partial(_by_the_user, self.method.evaluate, trainer, pl_module, self.submodule)
        judge = _Stoppable(
            trainer, pl_module, judging, partial(self._run, trainer), self.method.prediction, self.submodule
        )
        rank_zero_info(f"MultiDimPruneCallback is {duration_in_words(judge, self.method.n_trials)}")
        return judge

    def _search_folder(
        self, trainer: Trainer, pl_module: LightningModule, *batches: Sequence[Any]
    ) -> SearchFolder | None:
        """Where a search over these weights, options and images is kept; None where files cannot be."""
        root = str(trainer.default_root_dir)
        if "://" in root:
            rank_zero_info(f"{root} is no local folder: the search is not kept, and begins anew if it is killed")
            return None
        images = gather(lambda: [digest_of_batches(share) for share in batches])
        settings = {name: value for name, value in vars(self.method).items() if name != "n_trials"}
        state = {name: value for name, value in pl_module.state_dict().items() if isinstance(value, Tensor)}
        return SearchFolder(Path(root) / "mdc", settings, self.submodule, digest_of(state), images)

    def _compensate(
        self, trainer: Trainer, pl_module: LightningModule, batches: Iterable[Any], moments: Moments | None
    ) -> None:
        """Refit what reads units, in the model and, alike, in the averages of it that callbacks keep: by `moments`, or
        in sequence on the batches."""
        plan = self._outcome.plan
        assert plan is not None
        kinds = (WeightAveraging, StochasticWeightAveraging)
        averages = [c._average_model for c in trainer.callbacks if isinstance(c, kinds)]  # type: ignore[attr-defined]
        averaged = [a.module if isinstance(a, AveragedModel) else a for a in averages if a is not None]
        anatomies = [find_anatomy(module, self.submodule) for module in (pl_module, *averaged)]
        readers = [units.reader for anatomy in anatomies for units in anatomy.all_units]
        tensors = [tensor for reader in readers for tensor in (reader.weight, reader.bias) if tensor is not None]
        self._before = [(tensor, tensor.detach().cpu().clone()) for tensor in tensors]
        if moments is not None:
            for anatomy in anatomies:
                on_every_rank(partial(refit_readers, anatomy, plan, moments))
        else:
            small = self._refitted_in_sequence(trainer, pl_module, anatomies[0].model, plan, batches)
            take_readers(small, plan, *anatomies)
        for tensor in tensors:
            copy_from_first_rank(tensor)

    def _refitted_in_sequence(
        self, trainer: Trainer, pl_module: LightningModule, dense: nn.Module, plan: Plan, batches: Iterable[Any]
    ) -> Anatomy:
        """The slim model, whose layers are refitted on what the module shows it."""
        small = find_anatomy(slim(dense, plan))
        whole = small.model if pl_module is dense else pl_module
        run = partial(self._run, trainer)
        passes = [(partial(run, pl_module, batch), partial(run, whole, batch)) for batch in batches]
        with evaluating(pl_module, small.model), isolated_rng():
            refit_in_sequence(
                find_anatomy(dense),
                small,
                passes,
                standing_in=partial(standing_in, pl_module, dense, small.model),
                over_ranks=True,
                progress=trainer.progress_bar_callback is not None,
            )
        return small

    def _mask(self, pl_module: LightningModule) -> None:
        """Masks on as far as the schedule has got, if a plan is known and they are not on already."""
        outcome = self._shown or self._outcome
        if outcome.plan is None or outcome.progress == 0:
            return
        _, model = find_model(pl_module, self.submodule)
        if is_masked(model) or self._is_delivered(model):
            return
        try:
            apply_masks(pl_module, self._plan_at(outcome, model), self.submodule)
        except (PlanError, PolicyError) as error:
            raise PlanError(f"{error}. To prune another model with this callback, call callback.reset()") from error

    def _plan_at(self, outcome: Outcome, model: nn.Module) -> Plan:
        """What is kept when the schedule has got so far."""
        plan = outcome.plan
        assert plan is not None
        if outcome.progress >= 1 or outcome.scores is None:
            return plan
        final = plan.policy
        ratios = {d: [1 - outcome.progress * (1 - ratio) for ratio in of] for d, of in final.ratios.items()}
        score = (self.method.tokens or TokenOptions()).score
        policy = Policy(**ratios, stages=final.stages, input_size=final.input_size)
        return make_plan(model, outcome.scores, policy, TokenOptions(score, plan.reduction, plan.restore))

    def _unmask(self, pl_module: LightningModule) -> None:
        model = _model_at(pl_module, self.submodule)
        if model is not None:  # else there never was a model of ours; whoever needs one has raised
            remove_masks(model)

    def _is_delivered(self, model: nn.Module) -> bool:
        """Whether `model` is already the slim network of this plan (`slim_model(in_place=True)`)."""
        made_with = plan_of(model)
        return made_with is not None and made_with == self._outcome.plan

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and say what masks keep from this step on."""
        _, model = find_model(pl_module, self.submodule)
        if not is_masked(model):
            return
        self._is_reported, anatomy, plan = True, find_anatomy(model), self._plan_at(self._outcome, model)
        costs = CostModel(anatomy, plan.input_size)
        kept = {d: sum(map(len, plan.kept[d])) / max(sum(sizes), 1) for d, sizes in plan.sizes.items()}
        metrics = {
            "mdc/macs": float(costs.of_plan(plan)),
            "mdc/params": float(costs.params(costs.kept_by_plan(plan))),
            **{f"mdc/keep_{dimension}": ratio for dimension, ratio in kept.items()},
            "mdc/keep_tokens": math.prod(stage.keep for stage in plan.tokens),
        }
        self._dashboard.in_force(metrics, trainer.global_step)
        rank_zero_info(
            f"Pruning {anatomy.name} to {metrics['mdc/macs'] / costs.of_model():.1%} of its MACs for images of "
            f"{costs.size[0]} x {costs.size[1]} pixels: "
            f"{', '.join(f'{ratio:.0%} of {d}' for d, ratio in kept.items())}, "
            f"{metrics['mdc/keep_tokens']:.0%} of tokens at the end"
        )


def _model_at(pl_module: LightningModule, submodule: str | None) -> nn.Module | None:
    """The vision transformer there, if there is one."""
    try:
        return find_model(pl_module, submodule)[1]
    except MdcError:
        return None


def _takes_steps(trainer: Trainer) -> bool:
    """Whether a fit is going on that is not at its end."""
    is_running = trainer.state.fn == TrainerFn.FITTING and trainer.state.status == TrainerStatus.RUNNING
    return is_running and not trainer.fit_loop.done


def _to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """What Lightning does to a training batch before ``training_step``."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)  # the module's hook or the data module's
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


# --- judging ---------------------------------------------------------------------------------------------------------


class _Stoppable(InPlace):
    """Looks, before each trial, whether the Trainer has been told to stop."""

    def __init__(self, trainer: Trainer, *args: Any) -> None:
        super().__init__(*args)
        self._trainer = trainer

    def judge(self, model: nn.Module) -> Judgement:
        _stop_if_told(self._trainer)
        return super().judge(model)


def _stop_if_told(trainer: Trainer) -> None:
    """On all ranks, if one has been: what is in the journal by now is safe."""
    if any(gather(lambda: trainer.received_sigterm)):
        raise SIGTERMException


def _by_the_user(
    evaluate: Callable[[Any], float],
    trainer: Trainer,
    pl_module: LightningModule,
    submodule: str | None,
    model: nn.Module,
) -> float:
    _stop_if_told(trainer)
    dense = find_model(pl_module, submodule)[1]
    with standing_in(pl_module, dense, model) as whole, running_as_written(whole):
        return evaluate(whole)


def _is_short(scorer: Scorer, batch: Any) -> bool:
    """Whether this batch is smaller than those before, where they must be equal."""
    images = num_images(batch)
    if not scorer.needs.equal_batches or images is None or scorer.sums["batches"] == 0:
        return False
    return images != int(scorer.sums["images"] / scorer.sums["batches"])


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


def _remove(handover: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a forked worker, which leaves the file behind for its parent
        handover.unlink(missing_ok=True)
