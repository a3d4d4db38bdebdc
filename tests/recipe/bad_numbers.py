"""Broken recipes, like those of bad_recipes.py: numbers with units, and numbers in quotes, in every kind of field that has one."""

# how each kind of number is written, its line and name, what is expected, and whether a fraction could be
KINDS = (
    ("steps: 100", "steps: {}", "15: training.steps", "a whole number", False),
    ("stage: 1", "stage: {}", "27: zero.stage", "a whole number", False),
    ("kv_heads: 2", "kv_heads: {}", "9: model.kv_heads", "a whole number or null", False),
    ("zero:\n", "parallel: {{cp: {}}}\nzero:\n", "26: parallel.cp", "a whole number or 'auto'", False),
    ("lr: 1e-3", "lr: {}", "21: optimizer.lr", "a number", True),
    ("lr: 1e-3", "lr: 1e-3\n  grad_clip: {}", "22: optimizer.grad_clip", "a number or null", True),
    ("betas: [0.9, 0.95]", "betas: [0.9, {}]", "22: optimizer.betas.1", "a number", True),
    ("path: data/tiny", "sources: {{data/tiny: {}}}", "12: data.sources.data/tiny", "a number", True),
)
UNITS = [
    (
        old,
        new.format(text),
        f"{place}: expected {expected}, found the text '{text}'; write the number alone and in full, without a unit",
    )
    for old, new, place, expected, _ in KINDS
    for text in ("32K", "8GiB", "5m", "1.5h", "10%", "100 ms")
]
QUOTED = [
    (
        old,
        new.format("'1e-4'"),
        f"{place}: expected {expected}, found the text '1e-4'{'; remove the quotes' if fraction else ''}",
    )
    for old, new, place, expected, fraction in KINDS
]
NUMBERS = [
    *UNITS,
    *QUOTED,
    (
        "  stage: 1",
        "  stage: 1\n  deepspeed: {steps_per_print: 32K}",
        "28: zero.deepspeed.steps_per_print: expected a whole number of at least 1, found '32K'",
    ),
    ("layers: 2", "layers: 10001", "7: model.layers: must be at most 10000, found the whole number 10001"),
    ("kv_heads: 2", "head_dim: 65538", "9: model.head_dim: a head has 65538 features; at most 65536 work"),
]
