from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtrain.errors import RecipeError
from longtrain.recipe import load
from longtrain.recipe.explain import FIELDS, FOREIGN_NAMES, is_section
from longtrain.recipe.load import builtin_recipes, dump_recipe, load_recipe, recipes_folder
from longtrain.recipe.schema import CheckpointSection, Precision
from tests.recipe.bad_recipes import BAD_RECIPES, BASE


def refusal(name: str | Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    return str(caught.value)


def test_base_is_valid_and_read_as_written(write) -> None:
    recipe = load_recipe(write(BASE))
    assert recipe.name == "tiny"
    assert recipe.model.kv_heads == 2
    assert recipe.optimizer.lr == 1e-3
    assert recipe.optimizer.betas == (0.9, 0.95)
    assert recipe.training.precision is Precision.FP32
    assert recipe.parallel.dp == "auto"
    assert recipe.checkpoint == CheckpointSection(every=500, keep=3)


@pytest.mark.parametrize(("old", "new", "message"), BAD_RECIPES)
def test_bad_recipe_is_refused_with_line_key_and_advice(write, old: str, new: str, message: str) -> None:
    assert old in BASE
    assert refusal(write(BASE.replace(old, new, 1))) == f"x.yaml:{message}"


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(write) -> None:
    text = BASE
    edits = {
        "seed: 3": "seed: 017",
        "heads: 4": "heads: 5",
        "steps: 100": "stepz: 100",
        "precision: fp32": "precision: bf61",
        "  lr: 1e-3\n": "",
        "stage: 1": "stage: 1\n  stage: 2",
    }
    for old, new in edits.items():
        text = text.replace(old, new, 1)
    assert refusal(write(text)).split("\n") == [
        "x.yaml:2: seed: 017 begins with a zero, which YAML may take for octal; drop the zero, or quote it as text",
        "x.yaml:8: model.heads: 5 heads do not divide hidden_size 32; change one of them, or set head_dim",
        "x.yaml:9: model.kv_heads: 2 key/value heads do not divide 5 heads; choose a divisor of heads",
        "x.yaml:15: training.stepz: unknown key; did you mean 'steps'?",
        "x.yaml:18: training.precision: expected one of fp32, bf16, fp16, found the text 'bf61'; did you mean 'bf16'?",
        "x.yaml:20: optimizer.lr: required key is missing; add 'lr: <a number>' under 'optimizer'",
        "x.yaml:27: zero.stage: key given twice, first on line 26; delete one",
    ]


def test_conflicts_between_sections_are_reported_together(write) -> None:
    text = BASE.replace("seed: 3", "device: cpu").replace("precision: fp32", "precision: fp16").replace("stage: 1", "stage: 0")
    assert refusal(write(text)).split("\n") == [
        "x.yaml:18: training.precision: fp16 needs a GPU; use fp32 or bf16, or device cuda",
        "x.yaml:27: zero.stage: stage 0 trains in fp32 only: in fp16 DeepSpeed takes a phantom Adam step at start; "
        "use stage 1, or precision fp32",
    ]


def test_line_of_a_value_below_its_key_is_the_line_of_the_key(write) -> None:
    assert refusal(write(BASE.replace("steps: 100", "steps:\n    fast", 1))).startswith("x.yaml:15: training.steps: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "x.yaml:1: nothing is written here"),
        ("# only a comment\n", "x.yaml:1: nothing is written here"),
        ("\n\n- a\n- b\n", "x.yaml:3: expected a recipe: 'key: value' lines, such as 'name: my-run'"),
        ("text", "x.yaml:1: expected a recipe: 'key: value' lines, such as 'name: my-run'"),
        ("---\n", "x.yaml:2: expected a recipe: 'key: value' lines, such as 'name: my-run'"),
        (b"name: a\nseed: \xff\n", "x.yaml:2: not UTF-8 text (byte 0xff); save the file as UTF-8"),
        (BASE.encode("utf-16"), "x.yaml:1: not UTF-8 text (byte 0xff); save the file as UTF-8"),
        (b"#" * (1024 * 1024 + 1), "x.yaml: larger than 1 MiB, so it is not a recipe; check the path"),
    ],
)
def test_file_that_is_no_recipe_is_refused(write, content: str | bytes, message: str) -> None:
    assert refusal(write(content)) == message


def test_nested_brackets_do_not_exhaust_the_stack(write) -> None:
    assert refusal(write("a: " + "[" * 100_000)) == "x.yaml:1: nested more than 16 levels deep"


def test_missing_file_and_folder_are_refused(write, tmp_path: Path) -> None:
    write(BASE)
    assert refusal("y.yaml") == "y.yaml: no such file; check the path"
    assert refusal("recipes/quickstrat.yaml") == (
        "recipes/quickstrat.yaml: no such file; did you mean the built-in recipe 'quickstart'?"
    )
    assert refusal(tmp_path / "..").endswith(": cannot be read: Is a directory")
    assert "cannot be read" in refusal("a\0.yaml")


