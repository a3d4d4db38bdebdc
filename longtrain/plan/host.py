"""What checkpoints take of a machine: disk, and memory for the copy that is written behind the training."""

from __future__ import annotations

from pathlib import Path

from longtrain.plan.plan import Plan
from longtrain.recipe.zero import Offload

SHARE = 0.8
"""Of the host memory that is available, what a copy may take."""
SAVED = 12
"""Bytes of a parameter in a checkpoint: master weight and two moments, fp32."""
OFFLOADED = 16
"""Bytes of a parameter that `zero.offload cpu` keeps on the host: the same, and the gradient."""


def available_memory(proc: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of host memory that can still be had, by the machine and by the limit of a container; None where neither says."""
    found = []
    try:
        lines = dict(line.split(":", 1) for line in proc.read_text().splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    except (OSError, ValueError, KeyError):
        pass
    try:
        limit = int((group / "memory.max").read_text())
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # the page cache of a container counts as used, but gives way
        found.append(max(0, limit - int(used["anon"])))
    except (OSError, ValueError, KeyError):
        pass
    return min(found, default=None)


def fits(copy: int, available: int | None) -> bool:
    """Whether so many bytes may be copied to host memory, of which so many are available. None: nobody knows, so try."""
    return copy == 0 or available is None or copy <= SHARE * available


def copy_bytes(plan: Plan) -> int:
    """Of the copies of all ranks of one machine."""
    return SAVED * plan.parameters * plan.host // plan.world


def describe_checkpoint(plan: Plan, available: int | None) -> str:
    """Its size, what it takes of the disk, and whether training stands still while it is written.

    available: bytes of host memory of each machine, before training begins.
    """
    checkpoint = plan.recipe.checkpoint
    if checkpoint.every is None:
        return "none"
    size, copy = SAVED * plan.parameters, copy_bytes(plan)
    offloaded = OFFLOADED * plan.parameters * plan.host // plan.world if plan.recipe.zero.offload is Offload.CPU else 0
    left = None if available is None else max(0, available - offloaded)
    most = _gib(size * (checkpoint.keep + 1))
    disk = f"{_gib(size)} every {checkpoint.every:,} steps, up to {most} of disk with keep {checkpoint.keep}"
    needs = f"a copy of {_gib(copy)} in the memory of each machine"
    if fits(copy, left):
        return f"{disk}; written behind the training after {needs}"
    assert left is not None
    return (
        f"{disk}; training stands still while it is written, file by file: {needs} is more than {SHARE:.0%} of the {_gib(left)} "
        "that this one will have left"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:,.3g} GiB"
