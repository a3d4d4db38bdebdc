"""Refusals: one message and exit code 2."""

from __future__ import annotations

import errno
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from longtrain.cli.terminal import rank
from longtrain.errors import LongtrainError
from longtrain.recipe.load import Written

REFUSED = 2
INTERRUPTED = 128 + 2  # what a shell reports of a command that SIGINT ended
PATIENCE = 3.0  # seconds in which torchrun ends the ranks of a run that one of them has left

# What the file system can say no with where the system call names no file.
_FILE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.EFBIG}
# what torch's allocators say: that of a GPU in many sentences, of which the later ones are advice to programmers
_NO_MEMORY = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")
_ADVICE = re.compile(r" If reserved but unallocated .*", re.DOTALL)
_LESS = (
    "Of a training run `longtrain plan` says what each rank holds: a smaller training.micro_batch_size, training.activations "
    "minimal, a higher zero.stage, zero.offload cpu, or more ranks (parallel.cp, parallel.dp) need less"
)
# what gloo and NCCL say on the ranks that are left when one has gone
_LOST_PEER = ("onnection closed by peer", "Connection reset by peer", "remote process exited", "Broken pipe")


@contextmanager
def refusals(*, ranks: bool = False) -> Iterator[None]:
    """Turns a refusal into its message and exit code 2, Ctrl-C into exit code 130. ranks: torchrun may have started several of
    this process, of which the first that refuses speaks for all."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        message, number = _refusal(error), rank() if ranks else 0
        if number:
            # where all ranks refuse alike, or this one only lost its peers: rank 0 says why, and torchrun ends this one meanwhile
            time.sleep(PATIENCE)
        if message is None:
            raise
        print(f"error on rank {number}: {message}" if number else f"error: {message}", file=sys.stderr, flush=True)
        raise typer.Exit(REFUSED) from None


@contextmanager
def located(written: Written, field: str | None = None) -> Iterator[None]:
    """Puts before a refusal of what a recipe asks for where it asks for it; field: to blame where the message names none."""
    try:
        yield
    except LongtrainError as error:
        error.args = (written.located(str(error), field),)
        raise


def _refusal(error: Exception) -> str | None:
    """What to tell of a refusal by us or by the file system; None for every other error, which keeps its traceback."""
    if isinstance(error, LongtrainError):
        return str(error)
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _FILE_ERRORS):
        return ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)
    if type(error).__name__ == "OutOfMemoryError":  # of torch, which is not imported for this
        return f"{_ADVICE.sub('', str(error))} {_LESS}"
    if isinstance(error, RuntimeError) and (wanted := _NO_MEMORY.search(str(error))):
        return f"out of memory: no {int(wanted[1]) / 2**30:,.3g} GiB can be had at once on {socket.gethostname()}. {_LESS}"
    if isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _LOST_PEER):
        return "another rank of this run has ended; what it printed says why"
    return None
