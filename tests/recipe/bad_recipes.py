"""Recipes that are refused, and in which words: (what to replace in BASE, with what, the message after the file's name)."""

from tests.recipe.bad_deepspeed import DEEPSPEED
from tests.recipe.bad_numbers import NUMBERS
from tests.recipe.bad_paths import PATHS
from tests.recipe.bad_together import TOGETHER

# The tables name lines, so its line numbers matter.
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
    "zero, checkpoint, guards, evaluation, tracking"
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
    ("  stage: 1", "  stage: 1\n  qqq: 1", "28: zero.qqq: unknown key; the keys here are stage, offload, deepspeed"),
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
    ("data:\n  path: data/tiny\n", "", "1: data: required section is missing; it needs at least data.path or data.sources"),
    ("name: tiny\n", "", "1: name: required key is missing; add 'name: <text>' at the top level"),
    (
        "  precision: fp32\n",
        "",
        "13: training.precision: required key is missing; add 'precision: <one of fp32, bf16, fp16>' under 'training'",
    ),
    ("  family: llama\n", "", "3: model.family: required key is missing; add 'family', or a preset or init that has it"),
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
    (
        "seed: 3",
        "seed: 32K",
        "2: seed: expected a whole number, found the text '32K'; write the number alone and in full, without a unit",
    ),
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
    (
        "family: llama",
        "family: lama",
        "4: model.family: expected one of llama, qwen2, opt or null, found the text 'lama'; did you mean 'llama'?",
    ),
    ("stage: 1", "stage: 1\n  offload: gpu", "28: zero.offload: expected one of none, cpu, found the text 'gpu'"),
    (
        "stage: 1",
        "stage: 1\ntracking: {wandb: off}",
        "28: tracking.wandb: expected one of disabled, offline, online, found the text 'off'",
    ),
    (
        "stage: 1",
        "stage: 1\ntracking:\n  project: a/b",
        "29: tracking.project: use 1 to 64 visible characters, none of / \\ # ? % :; found the text 'a/b'",
    ),
    ("stage: 1", "stage: 1\ntracking: {tags: one}", "28: tracking.tags: expected a list of text, found the text 'one'"),
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
    ("zero:\n  stage: 1", "parallel: {cp: all}", "26: parallel.cp: expected a whole number or 'auto', found the text 'all'"),
    (
        "zero:\n  stage: 1",
        "parallel: {cp: auto, tokens_per_rank: 0}",
        "26: parallel.tokens_per_rank: must be at least 1, found the whole number 0",
    ),
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
        "9: model.head_dim: a head has 7 features, and only even numbers are implemented; change it",
    ),
    (
        "hidden_size: 32",
        "hidden_size: 12",
        "8: model.heads: a head has 3 features, and only even numbers are implemented; change it",
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
        "25: schedule.decay_steps: only kind wsd has decay_steps; delete it or set it to null, or change kind linear to wsd",
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
        "16: training.batch_size: 8 is not a multiple of parallel.dp 3 x training.micro_batch_size 2; change one of them, or the "
        "number of ranks",
    ),
]
MODELS = [
    (
        "  family: llama",
        "  preset: lama-7b",
        "4: model.preset: the presets are llama-7b, llama-13b, llama-2-7b, llama-3-8b, "
        "llama-3.2-1b, tinyllama-1.1b, mistral-7b, qwen2-7b, opt-125m, opt-1.3b, opt-2.7b, opt-6.7b; found the text 'lama-7b'",
    ),
    (
        "  family: llama",
        "  family: opt\n  preset: llama-7b",
        "4: model.family: preset llama-7b is of family llama, not opt; delete one of them",
    ),
    ("family: llama", "family: opt", "9: model.kv_heads: family opt has as many key/value heads as heads; delete it"),
    (
        "family: llama",
        "family: llama\n  positions: {extend: random}",
        "5: model.positions.extend: family llama has rotary positions; use rope_scaling or rope_theta",
    ),
    (
        "layers: 2",
        "layers: 2\n  rope_scaling: {kind: yarn, factor: 4}",
        "8: model.rope_scaling.original_length: kind yarn needs original_length; add it",
    ),
    (
        "layers: 2",
        "layers: 2\n  rope_scaling: {factor: 4}",
        "8: model.rope_scaling.factor: kind none has no factor; delete it or set it to null, or change kind",
    ),
    (
        "layers: 2",
        "layers: 2\n  rope_scaling:\n    kind: linear\n    factor: 4\n    beta_fast: 1",
        "11: model.rope_scaling.beta_fast: kind linear has no beta_fast; delete it or set it to null, or change kind",
    ),
    (
        "layers: 2",
        "layers: 2\n  rope_scaling: {kind: linear, factor: 0.5}",
        "8: model.rope_scaling.factor: must be at least 1, found the number 0.5",
    ),
    (
        "layers: 2",
        "layers: 2\n  rope_scaling: {kind: yarm, factor: 4}",
        "8: model.rope_scaling.kind: expected one of none, linear, dynamic, yarn, llama3, longrope, "
        "found the text 'yarm'; did you mean 'yarn'?",
    ),
    (
        "layers: 2",
        "layers: 2\n  rope_scaling: {kind: longrope, factor: 4, original_length: 8, short_factor: 3, long_factor: [1]}",
        "8: model.rope_scaling.short_factor: expected a list of numbers or null, found the whole number 3",
    ),
    (
        "activations: none",
        "activations: none\n  fused: all",
        "20: training.fused: expected 'auto' or 'none' or a list of 'norm' or 'rotary' or 'mlp' or 'loss', found the text 'all'",
    ),
    (
        "activations: none",
        "activations: none\n  fused: [mlp, foo]",
        "20: training.fused.1: expected 'norm' or 'rotary' or 'mlp' or 'loss', found the text 'foo'",
    ),
    (
        "path: data/tiny",
        "sources:\n    a: 1\n    data/notes: -1",
        "14: data.sources.data/notes: must be greater than 0, found the whole number -1",
    ),
    ("path: data/tiny", "sources: {a: b}", "12: data.sources.a: expected a number, found the text 'b'"),
    (
        "stage: 1",
        "stage: 1\ntracking: {tags: [a, 3]}",
        "28: tracking.tags.1: expected text, found the whole number 3; put it in quotes",
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

BAD_RECIPES = [
    *MODELS,
    *DEEPSPEED,
    *UNKNOWN_KEYS,
    *MISSING_KEYS,
    *WRONG_TYPES,
    *NUMBERS,
    *PATHS,
    *OUT_OF_RANGE,
    *CONFLICTS,
    *TOGETHER,
    *YAML_TRAPS,
]
