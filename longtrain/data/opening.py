"""The data of a recipe: one prepared folder or a mixture, and what to do where one is missing."""

from __future__ import annotations

import shlex
from pathlib import Path

from longtrain.data.manifest import check_model_vocab
from longtrain.data.mixture import Mixture, Split
from longtrain.data.packed import PackedSplit
from longtrain.errors import DataError
from longtrain.recipe.presets import fetch_commands
from longtrain.recipe.schema import Recipe


def open_split(recipe: Recipe, split: str, vocab_size: int | None = None) -> Split:
    """The sequences of a split, "train" or "heldout", of the recipe's data.

    vocab_size: of the model; None: the recipe's, where it says one. Reads the index, not the tokens. DataError where a folder is
    missing (with the command that prepares it), damaged or foreign, where folders of a mixture do not go together, or where the
    tokenizer has more tokens than the model.
    """
    vocab_size = vocab_size or recipe.model.vocab_size
    _check_folders(recipe, vocab_size)
    data = recipe.data
    length = recipe.training.sequence_length
    splits = [PackedSplit(folder, split, length, data.long_documents) for folder in data.folders]
    for one in splits:
        if vocab_size is not None:
            check_model_vocab(one.manifest, vocab_size)
    return splits[0] if len(splits) == 1 else Mixture(splits, list(data.folders.values()))


def prepare_command(recipe: Recipe, folder: str, vocab_size: int | None) -> str:
    """The command that prepares a folder of the recipe; SOURCE stands where the recipe does not name a corpus."""
    data = recipe.data
    known = folder == data.path
    words = ["python", "scripts/prepare_data.py", "--source", (data.corpus if known else None) or "SOURCE"]
    # a model that begins with trained weights needs the tokenizer that belongs to them
    if tokenizer := data.tokenizer or recipe.model.init:
        words += ["--tokenizer", tokenizer]
    elif vocab_size is not None:
        words += ["--vocab-size", str(vocab_size)]
    words += ["--out", folder, "--sequence-length", str(recipe.training.sequence_length)]
    return shlex.join(words)


def tokenizer_commands(recipe: Recipe) -> list[str]:
    """Shell commands that bring the tokenizer of `prepare_command` where it is a folder or file that is not there; a comment of the
    shell where nobody knows them."""
    data, model = recipe.data, recipe.model
    wanted = data.tokenizer or model.init
    if wanted is None or wanted.startswith("hf:") or Path(wanted).exists():
        return []
    known = [] if data.tokenizer else fetch_commands(model.preset, wanted)
    field = "data.tokenizer" if data.tokenizer else "model.init"
    return known or [f"# first put the tokenizer there: {field} is {wanted}, and is not there yet"]


def _check_folders(recipe: Recipe, vocab_size: int | None) -> None:
    files = [folder for folder in recipe.data.folders if Path(folder).is_file()]
    if files:
        raise DataError(f"{files[0]}: is a file, not a folder of prepared data; scripts/prepare_data.py makes one of text")
    missing = [folder for folder in recipe.data.folders if not Path(folder).is_dir()]
    if missing:
        prepare = [prepare_command(recipe, folder, vocab_size) for folder in missing]
        commands = "".join(f"\n  {command}" for command in [*tokenizer_commands(recipe), *prepare])
        where = "data.path" if recipe.data.path else "data.sources"
        source = " from data.corpus" if recipe.data.corpus and recipe.data.path else ""
        raise DataError(
            f"{where}: {missing[0]}: no such data folder (relative to {Path.cwd()}); prepare it{source} with{commands}\n"
            "or name data that is prepared, with data.path; docs/data.md says how to bring your own"
        )
