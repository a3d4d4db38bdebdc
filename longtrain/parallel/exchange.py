"""Moving tensors between the ranks of a ring, without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

Parcel = tuple[int, Tensor]
"""(peer rank inside the ring, contiguous tensor)."""


class Transfer(Protocol):
    """Sends and receives under way. Received tensors may be read, and sent ones written, only after `wait`."""

    def wait(self) -> None: ...


class Exchange(Protocol):
    """Point-to-point transfers of one ring. All ranks call `start` in the same order; peers' parcels match in that order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def start(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Transfer: ...


class ProcessGroupExchange:
    """Over torch.distributed: gloo or NCCL, whichever the group has for the tensors' device."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """group: the ranks of this ring; None is a ring of one."""
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def start(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Transfer:
        operations = [dist.P2POp(dist.isend, tensor, group=self._group, group_peer=peer) for peer, tensor in sends]
        operations += [dist.P2POp(dist.irecv, tensor, group=self._group, group_peer=peer) for peer, tensor in receives]
        works = dist.batch_isend_irecv(operations) if operations else []
        return _Works(works, [*sends, *receives])


@dataclass(frozen=True)
class Subgroup:
    """Some ranks of an exchange as an exchange of their own, numbered in the order of `members`; the own rank is one of them."""

    whole: Exchange
    members: tuple[int, ...]

    @property
    def rank(self) -> int:
        return self.members.index(self.whole.rank)

    @property
    def size(self) -> int:
        return len(self.members)

    def start(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Transfer:
        return self.whole.start(self._outside(sends), self._outside(receives))

    def _outside(self, parcels: Sequence[Parcel]) -> list[Parcel]:
        return [(self.members[peer], tensor) for peer, tensor in parcels]


class _Works:
    def __init__(self, works: list[dist.Work], parcels: list[Parcel]) -> None:
        self._works, self._parcels = works, parcels  # parcels: buffers must live until the transfer is over

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._parcels.clear()
