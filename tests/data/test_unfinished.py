"""A preparation that is killed goes on where it was, and neither that nor the number of workers leaves a trace in the result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from longtrain.data import prepare as module
from longtrain.data import sources
from longtrain.data.prepare import prepare
from longtrain.data.shards import SplitWriter
from longtrain.data.workspace import JOURNAL
from longtrain.errors import DataError
from tests.interrupted import interrupt_preparation

ROOT = Path(__file__).parents[2]
TEXTS = [f"Record {n}, for the {n % 7}th time: the quick brown fox.\n" * (1 + n % 9) for n in range(300)]

KILLED = """
import os, pathlib, signal, sys
from longtrain.data import hub, prepare, sources
from longtrain.data.shards import SplitWriter
source, out, model, stop = sys.argv[1:]
prepare.JOURNAL_SECONDS, sources.PIECE_BYTES, hub.EXAMPLES, add, left = -1, 1500, 20, SplitWriter.add, int(stop)
def count(self, tokens):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, tokens)
SplitWriter.add = count
if __name__ == "__main__":
    prepare.prepare(source, pathlib.Path(out), tokenizer=model, held_out=0.1, shard_tokens=3000, workers=1)
"""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_model: bytes) -> Path:
    """The same records as every kind of source."""
    root = tmp_path_factory.mktemp("unfinished")
    content = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
    (root / "a.jsonl").write_bytes(content)
    (root / "a.jsonl.zst").write_bytes(pa.compress(content, codec="zstd", asbytes=True))
    pq.write_table(pa.table({"text": TEXTS}), root / "a.parquet", row_group_size=40)
    (root / "set").mkdir()
    for number in range(3):
        part = TEXTS[100 * number : 100 * number + 100]
        pq.write_table(pa.table({"text": part}), root / "set" / f"train-{number}.parquet", row_group_size=33)
    (root / "text").mkdir()
    for number, text in enumerate(TEXTS[:120]):
        (root / "text" / f"{number}.txt").write_text(text)
    (root / "tiny.model").write_bytes(tiny_model)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


OPTIONS = {"held_out": 0.1, "shard_tokens": 3000}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet", "hf:set", "text"])
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    desk: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 1500)
    monkeypatch.setattr("longtrain.data.hub.EXAMPLES", 20)
    monkeypatch.chdir(desk)
    prepare(name, tmp_path / "straight", tokenizer=desk / "tiny.model", workers=1, **OPTIONS)
    out = tmp_path / "out"
    words = [sys.executable, "-c", KILLED, name, str(out), str(desk / "tiny.model")]
    for kill_at in ("70", "45") if name == "a.jsonl.zst" else ("90",):
        done = subprocess.run([*words, kill_at], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=120)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert not out.exists()
    assert (tmp_path / ".out.partial" / JOURNAL).exists()
    adds, add = [], SplitWriter.add
    monkeypatch.setattr(SplitWriter, "add", lambda self, tokens: (adds.append(1), add(self, tokens)))
    with (tmp_path / "log").open("w") as log:
        prepare(name, out, tokenizer=desk / "tiny.model", workers=1, console=Console(file=log, width=200), **OPTIONS)
    assert contents(out) == contents(tmp_path / "straight")
    assert not (tmp_path / ".out.partial").exists()
    assert len(adds) < (120 if name == "text" else 300) - 40, "what was done is not done again"
    assert "going on after" in (tmp_path / "log").read_text()


def test_the_result_does_not_depend_on_the_workers(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 1500)
    wanted = [str(desk / name) for name in ("a.jsonl", "a.jsonl.zst", "a.parquet", "text")]
    for workers in (1, 3):
        prepare(wanted, tmp_path / str(workers), tokenizer=desk / "tiny.model", workers=workers, **OPTIONS)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_errors_of_a_worker_reach_the_user(desk: Path, tmp_path: Path) -> None:
    content = bytearray((desk / "a.parquet").read_bytes())
    content[4:60] = bytes(56)
    (tmp_path / "b.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"b\.parquet: row 1 \(row group 0\) cannot be read"):
        prepare(str(tmp_path / "b.parquet"), tmp_path / "out", tokenizer=desk / "tiny.model", workers=2)


def test_workers_end_with_a_killed_parent(desk: Path, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED.replace("workers=1", "workers=2"))
    words = [sys.executable, str(script), str(desk / "a.jsonl"), str(tmp_path / "out"), str(desk / "tiny.model"), "50"]
    done = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)
    assert done.wait(60) == -signal.SIGKILL
    for _ in range(200):
        try:
            os.killpg(done.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(done.pid, signal.SIGKILL)
    raise AssertionError("worker processes outlive their parent")


def interrupt(monkeypatch: pytest.MonkeyPatch, desk: Path, out: Path) -> None:
    """Leaves unfinished work behind."""
    monkeypatch.setattr(module, "JOURNAL_SECONDS", -1)
    monkeypatch.setattr(sources, "PIECE_BYTES", 1500)
    interrupt_preparation(str(desk / "a.jsonl"), out, 100, tokenizer=desk / "tiny.model", **OPTIONS)


def test_other_arguments_do_not_touch_unfinished_work(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    interrupt(monkeypatch, desk, out)
    kept = contents(tmp_path / ".out.partial")
    source, model = str(desk / "a.jsonl"), desk / "tiny.model"
    for change, named in (
        ({"seed": 1}, "--seed"),
        ({"held_out": 0.2}, "--held-out"),
        ({"text_field": "body"}, "--text-field"),
        ({"shard_tokens": 99}, "--shard-tokens"),
        ({"max_tokens": 99}, "--max-tokens"),
        ({"tokenizer": None, "vocab_size": 300}, "--tokenizer, --vocab-size"),
    ):
        with pytest.raises(DataError, match=f"unfinished preparation that differs in: {named};"):
            prepare(source, out, **({"tokenizer": model} | OPTIONS | change))
    with pytest.raises(DataError, match="differs in: --source"):
        prepare(str(desk / "a.parquet"), out, tokenizer=model, **OPTIONS)
    assert contents(tmp_path / ".out.partial") == kept
    prepare(source, out, tokenizer=model, workers=2, max_bad=0.5, **OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "index"])
def test_damaged_unfinished_work_is_found(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    out = tmp_path / "out"
    interrupt(monkeypatch, desk, out)
    path = tmp_path / ".out.partial" / ("train-00000.idx" if damage == "index" else "train-00000.bin")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 3] if damage == "cut" else content)
    with pytest.raises(DataError, match=rf"{path.name}: is .*unfinished preparation wrote.*--overwrite"):
        prepare(str(desk / "a.jsonl"), out, tokenizer=desk / "tiny.model", **OPTIONS)


def test_too_many_malformed_records_lose_no_work(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JOURNAL_SECONDS", -1)
    monkeypatch.setattr(sources, "PIECE_BYTES", 1500)
    (tmp_path / "a.jsonl").write_bytes((desk / "a.jsonl").read_bytes() + b"{\n" * 3)
    arguments = {"source": str(tmp_path / "a.jsonl"), "out": tmp_path / "out", "tokenizer": desk / "tiny.model"}
    with pytest.raises(DataError, match=r"3 of 303 records in all are malformed(?s:.*)--max-bad 1%"):
        prepare(**arguments, **OPTIONS)
    adds: list[int] = []
    monkeypatch.setattr(SplitWriter, "add", lambda self, tokens: adds.append(1))
    prepared = prepare(**arguments, **OPTIONS, max_bad=0.01)
    assert not adds
    assert sum(prepared.manifest.statistics.documents.values()) == 300


def test_hopeless_input_is_refused_early(tmp_path: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EARLY_RECORDS", 500)
    monkeypatch.setattr(sources, "PIECE_BYTES", 1500)
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" * 5000 + (desk / "a.jsonl").read_bytes())
    with pytest.raises(DataError, match=r"\d+ of \d\d?\d\d records so far are malformed"):
        prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer=desk / "tiny.model")
