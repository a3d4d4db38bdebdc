"""Which checkpoint a run goes on from where newer ones cannot be loaded, and that it says so."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from longtrain.errors import CheckpointError
from longtrain.parallel.context import ParallelContext
from longtrain.plan import make_plan
from longtrain.train import checkpoint
from longtrain.train.assemble import open_data
from longtrain.train.checkpoint import check_together
from longtrain.train.checkpoint_folder import complete, damage, problems
from longtrain.train.checkpoint_format import (
    MANIFEST,
    STATE,
    OtherVersionError,
    UnreadableError,
    read_manifest,
    read_state,
)
from longtrain.train.resume import CHECKPOINTS, choose, confirm
from tests.chain import TENSORS, Chain, rewrite, sign
from tests.distributed import run_ranks
from tests.tiny import tiny_recipe, write_corpus


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "data", 7)


def _flip(step: Path) -> None:
    content = (step / TENSORS).read_bytes()
    (step / TENSORS).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])


def _misshape(step: Path) -> None:
    parameters = json.loads((step / MANIFEST).read_text())["parameters"]
    parameters["a"]["shape"] = [2, 4]
    sign(step, parameters=parameters)


def _holding(name: str, values: Tensor) -> Callable[[Path], None]:
    return rewrite(save({name: values}))


SIGNED: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (rewrite(b""), f"{TENSORS}: not readable"),
    "header": (rewrite(b"\xff" * 64), f"{TENSORS}: not readable"),
    "no range": (_holding("a", torch.ones(6)), f"{TENSORS}: tensor 'a' is not a flat fp32 range of a parameter"),
    "endless place": (_holding(f"master/a@{'9' * 5000}", torch.ones(6)), "is not a flat fp32 range of a parameter"),
    "number": (_holding("master/a@0", torch.tensor(1.0)), f"{TENSORS}: tensor 'master/a@0' is not a flat fp32 range"),
    "half": (_holding("master/a@0", torch.ones(6).half()), f"{TENSORS}: tensor 'master/a@0' is not a flat fp32 range"),
    "place": (_holding("master/a@9", torch.ones(6)), "elements 0 to 6 of master of parameter a are in none of its files"),
    "hole": (_holding("master/a@0", torch.ones(4)), "elements 4 to 6 of master of parameter a are in none of its files"),
    "shape": (_misshape, f"{MANIFEST}: parameter a of shape [2, 4] cannot have 6 elements"),
}


@pytest.mark.parametrize("what", SIGNED)
def test_what_is_signed_and_cannot_be_loaded_is_passed_over(tmp_path: Path, data: Path, what: str) -> None:
    change, message = SIGNED[what]
    chain = Chain(tmp_path / "run", data)
    *_, second, third = chain.steps
    assert chain.start().checkpoint == third
    change(third)
    assert message in damage(third)[0]
    with pytest.raises(CheckpointError) as refusal:
        check_together(chain.engine.ctx, third)
    assert message in str(refusal.value)
    start = chain.start()
    assert start.checkpoint == second
    assert start.damaged == (third,)
    assert start.remarks[0].startswith(f"WARNING: passed over {third.name}: {third}")
    assert message in start.remarks[0]
    assert start.remarks[1] == f"resuming {second} (step 2)"
    with pytest.raises(CheckpointError) as refusal:
        chain.start(str(third))
    assert message in str(refusal.value), "one asked for by name is refused"


def test_where_all_are_damaged_nothing_begins_anew(tmp_path: Path, data: Path) -> None:
    chain = Chain(tmp_path / "run", data)
    first, second, third = chain.steps
    _flip(third)
    SIGNED["header"][0](second)
    (first / TENSORS).unlink()
    with pytest.raises(CheckpointError, match="every checkpoint of this run is damaged") as refusal:
        chain.start()
    lines = str(refusal.value).splitlines()[1:4]
    found = [line.strip().split(": ")[:2] for line in lines]
    reasons = ["SHA-256 differs from the manifest; the checkpoint is damaged", "not readable", "missing; the checkpoint is damaged"]
    assert [file for file, _ in found] == [str(step / TENSORS) for step in (third, second, first)]
    assert all(reason.startswith(start) for (_, reason), start in zip(found, reasons, strict=True))


def test_a_checkpoint_without_its_manifest_is_damaged(tmp_path: Path, data: Path) -> None:
    chain = Chain(tmp_path / "run", data)
    first, second, third = chain.steps
    (third / MANIFEST).unlink()
    start = chain.start()
    assert (start.checkpoint, start.damaged) == (second, (third,))
    assert start.remarks[0].startswith(f"WARNING: passed over {third.name}: {third / MANIFEST}: missing; the checkpoint is damaged")
    assert damage(third)[0].startswith(f"{third / MANIFEST}: missing")
    for step in (first, second):
        (step / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="every checkpoint of this run is damaged"):
        chain.start()
    with pytest.raises(CheckpointError, match="holds checkpoints of an earlier run"):
        chain.start("never")


def test_damage_comes_before_another_recipe(tmp_path: Path, data: Path) -> None:
    chain = Chain(tmp_path / "run", data, "optimizer.lr=0.5")
    *_, second, third = chain.steps
    for wanted in ("auto", str(third)):
        with pytest.raises(CheckpointError, match="is a checkpoint of another recipe"):
            chain.start(wanted)
    assert chain.start(force=True).checkpoint == third
    _flip(third)
    start = chain.start()
    assert start.checkpoint == second
    assert start.remarks[0].startswith(f"WARNING: passed over {third.name}: {third / TENSORS}: SHA-256 differs")
    assert chain.start(force=True).checkpoint == second
    with pytest.raises(CheckpointError, match=f"{TENSORS}: SHA-256 differs"):
        chain.start(str(third))


@contextmanager
def _failing(patched: tuple[object, str], wanted: Path, code: int) -> Iterator[None]:
    """A call that fails where it is about one path."""
    owner, name = patched
    call = getattr(owner, name)

    def fail(path: Any, *more: Any, **options: Any) -> Any:
        if Path(path) == wanted:
            raise OSError(code, os.strerror(code), str(path))
        return call(path, *more, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, fail)
        yield


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path, data: Path, code: int) -> None:
    chain = Chain(tmp_path / "run", data)
    folder = tmp_path / "run" / CHECKPOINTS
    for wanted in ("auto", "never", str(folder)):
        with _failing((os, "scandir"), folder, code), pytest.raises(UnreadableError, match="cannot be listed") as refusal:
            chain.start(wanted)
        assert str(folder) in str(refusal.value)
    assert complete(tmp_path / "none") == []
    assert complete(chain.steps[0] / TENSORS) == [], "a file"


@pytest.mark.parametrize(
    ("patched", "name", "code"),
    [((Path, "stat"), TENSORS, errno.EIO), ((Path, "stat"), STATE, errno.ESTALE), ((Path, "read_bytes"), MANIFEST, errno.EACCES)],
)
def test_what_cannot_be_read_is_passed_over_and_not_called_damaged(
    tmp_path: Path, data: Path, patched: tuple[object, str], name: str, code: int
) -> None:
    chain = Chain(tmp_path / "run", data)
    *_, second, third = chain.steps
    with _failing(patched, third / name, code):
        start = chain.start()
        assert [type(problem) for problem in problems(third)] == [UnreadableError]
        with pytest.raises(CheckpointError, match="cannot be read"):
            chain.start(str(third))
    assert (start.checkpoint, start.damaged) == (second, (third,))
    assert start.remarks[0] == f"WARNING: passed over {third.name}: {third / name}: cannot be read: {os.strerror(code)}"


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(tmp_path: Path, data: Path) -> None:
    chain = Chain(tmp_path / "run", data)
    _, second, third = chain.steps
    copy = third.with_name("step-00000009")
    shutil.copytree(second, copy)
    reason = f"{copy / MANIFEST}: is of step 2, and its folder, step-00000009, was copied or renamed"
    start = chain.start()
    assert (start.checkpoint, start.damaged) == (third, (copy,))
    assert start.remarks[0].startswith(f"WARNING: passed over {copy.name}: {reason}; the checkpoint is damaged")
    assert damage(copy)[0].startswith(reason)
    with pytest.raises(CheckpointError, match="was copied or renamed"):
        chain.start(str(copy))
    for name in ("step-00000003.replaced", "best"):
        third = third.rename(third.with_name(name))
        assert damage(third) == []


def _future_state(step: Path) -> None:
    """A state.json with a field that this version does not know, rightly signed."""
    rewrite(json.dumps(json.loads((step / STATE).read_text()) | {"novelty": 1}).encode(), STATE)(step)


def _future_manifest(step: Path) -> None:
    """A manifest of a version to come, which signs as this one."""
    text = (step / MANIFEST).read_text().replace('"version": 2', '"version": 3').encode()
    own = json.loads(text)["sha256"].encode()
    digest = hashlib.sha256(text.replace(own, b"0" * 64, 1)).hexdigest()
    (step / MANIFEST).write_bytes(text.replace(own, digest.encode(), 1))


def _past_manifest(step: Path) -> None:
    """A manifest of version 1, which had no digest of its own."""
    fields = json.loads((step / MANIFEST).read_text()) | {"version": 1}
    del fields["sha256"]
    (step / MANIFEST).write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("change", "field"), [(_future_state, "novelty"), (_future_manifest, "version"), (_past_manifest, "version")]
)
def test_one_of_another_version_is_refused_and_not_set_aside(
    tmp_path: Path, data: Path, change: Callable[[Path], None], field: str
) -> None:
    chain = Chain(tmp_path / "run", data)
    third = chain.steps[-1]
    change(third)
    assert [type(problem) for problem in problems(third)] == [OtherVersionError]
    for wanted in ("auto", str(third)):
        with pytest.raises(OtherVersionError, match=f"{field}: .*another version of longtrain wrote this checkpoint"):
            chain.start(wanted)
    # not as it was written, it is damaged
    name = STATE if change is _future_state else MANIFEST
    (third / name).write_bytes((third / name).read_bytes()[:-9])
    assert chain.start().damaged == (third,)


def test_a_checkpoint_from_before_runs_told_where_they_began(tmp_path: Path, data: Path) -> None:
    third = Chain(tmp_path / "run", data).steps[-1]
    fields = json.loads((third / STATE).read_text())
    assert fields.pop("origin") is None
    rewrite(json.dumps(fields).encode(), STATE)(third)
    assert damage(third) == []
    assert read_state(third).origin is None
    assert read_manifest(third).step == 3


def _confirm(ctx: ParallelContext, overrides: tuple[str, ...], unreadable: Path) -> tuple[str, bool]:
    """The checkpoint that a rank goes on from, where the last one cannot read a file once the ranks have met, and whether it tells
    the reasons."""
    recipe = tiny_recipe(*overrides)
    start = choose(recipe, open_data(make_plan(recipe, 1, "cpu"))[0], "auto")
    if ctx.is_main:
        return _told(confirm(ctx, start))
    with _failing((Path, "read_bytes"), unreadable, errno.EIO):
        return _told(confirm(ctx, start))


def _told(start: Any) -> tuple[str, bool]:
    return start.checkpoint.name, len(start.remarks) > 1


def test_ranks_go_on_from_the_same_one_also_where_one_of_them_cannot_read(tmp_path: Path, data: Path) -> None:
    chain = Chain(tmp_path / "run", data)
    first, second, third = chain.steps
    _flip(third)
    results = run_ranks(_confirm, 2, chain.overrides, second / MANIFEST)
    assert [name for name, _ in results] == [first.name] * 2
    assert results[0][1], "the main rank says what was passed over"


def _sees(ctx: ParallelContext, overrides: tuple[str, ...], at: int, unreadable: Path) -> tuple[str | None, str]:
    """The checkpoint that a rank goes on from, or why it refuses, where rank `at` cannot read a file before the ranks have met."""
    recipe = tiny_recipe(*overrides)
    split = open_data(make_plan(recipe, 1, "cpu"))[0]
    with _failing((Path, "read_bytes"), unreadable, errno.EIO) if ctx.rank == at else nullcontext():
        start = choose(recipe, split, "auto")
    try:
        found = confirm(ctx, start).checkpoint
    except CheckpointError as error:
        return None, str(error)
    return (None if found is None else found.name), ""


def test_the_main_rank_chooses_also_before_the_ranks_have_met(tmp_path: Path, data: Path) -> None:
    """Another one that reads less follows; so does one that reads what the main rank has passed over."""
    chain = Chain(tmp_path / "run", data)
    _, second, third = chain.steps
    for at, name in ((1, third.name), (0, second.name)):
        assert run_ranks(_sees, 2, chain.overrides, at, third / MANIFEST) == [(name, "")] * 2


def _hidden(ctx: ParallelContext, overrides: tuple[str, ...], hidden: list[str]) -> str:
    """What a rank says where these checkpoints do not appear in the main rank's listing."""
    recipe = tiny_recipe(*overrides)
    split = open_data(make_plan(recipe, 1, "cpu"))[0]
    with pytest.MonkeyPatch.context() as patch:
        if ctx.is_main:
            seen = lambda folder: [path for path in complete(folder) if path.name not in hidden]  # noqa: E731
            patch.setattr("longtrain.train.resume.complete", seen)
        start = choose(recipe, split, "auto")
    with pytest.raises(CheckpointError) as refusal:
        confirm(ctx, start)
    return str(refusal.value)


