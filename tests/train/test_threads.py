"""Work in threads, also where the system allows too few of them."""

from __future__ import annotations

import threading
import time

import pytest

from longtrain.train import threads
from longtrain.train.threads import in_threads


@pytest.mark.parametrize("allowed", [0, 1, 8])
def test_answers_come_in_order_however_many_threads_there_are(allowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)
    start, begun = threading.Thread.start, []

    def limited(thread: threading.Thread) -> None:
        if len(begun) == allowed:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    assert in_threads(lambda x: x * x, range(40)) == [x * x for x in range(40)]
    assert len(begun) == min(allowed, 7), "this thread works too"


def test_the_first_error_is_raised_and_nothing_more_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    seen: list[int] = []

    def act(number: int) -> None:
        seen.append(number)
        if number == 5:
            raise IndexError("five")
        time.sleep(0.01)

    with pytest.raises(IndexError, match="five"):
        in_threads(act, range(1000))
    assert len(seen) < 20
