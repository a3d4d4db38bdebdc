"""Tensors as bytes of a file: copied to host memory, all at once or in bounded pieces, and written from there."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtrain.files import sync_file
from longtrain.train.checkpoint_format import FileEntry

PIECE = 1 << 26
"""Elements of one host buffer: 256 MiB, a power of two because pinned memory is handed out in those."""
SHARE = 0.8
"""Of the host memory that is available, what a snapshot may take."""

Named = Sequence[tuple[str, Tensor]]


class HostMemory:
    """Host buffers for what this rank writes, kept from save to save: pinning is slow. Pinned where `device` is a GPU."""

    def __init__(self, device: torch.device, piece: int = PIECE) -> None:
        self._device, self._piece = device, piece
        self._buffers: list[Tensor] = []

    def missing(self, elements: int) -> int:
        """Bytes that `take` would still have to allocate for so many fp32 elements."""
        return max(0, 4 * (elements - sum(buffer.numel() for buffer in self._buffers)))

    def take(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """A copy of `tensors`, one after another as flat fp32, in pieces [n]; valid until the next call."""
        tensors = list(tensors)
        while missing := self.missing(sum(tensor.numel() for tensor in tensors)):
            self._buffers.append(self._allocate(missing // 4))
        pieces = list(_fill(tensors, iter(self._buffers)))
        self._wait()
        return pieces

    def stream(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same through one buffer, which is filled again when the next piece is asked for."""
        buffer = self._buffers[0] if self._buffers else self._allocate(self._piece)
        for piece in _fill(tensors, itertools.repeat(buffer)):
            self._wait()
            yield piece

    def _allocate(self, elements: int) -> Tensor:
        pinned = self._device.type == "cuda"
        return torch.empty(min(self._piece, elements), dtype=torch.float32, pin_memory=pinned)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def _fill(tensors: Iterable[Tensor], buffers: Iterator[Tensor]) -> Iterator[Tensor]:
    """Copies `tensors` into `buffers`; yields every buffer that is full, and what is filled of the last."""
    buffer, filled = None, 0
    for tensor in tensors:
        flat, done = tensor.detach().reshape(-1), 0
        while done < flat.numel():
            if buffer is None:
                buffer, filled = next(buffers), 0
            count = min(buffer.numel() - filled, flat.numel() - done)
            buffer[filled : filled + count].copy_(flat[done : done + count], non_blocking=True)
            filled, done = filled + count, done + count
            if filled == buffer.numel():
                yield buffer
                buffer = None
    if buffer is not None:
        yield buffer[:filled]


def header_of(tensors: Named) -> bytes:
    """The head of a safetensors file of fp32 tensors, which follow it in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, header: bytes, pieces: Iterable[Tensor]) -> FileEntry:
    """A safetensors file, on disk; the library's writer would hold a second copy of all moments on the host."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for data in itertools.chain([header], (piece.numpy().astype("<f4", copy=False).data for piece in pieces)):
            digest.update(data)
            file.write(data)
        sync_file(file)
        return FileEntry(size=file.tell(), sha256=digest.hexdigest())


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
