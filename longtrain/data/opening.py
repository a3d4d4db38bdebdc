"""The data of a recipe: one prepared folder or a mixture, what to do where one is missing, and whether it suits the weights."""

from __future__ import annotations

import shlex
from pathlib import Path

from longtrain.data.json_tokenizer import FILES, find_tokenizer, open_tokenizer
from longtrain.data.manifest import MANIFEST, TOKENIZER, check_model_vocab, read_manifest
from longtrain.data.mixture import Mixture, Split
from longtrain.data.packed import PackedSplit
from longtrain.data.tokenizer import Encoder
from longtrain.errors import DataError
from longtrain.files import sha256_of
from longtrain.recipe.presets import fetch_commands
from longtrain.recipe.schema import Recipe

SAMPLE = (
    "The quick brown fox, it's said, jumped over 1,234,567 lazy dogs (in 1998).\n\n    def mean(values):\n\treturn sum(values) / "
    "len(values)  # <b>naïve</b>\n\nÜber den Fluss: l'été à Łódź; Привет, мир! 你好，世界。日本語のテキスト مرحبا 🙂 https://example.org/?q=a_b&c=%20\n"
)
"""Text that tokenizers cut differently."""


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
            check_model_vocab(one.manifest, vocab_size, recipe.model.init)
    return splits[0] if len(splits) == 1 else Mixture(splits, list(data.folders.values()))


def compare_tokenizers(recipe: Recipe) -> str | None:
    """Whether the prepared data has the tokenizer that lies beside the weights of `model.init`, as far as both are there.

    Returns what to say where token ids mean the same text, but are not given in the same way, or where nobody can tell. Raises
    DataError where they mean other text, or the data is damaged.
    """
    init = recipe.model.init
    folder = next((Path(folder) for folder in recipe.data.folders if (Path(folder) / MANIFEST).is_file()), None)
    there = [] if init is None else [name for name in FILES if (Path(init) / name).is_file()]
    if init is None or folder is None or not there:
        return None
    entry = read_manifest(folder).tokenizer
    if entry.file == TOKENIZER and TOKENIZER in there and sha256_of(Path(init) / TOKENIZER) == entry.sha256:
        return None
    try:
        theirs = find_tokenizer(init)
    except DataError as error:
        return f"nobody can tell whether {folder} was prepared with the tokenizer of model.init {init}: {error}"
    ours = theirs if theirs.sha256 == entry.sha256 else open_tokenizer(folder, entry)
    if _sample_ids(ours) != _sample_ids(theirs):
        if not _same_tokens(ours, theirs):
            field = "data.sources" if recipe.data.path is None else "data.path"
            raise DataError(
                f"{field}: {folder} was prepared with another tokenizer than that of model.init {init}, to whose weights its "
                f"tokens mean other text; prepare the data again, to another folder, with --tokenizer {shlex.quote(init)}; or, if "
                f"you know better, move {', '.join(there)} out of {init}"
            )
        return f"{folder} has the tokens of model.init {init}, but its tokenizer cuts text in another way"
    if (entry.bos, entry.eos) != (theirs.bos, theirs.eos):
        begins = ["with their text" if bos is None else f"with token {bos}" for bos in (entry.bos, theirs.bos)]
        return (
            f"documents of {folder} begin {begins[0]} and end with token {entry.eos}; by the tokenizer of model.init {init} they "
            f"would begin {begins[1]} and end with token {theirs.eos}"
        )
    return None


def _sample_ids(tokenizer: Encoder) -> list[list[int] | None]:
    """SAMPLE as one text, or by characters where the tokenizer refuses some of them, None each."""
    try:
        return [tokenizer.encode(SAMPLE)]
    except DataError:
        return [_ids_or_none(tokenizer, character) for character in SAMPLE]


def _ids_or_none(tokenizer: Encoder, text: str) -> list[int] | None:
    try:
        return tokenizer.encode(text)
    except DataError:
        return None


def _same_tokens(one: Encoder, other: Encoder) -> bool:
    """Whether every token that both have is the same text, as where one vocabulary extends the other."""
    return all(one.decode([token]) == other.decode([token]) for token in range(min(one.vocab_size, other.vocab_size)))


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
