"""How the processes of one attempt find each other in a store that may remember earlier attempts.

torchrun keeps one store over restarts, and in it the addresses of processes that are gone. It numbers attempts for each host on its
own, so that hosts that were started again for different reasons count differently: no variable names the attempt. So rank 0 makes
up a name, and the others answer under it, until a roster with their own name in it says that these processes have met.
"""

from __future__ import annotations

import json
import time
import uuid
from datetime import timedelta
from typing import Any

from longtrain.errors import LaunchError

PATIENCE = timedelta(minutes=10)
"""How long processes wait for each other: some read their libraries from a slow disk."""
LOOK = timedelta(seconds=1)
"""How often a process looks whether rank 0 is another one by now."""
LEADER = "leader"


def meet(store: Any, rank: int, world: int, patience: timedelta = PATIENCE) -> str:
    """A name that the `world` processes which call this now, one a rank, have in common, and no others that use this store.

    Raises LaunchError where some do not come in time, or the store is gone.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + patience.total_seconds()
    try:
        if rank == 0:
            return _lead(store, own, world, patience)
        while (left := deadline - time.monotonic()) > 0:
            if not _there(store, [LEADER], timedelta(seconds=left)):
                break
            leader = store.get(LEADER).decode()
            store.set(f"{leader}/{rank}", own)
            if not _there(store, [f"{leader}/roster"], LOOK):
                continue
            if own in json.loads(store.get(f"{leader}/roster")):
                return leader
            time.sleep(0.25)  # the leader of an earlier attempt: this one's is not here yet
    except RuntimeError as error:
        raise LaunchError(f"rank {rank}: the store through which the ranks meet is gone: {error}") from error
    raise LaunchError(f"rank {rank}: rank 0 did not come within {patience.total_seconds():.0f} s; see what its host says")


def _lead(store: Any, own: str, world: int, patience: timedelta) -> str:
    answers = {rank: f"{own}/{rank}" for rank in range(1, world)}
    store.set(LEADER, own)
    if not _there(store, list(answers.values()), patience):
        missing = [str(rank) for rank, key in answers.items() if not store.check([key])]
        raise LaunchError(
            f"ranks {', '.join(missing)} did not come within {patience.total_seconds():.0f} s; see what their hosts say"
        )
    store.set(f"{own}/roster", json.dumps([store.get(key).decode() for key in answers.values()]))
    return own


def _there(store: Any, keys: list[str], patience: timedelta) -> bool:
    """Whether the store has these keys, after `patience` at most."""
    try:
        store.wait(keys, patience)
    except RuntimeError:
        return store.check(keys)  # raises where the store is gone
    return True
