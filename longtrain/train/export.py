"""What people take home: a checkpoint as a Hugging Face folder, or as a model in this process. No engine, no GPU."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longtrain.data.json_tokenizer import open_tokenizer
from longtrain.data.manifest import MANIFEST, TokenizerEntry, check_tokenizer, read_manifest
from longtrain.data.tokenizer import Encoder
from longtrain.errors import CheckpointError, DataError
from longtrain.kernels.local import LocalAttend
from longtrain.kernels.memory_efficient import MemoryEfficientKernel
from longtrain.models.decoder import Decoder
from longtrain.models.huggingface import Warn, origin_of, write_folder
from longtrain.parallel.zero_config import DTYPES
from longtrain.plan.model import model_config
from longtrain.recipe.load import parse_recipe
from longtrain.recipe.schema import Precision, Recipe
from longtrain.train.checkpoint_commands import find, without_advice
from longtrain.train.checkpoint_folder import check_files, digest_of, read_master
from longtrain.train.checkpoint_format import STATE, TrainState, read_state
from longtrain.train.checkpoint_format import read_manifest as read_checkpoint


@dataclass(frozen=True)
class Trained:
    """A trained model on the CPU in fp32, with what belongs to it. step: optimizer steps done. world: the ranks that saved it."""

    checkpoint: Path
    recipe: Recipe
    step: int
    world: int
    model: Decoder
    tokenizer: Encoder


def export_checkpoint(
    run: Path, out: Path, dtype: Precision | None = None, *, data: Path | None = None, warn: Warn = warnings.warn
) -> Path:
    """Writes the newest sound checkpoint of a run (or the one at that path) to the Hugging Face folder `out`, which must not exist.
    Returns that checkpoint.

    dtype: of the weights; by default what the run computed in. data: prepared data with the run's tokenizer; by default what it
    read. warn: told of every newer checkpoint that is damaged, and of what transformers makes of the folder otherwise than training
    did. One parameter is held at a time besides a shard. Raises CheckpointError or DataError; nothing is left half-written.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists; name a folder that does not")
    sound = _open(run, data, warn)
    folder, entry = sound.tokenizer
    write_folder(
        out,
        model_config(sound.recipe),
        sound.master,
        tokenizer_model=folder / entry.file,
        bos=entry.bos,
        eos=entry.eos,
        dtype=DTYPES[dtype or sound.recipe.training.precision],
        warn=warn,
        origin={"run": sound.recipe.name, "step": sound.state.step, "manifest_sha256": digest_of(sound.path)},
    )
    return sound.path


def is_export_of(out: Path, checkpoint: Path) -> bool:
    """Whether this Hugging Face folder was made of this checkpoint."""
    return origin_of(out).get("manifest_sha256") == digest_of(checkpoint)


def load_trained(run: Path, *, data: Path | None = None, warn: Warn = warnings.warn) -> Trained:
    """The model of the newest sound checkpoint of a run (or of the one at that path), for generating on the CPU.

    data, warn: as in `export_checkpoint`. Raises CheckpointError or DataError.
    """
    sound = _open(run, data, warn)
    model = Decoder(model_config(sound.recipe), LocalAttend(MemoryEfficientKernel())).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in sound.master:
            parameters[name].copy_(value)
    tokenizer = open_tokenizer(*sound.tokenizer)
    return Trained(sound.path, sound.recipe, sound.state.step, read_checkpoint(sound.path).world, model, tokenizer)


@dataclass(frozen=True)
class _Sound:
    """A checkpoint of which every byte is right. tokenizer: prepared data that has it, and its entry there. master: the parameters,
    as `read_master` gives them."""

    path: Path
    state: TrainState
    recipe: Recipe
    tokenizer: tuple[Path, TokenizerEntry]
    master: Iterator[tuple[str, Tensor]]


def _open(run: Path, data: Path | None, warn: Warn) -> _Sound:
    """The newest sound checkpoint of a run, or the one at that path. Raises CheckpointError where there is none."""
    candidates, damaged = find(run), []
    for path in reversed(candidates):
        try:
            check_files(path, read_checkpoint(path), [STATE])
            state = read_state(path)
            recipe = parse_recipe(state.recipe, f"{path}/{STATE}")
            tokenizer = _tokenizer_of(path, state, recipe, data)
            master = read_master(path)
            # reads every byte before it gives the first one
            first = list(itertools.islice(master, 1))
        except CheckpointError as error:
            damaged.append((path, without_advice(str(error).splitlines())))
            continue
        for bad, found in damaged:
            more = f" (and {len(found) - 1} more files)" if found[1:] else ""
            warn(f"passed over {bad.name}: {found[0]}{more}; using {path.name}")
        return _Sound(path, state, recipe, tokenizer, itertools.chain(first, master))
    lines = "\n".join(f"  {line}" for _, found in damaged for line in found)
    if candidates == [run]:
        whole = run.absolute().parent.parent
        advice = f"name another checkpoint of that run; `longtrain checkpoint ls {whole} --verify` says which are sound"
        raise CheckpointError(f"{run}: is damaged:\n{lines}\n{advice}")
    raise CheckpointError(f"{run}: every checkpoint of this run is damaged:\n{lines}")


def _tokenizer_of(path: Path, state: TrainState, recipe: Recipe, moved: Path | None) -> tuple[Path, TokenizerEntry]:
    """A prepared data folder with the tokenizer of a checkpoint, and its entry. Raises DataError where there is none.

    Any folder of a mixture will do: they all have the same one.
    """
    folders = [Path(folder) for folder in recipe.data.folders] if moved is None else [moved]
    folder = next((folder for folder in folders if (folder / MANIFEST).is_file()), None)
    if folder is None:
        raise DataError(f"{folders[0]}: the data of {path}, and its tokenizer, is not here; say where it is with --data FOLDER")
    manifest = read_manifest(folder)
    # checkpoints made before the digest was kept have none
    if state.tokenizer and manifest.tokenizer.fingerprint != state.tokenizer:
        raise DataError(
            f"{folder}: was not prepared with the tokenizer of {path}; name the data of that run, or other data with the same "
            "tokenizer, with --data FOLDER"
        )
    check_tokenizer(folder, manifest)
    return folder, manifest.tokenizer
