"""Weights of a Hugging Face folder, read into a decoder one tensor at a time. Only safetensors: nothing is ever unpickled."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from longtrain.errors import CheckpointError
from longtrain.models.config import ModelConfig
from longtrain.models.config_json import read_config
from longtrain.models.decoder import Decoder
from longtrain.models.deepspeed_folder import is_deepspeed
from longtrain.models.families import POSITION_OFFSET, hugging_face_names, parameter_shapes
from longtrain.models.initialise import initial_value

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64", "F32", "F16", "BF16"}
POSITIONS = "positions.weight"

_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$")
"""What old files hold besides parameters: numbers that follow from the configuration."""

Gathered = Callable[[nn.Parameter], AbstractContextManager[object]]


@dataclass(frozen=True)
class Entry:
    """A tensor of a folder: the file that holds it, its shape, and its name there."""

    file: Path
    shape: tuple[int, ...]
    name: str


@dataclass(frozen=True)
class Pretrained:
    """The weights of a folder, found and checked; nothing is read yet.

    tensors: by our names. head: a second copy of a tied head, which must be equal.
    """

    folder: Path
    tensors: dict[str, Entry]
    head: Entry | None

    @property
    def files(self) -> list[Path]:
        """Every file that holds a parameter, in the order of reading."""
        return sorted({entry.file for entry in self.tensors.values()})


def open_pretrained(folder: Path, config: ModelConfig) -> Pretrained:
    """The weights of a Hugging Face folder for a decoder of `config`; reads headers only, so that every rank can check them.

    Tables of learned positions may be shorter than config's.

    Raises:
        CheckpointError: the folder or a file of it is missing or damaged; a tensor is missing, unknown, of another shape or of a
            type that cannot be trained; the files are not safetensors.
    """
    stored = read_config(folder)
    found = _headers(folder)
    names = hugging_face_names(config)
    bare = {theirs.removeprefix("model.") for theirs in names.values()}
    if not any(name.startswith("model.") for name in found) and bare & found.keys():
        # saved from the model without its head, as OPT's older files are
        found = {name if name == "lm_head.weight" else f"model.{name}": entry for name, entry in found.items()}
    shapes = parameter_shapes(config)
    if POSITIONS in shapes:
        shapes[POSITIONS] = (min(stored.max_positions, config.max_positions) + POSITION_OFFSET, config.hidden_size)
    missing = [theirs for theirs in names.values() if theirs not in found]
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} tensors are missing, {missing[0]} first; the folder is not whole")
    tensors = {ours: found[theirs] for ours, theirs in names.items()}
    for ours, entry in tensors.items():
        if entry.shape != shapes[ours]:
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name} has shape {entry.shape}, its config.json wants {shapes[ours]}"
            )
    head = found.get("lm_head.weight") if config.tied_embeddings else None
    known = {*names.values(), *(["lm_head.weight"] if head else [])}
    extra = [entry.name for name, entry in found.items() if name not in known and not _BUFFERS.search(name)]
    if extra:
        raise CheckpointError(
            f"{folder}: {len(extra)} tensors belong to no parameter of a {config.family} decoder, {extra[0]} first"
        )
    if head is not None and head.shape != tensors["embedding.weight"].shape:
        raise CheckpointError(f"{head.file}: tensor {head.name} has shape {head.shape}, but tie_word_embeddings ties it")
    return Pretrained(folder, tensors, head)


def _headers(folder: Path) -> dict[str, Entry]:
    """Name, file and shape of every tensor."""
    found: dict[str, Entry] = {}
    for file in _files(folder):
        try:
            # what it says of a file that it may not read is that there is none
            file.open("rb").close()
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}; see to its permissions and its disk") from None
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (not a mapping)
                    header = handle.get_slice(name)
                    if header.get_dtype() not in DTYPES and not _BUFFERS.search(name):
                        wanted = ", ".join(sorted(DTYPES))
                        raise CheckpointError(f"{file}: tensor {name} is of type {header.get_dtype()}, not one of {wanted}")
                    if name in found:
                        raise CheckpointError(f"{file}: tensor {name} is also in {found[name].file.name}; keep one of them")
                    found[name] = Entry(file, tuple(header.get_shape()), name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read as safetensors: {error}; fetch the file again") from None
    return found


def _files(folder: Path) -> list[Path]:
    """The weight files, all of them there; where there are two sets, the one that transformers takes."""
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if index.is_file():
        try:
            shards = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise CheckpointError(f"{index}: is not an index of safetensors files, so it is damaged; fetch it again") from None
        foreign = sorted(name for name in shards if Path(name).name != name or not name.endswith(".safetensors"))
        if foreign:
            raise CheckpointError(f"{index}: names {foreign[0]!r}, which is no safetensors file of this folder")
        absent = sorted(name for name in shards if not (folder / name).is_file())
        if absent:
            raise CheckpointError(
                f"{folder}: {len(absent)} of {len(shards)} weight files are missing, {absent[0]} first; fetch them"
            )
        return [folder / name for name in sorted(shards)]
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder}: holds {pickled[0]}, a pickle, which can hold code and is not opened here; write its tensors as safetensors "
            "with scripts/convert_checkpoint.py FOLDER --out NEW_FOLDER"
        )
    if is_deepspeed(folder):
        raise CheckpointError(
            f"{folder}: holds a checkpoint of DeepSpeed's; write its weights as safetensors with "
            f"scripts/convert_checkpoint.py {folder} --out NEW_FOLDER"
        )
    raise CheckpointError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}; name a Hugging Face folder with its weights")


@torch.no_grad()
def load_pretrained(
    model: Decoder,
    weights: Pretrained,
    gathered: Gathered = lambda parameter: nullcontext(),
    *,
    seed: int = 0,
    extend: str = "refuse",
    reads: bool = True,
) -> None:
    """Fills every parameter of a decoder, in its dtype; one tensor is held on the host at a time, and one file is open.

    gathered: as for `initialise`. reads: whether this rank's values count; the others only take part in gathering. extend:
    "interpolate" or "random", for learned positions beyond the stored ones; random ones follow from `seed`.

    Raises:
        CheckpointError: a file cannot be read, a number is not finite in the decoder's dtype, or the copy of a tied head differs.
    """
    parameters = dict(model.named_parameters())
    for file in weights.files:
        names = [name for name, entry in weights.tensors.items() if entry.file == file]
        try:
            _fill(file, names, parameters, weights, gathered, reads, lambda rows: _extended(rows, model.config, seed, extend))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read: {error}") from error
    if reads and weights.head is not None:
        embedding = weights.tensors["embedding.weight"]
        if not torch.equal(_read(weights.head), _read(embedding)):
            raise CheckpointError(
                f"{weights.folder}: {weights.head.name} differs from {embedding.name}, but tie_word_embeddings is true; fetch the "
                "weights again, or set it to false in config.json"
            )


def _fill(
    file: Path,
    names: Iterable[str],
    parameters: dict[str, nn.Parameter],
    weights: Pretrained,
    gathered: Gathered,
    reads: bool,
    extended: Callable[[Tensor], Tensor],
) -> None:
    context: Any = safe_open(file, framework="pt") if reads else nullcontext()
    with context as handle:
        for name in names:
            with gathered(parameters[name]):
                if not reads:
                    continue
                value = handle.get_tensor(weights.tensors[name].name)
                filled = parameters[name].copy_(extended(value) if name == POSITIONS else value)
                # training would skip every step, and export what it began with
                if not torch.stack(filled.aminmax()).isfinite().all():
                    raise CheckpointError(
                        f"{file}: tensor {weights.tensors[name].name} holds numbers that are not finite in {filled.dtype}; fetch "
                        "the file again, or train in a format of wider range (training.precision)"
                    )


def _read(entry: Entry) -> Tensor:
    with safe_open(entry.file, framework="pt") as handle:
        return handle.get_tensor(entry.name)


def _extended(rows: Tensor, config: ModelConfig, seed: int, extend: str) -> Tensor:
    """A table of learned positions, fp32 [max_positions + POSITION_OFFSET, C], from a shorter one."""
    wanted = config.max_positions + POSITION_OFFSET
    if rows.shape[0] == wanted:
        return rows
    if extend == "random":
        fresh = initial_value(config, seed, POSITIONS, (wanted, config.hidden_size))
        return torch.cat((rows.float(), fresh[rows.shape[0] :]))
    if extend == "interpolate":
        before, learned = rows[:POSITION_OFFSET].float(), rows[POSITION_OFFSET:].float()
        stretched = F.interpolate(learned.t()[None], size=config.max_positions, mode="linear", align_corners=True)[0].t()
        return torch.cat((before, stretched))
    raise CheckpointError(
        f"{rows.shape[0] - POSITION_OFFSET} learned positions cannot become {config.max_positions} without extending"
    )
