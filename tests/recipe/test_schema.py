from collections.abc import Iterator
from enum import StrEnum
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from longtrain.recipe import guards, model, parallel, schema, zero
from longtrain.recipe.model import ROPE_NUMBERS, ModelSection, RopeKind
from longtrain.recipe.parallel import Layout
from longtrain.recipe.schema import OptimizerSection, Recipe
from longtrain.recipe.section import Section

MODEL = {"family": "llama", "vocab_size": 64, "hidden_size": 32, "layers": 2, "heads": 4, "intermediate_size": 48}
TRAINING = {"sequence_length": 64, "steps": 100, "batch_size": 8, "precision": "fp32", "activations": "none"}
REQUIRED = {"name": "tiny", "model": MODEL, "data": {"path": "data"}, "training": TRAINING, "optimizer": {"lr": 1e-3}}
DEFAULTS = {
    "seed": 0,
    "device": "auto",
    "output": None,
    "model.preset": None,
    "model.init": None,
    "model.family": None,
    "model.vocab_size": None,
    "model.hidden_size": None,
    "model.layers": None,
    "model.heads": None,
    "model.kv_heads": None,
    "model.head_dim": None,
    "model.intermediate_size": None,
    "model.hidden_act": None,
    "model.max_positions": None,
    "model.rope_theta": 10000.0,
    "model.norm_eps": 1e-5,
    "model.tied_embeddings": False,
    "model.window": None,
    "model.init_std": 0.02,
    "model.dropout": 0.0,
    "model.attention_dropout": 0.0,
    "model.positions.extend": "refuse",
    "model.rope_scaling.kind": "none",
    "model.rope_scaling.factor": None,
    "model.rope_scaling.original_length": None,
    "model.rope_scaling.low_freq_factor": None,
    "model.rope_scaling.high_freq_factor": None,
    "model.rope_scaling.beta_fast": None,
    "model.rope_scaling.beta_slow": None,
    "model.rope_scaling.attention_factor": None,
    "model.rope_scaling.mscale": None,
    "model.rope_scaling.mscale_all_dim": None,
    "model.rope_scaling.short_factor": None,
    "model.rope_scaling.long_factor": None,
    "data.path": None,
    "data.sources": None,
    "data.long_documents": "keep",
    "data.corpus": None,
    "data.tokenizer": None,
    "training.micro_batch_size": 1,
    "training.max_skipped": 20,
    "training.fused": "auto",
    "attention.kernel": "auto",
    "parallel.dp": "auto",
    "parallel.cp": 1,
    "parallel.tokens_per_rank": 16384,
    "parallel.ulysses": 1,
    "parallel.layout": "zigzag",
    "optimizer.betas": [0.9, 0.95],
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.1,
    "optimizer.grad_clip": 1.0,
    "schedule.kind": "cosine",
    "schedule.warmup_steps": 0,
    "schedule.decay_steps": None,
    "schedule.final_ratio": 0.1,
    "zero.stage": 1,
    "zero.offload": "none",
    "zero.deepspeed": None,
    "checkpoint.every": 500,
    "checkpoint.keep": 3,
    "checkpoint.on_failure": "go_on",
    "guards.spike_deviations": 6.0,
    "guards.spike_window": 100,
    "guards.on_spike": "report",
    "guards.on_max_skipped": "stop",
    "guards.max_roll_backs": 3,
    "guards.watchdog_seconds": 1800.0,
    "evaluation.every": None,
    "evaluation.sequences": 8,
    "tracking.every": 1,
    "tracking.tensorboard": False,
    "tracking.wandb": "disabled",
    "tracking.project": "longtrain",
    "tracking.entity": None,
    "tracking.group": None,
    "tracking.tags": [],
}


def walk(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, info in section.model_fields.items():
        yield prefix + name, info
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from walk(info.annotation, f"{prefix}{name}.")


FIELDS = dict(walk())
LEAVES = {path: info for path, info in FIELDS.items() if not any(other.startswith(f"{path}.") for other in FIELDS)}


def build(**changes: Any) -> Recipe:
    """A valid recipe with some fields changed; `a__b` is the field b of section a."""
    values: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in REQUIRED.items()}
    for path, value in changes.items():
        section, _, name = path.rpartition("__")
        target = values
        for part in section.split("__") if section else ():
            target = target.setdefault(part, {})
        target[name] = value
    return Recipe.model_validate(values)


