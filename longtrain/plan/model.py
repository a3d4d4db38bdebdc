"""The decoder of a recipe: its shape completed from the weights that it starts from, and what cannot be trained on them refused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from longtrain.errors import CheckpointError, PlanError
from longtrain.models.config import ModelConfig
from longtrain.models.config_json import CONFIG, read_config
from longtrain.models.families import family_of
from longtrain.models.pretrained import open_pretrained
from longtrain.models.rope import kind_of, make_scaling
from longtrain.recipe.model import FIXED, HiddenAct, ModelSection, RopeKind, RopeScalingSection
from longtrain.recipe.presets import PRESETS, how_to_get
from longtrain.recipe.schema import Recipe
from longtrain.recipe.section import CONFLICT, as_written

FREE = ("rope_theta", "window", "init_std", "rope_scaling")
"""What a recipe may replace of what config.json says: that is how a context is extended."""
PICKLED, SAFE = {".bin", ".pt", ".pth", ".ckpt"}, ".safetensors"
"""How files of weights end."""


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with the whole shape of its decoder. Where `model.init` is a folder, what the recipe itself leaves open is read
    from its config.json, whatever a preset says, and the rest compared, the preset's shape too; a recipe that leaves nothing open
    can be planned without the folder.

    Raises:
        PlanError: the recipe contradicts the weights, or leaves something open and the folder is not there.
        CheckpointError: config.json is damaged or of a model that is not implemented, or all weights beside it are pickles.
    """
    model = recipe.model
    if model.init is None:
        return recipe
    folder = Path(model.init)
    if not folder.exists():
        if model.missing:
            raise PlanError(f"{_absent(model)}\n(`longtrain plan` does without where model.preset, or the whole shape, is set)")
        return recipe
    try:
        config = read_config(folder)
        _refuse_pickles(folder, config)
    except CheckpointError as error:
        raise CheckpointError(f"model.init: {error}") from None
    stored = _section_values(config)
    given = {name: getattr(model, name) for name in model.model_fields_set}
    _compare(model, given, stored)
    scaling = given.get("rope_scaling")
    if scaling is not None and "kind" not in scaling.model_fields_set:
        given["rope_scaling"] = stored["rope_scaling"] | _numbers(scaling, stored["rope_scaling"]["kind"])
    values = given | {name: stored[name] for name in FIXED if stored[name] is not None}
    values |= {name: stored[name] for name in FREE if name not in given}
    try:
        completed = ModelSection(**values)
    except ValidationError as error:
        raise _refusal(error, given, folder / CONFIG) from None
    return recipe.model_copy(update={"model": completed})


def _refusal(error: ValidationError, given: Mapping[str, Any], config: Path) -> PlanError | CheckpointError:
    """What is wrong with the completed shape, laid to the recipe where that says the field."""
    first = error.errors()[0]
    path, message = [str(part) for part in first["loc"]], first["msg"]
    if first["type"] == CONFLICT:
        conflict = first.get("ctx", {})["conflicts"][0]
        path, message = [*path, conflict.field], conflict.message
    field = ".".join(["model", *path])
    if path[0].partition(".")[0] in given:
        return PlanError(f"{field}: {config}: {message}")
    return CheckpointError(f"model.init: {config}: no recipe can say this: {field}: {message}")


