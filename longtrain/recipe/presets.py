"""Public models by name: the fields of a recipe's model section as their config.json has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LLAMA = {"family": "llama", "vocab_size": 32000, "hidden_size": 4096, "layers": 32, "heads": 32, "intermediate_size": 11008}
_OPT = {"family": "opt", "vocab_size": 50272, "tied_embeddings": True, "max_positions": 2048}
_LLAMA_3 = {"family": "llama", "vocab_size": 128256, "kv_heads": 8, "rope_theta": 500000.0}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Touvron et al. 2023
    "llama-7b": _LLAMA | {"norm_eps": 1e-6, "max_positions": 2048},
    "llama-13b": _LLAMA
    | {"hidden_size": 5120, "layers": 40, "heads": 40, "intermediate_size": 13824, "norm_eps": 1e-6, "max_positions": 2048},
    "llama-2-7b": _LLAMA | {"max_positions": 4096},
    # Grattafiori et al. 2024
    "llama-3-8b": _LLAMA_3 | {"hidden_size": 4096, "layers": 32, "heads": 32, "intermediate_size": 14336, "max_positions": 8192},
    "llama-3.2-1b": _LLAMA_3
    | {
        "hidden_size": 2048,
        "layers": 16,
        "heads": 32,
        "intermediate_size": 8192,
        "tied_embeddings": True,
        "max_positions": 131072,
        "rope_scaling": {
            "kind": "llama3",
            "factor": 32.0,
            "original_length": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    },
    # Zhang et al. 2024
    "tinyllama-1.1b": _LLAMA | {"hidden_size": 2048, "layers": 22, "kv_heads": 4, "intermediate_size": 5632, "max_positions": 2048},
    # Jiang et al. 2023, version 0.1
    "mistral-7b": _LLAMA | {"kv_heads": 8, "intermediate_size": 14336, "window": 4096, "max_positions": 32768},
    # Yang et al. 2024
    "qwen2-7b": {
        "family": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "layers": 28,
        "heads": 28,
        "kv_heads": 4,
        "intermediate_size": 18944,
        "rope_theta": 1000000.0,
        "norm_eps": 1e-6,
        "max_positions": 131072,
    },
    # Zhang et al. 2022
    "opt-125m": _OPT | {"hidden_size": 768, "layers": 12, "heads": 12, "intermediate_size": 3072},
    "opt-1.3b": _OPT | {"hidden_size": 2048, "layers": 24, "heads": 32, "intermediate_size": 8192},
    "opt-2.7b": _OPT | {"hidden_size": 2560, "layers": 32, "heads": 32, "intermediate_size": 10240},
    "opt-6.7b": _OPT | {"hidden_size": 4096, "layers": 32, "heads": 32, "intermediate_size": 16384},
}
