"""A folder of text, or Python's standard library, to token shards: the command behind scripts/prepare_data.py."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import numpy.typing as npt
import rich.progress
import typer
from rich.console import Console

from longtrain.data.corpus import Corpus, Document, Skipped, find_corpus, find_stdlib, read_texts
from longtrain.data.manifest import SPLITS, TOKENIZER, Manifest, Statistics, TokenizerEntry, token_dtype_name
from longtrain.data.packed import context_share, context_warning
from longtrain.data.shards import SplitWriter, check_target, whole_folder, write_manifest
from longtrain.data.tokenizer import Tokenizer, sample_pieces, train_tokenizer
from longtrain.errors import DataError, LongtrainError
from longtrain.files import write_durably

STDLIB = "stdlib"
STDLIB_VOCAB = 4096
FOLDER_VOCAB = 32000
SHARD_TOKENS = 1 << 28
HELD_OUT = 0.02

SAMPLE_CHARACTERS = 16_000_000
"""What the tokenizer is trained on at most: 2 s on two cores for a vocabulary of 4096, and more text hardly changes the pieces."""

SAMPLE_PER_DOCUMENT = 100_000
"""So that one huge file does not become the whole sample, unless there are few files."""

GROUP_CHARACTERS = 1 << 22
"""Text encoded in one call, to use all cores."""

LOG_SECONDS = 10

REPORTED_LENGTHS = (1024, 8192, 32768)

T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """What a preparation wrote. lengths: per split int64 [documents], tokens of every document in the order of the stream."""

    out: Path
    manifest: Manifest
    lengths: dict[str, npt.NDArray[np.int64]]
    skipped: Skipped

    def report(self, sequence_length: int | None = None) -> str:
        """Lines for a person: sizes, document lengths, how much real context the tokens see, and the next command."""
        statistics = self.manifest.statistics
        vocab_size = self.manifest.tokenizer.vocab_size
        lines = [f"prepared {self.out}: vocabulary {vocab_size}, {self.manifest.dtype}"]
        for split, lengths in self.lengths.items():
            spread = ", ".join(f"{name} {value:.0f}" for name, value in statistics.document_length[split].items())
            lines.append(f"{split}: {lengths.size} documents, {lengths.sum()} tokens; tokens a document: {spread}")
        if text := str(self.skipped):
            lines.append(f"skipped: {text}")
        for length in [sequence_length] if sequence_length else REPORTED_LENGTHS:
            counts = ", ".join(f"{split} {int(lengths.sum()) // length}" for split, lengths in self.lengths.items())
            share = context_share(np.cumsum(self.lengths["train"]), length)
            lines.append(f"sequences of {length}: {counts}; {share:.1%} of the tokens see more than {length // 4} of context")
            for split, documents in self.lengths.items():
                if sequence_length and documents.sum() < length:
                    knob = "--held-out" if split != "train" else "--sequence-length or the text"
                    lines.append(f"warning: {split} has not one sequence of {length}: change {knob}")
            if sequence_length and (warning := context_warning(share, length)):
                lines.append(f"warning: {warning}")
        lines.append(f"next: a recipe with data.path {self.out} and model.vocab_size {vocab_size}, then")
        lines.append("  torchrun --nproc-per-node 1 scripts/train.py --recipe RECIPE")
        return "\n".join(lines)


def prepare(
    source: str,
    out: Path,
    *,
    globs: Sequence[str] = (),
    tokenizer: Path | None = None,
    vocab_size: int | None = None,
    held_out: float | None = None,
    seed: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
    console: Console | None = None,
) -> Prepared:
    """Tokenize `source` (a folder, or "stdlib") into the folder `out`, which appears whole or not at all.

    Documents are BOS + tokens + EOS. The tokenizer is the given .model file, or is trained on the training documents. The same
    arguments give the same bytes. DataError for every reason not to: see `find_corpus`, `check_target`, `train_tokenizer`.
    """
    console = console or Console(stderr=True, quiet=True)
    if tokenizer is not None and vocab_size is not None:
        raise DataError("--tokenizer and --vocab-size exclude each other: a given tokenizer has its vocabulary")
    if not -(2**63) <= seed < 2**63:
        raise DataError(f"--seed {seed} does not fit 64 bits")
    try:
        check_target(out, overwrite)
        existing = Tokenizer.load(tokenizer) if tokenizer is not None else None
        corpus = _find(source, out, globs, held_out, seed)
        with whole_folder(out, overwrite) as folder:
            default = STDLIB_VOCAB if source == STDLIB else FOLDER_VOCAB
            made = existing or _train(corpus, vocab_size or default, console)
            write_durably(folder / TOKENIZER, made.model)
            writers = _write_splits(folder, corpus, made, shard_tokens, console)
            entry = TokenizerEntry(sha256=made.sha256, vocab_size=made.vocab_size, bos=made.bos, eos=made.eos)
            manifest = make_manifest(writers, entry, corpus.skipped, seed)
            write_manifest(folder, manifest)
    except OSError as error:
        raise DataError(f"{error.filename or out}: {error.strerror}; nothing was written to {out}") from None
    lengths = {split: np.asarray(writer.lengths, dtype=np.int64) for split, writer in writers.items()}
    return Prepared(out, manifest, lengths, corpus.skipped)


def _find(source: str, out: Path, globs: Sequence[str], held_out: float | None, seed: int) -> Corpus:
    if source == STDLIB:
        if held_out is not None:
            raise DataError("--held-out: the standard library has a fixed list of held-out files; leave the option out")
        return find_stdlib(globs=globs, seed=seed)
    folder = Path(source)
    if folder.resolve().is_relative_to(out.resolve()):
        raise DataError(f"--out {out}: contains --source {source}; choose a folder outside the text")
    return find_corpus(folder, globs=globs, held_out=HELD_OUT if held_out is None else held_out, seed=seed)


def _train(corpus: Corpus, vocab_size: int, console: Console) -> Tokenizer:
    console.print(f"training a tokenizer of {vocab_size} tokens")
    skipped = Skipped()
    sentences = list(_sample(corpus.train, skipped))
    if not sentences:
        raise _nothing_left("train", skipped)
    return Tokenizer(train_tokenizer(sentences, vocab_size))


def _sample(documents: Sequence[Document], skipped: Skipped) -> Iterator[str]:
    """Training sentences from the shuffled documents, evenly spread over each, up to SAMPLE_CHARACTERS in all."""
    per_document = max(SAMPLE_CHARACTERS // len(documents), SAMPLE_PER_DOCUMENT)
    left = SAMPLE_CHARACTERS
    for _, text in read_texts(documents, skipped):
        if text is None:
            continue
        every = math.ceil(len(text) / per_document)
        for sentence in itertools.islice(sample_pieces(text), 0, None, every):
            yield sentence
            left -= len(sentence)
        if left <= 0:
            return


def _write_splits(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer, shard_tokens: int, console: Console
) -> dict[str, SplitWriter]:
    dtype = np.dtype(token_dtype_name(tokenizer.vocab_size)).newbyteorder("<")
    writers = {}
    for split, documents in zip(SPLITS, (corpus.train, corpus.heldout), strict=True):
        read = _track(read_texts(documents, corpus.skipped), f"tokenizing {split}", len(documents), console)
        with SplitWriter(folder, split, dtype, shard_tokens) as writer:
            for group in _groups(text for _, text in read if text is not None):
                for ids in tokenizer.encode_many(group):
                    writer.add([tokenizer.bos, *ids, tokenizer.eos])
        if not writer.shards:
            raise _nothing_left(split, corpus.skipped)
        writers[split] = writer
    return writers


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def make_manifest(writers: dict[str, SplitWriter], tokenizer: TokenizerEntry, skipped: Skipped, seed: int) -> Manifest:
    """The manifest of the finished writers of both splits."""
    lengths = {split: np.asarray(writer.lengths) for split, writer in writers.items()}
    return Manifest.model_validate(
        {
            "dtype": token_dtype_name(tokenizer.vocab_size),
            "seed": seed,
            "tokenizer": tokenizer,
            "splits": {split: writer.shards for split, writer in writers.items()},
            "statistics": Statistics(
                documents={split: array.size for split, array in lengths.items()},
                tokens={split: int(array.sum()) for split, array in lengths.items()},
                document_length={split: _spread(array) for split, array in lengths.items()},
                skipped=skipped.counts(),
            ),
        }
    )


def _spread(lengths: npt.NDArray[np.int64]) -> dict[str, float]:
    names = {"min": 0, "p10": 10, "median": 50, "p90": 90, "p99": 99, "max": 100}
    values = np.percentile(lengths, list(names.values()))
    return dict(zip(names, values.tolist(), strict=True)) | {"mean": float(lengths.mean())}


def _nothing_left(split: str, skipped: Skipped) -> DataError:
    advice = "convert the files to UTF-8, or choose others with --glob"
    return DataError(f"no file of the split {split!r} is usable text; skipped: {skipped}; {advice}")


def _track(items: Iterable[T], label: str, total: int, console: Console) -> Iterator[T]:
    """The items, with a bar on a terminal and a line now and then in a log."""
    if console.is_terminal:
        yield from rich.progress.track(items, description=label, total=total, console=console, transient=True)
        return
    last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if done == total or time.monotonic() - last > LOG_SECONDS:
            last = time.monotonic()
            console.print(f"{label}: {done} of {total} documents", highlight=False)


def command(
    source: Annotated[str, typer.Option(help="Folder of text files, or 'stdlib': this Python's standard library.")],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    glob: Annotated[list[str] | None, typer.Option(help="Files to take, as '**/*.txt'; repeatable.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="An existing SentencePiece .model.")] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help=f"Train a tokenizer of this size [default: {FOLDER_VOCAB}; stdlib {STDLIB_VOCAB}].")
    ] = None,
    held_out: Annotated[
        float | None, typer.Option(help=f"Share of documents kept from training [default: {HELD_OUT}; stdlib: fixed files].")
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(min=1, help="Sequence length to report on.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the document order.")] = 0,
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one shard file, about.")] = SHARD_TOKENS,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace older prepared data in --out.")] = False,
) -> None:
    """Turn text files into token shards for training."""
    prepared = prepare(
        source,
        out,
        globs=glob or (),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        held_out=held_out,
        seed=seed,
        shard_tokens=shard_tokens,
        overwrite=overwrite,
        console=Console(stderr=True, soft_wrap=True),
    )
    print(prepared.report(sequence_length))


def main() -> None:
    """The command with the process's arguments: exit 2 and one message on stderr where the input is refused."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    try:
        app()
    except LongtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
