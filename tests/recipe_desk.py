"""A desk for many recipes as a fixture: `pytest_plugins = ("tests.recipe_desk",)`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_wandb import FakeWandb
from tests.user import sit_at_desk


@pytest.fixture(scope="module")
def recipe_desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A current folder with three prepared corpora, and a wandb that sends nothing."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("desk")
        sit_at_desk(root, patch)
        patch.setitem(sys.modules, "wandb", FakeWandb())
        write_data(root / "other", vocab_size=300)
        write_data(root / "more", tokenizer="data/tokenizer.model")
        yield


def write_data(out: Path, **options: Any) -> None:
    from longtrain.data.prepare import prepare

    text = out.with_name("text")
    text.mkdir(exist_ok=True)
    for number in range(20):
        (text / f"{number}.txt").write_text(f"Another text, number {number}, about nothing at all.\n" * 9)
    prepare(str(text), out, held_out=0.25, **options)
