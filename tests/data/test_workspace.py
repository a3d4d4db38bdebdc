from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from longtrain.data.workspace import JOURNAL, Journal, work_folder
from longtrain.errors import DataError

PLAN = {"--seed": 0, "--text-field": "text"}


def old_data(out: Path) -> Path:
    out.mkdir()
    (out / "manifest.json").write_text("old")
    return out


def write_new(folder: Path) -> None:
    (folder / "manifest.json").write_text("new")


def replace(out: Path, then: Callable[[], object], overwrite: bool = True) -> None:
    """Write new data to `out`, and call `then` before it takes its place."""
    with work_folder(out, PLAN, overwrite) as folder:
        write_new(folder)
        then()


def test_the_folder_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with work_folder(out, PLAN, overwrite=False) as folder:
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
    with work_folder(out, PLAN, overwrite=True) as folder:
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
    with pytest.raises(DataError, match="not empty"), work_folder(out, PLAN, overwrite=False):
        pass
    assert (out / "manifest.json").read_text() == "old"


def test_targets_that_are_refused(tmp_path: Path) -> None:
    out = old_data(tmp_path / "out")
    with pytest.raises(DataError, match="--overwrite"), work_folder(out, PLAN, overwrite=False):
        pass
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match=r"holds 'thesis\.tex'"), work_folder(out, PLAN, overwrite=True):
        pass
    with pytest.raises(DataError, match="is a file"), work_folder(out / "thesis.tex", PLAN, overwrite=True):
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
    with work_folder(out, PLAN, overwrite=False) as folder:
        write_new(folder)
    assert (out / "manifest.json").read_text() == "new"


def unfinished(out: Path, journal: bool = True) -> None:
    """What an error leaves of a preparation."""

    def work() -> None:
        with work_folder(out, PLAN, overwrite=False) as folder:
            (folder / "train-00000.bin").write_text("work")
            if journal:
                (folder / JOURNAL).write_text("{}")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()


def test_unfinished_work_waits_for_the_same_plan(tmp_path: Path) -> None:
    out = tmp_path / "out"
    unfinished(out)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    with pytest.raises(DataError, match=r"unfinished preparation that differs in: --seed; .*--overwrite"):
        replace_plan(out, overwrite=False)
    with work_folder(out, dict(reversed(PLAN.items())), overwrite=False) as folder:
        assert (folder / "train-00000.bin").read_text() == "work"
        write_new(folder)
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "train-00000.bin"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unfinished_work_of_another_plan_is_thrown_away_when_told(tmp_path: Path) -> None:
    unfinished(tmp_path / "out")
    replace_plan(tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]


def replace_plan(out: Path, overwrite: bool) -> None:
    with work_folder(out, PLAN | {"--seed": 1}, overwrite=overwrite) as folder:
        write_new(folder)


def test_a_plan_that_cannot_be_read_is_another_one(tmp_path: Path) -> None:
    unfinished(tmp_path / "out")
    for content in ("", 100_000 * "["):
        (tmp_path / ".out.partial" / "plan.json").write_text(content)
        with pytest.raises(DataError, match=r"unfinished preparation that differs in: --seed, --text-field; .*--overwrite"):
            replace_plan(tmp_path / "out", overwrite=False)


def test_work_that_has_only_begun_is_not_kept(tmp_path: Path) -> None:
    unfinished(tmp_path / "out", journal=False)
    assert not list(tmp_path.iterdir())


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with work_folder(tmp_path / "out", PLAN, overwrite=False) as folder:
        write_new(folder)
        with pytest.raises(DataError, match="another process is preparing it"), work_folder(tmp_path / "out", PLAN, False):
            pass
    assert (tmp_path / "out" / "manifest.json").read_text() == "new"


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"{}", b"[]", b'{"skipped": 3}', b"\xff"):
        (tmp_path / JOURNAL).write_bytes(content)
        with pytest.raises(DataError, match=r"journal\.json: is damaged; start over"):
            Journal.load(tmp_path)
