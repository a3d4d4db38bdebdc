"""Rings and hosts: which numbers of ranks keep rings inside a host, and what is said of those that do not."""

from __future__ import annotations

import pytest

from longtrain.errors import LaunchError
from longtrain.parallel.launch import Launch, check_rings


def launched(local: int, hosts: int) -> Launch:
    return Launch(rank=0, world=local * hosts, local_rank=0, local_world=local, torchrun=True)


@pytest.mark.parametrize(("cp", "local", "hosts"), [(1, 3, 2), (2, 8, 2), (8, 8, 4), (4, 6, 1), (3, 4, 1)])
def test_rings_inside_a_host(cp: int, local: int, hosts: int) -> None:
    assert check_rings(launched(local, hosts), cp) == []


def test_rings_that_reach_over_hosts_without_need() -> None:
    with pytest.raises(LaunchError, match=r"parallel\.cp 4 does not divide the 6 ranks of each host.* --nproc-per-node 4, or set"):
        check_rings(launched(6, 2), 4)


@pytest.mark.parametrize(("cp", "local", "hosts"), [(16, 8, 2), (2, 1, 2), (12, 8, 3)])
def test_rings_that_the_recipe_asks_for(cp: int, local: int, hosts: int) -> None:
    (remark,) = check_rings(launched(local, hosts), cp)
    assert remark.startswith(f"warning: each ring of {cp} ranks reaches over hosts of {local}")
