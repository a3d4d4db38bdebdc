"""A decoder as a Hugging Face folder that transformers loads without our code."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from longtrain.errors import CheckpointError
from longtrain.files import sync_path
from longtrain.models.config import ModelConfig
from longtrain.models.config_json import CONFIG, config_json, differs_when_shorter
from longtrain.models.families import hugging_face_names, parameter_shapes
from longtrain.models.tokenizer_json import qwen2_keeps, tokenizer_files

SHARD_BYTES = 5 * 10**9
"""Hugging Face's customary shard: large enough for few files, small enough for a laptop's memory."""

ORIGIN = "longtrain.json"
"""What the weights of a folder are of; nothing but people and this program reads it."""

APART = "tokenizer"
"""Folder of a second copy of a tokenizer, where no config.json makes transformers read it as another one."""

_OTHER_TOKENIZER = (
    "AutoTokenizer.from_pretrained('{folder}') gives other ids than training had: in every Qwen2 model transformers 5 puts the "
    "rules of Qwen's tokenizer in the place of this one's, without a word. Load AutoTokenizer.from_pretrained('{apart}') or "
    "PreTrainedTokenizerFast.from_pretrained('{folder}'), and give {apart} to tools that ask for a tokenizer"
)

Warn = Callable[[str], None]


def write_folder(
    folder: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    tokenizer_model: Path | None,
    bos: int | None,
    eos: int | None,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
    warn: Warn = warnings.warn,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Writes config, weights and tokenizer, so that `folder` appears whole or not at all.

    tensors: (our name, tensor), every parameter once and in any order; at most `shard_bytes`, or one tensor, of them are held at a
    time. tokenizer_model: a tokenizer.json, or a SentencePiece .model file, also written as one; None leaves the tokenizer out.
    bos, eos: token ids. warn: told, once the folder is there, what transformers makes of it otherwise than training did. origin: of
    the weights, for people and `origin_of`.

    Raises:
        CheckpointError: the folder exists or cannot be written; a parameter is missing, unknown, given twice or of another shape.
        DataError: the tokenizer cannot be written with the same ids.
    """
    remarks = [remark for remark in (differs_when_shorter(config),) if remark]
    with appearing_whole(folder) as part:
        contents = {CONFIG: config_json(config, dtype, bos, eos)}
        contents["generation_config.json"] = {"bos_token_id": bos, "eos_token_id": eos}
        if origin is not None:
            contents[ORIGIN] = dict(origin)
        if tokenizer_model is not None:
            contents |= tokenizer_files(tokenizer_model, bos, eos)
            copy_file(tokenizer_model, part / f"tokenizer{tokenizer_model.suffix}")
        write_weights(part, _translated(config, tensors, dtype), shard_bytes)
        for name, content in contents.items():
            (part / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if config.family == "qwen2" and tokenizer_model is not None and not qwen2_keeps(part / "tokenizer.json"):
            (part / APART).mkdir()
            for name in ("tokenizer.json", "tokenizer_config.json"):
                copy_file(part / name, part / APART / name)
            remarks.append(_OTHER_TOKENIZER.format(folder=folder, apart=folder / APART))
        for path in part.glob("*.safetensors"):
            shutil.copymode(part / CONFIG, path)  # the library writes files that only their owner can read
    for remark in remarks:
        warn(remark)


def origin_of(folder: Path) -> dict[str, Any]:
    """The `origin` that a folder was written with; empty where it has none, or one that cannot be read."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads((folder / ORIGIN).read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


@contextmanager
def appearing_whole(folder: Path) -> Iterator[Path]:
    """A hidden folder to write to, which becomes `folder`, on the disk, where all goes well, and else is deleted. So is, at the
    next time, what a killed process left.

    Raises:
        CheckpointError: `folder` exists, cannot be written or is written by another process.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists; name a folder that does not")
    whole = folder.absolute()
    part = whole.with_name(f".{whole.name}.tmp")
    with _alone(folder, part):
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            yield part
            for path in [*part.rglob("*"), part]:
                sync_path(path)
            part.rename(whole)
            sync_path(whole.parent)
        except (OSError, SafetensorError) as error:
            blamed = getattr(error, "filename", None)
            if isinstance(blamed, str) and not Path(blamed).is_relative_to(part):
                raise
            raise CheckpointError(f"{folder}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _alone(folder: Path, part: Path) -> Iterator[None]:
    """Keeps other processes, also on another host, from writing to `part`. The lock goes with the process, however that ends; where
    the file system has none, a `part` that is there is refused, as it may be another's."""
    lock = part.with_suffix(".lock")
    try:
        with suppress(FileExistsError):
            part.parent.mkdir(parents=True)
        file = lock.open("a")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            raise CheckpointError(f"{folder}: another process writes it; let it end, or name another folder") from None
        except OSError:
            if part.exists():
                raise CheckpointError(f"{part}: another process writes it, or a killed one left it; then delete it") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def copy_file(source: Path, target: Path) -> None:
    """The content of a small file. Unlike shutil's, its errors never blame `source` for a full disk."""
    target.write_bytes(source.read_bytes())


def _translated(config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's names, and every parameter checked."""
    names, missing = hugging_face_names(config), parameter_shapes(config)
    for name, tensor in tensors:
        shape = missing.pop(name, None)
        if shape is None:
            raise CheckpointError(f"parameter {name}: {'given twice' if name in names else 'the model has none of this name'}")
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"parameter {name}: has shape {tuple(tensor.shape)}, the model has {shape}")
        yield names[name], tensor.detach().to("cpu", dtype).contiguous()
    if missing:
        raise CheckpointError(f"{len(missing)} parameters are missing, {next(iter(missing))} first")


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Shards in the order given, and the index that finds a tensor; one shard needs no index."""
    # map lets go of a shard before the next one is read
    shards = list(map(partial(_write_shard, folder), count(1), _shards(tensors, shard_bytes)))
    total = len(shards)
    files = ["model.safetensors" if total == 1 else f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    for i, file in enumerate(files, 1):
        (folder / str(i)).rename(folder / file)
    if total > 1:
        index = {
            "metadata": {"total_size": sum(size for shard in shards for size in shard.values())},
            "weight_map": {name: file for shard, file in zip(shards, files, strict=True) for name in shard},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def _write_shard(folder: Path, number: int, shard: dict[str, Tensor]) -> dict[str, int]:
    """The bytes of every tensor written. The file is called by its number until the count is known."""
    save_file(shard, folder / str(number), metadata={"format": "pt"})
    return {name: tensor.nbytes for name, tensor in shard.items()}
