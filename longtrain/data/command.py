"""The command line of scripts/prepare_data.py: arguments in, exit codes out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from longtrain.data.prepare import MAX_BAD, SHARD_TOKENS, STDLIB_VOCAB, TEXT_FIELD, VOCAB, prepare
from longtrain.data.sources import HELD_OUT
from longtrain.errors import DataError, LongtrainError

REFUSED, INTERRUPTED = 2, 130


def command(
    source: Annotated[
        list[str],
        typer.Option(
            help="A folder of text files, JSON Lines (.gz, .zst) or Parquet; one such file; hf:NAME[:CONFIG[:SPLIT]], a dataset of "
            "the hub; or 'stdlib', this Python's standard library. Repeatable."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    glob: Annotated[list[str] | None, typer.Option(help="Files of folders to take, as '**/*.txt'; repeatable.")] = None,
    text_field: Annotated[str, typer.Option(help="Field or column of a record that holds its text.")] = TEXT_FIELD,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A SentencePiece .model, a tokenizer.json, a folder that holds one, or hf:NAME, a model of the hub."),
    ] = None,
    bos: Annotated[str | None, typer.Option(help="Token of a tokenizer.json before every document; 'none': no token.")] = None,
    eos: Annotated[str | None, typer.Option(help="Token of a tokenizer.json after every document.")] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help=f"Train a tokenizer of this size [default: {VOCAB}; stdlib {STDLIB_VOCAB}].")
    ] = None,
    held_out: Annotated[
        float | None, typer.Option(help=f"Share of documents kept from training [default: {HELD_OUT}; stdlib: fixed files].")
    ] = None,
    max_bad: Annotated[str, typer.Option(help="Share of malformed records to pass over, as 1% or 0.01.")] = f"{MAX_BAD:.1%}",
    max_tokens: Annotated[
        str | None, typer.Option(help="Stop after about so many training tokens, as 2e9.", show_default=False)
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes [default: all cores, for more than a little text].")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=1, help="Sequence length to report on.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of text files.")] = 0,
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one shard file, about.")] = SHARD_TOKENS,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace older prepared data in --out, and unfinished work of another command.")
    ] = False,
) -> None:
    """Turn text into token shards for training. A killed preparation goes on where it was: give the same command again."""
    try:
        prepared = prepare(
            source,
            out,
            globs=glob or (),
            text_field=text_field,
            tokenizer=tokenizer,
            bos=bos,
            eos=eos,
            vocab_size=vocab_size,
            held_out=held_out,
            max_bad=share(max_bad),
            max_tokens=count(max_tokens),
            workers=workers,
            seed=seed,
            shard_tokens=shard_tokens,
            overwrite=overwrite,
            console=Console(stderr=True, soft_wrap=True),
        )
    except KeyboardInterrupt:
        print("interrupted; give the same command again to go on", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    print(prepared.report(sequence_length))


def share(text: str) -> float:
    """'0.1%' or '0.001'. DataError where it is no share."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise DataError(f"--max-bad {text}: expected a share, such as 0.1% or 0.001")
    return value


def count(text: str | None) -> int | None:
    """'2e9' or '2000000000'. DataError where it is no number of tokens."""
    try:
        value = None if text is None else int(float(text))
    except (ValueError, OverflowError):
        value = 0
    if value is not None and value < 1:
        raise DataError(f"--max-tokens {text}: expected a number of tokens, such as 2e9")
    return value


def main() -> None:
    """The command with the process's arguments: exit 2 and one message on stderr where the input is refused."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    try:
        app()
    except LongtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(REFUSED)
