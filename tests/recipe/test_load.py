import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtrain.errors import RecipeError
from longtrain.recipe import load
from longtrain.recipe.explain import FIELDS, FOREIGN_NAMES, is_section
from longtrain.recipe.load import builtin_recipes, dump_recipe, load_recipe, recipe_hash, recipes_folder
from longtrain.recipe.schema import (
    Activations,
    AttentionSection,
    CheckpointSection,
    DataSection,
    Device,
    EvaluationSection,
    Family,
    KernelName,
    Layout,
    ModelSection,
    Offload,
    OptimizerSection,
    ParallelSection,
    Precision,
    Recipe,
    ScheduleKind,
    ScheduleSection,
    TrackingSection,
    TrainingSection,
    ZeroSection,
)

# The tables below replace one piece of this text and name the line, so its line numbers matter.
BASE = """\
name: tiny
seed: 3
model:
  family: llama
  vocab_size: 64
  hidden_size: 32
  layers: 2
  heads: 4
  kv_heads: 2
  intermediate_size: 48
data:
  path: data/tiny
training:
  sequence_length: 64
  steps: 100
  batch_size: 8
  micro_batch_size: 2
  precision: fp32
  activations: none
optimizer:
  lr: 1e-3
  betas: [0.9, 0.95]
schedule:
  kind: cosine
  warmup_steps: 10
zero:
  stage: 1
"""
TOP_KEYS = (
    "the keys here are name, seed, device, output, model, data, training, attention, parallel, optimizer, schedule, "
    "zero, checkpoint, evaluation, tracking"
)
NAME_RULE = "use lower-case letters, digits, '.', '_' and '-' only, and begin with a letter or a digit;"
PATH_RULE = "expected a path, without line breaks or other invisible characters;"

