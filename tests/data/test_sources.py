"""Every kind of source to the same documents, and what of it is refused."""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longtrain.cli.prepare import main
from longtrain.data import sources as module
from longtrain.data.manifest import read_manifest
from longtrain.data.prepare import prepare
from longtrain.data.tokenizer import Tokenizer
from longtrain.errors import DataError

TEXTS = [f"Record {n}: für alle 漢字, the quick brown fox.\n" * (1 + n % 5) for n in range(200)] + [
    "\u2028 odd\r\n",
    "\ufeffx",
    "</s>",
]

Write = Callable[[Path, Sequence[str], str], object]


def lines(texts: Sequence[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({"id": n, field: text}, ensure_ascii=n % 2 == 0).encode() + b"\n" for n, text in enumerate(texts))


def write_jsonl(path: Path, texts: Sequence[str], field: str = "text") -> None:
    path.write_bytes(lines(texts, field))


def write_gz(path: Path, texts: Sequence[str], field: str = "text") -> None:
    half = len(texts) // 2  # two members, as `cat a.gz b.gz` gives
    path.write_bytes(gzip.compress(lines(texts[:half], field)) + gzip.compress(lines(texts[half:], field)))


def write_zst(path: Path, texts: Sequence[str], field: str = "text") -> None:
    half = len(texts) // 2
    path.write_bytes(b"".join(pa.compress(lines(part, field), codec="zstd", asbytes=True) for part in (texts[:half], texts[half:])))


def write_parquet(path: Path, texts: Sequence[str], field: str = "text") -> None:
    pq.write_table(pa.table({"id": range(len(texts)), field: list(texts)}), path, row_group_size=37)


def write_parquet_dictionary(path: Path, texts: Sequence[str], field: str = "text") -> None:
    pq.write_table(pa.table({field: pa.array(list(texts)).dictionary_encode()}), path, row_group_size=50)


FILES: dict[str, Write] = {
    "a.jsonl": write_jsonl,
    "a.ndjson": write_jsonl,
    "a.json": write_jsonl,
    "a.jsonl.gz": write_gz,
    "a.json.gz": write_gz,
    "a.jsonl.zst": write_zst,
    "a.JSONL.ZST": write_zst,
    "a.parquet": write_parquet,
    "b.parquet": write_parquet_dictionary,
}


def documents(folder: Path) -> dict[str, list[str]]:
    """The texts of a prepared folder."""
    manifest = read_manifest(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    found: dict[str, list[str]] = {}
    for split, shards in manifest.splits.items():
        for shard in shards:
            tokens = np.fromfile(folder / shard.file, manifest.token_dtype)
            ends = np.fromfile(folder / shard.index, "<i8")
            found.setdefault(split, []).extend(tokenizer.decode(part.tolist()) for part in np.split(tokens, ends[:-1]))
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: bytes) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.model"
    path.write_bytes(tiny_model)
    return path


@pytest.mark.parametrize("field", ["text", "body of it"])
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_documents(
    tmp_path: Path, model: Path, name: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    FILES[name](tmp_path / name, TEXTS, field)
    prepared = prepare(str(tmp_path / name), tmp_path / "out", tokenizer=model, held_out=0.1, text_field=field)
    found = documents(tmp_path / "out")
    assert sorted(found["train"] + found["heldout"]) == sorted(TEXTS)
    assert found["train"] == [text for text in TEXTS if text in set(found["train"])]
    assert 5 < len(found["heldout"]) < 40
    assert sum(prepared.skipped.counts().values()) == 0


def test_a_repeated_text_is_on_one_side(tmp_path: Path, model: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:50] * 3)
    prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer=model, held_out=0.2)
    found = documents(tmp_path / "out")
    assert not set(found["train"]) & set(found["heldout"])


def test_several_sources_and_a_folder_of_files(tmp_path: Path, model: Path, text_folder: Path) -> None:
    (tmp_path / "many" / "sub").mkdir(parents=True)
    write_jsonl(tmp_path / "many" / "sub" / "1.jsonl", TEXTS[:60])
    write_zst(tmp_path / "many" / "2.jsonl.zst", TEXTS[60:120])
    write_parquet(tmp_path / "more.parquet", TEXTS[120:])
    wanted = [str(tmp_path / "many"), str(tmp_path / "more.parquet"), str(text_folder)]
    prepare(wanted, tmp_path / "out", tokenizer=model, held_out=0.1)
    found = documents(tmp_path / "out")
    files = [path.read_text() for path in text_folder.rglob("*.txt")]
    assert sorted(found["train"] + found["heldout"]) == sorted([*TEXTS, *files])
    with pytest.raises(DataError, match="given twice"):
        prepare([wanted[0], wanted[0]], tmp_path / "two", tokenizer=model)


