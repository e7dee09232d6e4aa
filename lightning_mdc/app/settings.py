"""What the settings of ``train.py`` may be: the type of each, and its range where the type allows too much.

Defaults are in ``conf/``, and so is what a setting means. Mappings that are handed on as keyword arguments stay open:
whoever takes them refuses what is wrong.
"""

# ruff: noqa: RUF009 (what is called makes a `dataclasses.field`)

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from lightning_mdc.app.recipes import completed
from lightning_mdc.errors import ConfigError
from lightning_mdc.policy import TOKEN_SCORES, Space, TokenOptions
from lightning_mdc.policy_search.held_out import METRICS
from lightning_mdc.surgery import COMPENSATIONS

Settings = Mapping[str, Any]


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The settings as nested dicts, interpolations resolved, every value of its type and in its range; optimizer and
    schedule of each training as they are in force.

    Raises:
        ConfigError: an unknown key, or a value that is missing, wrong, or refers to something that is not there.
    """
    try:
        typed = OmegaConf.merge(OmegaConf.structured(_Settings), cfg)
        settings: Any = OmegaConf.to_container(typed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}=??? has to be given, e.g. {error.full_key}=VALUE") from error
    except ConfigKeyError as error:
        section = str(error.full_key).rpartition(".")[0]
        known = ", ".join(f"{section}.{each.name}".strip(".") for each in fields(error.object_type))  # type: ignore[arg-type]
        raise ConfigError(f"there is no setting {error.full_key!r}; there are {known}") from error
    except ValidationError as error:
        raise _refused(str(error.full_key).partition("[")[0], cfg) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key} cannot be worked out: {str(error).splitlines()[0]}") from error
    for key, allowed in _ALLOWED.items():
        if (value := OmegaConf.select(typed, key)) is not None and not allowed.accepts(value):
            raise _refused(key, cfg)
    return completed(settings)


def may_be(key: str) -> bool:
    """Whether there may be a setting `key`, if only in a mapping that is handed on: ``dense.optimizer.layer_decay``."""
    try:
        OmegaConf.merge(OmegaConf.structured(_Settings), OmegaConf.from_dotlist([f"{key}=null"]))
    except ConfigKeyError:
        return False
    except OmegaConfBaseException:  # null is no value of it
        return True
    return True


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every single setting, ``("search.n_trials", 60)``; an empty group is a value."""
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{key}.")
        else:
            yield key, value


def policy_space(settings: Settings, **of_a_search: Any) -> Space:
    """Where the settings let policies lie."""
    options = {name: settings["policy"][name] for name in ("min_heads", "min_neurons", "round_to")}
    return Space(**options, stages=settings["surgery"]["stages"], **of_a_search)


def token_options(settings: Settings) -> TokenOptions | None:
    """What the settings say happens at a token stage; None: nothing but the default."""
    surgery = settings["surgery"]
    options = TokenOptions(surgery["token_score"], surgery["reduction"], surgery["restore"])
    return None if options == TokenOptions() else options


def _refused(key: str, cfg: DictConfig) -> ConfigError:
    allowed = _ALLOWED.get(key, _Allowed(_MAPPING))  # what is not listed is within a recipe
    return ConfigError(f"{key}={OmegaConf.select(cfg, key)!r}: expected {allowed.expected}")


@dataclass(frozen=True)
class _Allowed:
    """What a setting has to be, for the message, and whether a value of its type is in its range; null always is."""

    expected: str
    accepts: Callable[[Any], bool] = lambda _: True


_MAPPING = "a mapping {KEY: VALUE}"


def _limited(expected: str, accepts: Callable[[Any], bool]) -> Any:
    return field(metadata={"allowed": _Allowed(expected, accepts)})


def _whole(least: int, or_null: str = "") -> Any:
    return _limited(f"a whole number of at least {least}{or_null}", lambda value: value >= least)


def _one_of(*names: str, or_null: str = "") -> Any:
    return _limited(f"one of {', '.join(names)}{or_null}", lambda value: value in names)


def _different(least: int, fewest: int = 1) -> Any:
    return _limited(
        f"a list of different whole numbers of at least {least}, such as [1,2]{'' if fewest else ' or []'}",
        lambda values: len(set(values)) == len(values) >= fewest and all(value >= least for value in values),
    )


def _ratios(or_null: str = "") -> Any:
    return _limited(
        f"a list of keep ratios from 0 to 1, such as [0.5,0]{or_null}",
        lambda ratios: len(ratios) > 0 and all(0 <= ratio <= 1 for ratio in ratios),
    )


# --- the sections, in the order of conf/train.yaml --------------------------------------------------------------------