def set_leaf(path: str, value: Any) -> Recipe:
    return build(**{path.replace(".", "__"): value})


def resolved(recipe: Recipe, path: str) -> Any:
    value: Any = recipe.model_dump(mode="json")
    for name in path.split("."):
        value = value[name]
    return value


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_is_described(path: str) -> None:
    description = FIELDS[path].description
    assert description is not None, path
    assert len(description) > 3
    assert description.endswith(".")
    assert description[0].isupper()


CHOICES = {
    path: info.annotation
    for path, info in LEAVES.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, StrEnum)
} | {"model.family": model.Family, "model.hidden_act": model.HiddenAct}


def test_every_enum_of_the_schema_is_a_choice_of_a_field() -> None:
    named = [value for module in (schema, model, parallel, zero, guards) for value in vars(module).values()]
    enums = {value for value in named if isinstance(value, type) and issubclass(value, StrEnum)}
    assert set(CHOICES.values()) == enums - {StrEnum}


@pytest.mark.parametrize(("path", "member"), [(path, member) for path, enum in CHOICES.items() for member in enum])
def test_every_choice_is_explained_and_accepted_as_text(path: str, member: StrEnum) -> None:
    assert member.value in (LEAVES[path].description or "")
    extra = {"schedule__decay_steps": 5} if member.value == "wsd" else {}
    if path == "model.rope_scaling.kind":
        extra = {f"model__rope_scaling__{name}": number_of(name) for name in ROPE_NUMBERS[RopeKind(member)][0]}
    if path == "model.positions.extend":
        extra = {"model__family": "opt"}
    assert resolved(build(**{path.replace(".", "__"): member.value}, **extra), path) == member.value


def number_of(name: str) -> Any:
    """A value that every kind of scaling takes."""
    return [2.0, 3.0, 4.0, 5.0] if name in ("short_factor", "long_factor") else 4


def test_defaults_are_those_of_the_reference() -> None:
    assert {path for path, info in LEAVES.items() if not info.is_required()} == set(DEFAULTS)
    recipe = build()
    # with the shape left open: a family fills in the activation of its gate
    bare = build(model={"init": "weights"})
    for path, value in DEFAULTS.items():
        if path not in ("model.init", "data.path"):
            assert resolved(bare if path.startswith("model.") else recipe, path) == value, path
    assert bare.model.model_dump(mode="json") == ModelSection(init="weights").model_dump(mode="json")
    assert bare.model.missing == ("family", "vocab_size", "hidden_size", "layers", "heads", "intermediate_size")


@pytest.mark.parametrize("path", [path for path, info in FIELDS.items() if info.is_required()])
def test_required_fields_are_required(path: str) -> None:
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in REQUIRED.items()}
    section, _, name = path.rpartition(".")
    del (values[section] if section else values)[name]
    with pytest.raises(ValidationError, match="Field required"):
        Recipe.model_validate(values)


def kinds(info: FieldInfo) -> set[type]:
    """The plain types a field may hold."""

    def flat(annotation: Any) -> Iterator[Any]:
        if isinstance(annotation, type):
            yield annotation
        for inner in get_args(annotation):
            yield from flat(inner)

    return set(flat(info.annotation))


WHOLE = [path for path, info in LEAVES.items() if int in kinds(info)]
LISTS = ["optimizer.betas", "data.sources", "model.rope_scaling.short_factor", "model.rope_scaling.long_factor"]
REAL = [path for path, info in LEAVES.items() if float in kinds(info) and path not in LISTS]
TEXT = [path for path, info in LEAVES.items() if str in kinds(info) and path != "tracking.tags"]


def test_the_mechanical_lists_cover_the_schema() -> None:
    assert len(WHOLE) >= 18
    assert set(REAL) >= {"optimizer.lr", "optimizer.eps", "optimizer.grad_clip", "model.rope_theta", "schedule.final_ratio"}
    assert set(TEXT) >= {"name", "output", "data.path", "model.init", "model.preset"}