def test_a_tokenizer_is_trained_on_records(tmp_path: Path) -> None:
    write_gz(tmp_path / "a.jsonl.gz", TEXTS)
    prepared = prepare(str(tmp_path / "a.jsonl.gz"), tmp_path / "out", vocab_size=330, held_out=0.1)
    assert prepared.manifest.tokenizer.vocab_size == 330
    found = documents(tmp_path / "out")
    assert sorted(found["train"] + found["heldout"]) == sorted(TEXTS)


def test_a_tokenizer_cannot_be_trained_on_another_field(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS, "body")
    with pytest.raises(DataError, match=r"203 of 203 records read are malformed(?s:.*)its fields are 'id', 'body'(?s:.*)no usable"):
        prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", vocab_size=330)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_tokenizer_json_is_carried_and_named(tmp_path: Path, json_tokenizer: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    for bos, first in ((None, 0), ("none", None)):
        out = tmp_path / f"out-{bos}"
        prepared = prepare(str(tmp_path / "a.jsonl"), out, tokenizer=json_tokenizer, held_out=0.1, bos=bos)
        entry = read_manifest(out).tokenizer
        assert (entry.file, entry.bos, entry.eos) == ("tokenizer.json", first, 1)
        assert (out / "tokenizer.json").read_bytes() == json_tokenizer.read_bytes()
        tokens = np.fromfile(out / "train-00000.bin", "<u2")
        assert (tokens[0] == 0) == (first == 0)
        assert (tokens == 1).sum() == prepared.lengths["train"].size
        assert ("token 0, its text" in prepared.report()) == (first == 0)


def test_max_tokens_stops(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepared = prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer=model, held_out=0.3, max_tokens=2000)
    lengths = prepared.lengths["train"]
    assert 2000 <= lengths.sum() < 2000 + lengths[-1]


@pytest.mark.parametrize("name", ["hf:FOLDER", "hf:FOLDER:default:train", "hf:FOLDER::train"])
def test_datasets_of_a_local_folder(tmp_path: Path, model: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtrain.data.hub.EXAMPLES", 30)
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "train-0.parquet", TEXTS[:90])
    write_parquet(tmp_path / "set" / "train-1.parquet", TEXTS[90:])
    prepare(name.replace("FOLDER", str(tmp_path / "set")), tmp_path / "out", tokenizer=model, held_out=0.1, workers=1)
    found = documents(tmp_path / "out")
    assert sorted(found["train"] + found["heldout"]) == sorted(TEXTS)


def test_datasets_saved_to_disk(tmp_path: Path, model: Path) -> None:
    import datasets

    made = datasets.Dataset.from_dict({"text": TEXTS})
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made, "more": made.select(range(99))}).save_to_disk(tmp_path / "two")
    for name, count in (("one", 203), ("two", 203), ("two::more", 99)):
        source = f"hf:{tmp_path / name}"
        prepared = prepare(source, tmp_path / f"out-{count}-{name[:3]}", tokenizer=model, held_out=0.1, workers=1)
        assert sum(prepared.manifest.statistics.documents.values()) == count
    with pytest.raises(DataError, match="has no split 'test'; it has train, more"):
        prepare(f"hf:{tmp_path / 'two'}::test", tmp_path / "no", tokenizer=model, workers=1)
    for name in ("one", "two"):
        with pytest.raises(
            DataError, match=rf"{name}:nope: .* no configurations such as 'nope'; leave it out: hf:.*{name}, or hf:"
        ):
            prepare(f"hf:{tmp_path / name}:nope", tmp_path / "no", tokenizer=model, workers=1)
    with pytest.raises(DataError, match=r"one::test: holds one dataset and no split 'test'; name it hf:.*one$"):
        prepare(f"hf:{tmp_path / 'one'}::test", tmp_path / "no", tokenizer=model, workers=1)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


GOOD = lines(TEXTS)
GZ, ZST = gzip.compress(GOOD), pa.compress(GOOD, codec="zstd", asbytes=True)


def parquet(*doubled: str, **columns: object) -> bytes:
    """doubled: columns that stand there again, under the same name."""
    table, sink = pa.table(columns), pa.BufferOutputStream()
    for name in doubled:
        table = table.append_column(name, table[name])
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


PARQUET = parquet(text=TEXTS)
BROKEN_PAGES = PARQUET[:4] + bytes(byte ^ 255 for byte in PARQUET[4:60]) + PARQUET[60:]


def bad(line: bytes) -> bytes:
    """One record in 204, in line 3."""
    return b"\n".join([*GOOD.split(b"\n")[:2], line, *GOOD.split(b"\n")[2:]])


