from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from longtrain.data.shards import whole_folder
from longtrain.errors import DataError


def old_data(out: Path) -> Path:
    out.mkdir()
    (out / "manifest.json").write_text("old")
    return out


def write_new(folder: Path) -> None:
    (folder / "manifest.json").write_text("new")


def replace(out: Path, then: Callable[[], object], overwrite: bool = True) -> None:
    """Write new data to `out`, and call `then` before it takes its place."""
    with whole_folder(out, overwrite) as folder:
        write_new(folder)
        then()


def test_the_folder_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with whole_folder(out, overwrite=False) as folder:
        write_new(folder)
        assert not out.exists()
    assert (out / "manifest.json").read_text() == "new"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing_new_and_everything_old(tmp_path: Path, error: type[BaseException]) -> None:
    out = old_data(tmp_path / "out")

    def interrupt() -> None:
        raise error

    for target, left in ((tmp_path / "fresh", ["out"]), (out, ["out"])):
        with pytest.raises(error):
            replace(target, interrupt)
        assert [path.name for path in tmp_path.iterdir()] == left
    assert (out / "manifest.json").read_text() == "old"


def test_overwrite_replaces(tmp_path: Path) -> None:
    out = old_data(tmp_path / "out")
    with whole_folder(out, overwrite=True) as folder:
        write_new(folder)
        assert (out / "manifest.json").read_text() == "old"
    assert (out / "manifest.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_swap_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    out = old_data(tmp_path / "out")
    rename, calls = Path.rename, []

    def fail(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == failing:
            raise OSError("no rename today")
        return rename(self, target)

    with pytest.raises(OSError, match="no rename"):
        replace(out, lambda: monkeypatch.setattr(Path, "rename", fail))
    assert (out / "manifest.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_swap_cut_between_its_renames_is_undone(tmp_path: Path) -> None:
    old_data(tmp_path / ".out.replaced")
    out = tmp_path / "out"
    with pytest.raises(DataError, match="not empty"), whole_folder(out, overwrite=False):
        pass
    assert (out / "manifest.json").read_text() == "old"


def test_targets_that_are_refused(tmp_path: Path) -> None:
    out = old_data(tmp_path / "out")
    with pytest.raises(DataError, match="--overwrite"), whole_folder(out, overwrite=False):
        pass
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match=r"holds 'thesis\.tex'"), whole_folder(out, overwrite=True):
        pass
    with pytest.raises(DataError, match="is a file"), whole_folder(out / "thesis.tex", overwrite=True):
        pass
    assert sorted(os.listdir(out)) == ["manifest.json", "thesis.tex"]


def test_a_file_put_into_the_target_meanwhile_survives(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match="not empty"):
        replace(out, lambda: old_data(out), overwrite=False)
    assert (out / "manifest.json").read_text() == "old"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with whole_folder(out, overwrite=False) as folder:
        write_new(folder)
    assert (out / "manifest.json").read_text() == "new"
