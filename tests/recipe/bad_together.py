"""Broken recipes, like those of bad_recipes.py: values of several sections that cannot hold together on any ranks."""

MINIMAL = (
    "minimal runs attention again in the backward, and with parallel.cp > 1 its exchange too; use full, which keeps the attention "
    "output"
)
LONGROPE = "rope_scaling: {{kind: longrope, factor: 4, original_length: 8, short_factor: [{}], long_factor: [{}]}}"


def _opt(more: str) -> str:
    return (
        f"  family: opt\n  vocab_size: 64\n  hidden_size: 32\n  layers: 2\n  heads: 4\n  intermediate_size: 48\n{more}"
        "data:\n  path: data/tiny\n"
    )


_LLAMA = (
    "  family: llama\n  vocab_size: 64\n  hidden_size: 32\n  layers: 2\n  heads: 4\n  kv_heads: 2\n  intermediate_size: 48\n"
    "data:\n  path: data/tiny\n"
)

TOGETHER = [
    ("activations: none", "activations: minimal\nparallel: {cp: 2}", f"19: training.activations: {MINIMAL}"),
    ("activations: none", "activations: minimal\nparallel: {cp: auto, ulysses: 2}", f"19: training.activations: {MINIMAL}"),
    (
        "heads: 4\n  kv_heads: 2\n  intermediate_size: 48",
        "heads: 3\n  head_dim: 8\n  intermediate_size: 48\nparallel: {cp: 2, ulysses: 2}",
        "11: parallel.ulysses: 3 query heads do not split over 2 ranks; change it (1: a ring of all cp ranks)",
    ),
    (
        "heads: 4\n  kv_heads: 2\n  intermediate_size: 48",
        "heads: 12\n  head_dim: 8\n  kv_heads: 3\n  intermediate_size: 48\nparallel:\n  cp: auto\n  ulysses: 2",
        "14: parallel.ulysses: 3 key-value heads neither split over 2 ranks nor does each go to equally many of them; change it "
        "(1: a ring of all cp ranks)",
    ),
    (
        "layers: 2",
        "layers: 2\n  " + LONGROPE.format("1, 1", "1, 1, 1, 1"),
        "8: model.rope_scaling.short_factor: has 2 numbers, but a head of 8 features has 4 pairs of them; give one a pair",
    ),
    (
        "layers: 2",
        "layers: 2\n  " + LONGROPE.format("1, 1, 1, 1", "1, 1, 1, 1, 1"),
        "8: model.rope_scaling.long_factor: has 5 numbers, but a head of 8 features has 4 pairs of them; give one a pair",
    ),
    (
        _LLAMA + "training:\n",
        _opt("") + "training:\n  fused: [norm, rotary]\n",
        "13: training.fused: family opt has no rotary to fuse; delete it from the list",
    ),
    (
        _LLAMA + "training:\n",
        _opt("") + "training:\n  fused: [mlp, rotary]\n",
        "13: training.fused: family opt has no rotary and no mlp to fuse; delete it from the list",
    ),
    (
        _LLAMA,
        _opt("  init: weights\n  max_positions: 32\n"),
        "15: training.sequence_length: 64 tokens, but the weights of model.init have learned 32 positions; shorten it, or set "
        "model.positions.extend to interpolate or random",
    ),
]

# what stands next to these and is sound
SOUND = [
    ("activations: none", "activations: minimal\nparallel: {cp: 1}"),
    ("activations: none", "activations: minimal\nparallel: {cp: auto}"),
    ("activations: none", "activations: full\nparallel: {cp: 2, ulysses: 2}"),
    ("activations: none", "activations: none\nparallel: {cp: 4, ulysses: 4}"),
    ("layers: 2", "layers: 2\n  " + LONGROPE.format("1, 1, 1, 1", "1, 1, 1, 1")),
    (_LLAMA + "training:\n", _opt("") + "training:\n  fused: [norm, loss]\n"),
    (_LLAMA, _opt("  init: weights\n  max_positions: 64\n")),
    (_LLAMA, _opt("  init: weights\n  max_positions: 32\n  positions: {extend: random}\n")),
    (_LLAMA, _opt("  max_positions: 32\n")),
    (_LLAMA, "  init: weights\ndata:\n  path: data/tiny\nparallel: {cp: 3, ulysses: 3}\n"),
]
