"""What people take home: a checkpoint as a Hugging Face folder, or as a model in this process. No engine, no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from longtrain.data.manifest import MANIFEST, Manifest, check_tokenizer, read_manifest
from longtrain.data.tokenizer import Tokenizer
from longtrain.errors import CheckpointError, DataError
from longtrain.kernels.local import LocalAttend
from longtrain.kernels.memory_efficient import MemoryEfficientKernel
from longtrain.models.decoder import Decoder
from longtrain.models.huggingface import write_folder
from longtrain.parallel.zero_config import DTYPES
from longtrain.plan.plan import model_config
from longtrain.recipe.load import parse_recipe
from longtrain.recipe.schema import Precision, Recipe
from longtrain.train import checkpoint
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
    tokenizer: Tokenizer


def export_checkpoint(run: Path, out: Path, dtype: Precision | None = None, *, data: Path | None = None) -> Path:
    """Writes the newest checkpoint of a run (or the one at that path) to the Hugging Face folder `out`, which must not exist.

    dtype: of the weights; by default what the run computed in. data: the prepared data, for its tokenizer; by default where the run
    read it. One parameter is held at a time besides a shard. Raises CheckpointError or DataError; nothing is left half-written.
    """
    path = find_checkpoint(run)
    state, recipe = _read(path)
    folder, manifest = _data_of(path, state, recipe, data)
    try:
        write_folder(
            out,
            model_config(recipe),
            checkpoint.read_master(path),
            tokenizer_model=folder / manifest.tokenizer.file,
            bos=manifest.tokenizer.bos,
            eos=manifest.tokenizer.eos,
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
    folder, manifest = _data_of(path, state, recipe, data)
    model = Decoder(model_config(recipe), LocalAttend(MemoryEfficientKernel()))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in checkpoint.read_master(path):
            parameters[name].copy_(value)
    tokenizer = Tokenizer.load(folder / manifest.tokenizer.file)
    return Trained(path, recipe, state.step, read_checkpoint(path).world, model, tokenizer)


def _read(path: Path) -> tuple[TrainState, Recipe]:
    state = read_state(path)
    return state, parse_recipe(state.recipe, f"{path}/state.json")


def _data_of(path: Path, state: TrainState, recipe: Recipe, moved: Path | None) -> tuple[Path, Manifest]:
    """The prepared data that a checkpoint was trained on, and so its tokenizer. Raises DataError where it is not there."""
    folder = Path(recipe.data.path) if moved is None else moved
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder}: the data of {path}, and its tokenizer, is not here; say where it is with --data FOLDER")
    manifest = read_manifest(folder)
    if manifest.fingerprint("train") != state.data:
        raise DataError(
            f"{folder}: is not the data that {path} was trained on (other tokens, documents or tokenizer); "
            "name that with --data FOLDER"
        )
    check_tokenizer(folder, manifest)
    return folder, manifest
