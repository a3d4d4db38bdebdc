"""Short texts from every rank to every other without a collective, for threads that work beside the one that trains.

Collectives belong to the training thread: from two threads their order would differ between ranks, and NCCL then hangs. The store
through which the ranks met has no order, and its operations are safe in any thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from longtrain.parallel.context import ParallelContext

POLL = 0.02
"""Seconds between two looks for what other ranks have posted; ten times that after the first second."""


class MailboxGoneError(RuntimeError):
    """The store is gone in which ranks leave their posts: torchrun was killed, or its host is down."""


class Mailbox:
    """What the ranks of `ctx` have posted under keys that nobody uses twice."""

    def __init__(self, ctx: ParallelContext) -> None:
        self._rank, self._world = ctx.rank, ctx.world
        self._own: dict[str, str] = {}
        self._store: Any = None
        if ctx.world > 1:
            store = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore("longtrain/mailbox", store)  # pyright: ignore[reportPrivateImportUsage]

    def post(self, key: str, text: str) -> None:
        """Leaves `text` as this rank's post under `key`. Raises MailboxGoneError."""
        if self._store is None:
            self._own[key] = text
        else:
            _reach(lambda: self._store.set(f"{key}/{self._rank}", text))

    def collect(self, key: str, give_up: Callable[[], bool]) -> list[str]:
        """The posts of all ranks under `key`, in rank order, when all are there; they are then forgotten.

        Raises TimeoutError that names the ranks that have posted nothing when `give_up` says so, and MailboxGoneError.
        """
        if self._store is None:
            return [self._own.pop(key)]
        return _reach(lambda: self._collect(key, give_up))

    def _collect(self, key: str, give_up: Callable[[], bool]) -> list[str]:
        keys = [f"{key}/{rank}" for rank in range(self._world)]
        start = time.monotonic()
        while not self._store.check(keys):
            if give_up():
                absent = [str(rank) for rank, name in enumerate(keys) if not self._store.check([name])]
                raise TimeoutError(f"nothing came from rank {', '.join(absent)}")
            time.sleep(POLL if time.monotonic() < start + 1 else 10 * POLL)
        posts = [self._store.get(name).decode() for name in keys]
        for name in keys:
            self._store.delete_key(name)
        return posts


def _reach(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except RuntimeError as error:  # all that the store raises, whatever is wrong
        raise MailboxGoneError(str(error)) from error
