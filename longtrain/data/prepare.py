"""Text to token shards: the work behind scripts/prepare_data.py."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from longtrain.cores import usable_cores
from longtrain.data.corpus import Skipped, place_of
from longtrain.data.encode import PieceEncoder, Work, encode_all, is_held_out
from longtrain.data.json_tokenizer import find_tokenizer
from longtrain.data.manifest import SPLITS, TOKENIZER, Manifest, Statistics, TokenizerEntry, token_dtype_name
from longtrain.data.prepared import Prepared
from longtrain.data.progress import Progress
from longtrain.data.records import Step
from longtrain.data.shards import SplitWriter, write_manifest
from longtrain.data.sources import STDLIB, Found, Source, find_sources
from longtrain.data.tokenizer import Encoder, Tokenizer, entry_of, sample_pieces, train_tokenizer
from longtrain.data.workspace import JOURNAL, Journal, check_target, work_folder
from longtrain.errors import DataError
from longtrain.files import write_durably

STDLIB_VOCAB = 4096
VOCAB = 32000
SHARD_TOKENS = 1 << 28
MAX_BAD = 0.001
TEXT_FIELD = "text"

SAMPLE_CHARACTERS = 16_000_000
"""What the tokenizer is trained on at most: 2 s on two cores for a vocabulary of 4096, and more text hardly changes the pieces."""

SAMPLE_PER_DOCUMENT = 100_000
"""So that one huge file does not become the whole sample, unless there are few files."""

JOURNAL_SECONDS = 5.0
"""Work that a kill loses, about."""

EARLY_RECORDS = 10_000
"""Records after which too many malformed ones end the work at once."""

SMALL = 8 << 20
"""Bytes of text that one process tokenizes before several have started."""


@dataclass(frozen=True)
class Options:
    """How sources become shards. Everything but `workers` and `max_bad` decides the bytes that are written.

    globs: which files of folders. text_field: of a record. tokenizer, bos, eos: see `find_tokenizer`; without a tokenizer one of
    `vocab_size` tokens is trained. held_out: share of documents kept from training. max_tokens: the document that reaches so many
    training tokens is the last of training. max_bad: share of malformed records to pass over. workers: processes; None: as many as
    help.
    """

    globs: Sequence[str] = ()
    text_field: str = TEXT_FIELD
    tokenizer: str | Path | None = None
    bos: str | None = None
    eos: str | None = None
    vocab_size: int | None = None
    held_out: float | None = None
    seed: int = 0
    shard_tokens: int = SHARD_TOKENS
    max_tokens: int | None = None
    max_bad: float = MAX_BAD
    workers: int | None = None

    def check(self) -> None:
        """DataError for what cannot hold together."""
        if self.tokenizer is not None and self.vocab_size is not None:
            raise DataError("--tokenizer and --vocab-size exclude each other: a given tokenizer has its vocabulary")
        if self.tokenizer is None and (self.bos is not None or self.eos is not None):
            raise DataError("--bos and --eos go with --tokenizer: a tokenizer that is trained here has its own")
        if not -(2**63) <= self.seed < 2**63:
            raise DataError(f"--seed {self.seed} does not fit 64 bits")
        if not 0 <= self.max_bad <= 1:
            raise DataError(f"--max-bad {self.max_bad} is not a share between 0 and 1")


def prepare(
    source: str | Sequence[str], out: Path, *, overwrite: bool = False, console: Console | None = None, **options: Any
) -> Prepared:
    """Tokenize sources (see `find_sources`) into the folder `out`, which appears whole or not at all.

    options: fields of `Options`. Documents are BOS + tokens + EOS. The same arguments give the same bytes, for any number of
    workers and after a kill too: the same call goes on from .NAME.partial beside `out`. DataError for every reason not to.
    """
    wanted = [source] if isinstance(source, str) else list(source)
    chosen = Options(**options)
    chosen.check()
    try:
        check_target(out, overwrite)
        given = None if chosen.tokenizer is None else find_tokenizer(str(chosen.tokenizer), chosen.bos, chosen.eos)
        found = find_sources(wanted, globs=chosen.globs, held_out=chosen.held_out, seed=chosen.seed, out=out)
        if given is None and chosen.vocab_size is None:
            chosen = replace(chosen, vocab_size=STDLIB_VOCAB if wanted == [STDLIB] else VOCAB)
        with work_folder(out, _plan(chosen, found, given), overwrite) as folder:
            if not (folder / JOURNAL).exists():
                check_held_out(found, chosen.text_field, chosen.max_bad)
            prepared = _Preparation(folder, chosen, found, console or Console(stderr=True, quiet=True)).run(given)
    except OSError as error:
        raise DataError(f"{error.filename or out}: {error.strerror}; nothing was written to {out}") from None
    return replace(prepared, out=out)


def _plan(options: Options, found: Found, tokenizer: Encoder | None) -> dict[str, Any]:
    """All that decides the bytes, in the words of the command line."""
    identity = json.dumps([source.identity() for source in found.sources])
    return {
        "--source (or the files there)": hashlib.sha256(identity.encode()).hexdigest(),
        "--text-field": options.text_field,
        "--tokenizer": None if tokenizer is None else entry_of(tokenizer).model_dump(),
        "--vocab-size": options.vocab_size,
        "--held-out": found.held_out,
        "--seed": options.seed,
        "--shard-tokens": options.shard_tokens,
        "--max-tokens": options.max_tokens,
    }


class _Preparation:
    """One preparation in its work folder."""

    def __init__(self, folder: Path, options: Options, found: Found, console: Console) -> None:
        self._folder = folder
        self._options = options
        self._found = found
        self._console = console
        self._journal = Journal.load(folder) or Journal(skipped=found.skipped)
        self._resumed = bool(self._journal.written)

    def run(self, given: Encoder | None) -> Prepared:
        """given: the tokenizer, None to train one."""
        tokenizer = given or self._trained()
        if not self._resumed:
            write_durably(self._folder / tokenizer.file, tokenizer.model)
        with ExitStack() as stack:
            writers = {split: stack.enter_context(self._writer(split, tokenizer)) for split in SPLITS}
            self._write(tokenizer, writers)
        skipped = self._journal.skipped
        manifest = make_manifest(writers, entry_of(tokenizer), skipped, self._options.seed)
        write_manifest(self._folder, manifest)
        lengths = {split: writer.lengths for split, writer in writers.items()}
        return Prepared(self._folder, manifest, lengths, skipped, self._journal.unknown)

    def _trained(self) -> Tokenizer:
        if self._resumed:
            return Tokenizer.load(self._folder / TOKENIZER)
        assert self._options.vocab_size is not None
        self._say(f"training a tokenizer of {self._options.vocab_size} tokens")
        skipped = Skipped()
        sentences = list(sample(self._found, self._options.text_field, skipped))
        if not sentences:
            records = sum(skipped.number.values())
            bad = skipped.number["malformed"]
            raise _malformed(skipped, records, "read", self._options.max_bad) if bad else _nothing_usable("train", skipped)
        return Tokenizer(train_tokenizer(sentences, self._options.vocab_size))

    def _writer(self, split: str, tokenizer: Encoder) -> SplitWriter:
        dtype = np.dtype(token_dtype_name(tokenizer.vocab_size)).newbyteorder("<")
        return SplitWriter(self._folder, split, dtype, self._options.shard_tokens, self._journal.written.get(split))

    def _write(self, tokenizer: Encoder, writers: dict[str, SplitWriter]) -> None:
        """Tokenizes what is not done yet."""
        encoder = PieceEncoder(tokenizer, self._options.text_field, self._found.held_out)
        sizes = [source.size for source in self._found.sources]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        workers = self._options.workers or (1 if total is not None and total <= SMALL else usable_cores())
        before = sum(writer.tokens for writer in writers.values())
        if self._resumed:
            self._say(f"going on after {before:,} tokens of an unfinished preparation")
        saved = time.monotonic()
        first = sum(size or 0 for size in sizes[: self._journal.source])
        try:
            with (
                Progress(self._console, total, first) as progress,
                closing(encode_all(self._steps(writers), encoder, workers)) as encoded,
            ):
                for work in encoded:
                    self._take(work, writers, tokenizer)
                    if time.monotonic() - saved > JOURNAL_SECONDS:
                        self._save(writers)
                        saved = time.monotonic()
                    tokens = sum(writer.tokens for writer in writers.values())
                    documents = sum(writer.documents for writer in writers.values())
                    read = sum(size or 0 for size in sizes[: work.source]) + work.step.read
                    progress.advance(read, documents, tokens, tokens - before)
                    if self._journal.records >= EARLY_RECORDS:
                        self._check_malformed("so far")
                    if self._full(writers):
                        break
                self._check_malformed("in all")
                self._check_splits(writers)
        except DataError:
            if (self._folder / JOURNAL).exists():
                self._save(writers)
            raise

    def _steps(self, writers: dict[str, SplitWriter]) -> Iterator[tuple[int, Step]]:
        """What is left to read."""
        if self._full(writers):
            return
        at, after = self._journal.source, self._journal.after
        for number, source in enumerate(self._found.sources[at:], at):
            yield from ((number, step) for step in source.steps(self._options.text_field, after if number == at else None))

    def _full(self, writers: dict[str, SplitWriter]) -> bool:
        return self._options.max_tokens is not None and writers["train"].tokens >= self._options.max_tokens

    def _take(self, work: Work, writers: dict[str, SplitWriter], tokenizer: Encoder) -> None:
        unknown = self._journal.unknown
        start = 0 if tokenizer.bos is None else 1  # BOS or EOS may be the same token
        for split, documents in work.encoded.documents.items():
            for document in documents:
                if split == "train" and self._full(writers):
                    break
                writers[split].add(document)
                if tokenizer.unk is not None:
                    unknown += int(np.count_nonzero(document[start:-1] == tokenizer.unk))
        skipped = self._journal.skipped
        skipped.extend(work.encoded.skipped)
        records = self._journal.records + work.encoded.records
        after = work.step.after
        self._journal = Journal(source=work.source, after=after, records=records, skipped=skipped, unknown=unknown)

    def _save(self, writers: dict[str, SplitWriter]) -> None:
        written = {split: writer.sync() for split, writer in writers.items()}
        self._journal.model_copy(update={"written": written}).save(self._folder)

    def _check_malformed(self, when: str) -> None:
        if self._journal.skipped.number["malformed"] > self._options.max_bad * self._journal.records:
            raise _malformed(self._journal.skipped, self._journal.records, when, self._options.max_bad)

    def _check_splits(self, writers: dict[str, SplitWriter]) -> None:
        skipped, share = self._journal.skipped, self._found.held_out
        for split, writer in writers.items():
            others = sum(other.documents for other in writers.values())
            if not others:
                raise _nothing_usable(split, skipped)
            if not writer.documents and others == 1:
                raise DataError(_ONE_DOCUMENT)
            if not writer.documents:
                enough = (
                    f"--held-out {min(0.5, math.ceil(3000 / others) / 1000):g}" if split == "heldout" else "a smaller --held-out"
                )
                raise DataError(f"--held-out {share:g} leaves the split {split!r} empty, of {others} documents: use {enough}")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)


_TWO_NEEDED = "training needs one, and --held-out another"
_ONE_DOCUMENT = f"there is one document: {_TWO_NEEDED}; split the text into several files or records"


def check_held_out(found: Found, text_field: str, max_bad: float) -> None:
    """DataError where a split is left without a document, before anything is tokenized.

    Reads until both have one, which takes few records, and never more than EARLY_RECORDS. Datasets of the hub would be fetched
    twice. What is not usable, and more of it than max_bad, is told of by the work itself.
    """
    if any(source.size is None for source in found.sources):
        return
    share, low, high, number, malformed = found.held_out, 1.0, 0.0, 0, 0
    steps = (step for source in found.sources for step in source.steps(text_field))
    records = 0
    for record in (record for step in steps for record in step.piece.records(text_field)):
        if records == EARLY_RECORDS:
            return
        records += 1
        malformed += record.problem == "malformed"
        if record.problem is not None or not record.text.strip():
            continue
        number += 1
        place = place_of(record.text.encode()) if record.held_out is None else float(not record.held_out)
        low, high = min(low, place), max(high, place)
        if low < share <= high:
            return
    if malformed > max_bad * records:
        return
    if low < high:
        chosen, enough = ("none", math.ceil(low * 1000 + 1)) if share <= low else ("all", math.floor(high * 1000))
        raise DataError(f"--held-out {share:g} picks {chosen} of {number} documents: use --held-out {min(enough, 999) / 1000:g}")
    if number:
        raise DataError(_ONE_DOCUMENT if number == 1 else f"all {number} documents are the same text: {_TWO_NEEDED}")


def sample(found: Found, text_field: str, skipped: Skipped) -> Iterator[str]:
    """Sentences to train a tokenizer on, up to SAMPLE_CHARACTERS in all: from the beginning of every source, whose text files are
    shuffled, evenly spread over each document, and never from held-out ones."""
    for source in found.sources:
        left = SAMPLE_CHARACTERS // len(found.sources)
        per_document = max(left // (source.documents or left), SAMPLE_PER_DOCUMENT)
        for text in _training_texts(source, found.held_out, text_field, skipped):
            for sentence in itertools.islice(sample_pieces(text), 0, None, math.ceil(len(text) / per_document)):
                yield sentence
                left -= len(sentence)
            if left <= 0:
                break


def _training_texts(source: Source, held_out: float, text_field: str, skipped: Skipped) -> Iterator[str]:
    for step in source.steps(text_field):
        for record in step.piece.records(text_field):
            problem = record.problem or (None if record.text.strip() else "empty")
            if problem is not None:
                skipped.add(problem, record.name)
            elif not is_held_out(record, held_out):
                yield record.text


def make_manifest(writers: dict[str, SplitWriter], tokenizer: TokenizerEntry, skipped: Skipped, seed: int) -> Manifest:
    """The manifest of the finished writers of both splits."""
    lengths = {split: writer.lengths for split, writer in writers.items()}
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


def _nothing_usable(split: str, skipped: Skipped) -> DataError:
    what = f"skipped: {skipped}" if str(skipped) else "there was nothing to read"
    advice = "convert the files to UTF-8, or choose others with --glob" if skipped.number["not_utf8"] else "name other text"
    return DataError(f"nothing for the split {split!r} is usable text; {what}; {advice}")


def _malformed(skipped: Skipped, records: int, when: str, limit: float) -> DataError:
    bad = skipped.number["malformed"]
    shown = "".join(f"\n  {name}" for name in skipped.examples["malformed"])
    enough = math.ceil(1000 * bad / records) / 10
    advice = f"mend them, or pass over such records with --max-bad {enough:g}%" if bad < records else "there is no usable one"
    return DataError(
        f"{bad} of {records} records {when} are malformed, more than --max-bad {100 * limit:.3g}%; the first ones:{shown}\n{advice}"
    )
