"""The decoder of a recipe: its shape completed from the weights that it starts from, and what cannot be trained on them refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from longtrain.errors import CheckpointError, PlanError
from longtrain.models.config import ModelConfig
from longtrain.models.config_json import CONFIG, read_config
from longtrain.models.pretrained import open_pretrained
from longtrain.models.rope import kind_of, make_scaling
from longtrain.recipe.model import ModelSection, RopeKind
from longtrain.recipe.presets import fetch_commands
from longtrain.recipe.schema import Recipe

# Fields that the weights decide. What else config.json says, a recipe may replace: that is how a context is extended.
FIXED = (
    "family",
    "vocab_size",
    "hidden_size",
    "layers",
    "heads",
    "kv_heads",
    "head_dim",
    "intermediate_size",
    "max_positions",
    "norm_eps",
    "tied_embeddings",
)
FREE = ("rope_theta", "window", "init_std", "rope_scaling")
OWN = ("dropout", "attention_dropout")
"""What the recipe alone says: it belongs to the training, not to the weights."""
PICKLED, SAFE = {".bin", ".pt", ".pth", ".ckpt"}, ".safetensors"
"""How files of weights end."""


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with the whole shape of its decoder. Where `model.init` is a folder, what the recipe leaves open is read from its
    config.json, and the rest compared; a recipe that leaves nothing open can be planned without the folder.

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
            raise PlanError(
                f"model.init: there is no folder {folder} (relative to {Path.cwd()}); put a Hugging Face folder there, or "
                f"set model.preset or {', '.join(f'model.{name}' for name in model.missing)} to plan without it"
            )
        return recipe
    try:
        config = read_config(folder)
        _refuse_pickles(folder, config)
    except CheckpointError as error:
        raise CheckpointError(f"model.init: {error}") from None
    stored = _section_values(config)
    given = {name: getattr(model, name) for name in model.model_fields_set}
    differing = [name for name in FIXED if given.get(name) is not None and given[name] != stored[name]]
    if differing:
        lines = "\n".join(f"  model.{name}: {given[name]} in the recipe, {stored[name]} in {CONFIG}" for name in differing)
        raise PlanError(f"model.init: the recipe is not that of the weights in {folder}:\n{lines}\ndelete these from the recipe")
    values = given | {name: stored[name] for name in FIXED} | {name: stored[name] for name in FREE if name not in given}
    try:
        completed = ModelSection(**values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in ("model", *first["loc"]))
        raise CheckpointError(f"model.init: {folder / CONFIG}: no recipe can say this: {field}: {first['msg']}") from None
    return recipe.model_copy(update={"model": completed})


def check_init(recipe: Recipe) -> None:
    """Raises PlanError where `model.init` is not there, with what brings it."""
    init = recipe.model.init
    if init is not None and not Path(init).exists():
        commands = "".join(f"\n  {command}" for command in fetch_commands(recipe.model.preset, init))
        get = f"get it with{commands}" if commands else "put a Hugging Face folder with its weights there"
        raise PlanError(f"model.init: there is no folder {init} (relative to {Path.cwd()}); {get}")


def _refuse_pickles(folder: Path, config: ModelConfig) -> None:
    """As training does. A folder that holds no weights yet can be planned."""
    kinds = {path.suffix for path in folder.iterdir()}
    if kinds & PICKLED and SAFE not in kinds:
        open_pretrained(folder, config)


def _section_values(config: ModelConfig) -> dict[str, Any]:
    """Fields of ModelSection."""
    values: dict[str, Any] = {name: getattr(config, name) for name in (*FIXED, *FREE)}
    scaling = config.rope_scaling
    numbers = {} if scaling is None else {"kind": kind_of(scaling)} | {k: v for k, v in vars(scaling).items() if k != "length"}
    return values | {"rope_scaling": numbers}


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
    )


def _known(value: int | None) -> int:
    assert value is not None, "a recipe with nothing missing has every number"
    return value
