from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from longtrain.errors import CheckpointError
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import MOMENTS
from longtrain.train import checkpoint
from longtrain.train.checkpoint import load, save
from longtrain.train.checkpoint_folder import find_latest, read_master, remove_leftovers, verify
from longtrain.train.checkpoint_format import Manifest, write_manifest
from longtrain.train.snapshot import header_of, write_tensors
from tests.distributed import run_ranks
from tests.one_rank import OneRank, make_state
from tests.toy import assemble, digest, loss_of, make_engine, owned, train

FIRST, ALL = range(3), range(6)
FP32 = [{"stage": stage, "accumulation": a} for stage in range(4) for a in (1, 2)]
BF16 = [{"stage": stage, "accumulation": stage % 2 + 1, "precision": "bf16", "grad_clip": 0.5} for stage in (1, 2, 3)]
OFFLOAD = [{"stage": stage, "precision": "bf16", "offload": "cpu"} for stage in (1, 2, 3)]
CASES: list[dict[str, Any]] = [*FP32, *BF16, *OFFLOAD]


def _folder(base: str, world: int, index: int) -> Path:
    return Path(base) / f"world{world}-{index}"


def _save_all(ctx: ParallelContext, base: str) -> list[Any]:
    """For every case: digests after 3 and after 6 straight steps, and what was saved after 3."""
    seen: list[Any] = []
    for index, case in enumerate(CASES):
        engine = make_engine(ctx, **case)
        train(engine, FIRST)
        # Saving must not change training either.
        save(_folder(base, ctx.world, index), engine, make_state(3), keep=1)
        middle, held = digest(engine), owned(engine)
        train(engine, range(3, 6))
        seen.append((middle, digest(engine), held, loss_of(engine)))
        engine.close()
    seen.append(_failing_save(ctx, base))
    return seen


def _failing_save(ctx: ParallelContext, base: str) -> list[str]:
    """The last rank cannot write: all ranks learn it, and the earlier checkpoint is still the latest."""
    engine = make_engine(ctx, stage=1)
    folder = Path(base) / f"failing{ctx.world}"
    save(folder, engine, make_state(0), keep=1)
    with pytest.MonkeyPatch.context() as patch:
        if ctx.rank == ctx.world - 1:

            def full(*arguments: Any) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr(checkpoint, "write_tensors", full)
        with pytest.raises(CheckpointError) as caught:
            save(folder, engine, make_state(1), keep=1)
    latest = find_latest(folder)
    engine.close()
    return [str(caught.value), latest.name if latest else "none"]


def _load_all(ctx: ParallelContext, base: str) -> list[Any]:
    """For every case, in processes that never trained before: load, go on, and the controls that must differ."""
    seen: list[Any] = []
    for index, case in enumerate(CASES):
        engine = make_engine(ctx, **case)
        state = load(_folder(base, ctx.world, index), engine)
        middle = digest(engine)
        train(engine, range(3, 6))
        seen.append((state, middle, digest(engine), loss_of(engine)))
        engine.close()
    controls = {}
    for index, forget in ((0, "exp_avg"), (2, "exp_avg_sq"), (4, "step"), (6, "exp_avg")):
        engine = make_engine(ctx, **CASES[index])
        load(_folder(base, ctx.world, index), engine)
        if forget == "step":
            engine.set_adam_steps(dict.fromkeys(engine.parameters(), 0))
        else:
            for piece in engine.held_ranges():
                piece.tensors[forget].zero_()
        train(engine, range(3, 6))
        controls[index] = digest(engine)
        engine.close()
    seen.append(controls)
    return seen


def _load_foreign(ctx: ParallelContext, base: str, world: int) -> list[Any]:
    """Load what `world` ranks saved into every fp32 and bf16 stage; what each rank then owns, and the loss three steps later."""
    seen = []
    for source, target in FOREIGN:
        case: dict[str, Any] = CASES[target] | {"accumulation": 1}
        engine = make_engine(ctx, **case)
        load(_folder(base, world, source), engine)
        held = owned(engine)
        steps = set(engine.adam_steps().values())
        train(engine, range(3, 6))
        seen.append((held, steps, loss_of(engine)))
        engine.close()
    return seen


