"""A recipe file in the current folder."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | bytes], str]:
    """Writes text or bytes as x.yaml in the current directory."""
    monkeypatch.chdir(tmp_path)

    def write(content: str | bytes) -> str:
        Path("x.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
        return "x.yaml"

    return write
