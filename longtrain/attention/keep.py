"""What one recomputed block keeps from its first run."""

from __future__ import annotations

from torch import Tensor


class Keep:
    """Slots of tensors that the first run of a checkpointed block stores and its recomputation recalls instead of computing.

    It is passed down explicitly, so there is no hidden state; it dies with the graph that holds the recomputation.
    """

    def __init__(self) -> None:
        self._slots: dict[str, tuple[Tensor, ...]] = {}

    def recall(self, name: str) -> tuple[Tensor, ...] | None:
        """Fresh aliases of what `store` was given, or None in the first run."""
        kept = self._slots.get(name)
        return None if kept is None else tuple(t.detach() for t in kept)

    def store(self, name: str, *tensors: Tensor) -> None:
        """Keeps aliases without graph: a kept tensor must not hold the node that holds the Keep."""
        self._slots[name] = tuple(t.detach() for t in tensors)