UNKNOWN_KEYS = [
    ("steps: 100", "stepz: 100", "15: training.stepz: unknown key; did you mean 'steps'?"),
    ("steps: 100", "Steps: 100", "15: training.Steps: unknown key; did you mean 'steps'?"),
    ("steps: 100", "num_steps: 100", "15: training.num_steps: unknown key; did you mean 'steps'?"),
    ("micro_batch_size: 2", "micro-batch-size: 2", "17: training.micro-batch-size: unknown key; did you mean 'micro_batch_size'?"),
    ("training:", "trainning:", "13: trainning: unknown key; did you mean 'training'?"),
    ("seed: 3", "sed: 3", "2: sed: unknown key; did you mean 'seed'?"),
    ("seed: 3", "steps: 3", "2: steps: unknown key; 'steps' belongs under 'training'"),
    ("seed: 3", "every: 3", "2: every: unknown key; 'every' belongs under 'checkpoint' or under 'evaluation' or under 'tracking'"),
    ("steps: 100", "steps: 100\n  seed: 1", "16: training.seed: unknown key; 'seed' belongs at the top level"),
    ("steps: 100", "steps: 100\n  lr: 1", "16: training.lr: unknown key; 'lr' belongs under 'optimizer'"),
    ("steps: 100", "steps: 100\n  decay_steps: 1", "16: training.decay_steps: unknown key; 'decay_steps' belongs under 'schedule'"),
    ("lr: 1e-3", "learning_rate: 1e-3", "21: optimizer.learning_rate: unknown key; did you mean 'lr'?"),
    ("layers: 2", "num_hidden_layers: 2", "7: model.num_hidden_layers: unknown key; did you mean 'layers'?"),
    ("seed: 3", "sequence_len: 3", "2: sequence_len: unknown key; did you mean 'training.sequence_length'?"),
    ("seed: 3", "training.steps: 3", "2: training.steps: unknown key; write 'steps' under 'training'"),
    ("seed: 3", "foo: 3", "2: foo: unknown key; " + TOP_KEYS),
    ("  stage: 1", "  stage: 1\n  qqq: 1", "28: zero.qqq: unknown key; the keys here are stage, offload"),
    ("steps: 100", "ste\u0440s: 100", "15: training.ste\\u0440s: unknown key; did you mean 'steps'?"),
    ("seed: 3", "1: 3", "2: 1: unknown key; " + TOP_KEYS),
    ("stage: 1", "stage: 1\n  optimizer: {lr: 1}", "28: zero.optimizer: unknown key; 'optimizer' belongs at the top level"),
    ("seed: 3", "sequences: 3", "2: sequences: unknown key; 'sequences' belongs under 'evaluation'"),
    ("zero:\n  stage: 1", "zero_optimization:\n  stage: 1", "26: zero_optimization: unknown key; did you mean 'zero'?"),
    (
        "  kind: cosine",
        "  kind: cosine\n  parallel: {cp: 2}",
        "25: schedule.parallel: unknown key; 'parallel' belongs at the top level",
    ),
]
MISSING_KEYS = [
    ("  steps: 100\n", "", "13: training.steps: required key is missing; add 'steps: <a whole number>' under 'training'"),
    ("  lr: 1e-3\n", "", "20: optimizer.lr: required key is missing; add 'lr: <a number>' under 'optimizer'"),
    ("data:\n  path: data/tiny\n", "", "1: data: required section is missing; it needs at least data.path"),
    ("name: tiny\n", "", "1: name: required key is missing; add 'name: <text>' at the top level"),
    (
        "  precision: fp32\n",
        "",
        "13: training.precision: required key is missing; add 'precision: <one of fp32, bf16, fp16>' under 'training'",
    ),
    ("  family: llama\n", "", "3: model.family: required key is missing; add 'family: <one of llama>' under 'model'"),
]
WRONG_TYPES = [
    ("steps: 100", "steps: fast", "15: training.steps: expected a whole number, found the text 'fast'"),
    ("steps: 100", "steps: '100'", "15: training.steps: expected a whole number, found the text '100'; remove the quotes"),
    ("steps: 100", "steps: 1e2", "15: training.steps: expected a whole number, found the number 100.0; write 100"),
    ("steps: 100", "steps: 100.5", "15: training.steps: expected a whole number, found the number 100.5"),
    ("steps: 100", "steps: true", "15: training.steps: expected a whole number, found true"),
    ("steps: 100", "steps:", "15: training.steps: expected a whole number, found nothing"),
    ("steps: 100", "steps: [100]", "15: training.steps: expected a whole number, found a list of length 1"),
    ("steps: 100", "steps: {a: 1}", "15: training.steps: expected a whole number, found a section"),
    ("lr: 1e-3", "lr: fast", "21: optimizer.lr: expected a number, found the text 'fast'"),
    ("lr: 1e-3", "lr: '1e-3'", "21: optimizer.lr: expected a number, found the text '1e-3'; remove the quotes"),
    ("lr: 1e-3", "lr: false", "21: optimizer.lr: expected a number, found false"),
    ("seed: 3", "seed: 0x10", "2: seed: expected a whole number, found the text '0x10'"),
    ("seed: 3", "seed: 32K", "2: seed: expected a whole number, found the text '32K'"),
    ("name: tiny", "name: 12", "1: name: expected text, found the whole number 12; put it in quotes"),
    ("name: tiny", "name: 1.5", "1: name: expected text, found the number 1.5; put it in quotes"),
    ("name: tiny", "name: true", "1: name: expected text, found true; put it in quotes"),
    ("name: tiny", "name:", "1: name: expected text, found nothing"),
    ("name: tiny", "name: [a]", "1: name: expected text, found a list of length 1"),
    ("kv_heads: 2", "kv_heads: None", "9: model.kv_heads: expected a whole number or null, found the text 'None'; write null"),
    (
        "layers: 2",
        "layers: 2\n  tied_embeddings: yes",
        "8: model.tied_embeddings: expected true or false, found the text 'yes'; write true",
    ),
    (
        "layers: 2",
        "layers: 2\n  tied_embeddings: off",
        "8: model.tied_embeddings: expected true or false, found the text 'off'; write false",
    ),
    ("layers: 2", "layers: 2\n  tied_embeddings: 1", "8: model.tied_embeddings: expected true or false, found the whole number 1"),
    (
        "layers: 2",
        "layers: 2\n  tied_embeddings: 'true'",
        "8: model.tied_embeddings: expected true or false, found the text 'true'; remove the quotes",
    ),
    (
        "precision: fp32",
        "precision: bf61",
        "18: training.precision: expected one of fp32, bf16, fp16, found the text 'bf61'; did you mean 'bf16'?",
    ),
    (
        "precision: fp32",
        "precision: BF16",
        "18: training.precision: expected one of fp32, bf16, fp16, found the text 'BF16'; did you mean 'bf16'?",
    ),
    ("precision: fp32", "precision: 16", "18: training.precision: expected one of fp32, bf16, fp16, found the whole number 16"),
    ("precision: fp32", "precision: float8", "18: training.precision: expected one of fp32, bf16, fp16, found the text 'float8'"),
    (
        "activations: none",
        "activations: true",
        "19: training.activations: expected one of none, selective, full, minimal, found true",
    ),
    (
        "activations: none",
        "activations:",
        "19: training.activations: expected one of none, selective, full, minimal, found nothing",
    ),
    (
        "kind: cosine",
        "kind: cosin",
        "24: schedule.kind: expected one of cosine, linear, wsd, constant, found the text 'cosin'; did you mean 'cosine'?",
    ),
    ("family: llama", "family: lama", "4: model.family: expected one of llama, found the text 'lama'; did you mean 'llama'?"),
    ("stage: 1", "stage: 1\n  offload: gpu", "28: zero.offload: expected one of none, cpu, found the text 'gpu'"),
    ("stage: 1", "stage: '1'", "27: zero.stage: expected a whole number, found the text '1'; remove the quotes"),
    ("betas: [0.9, 0.95]", "betas: 0.9", "22: optimizer.betas: expected a list of 2 numbers, found the number 0.9"),
    ("betas: [0.9, 0.95]", "betas: [0.9]", "22: optimizer.betas: expected a list of 2 numbers, found a list of length 1"),
    ("betas: [0.9, 0.95]", "betas: [0.9, 0.95, 1]", "22: optimizer.betas: expected a list of 2 numbers, found a list of length 3"),
    ("betas: [0.9, 0.95]", "betas:\n  - 0.9\n  - high", "24: optimizer.betas.1: expected a number, found the text 'high'"),
    ("betas: [0.9, 0.95]", "betas:\n  - 0.9\n  - 1.0", "24: optimizer.betas.1: must be less than 1, found the number 1.0"),
    ("betas: [0.9, 0.95]", "betas: [-0.1, 0.95]", "22: optimizer.betas.0: must be at least 0, found the number -0.1"),
    ("zero:\n  stage: 1", "zero: 1", "26: zero: expected a section of 'key: value' lines, found the whole number 1"),
    (
        "zero:\n  stage: 1",
        "zero:",
        "26: zero: expected a section of 'key: value' lines, found nothing; fill it, or delete the line",
    ),
    ("zero:\n  stage: 1", "zero: [stage]", "26: zero: expected a section of 'key: value' lines, found a list of length 1"),
    ("zero:\n  stage: 1", "parallel: {dp: all}", "26: parallel.dp: expected a whole number or 'auto', found the text 'all'"),
    (
        "zero:\n  stage: 1",
        "parallel: {dp: 2.0}",
        "26: parallel.dp: expected a whole number or 'auto', found the number 2.0; write 2",
    ),
    ("zero:\n  stage: 1", "parallel: {dp: 0}", "26: parallel.dp: must be at least 1, found the whole number 0"),
    ("zero:\n  stage: 1", "parallel: {cp: auto}", "26: parallel.cp: expected a whole number, found the text 'auto'"),
]
OUT_OF_RANGE = [
    ("steps: 100", "steps: 0", "15: training.steps: must be at least 1, found the whole number 0"),
    ("steps: 100", "steps: -5", "15: training.steps: must be at least 1, found the whole number -5"),
    ("sequence_length: 64", "sequence_length: 1", "14: training.sequence_length: must be at least 2, found the whole number 1"),
    ("lr: 1e-3", "lr: 0", "21: optimizer.lr: must be greater than 0, found the whole number 0"),
    ("lr: 1e-3", "lr: -1e-3", "21: optimizer.lr: must be greater than 0, found the number -0.001"),
    ("lr: 1e-3", "lr: .nan", "21: optimizer.lr: must be a finite number, found the number nan"),
    ("lr: 1e-3", "lr: .inf", "21: optimizer.lr: must be a finite number, found the number inf"),
    ("lr: 1e-3", "lr: 1e999", "21: optimizer.lr: must be a finite number, found the number inf"),
    ("lr: 1e-3", "lr: nan", "21: optimizer.lr: expected a number, found the text 'nan'"),
    ("stage: 1", "stage: 4", "27: zero.stage: must be at most 3, found the whole number 4"),
    ("seed: 3", "seed: -1", "2: seed: must be at least 0, found the whole number -1"),
    (
        "seed: 3",
        "seed: 9223372036854775808",
        "2: seed: must be at most 9223372036854775807, found the whole number 9223372036854775808",
    ),
    ("layers: 2", "layers: 2\n  window: 0", "8: model.window: must be at least 1, found the whole number 0"),
    ("lr: 1e-3", "lr: 1e-3\n  grad_clip: 0", "22: optimizer.grad_clip: must be greater than 0, found the whole number 0"),
    ("kind: cosine", "kind: cosine\n  final_ratio: 1.5", "25: schedule.final_ratio: must be at most 1, found the number 1.5"),
    ("name: tiny", "name: My Run", "1: name: " + NAME_RULE + " found the text 'My Run'"),
    ("name: tiny", "name: ..", "1: name: " + NAME_RULE + " found the text '..'"),
    ("name: tiny", "name: ''", "1: name: " + NAME_RULE + " found the text ''"),
    ("path: data/tiny", "path: ' '", "12: data.path: " + PATH_RULE + " found the text ' '"),
    ("path: data/tiny", 'path: "a\\nb"', "12: data.path: " + PATH_RULE + " found the text 'a\\nb'"),
]
CONFLICTS = [
    (
        "heads: 4\n  kv_heads: 2",
        "heads: 5",
        "8: model.heads: 5 heads do not divide hidden_size 32; change one of them, or set head_dim",
    ),
    ("kv_heads: 2", "kv_heads: 3", "9: model.kv_heads: 3 key/value heads do not divide 4 heads; choose a divisor of heads"),
    (
        "kv_heads: 2",
        "head_dim: 7",
        "9: model.head_dim: a head has 7 features, but rotary positions turn pairs of features; make it even",
    ),
    (
        "hidden_size: 32",
        "hidden_size: 12",
        "8: model.heads: a head has 3 features, but rotary positions turn pairs of features; make it even",
    ),
    (
        "stage: 1",
        "stage: 0\n  offload: cpu",
        "28: zero.offload: offload cpu needs zero.stage 1, 2 or 3; stage 0 keeps optimizer state on the device",
    ),
    (
        "warmup_steps: 10",
        "warmup_steps: 101",
        "25: schedule.warmup_steps: a warmup of 101 steps is longer than training.steps 100; shorten it",
    ),
    ("kind: cosine", "kind: wsd", "23: schedule.decay_steps: kind wsd needs decay_steps: the number of steps of the final decay"),
    (
        "kind: cosine",
        "kind: wsd\n  decay_steps: 91",
        "25: schedule.decay_steps: warmup_steps 10 + decay_steps 91 are more than training.steps 100; shorten one of them",
    ),
    (
        "kind: cosine",
        "kind: linear\n  decay_steps: 9",
        "25: schedule.decay_steps: only kind wsd has decay_steps; delete it, or change kind linear to wsd",
    ),
    (
        "kind: cosine\n  warmup_steps: 10",
        "kind: constant\n  warmup_steps: 101",
        "25: schedule.warmup_steps: a warmup of 101 steps is longer than training.steps 100; shorten it",
    ),
    ("batch_size: 8", "batch_size: 7", "16: training.batch_size: 7 is not a multiple of micro_batch_size 2; change one of them"),
    (
        "zero:\n",
        "parallel:\n  dp: 3\nzero:\n",
        "16: training.batch_size: 8 is not a multiple of parallel.dp * micro_batch_size = 3 * 2; change one of them",
    ),
]
YAML_TRAPS = [
    ("steps: 100", "steps: 100\n  steps: 200", "16: training.steps: key given twice, first on line 15; delete one"),
    ("seed: 3", "seed: 3\nname: again", "3: name: key given twice, first on line 1; delete one"),
    ("zero:", "training:\n  steps: 3\nzero:", "26: training: key given twice, first on line 13; delete one"),
    (
        "steps: 100",
        "steps: 0100",
        "15: training.steps: 0100 begins with a zero, which YAML may take for octal; drop the zero, or quote it as text",
    ),
    (
        "steps: 100",
        "steps: 1:30",
        "15: training.steps: 1:30 would be a base-60 number in YAML; write the plain number, or quote it as text",
    ),
    (
        "lr: 1e-3",
        "lr: 01.5",
        "21: optimizer.lr: 01.5 begins with a zero, which YAML may take for octal; drop the zero, or quote it as text",
    ),
    (
        "name: tiny",
        "name: 017",
        "1: name: 017 begins with a zero, which YAML may take for octal; drop the zero, or quote it as text",
    ),
    ("steps: 100", "steps: &n 100", "15: anchors (&x) and aliases (*x) are not allowed; write the value out, or quote the text"),
    ("steps: 100", "steps: *n", "15: anchors (&x) and aliases (*x) are not allowed; write the value out, or quote the text"),
    ("steps: 100", "<<: {a: 1}\n  steps: 100", "15: training.<<: merge keys are not allowed; write the keys out"),
    ("steps: 100", "steps: !!int '100'", "15: tags such as !!int are not allowed; delete it, or quote the text"),
    (
        "steps: 100",
        "steps: !!python/object/apply:os.system ['true']",
        "15: tags such as !!python/object/apply:os.system are not allowed; delete it, or quote the text",
    ),
    ("steps: 100", "? [a]\n  : 1\n  steps: 100", "15: training: a key must be a plain name; text in braces needs quotes"),
    ("steps: 100", "\tsteps: 100", "15: not valid YAML: a tab cannot indent or separate; use spaces"),
    ("steps: 100", "steps: 100: 3", "15: not valid YAML: unexpected ':'; check the indentation, or put the value in quotes"),
    ("steps: 100", "steps 100", "16: not valid YAML: this line, or the one before it, is not 'key: value'"),
    ("steps: 100", "steps: [100", "15: not valid YAML: the bracket that opens here is not closed properly"),
    ("steps: 100", "steps: {a: 100", "15: not valid YAML: the bracket that opens here is not closed properly"),
    ("steps: 100", "steps: 'a", "15: not valid YAML: the quote that opens here is never closed"),
    ("steps: 100", " steps: 100", "15: not valid YAML: unexpected ':'; check the indentation, or put the value in quotes"),
    ("steps: 100", "steps: 100\x00", "15: holds the invisible character U+0000; delete it"),
    ("steps: 100", "steps: @x", "15: not valid YAML: a value cannot begin with '@', '`' or '%'; put it in quotes"),
    ("zero:", "---\nzero:", "26: a second document begins; keep only one"),
    ("steps: 100", "steps: [[[[[[[[[[[[[[[[[", "15: nested more than 16 levels deep"),
    (
        "betas: [0.9, 0.95]",
        "betas: [07, 0.95]",
        "22: optimizer.betas.0: 07 begins with a zero, which YAML may take for octal; drop the zero, or quote it as text",
    ),
    ("steps: 100", "steps: a\u200bb", "15: training.steps: expected a whole number, found the text 'a\\u200bb'"),
    ("steps: 100", "steps:100", "16: not valid YAML: this line, or the one before it, is not 'key: value'"),
    ("  steps: 100", "steps: 100", "16: not valid YAML: unexpected ':'; check the indentation, or put the value in quotes"),
]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes text or bytes as x.yaml in the current directory."""
    monkeypatch.chdir(tmp_path)

    def write(content: str | bytes) -> str:
        Path("x.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
        return "x.yaml"

    return write


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


@pytest.mark.parametrize(
    ("old", "new", "message"), [*UNKNOWN_KEYS, *MISSING_KEYS, *WRONG_TYPES, *OUT_OF_RANGE, *CONFLICTS, *YAML_TRAPS]
)
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
    assert "llama-160m-4k, llama-1b-32k, llama-7b-32k, quickstart" in message
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
    assert {"quickstart", "llama-160m-4k", "llama-1b-32k", "llama-7b-32k"} <= set(known)
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
            "unknown key 'a.b'; the sections are model, data, training, attention, parallel, optimizer, schedule, zero, "
            "checkpoint, evaluation, tracking",
        ),
        ("zero=5", "zero is a section; set one of its fields: zero.stage, zero.offload"),
        ("zero={stage: 2}", "zero is a section; set one of its fields: zero.stage, zero.offload"),
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
        ("schedule.decay_steps=5", "only kind wsd has decay_steps; delete it, or change kind cosine to wsd"),
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


TRAPS = [
    "017",
    "1e4",
    "1:30",
    "no",
    "true",
    "null",
    "~",
    "<<",
    "=",
    "&a",
    "*b",
    "!t",
    "# x",
    "a: b",
    "- a",
    "'",
    '"',
    "{",
    ".inf",
    "é",
    "-",
]
paths = st.sampled_from(TRAPS) | st.text(min_size=1, max_size=20).filter(lambda text: text.strip() and text.isprintable())
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
counts = st.integers(1, 2**40)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    heads, kv_factor, micro, accumulation, dp = (draw(st.integers(1, 64)) for _ in range(5))
    kind = draw(st.sampled_from(ScheduleKind))
    warmup, decay, more = draw(st.integers(0, 1000)), draw(st.integers(1, 1000)), draw(st.integers(0, 1000))
    precision = draw(st.sampled_from(Precision))
    return Recipe(
        name=draw(
            st.sampled_from(["1e4", "017", "no", "null", "12", "1.5"]) | st.from_regex(r"[a-z0-9][a-z0-9._-]*", fullmatch=True)
        ),
        seed=draw(st.integers(0, 2**63 - 1)),
        device=draw(st.sampled_from([Device.AUTO, Device.CUDA])),
        output=draw(st.none() | paths),
        model=ModelSection(
            family=draw(st.sampled_from(Family)),
            vocab_size=draw(st.integers(2, 2**20)),
            hidden_size=heads * kv_factor * 2,
            layers=draw(counts),
            heads=heads * kv_factor,
            kv_heads=draw(st.none() | st.just(heads)),
            head_dim=draw(st.none() | st.just(64)),
            intermediate_size=draw(counts),
            rope_theta=draw(positive),
            norm_eps=draw(positive),
            tied_embeddings=draw(st.booleans()),
            window=draw(st.none() | counts),
            init_std=draw(positive),
        ),
        data=DataSection(path=draw(paths)),
        training=TrainingSection(
            sequence_length=draw(st.integers(2, 2**30)),
            steps=max(1, warmup + decay + more),
            batch_size=micro * accumulation * dp,
            micro_batch_size=micro,
            precision=precision,
            activations=draw(st.sampled_from(Activations)),
        ),
        attention=AttentionSection(kernel=draw(st.sampled_from(KernelName))),
        parallel=ParallelSection(dp=draw(st.sampled_from(["auto", dp])), cp=draw(counts), layout=draw(st.sampled_from(Layout))),
        optimizer=OptimizerSection(
            lr=draw(positive),
            betas=(draw(st.floats(0, 1, exclude_max=True)), draw(st.floats(0, 1, exclude_max=True))),
            eps=draw(positive),
            weight_decay=draw(st.floats(0, 1)),
            grad_clip=draw(st.none() | positive),
        ),
        schedule=ScheduleSection(
            kind=kind,
            warmup_steps=warmup,
            decay_steps=decay if kind is ScheduleKind.WSD else None,
            final_ratio=draw(st.floats(0, 1)),
        ),
        zero=ZeroSection(stage=draw(st.integers(1, 3)), offload=draw(st.sampled_from(Offload))),
        checkpoint=CheckpointSection(every=draw(counts), keep=draw(counts)),
        evaluation=EvaluationSection(every=draw(st.none() | counts), sequences=draw(counts)),
        tracking=TrackingSection(every=draw(counts)),
    )


@settings(max_examples=150, deadline=None)
@given(recipe=recipes())
def test_dump_and_load_give_back_the_recipe(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.getbasetemp() / "resolved.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    loaded = load_recipe(path)
    assert loaded == recipe
    assert recipe_hash(loaded) == recipe_hash(recipe)
    assert dump_recipe(loaded) == dump_recipe(recipe)


@pytest.mark.parametrize("trap", TRAPS)
def test_text_that_looks_like_something_else_survives_the_dump(write, trap: str) -> None:
    recipe = load_recipe(write(BASE))
    recipe = recipe.model_copy(update={"data": DataSection(path=trap)})
    assert load_recipe(write(dump_recipe(recipe))) == recipe


def test_dump_holds_every_field(write) -> None:
    text = dump_recipe(load_recipe(write(BASE)))
    for path in FIELDS:
        assert f"{path[-1]}:" in text


def test_hash_is_of_the_meaning_not_of_the_text(write) -> None:
    recipe = load_recipe(write(BASE))
    same = load_recipe(write("# a comment\n" + BASE.replace("lr: 1e-3", "lr: 0.001\n  eps: 1e-8")))
    other = load_recipe(write(BASE), ["seed=4"])
    assert recipe_hash(same) == recipe_hash(recipe)
    assert recipe_hash(other) != recipe_hash(recipe)
    assert len(recipe_hash(recipe)) == len(hashlib.sha256().hexdigest())


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
