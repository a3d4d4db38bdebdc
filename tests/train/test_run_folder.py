"""The folder of a run: what it says about itself, and whether all hosts mean the same one."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import longtrain
from longtrain.errors import CheckpointError, LaunchError
from longtrain.parallel.context import ParallelContext
from longtrain.recipe.load import load_recipe
from longtrain.train import run
from longtrain.train.run_folder import check_place, check_shared, check_writable, commit, occupy
from tests.distributed import run_ranks
from tests.tiny import tiny_recipe
from tests.user import snapshot, train

pytest_plugins = ("tests.desks",)


@pytest.mark.usefixtures("trained")
def test_a_run_explains_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "do not tell")
    assert train("--set", "training.steps=4").code == 0
    assert load_recipe(Path("run/recipe.yaml")).training.steps == 4
    plan = Path("run/plan.txt").read_text()
    assert "kernel           memory_efficient\n" in plan
    assert "  not reference" in plan
    first, second = (json.loads(line) for line in Path("run/environment.jsonl").read_text().splitlines())
    assert (first["after_step"], second["after_step"]) == (0, 3)
    assert second["versions"]["longtrain"] == longtrain.__version__
    assert [list(devices.values()) for devices in second["ranks"].values()] == [[1]]
    assert sys.argv[0] in second["command"]
    assert "do not tell" not in Path("run/environment.jsonl").read_text()


def git(folder: Path, *words: str) -> None:
    who = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    environment = {**os.environ, **who, "GIT_CONFIG_GLOBAL": os.devnull}
    subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, env=environment)


def test_commit(tmp_path: Path) -> None:
    package, stranger = tmp_path / "package", tmp_path / "venv" / "package"
    for folder in (package, stranger):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    assert commit(package) is None, "no repository"
    git(tmp_path, "init")
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-m", "first")
    found = commit(package)
    assert found is not None
    assert len(found) == 40
    assert commit(stranger) is None, "installed below a repository that does not hold it"
    (tmp_path / "elsewhere").write_text("untracked")
    assert commit(package) == found
    (package / "__init__.py").write_text("changed")
    assert commit(package) == f"{found}+changes"


def test_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(Path(longtrain.__file__).parent) is None


def _on_hosts(ctx: ParallelContext, folders: list[str], hosts: list[str]) -> str:
    """What the ranks, each on a host of its own, say of a run's folder: each sees another one under its name."""
    alone = replace(ctx, local_rank=0)
    try:
        check_shared(alone, Path(folders[ctx.rank]), host=hosts[ctx.rank], patience=0.2)
    except LaunchError as error:
        return str(error)
    return ""


def test_a_shared_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny"
    assert run_ranks(_on_hosts, 2, [str(folder)] * 2, ["north", "south"]) == ["", ""]
    assert list(tmp_path.iterdir()) == [], "no trace"
    folder.mkdir(parents=True)
    (folder / "mine").touch()
    assert run_ranks(_on_hosts, 2, [str(folder)] * 2, ["north", "south"]) == ["", ""]
    assert [path.name for path in folder.iterdir()] == ["mine"]


@pytest.mark.parametrize("there", [True, False], ids=["both there", "not there"])
def test_a_folder_of_each_host_is_refused(tmp_path: Path, there: bool) -> None:
    folders = [tmp_path / host / "runs" / "tiny" for host in ("north", "south")]
    for folder in folders:
        folder.mkdir(parents=True) if there else folder.parents[1].mkdir()
    before = sorted(tmp_path.rglob("*"))
    said = run_ranks(_on_hosts, 2, [str(folder) for folder in folders], ["north", "south"])
    assert said[0] == said[1]
    assert (
        said[0].startswith(f"output: the run's folder {folders[0]} of north is another one on south: ")
        or str(folders[1]) in said[1]
    )
    assert "set output to a folder on a file system that all hosts share" in said[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_the_main_host_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = run_ranks(_on_hosts, 2, [str(tmp_path / "file" / "run")] * 2, ["north", "south"])
    assert said[0] == said[1]
    assert "cannot be written: Not a directory; set another output" in said[0]


def _on_one_host(ctx: ParallelContext, folder: str) -> None:
    check_shared(ctx, Path(folder), patience=0.0)


def test_one_host_writes_nothing(tmp_path: Path) -> None:
    run_ranks(_on_one_host, 2, str(tmp_path / "file" / "\0 impossible"))


def test_a_folder_of_a_run_may_hold_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe("output=run")
    check_place(recipe)
    Path("run").mkdir()
    Path("run", "log.txt").touch()
    check_place(recipe)
    Path("run", "plan.txt").touch()
    with pytest.raises(LaunchError, match=r"output: run holds a plan\.txt that no run wrote"):
        check_place(recipe)
    for name in ("environment.jsonl", "metrics.jsonl", "checkpoints"):
        Path("run", name).touch()
        check_place(recipe)
        Path("run", name).unlink()


def test_writable(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match="is not a folder; set another output"):
        check_writable(tmp_path / "file" / "b")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with occupy(folder), pytest.raises(CheckpointError, match=r"run: another process trains into it .*environment\.jsonl"):
        occupy(folder)
    occupy(folder).close()


def test_where_nothing_can_be_locked_nobody_is_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unable)
    with occupy(tmp_path), occupy(tmp_path):
        pass


@pytest.mark.usefixtures("trained")
def test_another_process_in_the_folder_is_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    more = ("--set", "training.steps=5")
    before = snapshot()
    with occupy(Path("run")):
        said = train(*more)
    assert said.code == 2
    assert "error: run: another process trains into it" in said.text
    assert snapshot() == before
    inner = run.assemble

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        shutil.copytree("run/checkpoints/step-00000003", "run/checkpoints/step-00000004")
        return inner(*arguments, **options)

    monkeypatch.setattr(run, "assemble", meanwhile)
    said = train(*more)
    assert said.code == 2
    assert "error: run: another process has saved step-00000004 there since this one looked" in said.text
    assert "start again" in said.text
    shutil.rmtree("run/checkpoints/step-00000004")
    assert snapshot() == before
