from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longtrain.errors import LaunchError
from longtrain.parallel.context import Grid, ParallelContext
from longtrain.parallel.launch import Launch, check_agreement, resolve_device, start, stop
from longtrain.parallel.loss import loss_scale
from tests.distributed import RankError, run_ranks
from tests.user import process

pytest_plugins = ("tests.desks",)

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def test_grid_places_context_ranks_inside_data_ranks() -> None:
    grid = Grid(dp=2, cp=3)
    assert [grid.place(rank) for rank in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert grid.cp_ranks(1) == [3, 4, 5]
    for rank in range(grid.world):
        dp_rank, cp_rank = grid.place(rank)
        assert grid.cp_ranks(dp_rank)[cp_rank] == rank
    with pytest.raises(ValueError, match="outside"):
        grid.place(6)
    with pytest.raises(ValueError, match="at least 1"):
        Grid(0, 1)


def test_launch_reads_torchrun() -> None:
    assert Launch.read({}) == Launch()
    assert Launch.read({"LOCAL_RANK": "0"}) == Launch()
    launch = Launch.read(TORCHRUN)
    assert (launch.rank, launch.world, launch.local_rank, launch.local_world) == (3, 4, 1, 2)
    assert launch.torchrun
    assert not launch.default_threads
    assert Launch.read(TORCHRUN | {"OMP_NUM_THREADS": "1"}).default_threads
    assert not Launch.read(TORCHRUN | {"OMP_NUM_THREADS": "6"}).default_threads


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "has RANK but not WORLD_SIZE and LOCAL_RANK"),
        (TORCHRUN | {"RANK": "first"}, "RANK='first' is not a whole number"),
    ],
)
def test_launch_refuses_half_an_environment(environment: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        Launch.read(environment)


def test_start_refuses_a_world_that_is_not_the_grid() -> None:
    wanted = r"started with 3 processes, but dp 2 x cp 2 needs 4: run torchrun --nproc-per-node 4, or set parallel\.dp"
    with pytest.raises(LaunchError, match=wanted):
        start(Launch(world=3), dp=2, cp=2, device="cpu")
    with pytest.raises(LaunchError, match=r"started with 1 process, but"):
        start(Launch(), dp=1, cp=2, device="cpu")
    assert not dist.is_initialized()


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto", Launch()) == torch.device("cpu")
    with pytest.raises(LaunchError, match="sees no CUDA GPU"):
        resolve_device("cuda", Launch())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto", Launch(rank=5, world=8, local_rank=1, local_world=2)) == torch.device("cuda", 1)
    with pytest.raises(LaunchError, match=r"4 processes on this machine, but only 2 GPU.*--nproc-per-node 2"):
        resolve_device("cuda", Launch(rank=0, world=4, local_rank=0, local_world=4))
    with pytest.raises(LaunchError, match="'tpu' is not known"):
        resolve_device("tpu", Launch())


def test_one_process_needs_no_port_and_can_start_again() -> None:
    for _ in range(2):
        ctx = start(Launch(), device="cpu")
        try:
            assert (ctx.world, ctx.is_main, ctx.cp_group) == (1, True, None)
            assert ctx.all_reduce_sum([3, 4]) == [3, 4]
            assert ctx.all_gather_text("grüße") == ["grüße"]
        finally:
            stop()
    stop()


def test_importing_the_package_imports_no_deepspeed() -> None:
    modules = "longtrain.parallel.launch, longtrain.parallel.deepspeed, longtrain.train.checkpoint"
    check = f"import sys, {modules}; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_loss_scale_is_the_token_mean_and_zero_without_tokens() -> None:
    assert loss_scale(world=4, accumulation=2, tokens=16) == 0.5
    assert loss_scale(world=4, accumulation=2, tokens=0) == 0.0


def _collectives(ctx: ParallelContext) -> dict[str, object]:
    # 0.1 + 1e16 - 1e16 is 0 or 0.1 by order of summation; fsum rounds the true sum once.
    awkward = [0.1, 1e16, -1e16, 0.2][ctx.rank]
    return {
        "place": (ctx.dp_rank, ctx.cp_rank),
        "cp": dist.get_process_group_ranks(ctx.cp_group),
        "sums": ctx.all_reduce_sum([ctx.rank, 2**53 + 1]),
        "awkward": ctx.all_reduce_sum([awkward]),
        "texts": ctx.all_gather_text("é" * ctx.rank),
        "tokens": int(ctx.all_reduce_sum([0 if ctx.rank == 1 else 5])[0]),
    }


def test_four_ranks() -> None:
    results = run_ranks(_collectives, 4, dp=2, cp=2)
    assert [result["place"] for result in results] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [result["cp"] for result in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    for result in results:
        assert result["sums"] == [6, 4 * (2**53 + 1)]
        assert result["awkward"] == [0.1 + 0.2]
        assert result["texts"] == ["", "é", "éé", "ééé"]
        assert result["tokens"] == 15


def _disagrees(ctx: ParallelContext) -> str:
    check_agreement(ctx, {"seed": "0", "--until": "None"})
    try:
        check_agreement(ctx, {"seed": "5" if ctx.rank == 1 else "0", "--until": "None"})
    except LaunchError as error:
        return str(error)
    return ""


def test_a_rank_that_was_started_otherwise_is_named_on_every_rank() -> None:
    for message in run_ranks(_disagrees, 2):
        assert message.startswith("rank 1 was started with another seed than rank 0: 5 instead of 0; start all ranks with the same")


def _one_fails(ctx: ParallelContext) -> None:
    if ctx.rank == 1:
        raise ZeroDivisionError("this one")
    ctx.all_gather_text("")


def _hangs(ctx: ParallelContext) -> None:
    time.sleep(3600)


def test_run_ranks_surfaces_the_failing_rank() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2 failed:[\s\S]*_one_fails[\s\S]*ZeroDivisionError: this one"):
        run_ranks(_one_fails, 2)


def test_run_ranks_ends_a_hang() -> None:
    with pytest.raises(RankError, match=r"ranks \[0\] of 1 did not finish within 4 s"):
        run_ranks(_hangs, 1, timeout=4)


THREADS = """
import time
from pathlib import Path
from longtrain.cli import train_main
from longtrain.parallel import launch

def gloo():
    time.sleep(0.2)  # what has just ended is still listed
    return sum((task / "comm").read_text().startswith(("gloo", "pt_gloo")) for task in Path("/proc/self/task").iterdir())

inner, before = launch.stop, []
launch.stop = lambda failed=False: (before.append(gloo()), inner(failed))
try:
    train_main()
except SystemExit:
    print(f"gloo threads: {min(before[0], 1)} before, {gloo()} after\\n", end="", flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts the threads of a process in /proc")
@pytest.mark.faults
@pytest.mark.usefixtures("fresh")
def test_no_thread_of_a_process_group_outlives_a_run() -> None:
    """One that lets go of a collective's tensors while the interpreter ends makes the process abort. ZeRO-3 keeps most."""
    Path("threads.py").write_text(THREADS)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "threads.py")
    words = ("--recipe", "recipe.yaml", "--set", "zero.stage=3", "--set", "parallel.cp=2", "--until", "2")
    done = process(*torchrun, *words)
    assert done.stdout.count("gloo threads: 1 before, 0 after") == 2, done.stdout + done.stderr
