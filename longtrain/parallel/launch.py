"""Starting and stopping: the only reader and writer of environment variables."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from longtrain.cores import usable_cores
from longtrain.errors import LaunchError
from longtrain.parallel import deepspeed
from longtrain.parallel.context import Grid, ParallelContext, create_context
from longtrain.parallel.meeting import meet


@dataclass(frozen=True)
class Launch:
    """How this process was started. `default_threads`: torchrun, not the user, chose one OpenMP thread per rank. `parent`: the
    number of the torchrun process, where that is what started it."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    torchrun: bool = False
    default_threads: bool = False
    parent: int | None = None

    def orphaned(self) -> bool:
        """Whether torchrun has ended without ending this process, as a kill -9 makes it."""
        return self.parent is not None and os.getppid() != self.parent

    @staticmethod
    def read(environment: Mapping[str, str] | None = None) -> Launch:
        """From torchrun's variables, or one process of its own where there are none.

        Raises LaunchError where only some of them are set or one is not a number.
        """
        env = os.environ if environment is None else environment
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        present = [name for name in names if name in env]
        # LOCAL_RANK alone is what `start` itself leaves behind for DeepSpeed.
        if "RANK" not in present and "WORLD_SIZE" not in present:
            return Launch()
        missing = [name for name in names if name not in present]
        if missing:
            raise LaunchError(
                f"the environment has {' and '.join(present)} but not {' and '.join(missing)}: "
                "start with torchrun, or unset them all to run in one process"
            )

        def number(name: str, default: str = "") -> int:
            try:
                return int(env.get(name, default))
            except ValueError:
                raise LaunchError(f"the environment variable {name}={env.get(name)!r} is not a whole number") from None

        local_world = number("LOCAL_WORLD_SIZE", env["WORLD_SIZE"])
        return Launch(
            rank=number("RANK"),
            world=number("WORLD_SIZE"),
            local_rank=number("LOCAL_RANK"),
            local_world=local_world,
            torchrun=True,
            # torchrun exports 1 where the user exported nothing; any other value is the user's.
            default_threads=local_world > 1 and env.get("OMP_NUM_THREADS") == "1",
            parent=os.getppid() if "TORCHELASTIC_RUN_ID" in env else None,
        )


def variables(names: Collection[str]) -> dict[str, str]:
    """Those of these environment variables that are set."""
    return {name: os.environ[name] for name in names if name in os.environ}


