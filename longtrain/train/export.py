"""What people take home: a checkpoint as a Hugging Face folder, or as a model in this process. No engine, no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from longtrain.data.json_tokenizer import open_tokenizer
from longtrain.data.manifest import MANIFEST, TokenizerEntry, check_tokenizer, read_manifest
from longtrain.data.tokenizer import Encoder
from longtrain.errors import CheckpointError, DataError
from longtrain.kernels.local import LocalAttend
from longtrain.kernels.memory_efficient import MemoryEfficientKernel
from longtrain.models.decoder import Decoder
from longtrain.models.huggingface import write_folder
from longtrain.parallel.zero_config import DTYPES
from longtrain.plan.model import model_config
from longtrain.recipe.load import parse_recipe
from longtrain.recipe.schema import Precision, Recipe
from longtrain.train.checkpoint_folder import read_master
from longtrain.train.checkpoint_format import TrainState, read_state
from longtrain.train.checkpoint_format import read_manifest as read_checkpoint
from longtrain.train.resume import find_checkpoint


@dataclass(frozen=True)
class Trained:
    """A trained model on the CPU in fp32, with what belongs to it. step: optimizer steps done. world: the ranks that saved it."""

    checkpoint: Path
    recipe: Recipe
    step: int
    world: int
    model: Decoder
    tokenizer: Encoder


def export_checkpoint(run: Path, out: Path, dtype: Precision | None = None, *, data: Path | None = None) -> Path:
    """Writes the newest checkpoint of a run (or the one at that path) to the Hugging Face folder `out`, which must not exist.

    dtype: of the weights; by default what the run computed in. data: prepared data with the run's tokenizer; by default what it
    read. One parameter is held at a time besides a shard. Raises CheckpointError or DataError; nothing is left half-written.
    """
    path = find_checkpoint(run)
    state, recipe = _read(path)
    folder, entry = _tokenizer_of(path, state, recipe, data)
    try:
        write_folder(
            out,
            model_config(recipe),
            read_master(path),
            tokenizer_model=folder / entry.file,
            bos=entry.bos,
            eos=entry.eos,
            dtype=DTYPES[dtype or recipe.training.precision],
        )
    except SafetensorError as error:
        raise CheckpointError(f"{out}: the weights cannot be written: {error}") from error
    return out


def load_trained(run: Path, *, data: Path | None = None) -> Trained:
    """The model of the newest checkpoint of a run (or of the one at that path), for generating on the CPU.

    data: as in `export_checkpoint`. Raises CheckpointError or DataError.
    """
    path = find_checkpoint(run)
    state, recipe = _read(path)
    folder, entry = _tokenizer_of(path, state, recipe, data)
    model = Decoder(model_config(recipe), LocalAttend(MemoryEfficientKernel())).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in read_master(path):
            parameters[name].copy_(value)
    return Trained(path, recipe, state.step, read_checkpoint(path).world, model, open_tokenizer(folder, entry))


def _read(path: Path) -> tuple[TrainState, Recipe]:
    state = read_state(path)
    return state, parse_recipe(state.recipe, f"{path}/state.json")


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
