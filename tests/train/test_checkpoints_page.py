"""docs/checkpoints.md says of every promise where it is proven: at places that exist."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_proof_exists() -> None:
    page = (HERE.parents[1] / "docs" / "checkpoints.md").read_text()
    proofs = page[page.index("## Where each promise is proven") :]
    files = {name: HERE.parents[1] / name if "/" in name else HERE / name for name in re.findall(r"`([\w/]+\.py)`", proofs)}
    assert len(files) > 15
    sources = {name: path.read_text() for name, path in files.items()}
    tests = set(re.findall(r"`(test_\w+)`", proofs))
    assert len(tests) > 25
    missing = [name for name in tests if not any(f"def {name}(" in source for source in sources.values())]
    assert not missing
    for row in re.findall(r"^\|.*$", proofs, re.MULTILINE):
        assert row.count("|") == 3, f"not two columns: {row}"
