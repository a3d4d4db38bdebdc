"""Nothing that happens to files costs a checkpoint: damage is found and named, and a save may fail or be killed anywhere."""

from __future__ import annotations

import errno
import io
import os
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from longtrain.errors import CheckpointError
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import Range
from longtrain.train import checkpoint
from longtrain.train.checkpoint import Saver, load, save
from longtrain.train.checkpoint_folder import damage, find_latest, remove_leftovers, verify
from tests.distributed import run_ranks
from tests.one_rank import OneRank, make_state
from tests.small_disk import mounted


@pytest.fixture
def engine() -> Any:
    return OneRank()


@pytest.fixture
def step(tmp_path: Path, engine: Any) -> Path:
    """A checkpoint of several files of tensors."""
    saver = Saver(engine.ctx, part=16)
    saver.begin(tmp_path, engine, make_state(1), keep=1)
    saved = saver.settle()
    assert saved is not None
    assert len(_names(saved.path)) > 4
    return saved.path


def _names(step: Path) -> list[str]:
    return sorted(path.name for path in step.iterdir())


def _cuts(size: int) -> tuple[int, ...]:
    return 0, 1, size // 2, size - 1


def test_every_torn_file_is_found_and_named(step: Path) -> None:
    for name in _names(step):
        whole = (step / name).read_bytes()
        for length in _cuts(len(whole)):
            (step / name).write_bytes(whole[:length])
            for content in (True, False):
                found = damage(step, content=content)
                assert len(found) == 1, length
                assert found[0].startswith(f"{step / name}: "), found
        (step / name).write_bytes(whole)
    assert damage(step) == []


def _flip_bits(step: Path, places: int, seed: int) -> int:
    """How many flipped bits were found and blamed on the right file."""
    draw, found = random.Random(seed), 0
    for name in _names(step):
        whole = (step / name).read_bytes()
        for _ in range(places):
            data = bytearray(whole)
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            (step / name).write_bytes(data)
            reasons = damage(step)
            found += len(reasons) == 1 and reasons[0].startswith(f"{step / name}: ")
        (step / name).write_bytes(whole)
    return found


def test_flipped_bits_are_found_and_named(step: Path) -> None:
    assert _flip_bits(step, 16, seed=0) == 16 * len(_names(step))


@pytest.mark.faults
def test_flipped_bits_everywhere(step: Path) -> None:
    for seed in range(16):
        assert _flip_bits(step, 64, seed) == 64 * len(_names(step))


def test_every_bit_of_the_manifest_counts(step: Path) -> None:
    """Its numbers are not covered by any other file."""
    whole = (step / "manifest.json").read_bytes()
    places = range(0, len(whole), 7)
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1
        (step / "manifest.json").write_bytes(data)
        assert damage(step)[0].startswith(f"{step / 'manifest.json'}: "), whole[place - 9 : place + 9]


