"""`longtrain checkpoint` beside a run that saves, and deletes its older checkpoints: what is gone is not damaged."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from longtrain.train import checkpoint_commands, checkpoint_folder
from longtrain.train.checkpoint import save
from longtrain.train.checkpoint_folder import Pieces, complete, damage, delete, problems, publish
from longtrain.train.checkpoint_format import GoneError, UnreadableError, read_manifest
from tests.one_rank import OneRank, make_state
from tests.user import command

TENSORS = "rank-00000.safetensors"


@pytest.fixture
def steps(tmp_path: Path) -> list[Path]:
    """Checkpoints 1, 2 and 3 of a run."""
    engine: Any = OneRank()
    return [save(tmp_path / "run" / "checkpoints", engine, make_state(step), keep=3) for step in (1, 2, 3)]


def _run_of(step: Path) -> str:
    return str(step.parents[1])


def _unable_to_open(path: Path) -> None:
    raise RuntimeError(f"unable to open file <{path}> in read-only mode: No such file or directory (2)")


Moment = tuple[Any, str, Callable[[Path], object]]
MOMENTS: dict[str, Moment] = {
    "before its manifest": (checkpoint_folder, "read_manifest", lambda _: None),
    "before its files": (checkpoint_folder, "_wrong_files", lambda _: None),
    "before its state": (checkpoint_folder, "read_state", lambda _: None),
    "before its tensors": (checkpoint_folder, "safe_open", lambda _: None),
    "when torch opens them": (checkpoint_folder, "safe_open", _unable_to_open),
    "after all": (checkpoint_commands, "read_state", lambda _: None),
}


def _at(patch: pytest.MonkeyPatch, moment: Moment, wanted: Path, happens: Callable[[Path], object]) -> list[Path]:
    """Lets something happen to a checkpoint, once, before a call that is about it; what it happened to."""
    owner, name, then = moment
    call, done = getattr(owner, name), []

    def hooked(path: Path, *more: Any, **options: Any) -> Any:
        if not done and wanted in (path, path.parent):
            done.append(wanted)
            happens(wanted)
            then(path)
        return call(path, *more, **options)

    patch.setattr(owner, name, hooked)
    return done


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("words", ["ls", "ls --verify", "verify", "prune --keep 2"])
def test_what_is_deleted_while_it_is_read_is_left_out(
    steps: list[Path], monkeypatch: pytest.MonkeyPatch, moment: str, words: str
) -> None:
    """Of `prune` the newest one is, which another process must then have deleted; it goes on with the others."""
    if words.startswith("prune") and moment == "after all":
        return
    wanted = steps[2] if words.startswith("prune") else steps[0]
    done = _at(monkeypatch, MOMENTS[moment], wanted, delete)
    name, *options = words.split()
    said = command("checkpoint", name, _run_of(wanted), *options)
    assert done
    assert said.code == 0, said.text
    assert "DAMAGED" not in said.text
    assert "UNREADABLE" not in said.text
    if name == "ls":
        assert [line.split()[0] for line in said.text.splitlines()[1:]] == ["2", "3"]
    elif name == "verify":
        assert said.text.splitlines() == [f"{steps[0]}: deleted meanwhile", *(f"{step}: verified" for step in steps[1:])]
    else:
        assert said.text == ""
        assert complete(wanted.parent) == steps[:2]


def test_prune_goes_on_where_another_process_has_deleted_one(steps: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    moment = (checkpoint_folder, "read_state", lambda _: delete(steps[1]))
    assert _at(monkeypatch, moment, steps[2], lambda _: None) == []
    said = command("checkpoint", "prune", _run_of(steps[0]), "--keep", "1")
    assert (said.code, said.text) == (0, f"deleted {steps[0]} (a newer one is right)\n")
    assert complete(steps[0].parent) == steps[2:]


@pytest.mark.parametrize("words", ["ls", "prune --keep 1"])
def test_where_all_are_deleted_the_newer_ones_count(steps: list[Path], monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    def goes_on(_: Path) -> None:
        for step in steps:
            delete(step)
        engine: Any = OneRank()
        save(steps[0].parent, engine, make_state(9), keep=3)

    first = steps[2] if words.startswith("prune") else steps[0]
    _at(monkeypatch, MOMENTS["before its manifest"], first, goes_on)
    name, *options = words.split()
    said = command("checkpoint", name, _run_of(first), *options)
    assert said.code == 0, said.text
    if name == "ls":
        assert [line.split()[0] for line in said.text.splitlines()[1:]] == ["9"]
    assert [path.name for path in complete(first.parent)] == ["step-00000009"]


def test_what_is_saved_again_while_it_is_read_is_read_again(steps: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As a roll-back does: the files of one and the manifest of the other do not fit."""
    engine: Any = OneRank()
    done = _at(monkeypatch, MOMENTS["before its files"], steps[2], lambda step: save(step.parent, engine, make_state(3), keep=3))
    assert problems(steps[2]) == []
    assert done


def test_one_that_is_not_there_is_gone(steps: list[Path]) -> None:
    assert delete(steps[0])
    assert not delete(steps[0])
    with pytest.raises(GoneError, match="deleted meanwhile"):
        problems(steps[0])


def test_what_cannot_be_opened_is_told_as_the_system_says_it(steps: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors says of every file that it cannot open that there is none."""
    wanted, opened = steps[0] / TENSORS, Path.open

    def refuse(path: Path, *more: Any, **options: Any) -> Any:
        if path == wanted:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *more, **options)

    def lie(path: Path, **options: Any) -> Any:
        if path == wanted:
            raise FileNotFoundError(f"No such file or directory: {path}")
        return safe_open(path, **options)

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(checkpoint_folder, "safe_open", lie)
    assert [type(problem) for problem in problems(steps[0], content=False)] == [UnreadableError]
    said = command("checkpoint", "ls", _run_of(wanted.parent))
    assert said.code == 2
    assert f"error: {wanted}: cannot be read: Permission denied\n" in said.text


def test_want_of_memory_says_nothing_of_a_checkpoint(steps: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, **_: Any) -> Any:
        raise RuntimeError(f"unable to mmap 400 bytes from file <{path}>: Cannot allocate memory (12)")

    manifest = read_manifest(steps[0])
    monkeypatch.setattr(checkpoint_folder, "safe_open", fail)
    with pytest.raises(RuntimeError, match="Cannot allocate memory"):
        Pieces(steps[0], manifest)


@pytest.mark.parametrize("link", [False, True])
def test_what_has_taken_the_name_of_a_checkpoint_makes_way(steps: list[Path], link: bool) -> None:
    *_, third = steps
    temporary = third.rename(third.with_name(f"{third.name}.tmp"))
    if link:
        third.symlink_to("nowhere")
    else:
        third.write_text("")
    publish(temporary, third)
    assert damage(third) == []
    assert sorted(path.name for path in third.parent.iterdir()) == [step.name for step in steps]
