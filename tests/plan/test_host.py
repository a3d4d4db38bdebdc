"""What the plan says of checkpoints, and the memory that it goes by."""

from __future__ import annotations

from pathlib import Path

import pytest

from longtrain.plan import make_plan
from longtrain.plan.describe import describe
from longtrain.plan.host import available_memory, copy_bytes, disk_bytes, fits, lacks_disk
from longtrain.recipe.load import load_recipe

GIB = 2**30


MACHINE = {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable:   50 kB\nActive(anon): 1 kB\nHugePages_Total:       0\n"}
"""51,200 bytes are left."""
UNIFIED = "29 23 0:25 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
MEMORY = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"


def group(folder: str, limit: int | str, anon: int = 0, shmem: int = 0) -> dict[str, str]:
    """A control group of version 2; its page cache counts as used, but gives way."""
    stat = f"anon {anon}\nfile 70000\nshmem {shmem}\n"
    return {f"sys/fs/cgroup/{folder}/memory.max": f"{limit}\n", f"sys/fs/cgroup/{folder}/memory.stat": stat}


def old_group(folder: str, limit: int, rss: int = 0, shmem: int = 0) -> dict[str, str]:
    """One of version 1, where the first numbers of memory.stat leave out the groups below it."""
    stat = f"cache 1\nrss 1\nshmem 1\ntotal_cache 70000\ntotal_rss {rss}\ntotal_shmem {shmem}\n"
    folder = f"sys/fs/cgroup/memory/{folder}"
    return {f"{folder}/memory.limit_in_bytes": f"{limit}\n", f"{folder}/memory.stat": stat}


def process(groups: str, mounts: str) -> dict[str, str]:
    return {"proc/self/cgroup": groups, "proc/self/mountinfo": "22 1 8:1 / / rw - ext4 /dev/a\\040b rw\n" + mounts}


def available(root: Path, files: dict[str, str]) -> int | None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return available_memory(root)


NONE = 9223372036854771712
LIMITS = {
    "nothing is known": ({}, None),
    "the machine": (MACHINE, 51200),
    "the machine has less": (MACHINE | process("0::/\n", UNIFIED) | group(".", 90000), 51200),
    "a container": (process("0::/\n", UNIFIED) | group(".", 30000, 9000, 1000), 20000),
    "a full container": (process("0::/\n", UNIFIED) | group(".", 30000, 30000, 1000), 0),
    "a container without a limit": (MACHINE | process("0::/\n", UNIFIED) | group(".", "max"), 51200),
    "only that": (process("0::/\n", UNIFIED) | group(".", "max"), None),
    "a job": (process("0::/slurm/job_7/step_0\n", UNIFIED) | group("slurm/job_7/step_0", 30000, 9000), 21000),
    "another job": (MACHINE | process("0::/slurm/job_7\n", UNIFIED) | group("slurm/job_8", 30000), 51200),
    "the limit of the job above": (
        process("0::/slurm/job_7/step_0\n", UNIFIED)
        | group("slurm/job_7/step_0", "max", 9000)
        | group("slurm/job_7", 30000, 20000, 4000)
        | group("slurm", 30000, 20000),
        6000,
    ),
    "the limit below": (process("0::/a/b\n", UNIFIED) | group("a/b", 30000, 9000) | group("a", 90000, 20000), 21000),
    "a container that sees the groups of the host, and has its own mounted": (
        process("0::/docker/7f\n", UNIFIED.replace(" / ", " /docker/7f ", 1)) | group(".", 30000, 9000),
        21000,
    ),
    "a mount of another container": (
        MACHINE | process("0::/user\n", UNIFIED.replace(" / ", " /docker/7f ", 1)) | group(".", 30000, 9000),
        51200,
    ),
    "a name that mountinfo escapes": (
        process("0::/a\\x2db.slice/c\n", UNIFIED.replace(" / ", " /a\\134x2db.slice ", 1)) | group("c", 30000, 9000),
        21000,
    ),
    "statistics that nobody may read": (
        process("0::/\n", UNIFIED) | {"sys/fs/cgroup/memory.max": "30000\n"},
        30000,
    ),
    "version 1": (process("5:cpu:/x\n4:memory:/job\n", MEMORY) | old_group("job", 30000, 9000, 1000), 20000),
    "version 1, nested": (
        process("4:memory:/slurm/job\n", MEMORY)
        | old_group("slurm/job", NONE, 9000)
        | old_group("slurm", 40000, 12000, 500)
        | old_group(".", NONE, 90000),
        27500,
    ),
    "version 1 without a limit": (MACHINE | process("4:memory:/\n", MEMORY) | old_group(".", NONE), 51200),
    "version 1 in a container, with others in its tree": (
        process("4:cpu,memory:/docker/7f\n", MEMORY.replace(" / ", " /docker/7f ", 1).replace("rw,memory", "rw,cpu,memory"))
        | old_group(".", 30000, 9000),
        21000,
    ),
    "version 1 of something else": (
        MACHINE | process("4:cpu:/job\n", MEMORY.replace("rw,memory", "rw,cpu")) | old_group("job", 30000),
        51200,
    ),
    "both versions": (
        process("4:memory:/job\n1:name=systemd:/unit\n0::/unit\n", MEMORY + UNIFIED.replace("cgroup ", "cgroup/unified "))
        | old_group("job", 30000, 9000)
        | {"sys/fs/cgroup/unified/unit/cgroup.procs": "1\n"},
        21000,
    ),
}


@pytest.mark.parametrize(("files", "wanted"), LIMITS.values(), ids=LIMITS)
def test_available_memory_is_the_least_that_machine_and_control_groups_leave(
    tmp_path: Path, files: dict[str, str], wanted: int | None
) -> None:
    assert available(tmp_path, files) == wanted


def test_available_memory_of_this_machine() -> None:
    found = available_memory()
    assert found is None or found > 2**20


def test_a_copy_leaves_a_fifth_of_the_memory() -> None:
    assert fits(80, 100)
    assert not fits(81, 100)
    assert fits(81, None)
    assert fits(0, 0)


def said(world: int, host: int | None, memory: int, *overrides: str) -> str:
    plan = make_plan(load_recipe("llama-7b-32k", ("parallel.cp=1", "training.batch_size=16", *overrides)), world, "cuda", host)
    assert copy_bytes(plan) == 12 * plan.parameters * (host or world) // world
    return dict(describe(plan, memory))["checkpoint"]


def test_the_plan_says_how_checkpoints_are_written() -> None:
    keep = ("checkpoint.keep=2", "checkpoint.every=100")
    assert said(1, None, 128 * GIB, *keep) == (
        "75.3 GiB every 100 steps, up to 226 GiB of disk with keep 2; written behind the training after a copy of 75.3 GiB in the "
        "memory of each machine"
    )
    assert said(1, None, 64 * GIB, *keep).endswith(
        "; training stands still while it is written, file by file: a copy of 75.3 GiB in the memory of each machine is more than "
        "80% of the 64 GiB that this one will have left"
    )
    assert "after a copy of 37.7 GiB in the memory of each machine" in said(16, 8, 64 * GIB)
    assert said(1, None, 64 * GIB, "checkpoint.every=null") == "none"


@pytest.mark.parametrize(("memory", "behind"), [(128, False), (256, True)])
def test_what_is_offloaded_is_there_first(memory: int, behind: bool) -> None:
    assert ("written behind" in said(1, None, memory * GIB, "zero.offload=cpu")) == behind


@pytest.mark.parametrize(
    ("free", "steps", "there", "wanted"),
    [
        (300, 10000, 0, None),
        (200, 10000, 0, "up to 226 GiB more (75.3 GiB each), and 200 GiB are free"),
        (100, 100, 0, None),  # one more is written
        (100, 9500, 2, None),  # one is deleted after each
        (70, 9500, 3, "up to 75.3 GiB more (75.3 GiB each), and 70 GiB are free"),
        (1, 0, 2, None),
    ],
)
def test_a_disk_that_is_too_small_is_told_before_it_is_full(free: int, steps: int, there: int, wanted: str | None) -> None:
    overrides = ("parallel.cp=1", "training.batch_size=16", "checkpoint.keep=2", "checkpoint.every=100")
    found = lacks_disk(make_plan(load_recipe("llama-7b-32k", overrides), 1, "cuda"), steps, there, free * GIB)
    assert found is None if wanted is None else found is not None and wanted in found


def test_what_stands_beside_the_tensors_is_little() -> None:
    assert disk_bytes(30_000) < 2 << 20, "a small model fits a small disk"
    assert disk_bytes(7 * 10**9) == 12 * 7 * 10**9 + (64 << 20)


def test_without_checkpoints_no_disk_is_needed() -> None:
    overrides = ("parallel.cp=1", "training.batch_size=16", "checkpoint.every=null")
    assert lacks_disk(make_plan(load_recipe("llama-7b-32k", overrides), 1, "cuda"), 10000, 0, 0) is None
