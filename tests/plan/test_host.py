"""What the plan says of checkpoints, and the memory that it goes by."""

from __future__ import annotations

from pathlib import Path

import pytest

from longtrain.plan import make_plan
from longtrain.plan.describe import describe
from longtrain.plan.host import available_memory, copy_bytes, fits
from longtrain.recipe.load import load_recipe

GIB = 2**30


def test_available_memory_is_the_machines_or_the_containers(tmp_path: Path) -> None:
    assert available_memory(tmp_path / "none", tmp_path) is None
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:   50 kB\n")
    assert available_memory(tmp_path / "meminfo", tmp_path) == 50 * 1024
    (tmp_path / "memory.max").write_text("30000\n")
    (tmp_path / "memory.stat").write_text("anon 10000\nfile 9000\n")
    assert available_memory(tmp_path / "meminfo", tmp_path) == 20000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path / "meminfo", tmp_path) == 50 * 1024


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