def test_unknown_name_lists_the_built_in_recipes() -> None:
    message = refusal("llama-7b-23k")
    assert message.startswith("no built-in recipe 'llama-7b-23k'; did you mean 'llama-7b-32k'? ")
    assert ", ".join(builtin_recipes()) in message
    assert "did you mean" not in refusal("zzzz")


def test_recipes_of_an_installed_package_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "longtrain" / "recipe" / "load.py"
    monkeypatch.setattr(load, "__file__", str(module))
    assert recipes_folder() == tmp_path / "recipes"
    assert "there are no built-in recipes" in refusal("quickstart")
    (tmp_path / "longtrain" / "recipes").mkdir(parents=True)
    (tmp_path / "longtrain" / "recipes" / "mine.yaml").write_text(BASE)
    assert recipes_folder() == tmp_path / "longtrain" / "recipes"
    assert load_recipe("mine").name == "tiny"


def test_every_built_in_recipe_loads_under_its_own_name() -> None:
    known = builtin_recipes()
    public = {"opt-125m-4k", "opt-1.3b-16k", "opt-6.7b-32k", "llama-7b-128k", "llama3-8b-512k"}
    assert {"quickstart", "llama-160m-4k", "llama-1b-32k", "llama-7b-32k"} | public == set(known)
    for name, path in known.items():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert load_recipe(path) == load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-4", 1e-4), ("1E5", 1e5), ("+1.5e+2", 150.0), (".5", 0.5), ("5.", 5.0), ("1", 1.0), ("1_000", 1000.0), ("0.1", 0.1)],
)
def test_numbers_are_read_as_numbers(write, written: str, value: float) -> None:
    lr = load_recipe(write(BASE.replace("1e-3", written))).optimizer.lr
    assert type(lr) is float
    assert lr == value


@pytest.mark.parametrize(
    "written", ["no", "off", "2026-11-22", "1e5x", "v1.0", "null-run", "'017'", '"1:30"', "'12'", "0x1f", "12:00:99x"]
)
def test_text_stays_text(write, written: str) -> None:
    recipe = load_recipe(write(BASE.replace("path: data/tiny", f"path: {written}")))
    assert recipe.data.path == written.strip("'\"")


def test_byte_order_mark_and_windows_line_ends_are_read(write) -> None:
    expected = load_recipe(write(BASE))
    assert load_recipe(write("\ufeff" + BASE)) == expected
    assert load_recipe(write(BASE.replace("\n", "\r\n"))) == expected
    assert refusal(write(BASE.replace("steps: 100", "stepz: 100").replace("\n", "\r\n"))).startswith("x.yaml:15: ")


def test_null_is_allowed_where_the_schema_says_so(write) -> None:
    recipe = load_recipe(write(BASE.replace("kv_heads: 2", "kv_heads: null").replace("lr: 1e-3", "lr: 1e-3\n  grad_clip: ~")))
    assert recipe.model.kv_heads is None
    assert recipe.model.key_value_heads == 4
    assert recipe.optimizer.grad_clip is None


def test_overrides_replace_and_add_values(write) -> None:
    recipe = load_recipe(
        write(BASE),
        [
            "training.steps=7",
            "schedule.warmup_steps=1",
            "optimizer.betas=[0.5, 1e-1]",
            "parallel.dp=4",
            "checkpoint.every=9",
            "model.window=null",
            "name='12'",
            "output=runs/a=b",
        ],
    )
    assert recipe.training.steps == 7
    assert recipe.optimizer.betas == (0.5, 0.1)
    assert recipe.parallel.dp == 4
    assert recipe.checkpoint.every == 9
    assert recipe.name == "12"
    assert recipe.output == "runs/a=b"


