"""What checkpoints take of a machine: disk, and memory for the copy that is written behind the training."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from longtrain.plan.plan import Plan
from longtrain.recipe.zero import Offload

SHARE = 0.8
"""Of the host memory that is available, what a copy may take."""
SAVED = 12
"""Bytes of a parameter in a checkpoint: master weight and two moments, fp32."""
OFFLOADED = 16
"""Bytes of a parameter that `zero.offload cpu` keeps on the host: the same, and the gradient."""
UNLIMITED = 1 << 60
"""Bytes from which on a limit is none: version 1 of control groups writes the largest number of pages that it can count."""

# by the file system of either version: the limit of a control group, and what of memory.stat cannot be dropped, as page cache can
_LIMITS = {
    "cgroup": ("memory.limit_in_bytes", ("total_rss", "total_shmem")),
    "cgroup2": ("memory.max", ("anon", "shmem")),
}
_NUMBER = re.compile(r"^(\w+):? +(\d+)", re.MULTILINE)
_GROUP = re.compile(r"^(\d+):(.*?):(/.*)$", re.MULTILINE)
_MOUNT = re.compile(r"^\S+ \S+ \S+ (/\S*) (/\S*) .* - (cgroup2?) \S+ (\S+)$", re.MULTILINE)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of host memory that can still be had, by the machine and by the limit of every control group that this process is in:
    a container, a job of Slurm, a unit of systemd. None where nothing says. root: of the file system, with proc in it.
    """
    found = []
    machine = _numbers(root / "proc/meminfo")
    if "MemAvailable" in machine:
        found.append(1024 * machine["MemAvailable"])
    for group, kind in _groups(root):
        name, taken = _LIMITS[kind]
        try:
            limit = int((group / name).read_text())
        except (OSError, ValueError):  # the root of version 2 has none, others have perhaps "max"
            continue
        if limit < UNLIMITED:
            used = _numbers(group / "memory.stat")
            found.append(max(0, limit - sum(used.get(what, 0) for what in taken)))
    return min(found, default=None)


def _groups(root: Path) -> Iterator[tuple[Path, str]]:
    """The control group of this process and all above it, as far up as they are mounted, with the file system that they are of."""
    own: dict[str, PurePosixPath] = {}
    for number, controllers, path in _GROUP.findall(_text(root / "proc/self/cgroup")):
        if number == "0":
            own["cgroup2"] = PurePosixPath(path)
        elif "memory" in controllers.split(","):
            own["cgroup"] = PurePosixPath(path)
    for top, point, kind, options in _MOUNT.findall(_text(root / "proc/self/mountinfo")):
        # of version 1 every controller has a tree of its own; and what is mounted may be a part of the tree that we are not in
        if kind in own and (kind == "cgroup2" or "memory" in options.split(",")) and own[kind].is_relative_to(_unescaped(top)):
            inner, mount = own[kind].relative_to(_unescaped(top)), root / _unescaped(point).lstrip("/")
            yield from ((mount / path, kind) for path in (inner, *inner.parents))


def _unescaped(path: str) -> str:
    """As it is called, of how mountinfo writes it: systemd's names have backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), path)


def _numbers(path: Path) -> dict[str, int]:
    """The number behind every name in a file of the kernel."""
    return {name: int(number) for name, number in _NUMBER.findall(_text(path))}


def _text(path: Path) -> str:
    """Nothing where it cannot be read. Names of mounts need not be UTF-8."""
    try:
        return os.fsdecode(path.read_bytes())
    except OSError:
        return ""


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


def disk_bytes(parameters: int) -> int:
    """Of a checkpoint, with headers, the manifest and what file systems round up."""
    tensors = SAVED * parameters
    return tensors + min(64 << 20, (1 << 20) + tensors // 50)


def lacks_disk(plan: Plan, steps: int, there: int, free: int) -> str | None:
    """What a disk with so many `free` bytes lacks for the checkpoints of so many `steps` to come, of a run that has so many of them
    `there`; None where it takes them all."""
    checkpoint, size = plan.recipe.checkpoint, SAVED * plan.parameters
    if checkpoint.every is None:
        return None
    saves = math.ceil(steps / checkpoint.every)
    # an old one gives way once the new one is there
    coming = min(saves, max(1, checkpoint.keep + 1 - there))
    if free >= coming * disk_bytes(plan.parameters):
        return None
    return (
        f"checkpoints to come take up to {_gib(coming * size)} more ({_gib(size)} each), and {_gib(free)} are free on the disk; "
        "free some, set output to another one or checkpoint.keep lower"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:,.3g} GiB"
