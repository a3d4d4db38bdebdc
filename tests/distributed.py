"""Running a function on several gloo ranks, each a process of its own, from inside a test."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from longtrain.parallel.context import ParallelContext
from longtrain.parallel.launch import Launch, start, stop


class RankError(AssertionError):
    """A rank raised, died or did not finish; the message holds its traceback."""


@dataclass(frozen=True)
class Ranks:
    """Ranks that run a function, each a process."""

    processes: Sequence[BaseProcess]
    pipes: Sequence[Connection]

    def results(self, timeout: float) -> list[Any]:
        """What each returned, in rank order. Raises RankError with the traceback of the first that failed."""
        return _collect(self.pipes, timeout)

    def running(self) -> bool:
        """Whether all are; raises RankError with its traceback where one has failed."""
        ended = wait(list(self.pipes), 0)
        _collect([pipe for pipe in self.pipes if pipe in ended], 0)
        return not ended

    def kill(self, order: Sequence[int]) -> list[int | None]:
        """kill -9 of all, in this order, at once; their exit codes."""
        for rank in order:
            self.processes[rank].kill()
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]


def run_ranks(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    dp: int | None = None,
    cp: int = 1,
    timeout: float = 120.0,
    device: str = "cpu",
) -> list[Any]:
    """`function(ctx, *args)` on `world` ranks of one machine; returns what each returned, in rank order.

    function and args must be picklable, so the function stands at the top of its module; results are best plain data. Ranks meet
    through a file, so no port is taken. Raises RankError with the traceback of the first rank that failed; no process survives.
    """
    with start_ranks(function, world, *args, dp=dp, cp=cp, timeout=timeout, device=device) as ranks:
        return ranks.results(timeout)


@contextmanager
def start_ranks(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    dp: int | None = None,
    cp: int = 1,
    timeout: float = 120.0,
    device: str = "cpu",
) -> Iterator[Ranks]:
    """The ranks of `run_ranks` while they run; none outlives the block."""
    # Ranks are forked from a server that has imported all they need and run nothing: seconds less for each than a new interpreter.
    # Not for CUDA, which the compiler initialises on a machine that has it, and which does not survive a fork.
    server = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
    server.set_forkserver_preload(["tests.warm"])
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        try:
            for rank in range(world):
                receiver, sender = server.Pipe(duplex=False)
                place = (rank, world, dp or world // cp, cp, f"file://{Path(folder).resolve()}/store", timeout, device)
                process = server.Process(target=_rank, args=(sender, place, function, args), daemon=True)
                process.start()
                sender.close()
                processes.append(process)
                pipes.append(receiver)
            yield Ranks(processes, pipes)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _collect(pipes: Sequence[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(waiting.values())} of {len(pipes)} did not finish within {timeout:.0f} s")
        for pipe in ready:
            rank = waiting.pop(pipe)  # type: ignore[arg-type]
            try:
                error, result = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                error, result = "the process died without a traceback", None
            if error:
                raise RankError(f"rank {rank} of {len(pipes)} failed:\n{error}")
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]


def _rank(sender: Connection, place: tuple[Any, ...], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    rank, world, dp, cp, rendezvous, timeout, device = place
    threading.Thread(target=_die_with_parent, daemon=True).start()
    # A hang shows where it hangs before the parent gives up.
    faulthandler.dump_traceback_later(0.9 * timeout)
    torch.set_num_threads(1)
    try:
        launch = Launch(rank=rank, world=world, local_rank=rank, local_world=world)
        ctx: ParallelContext = start(launch, dp=dp, cp=cp, device=device, rendezvous=rendezvous)
        sender.send(("", function(ctx, *args)))
    except BaseException:
        sender.send((traceback.format_exc(), None))
    finally:
        stop()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
