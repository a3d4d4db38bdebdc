"""A Hugging Face folder of pickled weights as one of safetensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from longtrain.errors import CheckpointError
from longtrain.models.config_json import read_config
from longtrain.models.huggingface import SHARD_BYTES, write_weights
from longtrain.models.pretrained import open_pretrained

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def to_safetensors(folder: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> Path:
    """Writes the weights of `folder` (pytorch_model.bin, or shards of one), its JSON and its tokenizer files to `out`, which must
    not exist. Only tensors are unpickled: a file that holds anything else is refused. One file is held at a time, and a shard.

    Raises:
        CheckpointError: a file is missing, damaged or holds more than tensors; the model is not implemented; `out` exists.
    """
    config = read_config(folder)
    if out.exists():
        raise CheckpointError(f"{out} exists; name a folder that does not")
    part = out.absolute().with_name(f".{out.name}.{os.getpid()}.tmp")
    part.mkdir(parents=True)
    try:
        write_weights(part, _tensors(folder, config.tied_embeddings), shard_bytes)
        for path in folder.iterdir():
            if path.suffix in (".json", ".model", ".txt") and path.name != PICKLE_INDEX and path.is_file():
                shutil.copyfile(path, part / path.name)
        open_pretrained(part, config)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _tensors(folder: Path, tied: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every file, without the second name of a tied head."""
    for file in _files(folder):
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{file}: is damaged or holds more than tensors: {reason}") from None
        if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
            raise CheckpointError(f"{file}: holds something else than named tensors")
        for name, tensor in content.items():
            if not (tied and name == "lm_head.weight"):
                yield name, tensor.contiguous()


def _files(folder: Path) -> list[Path]:
    if (folder / PICKLE).is_file():
        return [folder / PICKLE]
    try:
        names = sorted(set(json.loads((folder / PICKLE_INDEX).read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{folder}: holds neither {PICKLE} nor a usable {PICKLE_INDEX}; only these need converting") from None
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{folder / PICKLE_INDEX}: names files outside its folder")
    return [folder / name for name in names]
