from __future__ import annotations

import os
from pathlib import Path

import pytest

from longtrain.data.corpus import STDLIB_HELD_OUT, Document, Skipped, find_corpus, find_stdlib
from longtrain.data.records import TextFiles
from longtrain.errors import DataError


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")
    return folder


def names(source: Path, *globs: str) -> set[str]:
    return {document.name for document in find_corpus(source, globs=globs).documents}


def test_globs(tmp_path: Path) -> None:
    every = ["a.txt", "B.TXT", "sub/b.md", "sub/deep/c.txt", "d.json", "e(1).py", "sub/é ü.txt"]
    fill(tmp_path, *every, ".hidden.txt", ".git/x.txt", "sub/.cache/y.txt")
    assert names(tmp_path) == set(every) - {"d.json"}
    assert names(tmp_path, "**/*.txt") == {"a.txt", "sub/deep/c.txt", "sub/é ü.txt"}
    assert names(tmp_path, "*.txt", "sub/**") == {"a.txt", "sub/b.md", "sub/deep/c.txt", "sub/é ü.txt"}
    assert names(tmp_path, "**/e(1).py", "?.json", "sub/*") == {"e(1).py", "d.json", "sub/b.md", "sub/é ü.txt"}


def test_the_order_depends_on_names_and_seed_alone(tmp_path: Path) -> None:
    files = [f"{n % 4}/{n}.txt" for n in range(60)]
    a = find_corpus(fill(tmp_path / "a", *files), seed=1)
    b = find_corpus(fill(tmp_path / "elsewhere" / "b", *reversed(files)), seed=1)
    c = find_corpus(tmp_path / "a", seed=2)
    order = [[document.name for document in corpus.documents] for corpus in (a, b, c)]
    assert order[0] == order[1] != order[2]
    assert order[0] != sorted(order[0])
    fill(tmp_path / "a", "new.txt")
    grown = find_corpus(tmp_path / "a", seed=1)
    assert [document.name for document in grown.documents if document.name != "new.txt"] == order[0]


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", "a.txt", "sub/b.txt")
    other = fill(tmp_path / "other", "c.txt", "d.txt")
    (source / "sub" / "up").symlink_to(source, target_is_directory=True)
    (source / "self").symlink_to(source / "self")
    (source / "linked").symlink_to(other, target_is_directory=True)
    (source / "again").symlink_to(other, target_is_directory=True)
    (source / "a2.txt").symlink_to(source / "a.txt")
    (source / "gone.txt").symlink_to(source / "nowhere.txt")
    os.mkfifo(source / "pipe.txt")
    corpus = find_corpus(source)
    found = {document.name for document in corpus.documents}
    assert found == {"a.txt", "sub/b.txt", "again/c.txt", "again/d.txt"}
    assert sorted(corpus.skipped.examples["unreadable"]) == ["gone.txt", "self"]


def test_reading(tmp_path: Path) -> None:
    source = fill(tmp_path, *(f"{n}.txt" for n in range(6)))
    (source / "0.txt").write_bytes(b"caf\xe9")
    (source / "1.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    (source / "2.txt").write_text(" \n")
    corpus = find_corpus(source)
    (source / "3.txt").unlink()
    texts, skipped = read(corpus.documents)
    assert "0.txt" not in texts
    assert texts["1.txt"] == "with a mark"
    assert texts["4.txt"] == "text of 4.txt"
    assert skipped.counts() == {"not_utf8": 1, "unreadable": 1, "empty": 0, "malformed": 0}
    assert str(skipped) == "1 not UTF-8 (0.txt); 1 unreadable (3.txt)"


def test_of_what_is_skipped_the_first_few_are_shown() -> None:
    skipped = Skipped()
    for n in range(9):
        skipped.add("empty", f"a{n}")
    later = Skipped()
    later.add("empty", "b")
    skipped.extend(later)
    later.add("malformed", "c")
    assert skipped.counts()["empty"] == 10
    assert str(skipped) == "10 empty (a0, a1, a2, ...)"


def read(documents: tuple[Document, ...]) -> tuple[dict[str, str], Skipped]:
    texts, skipped = {}, Skipped()
    for record in TextFiles(documents).records("text"):
        if record.problem is None:
            texts[record.name] = record.text
        else:
            skipped.add(record.problem, record.name)
    return texts, skipped


def test_files_of_records_are_told_from_text(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt", "b.md", "c.jsonl", "sub/d.JSONL.gz", "e.parquet", "f.json.zst", "g.json")
    with pytest.raises(DataError, match=r"2 text files .* and 4 files of records .*--glob '\*\*/\*\.jsonl'"):
        find_corpus(tmp_path)
    only = find_corpus(tmp_path, globs=["**/*.jsonl", "**/*.JSONL.gz"])
    assert [container.name for container in only.containers] == ["c.jsonl", "sub/d.JSONL.gz"]
    assert only.documents == ()
    both = find_corpus(tmp_path, globs=["**"])
    assert {document.name for document in both.documents} == {"a.txt", "b.md", "g.json"}
    assert len(both.containers) == 4


def test_folders_without_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        find_corpus(tmp_path / "none")
    with pytest.raises(DataError, match="no readable files at all"):
        find_corpus(tmp_path)
    fill(tmp_path, "a.json", "b.json", "c.png", "d")
    with pytest.raises(DataError, match=r"found 2 x \.json, 1 x \.png, 1 x no suffix\. Name them with --glob"):
        find_corpus(tmp_path)
    with pytest.raises(DataError, match=r"looked for --glob \*\.xyz"):
        find_corpus(tmp_path, globs=["*.xyz"])
    with pytest.raises(DataError, match=r"is a file that does not end in .*, or give its folder"):
        find_corpus(tmp_path / "a.json")


def test_held_out_by_name(tmp_path: Path) -> None:
    source = fill(tmp_path, *(f"{n}.txt" for n in range(5)))
    assert {document.held_out for document in find_corpus(source).documents} == {None}
    chosen = find_corpus(source, held_out=frozenset({"3.txt"})).documents
    assert {document.name: document.held_out for document in chosen} == {f"{n}.txt": n == 3 for n in range(5)}
    with pytest.raises(DataError, match=r"let --glob match x\.txt"):
        find_corpus(source, held_out=frozenset({"x.txt"}))
    with pytest.raises(DataError, match="none is left to train on"):
        find_corpus(source, globs=["0.txt"], held_out=frozenset({"0.txt"}))


def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt", "b.txt")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")).write_bytes(b"\xff")
    corpus = find_corpus(tmp_path)
    assert str(read(corpus.documents)[1]) == "1 not UTF-8 (?.txt)"


def test_the_standard_library(tmp_path: Path) -> None:
    corpus = find_stdlib()
    assert {document.name for document in corpus.documents if document.held_out} == STDLIB_HELD_OUT
    train = {document.name for document in corpus.documents if not document.held_out}
    assert {"os.py", "collections/__init__.py"} <= train
    assert not any(name.startswith(("test/", "site-packages/")) or "/tests/" in name for name in train)
    assert sum(document.path.stat().st_size for document in corpus.documents) > 5_000_000
    with pytest.raises(DataError, match=r"let --glob match argparse\.py"):
        find_stdlib(globs=["email/*.py"])
