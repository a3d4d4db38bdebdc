"""Pickled weights, of a Hugging Face folder or of a checkpoint of DeepSpeed's, as a Hugging Face folder of safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from longtrain.errors import CheckpointError
from longtrain.models.config import ModelConfig
from longtrain.models.config_json import CONFIG, read_config
from longtrain.models.deepspeed_folder import open_deepspeed
from longtrain.models.families import hugging_face_names
from longtrain.models.huggingface import SHARD_BYTES, appearing_whole, copy_file, write_weights
from longtrain.models.pretrained import INDEX, open_pretrained
from longtrain.models.unpickled import named_tensors

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
HEAD = "lm_head.weight"


def to_safetensors(folder: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> Path:
    """Writes the weights of `folder` (pytorch_model.bin, or shards of one), its JSON and its tokenizer files to `out`, which must
    not exist. Only tensors are unpickled: a file that holds anything else is refused. One file is held at a time, and a shard,
    beside the embedding and the copy of it that a tied head may have, which is left behind.

    Raises:
        CheckpointError: a file is missing, damaged or holds more than dense tensors of floating point; a tensor is missing, unknown
            or of another shape; the copy of a tied head differs; the model is not implemented; `out` exists.
    """
    config = read_config(folder)
    return _write(out, config, _tensors(folder, config), folder, folder, shard_bytes)


def from_deepspeed(folder: Path, out: Path, described: Path | None = None, shard_bytes: int = SHARD_BYTES) -> Path:
    """Writes the fp32 master weights, at stage 0 the model's own, of a checkpoint that DeepSpeed saved to the Hugging Face folder
    `out`, which must not exist.

    folder: what save_checkpoint was given, or one step in it. described: the Hugging Face folder whose config.json and tokenizer
    belong to the model; by default `folder` or the one above it. Parameters may have Hugging Face's names or ours. One parameter is
    held at a time, and a shard; optimizer moments are left behind.

    Raises:
        CheckpointError: as `open_deepspeed`; config.json is missing or of another model; `out` exists.
    """
    weights = open_deepspeed(folder)
    if described is None:
        described = next((place for place in (folder, weights.step, weights.step.parent) if (place / CONFIG).is_file()), None)
        if described is None:
            raise CheckpointError(f"{folder}: has no {CONFIG}; name the Hugging Face folder of its model with --config FOLDER")
    config = read_config(described)
    names = hugging_face_names(config)
    theirs = names if weights.shapes.keys() <= names.keys() else {name: name for name in weights.shapes}
    tensors = ((theirs[name], weights.read(name)) for name in weights.shapes)
    return _write(out, config, tensors, folder, described, shard_bytes)


def _write(
    out: Path, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], source: Path, described: Path, shard_bytes: int
) -> Path:
    """A folder of the weights of `source`, with the JSON and tokenizer files of `described`, checked, whole or not at all."""
    with appearing_whole(out) as part:
        write_weights(part, tensors, shard_bytes)
        for path in described.iterdir():
            if path.suffix in (".json", ".model", ".txt") and path.name not in (PICKLE_INDEX, INDEX) and path.is_file():
                copy_file(path, part / path.name)
        try:
            open_pretrained(part, config)
        except CheckpointError as error:
            # the hidden folder is gone when this is read, and what is wrong came out of `source`
            hidden = rf"{re.escape(str(part))}(/model[\w.-]*\.safetensors)?"
            raise CheckpointError(re.sub(hidden, lambda _: str(source), str(error))) from None
    return out


def _tensors(folder: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every file, no two in one memory, without the second name of a tied head, which must be equal."""
    embedding = hugging_face_names(config)["embedding.weight"]
    head: tuple[Path, Tensor] | None = None
    table: Tensor | None = None
    for file in _files(folder):
        storages = set[int]()
        for name, tensor in named_tensors(file).items():
            if config.tied_embeddings and name == HEAD:
                head = (file, tensor)
                continue
            if embedding in (name, f"model.{name}"):
                table = tensor
            storage = tensor.untyped_storage().data_ptr()
            yield name, tensor.clone(memory_format=torch.contiguous_format) if storage in storages else tensor.contiguous()
            storages.add(storage)
    if head is not None and table is not None and not torch.equal(head[1], table):
        raise CheckpointError(
            f"{head[0]}: {HEAD} differs from {embedding}, but tie_word_embeddings is true; fetch the file again, or set it to "
            f"false in {folder / CONFIG}"
        )


def _files(folder: Path) -> list[Path]:
    if (folder / PICKLE).is_file():
        return [folder / PICKLE]
    if not (folder / PICKLE_INDEX).is_file() and next(folder.glob("*.safetensors"), None):
        raise CheckpointError(f"{folder}: holds safetensors already; model.init reads it as it is")
    try:
        names = sorted({str(name) for name in json.loads((folder / PICKLE_INDEX).read_bytes())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{folder}: holds neither {PICKLE} nor a usable {PICKLE_INDEX}; only these need converting") from None
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{folder / PICKLE_INDEX}: names files outside its folder")
    return [folder / name for name in names]