class Disk:
    """The disk of a save: counts every call that changes it, or opens a folder, and `strikes` at one of them.

    lasting: and at all after it.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int | None, strike: Callable[[], None], *, lasting: bool = False) -> None:
        self.calls, self._at, self._strike, self._lasting = 0, at, strike, lasting
        rename, mkdir, unfold = Path.rename, Path.mkdir, Path.open
        # folders are opened to be synced, and to be deleted with what is in them
        for name in ("fsync", "open", "unlink", "rmdir"):
            patch.setattr(os, name, partial(self._call, getattr(os, name)))
        patch.setattr(Path, "rename", lambda path, target: self._call(rename, path, target))
        patch.setattr(Path, "mkdir", lambda path, *a, **k: self._call(mkdir, path, *a, **k))
        patch.setattr(Path, "open", lambda path, *a, **k: self._opened(self._call(unfold, path, *a, **k)))

    def _call(self, function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        self.calls += 1
        if self._at is not None and (self.calls - 1 == self._at or (self._lasting and self.calls > self._at)):
            self._strike()
        return function(*arguments, **more)

    def _opened(self, file: Any) -> Any:
        disk = self

        class Counted:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, data: Any) -> int:
                return disk._call(file.write, data)

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        return Counted()


def _fail(number: int) -> Callable[[], None]:
    def strike() -> None:
        raise OSError(number, os.strerror(number))

    return strike


def _calls_of_a_save(folder: Path, before: list[int], now: int) -> int:
    with pytest.MonkeyPatch.context() as patch:
        engine: Any = OneRank()
        for number in before:
            save(folder, engine, make_state(number), keep=1)
        disk = Disk(patch, None, _fail(0))
        save(folder, engine, make_state(now), keep=1)
    return disk.calls


def _still_good(folder: Path, known: dict[int, Any]) -> None:
    """What is found is sound and what was saved; the next save works."""
    latest = find_latest(folder)
    assert latest is not None
    assert damage(latest) == []
    other: Any = OneRank()
    state = load(latest, other)
    for name, tensors in known[state.step].items():
        assert all(other.values[name][kind].equal(value) for kind, value in tensors.items())
    remove_leftovers(folder)
    save(folder, other, make_state(9), keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-00000009"]
    verify(folder)


# the second: the same step once more, in the place of the only checkpoint that there is
CASES = [(1, 2), (1, 1)]


@pytest.mark.parametrize(("before", "now"), CASES)
@pytest.mark.parametrize("number", [errno.ENOSPC, *(pytest.param(e, marks=pytest.mark.faults) for e in (errno.EROFS, errno.EIO))])
def test_an_error_at_every_call_of_a_save(tmp_path: Path, before: int, now: int, number: int) -> None:
    calls = _calls_of_a_save(tmp_path / "count", [before], now)
    assert calls > 15
    for at in range(calls):
        folder, engine = tmp_path / str(at), OneRank()
        save(folder, engine, make_state(before), keep=1)  # type: ignore[arg-type]
        known = {before: {name: {k: v.clone() for k, v in t.items()} for name, t in engine.values.items()}}
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, at, _fail(number))
            try:
                save(folder, engine, make_state(now), keep=1)  # type: ignore[arg-type]
            except CheckpointError as error:
                assert os.strerror(number) in str(error)  # noqa: PT017
        _still_good(folder, known | {now: engine.values})


def _kill_at(folder: Path, engine: Any, now: int, at: int) -> int:
    """Saves in a child that is gone at once at one call; its exit code."""
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, at, lambda: os._exit(9))
            save(folder, engine, make_state(now), keep=1)
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(("before", "now"), CASES)
def test_a_kill_at_every_call_of_a_save(tmp_path: Path, before: int, now: int) -> None:
    calls = _calls_of_a_save(tmp_path / "count", [before], now)
    for at in range(calls):
        folder, engine = tmp_path / str(at), OneRank()
        save(folder, engine, make_state(before), keep=1)  # type: ignore[arg-type]
        assert _kill_at(folder, engine, now, at) == 9
        _still_good(folder, {before: engine.values, now: engine.values})


class Half(OneRank):
    """One of two ranks, each of which owns and holds half of every parameter."""

    def __init__(self, ctx: ParallelContext) -> None:
        super().__init__()
        self.ctx, self._start = ctx, 3 * ctx.rank

    def owned_ranges(self) -> Iterator[Range]:
        start, end = self._start, self._start + 3
        for name, tensors in self.values.items():
            yield Range(name, start, 3, {kind: value[start:end] for kind, value in tensors.items()})

    held_ranges = owned_ranges

    def owned(self) -> list[list[float]]:
        return [view.tolist() for piece in self.owned_ranges() for view in piece.tensors.values()]


def _save_half(folder: Path, engine: Any, step: int) -> str:
    """How a save of two ranks, of several files each, ended on this one."""
    saver = Saver(engine.ctx, part=7)
    try:
        saver.begin(folder, engine, make_state(step), keep=1)
        saver.settle()
    except CheckpointError as error:
        return str(error)
    return "saved"


def _strike(ctx: ParallelContext, folder: Path, now: int, rank: int, at: int | None, fault: tuple[int, bool]) -> tuple[int, str]:
    """Saves step 1 and then `now`, with a fault at one call of one rank; checks on both that a run can go on from what is there.
    The calls that this rank made, and how the save ended on it."""
    number, lasting = fault
    engine: Any = Half(ctx)
    assert _save_half(folder, engine, 1) == "saved"
    known = [(1, engine.owned())]
    for tensors in engine.values.values():
        for value in tensors.values():
            value += 1
    known.append((now, engine.owned()))
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, at if ctx.rank == rank else None, _fail(number), lasting=lasting)
        ended = _save_half(folder, engine, now)
        ctx.all_gather_text("struck")
    latest = find_latest(folder)
    assert latest is not None
    assert damage(latest) == []
    other: Any = Half(ctx)
    which = known.index((load(latest, other).step, other.owned()))
    assert len(set(ctx.all_gather_text(str(which)))) == 1
    assert which == 1 or ended != "saved"
    if ctx.is_main:
        remove_leftovers(folder)
    assert _save_half(folder, other, 9) == "saved"
    assert [path.name for path in folder.iterdir()] == ["step-00000009"]
    verify(folder)
    ctx.all_gather_text("verified")
    return disk.calls, ended


def _strike_all(ctx: ParallelContext, base: str, faults: list[tuple[int, bool]], stride: int) -> list[tuple[Any, ...]]:
    """Every `stride`-th call of each rank in turn is struck by each fault: at what, and how the save ended on this rank."""
    seen: list[tuple[Any, ...]] = []
    for _, now in CASES:
        calls, _ = _strike(ctx, Path(base, f"count-{now}"), now, 0, None, (0, False))
        for rank, count in enumerate(ctx.all_gather_text(str(calls))):
            for fault in faults:
                for at in range(len(seen) % stride, int(count), stride):
                    _, ended = _strike(ctx, Path(base, str(len(seen))), now, rank, at, fault)
                    seen.append((now, rank, at, *fault, ended))
    return seen


LASTING = [(number, lasting) for number in (errno.ENOSPC, errno.EIO) for lasting in (False, True)]


@pytest.mark.parametrize(
    ("faults", "stride"),
    [
        pytest.param([(errno.ENOSPC, False)], 13, id="short"),
        pytest.param(LASTING, 1, marks=[pytest.mark.faults, pytest.mark.timeout(3600)], id="long"),
    ],
)
def test_an_error_at_every_call_of_each_of_two_ranks(tmp_path: Path, faults: list[tuple[int, bool]], stride: int) -> None:
    begin = time.monotonic()
    first, second = run_ranks(_strike_all, 2, str(tmp_path), faults, stride, timeout=3000)
    assert first == second, "both ranks say the same of every save"
    for _, rank, _, number, _, ended in first:
        if ended != "saved":
            assert ended.startswith(f"rank {rank}: ") or rank == 0, ended
            assert os.strerror(number) in ended
    struck = [len([case for case in first if case[1] == rank]) for rank in range(2)]
    failed = sum(ended != "saved" for *_, ended in first)
    print(f"{struck} faults on ranks 0 and 1: {failed} saves failed, on both ranks; {time.monotonic() - begin:.0f} s")
    assert min(struck) > 20 // stride
    assert failed > len(first) // 2


class Trickle(io.FileIO):
    """A file each of whose writes takes half of what it is given. left: after so many of them the disk is full."""

    left: int | None = None

    def write(self, data: Any) -> int:
        if Trickle.left is not None:
            Trickle.left -= 1
            if Trickle.left < 0:
                _fail(errno.ENOSPC)()
        return super().write(memoryview(data).cast("B")[: -(-len(data) // 2)])


def _trickling(path: Path, mode: str = "r", *arguments: Any, **more: Any) -> Any:
    return io.BufferedWriter(Trickle(path, mode)) if "w" in mode else open(path, mode, *arguments, **more)


def test_writes_that_take_less_than_they_are_given(tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk fills up in the middle of a write, which then says how much it took, and only the next one that it is full."""
    save(tmp_path, engine, make_state(1), keep=1)
    monkeypatch.setattr(Path, "open", _trickling)
    written = 0
    while True:
        monkeypatch.setattr(Trickle, "left", written)
        try:
            save(tmp_path, engine, make_state(2), keep=1)
            break
        except CheckpointError as error:
            assert "No space left on device" in str(error)  # noqa: PT017
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        assert damage(tmp_path / "step-00000001") == []
        written += 1
    assert written > 20
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    verify(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    with mounted(tmp_path / "small", "64k") as folder:
        yield folder


def test_a_full_disk(small_disk: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "disk_bytes", lambda elements: 0)
    save(small_disk, engine, make_state(1), keep=3)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"step-00000002: needs \d+ MiB, and \d+ MiB are free on its disk"):
        save(small_disk, engine, make_state(2), keep=3)
    monkeypatch.setattr(checkpoint, "disk_bytes", lambda elements: 0)

    def fill() -> None:
        for number in range(2, 100):
            save(small_disk, engine, make_state(number), keep=100)

    with pytest.raises(CheckpointError, match="No space left on device"):
        fill()
    latest = find_latest(small_disk)
    assert latest is not None
    assert latest.name > "step-00000002"
    verify(latest)
    load(latest, engine)
    assert not list(small_disk.glob("*.tmp"))
