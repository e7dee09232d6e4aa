"""Save and load a slim (or dense) model as a folder of two files: ``model.safetensors`` and ``config.json``.

Of a module that is more than its vision transformer, the weights of all else are in a third, ``rest.safetensors``.

Nothing is pickled and nothing is imported by a name from the file: the config holds a recipe (constructor arguments of
a known family, and the plan) and facts, for timm's classes in timm's layout. A folder is written beside its place and
moved there whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_mdc.budget import CostModel, num_params
from lightning_mdc.errors import ArtifactError, MdcError, PlanError
from lightning_mdc.files import read_json
from lightning_mdc.models import FAMILIES, Anatomy, Family, check_unmasked, find_anatomy, find_model, unwrap
from lightning_mdc.models.anatomy import brief
from lightning_mdc.models.parts import uninitialised, unloaded
from lightning_mdc.models.swapping import plain_copy
from lightning_mdc.models.timm_hub import (
    ENTRYPOINT,
    FIELDS,
    LABELS,
    RECIPE,
    as_timm_writes_it,
    described,
    is_timms,
    make_known,
    recipe,
)
from lightning_mdc.policy import Plan
from lightning_mdc.randomness import isolated_rng
from lightning_mdc.surgery import plan_of, slim
from lightning_mdc.weights import fitted

log = logging.getLogger(__name__)

WEIGHTS, CONFIG, REST = "model.safetensors", "config.json", "rest.safetensors"
_FORMAT = "lightning_mdc.model.1"
_RENAMES = 20  # before others who are at the same folder are taken for an error
# A batch norm's counter, and where the windows of torchvision's Swin look in their table.
_WHOLE_NUMBERS = (".num_batches_tracked", ".relative_position_index")
_FACTS = {"format", "pretrained_cfg", "cost", "versions", "sha256"}
# Of timm's pretrained_cfg: what says how images are prepared and what the classes mean.
_CFG_KEYS = (
    "architecture",
    "tag",
    "num_classes",
    "input_size",
    "test_input_size",
    "fixed_input_size",
    "interpolation",
    "crop_pct",
    "test_crop_pct",
    "crop_mode",
    "mean",
    "std",
    "label_names",
    "label_descriptions",
    "license",
    "first_conv",
    "classifier",
    "pool_size",
)


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    constructor: bool = True,
    class_names: list[str] | None = None,
    submodule: str | None = None,
) -> None:
    """Write `model` to `directory`, replacing a model that is there.

    Of a module that is more than its vision transformer all weights are written: ``load(directory)`` gives the
    transformer alone, ``load(directory, model=mine)`` all. `submodule` is the transformer's attribute path in `model`;
    None finds it if there is just one.

    Its constructor's arguments are read off the modules and checked by building it again, before anything is written.
    With ``constructor=False`` only plan and weights are kept, for ``load(directory, model=my_dense_model)``.
    `class_names`, in label order, are kept in ``pretrained_cfg``.

    Raises:
        ArtifactError: a part of the model that the constructor cannot express (it is named), a model with masks on, a
            place that cannot be written, or a folder there that holds something else.
    """
    anatomy, target = _savable(model, submodule), _free_folder(directory)
    if (name := uninitialised(model) or unloaded(model)) is not None:
        raise ArtifactError(
            f"model={type(model).__name__}: {name} has no values yet (a lazy module, or on the meta device); call "
            "the model, or load its weights, first"
        )
    plan = plan_of(anatomy.model)
    spec = _describe(anatomy, plan) if constructor else None
    tensors = _written(anatomy.model.state_dict(keep_vars=True))
    costs = CostModel(anatomy)
    cost: dict[str, Any] = {"macs": costs.of_model(), "params": num_params(anatomy.model)}
    if spec is not None and plan is not None:
        dense = find_anatomy(_built(anatomy.family, spec, None))
        cost |= {"dense_macs": CostModel(dense).of_model(), "dense_params": num_params(dense.model)}
    made_of, cfg = recipe(anatomy.family, spec, plan), _pretrained_cfg(anatomy.model, class_names)
    for_timm = spec is not None and is_timms(anatomy.model)
    config: dict[str, Any] = {
        "format": _FORMAT,
        **(as_timm_writes_it(anatomy, made_of, cfg or {}) if for_timm else {**made_of, "pretrained_cfg": cfg}),
        "cost": cost,
        "versions": _versions(),
    }
    rest = _written(_rest(model, anatomy.model))
    about = {"module": type(unwrap(model)).__name__, "submodule": find_model(model, submodule)[0]}
    with _replacing(target) as folder:
        save_file(tensors, str(folder / WEIGHTS), metadata={"format": _FORMAT})
        if rest:
            save_file(rest, str(folder / REST), metadata=about)
        config["sha256"] = _content_hash(config, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _written(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file holds of `state`: each tensor once, by the first of its names, on the CPU, in memory of its own."""
    firsts = _first_names(state)
    found = {name: tensor.detach().cpu() for name, tensor in state.items() if firsts[name] == name}
    memory = Counter(tensor.untyped_storage().data_ptr() for tensor in found.values())
    return {
        name.replace("_orig_mod.", ""): (  # of a block compiled by itself
            tensor.clone(memory_format=torch.contiguous_format)
            if memory[tensor.untyped_storage().data_ptr()] > 1
            else tensor.contiguous()
        )
        for name, tensor in found.items()
    }


