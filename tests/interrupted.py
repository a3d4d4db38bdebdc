"""A preparation of data that Ctrl-C ends before it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longtrain.data.prepare import prepare
from longtrain.data.shards import SplitWriter


def interrupt_preparation(source: str, out: Path, documents: int, **options: Any) -> None:
    """`prepare(source, out, **options)`, interrupted where it writes that many documents; leaves its unfinished work behind."""
    add, left = SplitWriter.add, documents

    def interrupt(self: SplitWriter, tokens: list[int]) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        add(self, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SplitWriter, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, out, **options)
