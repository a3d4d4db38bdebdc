"""A decoder's configuration as Hugging Face's config.json, written and read. What is not implemented is refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from longtrain.errors import CheckpointError, PlanError
from longtrain.models.config import HIDDEN_ACTS, ModelConfig
from longtrain.models.rope import LENGTH, LISTS, SCALINGS, Dynamic, LongRope, RopeScaling, kind_of, make_scaling, to_hugging_face

CONFIG = "config.json"
FULL, SLIDING = "full_attention", "sliding_attention"
"""What layer_types calls attention without and with a window."""


def config_json(config: ModelConfig, dtype: torch.dtype, bos: int | None, eos: int | None) -> dict[str, object]:
    """The contents of config.json, for transformers 5 and for earlier versions. bos, eos: token ids."""
    name = str(dtype).removeprefix("torch.")
    shared = {"bos_token_id": bos, "eos_token_id": eos, "use_cache": True, "dtype": name, "torch_dtype": name}
    return _WRITERS[config.family](config) | shared


def differs_when_shorter(config: ModelConfig) -> str | None:
    """Why transformers computes something else than training for inputs shorter than the training length; None: it does not.

    It chooses the frequencies of these scalings by the length of each input, training had those of one length (models/rope.py).
    """
    scaling = config.rope_scaling
    if not isinstance(scaling, Dynamic | LongRope) or scaling.length <= scaling.original_length:
        return None
    before = f"rope_scaling {kind_of(scaling)}: the export computes what was trained for inputs of "
    if isinstance(scaling, LongRope):
        return (
            f"{before}more than {scaling.original_length} tokens. For shorter ones transformers takes short_factor, which this "
            f"training never did: for them write the numbers of long_factor there too, in {CONFIG}"
        )
    return (
        f"{before}{scaling.length} tokens. For every shorter one transformers raises rope_theta less than training did, up to "
        f"{scaling.original_length} tokens not at all: for them write the raised one to {CONFIG}, without scaling, as "
        "docs/attention.md says"
    )


def read_config(folder: Path) -> ModelConfig:
    """What the config.json of a Hugging Face folder describes.

    max_positions is its max_position_embeddings, and scalings that depend on the length are for that length.

    Raises:
        CheckpointError: the file is missing or damaged, or of a model that is not implemented, with the field to blame.
    """
    path = folder / CONFIG
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder}: {_not_a_model(folder)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, so it is damaged or foreign")
    kind = str(content.get("model_type"))
    if kind not in _READERS:
        raise CheckpointError(f"{path}: model_type {kind!r} is not implemented; there are: {', '.join(_READERS)}")
    try:
        return _READERS[kind](_Fields(path, content))
    except PlanError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _not_a_model(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder; model.init is the path of a Hugging Face folder, relative to the current directory"
    if (folder / "checkpoints").is_dir() or (folder / "manifest.json").is_file():
        return (
            "is a run of longtrain, not a Hugging Face folder; write one with `longtrain export RUN --out FOLDER --dtype fp32` "
            "and name that (a complete run also has one: huggingface/)"
        )
    return f"holds no {CONFIG}, so it is not a Hugging Face folder"


def _llama(config: ModelConfig) -> dict[str, object]:
    """LLaMA, or Mistral where transformers' LLaMA has no equal: a sliding window (which counts the query there too), or heads
    that do not divide hidden_size."""
    if config.window is not None or config.hidden_size % config.heads != 0:
        kind = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
        return kind | _rotary_model(config) | {"sliding_window": config.window}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return kind | _rotary_model(config) | {"attention_bias": False, "mlp_bias": False}


def _qwen2(config: ModelConfig) -> dict[str, object]:
    window = {"use_sliding_window": config.window is not None, "sliding_window": config.window, "max_window_layers": 0}
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"} | _rotary_model(config) | window


def _rotary_model(config: ModelConfig) -> dict[str, object]:
    scaling, theta = config.rope_scaling, {"rope_theta": config.rope_theta}
    known = config.max_positions
    if isinstance(scaling, Dynamic):
        known = scaling.original_length
    scaled = {"rope_type": "default"} if scaling is None else to_hugging_face(scaling)
    # transformers 5 reads rope_parameters, earlier ones rope_theta and rope_scaling, with the kind as rope_type or type
    old = {} if scaling is None else {"rope_scaling": scaled | theta | {"type": scaled["rope_type"]}}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": known,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": scaled | theta,
        **theta,
        **old,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_dropout": config.attention_dropout,
    }


def _opt(config: ModelConfig) -> dict[str, object]:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "word_embed_proj_dim": config.hidden_size,
        "ffn_dim": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.max_positions,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "init_std": config.init_std,
        "tie_word_embeddings": config.tied_embeddings,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "layerdrop": 0.0,
        # transformers sets the embedding of this id to 0 in what it initialises itself; ours has no such id
        "pad_token_id": None,
    }


_WRITERS: Mapping[str, Callable[[ModelConfig], dict[str, object]]] = {"llama": _llama, "qwen2": _qwen2, "opt": _opt}


class _Fields:
    """config.json with suspicion: every value has the type that is asked for, or its name is refused."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path, self.content = path, content
        if content.get("quantization_config") is not None:
            raise self.refusal("quantization_config", "quantized weights cannot be trained; name a folder that holds them whole")

    def refusal(self, name: str, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {name}: {message}")

    def count(self, name: str, default: int | None = None) -> int:
        value = self.content.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            raise self.refusal(name, f"expected a whole number, found {_short(value)}")
        return value

    def number(self, name: str, default: float) -> float:
        """Above 0."""
        value = self.content.get(name, default)
        if not _is_number(value) or value <= 0:
            raise self.refusal(name, f"expected a number above 0, found {_short(value)}")
        return float(value)

    def numbers(self, name: str) -> float | tuple[float, ...] | None:
        """A number, or a list of them, or nothing."""
        value = self.content[name]
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not _is_number(number):
                raise self.refusal(name, f"expected a number, found {_short(number)}")
        return tuple(value) if isinstance(value, list) else value

    def flag(self, name: str, default: bool) -> bool:
        value = self.content.get(name, default)
        if not isinstance(value, bool):
            raise self.refusal(name, f"expected true or false, found {_short(value)}")
        return value

    def must_be(self, name: str, wanted: object, default: object) -> None:
        value = self.content.get(name, default)
        if value != wanted:
            raise self.refusal(name, f"{_short(value)} is not implemented, only {wanted!r}")

    def one_of(self, name: str, known: Collection[str], default: str) -> str:
        value = self.content.get(name, default)
        if not isinstance(value, str) or value not in known:
            raise self.refusal(name, f"{_short(value)} is not implemented; there are: {', '.join(known)}")
        return value

    def layer_kind(self) -> str | None:
        """What layer_types says, which must be the same of every layer; None where it says nothing."""
        given = self.content.get("layer_types") or []
        if not isinstance(given, list) or not all(isinstance(kind, str) for kind in given):
            raise self.refusal("layer_types", f"expected a list of names, found {_short(given)}")
        if len(set(given)) > 1:
            raise self.refusal("layer_types", "layers of different kinds are not implemented")
        return given[0] if given else None


def _is_number(value: object) -> bool:
    """Whether it is one that a float can hold; JSON as Python reads it has nan and whole numbers of any size."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return isfinite(value) if isinstance(value, float) else abs(value) < 2**63


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _read_llama(fields: _Fields) -> ModelConfig:
    fields.must_be("attention_bias", False, False)
    fields.must_be("mlp_bias", False, False)
    if fields.layer_kind() not in (None, FULL):
        raise fields.refusal("layer_types", f"{_short(fields.layer_kind())} is not implemented, only {FULL!r}")
    return _read_rotary("llama", fields, None)


def _read_mistral(fields: _Fields) -> ModelConfig:
    window = fields.content.get("sliding_window", 4096)
    return _read_rotary("llama", fields, None if window is None else fields.count("sliding_window", 4096))


def _read_qwen2(fields: _Fields) -> ModelConfig:
    slides = fields.flag("use_sliding_window", False) and fields.content.get("sliding_window", 4096) is not None
    kind = fields.layer_kind()
    if slides and kind is None:
        first, layers = fields.count("max_window_layers", 28), fields.count("num_hidden_layers")
        if 0 < first < layers:
            raise fields.refusal(
                "max_window_layers", f"a sliding window in some layers only is not implemented; {first} of {layers} have none"
            )
        kind = SLIDING if first < layers else FULL
    windowed = slides and kind == SLIDING
    if kind not in (None, FULL) and not windowed:
        raise fields.refusal("layer_types", f"{_short(kind)} is not implemented without use_sliding_window and sliding_window")
    return _read_rotary("qwen2", fields, fields.count("sliding_window", 4096) if windowed else None)


def _read_rotary(family: str, fields: _Fields, window: int | None) -> ModelConfig:
    heads, hidden, length = (fields.count(name) for name in ("num_attention_heads", "hidden_size", "max_position_embeddings"))
    if heads < 1:
        raise fields.refusal("num_attention_heads", f"must be at least 1, found {heads}")
    theta, scaling = _read_rope(fields, length)
    return ModelConfig(
        family=family,
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden,
        layers=fields.count("num_hidden_layers"),
        heads=heads,
        kv_heads=fields.count("num_key_value_heads", heads),
        head_dim=fields.count("head_dim", hidden // heads),
        intermediate_size=fields.count("intermediate_size"),
        max_positions=length,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        window=window,
        init_std=fields.number("initializer_range", 0.02),
        # swish: another name of silu
        hidden_act="silu" if fields.content.get("hidden_act") == "swish" else fields.one_of("hidden_act", HIDDEN_ACTS, "silu"),
    )


def _read_rope(fields: _Fields, length: int) -> tuple[float, RopeScaling | None]:
    """theta and scaling, from rope_parameters of transformers 5 or rope_theta and rope_scaling of earlier ones."""
    where = "rope_parameters" if fields.content.get("rope_scaling") in (None, {}) else "rope_scaling"
    given = fields.content.get(where)
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise fields.refusal(where, f"expected an object, found {_short(given)}")
    nested = next((name for name, value in given.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise fields.refusal(where, f"has parameters of {nested} apart, and layers of different kinds are not implemented")
    inside = _Fields(fields.path, given)
    theta = inside.number("rope_theta", fields.number("rope_theta", 10000.0))
    inside.must_be("partial_rotary_factor", 1.0, fields.content.get("partial_rotary_factor", 1.0))
    inside.must_be("truncate", True, True)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return theta, None
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise fields.refusal(where, f"rope_type {_short(kind)} is not implemented; there are: default, {', '.join(SCALINGS)}")
    # finetuned: a note of YaRN's authors on their models, which nothing reads
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor", "truncate", "finetuned", LENGTH}
    values: dict[str, Any] = {name: inside.numbers(name) for name in given if name not in known}
    for name in values.keys() & SCALINGS[kind].__dataclass_fields__.keys():
        if values[name] is not None and isinstance(values[name], tuple) != (name in LISTS):
            wanted = "a list of numbers" if name in LISTS else "a number"
            raise fields.refusal(name, f"expected {wanted}, found {_short(given[name])}")
    original = length
    if kind in ("dynamic", "yarn", "llama3", "longrope"):
        original = length if kind == "dynamic" else inside.count(LENGTH, fields.count(LENGTH, length))
        values["original_length"] = original
        if values.get("factor") is None:
            values["factor"] = length / original
    if kind == "yarn":  # transformers takes a 0 for nothing said
        values |= {name: values.get(name) or None for name in ("mscale", "mscale_all_dim")}
    trained = round(original * values["factor"]) if kind == "dynamic" else length
    return theta, make_scaling(kind, trained, **values)


def _read_opt(fields: _Fields) -> ModelConfig:
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    for name, wanted in (("do_layer_norm_before", True), ("enable_bias", True), ("layer_norm_elementwise_affine", True)):
        fields.must_be(name, wanted, True)
    fields.must_be("_remove_final_layer_norm", False, False)
    fields.must_be("activation_function", "relu", "relu")
    fields.must_be("word_embed_proj_dim", hidden, hidden)
    if heads < 1 or hidden % heads:
        raise fields.refusal("num_attention_heads", f"{heads} heads do not divide hidden_size {hidden}")
    return ModelConfig(
        family="opt",
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden,
        layers=fields.count("num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=fields.count("ffn_dim"),
        max_positions=fields.count("max_position_embeddings"),
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        init_std=fields.number("init_std", 0.02),
    )


_READERS: Mapping[str, Callable[[_Fields], ModelConfig]] = {
    "llama": _read_llama,
    "mistral": _read_mistral,
    "qwen2": _read_qwen2,
    "opt": _read_opt,
}
