"""Presets and imported weights: what they fill, what may be replaced, what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtrain.errors import CheckpointError, PlanError, RecipeError
from longtrain.kernels.layers import FUSABLE
from longtrain.models.config import ModelConfig
from longtrain.models.families import FAMILIES, parameter_count
from longtrain.models.pretrained import open_pretrained
from longtrain.models.rope import Dynamic, Linear, Llama3, Yarn
from longtrain.plan import make_plan, plan
from longtrain.plan.describe import describe, doubts
from longtrain.plan.model import FIXED, FREE, check_init, model_config, resolve, unseen_positions
from longtrain.recipe.load import dump_recipe, parse_recipe
from longtrain.recipe.model import OWN
from longtrain.recipe.presets import PRESETS
from longtrain.recipe.schema import Recipe
from tests.plan_cases import LLAMA, folder

TEXT = """
name: small
data: {path: data}
training: {sequence_length: 64, steps: 10, batch_size: 12, precision: fp32, activations: none}
optimizer: {lr: 0.01}
"""
OPT = ModelConfig("opt", 50, 24, 2, 4, 4, 6, 40, 32, tied_embeddings=True)


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(TEXT, "small", overrides)


PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "tinyllama-1.1b": 1_100_048_384,
    "mistral-7b": 7_241_732_096,
    "qwen2-7b": 7_615_616_512,
    "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_published_size(name: str) -> None:
    chosen = recipe(f"model.preset={name}")
    config = model_config(chosen)
    assert parameter_count(config) == PUBLISHED[name]
    assert config.max_positions == PRESETS[name]["max_positions"]
    assert (config.window is not None) == (name == "mistral-7b")
    assert isinstance(config.rope_scaling, Llama3) == (name == "llama-3.2-1b")
    assert parse_recipe(dump_recipe(chosen), "again") == chosen


def test_fields_of_a_preset_may_be_replaced() -> None:
    chosen = recipe("model.preset=llama-3.2-1b", "model.layers=3", "model.rope_theta=1e6", "model.rope_scaling.factor=8")
    config = model_config(chosen)
    assert (config.layers, config.rope_theta, config.hidden_size) == (3, 1e6, 2048)
    assert config.rope_scaling == Llama3(8.0, 8192)
    other = recipe("model.preset=llama-3.2-1b", "model.rope_scaling.kind=linear", "model.rope_scaling.factor=2")
    assert model_config(other).rope_scaling == Linear(2.0)


def test_scalings_of_a_recipe_reach_the_model() -> None:
    base = ["model.preset=llama-7b", "training.sequence_length=8192", "model.rope_scaling.original_length=2048"]
    yarn = model_config(
        recipe(*base, "model.rope_scaling.kind=yarn", "model.rope_scaling.factor=4", "model.rope_scaling.beta_fast=16")
    )
    assert yarn.rope_scaling == Yarn(4.0, 2048, beta_fast=16.0)
    dynamic = model_config(recipe(*base, "model.rope_scaling.kind=dynamic", "model.rope_scaling.factor=4"))
    assert dynamic.rope_scaling == Dynamic(4.0, 2048, 8192)
    assert dynamic.max_positions == 8192


class TestInit:
    def test_the_folder_alone_is_enough(self, tmp_path: Path) -> None:
        chosen = resolve(recipe(f"model.init={folder(tmp_path, LLAMA)}"))
        assert model_config(chosen) == LLAMA
        again = parse_recipe(dump_recipe(chosen), "again")
        assert again == chosen
        assert resolve(again) == chosen
        made = make_plan(recipe(f"model.init={tmp_path}"), 1, "cpu")
        assert (made.recipe, made.model, made.band.hi) == (chosen, LLAMA, 8)

    @pytest.mark.parametrize(
        "scaling", [Linear(4.0), Dynamic(2.0, 32, 64), Yarn(4.0, 16, beta_fast=8.0), Llama3(4.0, 16), None], ids=str
    )
    def test_scalings_survive(self, tmp_path: Path, scaling: object) -> None:
        values = {field.name: getattr(LLAMA, field.name) for field in fields(LLAMA)} | {"rope_scaling": scaling}
        assert model_config(resolve(recipe(f"model.init={folder(tmp_path, ModelConfig(**values))}"))).rope_scaling == scaling

    def test_every_field_is_fixed_or_free(self) -> None:
        assert {field.name for field in fields(ModelConfig)} == {*FIXED, *FREE, *OWN}

    def test_what_the_recipe_says_of_how_to_go_on_counts(self, tmp_path: Path) -> None:
        changes = ["model.rope_theta=1e6", "model.window=null", "model.init_std=0.5", "training.sequence_length=256"]
        changes += ["model.rope_scaling.kind=linear", "model.rope_scaling.factor=4"]
        config = model_config(resolve(recipe(f"model.init={folder(tmp_path, LLAMA)}", *changes)))
        assert (config.rope_theta, config.window, config.init_std, config.max_positions) == (1e6, None, 0.5, 256)
        assert config.rope_scaling == Linear(4.0)

    @pytest.mark.parametrize(
        ("config", "overrides", "world", "message"),
        [
            (OPT, ["training.fused=[norm, mlp]"], 1, "training.fused: family opt has no mlp to fuse"),
            (OPT, ["training.fused=[norm, mlp, rotary]"], 1, "training.fused: family opt has no rotary and no mlp to fuse"),
            (OPT, [], 1, "training.sequence_length: 64 tokens, but the weights of model.init have learned 32 positions"),
            (LLAMA, ["parallel.cp=3", "parallel.ulysses=3"], 3, "parallel.ulysses: 4 query heads do not split over 3 ranks"),
        ],
    )
    def test_a_recipe_is_judged_again_when_the_weights_are_known(
        self, tmp_path: Path, config: ModelConfig, overrides: list[str], world: int, message: str
    ) -> None:
        chosen = recipe(f"model.init={folder(tmp_path, config)}", *overrides)
        with pytest.raises(PlanError, match=f"^{message}"):
            make_plan(chosen, world, "cpu")

    def test_what_contradicts_the_weights_is_refused(self, tmp_path: Path) -> None:
        wrong = ["model.layers=3", "model.norm_eps=1e-5", "model.tied_embeddings=true", "model.heads=4", "model.kv_heads=4"]
        with pytest.raises(PlanError) as caught:
            resolve(recipe(f"model.init={folder(tmp_path, LLAMA)}", *wrong))
        assert str(caught.value).split("\n")[1:] == [
            "  model.layers: 3 in the recipe, 2 in config.json",
            "  model.kv_heads: 4 in the recipe, 2 in config.json",
            "  model.norm_eps: 1e-05 in the recipe, 1e-06 in config.json",
            "  model.tied_embeddings: true in the recipe, false in config.json",
            "delete what the recipe, the one that it extends or --set says of these",
        ]
        assert str(caught.value).startswith("model.layers: the recipe is not that of the weights in ")

    def test_what_the_family_of_the_weights_lacks_is_laid_to_the_recipe(self, tmp_path: Path) -> None:
        chosen = recipe(f"model.init={folder(tmp_path, OPT)}", "model.rope_theta=5e5", "training.sequence_length=32")
        with pytest.raises(
            PlanError, match=r"^model\.rope_theta: .*config\.json: family opt .*; delete it, or set it to 10000\.0$"
        ):
            resolve(chosen)
        resolve(recipe(f"model.init={tmp_path}", "model.rope_theta=10000.0", "model.rope_scaling.kind=none", "model.window=null"))

    def test_the_activation_of_the_gate_is_that_of_the_weights(self, tmp_path: Path) -> None:
        geglu = replace(LLAMA, hidden_act="gelu_pytorch_tanh")
        init = f"model.init={folder(tmp_path, geglu)}"
        for said in (
            [],
            ["model.hidden_act=null"],
            ["model.family=llama", "model.hidden_act=null"],
            ["model.hidden_act=gelu_pytorch_tanh"],
        ):
            assert model_config(resolve(recipe(init, *said))) == geglu
        with pytest.raises(
            PlanError, match=r"^model\.hidden_act: .*\n  model\.hidden_act: gelu in the recipe, gelu_pytorch_tanh in config\.json"
        ):
            resolve(recipe(init, "model.hidden_act=gelu"))

    @pytest.mark.parametrize("act", ["silu", "gelu"])
    def test_what_has_no_gate_has_no_activation_of_it(self, tmp_path: Path, act: str) -> None:
        init = f"model.init={folder(tmp_path, OPT)}"
        message = "the feed-forward layer of family opt has ReLU and no gate; delete it, or set it to null"
        with pytest.raises(PlanError, match=rf"^model\.hidden_act: .*config\.json: {message}$"):
            resolve(recipe(init, f"model.hidden_act={act}"))
        with pytest.raises(RecipeError, match=f"--set model.hidden_act={act}: {message}"):
            recipe("model.preset=opt-125m", f"model.hidden_act={act}")
        assert resolve(recipe(init, "model.hidden_act=null")).model.hidden_act is None

    def test_a_shape_that_is_none_is_laid_to_the_weights(self, tmp_path: Path) -> None:
        folder(tmp_path, LLAMA)
        content = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(content | {"num_key_value_heads": 3}))
        with pytest.raises(CheckpointError, match=r"^model\.init: .*config\.json"):
            resolve(recipe(f"model.init={tmp_path}"))

    def test_a_preset_of_another_model_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(PlanError) as caught:
            resolve(recipe("model.preset=llama-7b", f"model.init={folder(tmp_path, OPT)}"))
        said = str(caught.value).split("\n")
        assert said[0].startswith("model.init: ")
        assert said[1] == "  model.family: llama in the preset, opt in config.json"
        assert said[-1] == "llama-7b is another model: set model.preset to that of the weights, or to null"
        assert "delete" not in said[-2]

    def test_the_weights_count_more_than_what_a_preset_fills(self, tmp_path: Path) -> None:
        """A newer Mistral has no window; the export of longer training has another theta and more positions."""
        shape = model_config(recipe("model.preset=mistral-7b", "training.sequence_length=65536"))
        weights = replace(shape, window=None, rope_theta=15.3e6, init_std=0.5)
        given = ["model.preset=mistral-7b", f"model.init={folder(tmp_path, weights)}"]
        resolved = resolve(recipe(*given))
        assert (resolved.model.max_positions, resolved.model.preset) == (65536, "mistral-7b")
        assert model_config(resolved) == weights
        own = model_config(resolve(recipe(*given, "model.window=4096", "model.rope_theta=10000.0")))
        assert (own.window, own.rope_theta) == (4096, 10000.0)
        assert resolve(parse_recipe(dump_recipe(resolved), "again")) == resolved

    def test_scalings_of_a_preset_and_of_weights(self, tmp_path: Path) -> None:
        shape = model_config(recipe("model.preset=llama-3.2-1b", "training.sequence_length=131072"))
        given = ["model.preset=llama-3.2-1b", f"model.init={folder(tmp_path, replace(shape, rope_scaling=None))}"]
        assert model_config(resolve(recipe(*given))).rope_scaling is None
        with pytest.raises(PlanError, match=r"^model\.rope_scaling: .* for kind llama3, but .* kind none; set .*\.kind too"):
            resolve(recipe(*given, "model.rope_scaling.factor=64"))
        folder(tmp_path, replace(shape, rope_scaling=Llama3(8.0, 4096)))
        assert model_config(resolve(recipe(*given))).rope_scaling == Llama3(8.0, 4096)
        assert model_config(resolve(recipe(*given, "model.rope_scaling.factor=64"))).rope_scaling == Llama3(64.0, 4096)

    def test_a_whole_recipe_is_planned_without_the_folder(self, tmp_path: Path) -> None:
        absent = tmp_path / "absent"
        made = make_plan(recipe("model.preset=opt-125m", f"model.init={absent}"), 1, "cpu")
        said = dict(describe(made))
        assert said["weights"].startswith(f"from {absent} (not there yet")
        assert said["positions"] == "2,048 learned"
        with pytest.raises(PlanError, match=rf"model.init: there is no folder {absent} .*put a Hugging Face folder .* there\n"):
            make_plan(recipe(f"model.init={absent}"), 1, "cpu")

    @pytest.mark.parametrize("check", [resolve, check_init])
    def test_weights_that_are_not_there_can_be_had(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[[Recipe], object]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        fetch = r"\n  hf download meta-llama/Llama-2-7b-hf --local-dir weights/Llama-2-7b-hf\nand set model.init to weights/Llama"
        with pytest.raises(PlanError, match=fetch):
            check(recipe("model.init=meta-llama/Llama-2-7b-hf"))
        for local in ("weights/llama", "meta-llama", "/weights/of/mine"):
            with pytest.raises(PlanError, match="put a Hugging Face folder with its weights there") as caught:
                check(recipe(f"model.init={local}"))
            assert "hf download" not in str(caught.value)
        with pytest.raises(PlanError, match=r"get it with\n  hf download meta-llama/Llama-2-7b-hf .*--local-dir weights/llama"):
            check_init(recipe("model.preset=llama-2-7b", "model.init=weights/llama"))

    def test_a_damaged_folder_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"config.json: cannot be read as JSON"):
            make_plan(recipe(f"model.init={tmp_path}"), 1, "cpu")

    def test_weights_that_are_pickles_are_refused_as_in_training(self, tmp_path: Path) -> None:
        chosen = recipe(f"model.init={folder(tmp_path, LLAMA)}")
        assert dict(describe(make_plan(chosen, 1, "cpu")))["weights"].startswith(f"from {tmp_path} (not there yet")
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"holds pytorch_model.bin, a pickle, .*convert_checkpoint.py") as said:
            make_plan(chosen, 1, "cpu")
        with pytest.raises(CheckpointError) as trained:
            open_pretrained(tmp_path, LLAMA)
        assert str(said.value) == f"model.init: {trained.value}"
        (tmp_path / "model.safetensors").write_bytes(b"")  # read by training alone
        assert dict(describe(make_plan(chosen, 1, "cpu")))["weights"] == f"from {tmp_path}"

    def test_learned_positions_end(self, tmp_path: Path) -> None:
        init = f"model.init={folder(tmp_path, OPT)}"
        message = (
            "training.sequence_length: 64 tokens, but the weights of model.init have learned 32 positions; .*model.positions.extend"
        )
        with pytest.raises(PlanError, match=message):
            make_plan(recipe(init), 1, "cpu")
        assert make_plan(recipe(init, "training.sequence_length=20"), 1, "cpu").model.max_positions == 32
        for extend in ("interpolate", "random"):
            made = make_plan(recipe(init, f"model.positions.extend={extend}"), 1, "cpu")
            assert made.model.max_positions == 64
            assert dict(describe(made))["positions"] == f"64 learned, {extend} beyond 32"


class TestReplaced:
    """A plan says what of config.json the recipe replaces."""

    @pytest.mark.parametrize(
        ("weights", "changes", "told"),
        [
            (LLAMA, [], []),
            (LLAMA, ["rope_theta=500.0", "window=9", "init_std=0.1", "rope_scaling.kind=none"], []),
            (LLAMA, ["rope_theta=5e5"], ["rope_theta: 500000.0 in the recipe, 500.0"]),
            (LLAMA, ["window=null", "init_std=0.5"], ["window: null in the recipe, 9", "init_std: 0.5 in the recipe, 0.1"]),
            (LLAMA, ["rope_scaling.kind=linear", "rope_scaling.factor=2"], ["rope_scaling.kind: linear in the recipe, none"]),
            (
                replace(LLAMA, rope_scaling=Llama3(8.0, 32)),
                ["rope_scaling.kind=llama3", "rope_scaling.factor=16", "rope_scaling.original_length=32"],
                ["rope_scaling.factor: 16.0 in the recipe, 8.0"],
            ),
            (OPT, ["positions.extend=random"], []),
        ],
    )
    def test_field_by_field(self, tmp_path: Path, weights: ModelConfig, changes: list[str], told: list[str]) -> None:
        made = make_plan(recipe(f"model.init={folder(tmp_path, weights)}", *(f"model.{change}" for change in changes)), 1, "cpu")
        expected = [f"model.{line} in {tmp_path}/config.json: the recipe's is used" for line in told]
        assert [text for what, text in describe(made) if what == "warning"] == expected
        assert list(doubts(made)) == expected, "as the start of a run says it"

    def test_without_the_folder_nobody_can_tell(self, tmp_path: Path) -> None:
        given = ["model.preset=llama-2-7b", f"model.init={tmp_path / 'absent'}", "model.rope_theta=1e6"]
        assert not list(doubts(make_plan(recipe(*given), 1, "cpu")))


class TestUnseenPositions:
    @pytest.mark.parametrize(
        ("weights", "changes", "length", "told"),
        [
            (LLAMA, [], 64, None),
            (LLAMA, [], 65, "know 64 positions; those beyond, up to 65, are new .* with a factor of 2 or more, or a higher"),
            (LLAMA, ["model.rope_theta=1e6"], 1000, None),
            (LLAMA, ["kind=linear", "factor=2"], 128, None),
            (LLAMA, ["kind=linear", "factor=2"], 250, "know 64 positions, 128 with model.rope_scaling linear; .* a factor of 4 or"),
            (LLAMA, ["kind=yarn", "factor=4", "original_length=64"], 256, None),
            (LLAMA, ["kind=yarn", "factor=4", "original_length=64"], 257, "256 with model.rope_scaling yarn"),
            (LLAMA, ["kind=dynamic", "factor=1", "original_length=64"], 1000, None),
            # a window of the length that is known
            (replace(LLAMA, window=64), [], 1000, None),
            # weights that were stretched to the length that they know
            (replace(LLAMA, rope_scaling=Linear(4.0)), [], 64, None),
            (replace(LLAMA, rope_scaling=Linear(4.0)), [], 65, "know 64 positions; .* a factor of 5 or more"),
            (replace(LLAMA, rope_scaling=Linear(4.0)), ["kind=linear", "factor=8"], 128, None),
            (replace(LLAMA, rope_scaling=Linear(4.0)), ["kind=none"], 64, "know 64 positions, 16 with model.rope_scaling none"),
            (replace(LLAMA, rope_scaling=Llama3(4.0, 16)), ["kind=llama3", "factor=8", "original_length=16"], 129, "128 with"),
            # learned positions are refused, or stretched by positions.extend
            (OPT, ["model.positions.extend=random"], 64, None),
        ],
    )
    def test_a_plan_tells(self, tmp_path: Path, weights: ModelConfig, changes: list[str], length: int, told: str | None) -> None:
        # the window of LLAMA is shorter than what it knows
        weights = replace(weights, window=None) if weights.window == 9 else weights
        changes = [change if change.startswith("model.") else f"model.rope_scaling.{change}" for change in changes]
        chosen = recipe(f"model.init={folder(tmp_path, weights)}", f"training.sequence_length={length}", *changes)
        made = make_plan(chosen, 1, "cpu")
        warned = unseen_positions(made.recipe)
        assert (warned is None) == (told is None)
        assert told is None or re.search(told, str(warned))
        assert (("warning", warned) in describe(made)) == (told is not None)
        again = make_plan(parse_recipe(dump_recipe(made.recipe), "again"), 1, "cpu")
        assert unseen_positions(again.recipe) == warned

    def test_a_preset_stands_for_weights_that_are_not_there(self, tmp_path: Path) -> None:
        given = ["model.preset=llama-2-7b", f"model.init={tmp_path / 'absent'}", "training.sequence_length=8192"]
        assert unseen_positions(make_plan(recipe(*given), 1, "cpu").recipe)
        assert not unseen_positions(make_plan(recipe(*given, "model.rope_theta=1e6"), 1, "cpu").recipe)
        assert not unseen_positions(make_plan(recipe("model.preset=llama-2-7b", given[2]), 1, "cpu").recipe)


class TestFused:
    SMALL = ("model.preset=llama-7b", "model.layers=1")

    def test_auto_is_for_gpus(self) -> None:
        assert make_plan(recipe(*self.SMALL), 1, "cpu").fused == ()
        made = make_plan(recipe(*self.SMALL), 1, "cuda")
        assert set(made.fused) <= set(FUSABLE)
        assert dict(describe(made))["layers"] == ("fused: " + ", ".join(made.fused) if made.fused else "plain torch")

    @given(st.sets(st.sampled_from(FUSABLE)).map(list))
    def test_a_list_is_taken_in_one_order(self, wanted: list[str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, "fusable", lambda device: FUSABLE)
            for device in ("cpu", "cuda"):
                made = make_plan(recipe(*self.SMALL, f"training.fused=[{', '.join(wanted)}]"), 1, device)
                assert made.fused == tuple(name for name in FUSABLE if name in wanted)
            assert make_plan(recipe(*self.SMALL, "training.fused=none"), 1, "cuda").fused == ()

    def test_what_the_device_cannot_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plan, "fusable", lambda device: ("norm",))
        assert make_plan(recipe(*self.SMALL), 1, "cuda").fused == ("norm",)
        with pytest.raises(
            PlanError, match=r"training.fused: mlp, loss cannot be fused on this cuda: .*set training.fused to auto"
        ):
            make_plan(recipe(*self.SMALL, "training.fused=[mlp, norm, loss]"), 1, "cuda")

    def test_what_the_family_lacks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plan, "fusable", lambda device: FUSABLE)
        assert make_plan(recipe("model.preset=opt-125m"), 1, "cuda").fused == ("norm", "loss")
        assert {name for name, family in FAMILIES.items() if (family.mlp, family.positions) != ("gated", "rotary")} == {"opt"}

    def test_fused_layers_hold_less(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plan, "fusable", lambda device: FUSABLE)
        held = []
        for fused in ("none", "auto"):
            said = dict(
                describe(make_plan(recipe(*self.SMALL, f"training.fused={fused}", "training.sequence_length=4096"), 1, "cuda"))
            )
            held.append(float(said["activations"].split("about ")[1].split(" GiB")[0]))
        assert held[1] < 0.8 * held[0]
        assert not math.isnan(held[1])
