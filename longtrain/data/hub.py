"""Datasets that the `datasets` library reads: of the Hugging Face hub, a local folder, or one of its save_to_disk."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtrain.data.records import Examples, Step, first_line
from longtrain.errors import DataError

PREFIX = "hf:"

EXAMPLES = 256
"""Examples of one piece; a few long documents go alone."""

CHARACTERS = 1 << 20


def is_path(name: str) -> bool:
    """Whether what stands behind PREFIX is a path, of something or nothing: no name of the hub looks like it."""
    return name.startswith((".", "/")) or name.count("/") > 1


@dataclass(frozen=True)
class HubSource:
    """`hf:NAME[:CONFIG[:SPLIT]]`, streamed: nothing is copied to the disk. Code that a dataset brings is never run."""

    name: str
    dataset: str
    config: str | None
    split: str
    size: None = None
    documents: None = None

    @classmethod
    def parse(cls, text: str) -> HubSource:
        """DataError where the text is not of that form, or names a folder that is not there or has no configurations."""
        dataset, *more = text.removeprefix(PREFIX).split(":")
        if not dataset or len(more) > 2:
            raise DataError(f"--source {text}: expected {PREFIX}NAME, {PREFIX}NAME:CONFIG or {PREFIX}NAME:CONFIG:SPLIT")
        if is_path(dataset) and not Path(dataset).exists():
            raise DataError(f"--source {text}: no such folder {dataset}; name one, or a dataset of the hub as {PREFIX}OWNER/NAME")
        source = cls(text, dataset, (more[0] or None) if more else None, more[1] if more[1:] and more[1] else "train")
        if source.config is not None and source._saved:
            raise DataError(
                f"--source {text}: {dataset} is of save_to_disk, which knows no configurations such as {source.config!r}; leave it "
                f"out: {PREFIX}{dataset}, or {PREFIX}{dataset}::SPLIT"
            )
        return source

    @property
    def _saved(self) -> bool:
        """Whether it is a folder of save_to_disk."""
        folder = Path(self.dataset)
        return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()

    def identity(self) -> Any:
        return self.name

    def steps(self, field: str, after: Any = None) -> Iterator[Step]:
        """As sources.Source."""
        done, state = after or (0, None)
        try:
            stream = self._open(field)
            if state is not None:
                stream.load_state_dict(state)
            examples = iter(stream)
            while texts := self._take(examples, field, done):
                piece = Examples(self.name, done + 1, tuple(texts))
                done += len(texts)
                yield Step(piece, [done, stream.state_dict()], 0)
        except (DataError, GeneratorExit):
            raise
        except Exception as error:  # the libraries below raise what they like: of the network, of files, of their own
            raise DataError(f"--source {self.name}: example {done + 1} cannot be read: {_reason(error)}") from None

    def _open(self, field: str) -> Any:
        """The stream of the one column."""
        import datasets  # seconds to import
        import huggingface_hub.utils.logging

        # ours are the only messages
        huggingface_hub.utils.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        if self._saved:
            saved = datasets.load_from_disk(self.dataset)
            if isinstance(saved, datasets.DatasetDict):
                if self.split not in saved:
                    raise DataError(f"--source {self.name}: has no split {self.split!r}; it has {', '.join(map(str, saved))}")
                saved = saved[self.split]
            elif self.split not in ("train", str(saved.split)):
                raise DataError(
                    f"--source {self.name}: holds one dataset and no split {self.split!r}; name it {PREFIX}{self.dataset}"
                )
            stream = saved.to_iterable_dataset()
        else:
            stream = datasets.load_dataset(self.dataset, self.config, split=self.split, streaming=True)
        columns = stream.column_names or list(next(iter(stream), {}))
        if columns and field not in columns:
            raise DataError(
                f"--source {self.name}: has no column {field!r}; its columns are {', '.join(columns)}: choose with --text-field"
            )
        return stream.select_columns([field]) if columns else stream

    def _take(self, examples: Iterator[dict[str, object]], field: str, done: int) -> list[object]:
        texts: list[object] = []
        size = 0
        for example in itertools.islice(examples, EXAMPLES):
            text = example.get(field)
            texts.append(text)
            size += len(text) if isinstance(text, str) else 0
            if size >= CHARACTERS:
                break
        return texts


def _reason(error: Exception) -> str:
    """What went wrong, and what to do."""
    if isinstance(error, ConnectionError) or "Connection" in type(error).__name__:
        advice = "check the network, or get the dataset's files by other means and name them"
    elif "scripts are no longer supported" in str(error):
        advice = "code of a dataset is never run here: choose a copy of it in Parquet or JSON"
    else:
        advice = "check the name, the configuration and the split: hf:NAME:CONFIG:SPLIT"
    return f"{first_line(error)}; {advice}"
