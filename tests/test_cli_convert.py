"""scripts/convert_checkpoint.py: what it refuses."""

from __future__ import annotations

import sys

import pytest

from tests.user import REPOSITORY, process, snapshot

pytest_plugins = ("tests.desks",)


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run/huggingface",), "run/huggingface: holds safetensors already; model.init reads it as it is"),
        (("run/huggingface", "--data", "data"), "--data goes with a run or one checkpoint of it, and run/huggingface is none"),
        (("run", "--config", "run/huggingface"), "--config goes with a folder that DeepSpeed wrote, and run is none"),
        (("nowhere",), "nowhere: no such folder; name a run's folder or a checkpoint's"),
    ],
    ids=["safetensors", "data", "config", "nothing"],
)
def test_refusals(words: tuple[str, ...], says: str) -> None:
    before = snapshot()
    done = process(sys.executable, str(REPOSITORY / "scripts" / "convert_checkpoint.py"), *words, "--out", "new")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {says}")
    assert snapshot() == before
