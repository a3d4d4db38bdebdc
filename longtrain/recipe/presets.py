"""Public models by name: the fields of a recipe's model section as their config.json has them, and where they can be had."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
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

_NO_BIN, _NO_ORIGINAL = ("--exclude", "*.bin"), ("--exclude", "original/*")
_PICKLED = ("--include", "*.json", "--include", "*.txt", "--include", "pytorch_model*")

HUB: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "llama-7b": ("huggyllama/llama-7b", _NO_BIN),
    "llama-13b": ("huggyllama/llama-13b", _NO_BIN),
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", _NO_BIN),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", _NO_ORIGINAL),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", _NO_ORIGINAL),
    "tinyllama-1.1b": ("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", _NO_BIN),
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", _NO_BIN),
    "qwen2-7b": ("Qwen/Qwen2-7B", ()),
    "opt-125m": ("facebook/opt-125m", _PICKLED),
    "opt-1.3b": ("facebook/opt-1.3b", _PICKLED),
    "opt-2.7b": ("facebook/opt-2.7b", _PICKLED),
    "opt-6.7b": ("facebook/opt-6.7b", _PICKLED),
}
"""Their repositories on the Hugging Face hub, and which files to take: the same weights are there in several forms."""


def fetch_commands(preset: str | None, folder: str) -> list[str]:
    """Shell commands that bring the public weights and tokenizer of a preset to `folder`; none without a preset."""
    if preset is None:
        return []
    repository, files = HUB[preset]
    if files is not _PICKLED:
        return [shlex.join(["hf", "download", repository, *files, "--local-dir", folder])]
    pickled = f"{folder.rstrip('/')}-hub"
    return [
        shlex.join(["hf", "download", repository, *files, "--local-dir", pickled]),
        shlex.join(["python", "scripts/convert_checkpoint.py", pickled, "--out", folder]),
    ]


def how_to_get(preset: str | None, folder: str) -> str:
    """What brings weights that are not in `folder`, in words."""
    commands = fetch_commands(preset, folder)
    if commands:
        return "get it with" + "".join(f"\n  {command}" for command in commands)
    name = re.fullmatch(r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)", folder)
    if name is None or name[1] == "weights" or Path(name[1]).exists():
        return "put a Hugging Face folder with its weights there"
    local = f"weights/{name[2]}"
    return (
        "put a Hugging Face folder with its weights there; if that is a name of the hub, get it with\n  "
        f"{shlex.join(['hf', 'download', folder, '--local-dir', local])}\nand set model.init to {local}"
    )
