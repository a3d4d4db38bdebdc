"""Files that torch.save wrote, read as data: nothing in them is executed."""

from __future__ import annotations

import re
import struct
import warnings
from pathlib import Path
from pickle import UnpicklingError

import torch

from longtrain.errors import CheckpointError

UNREADABLE = (
    *(OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, ArithmeticError, AssertionError),
    *(UnpicklingError, struct.error),
)
"""What `torch.load(weights_only=True)` raises for files that are damaged or hold more than tensors."""


def unpickled(file: Path) -> object:
    """What a file holds: tensors, numbers, text, and containers of them, on the CPU. Raises CheckpointError, which names the file,
    where it cannot be read, is damaged, or holds anything that would have to be executed."""
    try:
        with file.open("rb") as opened, warnings.catch_warnings():
            # torch asks for issues about pickles that it cannot read
            warnings.simplefilter("ignore")
            # the format before torch 1.6 is no zip file, and cannot be mapped
            return torch.load(file, map_location="cpu", weights_only=True, mmap=opened.read(4) == b"PK\x03\x04")
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
        # nothing else of torch's messages: they advise to execute the file
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"{foreign[1]} is never executed here; name safetensors of this model" if foreign else "copy or fetch it again"
        raise CheckpointError(f"{file}: is damaged or holds more than tensors: {reason}") from None
