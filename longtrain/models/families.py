"""Model families as data: which parts a decoder has, and what Hugging Face calls its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TypeVar

from longtrain.errors import PlanError
from longtrain.models.config import ModelConfig

Part = TypeVar("Part")


@dataclass(frozen=True)
class Family:
    """Choices by name (`choose` finds what implements them) and the weight map.

    biases: the linear layers of a block that add one. names: Hugging Face's name of every parameter outside the blocks, those
    before the blocks in `before`; block_names: of every one inside, below our `blocks.<i>.` and its `layers.<i>.` (block_prefix).
    """

    norm: str
    mlp: str
    positions: str
    biases: frozenset[str]
    before: Mapping[str, str]
    names: Mapping[str, str]
    block_names: Mapping[str, str]
    block_prefix: str


LLAMA = Family(
    norm="rmsnorm",
    mlp="gated",
    positions="rotary",
    biases=frozenset(),
    before={"embedding.weight": "model.embed_tokens.weight"},
    names={"norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"},
    block_names={
        "attention_norm.weight": "input_layernorm.weight",
        "attention.query.weight": "self_attn.q_proj.weight",
        "attention.key.weight": "self_attn.k_proj.weight",
        "attention.value.weight": "self_attn.v_proj.weight",
        "attention.output.weight": "self_attn.o_proj.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
        "mlp.gate.weight": "mlp.gate_proj.weight",
        "mlp.up.weight": "mlp.up_proj.weight",
        "mlp.down.weight": "mlp.down_proj.weight",
    },
    block_prefix="model.layers.",
)
"""Touvron et al. 2023; Mistral (Jiang et al. 2023) is one with a window."""


def _with_biases(names: Mapping[str, str], biases: frozenset[str]) -> dict[str, str]:
    """Every bias after the weight of its linear layer, as modules register them."""
    found: dict[str, str] = {}
    for ours, theirs in names.items():
        found[ours] = theirs
        layer = ours.removesuffix(".weight")
        if layer.rpartition(".")[2] in biases:
            found[f"{layer}.bias"] = theirs.removesuffix("weight") + "bias"
    return found


_QUERY_KEY_VALUE = frozenset({"query", "key", "value"})

QWEN2 = replace(LLAMA, biases=_QUERY_KEY_VALUE, block_names=_with_biases(LLAMA.block_names, _QUERY_KEY_VALUE))
"""Yang et al. 2024: LLaMA with biases of queries, keys and values."""

_ALL = frozenset({"query", "key", "value", "output", "up", "down", "attention_norm", "mlp_norm"})

OPT = Family(
    norm="layernorm",
    mlp="relu",
    positions="learned",
    biases=_ALL,
    before={"embedding.weight": "model.decoder.embed_tokens.weight", "positions.weight": "model.decoder.embed_positions.weight"},
    names={
        "norm.weight": "model.decoder.final_layer_norm.weight",
        "norm.bias": "model.decoder.final_layer_norm.bias",
        "head.weight": "lm_head.weight",
    },
    block_names=_with_biases(
        {
            "attention_norm.weight": "self_attn_layer_norm.weight",
            "attention.query.weight": "self_attn.q_proj.weight",
            "attention.key.weight": "self_attn.k_proj.weight",
            "attention.value.weight": "self_attn.v_proj.weight",
            "attention.output.weight": "self_attn.out_proj.weight",
            "mlp_norm.weight": "final_layer_norm.weight",
            "mlp.up.weight": "fc1.weight",
            "mlp.down.weight": "fc2.weight",
        },
        _ALL,
    ),
    block_prefix="model.decoder.layers.",
)
"""Zhang et al. 2022."""

FAMILIES: Mapping[str, Family] = {"llama": LLAMA, "qwen2": QWEN2, "opt": OPT}

POSITION_OFFSET = 2
"""Rows of a table of learned positions before the one of position 0: OPT's, which it inherited from a padding token."""


def choose(what: str, name: str, known: Mapping[str, Part]) -> Part:
    """The part of that name. Raises PlanError with the known ones where there is none."""
    if name not in known:
        raise PlanError(f"{what} {name!r} is not implemented; choose one of: {', '.join(known)}")
    return known[name]


def family_of(config: ModelConfig) -> Family:
    """Raises PlanError where the family is unknown."""
    return choose("model.family", config.family, FAMILIES)


def hugging_face_names(config: ModelConfig) -> dict[str, str]:
    """Hugging Face's name of every parameter of ours, in the order of the decoder; tied parameters once, as the embedding."""
    family = family_of(config)
    names = dict(family.before)
    for i in range(config.layers):
        names |= {f"blocks.{i}.{ours}": f"{family.block_prefix}{i}.{theirs}" for ours, theirs in family.block_names.items()}
    names |= family.names
    if config.tied_embeddings:
        del names["head.weight"]
    return names


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, without building one; tied parameters once, as the embedding."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    of_layer: dict[str, tuple[int, ...]] = {
        "embedding": (config.vocab_size, hidden),
        "positions": (config.max_positions + POSITION_OFFSET, hidden),
        "attention_norm": (hidden,),
        "attention.query": (queries, hidden),
        "attention.key": (keys, hidden),
        "attention.value": (keys, hidden),
        "attention.output": (hidden, queries),
        "mlp_norm": (hidden,),
        "mlp.gate": (inner, hidden),
        "mlp.up": (inner, hidden),
        "mlp.down": (hidden, inner),
        "norm": (hidden,),
        "head": (config.vocab_size, hidden),
    }
    return {
        name: of_layer[layer] if kind == "weight" else of_layer[layer][:1]
        for name, layer, kind in _local_names(hugging_face_names(config))
    }


def _local_names(names: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """(name, layer within its block or the decoder, "weight" or "bias")."""
    for name in names:
        layer, _, kind = (name.split(".", 2)[2] if name.startswith("blocks.") else name).rpartition(".")
        yield name, layer, kind


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the decoder, exactly; tied ones once."""
    return sum(prod(shape) for shape in parameter_shapes(config).values())