REFUSALS: dict[str, tuple[str, bytes, str]] = {
    "not JSON": ("a.jsonl", bad(b'{"text": "x"'), r"a\.jsonl:3: not JSON \(Expecting ',' delimiter, column 14\)"),
    "plain text": ("a.jsonl", b"once upon a time\n" * 50, r"50 of 50 records .*a\.jsonl:1: not JSON"),
    "binary": ("a.jsonl", bytes(range(256)) * 30, r"a\.jsonl:2: not UTF-8 \(byte 0x80\)"),
    "a list on a line": ("a.jsonl", bad(b'["x"]'), r"a\.jsonl:3: a JSON list, not an object with a field 'text'"),
    "a number on a line": ("a.jsonl", bad(b"3"), r"a\.jsonl:3: a JSON int"),
    "one JSON list": ("a.jsonl", b' \n[{"text": "x"}]', r"a\.jsonl: is one JSON list, not JSON Lines.*jq -c '\.\[\]'"),
    "other fields": ("a.jsonl", lines(TEXTS, "body"), r"no field 'text'; its fields are 'id', 'body' \(--text-field chooses one\)"),
    "one other field": ("a.jsonl", bad(b"{}"), r"a\.jsonl:3: no field 'text'; its fields are none"),
    "a number as text": ("a.jsonl", bad(b'{"text": 3}'), r"a\.jsonl:3: the text is of type int, not a string"),
    "null as text": ("a.jsonl", bad(b'{"text": null}'), r"a\.jsonl:3: the text is null"),
    "not UTF-8": ("a.jsonl", bad(b'{"text": "caf\xe9"}'), r"a\.jsonl:3: not UTF-8 \(byte 0xe9\)"),
    "half a surrogate": ("a.jsonl", bad(b'{"text": "\\ud800"}'), r"a\.jsonl:3: the text holds half of a surrogate pair"),
    "nested": ("a.jsonl", bad(b"[" * 100_000), r"a\.jsonl:3: not JSON that can be read"),
    "long number": ("a.jsonl", bad(b'{"text": ' + b"1" * 9999 + b"}"), r"a\.jsonl:3: not JSON that can be read"),
    "nothing": ("a.jsonl", b"", r"'train' is usable text; there was nothing to read; name other text"),
    "blank lines": ("a.jsonl", b"\n \n", "there was nothing to read"),
    "empty texts": ("a.jsonl", b'{"text": " "}\n' * 9, r"skipped: 9 empty \(.*a\.jsonl:1, .*\.\.\.\)"),
    "one text": ("a.jsonl", GOOD.split(b"\n")[0], r"there is one document: training needs one, and --held-out another"),
    "one text again and again": ("a.jsonl", b"\n".join(GOOD.split(b"\n")[:1] * 2), "all 2 documents are the same text"),
    "gzip cut": ("a.jsonl.gz", GZ[:-20], r"a\.jsonl\.gz: cannot be read after line \d+ .*cut short or damaged; copy it again"),
    "gzip head": ("a.jsonl.gz", GZ[:5], r"a\.jsonl\.gz: cannot be read after line 0"),
    "gzip flipped": ("a.jsonl.gz", GZ[:200] + b"\0\0\0\0" + GZ[204:], r"a\.jsonl\.gz: cannot be read after line"),
    "not gzip": ("a.jsonl.gz", GOOD, r"a\.jsonl\.gz: cannot be read after line 0 \(Not a gzipped file"),
    "zstd cut": ("a.jsonl.zst", ZST[:-20], r"a\.jsonl\.zst: cannot be read after line \d+ \(Truncated"),
    "zstd head": ("a.jsonl.zst", ZST[:9], r"a\.jsonl\.zst: cannot be read after line 0 \(Truncated"),
    "not zstd": ("a.jsonl.zst", GOOD, r"a\.jsonl\.zst: cannot be read after line 0"),
    "empty zstd": ("a.jsonl.zst", b"", "there was nothing to read"),
    "not Parquet": ("a.parquet", GOOD, r"a\.parquet: is not a Parquet file, or is cut short"),
    "empty Parquet": ("a.parquet", b"", r"a\.parquet: is not a Parquet file, or is cut short: Parquet file size is 0 bytes"),
    "Parquet cut": ("a.parquet", PARQUET[:-9], r"a\.parquet: is not a Parquet file, or is cut short"),
    "Parquet head": ("a.parquet", PARQUET[:9], r"a\.parquet: is not a Parquet file, or is cut short"),
    "Parquet pages": ("a.parquet", BROKEN_PAGES, r"a\.parquet: row 1 \(row group 0\) cannot be read: .*copy it again"),
    "no column": (
        "a.parquet",
        parquet(body=TEXTS, id=range(203)),
        r"no column 'text'; its columns are body, id: choose with",
    ),
    "a column of numbers": ("a.parquet", parquet(text=range(203)), r"the column 'text' holds int64, not text"),
    "a doubled column": (
        "a.parquet",
        parquet("text", text=TEXTS),
        r"a\.parquet: has 2 columns 'text', .* another column with --text-field",
    ),
    "a column of lists": ("a.parquet", parquet(text=[["a"]] * 9), r"the column 'text' holds list"),
    "a null": ("a.parquet", parquet(text=[*TEXTS, None]), r"a\.parquet: row 204: the text is null"),
    "no rows": ("a.parquet", parquet(text=pa.array([], pa.string())), "there was nothing to read"),
    "a text file": (
        "a.txt",
        GOOD,
        r"--source .*a\.txt: is a file that does not end in \.jsonl, .*\.parquet, \.json, as .*; rename it if it is one, or give",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_broken_sources_exit_with_2_and_one_message(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    name, content, message = REFUSALS[case]
    (tmp_path / name).write_bytes(content)
    options = ["--tokenizer", model, "--held-out", "0.1"]
    assert run(monkeypatch, "--source", tmp_path / name, "--out", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    with pytest.raises(DataError, match=f"(?s){message}"):
        raise DataError(error)
    assert error.count("error: ") == 1
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "hf:"], "expected hf:NAME"),
        (["--source", "hf:a:b:c:d"], "expected hf:NAME"),
        (["--source", "hf:FOLDER::nope"], r"Bad split: nope.*check the name, the configuration and the split"),
        (["--source", "hf:FOLDER:nope"], r"BuilderConfig 'nope' not found"),
        (["--source", "hf:FOLDER", "--text-field", "body"], r"has no column 'body'; its columns are id, text"),
        (
            ["--source", "hf:./nothing-here"],
            r"hf:\./nothing-here: no such folder \./nothing-here; name one, or a dataset of the hub",
        ),
        (["--source", "FILE", "--tokenizer", "hf:./nothing-here"], r"--tokenizer hf:\./nothing-here: no such file or folder"),
        (["--source", "FILE", "--max-bad", "2"], "--max-bad 2: expected a share"),
        (["--source", "FILE", "--max-bad", "x%"], "--max-bad x%: expected a share"),
        (["--source", "FILE", "--max-tokens", "0"], "--max-tokens 0: expected a number of tokens"),
        (["--source", "FILE", "--max-tokens", "many"], "--max-tokens many: expected a number"),
        (["--source", "FILE", "--workers", "0"], "Invalid value for '--workers'"),
        (["--source", "FILE", "--held-out", "0"], "not a share between 0 and 1"),
        (["--source", "FILE", "--vocab-size", "300", "--eos", "x"], "--bos and --eos go with --tokenizer"),
        (["--source", "FILE", "--source", "FILE"], "given twice"),
        (["--source", "missing.jsonl"], r"missing\.jsonl: no such file or folder"),
    ],
)
def test_arguments_that_are_refused(
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "0.parquet", TEXTS)
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    words = [word.replace("FOLDER", str(tmp_path / "set")).replace("FILE", str(tmp_path / "a.jsonl")) for word in arguments]
    words += [] if {"--eos", "--tokenizer"} & set(words) else ["--tokenizer", str(model)]
    assert run(monkeypatch, *words, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    with pytest.raises(DataError, match=f"(?s){message}"):
        raise DataError(error)
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_an_unreachable_hub_is_one_message(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*words: object, **options: object) -> None:
        assert "trust_remote_code" not in options
        raise ConnectionError("Couldn't reach 'a/b' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"^--source hf:a/b: example 1 .*Couldn't reach 'a/b' on the Hub; check the network"):
        prepare("hf:a/b", tmp_path / "out", tokenizer=model, workers=1)


def test_malformed_lines_below_the_limit_are_counted_and_shown(tmp_path: Path, model: Path) -> None:
    content = GOOD.split(b"\n")
    content[3:3] = [b"{", b'{"text": ""}', b"[]", b"\xff", b'{"text": 1}', b"{}", b"nan nan"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(content))
    prepared = prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer=model, held_out=0.1, max_bad=0.1)
    assert prepared.manifest.statistics.skipped == {"not_utf8": 0, "unreadable": 0, "empty": 1, "malformed": 6}
    assert "6 malformed" in prepared.report()
    assert "a.jsonl:4: not JSON" in prepared.report()
    found = documents(tmp_path / "out")
    assert sorted(found["train"] + found["heldout"]) == sorted(TEXTS)
    with pytest.raises(DataError, match=r"6 of 210 records in all are malformed, more than --max-bad 0\.1%(?s:.*)--max-bad 2\.9%"):
        prepare(str(tmp_path / "a.jsonl"), tmp_path / "no", tokenizer=model, held_out=0.1)


def test_a_hundred_thousand_lines_are_quick(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(b'{"text": "line %d of a small file"}\n' % n for n in range(100_000)))
    began = time.monotonic()
    prepared = prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer=model)
    assert sum(prepared.manifest.statistics.documents.values()) == 100_000
    assert time.monotonic() - began < 30
