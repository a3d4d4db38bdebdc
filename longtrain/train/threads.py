"""Work on many files, or many ranges of them, in several threads of one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from longtrain.cores import usable_cores

THREADS = 8
"""Of one rank at most: SHA-256 and page faults keep one core to 1 or 2 GB/s, and few disks take more than eight of them."""

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def in_threads(action: Callable[[Item], Answer], items: Iterable[Item], most: int = THREADS) -> list[Answer]:
    """What `action` makes of every item, in their order; up to `most` at a time, and no more than there are cores.

    Raises what the first item that failed raised; what had not begun by then never does. One at a time runs in this thread, as all
    do where a limit on processes leaves no other.
    """
    items = list(items)
    workers = min(most, usable_cores(), len(items))
    if workers <= 1:
        return [action(item) for item in items]
    with ThreadPoolExecutor(workers, "checkpoint") as pool:
        try:
            pool.submit(lambda: None)
        except RuntimeError:
            return [action(item) for item in items]
        return list(pool.map(action, items))
