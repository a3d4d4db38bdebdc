"""How much of the machine's processor this process has."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Cores that this process may run on; macOS has no affinity, so there it is all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