@pytest.mark.parametrize("path", WHOLE)
@pytest.mark.parametrize("value", [True, "1", 1.0, -1, 2**63, [1], float("nan")])
def test_whole_numbers_are_strict_and_bounded(path: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        set_leaf(path, value)


@pytest.mark.parametrize("path", REAL)
@pytest.mark.parametrize("value", [True, "1", -1.0, float("nan"), float("inf"), -float("inf"), [1.0]])
def test_numbers_are_strict_and_finite(path: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        set_leaf(path, value)


@pytest.mark.parametrize("path", REAL)
def test_whole_numbers_serve_as_numbers(path: str) -> None:
    *_, section, name = path.split(".")
    kind = (
        next((kind for kind, (needed, more) in ROPE_NUMBERS.items() if name in needed | more), None)
        if section == "rope_scaling"
        else None
    )
    extra = {"model__rope_scaling__kind": kind.value} if kind else {}
    if kind:
        if name == "high_freq_factor":
            extra["model__rope_scaling__low_freq_factor"] = 0.5
        others = {"mscale", "mscale_all_dim"} if "mscale" in name else set()
        extra |= {f"model__rope_scaling__{needed}": number_of(needed) for needed in ROPE_NUMBERS[kind][0] | others}
    whole = 0 if name.endswith("dropout") else 1
    value = resolved(build(**extra | {path.replace(".", "__"): whole}), path)
    assert value == float(whole)
    assert type(value) is float


@pytest.mark.parametrize("path", TEXT)
@pytest.mark.parametrize("value", [1, True, "", "  ", "a\nb", "a\0b", ["a"], b"a"])
def test_texts_are_strict_and_printable(path: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        set_leaf(path, value)


@pytest.mark.parametrize("betas", [[0.9, 1], [1, 0.9], [-0.1, 0.9], [0.9, float("nan")], [0.9], [0.9, 0.9, 0.9], [True, 0], "ab"])
def test_betas_are_two_numbers_below_one(betas: Any) -> None:
    with pytest.raises(ValidationError):
        build(optimizer__betas=betas)


@pytest.mark.parametrize("name", ["My", "a b", "a/b", "..", ".hidden", "-a", "_a", "é", "a\n"])
def test_names_that_make_bad_folders_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="lower-case"):
        build(name=name)


@pytest.mark.parametrize("name", ["a", "7b", "llama-7b_32k.v2"])
def test_names_name_the_run_folder(name: str) -> None:
    assert build(name=name).run_folder == f"runs/{name}"
    assert build(name=name, output="elsewhere").run_folder == "elsewhere"


def test_recipes_are_frozen() -> None:
    recipe = build()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        recipe.model.layers = 1
    assert hash(recipe) == hash(build())


def test_unknown_keys_are_refused_in_every_section() -> None:
    for section in [path for path in FIELDS if path not in LEAVES]:
        with pytest.raises(ValidationError, match="Extra inputs"):
            set_leaf(f"{section}.stepz", 1)
    with pytest.raises(ValidationError, match="Extra inputs"):
        build(stepz=1)


def test_head_counts_and_sizes_are_derived() -> None:
    model = ModelSection.model_validate(MODEL)
    assert (model.key_value_heads, model.dim_per_head) == (4, 8)
    model = ModelSection.model_validate({**MODEL, "kv_heads": 2, "head_dim": 64})
    assert (model.key_value_heads, model.dim_per_head) == (2, 64)


def test_a_gate_is_activated_by_silu_where_nothing_is_said() -> None:
    """So that a checkpoint from before there was a choice goes on under a recipe that names silu."""
    for preset in ({}, {"preset": "llama-7b"}, {"preset": "qwen2-7b"}):
        shape = preset or MODEL
        unsaid = ModelSection.model_validate(shape)
        assert unsaid.hidden_act == "silu"
        assert "hidden_act" not in unsaid.model_fields_set, "weights may say otherwise"
        for said in ("silu", None):
            assert ModelSection.model_validate({**shape, "hidden_act": said}).model_dump() == unsaid.model_dump()
    assert ModelSection.model_validate({"preset": "opt-125m"}).hidden_act is None
    assert ModelSection.model_validate({**MODEL, "hidden_act": "gelu"}).hidden_act == "gelu"


def test_sections_can_be_built_from_values_of_python() -> None:
    assert build(parallel__layout=Layout.STRIPED).parallel.layout is Layout.STRIPED
    assert OptimizerSection(lr=1, betas=(0, 0.5)).betas == (0.0, 0.5)


CONFLICTS = [
    ({"model__heads": 5}, "heads"),
    ({"model__heads": 5, "model__head_dim": 8}, None),
    ({"model__head_dim": 7}, "head_dim"),
    ({"model__hidden_size": 12}, "heads"),
    ({"model__kv_heads": 3}, "kv_heads"),
    ({"model__kv_heads": 8}, "kv_heads"),
    ({"model__kv_heads": 1}, None),
    ({"model__hidden_act": "silu", "model__family": "opt"}, "hidden_act"),
    ({"model__hidden_act": None, "model__family": "opt"}, None),
    ({"training__batch_size": 8, "training__micro_batch_size": 3}, "batch_size"),
    ({"training__batch_size": 8, "training__micro_batch_size": 16}, "batch_size"),
    ({"training__batch_size": 8, "training__micro_batch_size": 8}, None),
    ({"parallel__dp": 3}, "training.batch_size"),
    ({"parallel__dp": 4, "training__micro_batch_size": 4}, "training.batch_size"),
    ({"parallel__dp": 4, "training__micro_batch_size": 2}, None),
    ({"schedule__kind": "wsd"}, "decay_steps"),
    ({"schedule__kind": "wsd", "schedule__decay_steps": 100}, None),
    ({"schedule__kind": "wsd", "schedule__decay_steps": 101}, "schedule.decay_steps"),
    ({"schedule__kind": "wsd", "schedule__decay_steps": 60, "schedule__warmup_steps": 41}, "schedule.decay_steps"),
    ({"schedule__kind": "cosine", "schedule__decay_steps": 10}, "decay_steps"),
    ({"schedule__kind": "linear", "schedule__decay_steps": 10}, "decay_steps"),
    ({"schedule__kind": "constant", "schedule__decay_steps": 10}, "decay_steps"),
    ({"schedule__kind": "constant", "schedule__warmup_steps": 101}, "schedule.warmup_steps"),
    ({"schedule__kind": "cosine", "schedule__warmup_steps": 101}, "schedule.warmup_steps"),
    ({"schedule__kind": "cosine", "schedule__warmup_steps": 100}, None),
    ({"training__precision": "bf16", "zero__stage": 0}, "zero.stage"),
    ({"training__precision": "fp16", "zero__stage": 0}, "zero.stage"),
    ({"training__precision": "fp32", "zero__stage": 0}, None),
    ({"training__precision": "fp16", "device": "cpu"}, "training.precision"),
    ({"training__precision": "fp16", "device": "auto"}, None),
    ({"training__precision": "bf16", "device": "cpu"}, None),
    ({"zero__stage": 0, "zero__offload": "cpu"}, "offload"),
    ({"zero__stage": 1, "zero__offload": "cpu"}, None),
    ({"guards__on_max_skipped": "roll_back"}, None),
    ({"guards__on_max_skipped": "roll_back", "checkpoint__keep": 1}, "guards.on_max_skipped"),
    ({"guards__on_max_skipped": "roll_back", "checkpoint__every": None}, "guards.on_max_skipped"),
]


@pytest.mark.parametrize(("changes", "blamed"), CONFLICTS)
def test_fields_that_do_not_fit_together_are_refused(changes: dict[str, Any], blamed: str | None) -> None:
    if blamed is None:
        build(**changes)
        return
    with pytest.raises(ValidationError) as caught:
        build(**changes)
    [error] = caught.value.errors()
    assert [conflict.field for conflict in error.get("ctx", {})["conflicts"]] == [blamed]
    assert f"{blamed}: " in str(caught.value)


def test_all_conflicts_of_a_section_are_reported() -> None:
    with pytest.raises(ValidationError) as caught:
        build(model__heads=5, model__kv_heads=2)
    [error] = caught.value.errors()
    assert [conflict.field for conflict in error.get("ctx", {})["conflicts"]] == ["heads", "kv_heads"]
