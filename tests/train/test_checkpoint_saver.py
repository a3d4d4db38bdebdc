"""Saving behind the training: what is written is what was there when the save began, and nothing is lost in silence."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from longtrain.errors import CheckpointError
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import MOMENTS, Engine
from longtrain.parallel.mailbox import Mailbox
from longtrain.train import checkpoint, threads
from longtrain.train.checkpoint import Saver, load
from longtrain.train.checkpoint_folder import Pieces, damage, find_latest, read_master, remove_leftovers, verify
from longtrain.train.checkpoint_format import Manifest, ParameterEntry
from longtrain.train.snapshot import PART, HostMemory, header_of, parts_of, write_tensors
from tests.distributed import run_ranks
from tests.one_rank import OneRank, make_state
from tests.toy import make_engine, owned
from tests.train.test_checkpoint_faults import Disk


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


@pytest.mark.parametrize("part", [5, 1 << 26])
def test_without_memory_for_a_copy_the_same_is_written_at_once(
    tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    behind = Saver(engine.ctx, part)
    behind.begin(tmp_path / "copied", engine, make_state(1), keep=1)
    assert behind.settle()
    monkeypatch.setattr(checkpoint, "available_memory", lambda: 100)
    small = Saver(engine.ctx, part)
    reason = small.begin(tmp_path / "streamed", engine, make_state(1), keep=1)
    assert reason is not None
    assert "a copy for the background needs 0 MiB of memory on" in reason
    assert small.finished, "written before training goes on"
    saved = small.settle()
    assert saved is not None
    assert verify(saved.path).files == verify(tmp_path / "copied/step-00000001").files


def refuse_threads(patch: pytest.MonkeyPatch) -> None:
    """As where a limit on processes is reached."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    patch.setattr(threading.Thread, "start", refuse)


