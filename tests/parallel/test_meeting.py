"""Processes that meet in a store are those of one attempt, whatever earlier ones have left there."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from longtrain.errors import LaunchError
from longtrain.parallel.meeting import LEADER, meet

SOON = timedelta(seconds=20)


@pytest.fixture
def stores() -> Any:
    """A connection to one store for whoever asks."""
    server: Any = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as threads:
        yield threads


def _names(ranks: list[Future[str]]) -> set[str]:
    return {future.result(30) for future in ranks}


def test_every_attempt_has_a_name_of_its_own(stores: Any, pool: ThreadPoolExecutor) -> None:
    seen = set()
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        ranks = [pool.submit(meet, stores(), rank, 3, SOON) for rank in order]
        names = _names(ranks)
        assert len(names) == 1, "one name for all"
        seen |= names
    assert len(seen) == 3


def test_who_comes_first_waits_for_the_leader_of_this_attempt(stores: Any, pool: ThreadPoolExecutor) -> None:
    before = _names([pool.submit(meet, stores(), rank, 2, SOON) for rank in (0, 1)])
    early = pool.submit(meet, stores(), 1, 2, SOON)
    with pytest.raises(TimeoutError):
        early.result(0.5)
    name = meet(stores(), 0, 2, SOON)
    assert early.result(30) == name
    assert {name} != before


def test_a_leader_that_died_before_they_met(stores: Any, pool: ThreadPoolExecutor) -> None:
    with pytest.raises(LaunchError, match="ranks 1 did not come within 0 s"):
        meet(stores(), 0, 2, timedelta(milliseconds=200))
    early = pool.submit(meet, stores(), 1, 2, SOON)
    assert meet(stores(), 0, 2, SOON) == early.result(30)


def test_nobody_waits_for_ever(stores: Any) -> None:
    with pytest.raises(LaunchError, match="rank 1: rank 0 did not come within 0 s"):
        meet(stores(), 1, 2, timedelta(milliseconds=200))
    stores().set(LEADER, "of an earlier attempt")
    with pytest.raises(LaunchError, match="rank 1: rank 0 did not come within 2 s"):
        meet(stores(), 1, 2, timedelta(seconds=2))


def test_a_store_that_is_gone() -> None:
    server: Any = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    del server
    with pytest.raises(LaunchError, match="the store through which the ranks meet is gone"):
        meet(client, 1, 2, timedelta(seconds=2))
