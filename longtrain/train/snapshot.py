"""Tensors as bytes of files of bounded size: dealt to them, copied to host memory, and written from there."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtrain.files import sync_file
from longtrain.train.checkpoint_format import FileEntry

PART = 1 << 26
"""fp32 elements of one file, and of the host buffer that it is written from: 256 MiB, so that the files of a large rank keep many
threads busy; a power of two, because pinned memory is handed out in those."""

Named = Sequence[tuple[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Part:
    """One file of a rank: what it is called, and the flat tensors in it by name, in order."""

    file: str
    tensors: Named

    @property
    def elements(self) -> int:
        return sum(tensor.numel() for _, tensor in self.tensors)


def parts_of(rank: int, ranges: Iterable[tuple[str, int, Tensor]], elements: int = PART) -> list[Part]:
    """The files of a rank, of at most `elements` each, and at least one. A range that is too long goes on in the next file.

    ranges: KIND/PARAMETER, where in the parameter the range begins, and its elements [n].
    """
    files: list[list[tuple[str, Tensor]]] = [[]]
    room = elements
    for key, start, tensor in ranges:
        done = 0
        while done < tensor.numel():
            if room == 0:
                files.append([])
                room = elements
            count = min(room, tensor.numel() - done)
            files[-1].append((f"{key}@{start + done}", tensor[done : done + count]))
            done, room = done + count, room - count
    numbers = [""] if len(files) == 1 else [f"-{number:05d}" for number in range(len(files))]
    return [Part(f"rank-{rank:05d}{number}.safetensors", tensors) for number, tensors in zip(numbers, files, strict=True)]


class HostMemory:
    """Host buffers for what this rank writes, kept from save to save: pinning is slow. Pinned where `device` is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[Tensor] = []

    def missing(self, parts: Sequence[Part]) -> int:
        """Bytes that `take` would still have to allocate."""
        there = itertools.chain((buffer.numel() for buffer in self._buffers), itertools.repeat(0))
        return 4 * sum(part.elements for part, size in zip(parts, there, strict=False) if size < part.elements)

    def take(self, parts: Sequence[Part]) -> list[Tensor]:
        """A copy of every part, as flat fp32 [n]; valid until this memory is used again."""
        self._buffers += [torch.empty(0)] * (len(parts) - len(self._buffers))
        copies = []
        for number, part in enumerate(parts):
            self._buffers[number] = self._fitting(self._buffers[number], part)
            copies.append(_fill(self._buffers[number], part))
        self._wait()
        return copies

    @contextmanager
    def lend(self, part: Part) -> Iterator[Tensor]:
        """The same of one part, in a buffer that serves others afterwards. As many are allocated as threads borrow at a time."""
        try:  # not asked first: another thread may take the last one in between
            buffer = self._buffers.pop()
        except IndexError:
            buffer = torch.empty(0)
        buffer = self._fitting(buffer, part)
        try:
            copy = _fill(buffer, part)
            self._wait()
            yield copy
        finally:
            self._buffers.append(buffer)

    def _fitting(self, buffer: Tensor, part: Part) -> Tensor:
        if buffer.numel() >= part.elements:
            return buffer
        return torch.empty(part.elements, dtype=torch.float32, pin_memory=self._device.type == "cuda")

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def _fill(buffer: Tensor, part: Part) -> Tensor:
    """Copies a part into `buffer`; what is filled of it."""
    filled = 0
    for _, tensor in part.tensors:
        buffer[filled : filled + tensor.numel()].copy_(tensor.detach(), non_blocking=True)
        filled += tensor.numel()
    return buffer[:filled]


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