def test_override_mends_what_the_file_lacks(write) -> None:
    assert load_recipe(write(BASE.replace("  steps: 100\n", "")), ["training.steps=50"]).training.steps == 50
    assert load_recipe(write(BASE.replace("data:\n  path: data/tiny\n", "")), ["data.path=d"]).data.path == "d"
    assert load_recipe(write(BASE.replace("steps: 100", "steps: fast", 1)), ["training.steps=50"]).training.steps == 50


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stepz=5", "unknown key; did you mean 'training.steps'?"),
        ("steps=5", "unknown key; did you mean 'training.steps'?"),
        ("trainin.steps=5", "unknown key; did you mean 'training.steps'?"),
        ("learning_rate=5", "unknown key; did you mean 'optimizer.lr'?"),
        ("model.lr=5", "unknown key; did you mean 'optimizer.lr'?"),
        ("every=5", "unknown key; did you mean 'checkpoint.every' or 'evaluation.every' or 'tracking.every'?"),
        ("training.steps.more=5", "unknown key; did you mean 'training.steps'?"),
        (
            "a.b=5",
            "unknown key 'a.b'; the sections are model, model.positions, model.rope_scaling, "
            "data, training, attention, parallel, optimizer, schedule, zero, "
            "checkpoint, guards, evaluation, tracking",
        ),
        ("zero=5", "zero is a section; set one of its fields: zero.stage, zero.offload, zero.deepspeed"),
        ("zero={stage: 2}", "zero is a section; set one of its fields: zero.stage, zero.offload, zero.deepspeed"),
        ("training.steps", "expected key.path=value, such as training.steps=100"),
        ("training.steps=", "the value is missing; expected a whole number"),
        ("training.steps=fast", "expected a whole number, found the text 'fast'"),
        ("training.steps=1e2", "expected a whole number, found the number 100.0; write 100"),
        ("training.steps=0", "must be at least 1, found the whole number 0"),
        ("training.steps=010", "010 begins with a zero, which YAML may take for octal; drop the zero, or quote it as text"),
        ("training.steps=1:30", "1:30 would be a base-60 number in YAML; write the plain number, or quote it as text"),
        ("training.steps=5 # five", "only part of this is the value; put it in quotes"),
        ("training.steps=*x", "anchors (&x) and aliases (*x) are not allowed; write the value out, or quote the text"),
        ("training.steps=[1", "not valid YAML: the bracket that opens here is not closed properly"),
        ("training.precision=bf61", "expected one of fp32, bf16, fp16, found the text 'bf61'; did you mean 'bf16'?"),
        ("optimizer.betas=[0.9, 1]", "must be less than 1, found the whole number 1"),
        ("optimizer.betas=0.9", "expected a list of 2 numbers, found the number 0.9"),
        ("model.heads=5", "5 heads do not divide hidden_size 32; change one of them, or set head_dim"),
        ("schedule.decay_steps=5", "only kind wsd has decay_steps; delete it or set it to null, or change kind cosine to wsd"),
        ("training.batch_size=7", "7 is not a multiple of micro_batch_size 2; change one of them"),
    ],
)
def test_bad_override_is_refused_by_its_own_words(write, override: str, message: str) -> None:
    assert f"--set {override}: {message}" in refusal(write(BASE), override).split("\n")


def test_override_given_twice_is_refused(write) -> None:
    message = refusal(write(BASE), "training.steps=50", "training.steps=60")
    assert message == "--set training.steps=60: key given twice, first as --set training.steps=50; delete one"


def test_override_that_breaks_a_line_of_the_file_names_that_line(write) -> None:
    message = refusal(write(BASE), "training.steps=5")
    assert message == "x.yaml:25: schedule.warmup_steps: a warmup of 10 steps is longer than training.steps 5; shorten it"


def test_problems_of_file_and_overrides_are_reported_together(write) -> None:
    message = refusal(write(BASE.replace("seed: 3", "sed: 3")), "optimizer.lr=fast", "zero.stag=1")
    assert message.split("\n") == [
        "x.yaml:2: sed: unknown key; did you mean 'seed'?",
        "--set zero.stag=1: unknown key; did you mean 'zero.stage'?",
        "--set optimizer.lr=fast: expected a number, found the text 'fast'",
    ]


def test_every_misspelled_key_is_refused_and_led_back(write) -> None:
    """Drops, doubles and swaps one letter of every key: none may train, each must suggest the key that was meant."""
    for path in FIELDS:
        key = str(path[-1])
        if is_section(path) or len(key) < 5:
            continue
        for typo in (key[:-1], key + key[-1], key[:2] + key[3] + key[2] + key[4:], key.replace("_", "-"), key.upper()):
            if typo == key:
                continue
            message = refusal(write(f"{BASE}"), ".".join([*map(str, path[:-1]), typo]) + "=1")
            assert repr(".".join(map(str, path))) in message, (typo, message)


def test_names_of_other_libraries_lead_to_fields() -> None:
    own = {path[-1] for path in FIELDS}
    for name, path in FOREIGN_NAMES.items():
        assert path in FIELDS, name
        assert name not in own


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_files_and_overrides_raise_nothing_but_recipe_errors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(BASE)))
    end = data.draw(st.integers(start, min(len(BASE), start + 8)))
    noise = st.text(alphabet=" \n\t:#-[]{},'\"&*!|>%@`?<~.0179eé\u2028\x00\ud800abkLlr=_", max_size=8)
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_bytes((BASE[:start] + data.draw(noise) + BASE[end:]).encode("utf-8", "surrogatepass"))
    leaf = data.draw(st.sampled_from([".".join(map(str, path)) for path in FIELDS]))
    try:
        recipe = load_recipe(path, [f"{leaf}{data.draw(noise)}={data.draw(noise)}"])
    except RecipeError:
        return
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
