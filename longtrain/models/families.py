"""Model families as data: which parts a decoder has, and what Hugging Face calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TypeVar

from longtrain.errors import PlanError
from longtrain.models.config import ModelConfig

Part = TypeVar("Part")


@dataclass(frozen=True)
class Family:
    """Choices by name (`choose` finds what implements them) and the weight map.

    names: Hugging Face's name of every parameter outside the blocks; block_names: of every one inside, below our `blocks.<i>.` and
    its `layers.<i>.` (block_prefix). hugging_face: the family's own part of config.json.
    """

    norm: str
    mlp: str
    positions: str
    bias: bool
    names: Mapping[str, str]
    block_names: Mapping[str, str]
    block_prefix: str
    hugging_face: Callable[[ModelConfig], dict[str, object]]


def _llama_config(config: ModelConfig) -> dict[str, object]:
    """LLaMA, or Mistral where transformers' LLaMA has no equal: a sliding window (which counts the query there too), or heads
    that do not divide hidden_size."""
    mistral = config.window is not None or config.hidden_size % config.heads != 0
    shared: dict[str, object] = {
        "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
        "model_type": "mistral" if mistral else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        # transformers 5 reads rope_parameters, earlier ones rope_theta
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_dropout": 0.0,
    }
    return shared | ({"sliding_window": config.window} if mistral else {"attention_bias": False, "mlp_bias": False})


LLAMA = Family(
    norm="rmsnorm",
    mlp="swiglu",
    positions="rotary",
    bias=False,
    names={
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    },
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
    hugging_face=_llama_config,
)
"""Touvron et al. 2023."""

FAMILIES: Mapping[str, Family] = {"llama": LLAMA}


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
    names = {"embedding.weight": family.names["embedding.weight"]}
    for i in range(config.layers):
        names |= {f"blocks.{i}.{ours}": f"{family.block_prefix}{i}.{theirs}" for ours, theirs in family.block_names.items()}
    names |= {ours: theirs for ours, theirs in family.names.items() if ours not in names}
    if config.tied_embeddings:
        del names["head.weight"]
    return names


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, without building one; tied parameters once, as the embedding."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    of_name: dict[str, tuple[int, ...]] = {
        "embedding.weight": (config.vocab_size, hidden),
        "attention_norm.weight": (hidden,),
        "attention.query.weight": (queries, hidden),
        "attention.key.weight": (keys, hidden),
        "attention.value.weight": (keys, hidden),
        "attention.output.weight": (hidden, queries),
        "mlp_norm.weight": (hidden,),
        "mlp.gate.weight": (inner, hidden),
        "mlp.up.weight": (inner, hidden),
        "mlp.down.weight": (hidden, inner),
        "norm.weight": (hidden,),
        "head.weight": (config.vocab_size, hidden),
    }
    return {name: of_name[local] for name, local in _local_names(hugging_face_names(config))}


def _local_names(names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name in names:
        yield name, name.split(".", 2)[2] if name.startswith("blocks.") else name


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the decoder, exactly; tied ones once."""
    return sum(prod(shape) for shape in parameter_shapes(config).values())
