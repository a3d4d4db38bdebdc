"""Every value of a field that can be counted is run, or planned where a CPU cannot; the built-in recipes can be planned."""

from __future__ import annotations

import json
import types
import typing
from enum import StrEnum
from typing import Any

import pytest

from longtrain.errors import CheckpointError, KernelError, RecipeError
from longtrain.plan import make_plan
from longtrain.recipe.explain import FIELDS, dotted
from longtrain.recipe.load import builtin_recipes, dump_recipe, load_recipe, parse_recipe
from tests.recipe_runs import outcome, scaled, tiny

pytest_plugins = ("tests.recipe_desk",)
pytestmark = pytest.mark.usefixtures("recipe_desk")


def choices(annotation: Any) -> list[str]:
    """The values of a field that can be counted: members of an enum, of a Literal, truth values."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return [choice for argument in arguments for choice in choices(argument)]
    if origin is typing.Literal:
        return [str(argument) for argument in arguments]
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return [member.value for member in annotation]
    return {bool: ["false", "true"], types.NoneType: ["null"]}.get(annotation, [])


MEMBERS = [
    (name, choice) for path, name in zip(FIELDS, map(dotted, FIELDS), strict=True) for choice in choices(FIELDS[path].annotation)
]
MEMBERS += [("zero.stage", str(stage)) for stage in range(4)]

# what else a member needs to be accepted
WITH = {
    ("schedule.kind", "wsd"): ("schedule.decay_steps=2",),
    ("data.path", "null"): ("data.sources={data: 1, more: 3}",),
    # long enough for some documents to be left
    ("data.long_documents", "drop"): ("training.sequence_length=128", "training.batch_size=2"),
    ("model.positions.extend", "interpolate"): ("model.family=opt",),
    ("model.positions.extend", "random"): ("model.family=opt",),
    ("model.rope_scaling.kind", "linear"): scaled("", factor=2),
    ("model.rope_scaling.kind", "dynamic"): scaled("", factor=2, original_length=16),
    ("model.rope_scaling.kind", "yarn"): scaled("", factor=2, original_length=16),
    ("model.rope_scaling.kind", "llama3"): scaled("", factor=2, original_length=16),
    ("model.rope_scaling.kind", "longrope"): scaled(
        "", factor=2, original_length=16, short_factor="[1.0, 1.0]", long_factor="[1.0, 2.0]"
    ),
}
# null where something else, a preset or imported weights, has to say it
NOT_ALONE = {f"model.{name}" for name in ("family", "vocab_size", "hidden_size", "layers", "heads", "intermediate_size")}
# what a CPU cannot train, and can plan for a GPU
ON_GPU = {
    ("device", "cuda"): (),
    ("training.precision", "fp16"): ("device=cuda",),
    ("attention.kernel", "triton"): ("device=cuda",),
    ("attention.kernel", "flash"): ("device=cuda", "training.precision=bf16", "model.head_dim=8"),
}


@pytest.mark.parametrize(("field", "value"), MEMBERS, ids=[f"{name}={value}" for name, value in MEMBERS])
def test_every_member_runs(field: str, value: str) -> None:
    given = WITH.get((field, value), ())
    if (field, value) == ("attention.kernel", "cudnn"):
        with pytest.raises(KernelError, match="cudnn cannot do this: takes no packed documents"):
            make_plan(tiny("device=cuda", "training.precision=bf16", "model.head_dim=8", f"{field}={value}"), 1, "cuda")
        return
    if value == "null" and field in NOT_ALONE:
        with pytest.raises(RecipeError, match="required key is missing"):
            tiny(f"{field}=null")
        return
    if (field, value) == ("checkpoint.every", "null"):
        with pytest.raises(CheckpointError, match="no such folder"):  # it trained, and left nothing to read
            outcome((f"{field}={value}",))
        return
    if (field, value) in ON_GPU:
        plan = make_plan(tiny(*ON_GPU[field, value], f"{field}={value}"), 1, "cuda")
        assert plan.device == "cuda"
        return
    seen = outcome((*given, f"{field}={value}"))
    assert seen.steps == 4
    assert all(abs(loss) < 20 for _, loss in seen.losses)


@pytest.mark.parametrize("layout", [choice for name, choice in MEMBERS if name == "parallel.layout"])
def test_layouts_in_a_ring_are_planned(layout: str) -> None:
    plan = make_plan(tiny("parallel.cp=4", f"parallel.layout={layout}"), 4, "cpu")
    held_positions = sorted(
        p
        for rank in range(4)
        for c in plan.layout.chunks(32, 4, rank)
        for p in range(c.start, c.start + c.length * c.stride, c.stride)
    )
    assert held_positions == list(range(32))


@pytest.mark.parametrize("name", builtin_recipes())
def test_builtin_recipe(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name, "the run folder is called like the recipe"
    assert builtin_recipes()[name].read_text().startswith("# "), "`longtrain recipes` shows the first line"
    assert parse_recipe(dump_recipe(recipe), name) == recipe
    devices = ("cpu", "cuda") if recipe.device == "auto" else (recipe.device.value,)
    for device in devices:
        plan = make_plan(recipe, recipe.meant_world, device)
        assert plan.parameters > 0
        assert json.dumps(plan.deepspeed)
