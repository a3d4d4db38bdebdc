from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from longtrain.cli.prepare import main
from longtrain.data import prepare as module
from longtrain.data.corpus import Skipped, place_of
from longtrain.data.manifest import read_manifest
from longtrain.data.packed import PackedSplit
from longtrain.data.prepare import prepare
from longtrain.data.shards import SplitWriter
from longtrain.data.sources import find_sources
from longtrain.data.tokenizer import Tokenizer
from longtrain.errors import DataError

ROOT = Path(__file__).parents[2]
OPTIONS = ["--vocab-size", "320", "--held-out", "0.2"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def documents(folder: Path, split: str) -> list[list[int]]:
    manifest = read_manifest(folder)
    found = []
    for shard in manifest.splits[split]:  # type: ignore[index]
        tokens = np.fromfile(folder / shard.file, manifest.token_dtype)
        ends = np.fromfile(folder / shard.index, "<i8")
        found += [part.tolist() for part in np.split(tokens, ends[:-1])]
    return found


def test_every_document_can_be_read_back(text_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepared = prepare(str(text_folder), out, vocab_size=320, held_out=0.2, shard_tokens=2000)
    tokenizer = Tokenizer.load(out / "tokenizer.model")
    texts = {"train": set(), "heldout": set()}
    for split in texts:
        for ids in documents(out, split):
            assert (ids[0], ids[-1]) == (tokenizer.bos, tokenizer.eos)
            texts[split].add(tokenizer.decode(ids))
        PackedSplit(out, split, 16).verify()
    assert not texts["train"] & texts["heldout"]
    assert texts["train"] | texts["heldout"] == {path.read_text() for path in text_folder.rglob("*.txt")}
    assert len(prepared.manifest.splits["train"]) > 3
    assert prepared.manifest == read_manifest(out)
    statistics = prepared.manifest.statistics
    assert statistics.tokens["train"] == sum(map(len, documents(out, "train")))
    assert statistics.documents == {split: len(found) for split, found in texts.items()}


def test_the_same_arguments_give_the_same_bytes(text_folder: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        prepare(str(text_folder), tmp_path / out, vocab_size=320, held_out=0.2, seed=5)
    contents = [{path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("a", "b")]
    assert contents[0] == contents[1]
    assert str(tmp_path).encode() not in contents[0]["manifest.json"]


def test_an_existing_tokenizer_is_kept_byte_for_byte(text_folder: Path, tmp_path: Path, tiny_model: bytes) -> None:
    model = tmp_path / "my.model"
    model.write_bytes(tiny_model)
    prepare(str(text_folder), tmp_path / "out", tokenizer=model, held_out=0.2)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tiny_model
    with pytest.raises(DataError, match="exclude each other"):
        prepare(str(text_folder), tmp_path / "two", tokenizer=model, vocab_size=320)


def test_held_out_documents_do_not_reach_the_tokenizer(text_folder: Path, tmp_path: Path) -> None:
    prepare(str(text_folder), tmp_path / "a", vocab_size=320, held_out=0.2)
    for path in text_folder.rglob("*.txt"):
        if place_of(path.read_bytes()) < 0.2:
            other = (f"zzqq xxyy wwvv {n} " * 500 for n in range(99))
            path.write_text(next(text for text in other if place_of(text.encode()) < 0.2))
    prepare(str(text_folder), tmp_path / "b", vocab_size=320, held_out=0.2)
    assert read_manifest(tmp_path / "a").tokenizer == read_manifest(tmp_path / "b").tokenizer


def test_a_large_corpus_is_sampled(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_CHARACTERS", 20_000)
    monkeypatch.setattr(module, "SAMPLE_PER_DOCUMENT", 2_000)
    found = find_sources([str(text_folder)], globs=(), held_out=0.2, seed=0, out=Path("out"))
    sentences = list(module.sample(found, "text", Skipped()))
    assert 15_000 < sum(map(len, sentences)) < 24_000
    assert len({sentence.split(":")[0].rsplit(" ", 1)[1] for sentence in sentences}) >= 8


def test_files_that_are_no_text_are_counted_and_named(text_folder: Path, tmp_path: Path) -> None:
    for n in range(5):
        (text_folder / f"latin{n}.txt").write_bytes(b"caf\xe9")
    (text_folder / "empty.txt").touch()
    prepared = prepare(str(text_folder), tmp_path / "out", vocab_size=320, held_out=0.2)
    assert prepared.manifest.statistics.skipped == {"not_utf8": 5, "unreadable": 0, "empty": 1, "malformed": 0}
    assert "5 not UTF-8 (latin" in prepared.report()
    for path in text_folder.rglob("*.txt"):
        path.write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"'train' is usable text; skipped: \d+ not UTF-8 .*convert the files"):
        prepare(str(text_folder), tmp_path / "none", vocab_size=320, held_out=0.2)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("at", [0, 9, 35])
def test_a_preparation_cut_short_leaves_nothing_half_written(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int
) -> None:
    prepare(str(text_folder), tmp_path / "old", vocab_size=320, held_out=0.2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    add, calls = SplitWriter.add, []

    def fail(self: SplitWriter, tokens: list[int]) -> None:
        calls.append(self)
        if len(calls) > at:
            raise error
        add(self, tokens)

    monkeypatch.setattr(SplitWriter, "add", fail)
    for name in ("new", "old"):
        calls.clear()
        with pytest.raises(DataError if isinstance(error, OSError) else type(error)):
            prepare(str(text_folder), tmp_path / name, vocab_size=320, held_out=0.2, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "text"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before


def test_overwriting_the_source_is_refused(text_folder: Path, tmp_path: Path) -> None:
    for out in (text_folder, tmp_path):
        with pytest.raises(DataError, match="--out"):
            prepare(str(text_folder), out, vocab_size=320, overwrite=True)


def test_the_command_reports(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(monkeypatch, "--source", text_folder, "--out", out, *OPTIONS, "--sequence-length", 4096) == 0
    printed = capsys.readouterr()
    assert "tokens a document: min" in printed.out
    assert "sequences of 4096" in printed.out
    assert "warning: only" in printed.out
    assert f"data.path {out}" in printed.out
    assert "training a tokenizer of 320 tokens" in printed.err
    assert run(monkeypatch, "--source", text_folder, "--out", out, *OPTIONS) == 2
    assert "replace it with --overwrite" in capsys.readouterr().err
    assert run(monkeypatch, "--source", text_folder, "--out", out, *OPTIONS, "--overwrite", "--glob", "part0/*") == 0
    assert read_manifest(out).statistics.documents["train"] < 14


@pytest.mark.parametrize(
    "arguments",
    [
        ["--source", "nowhere"],
        ["--source", "SOURCE", "--vocab-size", "100000"],
        ["--source", "SOURCE", "--vocab-size", "-1"],
        ["--source", "SOURCE", "--glob", "*.nothing"],
        ["--source", "SOURCE", "--tokenizer", "SOURCE/part0/document0.txt"],
        ["--source", "SOURCE", "--tokenizer", "none.model"],
        ["--source", "SOURCE", "--held-out", "1e-9"],
        ["--source", "SOURCE", "--held-out", "7"],
        ["--source", "SOURCE", "--shard-tokens", "0"],
        ["--source", "SOURCE", "--seed", "99999999999999999999"],
        ["--source", "SOURCE", "--sequence-length", "x"],
        ["--source", "stdlib", "--held-out", "0.1"],
        [],
    ],
)
def test_bad_input_exits_with_2_and_one_message(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    arguments = [argument.replace("SOURCE", str(text_folder)) for argument in arguments]
    assert run(monkeypatch, *arguments, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "rror" in error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_the_script_as_users_run_it(tmp_path: Path) -> None:
    script = [sys.executable, "scripts/prepare_data.py", "--source", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(script, cwd=ROOT, env={"PYTHONPATH": "."}, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: --source {tmp_path}: no text files")
    assert done.stderr.count("\n") == 1


def test_progress_on_a_terminal_and_in_a_log(text_folder: Path, tmp_path: Path) -> None:
    for terminal in (True, False):
        with (tmp_path / "log").open("w") as log:
            console = Console(file=log, force_terminal=terminal, width=200)
            prepare(str(text_folder), tmp_path / str(terminal), vocab_size=320, held_out=0.2, console=console)
        text = (tmp_path / "log").read_text()
        assert ("\x1b" in text) == terminal
        assert "tokenizing" in text
        assert "tokens/s" in text


def test_part_of_the_standard_library(tmp_path: Path) -> None:
    prepared = prepare("stdlib", tmp_path / "out", globs=["json/*.py", "email/*.py"], vocab_size=500)
    assert prepared.manifest.statistics.documents["heldout"] == 1
    assert PackedSplit(tmp_path / "out", "train", 256).context_share() > 0.5
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["tokenizer"]["vocab_size"] == 500


def write_records(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.mark.parametrize(("share", "chosen"), [(0.001, "none"), (0.999, "all")])
def test_an_empty_split_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, chosen: str
) -> None:
    write_records(tmp_path / "a.jsonl", [f"Record number {number} of a few." * 9 for number in range(12)])
    for work in ("train_tokenizer", "encode_all"):
        monkeypatch.setattr(module, work, None)
    with pytest.raises(DataError, match=rf"--held-out {share:g} picks {chosen} of 12 documents: use --held-out 0\.\d+$") as refusal:
        prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", vocab_size=300, held_out=share)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    monkeypatch.undo()
    enough = float(str(refusal.value).split()[-1])
    prepared = prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", vocab_size=300, held_out=enough)
    assert all(prepared.manifest.statistics.documents.values())


def test_a_repeated_file_is_on_one_side(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(60):
        (tmp_path / "text" / f"{number}.txt").write_text(f"Text {number % 6}, the quick brown fox.\n" * 20)
    prepared = prepare(str(tmp_path / "text"), tmp_path / "out", vocab_size=290, held_out=0.3)
    sides = [{tuple(ids) for ids in documents(tmp_path / "out", split)} for split in ("train", "heldout")]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 6
    assert sum(prepared.manifest.statistics.documents.values()) == 60


def test_both_splits_of_a_folder_need_a_document(text_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"picks none of 40 documents: use --held-out (0\.\d+)$") as refusal:
        prepare(str(text_folder), tmp_path / "out", vocab_size=320, held_out=1e-6)
    advised = float(str(refusal.value).rsplit(" ", 1)[1])
    prepared = prepare(str(text_folder), tmp_path / "out", vocab_size=320, held_out=advised)
    assert prepared.manifest.statistics.documents == {"train": 39, "heldout": 1}
    with pytest.raises(DataError, match=r"there is one document: .*split the text into several files"):
        prepare(str(text_folder), tmp_path / "no", globs=["part0/document0.txt"], vocab_size=320)
    with pytest.raises(DataError, match="between 0 and 1"):
        prepare(str(text_folder), tmp_path / "no", vocab_size=320, held_out=float("nan"))


def test_records_that_are_not_usable_do_not_count(tmp_path: Path) -> None:
    """For what --held-out picks; the message about it is the one that helps."""
    texts = (f"Record number {number} of a few." * 9 for number in range(999))
    write_records(tmp_path / "a.jsonl", [text for text in texts if place_of(text.encode()) > 0.05][:30])
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": ""}\n' + "{\n" * 4)
    options = {"vocab_size": 300, "max_bad": 0.2}
    with pytest.raises(DataError, match=r"--held-out 0\.02 picks none of 30 documents: use --held-out 0\.\d+$") as refusal:
        prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", **options)
    enough = float(str(refusal.value).split()[-1])
    assert prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", held_out=enough, **options).skipped.number["malformed"] == 4
    with pytest.raises(DataError, match="4 of 35 records in all are malformed"):
        prepare(str(tmp_path / "a.jsonl"), tmp_path / "no", vocab_size=300)


@pytest.mark.parametrize(("share", "remedy"), [(0.001, "--held-out 0.1"), (0.999, "a smaller --held-out")])
def test_an_empty_split_is_seen_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, remedy: str) -> None:
    """Where it was not before, as with datasets of the hub: what was skipped is not the reason."""
    write_records(tmp_path / "a.jsonl", ["", *(f"Record number {number} of a few." * 9 for number in range(30))])
    monkeypatch.setattr(module, "check_held_out", lambda *_: None)
    monkeypatch.setattr(module, "is_held_out", lambda *_: False)  # there is something to train a tokenizer on
    with pytest.raises(DataError, match=rf"--held-out {share:g} leaves the split '\w+' empty, of 30 documents: use {remedy}$"):
        prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", vocab_size=300, held_out=share)


@pytest.mark.parametrize("records", [False, True], ids=["files", "records"])
def test_max_tokens_ends_with_a_document(text_folder: Path, tmp_path: Path, records: bool) -> None:
    texts = [path.read_text() for path in text_folder.rglob("*.txt")]
    write_records(tmp_path / "a.jsonl", texts)
    source = tmp_path / "a.jsonl" if records else text_folder
    prepared = prepare(str(source), tmp_path / "out", vocab_size=320, held_out=0.2, max_tokens=3000)
    lengths = prepared.lengths["train"]
    assert 3000 <= lengths.sum() < 3000 + lengths[-1]
    assert prepared.lengths["heldout"].size


def test_shares_in_percent(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("20%", "0.2"):
        words = ["--vocab-size", "320", "--held-out", text]
        assert run(monkeypatch, "--source", text_folder, "--out", tmp_path / text, *words) == 0
    assert read_manifest(tmp_path / "20%") == read_manifest(tmp_path / "0.2")
    assert run(monkeypatch, "--source", text_folder, "--out", tmp_path / "no", "--held-out", "a tenth") == 2
    assert "error: --held-out a tenth: expected a share" in capsys.readouterr().err


def test_looking_at_the_splits_takes_few_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(tmp_path / "a.jsonl", [f"Record number {number}" for number in range(5000)])
    looked: list[bytes] = []
    monkeypatch.setattr(module, "place_of", lambda text: looked.append(text) or place_of(text))
    module.check_held_out(find_sources([str(tmp_path / "a.jsonl")], globs=(), held_out=0.02, seed=0, out=Path("out")), "text", 0)
    assert 0 < len(looked) < 500
    # and not all of those of which hardly any can be held out
    monkeypatch.setattr(module, "EARLY_RECORDS", 100)
    looked.clear()
    module.check_held_out(find_sources([str(tmp_path / "a.jsonl")], globs=(), held_out=1e-9, seed=0, out=Path("out")), "text", 0)
    assert len(looked) == 100
