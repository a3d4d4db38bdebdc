"""Long documents of real text that every machine has: the Python sources of its packages, whole packages joined.

`python -m benchmarks.long_text --out FILE.jsonl --megabytes 40`, for scripts/prepare_data.py to read. Files of one package, in the
order of their names, stand after one another in documents that no sequence of 32K tokens uses up.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

DOCUMENT = 400_000
"""Characters of a document, at least: about 100K tokens."""

SKIPPED = frozenset({"__pycache__", "encodings", "idle_test", "site-packages", "test", "tests"})


def documents(roots: list[Path], least: int = DOCUMENT) -> Iterator[str]:
    """Texts of at least `least` characters: files of one folder of `roots`, joined. What is left of a folder is dropped."""
    for folder in (path for root in roots for path in sorted(root.iterdir()) if path.is_dir() and path.name not in SKIPPED):
        parts: list[str] = []
        for file in sorted(folder.rglob("*.py")):
            if SKIPPED.isdisjoint(file.relative_to(folder).parts):
                parts.append(f"# {file.relative_to(folder.parent)}\n{file.read_text(errors='ignore')}\n")
            if sum(map(len, parts)) >= least:
                yield "".join(parts)
                parts = []


def write(out: Path, megabytes: float, roots: list[Path] | None = None, least: int = DOCUMENT) -> Path:
    """JSON Lines with documents of this Python's library and packages, about so many million characters. Returns `out`."""
    paths = sysconfig.get_paths()
    found = list(documents(roots or [Path(paths["stdlib"]), Path(paths["purelib"])], least))
    found.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    out.parent.mkdir(parents=True, exist_ok=True)
    left = megabytes * 1e6
    with out.open("w") as file:
        for text in found:
            if left <= 0:
                break
            file.write(json.dumps({"text": text}) + "\n")
            left -= len(text)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=40.0)
    given = parser.parse_args()
    print(f"wrote {write(given.out, given.megabytes)}")
