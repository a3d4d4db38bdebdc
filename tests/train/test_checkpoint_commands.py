"""`longtrain checkpoint`: what a person sees of checkpoints, and what they can do to them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from longtrain.cli.train import _say_interrupted
from longtrain.train.checkpoint_folder import complete, damage, verify
from longtrain.train.checkpoint_format import FileEntry, read_manifest, read_state, write_manifest
from longtrain.train.tracking import METRICS_FILE, read_metrics
from tests.user import CHECKPOINT, REPOSITORY, command, process, snapshot, train

pytest_plugins = ("tests.desks",)
pytestmark = pytest.mark.usefixtures("trained")

FOLDER = CHECKPOINT.parent
OLDER = FOLDER / "step-00000002"
TENSORS = "rank-00000.safetensors"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("path", ["run", "run/checkpoints"])
def test_ls(path: str) -> None:
    said = command("checkpoint", "ls", path)
    assert said.code == 0, said.text
    head, second, third = said.text.splitlines()
    assert head.split() == ["step", "tokens", "loss", "size", "ranks", "ZeRO", "state"]
    losses = [f"{row['loss']:.4f}" for row in read_metrics(Path("run", METRICS_FILE))]
    assert second.split()[:3] == ["2", "256", losses[1]]
    assert third.split()[:3] == ["3", "384", losses[2]]
    assert "MiB" in third
    assert "whole, not verified" in third
    assert command("checkpoint", "ls", str(CHECKPOINT), "--verify").text.splitlines()[1].rstrip().endswith("  verified")
    Path("run", METRICS_FILE).unlink()
    assert command("checkpoint", "ls", path).text == said.text, "a checkpoint knows its loss"


def test_ls_shows_what_is_torn_at_once_and_what_is_changed_when_it_reads() -> None:
    flip(OLDER / TENSORS)
    with (CHECKPOINT / "state.json").open("ab") as file:
        file.truncate(30)
    said = command("checkpoint", "ls", "run")
    assert said.code == 2
    older, newer, reason, advice = said.text.splitlines()[1:]
    assert "whole, not verified" in older
    assert newer.split() == ["step-00000003", "DAMAGED"]
    assert reason.startswith(f"error: {CHECKPOINT}/state.json: 30 bytes instead of")
    assert "longtrain checkpoint prune" in advice
    said = command("checkpoint", "ls", "run", "--verify")
    assert said.code == 2
    older, newer, *reasons = said.text.splitlines()[1:]
    assert older.split()[-1] == newer.split()[-1] == "DAMAGED"
    assert reasons[0] == f"error: {OLDER}/{TENSORS}: SHA-256 differs from the manifest"
    assert len(reasons) == 3, "one line for each file, and one of advice"


def test_verify() -> None:
    said = command("checkpoint", "verify", "run")
    assert said.code == 0
    assert said.text.splitlines() == [f"{OLDER}: verified", f"{CHECKPOINT}: verified"]
    flip(OLDER / TENSORS)
    said = command("checkpoint", "verify", "run")
    assert said.code == 2
    assert f"{OLDER}: DAMAGED" in said.text
    assert f"error: {OLDER}/{TENSORS}: SHA-256 differs from the manifest" in said.text
    assert command("checkpoint", "verify", str(CHECKPOINT)).code == 0
    assert "nowhere: no such folder" in command("checkpoint", "verify", "nowhere").text


def test_a_checkpoint_without_its_manifest_is_damaged_by_its_name_too() -> None:
    (OLDER / "manifest.json").unlink()
    for words in (("ls", str(OLDER)), ("verify", str(OLDER)), ("export", str(OLDER), "--out", "out")):
        said = command("checkpoint", *words)
        assert said.code == 2
        assert f"{OLDER}/manifest.json: missing" in said.text


def test_a_recipe_that_is_not_the_manifests_is_damage() -> None:
    changed = read_manifest(CHECKPOINT).model_copy(update={"recipe_sha256": "0" * 64})
    write_manifest(CHECKPOINT / "manifest.json", changed)
    reason = f"{CHECKPOINT}/state.json: its recipe is not the one of manifest.json (recipe_sha256)"
    for words in (("checkpoint", "ls", "run"), ("checkpoint", "verify", "run")):
        said = command(*words)
        assert said.code == 2
        assert f"error: {reason}\n" in said.text
    said = train("--set", "training.steps=4")
    assert said.code == 0, said.text
    assert f"WARNING: passed over {CHECKPOINT.name}: {reason}" in said.text


def test_export_is_the_same_command() -> None:
    flip(OLDER / TENSORS)
    assert command("checkpoint", "export", "run", "--out", "one").code == 0
    assert command("export", "run", "--out", "two").code == 0
    assert snapshot(Path("one")) == snapshot(Path("two"))
    said = command("checkpoint", "export", str(OLDER), "--out", "three")
    assert said.code == 2
    assert said.text.splitlines() == [
        f"error: {OLDER}: is damaged:",
        f"  {OLDER}/{TENSORS}: SHA-256 differs from the manifest",
        f"name another checkpoint of that run; `longtrain checkpoint ls {Path.cwd()}/run --verify` says which are sound",
    ]
    assert not Path("three").exists()


def test_export_passes_over_damaged_ones_loudly() -> None:
    flip(CHECKPOINT / TENSORS)
    reason = f"{CHECKPOINT}/{TENSORS}: SHA-256 differs from the manifest"
    warning = f"WARNING: passed over {CHECKPOINT.name}: {reason}; using {OLDER.name}"
    said = command("export", "run", "--out", "one")
    assert (said.code, said.text.splitlines()) == (0, [warning, f"wrote one from {OLDER}"])
    assert command("export", str(OLDER), "--out", "two").code == 0
    assert snapshot(Path("one")) == snapshot(Path("two"))
    said = command("report", "run", "--tokens", "1")
    assert warning in said.text
    assert "sample:" in said.text
    script = process(sys.executable, str(REPOSITORY / "scripts" / "convert_checkpoint.py"), "run", "--out", "three")
    assert (script.returncode, script.stdout, script.stderr) == (0, f"wrote three from {OLDER}\n", f"{warning}\n")
    (OLDER / "manifest.json").write_text("{}")
    said = command("export", "run", "--out", "four")
    assert said.code == 2
    assert said.text.startswith(f"error: run: every checkpoint of this run is damaged:\n  {reason}\n  {OLDER}/manifest.json: ")
    assert not Path("four").exists()


def test_prune() -> None:
    third = FOLDER / "step-00000001"
    shutil.copytree(OLDER, third)
    before = snapshot()
    said = command("checkpoint", "prune", "run", "--keep", "2", "--dry-run")
    assert said.text == f"would delete {third} (2 newer ones are right)\n"
    assert snapshot() == before
    # the newest is damaged: it counts for nothing
    flip(CHECKPOINT / TENSORS)
    said = command("checkpoint", "prune", "run", "--keep", "1")
    assert said.text.splitlines() == [f"deleted {CHECKPOINT} (damaged)", f"deleted {third} (a newer one is right)"]
    assert complete(FOLDER) == [OLDER]
    verify(OLDER)
    flip(OLDER / "state.json")
    said = command("checkpoint", "prune", "run", "--keep", "1")
    assert said.code == 2
    assert "not one checkpoint is right, so that nothing was deleted" in said.text
    assert OLDER.exists()
    assert command("checkpoint", "prune", "run", "--keep", "0").code == 2


def test_what_is_no_folder_of_checkpoints() -> None:
    """Prepared data has a manifest too: nobody is to delete it."""
    Path("prepared").mkdir()
    Path("prepared/manifest.json").write_text('{"format": "longtrain-data", "version": 1}')
    said = [command("checkpoint", "ls", "prepared"), command("checkpoint", "prune", "prepared", "--keep", "1")]
    said.append(train("--resume", "prepared", "--set", "name=new"))
    for answer in said:
        assert answer.code == 2
        assert "prepared: no whole checkpoint here" in answer.text
    answer = command("checkpoint", "prune", str(OLDER), "--keep", "1")
    assert (answer.code, answer.text) == (2, f"error: {OLDER}: is one checkpoint; name the folder of its run\n")


def test_a_folder_of_checkpoints_that_cannot_be_written_to_is_refused_at_the_start() -> None:
    Path("other").mkdir()
    Path("other/checkpoints").write_text("")
    said = train("--set", "output=other")
    assert said.code == 2
    assert "other/checkpoints is not a folder; set another output" in " ".join(said.text.split())


def test_what_was_set_aside_is_listed_and_pruned() -> None:
    flip(CHECKPOINT / TENSORS)
    assert train("--set", "training.steps=4").code == 0
    aside = CHECKPOINT.with_name(f"{CHECKPOINT.name}.damaged")
    said = command("checkpoint", "ls", "run")
    size = sum(file.stat().st_size for file in aside.iterdir()) / 2**20
    assert said.code == 0
    assert f"set aside, {size:.1f} MiB: {aside.name}; `longtrain checkpoint prune` deletes" in said.text
    newest = complete(FOLDER)[-1]
    said = command("checkpoint", "prune", "run", "--keep", "1")
    assert said.text.splitlines()[-1] == f"deleted {aside} (was set aside)"
    assert [path.name for path in FOLDER.iterdir()] == [newest.name]


def future(step: Path) -> None:
    """A state.json with a field of a version to come, rightly signed."""
    state = step / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"novelty": 1}))
    entry = FileEntry(size=state.stat().st_size, sha256=hashlib.sha256(state.read_bytes()).hexdigest())
    manifest = read_manifest(step)
    write_manifest(step / "manifest.json", manifest.model_copy(update={"files": manifest.files | {"state.json": entry}}))


def test_what_another_version_wrote_is_left_alone() -> None:
    future(CHECKPOINT)
    before = snapshot()
    assert command("checkpoint", "ls", "run").text.splitlines()[2].split() == [CHECKPOINT.name, "OTHER", "VERSION"]
    said = command("checkpoint", "verify", "run")
    assert said.code == 2
    assert f"{CHECKPOINT}: OTHER VERSION" in said.text
    assert "damaged" not in said.text
    reason = f"{CHECKPOINT}/state.json: novelty: Extra inputs are not permitted; another version of longtrain wrote this checkpoint"
    assert reason in said.text
    said = train("--set", "training.steps=4")
    assert said.code == 2
    assert reason in said.text
    said = command("checkpoint", "prune", "run", "--keep", "1")
    assert (said.code, said.text) == (0, f"left {CHECKPOINT} (another version of longtrain wrote it)\n")
    assert snapshot() == before


def test_what_cannot_be_read_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refuse(path: Path, *more: Any, **options: Any) -> Any:
        if path == CHECKPOINT / TENSORS:
            raise PermissionError(13, os.strerror(13), str(path))
        return opened(path, *more, **options)

    before = snapshot()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        said = command("checkpoint", "prune", "run", "--keep", "1")
        assert (said.code, said.text) == (0, f"left {CHECKPOINT} (cannot be read, and may be right)\n")
        said = command("checkpoint", "ls", "run", "--verify")
    assert said.code == 2
    assert said.text.splitlines()[2].split()[-1] == "UNREADABLE"
    assert f"{CHECKPOINT}/{TENSORS}: cannot be read: Permission denied\n" in said.text
    assert "see to its permissions" in said.text
    assert snapshot() == before


def test_one_that_waits_to_be_replaced_is_set_aside_too() -> None:
    waiting = CHECKPOINT.rename(CHECKPOINT.with_name(f"{CHECKPOINT.name}.replaced"))
    flip(waiting / TENSORS)
    said = train("--set", "training.steps=4")
    assert said.code == 0, said.text
    assert f"{waiting.name} is now {waiting.name}.damaged" in said.text
    assert [path.name for path in complete(FOLDER)] == ["step-00000003", "step-00000004"]


def test_the_same_command_goes_on() -> None:
    """From the checkpoint of another run, stopped, started again, and started once more when it is done."""
    named = ("--set", "output=new", "--set", "training.steps=6", "--resume", str(CHECKPOINT))
    said = train(*named, "--until", "4")
    assert "stopped at step 4, as asked; the command without --until goes on from there" in said.text
    own = Path("new/checkpoints/step-00000004")
    origin = read_state(own).origin
    assert origin is not None
    assert origin.path == str(CHECKPOINT.resolve())
    shutil.rmtree("run")
    said = train(*named)
    assert said.code == 0, said.text
    assert f"this run began at {CHECKPOINT}: it goes on from its newest checkpoint, as with --resume auto" in said.text
    assert f"resuming {own} (step 4)" in said.text
    assert read_state(Path("new/checkpoints/step-00000006")).origin == origin
    before = snapshot(Path("new"))
    said = train(*named)
    assert "nothing to do: new is at step 6 already" in said.text
    assert snapshot(Path("new")) == before


def test_never_says_which_command_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = train("--set", "output=new", "--resume", "never", "--until", "1")
    assert "the command with --resume auto and without --until goes on from there" in said.text
    said = train("--set", "output=new", "--resume", "never")
    assert said.code == 2
    assert "to go on from them, give --resume auto" in said.text
    _say_interrupted(Path("new"), "never")
    _say_interrupted(Path("run"), "auto")
    assert capsys.readouterr().err.splitlines() == [
        "interrupted; the command with --resume auto goes on from new/checkpoints/step-00000001",
        f"interrupted; the same command goes on from {CHECKPOINT}",
    ]

    def refuse(path: Path) -> Any:
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    _say_interrupted(Path("run"), "auto")
    assert capsys.readouterr().err.startswith("interrupted; run/checkpoints: cannot be listed: Permission denied")


def test_auto_passes_over_damaged_ones_loudly() -> None:
    flip(CHECKPOINT / TENSORS)
    said = train("--set", "training.steps=4")
    assert said.code == 0, said.text
    assert f"WARNING: passed over {CHECKPOINT.name}: {CHECKPOINT}/{TENSORS}: SHA-256 differs from the manifest" in said.text
    assert f"resuming {OLDER} (step 2)" in said.text
    assert f"{CHECKPOINT.name} is now {CHECKPOINT.name}.damaged" in said.text
    assert [path.name for path in complete(FOLDER)] == ["step-00000003", "step-00000004"]
    assert damage(FOLDER / "step-00000003") == []


def test_a_torn_one_is_passed_over_before_the_ranks_meet() -> None:
    (CHECKPOINT / "manifest.json").write_text("{}")
    flip(OLDER / TENSORS)
    before = snapshot()
    said = train("--set", "training.steps=4")
    assert said.code == 2
    assert "every checkpoint of this run is damaged" in said.text
    for name in (f"{CHECKPOINT}/manifest.json", f"{OLDER}/{TENSORS}"):
        assert name in said.text
    assert snapshot() == before


def test_a_damaged_one_by_name_is_refused() -> None:
    flip(CHECKPOINT / TENSORS)
    for path in (CHECKPOINT, Path("run")):
        said = train("--set", "output=new", "--resume", str(path))
        assert said.code == 2
        assert f"error: {CHECKPOINT}/{TENSORS}: SHA-256 differs from the manifest; the checkpoint is damaged" in said.text
        assert not Path("new/checkpoints").exists()


def test_another_recipe_can_be_forced() -> None:
    changes = ("--set", "optimizer.eps=1e-6", "--set", "training.steps=4", "--set", "checkpoint.keep=1")
    said = train(*changes)
    assert said.code == 2
    assert "optimizer.eps: 1e-08 in the checkpoint, 1e-06 in this recipe" in said.text
    assert "--force-resume" in said.text
    assert "--force-resume" not in train("--set", "model.intermediate_size=32").text, "of another shape nothing goes on"
    said = train(*changes, "--force-resume")
    assert said.code == 0, said.text
    assert f"WARNING: forced to go on, although {CHECKPOINT}: is a checkpoint of another recipe" in said.text
    assert "changed since that checkpoint: optimizer.eps: 1e-08 -> 1e-06" in said.text
    # the same weights of another shape cannot be
    said = train("--set", "model.intermediate_size=32", "--force-resume", "--set", "training.steps=9")
    assert said.code == 2
    assert "it is a checkpoint of another model" in said.text


def test_import_refuses_what_deepspeed_did_not_write() -> None:
    for ours in (CHECKPOINT, FOLDER, "run"):
        said = command("checkpoint", "import", str(ours), "--out", "imported")
        assert said.code == 2
        assert f"{ours}: is longtrain's own, which training goes on from as it is (--resume)" in said.text
        assert f"longtrain export {ours} --out imported" in said.text
    said = command("checkpoint", "import", "data", "--out", "imported")
    assert said.code == 2
    assert "data: has no file *_optim_states.pt of ZeRO" in said.text
    assert "name a folder that DeepSpeed's save_checkpoint wrote" in said.text
    assert not Path("imported").exists()


def test_the_plan_is_for_the_memory_that_is_named() -> None:
    plan = ("train", "--recipe", "llama-7b-32k", "--set", "device=cuda", "--ranks", "2", "--dry-run", "--host-memory")
    assert "written behind the training after a copy of 75.3 GiB" in command(*plan, "128").text
    assert "training stands still while it is written" in command(*plan, "64").text
    said = command("train", "--recipe", "llama-7b-32k", "--host-memory", "64")
    assert said.code == 2
    assert "--host-memory goes with --dry-run" in said.text
