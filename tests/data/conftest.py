from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from longtrain.data.corpus import Skipped
from longtrain.data.manifest import TOKENIZER, TokenizerEntry, token_dtype_name
from longtrain.data.prepare import make_manifest
from longtrain.data.shards import SplitWriter, write_manifest
from longtrain.data.tokenizer import train_tokenizer

WritePrepared = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_model() -> bytes:
    sentences = [f"def function_{n}(x):\n\n    return x + {n}  # the {n}th, für alle\n\tpass\n" for n in range(50)]
    return train_tokenizer(sentences, 320)


@pytest.fixture(scope="session")
def write_prepared() -> WritePrepared:
    def write(
        folder: Path,
        train: Sequence[Sequence[int]],
        heldout: Sequence[Sequence[int]] = ((1, 2),),
        vocab_size: int = 1000,
        shard_tokens: int = 1 << 20,
    ) -> Path:
        """A prepared folder of given token documents; its tokenizer.model is no model, only bytes to be hashed."""
        folder.mkdir()
        (folder / TOKENIZER).write_bytes(b"model")
        writers = {}
        for split, documents in (("train", train), ("heldout", heldout)):
            dtype = np.dtype(token_dtype_name(vocab_size)).newbyteorder("<")
            with SplitWriter(folder, split, dtype, shard_tokens) as writer:
                for document in documents:
                    writer.add(document)
            writers[split] = writer
        entry = TokenizerEntry(sha256=hashlib.sha256(b"model").hexdigest(), vocab_size=vocab_size, bos=1, eos=2)
        write_manifest(folder, make_manifest(writers, entry, Skipped(), 0))
        return folder

    return write


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """40 documents of different lengths in nested folders."""
    source = tmp_path / "text"
    for n in range(40):
        path = source / f"part{n % 3}" / f"document{n}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"Line {line} of document {n}: the quick brown fox.\n" for line in range(1 + 3 * n)))
    return source


@pytest.fixture(scope="session")
def json_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json as GPT-2's, with <s>, </s> and <pad> as tokens 0, 1 and 2."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog, line by line\n"] * 20, trainer)
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    made.save(str(path))
    return path