# Indices into CASES: fp32 stages 0-3, then a bf16 checkpoint into another bf16 stage.
FOREIGN = [(2 * a, 2 * b) for a in range(4) for b in range(4)] + [(8, 9), (9, 10), (10, 8)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[int, Any]]:
    base = str(tmp_path_factory.mktemp("checkpoints"))
    return base, {world: run_ranks(_save_all, world, base, timeout=150) for world in (1, 2)}


@pytest.mark.parametrize("world", [1, 2])
def test_resuming_in_new_processes_is_bitwise(saved: tuple[str, dict[int, Any]], world: int) -> None:
    base, straight = saved
    resumed = run_ranks(_load_all, world, base, timeout=150)
    for rank in range(world):
        for index, case in enumerate(CASES):
            middle, end, _, loss = straight[world][rank][index]
            state, middle_again, end_again, loss_again = resumed[rank][index]
            assert middle == middle_again, case
            assert end == end_again, case
            assert loss == loss_again, case
            assert (state.step, state.tokens, state.cursor, state.tracker) == (3, 3000, 12, "run-1")
            assert state.recipe_sha256 == make_state(0).recipe_sha256
            assert set(state.versions) == {"longtrain", "torch", "deepspeed", "safetensors"}
        for index, control in resumed[rank][-1].items():
            assert control != straight[world][rank][index][1], f"forgetting state changed nothing: {CASES[index]}"


@pytest.mark.parametrize(("world", "other"), [(1, 2), (2, 1)])
def test_any_world_and_stage_loads_any_other(saved: tuple[str, dict[int, Any]], world: int, other: int) -> None:
    base, straight = saved
    ranks = run_ranks(_load_foreign, world, base, other, timeout=150)
    for index, (source, target) in enumerate(FOREIGN):
        case = (CASES[source], CASES[target])
        held, steps, losses = zip(*(rank[index] for rank in ranks), strict=True)
        assert steps == ({3},) * world
        before = [straight[other][rank][source][2] for rank in range(other)]
        for kind in ("master", *MOMENTS):
            whole, wanted = assemble(list(held), kind), assemble(before, kind)
            assert whole.keys() == wanted.keys()
            for name in whole:
                assert torch.equal(whole[name], wanted[name]), (case, kind, name)
        low = "precision" in CASES[source]
        assert losses[0] == pytest.approx(straight[other][0][source][3], rel=0.02 if low else 1e-5), case


def test_a_rank_that_cannot_write_stops_all(saved: tuple[str, dict[int, Any]]) -> None:
    for world, ranks in saved[1].items():
        for rank in ranks:
            message, latest = rank[-1]
            assert "No space left on device" in message
            assert message.startswith("rank 1: ") == (world == 2)
            assert latest == "step-00000000"


def test_read_master_gives_whole_parameters_from_two_ranks(saved: tuple[str, dict[int, Any]]) -> None:
    base, straight = saved
    for index, case in enumerate(CASES):
        wanted = assemble([rank[index][2] for rank in straight[2]], "master")
        found = dict(read_master(_folder(base, 2, index)))
        assert found.keys() == wanted.keys(), case
        assert found["embedding.weight"].shape == (11, 7)
        assert all(torch.equal(found[name].flatten(), wanted[name]) for name in wanted), case


@pytest.fixture
def engine() -> Any:
    return OneRank()


def test_save_and_load_are_inverse(tmp_path: Path, engine: Any) -> None:
    path = save(tmp_path / "deep" / "run", engine, make_state(12), keep=2)
    assert path.name == "step-00000012"
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "rank-00000.safetensors", "state.json"]
    other = OneRank()
    other.scaler = None
    state = load(tmp_path / "deep" / "run", other)  # type: ignore[arg-type]
    assert state == make_state(12, scaler=engine.scaler, versions=state.versions)
    assert other.steps == engine.steps
    assert other.scaler == {"cur_scale": 65536.0, "cur_iter": 7}
    assert other.refreshed
    for name, tensors in engine.values.items():
        assert all(torch.equal(value, other.values[name][kind]) for kind, value in tensors.items())


