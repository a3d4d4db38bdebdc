"""scripts/prepare_data.py. Not imported with the other commands: its defaults come from a module that takes a while to import."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from longtrain.cli.options import group
from longtrain.cli.refusals import refusals
from longtrain.cli.terminal import outlive_readers, say
from longtrain.data.json_tokenizer import ACCEPTED
from longtrain.data.prepare import MAX_BAD, SHARD_TOKENS, STDLIB_VOCAB, TEXT_FIELD, VOCAB, prepare
from longtrain.data.sources import HELD_OUT
from longtrain.errors import DataError


def prepare_data(
    # typer 0.27 takes a metavar that is the parameter's name in capitals for the name of the option
    source: Annotated[
        list[str],
        typer.Option(
            "--source",
            metavar="SOURCE",
            help="A folder of text files, JSON Lines (.gz, .zst) or Parquet; one such file; hf:NAME[:CONFIG[:SPLIT]], a dataset of "
            "the hub; or 'stdlib', this Python's standard library. Repeatable.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to create.")],
    glob: Annotated[
        list[str] | None, typer.Option("--glob", metavar="GLOB", help="Files of folders to take, as '**/*.txt'; repeatable.")
    ] = None,
    text_field: Annotated[str, typer.Option(metavar="NAME", help="Field or column of a record that holds its text.")] = TEXT_FIELD,
    tokenizer: Annotated[str | None, typer.Option(metavar="PATH|hf:NAME", help=f"{ACCEPTED}.")] = None,
    bos: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="Token of a tokenizer.json before every document; 'none': no token.")
    ] = None,
    eos: Annotated[str | None, typer.Option(metavar="TOKEN", help="Token of a tokenizer.json after every document.")] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Without --tokenizer: the size of the one that is trained.  [default: {VOCAB}; stdlib: {STDLIB_VOCAB}]",
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help=f"Share of documents kept from training, as 2% or 0.02.  [default: {HELD_OUT}; stdlib: fixed files]",
        ),
    ] = None,
    max_bad: Annotated[
        str, typer.Option(metavar="SHARE", help="Share of malformed records to pass over, as 1% or 0.01.")
    ] = f"{MAX_BAD:.1%}",
    max_tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Stop with the document that reaches so many training tokens, as 2e9.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes.  [default: all cores, for more than a little text]")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, metavar="TOKENS", help="Sequence length that the report is for.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the order of text files.")] = 0,
    shard_tokens: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Tokens in one shard file, about.")] = SHARD_TOKENS,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace older prepared data in --out, and unfinished work of another command.")
    ] = False,
) -> None:
    """Turns text into token shards for training. A killed preparation goes on where it was when the same command is given again."""
    with refusals():
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
                held_out=None if held_out is None else share("--held-out", held_out),
                max_bad=share("--max-bad", max_bad),
                max_tokens=count(max_tokens),
                workers=workers,
                seed=seed,
                shard_tokens=shard_tokens,
                overwrite=overwrite,
                console=Console(stderr=True, soft_wrap=True),
            )
        except KeyboardInterrupt:
            print("interrupted; give the same command again to go on", file=sys.stderr)
            raise
        say(prepared.report(sequence_length))


def share(option: str, text: str) -> float:
    """'0.1%' or '0.001'. DataError where it is no share."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise DataError(f"{option} {text}: expected a share, such as 0.1% or 0.001")
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
    """The command with the process's arguments."""
    outlive_readers()
    app = group()
    app.command()(prepare_data)
    app()
