"""Work on many files, or many ranges of them, in several threads of one rank."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar

from longtrain.cores import usable_cores

THREADS = 8
"""Of one rank at most: SHA-256 and page faults keep one core to 1 or 2 GB/s, and few disks take more than eight of them."""

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def in_threads(action: Callable[[Item], Answer], items: Iterable[Item], most: int = THREADS) -> list[Answer]:
    """What `action` makes of every item, in their order; up to `most` at a time, and no more than there are cores.

    Raises what the first item that failed raised; what had not begun by then never does. This thread works too, alone where a limit
    on processes leaves no other.
    """
    items = list(items)
    waiting, answers, errors = deque(range(len(items))), dict[int, Answer](), dict[int, BaseException]()

    def work() -> None:
        with suppress(IndexError):
            while not errors:
                number = waiting.popleft()
                try:
                    answers[number] = action(items[number])
                except BaseException as error:
                    errors[number] = error

    helpers = [threading.Thread(target=work, name="checkpoint") for _ in range(min(most, usable_cores(), len(items)) - 1)]
    started: list[threading.Thread] = []
    with suppress(RuntimeError):
        for helper in helpers:
            helper.start()
            started.append(helper)
    work()
    for helper in started:
        helper.join()
    if errors:
        raise errors[min(errors)]
    return [answers[number] for number in range(len(items))]
