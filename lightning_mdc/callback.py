"""`MultiDimPruneCallback`: when to observe, decide and apply, inside anybody's ``Trainer.fit``."""

from __future__ import annotations

import math
import os
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_mdc.artifact import check_savable, save
from lightning_mdc.budget import Budget, CostModel, macs, policy_macs
from lightning_mdc.compression import Compression, Method, duration_in_words
from lightning_mdc.distributed import copy_from_first_rank, gather, on_every_rank, on_first_rank
from lightning_mdc.errors import (
    CalibrationError,
    CallbackError,
    MdcError,
    PlanError,
    PolicyError,
    check_one_of,
    check_whole,
)
from lightning_mdc.figures.dashboard import Dashboard
from lightning_mdc.figures.decision import Decision
from lightning_mdc.importance import Criterion, Moments, Scorer, Scores
from lightning_mdc.importance.calibration import (
    Calibration,
    Remembered,
    calibration_batches,
    is_map_style,
    num_images,
)
from lightning_mdc.models import Anatomy, evaluating, find_anatomy, find_model, put_in_place, standing_in
from lightning_mdc.policy import Plan, Policy, Space, TokenOptions
from lightning_mdc.policy_search.closeness import float_tensors
from lightning_mdc.policy_search.driver import SearchOptions, SearchResult, digest_of
from lightning_mdc.policy_search.folder import SearchFolder, digest_of_batches
from lightning_mdc.policy_search.held_out import InPlace, Judgement, running_as_written
from lightning_mdc.prediction import plain
from lightning_mdc.progress import bar
from lightning_mdc.randomness import isolated_rng, rng_state, seed_all, set_rng_state
from lightning_mdc.surgery import apply_masks, is_masked, plan_of, remove_masks, slim
from lightning_mdc.surgery.compensation import refit_readers, take_readers
from lightning_mdc.surgery.plan import make_plan
from lightning_mdc.surgery.sequential import refit_in_sequence

_STATE_FORMAT = 1