def _first_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Of a state with its own parameters and buffers: for each name the first of the same tensor."""
    firsts: dict[int, str] = {}
    return {name: firsts.setdefault(id(tensor), name) for name, tensor in state.items()}


def _tied(model: nn.Module) -> dict[str, str]:
    """Names in the state of `model` that are another's tensor, whose first name is given."""
    firsts = _first_names(model.state_dict(keep_vars=True))
    return {name: first for name, first in firsts.items() if name != first}


def _spread(weights: dict[str, Tensor], ties: Mapping[str, str], folder: Path, kind: str) -> None:
    """Give what a file has by the first of its names to all of them (name -> first name)."""
    for name, first in ties.items():
        if first in weights and not torch.equal(weights.setdefault(name, weights[first]), weights[first]):
            raise ArtifactError(
                f"{folder / WEIGHTS}: {name} and {first} differ, but are one tensor in {kind}; give a model in which "
                "they are two"
            )


def check_savable(model: nn.Module, directory: str | Path) -> None:
    """Refuse what `save` would, without writing anything."""
    anatomy = _savable(model)
    _free_folder(directory)
    _describe(anatomy, plan_of(anatomy.model))


@torch.inference_mode(False)  # as `slim`: what is made in it cannot be trained
def load(directory: str | Path, model: nn.Module | None = None, submodule: str | None = None) -> nn.Module:
    """The model saved in `directory`, on the CPU, in eval mode. Of a module that was more than its vision transformer
    that alone, which is logged.

    With `model`, a dense instance of your own: a copy of it, the vision transformer in it slimmed by the saved plan,
    with the saved weights. Positions are resampled where it takes images of another size; a head of another size stays
    as it is, and so does what is around the transformer if the folder has none of it; both are logged. `submodule` is
    the attribute path of the vision transformer in it; None finds it if there is just one.

    Raises:
        ArtifactError: the folder is missing, incomplete, damaged, edited or not ours; says what and what to do.
    """
    folder = _recovered(_resolved(directory))
    config = _read_config(folder)
    shapes = read_header(folder / WEIGHTS, whole_numbers=model is not None)
    plan = read_plan(_recipe(config))
    try:
        own = None if model is None else find_anatomy(model, submodule).model
        if own is None:
            result = rebuilt(_recipe(config), plan, shapes, folder)
        else:
            _check_like_saved(own, plan, _recipe(config), folder)
            result = plain_copy(own) if plan is None else slim(own, plan)
        if config["sha256"] != _content_hash(config, folder / WEIGHTS):
            raise ArtifactError(
                f"{folder} was changed after it was saved (its content does not match its sha256); get a fresh copy"
            )
        weights: dict[str, Tensor] = dict(load_file(str(folder / WEIGHTS)))
        ties = _tied(result)
        _spread(weights, ties, folder, type(result).__name__)
        if model is not None:
            weights = fitted(result, weights, str(folder / WEIGHTS), ArtifactError)
            like = next(iter(weights.values()))  # a new head is of the others' device and dtype
            weights = {name: weights.get(name, own.to(like)) for name, own in result.state_dict().items()}
        of_result = result.state_dict(keep_vars=True)
        for name, first in ties.items():  # one parameter by both names, so that they stay tied
            if isinstance(of_result[first], nn.Parameter) and not isinstance(weights[first], nn.Parameter):
                weights[first] = nn.Parameter(weights[first], of_result[first].requires_grad)
            weights[name] = weights[first]
        result.load_state_dict(weights, assign=True)
        if model is not None:
            assert own is not None
            _take_tables(result, next(own.parameters()).dtype, _recipe(config), plan)
        else:
            anatomy = find_anatomy(result)
            fresh = partial(_built, anatomy.family, _recipe(config)["constructor"], plan, "cpu")
            anatomy.family.complete(result, fresh)
            _set_pretrained_cfg(result, config)
            if is_timms(result):
                make_known(anatomy, plan)
        if model is None or own is None or unwrap(model) is own:
            _say_if_alone(folder)
        else:
            result = _around(result, own, unwrap(model), folder)
    except ArtifactError:
        raise
    except (MdcError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder} cannot be loaded: {error}") from error
    return result.eval()