@dataclass(kw_only=True)
class _PerDimension:
    heads: Any
    neurons: Any
    tokens: Any


@dataclass(kw_only=True)
class _Policy:
    kind: str = _one_of("searched", "uniform")
    file: str | None
    keep: _PerDimension
    dimensions: Any
    min_heads: int
    min_neurons: int
    round_to: int | None


@dataclass(kw_only=True)
class _Search:
    n_trials: int = _whole(1)
    n_initial_points: int = _whole(1)
    metric: str = _one_of("auto", *METRICS)
    images: int = _whole(1)
    batch_size: int = _whole(1)
    groups: Any
    token_ratio: str
    bounds: _PerDimension
    warm_start: str | None


@dataclass(kw_only=True)
class _Rates:
    optimizer: dict[str, Any]
    schedule: dict[str, Any]


@dataclass(kw_only=True)
class _Recipe:
    dense: _Rates
    sharing: _Rates
    distillation: _Rates


@dataclass(kw_only=True)
class _Training(_Rates):
    epochs: int = _whole(0)
    label_smoothing: float
    recipe: str


@dataclass(kw_only=True)
class _Dense(_Training):
    mixup: dict[str, Any] | None
    compile: Any
    grad_checkpointing: bool


@dataclass(kw_only=True)
class _Sharing(_Training):
    shared_weight: float
    temperature: float


@dataclass(kw_only=True)
class _Distillation(_Dense):
    teacher: str | None
    teacher_checkpoint: str | None
    teacher_args: dict[str, Any]
    teacher_precision: Any
    teacher_compile: Any
    teacher_normalization: Any
    ema_decay: float | None = _limited("a number between 0 and 1, or null", lambda value: 0 < value < 1)
    kd: str | None
    kd_weight: float
    distill_token: bool | None
    hidden_weight: float
    temperature: float
    seeds: list[int] = _different(least=0)
    reference_seeds: list[int] = _different(least=0, fewest=0)


@dataclass(kw_only=True)
class _Calibration:
    images: int = _whole(1)
    batch_size: int = _whole(1)


@dataclass(kw_only=True)
class _Healing:
    epochs: int = _whole(0)
    images: int = _whole(1)
    lr: float = _limited("a learning rate above 0", lambda value: value > 0)


@dataclass(kw_only=True)
class _Sensitivity(_Calibration):
    heads: list[float] | None = _ratios(", or null for every number of heads")
    neurons: list[float] = _ratios()
    tokens: list[float] = _ratios()


@dataclass(kw_only=True)
class _Latency:
    batch_sizes: list[int] = _different(least=1)
    rounds: int = _whole(1)


@dataclass(kw_only=True)
class _Model:
    name: str | None
    pretrained: bool
    checkpoint: str | None
    args: dict[str, Any]


@dataclass(kw_only=True)
class _Surgery:
    token_score: str | None = _one_of(*TOKEN_SCORES, or_null=", or null")
    reduction: str
    restore: bool | None
    stages: list[int] | None
    compensate: str = _one_of(*COMPENSATIONS)


@dataclass(kw_only=True)
class _Settings:
    name: str
    runs: str
    stage: Any
    skip: Any
    resume: bool | str = _limited("true, false or the folder of an earlier run", lambda _: True)
    seed: int = _whole(0)
    threads: int | None = _whole(1, ", or null for one per core")
    checkpoint_minutes: float | None = _limited("a number of minutes above 0, or null", lambda value: value > 0)
    debug: bool
    budget: Any
    policy: _Policy
    search: _Search
    recipes: dict[str, _Recipe]
    dense: _Dense
    sharing: _Sharing
    calibration: _Calibration
    healing: _Healing
    sensitivity: _Sensitivity
    latency: _Latency
    model: _Model
    data: dict[str, Any]
    importance: dict[str, Any]
    surgery: _Surgery
    distillation: _Distillation
    trainer: dict[str, Any]
    logger: dict[str, Any] = field(default_factory=dict)  # logger=[] leaves no group


def _allowed(section: type, prefix: str = "") -> Iterator[tuple[str, _Allowed]]:
    """What is allowed for every setting, by dotted key."""
    hints = get_type_hints(section)
    for setting in fields(section):
        key, hint = f"{prefix}{setting.name}", hints[setting.name]
        expected = _MAPPING if is_dataclass(hint) else str(setting.type).replace("None", "null")
        yield key, setting.metadata.get("allowed") or _Allowed(expected)
        if is_dataclass(hint):
            yield from _allowed(hint, f"{key}.")  # type: ignore[arg-type]


_ALLOWED = dict(_allowed(_Settings))
