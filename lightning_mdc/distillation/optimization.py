"""Optimizers and schedules: timm's, checked before training, and with parameter groups that survive wrapping."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import timm.optim
import timm.scheduler
import torch
from torch import nn

from lightning_mdc.errors import DistillationError, check_number

# For weights that are trained already: `recipes.finetune` of the app's settings.
DEFAULT_OPTIMIZER: Mapping[str, Any] = {"opt": "adamw", "lr": 5e-5, "weight_decay": 0.05, "layer_decay": 0.75}
# Without warmup_epochs, one, and at most a fifth of the run.
DEFAULT_SCHEDULE: Mapping[str, Any] = {"sched": "cosine", "warmup_epochs": None, "warmup_lr": 1e-6, "min_lr": 1e-6}

# The length of a run is the Trainer's to say.
_SCHEDULE_KEYS = set(inspect.signature(timm.scheduler.create_scheduler_v2).parameters) - {
    "optimizer",
    "num_epochs",
    "step_on_epochs",
    "updates_per_epoch",
    "plateau_mode",
}

# What FSDP and torch.compile put into the names of parameters.
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")


# Per group: what an optimizer knows of it but its parameters, and the parameters' names.
Groups = list[tuple[dict[str, Any], list[str]]]


def named_groups(model: nn.Module, kwargs: Mapping[str, Any]) -> Groups:
    """The parameter groups that timm makes of `model`, by the parameters' names.

    timm looks at shapes (no weight decay on 1-d parameters), at names (none on what ``no_weight_decay()`` lists, a
    smaller rate in early layers with ``layer_decay``) and at ``requires_grad``. Sharding flattens and renames
    parameters, so the groups are made of the plain model, before a strategy wraps it, and filled later with what became
    of its parameters. `kwargs` are those of ``timm.optim.create_optimizer_v2``.
    """
    names = {id(parameter): name for name, parameter in _plain_names(model).items()}
    optimizer = create("optimizer", timm.optim.create_optimizer_v2, model, kwargs)
    return [
        ({key: value for key, value in group.items() if key != "params"}, [names[id(p)] for p in group["params"]])
        for group in optimizer.param_groups
    ]


def create_optimizer(model: nn.Module, kwargs: Mapping[str, Any], groups: Groups | None) -> torch.optim.Optimizer:
    """The optimizer of what requires a gradient in `model`, which may be wrapped by now.

    `groups` are its `named_groups`; where they name other parameters than it has now, timm is asked anew.
    """
    trained = {name: parameter for name, parameter in _plain_names(model).items() if parameter.requires_grad}
    if groups is None or {name for _, names in groups for name in names} != set(trained):
        groups = named_groups(model, kwargs)
    filled = [{**options, "params": [trained[name] for name in names]} for options, names in groups]
    # Each group has its weight decay; timm's own default is 0 as well where it makes the groups.
    return create("optimizer", timm.optim.create_optimizer_v2, filled, {**kwargs, "weight_decay": 0.0})


def _plain_names(model: nn.Module) -> dict[str, nn.Parameter]:
    named = {}
    for name, parameter in model.named_parameters():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        named[name] = parameter
    return named


def create(argument: str, factory: Any, subject: Any, kwargs: Mapping[str, Any]) -> Any:
    """``factory(subject, **kwargs)``; if it refuses them, a `DistillationError` names the `argument` they are from."""
    try:
        return factory(subject, **kwargs)
    except (TypeError, ValueError, AssertionError) as error:
        raise DistillationError(
            f"{argument}={dict(kwargs)!r} is refused by timm's {factory.__name__}: {error}; correct that keyword"
        ) from error


def create_schedule(optimizer: torch.optim.Optimizer, kwargs: Mapping[str, Any], updates: int, per_epoch: int) -> Any:
    """timm's schedule over so many updates, stepped after each; None for a constant rate."""
    epochs = updates / per_epoch  # may be a fraction: max_steps ends a run in mid-epoch
    length = {"num_epochs": epochs, "updates_per_epoch": per_epoch, "step_on_epochs": False}
    if kwargs["warmup_epochs"] is None:
        length["warmup_epochs"] = min(1, epochs / 5)
    return create("schedule", timm.scheduler.create_scheduler_v2, optimizer, {**kwargs, **length})[0]


def complete_optimizer(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """`optimizer` over `DEFAULT_OPTIMIZER`, if timm knows it and its rate is one; else a `DistillationError`."""
    complete = {**DEFAULT_OPTIMIZER, **optimizer}
    opt, lr = complete["opt"], complete["lr"]
    try:
        timm.optim.get_optimizer_class(opt, bind_defaults=False)
    except (ValueError, AttributeError) as error:
        raise DistillationError(
            f"optimizer opt={opt!r} is unknown to timm; give a name from timm.optim.list_optimizers(), such as 'adamw'"
        ) from error
    if lr is not None:
        check_number("optimizer lr", lr, "a learning rate such as 5e-5", DistillationError, least=0)
    return complete


def complete_schedule(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """`schedule` over `DEFAULT_SCHEDULE`, if timm knows it and it can be stepped after every update; else a
    `DistillationError`."""
    schedule = {**DEFAULT_SCHEDULE, **schedule}
    unknown = sorted(set(schedule) - _SCHEDULE_KEYS)
    if unknown:
        raise DistillationError(
            f"schedule={dict(schedule)!r} has unknown keys {unknown}; known are {sorted(_SCHEDULE_KEYS)}"
            " (the length is the Trainer's max_epochs or max_steps)"
        )
    if schedule["sched"] == "plateau":
        raise DistillationError(
            "schedule sched='plateau' waits for a metric and can't be stepped per update; give 'cosine' or another"
        )
    # timm keeps no list of its schedules to look a name up in; only building one tells, and older releases just return
    # None. A misspelt name should not wait until the data are read. Long enough that no decay_epochs exceeds it.
    nothing = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = create_schedule(nothing, schedule, 10**6, 1)
    if scheduler is None and schedule["sched"] != "none":
        raise DistillationError(f"schedule sched={schedule['sched']!r} is unknown to timm; give 'cosine' or another")
    return schedule