class MultiDimPruneCallback(Callback):
    """Prunes the vision transformer in a LightningModule while it trains, and hands it over physically smaller.

    At the start of fit it scores heads, neurons and token positions on a seeded sample of the training data, searches
    how much each block gives up under the budget, puts reversible masks on, and refits the layers that read what
    leaves, so that what stays makes up for it. Masks are on in training, validation, test and predict, and off when the
    Trainer is done. `slim_model` then gives the small network. The plan lives in the checkpoint: a resumed run goes on
    with it, without scoring or searching again. The module's own weights and keys never change shape.

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
            ``Calibration()``. In batches of the training loader's size, unless it says another.
        compensate: ``"sequential"`` and ``"lstsq"`` refit, once, by least squares, the weights that read units; see
            `slim`. ``"none"`` leaves them. None: ``"sequential"``, but ``"none"`` with ``schedule="cubic"``. An
            optimizer that has state by then keeps it.
        n_trials: how many policies are tried; None: 40.
        evaluate: what the module is worth with a slim model in place, higher is better, instead of closeness; called
            as ``evaluate(pl_module)``, in eval mode and without gradients, by all ranks.
        schedule: ``"one-shot"`` masks all at `start`; ``"cubic"`` goes there gradually until `end`, fast first
            (Zhu & Gupta 2017), always from the same scores, never compounding.
        start, end: when, in `unit`; `end` defaults to two thirds of the training.
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
        policy: str | Path | Policy = "searched",
        criterion: str | Criterion = "conditional",
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
        prediction: Callable[[Any], Tensor] | None = None,
        seed: int = 0,
        restore_rng: bool = False,
        save_to: str | Path | None = None,
    ) -> None:
        super().__init__()
        _check_types(restore_rng=restore_rng, submodule=submodule, save_to=save_to)
        _check_schedule(schedule, start, end, unit)
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
        self.schedule, self.start, self.end, self.unit = schedule, start, end, unit
        self.submodule, self.restore_rng = submodule, restore_rng
        self.save_to = None if save_to is None else Path(save_to)
        # Spawned workers cannot give attributes back; rank 0 leaves the outcome in this file.
        self._handover = Path(tempfile.gettempdir()) / f"lightning_mdc-{uuid.uuid4().hex}.pt"
        weakref.finalize(self, _remove, self._handover, os.getpid())
        self._restores_rng_now = False
        self._is_tried = False
        self._has_warned_of_lost_work = False
        self._dashboard = Dashboard(())
        self.reset()

    def reset(self) -> None:
        """Forget scores, policy and plan: the next fit starts over. Weights stay as they are."""
        self._scores: Scores | None = None
        self._search: SearchResult | None = None
        self._plan: Plan | None = None
        self._planned_for: str | None = None  # the budget, in words
        self._task: Compression | None = None  # the method on this fit's model
        self._progress = 0.0
        self._watched: list[Any] | None = None  # batches of an iterable data set, while they are collected
        self._watched_in = 0  # the epoch
        self._steps_to_watch: int | None = None
        self._folder: SearchFolder | None = None  # of the search of this fit
        self._before: list[tuple[Tensor, Tensor]] | None = None  # what compensation changed, with its dense values
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

    @property
    def search(self) -> SearchResult | None:
        """How the policy was searched for; None before, and where it was not."""
        self._collect_handover()
        return self._search

    def slim_model(self, pl_module: LightningModule, in_place: bool = False) -> nn.Module:
        """The physically slim vision transformer of `pl_module`, a plain module.

        With ``in_place=True`` it also takes the dense one's place in `pl_module` (uncompiled), to go on training. What
        makes up for what left is in the weights by now.

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

        # A checkpoint's state comes after this. Its random states have to be back before optimizers are configured:
        # asking there how long training is makes Lightning start the loaders.
        self._restores_rng_now = self.restore_rng and stage == "fit" and trainer.world_size == 1
        self._dashboard = Dashboard(trainer.loggers)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What could be refused after hours of training is refused now.
        self._task = None  # the model may be another than in the last fit
        self._is_tried = False
        if self._plan is None or isinstance(self.method.policy, Policy):
            self._compression(pl_module)
        if self.save_to is not None and trainer.is_global_zero:
            check_savable(find_model(pl_module, self.submodule)[1], self.save_to)
        if self.schedule == "cubic":
            self._schedule_end(trainer)
        self._mask(trainer, pl_module)
        self._warn_of_another_budget(pl_module)
        self._warn_of_lost_work(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._advance(trainer, pl_module)

    on_train_epoch_start = on_train_start

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._watched is not None:
            self._watch(trainer, pl_module, batch)
        elif self._plan is None and not self._is_tried:  # of an iterable data set, before `start`
            self._try_out(trainer, pl_module, batch)
        if self.unit == "step":
            self._advance(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._before = None  # see `undo_compensation`

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A finite stream begins anew: what was seen once must not be judged on, too.
        if self._watched and self._watched_in == trainer.current_epoch:
            self._decide_watched(trainer, pl_module)  # at the end of the last epoch, too: weights and masks go together

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mask(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._plan is None and not getattr(trainer, "fast_dev_run", False):
            rank_zero_warn(
                f"fit ended before anything was pruned: start={self.start} ({self.unit}s) was not reached, or an "
                "iterable data set ended before enough images had gone by"
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
        if trainer.is_global_zero and self._folder is not None:
            self._folder.clear()

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
            "planned_for": self._planned_for,
            "search": None if self._search is None else self._search.to_json(),
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
            self._plan, self._planned_for = Plan.from_json(state_dict["plan"]), state_dict["planned_for"]
        if state_dict["search"] is not None:
            self._search = SearchResult.from_json(state_dict["search"])
        if state_dict["scores_facts"]:
            self._scores = Scores.from_parts(state_dict["scores"], state_dict["scores_facts"])
        self._progress = state_dict["progress"]
        if self._restores_rng_now and state_dict["rng"] is not None:
            set_rng_state(state_dict["rng"])

    def _collect_handover(self) -> None:
        if self._handover.is_file():
            self.load_state_dict(torch.load(self._handover, weights_only=True))

    # --- observe, decide, apply -----------------------------------------------------------------------------------

    def _compression(self, pl_module: LightningModule) -> Compression:
        """The method on this model. Made once a fit: for a latency budget it may measure."""
        if self._task is None:
            self._task = Compression(self.method, pl_module, self.submodule, say=rank_zero_info)
        return self._task

    def _advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        now = trainer.current_epoch if self.unit == "epoch" else trainer.global_step
        loader = trainer.train_dataloader
        if now < self.start:
            if self._plan is None and not self._is_tried and is_map_style(loader):
                with isolated_rng():
                    batch = calibration_batches(loader, self.method.calibration, self.method.seed)[0][0]
                self._try_out(trainer, pl_module, _to_device(trainer, pl_module, batch))
            return
        if self._watched is not None:
            return
        if self._plan is None:
            if not is_map_style(loader):
                if self.method.calibration.batch_size is not None:
                    raise CallbackError(
                        f"calibration.batch_size={self.method.calibration.batch_size}: the batches of an iterable data "
                        "set are watched as they come; leave it out"
                    )
                # Keep the first training batches as they go by, then decide.
                self._watched, self._watched_in = [], trainer.current_epoch
                return
            self._decide(trainer, pl_module, *self._drawn(trainer, pl_module))
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

    def _warn_of_lost_work(self, trainer: Trainer) -> None:
        saving = trainer.checkpoint_callbacks  # none: that is meant
        if any(isinstance(c, OnExceptionCheckpoint) or getattr(c, "save_on_exception", False) for c in saving):
            return
        if saving and not self._has_warned_of_lost_work:
            self._has_warned_of_lost_work = True
            rank_zero_warn(
                "no callback saves a checkpoint when the fit is told to end (SIGTERM, as by a cluster): what was "
                "trained since the last one would be lost; give the Trainer ModelCheckpoint(save_on_exception=True)"
            )

    def _warn_of_another_budget(self, pl_module: LightningModule) -> None:
        """The plan of a checkpoint or of an earlier fit stays, whatever budget is asked for now."""
        _, model = find_model(pl_module, self.submodule)
        if self._plan is None or isinstance(self.method.policy, Policy) or self._is_delivered(model):
            return
        if self._planned_for != str(self.method.budget):
            share = policy_macs(model, self._plan.policy) / macs(model)
            rank_zero_warn(
                f"the budget asked for now ({self.method.budget}) is not looked at: the plan from the checkpoint or "
                f"the fit before is kept ({share:.1%} of the MACs). For a new plan call callback.reset(), or fit "
                "without ckpt_path"
            )

    # --- which images ---------------------------------------------------------------------------------------------

    def _drawn(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Sequence[Any], Sequence[Any]]:
        """This rank's batches to score on and to judge on, of an own loader over the training data: numbers r,
        r + world, ... of seeded lists."""
        task = self._compression(pl_module)
        loaders, calibration, seed = trainer.train_dataloader, self.method.calibration, self.method.seed
        drawn = calibration_batches(loaders, calibration, seed, judged=task.needs_judging, say=rank_zero_info)
        world, rank = trainer.world_size, trainer.global_rank

        def made(batches: Sequence[Any], index: int) -> Any:
            number = rank + world * index
            seed_all(self.method.seed + number)  # random augmentation is the same whichever rank draws it
            return _to_device(trainer, pl_module, batches[number])

        shares = [Remembered(len(range(rank, len(all_), world)), partial(made, all_)) for all_ in drawn]
        return shares[0], shares[1]

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
        self._decide(trainer, pl_module, batches[:scored], batches[scored:])
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
        said: list[Any] = []

        def run() -> Any:
            said[:] = [self._run(trainer, pl_module, batch)]
            return said[0]

        labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
        scorer.update(run, num_images(batch) or 0, labels if isinstance(labels, Tensor) else None, batch)
        return said[0]

    def _try_out(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Score a batch for nothing: what scoring or judging would refuse, epochs from now, is refused at once."""
        self._is_tried = True
        task = self._compression(pl_module)
        scorer = task.scorer()
        if scorer.needs.images:
            with isolated_rng(), evaluating(pl_module), scorer.watching():
                output = self._observe(trainer, pl_module, scorer, batch)
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
            plan, self._search = task.decide(scores, evaluate, options, 1 if is_quick else None)
        told, digest = trainer.strategy.broadcast((plan.to_json(), plan.hash), src=0)
        plan = Plan.from_json(told)
        if plan.hash != digest:
            raise PlanError(
                f"rank {trainer.global_rank} received another plan ({plan.hash}) than rank 0 sent ({digest})"
            )
        self._scores, self._plan, self._planned_for = scores.with_moments(None), plan, str(self.method.budget)
        if task.compensate != "none":
            self._compensate(trainer, pl_module, scoring, scores.moments if task.compensate == "lstsq" else None)
        costs, budget = CostModel(task.anatomy, task.input_size), None if task.is_given else self.method.budget
        with evaluating(pl_module):
            self._dashboard.decided(Decision(costs, plan, self._scores, budget, self._search, first))

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
        return SearchFolder(Path(root) / "mdc", settings, self.submodule, digest_of(pl_module.state_dict()), images)

    def _compensate(
        self, trainer: Trainer, pl_module: LightningModule, batches: Sequence[Any], moments: Moments | None
    ) -> None:
        """Refit what reads units, in the model and, alike, in the averages of it that callbacks keep: by `moments`, or
        in sequence on the batches."""
        plan = self._plan
        assert plan is not None
        averaged = [
            other._average_model.module
            for other in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(other, WeightAveraging) and other._average_model is not None
        ]
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
        self, trainer: Trainer, pl_module: LightningModule, dense: nn.Module, plan: Plan, batches: Sequence[Any]
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
        tokens = replace(self.method.tokens, reduction=self._plan.reduction, restore=self._plan.restore)
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