def _take_tables(model: nn.Module, before: torch.dtype, recipe: Mapping[str, Any], plan: Plan | None) -> None:
    """Put on the CPU what no file holds; in the precision of the weights, where it had that of the user's own model."""
    saved, dtype = model.state_dict(), next(model.parameters()).dtype
    tables = {name: each for name, each in model.named_buffers(remove_duplicate=False) if name not in saved}
    fresh: dict[str, Tensor] = {}
    if dtype != before and recipe["constructor"] is not None and tables:  # what was rounded once stays so
        fresh = dict(_built(find_anatomy(model).family, recipe["constructor"], plan, "cpu").named_buffers())
    for name, table in tables.items():
        if table.dtype == before != dtype:
            again = fresh.get(name, table)
            table = (again if again.shape == table.shape else table).to(dtype)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, table.cpu())


def _check_like_saved(own: nn.Module, plan: Plan | None, recipe: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model of other blocks, heads or neurons than that which was saved had when it was dense."""
    anatomy = find_anatomy(own)
    sizes: Mapping[str, tuple[int, ...]] = {} if plan is None else plan.sizes
    if plan is None and recipe["constructor"] is not None:
        saved = find_anatomy(rebuilt(recipe, None, None, folder))
        sizes = saved.sizes if saved.family is anatomy.family else {}
    for dimension, counts in sizes.items():
        if counts != anatomy.sizes[dimension]:
            was, is_ = (f"{len(of)} blocks of {brief(of)} {dimension}" for of in (counts, anatomy.sizes[dimension]))
            slimmed = ", and is slim already" if plan_of(own) is not None else ""
            raise ArtifactError(
                f"{folder} was saved of a model with {was}, before any left; model={anatomy.name} has {is_}{slimmed}: "
                "give a dense model built as that one was, or leave model= out"
            )


def _savable(model: nn.Module, submodule: str | None = None) -> Anatomy:
    anatomy = find_anatomy(model, submodule)
    check_unmasked(
        anatomy.model, ArtifactError, "the dense weights would be saved, without them", "save mdc.slim(model, plan)"
    )
    return anatomy


def _rest(module: nn.Module, transformer: nn.Module) -> dict[str, Tensor]:
    """What `module` has beside its vision transformer: every tensor once, by its first name."""
    seen = {id(tensor) for tensor in transformer.state_dict(keep_vars=True).values()}
    rest = {}
    for name, tensor in unwrap(module).state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            rest[name.replace("_orig_mod.", "")] = tensor
    return rest


def _around(loaded: nn.Module, own: nn.Module, module: nn.Module, folder: Path) -> nn.Module:
    """A copy of `module` with `loaded` in the place of `own`, its vision transformer, and with the saved rest."""
    old, new = own.state_dict(keep_vars=True), loaded.state_dict(keep_vars=True)
    shared = {id(tensor): new[name] for name, tensor in old.items() if name in new}  # with what is around it
    whole = plain_copy(module, {id(own): loaded, **shared})
    kind, expected = type(whole).__name__, _rest(whole, loaded)
    if not (folder / REST).is_file():
        if expected:
            log.warning("  %s has a vision transformer alone: the rest of %s stays as it is", folder, kind)
        return whole
    saved = load_file(str(folder / REST))
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (expected, saved)]
    if shapes[0] != shapes[1]:
        differing = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
        raise ArtifactError(
            f"{folder / REST} does not fit {kind}: {', '.join(differing[:3])} is missing, unknown or of another shape; "
            "give a module built like the one that was saved, or take its vision transformer alone, without model="
        )
    tensors = {
        id(tensor): nn.Parameter(saved[name]) if isinstance(tensor, nn.Parameter) else saved[name]
        for name, tensor in expected.items()
    }
    # By all names: what is tied stays tied.
    by_name = {n: tensors[id(t)] for n, t in whole.state_dict(keep_vars=True).items() if id(t) in tensors}
    whole.load_state_dict(by_name, strict=False, assign=True)
    return whole


def _say_if_alone(folder: Path) -> None:
    if (folder / REST).is_file():
        with safe_open(str(folder / REST), framework="pt") as file:
            of = file.metadata()
        log.warning(
            "  %s: of the %s that was saved, its vision transformer %s alone; load(directory, model=mine) gives all",
            *(folder, of["module"], of["submodule"]),
        )


def load_skeleton(directory: str | Path) -> nn.Module:
    """The model saved in `directory` on the meta device, without its weights: what it is made of and what it costs.

    Raises:
        ArtifactError: as `load`, but weights that were changed are not noticed.
    """
    folder = _recovered(_resolved(directory))
    config = _read_config(folder)
    return rebuilt(_recipe(config), read_plan(_recipe(config)), read_header(folder / WEIGHTS), folder).eval()


# --- building again ---------------------------------------------------------------------------------------------------


def _describe(anatomy: Anatomy, plan: Plan | None) -> dict[str, Any]:
    """Constructor arguments that are known to give this model, because they just did (on the meta device)."""
    advice = (
        "save(model, directory, constructor=False) keeps plan and weights; get them back with "
        "load(directory, model=my_dense_model)"
    )
    if ties := _tied(anatomy.model):
        name, first = next(iter(ties.items()))
        raise ArtifactError(
            f"{anatomy.name} cannot be expressed by constructor arguments: {name} and {first} are one tensor, and "
            f"would be two. {advice}"
        )
    try:
        spec = described(anatomy, plan)
        again = _built(anatomy.family, spec, plan)
    except Exception as error:
        raise ArtifactError(
            f"{anatomy.name} cannot be expressed by constructor arguments: {error}. {advice}"
        ) from error
    difference = _difference(anatomy.model, again)
    if difference:
        raise ArtifactError(f"{anatomy.name} cannot be expressed by constructor arguments: {difference}. {advice}")
    return spec


def _built(family: Family, spec: Mapping[str, Any], plan: Plan | None, device: str = "meta") -> nn.Module:
    """The dense or slim model; on the meta device nothing is allocated until shapes are known to match a file."""
    with torch.device(device), isolated_rng():
        model = family.build(spec)
        return model if plan is None else slim(model, plan)


def _difference(model: nn.Module, again: nn.Module) -> str | None:
    """The first part in which `again` is not built like `model`, in words."""
    parts, rebuilt = _parts(model), _parts(again)
    for name in [*parts, *(n for n in rebuilt if n not in parts)]:
        if name not in rebuilt:
            return f"{name} is a {parts[name][0]}, which the rebuilt model does not have"
        if name not in parts:
            return f"{name} is missing, the rebuilt model has a {rebuilt[name][0]} there"
        kind, what, own = parts[name]
        other_kind, other_what, other = rebuilt[name]
        if what != other_what:  # the class is enough, if what it prints is the same
            is_, would_be = (f"{k}({shown})" for k, (_, shown) in ((kind, what), (other_kind, other_what)))
            if is_ == would_be:
                is_, would_be = what[0], other_what[0]
            return f"{name or 'the model'} is {is_}, the rebuilt one would be {would_be}"
        for key in [*own, *(key for key in other if key not in own)]:
            if own.get(key) != other.get(key):
                at = f"{name}.{key}" if name else key
                return f"{at} is {own.get(key)!r:.80}, in the rebuilt one it would be {other.get(key)!r:.80}"
    return None


def _parts(model: nn.Module) -> dict[str, tuple[str, Any, dict[str, Any]]]:
    """By name: class, what it computes (its forward, printed settings), and shapes of its own tensors, and settings."""
    parts = {}
    for name, module in model.named_modules(remove_duplicate=False):
        module = unwrap(module)
        tensors = {
            n: tuple(t.shape)
            for n, t in (module._parameters | module._buffers).items()
            if t is not None and n not in _STATE
        }
        simple = {
            key: tuple(value) if isinstance(value, list) else value  # either says the same to a constructor
            for key, value in vars(module).items()
            if _is_simple(value) and not key.startswith("_") and key not in _STATE
        }
        what = (type(module).forward.__qualname__, module.extra_repr())
        parts[name] = (type(module).__qualname__, what, tensors | simple)
    return parts


def _is_simple(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(part, (int, float, str)) for part in value)
    return isinstance(value, (int, float, str, tuple))


# Attributes that say how a model runs just now, or how it was once initialised; not how it is built.
_STATE = {
    "training",
    "fused_attn",
    "grad_checkpointing",
    "gradient_checkpointing",
    "name_or_path",
    "distilled_training",
    "weight_init_mode",
    "fix_init",
    "init_values",
    "strict_img_size",
    "target_shift_size",
    "shift_size",  # which transformers' Swin sets by what it is shown
    "head_init_scale",
    "flatten",
    "rel_indices",
}


def rebuilt(
    recipe: Mapping[str, Any], plan: Plan | None, shapes: Mapping[str, tuple[int, ...]] | None, folder: Path
) -> nn.Module:
    """The model of a recipe in `folder` on the meta device; `shapes` are those of its weights, None if not at hand.

    Raises:
        ArtifactError: the recipe has none, or says something else than `save` writes or than the weights are.
    """
    spec = recipe["constructor"]
    if spec is None:
        raise ArtifactError(
            f"{folder} was saved without a constructor; build the dense model yourself and pass load(..., model=it)"
        )
    family = next((f for f in FAMILIES if f.name == recipe["family"]), None)
    if family is None or not isinstance(spec, dict):
        raise ArtifactError(
            f"{folder / CONFIG}: family {recipe['family']!r} is unknown; known: {', '.join(f.name for f in FAMILIES)}"
        )
    try:
        if shapes is not None:
            family.check_spec(spec, shapes)
        result = _built(family, spec, plan)
    except Exception as error:
        reason = error if isinstance(error, ArtifactError) else f"its constructor arguments give no model ({error})"
        raise ArtifactError(f"{folder / CONFIG}: {reason}") from error
    if shapes is not None:
        _check_shapes(result, shapes, folder)
    return result


def _check_shapes(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    ties = _tied(model)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in ties}
    missing, extra = sorted(set(expected) - set(shapes)), sorted(set(shapes) - set(expected))
    if missing or extra:
        raise ArtifactError(f"{folder / WEIGHTS} does not fit its config: missing {missing[:3]}, unknown {extra[:3]}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ArtifactError(f"{folder / WEIGHTS}: {name} has shape {shapes[name]}, its config says {shape}")


# --- reading and writing ----------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is no folder; pass the folder that mdc.save wrote")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder} has no {name}; it is not (or not all of) a model saved by mdc.save")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be parsed ({error}); get a fresh copy of the folder") from error
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        format = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ArtifactError(
            f"{path}: format {format!r} is not {_FORMAT!r}; it is no model of ours, or of a newer version"
        )
    timms = "architecture" in config
    fields = _FACTS | set(FIELDS if timms else RECIPE) | (set(LABELS) & set(config) if timms else set())
    if set(config) != fields:
        raise ArtifactError(f"{path}: fields {sorted(set(config) ^ fields)} are missing or unknown")
    types: dict[str, Any] = {
        "pretrained_cfg": dict if timms else (dict, type(None)),
        "cost": dict,
        "versions": dict,
        "sha256": str,
        **({"model_args": dict} if timms else {}),
    }
    for name, kind in types.items():
        if not isinstance(config[name], kind):
            raise ArtifactError(f"{path}: field {name} has the wrong type ({type(config[name]).__name__})")
    if timms and (config["architecture"], set(config["model_args"])) != (ENTRYPOINT, set(RECIPE)):
        raise ArtifactError(f"{path}: expected architecture {ENTRYPOINT!r} and model_args {', '.join(RECIPE)}")
    return config


def _recipe(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the model is made of: for timm it lies in ``model_args``."""
    recipe: Mapping[str, Any] = config.get("model_args", config)
    return recipe


def read_header(path: Path, *, whole_numbers: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes by name, without reading a weight. Somebody's own model may have buffers of `whole_numbers`."""
    try:
        with safe_open(str(path), framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            weights = [s for name, s in slices.items() if not name.endswith(_WHOLE_NUMBERS)]
            odd = {s.get_dtype() for s in weights} - {"F64", "F32", "F16", "BF16"}
            if odd and not whole_numbers:
                raise ArtifactError(f"{path} holds {', '.join(sorted(odd))} tensors; a model's are floating-point")
            return {name: tuple(s.get_shape()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is damaged or no safetensors file ({error}); get a fresh copy") from error


def read_plan(recipe: Mapping[str, Any]) -> Plan | None:
    """The plan of a recipe; None if it is of a dense model.

    Raises:
        ArtifactError: it is none.
    """
    if recipe["plan"] is None:
        return None
    try:
        return Plan.from_json(json.dumps(recipe["plan"]))
    except PlanError as error:
        raise ArtifactError(f"{CONFIG}: {error}") from error


def _content_hash(config: Mapping[str, Any], weights: Path) -> str:
    """SHA-256 over the files of weights and all of the config but the hash itself."""
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    if (rest := weights.with_name(REST)).is_file():
        with rest.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    unsigned = {key: value for key, value in config.items() if key != "sha256"}
    digest.update(json.dumps(unsigned, sort_keys=True).encode())
    return digest.hexdigest()


def _resolved(directory: Any) -> Path:
    if not isinstance(directory, (str, os.PathLike)):
        raise ArtifactError(f"directory is a {type(directory).__name__}: expected the path of a folder")
    return Path(directory).resolve()


def _free_folder(directory: str | Path) -> Path:
    """`directory` without links, if a model may be written there: nothing of somebody else's would be lost."""
    target = _resolved(directory)
    if target.exists() and not target.is_dir():
        raise ArtifactError(f"directory={str(directory)!r} is a file; give a folder")
    names = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if names and (names - {REST} != {CONFIG, WEIGHTS} or not _is_ours(target / CONFIG)):
        raise ArtifactError(
            f"directory={str(directory)!r} holds something else ({', '.join(sorted(names)[:3])}); give an empty or new "
            "folder: what is in it would be replaced"
        )
    return target


def _is_ours(config: Path) -> bool:
    fields = read_json(config)
    return isinstance(fields, dict) and str(fields.get("format")).startswith("lightning_mdc.model.")


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A folder to write into, moved to `target` when all is written. A kill leaves the old model or the new one.

    A folder cannot be swapped in one step everywhere: between two renames the old one lies at `_previous`, where `load`
    finds it (`_recovered`).
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _recovered(target)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ArtifactError(f"directory={str(target)!r} cannot be written: {error}") from error
    try:
        yield folder
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        # Made private while unfinished; who may read it is for the user's umask to say, as with any new file.
        mode = (folder / CONFIG).stat().st_mode
        for path in folder.iterdir():
            path.chmod(mode)
        folder.chmod(mode | (mode & 0o444) >> 2)  # whoever may read may look inside
        _put_in_place(folder, target)
        shutil.rmtree(_previous(target), ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"directory={str(target)!r} cannot be written: {error}; what was there is kept") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _recovered(target)


def _put_in_place(folder: Path, target: Path) -> None:
    """Others who save there, or load and put back what they find to be missing, may come in between: then again."""
    for left in reversed(range(_RENAMES)):
        try:
            if target.is_dir():
                shutil.rmtree(_previous(target), ignore_errors=True)
                target.rename(_previous(target))
            folder.rename(target)
        except OSError as error:
            if not left or error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise
        else:
            return


def _recovered(target: Path) -> Path:
    """`target`, put back if a save was killed between taking the old model away and putting the new one there."""
    if not target.exists():
        with suppress(OSError):  # there is nothing to put back, or another process was first
            _previous(target).rename(target)
    return target


# --- facts ------------------------------------------------------------------------------------------------------------


def _pretrained_cfg(model: nn.Module, class_names: list[str] | None) -> dict[str, Any] | None:
    cfg = getattr(model, "pretrained_cfg", None)
    if cfg is not None and not isinstance(cfg, dict):
        cfg = vars(cfg)
    known = {key: cfg[key] for key in _CFG_KEYS if cfg.get(key) is not None} if cfg else {}
    if class_names is not None:
        known["label_names"] = list(class_names)
    try:
        return json.loads(json.dumps(known)) if known else None
    except TypeError as error:
        raise ArtifactError(f"pretrained_cfg holds something that is no JSON: {error}") from error


def _set_pretrained_cfg(model: nn.Module, config: Mapping[str, Any]) -> None:
    cfg = config["pretrained_cfg"]
    if "architecture" in config:  # where timm has them while a model lives
        cfg = cfg | {key: config[key] for key in ("architecture", "num_classes", *LABELS) if key in config}
    if cfg is not None:
        cfg = {key: tuple(value) if key in ("mean", "std", "input_size") else value for key, value in cfg.items()}
        model.pretrained_cfg = model.default_cfg = cfg  # type: ignore[assignment]


def _versions() -> dict[str, str]:
    versions = {}
    for package in ("lightning-mdc", "torch", "timm", "safetensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a source tree without an install
            continue
    return versions
