"""Nothing that happens to files costs a checkpoint: damage is found and named, and a save may fail or be killed anywhere."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longtrain.errors import CheckpointError
from longtrain.train import checkpoint
from longtrain.train.checkpoint import Saver, load, save
from longtrain.train.checkpoint_folder import damage, find_latest, remove_leftovers, verify
from tests.one_rank import OneRank, make_state


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
    """The disk of a save: counts every call that changes it, and `strikes` at one of them."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int | None, strike: Callable[[], None]) -> None:
        self.calls, self._at, self._strike = 0, at, strike
        fsync, rename, mkdir, unfold = os.fsync, Path.rename, Path.mkdir, Path.open
        patch.setattr(os, "fsync", lambda fd: self._call(fsync, fd))
        patch.setattr(Path, "rename", lambda path, target: self._call(rename, path, target))
        patch.setattr(Path, "mkdir", lambda path, *a, **k: self._call(mkdir, path, *a, **k))
        patch.setattr(Path, "open", lambda path, *a, **k: self._opened(self._call(unfold, path, *a, **k)))

    def _call(self, function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        self.calls += 1
        if self.calls - 1 == self._at:
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
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "OVERHEAD", 0)
    save(small_disk, engine, make_state(1), keep=3)
    monkeypatch.setattr(checkpoint, "OVERHEAD", 64 << 20)
    with pytest.raises(CheckpointError, match=r"step-00000002: needs 0\.06 GiB, and 0\.00 GiB are free on its disk"):
        save(small_disk, engine, make_state(2), keep=3)
    monkeypatch.setattr(checkpoint, "OVERHEAD", 0)

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