def test_files_are_plain_safetensors(tmp_path: Path, engine: Any) -> None:
    path = save(tmp_path, engine, make_state(1), keep=1)
    with safe_open(path / "rank-00000.safetensors", framework="pt") as file:
        assert set(file.keys()) == {f"{k}/{n}@{s}" for k in ("master", *MOMENTS) for n in "ab" for s in (0, 4)}
        assert torch.equal(file.get_tensor("exp_avg/b@4"), engine.values["b"]["exp_avg"][4:])


def test_a_rank_that_owns_nothing_writes_an_empty_file(tmp_path: Path) -> None:
    entry = write_tensors(tmp_path / "rank-00000.safetensors", header_of([]), [])
    with safe_open(tmp_path / "rank-00000.safetensors", framework="pt") as file:
        assert list(file.keys()) == []
    assert entry.size == (tmp_path / "rank-00000.safetensors").stat().st_size


def test_keep_and_leftovers(tmp_path: Path, engine: Any) -> None:
    for step in (1, 2, 30, 4):
        save(tmp_path, engine, make_state(step), keep=2)
    # 4 was just written, and stays although two later steps exist.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000030"]
    latest = find_latest(tmp_path)
    assert latest is not None
    assert latest.name == "step-00000030"
    (tmp_path / "step-00000099.tmp").mkdir()
    (tmp_path / "step-00000098").touch()
    (tmp_path / "step-00000097.damaged").mkdir()
    assert find_latest(tmp_path) == latest
    remove_leftovers(tmp_path)
    assert not (tmp_path / "step-00000099.tmp").exists()
    assert find_latest(tmp_path / "nowhere") is None
    with pytest.raises(CheckpointError, match="keep at least 1"):
        save(tmp_path, engine, make_state(5), keep=0)


def test_saving_a_step_again_replaces_it(tmp_path: Path, engine: Any) -> None:
    save(tmp_path, engine, make_state(7), keep=1)
    engine.values["a"]["master"].fill_(3.0)
    path = save(tmp_path, engine, make_state(7), keep=1)
    assert dict(read_master(path))["a"].tolist() == [[3.0] * 3] * 2
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-00000007"]


