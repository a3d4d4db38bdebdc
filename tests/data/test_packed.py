from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtrain.batch import IGNORE
from longtrain.data.manifest import check_model_vocab, read_manifest
from longtrain.data.packed import PackedSplit, context_share, context_warning
from longtrain.errors import DataError
from longtrain.recipe.schema import LongDocuments

WritePrepared = Callable[..., Path]


def number(lengths: list[int]) -> list[list[int]]:
    """Documents of the given lengths whose tokens are all different."""
    ends = np.cumsum(lengths)
    return [list(range(end - length, end)) for length, end in zip(lengths, ends, strict=True)]


def slow_sequence(
    documents: list[list[int]], T: int, index: int
) -> tuple[list[int], list[int], list[int], list[int], tuple[int, ...]]:
    """The obvious truth, token by token."""
    stream = [(token, name, place) for name, document in enumerate(documents) for place, token in enumerate(document)]
    tokens, labels, positions, segments, borders = [], [], [], [], [0]
    for place in range(index * T, index * T + T):
        token, name, _ = stream[place]
        if place > index * T and name != stream[place - 1][1]:
            borders.append(place - index * T)
        tokens.append(token)
        positions.append(place - index * T - borders[-1])
        segments.append(len(borders) - 1)
        labels.append(stream[place + 1][0] if place + 1 < len(stream) and stream[place + 1][1] == name else IGNORE)
    return tokens, labels, positions, segments, (*borders, T)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 3) | st.integers(1, 40), min_size=1, max_size=25),
    T=st.integers(1, 24),
    shard_tokens=st.sampled_from([1, 7, 30, 10**6]),
    wide=st.booleans(),
)
def test_every_sequence_equals_the_slow_truth(
    tmp_path_factory: pytest.TempPathFactory,
    write_prepared: WritePrepared,
    lengths: list[int],
    T: int,
    shard_tokens: int,
    wide: bool,
) -> None:
    documents = number(lengths)
    vocab_size = 70_000 if wide else 1000
    if wide:
        documents = [[token + 66_000 for token in document] for document in documents]
    folder = tmp_path_factory.mktemp("packed") / "data"
    write_prepared(folder, documents, vocab_size=vocab_size, shard_tokens=shard_tokens)
    if sum(lengths) < T:
        with pytest.raises(DataError, match=f"{sum(lengths)} tokens, fewer than one sequence of {T}"):
            PackedSplit(folder, "train", T)
        return
    split = PackedSplit(folder, "train", T)
    assert (len(split), split.tokens, split.documents) == (sum(lengths) // T, sum(lengths), len(lengths))
    seen = 0
    for index in range(len(split)):
        row = split.sequence(index)
        tokens, labels, positions, segments, boundaries = slow_sequence(documents, T, index)
        assert row.tokens.tolist() == tokens
        assert row.labels.tolist() == labels
        assert row.positions.tolist() == positions
        assert row.segment_ids.tolist() == segments
        assert row.boundaries == boundaries
        assert [array.dtype for array in row[:4]] == [np.int64, np.int64, np.int64, np.int32]
        seen += sum(4 * position > T for position in positions)
    assert split.context_share() == pytest.approx(seen / (len(split) * T))
    split.verify()


def reference_spans(documents: list[list[int]], T: int, mode: str) -> list[tuple[list[int], int | None]]:
    """What is packed, as (tokens, the token of the same document that comes after them)."""
    pieces, others = [], []
    for document in documents:
        if len(document) <= T or mode == "keep":
            others.append((document, None))
        elif mode == "split":
            cuts = [*range(0, len(document), T), len(document)]
            for start, stop in itertools.pairwise(cuts):
                after = document[stop] if stop < len(document) else None
                (pieces if stop - start == T else others).append((document[start:stop], after))
    return pieces + others


@settings(deadline=None, max_examples=80)
@given(
    lengths=st.lists(st.integers(1, 5) | st.integers(1, 60), min_size=1, max_size=20),
    T=st.integers(1, 16),
    shard_tokens=st.sampled_from([1, 30, 10**6]),
    mode=st.sampled_from(["keep", "split", "drop"]),
)
def test_long_documents_equal_the_slow_truth(
    tmp_path_factory: pytest.TempPathFactory,
    write_prepared: WritePrepared,
    lengths: list[int],
    T: int,
    shard_tokens: int,
    mode: str,
) -> None:
    documents = number(lengths)
    folder = write_prepared(tmp_path_factory.mktemp("long") / "data", documents, shard_tokens=shard_tokens, vocab_size=2000)
    spans = reference_spans(documents, T, mode)
    whole = sum(len(tokens) for tokens, _ in spans) // T
    if not whole:
        with pytest.raises(DataError, match="fewer than one sequence"):
            PackedSplit(folder, "train", T, LongDocuments(mode))
        return
    split = PackedSplit(folder, "train", T, LongDocuments(mode))
    assert len(split) == whole
    assert (split.tokens, split.documents) == (sum(lengths), len(lengths))
    stream = [
        (token, name, place, [*tokens, after][place + 1] if place + 1 < len(tokens) or after is not None else IGNORE)
        for name, (tokens, after) in enumerate(spans)
        for place, token in enumerate(tokens)
    ]
    for index in range(whole):
        row = split.sequence(index)
        part = stream[index * T : index * T + T]
        borders = [0] + [place for place in range(1, T) if part[place][1] != part[place - 1][1]]
        assert row.tokens.tolist() == [token for token, _, _, _ in part]
        assert row.labels.tolist() == [label for _, _, _, label in part]
        assert row.boundaries == (*borders, T)
        assert row.positions.tolist() == [place - max(b for b in borders if b <= place) for place in range(T)]
        assert row.segment_ids.tolist() == [sum(b <= place for b in borders) - 1 for place in range(T)]


def test_split_gives_long_documents_sequences_of_their_own(tmp_path: Path, write_prepared: WritePrepared) -> None:
    folder = write_prepared(tmp_path / "data", number([3, 10, 2, 8]))
    split = PackedSplit(folder, "train", 4, LongDocuments.SPLIT)
    rows = [split.sequence(index) for index in range(len(split))]
    assert [row.tokens.tolist() for row in rows] == [[3, 4, 5, 6], [7, 8, 9, 10], [15, 16, 17, 18], [19, 20, 21, 22], [0, 1, 2, 11]]
    assert [row.labels.tolist()[-1] for row in rows] == [7, 11, 19, IGNORE, 12]
    drop = PackedSplit(folder, "train", 4, LongDocuments.DROP)
    assert [drop.sequence(0).tokens.tolist(), drop.sequence(0).boundaries] == [[0, 1, 2, 13], (0, 3, 4)]
    keep = PackedSplit(folder, "train", 4)
    assert split.context_share() > keep.context_share() > drop.context_share()
    assert len({keep.fingerprint, split.fingerprint, drop.fingerprint}) == 3
    assert keep.fingerprint == keep.manifest.fingerprint("train")
    with pytest.raises(DataError, match=r"5 tokens after data\.long_documents drop, fewer than one sequence of 7"):
        PackedSplit(folder, "train", 7, LongDocuments.DROP)


def test_a_whole_number_of_sequences_needs_no_further_token(tmp_path: Path, write_prepared: WritePrepared) -> None:
    split = PackedSplit(write_prepared(tmp_path / "data", number([3, 5])), "train", 4)
    assert len(split) == 2
    assert split.sequence(0).labels.tolist() == [1, 2, IGNORE, 4]
    assert split.sequence(1).labels.tolist() == [5, 6, 7, IGNORE]
    assert split.sequence(0).boundaries == (0, 3, 4)
    assert split.sequence(1).positions.tolist() == [0, 1, 2, 3]


def test_index_outside(tmp_path: Path, write_prepared: WritePrepared) -> None:
    split = PackedSplit(write_prepared(tmp_path / "data", number([8])), "train", 4)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            split.sequence(index)


def test_types_on_disk(tmp_path: Path, write_prepared: WritePrepared) -> None:
    narrow = write_prepared(tmp_path / "narrow", [[0, 65_535]], vocab_size=65_536)
    wide = write_prepared(tmp_path / "wide", [[0, 65_536]], vocab_size=65_537)
    assert (narrow / "train-00000.bin").read_bytes() == b"\x00\x00\xff\xff"
    assert (wide / "train-00000.bin").read_bytes() == b"\x00\x00\x00\x00\x00\x00\x01\x00"
    assert (wide / "train-00000.idx").read_bytes() == (2).to_bytes(8, "little")
    assert PackedSplit(wide, "train", 2).sequence(0).tokens.tolist() == [0, 65_536]


def test_a_document_stays_in_one_shard(tmp_path: Path, write_prepared: WritePrepared) -> None:
    folder = write_prepared(tmp_path / "data", number([5, 5, 20, 3]), shard_tokens=10)
    assert [shard.tokens for shard in read_manifest(folder).splits["train"]] == [10, 20, 3]


def test_context_share_by_hand() -> None:
    # T = 8, context above 2: one document of 16 gives positions 3..7 in both sequences; documents of 3 give none.
    assert context_share(np.array([16]), 8) == 10 / 16
    assert context_share(np.arange(3, 25, 3), 8) == 0
    assert context_share(np.array([8, 10, 12, 14, 16]), 8) == 5 / 16
    assert context_share(np.array([5]), 8) == 0
    assert context_warning(0.9, 8) is None
    assert "10%" in (context_warning(0.1, 8) or "")


def test_a_million_tokens_are_quick(tmp_path: Path, write_prepared: WritePrepared) -> None:
    T = 1 << 20
    split = PackedSplit(write_prepared(tmp_path / "data", [np.zeros(1000 + n % 500, int) for n in range(1700)]), "train", T)
    row = split.sequence(0)
    assert row.positions.max() == 1498
    assert row.boundaries[-1] == T


@pytest.fixture
def folder(tmp_path: Path, write_prepared: WritePrepared) -> Path:
    return write_prepared(tmp_path / "data", number([9, 4, 7]), shard_tokens=10)


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00001.bin", "train-00000.idx", "train-00001.idx"])
def test_truncated_grown_and_missing_files_are_named(folder: Path, name: str) -> None:
    path = folder / name
    content = path.read_bytes()
    for size in sorted({0, 1, len(content) // 2, len(content) - 1}):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match=rf"{name}: has {size} bytes, the manifest says {len(content)}"):
            PackedSplit(folder, "train", 4)
    path.write_bytes(content + b"\0")
    with pytest.raises(DataError, match=name):
        PackedSplit(folder, "train", 4)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}: cannot be read"):
        PackedSplit(folder, "train", 4)


@pytest.mark.parametrize("ends", [[4, 9], [13, 13], [0, 13], [-1, 13], [14, 13], [13, 14]])
def test_an_index_that_is_no_index_is_refused(tmp_path: Path, write_prepared: WritePrepared, ends: list[int]) -> None:
    folder = write_prepared(tmp_path / "data", number([9, 4]))
    (folder / "train-00000.idx").write_bytes(np.array(ends, "<i8").tobytes())
    with pytest.raises(DataError, match=r"train-00000\.idx: is no list of document ends"):
        PackedSplit(folder, "train", 4)


def test_verify_finds_one_flipped_bit_and_opening_does_not_read_everything(folder: Path) -> None:
    path = folder / "train-00001.bin"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    split = PackedSplit(folder, "train", 4)
    with pytest.raises(DataError, match=r"train-00001\.bin: is not what was written"):
        split.verify()


def test_verify_finds_ids_outside_the_vocabulary(tmp_path: Path, write_prepared: WritePrepared) -> None:
    split = PackedSplit(write_prepared(tmp_path / "data", [[5, 10, 3]], vocab_size=10), "train", 3)
    with pytest.raises(DataError, match="holds token 10"):
        split.verify()


def test_the_tokenizer_must_be_the_one_that_wrote_the_shards(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(DataError, match="tokenizer differs from the one that wrote the shards"):
        PackedSplit(folder, "train", 4)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.model"):
        PackedSplit(folder, "train", 4)


def test_model_vocabulary(folder: Path) -> None:
    manifest = read_manifest(folder)
    check_model_vocab(manifest, 1000)
    with pytest.raises(
        DataError, match=r"^model\.init w has 999 tokens, .* a tokenizer of 1000: prepare it again, .* --tokenizer\)$"
    ):
        check_model_vocab(manifest, 999, "w")
    with pytest.raises(DataError, match=r"model\.vocab_size to 1000"):
        check_model_vocab(manifest, 999)


def test_missing_folder_manifest_and_split(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data folder"):
        PackedSplit(tmp_path / "nothing", "train", 4)
    with pytest.raises(DataError, match="no split 'validation'; it has train, heldout"):
        PackedSplit(folder, "validation", 4)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no manifest\.json"):
        PackedSplit(folder, "train", 4)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 200_000, b"[]", b"{}", b'{"format": "other"}', b"null"])
def test_a_foreign_or_damaged_manifest_is_refused(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json: is not"):
        PackedSplit(folder, "train", 4)


def test_a_truncated_manifest_is_refused_wherever_it_is_cut(folder: Path) -> None:
    content = (folder / "manifest.json").read_bytes().rstrip()
    for size in range(0, len(content), 37):
        (folder / "manifest.json").write_bytes(content[:size])
        with pytest.raises(DataError, match=r"manifest\.json"):
            read_manifest(folder)


def edit(folder: Path, *path: str | int, value: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    place = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 2, "version 2, but this longtrain reads 1"),
        (("dtype",), "float32", "dtype"),
        (("dtype",), "uint32", "contradicts itself"),
        (("tokenizer", "sha256"), "abc", "tokenizer.sha256"),
        (("tokenizer", "file"), "../other.model", "tokenizer.file"),
        (("splits", "train", 0, "file"), "../../secret-00000.bin", "splits.train.0.file"),
        (("splits", "train", 0, "file"), "heldout-00000.bin", "contradicts itself"),
        (("splits", "train", 0, "tokens"), 9.5, "splits.train.0.tokens"),
        (("splits", "train", 0, "documents"), 0, "splits.train.0.documents"),
        (("splits", "train"), [], "no shards"),
        (("extra",), 1, "extra"),
    ],
)
def test_a_manifest_with_a_wrong_field_names_it(folder: Path, path: tuple[str | int, ...], value: object, message: str) -> None:
    edit(folder, *path, value=value)
    with pytest.raises(DataError, match=message):
        PackedSplit(folder, "train", 4)


def test_shards_of_another_folder_are_refused(folder: Path, tmp_path: Path, write_prepared: WritePrepared) -> None:
    other = write_prepared(tmp_path / "other", number([9, 5]))
    shutil.copy(other / "train-00000.bin", folder / "train-00000.bin")
    with pytest.raises(DataError, match="truncated or foreign"):
        PackedSplit(folder, "train", 4)
