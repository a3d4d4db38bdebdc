"""How a benchmark says that it cannot run here: one sentence and exit code 2, as the command line of longtrain does."""

from __future__ import annotations

import sys
from typing import NoReturn

import torch


def refuse(reason: str) -> NoReturn:
    """Raises SystemExit."""
    print(f"error: {reason}", file=sys.stderr)
    raise SystemExit(2)


def need_gpu(instead: str = "") -> None:
    """Refuses where torch finds no CUDA GPU. instead: what can be done without one."""
    if not torch.cuda.is_available():
        refuse(f"this benchmark needs a CUDA GPU, and torch {torch.__version__} finds none here{instead and f'; {instead}'}")