def test_order_of_writing(tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are synced before the manifest exists, everything before the rename, the parent after it."""
    events: list[str] = []
    sync, rename = os.fsync, Path.rename

    def spy_sync(descriptor: int) -> None:
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def spy_rename(self: Path, target: Path) -> Path:
        events.append("rename " + self.name)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", spy_sync)
    monkeypatch.setattr(Path, "rename", spy_rename)
    save(tmp_path, engine, make_state(1), keep=1)
    assert events == [
        "sync rank-00000.safetensors",
        "sync state.json",
        "sync manifest.json",
        "sync step-00000001.tmp",
        "rename step-00000001.tmp",
        f"sync {tmp_path.name}",
    ]


@pytest.mark.parametrize("moment", ["sync", "rename"])
def test_a_failed_save_leaves_the_last_checkpoint(
    tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    save(tmp_path, engine, make_state(1), keep=1)

    def fail(*arguments: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail) if moment == "sync" else patch.setattr(Path, "rename", fail)
        with pytest.raises(CheckpointError, match="Input/output error"):
            save(tmp_path, engine, make_state(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"], "what is half written would only fill the disk"
    assert find_latest(tmp_path) == tmp_path / "step-00000001"
    verify(tmp_path)
    save(tmp_path, engine, make_state(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def _edit(path: Path, **fields: Any) -> None:
    """A manifest that is signed anew where it still is one."""
    changed = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(changed))
    with contextlib.suppress(ValidationError):
        write_manifest(path, Manifest.model_validate(changed))


def _drop_range(path: Path) -> None:
    """A well-formed checkpoint, digests and all, that lacks the end of one moment."""
    file = path / "rank-00000.safetensors"
    with safe_open(file, framework="pt") as handle:
        tensors: dict[str, Tensor] = {key: handle.get_tensor(key).clone() for key in handle.keys()}  # noqa: SIM118
    del tensors["exp_avg_sq/b@4"]
    entry = write_tensors(file, header_of(list(tensors.items())), tensors.values())
    files = json.loads((path / "manifest.json").read_text())["files"]
    _edit(path / "manifest.json", files=files | {file.name: entry.model_dump()})


DAMAGE = {
    "bit": (lambda p: _flip(p / "rank-00000.safetensors"), r"rank-00000\.safetensors: SHA-256 differs"),
    "state bit": (lambda p: _flip(p / "state.json"), r"state\.json: SHA-256 differs"),
    "cut": (lambda p: os.truncate(p / "rank-00000.safetensors", 99), r"rank-00000\.safetensors: 99 bytes instead of \d+"),
    "gone": (lambda p: (p / "rank-00000.safetensors").unlink(), r"rank-00000\.safetensors: missing"),
    "manifest cut": (lambda p: os.truncate(p / "manifest.json", 40), r"manifest\.json: .*truncated"),
    "manifest of another": (lambda p: (p / "manifest.json").write_text("[1]"), r"manifest\.json: "),
    "version": (lambda p: _edit(p / "manifest.json", version=1), r"manifest\.json: version: "),
    "unknown field": (lambda p: _edit(p / "manifest.json", more=1), r"manifest\.json: more: "),
    "range": (_drop_range, r"elements 4 to 6 of exp_avg_sq of parameter b are in none"),
    "manifest gone": (lambda p: (p / "manifest.json").unlink(), r"manifest\.json: missing; the checkpoint is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_named(tmp_path: Path, engine: Any, kind: str) -> None:
    damage, message = DAMAGE[kind]
    path = save(tmp_path, engine, make_state(1), keep=1)
    verify(path)
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        verify(path)
    with pytest.raises(CheckpointError, match=message):
        load(path, engine)
    if kind != "range":
        with pytest.raises(CheckpointError, match=message):
            list(read_master(path))


def test_files_outside_the_folder_are_refused(tmp_path: Path, engine: Any) -> None:
    path = save(tmp_path, engine, make_state(1), keep=1)
    files = json.loads((path / "manifest.json").read_text())["files"]
    _edit(path / "manifest.json", files=files | {"../../rank-00000.safetensors": files["state.json"]})
    with pytest.raises(CheckpointError, match=r"field files is not that of a checkpoint: \.\./"):
        verify(path)


def _load_apart(ctx: ParallelContext, steps: list[str]) -> str:
    """What a rank says that reads a folder of its own."""
    engine: Any = OneRank()
    engine.ctx = ctx
    with pytest.raises(CheckpointError) as refusal:
        load(Path(steps[ctx.rank]), engine)
    assert not engine.refreshed
    return str(refusal.value)


def test_ranks_that_read_different_checkpoints_are_refused(tmp_path: Path, engine: Any) -> None:
    steps = [save(tmp_path, engine, make_state(step), keep=2) for step in (1, 2)]
    other = save(tmp_path / "other", engine, make_state(1, loss=2.0), keep=2)
    for second, read in ((steps[1], "step 2"), (other, "step 1")):
        first, last = run_ranks(_load_apart, 2, [str(steps[0]), str(second)])
        for said in (first, last):
            assert f"rank 1 read another checkpoint than rank 0: {read}, manifest " in said


def test_a_scaler_without_a_field_is_refused(tmp_path: Path) -> None:
    class Strict(OneRank):
        def set_scaler_state(self, state: dict[str, int | float] | None) -> None:
            assert state is not None
            self.scaler = {"cur_scale": state["cur_scale"], "cur_hysteresis": state["cur_hysteresis"]}

    engine: Any = Strict()
    path = save(tmp_path, engine, make_state(1), keep=1)
    with pytest.raises(CheckpointError, match=r"state\.json: scaler: lacks 'cur_hysteresis'"):
        load(path, engine)


@pytest.mark.parametrize("names", [("a",), ("a", "b", "c")])
def test_another_model_is_refused(tmp_path: Path, engine: Any, names: tuple[str, ...]) -> None:
    path = save(tmp_path, engine, make_state(1), keep=1)
    with pytest.raises(CheckpointError, match=r"parameter [bc] is .* checkpoint of another model"):
        load(path, OneRank(names))  # type: ignore[arg-type]