def resolve_device(wanted: str, launch: Launch) -> torch.device:
    """The device of this rank for auto | cpu | cuda. Raises LaunchError where there are too few GPUs."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    if wanted != "cuda":
        raise LaunchError(f"device {wanted!r} is not known: use auto, cpu or cuda")
    if not torch.cuda.is_available():
        raise LaunchError("device cuda is wanted, but torch sees no CUDA GPU here: set device to cpu, or check the driver")
    found = torch.cuda.device_count()
    if found < launch.local_world or found <= launch.local_rank:
        needed = max(launch.local_world, launch.local_rank + 1)
        raise LaunchError(f"{needed} processes on this machine, but only {found} GPU(s): run torchrun --nproc-per-node {found}")
    return torch.device("cuda", launch.local_rank)


def check_rings(launch: Launch, cp: int) -> list[str]:
    """What to say of rings of `cp` ranks that reach over several hosts.

    Raises LaunchError where they do so without need: the ranks of one host would hold whole rings, were they another number. A cp
    beyond the ranks of one host asks for such rings.
    """
    local = launch.local_world
    if cp == 1 or launch.world == local or local % cp == 0:
        return []
    if cp < local:
        raise LaunchError(
            f"parallel.cp {cp} does not divide the {local} ranks of each host, so that some rings would reach over two hosts, "
            f"whose network is far slower than what joins GPUs: run torchrun --nproc-per-node {local // cp * cp}, or set "
            f"parallel.cp to a divisor of {local}"
        )
    return [f"warning: each ring of {cp} ranks reaches over hosts of {local}: its keys and values travel over the network"]


def start(
    launch: Launch,
    *,
    dp: int = 1,
    cp: int = 1,
    device: str = "auto",
    timeout: timedelta = timedelta(minutes=60),
    rendezvous: str | None = None,
) -> ParallelContext:
    """Join the other processes and return this rank's context; DeepSpeed is told to use the same group.

    launch: normally `Launch.read()`. device: auto | cpu | cuda. timeout: of every collective; long, because one rank may be
    writing a checkpoint or compiling while the others wait. rendezvous: torch's init_method, for processes that were not
    started by torchrun; one process alone needs none and opens no port.
    Raises LaunchError where the processes do not fill dp x cp, the device is missing, or some do not come.
    """
    grid = Grid(dp, cp)
    if launch.world != grid.world:
        started = f"{launch.world} process" + ("" if launch.world == 1 else "es")
        raise LaunchError(
            f"started with {started}, but dp {dp} x cp {cp} needs {grid.world}: "
            f"run torchrun --nproc-per-node {grid.world}, or set parallel.dp"
        )
    place = resolve_device(device, launch)
    # DeepSpeed reads both: the first to find its device, the second because it would pick CUDA wherever there is one.
    os.environ["LOCAL_RANK"] = str(launch.local_rank)
    if place.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if launch.default_threads:
            torch.set_num_threads(max(1, usable_cores() // launch.local_world))
    else:
        torch.cuda.set_device(place)
    if launch.torchrun:
        deepspeed.load()
    store = _store(launch, timeout) if rendezvous is None else None
    dist.init_process_group(
        # Host tensors travel by gloo also on GPU machines: token counts and checkpoints need no device.
        "gloo" if place.type == "cpu" else "cpu:gloo,cuda:nccl",
        init_method=rendezvous if store is None else None,
        store=store,
        rank=launch.rank,
        world_size=launch.world,
        timeout=timeout,
    )
    return create_context(grid, rank=launch.rank, local_rank=launch.local_rank, device=place, timeout=timeout)


def _store(launch: Launch, timeout: timedelta) -> Any:
    """Where the ranks find each other; None leaves it to torch."""
    if launch.world == 1:
        return dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    if not launch.torchrun:
        return None
    store = next(iter(dist.rendezvous("env://", launch.rank, launch.world, timeout=timeout)))[0]  # pyright: ignore
    meeting = meet(store, launch.rank, launch.world)
    return dist.PrefixStore(meeting, store)  # pyright: ignore[reportPrivateImportUsage]


def check_agreement(ctx: ParallelContext, facts: Mapping[str, str]) -> None:
    """Raises LaunchError on every rank where some rank was started with other `facts` than rank 0, naming it and the first one."""
    rows = [json.loads(text) for text in ctx.all_gather_text(json.dumps(dict(facts)))]
    for rank, row in enumerate(rows):
        for name in sorted(row.keys() | rows[0].keys()):
            found, expected = row.get(name), rows[0].get(name)
            if found != expected:
                raise LaunchError(
                    f"rank {rank} was started with another {name} than rank 0: {found} instead of {expected}; "
                    "start all ranks with the same command, on the same files"
                )


def stop(failed: bool = False) -> None:
    """Leave the process group. Does nothing where `start` has not run, so that it can stand in a finally.

    failed: this rank is on its way out with an error while others may still wait for it; NCCL would make it wait for them in turn,
    so the group is left to the end of the process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if failed and dist.get_world_size() > 1 and "nccl" in dist.get_backend():
        return
    deepspeed.detach()
    dist.destroy_process_group()
    if not failed:
        # Groups are held by engines, which are cycles. One that outlives this has threads that let go of the last collective's
        # tensors when they get to it, and the process aborts where the interpreter is on its way out by then.
        gc.collect()
