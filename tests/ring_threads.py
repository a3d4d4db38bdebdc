"""A ring of ranks as threads of one process, which watches what travels."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from longtrain.parallel.exchange import Parcel

Result = TypeVar("Result")

TIMEOUT = 30.0
"""Seconds that a receive may wait for a parcel that nobody sends."""


class _Post:
    """First-in first-out boxes between every pair of ranks."""

    def __init__(self, size: int) -> None:
        self.size, self.sent, self.lock = size, 0, threading.Lock()
        self.boxes: dict[tuple[int, int], queue.Queue[Tensor | None]] = {
            (source, target): queue.Queue() for source in range(size) for target in range(size)
        }

    def abandon(self) -> None:
        """Wakes every rank that waits for a parcel: one of them has failed."""
        for box in self.boxes.values():
            box.put(None)


class ThreadExchange:
    """parallel.exchange.Exchange of one thread. Stricter than a network: what is sent must be contiguous, stay as it is until
    `wait`, and match shape and dtype at the receiver, whose buffer is filled only in `wait`."""

    def __init__(self, rank: int, post: _Post) -> None:
        self.rank, self.size, self._post = rank, post.size, post

    @property
    def sent(self) -> int:
        """Parcels sent so far by all ranks."""
        return self._post.sent

    def start(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> _Delivery:
        for peer, tensor in [*sends, *receives]:
            assert peer != self.rank, "a parcel to oneself"
            assert tensor.is_contiguous(), "parcels must be contiguous"
        for peer, tensor in sends:
            self._post.boxes[self.rank, peer].put(tensor.clone())
            with self._post.lock:
                self._post.sent += 1
        return _Delivery([(t, t.clone()) for _, t in sends], [(self._post.boxes[peer, self.rank], t) for peer, t in receives])


class _Delivery:
    def __init__(self, sent: list[tuple[Tensor, Tensor]], due: list[tuple[queue.Queue[Tensor | None], Tensor]]) -> None:
        self._sent, self._due = sent, due

    def wait(self) -> None:
        for box, buffer in self._due:
            try:
                parcel = box.get(timeout=TIMEOUT)
            except queue.Empty:
                raise TimeoutError("nobody sent the parcel that this rank waits for") from None
            if parcel is None:
                raise _AbandonedError
            assert parcel.shape == buffer.shape, f"sent {tuple(parcel.shape)}, expected {tuple(buffer.shape)}"
            assert parcel.dtype == buffer.dtype, f"sent {parcel.dtype}, expected {buffer.dtype}"
            buffer.copy_(parcel)
        for tensor, before in self._sent:
            assert torch.equal(tensor.nan_to_num(), before.nan_to_num()), "written to while it was being sent"
        self._due, self._sent = [], []


class _AbandonedError(Exception):
    """Another rank failed."""


@dataclass(frozen=True)
class RingRun(Generic[Result]):
    """What every rank returned, and how many parcels travelled between them."""

    results: list[Result]
    messages: int


def run_ring(ranks: int, work: Callable[[ThreadExchange], Result]) -> RingRun[Result]:
    """work(exchange) on every rank at once. Raises what any rank raises, and AssertionError if a parcel was never received."""
    post = _Post(ranks)
    returned: dict[int, Result] = {}
    failures: dict[int, BaseException] = {}

    def one(rank: int) -> None:
        try:
            # CUDA backwards of all threads share one worker a device: two that wait for each other's parcels would wait for ever
            with torch.autograd.set_multithreading_enabled(False):
                returned[rank] = work(ThreadExchange(rank, post))
        except BaseException as error:
            failures[rank] = error
            post.abandon()

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * TIMEOUT)
        assert not thread.is_alive(), "a rank does not end"
    for rank, error in sorted(failures.items(), key=lambda f: isinstance(f[1], _AbandonedError)):
        error.add_note(f"on rank {rank} of {ranks}")
        raise error
    left = {pair: box.qsize() for pair, box in post.boxes.items() if box.qsize()}
    assert not left, f"parcels sent but never received, by (source, target): {left}"
    return RingRun([returned[rank] for rank in range(ranks)], post.sent)
