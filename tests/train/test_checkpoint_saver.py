"""Saving behind the training: what is written is what was there when the save began, and nothing is lost in silence."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from longtrain.errors import CheckpointError
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.mailbox import Mailbox
from longtrain.train import checkpoint, snapshot
from longtrain.train.checkpoint import Saver
from longtrain.train.checkpoint_folder import find_latest, read_master, verify
from longtrain.train.snapshot import HostMemory, available_memory
from tests.distributed import run_ranks
from tests.one_rank import OneRank, make_state
from tests.toy import make_engine


class Gate:
    """A disk that writes when it is let."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.error: Exception | None = None
        write = checkpoint.write_tensors

        def wait(*arguments: Any) -> Any:
            assert self.open.wait(20)
            if self.error is not None:
                raise self.error
            return write(*arguments)

        patch.setattr(checkpoint, "write_tensors", wait)


@pytest.fixture
def engine() -> Any:
    return OneRank()


def test_training_goes_on_while_the_disk_writes(tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, saver = Gate(monkeypatch), Saver(engine.ctx)
    wanted = engine.values["a"]["master"].clone()
    assert saver.begin(tmp_path, engine, make_state(1), keep=1) is None
    assert saver.busy
    assert not saver.finished
    engine.values["a"]["master"].fill_(7.0)
    with pytest.raises(RuntimeError, match="settle it first"):
        saver.begin(tmp_path, engine, make_state(2), keep=1)
    assert find_latest(tmp_path) is None
    gate.open.set()
    saved = saver.settle()
    assert saved is not None
    assert saved.path == tmp_path / "step-00000001"
    assert torch.equal(dict(read_master(saved.path))["a"].flatten(), wanted), "what was there when the save began"
    assert saver.settle() is None
    assert not saver.busy


def test_an_error_comes_up_when_it_is_settled(tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, saver = Gate(monkeypatch), Saver(engine.ctx)
    gate.error = OSError(28, "No space left on device")
    gate.open.set()
    saver.begin(tmp_path, engine, make_state(1), keep=1)
    deadline = time.monotonic() + 10
    while not saver.finished:
        assert time.monotonic() < deadline
    with pytest.raises(CheckpointError, match="No space left on device"):
        saver.settle()
    assert list(tmp_path.iterdir()) == []
    gate.error = None
    saver.begin(tmp_path, engine, make_state(1), keep=1)
    assert saver.settle()


def test_leaving_waits_for_the_disk(tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, saver = Gate(monkeypatch), Saver(engine.ctx)
    saver.begin(tmp_path, engine, make_state(1), keep=1)
    threading.Timer(0.2, gate.open.set).start()
    saver.close()
    verify(tmp_path / "step-00000001")


def test_without_memory_for_a_copy_the_same_is_written_at_once(
    tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Saver(engine.ctx).begin(tmp_path / "copied", engine, make_state(1), keep=1)
    monkeypatch.setattr(checkpoint, "available_memory", lambda: 100)
    small = Saver(engine.ctx, HostMemory(engine.ctx.device, piece=5))
    reason = small.begin(tmp_path / "streamed", engine, make_state(1), keep=1)
    assert reason is not None
    assert "a copy for the background needs 0.00 GiB of memory on" in reason
    assert small.finished, "written before training goes on"
    saved = small.settle()
    assert saved is not None
    verify(saved.path)
    name = "rank-00000.safetensors"
    assert (tmp_path / "copied/step-00000001" / name).read_bytes() == (saved.path / name).read_bytes()


@pytest.mark.parametrize("piece", [1, 4, 7, 1 << 26])
def test_pieces_hold_the_tensors_in_order(piece: int) -> None:
    tensors = [torch.arange(n, dtype=torch.float32).view(shape) + n for n, shape in ((5, (5,)), (6, (2, 3)), (0, (0,)), (8, (8,)))]
    wanted = torch.cat([tensor.flatten() for tensor in tensors])
    memory = HostMemory(torch.device("cpu"), piece)
    assert torch.equal(torch.cat([part.clone() for part in memory.stream(tensors)]), wanted)
    assert memory.missing(19) == 4 * 19
    assert torch.equal(torch.cat(memory.take(tensors)), wanted)
    assert memory.missing(19) == 0
    assert torch.equal(torch.cat(memory.take(tensors[2:])), tensors[3]), "buffers are used again"


def test_available_memory_is_the_machines_or_the_containers(tmp_path: Path) -> None:
    assert available_memory(tmp_path / "none", tmp_path) is None
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:   50 kB\n")
    assert available_memory(tmp_path / "meminfo", tmp_path) == 50 * 1024
    (tmp_path / "memory.max").write_text("30000\n")
    (tmp_path / "memory.stat").write_text("anon 10000\nfile 9000\n")
    assert available_memory(tmp_path / "meminfo", tmp_path) == 20000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path / "meminfo", tmp_path) == 50 * 1024


def test_buffers_are_powers_of_two() -> None:
    assert snapshot.PIECE & (snapshot.PIECE - 1) == 0


def _two_ranks(ctx: ParallelContext, base: str) -> dict[str, Any]:
    engine, folder, saver = make_engine(ctx, stage=1), Path(base), Saver(ctx)
    seen: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)
        if ctx.rank == 0:
            gate.open.set()
        saver.begin(folder, engine, make_state(1), keep=5)
        ctx.all_gather_text("training goes on, with collectives of its own")
        time.sleep(0.3)
        seen["early"] = saver.finished
        gate.open.set()
        saved = saver.settle()
        seen["saved"] = saved.path.name if saved else None
        if ctx.rank == 1:
            gate.error = OSError(5, "Input/output error")
        saver.begin(folder, engine, make_state(2), keep=5)
        try:
            saver.settle()
        except CheckpointError as error:
            seen["error"] = str(error)
        gate.error = None
        saver.begin(folder, engine, make_state(3), keep=5)
        saver.settle()
    seen["found"] = [path.name for path in sorted(folder.iterdir())]
    engine.close()
    return seen


def test_two_ranks_publish_together_or_not_at_all(tmp_path: Path) -> None:
    for seen in run_ranks(_two_ranks, 2, str(tmp_path)):
        assert not seen["early"], "the other rank was still writing"
        assert seen["saved"] == "step-00000001"
        assert seen["error"] == "rank 1: OSError: [Errno 5] Input/output error"
        assert seen["found"] == ["step-00000001", "step-00000003"]
    verify(tmp_path / "step-00000003")


def _lonely(ctx: ParallelContext) -> str:
    """A rank that is gone: the other one waits for its post, but not for ever."""
    if ctx.rank == 1:
        ctx.all_gather_text("")
        return ""
    start, text = time.monotonic(), ""
    mailbox = Mailbox(ctx)
    mailbox.post("key", "mine")
    try:
        mailbox.collect("key", lambda: time.monotonic() > start + 0.3)
    except TimeoutError as error:
        text = str(error)
    ctx.all_gather_text("")
    return text


def test_nobody_waits_for_ever() -> None:
    assert run_ranks(_lonely, 2)[0] == "nothing came from rank 1"
