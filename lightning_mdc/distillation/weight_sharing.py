"""Weight sharing: dense weights trained so that any policy on the budget can be judged with them, before the search.

The paper's ``min_W E_policy[loss(W(policy))]`` (Hou & Kung, arXiv 2201.00043), by the sandwich rule with in-place
distillation of universally slimmable networks (Yu & Huang, arXiv 1903.05134, section 3): each step trains the largest
model, which is the dense one, on the labels, and the smallest and a random policy of the same weights on what the
largest says. All others lie in between, and gain from both ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from lightning_mdc.budget import Budget, LatencyTable
from lightning_mdc.distillation import DistillationModule
from lightning_mdc.distillation.losses import soft_distillation_loss
from lightning_mdc.errors import DistillationError, check_number, check_whole
from lightning_mdc.gp_ei.projection import Projection
from lightning_mdc.importance import Scores
from lightning_mdc.models import find_model, is_compiled
from lightning_mdc.policy import Plan, Policy, Space, TokenOptions
from lightning_mdc.policy_search.policy_space import PolicySpace
from lightning_mdc.surgery import masked
from lightning_mdc.surgery.plan import make_plan

# Policies drawn at once. Numpy's overhead is shared out: for DeiT-S 4 ms a policy, where one alone would take 60.
_DRAWN_AT_ONCE = 64

# What `DistillationModule` does with a teacher from outside; there is none here.
_OF_A_TEACHER = ("teacher", "kd", "kd_weight", "distill_token", "hidden_weight")


class WeightSharingModule(DistillationModule):
    """Trains `model` on ``task + shared_weight · shared``, with ``shared = (smallest + random) / 2``.

    *task* is the dense model's cross entropy to the labels. *smallest* and *random* are distances of the prediction
    under masks from the dense one on the same images, which gets no gradient from it: the dense model is the teacher.
    The smallest policy is the one at the lower end of every axis of `PolicySpace`, and always the same; the random one
    is drawn anew for every update. The fixed scores turn both into plans. Yu & Huang add the two up, where this takes
    their mean; that is ``shared_weight=2``. One backward pass follows the three forward passes, so a step takes the
    activations of all three.

    Logged as ``train/task``, ``train/shared`` and ``train/loss``; ``val/top1`` is the dense model's.

    Random policies come as the search's own random trials do: uniform in the box of `PolicySpace`, then moved onto the
    budget and filled up. Which one it is depends on `seed` and the number of the update alone: all ranks train the same
    one, a resumed run goes on with those of an uninterrupted one, and the batches of an accumulated update share one.
    Lightning divides the loss by the number of those batches, all its parts alike.

    After training, `model` is the ordinary dense model with other weights. A checkpoint holds neither networks nor
    scores: ``WeightSharingModule.load_from_checkpoint(path, model=..., scores=...)``.
    """

    def __init__(
        self,
        model: nn.Module,
        scores: Scores,
        budget: float | Budget | Mapping[str, Any] = 0.6,
        *,
        dimensions: Iterable[str] | None = None,
        space: Space | Mapping[str, Any] | None = None,
        tokens: TokenOptions | Mapping[str, Any] | None = None,
        seed: int = 0,
        shared_weight: float = 1.0,
        temperature: float = 1.0,
        submodule: str | None = None,
        **training: Any,
    ) -> None:
        """
        Args:
            model: the dense model, images (n, in_chans, H, W) -> logits (n, classes).
            scores: of its units; they say which ones a policy keeps, from the first step to the last.
            budget: as in `search`, or the limits of a `Budget` by name.
            dimensions, space, tokens: see `PolicySpace`; the last two also as arguments by name. Take those of the
                search: policies outside them are never asked for.
            seed: of the random policies.
            shared_weight: factor of *shared* in the loss, at least 0.
            temperature: of *shared*, see `soft_distillation_loss`.
            submodule: of the vision transformer in `model`, as an attribute path; None finds it if there is just one.
            training: further arguments of `DistillationModule` (``label_smoothing``, ``optimizer``, ``schedule``,
                ``mixup``, ...), except those about a teacher, ``compile`` and ``grad_checkpointing``.

        Raises:
            DistillationError: a setting is out of range or has no effect here, or the model is compiled or checkpoints
                its gradients.
            BudgetError, SearchError, UnsupportedModelError: see `PolicySpace`.
            CalibrationError: the scores are of another model, or lack a dimension.
        """
        if without_effect := sorted({*training} & {"student", *_OF_A_TEACHER}):
            raise DistillationError(
                f"{', '.join(without_effect)}: no such setting of weight sharing, where the dense model is both student"
                " and teacher; leave it out (its share of the loss is shared_weight)"
            )
        check_whole("seed", seed, 0, DistillationError)
        check_number("shared_weight", shared_weight, "a factor of the loss", DistillationError, least=0)
        # Not by super(): Lightning would find the model and the scores in this call, and keep them in checkpoints.
        DistillationModule.__init__(self, model, None, temperature=temperature, **training)
        _check_masks_can_train(self)
        dimensions = None if dimensions is None else list(dimensions)
        limits = Budget(**budget) if isinstance(budget, Mapping) else budget
        space = Space(**space) if isinstance(space, Mapping) else space
        tokens = TokenOptions(**tokens) if isinstance(tokens, Mapping) else tokens
        self.space = PolicySpace(model, limits, dimensions, space, tokens, submodule=submodule)
        self.scores = scores
        self.seed, self.submodule = seed, submodule
        self.shared_weight = shared_weight
        self._project = Projection(self.space, self.space.constraint)
        self._drawn: tuple[int, np.ndarray] | None = None
        # It needs the scores of every unit that may go.
        self.smallest_plan = self._plan(self.space.policy(self.space.low))

        in_force: dict[str, Any] = self.space.budget.as_dict()
        if isinstance(table := self.space.budget.options.get("table"), LatencyTable):  # another machine has others
            in_force["table"] = json.loads(table.to_json())
        own = {
            "budget": in_force,
            "seed": seed,
            "shared_weight": shared_weight,
            "dimensions": dimensions,
            "submodule": submodule,
        }
        own |= {"space": None if space is None else asdict(space), "tokens": asdict(self.space.tokens)}
        for name in _OF_A_TEACHER:
            self.hparams.pop(name, None)
        self.save_hyperparameters(own)

    def policy(self, step: int) -> Policy:
        """The random policy that update number `step` trains."""
        chunk, index = divmod(step, _DRAWN_AT_ONCE)
        if self._drawn is None or self._drawn[0] != chunk:
            rng = np.random.default_rng([self.seed, chunk])  # its own: the global states are the training's
            points = self._project(rng.random((_DRAWN_AT_ONCE, len(self.space))))
            self._drawn = chunk, self._project.fill(points, rng)
        return self.space.policy(self._drawn[1][index])

    def plan(self, step: int) -> Plan:
        """What of the model the random policy of update number `step` keeps."""
        return self._plan(self.policy(step))

    def _plan(self, policy: Policy) -> Plan:
        return make_plan(self.student, self.scores, policy, self.space.tokens, submodule=self.submodule)

    def loss_parts(self, images: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """The scalars ``task``, ``shared`` and ``loss``; see `DistillationModule.loss_parts`."""
        logits = cast(Tensor, self(images))
        task = self._task_loss(logits, labels)
        distances = []
        for plan in (self.smallest_plan, self.plan(self.global_step)):
            with masked(find_model(self.student, self.submodule)[1], plan):
                masked_logits = cast(Tensor, self(images))
            distances.append(soft_distillation_loss(masked_logits, logits.detach(), self.temperature))
        shared = torch.stack(distances).mean()
        return {"task": task, "shared": shared, "loss": task + self.shared_weight * shared}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        strategy = self.trainer.strategy
        if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise DistillationError(
                f"strategy={type(strategy).__name__} shards parameters, which masks need whole; share weights with"
                " strategy='ddp' or 'auto'"
            )


def _check_masks_can_train(sharing: DistillationModule) -> None:
    """Refuse a model that masks cannot train: they are there in a forward pass only, others in every step."""
    student = sharing.student
    name = type(student).__name__
    if sharing.compile_options is not False or is_compiled(student):
        raise DistillationError(
            f"model={name} is compiled, and would be again in every step, which has masks of its own; share the weights"
            " of the uncompiled model, with compile=False"
        )
    if sharing.grad_checkpointing or any(getattr(part, "grad_checkpointing", False) for part in student.modules()):
        raise DistillationError(
            f"model={name} has gradient checkpointing on, which runs blocks again when their masks are gone; call"
            " set_grad_checkpointing(False), and pass grad_checkpointing=False"
        )
