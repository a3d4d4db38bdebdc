"""What people take home: a checkpoint as a Hugging Face folder, or as a model in this process. No engine, no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from longtrain.data.manifest import read_manifest
from longtrain.data.tokenizer import Tokenizer
from longtrain.errors import CheckpointError
from longtrain.kernels.local import LocalAttend
from longtrain.kernels.memory_efficient import MemoryEfficientKernel
from longtrain.models.decoder import Decoder
from longtrain.models.huggingface import write_folder
from longtrain.plan.plan import DTYPES, model_config
from longtrain.recipe.load import parse_recipe
from longtrain.recipe.schema import Precision, Recipe
from longtrain.train import checkpoint
from longtrain.train.resume import CHECKPOINTS


@dataclass(frozen=True)
class Trained:
    """A trained model on the CPU in fp32, with what belongs to it. world: the ranks that saved it."""

    checkpoint: Path
    recipe: Recipe
    world: int
    model: Decoder
    tokenizer: Tokenizer


def export_checkpoint(run: Path, out: Path, dtype: str | None = None) -> Path:
    """Writes the newest checkpoint of a run (or the one at that path) to the Hugging Face folder `out`, which must not exist.

    dtype: fp32, bf16 or fp16; by default what the run computed in. One parameter is held at a time besides a shard. Raises
    CheckpointError or DataError; nothing is left half-written.
    """
    path = _find(run)
    recipe = _recipe(path)
    if dtype is not None and dtype not in list(Precision):
        raise CheckpointError(f"--dtype {dtype} is not known: use {', '.join(Precision)}")
    data = Path(recipe.data.path)
    manifest = read_manifest(data)
    write_folder(
        out,
        model_config(recipe),
        checkpoint.read_master(path),
        tokenizer_model=data / manifest.tokenizer.file,
        bos=manifest.tokenizer.bos,
        eos=manifest.tokenizer.eos,
        dtype=DTYPES[recipe.training.precision if dtype is None else Precision(dtype)],
    )
    return out


def load_trained(run: Path) -> Trained:
    """The model of the newest checkpoint of a run (or of the one at that path), for generating on the CPU."""
    path = _find(run)
    recipe = _recipe(path)
    data = Path(recipe.data.path)
    tokenizer = Tokenizer.load(data / read_manifest(data).tokenizer.file)
    model = Decoder(model_config(recipe), LocalAttend(MemoryEfficientKernel()))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in checkpoint.read_master(path):
            parameters[name].copy_(value)
    return Trained(path, recipe, checkpoint.read_manifest(path).world, model, tokenizer)


def _find(run: Path) -> Path:
    return checkpoint.resolve(run / CHECKPOINTS if (run / CHECKPOINTS).is_dir() else run)


def _recipe(path: Path) -> Recipe:
    return parse_recipe(checkpoint.read_state(path).recipe, f"{path}/state.json")
