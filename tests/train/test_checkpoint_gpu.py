"""Checkpoints of tensors on a GPU: copied and written behind the training, streamed by threads, and read by threads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longtrain.train import checkpoint
from longtrain.train.checkpoint import Saver, load
from longtrain.train.checkpoint_folder import verify
from tests.one_rank import OneRank, make_state

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def on_gpu() -> Any:
    engine = OneRank()
    engine.ctx = replace(engine.ctx, device=torch.device("cuda", 0))
    engine.values = {name: {kind: value.cuda() for kind, value in tensors.items()} for name, tensors in engine.values.items()}
    return engine


@pytest.mark.parametrize("memory", [None, 100])
@pytest.mark.parametrize("part", [5, 1 << 26])
def test_what_is_saved_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int | None, part: int) -> None:
    monkeypatch.setattr(checkpoint, "available_memory", lambda: memory)
    engine, other = on_gpu(), on_gpu()
    saver = Saver(engine.ctx, part)
    for step in (1, 2):
        wanted = {name: {kind: value.clone() for kind, value in tensors.items()} for name, tensors in engine.values.items()}
        reason = saver.begin(tmp_path, engine, make_state(step), keep=1)
        # the second finds the buffers of the first
        assert step == 2 or (reason is None) == (memory is None)
        for tensors in engine.values.values():
            for value in tensors.values():
                value.add_(1)
        saver.settle()
        verify(tmp_path)
        load(tmp_path, other)
        for name, tensors in wanted.items():
            assert all(torch.equal(other.values[name][kind], value) for kind, value in tensors.items())