def test_without_a_thread_the_same_is_written_at_once(tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (checkpoint, threads):
        monkeypatch.setattr(module, "usable_cores", lambda: 2)
    behind = Saver(engine.ctx, 18)
    behind.begin(tmp_path / "behind", engine, make_state(1), keep=1)
    assert behind.settle()
    alone = Saver(engine.ctx, 18)
    with monkeypatch.context() as patch:
        refuse_threads(patch)
        reason = alone.begin(tmp_path / "alone", engine, make_state(1), keep=1)
    assert reason == "no thread for the background: can't start new thread"
    assert alone.finished, "written before training goes on"
    alone.close()
    saved = alone.settle()
    assert saved is not None
    assert verify(saved.path).files == verify(tmp_path / "behind/step-00000001").files


def test_nobody_waits_for_a_save_that_nobody_writes(tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(BaseException):
        """As KeyboardInterrupt, which pytest would take for its own."""

    def interrupt(*arguments: Any) -> Any:
        raise Interrupted

    saver = Saver(engine.ctx)
    monkeypatch.setattr(checkpoint, "available_memory", lambda: 100)
    monkeypatch.setattr(checkpoint, "write_tensors", interrupt)
    with pytest.raises(Interrupted):
        saver.begin(tmp_path, engine, make_state(1), keep=1)
    assert not saver.busy
    assert saver.settle() is None
    assert find_latest(tmp_path) is None


@pytest.mark.parametrize("part", [1, 4, 5, 7, 24, 36])
def test_a_large_rank_is_several_files(tmp_path: Path, engine: Any, part: int) -> None:
    saver = Saver(engine.ctx, part)
    for step in (1, 2):
        saver.begin(tmp_path, engine, make_state(step), keep=2)
        saver.settle()
        manifest = verify(tmp_path / f"step-{step:08d}")
        names = sorted(manifest.files)[:-1]
        count = -(-36 // part)
        assert names == ([f"rank-00000-{n:05d}.safetensors" for n in range(count)] if count > 1 else ["rank-00000.safetensors"])
        for values in engine.values.values():
            values["master"] += 1
    other: Any = OneRank()
    load(tmp_path / "step-00000001", other)
    for name, tensors in engine.values.items():
        assert torch.allclose(other.values[name]["master"] + 2, tensors["master"])
        assert all(torch.equal(other.values[name][kind], tensors[kind]) for kind in MOMENTS)
    damaged = tmp_path / "step-00000002" / names[count // 2]
    data = bytearray(damaged.read_bytes())
    data[-2] ^= 8
    damaged.write_bytes(data)
    assert [text.split(": ")[0] for text in damage(damaged.parent)] == [str(damaged)]


def test_files_are_written_in_threads_and_the_first_error_ends_it(
    tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    meet, write = threading.Barrier(2, timeout=20), checkpoint.write_tensors

    def together(path: Path, *arguments: Any) -> Any:
        meet.wait()
        if failing and path.name.endswith("-00001.safetensors"):
            raise OSError(28, "No space left on device")
        return write(path, *arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", together)
    for module in (checkpoint, threads):
        monkeypatch.setattr(module, "usable_cores", lambda: 2)
    failing, saver = False, Saver(engine.ctx, 18)
    saver.begin(tmp_path, engine, make_state(1), keep=1)
    assert saver.settle()
    failing = True
    saver.begin(tmp_path, engine, make_state(2), keep=1)
    with pytest.raises(CheckpointError, match="No space left on device"):
        saver.settle()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_an_error_at_any_call_while_threads_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_in_parts(folder: Path, step: int) -> None:
        engine: Any = OneRank()
        saver = Saver(engine.ctx, 9)
        saver.begin(folder, engine, make_state(step), keep=1)
        saver.settle()

    for module in (checkpoint, threads):
        monkeypatch.setattr(module, "usable_cores", lambda: 3)
    save_in_parts(tmp_path / "count", 1)
    with monkeypatch.context() as patch:
        disk = Disk(patch, None, lambda: None)
        save_in_parts(tmp_path / "count", 2)
    assert disk.calls > 4 * 4
    for at in range(disk.calls):
        folder = tmp_path / str(at)
        save_in_parts(folder, 1)
        with monkeypatch.context() as patch, contextlib.suppress(CheckpointError):
            Disk(patch, at, _io_error)
            save_in_parts(folder, 2)
        latest = find_latest(folder)
        assert latest is not None
        assert damage(latest) == []
        remove_leftovers(folder)
        save_in_parts(folder, 3)
        verify(folder / "step-00000003")
        assert [path.name for path in folder.iterdir()] == ["step-00000003"]


def _io_error() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


class Gone:
    """A store whose server is gone, for who asks for this; what is set is lost with it."""

    def __init__(self, store: Any, operation: str) -> None:
        self._store, self._operation = store, operation

    def __getattr__(self, name: str) -> Any:
        if name == self._operation:
            raise RuntimeError("Broken pipe")
        return getattr(self._store, name)


def _save_without_a_store(ctx: ParallelContext, folder: Path, operation: str) -> tuple[list[str], str | None]:
    engine, saver = make_engine(ctx, stage=1), Saver(ctx)
    mailbox: Any = saver._mailbox
    mailbox._store = Gone(mailbox._store, operation)
    with pytest.MonkeyPatch.context() as patch:
        said = []
        for step in (1, 2):
            if step == 2:
                patch.setattr(checkpoint, "publish", lambda *_: _io_error())
            saver.begin(folder, engine, make_state(step), keep=5)
            try:
                saved = saver.settle()
                assert saved is not None
                said.append(saved.remark or "")
            except CheckpointError as error:
                said.append(str(error))
    return said, None if find_latest(folder) is None else verify(folder / "step-00000001").sha256


@pytest.mark.parametrize("operation", ["set", "check"])
def test_ranks_save_together_when_their_store_is_gone(tmp_path: Path, operation: str) -> None:
    """At every post, and where only the main rank hears nothing."""
    for said, digest in run_ranks(_save_without_a_store, 2, tmp_path, operation):
        assert said[0].startswith("torchrun is gone, or its host")
        assert "Input/output error" in said[1]
        assert digest is not None


def test_ranges_are_dealt_to_files_in_order() -> None:
    ranges = [("master/a", 3, torch.arange(5.0)), ("master/b", 0, torch.arange(0.0)), ("exp_avg/a", 3, torch.arange(4.0))]
    parts = parts_of(2, ranges, 3)
    names = [[name for name, _ in part.tensors] for part in parts]
    assert names == [["master/a@3"], ["master/a@6", "exp_avg/a@3"], ["exp_avg/a@4"]]
    assert [part.elements for part in parts] == [3, 3, 3]
    assert [part.file for part in parts_of(2, [], 3)] == ["rank-00002.safetensors"]


def test_host_memory_is_used_again() -> None:
    values = torch.arange(19, dtype=torch.float32)
    parts, memory = parts_of(0, [("master/a", 0, values)], 8), HostMemory(torch.device("cpu"))
    assert memory.missing(parts) == 4 * 19
    copies = memory.take(parts)
    assert torch.equal(torch.cat(copies), values)
    assert memory.missing(parts) == 0
    assert [copy.data_ptr() for copy in memory.take(parts)] == [copy.data_ptr() for copy in copies]
    memory = HostMemory(torch.device("cpu"))
    for part in parts:
        with memory.lend(part) as copy:
            assert torch.equal(copy, part.tensors[0][1])
    assert memory.missing(parts) == 4 * (8 + 3), "one buffer was enough"


def test_a_load_reads_no_more_than_its_ranges(tmp_path: Path) -> None:
    """Of a file that is mapped, pages that nobody touches stay out of memory."""
    values, out = torch.zeros(1 << 24), torch.empty(1000)
    entry = write_tensors(tmp_path / "rank-00000.safetensors", header_of([("master/a@0", values)]), [values])
    described = ParameterEntry(shape=[1 << 24], numel=1 << 24, dtype="float32", adam_step=0)
    files, parameters = {"rank-00000.safetensors": entry}, {"a": described}
    manifest = Manifest(step=1, world=1, stage=1, recipe_sha256="", files=files, parameters=parameters)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    Pieces(tmp_path, manifest).read("master", "a", 1 << 23, out)
    # 64 MiB are 16,384 pages, mapped by 16 at a time
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 500
    assert torch.equal(out, values[:1000])


def test_buffers_are_powers_of_two() -> None:
    assert PART & (PART - 1) == 0


def _two_ranks(ctx: ParallelContext, base: str) -> dict[str, Any]:
    # several files a rank
    engine, folder, saver = make_engine(ctx, stage=1), Path(base), Saver(ctx, 100)
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
    seen["starved"] = _starved(ctx, saver, folder, engine)
    seen["found"] = [path.name for path in sorted(folder.iterdir())]
    other = make_engine(ctx, stage=1)
    for piece in other.held_ranges():
        piece.tensors["master"].zero_()
    load(folder / "step-00000003", other)
    seen["loaded"] = owned(other) == owned(engine)
    engine.close()
    return seen


def _starved(ctx: ParallelContext, saver: Saver, folder: Path, engine: Engine) -> list[str | None]:
    """What both ranks get where one has no memory for its moments, and where one has no thread."""

    def exhaust() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    found: list[str | None] = []
    with pytest.MonkeyPatch.context() as patch:
        if ctx.rank == 1:
            patch.setattr(engine, "create_moments", exhaust)
        try:
            saver.begin(folder, engine, make_state(4), keep=5)
        except CheckpointError as error:
            found.append(str(error))
    with pytest.MonkeyPatch.context() as patch:
        if ctx.rank == 1:
            refuse_threads(patch)
        found.append(saver.begin(folder, engine, make_state(5), keep=5))
    saver.settle()
    return found


def test_two_ranks_publish_together_or_not_at_all(tmp_path: Path) -> None:
    reasons = [None, "no thread for the background: can't start new thread"]
    for reason, seen in zip(reasons, run_ranks(_two_ranks, 2, str(tmp_path)), strict=True):
        assert not seen["early"], "the other rank was still writing"
        assert seen["saved"] == "step-00000001"
        assert seen["error"] == "rank 1: OSError: [Errno 5] Input/output error"
        assert seen["starved"] == ["rank 1: OutOfMemoryError: CUDA out of memory", reason]
        assert seen["found"] == ["step-00000001", "step-00000003", "step-00000005"]
        assert seen["loaded"]
    files = verify(tmp_path / "step-00000003").files
    assert {"rank-00000-00000.safetensors", "rank-00001-00001.safetensors", "state.json"} <= files.keys()


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