def _compare(model: ModelSection, given: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raises PlanError where what is given, or filled in by the preset, is not that of the weights."""
    # the export of longer training has more positions than the preset
    filled = {name: getattr(model, name) for name in PRESETS.get(model.preset or "", {}) if name != "max_positions"}
    stated = filled | dict(given)
    # what the family lacks is a conflict of the completed shape
    differing = [name for name in FIXED if None not in (stated.get(name), stored[name]) and stated[name] != stored[name]]
    if not differing:
        return
    of_preset = [name for name in differing if name not in given]
    lines = [
        f"  model.{name}: {as_written(stated[name])} in {'the preset' if name in of_preset else 'the recipe'}, "
        f"{as_written(stored[name])} in {CONFIG}"
        for name in differing
    ]
    said = [name for name in differing if name in given]
    advice = ["delete what the recipe, the one that it extends or --set says of these"] if said else []
    advice += [f"{model.preset} is another model: set model.preset to that of the weights, or to null"] if of_preset else []
    # told where the first of them stands
    blamed = f"model.{said[0]}" if said else "model.init"
    raise PlanError("\n".join([f"{blamed}: the recipe is not that of the weights in {model.init}:", *lines, *advice]))


def _numbers(scaling: RopeScalingSection, kind: str) -> dict[str, Any]:
    """What a recipe says of a scaling without its kind. Raises PlanError where that is not for `kind`, which the weights have."""
    if scaling.kind != kind:
        raise PlanError(
            f"model.rope_scaling: its numbers change those of the preset, which are for kind {scaling.kind}, but {CONFIG} of "
            f"model.init has kind {kind}; set model.rope_scaling.kind too"
        )
    return {name: getattr(scaling, name) for name in scaling.model_fields_set}


def check_init(recipe: Recipe) -> None:
    """Raises PlanError where `model.init` is not there, with what brings it."""
    init = recipe.model.init
    if init is not None and not Path(init).exists():
        raise PlanError(_absent(recipe.model))


def _absent(model: ModelSection) -> str:
    assert model.init is not None
    return f"model.init: there is no folder {model.init} (relative to {Path.cwd()}); {how_to_get(model.preset, model.init)}"


def replaced(recipe: Recipe) -> Iterator[str]:
    """What the recipe says in the place of the config.json of `model.init`, where that is there. recipe: resolved."""
    config = Path(recipe.model.init or "") / CONFIG
    if recipe.model.init is None or not config.is_file():
        return
    used, stored = _free_values(model_config(recipe)), _free_values(read_config(config.parent))
    for name in used:
        # of another kind of scaling the kind alone is told, and the numbers that both have
        if name in stored and used[name] != stored[name]:
            said, theirs = as_written(used[name]), as_written(stored[name])
            yield f"model.{name}: {said} in the recipe, {theirs} in {config}: the recipe's is used"


def _free_values(config: ModelConfig) -> dict[str, Any]:
    """What a recipe may replace, by its path below `model`."""
    values = _section_values(config)
    scaling = {f"rope_scaling.{name}": value for name, value in values["rope_scaling"].items()}
    return {name: values[name] for name in FREE if name != "rope_scaling"} | scaling


def unseen_positions(recipe: Recipe) -> str | None:
    """What to say where the rotary weights of `model.init` meet more positions than they know, and the recipe stretches them less.

    recipe: resolved. Positions are relative, so that a window bounds them. A theta that the recipe changes is taken for enough.
    """
    model, length = recipe.model, recipe.training.sequence_length
    known, wanted = model.max_positions, min(length, model.window or length)
    if model.init is None or known is None or family_of(model_config(recipe)).positions != "rotary":
        return None
    there = (Path(model.init) / CONFIG).is_file()
    stored = _section_values(read_config(Path(model.init))) if there else PRESETS.get(model.preset or "", {})
    before, scaling = RopeScalingSection(**stored.get("rope_scaling", {})), model.rope_scaling
    if model.rope_theta != stored.get("rope_theta", 10000.0 if stored else model.rope_theta) or scaling.kind is RopeKind.DYNAMIC:
        return None
    unstretched = before.original_length or known / (before.factor or 1)
    reach = known if scaling == before else (scaling.original_length or unstretched) * (scaling.factor or 1)
    if wanted <= reach:
        return None
    stretched = "" if scaling == before else f", {reach:,.0f} with model.rope_scaling {scaling.kind}"
    return (
        f"the weights of model.init know {known:,} positions{stretched}; those beyond, up to {wanted:,}, are new to them: set "
        f"model.rope_scaling with a factor of {math.ceil(wanted / unstretched)} or more, or a higher model.rope_theta"
    )


def _refuse_pickles(folder: Path, config: ModelConfig) -> None:
    """As training does. A folder that holds no weights yet can be planned."""
    kinds = {path.suffix for path in folder.iterdir()}
    if kinds & PICKLED and SAFE not in kinds:
        open_pretrained(folder, config)


def _section_values(config: ModelConfig) -> dict[str, Any]:
    """Fields of ModelSection; None: the family has no such thing."""
    values: dict[str, Any] = {name: getattr(config, name) for name in (*FIXED, *FREE)}
    if family_of(config).mlp != "gated":
        values["hidden_act"] = None
    scaling = config.rope_scaling
    kind = "none" if scaling is None else kind_of(scaling)
    numbers = {} if scaling is None else {name: value for name, value in vars(scaling).items() if name != "length"}
    return values | {"rope_scaling": {"kind": kind} | numbers}


def model_config(recipe: Recipe) -> ModelConfig:
    """The decoder that a resolved recipe describes. Raises PlanError where it cannot be built or cannot see the sequence."""
    model, length = recipe.model, recipe.training.sequence_length
    if model.missing:
        raise PlanError(f"model.{model.missing[0]}: is not known; set it, or model.preset, or a model.init that is there")
    scaling = model.rope_scaling
    kind = scaling.kind
    numbers = scaling.model_dump(exclude={"kind"})
    return ModelConfig(
        family=str(model.family),
        vocab_size=_known(model.vocab_size),
        hidden_size=_known(model.hidden_size),
        layers=_known(model.layers),
        heads=_known(model.heads),
        kv_heads=_known(model.key_value_heads),
        head_dim=_known(model.dim_per_head),
        intermediate_size=_known(model.intermediate_size),
        max_positions=max(model.max_positions or length, length),
        rope_theta=model.rope_theta,
        rope_scaling=None if kind is RopeKind.NONE else make_scaling(kind.value, length, **numbers),
        norm_eps=model.norm_eps,
        tied_embeddings=model.tied_embeddings,
        window=model.window,
        init_std=model.init_std,
        dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        hidden_act=str(model.hidden_act or HiddenAct.SILU),
    )


def _known(value: int | None) -> int:
    assert value is not None, "a recipe with nothing missing has every number"
    return value
