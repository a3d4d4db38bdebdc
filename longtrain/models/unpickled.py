"""Files that torch.save wrote, read as data: nothing in them is executed."""

from __future__ import annotations

import re
import struct
import warnings
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from longtrain.errors import CheckpointError

UNREADABLE = (
    *(OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, ArithmeticError, AssertionError),
    *(UnpicklingError, struct.error),
)
"""What `torch.load(weights_only=True)` raises for files that are damaged or hold more than tensors."""

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What weights are converted from."""

_AGAIN = "save it again with torch.save(model.state_dict(), FILE)"


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


def named_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, dense and in one of FLOATS, on the CPU. Two may share their memory.

    Raises:
        CheckpointError: as `unpickled`; the file holds anything else. It names the file and the tensor.
    """
    content = unpickled(file)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds something else than named tensors ({type(content).__name__}); {_AGAIN}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            found = f"{type(tensor).__name__} by the name {repr(name)[:80]}"
            raise CheckpointError(f"{file}: holds something else than named tensors ({found}); {_AGAIN}")
        if tensor.layout != torch.strided or tensor.is_nested or tensor.device.type != "cpu" or tensor.dtype not in FLOATS:
            found = f"{tensor.dtype}, {'nested' if tensor.is_nested else tensor.layout}, on {tensor.device}"
            raise CheckpointError(
                f"{file}: tensor {name[:80]} is not dense numbers in fp64, fp32, fp16 or bf16 ({found}); load the whole model in "
                f"one of these and {_AGAIN}"
            )
    return content