@pytest.mark.parametrize("count", [1, 3])
def test_what_the_main_rank_does_not_see_is_not_written_over(tmp_path: Path, data: Path, count: int) -> None:
    """As in a stale listing of a network file system: the newest one, or all, which would be a start from step 0."""
    chain = Chain(tmp_path / "run", data)
    hidden = [path.name for path in chain.steps[-count:]]
    for said in run_ranks(_hidden, 2, chain.overrides, hidden):
        assert said.startswith(f"{chain.steps[-1]}: rank 1 sees this checkpoint, and rank 0 does not; ")


@pytest.mark.parametrize("trouble", [MemoryError("no memory"), RuntimeError("can't start new thread")])
def test_trouble_of_a_process_is_no_damage(tmp_path: Path, data: Path, trouble: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain(tmp_path / "run", data)

    def fail(*_: Any, **__: Any) -> None:
        raise trouble

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "check_files", fail)
        with pytest.raises(CheckpointError, match=f"{type(trouble).__name__}: {trouble}"):
            chain.start()
    assert chain.start().checkpoint == chain.steps[-1]


def test_what_holds_for_any_checkpoint_is_said_of_an_earlier_one(tmp_path: Path, data: Path) -> None:
    chain = Chain(tmp_path / "run", data)
    _flip(chain.steps[-1])
    start = replace(choose(chain.recipe, chain.split, "auto"), notes=("each ring reaches over hosts",))
    found = confirm(chain.engine.ctx, start)
    assert (found.checkpoint, found.notes) == (chain.steps[1], start.notes)
